"""From the hub to S3, with the real clients and the real engine; hub and S3 are servers that spoil answers."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitnet_gguf import ModelShape
from function.model_store import ModelStore
from function.settings import ROOT, Settings
from synthesize import synthesize
from tests.model.hub import COMMIT, Hub
from tests.s3 import S3, Answer, Request

SCRIPT = ROOT / "build" / "model" / "publish.py"
REPOSITORY, FILE = "someone/bitnet-tales-gguf", "tales.gguf"

pytestmark = pytest.mark.usefixtures("engine_path")


@pytest.fixture
def hub(demo_model: Path) -> Iterator[Hub]:
    with Hub(REPOSITORY, FILE, demo_model.read_bytes()) as server:
        yield server


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is uploaded in several parts: 22 MB when packed."""
    path = tmp_path_factory.mktemp("large") / "large.gguf"
    synthesize(path, ModelShape(40_000, 256, 512, 1, 512, 8, 4), 1, None)
    return path


def command(tmp_path: Path, *options: str | Path) -> list[str | Path]:
    folders: list[str | Path] = ["--directory", tmp_path / "models", "--packed", tmp_path / "packed"]
    return [sys.executable, SCRIPT, "--bucket", "models", *folders, *options]


def environment(tmp_path: Path, hub: Hub | None = None) -> dict[str, str]:
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return aws | {"HF_ENDPOINT": hub.endpoint if hub else "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}


def publish(tmp_path: Path, *options: str | Path, hub: Hub | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(tmp_path, *options), env=environment(tmp_path, hub), capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def from_hub(hub: Hub) -> list[str]:
    sha256 = hashlib.sha256(hub.body).hexdigest()
    return ["--repository", REPOSITORY, "--file", FILE, "--revision", COMMIT, "--sha256", sha256]


def uploads(s3: S3) -> list[Request]:
    return [request for request in s3.requests if request.method == "PUT"]


def test_from_the_hub_to_the_function(s3: S3, hub: Hub, tmp_path: Path) -> None:
    done = publish(tmp_path, *from_hub(hub), hub=hub)
    assert done.returncode == 0, done.stderr
    (uri,) = done.stdout.split()
    sha256 = hashlib.sha256(hub.body).hexdigest()
    assert uri == f"s3://models/models/tales-{sha256[:12]}-layout2-8bit.gguf"
    head = s3.client().head_object(Bucket="models", Key=uri.removeprefix("s3://models/"), ChecksumMode="ENABLED")
    packed = next((tmp_path / "packed").glob("*.gguf")).read_bytes()
    assert head["Metadata"] == {
        "source": f"{REPOSITORY}@{COMMIT}",
        "source-sha256": sha256,
        "sha256": hashlib.sha256(packed).hexdigest(),
        "layout-version": "2",
        "output-bits": "8",
    }
    assert head["ChecksumCRC64NVME"]
    copied = ModelStore(Settings(model_s3_uri=uri, model_cache_dir=tmp_path / "cache")).fetch()
    assert copied.read_bytes() == packed


def test_again_does_nothing(s3: S3, hub: Hub, tmp_path: Path) -> None:
    first = publish(tmp_path, *from_hub(hub), hub=hub)
    hub.requests.clear()
    s3.requests.clear()
    again = publish(tmp_path / "elsewhere", *from_hub(hub), hub=hub)  # with nothing of the first at hand
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert hub.requests == []
    assert [request.method for request in s3.requests] == ["HEAD"]
    assert not (tmp_path / "elsewhere").exists()


def test_another_precision_is_another_object(s3: S3, tmp_path: Path, demo_model: Path) -> None:
    uris = [publish(tmp_path, "--gguf", demo_model, "--output-bits", bits).stdout.strip() for bits in ("8", "6")]
    assert [uri.rsplit("-", 1)[1] for uri in uris] == ["8bit.gguf", "6bit.gguf"]
    assert len(uploads(s3)) == 2


def test_the_newest_of_a_repository_without_a_pin(s3: S3, hub: Hub, tmp_path: Path) -> None:
    for _ in range(2):
        done = publish(tmp_path, "--repository", REPOSITORY, "--file", FILE, hub=hub)
        assert done.returncode == 0, done.stderr
    assert len(hub.bytes_requests) == 1
    assert len(uploads(s3)) == 1
    (content,) = s3.client().list_objects_v2(Bucket="models")["Contents"]
    metadata = s3.client().head_object(Bucket="models", Key=content["Key"])["Metadata"]
    assert metadata["source"] == f"{REPOSITORY}@{COMMIT}"


def test_a_wrong_checksum_uploads_nothing(s3: S3, hub: Hub, tmp_path: Path) -> None:
    options = from_hub(hub)
    hub.sha256 = options[-1]
    hub.body = bytes([hub.body[0]]) + hub.body[1:-1] + b"!"
    done = publish(tmp_path, *options, hub=hub)
    assert done.returncode == 1
    assert "is corrupted: its SHA-256 is " in done.stderr
    assert uploads(s3) == []


def test_a_model_that_the_engine_cannot_read_uploads_nothing(s3: S3, hub: Hub, tmp_path: Path) -> None:
    hub.body = hub.body[:-4096]
    done = publish(tmp_path, *from_hub(hub), hub=hub)
    assert done.returncode == 1
    assert "(bitnet pack, exit code 5)" in done.stderr
    assert uploads(s3) == []


def test_an_upload_that_fails_leaves_nothing_and_can_be_repeated(s3: S3, large_model: Path, tmp_path: Path) -> None:
    def refuse_second_part(request: Request, answer: Answer) -> None:
        if "partNumber=2" in request.path:
            answer.status, answer.body = 403, b"<Error><Code>AccessDenied</Code></Error>"

    s3.fault = refuse_second_part
    done = publish(tmp_path, "--gguf", large_model)
    assert done.returncode == 1
    assert "AccessDenied" in done.stderr
    assert "Contents" not in s3.client().list_objects_v2(Bucket="models")
    assert "Uploads" not in s3.client().list_multipart_uploads(Bucket="models")
    s3.fault = None
    done = publish(tmp_path, "--gguf", large_model)
    assert done.returncode == 0, done.stderr
    assert "is there" in done.stderr  # the packed file, which is not made again
    packed = next((tmp_path / "packed").glob("*.gguf")).read_bytes()
    key = done.stdout.strip().removeprefix("s3://models/")
    assert s3.client().get_object(Bucket="models", Key=key)["Body"].read() == packed
    assert len({request.path.split("partNumber=")[1][0] for request in uploads(s3)}) == 2


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_an_upload_that_is_interrupted_can_be_repeated(
    s3: S3, large_model: Path, tmp_path: Path, blow: signal.Signals
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def hold_second_part(request: Request) -> None:
        if "partNumber=2" in request.path:
            begun.set()
            go_on.wait(60)

    s3.before = hold_second_part
    process = subprocess.Popen(
        command(tmp_path, "--gguf", large_model), env=environment(tmp_path), stderr=subprocess.DEVNULL
    )
    assert begun.wait(120)
    process.send_signal(blow)
    if blow == signal.SIGKILL:
        assert process.wait(60) == -blow
    go_on.set()
    assert process.wait(60) == (130 if blow == signal.SIGINT else -blow)
    assert "Contents" not in s3.client().list_objects_v2(Bucket="models")
    s3.before = None
    done = publish(tmp_path, "--gguf", large_model)
    assert done.returncode == 0, done.stderr
    (content,) = s3.client().list_objects_v2(Bucket="models")["Contents"]
    assert done.stdout.strip() == f"s3://models/{content['Key']}"


def test_bytes_that_change_on_the_way_are_not_taken(s3: S3, tmp_path: Path, demo_model: Path) -> None:
    def another_checksum(request: Request, answer: Answer) -> None:
        if request.method == "HEAD" and "x-amz-checksum-crc64nvme" in answer.headers:
            answer.headers["x-amz-checksum-crc64nvme"] = "AAAAAAAAAAA="

    s3.fault = another_checksum
    done = publish(tmp_path, "--gguf", demo_model)
    assert done.returncode == 1
    assert "is corrupted: it must have " in done.stderr


def test_no_bucket_is_told_before_the_download(s3: S3, hub: Hub, tmp_path: Path) -> None:
    done = publish(tmp_path, *from_hub(hub), "--bucket", "nowhere", hub=hub)
    assert done.returncode == 1
    assert re.search("s3://nowhere/.*HeadBucket operation: Not Found", done.stderr)
    assert hub.requests == []
    assert uploads(s3) == []


def test_no_file(tmp_path: Path) -> None:
    done = publish(tmp_path, "--gguf", tmp_path / "none.gguf")
    assert done.returncode == 1
    assert "none.gguf" in done.stderr
