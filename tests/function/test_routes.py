"""The smaller routes of the local server: tokens, metrics, CORS, and all of them against the OpenAPI document."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import validate
from prometheus_client.parser import text_string_to_metric_families

from tests.processes import eventually
from tests.server import Server

pytestmark = pytest.mark.usefixtures("engine_path")

ORIGIN = "https://page.example"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    settings = {"N_PREDICT": 2, "MAX_N_PREDICT": 4, "MAX_PROMPT_BYTES": 1000}
    with Server(tmp_path / "log", CORS_ALLOW_ORIGINS=f"{ORIGIN},http://localhost:3000", **settings) as server:
        eventually(lambda: server.health()[0] == 200)
        yield server


def post(server: Server, path: str, request: Any) -> tuple[int, dict[str, Any]]:
    response, body = server.request("POST", path, json.dumps(request).encode())
    return response.status, json.loads(body)


def test_text_to_tokens_and_back(server: Server) -> None:
    text = "Grüße, 🐉! There lived 1234 kings."
    status, tokens = post(server, "/tokenize", {"content": text})
    assert status == 200
    assert post(server, "/detokenize", tokens) == (200, {"content": text})
    _, with_bos = post(server, "/tokenize", {"content": text, "add_special": True, "with_pieces": False})
    assert with_bos["tokens"] == [4093, *tokens["tokens"]]
    _, with_pieces = post(server, "/tokenize", {"content": text, "with_pieces": True})
    assert [token["id"] for token in with_pieces["tokens"]] == tokens["tokens"]
    pieces = [token["piece"] for token in with_pieces["tokens"]]
    assert b"".join(bytes(piece) if isinstance(piece, list) else piece.encode() for piece in pieces) == text.encode()
    assert post(server, "/tokenize", {"content": ""}) == (200, {"tokens": []})
    assert post(server, "/detokenize", {"tokens": []}) == (200, {"content": ""})


@pytest.mark.parametrize(
    ("path", "request_", "param", "code"),
    [
        ("/tokenize", {}, "content", "missing_field"),
        ("/tokenize", {"content": 5}, "content", "invalid_type"),
        ("/tokenize", {"content": "x" * 1001}, "content", "too_long"),
        ("/tokenize", {"content": "x", "with_pieces": 1}, "with_pieces", "invalid_type"),
        ("/detokenize", {"tokens": [4096]}, "tokens", "invalid_value"),
        ("/detokenize", {"tokens": ["a"]}, "tokens", "invalid_type"),
        ("/apply-template", {"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages", "unknown_field"),
    ],
)
def test_what_is_wrong_is_said(server: Server, path: str, request_: Any, param: str, code: str) -> None:
    status, body = post(server, path, request_)
    assert (status, body["error"]["param"], body["error"]["code"]) == (400, param, code)


def test_tokens_do_not_wait_for_what_is_computed(tmp_path: Path, endless_model: Path) -> None:
    with Server(tmp_path / "log", MODEL_PATH=endless_model, CTX_SIZE=32_768, QUEUE_LIMIT=0) as server:
        eventually(lambda: server.health()[0] == 200)
        with server.stream({"prompt": "Once", "n_predict": -1, "ignore_eos": True}) as events:
            next(events)
            tokens = post(server, "/tokenize", {"content": " there lived"})[1]
            assert post(server, "/detokenize", tokens) == (200, {"content": " there lived"})
            assert next(events)["stop"] is False


def test_metrics(server: Server) -> None:
    post(server, "/completion", {"prompt": "Once upon a time", "n_predict": 3, "ignore_eos": True})
    post(server, "/completion", {"prompt": "Once upon a time", "n_predict": 1, "ignore_eos": True})
    post(server, "/completion", {"prompt": 5})
    server.request("GET", "/nowhere")
    response, body = server.request("GET", "/metrics")
    assert response.getheader("content-type") == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    requests = {(s.labels["route"], s.labels["status"]): s.value for s in families["bitnet_requests"].samples}
    assert (requests["/completion", "200"], requests["/completion", "400"], requests["", "404"]) == (2, 1, 1)
    values = {name: family.samples[0].value for name, family in families.items() if name != "bitnet_requests"}
    assert values["bitnet_prompt_tokens"] == 10
    assert values["bitnet_prompt_tokens_cached"] == 4
    assert values["bitnet_predicted_tokens"] == 4
    assert values["bitnet_requests_in_flight"] == 0
    assert values["bitnet_predicted_seconds"] > 0
    assert {families[name].type for name in values if name != "bitnet_requests_in_flight"} == {"counter"}


def test_a_page_of_an_allowed_origin_may_ask(server: Server) -> None:
    headers = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-y"}
    response, body = server.request("OPTIONS", "/v1/chat/completions", headers=headers)
    assert (response.status, body) == (204, b"")
    assert response.getheader("access-control-allow-origin") == ORIGIN
    assert "POST" in str(response.getheader("access-control-allow-methods"))
    allowed = str(response.getheader("access-control-allow-headers")).split(",")
    assert {"*", "Authorization"} <= set(allowed)
    too_large = b" " * (6 * 2**20 + 1)
    stream = b'{"prompt":"a","stream":true}'
    for request, status in ((b'{"prompt":"a"}', 200), (b"{", 400), (stream, 200), (too_large, 413)):
        response, _ = server.request("POST", "/completion", request, {"Origin": ORIGIN})
        assert response.status == status
        assert response.getheader("access-control-allow-origin") == ORIGIN
        assert response.getheader("vary") == "origin"


def test_other_pages_may_not(server: Server) -> None:
    response, _ = server.request("GET", "/health", headers={"Origin": "https://other.example"})
    assert response.getheader("access-control-allow-origin") is None


def test_without_the_setting_no_page_may(tmp_path: Path) -> None:
    with Server(tmp_path / "log") as server:
        response, _ = server.request("OPTIONS", "/completion", headers={"Origin": ORIGIN})
        assert response.status == 405
        assert response.getheader("access-control-allow-origin") is None


def test_the_openapi_document_is_one(server: Server) -> None:
    response, body = server.request("GET", "/openapi.json")
    assert response.status == 200
    document = json.loads(body)
    validate(document)
    assert json.loads(server.request("GET", "/openapi.json")[1]) == document
    _, missing = post(server, "/nowhere", {})
    described = {
        f"{method.upper()} {path}".replace("{", "<").replace("}", ">")
        for path, operations in document["paths"].items()
        for method in operations
    }
    assert set(missing["error"]["message"].split("there are ")[1].split(", ")) == described


def test_every_route_does_what_the_document_says(server: Server, tmp_path: Path) -> None:
    """schemathesis sends what the document allows and what it does not.

    Not checked is that everything it allows is taken: it does not know how many tokens the model has, nor which fields
    go together.
    """
    url = f"http://127.0.0.1:{server.port}/openapi.json"
    command = [sys.executable, "-m", "schemathesis.cli", "run", url, "--no-color", "--generation-deterministic"]
    command += ["--max-examples", "25", "--exclude-checks", "positive_data_acceptance"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:]
    assert "Tested: 12\n" in result.stdout  # all but the document itself
