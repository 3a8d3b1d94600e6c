"""KV of prompts that outlives the engine: one file for each `prompt_cache_key`, on this machine and in S3.

The engine writes and verifies the files (docs/worker-protocol.md, `cache_file`); here they get names, go to S3 and come
back. Whatever fails here is logged, without the key. S3 gets a share of a request's time and never its answer: a copy
that takes longer goes on by itself.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from function import aws
from function.own_directory import make_own_directory

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from function.settings import Settings

logger = logging.getLogger("bitnet.prompt_cache")

SUFFIX = ".kv"
UNFINISHED = re.compile(r"[0-9a-f]{64}\.(\d+\.part(\.\w+)?|kv\.\d+\.tmp)")  # ours, boto3's and the engine's
UNFINISHED_S = 60  # without a write, after which nobody lives who would end such a file
USEFUL_TOKENS = 32  # shared with a prompt, below which the file is another prompt's: all begin with the same token
PAUSE_S = 60  # without S3 after it failed
CUT = ("cancelled", "deadline")  # before the prompt was computed, perhaps
MIN_COPY_S = 0.4  # without so much time a copy is not begun
DOWNLOAD_SHARE = 0.25  # of the time that is left to a request; the rest is for its answer
CONNECT_TIMEOUT_S = 2
READ_TIMEOUT_S = 10
NOT_THERE = (403, 404)  # without s3:ListBucket, S3 says 403 of a missing key


@dataclass(frozen=True)
class Entry:
    """The file of one key. `save`: this request writes it."""

    path: Path
    save: bool

    def for_engine(self) -> dict[str, Any]:
        """The fields of the worker's `completion`."""
        return {"cache_file": str(self.path)} | ({"cache_save": True} if self.save else {})


class PromptCache:
    """Finds and keeps the files. Any thread may use it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        uri = settings.prompt_cache_s3_uri
        self._bucket, self._prefix = aws.split_uri(uri or "")
        self._directory = settings.prompt_cache_dir or (settings.model_cache_dir / "prompts" if uri else None)
        self._lock = threading.Lock()
        self._client: S3Client | None = None
        self._no_s3_before = 0.0  # of time.monotonic()
        self._useless: set[Path] = set()  # of another prompt: to be written again

    def open(self, key: str, ready: Mapping[str, Any], deadline: float | None = None) -> Entry | None:
        """The entry of `key` for the model of the worker's `ready` event, copied from S3 if it is not here.

        None if there is no cache. `deadline` (of `time.monotonic()`) is that of the request.
        """
        if self._directory is None:
            return None
        path = self._directory / (self._name(key, ready) + SUFFIX)
        try:
            make_own_directory(self._directory)
            if path.exists():
                os.utime(path)
            else:
                _remove_unfinished(self._directory)
                left_s = self._left_s(deadline)
                share_s = None if left_s is None else left_s * DOWNLOAD_SHARE
                self._copy("a prompt's cache cannot be copied from S3", partial(self._download, path), share_s)
            with self._lock:
                if path in self._useless:
                    self._useless.discard(path)
                    path.unlink(missing_ok=True)  # or the engine might take its first bytes for those of this prompt
                save = not path.exists()
        except Exception as error:
            _log("a prompt's cache cannot be read", error)
            return None
        return Entry(path, save)

    def close(self, entry: Entry, done: Mapping[str, Any], deadline: float | None = None) -> None:
        """Keeps what the request of this `done` event has saved, in S3 too."""
        try:
            if "saved" in done["cache_file"]:
                self._evict(entry.path)
                upload = partial(self._upload, entry.path)
                self._copy("a prompt's cache cannot be copied to S3", upload, self._left_s(deadline))
            elif entry.save and done["stop_type"] not in CUT:
                logger.warning("a prompt's cache was not written; the engine's log has the reason (LOG_LEVEL=DEBUG)")
            elif done["cache_file"] == "invalid" or done["tokens_cached"] < USEFUL_TOKENS:
                with self._lock:
                    self._useless.add(entry.path)
        except Exception as error:
            _log("a prompt's cache cannot be kept", error)

    def _name(self, key: str, ready: Mapping[str, Any]) -> str:
        """A name of its own for each key, model and type of cache, which tells nothing of the key."""
        model = ready["model"]
        parts = [key, ready["kv_type"], *(str(model[part]) for part in ("name", "architecture", "size", "n_params"))]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def _left_s(self, deadline: float | None) -> float | None:
        """The time until the answer must be on its way: half of the margin is for that."""
        return None if deadline is None else self._settings.answer_by(deadline) - time.monotonic()

    def _copy(self, what: str, copy: Callable[[], None], wait_s: float | None) -> None:
        """Lets `copy` use S3, if there is a bucket that did not fail just now, and waits for it so long at most."""
        if not self._bucket or time.monotonic() < self._no_s3_before or (wait_s is not None and wait_s < MIN_COPY_S):
            return

        def run() -> None:
            try:
                copy()
            except Exception as error:
                self._failed(what, error)

        thread = threading.Thread(target=run, name="prompt-cache", daemon=True)
        thread.start()
        thread.join(wait_s)
        if thread.is_alive():
            self._failed(what, TimeoutError())

    def _download(self, path: Path) -> None:
        from botocore.exceptions import ClientError

        part = path.with_suffix(f".{threading.get_ident()}.part")
        began = time.monotonic()
        try:
            self._s3().download_file(self._bucket, self._key(path), str(part))
            part.rename(path)
        except ClientError as error:
            if aws.status_of(error) in NOT_THERE:
                return
            raise
        finally:
            part.unlink(missing_ok=True)
        self._evict(path)
        copied = {"bytes": path.stat().st_size, "copy_ms": round((time.monotonic() - began) * 1e3)}
        logger.info("prompt's cache copied from S3", extra=copied)

    def _upload(self, path: Path) -> None:
        began = time.monotonic()
        self._s3().upload_file(str(path), self._bucket, self._key(path))
        copied = {"bytes": path.stat().st_size, "copy_ms": round((time.monotonic() - began) * 1e3)}
        logger.info("prompt's cache copied to S3", extra=copied)

    def _key(self, path: Path) -> str:
        return f"{self._prefix.rstrip('/')}/{path.name}"

    def _s3(self) -> S3Client:
        with self._lock:
            if self._client is None:
                self._client = aws.client(
                    "s3", connect_timeout_s=CONNECT_TIMEOUT_S, read_timeout_s=READ_TIMEOUT_S, attempts=2
                )
            return self._client

    def _failed(self, what: str, error: Exception) -> None:
        self._no_s3_before = time.monotonic() + PAUSE_S
        _log(what, error)

    def _evict(self, kept: Path) -> None:
        """Removes the files used least recently, but for `kept`, until the rest is small enough."""
        files = sorted(kept.parent.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime, reverse=True)
        room = self._settings.prompt_cache_bytes - kept.stat().st_size
        for path in files:
            if path != kept:
                room -= path.stat().st_size
                if room < 0:
                    path.unlink(missing_ok=True)


def _remove_unfinished(directory: Path) -> None:
    """Removes what processes that were killed have left: it is no use to anybody, and takes room."""
    for path in directory.iterdir():
        if UNFINISHED.fullmatch(path.name):
            with suppress(FileNotFoundError):  # it is finished
                if path.stat().st_mtime < time.time() - UNFINISHED_S:
                    path.unlink()


def _log(what: str, error: Exception) -> None:
    logger.warning(what, extra={"error_type": type(error).__name__})
