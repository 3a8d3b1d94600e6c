"""Downloads with the hub's real client from a local server that speaks its protocol (tests/model/hub.py)."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint import BITNET_2B, PipelineError, refuse_others
from function.settings import ROOT
from tests.model.hub import COMMIT, Hub
from tests.processes import eventually

SCRIPT = ROOT / "build" / "model" / "download.py"
REPOSITORY, FILE = "someone/bitnet-tales-gguf", "tales.gguf"
BODY = random.Random(5).randbytes(24_000_000)
BLOCK = 10 * 2**20  # what the client writes at once
TOKEN = "hf_aSecretThatNobodyMaySee"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(REPOSITORY, FILE, BODY) as server:
        yield server


def command(models: Path, *options: str) -> list[str | Path]:
    return [sys.executable, SCRIPT, "--directory", models, "--repository", REPOSITORY, "--file", FILE, *options]


def environment(hub: Hub, home: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home / "home"),
        "HF_TOKEN": TOKEN,
    } | {
        "TQDM_POSITION": "-1"  # a progress bar without a terminal
    }


def download(hub: Hub, tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(tmp_path / "models", *options),
        env=environment(hub, tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert TOKEN not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "models").glob("*") if not path.name.startswith("."))


def test_the_file_its_licence_and_its_source(hub: Hub, tmp_path: Path) -> None:
    done = download(hub, tmp_path, "--revision", COMMIT)
    assert done.returncode == 0
    assert (tmp_path / "models" / FILE).read_bytes() == BODY
    assert left(tmp_path) == [FILE, f"{FILE}.source.json"]
    assert f"{REPOSITORY} at {COMMIT}: {FILE}, 24,000,000 bytes, licence mit" in done.stderr
    assert "100%" in done.stderr  # the progress bar
    source = json.loads((tmp_path / "models" / f"{FILE}.source.json").read_text())
    assert (source["repository"], source["revision"], source["licence"]) == (REPOSITORY, COMMIT, "mit")


def test_again_asks_the_hub_nothing(hub: Hub, tmp_path: Path) -> None:
    download(hub, tmp_path)
    hub.requests.clear()
    done = download(hub, tmp_path)
    assert done.returncode == 0
    assert "is there, SHA-256 " in done.stderr
    assert hub.requests == []


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: Hub, tmp_path: Path) -> None:
    download(hub, tmp_path)
    assert [request.token for request in hub.requests if REPOSITORY in request.path] == 3 * [f"Bearer {TOKEN}"]
    assert [request.token for request in hub.bytes_requests] == [None]


def test_a_broken_connection_is_taken_up_again(hub: Hub, tmp_path: Path) -> None:
    hub.cut_after = [BLOCK + 1000]
    assert download(hub, tmp_path).returncode == 0
    assert (tmp_path / "models" / FILE).read_bytes() == BODY
    first, second = hub.bytes_requests
    assert first.range is None
    assert second.range is not None


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_download_goes_on_where_it_was(hub: Hub, tmp_path: Path, blow: signal.Signals) -> None:
    hub.hold_after = BLOCK + 1_000_000
    process = subprocess.Popen(command(tmp_path / "models"), env=environment(hub, tmp_path), stderr=subprocess.DEVNULL)
    assert hub.held.wait(60)
    eventually(lambda: [path.stat().st_size for path in (tmp_path / "models").glob(".*.part")] == [BLOCK])
    process.send_signal(blow)
    assert process.wait(60) == (130 if blow == signal.SIGINT else -signal.SIGKILL)
    assert left(tmp_path) == []
    hub.hold_after = None
    hub.resume.set()
    hub.requests.clear()
    assert download(hub, tmp_path).returncode == 0
    assert (tmp_path / "models" / FILE).read_bytes() == BODY
    assert [request.range for request in hub.bytes_requests] == [f"bytes={BLOCK}-"]


def test_what_is_there_of_it_is_not_asked_for_again(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    part = tmp_path / "models" / f".{FILE}.{hashlib.sha256(BODY).hexdigest()[:16]}.part"
    part.write_bytes(BODY[:1_234_567])
    done = download(hub, tmp_path)
    assert (tmp_path / "models" / FILE).read_bytes() == BODY
    assert "going on after 1,234,567 bytes" in done.stderr
    assert [request.range for request in hub.bytes_requests] == ["bytes=1234567-"]


def test_bytes_that_differ_from_their_checksum_are_thrown_away(hub: Hub, tmp_path: Path) -> None:
    hub.sha256 = "ab" * 32
    done = download(hub, tmp_path)
    assert done.returncode == 1
    assert f"{FILE} is corrupted: its SHA-256 is " in done.stderr
    assert f"it must be {hub.sha256}" in done.stderr
    assert list((tmp_path / "models").iterdir()) == []


def test_another_checksum_than_the_pinned_one_is_refused_before_the_download(hub: Hub, tmp_path: Path) -> None:
    done = download(hub, tmp_path, "--sha256", "cd" * 32)
    assert done.returncode == 1
    assert f"the SHA-256 of {FILE} must be {'cd' * 32}, the hub says " in done.stderr
    assert hub.bytes_requests == []


def test_another_revision_than_the_pinned_one_is_not_there(hub: Hub, tmp_path: Path) -> None:
    done = download(hub, tmp_path, "--revision", "b" * 40)
    assert done.returncode == 1
    assert REPOSITORY in done.stderr
    assert hub.bytes_requests == []


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_hub_that_refuses(hub: Hub, tmp_path: Path, status: int) -> None:
    hub.status = status
    done = download(hub, tmp_path)
    assert done.returncode == 1
    assert f"{REPOSITORY}, {FILE}: " in done.stderr
    assert str(status) in done.stderr


def test_another_file_of_that_name_is_left_alone(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / FILE).write_bytes(b"mine")
    for options in ([], ["--sha256", "ab" * 32]):
        done = download(hub, tmp_path, *options)
        assert done.returncode == 1
        assert "Move it away" in done.stderr
    assert (tmp_path / "models" / FILE).read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repository", "nobody"], "--repository must be owner/name, got 'nobody'"),
        (["--sha256", "123"], "--sha256 must be 64 hexadecimal digits, got '123'"),
    ],
)
def test_wrong_options_are_told(hub: Hub, tmp_path: Path, options: list[str], message: str) -> None:
    done = download(hub, tmp_path, *options)
    assert done.returncode == 1
    assert message in done.stderr
    assert hub.requests == []


def test_an_architecture_that_the_engine_does_not_have_is_refused_before_the_download(hub: Hub, tmp_path: Path) -> None:
    hub.architecture = "llama"
    done = download(hub, tmp_path)
    assert done.returncode == 1
    assert "its architecture must be one of bitnet-b1.58, bitnet-25, bitnet, it is llama" in done.stderr
    assert hub.bytes_requests == []


@pytest.mark.parametrize(
    "repository",
    [
        "1bitLLM/bitnet_b1_58-large",
        "1bitLLM/bitnet_b1_58-3B",
        "tiiuae/Falcon-E-3B-Instruct",
        "tiiuae/Falcon3-7B-Instruct-1.58bit",
        "HF1BitLLM/Llama3-8B-1.58-100B-tokens",
    ],
)
def test_other_ternary_models_are_refused_by_name(hub: Hub, tmp_path: Path, repository: str) -> None:
    done = download(hub, tmp_path, "--repository", repository)
    assert done.returncode == 1
    assert f"{repository} is not supported: it" in done.stderr
    assert f"The engine runs {BITNET_2B.repository}" in done.stderr
    assert hub.requests == []


def test_what_the_engine_runs_is_not_refused() -> None:
    for repository in (BITNET_2B.repository, "someone/my-bitnet-finetune-gguf"):
        refuse_others(repository, "bitnet-b1.58")
    with pytest.raises(PipelineError, match="is not supported"):
        refuse_others("someone/finetune", "qwen3")
