#!/usr/bin/env python3
"""Train the demo model: a small BitNet b1.58, the 2B-4T model's block scaled down, on public-domain stories.

    python build/model/train_demo.py --corpus corpus.txt --output CHECKPOINT_DIRECTORY [--minutes 64] [--seed 1]
    python build/model/train_demo.py --smoke     (under a minute, a smaller model, on smoke_corpus.txt beside this file)
    python build/model/convert.py CHECKPOINT_DIRECTORY model.gguf

The first part of the time trains in float, the rest with ternary weights (absmean) and int8 activations (absmax of each
token) through straight-through estimators: "The Era of 1-bit LLMs", arXiv 2402.17764. The result is a Hugging Face
BitNetForCausalLM checkpoint with float32 master weights. The schedule goes by time, so another machine makes another
model.
"""

# mypy: disallow-subclassing-any=False
# torch is in a dependency group of its own: where it is not installed, its classes have no type.
from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from convert import END_OF_TURN, LLAMA3_SPLIT
from corpus import BOOK_SEPARATOR

SPECIAL_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", END_OF_TURN]
RMS_EPSILON = 1e-5
MIN_SCALE = 1e-5
SMOKE_CORPUS = Path(__file__).with_name("smoke_corpus.txt")


@dataclass(frozen=True)
class Shape:
    """Hyperparameters of the model and the sizes of its training."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    feed_forward: int
    vocab_size: int
    context: int
    rope_theta: float = 10000.0
    batch: int = 16  # sequences of `context` tokens a step
    validation_tokens: int = 100_000
    report_every: int = 200  # steps

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads


DEMO = Shape(dim=256, n_layers=6, n_heads=4, n_kv_heads=2, feed_forward=768, vocab_size=4096, context=256)
SMOKE = Shape(
    dim=128, n_layers=2, n_heads=2, n_kv_heads=1, feed_forward=384, vocab_size=1024, context=128,
    batch=8, validation_tokens=4_000, report_every=50,
)  # fmt: skip
DEMO_MINUTES, SMOKE_MINUTES = 64.0, 0.6

WARM_UP_STEPS = 100
QUANTIZE_FROM = 0.4  # of the time
DECAY_FROM = 0.5  # of the time; then the learning rate falls in a line
LEAST_RATE = 0.02  # of the full learning rate
MATRIX_RATE, OTHER_RATE = 0.01, 3e-3


def read_documents(path: Path) -> list[str]:
    """The stories of a corpus: a book's end or a title in capitals begins another."""
    documents: list[str] = []
    current: list[str] = []

    def close() -> None:
        if sum(map(len, current)) > 400:  # less is a table of contents
            documents.append("\n".join(current))
        current.clear()

    for line in path.read_text(encoding="utf-8").splitlines():
        if line == BOOK_SEPARATOR:
            close()
            continue
        if is_title(line):
            close()
        current.append(line)
    close()
    return documents


def is_title(line: str) -> bool:
    """Whether a line is a heading: short, and nearly all of its letters capitals."""
    letters = [character for character in line if character.isalpha()]
    capitals = sum(character.isupper() for character in letters)
    return 3 <= len(line) <= 80 and len(letters) >= 3 and capitals > 0.85 * len(letters) and line[0] not in "'\""


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with Llama 3's split; the special tokens come last."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    if tokenizer.get_vocab_size() != vocab_size:
        raise SystemExit(
            f"the corpus gives {tokenizer.get_vocab_size()} tokens, the model wants {vocab_size}: too short a text"
        )
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of SPECIAL_TOKENS, the last of the vocabulary."""
    size = tokenizer.get_vocab_size()
    return list(range(size - len(SPECIAL_TOKENS), size))


def encode_documents(tokenizer: Tokenizer, documents: Sequence[str], seed: int) -> Tensor:
    """All documents in a random order as one line of token ids, each between a beginning and an end of text."""
    begin, end, _ = special_ids(tokenizer)
    order = np.random.default_rng(seed).permutation(len(documents))
    encodings = tokenizer.encode_batch([documents[i] for i in order])
    return torch.tensor([token for encoding in encodings for token in (begin, *encoding.ids, end)])


class BitLinear(nn.Linear):
    """A matrix that is float at first and ternary, with int8 inputs, once `ternary` is set."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.ternary = False

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) → (…, outputs)."""
        if not self.ternary:
            return F.linear(x, self.weight)
        return F.linear(fake_quantize_activations(x), fake_quantize_weights(self.weight))


def fake_quantize_weights(weight: Tensor) -> Tensor:
    """Ternary times its scale forward, the identity backward."""
    scale = weight.abs().mean().clamp(min=MIN_SCALE)
    return weight + ((weight / scale).round().clamp(-1, 1) * scale - weight).detach()


def fake_quantize_activations(x: Tensor) -> Tensor:
    """Int8 over its scale forward, for each token its own; the identity backward."""
    scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=MIN_SCALE)
    return x + ((x * scale).round().clamp(-128, 127) / scale - x).detach()


class Block(nn.Module):
    """Attention and squared-ReLU feed-forward, each with a norm before and a sub-norm before its last matrix."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        dim, kv_dim = shape.dim, shape.n_kv_heads * shape.head_dim
        self.input_layernorm = nn.RMSNorm(dim, eps=RMS_EPSILON)
        self.q_proj, self.k_proj = BitLinear(dim, dim), BitLinear(dim, kv_dim)
        self.v_proj, self.o_proj = BitLinear(dim, kv_dim), BitLinear(dim, dim)
        self.attn_sub_norm = nn.RMSNorm(dim, eps=RMS_EPSILON)
        self.post_attention_layernorm = nn.RMSNorm(dim, eps=RMS_EPSILON)
        self.gate_proj, self.up_proj = BitLinear(dim, shape.feed_forward), BitLinear(dim, shape.feed_forward)
        self.down_proj = BitLinear(shape.feed_forward, dim)
        self.ffn_sub_norm = nn.RMSNorm(shape.feed_forward, eps=RMS_EPSILON)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, n, dim) → the same."""
        h = self.input_layernorm(x)
        q, k = rotate(self._heads(self.q_proj(h)), cos, sin), rotate(self._heads(self.k_proj(h)), cos, sin)
        v = self._heads(self.v_proj(h))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(self.attn_sub_norm(a.transpose(1, 2).flatten(2)))
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(self.ffn_sub_norm(F.relu(self.gate_proj(h)).square() * self.up_proj(h)))

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, n, heads · head_dim) → (batch, heads, n, head_dim)."""
        return x.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on pairs (i, i + head_dim/2)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class BitNet(nn.Module):
    """The language model; the embedding is the output matrix too."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.dim)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        self.norm = nn.RMSNorm(shape.dim, eps=RMS_EPSILON)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        frequencies = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        angles = torch.outer(torch.arange(shape.context).float(), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, n) token ids → (batch, n, vocab) logits."""
        n = tokens.shape[1]
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, self.cos[:n], self.sin[:n])
        return F.linear(self.norm(x), self.embed_tokens.weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """(batch, n + 1) token ids → mean cross entropy in nats a token."""
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def make_ternary(self) -> None:
        """From here on the matrices compute as the finished model does."""
        for module in self.modules():
            if isinstance(module, BitLinear):
                module.ternary = True


class Trainer:
    """Muon for the matrices, AdamW for the rest, and a schedule over time."""

    def __init__(self, shape: Shape, tokens: Tensor, seed: int) -> None:
        torch.manual_seed(seed)
        self.shape = shape
        self.validation, self.training = tokens[: shape.validation_tokens], tokens[shape.validation_tokens :]
        if len(self.training) <= shape.context:
            raise SystemExit(
                f"the corpus must have {shape.validation_tokens + shape.context + 1} tokens or more, got {len(tokens)}"
            )
        self.model = BitNet(shape)
        matrices = [m.weight for m in self.model.modules() if isinstance(m, BitLinear)]
        self._others = [p for p in self.model.parameters() if all(p is not m for m in matrices)]
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices, lr=MATRIX_RATE, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(self._others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self._generator = torch.Generator().manual_seed(seed)

    def run(self, minutes: float, *, compiled: bool, report: Callable[[str], None]) -> float:
        """Train so long; the validation loss at the end, with ternary weights. `compiled`: once they are, compile."""
        start, step, mean_loss, ternary = time.monotonic(), 0, 0.0, False
        loss_of: Callable[[Tensor], Tensor] = self.model.loss
        while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
            if not ternary and done >= QUANTIZE_FROM:
                ternary = True
                self.model.make_ternary()
                loss_of = torch.compile(self.model.loss) if compiled else self.model.loss
                report(f"step {step}: ternary from here")
            loss = self._step(loss_of, step, done)
            step += 1
            mean_loss = loss if step == 1 else 0.98 * mean_loss + 0.02 * loss
            if step % self.shape.report_every == 0:
                report(f"step {step}, {time.monotonic() - start:.0f} s: loss {mean_loss:.3f}")
        self.model.make_ternary()
        return self.evaluate()

    def _step(self, loss_of: Callable[[Tensor], Tensor], step: int, done: float) -> float:
        rate = min(1, (step + 1) / WARM_UP_STEPS)
        if done > DECAY_FROM:
            rate *= max(LEAST_RATE, (1 - done) / (1 - DECAY_FROM))
        for optimizer, full_rate in zip(self._optimizers, (MATRIX_RATE, OTHER_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * full_rate
        loss = loss_of(self._batch(self.training, self._generator))
        loss.backward()
        nn.utils.clip_grad_norm_(self._others, 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    def _batch(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """(batch, context + 1) token ids from random places."""
        length = self.shape.context + 1
        starts = torch.randint(len(tokens) - length + 1, (self.shape.batch,), generator=generator)
        return torch.stack([tokens[start : start + length] for start in starts.tolist()])

    def evaluate(self) -> float:
        """Mean loss on the same eight batches of text that training never saw."""
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            return sum(float(self.model.loss(self._batch(self.validation, generator))) for _ in range(8)) / 8


def save_checkpoint(model: BitNet, shape: Shape, tokenizer: Tokenizer, directory: Path) -> None:
    """config.json, model.safetensors and tokenizer.json, as transformers' BitNetForCausalLM has them."""
    directory.mkdir(parents=True, exist_ok=True)
    groups = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn"}
    groups |= {"attn_sub_norm": "self_attn"}
    groups |= {"gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp", "ffn_sub_norm": "mlp"}
    state = {}
    for name, parameter in model.named_parameters():
        module = name.split(".")[-2]
        full = name.replace(module, f"{groups[module]}.{module}") if module in groups else name
        state["model." + full] = parameter.detach().float().contiguous()
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.dim,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "relu2",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": RMS_EPSILON,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "bos_token_id": special_ids(tokenizer)[0],
        "eos_token_id": special_ids(tokenizer)[1],
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    tokenizer.save(str(directory / "tokenizer.json"))


def sample(
    model: BitNet, shape: Shape, tokenizer: Tokenizer, prompt: str, n: int = 60, temperature: float = 0.7
) -> str:
    """The prompt and up to n more tokens."""
    begin, end, _ = special_ids(tokenizer)
    generator = torch.Generator().manual_seed(3)
    tokens = [begin, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    for _ in range(n):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[-shape.context :]]))[0, -1]
        token = int(torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator))
        if token == end:
            break
        tokens.append(token)
    return tokenizer.decode(tokens[1:])


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--corpus", type=Path, help="text made by corpus.py")
    parser.add_argument("--output", type=Path, default=Path("build/out/demo-checkpoint"), help="default: %(default)s")
    parser.add_argument("--minutes", type=float, help=f"default: {DEMO_MINUTES:g}, with --smoke {SMOKE_MINUTES:g}")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--smoke", action="store_true", help=f"a short run of a smaller model on {SMOKE_CORPUS.name}")
    arguments = parser.parse_args()
    corpus = arguments.corpus or (SMOKE_CORPUS if arguments.smoke else None)
    if corpus is None:
        parser.error("--corpus is needed, unless --smoke is given")
    if not corpus.is_file():
        parser.error(f"--corpus {corpus}: no such file")
    if arguments.minutes is not None and arguments.minutes <= 0:
        parser.error(f"--minutes must be positive, got {arguments.minutes:g}")
    shape = SMOKE if arguments.smoke else DEMO
    minutes = arguments.minutes or (SMOKE_MINUTES if arguments.smoke else DEMO_MINUTES)

    documents = read_documents(corpus)
    tokenizer = train_tokenizer(documents, shape.vocab_size)
    tokens = encode_documents(tokenizer, documents, arguments.seed)
    print(f"{len(documents)} documents, {len(tokens)} tokens", flush=True)
    trainer = Trainer(shape, tokens, arguments.seed)
    print(f"{sum(p.numel() for p in trainer.model.parameters())} parameters", flush=True)
    loss = trainer.run(minutes, compiled=not arguments.smoke, report=lambda line: print(line, flush=True))
    save_checkpoint(trainer.model, shape, tokenizer, arguments.output)
    print(f"{arguments.output}: validation loss {loss:.3f} nats a token with ternary weights")
    print(repr(sample(trainer.model, shape, tokenizer, "Once upon a time there was")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
