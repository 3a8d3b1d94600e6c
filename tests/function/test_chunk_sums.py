"""The checksums in a packed model's header, as `bitnet pack` writes them, and what becomes of damaged headers."""

from __future__ import annotations

import random
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from function.chunk_sums import ChunkSums, IncompleteError, read_chunk_sums


@pytest.fixture(scope="module")
def packed(engine_path: Path, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("packed") / "model.gguf"
    subprocess.run([engine_path, "pack", "--model", demo_model, "--output", path], check=True)
    return path.read_bytes()


def test_the_checksums_of_a_packed_model(packed: bytes) -> None:
    sums = read_chunk_sums(packed)
    assert sums is not None
    assert sums.fits(len(packed))
    (header, *chunks) = sums.pieces(len(packed))
    assert header == (0, sums.data_start, None)
    assert chunks
    assert [zlib.crc32(packed[start:end]) for start, end, _ in chunks] == [crc32 for _, _, crc32 in chunks]
    assert chunks[-1][1] == len(packed)


def test_the_header_alone_suffices_and_less_does_not(packed: bytes) -> None:
    whole = read_chunk_sums(packed)
    assert whole is not None
    # The padding to the data section is no part of what is read.
    assert read_chunk_sums(packed[: whole.data_start]) == whole
    for n in [0, 3, 4, 23, 24, *range(100, whole.data_start - 31, 997), whole.data_start - 32]:
        with pytest.raises(IncompleteError):
            read_chunk_sums(packed[:n])


def test_a_model_that_is_not_packed_has_none(demo_model: Path) -> None:
    assert read_chunk_sums(demo_model.read_bytes()) is None


@pytest.mark.parametrize("beginning", [b"\x00" * 100, b"PK\x03\x04", b"GGU_", b"G_"])
def test_another_file_has_none(beginning: bytes) -> None:
    assert read_chunk_sums(beginning) is None


def test_an_unknown_type_ends_the_reading() -> None:
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 99)
    assert read_chunk_sums(header + bytes(100)) is None


@pytest.mark.parametrize("size", [99, 116, 133])
def test_checksums_of_another_size_do_not_fit(size: int) -> None:
    sums = ChunkSums(data_start=100, chunk_bytes=16, crc32=(1,))
    assert sums.fits(101)
    assert sums.fits(size) == (size == 116)
    assert not ChunkSums(data_start=128, chunk_bytes=2**20, crc32=()).fits(110)


def test_damage_is_never_more_than_missing_or_incomplete(packed: bytes) -> None:
    sums = read_chunk_sums(packed)
    assert sums is not None
    chance = random.Random(7)
    header = packed[: sums.data_start]
    for _ in range(300):
        damaged = bytearray(header)
        for _ in range(chance.randint(1, 8)):
            damaged[chance.randrange(4, len(header))] = chance.randrange(256)
        try:
            found = read_chunk_sums(bytes(damaged))
        except IncompleteError:
            continue
        assert found is None or found.chunk_bytes > 0
