"""Signatures as a server sees them: recomputed from what came over the wire, as AWS's reference describes.

https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest
from botocore.credentials import Credentials

from function.sigv4 import SigV4, is_function_url

REGION = "eu-west-1"
ACCESS_KEY, SECRET_KEY, TOKEN = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", "session/token=="
URL = f"https://abc123.lambda-url.{REGION}.on.aws"


def expected_signature(method: str, path: str, headers: dict[str, str], body: bytes) -> str:
    """The signature, from the parts of the request that its Authorization says are signed."""
    match = re.fullmatch(
        r"AWS4-HMAC-SHA256 Credential=(\S+?)/(\d{8}/\S+), SignedHeaders=(\S+), Signature=[0-9a-f]{64}",
        headers["authorization"],
    )
    assert match
    key_id, scope, signed = match.groups()
    assert (key_id, scope.split("/")[1:]) == (ACCESS_KEY, [REGION, "lambda", "aws4_request"])
    assert {"host", "x-amz-date", "content-type", "x-amz-security-token"} <= set(signed.split(";"))
    canonical_headers = "".join(f"{name}:{headers[name].strip()}\n" for name in signed.split(";"))
    canonical = "\n".join([method, path, "", canonical_headers, signed, hashlib.sha256(body).hexdigest()])
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    message = "\n".join(["AWS4-HMAC-SHA256", headers["x-amz-date"], scope, digest])
    key = f"AWS4{SECRET_KEY}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return hmac.digest(key, message.encode(), "sha256").hex()


class Checker(BaseHTTPRequestHandler):
    """Answers 200 if the signature is right, 403 otherwise, as a Function URL does."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        signature = headers["authorization"].rpartition("Signature=")[2]
        right = hmac.compare_digest(signature, expected_signature(self.command, self.path, headers, body))
        choice = {"index": 0, "text": "signed", "logprobs": None, "finish_reason": "stop"}
        answer = {"id": "1", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}
        data = json.dumps(answer if right else {"Message": "Forbidden"}).encode()
        self.send_response(200 if right else 403)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Checker) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()


def auth(secret: str = SECRET_KEY) -> SigV4:
    return SigV4(REGION, Credentials(ACCESS_KEY, secret, TOKEN))


REQUEST: dict[str, Any] = {"model": "m", "prompt": "Grüße"}


def test_the_openai_client_signs(base_url: str) -> None:
    http_client = openai.DefaultHttpxClient(auth=auth())
    with openai.OpenAI(base_url=base_url, api_key="unused", http_client=http_client, max_retries=0) as client:
        assert client.completions.create(**REQUEST).choices[0].text == "signed"


def test_the_async_client_signs(base_url: str) -> None:
    async def ask() -> str:
        http_client = openai.DefaultAsyncHttpxClient(auth=auth())
        async with openai.AsyncOpenAI(base_url=base_url, api_key="unused", http_client=http_client) as client:
            answer = await client.completions.create(**REQUEST)
            text: str = answer.choices[0].text
            return text

    assert asyncio.run(ask()) == "signed"


def test_curl_signs_the_same_way(base_url: str) -> None:
    command = ["curl", "--silent", "--show-error", "--fail", "--aws-sigv4", f"aws:amz:{REGION}:lambda"]
    command += ["--user", f"{ACCESS_KEY}:{SECRET_KEY}", "-H", f"x-amz-security-token: {TOKEN}"]
    command += ["-H", "content-type: application/json", f"{base_url}/completions", "-d", json.dumps(REQUEST)]
    answer = subprocess.run(command, capture_output=True, check=True)
    assert json.loads(answer.stdout)["choices"][0]["text"] == "signed"


def test_another_secret_gives_another_signature(base_url: str) -> None:
    http_client = openai.DefaultHttpxClient(auth=auth("another"))
    with (
        openai.OpenAI(base_url=base_url, api_key="unused", http_client=http_client, max_retries=0) as client,
        pytest.raises(openai.PermissionDeniedError),
    ):
        client.completions.create(**REQUEST)


def test_credentials_and_region_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    headers = SigV4().headers("POST", f"{URL}/completion", b"{}")
    assert f"Credential={ACCESS_KEY}/" in headers["Authorization"]
    assert f"/{REGION}/lambda/aws4_request" in headers["Authorization"]
    assert "X-Amz-Security-Token" not in headers
    with pytest.raises(ValueError, match="the region is not in the URL"):
        SigV4().headers("POST", "https://example.org/", b"")


def test_without_credentials_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no AWS credentials"):
        SigV4().headers("GET", URL, b"")


def test_function_urls_are_known() -> None:
    assert is_function_url(URL)
    assert not is_function_url("http://localhost:8080")
    assert not is_function_url("https://example.org/x.lambda-url.eu-west-1.on.aws")
