"""Validation of requests."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from function.openai import CHAT_NEUTRAL, INERT, TEXT_NEUTRAL, chat_kinds, parse_chat, parse_text, text_kinds
from function.schema import (
    NEUTRAL,
    ApiError,
    Structure,
    completion_kinds,
    parse_completion,
    parse_object,
    picked,
)
from function.settings import Settings

SETTINGS = Settings()
FIELDS = sorted(completion_kinds(SETTINGS).keys() | NEUTRAL.keys())
OPENAI_FIELDS = sorted(
    chat_kinds(SETTINGS).keys() | text_kinds(SETTINGS).keys() | CHAT_NEUTRAL.keys() | TEXT_NEUTRAL.keys() | INERT
)


def refusal(body: dict[str, Any], settings: Settings = SETTINGS) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_completion(body, settings)
    assert caught.value.status == 400
    return caught.value


def test_defaults_are_the_settings() -> None:
    settings = Settings(
        n_predict=7, temperature=0.5, top_k=3, top_p=0.25, min_p=0.125, repeat_penalty=2, repeat_last_n=9
    )
    request = parse_completion({"prompt": "a"}, settings)
    for name in ("n_predict", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n"):
        assert getattr(request, name) == getattr(settings, name)
    assert (request.stop, request.seed, request.stream, request.special) == ((), -1, False, False)


def test_every_field_is_taken() -> None:
    body = {
        "prompt": [1, 2],
        "n_predict": 5,
        "temperature": 0,
        "top_k": 1,
        "top_p": 0.5,
        "min_p": 0.5,
        "repeat_penalty": 1.5,
        "repeat_last_n": -1,
        "presence_penalty": -1,
        "frequency_penalty": 1.25,
        "seed": 2**32 - 1,
        "stop": ["\n", "end"],
        "ignore_eos": True,
        "cache_prompt": False,
        "special": True,
        "stream": True,
        "return_tokens": True,
        "n_cmpl": 3,
        "n_probs": 4,
        "post_sampling_probs": True,
        "logit_bias": [[5, 1.5], ["king", -1], [7, False]],
        "samplers": ["top_k", "temperature"],
        "typical_p": 0.9,
        "top_n_sigma": 2,
        "xtc_probability": 0.5,
        "xtc_threshold": 0.2,
        "dynatemp_range": 0.25,
        "dynatemp_exponent": 1.5,
        "dry_multiplier": 0.8,
        "dry_base": 1.5,
        "dry_allowed_length": 3,
        "dry_penalty_last_n": -1,
        "dry_sequence_breakers": ["\n"],
        "mirostat": 2,
        "mirostat_tau": 4,
        "mirostat_eta": 0.2,
        "min_keep": 2,
        "t_max_predict_ms": 500,
        "json_schema": {"type": "string"},
        "response_fields": ["content"],
        "prompt_cache_key": "system",
    }
    request = parse_completion(body, SETTINGS)
    assert completion_kinds(SETTINGS).keys() - body.keys() == {"grammar"}
    assert dataclasses.asdict(request) == {
        "prompts": ((1, 2),),
        "n": body.pop("n_cmpl"),
        "structure": {"language": "json_schema", "text": '{"type":"string"}', "field": "json_schema", "parts": ()},
        "logprobs": False,
        "prompt_logprobs": False,
        **{name: value for name, value in body.items() if name not in ("prompt", "json_schema")},
        "stop": ("\n", "end"),
        "logit_bias": ((5, 1.5), ("king", -1), (7, False)),
        "samplers": ("top_k", "temperature"),
        "dry_sequence_breakers": ("\n",),
        "response_fields": ("content",),
    }
    (asked,) = request.for_engine({5: 1.5, 594: -1.0, 7: False}, add_bos=True)
    unchanged = set(body) - {
        "prompt",
        "json_schema",
        "logit_bias",
        "return_tokens",
        "response_fields",
        "prompt_cache_key",
    }
    assert {name: getattr(request, name) for name in unchanged} == {name: asked[name] for name in unchanged}
    rest = {name: value for name, value in asked.items() if name not in unchanged}
    assert rest == {
        "n": 3,
        "prompt": (1, 2),
        "logit_bias": [[5, 1.5], [594, -1.0], [7, False]],
        "logprobs": False,
        "prompt_logprobs": False,
        "mask": True,
    }
    (plain,) = parse_completion({"prompt": "a"}, SETTINGS).for_engine({}, add_bos=True)
    assert plain.keys() == asked.keys() - {"logit_bias", "mask"}  # no default of the worker's counts


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        ([1, 2], ((1, 2),)),
        ([1, "a", 2], ((1, "a", 2),)),
        (["a"], ("a",)),
        (["a", "b"], ("a", "b")),
        ([[1, 2], "a", ["a", 1], {"prompt_string": "b"}], ((1, 2), "a", ("a", 1), "b")),
        ({"prompt_string": "b", "multimodal_data": []}, ("b",)),
    ],
)
def test_every_shape_of_a_prompt(prompt: Any, prompts: tuple[Any, ...]) -> None:
    assert parse_completion({"prompt": prompt}, SETTINGS).prompts == prompts


def test_an_array_that_begins_with_a_text_begins_as_a_text() -> None:
    for prompt, add_bos in ((["a", 1], True), ([1, "a"], None), ([1], None), ("a", None)):
        (asked,) = parse_completion({"prompt": [prompt] if prompt == "a" else prompt}, SETTINGS).for_engine({}, True)
        assert asked.get("add_bos") == add_bos
    assert "add_bos" not in parse_completion({"prompt": ["a", 1]}, SETTINGS).for_engine({}, False)[0]


@pytest.mark.parametrize(
    ("given", "bias"),
    [
        ([[15043, 1.0]], ((15043, 1.0),)),
        ([[15043, False]], ((15043, False),)),
        ([["Hello, World!", -0.5]], (("Hello, World!", -0.5),)),
        ({"15043": -100, "Hello": 2, "7": False}, ((15043, -100.0), ("Hello", 2.0), (7, False))),
        ({}, ()),
    ],
)
def test_every_spelling_of_a_bias(given: Any, bias: Any) -> None:
    assert parse_completion({"prompt": "a", "logit_bias": given}, SETTINGS).logit_bias == bias


def test_a_grammar_or_a_schema() -> None:
    assert parse_completion({"prompt": "a", "grammar": ""}, SETTINGS).structure is None
    request = parse_completion({"prompt": "a", "grammar": 'root ::= "a"'}, SETTINGS)
    assert request.structure == Structure("gbnf", 'root ::= "a"', "grammar")
    assert refusal({"prompt": "a", "grammar": 'root ::= "a"', "json_schema": {}}).param == "grammar"


def test_response_fields_are_moved_to_the_top() -> None:
    body = {"content": "a", "generation_settings": {"n_predict": 5, "seed": 1}, "stop": True}
    paths = ["content", "generation_settings/n_predict", "nothing", "content/deeper"]
    assert picked(body, paths) == {"content": "a", "generation_settings/n_predict": 5}


def test_null_means_left_out() -> None:
    nulls: dict[str, Any] = dict.fromkeys([*FIELDS, "unknown"])
    assert parse_completion(nulls | {"prompt": "a"}, SETTINGS) == parse_completion({"prompt": "a"}, SETTINGS)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("prompt", 5, "must be a string or an array of token ids and strings, got 5"),
        ("prompt", {"text": "x"}, 'unknown field "text"'),
        ("prompt", {"prompt_string": "x", "multimodal_data": ["a"]}, "'multimodal_data' is not supported"),
        ("prompt", [], "at least one token id"),
        ("prompt", [1, None], "'prompt[1]' must be a token id, got null"),
        ("prompt", ["a", None], "'prompt[1]' must be a string or an array of token ids and strings, got null"),
        ("prompt", [[]], "'prompt[0]' must have at least one token id"),
        ("prompt", [["a", {}]], "'prompt[0][1]' must be a token id, got an object"),
        ("prompt", ["a"] * 129, "at most 128 prompts, got 129"),
        ("n_cmpl", 17, "from 1 to 16, got 17"),
        ("samplers", ["top_k", "top_q"], "'samplers[1]' must be one of penalties, dry,"),
        ("samplers", ["top_k", "top_k"], "'samplers[1]' must not be there twice, got \"top_k\""),
        ("samplers", "top_k", "must be an array of strings"),
        ("logit_bias", 5, "must be an object or an array of [token, bias], got 5"),
        ("logit_bias", [[5]], "'logit_bias[0]' must be [token, bias], got an array of 1"),
        ("logit_bias", [[5, True]], "'logit_bias[0][1]' must be a number, got true"),
        ("logit_bias", {"1" * 5000: 1}, "'logit_bias[0][0]' must have at most 1024 bytes of UTF-8, got 5000"),
        ("logit_bias", {"1" * 100: 1}, "'logit_bias[0][0]' must be from 0 to 2147483647"),
        ("logit_bias", [[5.5, 1]], "'logit_bias[0][0]' must be a token id, got 5.5"),
        ("logit_bias", {"5": 1e9}, "from -1e+06 to 1e+06, got 1000000000.0"),
        ("logit_bias", [[token, 1] for token in range(1025)], "at most 1024 entries, got 1025"),
        ("json_schema", [], "must be an object, got an array of 0"),
        ("n_probs", False, "must be an integer, got false"),
        ("prompt", [True], "'prompt[0]' must be a token id, got true"),
        ("prompt", [-1], "'prompt[0]' must be from 0 to 2147483647, got -1"),
        ("prompt", "a\ud800", "lone surrogate (\\ud800) at character 1"),
        ("n_predict", 1.5, "must be an integer, got 1.5"),
        ("n_predict", True, "must be an integer, got true"),
        ("n_predict", "8", 'must be an integer, got "8"'),
        ("n_predict", -2, "from -1 to 2147483647, got -2"),
        ("n_predict", 10**400, "got an integer of 1329 bits"),
        ("temperature", -0.5, "from 0 to 100, got -0.5"),
        ("temperature", float("nan"), "from 0 to 100, got nan"),
        ("temperature", float("inf"), "from 0 to 100, got inf"),
        ("temperature", 10**400, "from 0 to 100, got an integer of 1329 bits"),
        ("temperature", False, "must be a number, got false"),
        ("temperature", [1], "must be a number, got an array of 1"),
        ("top_p", -0.1, "from 0 to 1, got -0.1"),
        ("typical_p", 0, "above 0 to 1, got 0"),
        ("top_p", 1.01, "from 0 to 1, got 1.01"),
        ("min_p", 2, "from 0 to 1, got 2"),
        ("top_n_sigma", 100.5, "from -1 to 100, got 100.5"),
        ("dry_sequence_breakers", ["é" * 21], "'dry_sequence_breakers[0]' must have at most 40 bytes of UTF-8, got 42"),
        ("repeat_penalty", 0, "above 0 to 100, got 0"),
        ("seed", 2**32, "from -1 to 4294967295, got 4294967296"),
        ("stop", "end", 'must be an array of strings, got "end"'),
        ("stop", [1], "'stop[0]' must be a string, got 1"),
        ("stop", ["a", ""], "'stop[1]' must not be empty"),
        ("stop", ["a"] * 65, "at most 64 strings, got 65"),
        ("stop", ["é" * 513], "'stop[0]' must have at most 1024 bytes of UTF-8, got 1026"),
        ("stop", ["\udfff"], "'stop[0]' has a lone surrogate"),
        ("stream", 1, "must be true or false, got 1"),
        ("stream", "x" * 1000, 'must be true or false, got "' + "x" * 39 + "… (1002 characters)"),
    ],
)
def test_a_wrong_value_is_refused_with_field_limit_and_value(field: str, value: object, says: str) -> None:
    error = refusal({"prompt": "a"} | {field: value})
    assert error.param == field
    assert says in error.message


def test_the_prompt_is_required() -> None:
    assert (refusal({}).param, refusal({"prompt": None}).code) == ("prompt", "missing_field")


def test_limits_come_from_the_settings() -> None:
    settings = Settings(max_prompt_bytes=4, max_n_predict=10, n_predict=10)
    assert "at most 4 bytes of UTF-8, got 6" in refusal({"prompt": "ééé"}, settings).message
    assert "from -1 to 10, got 11" in refusal({"prompt": "", "n_predict": 11}, settings).message
    assert parse_completion({"prompt": "", "n_predict": -1}, settings).n_predict == 10


@pytest.mark.parametrize("field", sorted(NEUTRAL))
def test_an_unsupported_field_is_refused_unless_neutral(field: str) -> None:
    for neutral in NEUTRAL[field]:
        parse_completion({"prompt": "a", field: neutral}, SETTINGS)
    error = refusal({"prompt": "a", field: 77})
    assert (error.param, error.code) == (field, "unsupported_field")
    assert f"'{field}' is not supported" in error.message
    assert "got 77" in error.message


def test_false_is_not_the_neutral_zero() -> None:
    assert refusal({"prompt": "a", "n_keep": False}).code == "unsupported_field"


def test_too_many_completions_are_refused() -> None:
    assert "at most 128 completions in all, got 144" in refusal({"prompt": ["a"] * 9, "n_cmpl": 16}).message


def test_an_unknown_field_is_refused_by_name() -> None:
    error = refusal({"prompt": "a", "max_tokens": 5})
    assert (error.param, error.code) == ("max_tokens", "unknown_field")
    assert refusal({"prompt": "a", **dict.fromkeys("zyxwvuts", 1)}).param == "s"  # whatever the order


def test_an_unknown_name_is_safe_to_send_back() -> None:
    error = refusal({"prompt": "a", "\ud800" + "x" * 10_000: 5})
    assert len(json.dumps(error.body(), ensure_ascii=False).encode()) < 400


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "the body is empty"),
        (b" \n", "the body is empty"),
        (b"{", "at line 1, column 2"),
        (b'{"a": 1,}', "the body is not JSON"),
        (b"{'a': 1}", "the body is not JSON"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": -Infinity}', "-Infinity is no JSON number"),
        (b'{"a": ' + b"1" * 5000 + b"}", "too many digits"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8 at byte 7"),
        (b'\xef\xbb\xbf{"a": 1}', "the body is not JSON"),
        (b'{"a": 1} {}', "the body is not JSON"),
        (b"[]", "must be a JSON object, got an array of 0"),
        (b'"text"', 'must be a JSON object, got "text"'),
        (b"null", "must be a JSON object, got null"),
        (b'{"a": 1, "b": 2, "a": 3}', 'field "a" is there twice'),
        (b'{"a": {"b": 1, "b": 1}}', 'field "b" is there twice'),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(raw: bytes, says: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_object(raw)
    assert caught.value.status == 400
    assert says in caught.value.message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None, exclude_categories=())),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def outcome(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a function returns, or the body of its refusal. Nothing else may come of it."""
    try:
        return function()
    except ApiError as error:
        result = error
    assert result.status == 400
    json.dumps(result.body(), ensure_ascii=False).encode()
    return result.body()


@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(), JSON))
def test_any_object_is_valid_or_refused(body: dict[str, Any]) -> None:
    result = outcome(lambda: {"asked": parse_completion(body, SETTINGS).for_engine({}, True)})
    json.dumps(result, ensure_ascii=False, allow_nan=False).encode()


MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "user", "assistant", "tool"]) | JSON,
        "content": st.text()
        | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.text() | JSON}))
        | JSON,
        "refusal": JSON,
    },
)
OPENAI = st.dictionaries(st.sampled_from(OPENAI_FIELDS), JSON | st.integers(-2, 2) | st.booleans(), max_size=3)


@given(OPENAI, st.lists(MESSAGE | JSON, max_size=3) | JSON)
def test_any_chat_is_valid_or_refused(body: dict[str, Any], messages: Any) -> None:
    result = outcome(
        lambda: {"asked": parse_chat(body | {"messages": messages}, SETTINGS).completion.for_engine({}, True)}
    )
    json.dumps(result, ensure_ascii=False, allow_nan=False).encode()


@given(OPENAI, st.text() | st.lists(st.text() | st.integers(0, 9), max_size=2) | JSON)
def test_any_text_is_valid_or_refused(body: dict[str, Any], prompt: Any) -> None:
    result = outcome(lambda: {"asked": parse_text(body | {"prompt": prompt}, SETTINGS).completion.for_engine({}, True)})
    json.dumps(result, ensure_ascii=False, allow_nan=False).encode()


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_an_object_or_refused(raw: bytes) -> None:
    assert isinstance(outcome(lambda: parse_object(raw)), dict)
