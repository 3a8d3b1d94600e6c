"""`sam build` and `sam local invoke` with events/*.json, as a user has them; `make test-sam` runs this."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from function.settings import ROOT
from tests.image.container import CONTAINER, container, output
from tests.processes import eventually

SAM = ROOT / os.environ.get("SAM", "sam")
EVENTS = sorted((ROOT / "events").glob("*.json"))
pytestmark = pytest.mark.timeout(900)  # the first one may have to build all of the image
IMAGES = ("docker.io/library/function:latest", "docker.io/library/function:rapid-x86_64")


@pytest.fixture(scope="module")
def bases() -> Iterator[None]:
    """The bases under the names that the Dockerfile has for them, stand-ins where they cannot be had."""
    names = re.findall(r"^ARG [A-Z]+_IMAGE=(\S+)$", (ROOT / "build" / "Dockerfile").read_text(), re.MULTILINE)
    standin = os.environ.get("STANDIN")
    tagged = [name for name in names if standin and container("image", "inspect", name).returncode != 0]
    for name in tagged:
        output("tag", str(standin), name)
    yield
    for name in tagged:
        output("rmi", name)


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """That of SAM's command line, which speaks to docker's socket, or to podman's."""
    found = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    found |= {"SAM_CLI_TELEMETRY": "0", "AWS_DEFAULT_REGION": "us-east-1"}
    if "podman" not in output("--version"):
        yield found | {name: value for name, value in os.environ.items() if name.startswith("DOCKER_")}
        return
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "podman.sock"
        service = subprocess.Popen([CONTAINER, "system", "service", "--time=0", f"unix://{socket}"])
        eventually(socket.exists)
        yield found | {"DOCKER_HOST": f"unix://{socket}"}
        service.terminate()
        service.wait()


@pytest.fixture(scope="module")
def built(
    bases: None,  # noqa: ARG001
    environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Path]:
    """The template that `sam build` makes of template.yaml, and its image."""
    folder = tmp_path_factory.mktemp("sam")
    done = subprocess.run(
        [SAM, "build", "--build-dir", folder / "build", "--cache-dir", folder / "cache"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    yield folder / "build" / "template.yaml"
    for image in IMAGES:
        container("rmi", "--force", image)


def invoke(template: Path, event: Path, environment: dict[str, str], folder: Path) -> Any:
    variables = folder / "variables.json"
    variables.write_text(json.dumps({"Function": {"MODEL_S3_URI": ""}}))  # so that it takes the demo model
    options: list[str | Path] = ["--template", template, "--event", event, "--env-vars", variables, "--skip-pull-image"]
    done = subprocess.run(
        [SAM, "local", "invoke", "Function", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stderr)
    return json.loads(done.stdout)


@pytest.mark.parametrize("event", EVENTS, ids=[event.stem for event in EVENTS])
def test_an_event(built: Path, event: Path, environment: dict[str, str], tmp_path: Path) -> None:
    answer = invoke(built, event, environment, tmp_path)
    assert "errorType" not in answer
    if event.stem.startswith("url-"):
        assert answer["statusCode"] == (400 if event.stem == "url-refused" else 200)
    if event.stem == "completion":
        assert answer["content"].startswith(" there lived a king")
