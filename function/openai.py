"""OpenAI's shapes: `/v1/completions` and `/v1/chat/completions`.

Source: https://platform.openai.com/docs/api-reference. What the engine cannot do is refused by name unless its value is
the one that changes nothing, because stock clients send many of those. Fields of llama.cpp's sampling are taken too. A
field that is left out has the default of `/completion`, but for the length: an answer in a chat ends by itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from function import schema
from function.chat_template import NAMES, Message
from function.schema import Boolean, Integer, Kind, Text, describe, invalid

if TYPE_CHECKING:
    from function.settings import Settings

MAX_MODEL_BYTES = 256
MAX_MESSAGES = 4096
COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions
INT64_MAX = 2**63 - 1

INERT = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "store",
    "user",
}
_NEUTRAL: dict[str, tuple[object, ...]] = {"logit_bias": ({},), "n": (1,), "service_tier": ("auto", "default")}
CHAT_NEUTRAL: dict[str, tuple[object, ...]] = _NEUTRAL | {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
TEXT_NEUTRAL: dict[str, tuple[object, ...]] = _NEUTRAL | {
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (),
    "suffix": ("",),
}
# What clients send back of the messages that they were given.
MESSAGE_NEUTRAL: dict[str, tuple[object, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_calls": ([],),
}


@dataclass(frozen=True)
class Role:
    """Who speaks."""

    def __call__(self, name: str, value: object) -> str:
        """Checks `value`."""
        if not isinstance(value, str) or value not in NAMES:
            raise invalid(f"'{name}' must be one of {', '.join(NAMES)}, got {describe(value)}", param=name)
        return value

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        return {"enum": list(NAMES)}


@dataclass(frozen=True)
class Content:
    """A text, or an array of parts `{"type": "text", "text": …}`, which are joined."""

    max_bytes: int

    def __call__(self, name: str, value: object) -> str:
        """Checks `value`."""
        check = Text(self.max_bytes)
        if not isinstance(value, list):
            return check(name, value)
        texts: list[str] = []
        for index, part in enumerate(value):
            where = f"{name}[{index}]"
            if not isinstance(part, dict) or part.get("type") != "text" or part.keys() != {"type", "text"}:
                raise invalid(f'\'{where}\' must be {{"type": "text", "text": …}}, got {describe(part)}', param=name)
            texts.append(check(f"{where}.text", part["text"], param=name))
        return check(name, "".join(texts))

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        text = Text(self.max_bytes).document()
        part = {
            "type": "object",
            "properties": {"type": {"const": "text"}, "text": text},
            "required": ["type", "text"],
            "additionalProperties": False,
        }
        return {"anyOf": [text, {"type": "array", "items": part}]}


@dataclass(frozen=True)
class Messages:
    """A conversation, of at most `max_bytes` of UTF-8 in all."""

    max_bytes: int

    def __call__(self, name: str, value: object) -> tuple[Message, ...]:
        """Checks `value`."""
        if not isinstance(value, list):
            raise invalid(f"'{name}' must be an array, got {describe(value)}", param=name, code="invalid_type")
        if not 1 <= len(value) <= MAX_MESSAGES:
            raise invalid(f"'{name}' must have 1 to {MAX_MESSAGES} messages, got {len(value)}", param=name)
        messages = tuple(self._message(f"{name}[{index}]", message) for index, message in enumerate(value))
        size = sum(len(message.content.encode()) for message in messages)
        if size > self.max_bytes:
            message = f"'{name}' must have at most {self.max_bytes} bytes of UTF-8 in all, got {size}"
            raise invalid(message, param=name, code="too_long")
        return messages

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        message = schema.document(self._kinds(), ["role", "content"], MESSAGE_NEUTRAL, ())
        return {"type": "array", "items": message, "minItems": 1, "maxItems": MAX_MESSAGES}

    def _kinds(self) -> dict[str, Kind]:
        return {"role": Role(), "content": Content(self.max_bytes)}

    def _message(self, where: str, value: object) -> Message:
        if not isinstance(value, dict):
            raise invalid(f"'{where}' must be an object, got {describe(value)}", param="messages", code="invalid_type")
        try:
            return Message(**schema.check(value, self._kinds(), ["role", "content"], MESSAGE_NEUTRAL))
        except schema.ApiError as error:
            raise invalid(f"'{where}': {error.message}", param="messages", code=error.code) from None


@dataclass(frozen=True)
class TextPrompt:
    """What `/completion` takes, or an array with one of it."""

    max_bytes: int

    def __call__(self, name: str, value: object) -> str | tuple[int, ...]:
        """Checks `value`."""
        if isinstance(value, list) and value and isinstance(value[0], str | list):
            if len(value) > 1:
                message = f"'{name}' must be one prompt: several are not supported, got {len(value)}"
                raise invalid(message, param=name, code="unsupported_field")
            value = value[0]
        return schema.Prompt(self.max_bytes)(name, value)

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        one = schema.Prompt(self.max_bytes).document()
        return {"anyOf": [*one["anyOf"], {"type": "array", "items": one, "minItems": 1, "maxItems": 1}]}


@dataclass(frozen=True)
class StreamOptions:
    """`{"include_usage": …}` → whether the last event of a stream tells the counts of tokens."""

    def __call__(self, name: str, value: object) -> bool:
        """Checks `value`."""
        if not isinstance(value, dict):
            raise invalid(f"'{name}' must be an object, got {describe(value)}", param=name, code="invalid_type")
        try:
            given = schema.check(value, self._kinds(), inert=["include_obfuscation"])
        except schema.ApiError as error:
            raise invalid(f"'{name}': {error.message}", param=name, code=error.code) from None
        return bool(given.get("include_usage"))

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        return schema.document(self._kinds(), inert=["include_obfuscation"])

    def _kinds(self) -> dict[str, Kind]:
        return {"include_usage": Boolean()}


def _kinds() -> dict[str, Kind]:
    return schema.sampling_kinds() | {
        "model": Text(MAX_MODEL_BYTES),
        "seed": Integer(-INT64_MAX - 1, INT64_MAX),
        "stop": schema.Stops(or_one=True),
        "stream_options": StreamOptions(),
    }


def chat_kinds(settings: Settings) -> dict[str, Kind]:
    """The fields of `/v1/chat/completions`."""
    length = schema.length_kind(settings)
    return _kinds() | {
        "messages": Messages(settings.max_prompt_bytes),
        "max_tokens": length,
        "max_completion_tokens": length,
    }


def text_kinds(settings: Settings) -> dict[str, Kind]:
    """The fields of `/v1/completions`."""
    return _kinds() | {"prompt": TextPrompt(settings.max_prompt_bytes), "max_tokens": schema.length_kind(settings)}


def template_kinds(settings: Settings) -> dict[str, Kind]:
    """The fields of `/apply-template`."""
    return {"messages": Messages(settings.max_prompt_bytes)}


@dataclass(frozen=True)
class Request:
    """A valid request. `completion.prompt` of a chat is made of `messages` once the model is known."""

    completion: schema.CompletionRequest
    model: str | None
    include_usage: bool
    messages: tuple[Message, ...] = ()


def parse_chat(body: Mapping[str, object], settings: Settings) -> Request:
    """Validates a decoded `/v1/chat/completions`.

    Raises:
        ApiError: 400, naming the field, its limit and the value.
    """
    given = schema.check(body, chat_kinds(settings), ["messages"], CHAT_NEUTRAL, INERT)
    if "max_tokens" in given and "max_completion_tokens" in given:
        message = "'max_tokens' is the old name of 'max_completion_tokens': send one of them"
        raise invalid(message, param="max_tokens")
    length = given.pop("max_completion_tokens", given.pop("max_tokens", -1))
    messages = given.pop("messages")
    return _request(given | {"prompt": (), "n_predict": length}, settings, messages)


def parse_text(body: Mapping[str, object], settings: Settings) -> Request:
    """Validates a decoded `/v1/completions`.

    Raises:
        ApiError: 400, naming the field, its limit and the value.
    """
    given = schema.check(body, text_kinds(settings), ["prompt"], TEXT_NEUTRAL, INERT)
    limit = settings.max_n_predict or COMPLETION_MAX_TOKENS
    return _request(given | {"n_predict": given.pop("max_tokens", min(limit, COMPLETION_MAX_TOKENS))}, settings)


def _request(given: dict[str, Any], settings: Settings, messages: tuple[Message, ...] = ()) -> Request:
    model = given.pop("model", None)
    include_usage = given.pop("stream_options", None)
    if include_usage is not None and not given.get("stream"):
        raise invalid("'stream_options' needs \"stream\": true", param="stream_options")
    if "seed" in given:
        given["seed"] %= schema.UINT32_MAX + 1  # the engine's; its -1 would be a random one
    return Request(schema.completion_request(given, settings), model, bool(include_usage), messages)


class _Answer:
    """What the answers of both routes have in common."""

    end = "data: [DONE]\n\n"
    chunk_kind: str
    kind: str

    def __init__(self, identifier: str, include_usage: bool) -> None:
        self._identifier = identifier
        self._include_usage = include_usage
        self._created = int(time.time())

    def _choice(self, content: str, reason: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, content: str | None, reason: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def whole(self, done: Mapping[str, Any], model: str) -> dict[str, Any]:
        choice = self._choice(done["content"], _finish_reason(done))
        return self._head(self.kind, model) | {
            "choices": [choice],
            "usage": _usage(done),
            "timings": done["timings"],
        }

    def opening(self, _model: str) -> list[dict[str, Any]]:
        return []

    def piece(self, token: Mapping[str, Any], model: str) -> dict[str, Any]:
        return self._chunk(model, [self._delta(token["content"], None)])

    def closing(self, done: Mapping[str, Any], model: str) -> list[dict[str, Any]]:
        last = self._chunk(model, [self._delta(None, _finish_reason(done))]) | {"timings": done["timings"]}
        return [last, self._chunk(model, []) | {"usage": _usage(done)}] if self._include_usage else [last]

    def _chunk(self, model: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._head(self.chunk_kind, model) | {"choices": choices}
        return chunk | {"usage": None} if self._include_usage else chunk

    def _head(self, kind: str, model: str) -> dict[str, Any]:
        return {"id": self._identifier, "object": kind, "created": self._created, "model": model}


class ChatAnswer(_Answer):
    """The answer to `/v1/chat/completions`."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self, model: str) -> list[dict[str, Any]]:
        """Who speaks."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk(model, [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])]

    def _choice(self, content: str, reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": content, "refusal": None}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}

    def _delta(self, content: str | None, reason: str | None) -> dict[str, Any]:
        delta = {} if content is None else {"content": content}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}


class TextAnswer(_Answer):
    """The answer to `/v1/completions`."""

    kind = chunk_kind = "text_completion"

    def _choice(self, content: str, reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": content, "logprobs": None, "finish_reason": reason}

    def _delta(self, content: str | None, reason: str | None) -> dict[str, Any]:
        return self._choice(content or "", reason)


def model_body(name: str, created: int) -> dict[str, Any]:
    """A model of `/v1/models`."""
    return {"id": name, "object": "model", "created": created, "owned_by": "bitnet"}


def _finish_reason(done: Mapping[str, Any]) -> str:
    return "stop" if done["stop_type"] in ("eos", "word") else "length"


def _usage(done: Mapping[str, Any]) -> dict[str, Any]:
    prompt, predicted = done["tokens_evaluated"], done["tokens_predicted"]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": predicted,
        "total_tokens": prompt + predicted,
        "prompt_tokens_details": {"cached_tokens": done["tokens_cached"]},
    }


KNOWN_FIELDS = (
    schema.sampling_kinds().keys()
    | CHAT_NEUTRAL.keys()
    | TEXT_NEUTRAL.keys()
    | INERT
    | {
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "model",
        "prompt",
        "seed",
        "stop",
        "stream_options",
    }
)
