"""Shapes of requests and answers, their defaults and limits. Names and meanings are those of llama.cpp's server.

Source: https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md, `POST /completion`.

Validation is written out here because importing a validation library costs more of a cold start than the whole router
(pydantic: 95 ms, Powertools' resolver with its logger: 80 ms, this module: 2 ms).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol

if TYPE_CHECKING:
    from function.settings import Settings

INT32_MAX = 2**31 - 1
UINT32_MAX = 2**32 - 1
MAX_STOPS = 64
MAX_STOP_BYTES = 1024
MAX_COMPLETIONS = 128  # of one request: prompts × completions of each
MAX_N = 16  # completions of a prompt
MAX_N_PROBS = 100
MAX_LOGIT_BIASES = 1024
NUMBER = re.compile("[0-9]{1,100}")  # a longer one is no token either, but more than int() takes
MAX_BREAKERS = 64
MAX_BREAKER_BYTES = 40  # llama.cpp's
MAX_GRAMMAR_BYTES = 256 * 1024
MAX_RESPONSE_FIELDS = 64
MAX_NAME_BYTES = 256
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
class Texts:
    """An array of at most `most` strings, none of them empty; or, where `or_one`, a string, which may be."""

    most: int = MAX_STOPS
    max_bytes: int = MAX_STOP_BYTES
    or_one: bool = False

    def __call__(self, name: str, value: object) -> tuple[str, ...]:
        """Checks `value`."""
        if self.or_one and isinstance(value, str):
            value = [value] if value else []
        if not isinstance(value, list):
            kind = "a string or an array of strings" if self.or_one else "an array of strings"
            raise invalid(f"'{name}' must be {kind}, got {describe(value)}", param=name, code="invalid_type")
        if len(value) > self.most:
            message = f"'{name}' must have at most {self.most} strings, got {len(value)}"
            raise invalid(message, param=name, code="too_long")
        check = Text(self.max_bytes)
        words = tuple(check(f"{name}[{index}]", word, param=name) for index, word in enumerate(value))
        if "" in words:
            raise invalid(f"'{name}[{words.index('')}]' must not be empty", param=name)
        return words

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        word = Text(self.max_bytes).document() | {"minLength": 1}
        words = {"type": "array", "items": word, "maxItems": self.most}
        return {"anyOf": [Text(self.max_bytes).document(), words]} if self.or_one else words


@dataclass(frozen=True)
class Choices:
    """An array of names out of `names`, each at most once."""

    names: tuple[str, ...]

    def __call__(self, name: str, value: object) -> tuple[str, ...]:
        """Checks `value`."""
        if not isinstance(value, list):
            raise invalid(
                f"'{name}' must be an array of strings, got {describe(value)}", param=name, code="invalid_type"
            )
        for index, choice in enumerate(value):
            if choice not in self.names:
                message = f"'{name}[{index}]' must be one of {', '.join(self.names)}, got {describe(choice)}"
                raise invalid(message, param=name)
            if choice in value[:index]:
                raise invalid(f"'{name}[{index}]' must not be there twice, got {describe(choice)}", param=name)
        return tuple(value)

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        return {"type": "array", "items": {"enum": list(self.names)}, "uniqueItems": True}


def token_id(where: str, value: object, name: str) -> int:
    """Checks a token id, at `where` in the field `name`. How many there are depends on the model."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise invalid(f"'{where}' must be a token id, got {describe(value)}", param=name, code="invalid_type")
    if not 0 <= value <= INT32_MAX:
        raise invalid(f"'{where}' must be from 0 to {INT32_MAX}, got {describe(value)}", param=name)
    return value


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
        return tuple(token_id(f"{name}[{index}]", token, name) for index, token in enumerate(value))

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema. How many ids there are depends on the model."""
        return {"type": "array", "items": Integer(0, INT32_MAX).document(), "minItems": self.least}


Prompt = str | tuple[int | str, ...]  # a text, or token ids and texts


@dataclass(frozen=True)
class Prompts:
    """One prompt or an array of them, in all at most `max_bytes` of UTF-8.

    A prompt is a text, an array of token ids and texts, or `{"prompt_string": …}`. An array that has numbers is one.
    """

    max_bytes: int

    def __call__(self, name: str, value: object) -> tuple[Prompt, ...]:
        """Checks `value`."""
        several = isinstance(value, list) and value and not any(isinstance(item, int | float) for item in value)
        if not several:
            return (self._one(name, value, name),)
        assert isinstance(value, list)
        if len(value) > MAX_COMPLETIONS:
            message = f"'{name}' must have at most {MAX_COMPLETIONS} prompts, got {len(value)}"
            raise invalid(message, param=name, code="too_long")
        prompts = tuple(self._one(f"{name}[{index}]", item, name) for index, item in enumerate(value))
        if (size := sum(map(_text_bytes, prompts))) > self.max_bytes:
            raise invalid(f"'{name}' must have at most {self.max_bytes} bytes of UTF-8 in all, got {size}", param=name)
        return prompts

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        text = Text(self.max_bytes).document()
        mixed = {"type": "array", "items": {"anyOf": [Integer(0, INT32_MAX).document(), text]}, "minItems": 1}
        wrapped = document({"prompt_string": Text(self.max_bytes)}, ["prompt_string"], WRAPPED_NEUTRAL)
        several = {
            "type": "array",
            "items": {"anyOf": [text, mixed, wrapped]},
            "minItems": 1,
            "maxItems": MAX_COMPLETIONS,
        }
        return {"anyOf": [text, mixed, wrapped, several]}

    def _one(self, where: str, value: object, name: str) -> Prompt:
        if isinstance(value, dict):
            with within(where, name):
                given = check(value, {"prompt_string": Text(self.max_bytes)}, ["prompt_string"], WRAPPED_NEUTRAL)
            return str(given["prompt_string"])
        if isinstance(value, str):
            return Text(self.max_bytes)(where, value, param=name)
        if not isinstance(value, list):
            message = f"'{where}' must be a string or an array of token ids and strings, got {describe(value)}"
            raise invalid(message, param=name, code="invalid_type")
        if not value:
            raise invalid(f"'{where}' must have at least one token id, got an empty array", param=name)
        prompt = tuple(self._part(f"{where}[{index}]", part, name) for index, part in enumerate(value))
        if (size := _text_bytes(prompt)) > self.max_bytes:
            raise invalid(f"'{where}' must have at most {self.max_bytes} bytes of UTF-8, got {size}", param=name)
        return prompt

    def _part(self, where: str, part: object, name: str) -> int | str:
        if isinstance(part, str):
            return Text(self.max_bytes)(where, part, param=name)
        return token_id(where, part, name)


WRAPPED_NEUTRAL: dict[str, tuple[object, ...]] = {"multimodal_data": ([],)}


def _text_bytes(prompt: Prompt) -> int:
    return sum(
        len(part.encode()) for part in ((prompt,) if isinstance(prompt, str) else prompt) if isinstance(part, str)
    )


Bias = tuple[int | str, float | Literal[False]]  # a token id, or a text whose tokens are meant; False: never


@dataclass(frozen=True)
class LogitBias:
    """`[[id or text, number or false], …]`, or `{"id or text": number or false, …}`, numbers from −`most` to `most`."""

    most: float

    def __call__(self, name: str, value: object) -> tuple[Bias, ...]:
        """Checks `value`."""
        if isinstance(value, dict):
            pairs: list[Any] = [[int(key) if NUMBER.fullmatch(key) else key, bias] for key, bias in value.items()]
        elif isinstance(value, list):
            pairs = value
        else:
            message = f"'{name}' must be an object or an array of [token, bias], got {describe(value)}"
            raise invalid(message, param=name, code="invalid_type")
        if len(pairs) > MAX_LOGIT_BIASES:
            message = f"'{name}' must have at most {MAX_LOGIT_BIASES} entries, got {len(pairs)}"
            raise invalid(message, param=name, code="too_long")
        return tuple(self._pair(f"{name}[{index}]", pair, name) for index, pair in enumerate(pairs))

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        bias = {"anyOf": [Number(-self.most, self.most).document(), {"const": False}]}
        token = {"anyOf": [Integer(0, INT32_MAX).document(), Text(MAX_STOP_BYTES).document()]}
        pair = {"type": "array", "prefixItems": [token, bias], "minItems": 2, "maxItems": 2}
        return {
            "anyOf": [
                {"type": "object", "additionalProperties": bias, "maxProperties": MAX_LOGIT_BIASES},
                {"type": "array", "items": pair, "maxItems": MAX_LOGIT_BIASES},
            ]
        }

    def _pair(self, where: str, pair: object, name: str) -> Bias:
        if not isinstance(pair, list) or len(pair) != 2:
            raise invalid(f"'{where}' must be [token, bias], got {describe(pair)}", param=name, code="invalid_type")
        token, bias = pair
        if isinstance(token, str):
            token = Text(MAX_STOP_BYTES)(f"{where}[0]", token, param=name)
        else:
            token = token_id(f"{where}[0]", token, name)
        if bias is False:
            return token, False
        try:
            return token, Number(-self.most, self.most)(f"{where}[1]", bias)
        except ApiError as error:
            raise invalid(error.message, param=name, code=error.code) from None


@dataclass(frozen=True)
class Fields:
    """A JSON object whose fields are checked by somebody else."""

    def __call__(self, name: str, value: object, *, param: str | None = None) -> dict[str, Any]:
        """Checks `value`."""
        if not isinstance(value, dict):
            message = f"'{name}' must be an object, got {describe(value)}"
            raise invalid(message, param=param or name, code="invalid_type")
        return value

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        return {"type": "object"}


@dataclass(frozen=True)
class Object:
    """Any JSON object, as the text that spells it."""

    max_bytes: int = MAX_GRAMMAR_BYTES

    def __call__(self, name: str, value: object) -> str:
        """Checks `value`."""
        Fields()(name, value)
        try:
            text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        except (ValueError, RecursionError):
            raise invalid(f"'{name}' must be JSON: finite numbers, not nested too deeply", param=name) from None
        return Text(self.max_bytes)(name, text)

    def document(self) -> dict[str, Any]:
        """The same in JSON Schema."""
        return {"type": "object"}


# The ranges of the sampling fields: of requests, and of the settings that give their defaults.
N_PREDICT = Integer(-1, INT32_MAX)
TEMPERATURE = Number(0, 100)
TOP_K = Integer(0, INT32_MAX)
TOP_P = Number(0, 1)
MIN_P = Number(0, 1)
REPEAT_PENALTY = Number(0, 100, low_included=False)
REPEAT_LAST_N = Integer(-1, INT32_MAX)
PENALTY = Number(-100, 100)
SEED = Integer(-1, UINT32_MAX)
MAX_BIAS = 1e6
MAX_PREDICT_MS = 86_400_000

# Fields of llama.cpp that the engine does not have: taken with these values, which change nothing, otherwise refused.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "id_slot": (-1, 0),
    "image_data": ([],),
    "lora": ([],),
    "n_cache_reuse": (0,),
    "n_discard": (0,),
    "n_indent": (0,),
    "n_keep": (0, -1),
    "penalize_nl": (False,),
    "return_progress": (False,),
    "slot_id": (-1, 0),
    "sse_ping_interval": (-1,),
    "t_max_prompt_ms": (0, -1),
    "tfs_z": (1,),
    "timings_per_token": (False,),
}

SAMPLERS = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")
DRY_BREAKERS = ("\n", ":", '"', "*")


@dataclass(frozen=True)
class Structure:
    """What every answer must look like. `field` of the request says so, and is named if it cannot be done.

    `parts` are names and JSON Schemas that `text` is made of: the first that is to blame is named, too.
    """

    language: Literal["json_schema", "gbnf", "lark"]
    text: str
    field: str
    parts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class CompletionRequest:
    """A valid `/completion`. Fields that the request left out have the settings' defaults."""

    prompts: tuple[Prompt, ...]
    n_predict: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    repeat_last_n: int
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = -1
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    cache_prompt: bool = True
    special: bool = False
    stream: bool = False
    return_tokens: bool = False
    n: int = 1
    """Completions of each prompt; llama.cpp's n_cmpl."""
    n_probs: int = 0
    logprobs: bool = False
    """Of the chosen tokens, also where n_probs is 0."""
    prompt_logprobs: bool = False
    post_sampling_probs: bool = False
    logit_bias: tuple[Bias, ...] = ()
    samplers: tuple[str, ...] = SAMPLERS
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = DRY_BREAKERS
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    min_keep: int = 0
    t_max_predict_ms: int = 0
    structure: Structure | None = None
    response_fields: tuple[str, ...] = ()
    prompt_cache_key: str | None = None

    def for_engine(self, biases: Mapping[int, float | Literal[False]], add_bos: bool) -> list[dict[str, Any]]:
        """The worker's `completion` for each prompt, without `op` and `id` (docs/worker-protocol.md).

        No default of the worker's counts. `biases` is logit_bias with every text as its tokens; `add_bos` says whether
        the model's texts begin with BOS.
        """
        common = {name: value for name, value in self._items() if name not in _OURS}
        if biases:
            common["logit_bias"] = [[token, bias] for token, bias in biases.items()]
        if self.structure is not None:
            common["mask"] = True
        return [common | {"prompt": prompt} | _bos(prompt, add_bos) for prompt in self.prompts]

    def generation_settings(self, seed: int) -> dict[str, Any]:
        """What the text was made with; `seed` is the one that was used."""
        settings = {name: value for name, value in self._items() if name not in _NO_SETTING}
        if self.structure is not None and self.structure.field in ("grammar", "json_schema"):
            settings[self.structure.field] = self.structure.text
        return settings | {"n_cmpl": self.n, "seed": seed}

    def _items(self) -> Iterable[tuple[str, Any]]:
        return ((field.name, getattr(self, field.name)) for field in fields(self))


# Of the fields of CompletionRequest: what the worker does not know, what is no setting.
_OURS = {"prompts", "return_tokens", "logit_bias", "structure", "response_fields", "prompt_cache_key"}
_NO_SETTING = {
    "n",
    "logprobs",
    "prompt_logprobs",
    "prompts",
    "prompt_cache_key",
    "response_fields",
    "return_tokens",
    "structure",
}


def _bos(prompt: Prompt, add_bos: bool) -> dict[str, bool]:
    """A text gets a BOS from the worker by itself; an array that begins with a text too, in llama.cpp."""
    return {"add_bos": True} if add_bos and not isinstance(prompt, str) and isinstance(prompt[0], str) else {}


def sampling_kinds() -> dict[str, Kind]:
    """The fields that llama.cpp's and OpenAI's requests share, and those of llama.cpp that the latter may have too."""
    least = 1e-6
    return {
        "temperature": TEMPERATURE,
        "top_k": TOP_K,
        "top_p": TOP_P,
        "min_p": MIN_P,
        "typical_p": Number(0, 1, low_included=False),
        "top_n_sigma": Number(-1, 100),
        "xtc_probability": Number(0, 1),
        "xtc_threshold": Number(0, 1),
        "dynatemp_range": Number(0, 100),
        "dynatemp_exponent": Number(0, 100),
        "repeat_penalty": REPEAT_PENALTY,
        "repeat_last_n": REPEAT_LAST_N,
        "presence_penalty": PENALTY,
        "frequency_penalty": PENALTY,
        "dry_multiplier": Number(0, 100),
        "dry_base": Number(1, 100),
        "dry_allowed_length": Integer(0, INT32_MAX),
        "dry_penalty_last_n": Integer(-1, INT32_MAX),
        "dry_sequence_breakers": Texts(MAX_BREAKERS, MAX_BREAKER_BYTES),
        "mirostat": Integer(0, 2),
        "mirostat_tau": Number(least, 100),
        "mirostat_eta": Number(least, 100),
        "min_keep": Integer(0, INT32_MAX),
        "samplers": Choices(SAMPLERS),
        "t_max_predict_ms": Integer(-1, MAX_PREDICT_MS),
        "ignore_eos": Boolean(),
        "cache_prompt": Boolean(),
        "prompt_cache_key": Text(MAX_NAME_BYTES),
        "stream": Boolean(),
    }


def length_kind(settings: Settings) -> Integer:
    """How many tokens may be asked for."""
    return Integer(-1, settings.max_n_predict) if settings.max_n_predict else N_PREDICT


def completion_kinds(settings: Settings) -> dict[str, Kind]:
    """The fields of `/completion`."""
    return sampling_kinds() | {
        "prompt": Prompts(settings.max_prompt_bytes),
        "n_predict": length_kind(settings),
        "n_cmpl": Integer(1, MAX_N),
        "seed": SEED,
        "stop": Texts(),
        "special": Boolean(),
        "return_tokens": Boolean(),
        "n_probs": Integer(0, MAX_N_PROBS),
        "post_sampling_probs": Boolean(),
        "logit_bias": LogitBias(MAX_BIAS),
        "grammar": Text(MAX_GRAMMAR_BYTES),
        "json_schema": Object(),
        "response_fields": Texts(MAX_RESPONSE_FIELDS, MAX_NAME_BYTES),
    }


def parse_completion(body: Mapping[str, object], settings: Settings) -> CompletionRequest:
    """Validates a decoded `/completion`.

    Raises:
        ApiError: 400, naming the field, its limit and the value.
    """
    given = check(body, completion_kinds(settings), ["prompt"], NEUTRAL)
    given["prompts"] = given.pop("prompt")
    given["n"] = given.pop("n_cmpl", 1)
    grammar, json_schema = given.pop("grammar", ""), given.pop("json_schema", None)
    if grammar and json_schema is not None:
        raise invalid("'grammar' and 'json_schema' cannot be together: send one of them", param="grammar")
    if grammar:
        given["structure"] = Structure("gbnf", grammar, "grammar")
    elif json_schema is not None:
        given["structure"] = Structure("json_schema", json_schema, "json_schema")
    return completion_request(given, settings)


def completion_request(given: Mapping[str, Any], settings: Settings) -> CompletionRequest:
    """A request of checked values; where one is not given, the default.

    Raises:
        ApiError: 400: too many completions in all.
    """
    defaults = {
        "n_predict": settings.n_predict,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "min_p": settings.min_p,
        "repeat_penalty": settings.repeat_penalty,
        "repeat_last_n": settings.repeat_last_n,
    }
    values: dict[str, Any] = {**defaults, **given}
    if settings.max_n_predict and values["n_predict"] == -1:
        values["n_predict"] = settings.max_n_predict
    values["t_max_predict_ms"] = max(0, values.get("t_max_predict_ms", 0))
    request = CompletionRequest(**values)
    if (count := len(request.prompts) * request.n) > MAX_COMPLETIONS:
        message = f"'prompt' must have at most {MAX_COMPLETIONS} completions in all, got {count}"
        raise invalid(message, param="prompt", code="too_long")
    return request


@contextmanager
def within(where: str, param: str) -> Iterator[None]:
    """What is wrong with the fields of `where`, a part of the request's field `param`, is told with both."""
    try:
        yield
    except ApiError as error:
        raise invalid(f"'{where}': {error.message}", param=param, code=error.code) from None


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
    for name in sorted(given.keys() - kinds.keys() - set(inert)):
        if name not in neutral:
            raise invalid(f"unknown field {describe(name)}", param=_printable(name), code="unknown_field")
        if not any(_same(given[name], value) for value in neutral[name]):
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
    """How the worker's events become an answer. `done` and `token` are events of docs/worker-protocol.md.

    Their `index` is the number of the completion: of the first prompt's `n`, then of the second one's.
    """

    end: str  # of a stream, after the events
    says_cancelled: bool  # whether it has a word for what ended before its time

    def whole(self, done: Sequence[Mapping[str, Any]], model: str) -> dict[str, Any] | list[dict[str, Any]]:
        """The JSON answer, of all completions in the order of their index."""

    def opening(self, model: str) -> list[dict[str, Any]]:
        """The events of a stream before the first piece."""

    def piece(self, token: Mapping[str, Any], model: str) -> list[dict[str, Any]]:
        """The events of a stream for a piece of text."""

    def last(self, done: Mapping[str, Any], model: str) -> list[dict[str, Any]]:
        """The events of a stream after the last piece of one completion."""

    def closing(self, done: Sequence[Mapping[str, Any]], model: str) -> list[dict[str, Any]]:
        """The events of a stream after the last piece of all."""


class LlamaAnswer:
    """The answer to `/completion`, whole or in pieces, as llama.cpp gives it."""

    end = ""
    says_cancelled = True

    def __init__(self, request: CompletionRequest) -> None:
        self._request = request

    def whole(self, done: Sequence[Mapping[str, Any]], model: str) -> dict[str, Any] | list[dict[str, Any]]:
        """The JSON answer; an array if there are several completions."""
        bodies = [self._body(event, model) for event in done]
        return bodies[0] if len(bodies) == 1 else bodies

    def opening(self, _model: str) -> list[dict[str, Any]]:
        """The events before the first piece."""
        return []

    def piece(self, token: Mapping[str, Any], _model: str) -> list[dict[str, Any]]:
        """An event: the text and the token ids since the one before."""
        names = ("index", "content", "tokens")
        return [{name: token[name] for name in names} | {"stop": False} | probabilities(token)]

    def last(self, done: Mapping[str, Any], model: str) -> list[dict[str, Any]]:
        """The event that says how a completion ended."""
        return [self._body(done, model)]

    def closing(self, _done: Sequence[Mapping[str, Any]], _model: str) -> list[dict[str, Any]]:
        """The events after the last completion."""
        return []

    def _body(self, done: Mapping[str, Any], model: str) -> dict[str, Any]:
        body = completion_body(self._request, done, model)
        return picked(body, self._request.response_fields) if self._request.response_fields else body


class Offsets:
    """Where each token begins, in characters of the text: with the character that it is a part of."""

    def __init__(self, first: int = 0) -> None:
        self._next = first
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of(self, token: Mapping[str, Any]) -> int:
        """That of the next token."""
        offset = self._next
        self._next += len(self._decoder.decode(bytes(token["bytes"])))
        return offset


def shown(event: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The `probabilities` of a `token` or `done` event, as a stream gives them: without tokens behind the text's end.

    A stop string ends the text before the tokens that spell it; the one in which it begins may belong to both. The
    token that says that the text ends is none of it.
    """
    tokens: Sequence[Mapping[str, Any]] = event.get("probabilities") or ()
    if event.get("stop_type") == "eos" and tokens and not tokens[-1]["bytes"]:
        return tokens[:-1]
    if event.get("stop_type") != "word":
        return tokens
    offsets = Offsets()
    return [token for token in tokens if offsets.of(token) < len(event["content"])]


def probabilities(event: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp's `completion_probabilities` of a `token` or `done` event; nothing if they were not asked for.

    Each token's object gets `token`, the text of its bytes: those that are no UTF-8 become U+FFFD.
    """
    tokens = shown(event)
    return {"completion_probabilities": [named(token) for token in tokens]} if tokens else {}


def named(token: Mapping[str, Any]) -> dict[str, Any]:
    """A token of the worker's `probabilities`, and the tokens that it was chosen from, with their text."""
    head = {"id": token["id"], "token": bytes(token["bytes"]).decode(errors="replace")}
    rest = {
        name: [named(other) for other in value] if name.startswith("top_") else value for name, value in token.items()
    }
    return head | rest


def picked(body: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """llama.cpp's `response_fields`: what is at each path ("generation_settings/seed"), with the path as its name."""
    result: dict[str, Any] = {}
    for path in paths:
        value: Any = body
        for name in path.split("/"):
            if not isinstance(value, dict) or name not in value:
                break
            value = value[name]
        else:
            result[path] = value
    return result


def tokenize_kinds(settings: Settings) -> dict[str, Kind]:
    """The fields of `/tokenize`."""
    return {
        "content": Text(settings.max_prompt_bytes),
        "add_special": Boolean(),
        "parse_special": Boolean(),
        "with_pieces": Boolean(),
    }


DETOKENIZE_KINDS: dict[str, Kind] = {"tokens": Tokens()}


def completion_body(request: CompletionRequest, done: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The JSON answer, and the last event of a stream (where the text has been sent: `content` and `tokens` are empty).

    `done` is the worker's event. `tokens_evaluated` counts the prompt's tokens, `tokens_cached` those of them that were
    not computed again; `timings` are in milliseconds and tokens a second.
    """
    return {
        "index": done["index"],
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
    } | ({} if request.stream else probabilities(done))


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
