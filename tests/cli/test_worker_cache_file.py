"""The worker's protocol: keys and values of a prompt in a file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.bitnet import Bitnet
from tests.cli.gguf import Gguf
from tests.cli.worker import Event, Worker, started

TEXT = "There was once a miller who was poor, but he had a beautiful daughter. " * 3
LONGER = TEXT + "He told the king"
N_HEADER_BYTES = 32


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "prompt.kv"


@pytest.fixture
def saved(file: Path, worker: Worker) -> Event:
    """`done` of the completion that has written the file."""
    file.parent.mkdir()
    return ask(worker, file, cache_save=True)


@pytest.fixture
def fresh(bitnet: Bitnet, demo_model: Path) -> Iterator[Worker]:
    with started(bitnet, demo_model) as worker:
        yield worker


def ask(worker: Worker, file: Path, prompt: str = TEXT, **fields: object) -> Event:
    return worker.complete(prompt, **{"n_predict": 20, "cache_file": str(file)} | fields)


def test_another_process_goes_on_from_the_file(saved: Event, file: Path, fresh: Worker) -> None:
    assert (saved["cache_file"], saved["tokens_cached"]) == ("saved", 0)
    assert [path.name for path in file.parent.iterdir()] == ["prompt.kv"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    done = ask(fresh, file)
    assert (done["cache_file"], done["tokens_cached"]) == ("restored", saved["tokens_evaluated"] - 1)
    assert done["timings"]["prompt_n"] == 1
    assert done["tokens"] == saved["tokens"]


def test_a_prefix_is_enough_and_the_longest_one_counts(saved: Event, file: Path, fresh: Worker) -> None:
    longer = LONGER
    expected = fresh.complete(longer, n_predict=20, cache_prompt=False)
    assert ask(fresh, file, longer)["cache_file"] == "none"  # it has that already
    assert ask(fresh, file, longer, cache_prompt=False)["cache_file"] == "restored"
    for prompt in (TEXT[:100], longer):
        done = ask(fresh, file, prompt, cache_prompt=False)
        assert 10 < done["tokens_cached"] < done["tokens_evaluated"]
    assert done["tokens"] == expected["tokens"]
    assert done["tokens_cached"] <= saved["tokens_evaluated"]
    assert ask(fresh, file, "Hansel", cache_prompt=False)["tokens_cached"] == 1  # BOS


def test_a_file_is_written_again_only_for_other_tokens(saved: Event, file: Path, fresh: Worker) -> None:
    before = file.stat()
    assert ask(fresh, file, cache_save=True)["cache_file"] == "restored"
    assert ask(fresh, file, cache_save=True)["cache_file"] == "none"
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert ask(fresh, file, LONGER, cache_save=True, cache_prompt=False)["cache_file"] == "restored+saved"
    assert file.stat().st_ino != before.st_ino
    assert ask(fresh, file, LONGER, cache_prompt=False)["tokens_cached"] > saved["tokens_evaluated"] - 1


def test_only_the_first_of_several_completions_uses_it(file: Path, worker: Worker) -> None:
    file.parent.mkdir()
    worker.send(id="a", op="completion", prompt=TEXT, n=3, n_predict=2, cache_file=str(file), cache_save=True)
    done = {event["index"]: event["cache_file"] for event in (worker.receive() for _ in range(3))}
    assert done == {0: "saved", 1: "none", 2: "none"}


@pytest.mark.parametrize(
    "damage",
    [
        "empty",
        "short header",
        "magic",
        "version",
        "model",
        "kv type",
        "tokens",
        "body",
        "last byte",
        "cut",
        "directory",
        "pipe",
    ],
)
def test_a_damaged_file_is_left_aside_and_overwritten(damage: str, saved: Event, file: Path, fresh: Worker) -> None:
    data = bytearray(file.read_bytes())
    at = {"magic": 0, "version": 8, "kv type": 12, "model": 16, "tokens": N_HEADER_BYTES + 4, "body": len(data) // 2}
    if damage in at:
        data[at[damage]] ^= 1
    elif damage == "last byte":
        data[-1] ^= 0x80
    file.write_bytes(data[: {"empty": 0, "short header": 20, "cut": len(data) - 1}.get(damage, len(data))])
    if damage in ("directory", "pipe"):
        file.unlink()
        file.mkdir() if damage == "directory" else os.mkfifo(file)
    done = ask(fresh, file)
    assert (done["cache_file"], done["tokens_cached"]) == ("invalid", 0)
    assert done["tokens"] == saved["tokens"]
    assert ask(fresh, file, cache_save=True, cache_prompt=False)["cache_file"] == "invalid"
    again = ask(fresh, file, cache_prompt=False)
    assert again["cache_file"] == ("restored" if file.is_file() else "invalid")
    assert file.is_fifo() == (damage == "pipe")
    fresh.stdin.close()
    assert fresh.process.stderr is not None
    lines = fresh.process.stderr.read().decode().splitlines()
    assert 2 <= len(lines) <= 4
    assert all(line.startswith(f'bitnet: cache file "{file}" '[:60]) for line in lines)
    assert not any("miller" in line for line in lines)


@pytest.mark.parametrize(("key", "value"), [("rope.freq_base", 2e4), ("attention.layer_norm_rms_epsilon", 0.5)])
def test_a_model_that_computes_otherwise_is_another(
    key: str, value: float, saved: Event, file: Path, bitnet: Bitnet, gguf: Gguf, tmp_path: Path
) -> None:
    gguf.set_float(f"bitnet-b1.58.{key}", value)
    model = tmp_path / "other.gguf"
    model.write_bytes(gguf.data)
    with started(bitnet, model) as worker:
        done = ask(worker, file)
    assert (saved["cache_file"], done["cache_file"], done["tokens_cached"]) == ("saved", "invalid", 0)


def test_a_model_with_other_weights_is_another(
    saved: Event, file: Path, bitnet: Bitnet, demo_model: Path, tmp_path: Path
) -> None:
    """Ternary ones, of which all that has a name and a scale tells nothing: here the second half of the file's."""
    data = bytearray(demo_model.read_bytes())
    half = len(data) // 2
    data[half:] = data[half:].replace(b"\x96", b"\x69")
    model = tmp_path / "other.gguf"
    model.write_bytes(data)
    with started(bitnet, model) as worker:
        done = ask(worker, file)
    assert (saved["cache_file"], done["cache_file"], done["tokens_cached"]) == ("saved", "invalid", 0)


def test_another_cache_type_or_context_does_not_fit(saved: Event, file: Path, bitnet: Bitnet, demo_model: Path) -> None:
    with started(bitnet, demo_model, "--kv-type", "f32") as worker:
        assert ask(worker, file)["cache_file"] == "invalid"
    with started(bitnet, demo_model, "--ctx-size", "20") as worker:
        assert ask(worker, file, "Once upon a time")["cache_file"] == "invalid"
    with started(bitnet, demo_model, "--ctx-size", str(saved["tokens_evaluated"] + 20)) as worker:
        done = ask(worker, file)
        assert (done["cache_file"], done["tokens"]) == ("restored", saved["tokens"])


def test_a_file_that_cannot_be_written_is_no_error(file: Path, fresh: Worker) -> None:
    done = ask(fresh, file, cache_save=True)
    assert (done["cache_file"], done["tokens_predicted"]) == ("none", 20)
    assert not file.parent.exists()
