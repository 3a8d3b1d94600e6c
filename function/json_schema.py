"""JSON Schemas as llguidance keeps to them: what it would read wrongly, or never come to an end with, is refused.

It reads numbers as doubles, ends the process where an integer's bounds reach the least of 64 bits, and makes an
automaton with a state for each remainder of a `multipleOf`. `$ref` may lead to any place in a schema, so every place
counts as one where a schema may be; only the values of `const` and `enum` are not rewritten.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from decimal import Decimal
from json import JSONDecoder, dumps
from typing import Any, TypeGuard

from function.schema import describe

MAX_EXACT = 2**53 - 1  # of integers that doubles count one by one
MAX_MULTIPLE = 2**16 - 1  # compiled in half a second; the product of two still fits into llguidance's 32 bits
FORMATS = {
    "date",
    "date-time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "time",
    "uri",
    "uuid",
}  # those it knows
# RFC 3339 has a second 60 at the end of days only; llguidance at any time.
WITHOUT_LEAP = {"pattern": ":[0-5][0-9][.Zz+-]"}
NAMED = {"$defs", "definitions", "patternProperties", "properties"}  # whose keys are names and no keywords
ANY_NAME: tuple[object, ...] = ({}, {"type": "string"}, True)
DIGITS = 15  # that a double keeps of any decimal number
MAX_PLACES = 308  # powers of ten that are doubles


def prepared(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema that allows nothing that `schema` forbids, and that llguidance reads exactly.

    Raises:
        ValueError: there is none: a number is too large or has too many digits. The message names keyword and value.
    """
    result = _schema(schema)
    multiples = [Decimal(repr(value)) for value in _multiples(schema)]
    places = max(map(_places, multiples), default=0)
    if (common := math.lcm(*(int(value.scaleb(places)) for value in multiples))) > MAX_MULTIPLE:
        what = "of all 'multipleOf' the least common multiple" if len(multiples) > 1 else "'multipleOf'"
        raise ValueError(f"{what} must be at most {MAX_MULTIPLE} without the decimal point, got {describe(common)}")
    return result


def check_lark(grammar: str) -> None:
    """Checks each `%json` in a grammar of llguidance's, also those that a text or a comment spells.

    Raises:
        ValueError: one is no JSON, or not as `prepared` makes it.
    """
    for match in re.finditer(r"%json[ \t\r\n]*", grammar):
        schema, _ = JSONDecoder().raw_decode(grammar, match.end())
        if isinstance(schema, dict) and (other := prepared(schema)) != schema:
            raise ValueError(f"'%json' must be written as {dumps(other, ensure_ascii=False)}")


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in _with_bounds(schema).items():
        if key in NAMED and isinstance(value, dict):
            for name, inner in value.items():
                if not isinstance(inner, dict | bool):
                    raise ValueError(f"'{key}' must have schemas, got {describe(inner)} for {describe(name)}")
            result[key] = {name: _part(name, inner) for name, inner in value.items()}
        elif key in ("const", "enum"):
            _check_literal(key, value)
            result[key] = value
        elif not (key == "format" and isinstance(value, str) and value not in FORMATS) and not (
            key == "propertyNames" and value in ANY_NAME
        ):
            result[key] = _part(key, value)
    if result.get("format") in ("date-time", "time") and WITHOUT_LEAP not in (others := result.get("allOf", [])):
        result["allOf"] = [*others, WITHOUT_LEAP]
    return result


def _part(key: str, value: object) -> object:
    if isinstance(value, dict):
        return _schema(value)
    if isinstance(value, list):
        return [_part(key, item) for item in value]
    if _is_number(value) and value < -MAX_EXACT:  # wherever a `const` may find it
        raise ValueError(f"'{key}' must be at least {-MAX_EXACT}, got {describe(value)}")
    return value


def _with_bounds(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with exact bounds.

    llguidance lets through what an exclusive bound that is whole forbids, if both bounds have the same whole part: 0
    above 0 and below 0.3, for instance. The next number of 15 digits is an inclusive bound instead.
    """
    result = dict(schema)
    for side, plain, exclusive in (1, "minimum", "exclusiveMinimum"), (-1, "maximum", "exclusiveMaximum"):
        if isinstance(result.get(exclusive), bool) and result.pop(exclusive) and plain in result:  # as draft 4 has it
            result[exclusive] = result.pop(plain)
        for key in (plain, exclusive):
            if _is_number(value := result.get(key)):
                result[key] = _bound(key, value, side)
        if schema.get("type") != "integer" and _is_number(value := result.get(exclusive)) and value == int(value):
            step = Decimal(10) ** (min(len(str(abs(int(value)))), DIGITS) - DIGITS)
            least = float(int(value) + side * step)
            other = result.get(plain)
            result[plain] = side * max(side * least, side * other) if _is_number(other) else least
            del result[exclusive]
    return result


def _bound(key: str, value: float, side: int) -> float:
    """The bound, or the nearest exact one that is stricter."""
    if side * value > MAX_EXACT:
        limit = "at most" if side > 0 else "at least"
        raise ValueError(f"'{key}' must be {limit} {side * MAX_EXACT}, got {describe(value)}")
    value = side * max(side * value, -MAX_EXACT)
    _check_digits(key, value)
    return value


def _check_literal(key: str, value: object) -> None:
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_literal(key, inner)
    if _is_number(value):
        if abs(value) > MAX_EXACT:
            raise ValueError(f"'{key}' must have numbers from {-MAX_EXACT} to {MAX_EXACT}, got {describe(value)}")
        _check_digits(key, value)


def _check_digits(key: str, value: float) -> None:
    """Whether llguidance reads a number exactly: as a double, divided by a double that is a power of ten."""
    places = _places(number := Decimal(repr(value)))
    if places > MAX_PLACES or (places and float(number.scaleb(places)) / 10.0**places != value):
        raise ValueError(f"'{key}' must have at most {DIGITS} digits, got {describe(value)}")


def _multiples(value: object) -> Iterator[float]:
    if isinstance(value, dict):
        if _is_number(multiple := value.get("multipleOf")):
            if multiple <= 0:
                raise ValueError(f"'multipleOf' must be above 0, got {describe(multiple)}")
            yield multiple
        for inner in value.values():
            yield from _multiples(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _multiples(inner)


def _places(number: Decimal) -> int:
    """Digits behind the decimal point."""
    return max(0, -int(number.normalize().as_tuple().exponent))


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
