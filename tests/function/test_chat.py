"""The chat in the terminal, with the local server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from function.chat import Chat, ChatError
from function.settings import ROOT
from tests.processes import eventually
from tests.server import Server

pytestmark = pytest.mark.usefixtures("engine_path")


@pytest.fixture
def server(tmp_path: Path, endless_model: Path) -> Iterator[Server]:
    with Server(tmp_path / "log", MODEL_PATH=endless_model, CTX_SIZE=32_768, MAX_PROMPT_BYTES=500) as server:
        eventually(lambda: server.health()[0] == 200)
        yield server


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}/"


def expected(server: Server, messages: list[dict[str, str]], length: int) -> str:
    request = json.dumps({"messages": messages, "temperature": 0, "max_tokens": length}).encode()
    _, body = server.request("POST", "/v1/chat/completions", request)
    content: str = json.loads(body)["choices"][0]["message"]["content"]
    return content


def test_it_keeps_the_conversation(server: Server) -> None:
    chat = Chat(url(server), "You tell tales.")
    messages = [{"role": "system", "content": "You tell tales."}]
    for question in ("Tell me of a king.", "And of a queen?"):
        messages.append({"role": "user", "content": question})
        answer = "".join(chat.ask(question, temperature=0, max_tokens=6))
        assert answer == expected(server, messages, 6)
        messages.append({"role": "assistant", "content": answer})
    assert chat.messages == messages[1:]


def test_an_answer_that_is_given_up_is_kept_so_far(server: Server) -> None:
    chat = Chat(url(server))
    pieces = chat.ask("Tell me of a king.", ignore_eos=True)
    begun = [next(pieces) for _ in range(3)]
    pieces.close()  # type: ignore[attr-defined]
    assert chat.messages[1:] == [{"role": "assistant", "content": "".join(begun)}]
    eventually(lambda: server.in_flight() == 0)


def test_an_error_leaves_the_conversation_as_it_was(server: Server) -> None:
    chat = Chat(url(server))
    with pytest.raises(ChatError, match="'messages\\[0\\]': 'content' must have at most 500 bytes"):
        list(chat.ask("x" * 501))
    assert chat.messages == []
    pieces = chat.ask("Tell me of a king.", ignore_eos=True)
    next(pieces)
    os.kill(server.engine, signal.SIGKILL)
    with pytest.raises(ChatError, match="signal 9"):
        list(pieces)
    assert chat.messages == []
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    with pytest.raises(ChatError, match="Connection refused"):
        list(Chat(address).ask("Hello"))


def test_a_function_url_is_asked_with_a_signature(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(ChatError, match="no AWS credentials"):
        list(Chat("https://abc123.lambda-url.eu-west-1.on.aws").ask("Hello"))


def test_the_terminal(tmp_path: Path) -> None:
    with Server(tmp_path / "log", MAX_N_PREDICT=20, MAX_PROMPT_BYTES=500) as server:
        eventually(lambda: server.health()[0] == 200)
        command = [sys.executable, "-m", "function.chat", url(server), "--temperature", "0", "--system", "Be a king."]
        lines = ["Tell me of a king.", "", "/new", "x" * 501]
        result = subprocess.run(command, cwd=ROOT, input="\n".join(lines), capture_output=True, text=True, check=True)
        messages = [{"role": "system", "content": "Be a king."}, {"role": "user", "content": lines[0]}]
        assert result.stdout.startswith("> " + expected(server, messages, -1))
    assert result.stderr == "\nbitnet: 'messages[1]': 'content' must have at most 500 bytes of UTF-8, got 501"


def test_ctrl_c_ends_the_answer_and_ctrl_d_the_chat(server: Server) -> None:
    command = [sys.executable, "-m", "function.chat", url(server), "--temperature", "100"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write(b"Tell me of a king.\n")
        chat.stdin.flush()
        assert chat.stdout.read(3)  # beyond the prompt: the answer has begun
        chat.send_signal(signal.SIGINT)
        eventually(lambda: server.in_flight() == 0)
        _, errors = chat.communicate()  # closes its input
        assert (chat.returncode, errors) == (0, b"")
