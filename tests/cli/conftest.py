"""The engine, as a command and as a worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.bitnet import Bitnet
from tests.cli.gguf import Gguf
from tests.cli.worker import PROMPT, Worker, started


@pytest.fixture(scope="session")
def bitnet(engine_path: Path) -> Bitnet:
    return Bitnet(engine_path)


@pytest.fixture
def worker(bitnet: Bitnet, demo_model: Path) -> Iterator[Worker]:
    """One that must have nothing to say on standard error, and end well."""
    with started(bitnet, demo_model) as worker:
        yield worker
        if worker.process.poll() is None:
            assert worker.end() == (0, b"", b"")


@pytest.fixture
def busy(bitnet: Bitnet, endless_model: Path) -> Iterator[Worker]:
    """One that computes tens of thousands of tokens for request `long`, the first of which have come, and no other
    completion beside it."""
    with started(bitnet, endless_model, "--ctx-size", "32768", "--parallel", "1") as worker:
        worker.send(id="long", op="completion", prompt=PROMPT, n_predict=-1, ignore_eos=True, stream=True)
        assert worker.receive()["event"] == "token"
        yield worker


@pytest.fixture
def gguf(demo_model: Path) -> Gguf:
    return Gguf(bytearray(demo_model.read_bytes()))
