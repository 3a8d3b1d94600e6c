#!/usr/bin/env python3
"""Find out whether a model file is what it should be, and whether the engine understands it on this machine.

    python build/model/verify.py MODEL.gguf [--expectations FILE.json]

One line for each of: size, number of tensors of each type, keys, perplexity on a bundled text, answers of a chat,
speed. Exit code 0: all is as expected. What is expected of microsoft/bitnet-b1.58-2B-4T-gguf is in expectations.json
beside this file. The band of its perplexity is no measurement but what any sound model of its size stays within on
*Alice in Wonderland*: damaged weights or a defective kernel give hundreds, up to the size of the vocabulary.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint import PipelineError, exit_code_of

HERE = Path(__file__).resolve().parent
EXPECTATIONS = HERE / "expectations.json"
CHAT_TOKENS = 48
PACK_VERSION_KEY = "bitnet.pack.version"


@dataclass(frozen=True)
class Finding:
    """One line of the report; `right` is None for what is only told."""

    right: bool | None
    what: str
    text: str

    def __str__(self) -> str:
        mark = {True: "ok", False: "FAILED", None: ""}[self.right]
        return f"{mark:6}  {self.what:10}  {self.text}"


@dataclass(frozen=True)
class Contents:
    """What `bitnet info` tells: keys as it spells their values, and the number of tensors of each type."""

    keys: Mapping[str, str]
    tensors: Mapping[str, int]

    @property
    def packed(self) -> bool:
        """Whether `bitnet pack` has written it."""
        return PACK_VERSION_KEY in self.keys


def engine(*arguments: str | Path) -> str:
    """What the engine prints. Raises PipelineError with its own line where it fails."""
    path = Path(os.environ.get("BITNET_CLI") or HERE.parent / "out" / "bitnet")
    if not path.exists():
        raise PipelineError(f"{path} does not exist: make cli builds the engine")
    done = subprocess.run([path, *arguments], capture_output=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().split("\n")
        raise PipelineError(f"{lines[-1]} (bitnet {arguments[0]}, exit code {done.returncode})")
    return done.stdout.decode()


def contents(model: Path) -> Contents:
    """Raises PipelineError where it is no GGUF file."""
    listing = engine("info", model).split("\n\n")
    keys = dict(re.findall(r"^  (\S+) +(.+)$", listing[1], re.MULTILINE))
    types = re.findall(r"^  \S+ +(\S+) .* bytes$", listing[2], re.MULTILINE)
    return Contents(keys, collections.Counter(types))


def perplexity(model: Path, text: Path, first_bytes: int) -> tuple[float, int]:
    """The perplexity of the beginning of a text, and how many tokens it has."""
    with tempfile.NamedTemporaryFile(suffix=".txt") as beginning:
        beginning.write(text.read_bytes()[:first_bytes].decode(errors="ignore").encode())
        beginning.flush()
        result = json.loads(engine("perplexity", "--model", model, "--file", beginning.name, "--json"))
    return result["perplexity"], result["tokens"]


def verify(model: Path, expected: Mapping[str, Any]) -> Iterator[Finding]:
    """Compares the file, and what the engine makes of it, with what is expected; the fast parts come first."""
    found = contents(model)
    size = model.stat().st_size
    if found.packed:
        yield Finding(None, "size", f"{size:,} bytes, packed (layout {found.keys[PACK_VERSION_KEY]})")
    else:
        yield _compare("size", f"{size:,} bytes", f"{expected['bytes']:,} bytes")
        yield _compare("tensors", _census(found.tensors), _census(expected["tensors"]))
    wrong = [
        f"{name} is {found.keys.get(name, 'missing')}, not {value}"
        for name, value in expected["keys"].items()
        if found.keys.get(name) != value
    ]
    yield Finding(not wrong, "keys", "; ".join(wrong) or f"{len(expected['keys'])} of {len(found.keys)} compared")
    yield _judge_perplexity(model, expected["perplexity"])
    for chat in expected["chats"]:
        yield _judge_answer(model, chat["prompt"], chat["answer"])
    yield _speed(model)


def _compare(what: str, found: str, expected: str) -> Finding:
    return Finding(found == expected, what, found if found == expected else f"{found}, not {expected}")


def _census(tensors: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(tensors.items()))


def _judge_perplexity(model: Path, expected: Mapping[str, Any]) -> Finding:
    value, tokens = perplexity(model, HERE / expected["text"], expected["first_bytes"])
    low, high = expected["at_least"], expected["at_most"]
    text = f"{value:.2f} on {tokens:,} tokens of {expected['text']}, expected {low} to {high}"
    return Finding(low <= value <= high, "perplexity", text)


def _judge_answer(model: Path, prompt: str, pattern: str) -> Finding:
    options = ["--chat", "--json", "--temperature", "0", "--n-predict", str(CHAT_TOKENS)]
    answer = json.loads(engine("generate", "--model", model, "--prompt", prompt, *options))["content"].strip()
    right = re.search(pattern, answer, re.IGNORECASE) is not None
    one_line = " ".join(answer.split())
    return Finding(right, "chat", f"{prompt} → {one_line}" + ("" if right else f"  (expected: {pattern})"))


def _speed(model: Path) -> Finding:
    sizes = ["--prompt-tokens", "128", "--predict-tokens", "32", "--repetitions", "3"]
    result = json.loads(engine("bench", "--model", model, *sizes, "--json"))
    prompt, generation = (round(result[f"{name}_tokens_per_second"], 1) for name in ("prefill", "decode"))
    where = f"{result['threads']} threads, {result['isa']}"
    return Finding(None, "speed", f"{generation:,} tokens/s, of the prompt {prompt:,} tokens/s ({where})")


def main() -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Verify a model file.")
    parser.add_argument("model", type=Path, help="GGUF file, as downloaded or packed")
    parser.add_argument("--expectations", type=Path, default=EXPECTATIONS, help="JSON; default: those of the 2B model")
    arguments = parser.parse_args()
    return exit_code_of(lambda: _report(arguments.model, arguments.expectations))


def _report(model: Path, expectations: Path) -> None:
    """Prints every finding. Raises PipelineError where there is a wrong one, or the expectations cannot be read."""
    try:
        expected = json.loads(expectations.read_text())
    except ValueError as error:
        raise PipelineError(f"{expectations}: {error}") from error
    wrong = 0
    try:
        for finding in verify(model, expected):
            wrong += finding.right is False
            print(finding, flush=True)
    except KeyError as error:
        raise PipelineError(f"{expectations} lacks {error}") from error
    if wrong:
        raise PipelineError(f"{wrong} of the expectations of {model} are not met")


if __name__ == "__main__":
    sys.exit(main())
