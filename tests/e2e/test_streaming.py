"""Answers that leave the function while they are computed: over a real socket, against the Runtime API."""

from __future__ import annotations

import base64
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.emulator import Emulator
from tests.e2e.runtime_api import Invocation, RuntimeApi
from tests.events import url_event
from tests.gate import Gate
from tests.processes import children, engines, eventually

pytestmark = pytest.mark.usefixtures("engine_path")

TALE = {"prompt": "Once upon a time", "n_predict": 4, "temperature": 0}
PIECES = [" there", " lived", " a", " king"]
STREAM = {"INVOKE_MODE": "RESPONSE_STREAM"}
HEALTH = url_event("", path="/health", method="GET")


@pytest.fixture
def gate(tmp_path: Path, engine_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path, engine_path)
    yield gate
    gate.close()


@pytest.fixture
def gated(tmp_path: Path, gate: Gate) -> Iterator[RuntimeApi]:
    with RuntimeApi(tmp_path / "log", STREAM | {"BITNET_CLI": str(gate.path)}) as function:
        yield function


@pytest.fixture
def function(tmp_path: Path, endless_model: Path) -> Iterator[RuntimeApi]:
    settings = {"MODEL_PATH": str(endless_model), "CTX_SIZE": "32768"}
    with RuntimeApi(tmp_path / "log", STREAM | settings) as function:
        yield function


def prelude(chunk: bytes) -> tuple[dict[str, Any], bytes]:
    """The prelude and what comes after it in the first chunk."""
    head, body = chunk.split(bytes(8), 1)
    return json.loads(head), body


def event(data: bytes) -> dict[str, Any]:
    """The one server-sent event in `data`."""
    assert data.startswith(b"data: ")
    assert data.endswith(b"\n\n")
    value: dict[str, Any] = json.loads(data.removeprefix(b"data: "))
    return value


def whole(invocation: Invocation) -> tuple[int, dict[str, Any]]:
    """Status and body of an answer that is no stream of events."""
    head, body = prelude(b"".join(invocation.rest()))
    return head["statusCode"], json.loads(body)


def test_each_piece_leaves_before_the_next_is_computed(gated: RuntimeApi, gate: Gate) -> None:
    invocation = gated.invoke(url_event(TALE | {"stream": True}))
    gate.let_through(1)
    head, first = prelude(invocation.chunk())
    assert head == {
        "statusCode": 200,
        "headers": {
            "content-type": "text/event-stream; charset=utf-8",
            "x-request-id": invocation.identifier,
            "cache-control": "no-cache",
        },
        "cookies": [],
    }
    pieces = [event(first)["content"]]
    for _ in range(3):
        assert invocation.chunks.empty()
        gate.let_through(1)
        pieces.append(event(invocation.chunk())["content"])
    assert pieces == PIECES
    (last,) = invocation.rest()
    assert (event(last)["stop"], event(last)["tokens_predicted"]) == (True, 4)
    assert invocation.trailers == {}


def test_openai_s_stream(gated: RuntimeApi, gate: Gate) -> None:
    request = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "stream": True}
    invocation = gated.invoke(url_event(request | {"temperature": 0}, path="/v1/chat/completions"))
    gate.let_through(1)
    head, first = prelude(invocation.chunk())
    assert head["statusCode"] == 200
    assert event(first)["choices"][0]["delta"]["role"] == "assistant"
    assert event(invocation.chunk())["choices"][0]["delta"]["content"]
    assert invocation.chunks.empty()
    gate.let_through(1)
    *_, last, done = invocation.rest()
    assert event(last)["choices"][0]["finish_reason"] == "length"
    assert done == b"data: [DONE]\n\n"


def test_the_request_is_what_the_runtime_api_wants(function: RuntimeApi) -> None:
    invocation = function.invoke(url_event(TALE | {"stream": True}))
    invocation.rest()
    assert invocation.path == f"/2018-06-01/runtime/invocation/{invocation.identifier}/response"
    assert {name.lower(): value for name, value in invocation.headers.items() if name.lower() != "host"} == {
        "content-type": "application/vnd.awslambda.http-integration-response",
        "lambda-runtime-function-response-mode": "streaming",
        "transfer-encoding": "chunked",
        "trailer": "Lambda-Runtime-Function-Error-Type, Lambda-Runtime-Function-Error-Body",
        "lambda-runtime-invocation-id": f"i-{invocation.identifier}",
        "connection": "close",
        "accept-encoding": "identity",
    }


def test_other_answers_to_the_url_have_the_prelude_too(function: RuntimeApi) -> None:
    status, body = whole(function.invoke(url_event(TALE)))
    assert (status, body["content"]) == (200, "".join(PIECES))
    refused = function.invoke(url_event({"prompt": "a", "stream": True, "n_predict": 0.5}))
    assert whole(refused) == (400, {"error": refusal("n_predict")})
    assert refused.trailers == {}
    assert whole(function.invoke(HEALTH)) == (200, {"status": "ok", "model": "ready"})


def refusal(field: str) -> dict[str, Any]:
    message = f"'{field}' must be an integer, got 0.5"
    return {"message": message, "type": "invalid_request_error", "param": field, "code": "invalid_type"}


def test_who_is_no_function_url_gets_json(function: RuntimeApi) -> None:
    direct = function.invoke(TALE)
    (body,) = direct.rest()
    assert json.loads(body)["content"] == "".join(PIECES)
    assert direct.headers["content-type"] == "application/json"
    assert direct.headers["lambda-runtime-function-response-mode"] is None
    http_api = url_event(TALE | {"stream": True})
    http_api["requestContext"]["domainName"] = "x.execute-api.eu-west-1.amazonaws.com"
    (body,) = function.invoke(http_api).rest()
    reply = json.loads(body)
    assert (reply["statusCode"], reply["body"].count("data: ")) == (200, 5)
    (body,) = function.invoke({"prompt": "a", "stream": True}).rest()
    assert json.loads(body)["error"]["status"] == 400


def test_an_error_after_the_first_byte_is_an_event_and_a_trailer(gated: RuntimeApi, gate: Gate) -> None:
    invocation = gated.invoke(url_event(TALE | {"stream": True}))
    gate.let_through(1)
    invocation.chunk()
    (proxy,) = children(gated.process.pid)
    os.kill(proxy, signal.SIGKILL)
    (last,) = invocation.rest()
    error = event(last)["error"]
    assert (error["code"], error["type"]) == ("engine_died", "server_error")
    assert invocation.trailers.keys() == {"Lambda-Runtime-Function-Error-Type", "Lambda-Runtime-Function-Error-Body"}
    assert invocation.trailers["Lambda-Runtime-Function-Error-Type"] == "engine_died"
    body = json.loads(base64.b64decode(invocation.trailers["Lambda-Runtime-Function-Error-Body"], validate=True))
    assert body == {"errorType": "engine_died", "errorMessage": error["message"], "stackTrace": []}
    gate.let_through(4)
    assert whole(gated.invoke(url_event(TALE)))[0] == 200


ENDLESS = url_event({"prompt": "Once upon a time", "n_predict": -1, "ignore_eos": True, "stream": True})


def test_who_hangs_up_ends_the_computation(function: RuntimeApi) -> None:
    invocation = function.invoke(ENDLESS, hang_up_after=3)
    assert len(invocation.rest()) == 3
    # Were it still computing, this one would wait for it until its own deadline.
    assert whole(function.invoke(url_event(TALE)))[1]["stop_type"] == "limit"
    assert '"status":499' in function.log()
    assert "a stream was not taken to its end" in function.log()


def test_an_answer_that_is_refused_does_not_end_the_function(function: RuntimeApi) -> None:
    function.invoke(url_event(TALE), status=413).rest()
    assert whole(function.invoke(url_event(TALE)))[0] == 200
    assert '"message":"a stream was refused"' in function.log()
    function.invoke(TALE, status=413).rest()
    assert whole(function.invoke(url_event(TALE)))[0] == 200
    assert '"message":"an answer was refused"' in function.log()
    (engine,) = engines(function.process.pid)
    function.invoke(url_event(TALE), status=500).rest()
    assert function.process.wait(60) != 0
    eventually(lambda: not Path(f"/proc/{engine}").exists())


def test_sigterm_ends_a_stream(function: RuntimeApi) -> None:
    invocation = function.invoke(ENDLESS)
    invocation.chunk()
    function.process.send_signal(signal.SIGTERM)
    assert function.process.wait(60) == 0


def test_the_emulator_takes_a_stream(demo_model: Path) -> None:
    """AWS's own reading of the protocol. It hands the response on in one piece, with its prelude."""
    with Emulator(STREAM | {"MODEL_PATH": str(demo_model)}) as function:
        head, body = prelude(function.invoke_raw(url_event(TALE | {"stream": True})))
        assert head["statusCode"] == 200
        events = [event(piece + b"\n\n") for piece in body.split(b"\n\n")[:-1]]
        assert [piece["content"] for piece in events] == [*PIECES, ""]
        assert function.invoke(TALE)["content"] == "".join(PIECES)
