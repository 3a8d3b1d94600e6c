"""The engine behind a gate that holds its tokens back until a test lets them through, so that order needs no clock."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SCRIPT = """#!{python}
import subprocess, sys
engine = subprocess.Popen([{engine!r}, *sys.argv[1:]], stdin=0, stdout=subprocess.PIPE)
with open({permits!r}, "rb", buffering=0) as permits:
    for line in engine.stdout:
        if line.startswith(b'{{"event":"token"'):
            permits.read(1)
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
sys.exit(engine.wait())
"""


class Gate:
    """`path` is an executable that is the engine, but for its tokens: each of them waits for a permit."""

    def __init__(self, directory: Path, engine: Path) -> None:
        permits = directory / "permits"
        os.mkfifo(permits)
        self._permits = os.open(permits, os.O_RDWR)
        self.path = directory / "bitnet-gated"
        self.path.write_text(SCRIPT.format(python=sys.executable, engine=str(engine), permits=str(permits)))
        self.path.chmod(0o755)

    def let_through(self, tokens: int) -> None:
        os.write(self._permits, bytes(tokens))

    def close(self) -> None:
        os.close(self._permits)
