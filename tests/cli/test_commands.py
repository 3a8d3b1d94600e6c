"""What the commands print."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from function.settings import ROOT
from tests.cli.bitnet import Bitnet, error_line

PROMPT = "Once upon a time"
GREEDY = ("--temperature", 0)
EXIT_UNREADABLE = 4


def processor_isas() -> list[str]:
    """The instruction sets that this processor has kernels for, as the kernel lists its flags."""
    flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text().split("flags")[1].splitlines()[0]))
    avx512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
    vbmi = avx512 | {"avx512vbmi"}
    needed = {"avx512": avx512, "avx512-vbmi": vbmi, "amx": vbmi | {"amx_tile", "amx_int8"}}
    return ["scalar", "avx2", *(isa for isa, these in needed.items() if these <= flags)]


# generate


def test_generate_prints_the_text_that_json_holds(bitnet: Bitnet, demo_model: Path) -> None:
    options = ("generate", "-m", demo_model, "-p", PROMPT, "-n", 24, *GREEDY)
    result = bitnet.json(*options, "--json")
    assert list(result) == [
        *("content", "tokens", "stop_type", "stopping_word", "tokens_predicted", "tokens_evaluated"),
        *("truncated", "seed", "timings"),
    ]
    assert bitnet(*options) == result["content"].encode() + b"\n"
    assert result["content"].startswith(" there")
    assert bitnet("detokenize", "-m", demo_model, stdin=str(result["tokens"]).encode()) == result["content"].encode()
    assert (result["stop_type"], result["stopping_word"], result["truncated"]) == ("limit", "", False)
    assert result["tokens_predicted"] == len(result["tokens"]) == 24
    assert result["tokens_evaluated"] == 1 + len(bitnet.json("tokenize", "-m", demo_model, stdin=PROMPT.encode()))
    timings = result["timings"]
    assert (timings["prompt_n"], timings["predicted_n"]) == (result["tokens_evaluated"], 24)
    for phase in ("prompt", "predicted"):
        milliseconds, per_second = timings[f"{phase}_ms"], timings[f"{phase}_per_second"]
        assert per_second * milliseconds / 1000 == pytest.approx(timings[f"{phase}_n"])


def test_greedy_text_is_always_the_same(bitnet: Bitnet, demo_model: Path) -> None:
    options = ("generate", "-m", demo_model, "-p", PROMPT, "-n", 64, *GREEDY)
    text = bitnet(*options)
    assert bitnet(*options) == text
    assert bitnet(*options, "--seed", 5, "--top-p", 0.1) == text
    for variant in (("--threads", 1), ("--threads", 3), ("--batch-size", 1), ("--isa", "scalar")):
        assert bitnet(*options, *variant) == text


def test_a_seed_repeats_a_text(bitnet: Bitnet, demo_model: Path) -> None:
    options = ("generate", "-m", demo_model, "-p", PROMPT, "-n", 24, "--temperature", 1.5, "--top-k", 0)
    texts = {seed: bitnet(*options, "--seed", seed) for seed in (0, 1, 2, 2**63 - 1)}
    assert len(set(texts.values())) == len(texts)
    for seed, text in texts.items():
        assert bitnet(*options, "--seed", seed) == text
    random = bitnet.json(*options, "--json")
    assert bitnet(*options, "--seed", random["seed"]) == random["content"].encode() + b"\n"


def test_generation_ends_before_the_first_stop_string(bitnet: Bitnet, demo_model: Path) -> None:
    options = ("generate", "-m", demo_model, "-p", PROMPT, "-n", 40, *GREEDY)
    text = bitnet.json(*options, "--json")["content"]
    late, early = text[60:68], text[21:33]  # both begin and end within words
    stops = ("--stop", "never said", "--stop", late, "--stop", "", "--stop", early)
    result = bitnet.json(*options, *stops, "--json")
    assert result["content"] == text[: text.index(early)]
    assert (result["stop_type"], result["stopping_word"]) == ("word", early)
    assert bitnet(*options, *stops) == result["content"].encode() + b"\n"


@pytest.mark.parametrize("stop", ["{}", "[a,b]", "%%", "-x", "--json"])
def test_a_stop_string_is_taken_as_it_is(stop: str, bitnet: Bitnet, demo_model: Path) -> None:
    options = ("generate", "-m", demo_model, "-p", PROMPT, "-n", 12, *GREEDY)
    assert bitnet(*options, f"--stop={stop}") == bitnet(*options)


def test_the_prompt_can_be_a_file(bitnet: Bitnet, demo_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt"
    file.write_text("“Old king,”\n he said.\n")
    options = ("generate", "-m", demo_model, "-n", 8, *GREEDY)
    assert bitnet(*options, "-f", file) == bitnet(*options, "-p", file.read_text())


def test_the_prompt_can_be_any_bytes(bitnet: Bitnet, demo_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt"
    file.write_bytes(b"\xff\xfe\x00 Once \xe2\x80 upon\xf0\x9f")
    result = bitnet.json("generate", "-m", demo_model, "-f", file, "-n", 8, "--json")
    n_tokens = len(bitnet.json("tokenize", "-m", demo_model, stdin=file.read_bytes()))
    assert result["tokens_evaluated"] == 1 + n_tokens


def test_an_empty_prompt_is_the_beginning_of_a_text(bitnet: Bitnet, demo_model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    for prompt in ((), ("-p", ""), ("-f", empty)):
        result = bitnet.json("generate", "-m", demo_model, "-n", 4, "--ignore-eos", "--json", *prompt)
        assert (result["tokens_evaluated"], result["tokens_predicted"]) == (1, 4)
        code, message = bitnet.error("generate", "-m", demo_model, "--no-bos", *prompt)
        assert (code, message) == (2, "--prompt: must have at least 1 token, got 0")


def test_bos_special_and_chat_make_the_prompt(bitnet: Bitnet, demo_model: Path) -> None:
    def evaluated(*options: str) -> tuple[int, str]:
        result = bitnet.json("generate", "-m", demo_model, "-n", 16, *GREEDY, "--json", *options)
        return result["tokens_evaluated"], result["content"]

    n, text = evaluated("-p", PROMPT)
    assert evaluated("-p", PROMPT, "--no-bos")[0] == n - 1
    assert evaluated("-p", "<|begin_of_text|>" + PROMPT, "--special") == (n, text)
    assert evaluated("-p", "<|begin_of_text|>" + PROMPT)[0] > n + 1
    chat = evaluated("-p", "  Who are you?\n", "--chat")
    assert chat == evaluated("-p", "User: Who are you?<|eot_id|>Assistant: ", "--special")
    look_alike = evaluated("-p", "<|eot_id|>", "--chat")
    assert look_alike[0] > evaluated("-p", "User: <|eot_id|><|eot_id|>Assistant: ", "--special")[0]


def test_n_predict_from_nothing_to_a_full_context(bitnet: Bitnet, demo_model: Path) -> None:
    options = ("generate", "-m", demo_model, "-p", PROMPT, "--ignore-eos", "--ctx-size", 48, "--json")
    nothing = bitnet.json(*options, "-n", 0)
    assert (nothing["content"], nothing["tokens"], nothing["stop_type"]) == ("", [], "limit")
    assert not nothing["truncated"]
    room = 48 - nothing["tokens_evaluated"]
    assert bitnet(*options[:-1], "-n", 0) == b"\n"
    for n_predict, truncated in ((-1, True), (room + 1, True), (room, False), (room - 1, False)):
        result = bitnet.json(*options, "-n", n_predict)
        assert result["tokens_predicted"] == (room if truncated else n_predict)
        assert (result["truncated"], result["stop_type"]) == (truncated, "limit")


def test_generation_ends_at_an_end_token(bitnet: Bitnet, demo_model: Path) -> None:
    """Among tokens drawn alike there is an end token now and then."""
    alike = ("--temperature", 100, "--top-k", 0, "--top-p", 1, "--min-p", 0)
    options = ("generate", "-m", demo_model, "-p", PROMPT, "-n", -1, *alike)
    results = (bitnet.json(*options, "--seed", seed, "--json") for seed in range(200))
    result = next(result for result in results if result["stop_type"] == "eos")
    end = result["tokens"][-1]
    assert bitnet("detokenize", "-m", demo_model, stdin=f"[{end}]".encode()) in (b"<|end_of_text|>", b"<|eot_id|>")
    assert not re.search(r"<\|\w+\|>$", result["content"])
    assert bitnet(*options, "--seed", result["seed"]) == result["content"].encode() + b"\n"
    longer = bitnet.json(*options, "--seed", result["seed"], "--ignore-eos", "--json")
    assert (longer["stop_type"], longer["truncated"]) == ("limit", True)
    assert end not in longer["tokens"]


@contextmanager
def endless_generation(
    bitnet: Bitnet, model: Path, *, restore_signals: bool = True
) -> Iterator[subprocess.Popen[bytes]]:
    """`bitnet generate` in the middle of tens of thousands of tokens, its first bytes read."""
    command: list[str | Path] = [bitnet.path, "generate", "-m", model, "-p", PROMPT, "-n", "-1", "--ignore-eos"]
    command += ["--ctx-size", "32768"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, restore_signals=restore_signals) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(8)
            assert process.poll() is None
            yield process
        finally:
            process.kill()


def test_text_is_out_before_the_end_and_a_signal_ends_it(bitnet: Bitnet, endless_model: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        with endless_generation(bitnet, endless_model) as process:
            process.send_signal(number)
            assert process.wait() == -number


def test_a_closed_pipe_ends_generation(bitnet: Bitnet, endless_model: Path) -> None:
    with endless_generation(bitnet, endless_model) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait() == -signal.SIGPIPE
    # Python ignores SIGPIPE, and so does a child that inherits this: it is told by the failing write.
    with endless_generation(bitnet, endless_model, restore_signals=False) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert error_line(process.stderr.read()) == "standard output: cannot be written: Broken pipe"
        assert process.wait() == EXIT_UNREADABLE


@pytest.mark.parametrize("command", ["generate", "generate --json", "tokenize", "info", "perplexity", "bench"])
def test_output_that_cannot_be_written_is_an_error(
    command: str, bitnet: Bitnet, demo_model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("Once upon a time.")
    arguments: dict[str, list[str | Path]] = {
        "tokenize": ["-m", demo_model],
        "info": [demo_model],
        "perplexity": ["-m", demo_model, "-f", text],
        "bench": ["-m", demo_model, "--prompt-tokens", "2", "--predict-tokens", "1"],
    }
    line = [bitnet.path, *command.split(), *arguments.get(command, ["-m", demo_model, "-n", "2"])]
    with Path("/dev/full").open("wb") as full:
        run = subprocess.run(line, check=False, stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE)
    assert error_line(run.stderr) == "standard output: cannot be written: No space left on device"
    assert run.returncode == EXIT_UNREADABLE


# tokenize, detokenize


@pytest.mark.parametrize(
    "text", [b"", b"Once upon a time", "Prinzessin “Ännchen” 🐸\r\n\t".encode(), bytes(range(256))]
)
def test_detokenize_gives_the_bytes_back(text: bytes, bitnet: Bitnet, demo_model: Path) -> None:
    ids = bitnet("tokenize", "-m", demo_model, stdin=text)
    assert bitnet("detokenize", "-m", demo_model, stdin=ids) == text


def test_tokenize_takes_bos_and_special(bitnet: Bitnet, demo_model: Path) -> None:
    text = b"<|eot_id|> the"
    plain = bitnet.json("tokenize", "-m", demo_model, stdin=text)
    special = bitnet.json("tokenize", "-m", demo_model, "--special", stdin=text)
    (bos,) = bitnet.json("tokenize", "-m", demo_model, "--bos")
    assert len(special) < len(plain)
    assert bitnet.json("tokenize", "-m", demo_model, "--special", "--bos", stdin=text) == [bos, *special]
    assert bitnet("detokenize", "-m", demo_model, stdin=str([bos, *special]).encode()) == b"<|begin_of_text|>" + text


# logits


TOKENS = [1, 4095, 0, *range(5, 200)]


def logits_file(bitnet: Bitnet, model: Path, output: Path, *options: str | int, tokens: list[int] = TOKENS) -> bytes:
    bitnet("logits", "-m", model, "--tokens", ",".join(map(str, tokens)), "-o", output, *options)
    return output.read_bytes()


def test_logits_are_the_same_bits_however_they_are_computed(bitnet: Bitnet, demo_model: Path, tmp_path: Path) -> None:
    expected = logits_file(bitnet, demo_model, tmp_path / "a")
    assert len(expected) == len(TOKENS) * 4096 * 4
    for threads in (1, 2, 3):
        assert logits_file(bitnet, demo_model, tmp_path / "b", "--threads", threads) == expected
    for isa in processor_isas():
        assert logits_file(bitnet, demo_model, tmp_path / "b", "--isa", isa) == expected
        assert logits_file(bitnet, demo_model, tmp_path / "b", "--isa", isa, "--batch-size", 13) == expected
    for batch_size in (1, 7, 128, 1024):
        assert logits_file(bitnet, demo_model, tmp_path / "b", "--batch-size", batch_size) == expected
    assert logits_file(bitnet, demo_model, tmp_path / "b", tokens=TOKENS[:50]) == expected[: 50 * 4096 * 4]


def test_logits_are_little_endian_float32_that_greedy_text_follows(
    bitnet: Bitnet, demo_model: Path, tmp_path: Path
) -> None:
    prompt = bitnet.json("tokenize", "-m", demo_model, "--bos", stdin=PROMPT.encode())
    options = ("generate", "-m", demo_model, "-p", PROMPT, "-n", 20, *GREEDY, "--json")
    tokens = bitnet.json(*options)["tokens"]
    for kv_type in ("f16", "f32"):
        data = logits_file(bitnet, demo_model, tmp_path / "a", "--kv-type", kv_type, tokens=prompt + tokens)
        logits = np.frombuffer(data, "<f4").reshape(-1, 4096)
        assert np.isfinite(logits).all()
        if kv_type == "f16":
            assert logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist() == tokens
            rounded = logits
    assert not np.array_equal(rounded, logits)
    assert np.allclose(rounded, logits, atol=0.5)


# perplexity


def surprise(logits: npt.NDArray[np.float32], targets: list[int]) -> list[float]:
    """−ln softmax(logits)[target] of each row."""
    rows = logits.astype(np.float64)
    losses: list[float] = (np.logaddexp.reduce(rows, axis=-1) - rows[np.arange(len(targets)), targets]).tolist()
    return losses


def expected_losses(bitnet: Bitnet, model: Path, text: bytes, n_ctx: int, scratch: Path) -> list[list[float]]:
    """Nats of each scored token, window after window, from `bitnet logits`.

    A window is BOS and n_ctx − 1 tokens, of which those after the middle are scored; a text shorter than one is
    scored whole.
    """
    tokens = bitnet.json("tokenize", "-m", model, stdin=text)
    (bos,) = bitnet.json("tokenize", "-m", model, "--bos")
    step = n_ctx - 1
    windows = [tokens[i : i + step] for i in range(0, len(tokens), step)]
    if len(windows) > 1 and len(windows[-1]) < step:
        windows.pop()
    losses = []
    for window in windows:
        first = n_ctx // 2 if len(window) == step else 0
        data = logits_file(bitnet, model, scratch, "--ctx-size", n_ctx, tokens=[bos, *window])
        logits = np.frombuffer(data, "<f4").reshape(len(window) + 1, -1)
        losses.append(surprise(logits[first:-1], window[first:]))
    return losses


@pytest.mark.parametrize(("n_ctx", "n_bytes"), [(64, 1500), (63, 700), (256, 3000), (256, 300), (256, 9), (3, 40)])
def test_perplexity_is_that_of_the_logits(
    n_ctx: int, n_bytes: int, bitnet: Bitnet, demo_model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_bytes((ROOT / "LICENSE").read_bytes()[:n_bytes])
    losses = expected_losses(bitnet, demo_model, text.read_bytes(), n_ctx, tmp_path / "logits")
    result = bitnet.json("perplexity", "-m", demo_model, "-f", text, "--ctx-size", n_ctx, "--json")
    all_losses = list(itertools.chain(*losses))
    assert result["nats_per_token"] == pytest.approx(np.mean(all_losses), rel=1e-9)
    assert result["perplexity"] == pytest.approx(np.exp(np.mean(all_losses)), rel=1e-9)
    assert (result["windows"], result["tokens_scored"], result["n_ctx"]) == (len(losses), len(all_losses), n_ctx)
    assert result["tokens"] == len(bitnet.json("tokenize", "-m", demo_model, stdin=text.read_bytes()))

    line = bitnet("perplexity", "-m", demo_model, "-f", text, "--ctx-size", n_ctx).decode()
    assert line.startswith(f"perplexity {result['perplexity']:.4f} ({result['nats_per_token']:.4f} nats a token ")


def test_the_model_foretells_a_fairy_tale_better_than_a_licence(
    bitnet: Bitnet, demo_model: Path, tmp_path: Path
) -> None:
    tale, licence = tmp_path / "tale", tmp_path / "licence"
    tale.write_text("Once upon a time there was a king who had three sons, and the youngest of them was very poor.")
    licence.write_bytes((ROOT / "LICENSE").read_bytes()[:500])
    perplexity = [
        bitnet.json("perplexity", "-m", demo_model, "-f", file, "--json")["perplexity"] for file in (tale, licence)
    ]
    assert perplexity[0] < 50 < perplexity[1]


# info, bench, version, help


def test_info_lists_keys_tensors_and_sizes(bitnet: Bitnet, demo_model: Path) -> None:
    text = bitnet("info", demo_model).decode()
    size = demo_model.stat().st_size
    assert text.startswith(f"{demo_model}: GGUF 3, {size} bytes, 68 tensors\n")
    keys = dict(re.findall(r"^  ([a-z][\w.-]+) +(\S.*)$", text, re.MULTILINE))
    assert keys["general.architecture"] == '"bitnet-b1.58"'
    assert keys["bitnet-b1.58.context_length"] == "256"
    assert keys["tokenizer.ggml.tokens"].startswith('array of 4096 string: ["!", ')
    tensors = re.findall(r"^  (\S+\.weight) +(\w+) +(\d+(?: x \d+)*) +(\d+) bytes$", text, re.MULTILINE)
    assert len(tensors) == 68
    assert ("token_embd.weight", "F16", "256 x 4096", str(2 * 256 * 4096)) in tensors
    assert ("blk.5.ffn_down.weight", "I2_S", "768 x 256", str(768 * 256 // 4 + 32)) in tensors
    tensor_bytes = sum(int(n_bytes) for *_, n_bytes in tensors)
    assert size - tensor_bytes == pytest.approx(tensor_bytes * 0.03, rel=1)  # keys, mostly the vocabulary
    threads = len(os.sched_getaffinity(0))
    last = re.search(r"^this processor: ([\w-]+) kernels, (\d+) threads$", text, re.MULTILINE)
    assert last is not None
    assert last[1] == processor_isas()[-1]
    assert 1 <= int(last[2]) <= threads  # a quota may leave fewer


def test_bench_gives_plain_numbers(bitnet: Bitnet, demo_model: Path) -> None:
    options = ("bench", "-m", demo_model, "--prompt-tokens", 8, "--predict-tokens", 4, "--depth", 16, "--threads", 1)
    result = bitnet.json(*options, "--repetitions", 3, "--json")
    figures = [
        *("prefill_tokens_per_second", "decode_tokens_per_second", "decode_bytes_per_token"),
        *("read_bandwidth_bytes_per_second", "decode_bandwidth_fraction"),
    ]
    for name in figures:
        assert type(result[name]) is float
        assert result[name] > 0
        assert type(result[name + "_spread"]) is float
        assert result[name + "_spread"] >= 0
    assert (result["threads"], result["isa"], result["kv_type"]) == (1, processor_isas()[-1], "f16")
    asked = ("prompt_tokens", "predict_tokens", "depth", "sequences", "repetitions")
    assert [result[name] for name in asked] == [8, 4, 16, 1, 3]
    assert set(result) == {"model", "threads", "isa", "kv_type", *asked} | {
        name + suffix for name in figures for suffix in ("", "_spread")
    }
    table = dict(line.split() for line in bitnet(*options).decode().splitlines())
    assert list(table) == list(result)


def test_bench_compares_a_long_context_with_a_short_one(bitnet: Bitnet, demo_model: Path) -> None:
    options = ("bench", "-m", demo_model, "--prompt-tokens", 0, "--predict-tokens", 4, "--repetitions", 2, "--json")
    kept = bitnet.json(*options, "--depth", 200)["decode_of_short_context"]
    assert type(kept) is float
    assert kept > 0
    assert "decode_of_short_context" not in bitnet.json(*options, "--depth", 128)


def test_bench_of_texts_side_by_side_shares_the_weights(bitnet: Bitnet, demo_model: Path) -> None:
    options = ("bench", "-m", demo_model, "--prompt-tokens", 0, "--predict-tokens", 4, "--depth", 16, "--json")
    alone, four = (bitnet.json(*options, "--sequences", n) for n in (1, 4))
    assert four["sequences"] == 4
    assert alone["decode_bytes_per_token"] / 4 < four["decode_bytes_per_token"] < alone["decode_bytes_per_token"] / 2


@pytest.mark.parametrize("left_out", ["prefill", "decode"])
def test_bench_leaves_out_what_it_is_told_to(left_out: str, bitnet: Bitnet, demo_model: Path) -> None:
    prompt, predict = (0, 2) if left_out == "prefill" else (2, 0)
    options = ("bench", "-m", demo_model, "--prompt-tokens", prompt, "--predict-tokens", predict, "--repetitions", 1)
    result = bitnet.json(*options, "--json")
    assert not [name for name in result if name.startswith(left_out)]
    assert [name for name in result if name.startswith({"prefill": "decode", "decode": "prefill"}[left_out])]


def test_bench_says_a_text_again_with_and_without_guesses(bitnet: Bitnet, demo_model: Path, tmp_path: Path) -> None:
    verse = "the king had a son, and the son had a horse, and the horse had a golden saddle."
    (tmp_path / "text").write_text(f"Once upon a time {verse}\n---\nAnd so {verse}\n")
    options = ("--prompt-tokens", 0, "--predict-tokens", 0, "--repetitions", 1, "--json")
    result = bitnet.json("bench", "-m", demo_model, *options, "--replay", tmp_path / "text")
    said = bitnet.json("tokenize", "-m", demo_model, stdin=f"And so {verse}\n".encode())
    assert result["replay_tokens"] == len(said)
    assert 0 < result["replay_right_guesses"] <= result["replay_guesses"]
    assert result["replay_tokens_per_second"] > 0
    assert result["replay_without_guesses_tokens_per_second"] > 0


def test_bench_of_nothing_measures_the_memory(bitnet: Bitnet, demo_model: Path) -> None:
    result = bitnet.json("bench", "-m", demo_model, "--prompt-tokens", 0, "--predict-tokens", 0, "--json")
    assert result["read_bandwidth_bytes_per_second"] > 0


def test_the_version_is_the_projects(bitnet: Bitnet) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert bitnet("--version").decode() == version + "\n"


def test_help_lists_the_commands_and_each_has_its_own(bitnet: Bitnet) -> None:
    commands = re.findall(r"^  ([a-z]+) {2,}\S", bitnet("--help").decode().split("Subcommands:")[1], re.MULTILINE)
    assert {"generate", "worker", "tokenize", "detokenize", "logits", "perplexity", "info", "bench"} <= set(commands)
    for command in commands:
        assert f"Usage: bitnet {command} " in bitnet(command, "--help").decode()
