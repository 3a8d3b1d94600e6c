"""Metrics for CloudWatch: what the function writes on Lambda's standard output."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from function.metrics import NAMESPACE, Metrics
from tests.e2e.emulator import Emulator
from tests.events import url_event
from tests.s3 import S3

TALE = {"prompt": "Once upon a time", "n_predict": 5, "temperature": 0}
NAME = "bitnet-function"

pytestmark = pytest.mark.usefixtures("engine_path")


@pytest.fixture
def function(s3: S3, demo_model: Path, tmp_path: Path) -> Iterator[Emulator]:
    settings = {"MODEL_S3_URI": s3.put("m.gguf", demo_model.read_bytes()), "MODEL_CACHE_DIR": str(tmp_path)}
    with Emulator({**s3.environment, **settings, "AWS_LAMBDA_FUNCTION_NAME": NAME}) as function:
        yield function


def written(function: Emulator) -> list[dict[str, Any]]:
    """What is in the log for CloudWatch, each checked against the specification of the format."""
    lines = [json.loads(line) for line in function.log().splitlines() if line.startswith('{"_aws"')]
    for line in lines:
        (directive,) = line["_aws"]["CloudWatchMetrics"]
        assert line["_aws"]["Timestamp"] > 1.7e12
        assert (directive["Namespace"], directive["Dimensions"]) == (NAMESPACE, [["FunctionName"]])
        assert line["FunctionName"] == NAME
        for metric in directive["Metrics"]:
            assert metric["Unit"] in ("Count", "Milliseconds", "Bytes", "Count/Second")
            assert all(value >= 0 for value in line[metric["Name"]])
    return lines


def values(line: dict[str, Any]) -> dict[str, float]:
    return {metric["Name"]: line[metric["Name"]][0] for metric in line["_aws"]["CloudWatchMetrics"][0]["Metrics"]}


def test_a_cold_start_a_completion_and_a_restart(function: Emulator, demo_model: Path) -> None:
    reply = function.invoke(url_event(TALE))
    body = json.loads(reply["body"])
    copied, loaded, computed = written(function)
    assert values(copied)["ModelCopyBytes"] == demo_model.stat().st_size
    assert values(copied).keys() == {"ModelCopyBytes", "ModelCopyTime"}
    assert values(loaded).keys() == {"ColdStarts", "ColdStartTime", "ModelLoadTime"}
    assert values(loaded)["ColdStartTime"] >= values(loaded)["ModelLoadTime"]
    figures = values(computed)
    assert computed["request_id"] == reply["headers"]["x-request-id"]
    assert (figures["PromptTokens"], figures["CachedTokens"], figures["PredictedTokens"]) == (5, 0, 5)
    rate = 4 / body["timings"]["predicted_ms"] * 1e3  # the first of the five comes with the prompt
    assert figures["TokensPerSecond"] == pytest.approx(rate, rel=0.2)
    assert figures["StopLimit"] == 1
    # The first token comes after the model was copied and loaded and the prompt computed.
    assert figures["TimeToFirstToken"] >= figures["QueueTime"] >= values(loaded)["ModelLoadTime"]
    os.kill(function.engine, signal.SIGKILL)
    function.invoke(TALE)
    restarted, _ = written(function)[3:]
    function.invoke(TALE | {"n_predict": 1})  # one token says nothing of how many there are a second
    assert "TokensPerSecond" not in values(written(function)[-1])
    assert values(restarted).keys() == {"EngineRestarts", "ModelLoadTime"}


def test_what_computes_nothing_writes_nothing(function: Emulator) -> None:
    function.invoke(url_event("", path="/health", method="GET"))
    function.invoke(url_event({"prompt": 5}))
    assert written(function) == []


def test_errors_of_ours_are_counted(s3: S3) -> None:
    settings = {"MODEL_S3_URI": "s3://models/missing", "AWS_LAMBDA_FUNCTION_NAME": NAME}
    with Emulator({**s3.environment, **settings}) as function:
        function.invoke(url_event(TALE))
        assert [values(line) for line in written(function)] == [{"ServerErrors": 1}]


def test_a_model_that_comes_after_one_that_cannot_be_loaded_is_a_cold_start(
    s3: S3, demo_model: Path, tmp_path: Path
) -> None:
    uri = s3.put("m.gguf", b"not a model")
    settings = {"MODEL_S3_URI": uri, "MODEL_CACHE_DIR": str(tmp_path), "AWS_LAMBDA_FUNCTION_NAME": NAME}
    with Emulator({**s3.environment, **settings}) as function:
        assert function.invoke(url_event(TALE))["statusCode"] == 500
        s3.put("m.gguf", demo_model.read_bytes())
        assert function.invoke(url_event(TALE))["statusCode"] == 200
        names = [set(values(line)) for line in written(function)]
    assert {"ColdStarts", "ColdStartTime", "ModelLoadTime"} in names
    assert not any("EngineRestarts" in found for found in names)


def test_each_request_has_one_line_with_the_id_of_its_answer(function: Emulator) -> None:
    replies = [function.invoke(url_event(request)) for request in (TALE, {"prompt": 5}, TALE | {"stream": True})]
    lines = [json.loads(line) for line in function.log().splitlines() if '"message":"request"' in line]
    assert [line["request_id"] for line in lines] == [reply["headers"]["x-request-id"] for reply in replies]
    assert [line["status"] for line in lines] == [200, 400, 200]
    assert lines[0].keys() >= {"first_token_ms", "queue_ms", "prompt_ms", "predicted_ms", "stop_type", "route"}


def test_elsewhere_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics.from_environment({})
    metrics.copied(1, 2)
    metrics.loaded(1, 2, again=False)
    metrics.count(200, {"tokens_predicted": 3, "predicted_ms": 1.0})
    assert capsys.readouterr().out == ""
