"""The engine's logits as an array."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt


def engine_logits(engine: Path, model: Path, tokens: list[int], output: Path) -> npt.NDArray[np.float32]:
    """(n, vocab) from `bitnet logits`."""
    ids = ",".join(map(str, tokens))
    command: list[str | Path] = [
        engine,
        "logits",
        "--model",
        model,
        "--tokens",
        ids,
        "--output",
        output,
        "--kv-type",
        "f32",
    ]
    subprocess.run(command, check=True)
    return np.fromfile(output, "<f4").reshape(len(tokens), -1)
