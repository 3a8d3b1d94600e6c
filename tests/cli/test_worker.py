"""The worker's protocol (docs/worker-protocol.md), spoken over pipes."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import signal
import string
import struct
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cli.conftest import Bitnet
from tests.processes import alive, eventually, processor_ticks

MAX_LINE_BYTES = 16 * 2**20
PROMPT = "Once upon a time"
Event = dict[str, Any]


class Worker:
    """`bitnet worker` and the pipes to it."""

    def __init__(self, bitnet: Bitnet, model: Path, *options: str) -> None:
        command: list[str | Path] = [bitnet.path, "worker", "-m", model, *options]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
        self.ready = self.receive()
        assert self.ready["event"] == "ready"

    @property
    def stdin(self) -> IO[bytes]:
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def send_line(self, line: bytes) -> None:
        self.stdin.write(line + b"\n")
        self.stdin.flush()

    def send(self, **request: Any) -> None:
        self.send_line(json.dumps(request).encode())

    def receive(self) -> Event:
        line = self.stdout.readline()
        assert line.endswith(b"\n"), "the worker has ended"
        event: Event = json.loads(line)
        return event

    def ask(self, **request: Any) -> list[Event]:
        """All events of one request, when it is alone."""
        self.send(**{"id": "a"} | request)
        events = [self.receive()]
        while events[-1]["event"] == "token":
            events.append(self.receive())
        assert {event["id"] for event in events} == {request.get("id", "a")}
        return events

    def complete(self, prompt: str | list[int] | list[int | str], **fields: Any) -> Event:
        """The `done` event of a completion that is not streamed, greedy unless told otherwise."""
        (event,) = self.ask(**{"op": "completion", "prompt": prompt, "temperature": 0} | fields)
        assert event["event"] == "done"
        return event

    def tokenize(self, text: str, **fields: Any) -> list[int]:
        (event,) = self.ask(op="tokenize", content=text, **fields)
        tokens: list[int] = event["tokens"]
        return tokens

    def detokenize(self, tokens: list[int]) -> str:
        (event,) = self.ask(op="detokenize", tokens=tokens)
        text: str = event["content"]
        return text

    def end(self) -> tuple[int, bytes, bytes]:
        """(exit code, what is left on standard output and error) after standard input was closed."""
        stdout, stderr = self.process.communicate()
        return self.process.returncode, stdout, stderr


@contextmanager
def started(bitnet: Bitnet, model: Path, *options: str) -> Iterator[Worker]:
    worker = Worker(bitnet, model, *options)
    with worker.process:
        try:
            yield worker
        finally:
            worker.process.kill()


@pytest.fixture
def worker(bitnet: Bitnet, demo_model: Path) -> Iterator[Worker]:
    """One that must have nothing to say on standard error, and end well."""
    with started(bitnet, demo_model) as worker:
        yield worker
        if worker.process.poll() is None:
            assert worker.end() == (0, b"", b"")


@pytest.fixture
def busy(bitnet: Bitnet, endless_model: Path) -> Iterator[Worker]:
    """One that computes tens of thousands of tokens for request `long`, the first of which have come."""
    with started(bitnet, endless_model, "--ctx-size", "32768") as worker:
        worker.send(id="long", op="completion", prompt=PROMPT, n_predict=-1, ignore_eos=True, stream=True)
        assert worker.receive()["event"] == "token"
        yield worker


def finals(worker: Worker, n: int) -> list[Event]:
    """The next n events that end a request."""
    events = (worker.receive() for _ in itertools.count())
    return list(itertools.islice((event for event in events if event["event"] != "token"), n))


# events


def test_ready_says_what_is_served(bitnet: Bitnet, demo_model: Path) -> None:
    options = ("--ctx-size", "100", "--threads", "3", "--isa", "scalar", "--kv-type", "f32")
    with started(bitnet, demo_model, *options) as worker:
        ready = worker.ready
    assert ready.pop("load_ms") > 0
    assert ready.pop("model").pop("n_params") == pytest.approx(5_776_640)
    special = [
        bitnet.json("tokenize", "-m", demo_model, "--special", stdin=text)[0]
        for text in (b"<|begin_of_text|>", b"<|end_of_text|>", b"<|eot_id|>")
    ]
    assert ready == {
        "event": "ready",
        "n_ctx": 100,
        "threads": 3,
        "isa": "scalar",
        "kv_type": "f32",
        "bos": special[0],
        "eot": special[2],
        "eos": sorted(special[1:]),
        "version": bitnet("--version").decode().strip(),
    }


def test_ready_describes_the_model(worker: Worker, demo_model: Path) -> None:
    assert worker.ready["model"] == {
        "name": "bitnet-fairy-tales",
        "architecture": "bitnet-b1.58",
        "path": str(demo_model),
        "size": demo_model.stat().st_size,
        "n_ctx_train": 256,
        "n_vocab": 4096,
        "n_embd": 256,
        "n_layer": 6,
        "n_params": 5_776_640,
    }


def test_done_of_a_completion(worker: Worker, bitnet: Bitnet, demo_model: Path) -> None:
    options = ("generate", "-m", demo_model, "-p", PROMPT, "-n", 20, "--temperature", 0)
    expected = bitnet.json(*options, "--json")
    done = worker.complete(PROMPT, n_predict=20)
    timings = done.pop("timings")
    assert (timings["prompt_n"], timings["predicted_n"]) == (expected["tokens_evaluated"], 20)
    names = {f"{a}_{b}" for a in ("prompt", "predicted") for b in ("n", "ms", "per_second")}
    assert set(timings) == names | {"draft_n", "draft_n_accepted"}
    assert 0 <= done.pop("seed") < 2**32
    assert done == {
        "event": "done",
        "id": "a",
        "content": expected["content"],
        "tokens": expected["tokens"],
        "stop_type": "limit",
        "stopping_word": "",
        "tokens_predicted": 20,
        "tokens_evaluated": expected["tokens_evaluated"],
        "tokens_cached": 0,
        "truncated": False,
    }


def test_a_prompt_of_token_ids_is_taken_as_it_is(worker: Worker) -> None:
    ids = worker.tokenize(PROMPT)
    with_bos = worker.tokenize(PROMPT, add_bos=True)
    assert with_bos == [worker.ready["bos"], *ids]
    done = worker.complete(PROMPT, n_predict=8)
    for prompt, add_bos in ((with_bos, False), (with_bos, True), (ids, True)):
        same = worker.complete(prompt, n_predict=8, add_bos=add_bos)
        assert (same["tokens"], same["tokens_evaluated"]) == (done["tokens"], len(with_bos))
    assert worker.complete(ids, n_predict=8)["tokens_evaluated"] == len(ids)
    assert worker.complete(PROMPT, n_predict=8, add_bos=False)["tokens_evaluated"] == len(ids)


def test_a_prompt_may_mix_texts_and_token_ids(worker: Worker) -> None:
    """Each text is tokenized by itself."""
    bos, eot = worker.ready["bos"], worker.ready["eot"]
    parts = [bos, "Once upon", " a ti", "me", eot, eot, "", "<|eot_id|>"]
    ids = [token for part in parts for token in (worker.tokenize(part) if isinstance(part, str) else [part])]
    mixed, plain = worker.complete(parts, n_predict=8), worker.complete(ids, n_predict=8)
    assert (mixed["tokens"], mixed["tokens_evaluated"]) == (plain["tokens"], len(ids))
    assert worker.complete(parts[1:], add_bos=True, n_predict=8)["tokens"] == plain["tokens"]
    special = worker.complete(parts, special=True, n_predict=8)
    assert special["tokens_evaluated"] == len(ids) - len(worker.tokenize("<|eot_id|>")) + 1


def test_special_and_chat_make_the_prompt(worker: Worker) -> None:
    spelled = worker.complete("User: Hi<|eot_id|>Assistant: ", special=True, n_predict=12)
    chat = worker.complete(" Hi\n", chat=True, n_predict=12)
    assert (chat["tokens"], chat["tokens_evaluated"]) == (spelled["tokens"], spelled["tokens_evaluated"])
    assert worker.complete("User: Hi<|eot_id|>Assistant: ", n_predict=0)["tokens_evaluated"] > chat["tokens_evaluated"]


def test_the_vocabulary_is_every_token_as_it_is_written(worker: Worker) -> None:
    (done,) = worker.ask(op="vocabulary")
    tokens = [bytes.fromhex(token) for token in done["tokens"]]
    assert len(tokens) == worker.ready["model"]["n_vocab"]
    assert {"bos", "eot"} <= worker.ready.keys()
    assert {worker.ready["bos"], *worker.ready["eos"]} <= set(done["control"])
    assert tokens[worker.ready["eot"]] == b"<|eot_id|>"
    text = "Grüße, 🐉 and a king"
    assert b"".join(tokens[token] for token in worker.tokenize(text)) == text.encode()


def test_tokenize_and_detokenize(worker: Worker) -> None:
    for text in ("", "Once\n\tupon 1234567", "Ännchen 🐸 “\u2028”", "a\0b", "<|eot_id|>"):
        assert worker.detokenize(worker.tokenize(text)) == text
        assert worker.detokenize(worker.tokenize(text, special=True)) == text
    assert len(worker.tokenize("<|eot_id|>", special=True)) == 1
    assert worker.tokenize("<|begin_of_text|>x", special=True, add_bos=True)[0] == worker.ready["bos"]
    frog = worker.tokenize("🐸")
    assert len(frog) > 1
    assert worker.detokenize(frog[:-1]) == "\N{REPLACEMENT CHARACTER}"


ALIKE = {"temperature": 100, "top_k": 0, "top_p": 1, "min_p": 0, "ignore_eos": True}


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1}, ALIKE], ids=["greedy", "drawn", "alike"])
def test_streamed_pieces_are_whole_characters_and_make_the_content(fields: Event, worker: Worker) -> None:
    """Drawn alike, most tokens are parts of words and many are single bytes that are no character."""
    for seed in range(5):
        request = {"op": "completion", "prompt": "“Prinzessin 🐸", "n_predict": 100, "seed": seed, **fields}
        *pieces, done = worker.ask(**request, stream=True)
        assert "".join(piece["content"] for piece in pieces) == done["content"]
        assert all(piece["content"] for piece in pieces)
        tokens = [token for piece in pieces for token in piece["tokens"]]
        assert tokens == done["tokens"][: len(tokens)]
        text_tokens = [token for token in done["tokens"] if token not in worker.ready["eos"]]
        if done["stop_type"] == "limit":
            assert worker.detokenize(text_tokens) == done["content"]
        (whole,) = worker.ask(**request)
        assert {**whole, "timings": 0, "tokens_cached": 0} == {**done, "timings": 0, "tokens_cached": 0}


def test_a_stop_string_is_held_back_and_left_out(worker: Worker) -> None:
    text = worker.complete(PROMPT, n_predict=60)["content"]
    for start, length in ((0, 1), (0, 9), (10, 3), (17, 30), (40, 8)):
        stop = text[start : start + length]
        *pieces, done = worker.ask(
            op="completion", prompt=PROMPT, temperature=0, n_predict=60, stop=["never said", stop, "?!"], stream=True
        )
        assert done["content"] == "".join(piece["content"] for piece in pieces) == text[: text.index(stop)]
        assert (done["stop_type"], done["stopping_word"]) == ("word", stop)


def test_what_only_begins_like_a_stop_string_is_sent_after_all(worker: Worker) -> None:
    text = worker.complete(PROMPT, n_predict=30)["content"]
    stops = [text[i : i + 12] + "\0" for i in range(0, len(text), 5)]
    *pieces, done = worker.ask(op="completion", prompt=PROMPT, temperature=0, n_predict=30, stop=stops, stream=True)
    assert "".join(piece["content"] for piece in pieces) == done["content"] == text
    assert done["stop_type"] == "limit"


def test_the_first_of_several_stop_strings_wins(worker: Worker) -> None:
    text = worker.complete(PROMPT, n_predict=30)["content"]
    done = worker.complete(PROMPT, n_predict=30, stop=[text[25:28], "", text[12:17], text[13:16]])
    assert (done["content"], done["stopping_word"]) == (text[:12], text[12:17])


def test_a_full_context_is_truncated(bitnet: Bitnet, demo_model: Path) -> None:
    with started(bitnet, demo_model, "--ctx-size", "32") as worker:
        n_prompt = worker.complete(PROMPT, n_predict=0)["tokens_evaluated"]
        for n_predict, truncated in ((-1, True), (2**31 - 1, True), (32 - n_prompt, False), (33 - n_prompt, True)):
            done = worker.complete(PROMPT, n_predict=n_predict, ignore_eos=True)
            assert (done["stop_type"], done["truncated"], done["tokens_predicted"]) == (
                *("limit", truncated),
                32 - n_prompt,
            )


def test_n_predict_0_evaluates_the_prompt_only(worker: Worker) -> None:
    done = worker.complete(PROMPT, n_predict=0)
    assert (done["content"], done["tokens"], done["stop_type"], done["truncated"]) == ("", [], "limit", False)
    assert worker.complete(PROMPT)["tokens_cached"] == done["tokens_evaluated"] - 1


def test_a_seed_repeats_a_text(worker: Worker) -> None:
    first = worker.complete(PROMPT, temperature=1.5, n_predict=30)
    assert worker.complete(PROMPT, temperature=1.5, n_predict=30, seed=first["seed"])["tokens"] == first["tokens"]
    texts = {worker.complete(PROMPT, temperature=1.5, n_predict=30, seed=seed)["content"] for seed in (0, 1, 2**63 - 1)}
    assert len(texts) == 3


def test_penalties_keep_tokens_from_coming_again(worker: Worker) -> None:
    plain = worker.complete(PROMPT, n_predict=60)["tokens"]
    assert len(set(plain)) < len(plain)
    for penalty in ({"repeat_penalty": 100}, {"presence_penalty": 100}, {"frequency_penalty": 100}):
        tokens = worker.complete(PROMPT, n_predict=60, repeat_last_n=-1, **penalty)["tokens"]
        assert len(set(tokens)) == len(tokens)
        assert worker.complete(PROMPT, n_predict=60, repeat_last_n=0, **penalty)["tokens"] == plain


@pytest.mark.parametrize("blocking", [True, False])
def test_nothing_is_lost_when_the_pipe_is_full(blocking: bool, bitnet: Bitnet, demo_model: Path) -> None:
    text = "many words " * 20_000
    lines = [json.dumps({"id": str(i), "op": "tokenize", "content": text}).encode() + b"\n" for i in range(3)]
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, blocking)
    command: list[str | Path] = [bitnet.path, "worker", "-m", demo_model]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=write_end) as process, os.fdopen(read_end) as events:
        os.close(write_end)
        # It reads no more than it can answer.
        writer = threading.Thread(target=process.communicate, args=[b"".join(lines)])
        writer.start()
        eventually(lambda: bytes_in_pipe(read_end) > 60_000)
        _, *answers = map(json.loads, events)
        writer.join()
    assert process.returncode == 0
    expected = bitnet.json("tokenize", "-m", demo_model, stdin=text.encode())
    assert [answer["tokens"] for answer in answers] == [expected] * 3


def bytes_in_pipe(read_end: int) -> int:
    n: int = struct.unpack("i", fcntl.ioctl(read_end, termios.FIONREAD, bytes(4)))[0]
    return n


# the cache


def test_a_shared_prefix_is_reused_and_changes_nothing(worker: Worker, bitnet: Bitnet, demo_model: Path) -> None:
    prompts = [
        "Once upon a time there was a king",
        "Once upon a time there was a queen who",
        "Once upon a time there was a queen who had a daughter",
        "Once",
        "The king",
        "Once upon a time there was a king",
    ]
    with started(bitnet, demo_model) as fresh:
        for i, prompt in enumerate(prompts):
            done = worker.complete(prompt, n_predict=20)
            expected = fresh.complete(prompt, n_predict=20, cache_prompt=False)
            assert done["tokens"] == expected["tokens"]
            assert (expected["tokens_cached"], done["tokens_evaluated"]) == (0, expected["tokens_evaluated"])
            assert (done["tokens_cached"] > 0) == (i > 0)  # BOS at least
            assert done["timings"]["prompt_n"] == done["tokens_evaluated"] - done["tokens_cached"]
    assert worker.complete(prompts[-1], n_predict=0)["tokens_cached"] == expected["tokens_evaluated"] - 1
    turn = worker.complete(prompts[0], n_predict=20)
    longer = prompts[0] + turn["content"]
    grown = worker.complete([worker.ready["bos"], *worker.tokenize(prompts[0]), *turn["tokens"]], n_predict=5)
    assert grown["tokens_cached"] >= turn["tokens_evaluated"] + turn["tokens_predicted"] - 1
    assert grown["tokens"] == worker.complete(longer, n_predict=5, cache_prompt=False)["tokens"]


def test_the_cache_is_right_after_an_interrupted_prompt(bitnet: Bitnet, endless_model: Path) -> None:
    long_prompt = "many words that follow each other " * 4000
    with started(bitnet, endless_model, "--ctx-size", "32768") as worker:
        expected = worker.complete(PROMPT, n_predict=10)["tokens"]
        worker.send(id="b", op="completion", prompt=PROMPT + long_prompt, timeout_ms=50)
        interrupted = worker.receive()
        assert interrupted["stop_type"] == "deadline"
        assert worker.complete(PROMPT, n_predict=10)["tokens"] == expected
        assert worker.complete(PROMPT, n_predict=10, cache_prompt=False)["tokens"] == expected


# one after another, and out of turn


def test_completions_are_served_in_their_order(worker: Worker) -> None:
    for i in range(20):
        worker.send(id=str(i), op="completion", prompt=PROMPT, n_predict=20 - i)
    assert [(event["event"], event["id"]) for event in finals(worker, 20)] == [("done", str(i)) for i in range(20)]


def test_text_becomes_tokens_and_back_while_a_completion_runs(busy: Worker) -> None:
    busy.send(id="queued", op="completion", prompt=PROMPT, n_predict=1)
    busy.send(id="to", op="tokenize", content=PROMPT)
    (done,) = finals(busy, 1)
    busy.send(id="back", op="detokenize", tokens=done["tokens"])
    assert finals(busy, 1)[0]["content"] == PROMPT
    busy.send(id="long", op="cancel")
    assert [event["id"] for event in finals(busy, 2)] == ["long", "queued"]


def test_cancel_ends_the_running_request(busy: Worker) -> None:
    busy.send(id="long", op="cancel")
    (done,) = finals(busy, 1)
    assert (done["id"], done["stop_type"]) == ("long", "cancelled")
    assert 0 < done["tokens_predicted"] == len(done["tokens"]) < 32_000
    assert done["content"]
    assert busy.complete(PROMPT, n_predict=3)["tokens_predicted"] == 3


def test_cancel_ends_a_queued_request_while_another_runs(busy: Worker) -> None:
    busy.send(id="queued", op="completion", prompt=PROMPT)
    busy.send(id="behind", op="completion", prompt=PROMPT, n_predict=1)
    busy.send(id="queued", op="cancel")
    (done,) = finals(busy, 1)
    assert (done["id"], done["stop_type"], done["tokens"], done["content"]) == ("queued", "cancelled", [], "")
    busy.send(id="long", op="cancel")
    assert [event["id"] for event in finals(busy, 2)] == ["long", "behind"]


def test_cancel_of_an_unknown_request_is_nothing(worker: Worker) -> None:
    worker.send(id="nobody", op="cancel")
    worker.complete(PROMPT, n_predict=1, id="a")
    worker.send(id="a", op="cancel")
    assert worker.complete(PROMPT, n_predict=1, id="a")["stop_type"] == "limit"


def test_a_deadline_ends_the_running_request(bitnet: Bitnet, endless_model: Path) -> None:
    with started(bitnet, endless_model, "--ctx-size", "32768") as worker:
        done = worker.complete(PROMPT, n_predict=-1, ignore_eos=True, timeout_ms=300)
        assert done["stop_type"] == "deadline"
        assert 0 < done["tokens_predicted"] < 32_000
        assert not done["truncated"]
        at_once = worker.complete(PROMPT + " words" * 10_000, timeout_ms=1)
        assert (at_once["stop_type"], at_once["tokens"], at_once["content"]) == ("deadline", [], "")


def test_a_deadline_ends_a_queued_request_while_another_runs(busy: Worker) -> None:
    busy.send(id="later", op="completion", prompt=PROMPT, n_predict=2, ignore_eos=True, timeout_ms=86_400_000)
    busy.send(id="soon", op="completion", prompt=PROMPT, timeout_ms=1)
    (done,) = finals(busy, 1)
    assert (done["id"], done["stop_type"], done["tokens"]) == ("soon", "deadline", [])
    busy.send(id="long", op="cancel")
    assert [(event["id"], event["stop_type"]) for event in finals(busy, 2)] == [
        ("long", "cancelled"),
        ("later", "limit"),
    ]


def test_an_id_serves_one_request_at_a_time(busy: Worker) -> None:
    busy.send(id="long", op="tokenize", content="x")
    (error,) = finals(busy, 1)
    assert (error["event"], error["id"], error["code"], error["field"]) == ("error", "long", "invalid_request", "id")
    busy.send(id="long", op="cancel")
    (done,) = finals(busy, 1)
    assert done["stop_type"] == "cancelled"
    assert busy.complete(PROMPT, n_predict=1, id="long")["tokens_predicted"] == 1


# lines that are wrong

COMPLETION: Event = {"id": "a", "op": "completion", "prompt": "x", "n_predict": 1}
WRONG_FIELDS: list[tuple[Event, str, str]] = [
    ({"id": None}, "id", "id: must be a string, got null"),
    ({"id": ""}, "id", "id: must have 1 to 128 bytes, got 0"),
    ({"id": "ä" * 65}, "id", "id: must have 1 to 128 bytes, got 130"),
    ({"op": None}, "op", "op: must be a string, got null"),
    ({"op": "complete"}, "op", "op: must be completion, tokenize, detokenize, vocabulary or cancel"),
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
    ({"top_p": 0}, "top_p", "top_p: must be a number above 0.0 and up to 1.0, got 0"),
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
    ({"stop": ["x" * 4097]}, "stop", "stop: a stop string has at most 4096 bytes, got 4097"),
    ({"timeout_ms": 0}, "timeout_ms", "timeout_ms: must be an integer from 1 to 86400000, got 0"),
    ({"timeout_ms": "1"}, "timeout_ms", "got a value of type string"),
    ({"n_predikt": 1}, "n_predikt", "n_predikt: is not a field of this request"),
    ({"content": "x"}, "content", "content: is not a field of this request"),
    ({"op": "tokenize"}, "content", "content: is missing"),
    ({"op": "detokenize"}, "tokens", "tokens: is missing"),
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
    "temperature": st.floats(0, 100),
    "top_k": st.integers(0, 2**31 - 1),
    "top_p": st.floats(0, 1),
    "min_p": st.floats(0, 1),
    "repeat_penalty": st.floats(0, 100),
    "repeat_last_n": st.integers(-1, 2**31 - 1),
    "presence_penalty": st.floats(-100, 100),
    "frequency_penalty": st.floats(-100, 100),
    "seed": st.integers(-1, 2**63 - 1),
    "stop": st.lists(st.text(max_size=4), max_size=5),
    "timeout_ms": st.integers(1, 1000),
} | dict.fromkeys(["add_bos", "special", "chat", "stream", "ignore_eos", "cache_prompt"], st.booleans())
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
    with started(bitnet, demo_model) as worker:
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


@settings(max_examples=300)
@given(asked=REQUESTS)
def test_any_request_ends_with_one_event(asked: Event, shared_worker: Worker) -> None:
    shared_worker.send(**asked, id="a")
    events = events_before_the_next(shared_worker)
    assert {event["id"] for event in events} <= {"a", None}
    *pieces, last = events or [{"event": "none"}]
    assert {piece["event"] for piece in pieces} <= {"token"}
    assert last["event"] in ({"none", "error"} if asked["op"] == "cancel" else {"done", "error"})
    if last["event"] == "done" and asked["op"] == "completion":
        assert not pieces or "".join(piece["content"] for piece in pieces) == last["content"]


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
    finals = [event for event in events if event["event"] != "token"]
    assert len(finals) <= 1
    assert len(finals) == 1 or not line.strip(b" \t\r") or b"cancel" in line


@settings(max_examples=100)
@given(burst=st.lists(st.tuples(st.sampled_from("abc"), REQUESTS), max_size=20))
def test_each_of_many_requests_ends_with_one_event(burst: list[tuple[str, Event]], shared_worker: Worker) -> None:
    """Sent at once, under few ids: some are cancelled, some refused because their id is in use."""
    for name, asked in burst:
        shared_worker.send(**asked, id=name)
    ended = Counter(event["id"] for event in events_before_the_next(shared_worker) if event["event"] != "token")
    sent = Counter(name for name, asked in burst if asked["op"] != "cancel")
    wrong_cancels = sum(asked.keys() != {"op"} for _, asked in burst if asked["op"] == "cancel")
    assert sent <= ended
    assert (ended - sent).total() == wrong_cancels


# its end


def test_standard_input_that_closes_lets_the_queue_finish(bitnet: Bitnet, demo_model: Path) -> None:
    with started(bitnet, demo_model) as worker:
        for i in range(5):
            worker.send(id=str(i), op="completion", prompt=PROMPT, n_predict=50, temperature=0)
        worker.stdin.write(
            b'{"id":"last","op":"completion","prompt":"x","n_predict":50,"ignore_eos":true}'
        )  # its line has no end
        code, stdout, stderr = worker.end()
    events = [json.loads(line) for line in stdout.splitlines()]
    assert (code, stderr) == (0, b"")
    assert [(event["event"], event["id"]) for event in events] == [("done", name) for name in (*"01234", "last")]
    assert {event["tokens_predicted"] for event in events} == {50}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once(number: int, busy: Worker) -> None:
    busy.process.send_signal(number)
    assert busy.process.wait() == 0


def test_it_ends_when_nobody_reads_its_events(bitnet: Bitnet, demo_model: Path, endless_model: Path) -> None:
    with started(bitnet, demo_model) as idle:
        idle.stdout.close()
        assert idle.process.wait() == 0
    with started(bitnet, endless_model, "--ctx-size", "32768") as worker:
        worker.send(id="a", op="completion", prompt=PROMPT, n_predict=-1, ignore_eos=True)
        worker.stdout.close()
        assert worker.process.wait() == 0


# Starts a worker on its own standard input and output, names its process and waits to be killed.
PARENT = """
import subprocess, sys, time
worker = subprocess.Popen(sys.argv[1:])
print(worker.pid, file=sys.stderr, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("state", ["idle", "computing", "input closed"])
def test_it_ends_when_its_parent_dies(state: str, bitnet: Bitnet, endless_model: Path) -> None:
    """Although its pipes stay open at the other end."""
    worker = [str(bitnet.path), "worker", "-m", str(endless_model), "--ctx-size", "32768"]
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", PARENT, *worker], stdin=pipe, stdout=pipe, stderr=pipe) as parent:
        try:
            assert parent.stdin is not None
            assert parent.stdout is not None
            assert parent.stderr is not None
            pid = int(parent.stderr.readline())
            assert json.loads(parent.stdout.readline())["event"] == "ready"
            if state != "idle":
                request = {"id": "a", "op": "completion", "prompt": PROMPT, "n_predict": -1, "ignore_eos": True}
                parent.stdin.write(json.dumps(request).encode() + b"\n")
                parent.stdin.flush()
            if state == "input closed":
                parent.stdin.close()
            ticks = processor_ticks(pid)
            eventually(lambda: state == "idle" or processor_ticks(pid) > ticks + 2)
            assert alive(pid)
            parent.kill()
            eventually(lambda: not alive(pid))
        finally:
            parent.kill()
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_idle_it_uses_no_processor_time(worker: Worker) -> None:
    worker.complete(PROMPT, n_predict=100)
    time.sleep(0.1)
    before = processor_ticks(worker.process.pid)
    time.sleep(1)
    assert processor_ticks(worker.process.pid) - before < 2


def test_nothing_that_is_asked_reaches_standard_error(bitnet: Bitnet, demo_model: Path) -> None:
    secret = "rumpelstiltskin"
    with started(bitnet, demo_model) as worker:
        stderr: list[bytes] = []
        assert worker.process.stderr is not None
        reader = threading.Thread(target=lambda file: stderr.append(file.read()), args=[worker.process.stderr])
        reader.start()
        requests: list[Event] = [
            {"prompt": secret},
            {"prompt": secret * 200},
            {"prompt": "x", "stop": [secret]},
            {"prompt": "x", "temperature": secret},
            {"prompt": [secret]},
            {"op": "tokenize", "content": secret},
            {"op": secret},
        ]
        for request in requests:
            worker.send(**{"id": "a", "op": "completion", "n_predict": 3} | request)
            (final,) = finals(worker, 1)
            assert final["event"] == "done" or secret not in json.dumps(final)
        worker.send_line(secret.encode())
        assert secret not in json.dumps(worker.receive())
        worker.stdin.close()
        assert worker.process.wait() == 0
        reader.join()
    assert stderr == [b""]


def test_ids_are_any_short_string(worker: Worker) -> None:
    for name in ("x" * 128, "ä" * 64, "🐸", "\0", '"\\', string.printable):
        (event,) = worker.ask(id=name, op="tokenize", content="x")
        assert event["id"] == name
