"""The estimate of a batch's cost, by its command."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from function import batch
from function.api import Call
from function.handler import application
from function.settings import ROOT
from infra import batch_estimate

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
    chat = "/v1/chat/completions"
    lines = [
        ({"prompt": 5}, "'prompt' must be"),
        ({"url": "/health", "body": {}}, "'url' must be one of"),
        ({"prompt": "tale " * 1000}, "the prompt has 1003 tokens, at most 255 fit into the context of 256"),
        ({"prompt": "a", "top_p": 7}, "'top_p' must be from 0 to 1, got 7"),
        ({"prompt": "a", "colour": "red"}, 'unknown field "colour"'),
        ({"url": chat, "body": CHAT | {"n": 99}}, "'n' must be from 1 to 16, got 99"),
        ({"url": chat, "body": CHAT | {"model": "gpt"}}, 'there is no model "gpt"'),
        ({"prompt": "a", "json_schema": {"type": "nothing"}}, "'json_schema'"),
    ]
    done = estimate(write(tmp_path / "p.jsonl", *(line for line, _ in lines), {"prompt": "a"}))
    assert done.returncode == 0  # each has its error in the results
    for (number, (_, said)), line in zip(enumerate(lines, 1), done.stderr.splitlines(), strict=True):
        assert line.startswith(f"line {number}: {said}")


def test_tokens_are_those_that_the_api_counts(tmp_path: Path) -> None:
    """Answers are as long as they may be: 16 tokens of /v1/completions, unless it is told."""
    tool = {"type": "function", "function": {"name": "weather"}}
    lines = [
        ({"url": "/v1/completions", "body": {"prompt": "Once upon a time", "n": 2, "best_of": 3}}, 48),
        ({"url": "/v1/completions", "body": {"prompt": ["Once upon a time", 5], "max_tokens": 2, "n": 2}}, 4),
        ({"url": "/v1/chat/completions", "body": CHAT}, 5),
        ({"url": "/v1/chat/completions", "body": CHAT | {"tools": [tool]}}, 5),
    ]
    file = write(tmp_path / "p.jsonl", *(line for line, _ in lines))
    application.cache_clear()
    parts = application()
    try:
        for read, (item, answer) in zip(batch_estimate.read(file, parts), lines, strict=True):
            reply = parts.api.http(batch.http_event(*batch.route(item)), Call("1"), trusted=True)
            prompt = json.loads(str(reply["body"]))["usage"]["prompt_tokens"]
            assert (read.problem, read.prompt_tokens, read.answer_tokens) == ("", prompt, answer)
    finally:
        parts.engine.stop()
        application.cache_clear()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt"', "not JSON"),
        (json.dumps({"prompt": "x" * 200_000}), "bytes"),
        ("[" * 5000 + "]" * 5000, "not JSON"),
    ],
)
@pytest.mark.parametrize("others", [[], [{"prompt": "a"}]])
def test_a_line_that_no_batch_takes_fails_all(tmp_path: Path, line: str, said: str, others: list[Any]) -> None:
    done = estimate(write(tmp_path / "p.jsonl", *others, line))
    assert done.returncode == 1
    assert f"line {len(others) + 1}: " in done.stderr
    assert said in done.stderr
    assert "1 lines are such that" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_longest_prompt_is_what_the_function_takes(tmp_path: Path) -> None:
    """A context of 256 has room for 255 tokens and one of the answer, or for 256 if none is asked for."""
    full = [5] * 256
    done = estimate(
        write(tmp_path / "p.jsonl", {"prompt": full[:-1]}, {"prompt": full}, {"prompt": full, "n_predict": 0})
    )
    rows = {line[:28].strip(): line[28:44].strip() for line in done.stdout.splitlines()}
    assert (rows["prompts"], rows["lines that are refused"], rows["tokens of answers, at most"]) == ("2", "1", "1")
    assert done.stderr == "line 2: the prompt has 256 tokens, at most 255 fit into the context of 256\n"


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    done = estimate(tmp_path / "missing.jsonl")
    assert (done.returncode, "is no file" in done.stderr) == (2, True)
    done = estimate(write(tmp_path / "p.jsonl", {"prompt": "a"}), "--items", "0")
    assert (done.returncode, "must be above 0" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("name", "value", "said"), [("THREADS", "x", "'THREADS' must be"), ("MODEL_PATH", "none.gguf", "none.gguf")]
)
def test_what_the_engine_cannot_be_started_with_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    done = estimate(write(tmp_path / "p.jsonl", {"prompt": "a"}))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("batch-estimate: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
