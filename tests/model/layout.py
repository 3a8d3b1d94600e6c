"""The keys of a BitNet GGUF in the order of the file."""

# microsoft/bitnet-b1.58-2B-4T-gguf, ggml-model-i2_s.gguf
PUBLISHED_KEYS = [
    "general.architecture",
    "general.name",
    "bitnet-b1.58.vocab_size",
    "bitnet-b1.58.context_length",
    "bitnet-b1.58.embedding_length",
    "bitnet-b1.58.block_count",
    "bitnet-b1.58.feed_forward_length",
    "bitnet-b1.58.rope.dimension_count",
    "bitnet-b1.58.attention.head_count",
    "bitnet-b1.58.attention.head_count_kv",
    "tokenizer.ggml.add_bos_token",
    "bitnet-b1.58.attention.layer_norm_rms_epsilon",
    "bitnet-b1.58.rope.freq_base",
    "general.file_type",
    "tokenizer.ggml.model",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.chat_template",
    "general.quantization_version",
]

# convert.py adds what the published file leaves to guess, and has no chat template where the checkpoint has none.
CONVERTED_KEYS = [key for key in PUBLISHED_KEYS if key != "tokenizer.chat_template"]
CONVERTED_KEYS.insert(CONVERTED_KEYS.index("tokenizer.ggml.tokens"), "tokenizer.ggml.pre")
CONVERTED_KEYS.insert(CONVERTED_KEYS.index("general.quantization_version"), "tokenizer.ggml.eot_token_id")
