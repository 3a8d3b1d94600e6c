"""The front door: one event in, one response out."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from aws_lambda_powertools import Logger

from function.api import Api, Call, HttpReply
from function.batch import Batches, is_map_batch, is_queue_batch
from function.engine import Engine
from function.metrics import Metrics
from function.model_store import ModelStore
from function.settings import Settings

# Of an answer that is not streamed, as the Runtime API's error says; documented are 6 MB:
# https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html
MAX_ANSWER_BYTES = 6_291_556


class LambdaContext(Protocol):
    """What is used of Lambda's context."""

    aws_request_id: str

    def get_remaining_time_in_millis(self) -> int:
        """Milliseconds until the function is killed."""


@dataclass(frozen=True)
class Application:
    """What an execution environment keeps between invocations."""

    settings: Settings
    engine: Engine
    api: Api
    batches: Batches


@functools.cache
def application(*, is_local: bool = False) -> Application:
    """Puts the parts together on the first need. Nothing is loaded yet. The local server has the page in any case.

    Raises:
        SettingsError: an environment variable cannot be used.
    """
    settings = Settings.from_environment()
    settings = replace(settings, serve_page=settings.serve_page or is_local)
    Logger(service="bitnet", level=settings.log_level, utc=True)  # the parent of all loggers here
    logging.getLogger("bitnet").propagate = False  # awslambdaric's own handler would say everything again
    metrics = Metrics.from_environment()
    engine = Engine(settings, ModelStore(settings, metrics), metrics)
    api = Api(settings, engine, metrics)
    return Application(settings, engine, api, Batches(settings, engine, api))


@dataclass(frozen=True)
class Stream:
    """An answer that leaves as it is computed. `call.failure` is set once `reply["body"]` has ended with an error."""

    reply: HttpReply
    call: Call


def lambda_handler(event: Any, context: LambdaContext) -> Mapping[str, Any] | list[dict[str, Any]] | Stream:
    """What Lambda calls, with an HTTP request, a batch, or a direct invocation.

    Where the Function URL has INVOKE_MODE=RESPONSE_STREAM, every answer to it is a `Stream`, which `function.runtime`
    understands. Everywhere else a stream is answered in one piece.
    """
    deadline = time.monotonic() + context.get_remaining_time_in_millis() / 1e3
    call = Call(context.aws_request_id, deadline, max_bytes=MAX_ANSWER_BYTES)
    parts = application()
    if is_map_batch(event):
        return parts.batches.map_items(event, context.aws_request_id, deadline)
    if is_queue_batch(event):
        return parts.batches.queue_records(event, context.aws_request_id, deadline)
    if not is_http(event):
        return parts.api.invoke(event, call)
    streams = parts.settings.invoke_mode == "RESPONSE_STREAM" and is_function_url(event)
    if streams:
        call.max_bytes = None
    reply = parts.api.http(event, call)
    if event["requestContext"]["http"]["method"] == "HEAD":
        reply["body"] = ""
    if streams:
        return Stream(reply, call)
    if not isinstance(reply["body"], str):
        reply["body"] = "".join(reply["body"])
    return reply


def is_function_url(event: Mapping[str, Any]) -> bool:
    """Whether an HTTP request came from a Function URL: an HTTP API sends the same payload, but takes no streams."""
    return ".lambda-url." in str(event["requestContext"].get("domainName"))


def is_http(event: Any) -> bool:
    """Whether `event` is an HTTP request of payload version 2.0; everything else was invoked directly.

    https://docs.aws.amazon.com/lambda/latest/dg/urls-invocation.html#urls-payloads
    """
    match event:
        case {
            "version": "2.0",
            "rawPath": str(),
            "requestContext": {"stage": str(), "http": {"method": str(), "path": str()}},
        }:
            return True
    return False
