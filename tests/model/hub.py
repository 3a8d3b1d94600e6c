"""A server that speaks the protocol of the Hugging Face hub, as far as its client needs it to download a file.

https://huggingface.co/docs/hub/api: `/api/models/NAME/revision/REVISION`, and `/NAME/resolve/REVISION/FILE`, which
tells size and SHA-256 and redirects to another host for the bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

COMMIT = "c0ffee" * 6 + "c0ff"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Hub:
    """One repository with one file."""

    repository: str
    filename: str
    body: bytes
    commit: str = COMMIT
    licence: str | None = "mit"
    architecture: str | None = "bitnet-b1.58"
    sha256: str | None = None  # what it says, if not the truth
    cut_after: list[int] = field(default_factory=list)  # bytes of the next answers after which the connection breaks
    hold_after: int | None = None  # bytes after which an answer stops and waits
    status: int = 200  # of its answers
    requests: list[Request] = field(default_factory=list)
    held: threading.Event = field(default_factory=threading.Event)
    resume: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.resume.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def bytes_requests(self) -> list[Request]:
        """Those of the file's bytes."""
        return [request for request in self.requests if request.path.startswith("/bytes/")]

    def model_info(self) -> dict[str, Any]:
        info: dict[str, Any] = {"id": self.repository, "modelId": self.repository, "sha": self.commit, "tags": []}
        info |= {"siblings": [{"rfilename": self.filename}], "private": False, "downloads": 0, "likes": 0}
        if self.licence:
            info["cardData"] = {"license": self.licence}
        if self.architecture:
            info["gguf"] = {"architecture": self.architecture, "total": len(self.body)}
        return info


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub = self.hub
        hub.requests.append(
            Request(self.command, self.path, self.headers.get("range"), self.headers.get("authorization"))
        )
        if hub.status != 200:
            self._answer(hub.status, {}, b"{}")
        elif re.fullmatch(f"/api/models/{hub.repository}/revision/(main|{hub.commit})", self.path):
            self._answer(200, {"content-type": "application/json"}, json.dumps(hub.model_info()).encode())
        elif self.path == f"/{hub.repository}/resolve/{hub.commit}/{hub.filename}":
            sha256 = hub.sha256 or hashlib.sha256(hub.body).hexdigest()
            headers = {"x-repo-commit": hub.commit, "x-linked-etag": f'"{sha256}"', "x-linked-size": str(len(hub.body))}
            # localhost is another host than 127.0.0.1, as the hub's bytes are on another one than its pages.
            location = f"http://localhost:{hub.port}/bytes/{hub.filename}?signature=signed"
            self._answer(302, headers | {"location": location}, b"")
        elif self.path.startswith("/bytes/"):
            self._bytes()
        else:
            self._answer(404, {"x-error-code": "EntryNotFound"}, b"{}")

    do_HEAD = do_GET  # noqa: N815

    def _bytes(self) -> None:
        hub = self.hub
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        start = int(match[1]) if match else 0
        body, size = hub.body[start:], len(hub.body)
        headers = {"content-range": f"bytes {start}-{size - 1}/{size}"} if match else {}
        if hub.hold_after is not None:
            self._head(206 if match else 200, headers, len(body))
            self.wfile.write(body[: hub.hold_after])
            self.wfile.flush()
            hub.held.set()
            hub.resume.wait()
            self._break()
        elif hub.cut_after:
            self._head(206 if match else 200, headers, len(body))
            self.wfile.write(body[: hub.cut_after.pop(0)])
            self._break()
        else:
            self._answer(206 if match else 200, headers, body)

    def _break(self) -> None:
        self.wfile.flush()
        self.close_connection = True

    def _head(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(length))
        self.end_headers()

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self._head(status, headers, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass
