"""The binary itself: what it needs of a machine. Other processors are played by qemu's user mode emulation."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from tests.cli.bitnet import Argument, Bitnet, error_line

UNSUPPORTED_PROCESSOR = 3
MAX_BYTES = 10_000_000
PT_DYNAMIC, PT_INTERP = 2, 3


def run_as(
    processor: str, bitnet: Bitnet, *arguments: Argument, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """A command on another processor; `processor` as `qemu-x86_64 -cpu` takes it."""
    qemu = shutil.which("qemu-x86_64")
    assert qemu, "qemu-user is missing: build/setup/setup.sh test"
    run = Bitnet(Path(qemu)).run("-cpu", processor, bitnet.path, *arguments, stdin=stdin)
    # qemu lists what of the processor it does not play.
    lines = [line for line in run.stderr.splitlines(keepends=True) if not line.startswith(b"qemu-x86_64: warning: ")]
    run.stderr = b"".join(lines)
    return run


def test_the_binary_is_static_and_small(engine_path: Path) -> None:
    data = engine_path.read_bytes()
    assert len(data) < MAX_BYTES
    assert data[:6] == b"\x7fELF\x02\x01"  # 64 bits, little-endian
    (offset,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    segments = {struct.unpack_from("<I", data, offset + i * size)[0] for i in range(count)}
    assert segments
    assert not segments & {PT_DYNAMIC, PT_INTERP}


@pytest.mark.parametrize(
    "processor",
    ["qemu64", "Nehalem", "SandyBridge", "IvyBridge", "max,-avx2", "max,-fma", "max,-f16c", "max,-bmi2"],
)
def test_a_processor_without_what_is_needed_is_refused(processor: str, bitnet: Bitnet, demo_model: Path) -> None:
    for arguments in (("generate", "-m", demo_model, "-p", "Once"), ("info", demo_model), ("--version",), ()):
        run = run_as(processor, bitnet, *arguments)
        assert run.returncode == UNSUPPORTED_PROCESSOR
        assert error_line(run.stderr) == "this processor lacks AVX2, FMA, F16C or BMI2, which bitnet needs"
        assert not run.stdout


@pytest.mark.parametrize("processor", ["max", "Haswell", "EPYC"])
def test_avx2_is_enough_and_gives_the_same_text(processor: str, bitnet: Bitnet, demo_model: Path) -> None:
    options = ("generate", "-m", demo_model, "-p", "Once upon a time", "-n", 12, "--temperature", 0)
    run = run_as(processor, bitnet, *options)
    assert (run.returncode, run.stderr) == (0, b"")
    assert run.stdout == bitnet(*options)
    info = run_as(processor, bitnet, "info", demo_model)
    assert b"this processor: avx2 kernels" in info.stdout


def test_every_kernel_runs_where_it_is_named(bitnet: Bitnet, demo_model: Path, tmp_path: Path) -> None:
    """On a processor with AVX2 and no more: bits as here, and AVX-512 refused."""
    command = ("logits", "-m", demo_model, "--tokens", "1,2,3,4,5", "-o")
    bitnet(*command, tmp_path / "here")
    for isa in ("scalar", "avx2"):
        run = run_as("Haswell", bitnet, *command, tmp_path / "there", "--isa", isa)
        assert (run.returncode, run.stderr) == (0, b"")
        assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()
    run = run_as("Haswell", bitnet, *command, tmp_path / "there", "--isa", "avx512")
    assert run.returncode == 2
    assert error_line(run.stderr) == "--isa: this processor does not have avx512"


def test_the_worker_runs_there_too(bitnet: Bitnet, demo_model: Path) -> None:
    request = b'{"op":"completion","id":"a","prompt":"Once upon a time","n_predict":5,"temperature":0}\n'
    run = run_as("Haswell", bitnet, "worker", "-m", demo_model, "--threads", 2, stdin=request)
    here = bitnet("worker", "-m", demo_model, "--threads", 2, stdin=request)
    assert (run.returncode, run.stderr) == (0, b"")
    there, expected = (output.splitlines()[1].split(b',"stopping_word"')[0] for output in (run.stdout, here))
    assert there == expected
