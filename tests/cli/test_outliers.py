"""The largest logits of a model with an outlier channel, as trained ones have them, and rows that are large there."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType

from bitnet_gguf import ModelShape, TensorSpec, tensor_specs, write_gguf
from synthesize import RandomWeights, make_vocabulary
from tests.cli.bitnet import Bitnet
from tests.cli.worker import Worker, started

SHAPE = ModelShape(
    vocab_size=8000,
    context_length=256,
    embedding_length=2560,
    block_count=1,
    feed_forward_length=128,
    head_count=20,
    head_count_kv=1,
)
CHANNEL, LARGE_ROW = 777, 5000
NORM, WEIGHT = 12.0, 20.0  # of the outlier channel, and of the row there, in units of all others
DEVIATION = 0.04


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("outliers") / "model.gguf"
    others = RandomWeights(seed=3)
    values = np.random.default_rng(3)

    def load(spec: TensorSpec) -> npt.NDArray[Any]:
        if spec.name in ("token_embd.weight", "output.weight"):
            rows = values.normal(0, 1, spec.shape).astype(np.float32)
            if spec.name == "output.weight":
                rows[LARGE_ROW, CHANNEL] += WEIGHT
            else:
                rows[:, CHANNEL] = 1.0
            return (rows * DEVIATION).astype("<f2")
        if spec.name == "output_norm.weight":
            norm = np.ones(spec.shape, "<f4")
            norm[CHANNEL] = NORM
            return norm
        return others.load(spec)

    specs = list(tensor_specs(SHAPE, GGMLQuantizationType.F16, tied=False))
    write_gguf(path, "outliers", SHAPE, make_vocabulary(SHAPE.vocab_size, None), specs, load)
    return path


@pytest.fixture
def settled(bitnet: Bitnet, model: Path) -> Iterator[Worker]:
    """A worker whose weights, and so the sketch of its output matrix, have settled."""
    with started(bitnet, model) as worker:
        for _ in range(40):
            worker.complete([1] * 8, n_predict=2, cache_prompt=False)
        yield worker


def test_what_is_looked_for_is_what_all_logits_give(settled: Worker) -> None:
    numbers = random.Random(1)
    found, wanted = [], []
    for _ in range(100):
        prompt: list[int] = [numbers.randrange(7000) for _ in range(6)]
        found.append(settled.complete(prompt, n_predict=1, ignore_eos=True)["tokens"])
        wanted.append(settled.complete(prompt, n_predict=1, ignore_eos=True, logprobs=True)["tokens"])
    assert found == wanted
    assert [LARGE_ROW] in wanted
