"""build/model/convert.py: random checkpoints of every kind, judged by transformers' golden logits and by the bytes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from bitnet_gguf import ModelError, pack_i2_s
from convert import convert, ternarize
from function.settings import ROOT
from tests.golden.cases import GoldenLogits, relative_rms
from tests.golden.random_models import RANDOM_MODELS, write_checkpoint, write_json
from tests.golden.reference import Reference, dequantize, read_gguf
from tests.model.layout import CONVERTED_KEYS

CONVERT = ROOT / "build" / "model" / "convert.py"
EXACT_TOLERANCE = 2e-6

SMALLEST = "head128-smallest"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A float32 checkpoint that converts."""
    write_checkpoint(RANDOM_MODELS[SMALLEST], tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    write_json(path, content)


def edit_tensors(checkpoint: Path, change: Callable[[dict[str, npt.NDArray[Any]]], object]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")


@pytest.mark.parametrize("name", RANDOM_MODELS)
def test_the_converted_model_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    """By the numpy reference, where rounding decides nothing: the whole conversion without the engine."""
    write_checkpoint(RANDOM_MODELS[name], tmp_path)
    convert(tmp_path, tmp_path / "model.gguf", "f32")
    golden = GoldenLogits.load(f"{name}.random")
    logits = Reference(tmp_path / "model.gguf").logits(golden.tokens[: golden.n_exact].tolist())
    assert (
        relative_rms(logits - golden.logits[: golden.n_exact], golden.logits[: golden.n_exact]).max() < EXACT_TOLERANCE
    )


def test_keys_and_tensors_are_those_of_the_published_file(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "model.gguf", name="a name")
    reader = read_gguf(tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(fields) == CONVERTED_KEYS
    assert fields["general.name"] == "a name"
    assert fields["bitnet-b1.58.rope.freq_base"] == 1e6
    assert fields["tokenizer.ggml.bos_token_id"] == fields["tokenizer.ggml.tokens"].index("<|begin_of_text|>") == 297
    assert fields["tokenizer.ggml.eos_token_id"] == fields["tokenizer.ggml.padding_token_id"] == 298
    assert fields["tokenizer.ggml.eot_token_id"] == 299
    assert fields["tokenizer.ggml.token_type"] == [1] * 297 + [3] * 3
    assert fields["tokenizer.ggml.scores"] == [0.0] * 297 + [-1000.0] * 3
    assert fields["tokenizer.ggml.tokens"][256:258] == ["aa", "ab"]
    assert fields["tokenizer.ggml.merges"][:2] == ["a a", "a b"]
    tensors = {tensor.name: (tensor.shape.tolist(), int(tensor.tensor_type)) for tensor in reader.tensors}
    assert tensors["token_embd.weight"] == ([128, 300], 1)
    assert tensors["blk.0.attn_k.weight"] == ([128, 128], 36)
    assert tensors["blk.0.ffn_sub_norm.weight"] == ([128], 0)
    assert len(tensors) == 2 + 11
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)


def test_i2_s_layout_is_the_published_one() -> None:
    """By the formula: weight 128i + 32g + p is at bits 6-2g of byte 32i + p, one more than its value."""
    ternary = np.random.default_rng(0).integers(-1, 2, (3, 256)).astype(np.int8)
    packed = pack_i2_s(ternary, 0.25)
    assert packed.nbytes == ternary.size // 4 + 32
    for index, weight in enumerate(ternary.ravel().tolist()):
        block, rest = divmod(index, 128)
        group, place = divmod(rest, 32)
        assert (int(packed[32 * block + place]) >> (6 - 2 * group) & 3) - 1 == weight
    assert packed[-32:-28].view("<f4")[0] == 0.25


def test_ternary_weights_are_rounded_to_even_over_the_mean() -> None:
    ternary, scale = ternarize(np.array([[1.0, -0.5, 0.5, 0.501, -2.0, 3.0, 0.0, -0.499]], np.float32))
    assert scale == pytest.approx(1.0)  # the mean of the absolute values
    assert ternary.tolist() == [[1, 0, 0, 1, -1, 1, 0, 0]]


def test_a_matrix_of_zeros_stays_zero() -> None:
    ternary, scale = ternarize(np.zeros((2, 128), np.float32))
    assert not ternary.any()
    assert scale == pytest.approx(1e-5)


def test_same_checkpoint_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    for output in ("first.gguf", "second.gguf"):
        convert(checkpoint, tmp_path / output)
    assert (tmp_path / "first.gguf").read_bytes() == (tmp_path / "second.gguf").read_bytes()


def test_shards_make_the_same_file(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "whole.gguf")
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, checkpoint / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    write_json(checkpoint / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    convert(checkpoint, tmp_path / "shards.gguf", name="checkpoint")
    assert (tmp_path / "shards.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()

    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002.safetensors: missing"):
        convert(checkpoint, tmp_path / "missing.gguf")


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_packed_weights_make_the_same_file(linear_class: str, checkpoint: Path, tmp_path: Path) -> None:
    """The form of microsoft/bitnet-b1.58-2B-4T: four rows in a byte, and a scale that one class multiplies by."""
    convert(checkpoint, tmp_path / "float.gguf")
    reader = read_gguf(tmp_path / "float.gguf")
    whole = {tensor.name: tensor for tensor in reader.tensors}

    def pack(tensors: dict[str, npt.NDArray[Any]]) -> None:
        names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
        names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
        for name in [name for name in tensors if "_proj" in name]:
            ternary, scale = dequantize(reader, whole[f"blk.0.{names[name.split('.')[-2]]}.weight"])
            quarters = np.split((ternary + 1).astype(np.uint8), 4)
            tensors[name] = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
            weight_scale = scale if linear_class == "autobitlinear" else 1 / scale
            tensors[name + "_scale"] = np.array([weight_scale], np.float32)

    edit_tensors(checkpoint, pack)
    quantization = {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": "offline"}
    edit_json(checkpoint / "config.json", lambda config: config.update(quantization_config=quantization))
    convert(checkpoint, tmp_path / "packed.gguf", name="checkpoint")
    packed_reader = read_gguf(tmp_path / "packed.gguf")
    for tensor in packed_reader.tensors:
        values, scale = dequantize(packed_reader, tensor)
        expected, expected_scale = dequantize(reader, whole[tensor.name])
        assert np.array_equal(values, expected)
        assert scale == pytest.approx(expected_scale, rel=2e-7)

    edit_tensors(checkpoint, lambda tensors: tensors[Q_PROJ].__setitem__((0, 0), 0b11_00_00_00))
    with pytest.raises(ModelError, match=rf"tensor {Q_PROJ} holds the 2-bit code 3"):
        convert(checkpoint, tmp_path / "bad.gguf")


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "f32"])
def test_embedding_types_hold_the_embedding(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    """The random embedding is such that each type holds it exactly."""
    convert(checkpoint, tmp_path / "model.gguf", kind)
    reader = read_gguf(tmp_path / "model.gguf")
    values, _ = dequantize(reader, reader.tensors[0])
    assert reader.tensors[0].tensor_type.name.lower() == kind
    assert np.array_equal(values, load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"])


def test_bfloat16_embedding_rounds_to_even(checkpoint: Path, tmp_path: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors["model.embed_tokens.weight"].fill(1 + 2**-8 + 2**-7))
    convert(checkpoint, tmp_path / "model.gguf", "bf16")
    reader = read_gguf(tmp_path / "model.gguf")
    values, _ = dequantize(reader, reader.tensors[0])
    assert (values == np.float32(ml_dtypes.bfloat16(1 + 2**-6))).all()


def test_ids_without_a_token_become_unused_tokens(checkpoint: Path, tmp_path: Path) -> None:
    """A vocabulary padded to a round size has rows in the embedding that no text gives."""
    edit_json(checkpoint / "config.json", lambda config: config.update(vocab_size=320))

    def pad(tensors: dict[str, npt.NDArray[Any]]) -> None:
        tensors["model.embed_tokens.weight"] = np.resize(tensors["model.embed_tokens.weight"], (320, 128))

    edit_tensors(checkpoint, pad)
    convert(checkpoint, tmp_path / "model.gguf")
    fields = read_gguf(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents()[299:302] == ["<|eot_id|>", "[PAD300]", "[PAD301]"]
    assert fields["tokenizer.ggml.token_type"].contents()[299:302] == [3, 5, 5]


def test_chat_template_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    write_json(checkpoint / "tokenizer_config.json", {"chat_template": "{{ bos_token }}"})
    convert(checkpoint, tmp_path / "model.gguf")
    assert read_gguf(tmp_path / "model.gguf").fields["tokenizer.chat_template"].contents() == "{{ bos_token }}"


CONFIG_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "llama"}, "model_type must be 'bitnet', got 'llama'"),
    ({"hidden_act": "silu"}, "hidden_act must be 'relu2', got 'silu'"),
    ({"attention_bias": True}, "attention_bias must be false"),
    ({"hidden_size": 192}, "embedding_length must be a multiple of 128, .* got 192"),
    ({"intermediate_size": 100}, "feed_forward_length must be a multiple of 128, .* got 100"),
    ({"num_hidden_layers": 0}, "block_count must be positive, got 0"),
    ({"num_hidden_layers": "1"}, "num_hidden_layers must be an integer, got '1'"),
    ({"num_attention_heads": 3}, "head_count must divide embedding_length 128, got 3"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "head_count_kv must divide head_count 4, got 3"),
    ({"rope_theta": "high"}, "rope_theta must be a number, got 'high'"),
    ({"head_dim": 64}, "head_dim must be hidden_size / num_attention_heads = 128, got 64"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope type must be 'default', got 'yarn'"),
    ({"quantization_config": {"use_rms_norm": True}}, "use_rms_norm must be false"),
    ({"vocab_size": 299}, "token id 299 is outside the model's vocabulary of 299"),
    ({"eos_token_id": 300}, "eos_token_id must be a token id below 300, got 300"),
    ({"bos_token_id": None}, "bos_token_id must be a token id below 300, got None"),
    ({"num_hidden_layers": 2}, r"tensor model\.layers\.1\..* is missing from the checkpoint"),
    ({"tie_word_embeddings": False}, r"tensor lm_head\.weight is missing"),
    ({"intermediate_size": 256}, r"mlp\.gate_proj\.weight must have shape \(256, 128\), got \(128, 128\)"),
]


@pytest.mark.parametrize(("change", "message"), CONFIG_ERRORS, ids=lambda value: str(value)[:40])
def test_a_configuration_that_does_not_fit_is_named(
    change: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    edit_json(checkpoint / "config.json", lambda config: config.update(change))
    with pytest.raises(ModelError, match=message):
        convert(checkpoint, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


TENSOR_ERRORS: list[tuple[Callable[[dict[str, npt.NDArray[Any]]], object], str]] = [
    (lambda tensors: tensors.pop(Q_PROJ), f"tensor {Q_PROJ} is missing"),
    (lambda tensors: tensors[Q_PROJ].__setitem__((3, 5), np.nan), f"tensor {Q_PROJ} holds a value that is not finite"),
    (
        lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].astype(np.int32)}),
        f"{Q_PROJ} must be of type .*, got I32",
    ),
    (
        lambda tensors: tensors.update({Q_PROJ.replace("weight", "bias"): np.zeros(128, np.float32)}),
        r"1 tensors that BitNet has no place for, as model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    (
        lambda tensors: tensors["model.embed_tokens.weight"].__setitem__((0, 0), 70000.0),
        "embedding value 70000 is beyond float16; use --embedding-type bf16",
    ),
]


@pytest.mark.parametrize(("change", "message"), TENSOR_ERRORS, ids=["missing", "nan", "type", "unknown", "overflow"])
def test_a_tensor_that_does_not_fit_is_named(
    change: Callable[[dict[str, npt.NDArray[Any]]], object], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    edit_tensors(checkpoint, change)
    with pytest.raises(ModelError, match=message):
        convert(checkpoint, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


TOKENIZER_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"model": {"type": "Unigram"}}, "model.type must be 'BPE', got 'Unigram'"),
    ({"pre_tokenizer": {"type": "ByteLevel"}}, "pre_tokenizer must split as Llama 3 does"),
    ({"normalizer": {"type": "NFC"}}, "normalizer must be null, got 'NFC'"),
    ({"model": {"type": "BPE", "vocab": []}}, "tokenizer.json: not laid out as Hugging Face tokenizers saves it"),
]


@pytest.mark.parametrize(("change", "message"), TOKENIZER_ERRORS, ids=["model", "split", "normalizer", "vocabulary"])
def test_a_tokenizer_that_the_engine_lacks_is_refused(
    change: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    edit_json(checkpoint / "tokenizer.json", lambda tokenizer: tokenizer.update(change))
    with pytest.raises(ModelError, match=message):
        convert(checkpoint, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "config.json: No such file"),
        ("config.json", "{", "config.json: not JSON"),
        ("config.json", "[]", "config.json: must hold a JSON object"),
        ("model.safetensors", None, r"no \*\.safetensors file"),
        ("model.safetensors.index.json", '{"weight_map": []}', "weight_map must give each tensor its file"),
        ("model.safetensors", "not a tensor", "model.safetensors: not a readable safetensors file"),
    ],
)
def test_command_line_says_what_is_wrong_in_one_line(
    name: str, content: str | None, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    if content is None:
        (checkpoint / name).unlink()
    else:
        (checkpoint / name).write_text(content)
    command: list[str | Path] = [sys.executable, CONVERT, checkpoint, tmp_path / "model.gguf"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("convert: ")
    assert result.stderr.count("\n") == 1
    assert re.search(message, result.stderr)
