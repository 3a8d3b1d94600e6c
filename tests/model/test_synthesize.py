"""build/model/synthesize.py: small files as the published one is laid out, and the sizes of the full one."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bitnet_gguf import EMBEDDING_TYPES, I2_S, ModelError, ModelShape, tensor_specs
from function.settings import ROOT
from synthesize import FULL_SIZE, ZEROS, llama3_vocabulary, make_vocabulary, synthesize
from tests.golden.reference import Reference, dequantize, read_gguf
from tests.model.layout import PUBLISHED_KEYS

SYNTHESIZE = ROOT / "build" / "model" / "synthesize.py"
LLAMA3_TOKENIZER = ROOT / "build" / "out" / "llama3" / "tokenizer.model"

SMALL = ModelShape(
    vocab_size=1000,
    context_length=512,
    embedding_length=256,
    block_count=2,
    feed_forward_length=640,
    head_count=4,
    head_count_kv=2,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synthetic") / "small.gguf"
    synthesize(path, SMALL)
    return path


def test_layout_is_that_of_the_published_file(small: Path) -> None:
    reader = read_gguf(small)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(fields) == PUBLISHED_KEYS
    assert fields["bitnet-b1.58.feed_forward_length"] == 640
    assert fields["bitnet-b1.58.attention.head_count_kv"] == 2
    assert fields["tokenizer.ggml.bos_token_id"] == fields["tokenizer.ggml.tokens"].index("<|begin_of_text|>")
    tensors = {tensor.name: (tensor.shape.tolist(), int(tensor.tensor_type)) for tensor in reader.tensors}
    assert len(tensors) == 2 + 2 * 11
    assert tensors["token_embd.weight"] == ([256, 1000], 1)
    assert tensors["blk.1.ffn_down.weight"] == ([640, 256], 36)


def test_made_up_tokens_differ_and_each_longer_one_has_its_merge() -> None:
    vocabulary = make_vocabulary(FULL_SIZE.vocab_size, None)
    assert len(set(vocabulary.tokens)) == len(vocabulary.types) == FULL_SIZE.vocab_size
    assert max(map(len, vocabulary.tokens[: vocabulary.bos])) == 3
    assert [merge.replace(" ", "") for merge in vocabulary.merges] == vocabulary.tokens[256 : vocabulary.bos]


def test_full_size_is_that_of_the_published_file() -> None:
    """1,187,801,280 bytes, of which 8,351,360 are the head of a file with the real vocabulary."""
    specs = list(tensor_specs(FULL_SIZE, EMBEDDING_TYPES["f16"]))
    assert len(specs) == 332
    assert sum(spec.n_bytes for spec in specs) == 1_187_801_280 - 8_351_360
    assert sum(int(np.prod(spec.shape)) for spec in specs if spec.type == I2_S) == 2_084_044_800


def test_weights_are_ternary_and_as_sparse_as_absmean_leaves_them(small: Path) -> None:
    reader = read_gguf(small)
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down.weight")
    weights, scale = dequantize(reader, tensor)
    shares = [(weights == value).mean() for value in (-1, 0, 1)]
    assert shares == pytest.approx([(1 - ZEROS) / 2, ZEROS, (1 - ZEROS) / 2], abs=0.005)
    assert scale == pytest.approx(1 / np.sqrt(640 * (1 - ZEROS)))


def test_activations_keep_their_size(small: Path) -> None:
    """Or speed would be measured on infinities and zeros."""
    logits = Reference(small).logits([5, 600, 300, 7])
    assert np.isfinite(logits).all()
    assert 0.1 < np.sqrt(np.square(logits).mean()) < 10


def test_seed_decides_the_bytes(small: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        synthesize(tmp_path / f"{seed}.gguf", SMALL, seed)
    assert (tmp_path / "0.gguf").read_bytes() == small.read_bytes()
    assert (tmp_path / "1.gguf").read_bytes() != small.read_bytes()


def test_the_engine_reads_and_computes_it(small: Path, engine_path: Path, tmp_path: Path) -> None:
    info = subprocess.run([engine_path, "info", small], check=True, capture_output=True, text=True).stdout
    assert "bitnet2b" in info
    assert "blk.1.ffn_down.weight" in info
    tokens, output = [5, 600, 300, 7], tmp_path / "logits"
    ids = ",".join(map(str, tokens))
    command: list[str | Path] = [engine_path, "logits", "--model", small, "--tokens", ids, "--output", output]
    subprocess.run([*command, "--kv-type", "f32"], check=True)
    logits, expected = np.fromfile(output, "<f4").reshape(4, -1), Reference(small).logits(tokens)
    assert np.sqrt(np.square(logits - expected).mean() / np.square(expected).mean()) < 0.05


def test_llama3_vocabulary_lists_every_way_to_join_a_token(tmp_path: Path) -> None:
    ranks = [b"a", b"b", b" ", b"ab", b"ba", b"aba", b" a"]
    file = tmp_path / "tokenizer.model"
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in reversed(list(enumerate(ranks))))
    file.write_bytes(b"".join(lines))
    tokens, merges = llama3_vocabulary(file)
    assert tokens == ["a", "b", "Ġ", "ab", "ba", "aba", "Ġa"]
    assert merges == ["a b", "b a", "a ba", "ab a", "Ġ a"]
    with pytest.raises(ModelError, match=r"--vocab must be 263 with .*, got 1000"):
        make_vocabulary(1000, file)


def test_real_llama3_vocabulary_has_its_published_size() -> None:
    assert LLAMA3_TOKENIZER.exists(), "fetch it first: build/setup/setup.sh test"
    vocabulary = make_vocabulary(FULL_SIZE.vocab_size, LLAMA3_TOKENIZER)
    assert len(vocabulary.merges) == 280_147
    assert (vocabulary.bos, vocabulary.eos, vocabulary.tokens.index("<|eot_id|>")) == (128_000, 128_001, 128_009)


def test_a_line_that_is_no_token_is_named(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"YQ== 0\nYg==\n")
    with pytest.raises(ModelError, match="line 2 is not a base64 token and its rank"):
        llama3_vocabulary(file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hidden", "200"], "embedding_length must be a multiple of 128, the weights in a block of I2_S, got 200"),
        (["--heads", "7"], "head_count must divide embedding_length 2560, got 7"),
        (["--vocab", "300"], "--vocab must be at least 512 (256 bytes and the special tokens), got 300"),
        (["--tokenizer-model", "absent"], "No such file or directory: 'absent'"),
    ],
)
def test_command_line_says_what_is_wrong_in_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    command: list[str | Path] = [sys.executable, SYNTHESIZE, tmp_path / "model.gguf", *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("synthesize: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
