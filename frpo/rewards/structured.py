"""Check that a completion is JSON that fits a JSON schema: a ready reward function.

No function here judges whether the values are right, and none fetches anything: a `$ref` must lead to the schema
itself. Regular expressions of a schema are Python's and run without a limit of their own. A pattern that backtracks
for ever ends the call only at the reward's `timeout_s`.
"""
from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from frpo.rewards.verifiers import Completions, texts

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

Schema = Mapping[str, Any] | bool | str
"""A JSON schema: a mapping, true or false, or the JSON text of one of them."""

DRAFT = "https://json-schema.org/draft/2020-12/schema"

_FENCE = re.compile(r"```json[ \t]*\n(?P<inside>.*)```", re.DOTALL)
_SHALLOW: tuple[Any, ...] = (None, True, 0, "", [], [0], {}, {"": 0})
"""Values that a schema must judge without deep recursion."""


def json_answer(completions: Completions, schema: Schema | Sequence[Schema | None] | None = None,
                ) -> list[float | None]:
    """Score 1.0 if the completion is one valid JSON value that fits the schema (draft 2020-12), else 0.0.

    White space around the value and one fence of ```json around it are ignored. Not valid are NaN, Infinity, a key
    given twice, a number beyond a float, and nesting that is too deep for Python.
    schema: one schema for all rows (kwargs), or the data column `schema`. A mapping, or its JSON text. A row without a
    schema abstains. With neither kwargs nor column, any valid JSON scores 1.0. `format` is not checked.
    Raises ValueError that says what is wrong with a schema.
    """
    every = list(texts(completions))
    schemas: Sequence[Schema | None]
    if schema is None:
        schemas = [True] * len(every)
    elif isinstance(schema, Mapping | bool | str):
        schemas = [schema] * len(every)
    elif isinstance(schema, Sequence):
        schemas = schema
    else:
        raise ValueError(f"schema is {type(schema).__name__}; give a mapping, or its JSON text")
    validators: dict[str, Draft202012Validator] = {}  # the completions of a group share their schema
    return [None if wanted is None else float(_fits(text, _validator(wanted, validators)))
            for text, wanted in zip(every, schemas, strict=True)]


def parse_json(text: str) -> Any:
    """Parse one JSON value, with a ```json fence around it or without.

    Raises ValueError if the text is not valid JSON, in the sense of `json_answer`.
    """
    text = text.strip()
    fenced = _FENCE.fullmatch(text)
    try:
        return json.loads(fenced["inside"] if fenced else text, object_pairs_hook=_object, parse_constant=_constant,
                          parse_int=_whole, parse_float=_decimal)
    except RecursionError:
        raise ValueError("the JSON value is nested too deeply") from None


def _fits(text: str, validator: Draft202012Validator) -> bool:
    from referencing.exceptions import Unresolvable

    try:
        value = parse_json(text)
    except ValueError:
        return False
    try:
        return validator.is_valid(value)
    except Unresolvable as error:
        raise ValueError(_unresolved(error.ref)) from None
    except (OverflowError, RecursionError):  # a number or a nesting beyond what Python can compare
        return False


def _validator(schema: Schema, known: dict[str, Draft202012Validator]) -> Draft202012Validator:
    try:
        key = schema if isinstance(schema, str) else json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise ValueError(f"schema cannot be written as JSON: {error}; give a mapping, or its JSON text") from None
    if key not in known:
        known[key] = _checked_validator(key)
    return known[key]


def _checked_validator(text: str) -> Draft202012Validator:
    """Make the validator of the schema in a JSON text. Raises ValueError if the schema is wrong."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    try:
        schema = parse_json(text)
    except ValueError as error:
        raise ValueError(f"schema {_short(text)} is not valid JSON: {error}; give a mapping, or its JSON text") \
            from None
    if not isinstance(schema, dict | bool):
        raise ValueError(f"schema {_short(text)} is {type(schema).__name__}; give a mapping, or its JSON text")
    draft = schema.get("$schema", DRAFT) if isinstance(schema, dict) else DRAFT
    if draft != DRAFT and draft != f"{DRAFT}#":
        raise ValueError(f"schema names the draft {draft!r} in $schema; only {DRAFT!r} is supported")
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"schema is wrong at {error.json_path}: {error.message}") from None
    resource = DRAFT202012.create_resource(schema)
    # Without an explicit registry, jsonschema fetches remote references. This one holds only the specifications.
    validator = Draft202012Validator(schema, registry=REGISTRY)
    try:
        _check_references(resource, REGISTRY.resolver_with_root(resource))
        for value in _SHALLOW:
            validator.is_valid(value)
    except Unresolvable as error:
        raise ValueError(_unresolved(error.ref)) from None
    except RecursionError:
        raise ValueError(f"schema {_short(text)} refers to itself without end; a $ref must not lead back to itself at "
                         "the same value") from None
    return validator


def _check_references(resource: Any, resolver: Any) -> None:
    """Look up every $ref and $dynamicRef of a schema. Raises ValueError for one that leads nowhere."""
    from referencing.exceptions import Unresolvable

    for keyword in {"$ref", "$dynamicRef"} & resource.contents.keys() if isinstance(resource.contents, dict) else ():
        try:
            resolver.lookup(resource.contents[keyword])
        except Unresolvable:
            raise ValueError(_unresolved(resource.contents[keyword])) from None
    for inner in resource.subresources():
        _check_references(inner, resolver.in_subresource(inner))


def _unresolved(reference: str) -> str:
    return (f"schema refers to {reference!r}, which is not in the schema; nothing is fetched, so put it under $defs "
            "and refer to '#/$defs/NAME'")


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def _constant(literal: str) -> Any:
    raise ValueError(f"{literal} is not JSON")


def _whole(digits: str) -> int:
    _decimal(digits)
    return int(digits)


def _decimal(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"number {_short(digits)} is beyond a float")
    return value
