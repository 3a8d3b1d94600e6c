"""Structured output: masks of llguidance for the real model's vocabulary, without and with the engine drawing."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest

from function.engine import Engine
from function.model_store import ModelStore
from function.schema import ApiError, Structure
from function.settings import Settings
from function.structured import Grammars

pytestmark = pytest.mark.usefixtures("engine_path")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    settings = Settings()
    engine = Engine(settings, ModelStore(settings))
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def grammars(engine: Engine) -> Grammars:
    return Grammars(engine)


def json_schema(schema: dict[str, Any]) -> Structure:
    return Structure("json_schema", json.dumps(schema), "json_schema")


def takes(grammars: Grammars, engine: Engine, structure: Structure, text: str) -> bool:
    """Whether the masks let `text` through, token by token, and then call it complete."""
    masks = grammars.compile(structure, None, force=False)()
    drawn: list[int] = []
    for token in engine.tokenize(text, add_bos=False, special=False):
        answer = masks.answer(0, drawn)
        if "stop" in answer or not allowed(answer, token):
            return False
        drawn = [token]
    answer = masks.answer(0, drawn)
    return "stop" in answer or all(allowed(answer, token) for token in engine.describe()["eos"])


def allowed(answer: dict[str, Any], token: int) -> bool:
    mask = base64.b64decode(answer["allow"])
    return bool(mask[token // 8] >> token % 8 & 1)


KING = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("schema", "text", "fits"),
    [
        (KING, '{"name": "Grüße, \\"K\\u0007\\" 🐉", "age": 42}', True),
        (KING, '{"name": "K", "age": 121}', False),
        (KING, '{"name": "K"}', False),
        (KING, '{"name": "K", "age": 1, "x": 1}', False),
        (KING, ' {"name": "K", "age": 1}', False),
        (KING, '{"name": "K\n", "age": 1}', False),
        ({}, '[1, {"a": null}]', True),
        ({}, "[1, ", False),
        ({"enum": ["a", 5]}, "5", True),
        ({"enum": ["a", 5]}, '"b"', False),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, "[true, false]", True),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, "[true]", False),
        (
            {
                "$defs": {
                    "n": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/l"}]},
                    "l": {"type": "array", "items": {"$ref": "#/$defs/n"}},
                },
                "$ref": "#/$defs/n",
            },
            "[null, [[], null]]",
            True,
        ),
        (KING | {"x-guidance": {"whitespace_flexible": True, "lenient": True}}, '{"name":  "K", "age": 1}', False),
    ],
)
def test_what_a_schema_lets_through(
    grammars: Grammars, engine: Engine, schema: dict[str, Any], text: str, fits: bool
) -> None:
    assert takes(grammars, engine, json_schema(schema), text) == fits


# From llama.cpp's grammars/README.md, but for the last one.
CHESS = """
# Specifies chess moves as a list in algebraic notation
root ::= (
    # it must start with the characters "1. " followed by a sequence
    # of characters that match the `move` rule, followed by a space, followed
    # by another move, and then a newline
    "1. " move " " move "\\n"

    # it's followed by one or more subsequent moves, numbered with one or two digits
    ([1-9] [0-9]? ". " move " " move "\\n")+
)
move ::= (pawn | nonpawn | castle) [+#]?
pawn ::= ([a-h] "x")? [a-h] [1-8] ("=" [NBKQR])?
nonpawn ::= [NBKQR] [a-h]? [1-8]? "x"? [a-h] [1-8]
castle ::= "O-O" "-O"?
"""
LIST = 'root ::= item+\nitem ::= "- " [^\\r\\n\\x0b\\x0c\\x85\\u2028\\u2029]+ "\\n"\n'
LARK = '%llguidance {}\nstart: "a" | "b"'


@pytest.mark.parametrize(
    ("grammar", "text", "fits"),
    [
        (CHESS, "1. e4 e5\n2. Nf3 Nc6\n", True),
        (CHESS, "1. e4 e5\n2. Nf9 Nc6\n", False),
        (LIST, "- milk\n- Brot & Käse\n", True),
        (LIST, "- milk\n-bread\n", False),
        ('root ::= "yes" | "no"', "no", True),
        ('root ::= "yes" | "no"', "maybe", False),
        (LARK, "b", True),
        (LARK, "c", False),
    ],
)
def test_what_a_grammar_lets_through(grammars: Grammars, engine: Engine, grammar: str, text: str, fits: bool) -> None:
    assert takes(grammars, engine, Structure("gbnf", grammar, "grammar"), text) == fits


@pytest.mark.parametrize(
    ("structure", "says"),
    [
        (Structure("gbnf", "root ::= [a-z", "grammar"), "Unexpected end of input"),
        (Structure("gbnf", "a ::= b", "grammar"), "Rule 'b' not found"),
        (Structure("gbnf", 'a ::= "b"', "grammar"), "No 'root' rule found"),
        (Structure("gbnf", "root ::= " + "(" * 100_000, "grammar"), "recursion"),
        (Structure("gbnf", "%llguidance {}\nstart: missing", "grammar"), "missing"),
        (json_schema({"type": "king"}), "Invalid type: king"),
        (json_schema({"not": {"type": "string"}}), "not"),
        (json_schema({"$ref": "https://example.org/schema"}), "does not fetch"),
        (json_schema({"type": "string", "pattern": "(?=a)"}), "look-around"),
        (json_schema({"type": "string", "format": "king"}), "format"),
        (json_schema({"enum": []}), ""),
    ],
)
def test_what_cannot_be_honoured_is_refused(grammars: Grammars, structure: Structure, says: str) -> None:
    with pytest.raises(ApiError, match=f"'{structure.field}' cannot be honoured") as caught:
        grammars.compile(structure, None, force=True)
    assert (caught.value.status, caught.value.param) == (400, structure.field)
    assert says in caught.value.message
    assert len(caught.value.message) < 400


def test_no_control_token_is_in_a_text(grammars: Grammars, engine: Engine) -> None:
    masks = grammars.compile(json_schema({"type": "string"}), None, force=False)()
    answer = masks.answer(0, engine.tokenize('"', add_bos=False, special=False))
    assert all(allowed(answer, token) for token in engine.tokenize(" king", add_bos=False, special=False))
    assert not any(allowed(answer, token) for token in engine.vocabulary()["control"])


def test_each_completion_has_its_own_masks(grammars: Grammars, engine: Engine) -> None:
    masks = grammars.compile(Structure("gbnf", 'root ::= "a" "b" | "c"', "grammar"), None, force=False)()
    (a,), (b,), (c,) = (engine.tokenize(text, add_bos=False, special=False) for text in "abc")
    for index in (0, 1):
        answer = masks.answer(index, [])
        assert [allowed(answer, token) for token in (a, b, c)] == [True, False, True]
    assert masks.answer(1, [c]) == {"stop": True}
    assert allowed(masks.answer(0, [a]), b)


def test_tokens_without_an_alternative_are_spelled_as_the_model_would(grammars: Grammars, engine: Engine) -> None:
    structure = json_schema({"const": {"a king": ["once upon a time"]}})
    masks = grammars.compile(structure, None, force=True)()
    drawn: list[int] = []
    answer = masks.answer(0, [])
    while "stop" not in answer:
        drawn += answer["forced"]
        answer = masks.answer(0, answer["forced"])
    assert drawn == engine.tokenize('{"a king": ["once upon a time"]}', add_bos=False, special=False)
