"""The worker's protocol (docs/worker-protocol.md): what a completion gives."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
import termios
import threading
from pathlib import Path

import pytest

from tests.cli.bitnet import Bitnet
from tests.cli.worker import PROMPT, Event, Worker, started
from tests.processes import eventually


def test_ready_says_what_is_served(bitnet: Bitnet, demo_model: Path) -> None:
    options = ("--ctx-size", "100", "--threads", "3", "--parallel", "3", "--isa", "scalar", "--kv-type", "f32")
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
        "n_parallel": 3,
        "threads": 3,
        "isa": "scalar",
        "kv_type": "f32",
        "bos": special[0],
        "eot": special[2],
        "eos": sorted(special[1:]),
        "add_bos": True,
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
        "index": 0,
        "content": expected["content"],
        "tokens": expected["tokens"],
        "stop_type": "limit",
        "stopping_word": "",
        "tokens_predicted": 20,
        "tokens_evaluated": expected["tokens_evaluated"],
        "tokens_cached": 0,
        "cache_file": "none",
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
    chat = worker.complete(" \x1c\u3000Hi\u00a0\u2028\x85\n", chat=True, n_predict=12)
    assert (chat["tokens"], chat["tokens_evaluated"]) == (spelled["tokens"], spelled["tokens_evaluated"])
    assert worker.complete("User: Hi<|eot_id|>Assistant: ", n_predict=0)["tokens_evaluated"] > chat["tokens_evaluated"]


def test_the_vocabulary_is_every_token_as_it_is_written(worker: Worker) -> None:
    (done,) = worker.ask(op="vocabulary")
    tokens = [bytes.fromhex(token) for token in done["tokens"]]
    assert len(tokens) == worker.ready["model"]["n_vocab"]
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
    worker.send(id="two", op="completion", prompt=PROMPT, n_predict=1, n=2, seed=2**63 - 1)
    assert sorted(worker.receive()["seed"] for _ in range(2)) == [0, 2**63 - 1]  # both may be asked for again


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
