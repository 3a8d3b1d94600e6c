"""The file that the engine reads: GGUF v3 in the layout of microsoft/bitnet-b1.58-2B-4T-gguf (ggml-model-i2_s.gguf).

Keys, tensor names and I2_S packing live here, once; `convert.py` fills them from a checkpoint, `synthesize.py` from a
random generator. The `gguf` package writes the container.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, TokenType, quants

ARCHITECTURE = "bitnet-b1.58"
FILE_TYPE_I2_S = 40  # bitnet.cpp's LLAMA_FTYPE_MOSTLY_I2_S
QUANTIZATION_VERSION = 2

BLOCK = 128  # weights in one I2_S block of 32 bytes; a row is a whole number of blocks
I2_S_TAIL_BYTES = 32  # float32 scale and padding after the codes
# ggml's number for I2_S. The `gguf` package does not name this type, which is bitnet.cpp's own, but writes any number.
I2_S = cast(GGMLQuantizationType, 36)
F32 = GGMLQuantizationType.F32

EMBEDDING_TYPES = {
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "f32": GGMLQuantizationType.F32,
    "q8_0": GGMLQuantizationType.Q8_0,
}

SCORE_NORMAL, SCORE_CONTROL = 0.0, -1000.0


def _byte_alphabet() -> tuple[str, ...]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


# GPT-2's spelling of bytes: printable ones as they are, the others (space is Ġ) by the characters from U+0100 on.
BYTE_ALPHABET = _byte_alphabet()

Array = npt.NDArray[Any]


class ModelError(ValueError):
    """The input cannot become a BitNet GGUF; the message names the field or tensor, what it must be and what it is."""


@dataclass(frozen=True)
class ModelShape:
    """Hyperparameters of a BitNet b1.58 transformer. Raises ModelError when the engine could not run them."""

    vocab_size: int
    context_length: int
    embedding_length: int
    block_count: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    rms_epsilon: float = 1e-5
    rope_theta: float = 500000.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ModelError(f"{name} must be positive, got {value}")
        for name in ("embedding_length", "feed_forward_length"):
            if (value := getattr(self, name)) % BLOCK:
                raise ModelError(f"{name} must be a multiple of {BLOCK}, the weights in a block of I2_S, got {value}")
        if self.embedding_length % self.head_count:
            raise ModelError(f"head_count must divide embedding_length {self.embedding_length}, got {self.head_count}")
        if self.head_count % self.head_count_kv:
            raise ModelError(f"head_count_kv must divide head_count {self.head_count}, got {self.head_count_kv}")
        if self.head_dim % 2:
            raise ModelError(f"the head dimension must be even (rotary embedding turns pairs), got {self.head_dim}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embedding_length // self.head_count

    @property
    def kv_length(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.head_dim * self.head_count_kv


@dataclass(frozen=True)
class Vocabulary:
    """Byte-level BPE: token `i` is spelled `tokens[i]` in GPT-2's byte alphabet, control tokens as they are."""

    tokens: Sequence[str]
    types: Sequence[TokenType]
    merges: Sequence[str]  # "left right", in order of rank
    bos: int
    eos: int
    padding: int
    eot: int | None = None
    pre_tokenizer: str | None = None  # "llama-bpe"; Microsoft's file leaves it out
    chat_template: str | None = None


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the file: `shape` is (rows, inputs) or (length,), slowest dimension first."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def n_bytes(self) -> int:
        """Size in the file, without the padding to the next tensor."""
        n = int(np.prod(self.shape, dtype=np.int64))
        if self.type == I2_S:
            return n // 4 + I2_S_TAIL_BYTES
        block_elements, block_bytes = GGML_QUANT_SIZES[self.type]
        return n // block_elements * block_bytes


def tensor_specs(shape: ModelShape, embedding_type: GGMLQuantizationType, *, tied: bool = True) -> Iterator[TensorSpec]:
    """All tensors of a model, in the order of the file. `tied`: the embedding is the output matrix too."""
    d, ff, kv = shape.embedding_length, shape.feed_forward_length, shape.kv_length
    yield TensorSpec("token_embd.weight", (shape.vocab_size, d), embedding_type)
    for layer in range(shape.block_count):
        block = f"blk.{layer}."
        yield TensorSpec(block + "attn_norm.weight", (d,), F32)
        yield TensorSpec(block + "attn_q.weight", (d, d), I2_S)
        yield TensorSpec(block + "attn_k.weight", (kv, d), I2_S)
        yield TensorSpec(block + "attn_v.weight", (kv, d), I2_S)
        yield TensorSpec(block + "attn_sub_norm.weight", (d,), F32)
        yield TensorSpec(block + "attn_output.weight", (d, d), I2_S)
        yield TensorSpec(block + "ffn_norm.weight", (d,), F32)
        yield TensorSpec(block + "ffn_gate.weight", (ff, d), I2_S)
        yield TensorSpec(block + "ffn_up.weight", (ff, d), I2_S)
        yield TensorSpec(block + "ffn_sub_norm.weight", (ff,), F32)
        yield TensorSpec(block + "ffn_down.weight", (d, ff), I2_S)
    yield TensorSpec("output_norm.weight", (d,), F32)
    if not tied:
        yield TensorSpec("output.weight", (shape.vocab_size, d), embedding_type)


def pack_i2_s(ternary: Array, scale: float) -> npt.NDArray[np.uint8]:
    """I2_S, x86 layout: int8 {-1, 0, 1} of any shape (a multiple of 128 in all) and their scale → n/4 + 32 bytes.

    In each block of 128, byte p holds weights p, p+32, p+64, p+96 as codes w+1, the first in the highest bit pair.
    Source: quantize_i2_s() in microsoft/BitNet, src/ggml-bitnet-mad.cpp.
    """
    codes = (ternary.reshape(-1, 4, BLOCK // 4) + 1).astype(np.uint8)
    packed = (codes[:, 0] << 6 | codes[:, 1] << 4 | codes[:, 2] << 2 | codes[:, 3]).reshape(-1)
    tail = np.zeros(I2_S_TAIL_BYTES, np.uint8)
    tail[:4] = np.frombuffer(np.array(scale, "<f4").tobytes(), np.uint8)
    return np.concatenate([packed, tail])


def encode_rows(rows: npt.NDArray[np.float32], kind: GGMLQuantizationType) -> Array:
    """Float32 rows (n, inputs) in one of EMBEDDING_TYPES. Raises ModelError when float16 overflows."""
    if kind == GGMLQuantizationType.Q8_0:
        return quants.quantize(rows, kind)
    if kind == GGMLQuantizationType.F32:
        return rows.astype("<f4", copy=False)
    if kind == GGMLQuantizationType.BF16:
        return rows.astype(ml_dtypes.bfloat16).view(np.uint16)
    if np.abs(rows).max(initial=0) > np.finfo(np.float16).max:
        raise ModelError(f"embedding value {np.abs(rows).max():g} is beyond float16; use --embedding-type bf16")
    return rows.astype("<f2")


def write_gguf(
    path: Path,
    name: str,
    shape: ModelShape,
    vocabulary: Vocabulary,
    specs: Sequence[TensorSpec],
    load: Callable[[TensorSpec], Array],
) -> None:
    """Write a model tensor by tensor; `load` gives each one when its turn comes. A failure leaves no file behind."""
    temporary = path.with_name(path.name + ".part")
    writer = GGUFWriter(temporary, ARCHITECTURE)
    try:
        _add_keys(writer, name, shape, vocabulary)
        for spec in specs:
            # int8 stands for "bytes as they come": the package would take uint8 as a shape in quantised blocks.
            writer.add_tensor_info(spec.name, spec.shape, np.dtype(np.int8), spec.n_bytes, raw_dtype=spec.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for spec in specs:
            data = load(spec)
            if data.nbytes != spec.n_bytes:
                raise ModelError(f"{spec.name}: {data.nbytes} bytes, the layout wants {spec.n_bytes}")
            writer.write_tensor_data(data)
        writer.close()
        temporary.replace(path)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)


def _add_keys(writer: GGUFWriter, name: str, shape: ModelShape, vocabulary: Vocabulary) -> None:
    """Metadata in the order of Microsoft's file; general.architecture comes from the writer."""
    prefix = ARCHITECTURE + "."
    scores = [SCORE_CONTROL if kind == TokenType.CONTROL else SCORE_NORMAL for kind in vocabulary.types]
    writer.add_string("general.name", name)
    writer.add_uint32(prefix + "vocab_size", shape.vocab_size)
    writer.add_uint32(prefix + "context_length", shape.context_length)
    writer.add_uint32(prefix + "embedding_length", shape.embedding_length)
    writer.add_uint32(prefix + "block_count", shape.block_count)
    writer.add_uint32(prefix + "feed_forward_length", shape.feed_forward_length)
    writer.add_uint32(prefix + "rope.dimension_count", shape.head_dim)
    writer.add_uint32(prefix + "attention.head_count", shape.head_count)
    writer.add_uint32(prefix + "attention.head_count_kv", shape.head_count_kv)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_float32(prefix + "attention.layer_norm_rms_epsilon", shape.rms_epsilon)
    writer.add_float32(prefix + "rope.freq_base", shape.rope_theta)
    writer.add_uint32("general.file_type", FILE_TYPE_I2_S)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    if vocabulary.pre_tokenizer is not None:
        writer.add_string("tokenizer.ggml.pre", vocabulary.pre_tokenizer)
    writer.add_array("tokenizer.ggml.tokens", vocabulary.tokens)
    writer.add_array("tokenizer.ggml.scores", scores)
    writer.add_array("tokenizer.ggml.token_type", [int(kind) for kind in vocabulary.types])
    writer.add_array("tokenizer.ggml.merges", vocabulary.merges)
    writer.add_uint32("tokenizer.ggml.bos_token_id", vocabulary.bos)
    writer.add_uint32("tokenizer.ggml.eos_token_id", vocabulary.eos)
    writer.add_uint32("tokenizer.ggml.padding_token_id", vocabulary.padding)
    if vocabulary.eot is not None:
        writer.add_uint32("tokenizer.ggml.eot_token_id", vocabulary.eot)
    if vocabulary.chat_template is not None:
        writer.add_string("tokenizer.chat_template", vocabulary.chat_template)
    writer.add_uint32("general.quantization_version", QUANTIZATION_VERSION)
