"""AWS's emulator of Lambda (the runtime interface emulator), with the function as its runtime."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from function.settings import ROOT
from tests.processes import engines, eventually

EMULATOR = ROOT / "build" / "out" / "aws-lambda-rie"
INVOKE = "/2015-03-31/functions/function/invocations"

# The emulator keeps the runtime's exit status to itself: this shell writes it down, and leaves signals to the runtime.
SHELL = 'trap "" TERM; "$@" & echo $! > "$0.pid"; wait $!; status=$?; echo $status > "$0.status"; exit $status'


class Emulator:
    """One execution environment. Environment variables are those of the function."""

    def __init__(self, environment: dict[str, str], *, timeout_s: int = 60) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self.directory = Path(self._directory.name)
        self._log = (self.directory / "log").open("w+")
        self._environment = environment | {"AWS_LAMBDA_FUNCTION_TIMEOUT": str(timeout_s)}

    def __enter__(self) -> Self:
        assert EMULATOR.exists(), "set up the tests first: make test"
        self._port, api_port = _free_ports()
        command: list[str | Path] = [EMULATOR, "--runtime-interface-emulator-address", f"127.0.0.1:{self._port}"]
        command += ["--runtime-api-address", f"127.0.0.1:{api_port}"]
        command += ["/bin/sh", "-c", SHELL, self.directory / "runtime", sys.executable, "-m", "function.runtime"]
        environment = {"PATH": os.environ["PATH"], **self._environment}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        eventually(self._listens)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait()
        if error is not None:
            print(self.log())
        self._log.close()
        self._directory.cleanup()

    def invoke(self, event: Any) -> Any:
        """What `aws lambda invoke` gives for this payload."""
        return json.loads(self.invoke_raw(event))

    def invoke_raw(self, event: Any) -> bytes:
        """The same, when it is no JSON."""
        with closing(http.client.HTTPConnection("127.0.0.1", self._port)) as connection:
            connection.request("POST", INVOKE, json.dumps(event))
            return connection.getresponse().read()

    def log(self) -> str:
        """Everything that the emulator, the function and the engine have logged so far."""
        return (self.directory / "log").read_text()

    @property
    def runtime(self) -> int:
        """The process id of the function."""
        return int((self.directory / "runtime.pid").read_text())

    @property
    def engine(self) -> int:
        (pid,) = engines(self.runtime)
        return pid

    def end_runtime(self) -> int:
        """Sends the function SIGTERM, as Lambda does, and returns its exit status."""
        os.kill(self.runtime, signal.SIGTERM)
        status = self.directory / "runtime.status"
        eventually(lambda: status.exists() and status.read_text())
        return int(status.read_text())

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0


def _free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]
