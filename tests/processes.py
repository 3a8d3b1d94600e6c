"""Looks at processes as the kernel shows them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def engines(parent: int) -> set[int]:
    """Process ids of the engines that `parent` started."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = path.read_text().split(" (", 1)
        except OSError:  # it has ended
            continue
        name, fields = rest.rsplit(") ", 1)
        state, ppid = fields.split()[:2]
        if name == "bitnet" and int(ppid) == parent and state != "Z":
            found.add(int(pid))
    return found


def children(parent: int) -> set[int]:
    """Process ids of all that `parent` started, ended ones that it has not waited for included."""
    return {
        int(pid) for task in Path(f"/proc/{parent}/task").iterdir() for pid in (task / "children").read_text().split()
    }


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False


def processor_ticks(pid: int) -> int:
    """Processor time that the process has used, user and system, in hundredths of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def eventually(condition: Callable[[], object]) -> None:
    """Waits until something is so; that it takes at most a minute is no figure, but the end of a hung test."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)
