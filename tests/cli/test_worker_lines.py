"""The worker's protocol: lines that are wrong, and lines of any kind."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cli.bitnet import Bitnet
from tests.cli.worker import PROMPT, Event, Worker, started

MAX_LINE_BYTES = 16 * 2**20

COMPLETION: Event = {"id": "a", "op": "completion", "prompt": "x", "n_predict": 1}
WRONG_FIELDS: list[tuple[Event, str, str]] = [
    ({"id": None}, "id", "id: must be a string, got null"),
    ({"id": ""}, "id", "id: must have 1 to 128 bytes, got 0"),
    ({"id": "ä" * 65}, "id", "id: must have 1 to 128 bytes, got 130"),
    ({"op": None}, "op", "op: must be a string, got null"),
    ({"op": "complete"}, "op", "op: must be completion, tokenize, detokenize, vocabulary, cancel or mask"),
    ({"prompt": None}, "prompt", "prompt: must be a string or an array of token ids and strings, got null"),
    ({"prompt": {}}, "prompt", "got a value of type object"),
    ({"prompt": [4096]}, "prompt", "prompt: token ids are integers from 0 to 4095, got 4096"),
    ({"prompt": [-1]}, "prompt", "got -1"),
    ({"prompt": [1.0]}, "prompt", "got 1.0"),
    ({"prompt": ["x", None]}, "prompt", "got null"),
    ({"prompt": [["x"]]}, "prompt", "got a value of type array"),
    ({"prompt": ["", ""]}, "prompt", "prompt: must have at least 1 token, got 0"),
    ({"prompt": []}, "prompt", "prompt: must have at least 1 token, got 0"),
    ({"prompt": "", "add_bos": False}, "prompt", "prompt: must have at least 1 token, got 0"),
    ({"prompt": [1], "chat": True}, "chat", "chat: needs a prompt that is a string"),
    ({"add_bos": 1}, "add_bos", "add_bos: must be true or false, got 1"),
    ({"stream": "yes"}, "stream", "stream: must be true or false, got a value of type string"),
    ({"n_predict": -2}, "n_predict", "n_predict: must be an integer from -1 to 2147483647, got -2"),
    ({"n_predict": 2**31}, "n_predict", f"got {2**31}"),
    ({"n_predict": 2**70}, "n_predict", "n_predict: must be an integer from -1 to 2147483647"),
    ({"n_predict": 1.5}, "n_predict", "got 1.5"),
    ({"n_predict": True}, "n_predict", "got true"),
    ({"temperature": -0.1}, "temperature", "temperature: must be a number from 0.0 to 100.0, got -0.1"),
    ({"temperature": None}, "temperature", "got null"),
    ({"top_k": -1}, "top_k", "top_k: must be an integer from 0 to 2147483647, got -1"),
    ({"top_p": -0.1}, "top_p", "top_p: must be a number from 0.0 to 1.0, got -0.1"),
    ({"typical_p": 0}, "typical_p", "typical_p: must be a number above 0.0 and up to 1.0, got 0"),
    ({"top_p": 1.1}, "top_p", "got 1.1"),
    ({"min_p": 2}, "min_p", "min_p: must be a number from 0.0 to 1.0, got 2"),
    ({"repeat_penalty": 0}, "repeat_penalty", "repeat_penalty: must be a number above 0.0 and up to 100.0, got 0"),
    ({"repeat_last_n": -2}, "repeat_last_n", "repeat_last_n: must be an integer from -1 to 2147483647, got -2"),
    ({"presence_penalty": "x"}, "presence_penalty", "presence_penalty: must be a number from -100.0 to 100.0"),
    ({"frequency_penalty": 101}, "frequency_penalty", "got 101"),
    ({"seed": -2}, "seed", f"seed: must be an integer from -1 to {2**63 - 1}, got -2"),
    ({"seed": 2**63}, "seed", f"got {2**63}"),
    ({"stop": "x"}, "stop", "stop: must be an array of at most 64 strings, got a value of type string"),
    ({"stop": ["x"] * 65}, "stop", "stop: must be an array of at most 64 strings, got 65 elements"),
    ({"stop": [1]}, "stop", "stop: must be an array of strings, got 1"),
    ({"stop": ["x" * 4097]}, "stop", "stop: a string has at most 4096 bytes, got 4097"),
    ({"timeout_ms": 0}, "timeout_ms", "timeout_ms: must be an integer from 1 to 86400000, got 0"),
    ({"timeout_ms": "1"}, "timeout_ms", "got a value of type string"),
    ({"n_predikt": 1}, "n_predikt", "n_predikt: is not a field of this request"),
    ({"content": "x"}, "content", "content: is not a field of this request"),
    ({"op": "tokenize"}, "content", "content: is missing"),
    ({"op": "detokenize"}, "tokens", "tokens: is missing"),
    ({"n": 0}, "n", "n: must be an integer from 1 to 16, got 0"),
    ({"n": 17}, "n", "n: must be an integer from 1 to 16, got 17"),
    ({"n_probs": 101}, "n_probs", "n_probs: must be an integer from 0 to 100, got 101"),
    ({"logprobs": 1}, "logprobs", "logprobs: must be true or false, got 1"),
    ({"logit_bias": {}}, "logit_bias", "must be an array of at most 1024 pairs, got a value of type object"),
    ({"logit_bias": [[1, 0]] * 1025}, "logit_bias", "must be an array of at most 1024 pairs, got 1025 elements"),
    ({"logit_bias": [[1]]}, "logit_bias", "must be an array of pairs of a token id and a number or false"),
    ({"logit_bias": [[4096, 1]]}, "logit_bias", "token ids are integers from 0 to 4095, got 4096"),
    ({"logit_bias": [[1, 1000001]]}, "logit_bias", "a number from -1000000.0 to 1000000.0, or false, got 1000001"),
    ({"logit_bias": [[1, True]]}, "logit_bias", "got true"),
    ({"logit_bias": [[i, False] for i in range(1024)], "prompt": 1}, "prompt", "got 1"),
    ({"samplers": "top_k"}, "samplers", "samplers: must be an array of names, got a value of type string"),
    ({"samplers": ["top_k", "top_k"]}, "samplers", "samplers: must be some of penalties, dry, top_n_sigma, top_k"),
    ({"samplers": ["top-k"]}, "samplers", "temperature, each at most once"),
    ({"typical_p": 0}, "typical_p", "typical_p: must be a number above 0.0 and up to 1.0, got 0"),
    ({"top_n_sigma": -2}, "top_n_sigma", "top_n_sigma: must be a number from -1.0 to 100.0, got -2"),
    ({"min_keep": -1}, "min_keep", "min_keep: must be an integer from 0 to 2147483647, got -1"),
    ({"xtc_probability": 1.5}, "xtc_probability", "xtc_probability: must be a number from 0.0 to 1.0, got 1.5"),
    ({"xtc_threshold": -0.5}, "xtc_threshold", "xtc_threshold: must be a number from 0.0 to 1.0, got -0.5"),
    ({"dynatemp_range": -1}, "dynatemp_range", "dynatemp_range: must be a number from 0.0 to 100.0, got -1"),
    ({"dynatemp_exponent": -1}, "dynatemp_exponent", "dynatemp_exponent: must be a number from 0.0 to 100.0, got -1"),
    ({"dry_multiplier": -1}, "dry_multiplier", "dry_multiplier: must be a number from 0.0 to 100.0, got -1"),
    ({"dry_base": 0.5}, "dry_base", "dry_base: must be a number from 1.0 to 100.0, got 0.5"),
    ({"dry_allowed_length": -1}, "dry_allowed_length", "must be an integer from 0 to 2147483647, got -1"),
    ({"dry_penalty_last_n": -2}, "dry_penalty_last_n", "must be an integer from -1 to 2147483647, got -2"),
    ({"dry_sequence_breakers": ["x" * 41]}, "dry_sequence_breakers", "a string has at most 40 bytes, got 41"),
    ({"mirostat": 3}, "mirostat", "mirostat: must be an integer from 0 to 2, got 3"),
    ({"mirostat_tau": -1}, "mirostat_tau", "mirostat_tau: must be a number from 0.0 to 100.0, got -1"),
    ({"mirostat_eta": "x"}, "mirostat_eta", "mirostat_eta: must be a number from 0.0 to 100.0"),
    ({"t_max_predict_ms": -2}, "t_max_predict_ms", "must be an integer from -1 to 2147483647, got -2"),
    ({"cache_file": ""}, "cache_file", "cache_file: must be a path of 1 to 4000 bytes without NUL, got 0"),
    ({"cache_file": None}, "cache_file", "cache_file: must be a string, got null"),
    ({"cache_save": True}, "cache_save", "cache_save: needs a cache_file"),
    ({"mask": 1}, "mask", "mask: must be true or false, got 1"),
    ({"op": "cancel"}, "n_predict", "n_predict: is not a field of this request"),
]


@pytest.mark.parametrize(("fields", "field", "says"), WRONG_FIELDS, ids=lambda value: str(value)[:40])
def test_a_wrong_field_is_named_with_limit_and_value(fields: Event, field: str, says: str, worker: Worker) -> None:
    request = COMPLETION | fields
    worker.send(**request)
    error = worker.receive()
    message = error.pop("message")
    assert error == {
        "event": "error",
        "id": None if field == "id" else "a",
        "code": "invalid_request",
        "field": field,
    }
    assert says in message
    assert worker.complete(PROMPT, n_predict=1)["tokens_predicted"] == 1


@pytest.mark.parametrize("missing", ["id", "op", "prompt"])
def test_a_missing_field_is_named(missing: str, worker: Worker) -> None:
    worker.send(**{name: value for name, value in COMPLETION.items() if name != missing})
    error = worker.receive()
    assert (error["code"], error["field"]) == ("invalid_request", missing)
    assert error["message"] == f"{missing}: is missing"


WRONG_LINES = [
    b"x",
    b"{",
    b"{}}",
    b'{"id":"a"',
    b"[]",
    b"null",
    b"1",
    b'"text"',
    b'{"id":"a","op":"tokenize","content":"\xff"}',
    b'{"id":"a","op":"tokenize","content":"\\ud800"}',
    b'{"id":"a","op":"tokenize","content":"\0"}',
    b'{"id":"a","op":"completion","prompt":"x","temperature":NaN}',
    b'{"id":"a","op":"completion","prompt":"x","temperature":1e999}',
    b'{"id":"a"} {"id":"b"}',
    bytes(range(128, 256)),
    b"\0",
    b"\xef\xbb\xbf[",
    b"[" * 100_000,
    b'{"a":' * 100_000,
]


@pytest.mark.parametrize("line", WRONG_LINES, ids=lambda line: str(line[:30]))
def test_a_line_that_is_no_request_gets_one_error(line: bytes, worker: Worker) -> None:
    worker.send_line(line)
    error = worker.receive()
    assert (error["event"], error["id"], error["field"]) == ("error", None, None)
    assert error["code"] == ("invalid_request" if len(line) > 1000 else "invalid_json")
    assert worker.tokenize("x")


def test_empty_lines_are_nothing(worker: Worker) -> None:
    for line in (b"", b" ", b"\r", b"\t \r"):
        worker.send_line(line)
    worker.send_line(b'  {"id":"a","op":"tokenize","content":"x"}\r')
    assert worker.receive()["event"] == "done"


def test_a_line_may_have_16_mib(worker: Worker) -> None:
    """One more byte is an error, and so is much more; the next line is read as ever."""
    for n_bytes, code in (
        (MAX_LINE_BYTES, "invalid_json"),
        (MAX_LINE_BYTES + 1, "invalid_request"),
        (3 * MAX_LINE_BYTES + 5, "invalid_request"),
    ):
        worker.send_line(b"x" * n_bytes)
        error = worker.receive()
        assert (error["event"], error["id"], error["code"]) == ("error", None, code)
        if code == "invalid_request":
            assert str(MAX_LINE_BYTES) in error["message"]
        assert worker.tokenize("x")
    start, end = b'{"id":"a","op":"tokenize","content":"', b'"}'
    worker.send_line(start + b" " * (MAX_LINE_BYTES - len(start + end)) + end)
    done = worker.receive()
    assert worker.detokenize(done["tokens"][:3]).isspace()
    worker.stdin.write(b"x" * (MAX_LINE_BYTES + 1))  # without an end
    exit_code, rest, _ = worker.end()
    assert (exit_code, json.loads(rest)["code"]) == (0, "invalid_request")


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(worker: Worker) -> None:
    n_prompt = 1 + len(worker.tokenize("many words " * 300))
    (error,) = worker.ask(op="completion", prompt="many words " * 300)
    assert error.pop("message")
    assert error == {
        "event": "error",
        "id": "a",
        "code": "context_length_exceeded",
        "field": "prompt",
        "n_prompt": n_prompt,
        "n_ctx": 256,
    }
    full = [1] * 256
    assert worker.ask(op="completion", prompt=full)[0]["n_prompt"] == 256
    assert worker.complete(full, n_predict=0)["tokens_evaluated"] == 256
    assert worker.complete(full[:-1])["tokens_predicted"] == 1


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
    max_leaves=10,
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "op": st.text(max_size=10),
    "prompt": st.text(max_size=40) | st.lists(st.integers(0, 4095) | st.text(max_size=9), max_size=20),
    "content": st.text(max_size=40),
    "tokens": st.lists(st.integers(0, 4095), max_size=20),
    "n_predict": st.integers(0, 8),
    "n": st.integers(1, 3),
    "temperature": st.floats(0, 100),
    "top_k": st.integers(0, 2**31 - 1),
    "top_p": st.floats(0, 1),
    "min_p": st.floats(0, 1),
    "repeat_penalty": st.floats(0, 100),
    "repeat_last_n": st.integers(-1, 2**31 - 1),
    "presence_penalty": st.floats(-100, 100),
    "frequency_penalty": st.floats(-100, 100),
    "seed": st.integers(-1, 2**63 - 1),
    "n_probs": st.integers(0, 5),
    "logit_bias": st.lists(st.tuples(st.integers(0, 4095), st.floats(-1e6, 1e6) | st.just(value=False)), max_size=5),
    "samplers": st.lists(
        st.sampled_from(["penalties", "dry", "top_k", "typ_p", "top_p", "xtc", "temperature"]), unique=True
    ),
    "typical_p": st.floats(0.01, 1),
    "top_n_sigma": st.floats(-1, 100),
    "min_keep": st.integers(0, 2**31 - 1),
    "xtc_probability": st.floats(0, 1),
    "xtc_threshold": st.floats(0, 1),
    "dynatemp_range": st.floats(0, 100),
    "dynatemp_exponent": st.floats(0, 100),
    "dry_multiplier": st.floats(0, 100),
    "dry_base": st.floats(1, 100),
    "dry_allowed_length": st.integers(0, 2**31 - 1),
    "dry_penalty_last_n": st.integers(-1, 2**31 - 1),
    "dry_sequence_breakers": st.lists(st.text(max_size=9), max_size=5),
    "mirostat": st.integers(0, 2),
    "mirostat_tau": st.floats(0, 100),
    "mirostat_eta": st.floats(0, 100),
    "t_max_predict_ms": st.integers(-1, 1000),
    "stop": st.lists(st.text(max_size=4), max_size=5),
    "timeout_ms": st.integers(1, 1000),
} | dict.fromkeys(
    [
        "add_bos",
        "special",
        "chat",
        "stream",
        "ignore_eos",
        "cache_prompt",
        "logprobs",
        "post_sampling_probs",
        "prompt_logprobs",
    ],
    st.booleans(),
)
OF_COMPLETION = {name: FIELDS[name] for name in FIELDS.keys() - {"op", "prompt", "content", "tokens"}}


def request(op: str, required: str | None, optional: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Event]:
    fields = {"op": st.just(op)} | ({required: FIELDS[required]} if required else {})
    return st.fixed_dictionaries(fields, optional=optional)


# Right ones, and such as have up to two fields more or of another kind.
REQUESTS = st.builds(
    lambda right, wrong: right | wrong,
    request("completion", "prompt", OF_COMPLETION)
    | request("tokenize", "content", {name: FIELDS[name] for name in ("add_bos", "special")})
    | request("detokenize", "tokens", {})
    | request("cancel", None, {}),
    st.just({}) | st.dictionaries(st.sampled_from([*FIELDS, "other"]), JSON, max_size=2),
)


@pytest.fixture(scope="module")
def shared_worker(bitnet: Bitnet, demo_model: Path) -> Iterator[Worker]:
    with started(bitnet, demo_model, "--parallel", "1") as worker:  # one after another: the last request ends last
        yield worker
        assert worker.end() == (0, b"", b"")


def events_before_the_next(worker: Worker) -> list[Event]:
    """What has been said when a request sent now is done."""
    worker.send(id="sentinel", op="completion", prompt=[0], n_predict=0)
    events = []
    while (event := worker.receive()).get("id") != "sentinel":
        events.append(event)
    assert event["event"] == "done"
    return events


def ends(events: list[Event]) -> list[Event]:
    """Those that end a request, of whose completions the first may stand for all."""
    return [event for event in events if event["event"] != "token" and event.get("index", 0) == 0]


@settings(max_examples=300)
@given(asked=REQUESTS)
def test_any_request_ends_with_one_event(asked: Event, shared_worker: Worker) -> None:
    shared_worker.send(**asked, id="a")
    events = events_before_the_next(shared_worker)
    assert {event["id"] for event in events} <= {"a", None}
    pieces = [event for event in events if event["event"] == "token"]
    last = [event for event in events if event["event"] != "token"]
    if asked["op"] == "cancel":
        assert not pieces
        assert [event["event"] for event in last] in ([], ["error"])
    elif asked["op"] != "completion" or last[0]["event"] == "error":
        assert not pieces
        assert [event["event"] for event in last] in (["done"], ["error"])
    else:
        assert [(end["event"], end["index"]) for end in last] == [("done", i) for i in range(asked.get("n", 1))]
        for end in last:
            content = "".join(piece["content"] for piece in pieces if piece["index"] == end["index"])
            assert content == (end["content"] if asked.get("stream", False) else "")


@settings(max_examples=300)
@given(data=st.data())
def test_any_line_gets_one_error_at_most(data: st.DataObject, shared_worker: Worker) -> None:
    line = data.draw(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
    if data.draw(st.booleans()):  # a request with a few bytes changed
        damaged = bytearray(json.dumps({"id": "a", **data.draw(REQUESTS)}).encode())
        for _ in range(data.draw(st.integers(1, 4))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
        line = bytes(damaged)
    line = line.replace(b"\n", b"")
    shared_worker.send_line(line)
    events = events_before_the_next(shared_worker)
    finals = ends(events)
    assert len(finals) <= 1
    assert len(finals) == 1 or not line.strip(b" \t\r") or b"cancel" in line


@settings(max_examples=100)
@given(burst=st.lists(st.tuples(st.sampled_from("abc"), REQUESTS), max_size=20))
def test_each_of_many_requests_ends_with_one_event(burst: list[tuple[str, Event]], shared_worker: Worker) -> None:
    """Sent at once, under few ids: some are cancelled, some refused because their id is in use."""
    for name, asked in burst:
        shared_worker.send(**asked, id=name)
    ended = Counter(event["id"] for event in ends(events_before_the_next(shared_worker)))
    sent = Counter(name for name, asked in burst if asked["op"] != "cancel")
    wrong_cancels = sum(asked.keys() != {"op"} for _, asked in burst if asked["op"] == "cancel")
    assert sent <= ended
    assert (ended - sent).total() == wrong_cancels
