"""Lambda's Runtime API on a socket, with the function as its runtime.

It is here because AWS's emulator hands a streamed response on in one piece and drops its trailers. What is answered,
and what is expected of the other side, is from https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html and
https://docs.aws.amazon.com/lambda/latest/dg/runtimes-custom.html#runtimes-custom-response-streaming.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from function.settings import ROOT

WAIT_S = 120  # the end of a hung test, no figure


@dataclass
class Invocation:
    """One event and what the function answers to it. `chunks` are those of HTTP, as they come; None is the end."""

    event: Any
    status: int = 202  # of our answer to the response
    hang_up_after: int | None = None  # chunks
    identifier: str = field(default_factory=lambda: str(uuid.uuid4()))
    path: str = ""
    headers: Message = field(default_factory=Message)
    chunks: SimpleQueue[bytes | None] = field(default_factory=SimpleQueue)
    trailers: dict[str, str] = field(default_factory=dict)
    handed_out_at: float = 0.0  # of time.perf_counter()
    first_chunk_at: float = 0.0

    def chunk(self) -> bytes:
        """The next chunk, when it is there."""
        chunk = self.chunks.get(timeout=WAIT_S)
        assert chunk is not None, "the response has ended"
        return chunk

    def rest(self) -> list[bytes]:
        """The chunks to the end of the response."""
        return list(self)

    def __iter__(self) -> Iterator[bytes]:
        while (chunk := self.chunks.get(timeout=WAIT_S)) is not None:
            yield chunk


class RuntimeApi:
    """One execution environment: `python -m function.runtime` with these settings, and the API that it asks."""

    def __init__(self, log: Path, environment: dict[str, str]) -> None:
        self._log = log
        self._environment = environment
        self.events: SimpleQueue[Invocation | None] = SimpleQueue()
        self.running: dict[str, Invocation] = {}
        self.over = threading.Event()

    def __enter__(self) -> Self:
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"api": self}))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{self._server.server_address[1]}"
        environment = {"PATH": os.environ["PATH"], **self._environment, "AWS_LAMBDA_RUNTIME_API": address}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "function.runtime"], cwd=ROOT, env=environment, stdout=log, stderr=log
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        self.over.set()
        self.events.put(None)
        self._server.shutdown()
        self._server.server_close()
        print(self.log())

    def invoke(self, event: Any, **behaviour: Any) -> Invocation:
        """Hands the function an event, and does not wait for the answer."""
        invocation = Invocation(event, **behaviour)
        self.running[invocation.identifier] = invocation
        self.events.put(invocation)
        return invocation

    def log(self) -> str:
        return self._log.read_text()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or an event waits 40 ms for the acknowledgement of its headers
    api: RuntimeApi

    def do_GET(self) -> None:
        if self.path == "/2020-01-01/extension/event/next":
            self.api.over.wait()
            self.close_connection = True
            return
        assert self.path == "/2018-06-01/runtime/invocation/next"
        invocation = self.api.events.get()
        if invocation is None:
            self.close_connection = True
            return
        headers = {
            "Content-Type": "application/json",
            "Lambda-Runtime-Aws-Request-Id": invocation.identifier,
            "Lambda-Runtime-Deadline-Ms": str(int((time.time() + WAIT_S) * 1e3)),
            "Lambda-Runtime-Invoked-Function-Arn": "arn:aws:lambda:eu-west-1:123456789012:function:bitnet",
            "Lambda-Runtime-Invocation-Id": f"i-{invocation.identifier}",
        }
        invocation.handed_out_at = time.perf_counter()
        self._answer(200, json.dumps(invocation.event).encode(), headers)

    def do_POST(self) -> None:
        if self.path == "/2020-01-01/extension/register":
            self.rfile.read(int(self.headers["content-length"]))
            self._answer(200, b"{}", {"Lambda-Extension-Identifier": "extension-1"})
            return
        *_, identifier, _kind = self.path.split("/")
        invocation = self.api.running[identifier]
        invocation.path, invocation.headers = self.path, self.headers
        if self.headers["transfer-encoding"] == "chunked":
            if not self._read_chunks(invocation):
                self.close_connection = True
                invocation.chunks.put(None)
                return
        else:
            invocation.chunks.put(self.rfile.read(int(self.headers["content-length"])))
        self._answer(invocation.status, b'{"status":"OK"}', {"Content-Type": "application/json"})
        invocation.chunks.put(None)

    def _read_chunks(self, invocation: Invocation) -> bool:
        """Reads to the end, strictly as RFC 9112, section 7.1, says; False if it was told to hang up before."""
        count = 0
        while size := int(self._line(), 16):
            chunk = self.rfile.read(size)
            assert self.rfile.read(2) == b"\r\n"
            invocation.first_chunk_at = invocation.first_chunk_at or time.perf_counter()
            invocation.chunks.put(chunk)
            count += 1
            if count == invocation.hang_up_after:
                return False
        while line := self._line():
            name, value = line.decode().split(": ")
            assert name in self.headers["trailer"].split(", ")
            invocation.trailers[name] = value
        return True

    def _line(self) -> bytes:
        line = self.rfile.readline()
        assert line.endswith(b"\r\n"), "the connection broke"
        return line[:-2]

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass
