"""The routes: what each request means, and what is answered. Knows nothing of processes, nor where events come from."""

from __future__ import annotations

import base64
import json
import logging
import re
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict

from aws_lambda_powertools.event_handler import LambdaFunctionUrlResolver, Response

from function import schema
from function.engine import Cancellation, Engine, EngineError, Event, RefusedError
from function.model_store import ModelError
from function.schema import ApiError

if TYPE_CHECKING:
    from function.settings import Settings

logger = logging.getLogger("bitnet.api")

JSON = "application/json"
SSE = "text/event-stream; charset=utf-8"
JSON_TYPE = re.compile(  # curl -d says of any body that it is a form
    r"""\s*(application/(.+\+)?json|application/x-www-form-urlencoded|text/plain)\s*(;\s*charset="?(utf-8|us-ascii)"?\s*)?""",
    re.IGNORECASE,
)
RETRY_AFTER_S = 1
HUNG_UP = 499  # logged as nginx does; nobody is there to receive it


class HttpReply(TypedDict):
    """An answer to a Function URL (payload 2.0), but for `body`: that of a stream is an iterator of its events."""

    statusCode: int
    headers: dict[str, str]
    body: str | Iterator[str]
    isBase64Encoded: bool


@dataclass
class Call:
    """One request on its way: who asks, until when, and what will be logged of it."""

    request_id: str
    deadline: float | None = None  # time.monotonic() at which the answer must be out
    cancellation: Cancellation = field(default_factory=Cancellation)
    record: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def log(self, status: int) -> None:
        """The one line of this request. Nothing that the user wrote is in it, nor what was answered."""
        duration_ms = round((time.monotonic() - self.began) * 1e3, 1)
        logger.info(
            "request", extra={"request_id": self.request_id, "status": status, "duration_ms": duration_ms} | self.record
        )


Operation = Callable[[Mapping[str, Any], Call], dict[str, Any] | Iterator[str]]  # an answer, or a stream


class Api:
    """Answers HTTP requests and direct invocations with the same operations."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self._settings = settings
        self._engine = engine
        self._routes: dict[tuple[str, str], Operation] = {
            ("POST", "/completion"): self._completion,
            ("GET", "/health"): self._health,
        }
        self._resolving = threading.Lock()  # Powertools keeps the request that it resolves in class attributes
        self._resolver = LambdaFunctionUrlResolver()
        for (method, path), operation in self._routes.items():
            self._resolver.route(path, method=method)(_chosen(operation))
        self._resolver.not_found(_chosen(self._not_found))

    def http(self, event: dict[str, Any], call: Call) -> HttpReply:
        """Answers a Function URL event (payload 2.0). Every failure is an answer too."""
        try:
            _check_event(event)
            with self._resolving:
                reply = self._resolver.resolve(event, None)  # type: ignore[arg-type]
            body = reply["body"](event, call)
        except Exception as error:
            failure = _api_error(error, call)
            return _http_reply(failure.status, _dump(failure.body()), call, JSON, failure.headers)
        if isinstance(body, dict):
            return _http_reply(200, _dump(body), call, JSON, reply["headers"])
        return _http_reply(200, body, call, SSE, reply["headers"] | {"cache-control": "no-cache"})

    def invoke(self, event: object, call: Call) -> dict[str, Any]:
        """Answers a direct invocation, whose payload is the body of `/completion`, with the same JSON, less the HTTP.

        A failure is returned, not raised: `{"error": {…, "status"}}` with the status that HTTP would have had.
        """
        call.record["route"] = "invoke"
        try:
            if not isinstance(event, dict):
                raise schema.invalid(
                    f"the payload must be a JSON object, got {schema.describe(event)}", code="invalid_type"
                )
            request = schema.parse_completion(event, self._settings)
            if request.stream:
                message = "'stream' must be false: a direct invocation gets its answer in one piece"
                raise schema.invalid(message, param="stream", code="unsupported_field")
            (body,) = self._bodies(request, call)
        except Exception as error:
            failure = _api_error(error, call)
            call.log(failure.status)
            body = failure.body()
            body["error"]["status"] = failure.status
            return body
        call.log(200)
        return body

    def _completion(self, event: Mapping[str, Any], call: Call) -> dict[str, Any] | Iterator[str]:
        call.record["route"] = "/completion"
        request = schema.parse_completion(schema.parse_object(_body(event)), self._settings)
        bodies = self._bodies(request, call)
        if request.stream:
            first = next(bodies)  # what is refused, is refused before the stream begins
            return self._stream(first, bodies, call)
        (body,) = bodies
        return body

    def _health(self, _event: Mapping[str, Any], call: Call) -> dict[str, Any]:
        call.record["route"] = "/health"
        if (state := self._engine.state) == "loading":
            raise ApiError(503, "model_loading", "the model is being loaded", retry_after_s=RETRY_AFTER_S)
        return {"status": "ok", "model": state}

    def _not_found(self, event: Mapping[str, Any], call: Call) -> NoReturn:
        call.record["route"] = None
        http = event["requestContext"]["http"]
        allowed = [method for method, path in self._routes if path == http["path"]]
        if allowed:
            message = f"{schema.describe(http['path'])} takes {' or '.join(allowed)}"
            raise ApiError(405, "method_not_allowed", message, allow=", ".join(allowed))
        routes = ", ".join(f"{method} {path}" for method, path in self._routes)
        raise ApiError(404, "not_found", f"no route {schema.describe(http['path'])}; there are {routes}")

    def _bodies(self, request: schema.CompletionRequest, call: Call) -> Generator[dict[str, Any]]:
        """The answer's bodies: those of the tokens if it is streamed, then the one with everything."""
        fields = request.for_engine()
        with closing(self._engine.complete(fields, deadline=call.deadline, cancellation=call.cancellation)) as events:
            for event in events:
                if event["event"] == "token":
                    yield schema.token_body(event)
                else:
                    call.record |= _statistics(event)
                    yield schema.completion_body(request, event, self._engine.model_name)

    def _stream(self, first: dict[str, Any], rest: Generator[dict[str, Any]], call: Call) -> Iterator[str]:
        """The text of server-sent events. Closing it cancels the computation."""
        status = HUNG_UP
        try:
            with closing(rest):
                yield _sse(first)
                for body in rest:
                    yield _sse(body)
            status = 200
        except Exception as error:
            failure = _api_error(error, call)
            status = failure.status
            yield _sse(failure.body())
        finally:
            call.log(status)


def _chosen(operation: Operation) -> Callable[..., Response[Operation]]:
    """A route that only says which operation it is: that runs later, when the resolver serves the next request."""
    return lambda *_: Response(status_code=200, body=operation)


def _check_event(event: Mapping[str, Any]) -> None:
    """Refuses what no Function URL sends, but whoever may invoke the function can."""
    headers = event.get("headers")
    if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
        raise schema.invalid("the event's 'headers' must be an object of strings")
    if not isinstance(event.get("body"), str | None):
        raise schema.invalid("the event's 'body' must be a string")


def _body(event: Mapping[str, Any]) -> bytes:
    """The bytes of the request's body.

    Raises:
        ApiError: its type is none of JSON's, or it is not base64 although the event says so.
    """
    given = next((value for name, value in event["headers"].items() if name.lower() == "content-type"), JSON)
    if not JSON_TYPE.fullmatch(given):
        raise ApiError(415, "unsupported_media_type", f"the body must be {JSON} in UTF-8, got {schema.describe(given)}")
    body = event.get("body") or ""
    if not event.get("isBase64Encoded"):
        return body.encode(errors="surrogatepass")
    try:
        return base64.b64decode(body, validate=True)
    except ValueError:
        raise schema.invalid("the body is not base64, though the event says so", code="invalid_base64") from None


def _api_error(error: Exception, call: Call) -> ApiError:
    """The answer to whatever went wrong, noted in the record; the text of an unforeseen error is not: it may quote."""
    failure = _translate(error)
    call.record["error_code"] = failure.code
    if failure.param in schema.KNOWN_FIELDS:
        call.record["param"] = failure.param
    if failure.status >= 500 and isinstance(error, EngineError | ModelError | RefusedError):
        call.record["error_message"] = failure.message
    elif failure.code == "internal_error":
        trace = "".join(traceback.format_tb(error.__traceback__))
        logger.error("internal error", extra={"error_type": type(error).__name__, "trace": trace})
    return failure


def _translate(error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case RefusedError(event=event) if event["code"] in ("invalid_request", "context_length_exceeded"):
            details: dict[str, int] = {name: event[name] for name in ("n_prompt", "n_ctx") if name in event}
            param = "prompt" if details else event["field"]
            code = event["code"] if details else "invalid_value"
            return ApiError(400, code, event["message"], param=param, details=details)
        case RefusedError():
            return ApiError(500, "engine_failed", str(error))
        case EngineError(transient=True) | ModelError(transient=True):
            return ApiError(503, error.code, str(error), retry_after_s=RETRY_AFTER_S)
        case EngineError() | ModelError():
            return ApiError(500, error.code, str(error))
    return ApiError(500, "internal_error", "something went wrong here; the log has the details")


def _statistics(done: Event) -> dict[str, Any]:
    counts = {name: done[name] for name in ("stop_type", "tokens_predicted", "tokens_evaluated", "tokens_cached")}
    return counts | {name: round(done["timings"][name], 1) for name in ("prompt_ms", "predicted_ms")}


def _http_reply(
    status: int, body: str | Iterator[str], call: Call, content_type: str, headers: Mapping[str, str]
) -> HttpReply:
    if isinstance(body, str):  # a stream is logged when it ends
        call.log(status)
    headers = {"content-type": content_type, "x-request-id": call.request_id, **headers}
    return {"statusCode": status, "headers": headers, "body": body, "isBase64Encoded": False}


def _sse(body: Mapping[str, Any]) -> str:
    return f"data: {_dump(body)}\n\n"


def _dump(body: Mapping[str, Any]) -> str:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))
