"""Structured output: an answer that cannot but fit a JSON Schema or a grammar.

llguidance (https://github.com/guidance-ai/llguidance) says after each token which ones may follow; the engine draws
among those. It is imported, and given the model's vocabulary, at the first request that needs it.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from function import gbnf, json_schema
from function.schema import ApiError, Structure, invalid

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from function.engine import Engine, Event

# Spaces as json.dumps writes them. Were all white space allowed, a model could go on writing nothing else.
JSON_STYLE: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
JSON_OPTIONS = JSON_STYLE | {"lenient": False, "coerce_one_of": False}  # whatever a schema's x-guidance says
NO_TEXT = "NoExtensionBias <non-verbose/>"  # llguidance's words for it
MAX_ERROR_CHARACTERS = 300
# llguidance calls itself for each rule within a rule: 256 KiB of rules that lead one to the next take up to 256 MB.
STACK_BYTES = 512 * 2**20  # of address space; memory is what is used, while it is used
_starting = threading.Lock()  # one thread at a time: the size of stacks is the process's


class Grammars:
    """Makes structures into masks for the model that the engine has. Any thread may use it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._vocabulary: _Vocabulary | None = None

    def compile(self, structure: Structure, deadline: float | None, *, force: bool) -> Callable[[], Masks]:
        """What `Engine.complete` wants as `mask`.

        `force` lets tokens without an alternative follow in one step, which says nothing of their probability.

        Raises:
            ApiError: 400, naming the structure's field: it is no grammar, or one that llguidance cannot honour.
        """
        vocabulary = self.vocabulary(deadline)
        with ThreadPoolExecutor(1, "grammar") as pool:
            with _starting:
                usual = threading.stack_size(STACK_BYTES)
                try:
                    compiled = pool.submit(_matcher, vocabulary.tokenizer, structure)
                finally:
                    threading.stack_size(usual)
            matcher = compiled.result()
        return lambda: Masks(structure, matcher, vocabulary.n_mask_bytes, force)

    def vocabulary(self, deadline: float | None) -> _Vocabulary:
        """That of the engine's model."""
        ready = self._engine.describe(deadline)
        with self._lock:
            if self._vocabulary is None or self._vocabulary.ready is not ready:
                self._vocabulary = _Vocabulary(self._engine, ready, deadline)
            return self._vocabulary


class Masks:
    """The masks of one request, whose completions each go their own way."""

    def __init__(self, structure: Structure, matcher: LLMatcher, n_mask_bytes: int, force: bool) -> None:
        self._structure = structure
        self._begin = matcher
        self._n_mask_bytes = n_mask_bytes
        self._force = force
        self._matchers: dict[int, LLMatcher] = {}

    def answer(self, index: int, tokens: Sequence[int]) -> dict[str, Any]:
        """The fields of the worker's `mask` for the completion `index`, in which `tokens` were drawn since.

        Raises:
            ApiError: 400, naming the structure's field: what may follow here is more than llguidance's limits.
        """
        matcher = self._matchers.get(index)
        if matcher is None:
            matcher = self._matchers[index] = self._begin.deep_copy()
        if tokens:
            matcher.consume_tokens(list(tokens))
        answer = self._answer(matcher)
        if matcher.is_error():
            raise refusal(self._structure.field, matcher.get_error())
        return answer

    def _answer(self, matcher: LLMatcher) -> dict[str, Any]:
        if matcher.is_stopped():
            return {"stop": True}
        if self._force and (forced := matcher.compute_ff_tokens()):
            return {"forced": forced}
        return {"allow": base64.b64encode(matcher.compute_bitmask()[: self._n_mask_bytes]).decode()}


class _Vocabulary:
    """The model's tokens, as bytes and as llguidance wants them."""

    def __init__(self, engine: Engine, ready: Event, deadline: float | None) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        event = engine.vocabulary(deadline)
        self.ready = ready
        self.tokens = [bytes.fromhex(token) for token in event["tokens"]]
        self.n_mask_bytes = -(-len(self.tokens) // 8)
        source = _Source(engine, self.tokens, event["control"], ready)
        self.tokenizer: LLTokenizer = LLTokenizer(TokenizerWrapper(source), eos_token=ready["eos"])


class _Source:
    """The tokenizer that llguidance asks how a text without an alternative is spelled in tokens."""

    def __init__(self, engine: Engine, tokens: list[bytes], control: list[int], ready: Event) -> None:
        self._engine = engine
        self.tokens = tokens
        self.special_token_ids = control
        self.bos_token_id = ready["bos"]
        self.eos_token_id = ready["eos"][0]

    def __call__(self, text: bytes) -> list[int]:
        return self._engine.tokenize(text.decode(), add_bos=False, special=False)


def _matcher(tokenizer: LLTokenizer, structure: Structure) -> LLMatcher:
    from llguidance import LLMatcher

    try:
        grammar = _grammar(structure)
    except Exception as error:  # GBNF's converter raises what it likes, RecursionError too
        raise refusal(structure.field, str(error) or type(error).__name__) from None
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_limits())
    begun = matcher.deep_copy()  # to refuse what already the first choice is too much for, before anything is computed
    begun.consume_tokens(begun.compute_ff_tokens())
    if not begun.is_stopped():
        begun.compute_bitmask()
    if begun.is_error():
        for name, text in structure.parts:
            part = LLMatcher(tokenizer, _grammar(Structure("json_schema", text, structure.field)), log_level=0)
            if part.is_error():
                raise refusal(structure.field, f"{name}: {part.get_error()}")
        raise refusal(structure.field, begun.get_error())
    return matcher


def _grammar(structure: Structure) -> str:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if structure.language == "json_schema":
        text = json.dumps(json_schema.prepared(json.loads(structure.text)))
        return LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)  # type: ignore[arg-type]
    if structure.language == "gbnf":
        if not structure.text.lstrip().startswith("%llguidance"):  # as in llama.cpp
            return LLMatcher.grammar_from_lark(gbnf_to_lark(gbnf.normalised(structure.text)))
        json_schema.check_lark(structure.text)
    return LLMatcher.grammar_from_lark(structure.text)


def _limits() -> Any:
    from llguidance import LLParserLimits

    return LLParserLimits(verbose_errors=False)


def refusal(field: str, reason: str) -> ApiError:
    """A 400 about the request's field `field`, whose structure cannot be kept to."""
    return invalid(f"'{field}' cannot be honoured: {_short(reason)}", param=field)


def _short(text: str) -> str:
    line = " ".join(text.split()).replace(NO_TEXT, "no text can be what it asks for")
    return line if len(line) <= MAX_ERROR_CHARACTERS else f"{line[:MAX_ERROR_CHARACTERS]}…"
