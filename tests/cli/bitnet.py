"""The command line as a function."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Argument = str | int | float | Path


@dataclass(frozen=True)
class Bitnet:
    """Runs one command of the engine to its end."""

    path: Path

    def run(self, *arguments: Argument, stdin: bytes = b"", **options: Any) -> subprocess.CompletedProcess[bytes]:
        command = [str(argument) for argument in (self.path, *arguments)]
        return subprocess.run(command, input=stdin, capture_output=True, check=False, **options)

    def __call__(self, *arguments: Argument, stdin: bytes = b"") -> bytes:
        """Standard output of a command that succeeds and has nothing to say beside it."""
        run = self.run(*arguments, stdin=stdin)
        assert (run.returncode, run.stderr) == (0, b"")
        return run.stdout

    def json(self, *arguments: Argument, stdin: bytes = b"") -> Any:
        return json.loads(self(*arguments, stdin=stdin))

    def error(self, *arguments: Argument, stdin: bytes = b"", **options: Any) -> tuple[int, str]:
        """(exit code, message) of a command that fails as it should: one line, on standard error."""
        run = self.run(*arguments, stdin=stdin, **options)
        assert run.returncode > 0, "ended by a signal" if run.returncode else "succeeded"
        return run.returncode, error_line(run.stderr)


def error_line(stderr: bytes) -> str:
    """The message of the one line that an error is."""
    (line,) = stderr.decode().splitlines(keepends=True)
    assert line.startswith("bitnet: ")
    assert line.endswith("\n")
    return line.removeprefix("bitnet: ").rstrip("\n")
