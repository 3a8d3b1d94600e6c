"""`bitnet worker` as a child: requests in, events out."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tests.cli.bitnet import Bitnet

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


def finals(worker: Worker, n: int) -> list[Event]:
    """The next n events that end a request, or one of its completions."""
    events = (worker.receive() for _ in itertools.count())
    return list(itertools.islice((event for event in events if event["event"] != "token"), n))
