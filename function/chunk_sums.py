"""The checksums that a packed model carries of itself: the CRC-32 of each chunk of its data section.

`bitnet pack` writes them as the keys bitnet.pack.chunk_bytes and bitnet.pack.chunk_crc32 (build/cli/src/pack.h), so
that what is copied in parallel ranges can be verified, and a bad piece copied again, before the rest is there.
GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAGIC = b"GGUF"
UINT32, STRING, ARRAY = 4, 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, UINT32: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type
DEFAULT_ALIGNMENT = 32


class IncompleteError(Exception):
    """The header goes on behind the bytes at hand."""


@dataclass(frozen=True)
class ChunkSums:
    """`crc32[i]` is that of the bytes from `data_start + i * chunk_bytes`; the last chunk may be short."""

    data_start: int
    chunk_bytes: int
    crc32: tuple[int, ...]

    def fits(self, size: int) -> bool:
        """Whether these are the checksums of a file of `size` bytes."""
        return self.data_start <= size and len(self.crc32) == -(-(size - self.data_start) // self.chunk_bytes)

    def pieces(self, size: int) -> Iterator[tuple[int, int, int | None]]:
        """(start, end, CRC-32) of all pieces of the file, in order; the header comes first and has no checksum."""
        yield 0, self.data_start, None
        for i, crc32 in enumerate(self.crc32):
            start = self.data_start + i * self.chunk_bytes
            yield start, min(start + self.chunk_bytes, size), crc32


def read_chunk_sums(beginning: bytes) -> ChunkSums | None:
    """The checksums in the header of a GGUF file, from its first bytes; None: it carries none, or is no GGUF file.

    Raises:
        IncompleteError: more of the file is needed.
    """
    if not beginning.startswith(MAGIC[: len(beginning)]):
        return None
    try:
        return _Reader(beginning).chunk_sums()
    except struct.error:
        raise IncompleteError from None
    except _UnknownTypeError:
        return None


class _UnknownTypeError(Exception):
    """A type that has no known size, so that nothing behind it can be read."""


class _Reader:
    """Walks the header; a position behind the end shows at the next read."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = len(MAGIC)

    def chunk_sums(self) -> ChunkSums | None:
        _version, n_tensors, n_keys = self._read("<IQQ")
        keys = {}
        for _ in range(n_keys):
            name, kind = self._string(), self._read("<I")[0]
            keys[name] = self._value(kind)
        chunk_bytes, sums = keys.get(b"bitnet.pack.chunk_bytes"), keys.get(b"bitnet.pack.chunk_crc32")
        if not isinstance(sums, tuple) or not isinstance(chunk_bytes, int) or chunk_bytes == 0:
            return None
        for _ in range(n_tensors):
            self._string()
            self._read(f"<{self._read('<I')[0]}Q")
            self._read("<IQ")
        alignment = keys.get(b"general.alignment") or DEFAULT_ALIGNMENT
        if not isinstance(alignment, int):
            return None
        return ChunkSums(-(-self._at // alignment) * alignment, chunk_bytes, sums)

    def _read(self, layout: str) -> tuple[Any, ...]:
        self._room(struct.calcsize(layout))
        values = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _room(self, n: int) -> None:
        if self._at + n > len(self._data):
            raise struct.error

    def _string(self) -> bytes:
        (n,) = self._read("<Q")
        self._room(n)
        self._at += n
        return self._data[self._at - n : self._at]

    def _value(self, kind: int) -> Any:
        """The value of a u32 or an array of them; others are passed over."""
        if kind == STRING:
            self._string()
            return None
        if kind != ARRAY:
            return self._numbers(kind, 1)[0] if kind == UINT32 else self._skip(kind, 1)
        element, count = self._read("<IQ")
        if element == UINT32:
            return self._numbers(element, count)
        return self._skip_strings(count) if element == STRING else self._skip(element, count)

    def _numbers(self, kind: int, count: int) -> tuple[int, ...]:
        self._room(SIZES[kind] * count)
        return self._read(f"<{count}I")

    def _skip(self, kind: int, count: int) -> None:
        if kind not in SIZES:
            raise _UnknownTypeError
        self._room(SIZES[kind] * count)
        self._at += SIZES[kind] * count

    def _skip_strings(self, count: int) -> None:
        # Written out, since a vocabulary and its merges are 400,000 of them.
        data, at, length = self._data, self._at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            at += 8 + length(data, at)[0]
            if at > len(data):
                raise struct.error
        self._at = at
