"""`bitnet pack`: the same bits from fewer bytes."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import gguf
import numpy as np
import pytest

from bitnet_gguf import ModelShape
from build.bench.bench import files
from convert import convert
from function.settings import ROOT
from synthesize import synthesize
from tests.cli.bitnet import Bitnet
from tests.golden.random_models import RANDOM_MODELS, RandomModel, write_checkpoint
from tests.golden.reference import read_gguf

TOKENS = ",".join(str(token) for token in (1, 7, 200, 31, 299, 5, 5, 64))

# Rows of whole units of five blocks (640), of units and a rest (768 and 896), and of less than a unit.
WIDE = RandomModel(11, 400, 640, 768, 2, 5, 1)
WIDE_Q6_K = RandomModel(13, 400, 768, 768, 2, 6, 1)  # whose rows are multiples of 256
MODELS = RANDOM_MODELS | {"wide": WIDE, "wider": RandomModel(12, 333, 896, 1280, 1, 7, 7, tie_word_embeddings=False)}


def logits(bitnet: Bitnet, model: Path, output: Path, *options: str, tokens: str = TOKENS) -> bytes:
    bitnet("logits", "--model", model, "--tokens", tokens, "--output", output, *options)
    return output.read_bytes()


def checksums(packed: bytes) -> tuple[list[int], int]:
    """The CRC-32 of each chunk, and where this last key of the header ends."""
    key = packed.index(b"bitnet.pack.chunk_crc32") + len(b"bitnet.pack.chunk_crc32")
    n = int.from_bytes(packed[key + 8 : key + 16], "little")
    return np.frombuffer(packed, "<u4", n, key + 16).tolist(), key + 16 + 4 * n


def data_start(packed: bytes) -> int:
    """Where the data section begins."""
    (n_tensors,) = struct.unpack_from("<Q", packed, 8)
    _, at = checksums(packed)
    for _ in range(n_tensors):
        at += 8 + int.from_bytes(packed[at : at + 8], "little")  # name
        at += 4 + 8 * int.from_bytes(packed[at : at + 4], "little") + 4 + 8  # dimensions, type, offset
    return -(-at // 32) * 32


def place_of(packed: bytes, name: str) -> int:
    """Where a tensor's data begins in a packed file, whose types gguf's reader does not know."""
    at = packed.index(name.encode(), checksums(packed)[1]) + len(name)
    n_dims = int.from_bytes(packed[at : at + 4], "little")
    return data_start(packed) + int.from_bytes(packed[at + 8 + 8 * n_dims :][:8], "little")


def tensor_of(path: Path, name: str) -> gguf.ReaderTensor:
    return next(tensor for tensor in read_gguf(path).tensors if tensor.name == name)


def embedding(path: Path) -> gguf.ReaderTensor:
    return tensor_of(path, "token_embd.weight")


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


def test_eight_bits_are_those_of_ggml(bitnet: Bitnet, tmp_path: Path) -> None:
    """Of the gguf package, which quantises as ggml does."""
    write_checkpoint(WIDE, tmp_path / "checkpoint")
    for name in ("f32", "q8_0"):
        convert(tmp_path / "checkpoint", tmp_path / f"{name}.gguf", name)
        bitnet("pack", "--model", tmp_path / f"{name}.gguf", "--output", tmp_path / f"{name}.packed.gguf")
    expected = embedding(tmp_path / "q8_0.gguf").data.tobytes()
    for name in ("f32", "q8_0"):  # quantised by ourselves, and taken over as it is
        packed = (tmp_path / f"{name}.packed.gguf").read_bytes()
        assert packed[data_start(packed) :].startswith(expected)


def test_six_bits_are_close(bitnet: Bitnet, tmp_path: Path) -> None:
    """By the gguf package's decoder, and by ours."""
    write_checkpoint(WIDE_Q6_K, tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "f32.gguf", "f32")
    bitnet("pack", "--model", tmp_path / "f32.gguf", "--output", tmp_path / "6.gguf", "--output-bits", 6)
    weights = embedding(tmp_path / "f32.gguf").data
    packed = (tmp_path / "6.gguf").read_bytes()
    n_rows, n_columns = weights.shape
    row_bytes = n_columns // 256 * 210
    rows = np.frombuffer(packed, np.uint8, n_rows * row_bytes, data_start(packed)).reshape(n_rows, row_bytes)
    difference = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.Q6_K) - weights
    assert 0 < np.sqrt(np.mean(difference**2)) < 0.018 * np.sqrt(np.mean(weights**2))

    exact = np.frombuffer(logits(bitnet, tmp_path / "f32.gguf", tmp_path / "logits"), np.float32)
    difference = np.frombuffer(logits(bitnet, tmp_path / "6.gguf", tmp_path / "logits"), np.float32) - exact
    assert 0 < np.sqrt(np.mean(difference**2)) < 0.06 * np.sqrt(np.mean(exact**2))


def test_six_bits_that_are_there_are_kept(bitnet: Bitnet, tmp_path: Path) -> None:
    write_checkpoint(WIDE_Q6_K, tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "f32.gguf", "f32")
    bitnet("pack", "--model", tmp_path / "f32.gguf", "--output", tmp_path / "6.gguf", "--output-bits", 6)
    packed = (tmp_path / "6.gguf").read_bytes()
    (tmp_path / "q6_k.gguf").write_bytes(packed.replace(b"bitnet.pack.", b"another.key."))  # not taken for packed
    bitnet("pack", "--model", tmp_path / "q6_k.gguf", "--output", tmp_path / "again.gguf", "--output-bits", 6)
    again = (tmp_path / "again.gguf").read_bytes()
    assert again[data_start(again) :] == packed[data_start(packed) :]


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
    sums, _ = checksums(packed)
    chunk = 8 << 20
    assert len(sums) > 1
    assert [zlib.crc32(packed[at : at + chunk]) for at in range(data_start(packed), len(packed), chunk)] == sums


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


def test_a_file_that_another_process_packs_is_left_to_it(bitnet: Bitnet, tmp_path: Path, demo_model: Path) -> None:
    packed = tmp_path / "packed.gguf"
    part = tmp_path / "packed.gguf.part"
    part.write_bytes(b"half of it")
    with part.open("rb+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        code, message = bitnet.error("pack", "--model", demo_model, "--output", packed)
        assert (code, message) == (4, f"{packed}: cannot be written: another process is writing it")
        assert part.read_bytes() == b"half of it"
    bitnet("pack", "--model", demo_model, "--output", packed)  # what an ended process has left is in nobody's way
    bitnet("pack", "--model", demo_model, "--output", tmp_path / "again.gguf")
    assert packed.read_bytes() == (tmp_path / "again.gguf").read_bytes()
    assert not part.exists()


def test_rows_that_six_bits_do_not_take(bitnet: Bitnet, tmp_path: Path) -> None:
    write_checkpoint(WIDE, tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "f32.gguf", "f32")
    code, message = bitnet.error("pack", "-m", tmp_path / "f32.gguf", "-o", tmp_path / "6.gguf", "--output-bits", 6)
    assert code == 8
    assert "tensor token_embd.weight has rows of 640 weights; 6 bits take multiples of 256" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "f32.gguf"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("token_embd.weight", "has a weight that is not finite, or too large for its scale"),
        ("blk.1.attn_output.weight", "has a code that stands for no weight"),
    ],
)
def test_weights_that_cannot_be_packed(bitnet: Bitnet, tmp_path: Path, name: str, says: str) -> None:
    """They are found when some of the file may be written, of which nothing stays."""
    model = tmp_path / "model.gguf"
    write_checkpoint(WIDE, tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", model, "f32")
    damaged = bytearray(model.read_bytes())
    start = tensor_of(model, name).data_offset
    damaged[start : start + 4] = b"\xff\xff\xff\xff"  # NaN, and codes 3
    model.write_bytes(damaged)
    code, message = bitnet.error("pack", "--model", model, "--output", tmp_path / "packed.gguf")
    assert (code, message) == (9, f"{model}: tensor {name} {says}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "model.gguf"]


def test_a_damaged_model_computes_the_same_everywhere(bitnet: Bitnet, tmp_path: Path) -> None:
    """Codes, or bytes of trits, that stand for no weight: whatever they come to, it does not depend on the kernel."""
    model, packed = tmp_path / "model.gguf", tmp_path / "packed.gguf"
    write_checkpoint(WIDE, tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", model, "f32")
    bitnet("pack", "--model", model, "--output", packed)
    tokens = ",".join(str(token) for token in range(1, 71))
    for path in (model, packed):
        damaged = bytearray(path.read_bytes())
        for name in ("blk.0.ffn_down.weight", "blk.1.attn_q.weight"):
            start = place_of(bytes(damaged), name) if path == packed else tensor_of(path, name).data_offset
            damaged[start + 100 : start + 300] = b"\xff" * 200
        path.write_bytes(damaged)
        expected = logits(bitnet, path, tmp_path / "logits", "--isa", "scalar", "--batch-size", "7", tokens=tokens)
        for size in ("1", "16", "17", "256"):
            for n_threads in ("1", "2"):
                options = ("--batch-size", size, "--threads", n_threads)
                assert logits(bitnet, path, tmp_path / "logits", *options, tokens=tokens) == expected, options


def test_rows_that_are_copied_are_looked_at(bitnet: Bitnet, tmp_path: Path, demo_model: Path) -> None:
    model = tmp_path / "model.gguf"
    damaged = bytearray(demo_model.read_bytes())
    name = "blk.5.ffn_down.weight"  # whose short rows take no less room as trits
    damaged[tensor_of(demo_model, name).data_offset] |= 3
    model.write_bytes(damaged)
    code, message = bitnet.error("pack", "--model", model, "--output", tmp_path / "packed.gguf")
    assert (code, message) == (9, f"{model}: tensor {name} has a code that stands for no weight")


def test_a_model_is_not_packed_over_itself(bitnet: Bitnet, tmp_path: Path, demo_model: Path) -> None:
    model, link = tmp_path / "model.gguf", tmp_path / "link.gguf"
    model.write_bytes(demo_model.read_bytes())
    link.hardlink_to(model)
    for output in (model, link):
        assert bitnet.error("pack", "-m", model, "-o", output) == (4, f"{output}: cannot be written: it is the model")
    assert model.read_bytes() == demo_model.read_bytes()


def test_values_beyond_half_floats_do_not_spread(bitnet: Bitnet, tmp_path: Path) -> None:
    """Infinity in the f16 cache, times a weight of 0, would become part of other tokens' sums."""
    model = tmp_path / "model.gguf"
    write_checkpoint(WIDE, tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", model, "f32")
    damaged = bytearray(model.read_bytes())
    for name in ("blk.0.attn_v.weight", "blk.1.attn_v.weight"):
        tensor = tensor_of(model, name)
        scale = tensor.data_offset + int(np.prod(tensor.shape)) // 4
        damaged[scale : scale + 4] = struct.pack("<f", 30_000.0)
    model.write_bytes(damaged)
    expected = logits(bitnet, model, tmp_path / "logits", "--batch-size", "1")
    for options in (("--batch-size", "2"), ("--batch-size", "3"), (), ("--isa", "scalar")):
        assert logits(bitnet, model, tmp_path / "logits", *options) == expected


def test_an_interrupted_pack_leaves_what_was_there(bitnet: Bitnet, tmp_path: Path, demo_model: Path) -> None:
    """The kernel ends it where the file would grow past a limit."""
    packed = tmp_path / "packed.gguf"
    packed.write_bytes(b"what was there")

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    run = bitnet.run("pack", "--model", demo_model, "--output", packed, preexec_fn=limit_files)
    assert run.returncode == -signal.SIGXFSZ
    assert packed.read_bytes() == b"what was there"
    bitnet("pack", "--model", demo_model, "--output", packed)
    assert b"bitnet.pack.version" in packed.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["packed.gguf"]


def test_another_version_of_packed_files_is_refused(bitnet: Bitnet, tmp_path: Path, demo_model: Path) -> None:
    bitnet("pack", "--model", demo_model, "--output", tmp_path / "packed.gguf")
    packed = bytearray((tmp_path / "packed.gguf").read_bytes())
    value = packed.index(b"bitnet.pack.version") + len(b"bitnet.pack.version") + 4
    assert packed[value] == 2
    packed[value] = 1
    (tmp_path / "old.gguf").write_bytes(packed)
    expected = f'{tmp_path / "old.gguf"}: key "bitnet.pack.version": version 1, this program reads version 2: '
    for command in (("generate", "--prompt", "a"), ("pack", "--output", tmp_path / "again.gguf"), ("perplexity",)):
        arguments = (*command, "--file", demo_model) if command == ("perplexity",) else command
        code, message = bitnet.error(*arguments, "--model", tmp_path / "old.gguf")
        assert (code, message) == (8, expected + "pack the original again")


def test_the_benchmark_packs_the_model_that_it_measures(tmp_path: Path, demo_model: Path, endless_model: Path) -> None:
    for number, source in enumerate((demo_model, endless_model)):
        model = tmp_path / str(number) / "same-name.gguf"
        model.parent.mkdir()
        model.write_bytes(source.read_bytes())
        plain, packed = files(model, tmp_path)
        assert plain == model
        assert context_length(packed) == context_length(source)


def context_length(path: Path) -> int:
    return int(read_gguf(path).fields["bitnet-b1.58.context_length"].contents())


def test_the_benchmark_makes_no_model_of_a_name_that_is_wrong(tmp_path: Path) -> None:
    model = tmp_path / "none.gguf"
    options = ("--model", model, "--threads", "1", "--output", tmp_path / "out")
    command: list[str | Path] = [sys.executable, ROOT / "build/bench/bench.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, f"{model} is no file (MODEL)" in done.stderr) == (2, True)
    assert not list(tmp_path.iterdir())
