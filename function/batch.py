"""Batches: what a Step Functions Distributed Map or SQS sends, computed, with the results in S3.

An item is a line of the JSONL that OpenAI's Batch API takes, `{"custom_id", "method": "POST", "url", "body"}`, or any
other object, which is the body of `/completion`. Its result is a line of what that API gives:
`{"index", "custom_id", "response": {"status_code", "request_id", "body"}, "error": null}`. An item that cannot be
computed has its error there and keeps nobody else from being computed.

A result is written once. Its key follows from where the item stands in the batch, so whoever is sent the same items
again, by a retry, a redrive or SQS, finds what is done and computes the rest.
"""

from __future__ import annotations

import functools
import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from function import aws, schema
from function.api import Api, Call
from function.engine import Engine, EngineError
from function.model_store import ModelError
from function.schema import ApiError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from function.settings import Settings

logger = logging.getLogger("bitnet.batch")

URLS = ("/completion", "/v1/completions", "/v1/chat/completions")
ITEM_FIELDS = frozenset({"custom_id", "method", "url", "body"})
MAX_CUSTOM_ID_BYTES = 512
MAX_JOB_BYTES = 80  # a name of Step Functions' executions
RESERVE_S = 5.0  # before the function's timeout, to write what is done
RESERVE_SHARE = 0.1  # of the time there is, at most
ENOUGH_SHARE = 0.5  # of the time for generation: an item that is cut after less is computed again
OVERLOADED_WAIT_S = 0.05
WRITE_TRIES = 5  # against others that write the same results
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 20

Item = dict[str, Any]
Result = dict[str, Any]


class BatchError(Exception):
    """The invocation fails and may be tried again: what has been computed is kept."""


class UnfinishedError(BatchError):
    """The time was over before anything was done that could be kept."""


def is_map_batch(event: object) -> bool:
    """Whether it is a batch of a Distributed Map's items, as infra/batch.yaml forms them.

    https://docs.aws.amazon.com/step-functions/latest/dg/input-output-itembatcher.html
    """
    match event:
        case {"BatchInput": dict(), "Items": list()}:
            return True
    return False


def is_queue_batch(event: object) -> bool:
    """Whether it is messages of SQS.

    https://docs.aws.amazon.com/lambda/latest/dg/with-sqs.html
    """
    match event:
        case {"Records": [{"eventSource": "aws:sqs", "messageId": str(), "body": str()}, *_]}:
            return True
    return False


class Batches:
    """Computes batches with the operations of the API."""

    def __init__(self, settings: Settings, engine: Engine, api: Api) -> None:
        self._settings = settings
        self._engine = engine
        self._api = api

    @functools.cached_property
    def _store(self) -> _Store:
        return _Store(self._settings)

    def map_items(self, event: Mapping[str, Any], request_id: str, deadline: float) -> dict[str, Any]:
        """Computes `{"BatchInput": {"job"}, "Items": [{"index", "request"}, …]}` until shortly before `deadline`.

        The results lie at `BATCH_RESULTS_S3_URI/job/FIRST-LAST.jsonl`, in the order of the items, each once.

        Returns:
            `{"results", "items", "succeeded", "failed", "unfinished"}`: where they are, and counts of items. The same
            event again goes on with those that are unfinished.

        Raises:
            BatchError: nothing can be computed here and now (no model, no engine, no time, no place for results).
        """
        job, items = _checked(event)
        store = self._store
        key = f"{job}/{items[0]['index']:012d}-{items[-1]['index']:012d}.jsonl"
        done, tag = _parsed(*store.read(key))
        left = [item for item in items if item["index"] not in done]
        computed, failure = self._compute(left, request_id, deadline)
        for _ in range(WRITE_TRIES):
            new = {index: result for index, result in computed.items() if index not in done}
            if not new:
                break
            done |= new
            if store.write(key, _lines(done), tag):
                break
            done, tag = _parsed(*store.read(key))  # somebody else was sent the same items
        else:
            raise BatchError(f"{store.uri(key)} was replaced {WRITE_TRIES} times while it was written")
        if failure is not None:
            raise failure
        succeeded = sum(_succeeded(result) for result in done.values())
        return {
            "results": store.uri(key),
            "items": len(items),
            "succeeded": succeeded,
            "failed": len(done) - succeeded,
            "unfinished": len(items) - len(done),
        }

    def queue_records(self, event: Mapping[str, Any], request_id: str, deadline: float) -> dict[str, Any]:
        """Computes the messages of SQS until shortly before `deadline`; the body of each is an item.

        The result of each is at `BATCH_RESULTS_S3_URI/queue/MESSAGE_ID.jsonl`.

        Returns:
            `{"batchItemFailures": [{"itemIdentifier"}, …]}`: the messages that SQS shall send again.

        Raises:
            BatchError: there is no place for results; SQS sends all of them again.
        """
        store = self._store
        messages = {record["messageId"]: record["body"] for record in event["Records"]}
        keys = {message: f"queue/{message}.jsonl" for message in messages}
        left = [message for message in messages if store.read(keys[message])[1] is None]
        items = [{"index": number, "request": _decoded(messages[message])} for number, message in enumerate(left)]
        computed, failure = self._compute(items, request_id, deadline)
        if failure is not None:
            logger.error("a batch failed", extra={"request_id": request_id, "error": str(failure)})
        for number, result in computed.items():
            store.write(keys[left[number]], _lines({0: result | {"index": 0}}), None)  # else somebody else has
        again = [message for number, message in enumerate(left) if number not in computed]
        return {"batchItemFailures": [{"itemIdentifier": message} for message in again]}

    def _compute(
        self, items: Sequence[Item], request_id: str, deadline: float
    ) -> tuple[dict[int, Result], BatchError | None]:
        """The results by index, and what keeps the rest from being computed, if it is not the time."""
        left_s = deadline - time.monotonic()
        reserve_s = min(RESERVE_S, left_s * RESERVE_SHARE)
        run = _Run(self._api, request_id, deadline - reserve_s, self._settings.deadline_margin_ms / 1e3)
        run.all(items, threads=self._at_once(deadline) if items else 1)
        # An engine that died took all with it that it computed. Who did it, does it again alone.
        run.all(list(run.suspects.values()), threads=1, alone=True)
        if run.finished or not items:
            return run.finished, run.failure
        if run.cut:  # each of them takes longer than there is time, so this is all there will be
            return run.cut, run.failure
        return {}, run.failure or UnfinishedError("the time was over before any item had enough of it")

    def _at_once(self, deadline: float) -> int:
        """As many as the engine takes; where there is none, the first of them says why."""
        with suppress(EngineError, ModelError):
            return self._engine.capacity(deadline)
        return 1


class _Run:
    """The items of one invocation on their way."""

    def __init__(self, api: Api, request_id: str, deadline: float, margin_s: float) -> None:
        self._api = api
        self._request_id = request_id
        self._deadline = deadline
        self._cut_at = deadline - margin_s  # generation ends then
        self._enough_ms = (self._cut_at - time.monotonic()) * 1e3 * ENOUGH_SHARE
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self.finished: dict[int, Result] = {}
        self.cut: dict[int, Result] = {}  # ended by the deadline, after enough time
        self.suspects: dict[int, Item] = {}
        self.failure: BatchError | None = None

    def all(self, items: Sequence[Item], *, threads: int, alone: bool = False) -> None:
        """Computes the items, as many at the same time as there are threads, until one cannot be or time is over."""
        if not items:
            return
        with ThreadPoolExecutor(min(threads, len(items)), "item") as pool:
            for _ in pool.map(lambda item: self._one(item, alone), items):
                pass

    def _one(self, item: Item, alone: bool) -> None:
        while not self._stopped.is_set() and time.monotonic() < self._cut_at:
            call = Call(f"{self._request_id}-{item['index']}", self._deadline)
            result = _answer(self._api, item, call)
            code = call.failure.code if call.failure else None
            index: int = item["index"]
            with self._lock:
                if code == "overloaded":
                    pass
                elif code == "engine_died" and not alone:
                    self.suspects[index] = item
                    return
                elif code in ("engine_hung", "model_loading", "stopping", "too_late"):
                    return  # the time is over
                elif call.record.get("stop_type") in ("deadline", "cancelled"):
                    # Those that waited for others, or for the model, have little or nothing, and are not done.
                    if call.record["prompt_ms"] + call.record["predicted_ms"] >= self._enough_ms:
                        self.cut[index] = result
                    return
                elif result["response"]["status_code"] < 500 or code in (
                    "engine_died",
                    "engine_failed",
                    "internal_error",
                ):
                    self.finished[index] = result
                    return
                else:
                    assert call.failure is not None
                    self.failure = BatchError(f"{code}: {call.failure.message}")
                    self._stopped.set()
                    return
            self._stopped.wait(OVERLOADED_WAIT_S)


def _answer(api: Api, item: Item, call: Call) -> Result:
    """The result of one item, whatever it is."""
    request = item["request"]
    custom_id = request.get("custom_id") if isinstance(request, dict) else None
    try:
        event = http_event(*route(request))
    except ApiError as error:
        status, answer = error.status, error.body()
        custom_id = custom_id if isinstance(custom_id, str) else None
    else:
        reply = api.http(event, call, trusted=True)
        assert isinstance(reply["body"], str)
        status, answer = reply["statusCode"], json.loads(reply["body"])
    return {
        "index": item["index"],
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": call.request_id, "body": answer},
        "error": None,
    }


def route(request: object) -> tuple[str, dict[str, Any]]:
    """Where an item goes, and its body.

    Raises:
        ApiError: 400, it is no item.
    """
    if isinstance(request, ApiError):
        raise request
    if not isinstance(request, dict):
        raise schema.invalid(f"an item must be a JSON object, got {schema.describe(request)}", code="invalid_type")
    url: object = "/completion"
    body: object = request
    if "url" in request or "body" in request:
        if unknown := sorted(request.keys() - ITEM_FIELDS):
            raise schema.invalid(f"unknown field {schema.describe(unknown[0])}", code="unknown_field")
        if request.get("method", "POST") != "POST":
            message = f"'method' must be POST, got {schema.describe(request['method'])}"
            raise schema.invalid(message, param="method")
        url, body = request.get("url"), request.get("body")
        if url not in URLS:
            raise schema.invalid(f"'url' must be one of {', '.join(URLS)}, got {schema.describe(url)}", param="url")
        if not isinstance(body, dict):
            message = f"'body' must be an object, got {schema.describe(body)}"
            raise schema.invalid(message, param="body", code="invalid_type")
        if request.get("custom_id") is not None:
            schema.Text(MAX_CUSTOM_ID_BYTES)("custom_id", request["custom_id"])
    elif "custom_id" in request:
        schema.Text(MAX_CUSTOM_ID_BYTES)("custom_id", request["custom_id"])
        body = {name: value for name, value in request.items() if name != "custom_id"}
    assert isinstance(body, dict)
    if body.get("stream"):
        message = "'stream' must be false: results are written in one piece"
        raise schema.invalid(message, param="stream", code="unsupported_field")
    return str(url), body


def http_event(url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The item as an HTTP event (payload 2.0).

    Raises:
        ApiError: 400, it is nested more deeply than JSON can be written.
    """
    try:
        text = json.dumps(body)
    except RecursionError:
        raise schema.invalid("an item must not be nested so deeply", code="invalid_json") from None
    return {
        "version": "2.0",
        "rawPath": url,
        "rawQueryString": "",
        "headers": {},
        "requestContext": {"stage": "$default", "http": {"method": "POST", "path": url}},
        "body": text,
        "isBase64Encoded": False,
    }


def _checked(event: Mapping[str, Any]) -> tuple[str, list[Item]]:
    """The job's name and the items of a Map's batch.

    Raises:
        BatchError: the state machine is not that of infra/batch.yaml.
    """
    job, items = event["BatchInput"].get("job"), event["Items"]
    if not isinstance(job, str) or not 1 <= len(job.encode()) <= MAX_JOB_BYTES or "/" in job or job in (".", ".."):
        raise BatchError(f"'BatchInput.job' must be a name of 1 to {MAX_JOB_BYTES} bytes without a slash")
    seen = set()
    for item in items:
        index = item.get("index") if isinstance(item, dict) else None
        if isinstance(index, bool) or not isinstance(index, int) or index < 0 or index in seen or "request" not in item:
            raise BatchError("each of 'Items' must have its own 'index' from 0 and a 'request'")
        seen.add(index)
    if not items:
        raise BatchError("'Items' must not be empty")
    return job, sorted(items, key=lambda item: item["index"])


def _decoded(body: str) -> object:
    """The item in a message, or the error of one that is no JSON."""
    try:
        return schema.parse_object(body.encode(errors="surrogatepass"))
    except ApiError as error:
        return error


def _succeeded(result: Result) -> bool:
    return bool(result["response"]["status_code"] < 400)


def _parsed(body: bytes, tag: str | None) -> tuple[dict[int, Result], str | None]:
    results = (json.loads(line) for line in body.splitlines())
    return {result["index"]: result for result in results}, tag


def _lines(results: Mapping[int, Result]) -> bytes:
    lines = (json.dumps(results[index], ensure_ascii=False, separators=(",", ":")) for index in sorted(results))
    return "".join(f"{line}\n" for line in lines).encode(errors="replace")


class _Store:
    """The results in S3."""

    def __init__(self, settings: Settings) -> None:
        if settings.batch_results_s3_uri is None:
            raise BatchError("BATCH_RESULTS_S3_URI is not set: there is no place for results")
        self._bucket, prefix = aws.split_uri(settings.batch_results_s3_uri)
        self._prefix = prefix.rstrip("/")
        self._client = _client()

    def uri(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}/{key}"

    def read(self, key: str) -> tuple[bytes, str | None]:
        """The object and its ETag; nothing and None if there is none."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=f"{self._prefix}/{key}")
            return answer["Body"].read(), answer["ETag"]
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") == "NoSuchKey":
                return b"", None
            raise BatchError(f"{self.uri(key)} cannot be read: {error}") from error
        except BotoCoreError as error:
            raise BatchError(f"{self.uri(key)} cannot be read: {error}") from error

    def write(self, key: str, body: bytes, tag: str | None) -> bool:
        """Writes the object if it is still the one with this ETag, None being none at all. Says whether it was.

        https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html
        """
        from botocore.exceptions import BotoCoreError, ClientError

        condition: Any = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
        try:
            self._client.put_object(
                Bucket=self._bucket,
                Key=f"{self._prefix}/{key}",
                Body=body,
                ContentType="application/jsonl",
                **condition,
            )
        except ClientError as error:
            if aws.status_of(error) in (404, 409, 412):
                return False
            raise BatchError(f"{self.uri(key)} cannot be written: {error}") from error
        except BotoCoreError as error:
            raise BatchError(f"{self.uri(key)} cannot be written: {error}") from error
        return True


def _client() -> S3Client:
    from botocore.exceptions import BotoCoreError

    try:
        s3: S3Client = aws.client("s3", connect_timeout_s=CONNECT_TIMEOUT_S, read_timeout_s=READ_TIMEOUT_S, attempts=5)
        return s3
    except (BotoCoreError, ValueError) as error:
        raise BatchError(f"no S3 client: {error}") from error
