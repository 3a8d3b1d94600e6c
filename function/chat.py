"""A chat in the terminal: `make chat`, or `python -m function.chat [URL]`.

Answers are streamed and shown as Markdown, requests to a Function URL are signed. Ctrl-C ends an answer, Ctrl-D the
chat; `/help` lists the commands. Where the input or the output is no terminal, each line is asked and the answers are
written as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import sys
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from function.client import KEY, Client

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

PATH = "/v1/chat/completions"
COMMANDS = {
    "/help": "this list",
    "/reset": "begin a new conversation",
    "/system": "TEXT: what the model shall be; without TEXT nothing in particular",
    "/save": "FILE: keep the conversation there, from now on after every answer",
}
KEYS = "Enter sends, Alt-Enter breaks the line, Ctrl-C ends an answer, Ctrl-D the chat"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a terminal would obey; not tabs and ends of lines
REFRESH_PER_SECOND = 12


class ChatError(Exception):
    """No answer: one line that says why."""


class Chat:
    """A conversation with the model at `url`, kept in `file` if there is one: `{"system": …, "messages": […]}`."""

    def __init__(self, url: str, system: str | None = None, key: str | None = None) -> None:
        self.system = system
        self.file: Path | None = None
        self.messages: list[dict[str, str]] = []
        self.timings: dict[str, Any] = {}  # the engine's, of the last answer that came to its end
        self._client = Client(url, key)
        self.url = self._client.url

    def ask(self, content: str, **fields: Any) -> Generator[str]:
        """The pieces of the answer to `content`. What has come of it is kept, also if the iterator is closed.

        Raises:
            ChatError: there is no answer, or not its end; the conversation is as it was before.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": content})
        system = [{"role": "system", "content": self.system}] if self.system else []
        body = {"messages": system + self.messages, "stream": True} | fields
        answer = ""
        self.timings = {}
        try:
            for piece in self._stream(json.dumps(body).encode()):
                answer += piece
                yield piece
        except ChatError:
            self.messages = before
            raise
        finally:
            if answer and len(self.messages) > len(before):
                self.messages.append({"role": "assistant", "content": answer})
                self.save()
            else:
                self.messages = before

    def keep_in(self, file: Path) -> None:
        """Saves the conversation to `file`, now and after every answer.

        Raises:
            ChatError: it cannot be written.
        """
        self.file, former = file, self.file
        try:
            self.save()
        except ChatError:
            self.file = former
            raise

    def save(self) -> None:
        """Replaces `file`, if there is one.

        Raises:
            ChatError: it cannot be written.
        """
        if self.file is None:
            return
        text = json.dumps({"system": self.system, "messages": self.messages}, ensure_ascii=False, indent=1)
        partial = self.file.with_name(self.file.name + ".partial")
        try:
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(self.file)
        except OSError as error:
            raise ChatError(f"{self.file}: {error.strerror}") from error

    def load(self, file: Path) -> None:
        """Goes on with the conversation that `save` has written.

        Raises:
            ChatError: it cannot be read, or is something else.
        """
        try:
            match json.loads(file.read_text(encoding="utf-8")):
                case {"system": str() | None as system, "messages": [*messages]} if all(map(_is_message, messages)):
                    self.system, self.messages = system, messages
                case _:
                    raise ValueError("this is no conversation")
        except (OSError, ValueError) as error:
            raise ChatError(f"{file}: {getattr(error, 'strerror', None) or error}") from error

    def _stream(self, body: bytes) -> Generator[str]:
        ended = False
        try:
            with self._client.open(PATH, body) as response:
                if response.status != http.HTTPStatus.OK:
                    raise ChatError(_why(response))
                for line in response:
                    if not line.startswith(b"data: {"):
                        continue
                    event = json.loads(line.removeprefix(b"data: "))
                    if "error" in event:
                        raise ChatError(event["error"]["message"])
                    for choice in event["choices"]:
                        if piece := choice["delta"].get("content"):
                            yield piece
                        if choice["finish_reason"]:
                            ended = True
                            self.timings = event.get("timings", {})
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ChatError(f"{self.url}: {str(error) or type(error).__name__}") from error
        if not ended:
            raise ChatError(f"{self.url}: the connection broke before the end of the answer")


class Terminal:
    """The conversation on a terminal."""

    def __init__(self, chat: Chat, fields: dict[str, Any]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from rich.console import Console

        self._chat = chat
        self._fields = fields
        self._console: Console = Console(highlight=False, soft_wrap=False)
        self._session: PromptSession[str] = PromptSession(
            history=_history(),
            completer=WordCompleter(list(COMMANDS), sentence=True),
            complete_while_typing=False,
            key_bindings=_key_bindings(),
            prompt_continuation="  ",
        )

    def run(self) -> None:
        """Talks until Ctrl-D."""
        self._note(f"{self._chat.url} · /help lists the commands, Ctrl-D ends")
        while True:
            try:
                content = self._session.prompt("> ").strip()
            except KeyboardInterrupt:  # of a line that is not wanted
                continue
            except EOFError:
                return
            try:
                if content.startswith("/"):
                    self._obey(*content.split(maxsplit=1))
                elif content:
                    self._answer(content)
            except ChatError as error:
                self._note(f"bitnet: {error}", "red")
            except KeyboardInterrupt:
                self._note("stopped")

    def _obey(self, command: str, argument: str = "") -> None:
        match command:
            case "/help":
                for name, meaning in COMMANDS.items():
                    self._note(f"{name:8} {meaning}")
                self._note(KEYS)
            case "/reset":
                self._chat.messages = []
                self._note("a new conversation")
            case "/system":
                self._chat.system = argument or None
                self._note(
                    f"the model shall be: {argument}" if argument else "the model shall be nothing in particular"
                )
            case "/save" if argument:
                self._chat.keep_in(Path(argument).expanduser())
                self._note(f"the conversation is kept in {argument}")
            case "/save":
                raise ChatError("say where: /save FILE")
            case _:
                raise ChatError(f"there is no {command}; /help lists the commands")

    def _answer(self, content: str) -> None:
        """Shows the answer as it comes: finished paragraphs stay, the one that is written is drawn again and again."""
        from rich.live import Live
        from rich.spinner import Spinner

        began, first = time.monotonic(), None
        rest = ""
        try:
            with (
                closing(self._chat.ask(content, **self._fields)) as pieces,
                Live(
                    Spinner("dots", style="dim"),
                    console=self._console,
                    refresh_per_second=REFRESH_PER_SECOND,
                    transient=True,
                ) as live,
            ):
                for piece in pieces:
                    first = first or time.monotonic()
                    finished, rest = _paragraphs(rest + _harmless(piece))
                    if finished:
                        self._console.print(_markdown(finished))
                        self._console.print()
                    live.update(_Tail(_markdown(rest)))
        finally:
            if rest.strip():
                self._console.print(_markdown(rest))
        self._note(_figures(self._chat.timings, None if first is None else first - began))
        self._console.print()

    def _note(self, text: str, style: str = "dim") -> None:
        self._console.print(_harmless(text), style=style, markup=False)


class _Tail:
    """As many of the last lines as the screen has room for."""

    def __init__(self, whole: RenderableType) -> None:
        self._whole = whole

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.segment import Segment

        for line in console.render_lines(self._whole, options, pad=False)[-(console.height - 1) :]:
            yield from line
            yield Segment.line()


def main(arguments: list[str] | None = None) -> int:
    """Talks until the input ends. Returns 0, or 1 if there was no answer that could be had."""
    parser = argparse.ArgumentParser("python -m function.chat", description="Talk to the model.", epilog=f"{KEYS}.")
    parser.add_argument("url", nargs="?", default="http://localhost:8080", help="local server or Function URL")
    parser.add_argument("--system", metavar="TEXT", help="what the model shall be")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--conversation", type=Path, metavar="FILE", help="go on with this one, and keep it there")
    options = parser.parse_args(arguments)
    fields = {} if options.temperature is None else {"temperature": options.temperature}
    chat = Chat(options.url, options.system, os.environ.get(KEY))
    try:
        if options.conversation:
            if options.conversation.exists():
                chat.load(options.conversation)
                chat.system = options.system or chat.system
            chat.keep_in(options.conversation)
    except ChatError as error:
        return _fail(str(error))
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        try:
            return _converse(chat, fields)
        except BrokenPipeError:  # whoever reads has enough, as `head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left when it ends
            return 0
    try:
        terminal = Terminal(chat, fields)
    except ImportError as error:
        return _fail(f"the chat needs {error.name}: start it with `make chat`")
    terminal.run()
    return 0


def _converse(chat: Chat, fields: dict[str, Any]) -> int:
    """Asks each line of the input, and writes the answers as they are."""
    status = 0
    for line in sys.stdin:
        if not line.strip():
            continue
        try:
            with closing(chat.ask(line.strip(), **fields)) as pieces:
                for piece in pieces:
                    print(_harmless(piece) if sys.stdout.isatty() else piece, end="", flush=True)
            print(flush=True)
        except ChatError as error:
            status = _fail(str(error))
    return status


def _fail(message: str) -> int:
    print(f"bitnet: {_harmless(message)}", file=sys.stderr)
    return 1


def _harmless(text: str) -> str:
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def _paragraphs(text: str) -> tuple[str, str]:
    """The finished paragraphs and the rest: the last empty line that is not within a code fence is between them."""
    end = position = 0
    is_code = False
    for line in text.splitlines(keepends=True):
        position += len(line)
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif not line.strip() and not is_code and line.endswith("\n"):
            end = position
    return text[:end].strip("\n"), text[end:]


def _markdown(text: str) -> RenderableType:
    """Markdown in which line breaks count and HTML is text."""
    from markdown_it import MarkdownIt
    from rich.markdown import Markdown

    markdown = Markdown("")
    markdown.parsed = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).parse(text)
    for token in markdown.parsed:
        for child in token.children or ():
            child.type = child.type.replace("softbreak", "hardbreak")
    return markdown


def _figures(timings: dict[str, Any], first_s: float | None) -> str:
    parts = []
    if timings:
        parts = [f"{timings['predicted_n']} tokens", f"{timings['predicted_per_second']:.1f} tokens/s"]
    if first_s is not None:
        parts.append(f"first token {first_s:.2f} s")
    return " · ".join(parts) or "no text"


def _history() -> History:
    """The lines that were typed, for the arrow keys: kept in a file, where there is a place for it."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        folder = Path(state, "bitnet-lambda")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = folder / "history"
        file.touch(mode=0o600)
    except (OSError, RuntimeError):  # RuntimeError: nobody's home is known
        return InMemoryHistory()
    return FileHistory(str(file))


def _key_bindings() -> Any:
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()
    bindings.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    return bindings


def _is_message(value: object) -> bool:
    match value:
        case {"role": "user" | "assistant", "content": str()}:
            return True
    return False


def _why(response: http.client.HTTPResponse) -> str:
    body = response.read()
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(body)["error"]["message"])
    return f"HTTP {response.status} {response.reason}"


if __name__ == "__main__":
    sys.exit(main())
