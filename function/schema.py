"""Shapes of requests and answers, their defaults and limits. Names and meanings are those of llama.cpp's server.

Source: https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md, `POST /completion`.

Validation is written out here because importing a validation library costs more of a cold start than the whole router
(pydantic: 95 ms, Powertools' resolver with its logger: 80 ms, this module: 2 ms).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

if TYPE_CHECKING:
    from function.settings import Settings

INT32_MAX = 2**31 - 1
UINT32_MAX = 2**32 - 1
MAX_STOPS = 64
MAX_STOP_BYTES = 1024
SHOWN_CHARACTERS = 40  # of a wrong value, in the error that names it


class ApiError(Exception):
    """An answer that is not the one asked for: an HTTP status and OpenAI's error object.

    `param` is the request's field that is wrong, `code` a stable word for programs.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
        allow: str | None = None,
        details: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.details = dict(details or {})
        self.headers: dict[str, str] = {}
        if retry_after_s is not None:
            self.headers["retry-after"] = str(retry_after_s)
        if allow is not None:
            self.headers["allow"] = allow

    @property
    def type(self) -> str:
        """`invalid_request_error` (the caller's fault), `unavailable_error` (try again) or `server_error`."""
        if self.status < 500:
            return "invalid_request_error"
        return "unavailable_error" if self.status == 503 else "server_error"

    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code", …}}`."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error | self.details}


def invalid(message: str, *, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A 400 about the field `param`."""
    return ApiError(400, code, message, param=param)


def describe(value: object) -> str:
    """A wrong value in a few characters, safe to send back as JSON."""
    if isinstance(value, list):
        return f"an array of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, int) and abs(value) >= 10**SHOWN_CHARACTERS:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value) if isinstance(value, float) else json.dumps(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}… ({len(text)} characters)"


class Kind(Protocol):
    """A kind of value."""

    def __call__(self, name: str, value: object) -> Any:
        """Returns the decoded JSON value of the field `name` in its own type, or raises ApiError."""

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""


@dataclass(frozen=True)
class Integer:
    """An integer from `low` to `high`. JSON's `true` and `1.0` are none."""

    low: int
    high: int

    def __call__(self, name: str, value: object) -> int:
        """Checks `value`."""
        if isinstance(value, bool) or not isinstance(value, int):
            raise invalid(f"'{name}' must be an integer, got {describe(value)}", param=name, code="invalid_type")
        if not self.low <= value <= self.high:
            raise invalid(f"'{name}' must be from {self.low} to {self.high}, got {describe(value)}", param=name)
        return value

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True)
class Number:
    """A finite number from `low` to `high`; `low` itself only where `low_included`."""

    low: float
    high: float
    low_included: bool = True

    def __call__(self, name: str, value: object) -> float:
        """Checks `value`."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise invalid(f"'{name}' must be a number, got {describe(value)}", param=name, code="invalid_type")
        in_range = (self.low <= value if self.low_included else self.low < value) and value <= self.high
        if not in_range:  # NaN too
            start = "from" if self.low_included else "above"
            raise invalid(f"'{name}' must be {start} {self.low:g} to {self.high:g}, got {describe(value)}", param=name)
        return float(value)

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        return {
            "type": "number",
            "minimum" if self.low_included else "exclusiveMinimum": self.low,
            "maximum": self.high,
        }


@dataclass(frozen=True)
class Boolean:
    """`true` or `false`."""

    def __call__(self, name: str, value: object) -> bool:
        """Checks `value`."""
        if not isinstance(value, bool):
            raise invalid(f"'{name}' must be true or false, got {describe(value)}", param=name, code="invalid_type")
        return value

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        return {"type": "boolean"}


@dataclass(frozen=True)
class Text:
    """A string of at most `max_bytes` of UTF-8."""

    max_bytes: int

    def __call__(self, name: str, value: object, *, param: str | None = None) -> str:
        """Checks `value`."""
        param = param or name
        if not isinstance(value, str):
            raise invalid(f"'{name}' must be a string, got {describe(value)}", param=param, code="invalid_type")
        try:
            size = len(value.encode())
        except UnicodeEncodeError as error:
            message = f"'{name}' has a lone surrogate (\\u{ord(value[error.start]):04x}) at character {error.start}"
            raise invalid(message, param=param, code="invalid_unicode") from None
        if size > self.max_bytes:
            message = f"'{name}' must have at most {self.max_bytes} bytes of UTF-8, got {size}"
            raise invalid(message, param=param, code="too_long")
        return value

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema, which counts characters: at most as many as bytes."""
        return {"type": "string", "maxLength": self.max_bytes}


@dataclass(frozen=True)
class Stops:
    """Stop strings: an array of at most 64, none of them empty; or, where `or_one`, a string."""

    or_one: bool = False

    def __call__(self, name: str, value: object) -> tuple[str, ...]:
        """Checks `value`."""
        if self.or_one and isinstance(value, str):
            value = [value]
        if not isinstance(value, list):
            kind = "a string or an array of strings" if self.or_one else "an array of strings"
            raise invalid(f"'{name}' must be {kind}, got {describe(value)}", param=name, code="invalid_type")
        if len(value) > MAX_STOPS:
            message = f"'{name}' must have at most {MAX_STOPS} strings, got {len(value)}"
            raise invalid(message, param=name, code="too_long")
        check = Text(MAX_STOP_BYTES)
        words = tuple(check(f"{name}[{index}]", word, param=name) for index, word in enumerate(value))
        if "" in words:
            raise invalid(f"'{name}[{words.index('')}]' must not be empty", param=name)
        return words

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        word = Text(MAX_STOP_BYTES).document() | {"minLength": 1}
        words = {"type": "array", "items": word, "maxItems": MAX_STOPS}
        return {"anyOf": [word, words]} if self.or_one else words


@dataclass(frozen=True)
class Tokens:
    """An array of token ids."""

    least: int = 0

    def __call__(self, name: str, value: object) -> tuple[int, ...]:
        """Checks `value`."""
        if not isinstance(value, list):
            message = f"'{name}' must be an array of token ids, got {describe(value)}"
            raise invalid(message, param=name, code="invalid_type")
        if len(value) < self.least:
            raise invalid(f"'{name}' must have at least one token id, got an empty array", param=name)
        for index, token in enumerate(value):
            if isinstance(token, bool) or not isinstance(token, int):
                message = f"'{name}[{index}]' must be a token id, got {describe(token)}"
                raise invalid(message, param=name, code="invalid_type")
            if not 0 <= token <= INT32_MAX:
                raise invalid(f"'{name}[{index}]' must be from 0 to {INT32_MAX}, got {describe(token)}", param=name)
        return tuple(value)

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema. How many ids there are depends on the model."""
        return {"type": "array", "items": Integer(0, INT32_MAX).document(), "minItems": self.least}


@dataclass(frozen=True)
class Prompt:
    """A text of at most `max_bytes` of UTF-8, or an array of token ids."""

    max_bytes: int

    def __call__(self, name: str, value: object) -> str | tuple[int, ...]:
        """Checks `value`."""
        if isinstance(value, str):
            return Text(self.max_bytes)(name, value)
        if not isinstance(value, list):
            message = f"'{name}' must be a string or an array of token ids, got {describe(value)}"
            raise invalid(message, param=name, code="invalid_type")
        return Tokens(1)(name, value)

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        return {"anyOf": [Text(self.max_bytes).document(), Tokens(1).document()]}


# The ranges of the sampling fields: of requests, and of the settings that give their defaults.
N_PREDICT = Integer(-1, INT32_MAX)
TEMPERATURE = Number(0, 100)
TOP_K = Integer(0, INT32_MAX)
TOP_P = Number(0, 1, low_included=False)
MIN_P = Number(0, 1)
REPEAT_PENALTY = Number(0, 100, low_included=False)
REPEAT_LAST_N = Integer(-1, INT32_MAX)
PENALTY = Number(-100, 100)
SEED = Integer(-1, UINT32_MAX)

# Fields of llama.cpp that the engine does not have: taken with these values, which change nothing, otherwise refused.
SAMPLERS = ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"]
NEUTRAL: dict[str, tuple[object, ...]] = {
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "grammar": ("",),
    "id_slot": (-1, 0),
    "image_data": ([],),
    "json_schema": (),
    "logit_bias": ([], {}),
    "lora": ([],),
    "min_keep": (0,),
    "mirostat": (0,),
    "n_cache_reuse": (0,),
    "n_discard": (0,),
    "n_indent": (0,),
    "n_keep": (0, -1),
    "n_probs": (0,),
    "penalize_nl": (False,),
    "post_sampling_probs": (False,),
    "response_fields": ([],),
    "return_progress": (False,),
    "samplers": (SAMPLERS,),
    "slot_id": (-1, 0),
    "t_max_predict_ms": (0, -1),
    "t_max_prompt_ms": (0, -1),
    "tfs_z": (1,),
    "timings_per_token": (False,),
    "top_n_sigma": (-1,),
    "typical_p": (1,),
    "xtc_probability": (0,),
}
# Fine-tuning of switches above that are off: without effect whatever they say.
INERT = {
    "dry_allowed_length",
    "dry_base",
    "dry_penalty_last_n",
    "dry_sequence_breakers",
    "dynatemp_exponent",
    "mirostat_eta",
    "mirostat_tau",
    "xtc_threshold",
}


@dataclass(frozen=True)
class CompletionRequest:
    """A valid `/completion`. Fields that the request left out have the settings' defaults."""

    prompt: str | tuple[int | str, ...]
    n_predict: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    repeat_last_n: int
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: tuple[str, ...]
    ignore_eos: bool
    cache_prompt: bool
    special: bool
    stream: bool
    return_tokens: bool

    def for_engine(self) -> dict[str, Any]:
        """The fields of the worker's `completion` (docs/worker-protocol.md)."""
        return {name: value for name, value in self._items() if name != "return_tokens"}

    def generation_settings(self, seed: int) -> dict[str, Any]:
        """What the text was made with; `seed` is the one that was used."""
        return {name: value for name, value in self._items() if name not in ("prompt", "return_tokens")} | {
            "seed": seed
        }

    def _items(self) -> Iterable[tuple[str, Any]]:
        return ((field.name, getattr(self, field.name)) for field in fields(self))


COMPLETION_FIELDS = frozenset(field.name for field in fields(CompletionRequest))
KNOWN_FIELDS = COMPLETION_FIELDS | NEUTRAL.keys() | INERT


def sampling_kinds() -> dict[str, Kind]:
    """The fields that llama.cpp's and OpenAI's requests share, and those of llama.cpp that the latter may have too."""
    return {
        "temperature": TEMPERATURE,
        "top_k": TOP_K,
        "top_p": TOP_P,
        "min_p": MIN_P,
        "repeat_penalty": REPEAT_PENALTY,
        "repeat_last_n": REPEAT_LAST_N,
        "presence_penalty": PENALTY,
        "frequency_penalty": PENALTY,
        "ignore_eos": Boolean(),
        "cache_prompt": Boolean(),
        "stream": Boolean(),
    }


def length_kind(settings: Settings) -> Integer:
    """How many tokens may be asked for."""
    return Integer(-1, settings.max_n_predict) if settings.max_n_predict else N_PREDICT


def completion_kinds(settings: Settings) -> dict[str, Kind]:
    """The fields of `/completion`."""
    return sampling_kinds() | {
        "prompt": Prompt(settings.max_prompt_bytes),
        "n_predict": length_kind(settings),
        "seed": SEED,
        "stop": Stops(),
        "special": Boolean(),
        "return_tokens": Boolean(),
    }


def parse_completion(body: Mapping[str, object], settings: Settings) -> CompletionRequest:
    """Validates a decoded `/completion`.

    Raises:
        ApiError: 400, naming the field, its limit and the value.
    """
    return completion_request(check(body, completion_kinds(settings), ["prompt"], NEUTRAL, INERT), settings)


def completion_request(given: Mapping[str, Any], settings: Settings) -> CompletionRequest:
    """A request of checked values; where one is not given, the default."""
    defaults = {
        "n_predict": settings.n_predict,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "min_p": settings.min_p,
        "repeat_penalty": settings.repeat_penalty,
        "repeat_last_n": settings.repeat_last_n,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": -1,
        "stop": (),
        "ignore_eos": False,
        "cache_prompt": True,
        "special": False,
        "stream": False,
        "return_tokens": False,
    }
    values: dict[str, Any] = {**defaults, **given}
    if settings.max_n_predict and values["n_predict"] == -1:
        values["n_predict"] = settings.max_n_predict
    return CompletionRequest(**values)


def check(
    body: Mapping[str, object],
    kinds: Mapping[str, Kind],
    required: Iterable[str] = (),
    neutral: Mapping[str, tuple[object, ...]] | None = None,
    inert: Collection[str] = (),
) -> dict[str, Any]:
    """The checked values of the fields that `body` has. `null` means that a field was left out, as in llama.cpp.

    Fields of `neutral` are taken with these values only, those of `inert` with any; neither is in the result.

    Raises:
        ApiError: 400, naming the field, its limit and the value.
    """
    neutral = neutral or {}
    given = {name: value for name, value in body.items() if value is not None}
    for name in body.keys() - kinds.keys() - set(inert):
        if name not in neutral:
            raise invalid(f"unknown field {describe(name)}", param=_printable(name), code="unknown_field")
        if name in given and not any(_same(given[name], value) for value in neutral[name]):
            accepted = " or ".join(["leave it out", *(f"send {json.dumps(value)}" for value in neutral[name])])
            message = f"'{name}' is not supported: {accepted}; got {describe(given[name])}"
            raise invalid(message, param=name, code="unsupported_field")
    for name in required:
        if name not in given:
            raise invalid(f"'{name}' is required", param=name, code="missing_field")
    return {name: kind(name, given[name]) for name, kind in kinds.items() if name in given}


def document(
    kinds: Mapping[str, Kind],
    required: Iterable[str] = (),
    neutral: Mapping[str, tuple[object, ...]] | None = None,
    inert: Collection[str] = (),
) -> dict[str, Any]:
    """The JSON Schema of what `check` takes."""
    properties: dict[str, Any] = {}
    for name, kind in kinds.items():
        schema = kind.document()
        properties[name] = schema if name in required else {"anyOf": [schema, {"type": "null"}]}
    for name, values in (neutral or {}).items():
        properties[name] = {"enum": [*values, None], "description": "Not supported: taken where it changes nothing."}
    for name in sorted(inert):
        properties[name] = {"description": "Without effect."}
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


class Answer(Protocol):
    """How the worker's events become an answer. `done` and `token` are events of docs/worker-protocol.md."""

    end: str  # of a stream, after the events

    def whole(self, done: Mapping[str, Any], model: str) -> dict[str, Any]:
        """The JSON answer."""

    def opening(self, model: str) -> list[dict[str, Any]]:
        """The events of a stream before the first piece."""

    def piece(self, token: Mapping[str, Any], model: str) -> dict[str, Any]:
        """An event of a stream: the text since the one before."""

    def closing(self, done: Mapping[str, Any], model: str) -> list[dict[str, Any]]:
        """The events of a stream after the last piece."""


class LlamaAnswer:
    """The answer to `/completion`, whole or in pieces, as llama.cpp gives it."""

    end = ""

    def __init__(self, request: CompletionRequest) -> None:
        self._request = request

    def whole(self, done: Mapping[str, Any], model: str) -> dict[str, Any]:
        """The JSON answer."""
        return completion_body(self._request, done, model)

    def opening(self, _model: str) -> list[dict[str, Any]]:
        """The events before the first piece."""
        return []

    def piece(self, token: Mapping[str, Any], _model: str) -> dict[str, Any]:
        """An event: the text and the token ids since the one before."""
        return {"content": token["content"], "tokens": token["tokens"], "stop": False}

    def closing(self, done: Mapping[str, Any], model: str) -> list[dict[str, Any]]:
        """The events after the last piece."""
        return [completion_body(self._request, done, model)]


def tokenize_kinds(settings: Settings) -> dict[str, Kind]:
    """The fields of `/tokenize`."""
    return {"content": Text(settings.max_prompt_bytes), "add_special": Boolean(), "parse_special": Boolean()}


TOKENIZE_NEUTRAL: dict[str, tuple[object, ...]] = {"with_pieces": (False,)}
DETOKENIZE_KINDS: dict[str, Kind] = {"tokens": Tokens()}


def completion_body(request: CompletionRequest, done: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The JSON answer, and the last event of a stream (where the text has been sent: `content` and `tokens` are empty).

    `done` is the worker's event. `tokens_evaluated` counts the prompt's tokens, `tokens_cached` those of them that were
    not computed again; `timings` are in milliseconds and tokens a second.
    """
    return {
        "content": "" if request.stream else done["content"],
        "tokens": done["tokens"] if request.return_tokens and not request.stream else [],
        "stop": True,
        "stop_type": done["stop_type"],
        "stopping_word": done["stopping_word"],
        "model": model,
        "tokens_predicted": done["tokens_predicted"],
        "tokens_evaluated": done["tokens_evaluated"],
        "tokens_cached": done["tokens_cached"],
        "truncated": done["truncated"],
        "generation_settings": request.generation_settings(done["seed"]),
        "timings": done["timings"],
    }


def parse_object(raw: bytes) -> dict[str, object]:
    """Decodes a JSON object as strictly as RFC 8259 allows: UTF-8, no NaN or Infinity, no name twice in an object.

    Raises:
        ApiError: 400 that says where.
    """
    if not raw.strip():
        raise invalid("the body is empty: a JSON object is expected", code="invalid_json")
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8 at byte {error.start}", code="invalid_json") from None
    except json.JSONDecodeError as error:
        message = f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise invalid(message, code="invalid_json") from None
    except RecursionError:
        raise invalid("the body is not usable JSON: nested too deeply", code="invalid_json") from None
    except ValueError:  # Python's limit of digits, sys.get_int_max_str_digits
        raise invalid("the body is not usable JSON: an integer has too many digits", code="invalid_json") from None
    if not isinstance(value, dict):
        message = f"the body must be a JSON object, got {describe(value)}"
        raise invalid(message, code="invalid_type")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise invalid(f"field {describe(name)} is there twice", param=_printable(name), code="duplicate_field")
    return result


def _no_constant(name: str) -> NoReturn:
    raise invalid(f"the body is not JSON: {name} is no JSON number", code="invalid_json")


def _same(value: object, neutral: object) -> bool:
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def _printable(name: str) -> str:
    return name[: 2 * SHOWN_CHARACTERS].encode(errors="backslashreplace").decode()
