"""The examples of the README do what it says, with the local server as `make run` starts it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import playwright
import pytest

from function.settings import ROOT
from tests.processes import eventually
from tests.server import Server

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
LOCAL = "http://localhost:8080"
NODE = Path(playwright.__file__).parent / "driver" / "node"
CURL = [
    (command.replace("\\\n", ""), answer)
    for block in re.findall(r"^```\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    for command, answer in re.findall(r"^\$ (curl (?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
    if LOCAL in command
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, engine_path: Path) -> Iterator[Server]:
    assert engine_path.exists()
    with Server(tmp_path_factory.mktemp("readme") / "log") as server:
        eventually(lambda: server.health()[0] == 200)
        yield server


def examples(language: str) -> list[str]:
    """Those that ask the local server."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [block for block in blocks if LOCAL in block]


def here(example: str, server: Server) -> str:
    return example.replace(LOCAL, f"http://127.0.0.1:{server.port}")


@pytest.mark.parametrize(("command", "answer"), CURL)
def test_curl(server: Server, command: str, answer: str) -> None:
    """The answers are those of the README, but for times, and for what it leaves out with an ellipsis."""
    result = subprocess.run(["bash", "-c", here(command, server)], capture_output=True, text=True, check=True)
    shown = re.sub(r"\s", "", re.split(r", …|\"timings\"", answer)[0])
    assert shown
    assert re.sub(r"\s", "", result.stdout).startswith(shown)


def test_there_are_examples_for_curl() -> None:
    assert len(CURL) == TEXT.count("$ curl") - TEXT.count("$ curl --aws-sigv4") > 3


def test_python(server: Server) -> None:
    (example,) = examples("python")
    result = subprocess.run([sys.executable, "-c", here(example, server)], capture_output=True, text=True, check=True)
    assert result.stdout


def test_javascript(server: Server) -> None:
    (example,) = examples("js")
    example = here(example, server).replace("stream: true", "stream: true, temperature: 0")
    command = [str(NODE), "--input-type=module", "--eval", example]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    _, answer = server.post({"prompt": "Once upon a time", "n_predict": 40, "temperature": 0})
    assert result.stdout == answer["content"]
