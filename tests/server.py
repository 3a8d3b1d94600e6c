"""The local server as a process of its own."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from function.settings import ROOT
from tests.processes import engines, eventually


class Server:
    """`python -m function.local` on a free port, with these settings."""

    python = ("-m", "function.local")

    def __init__(self, log: Path, **settings: object) -> None:
        self._log = log
        self._settings = {name: str(value) for name, value in settings.items()}

    def __enter__(self) -> Self:
        environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.python],
                cwd=ROOT,
                env=environment | {"PORT": "0"} | self._settings,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        eventually(lambda: self._address() or self.process.poll() is not None)
        if address := self._address():
            self.port = int(address[1])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        print(self.log())

    def _address(self) -> re.Match[str] | None:
        return re.search(r"http://127\.0\.0\.1:(\d+)", self.log())

    def log(self) -> str:
        return self._log.read_text()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[http.client.HTTPResponse, bytes]:
        with closing(self.connect()) as connection:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response, response.read()

    def post(self, request: Any) -> tuple[int, dict[str, Any]]:
        response, body = self.request("POST", "/completion", json.dumps(request).encode())
        assert response.getheader("content-type") == "application/json"
        return response.status, json.loads(body)

    def health(self) -> tuple[int, dict[str, Any]]:
        response, body = self.request("GET", "/health")
        return response.status, json.loads(body)

    def in_flight(self) -> int:
        """Completions that compute or wait."""
        _, text = self.request("GET", "/metrics")
        return int(text.split(b"\nbitnet_requests_in_flight ")[1].split()[0])

    @contextmanager
    def stream(self, request: dict[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
        """The events of a stream, as they come; the connection breaks at the end of the block."""
        with closing(self.connect()) as connection:
            connection.request("POST", "/completion", json.dumps(request | {"stream": True}))
            response = connection.getresponse()
            assert response.status == 200
            assert response.getheader("content-type") == "text/event-stream; charset=utf-8"
            yield _events(response)
            response.close()

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)

    @property
    def engine(self) -> int:
        (pid,) = engines(self.process.pid)
        return pid


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    while line := response.readline():
        assert line.startswith(b"data: ")
        assert response.readline() == b"\n"
        yield json.loads(line.removeprefix(b"data: "))
