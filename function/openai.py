"""OpenAI's shapes: `/v1/completions` and `/v1/chat/completions`.

Source: https://platform.openai.com/docs/api-reference. What the engine cannot do is refused by name unless its value is
the one that changes nothing, because stock clients send many of those. Fields of llama.cpp's sampling are taken too. A
field that is left out has the default of `/completion`, but for the length: an answer in a chat ends by itself.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from function import schema, tools
from function.chat_template import NAMES, Message
from function.schema import Boolean, Integer, Kind, LogitBias, Offsets, Structure, Text, describe, invalid

if TYPE_CHECKING:
    from function.settings import Settings

MAX_MODEL_BYTES = 256
MAX_MESSAGES = 4096
MAX_ID_BYTES = 256
COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions
INT64_MAX = 2**63 - 1

MAX_NAME_CHARACTERS = 64
NAME_PATTERN = rf"[^\s<|\\/>]{{1,{MAX_NAME_CHARACTERS}}}"
MAX_TOP_LOGPROBS = 20
MAX_TEXT_LOGPROBS = 5
MAX_BIAS = 100

INERT = {"metadata", "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "store", "user"}
_NEUTRAL: dict[str, tuple[object, ...]] = {"service_tier": ("auto", "default")}
CHAT_NEUTRAL: dict[str, tuple[object, ...]] = _NEUTRAL | {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
TEXT_NEUTRAL: dict[str, tuple[object, ...]] = _NEUTRAL | {"suffix": ("",)}
# What clients send back of the messages that they were given.
MESSAGE_NEUTRAL: dict[str, tuple[object, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
}
# openai-python's own, of an answer that it has read; LiteLLM's; what a model thought before another answer; hints.
MESSAGE_INERT = {"parsed", "provider_specific_fields", "reasoning_content", *tools.HINTS}
PART_KINDS = ("text", "refusal")


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
class SpeakerName:
    """The name of who speaks."""

    def __call__(self, name: str, value: object) -> str:
        """Checks `value`."""
        text = Text(4 * MAX_NAME_CHARACTERS)(name, value)
        if not re.fullmatch(NAME_PATTERN, text):
            message = f"'{name}' must have 1 to {MAX_NAME_CHARACTERS} characters, no white space and none of <|\\/>"
            raise invalid(f"{message}, got {describe(value)}", param=name)
        return text

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        return {"type": "string", "pattern": f"^{NAME_PATTERN}$"}


@dataclass(frozen=True)
class Content:
    """A text, or an array of parts `{"type": "text", "text": …}`, which are joined. A refusal is a text, too."""

    max_bytes: int

    def __call__(self, name: str, value: object) -> str:
        """Checks `value`."""
        check = Text(self.max_bytes)
        if isinstance(value, str):
            return check(name, value)
        if not isinstance(value, list):
            message = f"'{name}' must be a string or an array of parts, got {describe(value)}"
            raise invalid(message, param=name, code="invalid_type")
        return check(name, "".join(self._text(f"{name}[{index}]", part, name) for index, part in enumerate(value)))

    def _text(self, where: str, part: object, name: str) -> str:
        """That of a part."""
        fields = schema.Fields()(where, part, param=name)
        kind = fields.get("type")
        if kind not in PART_KINDS:
            raise invalid(
                f"'{where}.type' must be \"text\", got {describe(kind)}", param=name, code="unsupported_field"
            )
        with schema.within(where, name):
            given = schema.check(fields, {kind: Text(self.max_bytes)}, [kind], inert={"type", *tools.HINTS})
        text: str = given[kind]
        return text

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        text = Text(self.max_bytes)
        parts = [_variant(kind, {kind: text}, [kind], tools.HINTS) for kind in PART_KINDS]
        return {"anyOf": [text.document(), {"type": "array", "items": {"anyOf": parts}}]}


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
        called: dict[str, str] = {}
        messages = tuple(self._message(f"{name}[{index}]", message, called) for index, message in enumerate(value))
        size = sum(len(message.content.encode()) for message in messages)
        if size > self.max_bytes:
            message = f"'{name}' must have at most {self.max_bytes} bytes of UTF-8 in all, got {size}"
            raise invalid(message, param=name, code="too_long")
        return messages

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        message = schema.document(self._kinds(), ["role"], MESSAGE_NEUTRAL, MESSAGE_INERT)
        return {"type": "array", "items": message, "minItems": 1, "maxItems": MAX_MESSAGES}

    def _kinds(self) -> dict[str, Kind]:
        return {
            "role": Role(),
            "content": Content(self.max_bytes),
            "refusal": Text(self.max_bytes),
            "name": SpeakerName(),
            "tool_calls": tools.Calls(self.max_bytes),
            "tool_call_id": Text(MAX_ID_BYTES),
        }

    def _message(self, where: str, value: object, called: dict[str, str]) -> Message:
        """One message. `called` is the function of each call so far, by the call's id."""
        fields = schema.Fields()(where, value, param="messages")
        with schema.within(where, "messages"):
            given = schema.check(fields, self._kinds(), ["role"], MESSAGE_NEUTRAL, MESSAGE_INERT)
            return _rendered(given, called, is_null="content" in fields)


def _rendered(given: Mapping[str, Any], called: dict[str, str], *, is_null: bool) -> Message:
    """A message as the template takes it: who speaks, and text. Names and calls become part of the text.

    `is_null`: content that is not in `given` was sent, as null.
    """
    role, calls = given["role"], given.get("tool_calls", ())
    if calls and role != "assistant":
        raise invalid(f"'tool_calls' is for the role assistant, got {describe(role)}", param="tool_calls")
    if "refusal" in given and role != "assistant":
        raise invalid(f"'refusal' is for the role assistant, got {describe(role)}", param="refusal")
    if "content" not in given and not (role == "assistant" and given.keys() & {"tool_calls", "refusal"}):
        if is_null:
            message = "'content' must be a string or an array of parts, got null"
            raise invalid(message, param="content", code="invalid_type")
        raise invalid("'content' is required", param="content", code="missing_field")
    texts = [given[field] for field in ("content", "refusal") if given.get(field)]
    texts += [call.text for call in calls]
    called |= {call.identifier: call.name for call in calls}
    name = given.get("name")
    if role == "tool":
        if (identifier := given.get("tool_call_id")) is None:
            raise invalid("'tool_call_id' is required", param="tool_call_id", code="missing_field")
        if identifier not in called:
            message = f"'tool_call_id' must be that of a call before, got {describe(identifier)}"
            raise invalid(message, param="tool_call_id")
        name = called[identifier]
    elif "tool_call_id" in given:
        raise invalid(f"'tool_call_id' is for the role tool, got {describe(role)}", param="tool_call_id")
    text = "\n".join(texts)
    return Message(role, f"{name}: {text}" if name else text)


@dataclass(frozen=True)
class ResponseFormat:
    """`{"type": "text"}`, `{"type": "json_object"}` or `{"type": "json_schema", "json_schema": {…}}`."""

    def __call__(self, name: str, value: object) -> Structure | None:
        """Checks `value`."""
        fields, variants = schema.Fields()(name, value), self._variants()
        kind = fields.get("type")
        if not isinstance(kind, str) or kind not in variants:
            accepted = ", ".join(variants)
            raise invalid(f"'{name}.type' must be one of {accepted}, got {describe(kind)}", param=name)
        kinds, required = variants[kind]
        with schema.within(name, name):
            given = schema.check(fields, kinds, required, inert={"type"})
        if kind == "text":
            return None
        if kind == "json_object":  # llama.cpp's may have a schema
            return Structure("json_schema", given.get("schema", '{"type":"object"}'), name)
        with schema.within(f"{name}.json_schema", name):
            wrapped = schema.check(given["json_schema"], self._wrapped(), ["name"])
        return Structure("json_schema", wrapped.get("schema", "{}"), name)

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        variants = {kind: _variant(kind, *fields) for kind, fields in self._variants().items()}
        variants["json_schema"]["properties"]["json_schema"] = schema.document(self._wrapped(), ["name"])
        return {"anyOf": list(variants.values())}

    def _variants(self) -> dict[str, tuple[dict[str, Kind], list[str]]]:
        """The fields beside `type`, and those that must be there."""
        return {
            "text": ({}, []),
            "json_object": ({"schema": schema.Object()}, []),
            "json_schema": ({"json_schema": schema.Fields()}, ["json_schema"]),
        }

    def _wrapped(self) -> dict[str, Kind]:
        return {
            "name": tools.FunctionName(),
            "description": Text(tools.MAX_DESCRIPTION_BYTES),
            "schema": schema.Object(),
            "strict": Boolean(),
        }


def _variant(
    kind: str, kinds: Mapping[str, Kind], required: Sequence[str], inert: Collection[str] = ()
) -> dict[str, Any]:
    """The JSON Schema of an object of this `type`."""
    document = schema.document(kinds, required, inert=inert)
    document["properties"] = {"type": {"const": kind}} | document["properties"]
    document["required"] = ["type", *required]
    return document


@dataclass(frozen=True)
class StreamOptions:
    """`{"include_usage": …}` → whether the last event of a stream tells the counts of tokens."""

    def __call__(self, name: str, value: object) -> bool:
        """Checks `value`."""
        fields = schema.Fields()(name, value)
        with schema.within(name, name):
            given = schema.check(fields, self._kinds(), inert=["include_obfuscation"])
        return bool(given.get("include_usage"))

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        return schema.document(self._kinds(), inert=["include_obfuscation"])

    def _kinds(self) -> dict[str, Kind]:
        return {"include_usage": Boolean()}


def _kinds() -> dict[str, Kind]:
    return schema.sampling_kinds() | {
        "model": Text(MAX_MODEL_BYTES),
        "n": Integer(1, schema.MAX_N),
        "seed": Integer(-INT64_MAX - 1, INT64_MAX),
        "stop": schema.Texts(or_one=True),
        "stream_options": StreamOptions(),
        "logit_bias": LogitBias(MAX_BIAS),
    }


def chat_kinds(settings: Settings) -> dict[str, Kind]:
    """The fields of `/v1/chat/completions`."""
    length = schema.length_kind(settings)
    return _kinds() | {
        "messages": Messages(settings.max_prompt_bytes),
        "max_tokens": length,
        "max_completion_tokens": length,
        "logprobs": Boolean(),
        "top_logprobs": Integer(0, MAX_TOP_LOGPROBS),
        "response_format": ResponseFormat(),
        "tools": tools.Tools(),
        "tool_choice": tools.ToolChoice(),
        "parallel_tool_calls": Boolean(),
    }


def text_kinds(settings: Settings) -> dict[str, Kind]:
    """The fields of `/v1/completions`."""
    return _kinds() | {
        "prompt": schema.Prompts(settings.max_prompt_bytes),
        "max_tokens": schema.length_kind(settings),
        "best_of": Integer(1, schema.MAX_N),
        "echo": Boolean(),
        "logprobs": Integer(0, MAX_TEXT_LOGPROBS),
    }


def template_kinds(settings: Settings) -> dict[str, Kind]:
    """The fields of `/apply-template`."""
    return {"messages": Messages(settings.max_prompt_bytes), "tools": tools.Tools()}


@dataclass(frozen=True)
class Request:
    """A valid request. `completion.prompts` of a chat is made of `messages` once the model is known."""

    completion: schema.CompletionRequest
    model: str | None
    include_usage: bool
    messages: tuple[Message, ...] = ()
    calls: bool = False
    """Whether an answer may be calls of tools."""
    must_call: bool = False
    """Whether it cannot be anything else."""
    echo: bool = False
    logprobs: bool = False
    """Of a text: whether they are in the answer. `best_of` needs them anyway."""
    n: int = 1
    """Completions of each prompt in the answer: the best ones of `completion.n`."""


def parse_chat(body: Mapping[str, object], settings: Settings) -> Request:
    """Validates a decoded `/v1/chat/completions`.

    Raises:
        ApiError: 400, naming the field, its limit and the value.
    """
    given = schema.check(body, chat_kinds(settings), ["messages"], CHAT_NEUTRAL, INERT)
    if "max_tokens" in given and "max_completion_tokens" in given:
        message = "'max_tokens' is the old name of 'max_completion_tokens': send one of them"
        raise invalid(message, param="max_tokens")
    if given.get("top_logprobs") and not given.get("logprobs"):
        raise invalid("'top_logprobs' needs \"logprobs\": true", param="top_logprobs")
    length = given.pop("max_completion_tokens", given.pop("max_tokens", -1))
    messages, structure = given.pop("messages"), given.pop("response_format", None)
    choice, several = given.pop("tool_choice", None), given.pop("parallel_tool_calls", True)
    callable_tools = tools.chosen(given.pop("tools", ()), choice)
    if callable_tools:
        if structure is not None:
            message = (
                "'response_format' must be text where 'tools' may be called: send \"tool_choice\": \"none\" or no tools"
            )
            raise invalid(message, param="response_format", code="unsupported_field")
        how = {
            "required": choice is not None and choice.mode == "required",
            "several": several and not (choice and choice.once),
        }
        structure = tools.structure(callable_tools, **how)
        messages = with_instructions(messages, tools.instructions(callable_tools, **how))
    given |= {"prompts": (), "n_predict": length, "structure": structure, "n_probs": given.pop("top_logprobs", 0)}
    must_call = bool(callable_tools) and choice is not None and choice.mode == "required"
    return replace(_request(given, settings), messages=messages, calls=bool(callable_tools), must_call=must_call)


def with_instructions(messages: Sequence[Message], text: str) -> tuple[Message, ...]:
    """The messages with `text` at the end of the system's, which comes first, or is made if there is none."""
    if messages[0].role in ("system", "developer"):
        first = messages[0]
        return (Message(first.role, f"{first.content.strip()}\n\n{text}"), *messages[1:])
    return (Message("system", text), *messages)


def parse_text(body: Mapping[str, object], settings: Settings) -> Request:
    """Validates a decoded `/v1/completions`.

    Raises:
        ApiError: 400, naming the field, its limit and the value.
    """
    given = schema.check(body, text_kinds(settings), ["prompt"], TEXT_NEUTRAL, INERT)
    limit = settings.max_n_predict or COMPLETION_MAX_TOKENS
    length = given.pop("max_tokens", min(limit, COMPLETION_MAX_TOKENS))
    wanted, best_of, echo = given.get("n", 1), given.pop("best_of", None), given.pop("echo", False)
    logprobs = given.pop("logprobs", None)
    given |= {"prompts": given.pop("prompt"), "n_predict": length}
    if logprobs is not None:
        given |= {"logprobs": True, "n_probs": logprobs, "prompt_logprobs": echo}
    if best_of is not None and best_of != wanted:
        if best_of < wanted:
            raise invalid(f"'best_of' must be at least n, {wanted}, got {best_of}", param="best_of")
        if given.get("stream"):
            raise invalid("'best_of' above n cannot be streamed: the best are known at the end", param="best_of")
        given |= {"n": best_of, "logprobs": True}
    return replace(_request(given, settings), echo=echo, logprobs=logprobs is not None, n=wanted)


def _request(given: dict[str, Any], settings: Settings) -> Request:
    model = given.pop("model", None)
    include_usage = given.pop("stream_options", None)
    if include_usage is not None and not given.get("stream"):
        raise invalid("'stream_options' needs \"stream\": true", param="stream_options")
    if "seed" in given:
        given["seed"] %= schema.UINT32_MAX + 1  # the engine's; its -1 would be a random one
    completion = schema.completion_request(given, settings)
    return Request(completion, model, bool(include_usage), n=completion.n)


class _Answer:
    """What the answers of both routes have in common."""

    end = "data: [DONE]\n\n"
    says_cancelled = False
    chunk_kind: str
    kind: str

    def __init__(self, identifier: str, request: Request) -> None:
        self._identifier = identifier
        self._request = request
        self._created = int(time.time())

    def _choice(self, index: int, done: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _deltas(self, token: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The choices of the chunks that a piece of text makes."""
        raise NotImplementedError

    def _end(self, done: Mapping[str, Any]) -> dict[str, Any]:
        """The choice of the chunk that says why a completion ended."""
        raise NotImplementedError

    def whole(self, done: Sequence[Mapping[str, Any]], model: str) -> dict[str, Any]:
        """The JSON answer."""
        choices = [self._choice(index, event) for index, event in enumerate(_best(done, self._request))]
        return self._head(self.kind, model) | {
            "choices": choices,
            "usage": _usage(done, self._request.completion.n),
            "timings": done[0]["timings"],
        }

    def opening(self, _model: str) -> list[dict[str, Any]]:
        """The events before the first piece."""
        return []

    def piece(self, token: Mapping[str, Any], model: str) -> list[dict[str, Any]]:
        """The events of a piece of text."""
        return [self._chunk(model, [choice]) for choice in self._deltas(token)]

    def last(self, done: Mapping[str, Any], model: str) -> list[dict[str, Any]]:
        """The event that says why a completion ended."""
        return [self._chunk(model, [self._end(done)]) | {"timings": done["timings"]}]

    def closing(self, done: Sequence[Mapping[str, Any]], model: str) -> list[dict[str, Any]]:
        """The event that counts all tokens, if it was asked for."""
        if not self._request.include_usage:
            return []
        return [self._chunk(model, []) | {"usage": _usage(done, self._request.completion.n)}]

    def _chunk(self, model: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._head(self.chunk_kind, model) | {"choices": choices}
        return chunk | {"usage": None} if self._request.include_usage else chunk

    def _head(self, kind: str, model: str) -> dict[str, Any]:
        return {"id": self._identifier, "object": kind, "created": self._created, "model": model}


class ChatAnswer(_Answer):
    """The answer to `/v1/chat/completions`."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, identifier: str, request: Request) -> None:
        super().__init__(identifier, request)
        self._readers: dict[int, tools.CallReader | None] = {}  # of the completions that have begun; None: it is text

    def opening(self, model: str) -> list[dict[str, Any]]:
        """Who speaks."""
        delta = {"role": "assistant", "content": None if self._request.must_call else "", "refusal": None}
        return [self._chunk(model, [_delta(index, delta)]) for index in range(self._request.completion.n)]

    def _choice(self, index: int, done: Mapping[str, Any]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": done["content"], "refusal": None}
        reader = self._reader(done["index"], done["content"])
        if reader is not None:
            reader.feed(done["content"])
            message |= {"content": None, "tool_calls": reader.calls} if reader.calls else {"content": ""}
        reason = self._reason(done, reader)
        return {"index": index, "message": message, "logprobs": _chat_logprobs(done), "finish_reason": reason}

    def _deltas(self, token: Mapping[str, Any]) -> list[dict[str, Any]]:
        index, logprobs = token["index"], _chat_logprobs(token)
        reader = self._reader(index, token["content"])
        if reader is None:
            return [_delta(index, {"content": token["content"]}, logprobs)]
        calls = reader.feed(token["content"])
        return [_delta(index, {"tool_calls": calls} if calls else {}, logprobs)] if calls or logprobs else []

    def _end(self, done: Mapping[str, Any]) -> dict[str, Any]:
        return _delta(done["index"], {}) | {"finish_reason": self._reason(done, self._readers.get(done["index"]))}

    def _reader(self, index: int, text: str) -> tools.CallReader | None:
        """What reads the completion's calls: its first character tells whether there are any."""
        if index not in self._readers:
            is_call = self._request.calls and text.startswith(tools.HEAD[0])
            self._readers[index] = tools.CallReader() if is_call else None
        return self._readers[index]

    def _reason(self, done: Mapping[str, Any], reader: tools.CallReader | None) -> str:
        reason = _finish_reason(done)
        return "tool_calls" if reader is not None and reader.whole and reason == "stop" else reason


class TextAnswer(_Answer):
    """The answer to `/v1/completions`. `echoes` are the texts of the prompts, if they shall come first."""

    kind = chunk_kind = "text_completion"

    def __init__(self, identifier: str, request: Request, echoes: Sequence[str] = ()) -> None:
        super().__init__(identifier, request)
        self._echoes = echoes
        self._offsets: dict[int, Offsets] = {}  # of each completion, in a stream
        self._prompts: list[Any] = []  # the probabilities of each prompt's tokens

    def whole(self, done: Sequence[Mapping[str, Any]], model: str) -> dict[str, Any]:
        """The JSON answer."""
        self._prompts = [event.get("prompt_probabilities") or [] for event in done[:: self._request.completion.n]]
        return super().whole(done, model)

    def opening(self, model: str) -> list[dict[str, Any]]:
        """The prompts, if they shall come first."""
        n = self._request.completion.n * len(self._echoes)
        return [self._chunk(model, [self._part(index, self._echo(index))]) for index in range(n)]

    def _choice(self, index: int, done: Mapping[str, Any]) -> dict[str, Any]:
        echo = self._echo(done["index"])
        logprobs = None
        if self._request.logprobs and "probabilities" in done:
            prompt = _with_first(self._prompts[done["index"] // self._request.completion.n], echo)
            logprobs = _text_logprobs([*prompt, *schema.shown(done)], self._request, Offsets())
        return self._part(index, echo + done["content"], logprobs) | {"finish_reason": _finish_reason(done)}

    def _deltas(self, token: Mapping[str, Any]) -> list[dict[str, Any]]:
        index, logprobs = token["index"], None
        if token.get("probabilities"):
            offsets = self._offsets.setdefault(index, Offsets(len(self._echo(index))))
            logprobs = _text_logprobs(token["probabilities"], self._request, offsets)
        return [self._part(index, token["content"], logprobs)]

    def _end(self, done: Mapping[str, Any]) -> dict[str, Any]:
        return self._part(done["index"], "") | {"finish_reason": _finish_reason(done)}

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._request.completion.n] if self._echoes else ""

    def _part(self, index: int, text: str, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}


def _delta(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _best(done: Sequence[Mapping[str, Any]], request: Request) -> list[Mapping[str, Any]]:
    """Of each prompt's completions the `n` with the highest log probability per token, best first."""
    made = request.completion.n
    if request.n == made:
        return list(done)
    groups = [done[begin : begin + made] for begin in range(0, len(done), made)]
    return [event for group in groups for event in sorted(group, key=_mean_logprob, reverse=True)[: request.n]]


def _mean_logprob(done: Mapping[str, Any]) -> float:
    logprobs = [token["logprob"] for token in done["probabilities"]]
    return sum(logprobs) / len(logprobs) if logprobs else 0.0


def _chat_logprobs(event: Mapping[str, Any]) -> dict[str, Any] | None:
    tokens = schema.shown(event)
    if not tokens:
        return None
    content = [
        _openai_token(token) | {"top_logprobs": [_openai_token(other) for other in token["top_logprobs"]]}
        for token in map(schema.named, tokens)
    ]
    return {"content": content, "refusal": None}


def _openai_token(token: Mapping[str, Any]) -> dict[str, Any]:
    return {name: token[name] for name in ("token", "logprob", "bytes")}


def _with_first(tokens: Sequence[Mapping[str, Any] | None], text: str) -> list[Mapping[str, Any]]:
    """The tokens of a prompt. The first one, which nothing foretells and the worker leaves out, is the rest of it."""
    others = [token for token in tokens if token is not None]
    if not tokens:
        return []
    rest = b"".join(bytes(token["bytes"]) for token in others)
    first = text.encode().removesuffix(rest)
    return [{"id": -1, "bytes": list(first), "logprob": None, "top_logprobs": None}, *others]


def _text_logprobs(tokens: Sequence[Mapping[str, Any]], request: Request, offsets: Offsets) -> dict[str, Any]:
    """The older shape, of `/v1/completions`."""
    top = [
        {bytes(other["bytes"]).decode(errors="replace"): other["logprob"] for other in token["top_logprobs"]}
        if token["top_logprobs"] is not None
        else None
        for token in tokens
    ]
    return {
        "tokens": [bytes(token["bytes"]).decode(errors="replace") for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": top if request.completion.n_probs else None,
        "text_offset": [offsets.of(token) for token in tokens],
    }


def model_body(name: str, created: int) -> dict[str, Any]:
    """A model of `/v1/models`."""
    return {"id": name, "object": "model", "created": created, "owned_by": "bitnet"}


def _finish_reason(done: Mapping[str, Any]) -> str:
    return "stop" if done["stop_type"] in ("eos", "word") else "length"


def _usage(done: Sequence[Mapping[str, Any]], n: int) -> dict[str, Any]:
    """What was computed: each prompt counts once, whatever was made of it."""
    prompts = done[::n]
    prompt, predicted = (
        sum(event["tokens_evaluated"] for event in prompts),
        sum(event["tokens_predicted"] for event in done),
    )
    return {
        "prompt_tokens": prompt,
        "completion_tokens": predicted,
        "total_tokens": prompt + predicted,
        "prompt_tokens_details": {"cached_tokens": sum(event["tokens_cached"] for event in prompts)},
    }
