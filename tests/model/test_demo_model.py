"""build/model/demo/model.gguf: what its card says."""

from __future__ import annotations

from pathlib import Path

from tests.golden.reference import read_gguf
from tests.model.layout import CONVERTED_KEYS


def test_demo_model_is_small_and_laid_out_as_converted(demo_model: Path) -> None:
    assert demo_model.stat().st_size < 6_000_000
    reader = read_gguf(demo_model)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(fields) == CONVERTED_KEYS
    shape = {
        key.removeprefix("bitnet-b1.58."): value for key, value in fields.items() if key.startswith("bitnet-b1.58.")
    }
    assert {
        key: shape[key] for key in ("context_length", "embedding_length", "block_count", "feed_forward_length")
    } == {
        "context_length": 256,
        "embedding_length": 256,
        "block_count": 6,
        "feed_forward_length": 768,
    }
    assert sum(tensor.n_elements for tensor in reader.tensors) == 5_776_640
    specials = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"]) if token.startswith("<|")}
    assert specials == {"<|begin_of_text|>": 4093, "<|end_of_text|>": 4094, "<|eot_id|>": 4095}
