"""The API key: who passes and who does not."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from moto import mock_aws
from openapi_spec_validator import validate

from function.api import Call
from function.handler import application, lambda_handler
from tests.events import url_event
from tests.server import Server

pytestmark = pytest.mark.usefixtures("engine_path")

KEY = "sesame-0123456789"
REGION = "eu-west-1"
WRONG = ["", KEY, f"Basic {KEY}", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer sésame"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fresh function and an account with nothing in it."""
    for name, value in (("AWS_ACCESS_KEY_ID", "t"), ("AWS_SECRET_ACCESS_KEY", "t"), ("AWS_DEFAULT_REGION", REGION)):
        monkeypatch.setenv(name, value)
    application.cache_clear()
    with mock_aws():
        yield
    if application.cache_info().currsize:
        application().engine.stop()
    application.cache_clear()


def ask(authorization: str | None, name: str = "authorization", path: str = "/props") -> tuple[int, dict[str, Any]]:
    """A request that needs neither a prompt nor much time."""
    headers = {} if authorization is None else {name: authorization}
    reply = application().api.http(url_event("", path=path, method="GET", headers=headers), Call("1"))
    assert isinstance(reply["body"], str)
    return reply["statusCode"], {"headers": reply["headers"], **json.loads(reply["body"])}


@pytest.mark.parametrize("authorization", [None, *WRONG])
def test_who_has_no_key_does_not_pass(monkeypatch: pytest.MonkeyPatch, authorization: str | None) -> None:
    monkeypatch.setenv("API_KEY", KEY)
    status, body = ask(authorization)
    assert (status, body["headers"]["www-authenticate"]) == (401, "Bearer")
    assert body["headers"]["x-request-id"] == "1"
    error = body["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "invalid_api_key")
    assert KEY not in error["message"]
    assert application().engine.state == "not_loaded"  # nothing is done for them


@pytest.mark.parametrize("name", ["authorization", "Authorization"])
@pytest.mark.parametrize("authorization", [f"Bearer {KEY}", f"bearer {KEY}", "Bearer the-next-key"])
def test_who_has_a_key_passes(monkeypatch: pytest.MonkeyPatch, name: str, authorization: str) -> None:
    monkeypatch.setenv("API_KEY", f"{KEY}\nthe-next-key")
    assert ask(authorization, name)[0] == 200


def test_without_a_key_everybody_passes() -> None:
    assert ask(None)[0] == 200


def test_health_is_for_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", KEY)
    assert ask(None, path="/health")[0] == 200
    assert ask(None, path="/metrics")[0] == 401
    assert ask(None, path="/nowhere")[0] == 401


def test_the_document_says_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", KEY)
    _, document = ask(None, path="/openapi.json")
    del document["headers"]
    validate(document)
    assert document["components"]["securitySchemes"] == {"apiKey": {"type": "http", "scheme": "bearer"}}
    assert document["paths"]["/completion"]["post"]["security"] == [{"apiKey": []}]
    assert "security" not in document["paths"]["/health"]["get"]


def test_a_direct_invocation_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", KEY)

    class Context:
        aws_request_id = "1"

        def get_remaining_time_in_millis(self) -> int:
            return 60_000

    assert lambda_handler({"prompt": "a", "n_predict": 1}, Context())["stop"] is True  # type: ignore[index, call-overload]


@pytest.mark.parametrize("name", ["/bitnet/api-key", "api-key"])
def test_a_key_in_ssm_is_read_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    ssm: Any = boto3.client("ssm")
    ssm.put_parameter(Name=name, Type="SecureString", Value=KEY)
    arn = ssm.get_parameter(Name=name)["Parameter"]["ARN"]
    monkeypatch.setenv("API_KEY_ARN", arn)
    assert ask(f"Bearer {KEY}")[0] == 200
    ssm.delete_parameter(Name=name)
    assert (ask(f"Bearer {KEY}")[0], ask(f"Bearer {KEY}x")[0]) == (200, 401)


def test_a_key_in_secrets_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets: Any = boto3.client("secretsmanager")
    monkeypatch.setenv("API_KEY_ARN", secrets.create_secret(Name="bitnet/api-key", SecretString=KEY)["ARN"])
    assert (ask(f"Bearer {KEY}")[0], ask(f"Bearer {KEY}x")[0]) == (200, 401)


def test_a_secret_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets: Any = boto3.client("secretsmanager")
    monkeypatch.setenv("API_KEY_ARN", secrets.create_secret(Name="text", SecretBinary=KEY.encode())["ARN"])
    assert (ask(f"Bearer {KEY}")[0], ask(f"Bearer {KEY}x")[0]) == (200, 401)
    application().engine.stop()
    application.cache_clear()
    monkeypatch.setenv("API_KEY_ARN", secrets.create_secret(Name="no text", SecretBinary=b"\xff")["ARN"])
    status, body = ask(f"Bearer {KEY}")
    assert (status, body["error"]["code"]) == (500, "api_key_unavailable")


def test_who_keeps_the_key_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request is answered before its deadline all the same."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL_SSM", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("API_KEY_ARN", "arn:aws:ssm:eu-west-1:123456789012:parameter/bitnet-key")
        api = application().api
        event = url_event("", path="/props", method="GET", headers={"authorization": f"Bearer {KEY}"})
        deadline = time.monotonic() + 2
        reply = api.http(event, Call("1", deadline))
        assert time.monotonic() < deadline
    assert isinstance(reply["body"], str)
    assert (reply["statusCode"], json.loads(reply["body"])["error"]["code"]) == (503, "api_key_unavailable")
    assert reply["headers"]["retry-after"] == "1"


@pytest.mark.parametrize(
    "kind", ["ssm:eu-west-1:123456789012:parameter/", "secretsmanager:eu-west-1:123456789012:secret:"]
)
def test_a_key_that_cannot_be_read_lets_nobody_pass(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("API_KEY_ARN", f"arn:aws:{kind}bitnet-key")
    for _ in range(2):
        status, body = ask(f"Bearer {KEY}")
        assert (status, body["error"]["code"]) == (500, "api_key_unavailable")
        assert "bitnet-key" not in body["error"]["message"]


def test_an_empty_key_lets_nobody_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets: Any = boto3.client("secretsmanager")
    monkeypatch.setenv("API_KEY_ARN", secrets.create_secret(Name="bitnet/api-key", SecretString=" \n")["ARN"])
    for authorization in (None, "Bearer ", f"Bearer {KEY}"):
        assert ask(authorization)[0] in (401, 500)


def test_the_local_server_asks_for_it_but_lets_pages_look(tmp_path: Any) -> None:
    settings = {"API_KEY": KEY, "CORS_ALLOW_ORIGINS": "*"}
    with Server(tmp_path / "log", **settings) as server:
        request = json.dumps({"prompt": "a", "n_predict": 1}).encode()
        headers = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
        assert server.request("OPTIONS", "/completion", headers=headers)[0].status == 204
        response, _ = server.request("POST", "/completion", request, {"Origin": "https://page.example"})
        assert (response.status, response.getheader("www-authenticate")) == (401, "Bearer")
        assert response.getheader("access-control-allow-origin")
        assert server.request("POST", "/completion", request, {"Authorization": f"Bearer {KEY}"})[0].status == 200
