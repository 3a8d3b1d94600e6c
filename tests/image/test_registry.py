"""Bases pinned and images pushed, with docker or podman and a real registry (Debian's docker-registry) on a socket."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from function.settings import ROOT
from tests.image.container import CONTAINER, output
from tests.processes import eventually

PIN = ROOT / "build" / "image" / "pin.py"
DEPLOY = ROOT / "infra" / "deploy.py"
ACCOUNT, REGION = "123456789012", "eu-west-1"
ECR = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com"

pytestmark = [
    pytest.mark.skipif(not shutil.which("docker-registry"), reason="wants Debian's docker-registry"),
    pytest.mark.filterwarnings("ignore:Tried to parse AWS:UserWarning"),
]


def podman() -> bool:
    return "podman" in output("--version")


@dataclass(frozen=True)
class Registry:
    port: int

    def digest(self, name: str, tag: str) -> str | None:
        """What the registry says of an image."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        accept = "application/vnd.docker.distribution.manifest.v2+json, application/vnd.oci.image.manifest.v1+json"
        connection.request("GET", f"/v2/{name}/manifests/{tag}", headers={"accept": accept})
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return f"sha256:{hashlib.sha256(body).hexdigest()}" if response.status == 200 else None


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    configuration = tmp_path / "registry.json"  # which is YAML too
    storage = {"filesystem": {"rootdirectory": str(tmp_path / "registry")}}
    configuration.write_text(
        json.dumps(
            {"version": 0.1, "storage": storage, "http": {"addr": f"127.0.0.1:{port}"}, "log": {"level": "error"}}
        )
    )
    # Without TLS: docker takes that of 127.0.0.1, podman has to be told.
    insecure = [f"127.0.0.1:{port}", ECR]
    registries = tmp_path / "registries.conf"
    registries.write_text("".join(f'[[registry]]\nlocation = "{name}"\ninsecure = true\n' for name in insecure))
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(registries))
    process = subprocess.Popen(["docker-registry", "serve", configuration], stderr=subprocess.DEVNULL)
    found = Registry(port)

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    eventually(answers)
    yield found
    process.terminate()
    process.wait()


@pytest.fixture
def image(tmp_path: Path) -> Iterator[str]:
    """A local image of one file."""
    name = f"localhost/bitnet-test-{os.getpid()}:one"
    make(tmp_path, name, "one")
    yield name
    subprocess.run([CONTAINER, "rmi", "--force", name], capture_output=True, check=False)


def make(folder: Path, name: str, content: str) -> None:
    (folder / "Dockerfile").write_text("FROM scratch\nCOPY file /file\n")
    (folder / "file").write_text(content)
    output("build", "--quiet", "--tag", name, str(folder))


def pin(dockerfile: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, PIN, dockerfile], capture_output=True, text=True, check=False)


def test_the_bases_are_pinned_and_pinned_anew(registry: Registry, image: str, tmp_path: Path) -> None:
    base = f"127.0.0.1:{registry.port}/library/base:stable"
    output("tag", image, base)
    output("push", base)
    dockerfile = tmp_path / "pinned" / "Dockerfile"
    dockerfile.parent.mkdir()
    rest = "ARG OTHER=1\nFROM ${BUILDER_IMAGE} AS engine\nFROM ${PYTHON_IMAGE}\nCOPY --from=engine /file /copy\n"
    dockerfile.write_text(f"ARG BUILDER_IMAGE={base}\nARG PYTHON_IMAGE={base}\n{rest}")
    for content in ("one", "two"):
        make(tmp_path, base, content)
        output("push", base)
        done = pin(dockerfile)
        assert done.returncode == 0, done.stderr
        pinned = f"{base}@{registry.digest('library/base', 'stable')}"
        assert dockerfile.read_text() == f"ARG BUILDER_IMAGE={pinned}\nARG PYTHON_IMAGE={pinned}\n{rest}"
        output("rmi", "--force", base)
        output("build", "--quiet", "--tag", f"{image}-built", str(dockerfile.parent))
    output("rmi", "--force", f"{image}-built", pinned)


def test_a_base_that_is_not_there_changes_nothing(registry: Registry, tmp_path: Path) -> None:
    dockerfile = tmp_path / "Dockerfile"
    text = f"ARG BUILDER_IMAGE=127.0.0.1:{registry.port}/library/none:stable\nFROM ${{BUILDER_IMAGE}}\n"
    dockerfile.write_text(text)
    done = pin(dockerfile)
    assert done.returncode == 1
    assert (
        f"127.0.0.1:{registry.port}/library/none:stable cannot be looked up: HTTP Error 404: Not Found" in done.stderr
    )
    assert dockerfile.read_text() == text


def test_a_registry_that_hands_out_tokens(tmp_path: Path) -> None:
    """As Docker Hub does, to everybody."""
    digest = f"sha256:{'5a' * 32}"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers["host"]
            if self.path == "/token?service=registry&scope=repository%3Alibrary%2Fbase%3Apull":
                self._answer(200, {}, b'{"token": "for-you"}')
            elif self.headers["authorization"] == "Bearer for-you" and self.path == "/v2/library/base/manifests/stable":
                self._answer(200, {"docker-content-digest": digest}, b"")
            else:
                scope = 'service="registry",scope="repository:library/base:pull"'
                self._answer(401, {"www-authenticate": f'Bearer realm="http://{host}/token",{scope}'}, b"")

        do_HEAD = do_GET  # noqa: N815

        def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"127.0.0.1:{server.server_port}/library/base:stable"
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text(f"ARG PYTHON_IMAGE={base}\n")
    done = pin(dockerfile)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert dockerfile.read_text() == f"ARG PYTHON_IMAGE={base}@{digest}\n"


def test_the_project_s_dockerfile_has_what_is_pinned() -> None:
    bases = re.findall(r"^ARG ([A-Z]+_IMAGE)=(\S+)$", (ROOT / "build" / "Dockerfile").read_text(), re.MULTILINE)
    assert [name for name, _ in bases] == ["BUILDER_IMAGE", "PYTHON_IMAGE"]


TEMPLATE = """
Parameters:
  ImageUri: {Type: String}
  ModelBucket: {Type: String}
  ModelKey: {Type: String}
  EphemeralStorage: {Type: Number}
  AuthType: {Type: String, Default: AWS_IAM}
Resources:
  Parameter:
    Type: AWS::SSM::Parameter
    Properties: {Name: /image, Type: String, Value: !Ref ImageUri}
Outputs:
  FunctionUrl: {Value: "https://abcdef.lambda-url.eu-west-1.on.aws/"}
  Image: {Value: !Ref ImageUri}
  Storage: {Value: !Ref EphemeralStorage}
"""


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The environment of a process whose AWS is moto on a socket."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    account = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
    }
    for name, value in account.items():
        monkeypatch.setenv(name, value)
    yield account
    server.stop()


def test_from_the_image_to_the_line_for_curl(
    registry: Registry, aws: dict[str, str], image: str, tmp_path: Path
) -> None:
    """ECR's name leads to the local registry by way of HTTP_PROXY: an HTTP server takes a proxy's requests too."""
    if not podman():
        pytest.skip("dockerd reads its proxy and its insecure registries when it starts")
    s3: Any = boto3.client("s3")
    s3.create_bucket(Bucket="models", CreateBucketConfiguration={"LocationConstraint": REGION})
    s3.put_object(Bucket="models", Key="models/tales.gguf", Body=bytes(3_000_000))
    template = tmp_path / "template.yaml"
    template.write_text(TEMPLATE)
    environment = (
        os.environ
        | aws
        | {
            "HTTP_PROXY": f"http://127.0.0.1:{registry.port}",
            "NO_PROXY": "127.0.0.1",
            "REGISTRY_AUTH_FILE": str(tmp_path / "auth.json"),
        }
    )
    command: list[str | Path] = [sys.executable, DEPLOY, "--prefix", "test", "function"]
    options: list[str | Path] = ["--model", "s3://models/models/tales.gguf", "--image", image, "--template", template]

    def deploy(*parameters: str) -> str:
        done = subprocess.run(
            [*command, *options, *parameters], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        print(done.stderr)
        return done.stdout

    outputs = deploy()
    tag = output("image", "inspect", "--format", "{{.Id}}", image).strip().removeprefix("sha256:")[:12]
    assert f"{ECR}/bitnet-lambda:{tag}" in outputs
    assert registry.digest("bitnet-lambda", tag) is not None
    assert re.search(r"^  Storage +512$", outputs, re.MULTILINE)
    assert 'curl --aws-sigv4 "aws:amz:eu-west-1:lambda"' in outputs
    assert "https://abcdef.lambda-url.eu-west-1.on.aws/completion --data" in outputs
    assert "Bearer $BITNET_API_KEY" in deploy("AuthType=NONE")
    output("rmi", f"{ECR}/bitnet-lambda:{tag}")
    logins = json.loads((tmp_path / "auth.json").read_text())["auths"]
    assert list(logins) == [ECR]
