"""The same API at http://localhost:8080, on an ASGI server: `python -m function.local`."""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # before the other imports, which take a while: process 1 of a container ends at no signal
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, lambda *_: os._exit(0))

import asyncio
import base64
import contextlib
import socket
import sys
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import uvicorn

from function.api import Call, HttpReply
from function.engine import Cancellation, StoppingError
from function.handler import Application, application
from function.schema import ApiError
from function.settings import SettingsError

MAX_BODY_BYTES = 6 * 2**20  # as on Lambda: https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html
MAX_DISCARDED_BYTES = 256 * 2**20  # read all the same: most clients look for an answer when they have sent all
MAX_PARALLEL = 64  # completions that the engine computes at the same time; a thread is made only when there is work
SPARE_THREADS = 8  # beside those that compute and wait: for health, refusals, errors
GRACEFUL_S = 2
UNREAD_MS = 60_000  # without reading, after which a client is taken for gone, and what is computed for it ends

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class App:
    """The ASGI application: turns a request into a Function URL event and a reply into a response."""

    def __init__(self, parts: Application) -> None:
        self._api = parts.api
        self._threads = ThreadPoolExecutor(MAX_PARALLEL + parts.settings.queue_limit + SPARE_THREADS, "request")

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """One HTTP request."""
        if scope["type"] != "http":
            raise NotImplementedError(scope["type"])
        with contextlib.suppress(asyncio.CancelledError):  # the server ends, and this client did not take its answer
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        call = Call(uuid.uuid4().hex)
        body: bytes | None = b""
        try:
            body = await _read(receive)
        except ApiError as error:
            call.refusal = error
        if body is None:
            return
        watch = asyncio.create_task(_cancel_on_hang_up(receive, call.cancellation))
        try:
            reply = await self._in_thread(self._api.http, _event(scope, body), call)
            if isinstance(reply["body"], str):
                await _send_reply(send, reply["statusCode"], reply["headers"], reply["body"])
            else:
                await self._stream(reply, send, call)
        finally:
            watch.cancel()

    async def _stream(self, reply: HttpReply, send: Send, call: Call) -> None:
        try:
            await send(_start(reply["statusCode"], reply["headers"]))
            while (event := await self._in_thread(next, reply["body"], None)) is not None:
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            await send({"type": "http.response.body"})
        finally:
            call.cancellation.cancel()  # nothing if the stream has ended

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)


class Server(uvicorn.Server):
    """Uvicorn, ended by SIGINT or SIGTERM with exit code 0: what runs is cancelled and answered with what there is."""

    def __init__(self, config: uvicorn.Config, parts: Application) -> None:
        super().__init__(config)
        self._parts = parts
        self.failure: BaseException | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn's own raises the signal again at the end, and so dies of it."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.end)
        loaded = self._parts.engine.load()
        loaded.add_done_callback(lambda future: loop.call_soon_threadsafe(self._on_loaded, future))
        yield

    def end(self) -> None:
        """Takes no more requests and cancels those there are."""
        self.force_exit = self.should_exit  # at the second signal
        self.should_exit = True
        asyncio.get_running_loop().run_in_executor(None, self._parts.engine.cancel_all)

    def _on_loaded(self, loaded: Future[Any]) -> None:
        error = loaded.exception()
        if error is not None and not isinstance(error, StoppingError):
            self.failure = error
            self.end()


def main() -> int:
    """Serves until a signal comes. Returns 0, or 1 if the model or the port cannot be had, or 2 for a wrong setting."""
    if len(sys.argv) > 1:
        return _fail(f"takes no arguments, got {sys.argv[1]}: settings are environment variables (README.md)", 2)
    try:
        parts = application(is_local=True)
    except SettingsError as error:
        return _fail(str(error), 2)
    settings = parts.settings
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=128)
    except OSError as error:
        return _fail(f"cannot listen on {settings.host}, port {settings.port} (HOST, PORT): {error.strerror}", 1)
    # Connections inherit it; asyncio sees to it only if a socket names its protocol. Without, answers wait for 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: it breaks the connection then
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_MS)
    config = uvicorn.Config(
        App(parts),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACEFUL_S,
    )
    server = Server(config, parts)
    shown_host = f"[{settings.host}]" if family == socket.AF_INET6 else settings.host
    print(f"bitnet: http://{shown_host}:{listener.getsockname()[1]} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    try:
        server.run(sockets=[listener])
    finally:
        parts.engine.stop()
    return _fail(str(server.failure), 1) if server.failure else 0


def _fail(message: str, code: int) -> int:
    print(f"bitnet: {message}", file=sys.stderr)
    return code


async def _read(receive: Receive) -> bytes | None:
    """The request's body, or None if the client hung up before its end.

    Raises:
        ApiError: it is larger than Lambda would take.
    """
    body = bytearray()
    size = 0
    while (message := await receive())["type"] == "http.request":
        size += len(message["body"])
        if size <= MAX_BODY_BYTES:
            body += message["body"]
        if message["more_body"] and size <= MAX_DISCARDED_BYTES:
            continue
        if size <= MAX_BODY_BYTES:
            return bytes(body)
        more = " and more" if message["more_body"] else ""
        error = ApiError(413, "too_long", f"the body must have at most {MAX_BODY_BYTES} bytes, got {size}{more}")
        error.headers["connection"] = "close"
        raise error
    return None


def _event(scope: Mapping[str, Any], body: bytes) -> dict[str, Any]:
    """The request as a Function URL passes it on: payload 2.0."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]},{value}" if name in headers else value
    client = scope.get("client") or ("", 0)
    return {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": scope["path"],
        "rawQueryString": scope["query_string"].decode("latin-1"),
        "headers": headers,
        "requestContext": {
            "stage": "$default",
            "http": {"method": scope["method"], "path": scope["path"], "sourceIp": client[0]},
        },
        "body": base64.b64encode(body).decode(),
        "isBase64Encoded": True,
    }


async def _cancel_on_hang_up(receive: Receive, cancellation: Cancellation) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    await asyncio.get_running_loop().run_in_executor(None, cancellation.cancel)


def _start(status: int, headers: Mapping[str, str]) -> Message:
    pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": pairs}


async def _send_reply(send: Send, status: int, headers: Mapping[str, str], body: str) -> None:
    encoded = body.encode()
    await send(_start(status, {**headers, "content-length": str(len(encoded))}))
    await send({"type": "http.response.body", "body": encoded})


if __name__ == "__main__":
    sys.exit(main())
