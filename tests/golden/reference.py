"""The forward pass in numpy, straight from a GGUF file: an opinion beside the engine's and that of transformers.

It reads the file with the `gguf` package and computes what docs/architecture.md says, plainly and slowly. The tests use
it to check files without the engine; in float64 it shows how much of a difference is rounding.
"""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path
from typing import Any, cast
from unittest import mock

import gguf
import numpy as np
import numpy.typing as npt
from gguf import gguf_reader, quants

Array = npt.NDArray[Any]

I2_S = 36
_Types = IntEnum(  # type: ignore[misc]  # the package's types and bitnet.cpp's own
    "_Types", [(kind.name, kind.value) for kind in gguf.GGMLQuantizationType] + [("I2_S", I2_S)]
)


def read_gguf(path: Path) -> gguf.GGUFReader:
    """A GGUF file with I2_S tensors, whose `data` holds the codes only, (rows, inputs/4)."""
    with (
        mock.patch.object(gguf_reader, "GGMLQuantizationType", _Types),
        mock.patch.dict(gguf.GGML_QUANT_SIZES, {cast(gguf.GGMLQuantizationType, I2_S): (4, 1)}),
    ):
        return gguf_reader.GGUFReader(path)


def dequantize(reader: gguf.GGUFReader, tensor: gguf.ReaderTensor) -> tuple[Array, float]:
    """(values, scale): for I2_S the ternary weights (rows, inputs) as int8, for other types float32 and 1."""
    if int(tensor.tensor_type) != I2_S:
        return quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32), 1.0
    rows = tensor.data.shape[0]
    shifts = np.array([6, 4, 2, 0], np.uint8)[:, None]
    codes = tensor.data.reshape(-1, 1, 32) >> shifts & 3
    end = tensor.data_offset + tensor.data.size
    scale = reader.data[end : end + 4].view("<f4")[0]
    return codes.astype(np.int8).reshape(rows, -1) - np.int8(1), float(scale)


class Reference:
    """A model held as numpy arrays; `logits` runs it.

    Afterwards `rounding_margins` (n,) says for each position how close an activation came to a boundary between two
    int8 values, in units of their distance: 0.5 at most, 0 on the boundary.
    """

    def __init__(self, path: Path, dtype: type[np.floating[Any]] = np.float32) -> None:
        reader = read_gguf(path)
        self.dtype = dtype
        self.tensors = {tensor.name: dequantize(reader, tensor) for tensor in reader.tensors}
        self.layers = int(self._key(reader, "block_count"))
        self.heads = int(self._key(reader, "attention.head_count"))
        self.kv_heads = int(self._key(reader, "attention.head_count_kv"))
        self.epsilon = self._key(reader, "attention.layer_norm_rms_epsilon")
        self.theta = self._key(reader, "rope.freq_base")
        self.position_scale = self._key(reader, "rope.scaling.factor", 1.0)  # linear

    @staticmethod
    def _key(reader: gguf.GGUFReader, name: str, default: float | None = None) -> float:
        field = reader.get_field("bitnet-b1.58." + name)
        if field is None and default is not None:
            return default
        assert field is not None, name
        return float(field.contents())

    def logits(self, tokens: list[int]) -> Array:
        """(n,) token ids → (n, vocab) logits, every position attending to itself and those before."""
        embedding = self.tensors["token_embd.weight"][0].astype(self.dtype)
        x = embedding[tokens]
        self.rounding_margins = np.full(len(tokens), 0.5)
        for layer in range(self.layers):
            block = f"blk.{layer}."
            h = self._norm(x, block + "attn_norm")
            q, k, v = (self._linear(h, block + name) for name in ("attn_q", "attn_k", "attn_v"))
            a = self._attention(q, k, v)
            x = x + self._linear(self._norm(a, block + "attn_sub_norm"), block + "attn_output")
            h = self._norm(x, block + "ffn_norm")
            gate = np.maximum(self._linear(h, block + "ffn_gate"), 0)
            h = self._norm(gate * gate * self._linear(h, block + "ffn_up"), block + "ffn_sub_norm")
            x = x + self._linear(h, block + "ffn_down")
        output = self.tensors.get("output.weight", self.tensors["token_embd.weight"])[0].astype(self.dtype)
        logits: Array = self._norm(x, "output_norm") @ output.T
        return logits

    def _norm(self, x: Array, name: str) -> Array:
        mean = np.square(x).mean(axis=-1, keepdims=True, dtype=np.float64)
        normed: Array = x / np.sqrt(mean + self.epsilon).astype(self.dtype)
        normed *= self.tensors[name + ".weight"][0].astype(self.dtype)
        return normed

    def _linear(self, x: Array, name: str) -> Array:
        weights, scale = self.tensors[name + ".weight"]
        s = (127 / np.maximum(np.abs(x).max(axis=-1, keepdims=True), 1e-5).astype(np.float64)).astype(self.dtype)
        scaled = x * s
        margins = np.abs(scaled - np.floor(scaled) - 0.5).min(axis=-1)
        self.rounding_margins = np.minimum(self.rounding_margins, margins)
        q = np.clip(np.rint(scaled), -128, 127)
        sums = q.astype(np.float64) @ weights.T.astype(np.float64)  # exact: integers far below 2⁵³
        product: Array = sums.astype(self.dtype) / s * self.dtype(scale)
        return product

    def _attention(self, q: Array, k: Array, v: Array) -> Array:
        n = len(q)
        q, k, v = (a.reshape(n, -1, q.shape[1] // self.heads).swapaxes(0, 1) for a in (q, k, v))
        q, k = self._rotate(q), self._rotate(k)
        k, v = (np.repeat(a, self.heads // self.kv_heads, axis=0) for a in (k, v))
        scores = q @ k.swapaxes(1, 2) / self.dtype(np.sqrt(q.shape[-1]))
        scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed: Array = weights @ v / weights.sum(axis=-1, keepdims=True)
        return mixed.swapaxes(0, 1).reshape(n, -1)

    def _rotate(self, x: Array) -> Array:
        half = x.shape[-1] // 2
        frequencies = self.theta ** (-np.arange(half, dtype=np.float64) / half)
        angles = np.arange(x.shape[1])[:, None] / self.position_scale * frequencies
        cos, sin = np.cos(angles).astype(self.dtype), np.sin(angles).astype(self.dtype)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
