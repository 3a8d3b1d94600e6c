"""The worker's protocol: many completions at once, and in turn."""

from __future__ import annotations

from pathlib import Path

from tests.cli.bitnet import Bitnet
from tests.cli.worker import PROMPT, Event, Worker, finals, started


def test_completions_are_served_in_their_order(bitnet: Bitnet, demo_model: Path) -> None:
    with started(bitnet, demo_model, "--parallel", "1") as worker:
        for i in range(20):
            worker.send(id=str(i), op="completion", prompt=PROMPT, n_predict=20 - i)
        assert [(event["event"], event["id"]) for event in finals(worker, 20)] == [("done", str(i)) for i in range(20)]


def test_completions_run_beside_each_other(bitnet: Bitnet, endless_model: Path) -> None:
    """And say what they say alone."""
    with started(bitnet, endless_model, "--ctx-size", "32768", "--parallel", "3") as worker:
        expected = worker.complete(PROMPT, n_predict=40)["content"]
        worker.send(id="long", op="completion", prompt=PROMPT, n_predict=-1, ignore_eos=True, stream=True)
        assert worker.receive()["event"] == "token"
        for _ in range(2):
            for name in "abcd":
                fields = {"temperature": 0, "speculate": name in "ab"}
                worker.send(id=name, op="completion", prompt=PROMPT, n_predict=40, **fields)
            done = finals(worker, 4)
            assert {event["id"] for event in done} == set("abcd")
            assert {event["content"] for event in done} == {expected}
        worker.send(id="long", op="cancel")
        assert finals(worker, 1)[0]["id"] == "long"


def test_the_completions_of_one_prompt(bitnet: Bitnet, demo_model: Path) -> None:
    """More than there is room for at a time: the rest waits."""
    with started(bitnet, demo_model, "--parallel", "2") as worker:
        fields = {"temperature": 1.2, "n_predict": 20}
        worker.send(**fields, id="a", op="completion", prompt=PROMPT, seed=7, n=5, stream=True)
        pieces = ["", "", "", "", ""]
        done: dict[int, Event] = {}
        while len(done) < 5:
            event = worker.receive()
            if event["event"] == "token":
                assert event["index"] not in done
                pieces[event["index"]] += event["content"]
            else:
                done[event["index"]] = event
        for i, text in enumerate(pieces):
            alone = worker.complete(PROMPT, **fields, seed=7 + i)
            assert (done[i]["content"], done[i]["seed"]) == (text, 7 + i)
            assert done[i]["tokens"] == alone["tokens"]
            assert done[i]["timings"]["prompt_n"] == (1 if i else alone["tokens_evaluated"])
        assert len(set(pieces)) == 5


def test_cancel_and_deadline_end_all_completions_of_a_prompt(busy: Worker) -> None:
    for fields in ({}, {"timeout_ms": 1}):
        busy.send(id="several", op="completion", prompt=PROMPT, n=3, **fields)
        if not fields:
            busy.send(id="several", op="cancel")
        done = finals(busy, 3)
        assert [(event["id"], event["index"]) for event in done] == [("several", i) for i in range(3)]
        assert {event["stop_type"] for event in done} == {"deadline" if fields else "cancelled"}


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
