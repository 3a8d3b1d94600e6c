"""The whole path on its real parts: Lambda's emulator, awslambdaric, the function, the engine, S3 on a socket."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.emulator import Emulator
from tests.events import url_event
from tests.processes import alive, engines, eventually, processor_ticks
from tests.s3 import S3, Answer, Request

pytestmark = pytest.mark.usefixtures("engine_path")

TALE = {"prompt": "Once upon a time", "n_predict": 12, "temperature": 0}
TEXT = " there lived a king who had a son who had three sons"
CANARY = "xylophonist"


@pytest.fixture
def environment(s3: S3, tmp_path: Path, demo_model: Path) -> dict[str, str]:
    """The function's: the demo model is in S3, the copies go to a directory of the test."""
    uri = s3.put("demo.gguf", demo_model.read_bytes())
    return s3.environment | {"MODEL_S3_URI": uri, "MODEL_CACHE_DIR": str(tmp_path), "COPY_PART_BYTES": "262144"}


def models(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.suffix != ".lock"]


def test_the_first_invocation_copies_the_model_and_the_second_asks_nothing(
    s3: S3, environment: dict[str, str], tmp_path: Path, demo_model: Path
) -> None:
    with Emulator(environment) as function:
        assert function.invoke(TALE)["content"] == TEXT
        assert [path.read_bytes() for path in models(tmp_path)] == [demo_model.read_bytes()]
        assert (s3.count("HEAD"), s3.count("GET")) == (1, 14)
        s3.requests.clear()
        again = function.invoke(TALE)
        assert again["content"] == TEXT
        assert again["tokens_cached"] == 4
        assert s3.requests == []


def test_a_new_environment_with_the_same_tmp_asks_once(s3: S3, environment: dict[str, str]) -> None:
    for expected in ({"HEAD": 1, "GET": 14}, {"HEAD": 1, "GET": 0}):
        s3.requests.clear()
        with Emulator(environment) as function:
            assert function.invoke(TALE)["content"] == TEXT
        assert {method: s3.count(method) for method in expected} == expected


def test_a_function_url_and_a_direct_invocation(environment: dict[str, str]) -> None:
    with Emulator(environment) as function:
        direct = function.invoke(TALE)
        http = function.invoke(url_event(TALE))
        assert http["statusCode"] == 200
        body = json.loads(http["body"])
        assert body.keys() == direct.keys()
        assert body["content"] == direct["content"] == TEXT
        stream = function.invoke(url_event(TALE | {"stream": True}))
        events = [json.loads(event.removeprefix("data: ")) for event in stream["body"].split("\n\n")[:-1]]
        assert "".join(event["content"] for event in events) == TEXT
        refused = function.invoke(url_event({"prompt": "a", "n_predict": 0.5}))
        assert (refused["statusCode"], json.loads(refused["body"])["error"]["param"]) == (400, "n_predict")
        assert function.invoke({"n_predict": 1})["error"]["status"] == 400


@pytest.mark.parametrize("status", [404, 403])
def test_a_missing_key(s3: S3, environment: dict[str, str], tmp_path: Path, status: int) -> None:
    def without_list_bucket(_: Request, answer: Answer) -> None:
        answer.status = status

    s3.fault = without_list_bucket
    with Emulator(environment | {"MODEL_S3_URI": "s3://models/missing.gguf"}) as function:
        reply = function.invoke(url_event(TALE))
        error = json.loads(reply["body"])["error"]
        assert (reply["statusCode"], error["type"]) == (500, "server_error")
        assert error["code"] == {404: "model_not_found", 403: "model_access_denied"}[status]
        assert "s3://models/missing.gguf" in error["message"]
        assert function.invoke(TALE)["error"] == error | {"status": 500}
        assert models(tmp_path) == []
        assert engines(function.runtime) == set()
        health = function.invoke(url_event("", path="/health", method="GET"))
        assert (health["statusCode"], json.loads(health["body"])["model"]) == (200, "not_loaded")


def test_a_corrupted_object(s3: S3, environment: dict[str, str], tmp_path: Path) -> None:
    def flip_a_bit(request: Request, answer: Answer) -> None:
        if request.range_start == 5 * 262_144:
            answer.body = bytes([answer.body[0] ^ 1]) + answer.body[1:]

    s3.fault = flip_a_bit
    with Emulator(environment) as function:
        reply = function.invoke(url_event(TALE))
        error = json.loads(reply["body"])["error"]
        assert (reply["statusCode"], error["code"]) == (500, "model_corrupted")
        assert "s3://models/demo.gguf is corrupted: CRC32 is" in error["message"]
        assert models(tmp_path) == []
        s3.fault = None  # the next invocation tries again
        assert function.invoke(TALE)["content"] == TEXT


def test_an_engine_that_was_killed_is_replaced(s3: S3, environment: dict[str, str]) -> None:
    with Emulator(environment) as function:
        function.invoke(TALE)
        first = function.engine
        s3.requests.clear()
        os.kill(first, signal.SIGKILL)
        assert function.invoke(TALE)["content"] == TEXT
        assert function.engine != first
        assert s3.requests == []


def test_generation_ends_before_the_timeout(environment: dict[str, str], endless_model: Path) -> None:
    settings = {"MODEL_PATH": str(endless_model), "CTX_SIZE": "32768"}
    with Emulator(environment | settings, timeout_s=4) as function:
        body = function.invoke({"prompt": "Once upon a time", "n_predict": -1, "ignore_eos": True})
        assert body["stop_type"] == "deadline"
        assert body["content"]


def test_an_answer_that_lambda_would_not_take(environment: dict[str, str]) -> None:
    large = {"prompt": ["a"] * 8, "n_predict": 200, "ignore_eos": True, "n_probs": 100}
    with Emulator(environment) as function:
        direct = function.invoke(large)["error"]
        runtime = function.runtime
        assert (direct["status"], direct["code"]) == (422, "answer_too_large")
        assert re.search("the answer has [0-9]{8} bytes in JSON, and Lambda takes at most 6291556", direct["message"])
        url = function.invoke(url_event(large))
        assert (url["statusCode"], json.loads(url["body"])["error"]["code"]) == (422, "answer_too_large")
        stream = function.invoke(url_event(large | {"stream": True}))["body"]
        assert 6_000_000 < len(json.dumps(stream)) < 6_291_556
        assert json.loads(stream.split("data: ")[-1])["error"]["code"] == "answer_too_large"
        assert function.log().count('"status":422') == 3
        assert function.invoke(TALE)["content"] == TEXT
        assert function.runtime == runtime


def test_sigterm_ends_the_function_and_its_engine(environment: dict[str, str]) -> None:
    with Emulator(environment) as function:
        function.invoke(TALE)
        engine = function.engine
        assert function.end_runtime() == 0
        assert not alive(engine)


def test_sigterm_ends_what_is_being_computed(environment: dict[str, str], endless_model: Path) -> None:
    settings = {"MODEL_PATH": str(endless_model), "CTX_SIZE": "32768"}
    with Emulator(environment | settings) as function:
        function.invoke(TALE)
        engine = function.engine
        endless = {"prompt": "Once upon a time", "n_predict": -1, "ignore_eos": True}
        answers: list[Any] = []
        client = threading.Thread(target=lambda: answers.append(function.invoke(endless)))
        client.start()
        before = processor_ticks(engine)
        eventually(lambda: processor_ticks(engine) > before + 20)  # it computes
        assert function.end_runtime() == 0
        assert not alive(engine)
        client.join()
        assert "content" not in answers[0]


def test_provisioned_concurrency_loads_before_the_first_invocation(environment: dict[str, str]) -> None:
    health = url_event("", path="/health", method="GET")
    for kind, expected in (("on-demand", "not_loaded"), ("provisioned-concurrency", "ready")):
        with Emulator(environment | {"AWS_LAMBDA_INITIALIZATION_TYPE": kind}) as function:
            assert json.loads(function.invoke(health)["body"])["model"] == expected


@pytest.mark.parametrize(
    ("settings", "kind", "says"),
    [
        ({"CTX_SIZE": "much"}, "SettingsError", "'CTX_SIZE' must be an integer"),
        (
            {"AWS_LAMBDA_INITIALIZATION_TYPE": "provisioned-concurrency", "MODEL_S3_URI": "s3://models/missing"},
            "ModelError",
            "s3://models/missing does not exist",
        ),
    ],
)
def test_what_cannot_work_does_not_begin_to_serve(
    environment: dict[str, str], settings: dict[str, str], kind: str, says: str
) -> None:
    with Emulator(environment | settings) as function:
        error = function.invoke(TALE)
        assert error["errorType"] == kind
        assert says in error["errorMessage"]


def test_no_text_reaches_the_log(environment: dict[str, str]) -> None:
    batches = {"BATCH_RESULTS_S3_URI": "s3://models/results", "AWS_LAMBDA_FUNCTION_NAME": "bitnet"}
    with Emulator(environment | batches | {"LOG_LEVEL": "DEBUG"}) as function:
        requests: list[Any] = [
            {"prompt": f"{CANARY} {CANARY}", "n_predict": 20, "stop": [CANARY]},
            {"prompt": CANARY, "n_predict": 4, "stream": True},
            {"prompt": CANARY * 1000},
            {"prompt": CANARY, CANARY: CANARY},
            {"prompt": {CANARY: CANARY}},
            {"prompt": CANARY, "n_predict": CANARY},
            {"prompt": CANARY, "stop": CANARY, "grammar": CANARY},
            {"prompt": [CANARY]},
            {"prompt": "a", "json_schema": {"const": CANARY}, "prompt_cache_key": CANARY},
            {"prompt": "a", "json_schema": {"type": CANARY}},
            CANARY,
            [CANARY],
        ]
        for request in requests:
            function.invoke(request)
            function.invoke(url_event(request))
        function.invoke(url_event("", path=f"/{CANARY}"))
        message = {"role": "user", "content": CANARY}
        for path, body in (
            ("/v1/chat/completions", {"messages": [message], "max_tokens": 4, "user": CANARY}),
            ("/v1/chat/completions", {"messages": [message | {CANARY: CANARY}], "model": CANARY}),
            ("/v1/chat/completions", {"messages": [message], "model": CANARY}),
            ("/v1/completions", {"prompt": [CANARY], "max_tokens": 4, "stream": True}),
            ("/tokenize", {"content": CANARY}),
            ("/apply-template", {"messages": [message]}),
        ):
            function.invoke(url_event(body, path=path))
        function.invoke(url_event("", path=f"/v1/models/{CANARY}", method="GET"))
        items = [{"index": index, "request": request} for index, request in enumerate(requests)]
        assert function.invoke({"BatchInput": {"job": "job"}, "Items": items})["succeeded"] == 3
        function.invoke({"BatchInput": {"job": CANARY * 100}, "Items": items})
        function.invoke({"Records": [{"eventSource": "aws:sqs", "messageId": "1", "body": f'{{"{CANARY}": 1}}'}]})
        os.kill(function.engine, signal.SIGKILL)
        function.invoke(requests[0])
        assert function.invoke(TALE)["content"] == TEXT
        assert function.invoke(url_event(TALE | {"stream": True}))["statusCode"] == 200
        log = function.log()
        assert '"message":"worker ended"' in log
        assert CANARY not in log
        assert "lived" not in log
        assert "Once" not in log
