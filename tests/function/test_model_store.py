"""Copying the model from S3: moto's S3 on a socket, behind a proxy that counts and spoils (tests/s3.py)."""

from __future__ import annotations

import base64
import hashlib
import logging
import random
import re
import resource
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from function import model_store
from function.model_store import ModelError, ModelStore
from function.settings import Settings
from tests.s3 import S3, Answer, Request

PART = 64 * 1024
MODEL = random.Random(2).randbytes(20 * PART + 12_345)  # 21 ranges, the last one short


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_store, "BACKOFF_S", 0.001)
    monkeypatch.setattr(model_store, "READ_TIMEOUT_S", 2)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def store(cache: Path) -> Callable[[str], ModelStore]:
    """Makes stores as new processes would: they share nothing but the directory."""
    return lambda uri: ModelStore(
        Settings(model_s3_uri=uri, model_cache_dir=cache, copy_part_bytes=PART, copy_threads=4)
    )


Store = Callable[[str], ModelStore]


def models(cache: Path) -> list[Path]:
    """Everything in the cache that is not a lock."""
    return [path for path in cache.iterdir() if path.suffix != ".lock"] if cache.exists() else []


def failure(store: ModelStore) -> ModelError:
    with pytest.raises(ModelError) as caught:
        store.fetch()
    return caught.value


def test_the_path_of_a_setting_needs_no_copy(tmp_path: Path) -> None:
    uri = "s3://nowhere/never"
    assert ModelStore(Settings(model_path=tmp_path / "m", model_s3_uri=uri)).fetch() == tmp_path / "m"
    assert ModelStore(Settings()).fetch() == Settings().demo_model


def test_boto3_is_imported_for_a_copy_only() -> None:
    program = """
import sys
from function.handler import application
application().engine._store.fetch()
assert not {"boto3", "botocore.session", "awscrt"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={})


def test_the_object_is_copied_in_ranges(s3: S3, store: Store, cache: Path) -> None:
    path = store(s3.put("m.gguf", MODEL)).fetch()
    assert path.read_bytes() == MODEL
    assert models(cache) == [path]
    assert s3.count("HEAD") == 1
    ranges = [request for request in s3.requests if request.method == "GET"]
    assert sorted(request.range_start or 0 for request in ranges) == list(range(0, len(MODEL), PART))
    assert all("if-match" in request.headers for request in ranges)


def test_a_warm_store_asks_nothing(s3: S3, store: Store) -> None:
    warm = store(s3.put("m.gguf", MODEL))
    path = warm.fetch()
    s3.requests.clear()
    assert warm.fetch() == path
    assert s3.requests == []


def test_a_new_process_asks_once_whether_the_file_is_still_right(s3: S3, store: Store) -> None:
    uri = s3.put("m.gguf", MODEL)
    path = store(uri).fetch()
    s3.requests.clear()
    assert store(uri).fetch() == path
    assert [request.method for request in s3.requests] == ["HEAD"]


def test_a_new_process_replaces_the_copy_of_an_older_version(s3: S3, store: Store, cache: Path) -> None:
    uri = s3.put("m.gguf", MODEL)
    old = store(uri).fetch()
    s3.put("m.gguf", MODEL[::-1])
    new = store(uri).fetch()
    assert new.read_bytes() == MODEL[::-1]
    assert models(cache) == [new] != [old]


def test_a_file_of_the_wrong_size_is_copied_again(s3: S3, store: Store) -> None:
    uri = s3.put("m.gguf", MODEL)
    path = store(uri).fetch()
    with path.open("r+b") as file:
        file.truncate(1000)
    assert store(uri).fetch().read_bytes() == MODEL


def test_a_file_that_was_deleted_is_copied_again(s3: S3, store: Store) -> None:
    warm = store(s3.put("m.gguf", MODEL))
    warm.fetch().unlink()
    assert warm.fetch().read_bytes() == MODEL


def test_what_a_killed_process_left_is_no_obstacle(s3: S3, store: Store, cache: Path) -> None:
    uri = s3.put("m.gguf", MODEL)
    cache.mkdir()
    (cache / f"{model_store._hash(uri)}.part").write_bytes(b"half")
    assert models(cache) != [store(uri).fetch()]
    assert [path.read_bytes() for path in models(cache)] == [MODEL]


@pytest.mark.parametrize("algorithm", ["CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256"])
def test_every_checksum_of_s3_is_verified(s3: S3, store: Store, cache: Path, algorithm: str) -> None:
    uri = s3.put("m.gguf", MODEL, ChecksumAlgorithm=algorithm)
    assert store(uri).fetch().read_bytes() == MODEL
    for path in models(cache):
        path.unlink()

    def flip_a_bit(request: Request, answer: Answer) -> None:
        if request.range_start == 7 * PART:
            answer.body = bytes([answer.body[0] ^ 1]) + answer.body[1:]

    s3.fault = flip_a_bit
    error = failure(store(uri))
    assert error.code == "model_corrupted"
    assert f"{uri} is corrupted: {algorithm} is " in str(error)
    assert models(cache) == []


def test_the_sha256_of_the_metadata_is_verified(s3: S3, store: Store, cache: Path) -> None:
    sha256 = hashlib.sha256(MODEL).hexdigest()
    assert store(s3.put("right", MODEL, Metadata={"sha256": sha256})).fetch().read_bytes() == MODEL
    error = failure(store(s3.put("wrong", MODEL[::-1], Metadata={"sha256": sha256})))
    assert error.code == "model_corrupted"
    assert f"the object says {sha256}" in str(error)
    assert "64 hexadecimal digits" in str(failure(store(s3.put("odd", MODEL, Metadata={"sha256": "abc"}))))
    assert len(models(cache)) == 1


def test_metadata_and_checksum_that_disagree_are_an_error(s3: S3, store: Store) -> None:
    uri = s3.put("m.gguf", MODEL, ChecksumAlgorithm="SHA256", Metadata={"sha256": "0" * 64})
    assert "the metadata 'sha256' differs from the checksum in S3" in str(failure(store(uri)))


def test_a_composite_checksum_is_no_checksum_of_the_whole(
    s3: S3, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    client = s3.client()
    upload = client.create_multipart_upload(Bucket="models", Key="m", ChecksumAlgorithm="SHA256")["UploadId"]
    large = MODEL * 4  # a part has at least 5 MiB
    parts: list[Any] = []
    for number, body in enumerate((large + MODEL[:100], MODEL), 1):
        part = client.upload_part(
            Bucket="models", Key="m", UploadId=upload, PartNumber=number, Body=body, ChecksumAlgorithm="SHA256"
        )
        digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
        parts.append({"ETag": part["ETag"], "PartNumber": number, "ChecksumSHA256": digest})
    client.complete_multipart_upload(Bucket="models", Key="m", UploadId=upload, MultipartUpload={"Parts": parts})

    def as_aws_does(request: Request, answer: Answer) -> None:
        if request.method == "HEAD":  # moto leaves out that the checksum is one of two parts
            answer.headers |= {"x-amz-checksum-sha256": answer.headers["x-amz-checksum-sha256"] + "-2"}

    s3.fault = as_aws_does
    with caplog.at_level(logging.WARNING):
        assert store("s3://models/m").fetch().read_bytes() == large + MODEL[:100] + MODEL
    assert "only its size is verified" in caplog.text


def test_ranges_that_break_off_go_on_where_they_broke(s3: S3, store: Store) -> None:
    uri = s3.put("m.gguf", MODEL)
    broken: set[int] = set()

    def break_off_once(request: Request, answer: Answer) -> None:
        start = request.range_start
        if start is not None and start % PART == 0 and start not in broken:
            broken.add(start)
            answer.cut_after = 1000

    s3.fault = break_off_once
    assert store(uri).fetch().read_bytes() == MODEL
    starts = {request.range_start for request in s3.requests if request.method == "GET"}
    assert {start + 1000 for start in broken} <= starts


def test_ranges_that_are_refused_for_a_while_are_asked_again(s3: S3, store: Store) -> None:
    uri = s3.put("m.gguf", MODEL)
    seen: dict[int, int] = {}

    def slow_down_once(request: Request, answer: Answer) -> None:
        start = request.range_start
        if start is not None:
            seen[start] = seen.get(start, 0) + 1
            if start % (3 * PART) == 0 and seen[start] == 1:
                answer.status, answer.body = 503, b"<Error><Code>SlowDown</Code></Error>"

    s3.fault = slow_down_once
    assert store(uri).fetch().read_bytes() == MODEL


@pytest.mark.parametrize("cut_after", [0, 5])
def test_a_range_that_never_comes_is_an_error_in_the_end(s3: S3, store: Store, cache: Path, cut_after: int) -> None:
    uri = s3.put("m.gguf", MODEL)

    def never_whole(request: Request, answer: Answer) -> None:
        if request.range_start is not None and request.range_start // PART == 3 and request.method == "GET":
            answer.cut_after = 0 if request.range_start > 3 * PART else cut_after

    s3.fault = never_whole
    error = failure(store(uri))
    assert (error.code, error.transient) == ("model_copy_failed", True)
    assert models(cache) == []


def test_a_range_that_comes_without_a_byte_is_an_error_in_the_end(s3: S3, store: Store, cache: Path) -> None:
    def empty(request: Request, answer: Answer) -> None:
        if request.range_start == 3 * PART:
            answer.body = b""

    uri = s3.put("m.gguf", MODEL)
    s3.fault = empty
    error = failure(store(uri))
    assert (error.code, error.transient) == ("model_copy_failed", True)
    assert sum(request.range_start == 3 * PART for request in s3.requests) == model_store.RANGE_TRIES
    assert models(cache) == []


def test_an_answer_with_other_bytes_than_asked_for_is_refused(s3: S3, store: Store, cache: Path) -> None:
    def whole_object(request: Request, answer: Answer) -> None:
        if request.method == "GET":
            answer.status, answer.body = 200, MODEL
            del answer.headers["content-range"]

    uri = s3.put("m.gguf", MODEL)
    s3.fault = whole_object
    error = failure(store(uri))
    assert error.code == "model_copy_failed"
    assert re.search(r"asked for 'bytes \d+-\d+/1323065', got 'None'", str(error))
    assert models(cache) == []


def test_an_object_that_is_replaced_meanwhile_is_copied_anew(s3: S3, store: Store, cache: Path) -> None:
    uri = s3.put("m.gguf", MODEL)
    lock = threading.Lock()

    def replace_once(request: Request) -> None:
        with lock:
            if request.range_start == 9 * PART and s3.count("HEAD") == 1:
                s3.put("m.gguf", MODEL[::-1])

    s3.before = replace_once
    path = store(uri).fetch()
    assert path.read_bytes() == MODEL[::-1]
    assert models(cache) == [path]
    assert s3.count("HEAD") == 2


def test_an_object_that_is_replaced_all_the_time_is_an_error(s3: S3, store: Store, cache: Path) -> None:
    uri = s3.put("m.gguf", MODEL)
    versions = iter(range(1000))

    def replace(request: Request) -> None:
        if request.range_start is not None:
            s3.put("m.gguf", MODEL + str(next(versions)).encode())

    s3.before = replace
    error = failure(store(uri))
    assert (error.code, error.transient) == ("model_replaced", True)
    assert models(cache) == []


def test_an_object_that_vanishes_meanwhile_is_missing(s3: S3, store: Store, cache: Path) -> None:
    uri = s3.put("m.gguf", MODEL)

    def delete(request: Request) -> None:
        if request.range_start == 9 * PART:
            s3.client().delete_object(Bucket="models", Key="m.gguf")

    s3.before = delete
    assert failure(store(uri)).code == "model_not_found"
    assert models(cache) == []


@pytest.mark.parametrize("uri", ["s3://models/missing", "s3://no-such-bucket/m.gguf"])
@pytest.mark.usefixtures("s3")
def test_a_missing_object_or_bucket(store: Store, cache: Path, uri: str) -> None:
    error = failure(store(uri))
    assert (error.code, error.transient) == ("model_not_found", False)
    assert f"{uri} does not exist" in str(error)
    assert models(cache) == []


@pytest.mark.parametrize("code", ["InvalidObjectState", "RequestTimeTooSkewed"])
def test_another_reason_for_a_refusal_is_told(s3: S3, store: Store, code: str) -> None:
    def refuse(request: Request, answer: Answer) -> None:
        if request.method == "GET":
            answer.status, answer.body = 403, f"<Error><Code>{code}</Code></Error>".encode()

    uri = s3.put("m.gguf", MODEL)
    s3.fault = refuse
    error = failure(store(uri))
    assert (error.code, str(error)) == ("model_access_denied", f"{uri}: S3 answered 403 {code}")


def test_a_store_without_versions_is_none(s3: S3, store: Store) -> None:
    def forget(_: Request, answer: Answer) -> None:
        answer.headers = {name: value for name, value in answer.headers.items() if name.lower() != "etag"}

    uri = s3.put("m.gguf", MODEL)
    s3.fault = forget
    error = failure(store(uri))
    assert (error.code, str(error)) == (
        "model_copy_failed",
        f"{uri}: S3 told no ETag of it, so its version cannot be known",
    )


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_no_permission(s3: S3, store: Store, cache: Path, method: str) -> None:
    def forbid(request: Request, answer: Answer) -> None:
        if request.method == method:
            answer.status, answer.body = 403, b"<Error><Code>AccessDenied</Code></Error>"

    uri = s3.put("m.gguf", MODEL)
    s3.fault = forbid
    error = failure(store(uri))
    assert (error.code, error.transient) == ("model_access_denied", False)
    assert "the role may not read it, or it does not exist" in str(error)
    assert models(cache) == []


def test_no_credentials(s3: S3, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = s3.put("m.gguf", MODEL)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    error = failure(store(uri))
    assert (error.code, str(error)) == ("model_access_denied", f"{uri}: no AWS credentials")


def test_an_s3_that_cannot_be_reached(s3: S3, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = s3.put("m.gguf", MODEL)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    error = failure(store(uri))
    assert (error.code, error.transient) == ("model_copy_failed", True)


def test_an_empty_object(s3: S3, store: Store) -> None:
    error = failure(store(s3.put("empty", b"")))
    assert (error.code, str(error)) == ("model_corrupted", "s3://models/empty is empty")


def test_too_little_room_is_said_before_anything_is_copied(s3: S3, store: Store, cache: Path) -> None:
    def huge(_: Request, answer: Answer) -> None:
        answer.headers["content-length"] = str(2**60)

    uri = s3.put("m.gguf", MODEL)
    s3.fault = huge
    error = failure(store(uri))
    assert error.code == "no_room_for_model"
    assert re.search(r"needs 1,152,921,504,606,846,976 bytes: .* has [\d,]+ bytes free", str(error))
    assert s3.count("GET") == 0
    assert models(cache) == []


def test_a_disk_that_fills_up_meanwhile(s3: S3, store: Store, cache: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    uri = s3.put("m.gguf", MODEL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * PART, limits[1]))
    try:
        error = failure(store(uri))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.code == "no_room_for_model"
    assert models(cache) == []


def test_a_directory_that_cannot_be_made(s3: S3, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = Settings(model_s3_uri=s3.put("m.gguf", MODEL), model_cache_dir=tmp_path / "file" / "cache")
    error = failure(ModelStore(settings))
    assert error.code == "model_cache_unusable"
    assert "Not a directory" in str(error)


def test_a_directory_of_somebody_else_is_not_used(s3: S3, tmp_path: Path) -> None:
    """In one that all may write to, whoever makes it first could put a model there."""
    tmp_path.chmod(0o1777)
    uri = s3.put("m.gguf", MODEL)
    ours, link, open_to_all = tmp_path / "ours", tmp_path / "link", tmp_path / "open"
    ours.mkdir(mode=0o700)
    link.symlink_to(ours)
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    for directory in (link, open_to_all):
        error = failure(ModelStore(Settings(model_s3_uri=uri, model_cache_dir=directory)))
        assert (error.code, "it is another user's" in str(error)) == ("model_cache_unusable", True)
    assert ModelStore(Settings(model_s3_uri=uri, model_cache_dir=ours)).fetch().read_bytes() == MODEL


def test_a_link_is_no_lock(s3: S3, store: Store, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text")
    uri = s3.put("m.gguf", MODEL)
    cache.mkdir(exist_ok=True)
    (cache / f"{hashlib.sha256(uri.encode()).hexdigest()[:16]}.lock").symlink_to(tmp_path / "precious")
    assert failure(store(uri)).code == "model_cache_unusable"
    assert (tmp_path / "precious").read_text() == "text"


def test_threads_wait_for_one_copy(s3: S3, store: Store) -> None:
    shared = store(s3.put("m.gguf", MODEL))
    with ThreadPoolExecutor(8) as threads:
        paths = set(threads.map(lambda _: shared.fetch(), range(8)))
    assert len(paths) == 1
    assert s3.count("GET") == 21


def test_processes_wait_for_one_copy(s3: S3, cache: Path) -> None:
    uri = s3.put("m.gguf", MODEL)
    program = f"""
from pathlib import Path
from function.model_store import ModelStore
from function.settings import Settings
settings = Settings(model_s3_uri={uri!r}, model_cache_dir=Path({str(cache)!r}), copy_part_bytes={PART})
print(ModelStore(settings).fetch())
"""
    children = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(3)]
    outputs = {child.communicate()[0] for child in children}
    assert len(outputs) == 1
    assert [path.read_bytes() for path in models(cache)] == [MODEL]
    assert s3.count("GET") == 21
    assert s3.count("HEAD") == 3


def test_a_copy_can_be_stopped(s3: S3, store: Store, cache: Path) -> None:
    uri = s3.put("m.gguf", MODEL)
    stop = threading.Event()

    def stop_in_the_middle(request: Request) -> None:
        if request.range_start == 5 * PART:
            stop.set()
        if stop.is_set():
            time.sleep(0.2)  # so that the end of the copy does not come first

    s3.before = stop_in_the_middle
    with pytest.raises(ModelError, match="the server is stopping"):
        store(uri).fetch(stop)
    assert models(cache) == []


@pytest.fixture
def packed() -> bytes:
    """A packed model of 1.3 MB whose header carries the checksums of its chunks, which do not agree with ranges."""
    data = MODEL[:-100]
    chunk = 3 * PART // 2
    sums = [zlib.crc32(data[start : start + chunk]) for start in range(0, len(data), chunk)]

    def key(name: bytes, value: bytes) -> bytes:
        return struct.pack("<Q", len(name)) + name + value

    tokens = b"".join(key(b"token", b"") for _ in range(9000))  # so that the header is longer than a range
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 3)
    header += key(b"tokenizer.ggml.tokens", struct.pack("<IIQ", 9, 8, 9000) + tokens)
    header += key(b"bitnet.pack.chunk_bytes", struct.pack("<II", 4, chunk))
    header += key(b"bitnet.pack.chunk_crc32", struct.pack(f"<IIQ{len(sums)}I", 9, 4, len(sums), *sums))
    return header + bytes(-len(header) % 32) + data


def flip_a_bit(times: int) -> Callable[[Request, Answer], None]:
    """A fault that spoils the byte 700,000 of an object, in the first `times` answers that hold it."""
    spoilt = 0

    def fault(request: Request, answer: Answer) -> None:
        nonlocal spoilt
        at = 700_000 - (request.range_start or 0)
        if request.method == "GET" and 0 <= at < len(answer.body) and spoilt < times:
            spoilt += 1
            answer.body = answer.body[:at] + bytes([answer.body[at] ^ 1]) + answer.body[at + 1 :]

    return fault


@pytest.mark.parametrize("times", [0, 1, 2])
def test_a_bad_chunk_is_copied_again(
    s3: S3, store: Store, packed: bytes, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    uri = s3.put("m.gguf", packed, ChecksumAlgorithm="CRC64NVME")
    s3.fault = flip_a_bit(times)
    with caplog.at_level(logging.INFO):
        assert store(uri).fetch().read_bytes() == packed
    retried = [record for record in caplog.records if "differs from its checksum" in record.message]
    assert len(retried) == times
    assert s3.count("GET") == -(-len(packed) // PART) + times
    (copied,) = [record for record in caplog.records if record.message == "model copied"]
    assert vars(copied)["verified"] == ["chunk_crc32", "CRC64NVME"]


def test_a_chunk_that_stays_bad_is_an_error(s3: S3, store: Store, cache: Path, packed: bytes) -> None:
    uri = s3.put("m.gguf", packed)
    s3.fault = flip_a_bit(model_store.CHUNK_TRIES)
    error = failure(store(uri))
    assert (error.code, error.transient) == ("model_corrupted", False)
    assert re.search(
        r"is corrupted: bytes \d+ to \d+ have the CRC-32 [0-9a-f]{8}, the file says [0-9a-f]{8} \(copied 3 times\)",
        str(error),
    )
    assert models(cache) == []


def test_an_object_that_was_spoilt_before_its_upload(s3: S3, store: Store, packed: bytes) -> None:
    spoilt = packed[:-1] + bytes([packed[-1] ^ 1])
    error = failure(store(s3.put("m.gguf", spoilt, ChecksumAlgorithm="CRC64NVME")))
    assert error.code == "model_corrupted"
    assert "copied 3 times" in str(error)


def test_a_packed_model_that_was_cut_short(s3: S3, store: Store, packed: bytes) -> None:
    error = failure(store(s3.put("m.gguf", packed[:1_000_000])))
    assert error.code == "model_corrupted"
    assert re.search(r"has 1,000,000 bytes, and checksums for \d+ chunks of 98,304 bytes from \d+,\d+ on", str(error))


def test_what_only_begins_like_a_model_is_verified_as_a_whole(s3: S3, store: Store) -> None:
    body = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + MODEL  # a header that never ends
    assert store(s3.put("m.gguf", body, ChecksumAlgorithm="SHA256")).fetch().read_bytes() == body
