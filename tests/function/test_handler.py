"""The function through its front door: events in, responses out, with the real engine and the demo model."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from awslambdaric.lambda_context import LambdaContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from function.api import Call
from function.engine import Cancellation
from function.handler import Stream, application, lambda_handler
from function.runtime import Client
from function.schema import NEUTRAL, completion_kinds
from function.settings import Settings
from tests.events import url_event
from tests.processes import alive, engines, eventually, processor_ticks

PROMPT = "Once upon a time"
Setup = Callable[..., None]


pytestmark = pytest.mark.usefixtures("engine_path")


@pytest.fixture(autouse=True)
def setup(monkeypatch: pytest.MonkeyPatch) -> Iterator[Setup]:
    """Sets the environment of a fresh function; the engine of each test is its own."""

    def set_up(**environment: object) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        application.cache_clear()

    set_up()
    yield set_up
    if application.cache_info().currsize:
        application().engine.stop()
    application.cache_clear()
    assert engines(os.getpid()) == set()


def context(remaining_ms: int = 60_000) -> LambdaContext:
    return LambdaContext("request-1", None, None, int(time.time() * 1000) + remaining_ms)


def invoke(event: Any, remaining_ms: int = 60_000) -> dict[str, Any]:
    """The response as Lambda passes it on: as JSON."""
    reply: dict[str, Any] = json.loads(
        json.dumps(lambda_handler(event, context(remaining_ms)), ensure_ascii=False).encode()
    )
    return reply


def post(request: Any, **changes: Any) -> tuple[int, dict[str, Any]]:
    reply = invoke(url_event(request, **changes))
    assert reply["headers"]["content-type"] == "application/json"
    assert reply["isBase64Encoded"] is False
    return reply["statusCode"], json.loads(reply["body"])


def stream(body: dict[str, Any], remaining_ms: int = 60_000) -> list[dict[str, Any]]:
    reply = invoke(url_event(body | {"stream": True}), remaining_ms)
    assert reply["statusCode"] == 200
    assert reply["headers"]["content-type"] == "text/event-stream; charset=utf-8"
    *events, rest = reply["body"].split("\n\n")
    assert rest == ""
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_completion_is_what_the_cli_generates(engine_path: Path, demo_model: Path) -> None:
    command = [str(engine_path), "generate", "--model", str(demo_model), "--prompt", PROMPT, "--n-predict", "40"]
    result = subprocess.run([*command, "--temperature", "0", "--json"], capture_output=True, check=True)
    expected = json.loads(result.stdout)
    status, body = post({"prompt": PROMPT, "n_predict": 40, "temperature": 0, "return_tokens": True})
    assert status == 200
    assert body["content"] == expected["content"]
    assert body["tokens"] == expected["tokens"]
    assert (body["stop"], body["stop_type"], body["stopping_word"]) == (True, "limit", "")
    assert (body["tokens_predicted"], body["truncated"]) == (40, False)
    assert body["tokens_evaluated"] == body["timings"]["prompt_n"] == 5
    assert body["model"] == "bitnet-fairy-tales"
    assert body["generation_settings"]["temperature"] == 0
    assert body["generation_settings"]["n_predict"] == 40
    assert body["timings"].keys() == {
        "prompt_n",
        "prompt_ms",
        "prompt_per_second",
        "predicted_n",
        "predicted_ms",
        "predicted_per_second",
        "draft_n",
        "draft_n_accepted",
    }


def test_a_direct_invocation_gives_the_same_without_http() -> None:
    request = {"prompt": PROMPT, "n_predict": 8, "temperature": 0, "seed": 1, "cache_prompt": False}
    direct, (_, http) = invoke(request), post(request)
    assert direct.pop("timings").keys() == http.pop("timings").keys()
    assert direct == http


def test_a_body_in_base64() -> None:
    body = base64.b64encode(json.dumps({"prompt": "Grüße, 🐉", "n_predict": 1}).encode()).decode()
    assert post(body, isBase64Encoded=True)[0] == 200


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json; charset=UTF-8",
        "application/json; charset=utf-8;",
        "application/json;odata=verbose; Charset='utf8' ;x",
        "",
        " ",
        "application/x-www-form-urlencoded",
        "text/plain",
        "application/vnd.x+json",
    ],
)
def test_content_types_that_are_taken(content_type: str) -> None:
    assert post({"prompt": "a", "n_predict": 1}, headers={"Content-Type": content_type})[0] == 200
    assert post({"prompt": "a", "n_predict": 1}, headers={})[0] == 200


@pytest.mark.parametrize(
    "content_type",
    ["multipart/form-data; boundary=x", "application/xml", "application/json; x=y; charset=latin-1", "json"],
)
def test_content_types_that_are_not(content_type: str) -> None:
    status, body = post({"prompt": "a"}, headers={"content-type": content_type})
    assert (status, body["error"]["code"]) == (415, "unsupported_media_type")
    assert content_type in body["error"]["message"]


def test_a_compressed_body_is_not_taken() -> None:
    assert post({"prompt": "a", "n_predict": 1}, headers={"content-encoding": "identity"})[0] == 200
    status, body = post("", headers={"Content-Encoding": "gzip"})
    assert (status, body["error"]["code"]) == (415, "unsupported_media_type")
    assert 'content-encoding "gzip"' in body["error"]["message"]


def test_tokens_as_a_prompt_and_as_an_answer() -> None:
    _, text = post({"prompt": PROMPT, "n_predict": 4, "temperature": 0, "return_tokens": True})
    bos = 4093
    _, start = post({"prompt": [bos], "n_predict": 0, "return_tokens": True})
    assert (start["tokens"], start["tokens_evaluated"]) == ([], 1)
    _, again = post({"prompt": [bos, *text["tokens"]], "n_predict": 1})
    assert (again["tokens"], again["tokens_evaluated"], again["tokens_predicted"]) == ([], 5, 1)


def test_special_tokens_stay_text_unless_asked_for() -> None:
    text = "<|eot_id|>"
    assert post({"prompt": text, "n_predict": 0})[1]["tokens_evaluated"] > 2
    assert post({"prompt": text, "n_predict": 0, "special": True})[1]["tokens_evaluated"] == 2


def test_the_same_seed_gives_the_same_text_and_is_told() -> None:
    first = post({"prompt": PROMPT, "n_predict": 30, "temperature": 1.5})[1]
    seed = first["generation_settings"]["seed"]
    again = post({"prompt": PROMPT, "n_predict": 30, "temperature": 1.5, "seed": seed})[1]
    assert again["content"] == first["content"]
    assert again["generation_settings"]["seed"] == seed


def test_stop_words_and_the_full_context_end_it() -> None:
    words = post({"prompt": PROMPT, "n_predict": 20, "temperature": 0, "stop": [" king"]})[1]
    assert (words["stop_type"], words["stopping_word"]) == ("word", " king")
    assert words["content"] == " there lived a"
    full = post({"prompt": PROMPT, "n_predict": -1, "temperature": 0, "ignore_eos": True})[1]
    assert (full["stop_type"], full["truncated"]) == ("limit", True)
    assert full["tokens_evaluated"] + full["tokens_predicted"] == 256


def test_the_defaults_are_the_settings(setup: Setup) -> None:
    setup(N_PREDICT=3, TEMPERATURE=0)
    body = post({"prompt": PROMPT})[1]
    assert body["tokens_predicted"] == 3
    assert body["generation_settings"]["temperature"] == 0


def test_a_stream_in_one_piece() -> None:
    request = {"prompt": PROMPT, "n_predict": 20, "temperature": 0, "return_tokens": True}
    *tokens, last = stream(request)
    _, whole = post(request)
    assert len(tokens) == 20
    assert "".join(token["content"] for token in tokens) == whole["content"]
    assert [identifier for token in tokens for identifier in token["tokens"]] == whole["tokens"]
    assert {token["stop"] for token in tokens} == {False}
    assert (last["content"], last["tokens"], last["stop"], last["stop_type"]) == ("", [], True, "limit")
    assert last.keys() == whole.keys()


def test_a_stream_that_is_refused_is_an_ordinary_error() -> None:
    status, body = post({"prompt": [5000], "stream": True})
    assert (status, body["error"]["param"]) == (400, "prompt")


def test_a_direct_invocation_does_not_stream() -> None:
    error = invoke({"prompt": PROMPT, "stream": True})["error"]
    assert (error["status"], error["param"], error["code"]) == (400, "stream", "unsupported_field")


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(setup: Setup) -> None:
    setup(CTX_SIZE=64)
    status, body = post({"prompt": "A tale of a tailor. " * 100})
    error = body["error"]
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
    assert error["n_ctx"] == 64 < error["n_prompt"]
    assert "64" in error["message"]
    assert str(error["n_prompt"]) in error["message"]


@pytest.mark.parametrize(
    ("event", "param", "code"),
    [
        ({}, "prompt", "missing_field"),
        ({"prompt": "a", "n_predict": "many"}, "n_predict", "invalid_type"),
        ({"prompt": "a", "max_tokens": 3}, "max_tokens", "unknown_field"),
        ({"prompt": [5000]}, "prompt", "invalid_value"),
        ([], None, "invalid_type"),
        ("text", None, "invalid_type"),
        (None, None, "invalid_type"),
        (7, None, "invalid_type"),
    ],
)
def test_a_direct_invocation_returns_errors(event: Any, param: str | None, code: str) -> None:
    error = invoke(event)["error"]
    assert (error["status"], error["param"], error["code"]) == (400, param, code)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"body": None}, 400, "invalid_json"),
        ({"body": ""}, 400, "invalid_json"),
        ({"body": "{"}, 400, "invalid_json"),
        ({"body": '{"prompt": "\ud800"}'}, 400, "invalid_json"),
        ({"body": '{"prompt": "\\ud800"}'}, 400, "invalid_unicode"),
        ({"body": "%%%", "isBase64Encoded": True}, 400, "invalid_base64"),
        ({"body": "é", "isBase64Encoded": True}, 400, "invalid_base64"),
        ({"body": "/w==", "isBase64Encoded": True}, 400, "invalid_json"),
        ({"body": {"prompt": "a"}}, 400, "invalid_value"),
        ({"headers": None}, 400, "invalid_value"),
        ({"headers": {"content-type": 5}}, 400, "invalid_value"),
        ({"path": "/nothing"}, 404, "not_found"),
        ({"path": ""}, 404, "not_found"),
        ({"method": "GET"}, 405, "method_not_allowed"),
        ({"method": "POST", "path": "/health"}, 405, "method_not_allowed"),
        ({"method": "\n"}, 405, "method_not_allowed"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(changes: dict[str, Any], status: int, code: str) -> None:
    given_status, body = post({"prompt": "a", "n_predict": 1}, **changes)
    assert (given_status, body["error"]["code"]) == (status, code)
    assert body["error"]["type"] == "invalid_request_error"


def test_a_wrong_method_is_told_the_right_one() -> None:
    reply = invoke(url_event({}, method="DELETE"))
    assert (reply["statusCode"], reply["headers"]["allow"]) == (405, "POST")


def test_head_is_get_without_the_body() -> None:
    reply = invoke(url_event("", path="/health", method="HEAD"))
    assert (reply["statusCode"], reply["headers"]["content-type"], reply["body"]) == (200, "application/json", "")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/prod/completion", 200),
        ("GET", "/prod/completion", 405),
        ("GET", "/prod/v1/models/bitnet-fairy-tales", 200),
        ("GET", "/prod/health", 200),
        ("GET", "/prod/props", 401),
        ("GET", "/prod", 404),
    ],
)
def test_the_stage_of_an_http_api_is_no_part_of_the_path(setup: Setup, method: str, path: str, status: int) -> None:
    """https://docs.aws.amazon.com/apigateway/latest/developerguide/http-api-stages.html"""
    setup(API_KEY="sesame")
    event = url_event({"prompt": "a", "n_predict": 1} if method == "POST" else "", path=path, method=method)
    event["requestContext"]["stage"] = "prod"
    if status != 401 and "health" not in path:  # for which nobody needs a key
        event["headers"]["authorization"] = "Bearer sesame"
    reply = invoke(event)
    assert reply["statusCode"] == status, reply["body"]


@pytest.mark.parametrize("path", ["/v1/models/bitnet-fairy-tales", "/v1/models/bitnet%2Dfairy%2Dtales"])
def test_the_name_of_a_model_may_be_escaped(path: str) -> None:
    assert post("", path=path, method="GET")[0] == 200


def test_health_tells_the_state_and_loads_nothing() -> None:
    health = {"path": "/health", "method": "GET"}
    assert post("", **health) == (200, {"status": "ok", "model": "not_loaded"})
    assert engines(os.getpid()) == set()
    post({"prompt": "a", "n_predict": 1})
    assert post("", **health) == (200, {"status": "ok", "model": "ready"})


def test_the_answer_carries_the_request_id() -> None:
    assert invoke(url_event({"prompt": "a", "n_predict": 1}))["headers"]["x-request-id"] == "request-1"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
NAMES = st.sampled_from(sorted(completion_kinds(Settings()).keys() | NEUTRAL.keys()))
REQUESTS = st.dictionaries(NAMES | st.text(max_size=3), JSON, max_size=4)
PROMPTED = st.tuples(REQUESTS, st.text(max_size=30) | st.lists(st.integers(0, 4095), max_size=9)).map(
    lambda pair: pair[0] | {"prompt": pair[1]}
)


def test_no_request_makes_it_fail(setup: Setup) -> None:
    setup(N_PREDICT=2, MAX_N_PREDICT=3)

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(REQUESTS | PROMPTED | JSON)
    def answers(body: Any) -> None:
        assert invoke(url_event(json.dumps(body)))["statusCode"] < 500
        direct = invoke(body)
        assert "content" in direct or direct["error"]["status"] < 500
        assert json.dumps(direct, ensure_ascii=False).encode()

    answers()


def test_no_event_makes_it_fail() -> None:
    wrong = (
        st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text()) | st.dictionaries(st.text(), JSON)
    )

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.fixed_dictionaries({}, optional=dict.fromkeys(url_event({}), wrong)))
    def answers(changes: dict[str, Any]) -> None:
        reply = invoke(url_event({"prompt": ""}) | changes)
        assert reply.get("statusCode", 400) < 500
        assert reply.get("error", {"status": 400})["status"] < 500

    answers()


def test_the_deadline_ends_it_with_what_there_is(setup: Setup, endless_model: Path) -> None:
    setup(MODEL_PATH=endless_model, CTX_SIZE=32_768, DEADLINE_MARGIN_MS=1000)
    body = invoke({"prompt": PROMPT, "n_predict": -1, "ignore_eos": True}, remaining_ms=2500)
    assert (body["stop_type"], body["truncated"]) == ("deadline", False)
    assert 0 < body["tokens_predicted"] < 32_000
    *tokens, last = stream({"prompt": PROMPT, "n_predict": -1, "ignore_eos": True}, remaining_ms=2500)
    assert last["stop_type"] == "deadline"
    assert sum(len(token["tokens"]) for token in tokens) <= last["tokens_predicted"]


def test_a_deadline_that_is_almost_over_still_gets_an_answer() -> None:
    invoke({"prompt": PROMPT, "n_predict": 1})
    assert invoke({"prompt": PROMPT, "n_predict": 200}, remaining_ms=900)["stop_type"] in ("deadline", "limit")


def begin(body: dict[str, Any], cancellation: Cancellation | None = None) -> Generator[str]:
    """A stream as the local server gets it, computing as soon as this returns."""
    call = Call("stream", cancellation=cancellation or Cancellation())
    events = application().api.http(url_event(body | {"stream": True}), call)["body"]
    assert not isinstance(events, str)
    return events


ENDLESS = {"prompt": PROMPT, "n_predict": -1, "ignore_eos": True}


def test_closing_a_stream_cancels_it(setup: Setup, endless_model: Path) -> None:
    setup(MODEL_PATH=endless_model, CTX_SIZE=32_768)
    events = begin(ENDLESS)
    assert json.loads(next(events).removeprefix("data: "))["stop"] is False
    events.close()
    # Were the first still computing, this one would wait for it until its own deadline.
    assert invoke({"prompt": PROMPT, "n_predict": 2}, remaining_ms=20_000)["stop_type"] == "limit"


def test_a_stream_that_nobody_takes_is_finished(setup: Setup, endless_model: Path) -> None:
    setup(MODEL_PATH=endless_model, CTX_SIZE=32_768, INVOKE_MODE="RESPONSE_STREAM")
    stream = lambda_handler(url_event(ENDLESS | {"stream": True}), context())
    assert isinstance(stream, Stream)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        Client(f"127.0.0.1:{nobody.getsockname()[1]}").post_invocation_result("request-1", stream)
    metrics = application().api.http(url_event("", path="/metrics", method="GET"), Call("metrics"))["body"]
    assert isinstance(metrics, str)
    assert 'route="/completion",status="499"} 1\n' in metrics
    assert "bitnet_requests_in_flight 0\n" in metrics


def test_a_cancellation_ends_it_within_a_token(setup: Setup, endless_model: Path) -> None:
    setup(MODEL_PATH=endless_model, CTX_SIZE=32_768)
    cancellation = Cancellation()
    events = begin(ENDLESS, cancellation)
    next(events)
    cancellation.cancel()
    assert json.loads(list(events)[-1].removeprefix("data: "))["stop_type"] == "cancelled"


def test_a_cancellation_before_it_begins(setup: Setup, endless_model: Path) -> None:
    setup(MODEL_PATH=endless_model, CTX_SIZE=32_768)
    application().engine.describe()  # the model is there: who hangs up before that has no answer
    cancellation = Cancellation()
    cancellation.cancel()
    assert json.loads(list(begin(ENDLESS, cancellation))[-1].removeprefix("data: "))["stop_type"] == "cancelled"


def test_what_comes_after_all_was_cancelled_is_cancelled_too(setup: Setup, endless_model: Path) -> None:
    setup(MODEL_PATH=endless_model, CTX_SIZE=32_768)
    invoke({"prompt": PROMPT, "n_predict": 1})
    engine = application().engine

    def mask() -> Any:  # it takes a while to make one of a grammar
        engine.cancel_all()

    (done,) = engine.complete([ENDLESS], mask=mask)
    assert done["stop_type"] == "cancelled"


def test_requests_queue_up_to_a_limit(setup: Setup, endless_model: Path) -> None:
    setup(MODEL_PATH=endless_model, CTX_SIZE=32_768, PARALLEL=1, QUEUE_LIMIT=1)
    running = begin(ENDLESS)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(post, {"prompt": PROMPT, "n_predict": 1})
        eventually(lambda: application().engine._in_flight == 2)
        reply = invoke(url_event({"prompt": PROMPT}))
        assert (reply["statusCode"], reply["headers"]["retry-after"]) == (503, "1")
        error = json.loads(reply["body"])["error"]
        assert (error["type"], error["code"]) == ("unavailable_error", "overloaded")
        assert "(QUEUE_LIMIT)" in error["message"]
        running.close()
        assert waiting.result()[0] == 200
    assert post({"prompt": PROMPT, "n_predict": 1})[0] == 200


def the_engine() -> int:
    (pid,) = engines(os.getpid())
    return pid


def test_what_is_slow_to_import_waits_until_it_is_needed() -> None:
    program = "import sys, function.handler as h; h.application(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "function.api" in modules
    assert not {"boto3", "botocore.client", "llguidance", "numpy", "pydantic"} & set(modules)


def test_one_engine_serves_all_requests() -> None:
    post({"prompt": "a", "n_predict": 1})
    first = the_engine()
    post({"prompt": "b", "n_predict": 1})
    assert the_engine() == first


def test_an_engine_that_was_killed_meanwhile_is_replaced() -> None:
    post({"prompt": "a", "n_predict": 1})
    first = the_engine()
    os.kill(first, signal.SIGKILL)
    assert post({"prompt": "a", "n_predict": 1})[0] == 200
    assert the_engine() != first


def in_background(function: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def test_an_engine_that_is_killed_before_it_answers_is_asked_anew() -> None:
    post({"prompt": "a", "n_predict": 1})
    first = the_engine()
    os.kill(first, signal.SIGSTOP)
    answer = in_background(lambda: post({"prompt": "a", "n_predict": 1}))
    eventually(lambda: application().engine._in_flight == 1)
    assert not answer.done()
    os.kill(first, signal.SIGKILL)
    assert answer.result(60)[0] == 200
    assert not alive(first)


def test_an_engine_that_dies_again_and_again_is_an_error(setup: Setup, endless_model: Path) -> None:
    setup(MODEL_PATH=endless_model, CTX_SIZE=32_768)
    answer = in_background(lambda: post(ENDLESS))
    killed = set()

    def kill_all() -> bool:
        for pid in engines(os.getpid()):
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        return answer.done()

    eventually(kill_all)
    status, body = answer.result()
    assert (status, body["error"]["type"]) == (500, "server_error")
    assert body["error"]["code"] in ("engine_died", "engine_start_failed")
    assert re.search("signal 9|the engine has ended", body["error"]["message"])
    assert 1 <= len(killed) <= 2


def test_a_stream_whose_engine_dies_ends_with_an_error(setup: Setup, endless_model: Path) -> None:
    setup(MODEL_PATH=endless_model, CTX_SIZE=32_768)
    events = begin(ENDLESS)
    next(events)
    os.kill(the_engine(), signal.SIGKILL)
    last = json.loads(list(events)[-1].removeprefix("data: "))
    assert (last["error"]["code"], last["error"]["type"]) == ("engine_died", "server_error")
    assert post({"prompt": "a", "n_predict": 1})[0] == 200


def test_an_engine_that_hangs_is_ended_at_the_deadline() -> None:
    post({"prompt": "a", "n_predict": 1})
    hung = the_engine()
    os.kill(hung, signal.SIGSTOP)
    error = invoke({"prompt": "a"}, remaining_ms=1500)["error"]
    assert (error["status"], error["code"]) == (500, "engine_hung")
    assert post({"prompt": "a", "n_predict": 1})[0] == 200
    assert not alive(hung)


def test_an_engine_that_does_not_even_read_is_ended_at_the_deadline() -> None:
    """The prompt is larger than what a pipe holds."""
    post({"prompt": "a", "n_predict": 1})
    hung = the_engine()
    os.kill(hung, signal.SIGSTOP)
    with ThreadPoolExecutor(2) as threads:
        large = threads.submit(invoke, {"prompt": "a " * 100_000}, remaining_ms=2500)
        time.sleep(0.2)
        small = threads.submit(invoke, {"prompt": "a", "n_predict": 1})
        assert large.result(60)["error"]["code"] == "engine_hung"
        assert small.result(60)["tokens_predicted"] == 1  # by another engine
    assert not alive(hung)


def test_an_engine_that_never_becomes_ready_is_ended(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 600\n")
    sleeper.chmod(0o700)
    monkeypatch.setattr("function.engine.START_TIMEOUT_S", 0.5)
    setup(BITNET_CLI=sleeper)
    status, body = post({"prompt": "a"})
    assert (status, body["error"]["code"]) == (500, "engine_start_failed")
    assert body["error"]["message"] == "the engine was not ready after 0.5 s and was ended"
    assert engines(os.getpid()) == set()


def test_an_engine_is_not_ended_for_a_request_that_comes_too_late() -> None:
    post({"prompt": "a", "n_predict": 1})
    asked = the_engine()
    error = invoke({"prompt": "a"}, remaining_ms=0)["error"]
    assert (error["status"], error["code"]) == (503, "too_late")
    assert "DEADLINE_MARGIN_MS" in error["message"]
    assert post({"prompt": "a", "n_predict": 1})[0] == 200
    assert the_engine() == asked


@pytest.mark.parametrize(
    ("environment", "code", "says"),
    [
        ({"MODEL_PATH": "/nowhere/m.gguf"}, "engine_start_failed", "/nowhere/m.gguf"),
        ({"MODEL_PATH": __file__}, "engine_start_failed", "GGUF"),
        ({"CTX_SIZE": "100000"}, "engine_start_failed", "CTX_SIZE 100000 is above the model's context length of 256"),
        ({"BITNET_CLI": "/nowhere/bitnet"}, "engine_start_failed", "cannot run /nowhere/bitnet: No such file"),
        ({"BITNET_CLI": "/bin/true"}, "engine_start_failed", "the engine ended before it was ready (exit code 0)"),
        ({"BITNET_CLI": "/bin/echo"}, "engine_start_failed", ""),
        ({"MODEL_S3_URI": "s3://models/missing"}, "model_not_found", "s3://models/missing does not exist"),
    ],
)
@pytest.mark.usefixtures("s3")
def test_an_engine_or_model_that_is_not_to_be_had(
    setup: Setup, tmp_path: Path, environment: dict[str, str], code: str, says: str
) -> None:
    setup(MODEL_CACHE_DIR=tmp_path, **environment)
    status, body = post({"prompt": "a"})
    assert (status, body["error"]["type"], body["error"]["code"]) == (500, "server_error", code)
    assert says in body["error"]["message"]
    assert post("", path="/health", method="GET") == (200, {"status": "ok", "model": "not_loaded"})


def test_a_thread_that_cannot_be_had_is_asked_for_again(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, demo_model: Path
) -> None:
    setup(MODEL_PATH=demo_model)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name in ("model-loader", "worker-events"):
            raise RuntimeError("can't start new thread")
        start(thread)

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            status, body = post({"prompt": "a"})
        assert (status, body["error"]["code"]) == (500, "engine_start_failed")
        assert "can't start new thread" in body["error"]["message"]
    assert post({"prompt": "a", "n_predict": 1})[0] == 200


def test_what_can_be_mended_is_tried_again(setup: Setup, tmp_path: Path, demo_model: Path) -> None:
    setup(MODEL_PATH=tmp_path / "m.gguf")
    assert post({"prompt": "a"})[0] == 500
    (tmp_path / "m.gguf").symlink_to(demo_model)
    assert post({"prompt": "a", "n_predict": 1})[0] == 200


def test_an_object_that_the_engine_does_not_take_can_be_replaced(
    setup: Setup, tmp_path: Path, demo_model: Path, s3: Any
) -> None:
    uri = s3.put("m.gguf", b"no model")
    setup(MODEL_S3_URI=uri, MODEL_CACHE_DIR=tmp_path)
    for _ in range(2):
        status, body = post({"prompt": "a"})
        assert (status, body["error"]["code"]) == (500, "engine_start_failed")
        assert body["error"]["message"].endswith(f"; the model is a copy of {uri}")
    assert s3.count("GET") == 1  # it is the same object still
    s3.put("m.gguf", demo_model.read_bytes())
    assert post({"prompt": "a", "n_predict": 1})[0] == 200


def test_a_model_that_takes_too_long_goes_on_loading(setup: Setup, tmp_path: Path, demo_model: Path, s3: Any) -> None:
    arrived, go_on = threading.Event(), threading.Event()

    def wait(_: Any) -> None:
        arrived.set()
        assert go_on.wait(60)

    uri = s3.put("m.gguf", demo_model.read_bytes())
    s3.before = wait
    setup(MODEL_S3_URI=uri, MODEL_CACHE_DIR=tmp_path, DEADLINE_MARGIN_MS=1000)
    error = invoke({"prompt": "a"}, remaining_ms=1200)["error"]
    assert (error["status"], error["code"]) == (503, "model_loading")
    assert arrived.wait(60)
    status, body = post("", path="/health", method="GET")
    assert (status, body["error"]["code"]) == (503, "model_loading")
    go_on.set()
    assert post({"prompt": "a", "n_predict": 1})[0] == 200
    assert s3.count("HEAD") == 1


def test_the_engine_does_not_see_our_environment(setup: Setup) -> None:
    setup(AWS_SECRET_ACCESS_KEY="secret")
    post({"prompt": "a", "n_predict": 1})
    assert Path(f"/proc/{the_engine()}/environ").read_bytes() == b""


def test_an_idle_engine_uses_no_processor_time() -> None:
    post({"prompt": "a", "n_predict": 1})

    before = processor_ticks(the_engine())
    time.sleep(0.5)
    assert processor_ticks(the_engine()) == before
