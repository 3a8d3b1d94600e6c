"""Directories for what the function takes without looking again: models, and prompts' caches."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def make_own_directory(path: Path) -> None:
    """Makes the directory unless it is there. In one like /tmp, where all may write, it must not be another user's.

    Raises:
        OSError: it cannot be made, or somebody else could put into it what would be taken for ours.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found, is_shared = path.stat(), path.parent.stat().st_mode & stat.S_ISVTX
    if path.is_mount():
        return  # whoever started the container chose it
    if is_shared and (path.is_symlink() or found.st_uid != os.geteuid() or found.st_mode & stat.S_IWOTH):
        raise OSError(errno.EPERM, "it is another user's, or all may write to it", str(path))
