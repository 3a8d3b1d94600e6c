"""Where the model is: a local path, or an object in S3 that is copied to local storage once and verified."""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import logging
import os
import re
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from function import aws
from function.chunk_sums import ChunkSums, IncompleteError, read_chunk_sums
from function.metrics import Metrics
from function.own_directory import make_own_directory

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from function.settings import Settings

logger = logging.getLogger("bitnet.model_store")

CHUNK_BYTES = 2**20  # read from the socket, written and hashed at once
RANGE_TRIES = 5  # in a row that bring no byte
COPY_TRIES = 3  # of an object that is replaced while it is copied
CHUNK_TRIES = 3  # of a chunk that differs from its checksum
HEADER_BYTES = 64 * 2**20  # of a GGUF file at most; the 2B model's has 8 million
BACKOFF_S = 0.2  # doubled at each try
LOCK_POLL_S = 0.05
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 10
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ModelError(Exception):
    """The model cannot be had: one line for the user, a stable `code`, and whether trying again may help."""

    def __init__(self, code: str, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.transient = transient


class _Replaced(Exception):  # noqa: N818 - not a failure: the copy starts again
    """The object is no longer the one that the copy began with."""


@dataclass(frozen=True)
class _Object:
    """One version of an object in S3."""

    bucket: str
    key: str
    etag: str
    size: int
    checksums: Mapping[str, bytes]

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


class ModelStore:
    """Gives the path of the model, and copies it there first if need be.

    After the first success nothing is asked of S3 again as long as the file is there and the engine takes it. A file
    that an earlier process left is used if one HEAD request shows that it is a copy of the object's present version:
    its name holds the ETag's hash, and it gets that name only when every byte has been checked.
    """

    def __init__(self, settings: Settings, metrics: Metrics | None = None) -> None:
        self._settings = settings
        self._metrics = metrics or Metrics()
        self._lock = threading.Lock()
        self._path: Path | None = None

    def fetch(self, stop: threading.Event | None = None) -> Path:
        """The path of a model that is complete and verified. Other callers, of this process or others, wait.

        Raises:
            ModelError: it is missing, forbidden, corrupted, too large for the disk, out of reach, or `stop` was set.
        """
        if self._settings.model_path is not None:
            return self._settings.model_path
        if self._settings.model_s3_uri is None:
            return self._settings.demo_model
        with self._lock:
            if self._path is None or not self._path.exists():
                self._path = self._fetch_from_s3(self._settings.model_s3_uri, stop or threading.Event())
            return self._path

    def distrust(self) -> None:
        """The file that was given is none that the engine takes: the next fetch asks S3 whether there is another."""
        with self._lock:
            self._path = None

    def _fetch_from_s3(self, uri: str, stop: threading.Event) -> Path:
        bucket, key = aws.split_uri(uri)
        directory = self._settings.model_cache_dir
        name = _hash(uri)
        try:
            make_own_directory(directory)
            with closing(self._client()) as client, _file_lock(directory / f"{name}.lock", stop):
                for _ in range(COPY_TRIES):
                    source = _head(client, bucket, key)
                    target = directory / f"{name}-{_hash(source.etag)}.gguf"
                    if target.exists() and target.stat().st_size == source.size:
                        return target
                    for stale in directory.glob(f"{name}-*.gguf"):
                        stale.unlink()
                    try:
                        self._copy(client, source, target, directory / f"{name}.part", stop)
                    except _Replaced:
                        logger.warning("the model was replaced while it was copied; starting again")
                        continue
                    return target
        except OSError as error:
            raise ModelError(
                "model_cache_unusable", f"cannot keep the model in {directory} (MODEL_CACHE_DIR): {error.strerror}"
            ) from error
        raise ModelError("model_replaced", f"{uri} was replaced {COPY_TRIES} times while it was copied", transient=True)

    def _client(self) -> S3Client:
        from botocore.exceptions import BotoCoreError

        try:
            s3: S3Client = aws.client(
                "s3",
                connect_timeout_s=CONNECT_TIMEOUT_S,
                read_timeout_s=READ_TIMEOUT_S,
                attempts=4,
                max_pool_connections=self._settings.copy_threads,
                response_checksum_validation="when_required",  # the whole object is verified instead
            )
            return s3
        except (BotoCoreError, ValueError) as error:
            raise ModelError("model_copy_failed", f"no S3 client: {error}") from error

    def _copy(self, client: S3Client, source: _Object, target: Path, part: Path, stop: threading.Event) -> None:
        """Copies `source` to `part`, verifies it and renames it to `target`. Leaves no half file."""
        part.unlink(missing_ok=True)  # of a process that was killed
        free = os.statvfs(part.parent)
        if (room := free.f_bavail * free.f_frsize) < source.size:
            raise _no_room(source, f"{part.parent} has {room:,} bytes free")
        began = time.monotonic()
        try:
            with part.open("wb+") as file:
                os.truncate(file.fileno(), source.size)
                copy = _RangedCopy(client, source, file.fileno(), self._settings)
                copy.run(stop)
                part.rename(target)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise _no_room(source, f"{part.parent}: {error.strerror}") from error
            raise
        finally:
            part.unlink(missing_ok=True)
        copy_ms = round((time.monotonic() - began) * 1e3)
        self._metrics.copied(copy_ms, source.size)
        verified = [*copy.verified, *sorted(source.checksums)] or ["size"]
        logger.info("model copied", extra={"bytes": source.size, "copy_ms": copy_ms, "verified": verified})


class _RangedCopy:
    """Fetches the ranges of one object in parallel, each to its offset, and hashes them in order as they land."""

    def __init__(self, client: S3Client, source: _Object, fd: int, settings: Settings) -> None:
        self._client = client
        self._source = source
        self._fd = fd
        self._part_bytes = settings.copy_part_bytes
        self._pending = deque(range(0, source.size, self._part_bytes))
        self._threads = min(settings.copy_threads, len(self._pending))
        self._results: SimpleQueue[int | BaseException] = SimpleQueue()
        self._landed: set[int] = set()  # starts of ranges that came before their turn
        self._complete = 0  # every byte before it is there
        self.verified: list[str] = []
        self._abort = threading.Event()

    def run(self, stop: threading.Event) -> None:
        """Returns when the file is complete and verified.

        Raises:
            ModelError: a range cannot be had, a checksum differs, or `stop` was set.
            _Replaced: the object is another one now.
        """
        threads = [
            threading.Thread(target=self._fetch_ranges, name=f"s3-{n}", daemon=True) for n in range(self._threads)
        ]
        for thread in threads:
            thread.start()
        try:
            self._verify_as_they_land(stop)
        finally:
            self._abort.set()
            for thread in threads:  # the descriptor must outlive them
                thread.join()

    def _verify_as_they_land(self, stop: threading.Event) -> None:
        checks = {name: _HASHES[name]() for name in self._source.checksums}
        for start, end, crc32 in self._pieces(stop):
            self._wait_for(end, stop)
            if crc32 is not None:
                self._verify_chunk(start, end, crc32)
            for piece in self._written(start, end):
                for check in checks.values():
                    check.update(piece)
        for name, check in checks.items():
            if (digest := check.digest()) != (expected := self._source.checksums[name]):
                message = f"{self._source.uri} is corrupted: {name} is {digest.hex()}, the object says {expected.hex()}"
                raise ModelError("model_corrupted", message)

    def _pieces(self, stop: threading.Event) -> Iterator[tuple[int, int, int | None]]:
        """(start, end, CRC-32) of the chunks of a packed model, else of the ranges, which have no checksum."""
        size = self._source.size
        if (sums := self._chunk_sums(stop)) is not None:
            if not sums.fits(size):
                message = f"{len(sums.crc32)} chunks of {sums.chunk_bytes:,} bytes from {sums.data_start:,} on"
                raise ModelError(
                    "model_corrupted", f"{self._source.uri} has {size:,} bytes, and checksums for {message}"
                )
            self.verified.append("chunk_crc32")
            yield from sums.pieces(size)
        else:
            for start in range(0, size, self._part_bytes):
                yield start, self._end(start), None

    def _chunk_sums(self, stop: threading.Event) -> ChunkSums | None:
        known = self._end(0)
        while True:
            self._wait_for(known, stop)
            try:
                return read_chunk_sums(os.pread(self._fd, known, 0))
            except IncompleteError:
                if known >= min(self._source.size, HEADER_BYTES):
                    return None
                known = min(2 * known, self._source.size)

    def _verify_chunk(self, start: int, end: int, expected: int) -> None:
        """Compares a chunk with its checksum, and copies it again where they differ."""
        for tries in range(1, CHUNK_TRIES + 1):
            crc32 = 0
            for piece in self._written(start, end):
                crc32 = zlib.crc32(piece, crc32)
            if crc32 == expected:
                return
            logger.warning("a chunk of the model differs from its checksum", extra={"offset": start, "tries": tries})
            if tries < CHUNK_TRIES:
                self._fetch(start, end)
        message = f"bytes {start} to {end - 1} have the CRC-32 {crc32:08x}, the file says {expected:08x}"
        raise ModelError("model_corrupted", f"{self._source.uri} is corrupted: {message} (copied {CHUNK_TRIES} times)")

    def _written(self, start: int, end: int) -> Iterator[bytes]:
        for offset in range(start, end, CHUNK_BYTES):
            yield os.pread(self._fd, min(CHUNK_BYTES, end - offset), offset)

    def _wait_for(self, end: int, stop: threading.Event) -> None:
        """Returns when every byte before `end` is there."""
        while self._complete < end:
            while self._complete not in self._landed:
                self._landed.add(self._next_landed(stop))
            self._landed.remove(self._complete)
            self._complete = self._end(self._complete)

    def _next_landed(self, stop: threading.Event) -> int:
        while not stop.is_set():
            try:
                result = self._results.get(timeout=LOCK_POLL_S)
            except Empty:
                continue
            if isinstance(result, BaseException):
                raise result
            return result
        raise _stopped()

    def _end(self, start: int) -> int:
        return min(start + self._part_bytes, self._source.size)

    def _fetch_ranges(self) -> None:
        while not self._abort.is_set():
            try:
                start = self._pending.popleft()
            except IndexError:
                return
            try:
                self._fetch(start, self._end(start))
            except BaseException as error:
                self._results.put(error)
                return
            self._results.put(start)

    def _fetch(self, start: int, end: int) -> None:
        """Fetches bytes `start` to `end` and goes on where a connection broke."""
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError

        offset, failures = start, 0
        while offset < end and not self._abort.is_set():
            began = offset
            try:
                for chunk in self._read(offset, end):
                    _write_at(self._fd, chunk, offset)
                    offset += len(chunk)
                if offset > began or self._abort.is_set():
                    continue
                reason: Exception = EOFError("S3 answers without a byte")
            except ClientError as error:
                if aws.status_of(error) in (404, 412):
                    raise _Replaced from error
                if 400 <= aws.status_of(error) < 500:
                    raise _client_error(error, self._source.uri) from error
                reason = error
            except (BotoCoreError, HTTPError) as error:
                reason = error
            failures = 1 if offset > began else failures + 1
            if failures == RANGE_TRIES:
                raise _unreachable(self._source.uri, reason) from reason
            logger.warning("a range of the model broke off", extra={"offset": offset, "error": type(reason).__name__})
            self._abort.wait(BACKOFF_S * 2 ** (failures - 1))

    def _read(self, offset: int, end: int) -> Iterator[bytes]:
        response = self._client.get_object(
            Bucket=self._source.bucket,
            Key=self._source.key,
            IfMatch=self._source.etag,
            Range=f"bytes={offset}-{end - 1}",
        )
        with closing(response["Body"]) as body:
            expected = f"bytes {offset}-{end - 1}/{self._source.size}"
            if response.get("ContentRange") != expected:
                message = f"{self._source.uri}: asked for '{expected}', got '{response.get('ContentRange')}'"
                raise ModelError("model_copy_failed", message)
            while not self._abort.is_set() and (chunk := body.read(CHUNK_BYTES)):
                yield chunk


class _Crc:
    """A cyclic redundancy check with hashlib's interface; the digest is big endian, as S3 writes it."""

    def __init__(self, update: Callable[[bytes, int], int], digest_bytes: int) -> None:
        self._update = update
        self._digest_bytes = digest_bytes
        self._value = 0

    def update(self, chunk: bytes) -> None:
        self._value = self._update(chunk, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._digest_bytes, "big")


def _crt(name: str, digest_bytes: int) -> _Crc:
    from awscrt import checksums  # type: ignore[import-untyped]

    return _Crc(getattr(checksums, name), digest_bytes)


_HASHES: dict[str, Callable[[], Any]] = {
    "CRC32": lambda: _Crc(zlib.crc32, 4),
    "CRC32C": lambda: _crt("crc32c", 4),
    "CRC64NVME": lambda: _crt("crc64nvme", 8),
    "SHA1": hashlib.sha1,
    "SHA256": hashlib.sha256,
}


def _head(client: S3Client, bucket: str, key: str) -> _Object:
    """What S3 says of the object. Needs s3:GetObject only."""
    from botocore.exceptions import BotoCoreError, ClientError

    uri = f"s3://{bucket}/{key}"
    try:
        head = client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    except ClientError as error:
        raise _client_error(error, uri) from error
    except BotoCoreError as error:
        raise _unreachable(uri, error) from error
    if head["ContentLength"] == 0:
        raise ModelError("model_corrupted", f"{uri} is empty")
    if "ETag" not in head:
        raise ModelError("model_copy_failed", f"{uri}: S3 told no ETag of it, so its version cannot be known")
    return _Object(bucket, key, head["ETag"], head["ContentLength"], _checksums(head, uri))


def _checksums(head: Mapping[str, Any], uri: str) -> dict[str, bytes]:
    """The checksums of the whole object: S3's own, and the `sha256` of its metadata (hexadecimal).

    A composite checksum ("…-12") is one of its parts' checksums, whose borders HEAD does not tell: not used.
    https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html
    """
    checksums = {
        name: base64.b64decode(value)
        for name in _HASHES
        if (value := head.get(f"Checksum{name}")) and "-" not in value and head.get("ChecksumType") != "COMPOSITE"
    }
    if (sha256 := head.get("Metadata", {}).get("sha256")) is not None:
        if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
            raise ModelError("model_corrupted", f"{uri}: the metadata 'sha256' must be 64 hexadecimal digits")
        if checksums.setdefault("SHA256", bytes.fromhex(sha256)) != bytes.fromhex(sha256):
            raise ModelError("model_corrupted", f"{uri}: the metadata 'sha256' differs from the checksum in S3")
    if not checksums:
        logger.warning("the model's object has no checksum of the whole: only its size is verified")
    return checksums


def _client_error(error: Any, uri: str) -> ModelError:
    status, code = aws.status_of(error), error.response.get("Error", {}).get("Code", "")
    if status == 404:
        return ModelError("model_not_found", f"{uri} does not exist: no such key, or no such bucket")
    if status == 403 and code in ("AccessDenied", "403"):  # a HEAD has no code
        reason = "the role may not read it, or it does not exist (without s3:ListBucket, S3 answers 403 for both)"
        return ModelError("model_access_denied", f"{uri}: {reason}")
    answer = str(status) if code == str(status) else f"{status} {code}"
    kind = "model_access_denied" if status == 403 else "model_copy_failed"
    return ModelError(kind, f"{uri}: S3 answered {answer}", transient=status >= 500)


def _unreachable(uri: str, error: Exception) -> ModelError:
    from botocore.exceptions import NoCredentialsError, PartialCredentialsError

    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return ModelError("model_access_denied", f"{uri}: no AWS credentials")
    return ModelError("model_copy_failed", f"{uri} cannot be copied: {error}", transient=True)


def _no_room(source: _Object, reason: str) -> ModelError:
    return ModelError("no_room_for_model", f"{source.uri} needs {source.size:,} bytes: {reason}")


def _stopped() -> ModelError:
    return ModelError("stopping", "the server is stopping", transient=True)


@contextmanager
def _file_lock(path: Path, stop: threading.Event) -> Iterator[None]:
    """Holds an exclusive lock on `path` against other processes."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)) as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stop.wait(LOCK_POLL_S):
                    raise _stopped() from None
        yield


def _write_at(fd: int, chunk: bytes, offset: int) -> None:
    view = memoryview(chunk)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
