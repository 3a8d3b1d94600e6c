"""The engine's logits beside those of transformers (tests/golden), with keys and values in float32.

Two tolerances, both of the root mean square of a position's difference relative to that of its logits:

- EXACT_TOLERANCE on the leading positions where rounding decides nothing (`n_exact`): what remains is float32
  arithmetic in another order.
- ROUNDING_TOLERANCE elsewhere. Before each matrix activations are rounded to int8; where one lies within a float32
  error of a boundary, two programs round it apart, and that one step moves all logits by about one per cent. It cannot
  be smaller: transformers differs from itself by as much when the same weights are loaded packed instead of as floats,
  and so does the numpy reference in float64. tests/golden/README.md has the figures.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from convert import convert
from tests.cli.engine_logits import engine_logits
from tests.cli.gguf import Gguf
from tests.golden.cases import GoldenLogits, logits_names, relative_rms
from tests.golden.random_models import RANDOM_MODELS, write_checkpoint
from tests.golden.reference import Reference

EXACT_TOLERANCE = 2e-6
ROUNDING_TOLERANCE = 0.05

# The random models' embeddings are such that each of these types holds them without loss.
EMBEDDING_TYPES = {"float32": ["f16", "bf16", "f32", "q8_0"], "bfloat16": ["bf16", "f32"], "float16": ["f16", "f32"]}

ModelPath = Callable[[str, str], Path]


def cases() -> list[tuple[str, str]]:
    """(name of a golden file, element type of the model's embedding)."""
    found = []
    for name in logits_names():
        model = RANDOM_MODELS.get(name.split(".")[0])
        found += [(name, kind) for kind in (EMBEDDING_TYPES[model.torch_dtype] if model else ["f16"])]
    return found


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> ModelPath:
    """The GGUF of a golden file's model, converted once."""
    folder = tmp_path_factory.mktemp("models")

    def find(name: str, embedding_type: str) -> Path:
        model = name.split(".", maxsplit=1)[0]
        if model == "demo":
            return demo_model
        checkpoint, gguf = folder / model, folder / f"{model}.{embedding_type}.gguf"
        if not checkpoint.exists():
            write_checkpoint(RANDOM_MODELS[model], checkpoint)
        if not gguf.exists():
            convert(checkpoint, gguf, embedding_type)
        return gguf

    return find


@pytest.mark.parametrize(("name", "embedding_type"), cases())
def test_logits_agree_with_transformers(
    name: str, embedding_type: str, engine_path: Path, model_path: ModelPath, tmp_path: Path
) -> None:
    golden = GoldenLogits.load(name)
    model = model_path(name, embedding_type)
    logits = engine_logits(engine_path, model, golden.tokens.tolist(), tmp_path / "logits")
    kept = logits[:, :: golden.column_step]
    assert kept.shape == golden.logits.shape

    tolerance = np.where(np.arange(len(logits)) < golden.n_exact, EXACT_TOLERANCE, ROUNDING_TOLERANCE)
    difference = relative_rms(kept - golden.logits, golden.logits)
    exact = difference[: golden.n_exact].max(initial=0)
    print(f"{golden.n_exact} exact to {exact:.1e}, median {np.median(difference):.1e}, largest {difference.max():.1e}")
    assert (difference < tolerance).all(), difference

    rms = np.sqrt(np.square(golden.logits).mean(axis=-1))
    log_sum_exp = np.logaddexp.reduce(logits.astype(np.float64), axis=-1)
    assert (np.abs(log_sum_exp - golden.log_sum_exp) / rms < tolerance).all()
    below_best = logits.max(axis=-1) - logits[np.arange(len(logits)), golden.best]
    assert (below_best / rms < tolerance).all()


SCALING_TYPE, SCALING_FACTOR = "bitnet-b1.58.rope.scaling.type", "bitnet-b1.58.rope.scaling.factor"


def test_positions_are_scaled(engine_path: Path, gguf: Gguf, tmp_path: Path) -> None:
    """As llama.cpp does it: linearly, if nothing else is said. Its converter writes linear scaling by 1."""
    tokens = GoldenLogits.load("demo.story").tokens.tolist()[:40]

    def logits(*keys: tuple[str, str | float]) -> npt.NDArray[np.float32]:
        changed = Gguf(bytearray(gguf.data))
        changed.add_keys(*keys)
        model = tmp_path / "model.gguf"
        model.write_bytes(changed.data)
        return engine_logits(engine_path, model, tokens, tmp_path / "logits")

    plain = logits()
    assert (logits((SCALING_TYPE, "linear"), (SCALING_FACTOR, 1.0)) == plain).all()
    assert (logits((SCALING_TYPE, "none"), (SCALING_FACTOR, 4.0)) == plain).all()
    scaled = logits((SCALING_TYPE, "linear"), (SCALING_FACTOR, 4.0))
    assert (logits((SCALING_FACTOR, 4.0)) == scaled).all()
    expected = Reference(tmp_path / "model.gguf").logits(tokens)
    assert np.median(relative_rms(plain - expected, expected)) > 2 * ROUNDING_TOLERANCE
    assert relative_rms(scaled - expected, expected).max() < ROUNDING_TOLERANCE


def test_golden_files_hold_what_the_tolerances_need() -> None:
    """Each model has positions that must be exact, one past a batch of 128 too, and the demo's context is full once."""
    golden = {name: GoldenLogits.load(name) for name in logits_names()}
    assert all(golden[name].n_exact >= 8 for name in ("demo.story", *(f"{model}.random" for model in RANDOM_MODELS)))
    assert golden["head128-smallest.random"].n_exact > 128
    assert len(golden["demo.context"].tokens) == 256
