"""The routes: what each request means, and what is answered. Knows nothing of processes, nor where events come from."""

from __future__ import annotations

import base64
import itertools
import json
import logging
import re
import threading
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypedDict
from urllib.parse import quote, unquote

from aws_lambda_powertools.event_handler import CORSConfig, LambdaFunctionUrlResolver, Response

from function import chat_template, openai, schema, tools
from function.auth import ApiKey
from function.engine import STOPPING, Cancellation, Engine, EngineError, Event, RefusedError, StoppingError
from function.metrics import CONTENT_TYPE as METRICS
from function.metrics import Metrics
from function.model_store import ModelError
from function.page import Page, page
from function.prompt_cache import PromptCache
from function.schema import Answer, ApiError, CompletionRequest
from function.structured import Grammars

if TYPE_CHECKING:
    from function.settings import Settings

logger = logging.getLogger("bitnet.api")

JSON = "application/json"
SSE = "text/event-stream; charset=utf-8"
JSON_TYPE = re.compile(  # curl -d says of any body that it is a form
    r"""\s*(application/(.+\+)?json|application/x-www-form-urlencoded|text/plain)\s*(;\s*charset=["']?(utf-?8|us-ascii)["']?\s*|;(?!\s*charset=)[^;]*)*""",
    re.IGNORECASE,
)
MODELS = "/v1/models/"  # and the name of one
CORS_MAX_AGE_S = 86_400
RETRY_AFTER_S = 1
ENVELOPE_BYTES = 4096  # of an answer's status and headers and the error that ends a stream, at most
HUNG_UP = 499  # logged as nginx does; nobody is there to receive it


class HttpReply(TypedDict):
    """An answer to a Function URL (payload 2.0), but for `body`: that of a stream generates its events."""

    statusCode: int
    headers: dict[str, str]
    body: str | Generator[str]
    isBase64Encoded: bool


@dataclass
class Call:
    """One request on its way: who asks, until when, and what will be logged of it."""

    request_id: str
    deadline: float | None = None  # time.monotonic() at which the answer must be out
    max_bytes: int | None = None  # of the answer in JSON, in which the body of an HTTP answer is a string
    answer_bytes: int = ENVELOPE_BYTES  # of it so far
    refusal: ApiError | None = None  # why whoever took the request does not pass it on
    prompt_field: str = "prompt"  # of the request
    structure_field: str | None = None
    cancellation: Cancellation = field(default_factory=Cancellation)
    record: dict[str, Any] = field(default_factory=dict)
    afterwards: Callable[[], None] | None = None  # done when all of a stream has left
    failure: ApiError | None = None  # what the answer says instead, or at its end if it is a stream
    began: float = field(default_factory=time.monotonic)


Json = dict[str, Any] | list[dict[str, Any]]
Body = Json | str | Page | Generator[str]  # JSON, a text, the page or a stream
Operation = Callable[[Mapping[str, Any], Call], Body]


class Api:
    """Answers HTTP requests and direct invocations with the same operations."""

    def __init__(self, settings: Settings, engine: Engine, metrics: Metrics | None = None) -> None:
        self._settings = settings
        self._engine = engine
        self._grammars = Grammars(engine)
        self._prompt_cache = PromptCache(settings)
        self._metrics = metrics or Metrics()
        self._api_key = ApiKey(settings)
        self._created = int(time.time())
        self._routes: dict[tuple[str, str], Operation] = {
            ("POST", "/completion"): self._completion,
            ("POST", "/v1/completions"): self._text_completion,
            ("POST", "/v1/chat/completions"): self._chat_completion,
            ("GET", "/v1/models"): self._models,
            ("GET", "/v1/models/<model>"): self._model,
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/detokenize"): self._detokenize,
            ("POST", "/apply-template"): self._apply_template,
            ("GET", "/props"): self._props,
            ("GET", "/health"): self._health,
            ("GET", "/metrics"): self._metrics_text,
            ("GET", "/openapi.json"): self._openapi,
        }
        self._resolving = threading.Lock()  # Powertools keeps the request that it resolves in class attributes
        self._resolver = LambdaFunctionUrlResolver(cors=_cors(settings))
        for (method, path), operation in self._routes.items():
            self._resolver.route(path, method=method)(_chosen(operation, path))
        if settings.serve_page:
            self._resolver.route("/", method="GET")(_chosen(self._page, "/"))
        self._resolver.not_found(_chosen(self._not_found, None))

    def http(self, event: dict[str, Any], call: Call, *, trusted: bool = False) -> HttpReply:
        """Answers a Function URL event (payload 2.0). Every failure is an answer too.

        `trusted`: the event did not come over HTTP, so whoever sent it had a permission instead of an API key.
        """
        headers: dict[str, str] = {}
        try:
            _check_event(event)
            event = _routed(event)
            with self._resolving:
                reply = self._resolver.resolve(event, None)  # type: ignore[arg-type]
            headers = reply["headers"]
            if isinstance(reply["body"], str):  # a browser asks whether a page may
                return self._reply(reply["statusCode"], reply["body"], call, None, headers)
            if call.refusal is not None:
                raise call.refusal
            if not trusted:
                self._api_key.check(event, call.deadline)
            body = reply["body"](event, call)
            text = _dump(body) if isinstance(body, dict | list) else None
            _count(text, call)
        except Exception as error:
            failure = _api_error(error, call)
            return self._reply(failure.status, _dump(failure.body()), call, JSON, headers | failure.headers)
        if text is not None:
            return self._reply(200, text, call, JSON, headers)
        if isinstance(body, str):
            return self._reply(200, body, call, METRICS, headers)
        if isinstance(body, Page):
            return self._reply(200, body.text, call, None, headers | body.headers)
        return self._reply(200, body, call, SSE, headers | {"cache-control": "no-cache"})

    def invoke(self, event: object, call: Call) -> Json:
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
            body = self._whole(request, schema.LlamaAnswer(request), call)
            _count(body, call)
        except Exception as error:
            failure = _api_error(error, call)
            self._finish(call, failure.status)
            body = failure.body()
            body["error"]["status"] = failure.status
            return body
        self._finish(call, 200)
        return body

    def _completion(self, event: Mapping[str, Any], call: Call) -> Json | Generator[str]:
        request = schema.parse_completion(schema.parse_object(_body(event)), self._settings)
        return self._answer(request, schema.LlamaAnswer(request), call)

    def _text_completion(self, event: Mapping[str, Any], call: Call) -> Json | Generator[str]:
        request = openai.parse_text(schema.parse_object(_body(event)), self._settings)
        self._named(request.model, call)
        echoes = [self._text(prompt, call) for prompt in request.completion.prompts] if request.echo else []
        return self._answer(request.completion, openai.TextAnswer(f"cmpl-{call.request_id}", request, echoes), call)

    def _chat_completion(self, event: Mapping[str, Any], call: Call) -> Json | Generator[str]:
        call.prompt_field = "messages"
        request = openai.parse_chat(schema.parse_object(_body(event)), self._settings)
        ready = self._named(request.model, call)
        prompt = chat_template.tokens(request.messages, ready["bos"], ready["eot"])
        answer = openai.ChatAnswer(f"chatcmpl-{call.request_id}", request)
        return self._answer(replace(request.completion, prompts=(prompt,)), answer, call)

    def _models(self, _event: Mapping[str, Any], call: Call) -> dict[str, Any]:
        name = self._engine.describe(call.deadline, call.cancellation)["model"]["name"]
        return {"object": "list", "data": [openai.model_body(name, self._created)]}

    def _model(self, event: Mapping[str, Any], call: Call) -> dict[str, Any]:
        name = unquote(event["requestContext"]["http"]["path"].removeprefix(MODELS))
        return openai.model_body(self._named(name, call)["model"]["name"], self._created)

    def _tokenize(self, event: Mapping[str, Any], call: Call) -> dict[str, Any]:
        kinds = schema.tokenize_kinds(self._settings)
        given = schema.check(schema.parse_object(_body(event)), kinds, ["content"])
        add_bos, special = given.get("add_special", False), given.get("parse_special", False)
        tokens = self._engine.tokenize(given["content"], add_bos=add_bos, special=special, deadline=call.deadline)
        if not given.get("with_pieces"):
            return {"tokens": tokens}
        pieces = self._grammars.vocabulary(call.deadline).tokens
        return {"tokens": [{"id": token, "piece": _piece(pieces[token])} for token in tokens]}

    def _detokenize(self, event: Mapping[str, Any], call: Call) -> dict[str, Any]:
        given = schema.check(schema.parse_object(_body(event)), schema.DETOKENIZE_KINDS, ["tokens"])
        return {"content": self._engine.detokenize(given["tokens"], call.deadline)}

    def _apply_template(self, event: Mapping[str, Any], _call: Call) -> dict[str, Any]:
        kinds = openai.template_kinds(self._settings)
        given = schema.check(schema.parse_object(_body(event)), kinds, ["messages"])
        messages = given["messages"]
        if functions := given.get("tools"):
            messages = openai.with_instructions(messages, tools.instructions(functions, required=False, several=True))
        return {"prompt": chat_template.text(messages)}

    def _props(self, _event: Mapping[str, Any], call: Call) -> dict[str, Any]:
        ready = self._engine.describe(call.deadline, call.cancellation)
        defaults = schema.completion_request({"prompts": ("",)}, self._settings).generation_settings(-1)
        return {
            "default_generation_settings": {"n_ctx": ready["n_ctx"], "params": defaults},
            "total_slots": ready["n_parallel"],
            "model_path": ready["model"]["path"],
            "chat_template": chat_template.JINJA,
            "bos_token": chat_template.BEGIN,
            "eos_token": chat_template.END_OF_TURN,
            "build_info": ready["version"],
            "model": {name: value for name, value in ready["model"].items() if name != "path"},
        }

    def _metrics_text(self, _event: Mapping[str, Any], _call: Call) -> str:
        return self._metrics.text(self._engine.in_flight)

    def _openapi(self, _event: Mapping[str, Any], _call: Call) -> dict[str, Any]:
        from function import openapi

        return self._api_key.document(openapi.document(self._settings))

    def _page(self, _event: Mapping[str, Any], _call: Call) -> Page:
        return page()

    def _health(self, _event: Mapping[str, Any], _call: Call) -> dict[str, Any]:
        if (state := self._engine.state) == "loading":
            raise ApiError(503, "model_loading", "the model is being loaded", retry_after_s=RETRY_AFTER_S)
        return {"status": "ok", "model": state}

    def _not_found(self, event: Mapping[str, Any], _call: Call) -> NoReturn:
        http = event["requestContext"]["http"]
        known = [*self._routes, *([("GET", "/")] if self._settings.serve_page else [])]
        allowed = [method for method, path in known if _fits(path, http["path"])]
        if allowed:
            message = f"{schema.describe(http['path'])} takes {' or '.join(allowed)}"
            raise ApiError(405, "method_not_allowed", message, allow=", ".join(allowed))
        routes = ", ".join(f"{method} {path}" for method, path in known)
        raise ApiError(404, "not_found", f"no route {schema.describe(http['path'])}; there are {routes}")

    def _named(self, model: str | None, call: Call) -> Event:
        """The worker's `ready` event, if `model` is what it has or None."""
        ready = self._engine.describe(call.deadline, call.cancellation)
        name = ready["model"]["name"]
        if model not in (None, name):
            message = f"there is no model {schema.describe(model)}: leave it out or send {json.dumps(name)}"
            raise ApiError(404, "model_not_found", message, param="model")
        return ready

    def _answer(self, request: CompletionRequest, answer: Answer, call: Call) -> Json | Generator[str]:
        if not request.stream:
            return self._whole(request, answer, call)
        events = self._events(request, call)
        first = next(events)  # what is refused, is refused before the stream begins
        stream = self._stream(first, events, answer, request.n, call)
        next(stream)
        return stream

    def _whole(self, request: CompletionRequest, answer: Answer, call: Call) -> Json:
        done = sorted(self._events(request, call), key=lambda event: event["index"])
        call.record |= _statistics(done, request.n, call)
        _check_complete(done, answer, call)
        return answer.whole(done, self._engine.model_name)

    def _events(self, request: CompletionRequest, call: Call) -> Generator[Event]:
        """What the worker says of the completions, but for masks."""
        with self._engine.admitted():
            yield from self._computed(request, call)

    def _computed(self, request: CompletionRequest, call: Call) -> Generator[Event]:
        ready = self._engine.describe(call.deadline, call.cancellation)
        biases = self._biases(request, call)
        asked = request.for_engine(biases, ready["add_bos"])
        entry = None
        if request.prompt_cache_key and request.cache_prompt and len(asked) == 1:
            entry = self._prompt_cache.open(request.prompt_cache_key, ready, call.deadline)
            asked[0] |= entry.for_engine() if entry else {}
        mask = None
        if request.structure is not None:
            call.structure_field = request.structure.field
            force = not (request.n_probs or request.logprobs or biases)
            mask = self._grammars.compile(request.structure, call.deadline, force=force)
        for event in self._engine.complete(asked, mask=mask, deadline=call.deadline, cancellation=call.cancellation):
            yield event
            if entry is not None and event["event"] == "done":
                call.record["cache_file"] = event["cache_file"]
                call.afterwards = partial(self._prompt_cache.close, entry, event, call.deadline)
                entry = None

    def _biases(self, request: CompletionRequest, call: Call) -> dict[int, float | Literal[False]]:
        """`logit_bias` by token: that of a text is each of its tokens', and what is said twice adds up."""
        biases: dict[int, float | Literal[False]] = {}
        for token, bias in request.logit_bias:
            tokens = [token] if isinstance(token, int) else self._tokens(token, call)
            for each in tokens:
                before = biases.get(each, 0.0)
                biases[each] = False if bias is False or before is False else before + bias
        if len(biases) > schema.MAX_LOGIT_BIASES:
            message = f"'logit_bias' must have at most {schema.MAX_LOGIT_BIASES} tokens, got {len(biases)}"
            raise schema.invalid(message, param="logit_bias", code="too_long")
        return biases

    def _tokens(self, text: str, call: Call) -> list[int]:
        return self._engine.tokenize(text, add_bos=False, special=False, deadline=call.deadline)

    def _text(self, prompt: schema.Prompt, call: Call) -> str:
        """The text of a prompt, whatever it is made of."""
        if isinstance(prompt, str):
            return prompt
        tokens = [self._tokens(part, call) if isinstance(part, str) else [part] for part in prompt]
        return self._engine.detokenize(list(itertools.chain.from_iterable(tokens)), call.deadline)

    def _stream(self, first: Event, rest: Generator[Event], answer: Answer, n: int, call: Call) -> Generator[str]:
        """Nothing, then the text of server-sent events. Closing it cancels the computation."""
        status = HUNG_UP
        model = self._engine.model_name
        done: list[Event] = []
        try:
            with closing(rest):
                yield ""  # what has begun is finished below, even if nobody takes a piece
                for body in answer.opening(model):
                    yield _part(body, call)
                for event in itertools.chain([first], rest):
                    if event["event"] == "done":
                        done.append(event)
                        if event["stop_type"] == "cancelled" and not answer.says_cancelled:
                            continue
                    for body in (answer.piece if event["event"] == "token" else answer.last)(event, model):
                        yield _part(body, call)
            done.sort(key=lambda event: event["index"])
            call.record |= _statistics(done, n, call)
            _check_complete(done, answer, call)
            for body in answer.closing(done, model):
                yield _part(body, call)
            if answer.end:
                yield answer.end
            status = 200
        except Exception as error:
            failure = _api_error(error, call)
            status = failure.status
            yield _sse(failure.body())
        finally:
            self._finish(call, status)

    def _reply(
        self,
        status: int,
        body: str | Generator[str],
        call: Call,
        content_type: str | None,
        headers: Mapping[str, str],
    ) -> HttpReply:
        if isinstance(body, str):  # a stream is counted when it ends
            self._finish(call, status)
        headers = {"x-request-id": call.request_id, **headers}
        if content_type is not None:
            headers = {"content-type": content_type, **headers}
        if self._settings.cors_allow_origins:
            headers["vary"] = "origin"
        return {"statusCode": status, "headers": headers, "body": body, "isBase64Encoded": False}

    def _finish(self, call: Call, status: int) -> None:
        """Counts the request and logs its one line. Nothing that the user wrote is in it, nor what was answered."""
        if call.afterwards:
            call.afterwards()
        self._metrics.count(status, call.record, call.request_id)
        duration_ms = round((time.monotonic() - call.began) * 1e3, 1)
        logger.info(
            "request", extra={"request_id": call.request_id, "status": status, "duration_ms": duration_ms} | call.record
        )


def _chosen(operation: Operation, route: str | None) -> Callable[..., Response[Operation]]:
    """A route that only says which operation it is: that runs later, when the resolver serves the next request."""

    def run(event: Mapping[str, Any], call: Call) -> Body:
        call.record["route"] = route
        return operation(event, call)

    return lambda *_, **__: Response(status_code=200, body=run)


def _fits(route: str, path: str) -> bool:
    return re.fullmatch(re.escape(route).replace("<model>", ".+"), path, re.DOTALL) is not None


def _cors(settings: Settings) -> CORSConfig | None:
    if not settings.cors_allow_origins:
        return None
    first, *others = settings.cors_allow_origins.split(",")
    return CORSConfig(
        first, others, allow_headers=["*"], expose_headers=["x-request-id", "retry-after"], max_age=CORS_MAX_AGE_S
    )


def _check_event(event: Mapping[str, Any]) -> None:
    """Refuses what no Function URL sends, but whoever may invoke the function can."""
    headers = event.get("headers")
    if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
        raise schema.invalid("the event's 'headers' must be an object of strings")
    if not isinstance(event.get("body"), str | None):
        raise schema.invalid("the event's 'body' must be a string")


def _routed(event: dict[str, Any]) -> dict[str, Any]:
    """The event as the routes want it.

    The path has no stage of API Gateway before it. The resolver's, `rawPath`, has no character that it does not take.
    HEAD is GET, but for the body of the answer, which whoever sends it leaves out.
    """
    context = event["requestContext"]
    http, stage, path = context["http"], context["stage"], event["rawPath"]
    if stage != "$default":
        path = path.removeprefix(f"/{stage}") or "/"
    raw_path = MODELS + quote(path.removeprefix(MODELS), safe="", errors="replace") if path.startswith(MODELS) else path
    method = "GET" if http["method"] == "HEAD" else http["method"]
    context = context | {"stage": "$default", "http": http | {"method": method, "path": path}}
    return event | {"rawPath": raw_path, "requestContext": context}


def _body(event: Mapping[str, Any]) -> bytes:
    """The bytes of the request's body.

    Raises:
        ApiError: its type is none of JSON's, it is compressed, or it is not base64 although the event says so.
    """
    headers = {name.lower(): value.strip() for name, value in event["headers"].items()}
    if (encoding := headers.get("content-encoding", "")).lower() not in ("", "identity"):
        message = f"the body must be sent as it is, got the content-encoding {schema.describe(encoding)}"
        raise ApiError(415, "unsupported_media_type", message)
    given = headers.get("content-type", "")
    if given and not JSON_TYPE.fullmatch(given):
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
    call.failure = failure = _translate(error, call)
    call.record["error_code"] = failure.code
    if failure.code not in ("unknown_field", "duplicate_field"):  # whose names the caller made up
        call.record["param"] = failure.param
    if failure.status >= 500 and isinstance(error, EngineError | ModelError | RefusedError):
        call.record["error_message"] = failure.message
    elif failure.code == "internal_error":
        trace = "".join(traceback.format_tb(error.__traceback__))
        logger.error("internal error", extra={"error_type": type(error).__name__, "trace": trace})
    return failure


def _translate(error: Exception, call: Call) -> ApiError:
    match error:
        case ApiError():
            return error
        case RefusedError(event={"code": "invalid_request", "field": "allow"}):  # of a mask, which no request has
            message = f"'{call.structure_field}' allows nothing here but what 'logit_bias' or 'ignore_eos' forbids"
            return schema.invalid(message, param=call.structure_field)
        case RefusedError(event=event) if event["code"] in ("invalid_request", "context_length_exceeded"):
            details: dict[str, int] = {name: event[name] for name in ("n_prompt", "n_ctx") if name in event}
            param = call.prompt_field if details else event["field"]
            code = event["code"] if details else "invalid_value"
            return ApiError(400, code, event["message"], param=param, details=details)
        case RefusedError():
            return ApiError(500, "engine_failed", str(error))
        case EngineError(transient=True) | ModelError(transient=True):
            return ApiError(503, error.code, str(error), retry_after_s=RETRY_AFTER_S)
        case EngineError() | ModelError():
            return ApiError(500, error.code, str(error))
    return ApiError(500, "internal_error", "something went wrong here; the log has the details")


def _statistics(done: Sequence[Event], n: int, call: Call) -> dict[str, Any]:
    """Of completions that have just ended, `n` of each prompt: they waited, then were computed side by side.

    Times of several are sums, but for those until the first token.
    """
    prompts = done[::n]
    prompt_ms = [event["timings"]["prompt_ms"] for event in prompts]
    predicted_ms = [event["timings"]["predicted_ms"] for event in done]
    first_token_ms = max(min(prompt_ms), (time.monotonic() - call.began) * 1e3 - max(predicted_ms))
    times = {
        "queue_ms": first_token_ms - min(prompt_ms),
        "prompt_ms": sum(prompt_ms),
        "first_token_ms": first_token_ms,
        "predicted_ms": sum(predicted_ms),
    }
    # A completion's first token comes with the prompt, before the time that counts.
    later_tokens = sum(max(0, event["tokens_predicted"] - 1) for event in done)
    if later_tokens and times["predicted_ms"]:
        times["tokens_per_second"] = later_tokens / times["predicted_ms"] * 1e3
    stop_types = [event["stop_type"] for event in done]
    cut = [kind for kind in stop_types if kind in ("deadline", "cancelled")]  # of one is as good as of all
    return {name: round(value, 1) for name, value in times.items()} | {
        "stop_type": (cut or stop_types)[0],
        "tokens_predicted": sum(event["tokens_predicted"] for event in done),
        "tokens_evaluated": sum(event["tokens_evaluated"] for event in prompts),
        "tokens_cached": sum(event["tokens_cached"] for event in prompts),
    }


def _check_complete(done: Sequence[Event], answer: Answer, call: Call) -> None:
    """Whether a client can tell that an answer was cancelled, if it was.

    Raises:
        ApiError: it cannot, but nobody is there.
        StoppingError: it cannot, and shall ask again: the server ends.
    """
    if answer.says_cancelled or all(event["stop_type"] != "cancelled" for event in done):
        return
    if call.cancellation.cancelled:
        raise ApiError(HUNG_UP, "hung_up", "the client hung up")
    raise StoppingError(STOPPING)


def _count(part: Json | str | None, call: Call) -> None:
    """Adds a part of the answer, in JSON, to what there is of it.

    Raises:
        ApiError: this is more than the caller can be given.
    """
    if call.max_bytes is not None:
        call.answer_bytes += len(json.dumps(part))
        if call.answer_bytes > call.max_bytes:
            message = (
                f"the answer has {call.answer_bytes} bytes in JSON, and Lambda takes at most {call.max_bytes}: ask"
            )
            message += " for fewer prompts, completions, tokens or probabilities of each ('n_probs', 'top_logprobs'),"
            raise ApiError(422, "answer_too_large", f"{message} or a Function URL that streams (InvokeMode)")


def _piece(token: bytes) -> str | list[int]:
    """A token of llama.cpp's `with_pieces`: text, or its bytes where they are no UTF-8."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return list(token)


def _sse(body: Mapping[str, Any]) -> str:
    return f"data: {_dump(body)}\n\n"


def _part(body: Mapping[str, Any], call: Call) -> str:
    """An event of a stream, which counts as a part of the answer."""
    text = _sse(body)
    _count(text, call)
    return text


def _dump(body: Json | Mapping[str, Any]) -> str:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))
