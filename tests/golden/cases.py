"""The golden files of this folder as values: what write_golden.py computes and the tests compare with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FOLDER = Path(__file__).parent
LOGITS_FOLDER = FOLDER / "logits"
GREEDY_FILE = FOLDER / "greedy.json"


@dataclass(frozen=True, eq=False)
class GoldenLogits:
    """Logits of transformers for one sequence of n tokens."""

    made_by: str
    tokens: npt.NDArray[np.int32]  # (n,)
    logits: npt.NDArray[np.float32]  # (n, vocab / column_step): every column_step-th logit
    column_step: int
    log_sum_exp: npt.NDArray[np.float64]  # (n,) over the whole vocabulary
    best: npt.NDArray[np.int32]  # (n,) the token of the largest logit
    spread: npt.NDArray[np.float32]  # (n,) how far the numpy reference is from these logits: relative rms
    n_exact: int  # leading positions where rounding decides nothing: see write_golden.py

    def save(self, name: str) -> None:
        np.savez_compressed(LOGITS_FOLDER / f"{name}.npz", **vars(self))

    @classmethod
    def load(cls, name: str) -> GoldenLogits:
        with np.load(LOGITS_FOLDER / f"{name}.npz") as file:
            return cls(**{key: value if value.ndim else value.item() for key, value in file.items()})


@dataclass(frozen=True)
class Continuation:
    """What transformers says after a prompt when it always takes the best token."""

    prompt: str
    text: str
    prompt_tokens: list[int]  # with the beginning of text
    tokens: list[int]
    margins: list[float]  # by how much each token's logit is above the second best
    rms: list[float]  # of the logits at each step


def logits_names() -> list[str]:
    """`MODEL.SEQUENCE` of each golden file."""
    return sorted(path.stem for path in LOGITS_FOLDER.glob("*.npz"))


def save_continuations(made_by: str, continuations: list[Continuation]) -> None:
    lines = ",\n".join(json.dumps(asdict(continuation)) for continuation in continuations)
    GREEDY_FILE.write_text(f'{{"made_by": {json.dumps(made_by)}, "continuations": [\n{lines}\n]}}\n', encoding="utf-8")


def load_continuations() -> list[Continuation]:
    content = json.loads(GREEDY_FILE.read_text(encoding="utf-8"))
    return [Continuation(**continuation) for continuation in content["continuations"]]


def relative_rms(difference: npt.NDArray[Any], of: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(n, vocab) twice → (n,): the root mean square of a difference, in units of the other's."""
    difference, of = difference.astype(np.float64), of.astype(np.float64)
    ratio: npt.NDArray[np.float64] = np.sqrt(np.square(difference).mean(axis=-1) / np.square(of).mean(axis=-1))
    return ratio
