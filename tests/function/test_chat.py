"""The chat in the terminal, with the local server."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Self

import pyte
import pytest
import rich.console

from function import chat as chat_module
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
    pieces.close()
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


def test_a_conversation_is_kept_in_a_file(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "tale.json"
    chat = Chat(url(server), "You tell tales.")
    chat.keep_in(file)
    list(chat.ask("Tell me of a king.", temperature=0, max_tokens=3))
    other = Chat(url(server))
    other.load(file)
    assert (other.system, other.messages) == (chat.system, chat.messages)
    assert len(chat.messages) == 2
    with pytest.raises(ChatError, match="No such file"):
        chat.keep_in(tmp_path / "nowhere" / "tale.json")
    assert chat.file == file
    for junk in ("{", "[]", '{"system": null, "messages": [{"role": "root", "content": ""}]}'):
        file.write_text(junk)
        with pytest.raises(ChatError, match=r"tale\.json: "):
            other.load(file)
    assert other.messages == chat.messages


def test_a_key_is_sent_instead_of_a_signature() -> None:
    seen = []

    def listen(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            seen.append(connection.recv(65536))
            connection.sendall(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=listen, args=[listener])
        thread.start()
        chat = Chat(f"http://127.0.0.1:{listener.getsockname()[1]}", key="secret")
        with pytest.raises(ChatError, match="HTTP 401 Unauthorized"):
            list(chat.ask("Hello"))
        thread.join()
    assert b"authorization: Bearer secret\r\n" in seen[0]


def run(server: Server, lines: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "function.chat", url(server), "--temperature", "0", *options]
    return subprocess.run(command, cwd=ROOT, input="\n".join(lines), capture_output=True, text=True, check=False)


def test_a_pipe(tmp_path: Path) -> None:
    with Server(tmp_path / "log", MAX_N_PREDICT=20, MAX_PROMPT_BYTES=500) as server:
        eventually(lambda: server.health()[0] == 200)
        file = tmp_path / "tale.json"
        result = run(server, ["Tell me of a king.", ""], "--system", "Be a king.", "--conversation", str(file))
        messages = [{"role": "system", "content": "Be a king."}, {"role": "user", "content": "Tell me of a king."}]
        answer = expected(server, messages, -1)
        assert (result.stdout, result.stderr, result.returncode) == (answer + "\n", "", 0)
        result = run(server, ["And then?", "x" * 501], "--conversation", str(file))
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]
        answer = expected(server, messages, -1)
        assert (result.stdout, result.returncode) == (answer + "\n", 1)
        assert "must have at most 500 bytes of UTF-8, got 501" in result.stderr
        messages.append({"role": "assistant", "content": answer})
        kept = json.loads(file.read_text())
        assert kept == {"system": "Be a king.", "messages": messages[1:]}


def test_a_pipe_whose_reader_has_enough(server: Server) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "function.chat", url(server)]
    done = subprocess.run(command, cwd=ROOT, input=b"Hello", stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.stderr, done.returncode) == (b"", 0)


class Reporting(pyte.HistoryScreen):
    """A screen that says where its cursor is, when it is asked."""

    def __init__(self, terminal: int, width: int, height: int) -> None:
        super().__init__(width, height, history=10_000, ratio=1)
        self._terminal = terminal

    def write_process_input(self, data: str) -> None:
        os.write(self._terminal, data.encode())


class Screen:
    """`python -m function.chat` on a terminal that is understood as a real one would be."""

    def __init__(self, server: Server, folder: Path, *options: str, width: int = 100, height: int = 30) -> None:
        self._master, slave = pty.openpty()
        self._screen = Reporting(self._master, width, height)
        self._stream = pyte.ByteStream(self._screen)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        command = ["setsid", "--ctty", "--wait", sys.executable, "-m", "function.chat", url(server), *options]
        environment = {"PATH": os.environ["PATH"], "TERM": "xterm-256color", "XDG_STATE_HOME": str(folder)}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        os.set_blocking(self._master, False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
        print(self.text())

    def type(self, keys: str) -> None:
        """Types once the chat listens: what comes earlier may get lost with the terminal's change of mode."""
        eventually(lambda: self.text().rstrip().endswith(">"))
        self.press(keys)

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def text(self) -> str:
        """All that was ever shown and stayed, without the ends of lines."""
        with contextlib.suppress(BlockingIOError, OSError):  # nothing new; it has ended
            while data := os.read(self._master, 65536):
                self._stream.feed(data)
        scrolled = ["".join(line[x].data for x in range(self._screen.columns)) for line in self._screen.history.top]
        return re.sub(r"\s+", " ", " ".join([*scrolled, *self._screen.display]))

    def shows(self, word: str) -> bool:
        return word in self.text()

    def wait_for(self, *words: str) -> None:
        for word in words:
            eventually(partial(self.shows, word))

    def end(self) -> int:
        """Ctrl-D; returns the exit code."""
        self.type("\x04")
        eventually(lambda: self.text() is not None and self.process.poll() is not None)
        return self.process.returncode


def squeeze(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def test_the_terminal(tmp_path: Path) -> None:
    with Server(tmp_path / "log", MAX_N_PREDICT=40) as server:
        eventually(lambda: server.health()[0] == 200)
        first = expected(server, [{"role": "user", "content": "Tell me of a king."}], -1)
        file = tmp_path / "tale.json"
        with Screen(server, tmp_path, "--temperature", "0") as screen:
            screen.wait_for("/help lists the commands")
            screen.type("Tell me of a king.\r")
            screen.wait_for(squeeze(first), "40 tokens", "tokens/s", "first token")
            screen.type("/nothing\r")
            screen.wait_for("there is no /nothing")
            screen.type("/save\r")
            screen.wait_for("say where: /save FILE")
            screen.type(f"/save {file}\r")
            screen.wait_for("the conversation is kept in")
            assert [message["content"] for message in json.loads(file.read_text())["messages"]][1] == first
            screen.type("/reset\r")
            screen.wait_for("a new conversation")
            screen.type("/system Be a king.\r")
            screen.wait_for("the model shall be: Be a king.")
            screen.type("one\x1b\rtwo\r")  # Alt-Enter between
            messages = [{"role": "system", "content": "Be a king."}, {"role": "user", "content": "one\ntwo"}]
            answer = expected(server, messages, -1)
            eventually(lambda: len(json.loads(file.read_text())["messages"]) == 2)
            screen.wait_for(squeeze(answer))
            messages.append({"role": "assistant", "content": answer})
            assert json.loads(file.read_text()) == {"system": "Be a king.", "messages": messages[1:]}
            assert screen.end() == 0
        with Screen(server, tmp_path, "--conversation", str(file)) as screen:
            screen.wait_for("/help lists the commands")
            screen.type("\x1b[A" * 3 + "\r")  # up over the two lines: what was typed before them
            screen.wait_for("the model shall be: Be a king.")
            assert screen.end() == 0


def test_ctrl_c_ends_the_answer_and_not_the_chat(server: Server, tmp_path: Path) -> None:
    with Screen(server, tmp_path, "--temperature", "0") as screen:
        screen.wait_for("/help lists the commands")
        screen.type("Tell me of a king.\r")
        screen.wait_for("I am going to tell you")
        assert server.in_flight() == 1
        screen.press("\x03")
        screen.wait_for("stopped")
        eventually(lambda: server.in_flight() == 0)
        screen.type("half a line\x03")  # only the line
        screen.type("/reset\r")
        screen.wait_for("a new conversation")
        assert screen.end() == 0
    assert "Traceback" not in screen.text()


def test_an_answer_longer_than_the_screen_stays_readable(tmp_path: Path) -> None:
    with Server(tmp_path / "log") as server:
        eventually(lambda: server.health()[0] == 200)
        answer = expected(server, [{"role": "user", "content": "Tell me of a king."}], -1)
        with Screen(server, tmp_path, "--temperature", "0", width=40, height=8) as screen:
            screen.wait_for("/help")
            screen.type("Tell me of a king.\r")
            screen.wait_for("tokens/s")
            assert screen.text().count(squeeze(answer)) == 1
            assert screen.end() == 0


def test_text_of_the_model_cannot_command_the_terminal() -> None:
    output = io.StringIO()
    console = rich.console.Console(file=output, width=60, force_terminal=True)
    evil = "\x1b]0;title\x07<b>bold</b>\none\ntwo\n\n```\n<i>x</i>\n```\n\n**end**"
    finished, rest = chat_module._paragraphs(chat_module._harmless(evil))
    assert rest == "**end**"
    console.print(chat_module._markdown(finished))
    shown = output.getvalue()
    assert "\x1b]" not in shown
    assert "<b>bold</b>" in shown
    assert "<i>x</i>" in re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert re.search(r"one *\ntwo", shown)


def test_what_was_typed_is_kept_where_there_is_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    chat_module._history().append_string("A king?")
    assert list(chat_module._history().load_history_strings()) == ["A king?"]
    assert (tmp_path / "bitnet-lambda" / "history").stat().st_mode & 0o077 == 0
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "bitnet-lambda" / "history"))  # which is no folder
    assert list(chat_module._history().load_history_strings()) == []
