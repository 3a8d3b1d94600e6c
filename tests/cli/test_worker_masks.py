"""The worker's protocol: constrained decoding. The tests answer its mask events."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tests.cli.worker import PROMPT, Event, Worker, finals

N_VOCAB = 4096


def bitmap(tokens: Iterable[int]) -> str:
    bits = bytearray(N_VOCAB // 8)
    for token in tokens:
        bits[token // 8] |= 1 << token % 8
    return base64.b64encode(bits).decode()


def drive(worker: Worker, answer: Callable[[int, list[int]], Event], **fields: Any) -> dict[int, Event]:
    """The `done` events by index; `answer` gets (index, tokens so far) and gives the fields of `mask`."""
    request = {"op": "completion", "prompt": PROMPT, "temperature": 0, "n_predict": 30, "mask": True}
    worker.send(id="m", **(request | fields))
    drawn: dict[int, list[int]] = {}
    done: dict[int, Event] = {}
    while len(done) < fields.get("n", 1):
        event = worker.receive()
        assert event["id"] == "m"
        if event["event"] == "mask":
            index = event["index"]
            assert (index in drawn) == bool(event["tokens"])
            drawn.setdefault(index, []).extend(event["tokens"])
            worker.send(op="mask", id="m", index=index, **answer(index, drawn[index]))
        elif event["event"] == "done":
            done[event["index"]] = event
            known = drawn[event["index"]]
            assert event["tokens"][: len(known)] == known
        else:
            assert event["event"] == "token"
    return done


def test_a_mask_of_everything_changes_nothing(worker: Worker) -> None:
    for fields in ({}, {"temperature": 1.2, "seed": 3}, {"top_k": 0, "temperature": 1.5, "seed": 4}):
        expected = worker.complete(PROMPT, n_predict=30, **fields)["tokens"]
        for answer in ({"allow": None}, {"allow": bitmap(range(N_VOCAB))}):
            masked = drive(worker, lambda _index, _tokens, answer=answer: answer, **fields)  # type: ignore[misc]
            assert masked[0]["tokens"] == expected


@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 2, "seed": 1}, {"top_k": 0, "temperature": 9, "seed": 1}, {"repeat_penalty": 1.3}]
)
def test_only_what_a_mask_allows_is_drawn(fields: Event, worker: Worker) -> None:
    def answer(_index: int, tokens: list[int]) -> Event:
        return {"allow": bitmap(range(100 + len(tokens), 4000, 97))}

    done = drive(worker, answer, **fields)[0]
    assert done["tokens_predicted"] == 30
    assert all(token in range(100 + i, 4000, 97) for i, token in enumerate(done["tokens"]))


def test_a_single_allowed_token_is_the_text(worker: Worker) -> None:
    text = worker.tokenize(" a pattern, letter for letter")
    done = drive(worker, lambda _, tokens: {"allow": bitmap([text[len(tokens)]])}, n_predict=len(text), stream=True)
    assert done[0]["content"] == " a pattern, letter for letter"


def test_forced_tokens_are_taken_without_a_choice_and_computed_like_any(worker: Worker) -> None:
    forced = worker.tokenize(" once more, said the wolf,")
    expected = worker.complete(worker.tokenize(PROMPT, add_bos=True) + forced, n_predict=10)["tokens"]

    def answer(_index: int, tokens: list[int]) -> Event:
        return {"allow": None} if tokens else {"forced": forced}

    done = drive(worker, answer, n_predict=len(forced) + 10)[0]
    assert done["tokens"] == forced + expected
    assert done["tokens_predicted"] == len(forced) + 10
    assert done["content"].startswith(" once more, said the wolf,")


def test_the_end_is_where_the_mask_says(worker: Worker) -> None:
    done = drive(worker, lambda _, tokens: {"stop": True} if len(tokens) == 4 else {"allow": None}, ignore_eos=True)[0]
    assert (done["stop_type"], done["tokens_predicted"]) == ("eos", 4)
    eos = worker.ready["eos"]
    done = drive(worker, lambda _, tokens: {"allow": bitmap(eos if len(tokens) == 3 else range(1000))})[0]
    assert (done["stop_type"], done["tokens_predicted"]) == ("eos", 4)
    assert done["tokens"][3] in eos
    assert not set(eos) & set(range(1000))


def test_every_completion_of_a_prompt_has_its_own_masks(worker: Worker) -> None:
    done = drive(worker, lambda index, _: {"allow": bitmap(range(index * 500, index * 500 + 500))}, n=8)
    for index in range(8):
        assert all(token // 500 == index for token in done[index]["tokens"])


def test_who_waits_for_a_mask_blocks_nobody(worker: Worker) -> None:
    expected = worker.complete(PROMPT, n_predict=20)["tokens"]
    worker.send(id="slow", op="completion", prompt=PROMPT, n_predict=20, temperature=0, mask=True)
    assert worker.receive() == {"event": "mask", "id": "slow", "index": 0, "tokens": []}
    for _ in range(20):
        assert worker.complete(PROMPT, n_predict=20, id="other")["tokens"] == expected
        worker.send(op="mask", id="slow", allow=None)
        event = worker.receive()
    assert event["event"] == "done"
    assert event["tokens"] == expected


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_who_waits_for_a_mask_can_be_ended(how: str, worker: Worker) -> None:
    timeout = {"timeout_ms": 200} if how == "deadline" else {}
    worker.send(id="m", op="completion", prompt=PROMPT, mask=True, **timeout)
    assert worker.receive()["event"] == "mask"
    if how == "cancel":
        worker.send(id="m", op="cancel")
    (done,) = finals(worker, 1)
    assert (done["stop_type"], done["tokens"]) == ({"cancel": "cancelled"}.get(how, how), [])
    worker.send(id="m", op="mask", allow=None)  # too late: nothing
    assert worker.complete(PROMPT, n_predict=1)["tokens_predicted"] == 1


def test_input_that_closes_ends_who_waits_for_a_mask(worker: Worker) -> None:
    worker.send(id="m", op="completion", prompt=PROMPT, mask=True)
    assert worker.receive()["event"] == "mask"
    worker.stdin.close()
    error = worker.receive()
    assert (error["event"], error["id"], error["field"]) == ("error", "m", "mask")
    assert worker.process.wait() == 0


WRONG_ANSWERS: list[tuple[Event, str, str]] = [
    ({}, "allow", "allow: is missing"),
    ({"allow": 1}, "allow", "allow: must be null or a string, got 1"),
    ({"allow": ""}, "allow", "allow: must be null or 684 characters of base64, 512 bytes, got 0 characters"),
    ({"allow": "?" * 684}, "allow", "allow: must be base64, got another character"),
    ({"allow": bitmap([])}, "allow", "allow: no token may be drawn"),
    ({"allow": None, "index": 1}, "index", "index: completion 1 has not begun"),
    ({"allow": None, "index": 16}, "index", "index: must be an integer from 0 to 15, got 16"),
    ({"forced": [N_VOCAB]}, "forced", "forced: token ids are integers from 0 to 4095, got 4096"),
    ({"forced": []}, "allow", "allow: is missing"),
    ({"stop": 1}, "stop", "stop: must be true or false, got 1"),
    ({"allow": None, "other": 1}, "other", "other: is not a field of this request"),
]


@pytest.mark.parametrize(("answer", "field", "says"), WRONG_ANSWERS, ids=lambda value: str(value)[:30])
def test_a_wrong_answer_ends_the_request(answer: Event, field: str, says: str, worker: Worker) -> None:
    worker.send(id="m", op="completion", prompt=PROMPT, mask=True)
    assert worker.receive()["event"] == "mask"
    worker.send(id="m", op="mask", **answer)
    error = worker.receive()
    assert (error["event"], error["id"], error["code"], error["field"]) == ("error", "m", "invalid_request", field)
    assert error["message"] == says
    assert worker.complete(PROMPT, id="m", n_predict=1)["tokens_predicted"] == 1


def test_an_answer_for_nobody_is_nothing(worker: Worker) -> None:
    worker.send(id="nobody", op="mask", allow=None)
    assert worker.complete(PROMPT, n_predict=1)["tokens_predicted"] == 1
