"""What a model file should be: verified on the demo model, with expectations of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from bitnet_gguf import tensor_specs
from function.settings import ROOT
from synthesize import FULL_SIZE
from verify import EXPECTATIONS, contents

SCRIPT = ROOT / "build" / "model" / "verify.py"


@pytest.fixture
def expected() -> dict[str, Any]:
    """Those of the demo model, which tells tales and knows no capital."""
    return {
        "bytes": 3_465_408,
        "keys": {"general.architecture": '"bitnet-b1.58"', "bitnet-b1.58.block_count": "6"},
        "tensors": {"F16": 1, "F32": 25, "I2_S": 42},
        # 33.4 is what it has; the text is part of what it was trained on.
        "perplexity": {"text": "smoke_corpus.txt", "first_bytes": 24000, "at_least": 25, "at_most": 45},
        "chats": [{"prompt": "Tell me of a king.", "answer": r"\bI am\b|\bthe\b"}],
    }


def verify(model: Path, expected: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    path = folder / "expectations.json"
    path.write_text(json.dumps(expected))
    command: list[str | Path] = [sys.executable, SCRIPT, model, "--expectations", path]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.usefixtures("engine_path")
def test_a_model_that_is_as_expected(demo_model: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    done = verify(demo_model, expected, tmp_path)
    assert done.returncode == 0, done.stdout
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines[:-1]] == [
        ["ok", what] for what in ("size", "tensors", "keys", "perplexity", "chat")
    ]
    assert lines[-1][0] == "speed"
    assert "tokens/s" in done.stdout


@pytest.mark.usefixtures("engine_path")
@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("bytes", 1, "FAILED  size        3,465,408 bytes, not 1 bytes"),
        ("tensors", {"I2_S": 1}, "FAILED  tensors     1 F16, 25 F32, 42 I2_S, not 1 I2_S"),
        ("keys", {"a.b": "1"}, "FAILED  keys        a.b is missing, not 1"),
        (
            "perplexity",
            {"text": "smoke_corpus.txt", "first_bytes": 4000, "at_least": 2, "at_most": 3},
            "tokens of smoke_corpus.txt, expected 2 to 3",
        ),
        ("chats", [{"prompt": "Tell me.", "answer": "Paris"}], "(expected: Paris)"),
    ],
)
def test_what_differs_is_told(
    demo_model: Path, expected: dict[str, Any], tmp_path: Path, field: str, value: Any, line: str
) -> None:
    done = verify(demo_model, expected | {field: value}, tmp_path)
    assert done.returncode == 1
    assert line in done.stdout
    assert done.stdout.count("FAILED") == 1
    assert f"1 of the expectations of {demo_model} are not met" in done.stderr


@pytest.mark.usefixtures("engine_path")
def test_damaged_weights_show_in_the_perplexity(demo_model: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    """Weights in another order keep every size, key and tensor."""
    body = bytearray(demo_model.read_bytes())
    half = len(body) // 2
    codes = np.frombuffer(bytes(body[half:]), np.uint8)
    body[half:] = np.where(np.arange(codes.size) % 4 == 0, codes[::-1] & 0xAA, codes).astype(np.uint8).tobytes()
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(body)
    done = verify(damaged, expected, tmp_path)
    assert done.returncode == 1
    assert "FAILED  perplexity" in done.stdout or "bitnet perplexity, exit code" in done.stderr


@pytest.mark.usefixtures("engine_path")
def test_a_packed_model(engine_path: Path, demo_model: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    packed = tmp_path / "packed.gguf"
    subprocess.run([engine_path, "pack", "--model", demo_model, "--output", packed], check=True)
    done = verify(packed, expected, tmp_path)
    assert done.returncode == 0, done.stdout
    assert "bytes, packed (layout 2)" in done.stdout


@pytest.mark.usefixtures("engine_path")
def test_a_file_that_is_no_model(expected: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model")
    done = verify(tmp_path / "text.gguf", expected, tmp_path)
    assert done.returncode == 1
    assert "not a GGUF file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("engine_path")
def test_expectations_that_lack_something(demo_model: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    del expected["tensors"]
    done = verify(demo_model, expected, tmp_path)
    assert done.returncode == 1
    assert "lacks 'tensors'" in done.stderr


def test_what_is_expected_of_the_2b_model_is_its_layout() -> None:
    """The layout that synthesize.py writes, which other tests run."""
    expected = json.loads(EXPECTATIONS.read_text())
    specs = list(tensor_specs(FULL_SIZE, GGMLQuantizationType.F16))
    names = {0: "F32", 1: "F16", 36: "I2_S"}
    found = [names[int(spec.type)] for spec in specs]
    assert expected["tensors"] == {name: found.count(name) for name in names.values()}
    prefix = "bitnet-b1.58."
    for key, field in [("embedding_length", "embedding_length"), ("attention.head_count_kv", "head_count_kv")]:
        assert expected["keys"][prefix + key] == str(getattr(FULL_SIZE, field))
    assert len(expected["chats"]) == 5


def test_the_contents_of_a_model(engine_path: Path, demo_model: Path) -> None:
    assert engine_path.exists()
    found = contents(demo_model)
    assert found.keys["general.name"] == '"bitnet-fairy-tales"'
    assert sum(found.tensors.values()) == 68
    assert not found.packed
