"""A chat in the terminal: `python -m function.chat [URL]`. Signs its requests where the URL is Lambda's.

Streams answers and keeps the conversation; `/new` begins another one. Ctrl-C ends an answer, or the chat when there is
none; so does Ctrl-D.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

from function.sigv4 import SigV4, is_function_url

PATH = "/v1/chat/completions"
TIMEOUT_S = 900  # Lambda's longest
JSON = "application/json"


class ChatError(Exception):
    """No answer: one line that says why."""


class Chat:
    """A conversation with the model at `url`."""

    def __init__(self, url: str, system: str | None = None) -> None:
        self._url = url.rstrip("/")
        self._signer = SigV4() if is_function_url(url) else None
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = []

    def ask(self, content: str, **fields: Any) -> Iterator[str]:
        """The pieces of the answer to `content`. What has come of it is kept, also if the iterator is closed.

        Raises:
            ChatError: there is no answer, or not its end; the conversation is as it was before.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": content})
        body = {"messages": self._system + self.messages, "stream": True} | fields
        answer = ""
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
            else:
                self.messages = before

    def _stream(self, body: bytes) -> Iterator[str]:
        parts = urlsplit(self._url + PATH)
        secure = parts.scheme == "https"
        connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        headers = {"content-type": JSON}
        try:
            if self._signer:
                headers |= self._signer.headers("POST", self._url + PATH, body, JSON)
            with closing(connect(parts.netloc, timeout=TIMEOUT_S)) as connection:
                connection.request("POST", parts.path, body, headers)
                response = connection.getresponse()
                if response.status != http.HTTPStatus.OK:
                    raise ChatError(_why(response))
                for line in response:
                    if line.startswith(b"data: {"):
                        event = json.loads(line.removeprefix(b"data: "))
                        if "error" in event:
                            raise ChatError(event["error"]["message"])
                        if piece := event["choices"][0]["delta"].get("content"):
                            yield piece
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ChatError(f"{self._url}: {str(error) or type(error).__name__}") from error


def main(arguments: list[str] | None = None) -> int:
    """Talks until the input ends. Returns 0."""
    parser = argparse.ArgumentParser("python -m function.chat", description="Talk to the model.")
    parser.add_argument("url", nargs="?", default="http://localhost:8080", help="local server or Function URL")
    parser.add_argument("--system", help="what the model shall be")
    parser.add_argument("--temperature", type=float)
    options = parser.parse_args(arguments)
    fields = {} if options.temperature is None else {"temperature": options.temperature}
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its history and line editing
    chat = Chat(options.url, options.system)
    while True:
        try:
            content = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if content == "/new":
            chat.messages.clear()
        elif content:
            _show(chat, content, fields)


def _show(chat: Chat, content: str, fields: dict[str, Any]) -> None:
    pieces = chat.ask(content, **fields)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except ChatError as error:
        print(f"\nbitnet: {error}", file=sys.stderr, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
    print()


def _why(response: http.client.HTTPResponse) -> str:
    body = response.read()
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(body)["error"]["message"])
    return f"HTTP {response.status} {response.reason}"


if __name__ == "__main__":
    sys.exit(main())
