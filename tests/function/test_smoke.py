"""The examples that validate a running API, on the local server, and on one that answers everything wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from function.settings import ROOT
from function.smoke import EXAMPLES
from tests.server import Server

KEY = "a-secret-key"


def smoke(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "function.smoke", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "AWS_CONFIG_FILE": "/nowhere"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert KEY not in done.stdout + done.stderr
    return done


@pytest.fixture
def headers() -> list[dict[str, str]]:
    """Of the requests to `wrong`."""
    return []


@pytest.fixture
def wrong(headers: list[dict[str, str]]) -> Iterator[str]:
    """An API that answers with its own idea of JSON."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers.append({name.lower(): value for name, value in self.headers.items()})
            self.rfile.read(int(self.headers.get("content-length", 0)))
            body = b"<html></html>" if self.path == "/v1/models" else b'{"error": {"message": "No."}, "content": ""}'
            self.send_response(403 if self.path == "/health" else 200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("engine_path")
def test_an_api_that_is_right(tmp_path: Path) -> None:
    with Server(tmp_path / "log") as server:
        done = smoke(f"http://127.0.0.1:{server.port}/")
    assert done.returncode == 0, done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["ok"] * len(EXAMPLES)
    assert f"{len(EXAMPLES)} of {len(EXAMPLES)} are right" in done.stderr


def test_an_api_that_is_wrong(wrong: str) -> None:
    done = smoke(wrong)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["FAILED"] * len(EXAMPLES)
    assert "status 403 instead of 200: No." in done.stdout
    assert "status 200, no JSON: b'<html></html>'" in done.stdout
    assert "the answer lacks something: KeyError('tokens_predicted')" in done.stdout


def test_an_api_that_is_not_there() -> None:
    done = smoke("http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stdout.count("Connection refused") == len(EXAMPLES)


def test_an_address_that_is_none() -> None:
    assert "the URL must begin with http:// or https://, got 'localhost'" in smoke("localhost").stdout


def test_the_key_is_sent(wrong: str, headers: list[dict[str, str]]) -> None:
    smoke(wrong, BITNET_API_KEY=KEY)
    assert {header.get("authorization") for header in headers} == {f"Bearer {KEY}"}


def test_nothing_is_sent_to_strangers(wrong: str, headers: list[dict[str, str]]) -> None:
    smoke(wrong, AWS_ACCESS_KEY_ID="AKIDEXAMPLE", AWS_SECRET_ACCESS_KEY="secret")
    assert {header.get("authorization") for header in headers} == {None}


def test_requests_are_signed(wrong: str, headers: list[dict[str, str]]) -> None:
    credentials = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "secret"}
    assert "the region is not in the URL" in smoke(wrong, "--sign", **credentials).stdout
    assert headers == []
    smoke(wrong, "--sign", "--region", "eu-west-1", **credentials)
    assert len(headers) > 0
    for header in headers:
        scheme, credential, *_ = header["authorization"].split(" ")
        assert scheme == "AWS4-HMAC-SHA256"
        assert credential.startswith("Credential=AKIDEXAMPLE/")
        assert credential.endswith("/eu-west-1/lambda/aws4_request,")


def test_missing_credentials_are_told() -> None:
    done = smoke("https://abcdef.lambda-url.eu-west-1.on.aws", AWS_EC2_METADATA_DISABLED="true")
    assert done.returncode == 1
    assert "no AWS credentials" in done.stdout
