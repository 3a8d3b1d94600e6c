"""What all tests of the function share: the real engine, the demo model, S3 on a socket."""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from function.settings import ROOT, Settings
from tests.s3 import S3

ENGINE = ROOT / "build" / "out" / "bitnet"
DEMO_MODEL = ROOT / "build" / "model" / "demo" / "model.gguf"


hypothesis.settings.register_profile("default", deadline=None)  # machines differ
hypothesis.settings.load_profile("default")

# A shell's `… &` ignores it, and whoever is started inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting or credential of the machine reaches a test."""
    for name in list(os.environ):
        if name.startswith("AWS_") or name in {field.upper() for field in Settings.__dataclass_fields__}:
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def engine_path() -> Path:
    assert ENGINE.exists(), "build the engine first: make cli"
    return ENGINE


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return DEMO_MODEL


@pytest.fixture(scope="session")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a context of 32,768 tokens: its sense ends at 256, but it computes for about a minute."""
    model = DEMO_MODEL.read_bytes()
    value = model.index(b"bitnet-b1.58.context_length") + len(b"bitnet-b1.58.context_length") + 4  # after a u32 of type
    assert model[value - 4 : value + 4] == struct.pack("<II", 4, 256)
    path = tmp_path_factory.mktemp("models") / "endless.gguf"
    path.write_bytes(model[:value] + struct.pack("<I", 32_768) + model[value + 4 :])
    return path


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    """One S3 for the whole run; `s3` is its fresh state."""
    with S3() as server:
        yield server


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """S3 with an empty bucket; this process and its children find it and may use it."""
    s3_server.reset()
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server
