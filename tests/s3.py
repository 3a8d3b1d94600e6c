"""moto's S3 on a socket, behind a proxy that keeps a list of the requests and can spoil answers.

The function talks to the proxy with the real boto3; moto holds the objects.
"""

from __future__ import annotations

import http.client
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

BUCKET = "models"
HOP_HEADERS = {"connection", "transfer-encoding", "server", "date", "content-length"}


@dataclass
class Answer:
    """What moto said, before a fault spoils it."""

    status: int
    headers: dict[str, str]
    body: bytes
    cut_after: int | None = None  # bytes of the body after which the connection breaks


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]

    @property
    def range_start(self) -> int | None:
        match = re.match(r"bytes=(\d+)-", self.headers.get("range", ""))
        return int(match[1]) if match else None


Fault = Callable[[Request, Answer], None]


@dataclass
class S3:
    """A server with the bucket `models`."""

    requests: list[Request] = field(default_factory=list)
    fault: Fault | None = None
    before: Callable[[Request], None] | None = None  # called before moto is asked

    def __enter__(self) -> Self:
        from moto.server import ThreadedMotoServer

        self._moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._moto.start()
        self.moto_host, self.moto_port = self._moto.get_host_and_port()
        self._proxy = _Server(("127.0.0.1", 0), type("Proxy", (_Proxy,), {"s3": self}))
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        self._moto.stop()

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to find and use the server."""
        return {
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{self._proxy.server_address[1]}",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
        }

    def client(self) -> S3Client:
        """A client that goes straight to moto: its requests are not counted, nor spoilt."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=f"http://{self.moto_host}:{self.moto_port}",
            region_name="us-east-1",
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )

    def reset(self) -> None:
        connection = http.client.HTTPConnection(self.moto_host, self.moto_port)
        connection.request("POST", "/moto-api/reset")
        assert connection.getresponse().status == 200
        connection.close()
        self.requests.clear()
        self.fault = self.before = None
        self.client().create_bucket(Bucket=BUCKET)

    def put(self, key: str, body: bytes, **options: Any) -> str:
        """Puts an object and returns its URI."""
        self.client().put_object(Bucket=BUCKET, Key=key, Body=body, **options)
        return f"s3://{BUCKET}/{key}"

    def count(self, method: str) -> int:
        return sum(request.method == method for request in self.requests)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients may go away
            super().handle_error(request, client_address)


class _Proxy(BaseHTTPRequestHandler):
    """Hands requests on to moto."""

    s3: S3
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        request = Request(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
        self.s3.requests.append(request)
        if self.s3.before:
            self.s3.before(request)
        body = self.rfile.read(int(request.headers.get("content-length", 0)))
        upstream = http.client.HTTPConnection(self.s3.moto_host, self.s3.moto_port)
        upstream.request(self.command, self.path, body, headers=dict(self.headers))
        response = upstream.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        answer = Answer(response.status, headers, response.read())
        upstream.close()
        if self.s3.fault:
            self.s3.fault(request, answer)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if name not in HOP_HEADERS:
                self.send_header(name, value)
        length = answer.headers["content-length"] if self.command == "HEAD" else str(len(answer.body))
        self.send_header("content-length", length)
        self.end_headers()
        self.wfile.write(answer.body[: answer.cut_after])
        if answer.cut_after is not None:
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass
