"""The verifiers on cases whose score is plain to a reader."""
from fractions import Fraction

import pytest

from frpo.rewards.verifiers import (
    boxed_format,
    exact_answer,
    find_number,
    math_answer,
    numeric_answer,
    regex_format,
    texts,
)


def chat(text):
    return [{"role": "assistant", "content": text}]


def test_texts_of_strings_and_of_chats():
    assert list(texts(["a"])) == ["a"]
    assert list(texts([chat("first") + chat("last")])) == ["last"]


def test_exact_answer():
    completions = [" yes\n", "Yes", "yes.", "7", "anything"]
    assert exact_answer(completions, ["yes", "yes", "yes", 7, None]) == [1.0, 0.0, 0.0, 1.0, None]
    assert exact_answer([chat("yes")], ["yes"]) == [1.0]


def test_exact_answer_by_pattern_takes_the_last_match():
    completions = ["<a>4</a> no: <a> 5\n</a>", "<a>5</a><a>4</a>", "5", "<a>5</a>"]
    assert exact_answer(completions, ["5", "5", "5", None], pattern="<a>(.*?)</a>") == [1.0, 0.0, 0.0, None]


def test_exact_answer_pattern_without_group():
    with pytest.raises(ValueError, match="pattern 'x' has no group"):
        exact_answer(["x"], ["x"], pattern="x")


@pytest.mark.parametrize("text, value", [
    ("72", 72), ("It is $72.", 72), ("so 1,234 apples", 1234), ("$1,234.50", Fraction(2469, 2)),
    ("1/2", Fraction(1, 2)),
    (".5", Fraction(1, 2)), ("-3", -3), ("= −3", -3), ("-$3", -3), ("10-4", 4), ("a 3 then 4", 4), ("2e3", 2000),
    ("5e-1", Fraction(1, 2)), ("50%", 50), ("work 9 #### 8 (of 10)", 8), ("#### 1 #### 2", 2), ("9 ####", None),
    ("none", None), ("", None), ("1/0", None), ("7" * 5000, None), ("1e999", Fraction(10) ** 999), ("1,2", 2)])
def test_find_number(text, value):
    assert find_number(text) == value


@pytest.mark.timeout(5)
def test_an_absurd_exponent_costs_nothing():
    assert numeric_answer(["1e999999999999"], [1]) == [0.0]


def test_numeric_answer_by_value():
    completions = ["1/2", "0.5", "1,234", "The answer is $72.", "71", "no idea", "5", "0.1"]
    answers = ["0.5", 0.5, "1234", "2+70 = 72\n#### 72", 72, "72", None, 0.1]
    assert numeric_answer(completions, answers) == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, None, 1.0]


def test_numeric_tolerance_is_absolute_and_inclusive():
    assert numeric_answer(["3.14", "3.15", "3.16"], ["3.14"] * 3, tolerance=0.01) == [1.0, 1.0, 0.0]
    assert numeric_answer(["3.1400001"], ["3.14"]) == [0.0]


@pytest.mark.parametrize("reference", ["unknown", True, [1]])
def test_numeric_reference_without_a_number_is_an_error(reference):
    with pytest.raises(ValueError, match="reference answer"):
        numeric_answer(["1"], [reference])


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="zip"):
        numeric_answer(["1", "2"], ["1"])


@pytest.mark.timeout(60)
def test_math_answer():
    completions = [r"So \boxed{\frac{1}{2}}", r"$\frac{2}{4}$", r"\boxed{0.5}", r"\boxed{\frac{1}{3}}", "no", "1",
                   "$x+1$"]
    answers = [r"\frac{1}{2}"] * 5 + [None, "1+x"]
    assert math_answer(completions, answers) == [1.0, 1.0, 1.0, 0.0, 0.0, None, 1.0]


@pytest.mark.timeout(60)
def test_math_answer_reads_the_whole_of_a_bare_reference():
    # Without delimiters math-verify takes the number 2 from 2^{10}: the wrong 2 would score and the right 1024 fail.
    assert math_answer(["$2$", "$1024$", r"\boxed{1234}"], ["2^{10}", "2^{10}", "1,234"]) == [0.0, 1.0, 1.0]


@pytest.mark.timeout(60)
def test_math_answer_names_an_unusable_reference():
    with pytest.raises(ValueError, match="math-verify cannot parse the reference answer ''"):
        math_answer(["1"], [""])


@pytest.mark.timeout(60)
def test_math_answer_abstains_when_a_comparison_takes_too_long(monkeypatch):
    import time

    import math_verify.grader
    monkeypatch.setattr(math_verify.grader, "sympy_expr_eq", lambda *_: time.sleep(30))
    assert math_answer(["$2$", "no"], ["1", "1"], limit_s=1) == [None, 0.0]


def test_boxed_format():
    completions = [
        r"so \boxed{5}", r"\boxed{\frac{1}{2}}", "5", r"\boxed{1} \boxed{2}", r"\boxed{5", r"\boxed{ }", r"\boxed 5"]
    assert boxed_format(completions) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert boxed_format([chat(r"\boxed{5}")]) == [1.0]


def test_regex_format():
    pattern = r"\A<think>.*</think>.+\Z"
    assert regex_format(["<think>a\nb</think>5", "x<think></think>5", "<think></think>"], pattern) == [1.0, 0.0, 0.0]
