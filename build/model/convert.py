#!/usr/bin/env python3
"""Convert a Hugging Face BitNetForCausalLM checkpoint to the GGUF that the engine reads.

    python build/model/convert.py CHECKPOINT_DIRECTORY OUTPUT.gguf [--embedding-type f16|bf16|f32|q8_0] [--name NAME]

The directory holds config.json, tokenizer.json and *.safetensors (one, or shards and model.safetensors.index.json).
Two kinds of checkpoint are known: float master weights (float32, bfloat16 or float16), which are made ternary here as
transformers does when it runs them, and weights that are already ternary, packed four to a byte with a `weight_scale`.
Tensors go through memory one at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (importing it lets safetensors hand bfloat16 to numpy)
import numpy as np
import numpy.typing as npt
from gguf import TokenType
from safetensors import SafetensorError, safe_open

from bitnet_gguf import (
    EMBEDDING_TYPES,
    I2_S,
    Array,
    ModelError,
    ModelShape,
    TensorSpec,
    Vocabulary,
    encode_rows,
    pack_i2_s,
    tensor_specs,
    write_gguf,
)

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TURN = "<|eot_id|>"

GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
    "ffn_down": "mlp.down_proj",
}

FLOAT_TYPES = ("F32", "F16", "BF16")
MIN_SCALE = np.float32(1e-5)  # transformers clamps the mean so that an all-zero matrix divides by something
ROWS_AT_ONCE = 8192  # of an embedding, so that a large vocabulary is never in memory as float32


def hugging_face_name(gguf_name: str) -> str:
    """From blk.3.attn_q.weight to model.layers.3.self_attn.q_proj.weight."""
    if gguf_name in GLOBAL_NAMES:
        return GLOBAL_NAMES[gguf_name]
    _, layer, module, suffix = gguf_name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[module]}.{suffix}"


def ternarize(weights: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], float]:
    """Absmean quantisation, (rows, inputs) → ({-1, 0, 1}, scale), in transformers' order of operations.

    s = 1 / max(mean|W|, 1e-5); t = clip(round(W·s), -1, 1), ties to even; the weight that counts is t / s.
    Source: WeightQuant in transformers/integrations/bitnet.py; "The Era of 1-bit LLMs", arXiv 2402.17764, section 2.
    """
    mean = np.float32(np.abs(weights).mean(dtype=np.float64))
    inverse = np.float32(1) / max(mean, MIN_SCALE)
    ternary = np.clip(np.rint(weights * inverse), -1, 1).astype(np.int8)
    return ternary, float(np.float32(1) / inverse)


def unpack_ternary(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """Four rows to a byte, (rows/4, inputs) → (rows, inputs): bits 2i hold row i·rows/4 + r as w+1.

    Source: unpack_weights() in transformers/integrations/bitnet.py.
    """
    return np.concatenate([(packed >> shift & 3).astype(np.int8) - 1 for shift in (0, 2, 4, 6)])


class Checkpoint:
    """The tensors of one or more safetensors files.

    A file is opened for each read: its mapping, as large as the model, does not stay in memory.
    """

    def __init__(self, directory: Path) -> None:
        self._paths: dict[str, Path] = {}
        for path in self._find_files(directory):
            try:
                with safe_open(path, framework="np") as file:
                    self._paths.update(dict.fromkeys(file.keys(), path))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: not a readable safetensors file: {error}") from error

    @staticmethod
    def _find_files(directory: Path) -> list[Path]:
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise ModelError(f"{index}: weight_map must give each tensor its file")
            paths = [directory / name for name in sorted(set(weight_map.values()))]
        else:
            paths = sorted(directory.glob("*.safetensors"))
        if not paths:
            raise ModelError(f"{directory}: no *.safetensors file")
        for path in paths:
            if not path.is_file():
                raise ModelError(f"{path}: missing, although {index.name} names it")
        return paths

    def names(self) -> set[str]:
        """All tensors of the checkpoint."""
        return set(self._paths)

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(safetensors' name of the element type, shape). Raises ModelError when there is no such tensor."""
        if name not in self._paths:
            raise ModelError(f"tensor {name} is missing from the checkpoint")
        with safe_open(self._paths[name], framework="np") as file:
            view = file.get_slice(name)
            return view.get_dtype(), tuple(view.get_shape())

    def floats(self, name: str, shape: tuple[int, ...], rows: slice = slice(None)) -> npt.NDArray[np.float32]:
        """A float tensor of this shape, or some of its rows, as float32; every value is finite."""
        self._expect(name, FLOAT_TYPES, shape)
        with safe_open(self._paths[name], framework="np") as file:
            values: npt.NDArray[np.float32] = file.get_slice(name)[rows].astype(np.float32)
        if not np.isfinite(values).all():
            raise ModelError(f"tensor {name} holds a value that is not finite")
        return values

    def bytes(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """A tensor of bytes of this shape."""
        self._expect(name, ("U8",), shape)
        with safe_open(self._paths[name], framework="np") as file:
            values: npt.NDArray[np.uint8] = file.get_tensor(name)
        return values

    def _expect(self, name: str, types: tuple[str, ...], shape: tuple[int, ...]) -> None:
        found_type, found_shape = self.describe(name)
        if found_type not in types:
            raise ModelError(f"tensor {name} must be of type {' or '.join(types)}, got {found_type}")
        if found_shape != shape:
            raise ModelError(f"tensor {name} must have shape {shape}, got {found_shape}")


class Converter:
    """A checkpoint directory, opened and checked; `write` makes the GGUF."""

    def __init__(self, directory: Path, embedding_type: str) -> None:
        config = read_json(directory / "config.json")
        self.shape = read_shape(config)
        self.vocabulary = read_vocabulary(directory, config, self.shape.vocab_size)
        self._scale_divides = packed_scale_divides(config)
        self._checkpoint = Checkpoint(directory)
        tied = bool(config.get("tie_word_embeddings", False))
        self._specs = list(tensor_specs(self.shape, EMBEDDING_TYPES[embedding_type], tied=tied))
        self._reject_unknown_tensors(tied)

    def write(self, path: Path, name: str) -> None:
        """Write the GGUF; `name` is its general.name."""
        write_gguf(path, name, self.shape, self.vocabulary, self._specs, self._load)

    def _reject_unknown_tensors(self, tied: bool) -> None:
        """A bias or an adapter that the graph has no place for would change the model silently."""
        known = {hugging_face_name(spec.name) for spec in self._specs}
        known |= {name + "_scale" for name in known}
        if tied:
            known.add(GLOBAL_NAMES["output.weight"])
        unknown = {name for name in self._checkpoint.names() - known if not name.endswith(".rotary_emb.inv_freq")}
        if unknown:
            raise ModelError(
                f"the checkpoint has {len(unknown)} tensors that BitNet has no place for, as {min(unknown)}"
            )

    def _load(self, spec: TensorSpec) -> Array:
        name = hugging_face_name(spec.name)
        if spec.type == I2_S:
            return pack_i2_s(*self._ternary(name, spec.shape))
        if len(spec.shape) == 1:
            return self._checkpoint.floats(name, spec.shape)
        return self._embedding(name, spec)

    def _ternary(self, name: str, shape: tuple[int, ...]) -> tuple[npt.NDArray[np.int8], float]:
        rows, inputs = shape
        if self._checkpoint.describe(name)[0] != "U8":
            return ternarize(self._checkpoint.floats(name, shape))
        packed = self._checkpoint.bytes(name, (rows // 4, inputs))
        if (packed & packed >> 1 & 0b01010101).any():
            raise ModelError(f"tensor {name} holds the 2-bit code 3, which is no ternary weight")
        scale = np.float32(self._checkpoint.floats(name + "_scale", (1,))[0])
        if not scale > 0:
            raise ModelError(f"tensor {name}_scale must be positive, got {scale}")
        return unpack_ternary(packed), float(np.float32(1) / scale if self._scale_divides else scale)

    def _embedding(self, name: str, spec: TensorSpec) -> Array:
        n_rows = spec.shape[0]
        encoded = np.empty((n_rows, spec.n_bytes // n_rows), np.uint8)
        for start in range(0, n_rows, ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, n_rows))
            encoded[rows] = encode_rows(self._checkpoint.floats(name, spec.shape, rows), spec.type).view(np.uint8)
        return encoded


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return content


def read_shape(config: dict[str, Any]) -> ModelShape:
    """Hyperparameters from config.json. Raises ModelError for an architecture or a variant that is not the engine's."""
    if config.get("model_type") != "bitnet":
        raise ModelError(f"config.json: model_type must be 'bitnet', got {config.get('model_type')!r}")
    if config.get("hidden_act", "relu2") != "relu2":
        raise ModelError(f"config.json: hidden_act must be 'relu2', got {config['hidden_act']!r}")
    if config.get("attention_bias"):
        raise ModelError("config.json: attention_bias must be false, got true")
    if quantization_config(config).get("use_rms_norm"):
        raise ModelError("config.json: quantization_config.use_rms_norm must be false, got true")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ModelError(f"config.json: rope type must be 'default', got {rope_type!r}")

    def integer(key: str, default: int | None = None) -> int:
        value = config.get(key, default)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool):
            raise ModelError(f"config.json: {key} must be an integer, got {value!r}")
        return value

    def number(key: str, value: object) -> float:
        if not isinstance(value, int | float):
            raise ModelError(f"config.json: {key} must be a number, got {value!r}")
        return float(value)

    heads = integer("num_attention_heads")
    shape = ModelShape(
        vocab_size=integer("vocab_size"),
        context_length=integer("max_position_embeddings"),
        embedding_length=integer("hidden_size"),
        block_count=integer("num_hidden_layers"),
        feed_forward_length=integer("intermediate_size"),
        head_count=heads,
        head_count_kv=integer("num_key_value_heads", heads),
        rms_epsilon=number("rms_norm_eps", config.get("rms_norm_eps", 1e-5)),
        rope_theta=number("rope_theta", rope.get("rope_theta", config.get("rope_theta", 500000.0))),
    )
    if integer("head_dim", shape.head_dim) != shape.head_dim:
        expected = f"hidden_size / num_attention_heads = {shape.head_dim}"
        raise ModelError(f"config.json: head_dim must be {expected}, got {config['head_dim']}")
    return shape


def quantization_config(config: dict[str, Any]) -> dict[str, Any]:
    """How the checkpoint says it was quantised; empty when it was not."""
    return config.get("quantization_config") or {}


def packed_scale_divides(config: dict[str, Any]) -> bool:
    """Whether to divide by a packed matrix's weight_scale: in transformers BitLinear does, AutoBitLinear multiplies."""
    return bool(quantization_config(config).get("linear_class", "bitlinear") == "bitlinear")


def read_vocabulary(directory: Path, config: dict[str, Any], vocab_size: int) -> Vocabulary:
    """Byte-level BPE from tokenizer.json; ids that it leaves free up to vocab_size become unused tokens."""
    path = directory / "tokenizer.json"
    try:
        return _vocabulary(directory, path, config, vocab_size)
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not laid out as Hugging Face tokenizers saves it: {error!r}") from error


def _vocabulary(directory: Path, path: Path, config: dict[str, Any], vocab_size: int) -> Vocabulary:
    tokenizer = read_json(path)
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise ModelError(f"{path}: model.type must be 'BPE', got {model.get('type')!r}")
    if LLAMA3_SPLIT not in split_patterns(tokenizer.get("pre_tokenizer") or {}):
        raise ModelError(f"{path}: pre_tokenizer must split as Llama 3 does: {LLAMA3_SPLIT}")
    if tokenizer.get("normalizer") is not None:
        raise ModelError(f"{path}: normalizer must be null, got {tokenizer['normalizer'].get('type')!r}")

    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size

    def place(token: str, token_id: int, kind: TokenType) -> None:
        if not 0 <= token_id < vocab_size:
            raise ModelError(f"{path}: token id {token_id} is outside the model's vocabulary of {vocab_size}")
        tokens[token_id], types[token_id] = token, kind

    for token, token_id in model["vocab"].items():
        place(token, token_id, TokenType.NORMAL)
    for added in tokenizer.get("added_tokens", []):
        place(added["content"], added["id"], TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)

    def special(key: str) -> int:
        value = config.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if not isinstance(value, int) or not 0 <= value < vocab_size:
            raise ModelError(f"config.json: {key} must be a token id below {vocab_size}, got {value!r}")
        return value

    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        bos=special("bos_token_id"),
        eos=special("eos_token_id"),
        padding=special("eos_token_id" if config.get("pad_token_id") is None else "pad_token_id"),
        eot=tokens.index(END_OF_TURN) if END_OF_TURN in tokens else None,
        pre_tokenizer="llama-bpe",
        chat_template=read_chat_template(directory),
    )


def split_patterns(pre_tokenizer: dict[str, Any]) -> set[str]:
    """The regular expressions by which a tokenizer.json cuts text into pieces."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return {step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"}


def read_chat_template(directory: Path) -> str | None:
    """The chat template, from the file of its own or from tokenizer_config.json; None when there is none."""
    template = directory / "chat_template.jinja"
    if template.is_file():
        return template.read_text(encoding="utf-8")
    tokenizer_config = directory / "tokenizer_config.json"
    if tokenizer_config.is_file():
        value = read_json(tokenizer_config).get("chat_template")
        return value if isinstance(value, str) else None
    return None


def convert(directory: Path, output: Path, embedding_type: str = "f16", name: str | None = None) -> ModelShape:
    """Write a GGUF from a checkpoint. Raises ModelError when it is not a BitNet that the engine can run.

    Args:
        directory: config.json, tokenizer.json and *.safetensors.
        output: the file to write.
        embedding_type: element type of the embedding (and of a separate output matrix): f16, bf16, f32 or q8_0.
        name: general.name in the file; the directory's own name when None.
    """
    converter = Converter(directory, embedding_type)
    converter.write(output, name or directory.resolve().name)
    return converter.shape


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Convert a BitNetForCausalLM checkpoint to GGUF (I2_S).")
    parser.add_argument("checkpoint", type=Path, help="directory with config.json, tokenizer.json and *.safetensors")
    parser.add_argument("output", type=Path, help="GGUF file to write")
    parser.add_argument("--embedding-type", choices=list(EMBEDDING_TYPES), default="f16", help="default: %(default)s")
    parser.add_argument("--name", help="general.name in the file (default: the directory's name)")
    arguments = parser.parse_args()
    try:
        shape = convert(arguments.checkpoint, arguments.output, arguments.embedding_type, arguments.name)
    except (ModelError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    size = arguments.output.stat().st_size
    print(f"{arguments.output}: {size:,} bytes, {shape.block_count} layers of {shape.embedding_length}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
