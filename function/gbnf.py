"""llama.cpp's GBNF in the words that llguidance's converter to its own language understands.

Source: https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md. The converter loses the zeros that an
escape begins with and the parentheses between two repetitions, takes two names for one that differ in - and _ or in
case, knows no {0}, and takes time that grows with the square of the rules unless each comes behind those that it names.
"""

from __future__ import annotations

import re
from contextlib import suppress
from graphlib import CycleError, TopologicalSorter

TOKEN = re.compile(r'"(?:\\.|[^"\\])*"?|\[(?:\\.|[^\]\\])*\]?|\{[^{}]*\}|#[^\r\n]*|::=|[\w-]+|\s+|.', re.DOTALL)
ESCAPE = re.compile(r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|\\.|[&~]", re.DOTALL)
MAX_RULES = 5000  # llguidance takes many seconds to refuse a chain of twice as many
NAME = re.compile(r"[\w-]+")
REPETITIONS = ("*", "+", "?", "{")
NO_TIMES = re.compile(r"\{\s*0+\s*(,\s*0+\s*)?\}")
ANY_CHARACTER = "[\\x00-\U0010ffff]"


def normalised(grammar: str) -> str:
    """The same grammar with other names of rules, but for `root`.

    Raises:
        ValueError: there are too many rules, a string or a class of characters does not end, or a rule is not there.
    """
    tokens = ["" if token.startswith("#") else token for token in TOKEN.findall(grammar)]
    if "::=" not in tokens:
        raise ValueError("a grammar is made of rules 'name ::= …', and here is none")
    begins = [index - 1 - tokens[index - 1].isspace() for index, token in enumerate(tokens) if token == "::="]
    if len(begins) > MAX_RULES:
        raise ValueError(f"a grammar must have at most {MAX_RULES} rules, got {len(begins)}")
    names = {tokens[begin]: f"r{number}" for number, begin in enumerate(begins)}
    if "root" in names:
        names["root"] = "root"
    rules: dict[str, str] = {}
    named: dict[str, list[str]] = {}
    for begin, end in zip(begins, [*begins[1:], len(tokens)], strict=True):
        name, *rest = tokens[begin:end]
        named[name] = [token for token in dict.fromkeys(rest) if token in names]
        rules[name] = "".join([names[name], *_parts(rest, names)])
    return "".join(tokens[: begins[0]]) + "\n".join(rules[name] for name in _ordered(named))


def _parts(tokens: list[str], names: dict[str, str]) -> list[str]:
    """The tokens behind a rule's name, as the converter understands them."""
    parts: list[str] = []
    for token in tokens:
        if NO_TIMES.fullmatch(token):
            _drop_last(parts)
            parts.append('""')
        elif token and token[0] in '"[':
            if len(token) == 1 or token[-1] not in '"]':
                raise ValueError(f"Unexpected end of input in what begins with {token[0]}")
            parts.append(ESCAPE.sub(_in_string if token[0] == '"' else _in_class, token))
        elif NAME.fullmatch(token):
            if token not in names:
                raise ValueError(f"Rule '{token}' not found")
            parts.append(names[token])
        else:
            if token[:1] in REPETITIONS:
                _keep_parentheses(parts)
            parts.append(ANY_CHARACTER if token == "." else token)
    return parts


def _keep_parentheses(parts: list[str]) -> None:
    """Puts an empty string at the end of a group, if the last part is one, so that it has several members."""
    last = next((index for index in reversed(range(len(parts))) if parts[index].strip()), None)
    if last is not None and parts[last] == ")":
        parts.insert(last, ' ""')


def _drop_last(parts: list[str]) -> None:
    """Takes away what a repetition is of: a word or a group, maybe repeated itself."""
    while parts and (not parts[-1].strip() or parts[-1][0] in REPETITIONS):
        parts.pop()
    depth = 0
    while parts:
        part = parts.pop()
        depth += (part == ")") - (part == "(")
        if depth <= 0:
            return


def _in_string(match: re.Match[str]) -> str:
    """An escape's character itself, unless a string needs the escape."""
    character = _character(match)
    return character if character and character.isprintable() and character not in '"\\' else match[0]


def _in_class(match: re.Match[str]) -> str:
    """An escape's character itself, or in two digits where a class may mean something else by it."""
    character = _character(match) or (match[0] if len(match[0]) == 1 else "")
    return match[0] if not character else character if character > "\x7f" else f"\\x{ord(character):02x}"


def _character(match: re.Match[str]) -> str:
    digits = match[1] or match[2] or match[3]
    return chr(int(digits, 16)) if digits else ""


def _ordered(named: dict[str, list[str]]) -> list[str]:
    """Rules behind those that they name; then those of which some name themselves."""
    sorter = TopologicalSorter(named)
    order: list[str] = []
    with suppress(CycleError):  # it goes as far as it can
        sorter.prepare()
    while ready := sorter.get_ready():
        order += ready
        sorter.done(*ready)
    return list(dict.fromkeys([*order, *named]))
