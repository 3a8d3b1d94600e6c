#!/usr/bin/env python3
"""Compute the golden logits and greedy continuations in this folder with Hugging Face transformers (`make golden`).

The oracle is transformers' BitNetForCausalLM in float32, keys and values too, on a processor:
- random models (random_models.py): from float master weights, which transformers makes ternary itself
  (linear_class autobitlinear, quantization_mode online);
- the demo model: from the ternary weights in build/model/demo/model.gguf, in the packed form in which Microsoft
  publishes its 2B model (quantization_mode offline).

Before each matrix activations are rounded to int8. Where one lies closer to a boundary than float32 computes it, the
order of additions decides which way it goes, and this one step moves all logits of this position and those after it by
about one per cent, in any two programs. The leading positions of a sequence where no activation comes so close
(ROUNDING_MARGIN, by the numpy reference in float64) are counted in `n_exact`: there the logits have to agree to
float32's own precision. Random sequences are chosen for many such positions. README.md has the figures.
"""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # or transformers compiles its quantisation helpers, which wants a C++ compiler
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import numpy.typing as npt
import safetensors.torch
import tokenizers
import torch
import transformers
from transformers.integrations.bitnet import pack_weights

from convert import END_OF_TURN, LLAMA3_SPLIT, convert, hugging_face_name
from tests.golden.cases import LOGITS_FOLDER, Continuation, GoldenLogits, relative_rms, save_continuations
from tests.golden.random_models import RANDOM_MODELS, write_checkpoint, write_json
from tests.golden.reference import I2_S, Reference, dequantize, read_gguf

DEMO_MODEL = Path(__file__).parents[2] / "build/model/demo/model.gguf"
ROUNDING_MARGIN = 2e-5  # of an int8 step: five times the rms error of an activation in float32
EXACT = 1e-6  # relative rms of a difference that is float32's own

RANDOM_LENGTHS = {"head128-gqa4": 140, "head64-mha": 64, "head32-untied": 64, "head128-smallest": 200}
SEARCH = 400  # random sequences to choose from

DEMO_PROMPTS = {
    "story": "Once upon a time there was a king who had three daughters.",
    "title": "THE GOLDEN BIRD\nIn the old days",
    "speech": '"Who are you?" said the wolf. "I\'m 1001 years old!"',
}
DEMO_CONTEXT = 256  # positions of the long sequence: all that the model has
CONTEXT_COLUMN_STEP = (
    8  # of which each eighth logit is kept, to keep the file small; their log-sum-exp covers the others
)

GREEDY_PROMPTS = [
    "Once upon a time there was",
    "The princess opened the door and",
    "THE FROG AND THE KING\n",
    '"Who are you?" said the wolf.',
    "In a far country, beyond the sea,",
]
GREEDY_TOKENS = 64

ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
OFFLINE = ONLINE | {"quantization_mode": "offline"}
MADE_BY = (
    f"tests/golden/write_golden.py: BitNetForCausalLM of transformers {transformers.__version__}, "
    f"torch {torch.__version__}, float32, {platform.machine()}"
)

Floats = npt.NDArray[np.float32]


class Oracle:
    """A checkpoint directory in transformers."""

    def __init__(self, directory: Path, quantization: dict[str, str]) -> None:
        config = transformers.AutoConfig.from_pretrained(directory)
        config.quantization_config = quantization
        self._model = transformers.BitNetForCausalLM.from_pretrained(
            directory, config=config, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def logits(self, tokens: list[int]) -> Floats:
        """(n,) token ids → (n, vocab)."""
        with torch.no_grad():
            logits: Floats = self._model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
        return logits


class Opinions:
    """The oracle, and the reference in two precisions, on one model."""

    def __init__(self, oracle: Oracle, gguf: Path) -> None:
        self.oracle = oracle
        self._single = Reference(gguf, np.float32)
        self._double = Reference(gguf, np.float64)

    def count_exact(self, tokens: list[int]) -> int:
        """Leading positions of a sequence where no activation is near a rounding boundary."""
        self._double.logits(tokens)
        return int(np.argmin([*(self._double.rounding_margins > ROUNDING_MARGIN), False]))

    def save(self, name: str, tokens: list[int], column_step: int = 1) -> None:
        """Write the oracle's logits, after checking them where the three must agree."""
        logits = self.oracle.logits(tokens)
        differences = [relative_rms(model.logits(tokens) - logits, logits) for model in (self._single, self._double)]
        spread = np.maximum(*differences)
        n_exact = self.count_exact(tokens)
        if (spread[:n_exact] > EXACT).any():
            raise SystemExit(f"{name}: transformers and the reference differ where rounding decides nothing: {spread}")
        GoldenLogits(
            made_by=MADE_BY,
            tokens=np.array(tokens, np.int32),
            logits=logits[:, ::column_step],
            column_step=column_step,
            log_sum_exp=np.logaddexp.reduce(logits.astype(np.float64), axis=-1),
            best=logits.argmax(axis=-1).astype(np.int32),
            spread=spread.astype(np.float32),
            n_exact=n_exact,
        ).save(name)
        exact = f"{n_exact} exact to {spread[:n_exact].max(initial=0):.1e}"
        print(f"{name}: {len(tokens)} positions, {exact}, spread {np.median(spread):.1e}, at most {spread.max():.1e}")


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # one order of additions
    LOGITS_FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for name, model in RANDOM_MODELS.items():
            directory = Path(temporary, name)
            write_checkpoint(model, directory)
            convert(directory, directory / "model.gguf", name=name)
            opinions = Opinions(Oracle(directory, ONLINE), directory / "model.gguf")
            opinions.save(f"{name}.random", best_sequence(opinions, RANDOM_LENGTHS[name], model.vocab_size))
        directory = Path(temporary, "demo")
        unpack_demo_model(directory)
        opinions = Opinions(Oracle(directory, OFFLINE), DEMO_MODEL)
        write_demo(opinions, tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")))


def best_sequence(opinions: Opinions, length: int, vocab_size: int) -> list[int]:
    """Of so many random sequences the one with the most exact positions."""
    seeds = range(SEARCH)
    candidates = [(np.random.PCG64([length, seed]).random_raw(length) % vocab_size).tolist() for seed in seeds]
    return max(candidates, key=opinions.count_exact)


def write_demo(opinions: Opinions, tokenizer: tokenizers.Tokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    bos, eos = vocabulary["<|begin_of_text|>"], vocabulary["<|end_of_text|>"]

    def encode(text: str) -> list[int]:
        return [bos, *tokenizer.encode(text, add_special_tokens=False).ids]

    for name, prompt in DEMO_PROMPTS.items():
        opinions.save(f"demo.{name}", encode(prompt))

    continuations = [greedy(opinions.oracle, tokenizer, prompt, encode(prompt), eos) for prompt in GREEDY_PROMPTS]
    save_continuations(MADE_BY, continuations)

    # The longest sequence: the continuations as one text.
    tokens = [token for c in continuations for token in [*c.prompt_tokens, *c.tokens]][:DEMO_CONTEXT]
    opinions.save("demo.context", tokens, CONTEXT_COLUMN_STEP)


def greedy(
    oracle: Oracle, tokenizer: tokenizers.Tokenizer, prompt: str, prompt_tokens: list[int], eos: int
) -> Continuation:
    tokens: list[int] = []
    margins: list[float] = []
    rms: list[float] = []
    while len(tokens) < GREEDY_TOKENS:
        logits = oracle.logits(prompt_tokens + tokens)[-1]
        second, best = np.argsort(logits)[-2:].tolist()
        if best == eos:
            raise SystemExit(f"{prompt!r} ends after {len(tokens)} tokens; choose another prompt")
        tokens.append(best)
        margins.append(round(float(logits[best] - logits[second]), 5))
        rms.append(round(float(np.sqrt(np.square(logits).mean())), 5))
    text = tokenizer.decode(tokens)
    print(f"greedy {prompt!r}: {text!r}, least margin {min(margins)}")
    return Continuation(prompt, text, prompt_tokens, tokens, margins, rms)


def unpack_demo_model(directory: Path) -> None:
    """The demo GGUF as a Hugging Face checkpoint: ternary weights packed in uint8, with a weight_scale each."""
    directory.mkdir()
    reader = read_gguf(DEMO_MODEL)
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values, scale = dequantize(reader, tensor)
        name = hugging_face_name(tensor.name)
        if int(tensor.tensor_type) == I2_S:
            state[name] = pack_weights(torch.from_numpy(values))
            state[name + "_scale"] = torch.tensor([scale])
        else:
            state[name] = torch.from_numpy(values)
    safetensors.torch.save_file(state, directory / "model.safetensors", {"format": "pt"})

    def key(name: str) -> Any:
        field = reader.get_field(name)
        assert field is not None, name
        return field.contents()

    prefix = "bitnet-b1.58."
    write_json(
        directory / "config.json",
        {
            "architectures": ["BitNetForCausalLM"],
            "model_type": "bitnet",
            "vocab_size": key(prefix + "vocab_size"),
            "hidden_size": key(prefix + "embedding_length"),
            "intermediate_size": key(prefix + "feed_forward_length"),
            "num_hidden_layers": key(prefix + "block_count"),
            "num_attention_heads": key(prefix + "attention.head_count"),
            "num_key_value_heads": key(prefix + "attention.head_count_kv"),
            "max_position_embeddings": key(prefix + "context_length"),
            "rms_norm_eps": key(prefix + "attention.layer_norm_rms_epsilon"),
            "rope_theta": key(prefix + "rope.freq_base"),
            "hidden_act": "relu2",
            "tie_word_embeddings": True,
            "bos_token_id": key("tokenizer.ggml.bos_token_id"),
            "eos_token_id": key("tokenizer.ggml.eos_token_id"),
        },
    )
    tokens, types = key("tokenizer.ggml.tokens"), key("tokenizer.ggml.token_type")
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == 1}
    merges = [tuple(merge.split(" ")) for merge in key("tokenizer.ggml.merges")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, ignore_merges=True))
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token in tokens if token not in vocabulary])
    assert tokenizer.token_to_id(END_OF_TURN) == tokens.index(END_OF_TURN)
    tokenizer.save(str(directory / "tokenizer.json"))


if __name__ == "__main__":
    main()
