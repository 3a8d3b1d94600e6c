"""The estimate of a batch's cost, by its command."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from function.settings import ROOT

pytestmark = pytest.mark.usefixtures("engine_path")

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}


def estimate(file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / ".venv/bin/python"), "-m", "infra.batch_estimate", str(file)]
    rates = ["--tokens-per-s", "10", "--prompt-tokens-per-s", "100"]
    return subprocess.run([*command, *rates, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_tokens_time_and_dollars(tmp_path: Path) -> None:
    tale = {"prompt": "Once upon a time", "n_predict": 100}  # 5 tokens
    file = write(tmp_path / "p.jsonl", *[tale] * 120, {"prompt": [1, 2, 3], "n_predict": 0})
    done = estimate(file, "--memory", "1024", "--items", "11", "--concurrency", "3", "--cold-start-s", "7")
    assert done.returncode == 0, done.stderr
    rows = {line[:28].strip(): float(line[28:44].replace(",", "")) for line in done.stdout.splitlines()}
    assert rows["prompts"] == 121
    assert rows["tokens of prompts"] == 603
    assert rows["tokens of answers, at most"] == 12_000
    assert rows["seconds of computing"] == 1206  # 603 / 100 + 12,000 / 10
    assert rows["invocations"] == 11
    # (1206.03 s + 3 cold starts of 7 s) at 1 GB, and 11 invocations
    assert rows["Lambda, 1024 MB"] == pytest.approx(1227.03 * 0.0000166667 + 11 * 0.2e-6, abs=1e-4)
    assert rows["Step Functions"] == pytest.approx(45 * 0.025e-3, abs=1e-4)
    costs = [rows[name] for name in ("Lambda, 1024 MB", "Step Functions", "S3", "CloudWatch Logs")]
    assert rows["together, at most"] == pytest.approx(sum(costs), abs=3e-4)


def test_answers_end_where_the_context_does(tmp_path: Path) -> None:
    endless = {"url": "/v1/chat/completions", "body": {"messages": CHAT["messages"]}}
    done = estimate(write(tmp_path / "p.jsonl", endless))
    rows = {line[:28].strip(): line[28:44].strip() for line in done.stdout.splitlines()}
    assert int(rows["tokens of prompts"]) + int(rows["tokens of answers, at most"]) == 256


def test_lines_that_are_wrong_are_named(tmp_path: Path) -> None:
    lines = [{"prompt": 5}, {"url": "/health", "body": {}}, {"prompt": "tale " * 1000}, {"prompt": "a"}]
    done = estimate(write(tmp_path / "p.jsonl", *lines))
    assert done.returncode == 0  # each has its error in the results
    for said in ("line 1: 'prompt' must be", "line 2: 'url' must be one of", "line 3: the prompt has 1003 tokens"):
        assert said in done.stderr
    assert "line 4" not in done.stderr


@pytest.mark.parametrize(
    ("line", "said"), [('{"prompt"', "not JSON"), (json.dumps({"prompt": "x" * 200_000}), "bytes")]
)
def test_a_line_that_no_batch_takes_fails_all(tmp_path: Path, line: str, said: str) -> None:
    done = estimate(write(tmp_path / "p.jsonl", {"prompt": "a"}, line))
    assert done.returncode == 1
    assert "line 2: " in done.stderr
    assert said in done.stderr


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    done = estimate(tmp_path / "missing.jsonl")
    assert (done.returncode, "is no file" in done.stderr) == (2, True)
    done = estimate(write(tmp_path / "p.jsonl", {"prompt": "a"}), "--items", "0")
    assert (done.returncode, "must be above 0" in done.stderr) == (2, True)
