"""Tools: what the model is told of them, the grammar of its calls, and how they are read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from function import tools
from function.chat_template import text
from function.engine import Engine
from function.model_store import ModelStore
from function.openai import parse_chat
from function.settings import Settings
from function.structured import Grammars
from tests.function.test_structured import takes

pytestmark = pytest.mark.usefixtures("engine_path")

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a town.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
            "required": ["town"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
USER = {"role": "user", "content": "What is the weather in Ulm?"}
CALL = '{"name": "get_weather", "arguments": {"town": "Ulm"}}'
SETTINGS = Settings()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(SETTINGS, ModelStore(SETTINGS))
    yield engine
    engine.stop()


@pytest.mark.parametrize(
    ("fields", "answer", "fits"),
    [
        ({}, "It rains.", True),
        ({}, "", True),
        ({}, CALL, True),
        ({}, f'{CALL}\n{{"name": "clock", "arguments": {{}}}}', True),
        ({}, '{"name": "clock", "arguments": {"x": 1}}', False),
        ({}, '{"name": "get_weather", "arguments": {}}', False),
        ({}, '{"name": "other", "arguments": {}}', False),
        ({}, f"{CALL} and more", False),
        ({"parallel_tool_calls": False}, f"{CALL}\n{CALL}", False),
        ({"tool_choice": "required"}, CALL, True),
        ({"tool_choice": "required"}, "It rains.", False),
        ({"tool_choice": {"type": "function", "function": {"name": "clock"}}}, CALL, False),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "auto",
                        "tools": [{"type": "function", "function": {"name": "clock"}}],
                    },
                }
            },
            CALL,
            False,
        ),
    ],
)
def test_what_may_be_answered(engine: Engine, fields: dict[str, Any], answer: str, fits: bool) -> None:
    request = parse_chat({"messages": [USER], "tools": [WEATHER, CLOCK]} | fields, SETTINGS)
    assert request.completion.structure is not None
    assert takes(Grammars(engine), engine, request.completion.structure, answer) == fits


def test_who_wants_no_call_gets_a_plain_chat() -> None:
    plain = parse_chat({"messages": [USER]}, SETTINGS)
    assert parse_chat({"messages": [USER], "tools": [WEATHER], "tool_choice": "none"}, SETTINGS) == plain
    assert parse_chat({"messages": [USER], "tools": []}, SETTINGS) == plain
    assert plain.completion.structure is None


def test_what_the_model_reads() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        USER | {"name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call("c1", "get_weather", '{"town":"Ulm"}')]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    request = parse_chat({"messages": messages, "tools": [WEATHER], "parallel_tool_calls": False}, SETTINGS)
    parameters = json.dumps(WEATHER["function"]["parameters"])
    assert text(request.messages) == (
        "<|begin_of_text|>System: Be brief.\n\n"
        "You can call these functions:\n"
        f'{{"name": "get_weather", "description": "The weather of a town.", "parameters": {parameters}}}\n'
        'To call one, answer with {"name": "…", "arguments": {…}} and nothing else.\n'
        "Otherwise answer in words.<|eot_id|>"
        "User: Ann: What is the weather in Ulm?<|eot_id|>"
        f"Assistant: {CALL}<|eot_id|>"
        "Tool: get_weather: rain<|eot_id|>"
        "Assistant: "
    )


def test_without_a_system_message_there_is_one_for_the_tools() -> None:
    request = parse_chat({"messages": [USER], "tools": [CLOCK], "tool_choice": "required"}, SETTINGS)
    assert [message.role for message in request.messages] == ["system", "user"]
    assert request.messages[0].content.endswith("Call one now.")


def call(identifier: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)
CALLS = st.lists(
    st.tuples(st.from_regex(r"[a-zA-Z0-9_-]{1,9}", fullmatch=True), st.dictionaries(st.text(), JSON)), min_size=1
)


@given(CALLS, st.booleans(), st.lists(st.integers(1, 9)))
def test_calls_are_read_however_they_are_cut(calls: list[tuple[str, Any]], ascii_only: bool, cuts: list[int]) -> None:
    spelled = [(name, json.dumps(arguments, ensure_ascii=ascii_only)) for name, arguments in calls]
    written = "\n".join(f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in spelled)
    reader = tools.CallReader()
    deltas: list[dict[str, Any]] = []
    for size in cuts:
        deltas += reader.feed(written[:size])
        written = written[size:]
    deltas += reader.feed(written)
    assert [(made["function"]["name"], made["function"]["arguments"]) for made in reader.calls] == spelled
    assert len({made["id"] for made in reader.calls}) == len(calls)
    joined = [""] * len(calls)
    for delta in deltas:
        joined[delta["index"]] += delta["function"]["arguments"]
    assert joined == [arguments for _, arguments in spelled]
    assert [delta["function"]["name"] for delta in deltas if "id" in delta] == [name for name, _ in spelled]


def test_a_call_that_was_cut_short_is_given_as_far_as_it_goes() -> None:
    reader = tools.CallReader()
    reader.feed('{"name": "f", "arguments": {"a": "}')
    assert reader.calls[0]["function"] == {"name": "f", "arguments": '{"a": "}'}
    assert tools.CallReader().feed('{"name": "f", "argu') == []
