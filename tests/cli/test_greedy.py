"""The engine's greedy text and transformers' (tests/golden/greedy.json): 64 tokens after each of five prompts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.cli.engine_logits import engine_logits
from tests.golden.cases import Continuation, load_continuations

# Where the two best logits are closer than this, in units of the logits' rms, rounding may choose either: twice the
# largest difference on the demo model that tests/golden/README.md lists.
TIE = 0.03

CONTINUATIONS = load_continuations()


@pytest.mark.parametrize("golden", CONTINUATIONS, ids=lambda golden: golden.prompt.strip())
def test_greedy_text_equals_transformers(golden: Continuation, engine_path: Path, demo_model: Path) -> None:
    command: list[str | Path] = [
        engine_path,
        "generate",
        "--model",
        demo_model,
        "--prompt",
        golden.prompt,
        "--temperature",
        "0",
    ]
    command += ["--n-predict", str(len(golden.tokens)), "--kv-type", "f32", "--json"]
    result = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)

    assert result["tokens_evaluated"] == len(golden.prompt_tokens)
    assert result["tokens"] == golden.tokens
    assert result["content"] == golden.text


@pytest.mark.parametrize("golden", CONTINUATIONS, ids=lambda golden: golden.prompt.strip())
def test_each_step_after_the_same_text_chooses_the_same_token(
    golden: Continuation, engine_path: Path, demo_model: Path, tmp_path: Path
) -> None:
    """Every step is given transformers' tokens so far."""
    tokens = golden.prompt_tokens + golden.tokens
    logits = engine_logits(engine_path, demo_model, tokens[:-1], tmp_path / "logits")[len(golden.prompt_tokens) - 1 :]
    chosen = logits.argmax(axis=-1)
    other = [step for step in range(len(golden.tokens)) if chosen[step] != golden.tokens[step]]
    print(f"{golden.prompt!r}: another token at steps {other}")
    margins, rms = np.array(golden.margins), np.array(golden.rms)
    assert (margins[other] < TIE * rms[other]).all()


def test_there_are_five_prompts_of_64_tokens() -> None:
    assert [len(golden.tokens) for golden in CONTINUATIONS] == [64] * 5
