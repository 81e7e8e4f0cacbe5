"""Let the policy use a calculator, as an example of a rollout hook with a tool.

    rollout: {hook: "frpo.rollout.calculator:rollout"}

The policy writes an expression and `=`, the calculator adds the value, and the policy continues. The policy learns when
to call the calculator. The calculator's tokens are context: the loss does not train on them. The expression is the
arithmetic at the end of the turn: numbers, + - * / and parentheses, as in "that is 48/2=".
"""
from __future__ import annotations

import ast
import operator
import re
from fractions import Fraction

from frpo.rollout.hook import Client, Episode, Transcript
from frpo.types import Prompt

_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_EXPRESSION = re.compile(r"[0-9(.\-][0-9+\-*/(). ]{0,63}$")


async def rollout(prompt: Prompt, client: Client) -> Episode:
    """Sample turns until a turn does not end in `=`, or no room is left."""
    equals = client.tokenizer.convert_tokens_to_ids("=")
    transcript = Transcript(prompt)
    while True:
        turn = await client.generate(transcript.context, stop_token_ids=[equals])
        transcript.add_policy_turn(turn)
        if not turn.token_ids or turn.token_ids[-1] != equals:
            return transcript.episode()
        value = calculate(turn.text.removesuffix("="))
        if value is not None:
            answer = client.tokenizer.encode(value, add_special_tokens=False)
            transcript.add_observation(answer[:client.max_tokens - len(transcript.token_ids)])


def calculate(text: str) -> str | None:
    """Return the value of the expression at the end of the text; None if there is no expression with a value.

    Whole numbers have no decimal point; other numbers have 6 digits.
    """
    expression = _EXPRESSION.search(text)
    if expression is None:
        return None
    try:
        value = _value(ast.parse(expression[0].strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"


def _value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    raise ValueError("no arithmetic")
