"""Containers of the image under test, by docker or podman, whichever build/image/container finds."""

from __future__ import annotations

import json
import subprocess
import uuid
from types import TracebackType
from typing import Any, Self

from function.settings import ROOT
from tests.processes import eventually

CONTAINER = ROOT / "build" / "image" / "container"
EMULATOR = ROOT / "build" / "out" / "aws-lambda-rie"
LOCKED_DOWN = ("--network", "none", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL")
INVOKE = "http://127.0.0.1:8080/2015-03-31/functions/function/invocations"

# There is no curl in the image: its own Python asks, from inside, since the container has no network.
ASK = (
    "import sys, urllib.request as u; request = u.Request(sys.argv[1], data=sys.stdin.buffer.read() or None); "
    "sys.stdout.write(u.urlopen(request, timeout=60).read().decode())"
)
PROBE = "import socket; raise SystemExit(socket.socket().connect_ex(('127.0.0.1', 8080)))"


def container(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs docker or podman to its end, whatever that is."""
    return subprocess.run(
        [CONTAINER, *arguments], input=stdin, capture_output=True, text=True, timeout=240, check=False
    )


def output(*arguments: str, stdin: str = "") -> str:
    """What docker or podman prints, if it succeeds."""
    done = container(*arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return done.stdout


def inspect(image: str) -> dict[str, Any]:
    """What is known of an image."""
    found: dict[str, Any] = json.loads(output("image", "inspect", image))[0]
    return found


class Container:
    """A container with port 8080 open inside, without network, rights or a file system to write on but /tmp."""

    def __init__(self, *arguments: str) -> None:
        self.name = f"bitnet-test-{uuid.uuid4().hex[:12]}"
        self._arguments = arguments

    def __enter__(self) -> Self:
        output("run", "--detach", "--name", self.name, *LOCKED_DOWN, *self._arguments)
        eventually(lambda: container("exec", self.name, "python", "-c", PROBE).returncode == 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            print(self.log())
        output("rm", "--force", self.name)

    def ask(self, url: str, body: Any = None) -> Any:
        """The JSON that is answered to a GET, or to a POST of `body`."""
        return json.loads(self.run("python", "-c", ASK, url, stdin="" if body is None else json.dumps(body)))

    def run(self, *command: str, stdin: str = "") -> str:
        """What a command in the container prints."""
        return output("exec", "--interactive", self.name, *command, stdin=stdin)

    def log(self) -> str:
        """Everything that it has printed so far."""
        done = container("logs", self.name)
        return done.stdout + done.stderr

    def stop(self) -> int:
        """Sends SIGTERM, and SIGKILL if that is no use, and returns the exit code."""
        output("stop", "--time", "20", self.name)
        return int(output("wait", self.name))
