"""Every setting of the function, read from the environment: one typed place, with defaults and limits."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from function import schema

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
MB_PER_VCPU = 1769  # https://docs.aws.amazon.com/lambda/latest/dg/configuration-memory.html


Parse = Callable[[str, str], Any]  # of an environment variable's name and text


class SettingsError(ValueError):
    """An environment variable that cannot be used: names it, its limit and its value."""


def _within(kind: schema.Integer | schema.Number) -> Parse:
    number = int if isinstance(kind, schema.Integer) else float
    return lambda name, text: kind(name, _number(name, text, number))


def _number(name: str, text: str, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(text)
    except ValueError:
        noun = "an integer" if kind is int else "a number"
        raise SettingsError(f"'{name}' must be {noun}, got {schema.describe(text)}") from None


def _choice(*choices: str) -> Parse:
    def check(name: str, text: str) -> str:
        if text not in choices:
            raise SettingsError(f"'{name}' must be one of {', '.join(choices)}, got {schema.describe(text)}")
        return text

    return check


def _flag(name: str, text: str) -> bool:
    return bool(_choice("true", "false")(name, text) == "true")


def _text(_name: str, text: str) -> str:
    return text


def _path(name: str, text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise SettingsError(f"'{name}' must be a path, got that of an unknown user, {schema.describe(text)}") from None


def _s3_uri(name: str, text: str) -> str:
    if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[^\n\ud800-\udfff]+", text):
        raise SettingsError(f"'{name}' must be s3://bucket/key, got {schema.describe(text)}")
    return text


def _secret(name: str, text: str) -> str:
    if not all(" " <= character <= "~" for character in text.replace("\n", " ")) or not text.split():
        raise SettingsError(f"'{name}' must be printable ASCII")  # says nothing of what it is
    return text


def _key_arn(name: str, text: str) -> str:
    service = r"(ssm:[a-z0-9-]+:\d{12}:parameter/|secretsmanager:[a-z0-9-]+:\d{12}:secret:)"
    if not re.fullmatch(rf"arn:aws[a-z-]*:{service}.+", text):
        message = f"'{name}' must be the ARN of an SSM parameter or a secret of Secrets Manager, got"
        raise SettingsError(f"{message} {schema.describe(text)}")
    return text


def _origins(name: str, text: str) -> str:
    if text != "*" and not all(re.fullmatch(r"https?://[^/,\s*]+", origin) for origin in text.split(",")):
        message = f"'{name}' must be * or origins such as https://example.org, separated by commas, got"
        raise SettingsError(f"{message} {schema.describe(text)}")
    return text


@dataclass(frozen=True)
class Settings:
    """The settings. The environment variable of each has its name in capitals; an empty one counts as not set."""

    model_path: Annotated[Path | None, _path] = None
    """The model, a GGUF file. Comes before `model_s3_uri`. Neither: the demo model."""
    model_s3_uri: Annotated[str | None, _s3_uri] = None
    """`s3://bucket/key` of the model: copied to `model_cache_dir` on the first need."""
    model_cache_dir: Annotated[Path, _path] = Path(tempfile.gettempdir()) / "bitnet"
    """Where copies of models are kept; on Lambda only /tmp can be written."""
    demo_model: Annotated[Path, _path] = ROOT / "build" / "model" / "demo" / "model.gguf"
    """The embedded model, for trying and testing."""
    copy_threads: Annotated[int, _within(schema.Integer(1, 64))] = 12
    """Ranges of the model that are copied from S3 at the same time."""
    copy_part_bytes: Annotated[int, _within(schema.Integer(64 * 1024, 1024 * MIB))] = 16 * MIB
    """Size of such a range."""

    bitnet_cli: Annotated[Path, _path] = ROOT / "build" / "out" / "bitnet"
    """The engine's executable."""
    ctx_size: Annotated[int, _within(schema.Integer(0, 2**30))] = 0
    """Context in tokens, prompt and answer together. 0: the model's, at most 2048; above the model's is an error."""
    threads: Annotated[int, _within(schema.Integer(0, 256))] = 0
    """Threads of the engine. 0: on Lambda as many as the memory setting pays for, elsewhere the engine's own choice."""
    parallel: Annotated[int, _within(schema.Integer(0, 64))] = 0
    """Sequences that the engine computes at the same time. 0: its own choice, by the memory there is."""
    kv_type: Annotated[str, _choice("f16", "f32", "i8")] = "f16"
    """Type of the K and V cache."""

    n_predict: Annotated[int, _within(schema.N_PREDICT)] = 128
    """Default of the request's field; the sampling settings below likewise."""
    temperature: Annotated[float, _within(schema.TEMPERATURE)] = 0.8
    top_k: Annotated[int, _within(schema.TOP_K)] = 40
    top_p: Annotated[float, _within(schema.TOP_P)] = 0.95
    min_p: Annotated[float, _within(schema.MIN_P)] = 0.05
    repeat_penalty: Annotated[float, _within(schema.REPEAT_PENALTY)] = 1.0
    repeat_last_n: Annotated[int, _within(schema.REPEAT_LAST_N)] = 64
    max_n_predict: Annotated[int, _within(schema.Integer(0, schema.INT32_MAX))] = 0
    """Upper limit of a request's n_predict. 0: only what the context leaves."""
    max_prompt_bytes: Annotated[int, _within(schema.Integer(1, 6 * MIB))] = 512 * 1024
    """Upper limit of a prompt's UTF-8; how many tokens fit is the context's limit."""
    queue_limit: Annotated[int, _within(schema.Integer(0, 1024))] = 8
    """Requests that may wait while others compute; the next one gets 503 with Retry-After."""
    deadline_margin_ms: Annotated[int, _within(schema.Integer(50, 60_000))] = 1000
    """Generation stops this long before the function's timeout, to have time for the answer."""

    prompt_cache_s3_uri: Annotated[str | None, _s3_uri] = None
    """`s3://bucket/prefix` where the KV of prompts with a `prompt_cache_key` is kept."""
    prompt_cache_dir: Annotated[Path | None, _path] = None
    """Where it lies on this machine. Not set: with `prompt_cache_s3_uri` in `model_cache_dir`, else nowhere."""
    prompt_cache_bytes: Annotated[int, _within(schema.Integer(1, 2**50))] = 512 * MIB
    """How much of it is kept there; the files used least recently go."""

    api_key: Annotated[str | None, _secret] = field(default=None, repr=False)
    """The key that requests must carry, or several with white space between. Neither this nor `api_key_arn`: none."""
    api_key_arn: Annotated[str | None, _key_arn] = None
    """Where the key is kept: the ARN of an SSM parameter (SecureString) or of a secret of Secrets Manager."""
    batch_results_s3_uri: Annotated[str | None, _s3_uri] = None
    """`s3://bucket/prefix` under which the results of batches are put."""

    invoke_mode: Annotated[str, _choice("BUFFERED", "RESPONSE_STREAM")] = "BUFFERED"
    """That of the Function URL, which the function cannot see. RESPONSE_STREAM: answers leave as they are computed."""
    cors_allow_origins: Annotated[str, _origins] = ""
    """Origins whose pages may ask, separated by commas; `*`: all. Empty where the Function URL has CORS of its own."""
    serve_page: Annotated[bool, _flag] = False
    """Whether the function too answers `GET /` with a page to talk to. The local server always does."""
    host: Annotated[str, _text] = "127.0.0.1"
    """Address of the local server; 0.0.0.0 makes it reachable from other machines."""
    port: Annotated[int, _within(schema.Integer(0, 65535))] = 8080
    """Port of the local server. 0: any free one."""
    log_level: Annotated[str, _choice("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")] = "INFO"
    """DEBUG shows the engine's own log too. No level shows prompts or completions."""

    def answer_by(self, deadline: float) -> float:
        """Until when an answer may be waited for. The other half of the margin is for sending it."""
        return deadline - self.deadline_margin_ms / 2e3

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Reads and checks all settings.

        Raises:
            SettingsError: with one line that names the variable, the limit and the value.
        """
        values: dict[str, Any] = {}
        for setting, hint in get_type_hints(cls, include_extras=True).items():
            name = setting.upper()
            if text := environment.get(name):
                try:
                    values[setting] = hint.__metadata__[0](name, text)
                except schema.ApiError as error:
                    raise SettingsError(error.message) from None
        name = "AWS_LAMBDA_FUNCTION_MEMORY_SIZE"
        if not values.get("threads") and (text := environment.get(name)):
            values["threads"] = lambda_threads(int(_number(name, text, int)))
        settings = cls(**values)
        if settings.max_n_predict and "n_predict" not in values:
            return cls(**values | {"n_predict": min(settings.n_predict, settings.max_n_predict)})
        if settings.max_n_predict and settings.n_predict > settings.max_n_predict:
            limit = f"MAX_N_PREDICT, {settings.max_n_predict}"
            raise SettingsError(f"'N_PREDICT' must be at most {limit}, got {settings.n_predict}")
        return settings


def lambda_threads(memory_mb: int) -> int:
    """Threads worth having on Lambda: the vCPUs that `memory_mb` pays for, but no more than there are to see."""
    return max(1, min(len(os.sched_getaffinity(0)), round(memory_mb / MB_PER_VCPU)))
