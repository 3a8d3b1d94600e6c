"""How commands fail: an exit code of docs/cli.md, and one line that names what is wrong, what it is and must be."""

from __future__ import annotations

import os
import random
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_gguf import ModelShape
from synthesize import synthesize
from tests.cli.bitnet import Argument, Bitnet, error_line
from tests.cli.gguf import Gguf

INTERNAL, USAGE, UNREADABLE, TRUNCATED, NOT_GGUF, VERSION, UNSUPPORTED, INVALID, CONTEXT, MEMORY = 1, 2, *range(4, 12)

MIB = 2**20


def generate(bitnet: Bitnet, model: Path, *options: Argument) -> tuple[int, str]:
    return bitnet.error("generate", "-m", model, "-p", "Once", "-n", 1, *options)


# the file


def test_a_missing_file(bitnet: Bitnet, tmp_path: Path) -> None:
    missing = tmp_path / "model.gguf"
    for command in (["info"], ["generate", "-p", "a", "-m"], ["worker", "-m"], ["tokenize", "-m"], ["bench", "-m"]):
        assert bitnet.error(*command, missing) == (UNREADABLE, f"{missing}: No such file or directory")


def test_what_is_no_regular_file(bitnet: Bitnet, tmp_path: Path) -> None:
    assert bitnet.error("info", tmp_path) == (UNREADABLE, f"{tmp_path}: is a directory, expected a file")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, Path("/dev/null")):
        assert bitnet.error("info", path) == (UNREADABLE, f"{path}: not a regular file")


def test_a_file_without_permission(bitnet: Bitnet, demo_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    shutil.copy(demo_model, model)
    model.chmod(0)
    command = [str(bitnet.path), "info", str(model)]
    if os.geteuid() == 0:  # root reads everything, unless that capability is dropped
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    assert Bitnet(Path(command[0])).error(*command[1:]) == (UNREADABLE, f"{model}: Permission denied")


def test_a_line_break_in_a_name_does_not_break_the_line(bitnet: Bitnet, tmp_path: Path) -> None:
    for name in ("a\nb.gguf", "a\x1b[31m\x7fb.gguf", os.fsdecode(b"a\xff\xc3b.gguf")):
        code, message = bitnet.error("info", tmp_path / name)
        assert code == UNREADABLE
        assert message.startswith(f"{tmp_path}/a")
        assert message.endswith("b.gguf: No such file or directory")
        assert message.isprintable()


def test_other_files_that_cannot_be_read_or_written(bitnet: Bitnet, demo_model: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    for command in (("generate", "-f"), ("perplexity", "-f")):
        for path, why in ((missing, "No such file or directory"), (tmp_path, "Is a directory"), ("", "No such file")):
            code, message = bitnet.error(command[0], "-m", demo_model, command[1], path)
            assert code == UNREADABLE
            assert message.startswith(f"{path}: cannot be read: {why}")
    for path, why in (
        (tmp_path, "Is a directory"),
        (missing / "logits", "No such file or directory"),
        ("/dev/full", "No space left on device"),
    ):
        code, message = bitnet.error("logits", "-m", demo_model, "--tokens", "1", "-o", path)
        assert (code, message) == (UNREADABLE, f"{path}: cannot be written: {why}")


def test_logits_do_not_overwrite_their_model(bitnet: Bitnet, demo_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    shutil.copy(demo_model, model)
    code, message = bitnet.error("logits", "-m", model, "--tokens", "1", "-o", tmp_path / "." / "model.gguf")
    assert (code, message) == (UNREADABLE, f"{model}: cannot be written: it is the model")
    assert model.read_bytes() == demo_model.read_bytes()


# its container


def test_a_file_cut_anywhere(bitnet: Bitnet, demo_model: Path, tmp_path: Path, gguf: Gguf) -> None:
    data = demo_model.read_bytes()
    cut = tmp_path / "cut.gguf"
    places = {
        "nothing": 0,
        "the magic": 3,
        "the version": 6,
        "the counts": 20,
        "the first key": 40,
        "the vocabulary": gguf.end_of("tokenizer.ggml.tokens") + 5000,
        "a tensor's name": gguf.end_of("blk.2.ffn_up.weight") - 4,
        "a tensor's shape": gguf.end_of("blk.2.ffn_up.weight") + 9,
        "a tensor's offset": gguf.end_of("output_norm.weight") + 18,
        "the data": len(data) // 2,
        "the last byte": len(data) - 1,
    }
    draw = random.Random(1)
    places |= {f"byte {n}": n for n in (draw.randrange(len(data)) for _ in range(40))}
    for what, length in places.items():
        cut.write_bytes(data[:length])
        code, message = bitnet.error("info", cut)
        assert (what, code) == (what, TRUNCATED)
        assert message.startswith(f"{cut}: ")
        assert ("expected" in message or "remain" in message) == (length > 0)

    cut.write_bytes(data[:-1])
    code, message = generate(bitnet, cut)
    assert (code, '"output_norm.weight": expected 1024 bytes' in message) == (TRUNCATED, True)


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"GGML", b"\0\0\0\0", b"{", b"ggufxxxx"])
def test_what_is_not_gguf(start: bytes, bitnet: Bitnet, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(start + b"\0" * 1000)
    code, message = bitnet.error("info", file)
    assert code == NOT_GGUF
    assert message.startswith(f"{file}: not a GGUF file: it begins with ")
    assert message.endswith('expected "GGUF"')


@pytest.mark.parametrize(
    ("version", "says"),
    [(2, "GGUF version 2, expected 3"), (4, "GGUF version 4, expected 3"), (3 << 24, "big-endian GGUF")],
)
def test_another_version(version: int, says: str, bitnet: Bitnet, gguf: Gguf, tmp_path: Path) -> None:
    gguf.set_u32(4, version)
    (tmp_path / "x.gguf").write_bytes(gguf.data)
    code, message = bitnet.error("info", tmp_path / "x.gguf")
    assert code == VERSION
    assert says in message


# the model in it

Change = Callable[[Gguf], None]
ARCHITECTURE = "bitnet-b1.58"


def other_architecture(gguf: Gguf) -> None:
    start, end = gguf.text("general.architecture")
    gguf.data[start:end] = b"bitnet-b1.59"


def other_tokenizer(gguf: Gguf) -> None:
    start, end = gguf.text("tokenizer.ggml.model")
    gguf.data[start:end] = b"bert"


def other_split(gguf: Gguf) -> None:
    start, end = gguf.text("tokenizer.ggml.pre")
    gguf.data[start:end] = b"qwen2-bpe"


def tensor_not_finite(gguf: Gguf) -> None:
    """The scale of an I2_S tensor lies behind its codes; the last of the file is blk.5.ffn_down.weight."""
    norm = 256 * 4
    scale = len(gguf.data) - norm - 32
    assert 0 < struct.unpack_from("<f", gguf.data, scale)[0] < 10
    struct.pack_into("<f", gguf.data, scale, float("nan"))


WRONG_MODELS: dict[str, tuple[Change, int, list[str]]] = {
    "architecture": (other_architecture, UNSUPPORTED, ["general.architecture", '"bitnet-b1.59"', "bitnet-b1.58"]),
    "tokenizer": (other_tokenizer, UNSUPPORTED, ["tokenizer.ggml.model", '"bert"', "gpt2"]),
    "split": (other_split, UNSUPPORTED, ["tokenizer.ggml.pre", '"qwen2-bpe"', '"llama-bpe"']),
    "tensor of a layer that there is not": (
        lambda gguf: gguf.set_key(f"{ARCHITECTURE}.block_count", 5),
        UNSUPPORTED,
        ["blk.5.", "do not have"],
    ),
    "tensor type": (
        lambda gguf: gguf.set_tensor_type("blk.3.attn_q.weight", 99),
        UNSUPPORTED,
        ['"blk.3.attn_q.weight"', "unknown tensor type 99", "I2_S (36)"],
    ),
    "norm not in float32": (
        lambda gguf: gguf.set_tensor_type("blk.3.attn_norm.weight", 1),
        UNSUPPORTED,
        ["blk.3.attn_norm.weight", "type F16, expected F32"],
    ),
    "matrix not ternary": (
        lambda gguf: gguf.set_tensor_type("blk.0.attn_k.weight", 8),
        UNSUPPORTED,
        ["blk.0.attn_k.weight", "Q8_0", "expected I2_S"],
    ),
    "tensor missing": (
        lambda gguf: gguf.rename("blk.5.ffn_gate.weight", "blk.5.ffn_gats.weight"),
        INVALID,
        ["blk.5.ffn_gate.weight", "missing"],
    ),
    "embedding missing": (
        lambda gguf: gguf.rename("token_embd.weight", "token_embx.weight"),
        INVALID,
        ["token_embd.weight", "missing"],
    ),
    "tensor twice": (
        lambda gguf: gguf.rename("blk.5.attn_q.weight", "blk.4.attn_q.weight"),
        INVALID,
        ['"blk.4.attn_q.weight"', "twice"],
    ),
    "fewer rows": (
        lambda gguf: gguf.set_dimension("blk.1.ffn_up.weight", 1, 512),
        INVALID,
        ["blk.1.ffn_up.weight", "[256, 512], expected [256, 768]"],
    ),
    "fewer columns": (
        lambda gguf: gguf.set_dimension("blk.1.ffn_up.weight", 0, 128),
        INVALID,
        ["blk.1.ffn_up.weight", "[128, 768], expected [256, 768]"],
    ),
    "rows of no whole blocks": (
        lambda gguf: gguf.set_dimension("blk.1.ffn_up.weight", 0, 100),
        INVALID,
        ['"blk.1.ffn_up.weight"', "row length 100, expected a multiple of 128"],
    ),
    "shorter norm": (
        lambda gguf: gguf.set_dimension("output_norm.weight", 0, 128),
        INVALID,
        ["output_norm.weight", "[128], expected [256]"],
    ),
    "no dimension": (
        lambda gguf: gguf.set_dimension("output_norm.weight", 0, 0),
        INVALID,
        ['"output_norm.weight"', "dimension 0 is 0"],
    ),
    "more elements than there are bytes": (
        lambda gguf: gguf.set_dimension("token_embd.weight", 1, 2**50),
        TRUNCATED,
        ['"token_embd.weight"', "expected 576460752303423488 bytes"],
    ),
    "scale not finite": (tensor_not_finite, INVALID, ["blk.5.ffn_down.weight", "not finite"]),
    "key missing": (
        lambda gguf: gguf.rename(f"{ARCHITECTURE}.block_count", f"{ARCHITECTURE}.block_kount"),
        INVALID,
        [f'"{ARCHITECTURE}.block_count"', "missing"],
    ),
    "key of another type": (
        lambda gguf: gguf.set_key_type(f"{ARCHITECTURE}.block_count", "f32"),
        INVALID,
        [f'"{ARCHITECTURE}.block_count"', "type f32, expected an integer"],
    ),
    "key out of range": (
        lambda gguf: gguf.set_key(f"{ARCHITECTURE}.block_count", 0),
        INVALID,
        [f"{ARCHITECTURE}.block_count is 0, expected 1 to"],
    ),
    "epsilon out of range": (
        lambda gguf: gguf.set_float(f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon", 1.5),
        INVALID,
        [f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon is 1.5, expected 0 to below 1"],
    ),
    "base out of range": (
        lambda gguf: gguf.set_float(f"{ARCHITECTURE}.rope.freq_base", 0.5),
        INVALID,
        [f"{ARCHITECTURE}.rope.freq_base is 0.5, expected 1 to 1e12"],
    ),
    "scaling of positions": (
        lambda gguf: gguf.add_keys((f"{ARCHITECTURE}.rope.scaling.type", "yarn")),
        UNSUPPORTED,
        [f'{ARCHITECTURE}.rope.scaling.type "yarn" is not supported'],
    ),
    "scaling out of range": (
        lambda gguf: gguf.add_keys((f"{ARCHITECTURE}.rope.scaling.factor", 0.5)),
        INVALID,
        [f"{ARCHITECTURE}.rope.scaling.factor is 0.5, expected 1 to 1e6"],
    ),
    "scaling that is no number": (
        lambda gguf: gguf.add_keys((f"{ARCHITECTURE}.rope.scaling.factor", "4")),
        INVALID,
        [f"{ARCHITECTURE}.rope.scaling.factor"],
    ),
    "dimensions out of range": (
        lambda gguf: gguf.set_key(f"{ARCHITECTURE}.rope.dimension_count", 2048),
        INVALID,
        [f"{ARCHITECTURE}.rope.dimension_count is 2048, expected 1 to 1024"],
    ),
    "more layers": (
        lambda gguf: gguf.set_key(f"{ARCHITECTURE}.block_count", 7),
        INVALID,
        ["blk.6.attn_norm.weight", "missing"],
    ),
    "heads that do not group": (
        lambda gguf: gguf.set_key(f"{ARCHITECTURE}.attention.head_count_kv", 3),
        INVALID,
        ["head_count 4", "head_count_kv 3"],
    ),
    "head dimension": (
        lambda gguf: gguf.set_key(f"{ARCHITECTURE}.rope.dimension_count", 24),
        UNSUPPORTED,
        ["24", "multiple of 16"],
    ),
    "vocabulary": (
        lambda gguf: gguf.set_key(f"{ARCHITECTURE}.vocab_size", 4095),
        INVALID,
        ["token_embd.weight", "[256, 4096], expected [256, 4095]"],
    ),
    "end token": (
        lambda gguf: gguf.set_key("tokenizer.ggml.eos_token_id", 4096),
        INVALID,
        ['"tokenizer.ggml.eos_token_id"', "4096"],
    ),
}


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_a_model_that_is_wrong(name: str, bitnet: Bitnet, gguf: Gguf, tmp_path: Path) -> None:
    change, expected_code, says = WRONG_MODELS[name]
    change(gguf)
    model = tmp_path / "wrong.gguf"
    model.write_bytes(gguf.data)
    code, message = generate(bitnet, model)
    assert code == expected_code
    assert message.startswith(f"{model}: ")
    for part in says:
        assert part in message
    assert bitnet.error("worker", "-m", model) == (code, message)


@pytest.fixture(scope="module")
def packed_model(bitnet: Bitnet, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "packed.gguf"
    bitnet("pack", "-m", demo_model, "-o", path, "--output-bits", 6)
    return path


def assert_ends_well(bitnet: Bitnet, model: Path) -> None:
    """Whatever is wrong with the model: a text, or an error that is one line."""
    run = bitnet.run("generate", "-m", model, "-p", "Once upon", "-n", 3, "--ctx-size", 8)
    assert run.returncode in {0, USAGE, *range(TRUNCATED, MEMORY + 1)}
    if run.returncode:
        error_line(run.stderr)


@pytest.mark.parametrize("packed", [False, True])
@settings(max_examples=100)
@given(data=st.data())
def test_a_damaged_header_never_crashes(
    data: st.DataObject,
    packed: bool,
    bitnet: Bitnet,
    demo_model: Path,
    packed_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model = bytearray((packed_model if packed else demo_model).read_bytes())
    vocabulary = model.index(b"tokenizer.ggml.tokens")
    tensors = model.index(b"token_embd.weight")
    places = st.integers(0, vocabulary + 64) | st.integers(tensors - 600, tensors + 4000)
    for place in data.draw(st.lists(places, min_size=1, max_size=6)):
        model[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(model)
    assert_ends_well(bitnet, path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weights", ["0xff", "0x00", "0x7f", "random"])
def test_damaged_weights_never_crash(
    weights: str, packed: bool, bitnet: Bitnet, demo_model: Path, packed_model: Path, tmp_path: Path
) -> None:
    """A header as it should be, and behind it bytes that are no weights."""
    model = (packed_model if packed else demo_model).read_bytes()
    start = model.index(b"output_norm.weight") + 200
    draw = random.Random(1)
    n = len(model) - start
    path = tmp_path / "damaged.gguf"
    path.write_bytes(model[:start] + (draw.randbytes(n) if weights == "random" else bytes([int(weights, 16)]) * n))
    assert_ends_well(bitnet, path)
    run = bitnet.run("pack", "-m", path, "-o", tmp_path / "again.gguf")
    assert run.returncode in (0, UNSUPPORTED, INVALID)
    if run.returncode == 0:
        assert_ends_well(bitnet, tmp_path / "again.gguf")


def test_numbers_that_are_none_crash_nothing(bitnet: Bitnet, gguf: Gguf, tmp_path: Path) -> None:
    """A norm of NaN makes every logit NaN."""
    gguf.data[-256 * 4 :] = struct.pack("<f", float("nan")) * 256
    model = tmp_path / "nan.gguf"
    model.write_bytes(gguf.data)
    for options in ((), ("--temperature", 0), ("--top-k", 0), ("--repeat-penalty", 1.5), ("--top-k", 4096)):
        run = bitnet.run("generate", "-m", model, "-p", "Once", "-n", 4, *options)
        assert run.returncode in (0, INTERNAL, INVALID)
        if run.returncode:
            error_line(run.stderr)


# context and memory


def test_a_prompt_longer_than_the_context(bitnet: Bitnet, demo_model: Path, tmp_path: Path) -> None:
    prompt = "one two three four five six seven"
    n_prompt = 1 + len(bitnet.json("tokenize", "-m", demo_model, stdin=prompt.encode()))
    options = ("generate", "-m", demo_model, "-p", prompt)
    code, message = bitnet.error(*options, "--ctx-size", n_prompt)
    assert code == CONTEXT
    assert f"prompt has {n_prompt} tokens" in message
    assert f"context size of {n_prompt} " in message
    assert bitnet.run(*options, "--ctx-size", n_prompt + 1).returncode == 0
    assert bitnet.run(*options, "--ctx-size", n_prompt, "-n", 0).returncode == 0
    assert bitnet.error(*options, "--ctx-size", n_prompt - 1, "-n", 0)[0] == CONTEXT

    code, message = bitnet.error("generate", "-m", demo_model, "-p", "many words " * 300)
    assert code == CONTEXT
    assert "exceeds the available context size of 256 tokens" in message
    code, message = bitnet.error("logits", "-m", demo_model, "--tokens", "1,2,3", "-o", "x", "--ctx-size", 2)
    assert (code, "3 tokens" in message, "size of 2 " in message) == (CONTEXT, True, True)
    code, message = bitnet.error("bench", "-m", demo_model, "--prompt-tokens", 10, "--depth", 250)
    assert (code, "260" in message or "314" in message, "holds 256" in message) == (CONTEXT, True, True)
    (tmp_path / "text").write_text("many words " * 150 + "\n---\n" + "many words " * 150)
    code, message = bitnet.error("bench", "-m", demo_model, "--prompt-tokens", 0, "--replay", tmp_path / "text")
    assert (code, "--replay" in message, "holds 256" in message) == (CONTEXT, True, True)


@pytest.mark.parametrize("text", ["", "no line", "a prompt\n---\n", "a prompt\n--- \na text"])
def test_a_text_to_replay_without_its_parts(text: str, bitnet: Bitnet, demo_model: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(text)
    code, message = bitnet.error("bench", "-m", demo_model, "--replay", tmp_path / "text")
    assert (code, '"---"' in message) == (USAGE, True)


def test_a_context_longer_than_the_models(bitnet: Bitnet, demo_model: Path) -> None:
    code, message = generate(bitnet, demo_model, "--ctx-size", 257)
    assert (code, message) == (USAGE, "--ctx-size 257 is above the model's context length of 256")


def limit_memory(n_bytes: int) -> Callable[[], None]:
    """What a child does to itself before it becomes the engine."""
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few weights, but a long context and wide activations: most of its memory is neither file nor vocabulary."""
    path = tmp_path_factory.mktemp("models") / "wide.gguf"
    synthesize(path, ModelShape(1024, 16384, 1024, 2, 4096, 16, 16))
    return path


LIMITED: dict[str, tuple[Argument, ...]] = {
    "one thread": ("generate", "-p", "Once upon a time", "-n", 4, "--threads", 1),
    "five threads": ("generate", "-p", "Once upon a time", "-n", 4, "--threads", 5),
    "json": ("generate", "-p", "Once upon a time", "-n", 4, "--threads", 2, "--json"),
    "worker": ("worker", "--threads", 2),
    "logits": ("logits", "--tokens", "1,2,3", "-o", "/dev/null", "--threads", 2),
    "perplexity": ("perplexity", "-f", "/proc/self/cmdline", "--ctx-size", 32, "--threads", 2),
    "tokenize": ("tokenize",),
}


@pytest.mark.parametrize("name", LIMITED)
@pytest.mark.parametrize("model", ["demo", "wide"])
def test_any_limit_of_memory_is_kept_or_named(
    name: str, model: str, bitnet: Bitnet, demo_model: Path, wide_model: Path
) -> None:
    """From where the program itself hardly fits to where the command succeeds."""
    path = {"demo": demo_model, "wide": wide_model}[model]
    command, *options = LIMITED[name]
    request = b'{"op":"completion","id":"a","prompt":"Once upon a time","n_predict":4}\n'
    limit, step, failures = 6 * MIB, 96 * 1024, set()
    while True:
        run = bitnet.run(command, "-m", path, *options, stdin=request, preexec_fn=limit_memory(limit))
        if run.returncode == 0 and b'"error"' not in run.stdout:
            break
        if run.returncode:
            assert (limit, run.returncode) == (limit, MEMORY), run.stderr
            failures.add(error_line(run.stderr))
        limit += step
        step = max(step, limit // 40)
        assert limit < 4096 * MIB
    assert failures


def test_memory_that_cannot_be_had_is_named_before_it_is_touched(bitnet: Bitnet, gguf: Gguf, tmp_path: Path) -> None:
    gguf.set_key(f"{ARCHITECTURE}.context_length", 2**20)
    model = tmp_path / "long.gguf"
    model.write_bytes(gguf.data)
    code, message = bitnet.error(
        *("generate", "-m", model, "-p", "a", "--ctx-size", 2**20, "--kv-type", "f32"),
        preexec_fn=limit_memory(2**30),
    )
    assert code == MEMORY
    assert "the KV cache of 1048576 positions takes 6144 MiB" in message


# options

GENERATE = ("generate", "-p", "a")
WRONG_OPTIONS: list[tuple[tuple[Argument, ...], str]] = [
    ((*GENERATE, "--threads", 0), '--threads: must be an integer from 1 to 256, got "0"'),
    ((*GENERATE, "--threads", 257), '--threads: must be an integer from 1 to 256, got "257"'),
    ((*GENERATE, "--threads", "two"), '--threads: must be an integer from 1 to 256, got "two"'),
    ((*GENERATE, "--threads", "1\n2"), '--threads: must be an integer from 1 to 256, got "1\\n2"'),
    ((*GENERATE, "--threads", ""), '--threads: must be an integer from 1 to 256, got ""'),
    ((*GENERATE, "--threads", "1.5"), "--threads: must be an integer from 1 to 256"),
    ((*GENERATE, "--ctx-size", 0), '--ctx-size: must be an integer from 1 to 1073741824, got "0"'),
    ((*GENERATE, "--ctx-size", -1), "--ctx-size: must be an integer from 1 "),
    ((*GENERATE, "--ctx-size", 2**64), f'got "{2**64}"'),
    ((*GENERATE, "--batch-size", 0), '--batch-size: must be an integer from 1 to 1024, got "0"'),
    ((*GENERATE, "--batch-size", 1025), '--batch-size: must be an integer from 1 to 1024, got "1025"'),
    ((*GENERATE, "--isa", "sse2"), '--isa: must be scalar|avx2|avx512|avx512-vbmi|amx, got "sse2"'),
    ((*GENERATE, "--isa", 1), '--isa: must be scalar|avx2|avx512|avx512-vbmi|amx, got "1"'),
    ((*GENERATE, "--kv-type", "q8_0"), '--kv-type: must be f16|f32|i8, got "q8_0"'),
    ((*GENERATE, "--n-predict", -2), '--n-predict: must be an integer from -1 to 1073741824, got "-2"'),
    ((*GENERATE, "--n-predict", 2**32), f'--n-predict: must be an integer from -1 to 1073741824, got "{2**32}"'),
    ((*GENERATE, "--temperature", -0.1), '--temperature: must be a number from 0.0 to 100.0, got "-0.1"'),
    ((*GENERATE, "--temperature", "nan"), '--temperature: must be a number from 0.0 to 100.0, got "nan"'),
    ((*GENERATE, "--temperature", "inf"), '--temperature: must be a number from 0.0 to 100.0, got "inf"'),
    ((*GENERATE, "--temperature", "0x1"), "--temperature: must be a number from 0.0 to 100.0"),
    ((*GENERATE, "--top-k", -1), '--top-k: must be an integer from 0 to 1073741824, got "-1"'),
    ((*GENERATE, "--top-p", -0.1), '--top-p: must be a number from 0.0 to 1.0, got "-0.1"'),
    ((*GENERATE, "--top-p", 1.01), '--top-p: must be a number from 0.0 to 1.0, got "1.01"'),
    ((*GENERATE, "--min-p", 2), '--min-p: must be a number from 0.0 to 1.0, got "2"'),
    ((*GENERATE, "--repeat-penalty", 0), '--repeat-penalty: must be a number from 1e-09 to 100.0, got "0"'),
    ((*GENERATE, "--repeat-last-n", -2), '--repeat-last-n: must be an integer from -1 to 1073741824, got "-2"'),
    ((*GENERATE, "--presence-penalty", 101), "--presence-penalty: must be a number from -100.0 to 100.0"),
    ((*GENERATE, "--frequency-penalty", "x"), "--frequency-penalty: must be a number from -100.0 to 100.0"),
    ((*GENERATE, "--seed", -2), '--seed: must be an integer from -1 to 9223372036854775807, got "-2"'),
    ((*GENERATE, "--seed", 2**63), f'--seed: must be an integer from -1 to 9223372036854775807, got "{2**63}"'),
    ((*GENERATE, "--stop", os.fsdecode(b"\x80")), "--stop: must be UTF-8"),
    ((*GENERATE, "--prompt-file", "x"), "--prompt"),
    ((*GENERATE, "--n-predict"), "--n-predict"),
    ((*GENERATE, "more"), "more"),
    ((*GENERATE, "--no-such-option"), "--no-such-option"),
    (("logits", "-o", "x", "--tokens", ""), '--tokens: must be token ids from 0 to 4095, got ""'),
    (("logits", "-o", "x", "--tokens", "1,4096"), '--tokens: must be token ids from 0 to 4095, got "4096"'),
    (("logits", "-o", "x", "--tokens", "1,-1"), '--tokens: must be token ids from 0 to 4095, got "-1"'),
    (("logits", "-o", "x", "--tokens", "1,,2"), '--tokens: must be token ids from 0 to 4095, got ""'),
    (("logits", "-o", "x", "--tokens", "1,2,"), '--tokens: must be token ids from 0 to 4095, got ""'),
    (("logits", "-o", "x", "--tokens", "1 2"), '--tokens: must be token ids from 0 to 4095, got "1 2"'),
    (("logits", "-o", "x"), "--tokens is required"),
    (("perplexity",), "--file is required"),
    (("perplexity", "-f", "/dev/null"), "at least 2 tokens"),
    (("perplexity", "-f", str(Path(__file__)), "--ctx-size", 2), "a context of at least 3"),
    (("bench", "--depth", -1), '--depth: must be an integer from 0 to 1073741824, got "-1"'),
    (("bench", "--prompt-tokens", 2**64), f'--prompt-tokens: must be an integer from 0 to 1073741824, got "{2**64}"'),
    (("bench", "--repetitions", 0), '--repetitions: must be an integer from 1 to 1000, got "0"'),
]


@pytest.mark.parametrize(("arguments", "says"), WRONG_OPTIONS, ids=lambda value: str(value)[:60])
def test_a_wrong_option(arguments: tuple[Argument, ...], says: str, bitnet: Bitnet, demo_model: Path) -> None:
    command, *options = arguments
    code, message = bitnet.error(command, "-m", demo_model, *options)
    assert code == USAGE
    assert says in message


def test_numbers_are_decimal(bitnet: Bitnet, demo_model: Path) -> None:
    result = bitnet.json("generate", "-m", demo_model, "-p", "a", "-n", "010", "--ignore-eos", "--json")
    assert result["tokens_predicted"] == 10


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "a command is missing"),
        (("generat", "-m", "x"), '"generat" is not a command'),
        (("-m", "x"), '"-m" is not a command'),
        (("generate", "-p", "a"), "--model is required"),
        (("info",), "file is required"),
    ],
)
def test_a_wrong_command(arguments: tuple[str, ...], says: str, bitnet: Bitnet) -> None:
    code, message = bitnet.error(*arguments)
    assert code == USAGE
    assert says in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "{}",
        "5",
        "null",
        "[1.5]",
        "[true]",
        "[-1]",
        "[4096]",
        "[4294967297]",
        '["a"]',
        "[[1]]",
        "[1] x",
        pytest.param("[" * 200_000 + "]" * 200_000, id="nested"),
    ],
)
def test_detokenize_takes_an_array_of_token_ids(text: str, bitnet: Bitnet, demo_model: Path) -> None:
    code, message = bitnet.error("detokenize", "-m", demo_model, stdin=text.encode())
    assert code == USAGE
    assert message.startswith("standard input")


def test_standard_input_that_cannot_be_read(bitnet: Bitnet, demo_model: Path, tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        code, message = bitnet.error("tokenize", "-m", demo_model, preexec_fn=lambda: os.dup2(folder, 0))
    finally:
        os.close(folder)
    assert (code, message) == (UNREADABLE, "standard input: cannot be read: Is a directory")
