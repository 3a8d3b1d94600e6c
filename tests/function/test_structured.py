"""Structured output: masks of llguidance for the real model's vocabulary, without and with the engine drawing."""

from __future__ import annotations

import base64
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import jsonschema
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from function.api import Api, Call
from function.engine import Engine
from function.gbnf import normalised
from function.model_store import ModelStore
from function.schema import MAX_GRAMMAR_BYTES, ApiError, Structure
from function.settings import Settings
from function.structured import Grammars
from tests.events import url_event
from tests.processes import engines

pytestmark = pytest.mark.usefixtures("engine_path")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    settings = Settings()
    engine = Engine(settings, ModelStore(settings))
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def api(engine: Engine) -> Api:
    return Api(Settings(), engine)


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
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
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
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, "-9007199254740991", True),
        ({"type": "integer", "minimum": -1e20, "maximum": 5}, "6", False),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.3}, "0", False),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.3}, "0.00000001", True),
        ({"type": "number", "minimum": 0, "exclusiveMinimum": True, "maximum": 0.3}, "0", False),
        ({"type": "number", "minimum": -0.5, "exclusiveMaximum": 0}, "-0", False),
        ({"allOf": [{"type": "number", "exclusiveMinimum": 12}, {"maximum": 12.5}]}, "12", False),
        ({"allOf": [{"type": "number", "exclusiveMinimum": 12}, {"maximum": 12.5}]}, "12.01", True),
        ({"type": "integer", "exclusiveMinimum": 12, "exclusiveMaximum": 14}, "13", True),
        ({"type": "integer", "multipleOf": 65_535}, "65535", True),
        ({"properties": {"minimum": {"const": -1}, "format": {"type": "null"}}, "required": ["minimum"]}, "{}", False),
        (
            {"properties": {"minimum": {"const": -1}, "format": {"type": "null"}}},
            '{"minimum": -1, "format": null}',
            True,
        ),
        ({"type": "string", "format": "king", "maxLength": 3}, '"abc"', True),
        ({"type": "string", "format": "date"}, '"abc"', False),
        ({"type": "object", "propertyNames": {"type": "string"}}, '{"a": 1}', True),
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
        (r'root ::= "\u00e9\x41\"" [\u00e0-\u00ff]+ [\U0001F600-\U0001F64F]', 'éA"éà😀', True),
        (r'root ::= [^"\\\x7F\x00-\x1F]+', "a-é", True),
        (r'root ::= [^"\\\x7F\x00-\x1F]+', "a\x7f", False),
        (r"root ::= [\x2d\x5ea&&~b]+", "^~&-b", True),
        ('root ::= start "c"{0} ("b" ("c")*) {0, 0}\nstart ::= "a" .', "a\n", True),
        ('root ::= a-b a_b aB A_B\na-b ::= "1"\na_b ::= "2"\naB ::= "3" # "4"\nA_B ::= "4"', "1234", True),
        ('root ::= ([a-c]+)* "z"', "abcz", True),
        ('root ::= ([a-c]+)* "z"', "abc", False),
        ('root ::= ("a"{2}){3}', "aaaaaa", True),
        ('root ::= ("a"{2}){3}', "aaaaa", False),
        ('root ::= (("a")+)? ([bc]?) + ("d"*)+', "aabcdd", True),
        (LARK, "b", True),
        (LARK, "c", False),
    ],
)
def test_what_a_grammar_lets_through(grammars: Grammars, engine: Engine, grammar: str, text: str, fits: bool) -> None:
    assert takes(grammars, engine, Structure("gbnf", grammar, "grammar"), text) == fits


def test_rules_come_behind_those_that_they_name() -> None:
    lines = normalised('root ::= a c\na ::= b "y"\nb ::= "x"\nc ::= c? "z"\n').split("\n")
    assert [line for line in lines if line] == ['r2 ::= "x"', 'r1 ::= r2 "y"', "root ::= r1 r3", 'r3 ::= r3? "z"']


MANY = {"type": "object", "properties": {f"p{number}": {"type": "null"} for number in range(500)}}


@pytest.mark.parametrize(
    ("structure", "says"),
    [
        (Structure("gbnf", "root ::= [a-z", "grammar"), "Unexpected end of input"),
        (Structure("gbnf", "a ::= b", "grammar"), "Rule 'b' not found"),
        (Structure("gbnf", 'a ::= "b"', "grammar"), "No 'root' rule found"),
        (Structure("gbnf", 'root ::= "a', "grammar"), "Unexpected end of input"),
        (Structure("gbnf", "root ::= " + "[" * 200_000, "grammar"), "Unexpected end of input"),
        (Structure("gbnf", "::= a", "grammar"), "Expected name"),
        (Structure("gbnf", '"a" "b"', "grammar"), "a grammar is made of rules 'name ::= …', and here is none"),
        (Structure("gbnf", "root ::= root", "grammar"), "no text can be what it asks for"),
        (Structure("gbnf", r'root ::= "\ud800"', "grammar"), "unexpected end of hex escape"),
        (Structure("gbnf", 'root ::= <[100]> "a"', "grammar"), "Expected name"),
        (Structure("gbnf", 'root ::= "a"\n' * 5001, "grammar"), "at most 5000 rules, got 5001"),
        (Structure("gbnf", "root ::= " + "(" * 100_000, "grammar"), "recursion"),
        (Structure("gbnf", "%llguidance {}\nstart: missing", "grammar"), "missing"),
        (json_schema({"type": "king"}), "Invalid type: king"),
        (json_schema({"not": {"type": "string"}}), "not"),
        (json_schema({"$ref": "https://example.org/schema"}), "does not fetch"),
        (json_schema({"type": "string", "pattern": "(?=a)"}), "look-around"),
        (json_schema({"enum": [-(2**63), 0]}), "'enum' must have numbers from -9007199254740991 to 9007199254740991"),
        (json_schema({"const": [{"a": 2**64 - 1}]}), "got 18446744073709551615"),
        (json_schema({"const": 123456789.123456789}), "'const' must have at most 15 digits, got 123456789.12345679"),
        (json_schema({"items": {"type": "integer", "minimum": 10**20}}), "'minimum' must be at most 9007199254740991"),
        (json_schema({"type": "integer", "minimum": -1e20, "maximum": -1e19}), "'maximum' must be at least"),
        (json_schema({"$ref": "#/default", "default": {"type": "integer", "maximum": -(2**63)}}), "'maximum'"),
        (json_schema({"$ref": "#/$defs", "$defs": {"minimum": -(2**63), "maximum": -(2**63)}}), "'$defs' must have"),
        (json_schema({"$ref": "#/$defs", "$defs": {"const": {"x": -(2**63)}}}), "'x' must be at least"),
        (json_schema({"type": "integer", "multipleOf": 20_000_003}), "'multipleOf' must be at most 65535"),
        (json_schema({"type": "integer", "multipleOf": -(2**31)}), "'multipleOf' must be above 0, got -2147483648"),
        (json_schema({"$ref": "#/const", "const": {"type": "integer", "multipleOf": 65_537}}), "got 65537"),
        (json_schema({"allOf": [{"type": "number", "multipleOf": 0.997}, {"multipleOf": 0.0083}]}), "got 82751"),
        (Structure("gbnf", f'%llguidance {{}}\nstart: %json\t{{"const": {-(2**63)}}}', "grammar"), "'const'"),
        (Structure("gbnf", '%llguidance {}\nstart: %json {"maximum": 1e99}', "grammar"), "'%json' must be written as"),
        (Structure("gbnf", '%llguidance {}\n#%json {"\nstart: "a"', "grammar"), "Invalid control character"),
        (json_schema({"enum": []}), ""),
        (json_schema(MANY), "max is 2000"),
        (Structure("gbnf", "root ::= " + " | ".join(f'"a{number}"' for number in range(2001)), "grammar"), "2000"),
    ],
)
def test_what_cannot_be_honoured_is_refused(grammars: Grammars, structure: Structure, says: str) -> None:
    with pytest.raises(ApiError, match=f"'{structure.field}' cannot be honoured") as caught:
        grammars.compile(structure, None, force=True)
    assert (caught.value.status, caught.value.param) == (400, structure.field)
    assert says in caught.value.message
    assert len(caught.value.message) < 400


def links(count: int) -> dict[str, Any]:
    """Definitions, each of which refers to the next."""
    following = {f"d{number}": {"items": {"$ref": f"#/$defs/d{number + 1}"}} for number in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": following | {f"d{count}": {"type": "null"}}}


RULES = "\n".join(f'r{number}: r{number + 1} "a"' for number in range(13_000))
WORDS = "\n".join(f"R{number}: R{number + 1}" for number in range(17_000))


@pytest.mark.parametrize(
    "structure",
    [
        json_schema(links(4_000)),
        Structure("gbnf", f'%llguidance {{}}\nstart: r0\n{RULES}\nr13000: "b"', "grammar"),
        Structure("gbnf", f'%llguidance {{}}\nstart: R0\n{WORDS}\nR17000: "b"', "grammar"),
    ],
)
def test_rules_may_lead_one_to_the_next_as_long_as_they_fit(grammars: Grammars, structure: Structure) -> None:
    assert 0.7 < len(structure.text) / MAX_GRAMMAR_BYTES < 1
    masks = grammars.compile(structure, None, force=True)()
    assert masks.answer(0, [])


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


NAMES = st.sampled_from(["name", "age", "a b", '"', "Grüße", "🐉", "n\n", ""])
TEXTS = st.text(st.characters(codec="utf-8"), max_size=6)
BOUND = st.integers(-1000, 1000)


def bounded(kind: str, low: str, high: str, bounds: st.SearchStrategy[tuple[Any, Any]]) -> st.SearchStrategy[Any]:
    return bounds.map(lambda pair: {"type": kind, low: min(pair), high: max(pair)})


LENGTHS = st.tuples(st.integers(0, 12), st.integers(0, 12))
PATTERNS = ("^[a-z]{1,5}$", "^(ab|cd){2}$", r"^\d{3}$", "b")
SIMPLE = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "number", "minimum": 0, "maximum": 9}]),
    bounded("integer", "minimum", "maximum", st.tuples(BOUND, BOUND)),
    bounded("string", "minLength", "maxLength", LENGTHS),
    st.lists(TEXTS | BOUND | st.none() | st.booleans(), min_size=1, max_size=3).map(lambda values: {"enum": values}),
    TEXTS.map(lambda text: {"const": text}),
    st.sampled_from([{"type": "string", "pattern": pattern} for pattern in PATTERNS]),
    st.sampled_from([{"type": "string", "format": name} for name in ("date", "time", "ipv4", "uuid")]),
)


def arrays(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    sizes = st.tuples(st.integers(0, 3), st.integers(0, 3))
    return st.tuples(items, sizes).map(
        lambda pair: {"type": "array", "items": pair[0], "minItems": min(pair[1]), "maxItems": max(pair[1])}
    )


def objects(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def made(properties: dict[str, Any], optional: set[str]) -> dict[str, Any]:
        required = [name for name in properties if name not in optional]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return st.builds(made, st.dictionaries(NAMES, items, max_size=3), st.sets(NAMES))


SCHEMAS = st.recursive(
    SIMPLE,
    lambda inner: (
        arrays(inner) | objects(inner) | st.lists(inner, min_size=1, max_size=3).map(lambda kinds: {"anyOf": kinds})
    ),
    max_leaves=5,
)


def test_every_completed_answer_fits_whatever_the_schema(endless_model: Path) -> None:
    settings = replace(Settings(), model_path=endless_model, ctx_size=1024)
    engine = Engine(settings, ModelStore(settings))
    api = Api(settings, engine)
    ends = {"stop": 0, "length": 0}

    @hypothesis.settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(SCHEMAS, st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2.5]))
    def fits(schema: dict[str, Any], seed: int, temperature: float) -> None:
        wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
        request = {"messages": [{"role": "user", "content": "A tale?"}], "response_format": wrapped, "seed": seed}
        options = {"max_tokens": 300, "temperature": temperature, "top_k": 0, "top_p": 1}
        reply = api.http(url_event(request | options, path="/v1/chat/completions"), Call("1"))
        assert isinstance(reply["body"], str)
        body = json.loads(reply["body"])
        assert reply["statusCode"] == 200, body
        (choice,) = body["choices"]
        ends[choice["finish_reason"]] += 1
        if choice["finish_reason"] == "stop":
            jsonschema.Draft202012Validator(schema).validate(json.loads(choice["message"]["content"]))
        else:
            assert body["usage"]["completion_tokens"] == 300

    try:
        fits()
    finally:
        engine.stop()
    assert ends["stop"] > 10 * ends["length"], ends


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_honoured_further_on_is_refused_too(api: Api, stream: bool) -> None:
    schema = {"type": "array", "prefixItems": [{"type": "boolean"}, MANY], "minItems": 2}
    reply = api.http(url_event({"prompt": "A king", "json_schema": schema, "stream": stream}), Call("1"))
    body = "".join(reply["body"])
    error = json.loads(body[body.index('{"error"') :])["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "json_schema")
    assert reply["statusCode"] == (200 if stream else 400)


def test_a_bias_that_forbids_all_that_is_left_is_refused(api: Api) -> None:
    request = {"prompt": "A king", "json_schema": {"enum": [1, 2]}, "logit_bias": [["1", False], ["2", False]]}
    reply = api.http(url_event(request), Call("1"))
    assert isinstance(reply["body"], str)
    error = json.loads(reply["body"])["error"]
    assert (reply["statusCode"], error["param"]) == (400, "json_schema")
    assert error["message"] == "'json_schema' allows nothing here but what 'logit_bias' or 'ignore_eos' forbids"


def test_a_bias_that_forbids_the_only_token_is_refused(api: Api) -> None:
    """Such a token is not even asked for, as a rule."""
    reply = api.http(
        url_event({"prompt": "A king", "json_schema": {"const": 1}, "logit_bias": [["1", False]]}), Call("1")
    )
    assert isinstance(reply["body"], str)
    assert (reply["statusCode"], json.loads(reply["body"])["error"]["param"]) == (400, "json_schema")


@pytest.mark.parametrize("cut", [1, 3, 10])
def test_an_answer_that_is_cut_says_so(api: Api, cut: int) -> None:
    body = complete(api, {"prompt": "A king", "json_schema": KING, "n_predict": cut})
    assert (body["stop_type"], body["tokens_predicted"]) == ("limit", cut)
    assert '{"name": "'.startswith(body["content"]) or body["content"].startswith('{"name": "')


def test_a_grammar_decides_what_is_written(api: Api) -> None:
    request = {"prompt": "Once upon a time", "grammar": 'root ::= " Yes" | " No"', "temperature": 2}
    assert {complete(api, request | {"seed": seed})["content"] for seed in range(20)} == {" Yes", " No"}


def test_each_prompt_and_completion_keeps_to_it(api: Api) -> None:
    request = {"prompt": ["Once", "A king", "Then"], "n_cmpl": 3, "json_schema": {"enum": [1, "two", None]}}
    answers = complete(api, request)
    assert [answer["index"] for answer in answers] == list(range(9))
    assert {answer["content"] for answer in answers} <= {"1", '"two"', "null"}
    assert {answer["stop_type"] for answer in answers} == {"eos"}


def test_forced_tokens_are_asked_for_when_their_probability_is_wanted(api: Api) -> None:
    body = complete(api, {"prompt": "A king", "json_schema": {"const": "king"}, "n_probs": 2, "temperature": 0})
    assert body["content"] == '"king"'
    assert "".join(token["token"] for token in body["completion_probabilities"]) == '"king"'
    assert all(token["logprob"] <= 0 and len(token["top_logprobs"]) == 2 for token in body["completion_probabilities"])


@pytest.mark.parametrize("schema", [{"format": "date-time"}, {"format": "time", "pattern": "^1"}])
def test_second_60_is_no_time_of_day(api: Api, schema: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator({"type": "string", "pattern": "^[^:]*:[0-5][0-9]:[0-5][0-9]"})
    for seed in range(40):
        request = {"prompt": "A king", "json_schema": {"type": "string"} | schema, "temperature": 2, "top_k": 0}
        body = complete(api, request | {"seed": seed, "n_predict": 60})
        if body["stop_type"] == "eos":
            validator.validate(json.loads(body["content"]))


def test_a_worker_that_dies_begins_again_with_the_grammar(api: Api) -> None:
    request = {"prompt": "A king", "json_schema": KING, "n_predict": 100}
    complete(api, request)
    (pid,) = engines(os.getpid())
    os.kill(pid, signal.SIGKILL)
    body = complete(api, request)
    assert body["stop_type"] == "eos"
    jsonschema.Draft202012Validator(KING).validate(json.loads(body["content"]))


def complete(api: Api, request: dict[str, Any]) -> Any:
    reply = api.http(url_event(request), Call("1"))
    assert isinstance(reply["body"], str)
    body = json.loads(reply["body"])
    assert reply["statusCode"] == 200, body
    return body
