"""Batches through the front door: events of Step Functions and SQS in, results in S3 (moto's), with the real engine."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
from awslambdaric.lambda_context import LambdaContext
from moto import mock_aws

from function import batch
from function.handler import application, lambda_handler
from tests.processes import engines

pytestmark = pytest.mark.usefixtures("engine_path")

BUCKET = "batches"
TALE = {"prompt": "Once upon a time", "n_predict": 3, "temperature": 0}
TEXT = " there lived a"
# Its second element may begin in more ways than llguidance takes, which shows once the first is there.
MANY_WAYS = {
    "type": "array",
    "prefixItems": [{"type": "boolean"}, {"type": "object", "properties": {f"p{number}": {} for number in range(500)}}],
    "minItems": 2,
}

# The engine, which dies of a prompt with this word: a defect that no check foresees.
DEADLY = "Rumpelstiltskin"
KILLER = """#!{python}
import subprocess, sys
engine = subprocess.Popen([{engine!r}, *sys.argv[1:]], stdin=subprocess.PIPE)
for line in sys.stdin.buffer:
    if b"{word}" in line:
        engine.kill()
        sys.exit(1)
    engine.stdin.write(line)
    engine.stdin.flush()
engine.stdin.close()
sys.exit(engine.wait())
"""


@pytest.fixture(autouse=True)
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A fresh function with an empty bucket for its results."""
    environment = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "BATCH_RESULTS_S3_URI": f"s3://{BUCKET}/results",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    application.cache_clear()
    with mock_aws():
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield boto3.resource("s3").Bucket(BUCKET)
    if application.cache_info().currsize:
        application().engine.stop()
    application.cache_clear()
    assert engines(os.getpid()) == set()


def invoke(event: Any, remaining_ms: int = 60_000) -> Any:
    context = LambdaContext("request-1", None, None, int(time.time() * 1000) + remaining_ms)
    return json.loads(json.dumps(lambda_handler(event, context)))


def map_event(requests: list[Any], first: int = 0) -> dict[str, Any]:
    items = [{"index": first + number, "request": request} for number, request in enumerate(requests)]
    return {"BatchInput": {"job": "job-1"}, "Items": items}


def queue_event(bodies: list[str], first: int = 0) -> dict[str, Any]:
    """https://docs.aws.amazon.com/lambda/latest/dg/with-sqs.html#example-standard-queue-message-event"""
    records = [
        {
            "messageId": f"059f36b4-87a3-44ab-83d2-{first + number:012d}",
            "receiptHandle": "AQEBwJnKyrHigUMZj6rYigCgxlaS3SLy0a",
            "body": body,
            "attributes": {"ApproximateReceiveCount": "1", "SentTimestamp": "1767225600000"},
            "messageAttributes": {},
            "md5OfBody": "e4e68fb7bd0e697a0ae8f1bb342846b3",
            "eventSource": "aws:sqs",
            "eventSourceARN": "arn:aws:sqs:us-east-1:123456789012:bitnet-batch-Queue",
            "awsRegion": "us-east-1",
        }
        for number, body in enumerate(bodies)
    ]
    return {"Records": records}


def results(bucket: Any) -> dict[str, list[dict[str, Any]]]:
    """The lines of every object, by key."""
    return {
        entry.key: [json.loads(line) for line in entry.get()["Body"].read().splitlines()]
        for entry in bucket.objects.all()
    }


def completions() -> int:
    """How many have been computed or refused in this environment."""
    counts = application().api._metrics._requests
    return sum(counts.values())


def test_items_are_computed_and_their_results_lie_in_s3(bucket: Any) -> None:
    chat = {"messages": [{"role": "user", "content": "Tell."}], "max_completion_tokens": 2, "temperature": 0}
    requests = [
        TALE,
        {"custom_id": "tale", **TALE},
        {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"custom_id": "text", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once", "max_tokens": 1}},
    ]
    summary = invoke(map_event(requests, first=100))
    key = "results/job-1/000000000100-000000000103.jsonl"
    assert summary == {
        "results": f"s3://{BUCKET}/{key}",
        "items": 4,
        "succeeded": 4,
        "failed": 0,
        "unfinished": 0,
    }
    lines = results(bucket)
    assert lines.keys() == {key}
    assert [line["index"] for line in lines[key]] == [100, 101, 102, 103]
    assert [line["custom_id"] for line in lines[key]] == [None, "tale", "chat", "text"]
    assert [line["response"]["status_code"] for line in lines[key]] == [200] * 4
    assert [line["error"] for line in lines[key]] == [None] * 4
    bodies = [line["response"]["body"] for line in lines[key]]
    assert [body["content"] for body in bodies[:2]] == [TEXT, TEXT]
    assert [body["object"] for body in bodies[2:]] == ["chat.completion", "text_completion"]
    assert len({line["response"]["request_id"] for line in lines[key]}) == 4


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        ("text", 400, "invalid_type"),
        (None, 400, "invalid_type"),
        ([], 400, "invalid_type"),
        ({}, 400, "missing_field"),
        ({"prompt": "\ud800"}, 400, "invalid_unicode"),
        (TALE | {"top_p": 7}, 400, "invalid_value"),
        (TALE | {"custom_id": 5}, 400, "invalid_type"),
        (TALE | {"stream": True}, 400, "unsupported_field"),
        ({"prompt": "tale " * 1000}, 400, "context_length_exceeded"),
        ({"prompt": [5000]}, 400, "invalid_value"),
        (TALE | {"json_schema": MANY_WAYS, "n_predict": 100}, 400, "invalid_value"),
        ({"url": "/completion", "body": "text"}, 400, "invalid_type"),
        ({"url": "/health", "body": {}}, 400, "invalid_value"),
        ({"url": "/completion", "body": TALE, "method": "GET"}, 400, "invalid_value"),
        ({"url": "/completion", "body": TALE, "custom": "a"}, 400, "unknown_field"),
        ({"url": "/completion", "body": TALE, "custom_id": "\ud800"}, 400, "invalid_unicode"),
    ],
)
def test_a_poisoned_item_has_its_error_and_the_others_their_results(
    bucket: Any, request_: Any, status: int, code: str
) -> None:
    summary = invoke(map_event([TALE, request_, TALE]))
    assert (summary["succeeded"], summary["failed"], summary["unfinished"]) == (2, 1, 0)
    ((first, poisoned, last),) = results(bucket).values()
    assert poisoned["response"]["status_code"] == status
    assert poisoned["response"]["body"]["error"]["code"] == code
    assert first["response"]["body"]["content"] == last["response"]["body"]["content"] == TEXT
    assert invoke(queue_event([json.dumps(request_)])) == {"batchItemFailures": []}
    queued = results(bucket)["results/queue/059f36b4-87a3-44ab-83d2-000000000000.jsonl"]
    assert queued[0]["response"]["status_code"] == status


def test_an_item_that_is_nested_too_deeply_is_refused(bucket: Any) -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    summary = invoke(map_event([TALE | {"custom_id": "deep", "json_schema": {"enum": nested}}, TALE]))
    assert (summary["succeeded"], summary["failed"], summary["unfinished"]) == (1, 1, 0)
    ((deep, _),) = results(bucket).values()
    assert (deep["custom_id"], deep["response"]["status_code"]) == ("deep", 400)
    assert deep["response"]["body"]["error"]["code"] == "invalid_json"


def test_an_item_that_kills_the_engine_is_found_and_the_others_are_computed(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine_path: Path
) -> None:
    killer = tmp_path / "bitnet"
    killer.write_text(KILLER.format(python=sys.executable, engine=str(engine_path), word=DEADLY))
    killer.chmod(0o755)
    monkeypatch.setenv("BITNET_CLI", str(killer))
    requests = [TALE] * 12
    requests[5] = TALE | {"prompt": f"Once {DEADLY} came"}
    summary = invoke(map_event(requests))
    assert (summary["succeeded"], summary["failed"], summary["unfinished"]) == (11, 1, 0)
    (lines,) = results(bucket).values()
    assert [line["index"] for line in lines] == list(range(12))
    assert lines[5]["response"]["body"]["error"]["code"] == "engine_died"
    assert {line["response"]["body"].get("content") for line in lines} == {TEXT, None}


def test_the_same_event_again_computes_nothing(bucket: Any) -> None:
    event = map_event([TALE, {"prompt": 5}])
    first = invoke(event)
    before, lines = completions(), results(bucket)
    assert invoke(event) == first
    assert (completions(), results(bucket)) == (before, lines)
    messages = queue_event([json.dumps(TALE), "{"])
    assert invoke(messages) == {"batchItemFailures": []}
    before, lines = completions(), results(bucket)
    assert invoke(messages) == {"batchItemFailures": []}
    assert (completions(), results(bucket)) == (before, lines)


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch, endless_model: Path) -> None:
    """Items without an end are computed until their time is over. A machine may stand still for a second meanwhile."""
    monkeypatch.setenv("DEADLINE_MARGIN_MS", "4000")
    monkeypatch.setenv("MODEL_PATH", str(endless_model))
    monkeypatch.setenv("CTX_SIZE", "32768")


@pytest.mark.usefixtures("endless")
def test_time_that_is_over_leaves_items_for_the_next_invocation(bucket: Any) -> None:
    invoke(map_event([TALE], first=9))  # the engine is ready
    event = map_event([TALE, {"prompt": "Once", "n_predict": -1, "ignore_eos": True, "temperature": 0}])
    first = invoke(event, remaining_ms=7000)
    assert (first["succeeded"], first["unfinished"]) == (1, 1)
    lines = results(bucket)["results/job-1/000000000000-000000000001.jsonl"]
    assert [line["index"] for line in lines] == [0]
    # Alone it has all the time there is, and so it has what came of it.
    second = invoke(event, remaining_ms=6000)
    assert (second["succeeded"], second["unfinished"]) == (2, 0)
    again, cut = results(bucket)["results/job-1/000000000000-000000000001.jsonl"]
    assert [again] == lines
    assert cut["response"]["body"]["stop_type"] == "deadline"


@pytest.mark.usefixtures("endless")
def test_an_item_that_waited_for_others_is_not_done(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLEL", "1")
    invoke(map_event([TALE], first=9))  # the engine is ready
    long = {"prompt": "Once", "n_predict": -1, "ignore_eos": True}
    event = map_event([long, long, TALE])
    assert [invoke(event, remaining_ms=7000)["unfinished"] for _ in range(3)] == [2, 1, 0]
    bodies = [line["response"]["body"] for line in results(bucket)["results/job-1/000000000000-000000000002.jsonl"]]
    assert [body["stop_type"] for body in bodies] == ["deadline", "deadline", "limit"]
    assert all(body["tokens_predicted"] > 0 for body in bodies)


@pytest.mark.parametrize(("parallel", "queue_limit", "at_once"), [(6, 0, 6), (1, 2, 3)])
def test_as_many_items_as_the_engine_takes_are_on_their_way(
    monkeypatch: pytest.MonkeyPatch, parallel: int, queue_limit: int, at_once: int
) -> None:
    monkeypatch.setenv("PARALLEL", str(parallel))
    monkeypatch.setenv("QUEUE_LIMIT", str(queue_limit))
    engine = application().engine
    event = map_event([TALE | {"n_predict": 200, "ignore_eos": True}] * (2 * at_once))
    with ThreadPoolExecutor(1) as pool:
        summary = pool.submit(invoke, event)
        most = 0
        while not summary.done():
            most = max(most, engine.in_flight)
            time.sleep(0.002)
    assert (summary.result()["succeeded"], most) == (2 * at_once, at_once)


@pytest.mark.usefixtures("endless")
def test_an_item_of_which_one_completion_is_cut_is_not_done() -> None:
    prompts = ["Once upon a time", "The wolf"]  # the first comes to its stop at once
    several = {"prompt": prompts, "n_predict": -1, "ignore_eos": True, "temperature": 0, "stop": ["there lived a king"]}
    assert invoke(map_event([several, TALE]), remaining_ms=7000)["unfinished"] == 1


def test_the_end_of_the_time_is_not_the_end_of_the_engine() -> None:
    invoke(map_event([TALE], first=9999))
    started = engines(os.getpid())
    summary = invoke(map_event([TALE | {"n_predict": 20}] * 3000), remaining_ms=2500)
    assert (summary["failed"], summary["succeeded"] + summary["unfinished"]) == (0, 3000)
    assert engines(os.getpid()) == started
    with pytest.raises(batch.UnfinishedError):  # nothing is begun that has no time
        invoke(map_event([TALE], first=5000), remaining_ms=1000)
    assert engines(os.getpid()) == started


def test_without_a_model_the_invocation_fails(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_PATH", "/nowhere/m.gguf")
    with pytest.raises(batch.BatchError, match=r"engine_start_failed: .*/nowhere/m\.gguf"):
        invoke(map_event([TALE, {"prompt": 5}]))
    messages = queue_event([json.dumps(TALE)])
    failures = invoke(messages)["batchItemFailures"]
    assert failures == [{"itemIdentifier": messages["Records"][0]["messageId"]}]
    assert all(line["index"] == 1 for lines in results(bucket).values() for line in lines)  # the item that is wrong


def test_two_invocations_with_the_same_items_write_each_result_once(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = batch._Store.write
    other: list[dict[str, Any]] = []

    def write_second(store: Any, key: str, body: bytes, tag: str | None) -> bool:
        if not other:
            other.append(json.loads(body.splitlines()[0]) | {"custom_id": "the other's"})
            assert write(store, key, (json.dumps(other[0]) + "\n").encode(), tag)
        return write(store, key, body, tag)

    monkeypatch.setattr(batch._Store, "write", write_second)
    assert invoke(map_event([TALE] * 3))["succeeded"] == 3
    (lines,) = results(bucket).values()
    assert lines[0] == other[0]
    assert [(line["index"], line["custom_id"]) for line in lines[1:]] == [(1, None), (2, None)]


@pytest.mark.parametrize(
    "event",
    [
        {"BatchInput": {}, "Items": [{"index": 0, "request": TALE}]},
        {"BatchInput": {"job": "../other"}, "Items": [{"index": 0, "request": TALE}]},
        {"BatchInput": {"job": "a"}, "Items": []},
        {"BatchInput": {"job": "a"}, "Items": [TALE]},
        {"BatchInput": {"job": "a"}, "Items": [{"index": 0, "request": TALE}, {"index": 0, "request": TALE}]},
    ],
)
def test_what_is_no_batch_of_ours_fails(bucket: Any, event: dict[str, Any]) -> None:
    with pytest.raises(batch.BatchError, match="must"):
        invoke(event)
    assert results(bucket) == {}


def test_without_a_place_for_results_the_invocation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATCH_RESULTS_S3_URI")
    with pytest.raises(batch.BatchError, match="BATCH_RESULTS_S3_URI is not set"):
        invoke(map_event([TALE]))


def test_an_api_key_is_asked_of_requests_only(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "open sesame")
    assert invoke(map_event([TALE]))["succeeded"] == 1
    assert len(results(bucket)) == 1
