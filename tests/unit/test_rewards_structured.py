"""JSON that fits a schema: scores plain to a reader, schemas that are wrong, and outputs made to break the check."""
import json
import socket

import pytest

from frpo.rewards.structured import json_answer

PERSON = {"type": "object", "required": ["name"], "additionalProperties": False,
          "properties": {"name": {"type": "string", "minLength": 1}, "age": {"type": "integer", "minimum": 0}}}
TREE = {"$ref": "#/$defs/node", "$defs": {"node": {
    "type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}}}


@pytest.mark.parametrize("text, score", [
    ('{"name": "Ada", "age": 36}', 1), ('\n {"name": "Ada"}\t', 1), ('{"name": ""}', 0), ('{"age": 36}', 0),
    ('{"name": "Ada", "age": 36.0}', 1), ('{"name": "Ada", "age": true}', 0), ('{"name": "Ada", "job": 1}', 0),
    ('["Ada"]', 0), ('{"name": "Ada"} {"name": "Bob"}', 0), ('Here: {"name": "Ada"}', 0), ("{'name': 'Ada'}", 0),
    ('{"name": "Ada",}', 0), ("", 0), ('{"name": "A', 0),
    ('```json\n{"name": "Ada"}\n```', 1), (' ```json\n{"name": "Ada"}```\n', 1), ('```\n{"name": "Ada"}\n```', 0),
    ('```json\n```json\n{"name": "Ada"}\n```\n```', 0), ('```json\n{"name": "Ada"}\n```\nDone.', 0)])
def test_a_person(text, score):
    assert json_answer([text], PERSON) == [score]
    assert json_answer([[{"role": "assistant", "content": text}]], json.dumps(PERSON)) == [score]


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "-Infinity", '{"a": 1, "a": 1}', '[{"b": {"a": 1, "a": 2}}]',
                                  "1e999", "9" * 400, "[1] x", "\ufeff[]", "'a'", "01", "+1", "tru"])
def test_what_is_no_json(text):
    assert json_answer([text, "1"]) == [0, 1]


def test_a_schema_for_each_row_and_none():
    texts = ['"a"', "1", "1", "nothing", "1"]
    assert json_answer(texts, [{"type": "string"}, '{"type": "string"}', None, None, True]) == [1, 0, None, None, 1]
    with pytest.raises(ValueError, match="zip"):
        json_answer(texts, [True])


@pytest.mark.parametrize("depth", [150, 900, 100_000])
def test_deep_nesting_scores_zero_and_never_raises(depth):
    kids, lists = '{"kids": [' * depth + "]}" * depth, "[" * depth + "]" * depth
    assert json_answer([lists, "[" * depth], TREE) == [0, 0]
    [score] = json_answer([kids], TREE)
    assert score == (depth == 150)


@pytest.mark.parametrize("schema, message", [
    ({"type": "objct"}, r"schema is wrong at \$\.type: 'objct' is not valid"),
    ({"properties": {"a": {"minimum": "1"}}}, r"schema is wrong at \$\.properties\.a\.minimum: '1' is not of type"),
    ({"pattern": "("}, r"schema is wrong at \$\.pattern: '\(' is not a 'regex'"),
    ("{", "schema '{' is not valid JSON: Expecting property name"),
    ("[1]", r"schema '\[1\]' is list; give a mapping, or its JSON text"),
    (3, "schema is int; give a mapping"), ([3], "schema '3' is int; give a mapping"),
    ({"const": float("nan")}, "is not valid JSON: NaN is not JSON"),
    ({"const": {1}}, "schema cannot be written as JSON: Object of type set"),
    ({"$schema": "http://json-schema.org/draft-07/schema#"}, r"draft 'http://.*/draft-07/schema#' in \$schema"),
    ({"$ref": "#"}, "refers to itself without end"),
    ({"properties": {"a": {"$ref": "#/$defs/b"}}}, r"schema refers to '#/\$defs/b', which is not in the schema"),
    ({"properties": {"a": {"$dynamicRef": "#b"}}}, "schema refers to '#b', which is not in the schema"),
    ({"$ref": "https://json.invalid/person"}, "schema refers to 'https://json.invalid/person'.* nothing is fetched")])
def test_a_wrong_schema_is_told(schema, message):
    with pytest.raises(ValueError, match=message):
        json_answer(['{"a": 1}'], schema)


def test_a_remote_reference_is_never_fetched(monkeypatch):
    """One reference lies where only the check of a value finds it: behind a pointer into an unknown keyword."""
    asked = []
    monkeypatch.setattr(socket, "create_connection", lambda *args, **_: asked.append(args))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: asked.append(args))
    hidden = {"$ref": "#/parts/a", "parts": {"a": {"properties": {"b": {"$ref": "http://127.0.0.1:9/c"}}}}}
    assert json_answer(["1"], hidden) == [1]
    with pytest.raises(ValueError, match=r"schema refers to 'http://127\.0\.0\.1:9/c'"):
        json_answer(['{"b": 1}'], hidden)
    assert not asked


def test_references_inside_the_schema():
    named = {"$id": "https://json.invalid/all", "$ref": "number", "$defs": {"n": {"$id": "number", "type": "number"}}}
    assert json_answer(["1", '"1"'], named) == [1, 0]
    draft = {"$ref": "https://json-schema.org/draft/2020-12/schema"}
    assert json_answer(['{"type": "string"}', '{"type": "strin"}'], draft) == [1, 0]
