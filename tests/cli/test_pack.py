"""`bitnet pack`: the same bits from fewer bytes."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from bitnet_gguf import ModelShape
from convert import convert
from synthesize import synthesize
from tests.cli.bitnet import Bitnet
from tests.golden.random_models import RANDOM_MODELS, RandomModel, write_checkpoint

TOKENS = ",".join(str(token) for token in (1, 7, 200, 31, 299, 5, 5, 64))

# Rows of whole units of five blocks (640), of units and a rest (768 and 896), and of less than a unit.
WIDE = RandomModel(11, 400, 640, 768, 2, 5, 1)
MODELS = RANDOM_MODELS | {"wide": WIDE, "wider": RandomModel(12, 333, 896, 1280, 1, 7, 7, tie_word_embeddings=False)}


def logits(bitnet: Bitnet, model: Path, output: Path, *options: str) -> bytes:
    bitnet("logits", "--model", model, "--tokens", TOKENS, "--output", output, *options)
    return output.read_bytes()


def data_start(gguf: bytes, tensor_infos: int) -> int:
    """Where the data section begins; `tensor_infos`: where the keys end."""
    (n_tensors,) = struct.unpack_from("<Q", gguf, 8)
    at = tensor_infos
    for _ in range(n_tensors):
        at += 8 + int.from_bytes(gguf[at : at + 8], "little")  # name
        at += 4 + 8 * int.from_bytes(gguf[at : at + 4], "little") + 4 + 8  # dimensions, type, offset
    return -(-at // 32) * 32


@pytest.mark.parametrize("name", MODELS)
def test_logits_have_the_bits_of_a_file_with_the_same_output_matrix(bitnet: Bitnet, tmp_path: Path, name: str) -> None:
    write_checkpoint(MODELS[name], tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "f32.gguf", "f32")
    convert(tmp_path / "checkpoint", tmp_path / "q8_0.gguf", "q8_0")
    expected = logits(bitnet, tmp_path / "q8_0.gguf", tmp_path / "logits")
    for source in ("q8_0", "f32"):  # taken over as it is, and quantised by ourselves
        packed = tmp_path / f"{source}.packed.gguf"
        bitnet("pack", "--model", tmp_path / f"{source}.gguf", "--output", packed)
        for options in ((), ("--isa", "scalar"), ("--isa", "avx2", "--threads", "1"), ("--batch-size", "3")):
            assert logits(bitnet, packed, tmp_path / "logits", *options) == expected


def test_six_bits_are_close(bitnet: Bitnet, tmp_path: Path) -> None:
    write_checkpoint(WIDE, tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "f32.gguf", "f32")
    exact = np.frombuffer(logits(bitnet, tmp_path / "f32.gguf", tmp_path / "logits"), np.float32)
    bitnet("pack", "--model", tmp_path / "f32.gguf", "--output", tmp_path / "6.gguf", "--output-bits", 6)
    difference = np.frombuffer(logits(bitnet, tmp_path / "6.gguf", tmp_path / "logits"), np.float32) - exact
    assert 0 < np.sqrt(np.mean(difference**2)) < 0.06 * np.sqrt(np.mean(exact**2))


def test_text_is_that_of_the_whole_output_matrix(bitnet: Bitnet, tmp_path: Path, demo_model: Path) -> None:
    """A penalty that is too small to change a logit makes the engine take the exact path."""
    packed = tmp_path / "packed.gguf"
    bitnet("pack", "--model", demo_model, "--output", packed)
    for sampling in (("--temperature", 0), ("--seed", 3), ("--seed", 4, "--top-k", 100, "--temperature", 1.5)):
        common = ("generate", "--model", packed, "--prompt", "Once upon a time", "--n-predict", 200, *sampling)
        exact = bitnet(*common, "--presence-penalty", 1e-30)
        assert bitnet(*common) == exact


def test_sizes_and_checksums(bitnet: Bitnet, tmp_path: Path) -> None:
    shape = ModelShape(
        vocab_size=2000,
        context_length=64,
        embedding_length=1280,
        block_count=6,
        feed_forward_length=3456,
        head_count=10,
        head_count_kv=2,
    )
    synthesize(tmp_path / "model.gguf", shape)
    bitnet("pack", "--model", tmp_path / "model.gguf", "--output", tmp_path / "packed.gguf")
    original, packed = (tmp_path / "model.gguf").read_bytes(), (tmp_path / "packed.gguf").read_bytes()
    ternary = 6 * (1280 * (1280 * 2 + 256 * 2) + 3 * 1280 * 3456)
    assert len(original) - len(packed) > ternary * (1 / 4 - 1 / 4.8) + 2000 * 1280 * 0.9

    information = bitnet("info", tmp_path / "packed.gguf").decode()
    assert "TRITS" in information
    assert "bitnet.pack.chunk_crc32" in information
    key = packed.index(b"bitnet.pack.chunk_crc32") + len(b"bitnet.pack.chunk_crc32")
    n = int.from_bytes(packed[key + 8 : key + 16], "little")
    sums = np.frombuffer(packed, "<u4", n, key + 16)
    chunk = 8 << 20
    data = data_start(packed, key + 16 + 4 * n)
    assert [zlib.crc32(packed[start : start + chunk]) for start in range(data, len(packed), chunk)] == sums.tolist()


def test_what_cannot_be_packed(bitnet: Bitnet, tmp_path: Path, demo_model: Path) -> None:
    packed = tmp_path / "packed.gguf"
    bitnet("pack", "--model", demo_model, "--output", packed)
    assert "is packed already" in bitnet.error("pack", "--model", packed, "--output", tmp_path / "again.gguf")[1]
    assert bitnet.error("pack", "--model", demo_model, "--output", tmp_path / "no" / "such.gguf")[0] == 4
    assert bitnet.error("pack", "--model", demo_model, "--output", packed, "--output-bits", 5)[0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed.gguf"]
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):  # nothing but a file is ever replaced
        code, message = bitnet.error("pack", "--model", demo_model, "--output", tmp_path / name)
        assert (code, message) == (4, f"{tmp_path / name}: cannot be written: not a regular file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "packed.gguf", "pipe"]
