"""Tools: functions that a chat may call. OpenAI's shapes outside, lines of JSON in the model's text.

A call is `{"name": "f", "arguments": {…}}`, with these spaces, and nothing else but calls, one a line, is in its
message. The model is told so in the system message, and the grammar leaves it no other way: an answer whose first
character is `{` is calls, any other is text.

Source: https://platform.openai.com/docs/guides/function-calling.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from function import json_schema
from function.schema import (
    Boolean,
    Fields,
    Kind,
    Object,
    Structure,
    Text,
    check,
    describe,
    document,
    invalid,
    within,
)
from function.structured import JSON_OPTIONS, refusal

MAX_TOOLS = 128
MAX_TOOL_CALLS = 128  # of a message
MAX_DESCRIPTION_BYTES = 16_384
MAX_NAME_CHARACTERS = 64
HINTS = frozenset({"cache_control", "prompt_cache_breakpoint"})  # of where a cache might begin: ours needs none
CALL_INERT = {"parsed_arguments"}  # openai-python's own, of a call that it has read
NAME_PATTERN = "^[a-zA-Z0-9_-]{1,64}$"

HEAD, MIDDLE, TAIL = '{"name": "', '", "arguments": ', "}"


@dataclass(frozen=True)
class Tool:
    """A function that may be called. `parameters` is the text of a JSON Schema."""

    name: str
    description: str
    parameters: str


@dataclass(frozen=True)
class Call:
    """A function that was called; `arguments` is the text of a JSON object."""

    identifier: str
    name: str
    arguments: str

    @property
    def text(self) -> str:
        """As the model writes it."""
        try:
            arguments = json.dumps(json.loads(self.arguments), ensure_ascii=False)
        except (ValueError, RecursionError):
            arguments = self.arguments
        return f"{HEAD}{self.name}{MIDDLE}{arguments}{TAIL}"


@dataclass(frozen=True)
class Choice:
    """Whether functions are called: `none`, `auto`, `required`; only those of `names`, if there are any."""

    mode: str
    names: tuple[str, ...] = ()
    once: bool = False


@dataclass(frozen=True)
class FunctionName:
    """The name of a function."""

    def __call__(self, name: str, value: object) -> str:
        """Checks `value`."""
        text = Text(MAX_NAME_CHARACTERS)(name, value)
        if not text or not all(
            character.isascii() and (character.isalnum() or character in "_-") for character in text
        ):
            raise invalid(f"'{name}' must have letters, digits, _ and - only, got {describe(value)}", param=name)
        return text

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        return {"type": "string", "pattern": NAME_PATTERN}


@dataclass(frozen=True)
class Tools:
    """An array of `{"type": "function", "function": {"name", "description", "parameters", "strict"}}`."""

    def __call__(self, name: str, value: object) -> tuple[Tool, ...]:
        """Checks `value`."""
        tools: list[Tool] = []
        for where, item in _items(name, value, MAX_TOOLS):
            function = _function(where, item, self._kinds(), ["name"], name)
            tool = Tool(function["name"], function.get("description", ""), function.get("parameters", NO_PARAMETERS))
            if (kind := json.loads(tool.parameters).get("type", "object")) not in ("object", ["object"]):
                message = f"'{where}.function.parameters.type' must be \"object\", got {describe(kind)}"
                raise invalid(message, param=name)
            if any(tool.name == other.name for other in tools):
                raise invalid(f"'{where}': there are two functions {describe(tool.name)}", param=name)
            tools.append(tool)
        return tuple(tools)

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        return {"type": "array", "items": _function_document(self._kinds(), ["name"]), "maxItems": MAX_TOOLS}

    def _kinds(self) -> dict[str, Kind]:
        return {
            "name": FunctionName(),
            "description": Text(MAX_DESCRIPTION_BYTES),
            "parameters": Object(),
            "strict": Boolean(),
        }


NO_PARAMETERS = '{"type":"object","properties":{},"additionalProperties":false}'


@dataclass(frozen=True)
class Calls:
    """The `tool_calls` of an assistant's message."""

    max_bytes: int

    def __call__(self, name: str, value: object) -> tuple[Call, ...]:
        """Checks `value`."""
        calls: list[Call] = []
        for where, item in _items(name, value, MAX_TOOL_CALLS):
            identifier = item.get("id") if isinstance(item, dict) else None
            rest = {key: part for key, part in item.items() if key not in ("id", "index")} if identifier else item
            function = _function(where, rest, self._kinds(), ["name", "arguments"], name, CALL_INERT)
            calls.append(Call(Text(MAX_DESCRIPTION_BYTES)(f"{where}.id", identifier or ""), **function))
        return tuple(calls)

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        call = _function_document(self._kinds(), ["name", "arguments"], CALL_INERT)
        call["properties"] |= {"id": {"type": "string"}, "index": {"type": "integer"}}
        return {"type": "array", "items": call, "maxItems": MAX_TOOL_CALLS}

    def _kinds(self) -> dict[str, Kind]:
        return {"name": FunctionName(), "arguments": Text(self.max_bytes)}


@dataclass(frozen=True)
class ToolChoice:
    """`none`, `auto`, `required`, one function, or some that are allowed."""

    def __call__(self, name: str, value: object) -> Choice:
        """Checks `value`."""
        if isinstance(value, dict) and value.get("type") == "function":
            return Choice("required", (self._named(name, value, name),), once=True)
        match value:
            case "none" | "auto" | "required":
                return Choice(str(value))
            case {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list(tools)},
            }:
                where = f"{name}.allowed_tools.tools"
                return Choice(mode, tuple(self._named(f"{where}[{i}]", tool, name) for i, tool in enumerate(tools)))
        accepted = (
            '"none", "auto", "required", {"type": "function", "function": {"name": …}} or '
            '{"type": "allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": […]}}'
        )
        raise invalid(f"'{name}' must be {accepted}, got {describe(value)}", param=name)

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        function = {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "properties": {"name": FunctionName().document()},
                    "required": ["name"],
                    "additionalProperties": False,
                },
            },
            "required": ["type", "function"],
            "additionalProperties": False,
        }
        allowed = {
            "type": "object",
            "properties": {"mode": {"enum": ["auto", "required"]}, "tools": {"type": "array", "items": function}},
            "required": ["mode", "tools"],
        }
        some = {
            "type": "object",
            "properties": {"type": {"const": "allowed_tools"}, "allowed_tools": allowed},
            "required": ["type", "allowed_tools"],
        }
        return {"anyOf": [{"enum": ["none", "auto", "required"]}, function, some]}

    def _named(self, where: str, tool: object, name: str) -> str:
        function: str = _function(where, tool, {"name": FunctionName()}, ["name"], name)["name"]
        return function


def chosen(tools: Sequence[Tool], choice: Choice | None) -> tuple[Tool, ...]:
    """Those of `tools` that may be called.

    Raises:
        ApiError: 400: the choice names another one, or wants a call and there is no tool.
    """
    if choice is None:
        return tuple(tools)
    names = {tool.name for tool in tools}
    for name in choice.names:
        if name not in names:
            raise invalid(f"'tool_choice' must name one of 'tools', got {describe(name)}", param="tool_choice")
    if choice.mode == "required" and not tools:
        raise invalid("'tool_choice' wants a call, but there are no 'tools'", param="tool_choice")
    if choice.mode == "none":
        return ()
    return tuple(tool for tool in tools if not choice.names or tool.name in choice.names)


def structure(tools: Sequence[Tool], *, required: bool, several: bool) -> Structure:
    """The grammar of an answer that may, or must, call one or several of `tools`.

    Raises:
        ApiError: 400: parameters that cannot be kept to.
    """
    lines = ["start: calls" if required else "start: TEXT? | calls"]
    if not required:
        lines.append(r"TEXT: /[^{](.|\n)*/")
    lines.append(r'calls: call ("\n" call)*' if several else "calls: call")
    lines.append("call: " + " | ".join(f"call_{index}" for index in range(len(tools))))
    for index, tool in enumerate(tools):
        try:
            schema = json_schema.prepared(json.loads(tool.parameters) | {"type": "object"})
        except (ValueError, RecursionError) as error:
            raise refusal("tools", f"{tool.name}: {error}") from None
        schema["x-guidance"] = JSON_OPTIONS
        head, tail = json.dumps(f"{HEAD}{tool.name}{MIDDLE}"), json.dumps(TAIL)
        lines += [f"call_{index}: {head} arguments_{index} {tail}", f"arguments_{index}: %json {json.dumps(schema)}"]
    return Structure("lark", "\n".join(lines), "tools", tuple((tool.name, tool.parameters) for tool in tools))


def instructions(tools: Sequence[Tool], *, required: bool, several: bool) -> str:
    """What the system message says of the tools."""
    lines = ["You can call these functions:"]
    for tool in tools:
        parts: dict[str, Any] = {"name": tool.name}
        if tool.description:
            parts["description"] = tool.description
        lines.append(json.dumps(parts | {"parameters": json.loads(tool.parameters)}, ensure_ascii=False))
    form = f"{HEAD}…{MIDDLE}{{…}}{TAIL}"
    lines.append(
        f"To call one, answer with {form} and nothing else{', one a line if there are several' if several else ''}."
    )
    lines.append("Call one now." if required else "Otherwise answer in words.")
    return "\n".join(lines)


class CallReader:
    """Reads the calls in an answer as its text comes. Text that is no call has another first character."""

    def __init__(self) -> None:
        self._text = ""  # that is not yet understood: less than what comes before a name's or after the arguments' end
        self._state = "head"
        self._depth = 0
        self._in_string = self._escaped = False
        self.calls: list[dict[str, Any]] = []  # whole so far, in OpenAI's shape

    @property
    def whole(self) -> bool:
        """Whether there are calls, the last of which has all of its arguments."""
        return bool(self.calls) and self._state != "arguments"

    def feed(self, text: str) -> list[dict[str, Any]]:
        """The `tool_calls` of the `delta` that `text` makes: usually one, none, or several."""
        self._text += text
        deltas: list[dict[str, Any]] = []
        while self._step(deltas):
            pass
        return deltas

    def _step(self, deltas: list[dict[str, Any]]) -> bool:
        """Understands the next part of the text, if it is there."""
        if self._state == "head":
            begin = self._text.find(HEAD)
            end = self._text.find(MIDDLE, begin + len(HEAD)) if begin >= 0 else -1
            if end < 0:
                return False
            name, self._text = self._text[begin + len(HEAD) : end], self._text[end + len(MIDDLE) :]
            function = {"name": name, "arguments": ""}
            self.calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
            deltas.append({"index": len(self.calls) - 1, **self.calls[-1], "function": dict(function)})
            self._state = "arguments"
            return True
        if self._state == "arguments":
            end = self._arguments_end()
            piece, self._text = self._text[:end], self._text[end:]
            if piece:
                self.calls[-1]["function"]["arguments"] += piece
                deltas.append({"index": len(self.calls) - 1, "function": {"arguments": piece}})
            if self._depth == 0 and self.calls[-1]["function"]["arguments"]:
                self._state = "tail"
                return True
            return False
        if not self._text.startswith(TAIL):
            return False
        self._text = self._text.removeprefix(TAIL)
        self._state = "head"
        return True

    def _arguments_end(self) -> int:
        """How much of the text belongs to the arguments: an object, whose braces are counted outside of strings."""
        for index, character in enumerate(self._text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "]}":
                self._depth -= 1
                if self._depth == 0:
                    return index + 1
        return len(self._text)


def _items(name: str, value: object, most: int) -> list[tuple[str, Any]]:
    if not isinstance(value, list):
        raise invalid(f"'{name}' must be an array, got {describe(value)}", param=name, code="invalid_type")
    if len(value) > most:
        raise invalid(f"'{name}' must have at most {most} elements, got {len(value)}", param=name, code="too_long")
    return [(f"{name}[{index}]", item) for index, item in enumerate(value)]


def _function(
    where: str,
    value: object,
    kinds: Mapping[str, Kind],
    required: Sequence[str],
    name: str,
    inert: Collection[str] = (),
) -> dict[str, Any]:
    """The checked fields of the function in `{"type": "function", "function": {…}}`."""
    fields = Fields()(where, value, param=name)
    if (kind := fields.get("type")) is not None and kind != "function":
        message = f"'{where}.type' must be \"function\", got {describe(kind)}"
        raise invalid(message, param=name, code="unsupported_field")
    with within(where, name):
        given = check(
            fields, {"type": Text(MAX_NAME_CHARACTERS), "function": Fields()}, ["type", "function"], inert=HINTS
        )
    with within(f"{where}.function", name):
        return check(given["function"], kinds, required, inert=inert)


def _function_document(
    kinds: Mapping[str, Kind], required: Sequence[str], inert: Collection[str] = ()
) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"type": {"const": "function"}, "function": document(kinds, required, inert=inert)}
        | dict.fromkeys(sorted(HINTS), True),
        "required": ["type", "function"],
        "additionalProperties": False,
    }
