"""The bytes of a model, with something wrong in them."""

from __future__ import annotations

import struct
from dataclasses import dataclass

KEY_TYPES = {"u32": 4, "f32": 6, "string": 8}


def _entry(name: str, value: str | float) -> bytes:
    head = struct.pack("<Q", len(name)) + name.encode()
    if isinstance(value, str):
        return head + struct.pack("<IQ", KEY_TYPES["string"], len(value)) + value.encode()
    return head + struct.pack("<If", KEY_TYPES["f32"], value)


@dataclass
class Gguf:
    """The bytes of a GGUF file, to be changed in single places."""

    data: bytearray

    def end_of(self, name: str) -> int:
        """Where a key or the name of a tensor ends."""
        entry = struct.pack("<Q", len(name)) + name.encode()
        assert self.data.count(entry) == 1
        return self.data.index(entry) + len(entry)

    def rename(self, old: str, new: str) -> None:
        assert len(old) == len(new)
        end = self.end_of(old)
        self.data[end - len(old) : end] = new.encode()

    def add_keys(self, *keys: tuple[str, str | float]) -> None:
        """Keys of type f32 or string, and one more, so that the data behind them stays aligned."""
        entries = b"".join(_entry(name, value) for name, value in keys)
        filler = _entry("test.filler", "")
        entries += _entry("test.filler", "x" * (-(len(entries) + len(filler)) % 32))
        (n_keys,) = struct.unpack_from("<Q", self.data, 16)
        struct.pack_into("<Q", self.data, 16, n_keys + len(keys) + 1)
        self.data[24:24] = entries

    def set_u32(self, position: int, value: int) -> None:
        struct.pack_into("<I", self.data, position, value)

    def set_key(self, name: str, value: int) -> None:
        """The value of a key of type u32."""
        self.set_u32(self.end_of(name) + 4, value)

    def set_float(self, name: str, value: float) -> None:
        """The value of a key of type f32."""
        struct.pack_into("<f", self.data, self.end_of(name) + 4, value)

    def set_key_type(self, name: str, value_type: str) -> None:
        self.set_u32(self.end_of(name), KEY_TYPES[value_type])

    def set_tensor_type(self, name: str, value: int) -> None:
        """After the name: the number of dimensions, each of them in 8 bytes, the type, the offset."""
        position = self.end_of(name)
        (n_dimensions,) = struct.unpack_from("<I", self.data, position)
        self.set_u32(position + 4 + 8 * n_dimensions, value)

    def set_dimension(self, name: str, index: int, value: int) -> None:
        struct.pack_into("<Q", self.data, self.end_of(name) + 4 + 8 * index, value)

    def text(self, key: str) -> tuple[int, int]:
        """(start, end) of the value of a key of type string."""
        position = self.end_of(key) + 4
        (length,) = struct.unpack_from("<Q", self.data, position)
        return position + 8, position + 8 + length
