"""The worker's protocol: how the process lives and ends."""

from __future__ import annotations

import json
import os
import signal
import string
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.cli.bitnet import Bitnet
from tests.cli.worker import PROMPT, Event, Worker, finals, started
from tests.processes import alive, eventually, processor_ticks


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


def test_it_ends_when_it_has_no_standard_input(bitnet: Bitnet, demo_model: Path) -> None:
    command = ["sh", "-c", 'exec "$@" <&-', "sh", str(bitnet.path), "worker", "-m", str(demo_model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.read())["event"] == "ready"
        assert process.wait() == 0


def test_a_model_that_becomes_shorter_ends_it_with_a_word(bitnet: Bitnet, demo_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(demo_model.read_bytes())
    with started(bitnet, model) as worker:
        os.truncate(model, 4096)
        worker.send(id="a", op="completion", prompt=PROMPT)
        code, _, stderr = worker.end()
    assert (code, stderr) == (5, b"bitnet: a file became shorter, or unreadable, while it was in use\n")


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
