"""Asks a running API a few things and says of each whether the answer is right: `python -m function.smoke [URL]`.

One line an example; exit code 0: all are right. Requests to Lambda's own URLs are signed, unless BITNET_API_KEY is set,
which is then sent as a bearer token; any other URL gets neither but the key. The first request waits as long as a cold
start takes. What the model says is not judged.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from function.client import KEY, Client

PROMPT = "Once upon a time"
TOKENS = 16


class WrongError(Exception):
    """An answer that is not as it must be: what it is."""


class Api(Client):
    """The same, with answers that are judged."""

    def ask(self, path: str, body: Any = None) -> tuple[int, bytes]:
        """Status and body of the answer to a GET, or to a POST of JSON. Raises what `open` does."""
        with self.open(path, None if body is None else json.dumps(body).encode()) as response:
            return response.status, response.read()

    def json(self, path: str, body: Any = None, *, status: int = 200) -> Any:
        """The decoded body. Raises WrongError where the status is another one, or the body is no JSON."""
        found, answer = self.ask(path, body)
        try:
            decoded = json.loads(answer)
        except ValueError:
            raise WrongError(f"status {found}, no JSON: {answer[:80]!r}") from None
        if found != status:
            raise WrongError(f"status {found} instead of {status}: {_message(decoded)}")
        return decoded

    def events(self, path: str, body: Any) -> list[Any]:
        """The decoded server-sent events, but for [DONE]."""
        status, answer = self.ask(path, body)
        if status != 200:
            raise WrongError(f"status {status}: {answer[:200].decode(errors='replace')}")
        lines = [line.removeprefix("data: ") for line in answer.decode().split("\n\n") if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]


def _message(decoded: Any) -> str:
    error = decoded.get("error") if isinstance(decoded, dict) else None
    return str(error["message"] if isinstance(error, dict) and "message" in error else decoded)[:200]


def _must(right: bool, what: str) -> None:
    if not right:
        raise WrongError(what)


def _completion(api: Api) -> str:
    answer = api.json("/completion", {"prompt": PROMPT, "n_predict": TOKENS, "temperature": 0, "ignore_eos": True})
    _must(answer["tokens_predicted"] == TOKENS, f"{answer['tokens_predicted']} tokens instead of {TOKENS}")
    _must(bool(answer["content"]), "no text")
    timings = answer["timings"]
    return f"{answer['model']}: {timings['predicted_per_second']:.1f} tokens/s, {answer['tokens_cached']} cached"


def _repeated(api: Api) -> str:
    body = {"prompt": PROMPT, "n_predict": TOKENS, "temperature": 0, "ignore_eos": True}
    first, second = (api.json("/completion", body) for _ in range(2))
    _must(first["content"] == second["content"], "two answers at temperature 0 differ")
    return f"twice the same, {second['tokens_cached']} tokens cached"


def _stream(api: Api) -> str:
    body = {"prompt": PROMPT, "n_predict": TOKENS, "temperature": 0, "ignore_eos": True}
    events = api.events("/completion", body | {"stream": True})
    _must(bool(events) and events[-1].get("stop") is True, "no last event")
    text = "".join(event["content"] for event in events)
    _must(text == api.json("/completion", body)["content"], "the stream differs from the answer in one piece")
    return f"{len(events)} events"


def _chat(api: Api) -> str:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = api.json("/v1/chat/completions", {"messages": messages, "max_tokens": TOKENS, "temperature": 0})
    (choice,) = answer["choices"]
    _must(choice["message"]["role"] == "assistant", f"the role is {choice['message']['role']}")
    return " ".join(choice["message"]["content"].split()) or "an empty answer"


def _chat_stream(api: Api) -> str:
    messages = [{"role": "user", "content": "Tell me of a king."}]
    body = {"messages": messages, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    events = api.events("/v1/chat/completions", body)
    reasons = [event["choices"][0]["finish_reason"] for event in events if event.get("choices")]
    _must(bool(reasons) and reasons[-1] in ("stop", "length"), "no finish_reason at the end")
    return f"{len(events)} events, finish_reason {reasons[-1]}"


def _tokens(api: Api) -> str:
    text = "Ein Königreich für 2 Pferde 🐎."
    tokens = api.json("/tokenize", {"content": text})["tokens"]
    back = api.json("/detokenize", {"tokens": tokens})["content"]
    _must(back == text, f"{text!r} came back as {back!r}")
    return f"{len(tokens)} tokens, there and back"


def _refusal(api: Api) -> str:
    error = api.json("/completion", {"prompt": PROMPT, "top_p": 7}, status=400)["error"]
    _must(error.get("param") == "top_p", f"the error names {error.get('param')}")
    return str(error["message"])


def _unknown(api: Api) -> str:
    return str(api.json("/nowhere", status=404)["error"]["message"])


def _models(api: Api) -> str:
    return ", ".join(model["id"] for model in api.json("/v1/models")["data"])


def _health(api: Api) -> str:
    answer = api.json("/health")
    _must(answer.get("status") == "ok", f"status is {answer.get('status')}")
    return json.dumps(answer)


EXAMPLES: dict[str, Callable[[Api], str]] = {
    "completion": _completion,  # first, since it is the one that waits for the model
    "health": _health,
    "models": _models,
    "repeated": _repeated,
    "stream": _stream,
    "chat": _chat,
    "chat stream": _chat_stream,
    "tokenize": _tokens,
    "wrong value": _refusal,
    "wrong path": _unknown,
}


def main() -> int:
    """The command line. Returns the exit code: 0, or 1 if an answer is wrong."""
    parser = argparse.ArgumentParser(prog="python -m function.smoke", description="Validates a running API.")
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8080", help="default: %(default)s")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--sign", action="store_true", default=None, help="sign requests (default: to Lambda's URLs)")
    choice.add_argument("--no-sign", dest="sign", action="store_false", help="do not")
    parser.add_argument("--region", help="of the signature (default: that of the URL)")
    arguments = parser.parse_args()
    wrong = 0
    api = Api(arguments.url, os.environ.get(KEY), sign=arguments.sign, region=arguments.region)
    for name, example in EXAMPLES.items():
        began = time.monotonic()
        try:
            text, mark = example(api), "ok"
        except (WrongError, OSError, http.client.HTTPException, ValueError) as error:
            text, mark = str(error) or type(error).__name__, "FAILED"
        except (KeyError, TypeError, IndexError) as error:
            text, mark = f"the answer lacks something: {error!r}", "FAILED"
        wrong += mark == "FAILED"
        print(f"{mark:6}  {name:12}  {(time.monotonic() - began) * 1e3:7,.0f} ms  {text}", flush=True)
    print(f"smoke: {arguments.url}: {len(EXAMPLES) - wrong} of {len(EXAMPLES)} are right", file=sys.stderr)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
