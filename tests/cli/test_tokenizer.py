"""Text and token ids: the engine's against Hugging Face `tokenizers`, on the demo vocabulary and on that of Llama 3."""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from bitnet_gguf import BYTE_ALPHABET, ModelShape
from function.settings import ROOT
from synthesize import make_vocabulary, synthesize
from tests.cli.tokenizer_corpus import Corpus

# The tokenizer.json that build/model/demo/model.gguf was converted with.
DEMO_TOKENIZER = ROOT / "tests" / "data" / "demo_tokenizer.json.gz"
LLAMA3_TOKENIZER = ROOT / "build" / "out" / "llama3" / "tokenizer.model"

N_TEXTS = 12_000
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def demo_tokenizer() -> Tokenizer:
    return Tokenizer.from_str(gzip.decompress(DEMO_TOKENIZER.read_bytes()).decode())


def byte_level_bpe(tokens: Sequence[str], merges: Iterable[str], special: Sequence[str]) -> Tokenizer:
    """Hugging Face's tokenizer of Llama 3 with another vocabulary; the special tokens have the ids after `tokens`."""
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, pairs, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


@dataclass(frozen=True)
class Subject:
    """One vocabulary, as the engine and as Hugging Face read it."""

    engine: Path
    model: Path
    oracle: Tokenizer

    def command(self, name: str, data: bytes, *options: str) -> bytes:
        command: list[str | Path] = [self.engine, name, "--model", self.model, *options]
        run = subprocess.run(command, input=data, capture_output=True, check=True)
        return run.stdout

    def ask(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The worker's answer to each of the requests, which take their turn in one process."""
        lines = "".join(json.dumps({"id": str(i), **request}) + "\n" for i, request in enumerate(requests))
        command: list[str | Path] = [self.engine, "worker", "--model", self.model, "--ctx-size", "64"]
        run = subprocess.run(command, input=lines.encode(), capture_output=True, check=True)
        ready, *events = map(json.loads, run.stdout.splitlines())
        assert ready["event"] == "ready"
        assert [(event["event"], event["id"]) for event in events] == [("done", str(i)) for i in range(len(requests))]
        return events

    def tokenize(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        requests = [{"op": "tokenize", "content": text, "special": special} for text in texts]
        return [event["tokens"] for event in self.ask(requests)]

    def detokenize(self, ids: Sequence[list[int]]) -> list[str]:
        return [event["content"] for event in self.ask([{"op": "detokenize", "tokens": tokens} for tokens in ids])]

    def id_of(self, token: str) -> int:
        token_id = self.oracle.token_to_id(token)
        assert token_id is not None
        return token_id

    def expected(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        self.oracle.encode_special_tokens = not special
        return [encoding.ids for encoding in self.oracle.encode_batch(list(texts), add_special_tokens=False)]


@pytest.fixture(scope="module", params=["demo", "llama3"])
def subject(
    request: pytest.FixtureRequest, engine_path: Path, demo_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Subject:
    if request.param == "demo":
        return Subject(engine_path, demo_model, demo_tokenizer())
    assert LLAMA3_TOKENIZER.exists(), "fetch it first: build/setup/setup.sh test"
    vocabulary = make_vocabulary(128_256, LLAMA3_TOKENIZER)
    n_normal = vocabulary.types.count(TokenType.NORMAL)
    assert (n_normal, len(vocabulary.merges)) == (128_000, 280_147)
    # The smallest model that this vocabulary can have: it only has to load.
    path = tmp_path_factory.mktemp("llama3") / "model.gguf"
    shape = ModelShape(
        vocab_size=128_256,
        context_length=64,
        embedding_length=128,
        block_count=1,
        feed_forward_length=128,
        head_count=2,
        head_count_kv=1,
    )
    synthesize(path, shape, tokenizer_model=LLAMA3_TOKENIZER)
    oracle = byte_level_bpe(vocabulary.tokens[:n_normal], vocabulary.merges, vocabulary.tokens[n_normal:])
    return Subject(engine_path, path, oracle)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    texts = Corpus(seed=20_250_101).texts(N_TEXTS)
    assert len(set(texts)) > 10_000
    return texts


def assert_same(texts: Sequence[str], found: Sequence[object], expected: Sequence[object]) -> None:
    """Compares item by item; shows the first that differ, where pytest's own comparison would take minutes."""
    differing = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    shown = "\n".join(f"{texts[i]!a}\n  found    {found[i]!r}\n  expected {expected[i]!r}" for i in differing[:3])
    assert not differing, f"{len(differing)} of {len(texts)} differ, among them\n{shown}"


@pytest.mark.parametrize("special", [False, True], ids=["plain", "special"])
def test_ids_equal_hugging_face(subject: Subject, texts: list[str], special: bool) -> None:
    assert_same(texts, subject.tokenize(texts, special=special), subject.expected(texts, special=special))


def test_detokenizing_gives_the_text_back(subject: Subject, texts: list[str]) -> None:
    for special in (False, True):
        assert_same(texts, subject.detokenize(subject.expected(texts, special=special)), texts)


BYTES = [
    b"",
    "Once upon a time, there's 12345 🏴󠁧󠁢󠁥󠁮󠁧󠁿\r\n\r\n".encode(),
    b"\0nul \0\0 bytes\0",
    bytes(range(256)),
    b"\xff\xfe caf\xc3\xa9 \xc3 \xa9 \xed\xa0\x80 \xf0\x9f\x98",
    b"<|eot_id|>\xc3<|begin_of_text|>\xa9",
]


@pytest.mark.parametrize("data", BYTES, ids=ascii)
@pytest.mark.parametrize("options", [[], ["--special"], ["--bos"], ["--bos", "--special"]], ids=" ".join)
def test_commands_give_any_bytes_back(subject: Subject, data: bytes, options: list[str]) -> None:
    output = subject.command("tokenize", data, *options)
    begin = b"<|begin_of_text|>" if "--bos" in options else b""
    assert subject.command("detokenize", output) == begin + data
    ids: list[int] = json.loads(output)
    if "--bos" in options:
        assert ids.pop(0) == subject.id_of("<|begin_of_text|>")
    # Between bytes that are no UTF-8, which are tokens one by one, text is encoded on its own.
    expected: list[int] = []
    for part in split_at_invalid(data):
        if isinstance(part, int):
            expected.append(subject.id_of(BYTE_ALPHABET[part]))
        else:
            expected += subject.expected([part], special="--special" in options)[0]
    assert ids == expected


def split_at_invalid(data: bytes) -> list[str | int]:
    """The valid stretches of UTF-8, and the bytes between them."""
    parts: list[str | int] = []
    text = ""
    for character in data.decode(errors="surrogateescape"):
        if 0xDC80 <= ord(character) <= 0xDCFF:
            parts += [text, ord(character) - 0xDC00]
            text = ""
        else:
            text += character
    return [*parts, text]


def test_every_character_is_of_the_same_class(engine_path: Path, tmp_path: Path) -> None:
    """All planes that have characters: which of these bytes merge shows where the pieces end."""
    pairs = [(before, byte) for before in "a1!" for byte in BYTE_ALPHABET]
    pairs += [(byte, "z") for byte in BYTE_ALPHABET if byte not in "a1!"]
    tokens = [*BYTE_ALPHABET, *(left + right for left, right in pairs)]
    merges = [f"{left} {right}" for left, right in pairs]
    writer = GGUFWriter(tmp_path / "vocabulary.gguf", "bitnet-b1.58")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(merges)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    subject = Subject(engine_path, tmp_path / "vocabulary.gguf", byte_level_bpe(tokens, merges, []))

    # A letter joins a and !, a number 1, white space nothing, all else !; what is an s in any case ends before z.
    codes = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000)]
    texts = [f"a{c}1{c}!{c}'{c}z\n" for c in map(chr, codes)]
    blocks = ["".join(texts[i : i + 4096]) for i in range(0, len(texts), 4096)]
    found = json.loads(subject.command("tokenize", "".join(blocks).encode()))
    start = 0
    for i, expected in enumerate(subject.expected(blocks, special=False)):
        end = start + len(expected)
        assert found[start:end] == expected, f"from U+{codes[4096 * i]:04X} on"
        start = end
    assert start == len(found)


def test_streamed_pieces_are_whole_characters(engine_path: Path, demo_model: Path) -> None:
    """At a high temperature the model writes bytes that are no text, and control tokens, which are left out of it."""
    subject = Subject(engine_path, demo_model, demo_tokenizer())
    control = subject.oracle.get_added_tokens_decoder()
    options = {
        "op": "completion",
        "prompt": "x",
        "n_predict": 60,
        "temperature": 50,
        "top_k": 0,
        "top_p": 1,
        "min_p": 0,
    }
    lines = [json.dumps({"id": str(seed), "seed": seed, "stream": True, **options}) for seed in range(20)]
    run = subprocess.run(
        [engine_path, "worker", "--model", demo_model], input="\n".join(lines).encode(), capture_output=True, check=True
    )
    _, *events = map(json.loads, run.stdout.decode(errors="strict").splitlines())
    done = {event["id"]: event for event in events if event["event"] == "done"}
    assert len(done) == len(lines)
    n_held_back = 0
    for id_, last in done.items():
        pieces = [event for event in events if event["event"] == "token" and event["id"] == id_]
        assert all(piece["content"] for piece in pieces)
        assert "".join(piece["content"] for piece in pieces) == last["content"]
        assert [last["content"]] == subject.detokenize([[token for token in last["tokens"] if token not in control]])
        n_held_back += sum(len(piece["tokens"]) > 1 for piece in pieces)
    assert n_held_back > 0
