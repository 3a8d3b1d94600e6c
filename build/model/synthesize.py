#!/usr/bin/env python3
"""Write a GGUF of any size with random weights, by default as large as microsoft/bitnet-b1.58-2B-4T-gguf (1.19 GB).

    python build/model/synthesize.py OUTPUT.gguf [--tokenizer-model tokenizer.model] [--layers 30 --hidden 2560 …]

The file has the layout, keys, tensors and size of the real one, so speed and memory can be measured without it; what
the model says means nothing. With Llama 3's tokenizer.model (in the `llama-models` package on PyPI) it has the real
vocabulary too, otherwise a made-up one of the same size.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import sys
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import TokenType

from bitnet_gguf import (
    BYTE_ALPHABET,
    EMBEDDING_TYPES,
    F32,
    I2_S,
    I2_S_TAIL_BYTES,
    Array,
    ModelError,
    ModelShape,
    TensorSpec,
    Vocabulary,
    tensor_specs,
    write_gguf,
)

FULL_SIZE = ModelShape(
    vocab_size=128256,
    context_length=4096,
    embedding_length=2560,
    block_count=30,
    feed_forward_length=6912,
    head_count=20,
    head_count_kv=5,
)
ZEROS = 0.31  # of the weights: what absmean quantisation leaves of a normal distribution
EMBEDDING_DEVIATION = 0.04
ROWS_AT_ONCE = 4096

# Llama 3's, in the order of their ids.
SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
]
LEAST_VOCABULARY = 256 + len(SPECIAL_TOKENS)

# What the published file holds. It is not the template that the model was trained on, and the engine does not use it.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ 'Human: ' + message['content'] + '\\n\\nBITNETAssistant: ' + eos_token }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)


def llama3_vocabulary(path: Path) -> tuple[list[str], list[str]]:
    """(tokens, merges) of a tiktoken file, lines of base64 token and rank.

    A token came from joining two of lower rank; all such pairs are merges, as in transformers' TikTokenConverter.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ModelError(f"{path}: line {number} is not a base64 token and its rank") from error
    by_rank = sorted(ranks, key=ranks.__getitem__)
    merges: list[str] = []
    for token in by_rank:
        parts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [(ranks[a], ranks[b], a, b) for a, b in parts if a in ranks and b in ranks]
        merges += (f"{spell(a)} {spell(b)}" for _, _, a, b in sorted(pairs))
    return [spell(token) for token in by_rank], merges


def spell(token: bytes) -> str:
    """Bytes in the byte-level alphabet."""
    return "".join(BYTE_ALPHABET[byte] for byte in token)


def made_up_vocabulary(n: int) -> tuple[list[str], list[str]]:
    """(tokens, merges): the bytes, then pairs of them, then pairs and a third, up to n tokens."""
    pairs = itertools.product(BYTE_ALPHABET, BYTE_ALPHABET)
    triples = ((a + b, c) for c in BYTE_ALPHABET for a, b in itertools.product(BYTE_ALPHABET, BYTE_ALPHABET))
    joined = list(itertools.islice(itertools.chain(pairs, triples), n - len(BYTE_ALPHABET)))
    return [*BYTE_ALPHABET, *(a + b for a, b in joined)], [f"{a} {b}" for a, b in joined]


def make_vocabulary(size: int, tokenizer_model: Path | None) -> Vocabulary:
    """`size` tokens, the special ones last. Raises ModelError when the size does not suit."""
    if size < LEAST_VOCABULARY:
        raise ModelError(f"--vocab must be at least {LEAST_VOCABULARY} (256 bytes and the special tokens), got {size}")
    n_normal = size - len(SPECIAL_TOKENS)
    tokens, merges = llama3_vocabulary(tokenizer_model) if tokenizer_model else made_up_vocabulary(n_normal)
    if len(tokens) != n_normal:
        raise ModelError(f"--vocab must be {len(tokens) + len(SPECIAL_TOKENS)} with {tokenizer_model}, got {size}")
    return Vocabulary(
        tokens=tokens + SPECIAL_TOKENS,
        types=[TokenType.NORMAL] * n_normal + [TokenType.CONTROL] * len(SPECIAL_TOKENS),
        merges=merges,
        bos=n_normal + SPECIAL_TOKENS.index("<|begin_of_text|>"),
        eos=n_normal + SPECIAL_TOKENS.index("<|end_of_text|>"),
        padding=n_normal + SPECIAL_TOKENS.index("<|end_of_text|>"),
        chat_template=CHAT_TEMPLATE,
    )


def ternary_byte_table() -> npt.NDArray[np.uint8]:
    """65,536 bytes of four I2_S codes: a random one has weights -1 and 1 alike often, and 0 with probability ZEROS."""
    chance = np.array([(1 - ZEROS) / 2, ZEROS, (1 - ZEROS) / 2])
    codes = np.array(list(itertools.product(range(3), repeat=4)))
    # Rounding may leave a few entries out; an all-zero-weight byte fills them.
    counts = np.floor(chance[codes].prod(axis=1) * 2**16).astype(int)
    counts[(codes == 1).all(axis=1)] += 2**16 - counts.sum()
    return np.repeat((codes @ [64, 16, 4, 1]).astype(np.uint8), counts)


class RandomWeights:
    """Each tensor's bytes from the seed and the tensor's name alone."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._table = ternary_byte_table()

    def load(self, spec: TensorSpec) -> Array:
        """The tensor as the file wants it: I2_S, F16 embedding or F32 norm."""
        bits = np.random.PCG64([self._seed, zlib.crc32(spec.name.encode())])
        generator = np.random.Generator(bits)
        if spec.type == I2_S:
            return self._ternary(spec, bits)
        if spec.type == F32:
            norm = 1 + 0.1 * generator.standard_normal(spec.shape)
            return norm.clip(0.3, 2).astype("<f4")
        embedding = np.empty(spec.shape, "<f2")
        for start in range(0, spec.shape[0], ROWS_AT_ONCE):
            rows = embedding[start : start + ROWS_AT_ONCE]
            rows[:] = generator.standard_normal(rows.shape, dtype=np.float32) * np.float32(EMBEDDING_DEVIATION)
        return embedding

    def _ternary(self, spec: TensorSpec, bits: np.random.PCG64) -> npt.NDArray[np.uint8]:
        tensor = np.zeros(spec.n_bytes, np.uint8)
        codes, tail = tensor[:-I2_S_TAIL_BYTES], tensor[-I2_S_TAIL_BYTES:]
        np.take(self._table, bits.random_raw(-(-len(codes) // 4)).view(np.uint16)[: len(codes)], out=codes)
        # A row of n such weights turns a vector of size 1 into a number of size 1.
        scale = 1 / np.sqrt(spec.shape[1] * (1 - ZEROS))
        tail[:4] = np.array([scale], "<f4").view(np.uint8)
        return tensor


def synthesize(output: Path, shape: ModelShape, seed: int = 0, tokenizer_model: Path | None = None) -> None:
    """Write a model of this shape. Raises ModelError when the vocabulary's size does not suit."""
    specs = list(tensor_specs(shape, EMBEDDING_TYPES["f16"]))
    vocabulary = make_vocabulary(shape.vocab_size, tokenizer_model)
    write_gguf(output, "bitnet2b", shape, vocabulary, specs, RandomWeights(seed).load)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write a GGUF with random ternary weights.")
    parser.add_argument("output", type=Path, help="GGUF file to write")
    parser.add_argument(
        "--tokenizer-model", type=Path, help="Llama 3's tokenizer.model; without it a made-up vocabulary"
    )
    sizes = {
        "layers": FULL_SIZE.block_count,
        "hidden": FULL_SIZE.embedding_length,
        "ffn": FULL_SIZE.feed_forward_length,
        "heads": FULL_SIZE.head_count,
        "kv-heads": FULL_SIZE.head_count_kv,
        "vocab": FULL_SIZE.vocab_size,
        "context": FULL_SIZE.context_length,
        "seed": 0,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        shape = ModelShape(
            vocab_size=arguments.vocab,
            context_length=arguments.context,
            embedding_length=arguments.hidden,
            block_count=arguments.layers,
            feed_forward_length=arguments.ffn,
            head_count=arguments.heads,
            head_count_kv=arguments.kv_heads,
        )
        synthesize(arguments.output, shape, arguments.seed, arguments.tokenizer_model)
    except (ModelError, OSError) as error:
        print(f"synthesize: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
