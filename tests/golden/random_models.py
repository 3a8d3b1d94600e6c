"""Small BitNet checkpoints with random weights, the same on every machine: shapes that the demo model does not have.

Each is a directory as `save_pretrained` leaves it. transformers computes golden logits from it (write_golden.py); the
tests make it again, convert it and ask the engine for the same logits. So the models themselves need not be kept.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from bitnet_gguf import BYTE_ALPHABET
from convert import LLAMA3_SPLIT

SPECIAL_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class RandomModel:
    """How these models differ: the seed of the weights, and fields of config.json under their names there."""

    seed: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 256
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    torch_dtype: str = "float32"

    def config(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["seed"]
        return fields | {
            "architectures": ["BitNetForCausalLM"],
            "model_type": "bitnet",
            "hidden_act": "relu2",
            "bos_token_id": self.vocab_size - 3,
            "eos_token_id": self.vocab_size - 2,
        }


RANDOM_MODELS = {
    # As the 2B model: heads of 128, four query heads to a key/value head; a feed-forward of 13 blocks.
    "head128-gqa4": RandomModel(1, 317, 1024, 1664, 2, 8, 2),
    # A key/value head to each query head, odd numbers of blocks (3 and 5), another rotation, bfloat16 weights.
    "head64-mha": RandomModel(2, 509, 384, 640, 3, 6, 6, rope_theta=10000.0, torch_dtype="bfloat16"),
    # An output matrix of its own, many small heads, float16 weights, another epsilon.
    "head32-untied": RandomModel(
        3, 771, 256, 896, 4, 8, 2, rms_norm_eps=1e-6, tie_word_embeddings=False, torch_dtype="float16"
    ),
    # The smallest there is: one block a row, one head, one layer.
    "head128-smallest": RandomModel(4, 300, 128, 128, 1, 1, 1, rope_theta=1e6),
}


def write_checkpoint(model: RandomModel, directory: Path) -> None:
    """config.json, model.safetensors and tokenizer.json in `directory`, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", model.config())
    write_json(directory / "tokenizer.json", tokenizer(model.vocab_size))
    save_file(tensors(model), directory / "model.safetensors", {"format": "pt"})


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def tensors(model: RandomModel) -> dict[str, npt.NDArray[Any]]:
    """Random master weights by their Hugging Face names."""
    d, ff = model.hidden_size, model.intermediate_size
    kv = d // model.num_attention_heads * model.num_key_value_heads
    matrices = {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (ff, d),
        "mlp.up_proj": (ff, d),
        "mlp.down_proj": (d, ff),
    }
    norms = {"input_layernorm": d, "self_attn.attn_sub_norm": d, "post_attention_layernorm": d, "mlp.ffn_sub_norm": ff}
    values = {
        "model.embed_tokens.weight": _embedding(model, "embed_tokens"),
        "model.norm.weight": _norm(model, "norm", d),
    }
    if not model.tie_word_embeddings:
        values["lm_head.weight"] = _embedding(model, "lm_head")
    for layer in range(model.num_hidden_layers):
        for name, shape in matrices.items():
            full = f"model.layers.{layer}.{name}.weight"
            # Uniform in ±2/√inputs: absmean makes three weights in four ±1/√inputs, and vectors keep their size.
            uniform = _uniform(model, full, shape[0] * shape[1]).reshape(shape)
            values[full] = uniform * np.float32(4 / np.sqrt(shape[1]))
        for name, length in norms.items():
            full = f"model.layers.{layer}.{name}.weight"
            values[full] = _norm(model, full, length)
    return {name: value.astype(DTYPES[model.torch_dtype]) for name, value in values.items()}


def _uniform(model: RandomModel, name: str, n: int) -> npt.NDArray[np.float32]:
    """(n,) in [-0.5, 0.5) from the generator's raw bits, which numpy promises never to change; distributions may."""
    bits = np.random.PCG64([model.seed, zlib.crc32(name.encode())]).random_raw((n + 1) // 2).view(np.uint32)[:n]
    uniform: npt.NDArray[np.float32] = ((bits >> 8).astype(np.float32) * np.float32(2**-24)) - np.float32(0.5)
    return uniform


def _norm(model: RandomModel, name: str, length: int) -> npt.NDArray[np.float32]:
    return 1 + _uniform(model, name, length)


def _embedding(model: RandomModel, name: str) -> npt.NDArray[np.float32]:
    """In ±1/8; as float32, multiples of 1/1024, in each block of 32 up to 127: F16, BF16 and Q8_0 hold them exactly."""
    uniform = _uniform(model, name, model.vocab_size * model.hidden_size).reshape(model.vocab_size, model.hidden_size)
    if model.torch_dtype != "float32":
        return uniform * np.float32(0.25)
    grid = np.rint(uniform * 254)
    grid[:, ::32] = 127
    return (grid / 1024).astype(np.float32)


def tokenizer(vocab_size: int) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE: the bytes, pairs of letters up to the size wanted, the special tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    n_pairs = vocab_size - len(BYTE_ALPHABET) - len(SPECIAL_TOKENS)
    merges = [[a, b] for a in letters for b in letters][:n_pairs]
    tokens = [*BYTE_ALPHABET, *(a + b for a, b in merges)]
    assert len(tokens) + len(SPECIAL_TOKENS) == vocab_size, vocab_size
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": len(tokens) + i, "content": content, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": True}
            for i, content in enumerate(SPECIAL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges},
    }
