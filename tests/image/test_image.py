"""The image as it is shipped: contents, and the three ways to start it, without network, rights or a file to write."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import subprocess
import uuid
from pathlib import Path
from urllib.parse import unquote

import pytest

from function.settings import ROOT
from tests.events import url_event
from tests.image.container import EMULATOR, INVOKE, LOCKED_DOWN, Container, container, inspect, output
from tests.processes import eventually

IMAGE, BASE = os.environ["IMAGE"], os.environ["BASE"]
USER = "65532:65532"
ADDED_BYTES, ALL_BYTES = 90_000_000, 220_000_000
DEMO_MODEL = ROOT / "build" / "model" / "demo" / "model.gguf"
PROMPT = "Once upon a time"
TALE = {"prompt": PROMPT, "n_predict": 12, "temperature": 0}
TEXT = " there lived a king who had a son who had three sons"
PT_DYNAMIC, PT_INTERP, SHT_SYMTAB = 2, 3, 2


def in_image(*command: str, user: str = USER) -> str:
    """What a command in a fresh container prints."""
    return output("run", "--rm", *LOCKED_DOWN, "--user", user, "--entrypoint", command[0], IMAGE, *command[1:])


def as_function(*arguments: str) -> Container:
    """The image as Lambda starts it, in AWS's emulator."""
    emulator = ("--volume", f"{EMULATOR}:/aws-lambda-rie:ro", "--entrypoint", "/aws-lambda-rie")
    return Container(*emulator, *arguments, IMAGE, "/var/task/start.sh", "lambda")


def test_size() -> None:
    size, base = inspect(IMAGE)["Size"], inspect(BASE)["Size"]
    print(f"{size:,} bytes, {size - base:,} of them added to the base")
    assert size - base <= ADDED_BYTES
    assert size < ALL_BYTES


def test_what_the_image_says_of_itself() -> None:
    config = inspect(IMAGE)["Config"]
    assert config["User"] == USER
    assert (config["Entrypoint"], config["Cmd"]) == (["/var/task/start.sh"], ["lambda"])
    assert "8080/tcp" in config["ExposedPorts"]
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert [labels["version"], labels["licenses"]] == [version[1], "Apache-2.0"]
    assert re.fullmatch(r"[0-9a-f]{40}", labels["revision"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.+", labels["created"])
    assert labels["base.name"] == BASE


def test_the_engine_is_static_and_stripped(tmp_path: Path) -> None:
    name = f"bitnet-test-copy-{os.getpid()}"
    output("create", "--name", name, IMAGE)
    try:
        output("cp", f"{name}:/usr/local/bin/bitnet", str(tmp_path / "bitnet"))
    finally:
        output("rm", name)
    elf = (tmp_path / "bitnet").read_bytes()
    # https://refspecs.linuxfoundation.org/elf/elf.pdf, with 64-bit fields
    assert elf[:5] == b"\x7fELF\x02"
    segments, sections = struct.unpack_from("<QQ", elf, 32)
    segment_size, segment_count, section_size, section_count = struct.unpack_from("<HHHH", elf, 54)
    segment_types = [struct.unpack_from("<I", elf, segments + i * segment_size)[0] for i in range(segment_count)]
    section_types = [struct.unpack_from("<I", elf, sections + i * section_size + 4)[0] for i in range(section_count)]
    assert segment_types
    assert section_types
    assert not {PT_DYNAMIC, PT_INTERP} & set(segment_types)
    assert SHT_SYMTAB not in section_types


def test_nothing_is_left_of_the_build() -> None:
    tools = "for tool in cc gcc g++ c++ ld as make cmake git curl; do command -v $tool; done; true"
    assert in_image("sh", "-c", tools) == ""
    found = "find / -xdev \\( -path '*/.cache/*' -o -name '*.whl' -o -path '/src*' -o -path '/tmp/*' \\) -print"
    assert in_image("sh", "-c", found, user="0") == ""


def test_every_file_can_be_read_by_all_and_written_by_none() -> None:
    find = "find /var/task /opt/python /usr/local/bin/bitnet ! -type l \\( ! -perm -o=r -o -perm /o=w -o ! -user 0 \\)"
    assert in_image("sh", "-c", find, user="0") == ""
    sources = in_image("sh", "-c", "find /var/task /opt/python -name '*.py' | wc -l", user="0")
    compiled = in_image("sh", "-c", "find /var/task /opt/python -name '*.pyc' | wc -l", user="0")
    assert int(compiled) == int(sources) > 0


def test_what_is_installed_is_what_is_locked() -> None:
    lock = dict(re.findall(r"^([a-z0-9-]+)(?:\[.+\])?==(\S+)", (ROOT / "requirements/function.txt").read_text(), re.M))
    script = (
        "import importlib.metadata as m, json; found = m.distributions(path=['/opt/python']); "
        "print(json.dumps({d.name.lower().replace('_', '-'): d.version for d in found}))"
    )
    installed: dict[str, str] = json.loads(in_image("python", "-c", script))
    assert set(installed.items()) <= set(lock.items())
    direct = set(re.findall(r"^([a-z0-9-]+)", (ROOT / "requirements/function.in").read_text(), re.MULTILINE))
    assert direct <= installed.keys()


def test_the_bill_of_materials(tmp_path: Path) -> None:
    path = tmp_path / "sbom.json"
    script = ROOT / "build" / "image" / "sbom.py"
    subprocess.run([os.environ["SBOM_PYTHON"], script, IMAGE, path], check=True, timeout=240)
    document = json.loads(path.read_text())
    assert (document["bomFormat"], document["metadata"]["component"]["name"]) == ("CycloneDX", "bitnet-lambda")
    urls = {unquote(component["purl"].split("?")[0]) for component in document["components"]}
    packages = dict(
        line.split()
        for line in in_image("dpkg-query", "--show", "--showformat", "${Package} ${Version}\\n").splitlines()
    )
    assert {f"pkg:deb/debian/{name}" for name in packages} <= {url.rsplit("@", 1)[0] for url in urls}
    installed = in_image("sh", "-c", "ls -d /opt/python/*.dist-info | wc -l")
    assert sum(url.startswith("pkg:pypi/") for url in urls) == int(installed)
    linked = {component["name"] for component in document["components"] if component["bom-ref"].startswith("engine:")}
    assert {"libc6-dev", "libpcre2-dev", "zlib1g-dev", "nlohmann-json3-dev", "libcli11-dev"} <= linked
    refused = subprocess.run(
        [os.environ["SBOM_PYTHON"], script, "no-such-image", path], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "sbom: " in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_cold_and_a_warm_invocation() -> None:
    with as_function("--env", "AWS_LAMBDA_FUNCTION_TIMEOUT=60") as function:
        cold = function.ask(INVOKE, TALE)
        warm = function.ask(INVOKE, url_event(TALE))
        assert (cold["content"], cold["tokens_cached"]) == (TEXT, 0)
        body = json.loads(warm["body"])
        assert (warm["statusCode"], body["content"], body["tokens_cached"]) == (200, TEXT, 4)
        assert function.run("id", "-u").strip() == "65532"
        assert set(re.findall(r"^Uid:\s+(.+)$", function.run("cat", "/proc/1/status"), re.MULTILINE)) == {
            "65532\t65532\t65532\t65532"
        }
        assert "Read-only file system" in function.run("sh", "-c", "touch /var/task/file 2>&1 || true")
        assert function.run("ls", "/sys/class/net").split() == ["lo"]
        log = function.log()
        assert PROMPT not in log
        assert TEXT not in log


def test_the_events_for_sam_local() -> None:
    with as_function() as function:
        answers = {
            path.stem: function.ask(INVOKE, json.loads(path.read_text())) for path in (ROOT / "events").glob("*.json")
        }
    assert answers.pop("completion")["content"].startswith(TEXT)
    assert {name: answer["statusCode"] for name, answer in answers.items()} == {
        "url-completion": 200,
        "url-stream": 200,
        "url-health": 200,
        "url-refused": 400,
    }


def test_lambda_s_own_user() -> None:
    """Lambda runs the image as a user of its choice, with no rights and no home."""
    with as_function("--user", "993:990") as function:
        assert function.ask(INVOKE, TALE)["content"] == TEXT


def test_a_model_that_cannot_be_had_is_an_error_and_not_the_end() -> None:
    with as_function("--env", "MODEL_PATH=/models/none.gguf") as function:
        error = function.ask(INVOKE, TALE)["error"]
        assert error["status"] == 500
        assert "/models/none.gguf" in error["message"]
        assert function.ask(INVOKE, TALE)["error"] == error


def test_serving_without_network() -> None:
    with Container(IMAGE, "serve") as server:
        assert server.ask("http://127.0.0.1:8080/completion", TALE)["content"] == TEXT
        assert "no *.gguf in /models: the demo model" in server.log()
        assert server.stop() == 0


def healthy(started: Container, **environment: str) -> bool:
    """What the image's HEALTHCHECK says in a container."""
    image = inspect(IMAGE)
    health = image.get("Healthcheck") or image["Config"]["Healthcheck"]  # podman's place, docker's place
    kind, *command = health["Test"]
    assert kind == "CMD"
    variables = [part for name, value in environment.items() for part in ("--env", f"{name}={value}")]
    return container("exec", *variables, started.name, *command).returncode == 0


# The second way is as with `docker run --init`, which starts another process first.
@pytest.mark.parametrize(
    "arguments", [(IMAGE, "serve"), ("--entrypoint", "sh", IMAGE, "-c", "/var/task/start.sh serve & wait")]
)
def test_health_of_the_server_is_that_of_the_api(arguments: tuple[str, ...]) -> None:
    with Container(*arguments) as server:
        eventually(lambda: healthy(server))
        assert not healthy(server, PORT="8081")  # where nothing answers


def test_health_of_the_function_and_of_the_command_line_is_that_they_run() -> None:
    with as_function() as function:
        assert healthy(function)
    name = f"bitnet-test-{uuid.uuid4().hex[:12]}"
    worker = ("bitnet", "worker", "--model", "/var/task/model.gguf")
    output("run", "--detach", "--interactive", "--name", name, *LOCKED_DOWN, IMAGE, *worker)
    try:
        started = Container(IMAGE)
        started.name = name
        assert healthy(started)
    finally:
        output("rm", "--force", name)


def test_serving_the_mounted_model(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "tales.gguf").write_bytes(DEMO_MODEL.read_bytes())
    mount = ("--volume", f"{tmp_path}:/models:ro")
    with Container(*mount, IMAGE, "serve") as server:
        assert server.ask("http://127.0.0.1:8080/completion", TALE)["content"] == TEXT
        assert "--model /models/tales.gguf" in server.run("sh", "-c", "tr '\\0' ' ' < /proc/$(pidof bitnet)/cmdline")
    (tmp_path / "second.gguf").write_bytes(b"")
    refused = container("run", "--rm", *LOCKED_DOWN, *mount, IMAGE, "serve")
    assert refused.returncode == 2
    assert "MODEL_PATH must name one of the models in /models: /models/second.gguf /models/tales.gguf" in refused.stderr


def test_the_command_line() -> None:
    command = ("bitnet", "generate", "--model", "/var/task/model.gguf", "--temperature", "0", "--n-predict", "12")
    told = output("run", "--rm", *LOCKED_DOWN, IMAGE, *command, "--prompt", PROMPT)
    assert TEXT in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "not on Lambda (AWS_LAMBDA_RUNTIME_API is not set); start the image with 'serve'"),
        (["server"], "'server' is no way to start: lambda, serve and bitnet are"),
        (["serve", "--port"], "'serve' takes no arguments but environment variables, got '--port'"),
    ],
)
def test_a_wrong_start_is_told(arguments: list[str], message: str) -> None:
    refused = container("run", "--rm", *LOCKED_DOWN, IMAGE, *arguments)
    assert refused.returncode == 2
    assert message in refused.stderr


def make(target: str, **variables: str) -> str:
    done = subprocess.run(
        ["make", "--silent", target, *(f"{name}={value}" for name, value in variables.items())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_make_serve_image_logs_stats_stop() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mine = {"IMAGE": IMAGE, "NAME": f"bitnet-test-{os.getpid()}", "PORT": str(port)}
    make("serve-image", **mine)
    try:
        retry = (
            "curl",
            "--silent",
            "--show-error",
            "--fail",
            "--retry",
            "20",
            "--retry-connrefused",
            "--retry-all-errors",
        )
        answer = subprocess.run(
            [*retry, f"http://127.0.0.1:{port}/completion", "--data", json.dumps(TALE)],
            capture_output=True,
            text=True,
            timeout=240,
            check=True,
        )
        assert json.loads(answer.stdout)["content"] == TEXT
        assert "/completion" in make("logs", **mine)
        assert mine["NAME"] in make("stats", **mine)
    finally:
        stopped = make("stop", **mine)
    assert f"{mine['NAME']} has stopped with exit code 0" in stopped
