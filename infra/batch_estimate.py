"""What a file of prompts will cost at most, before anybody pays for it: `make batch-estimate FILE=prompts.jsonl`.

Lines are read and prompts tokenized as the function does; the answers are taken to be as long as they may be. Prices
are those of us-east-1 and an x86 function in 2025, without the free tier; the rest is arithmetic on the rates given.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from function import batch, chat_template, openai, schema
from function.engine import EngineError, Event
from function.handler import Application, application
from function.model_store import ModelError
from function.schema import ApiError, CompletionRequest
from function.settings import Settings, SettingsError
from function.structured import Grammars

# US dollars.
GB_SECOND = 0.0000166667  # https://aws.amazon.com/lambda/pricing/
INVOCATION = 0.20 / 1e6
TRANSITION = 0.025 / 1e3  # of a standard workflow: https://aws.amazon.com/step-functions/pricing/
S3_GET, S3_PUT = 0.0004 / 1e3, 0.005 / 1e3  # https://aws.amazon.com/s3/pricing/
LOG_GB = 0.50  # https://aws.amazon.com/cloudwatch/pricing/

TRANSITIONS_PER_INVOCATION = 4  # the start of its own execution, and three states
LOG_BYTES_PER_PROMPT = 1000  # one line, and one of metrics
MAX_LINE_BYTES = 200_000  # a batch of infra/batch.yaml
LINES_SHOWN = 10  # of those that are wrong


@dataclass
class Prompts:
    """What is in a file: lines that are computed, their tokens, and what is wrong with the others."""

    count: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    refused: int = 0
    fatal: int = 0


@dataclass(frozen=True)
class Line:
    """A line of the file: the tokens of its prompt and of its answer, or what is wrong with it."""

    number: int
    prompt_tokens: int = 0
    answer_tokens: int = 0
    problem: str = ""
    fatal: bool = False  # for all of the file, since Step Functions cannot read it


def read(path: Path, parts: Application) -> Iterator[Line]:
    """The lines of a file."""
    grammars = Grammars(parts.engine)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if len(line) > MAX_LINE_BYTES:
                problem = f"it has {len(line)} bytes, at most {MAX_LINE_BYTES} fit into a batch"
                yield Line(number, problem=problem, fatal=True)
                continue
            try:
                yield Line(number, *_tokens(json.loads(line), parts, grammars))
            except ApiError as error:
                yield Line(number, problem=error.message)
            except (ValueError, RecursionError) as error:
                yield Line(number, problem=f"it is not JSON: {error}", fatal=True)


def _tokens(item: object, parts: Application, grammars: Grammars) -> tuple[int, int]:
    """Tokens of the prompts, and of the answers at most.

    Raises:
        ApiError: the function would refuse the line.
    """
    ready = parts.engine.describe()
    request = _parsed(item, parts.settings, ready)
    if request.structure is not None:
        grammars.compile(request.structure, None, force=False)
    prompts = [_prompt_tokens(prompt, request.special, ready["add_bos"], parts) for prompt in request.prompts]
    n_ctx: int = ready["n_ctx"]
    asked = request.n_predict
    longest = n_ctx if asked == 0 else n_ctx - 1
    if max(prompts) > longest:
        raise schema.invalid(f"the prompt has {max(prompts)} tokens, at most {longest} fit into the context of {n_ctx}")
    rooms = [n_ctx - prompt for prompt in prompts]
    return sum(prompts), request.n * sum(room if asked < 0 else min(asked, room) for room in rooms)


def _parsed(item: object, settings: Settings, ready: Event) -> CompletionRequest:
    """What the function makes of an item."""
    url, body = batch.route(item)
    if url == "/completion":
        return schema.parse_completion(body, settings)
    request = (openai.parse_chat if url == "/v1/chat/completions" else openai.parse_text)(body, settings)
    if request.model not in (None, name := ready["model"]["name"]):
        raise schema.invalid(f"there is no model {schema.describe(request.model)}: leave it out or send '{name}'")
    if not request.messages:
        return request.completion
    return replace(request.completion, prompts=(chat_template.tokens(request.messages, ready["bos"], ready["eot"]),))


def _prompt_tokens(prompt: schema.Prompt, special: bool, add_bos: bool, parts: Application) -> int:
    """How many tokens a prompt has that is a text, or ids and texts; one that begins with a text gets a BOS."""
    pieces = (prompt,) if isinstance(prompt, str) else prompt
    texts = [piece for piece in pieces if isinstance(piece, str)]
    tokenized = [len(parts.engine.tokenize(text, add_bos=False, special=special)) for text in texts]
    return (add_bos and isinstance(pieces[0], str)) + len(pieces) - len(texts) + sum(tokenized)


def main() -> int:
    """Prints the estimate. Returns 1 if Step Functions would refuse the file, 2 if there is none, or no model."""
    parser = argparse.ArgumentParser(prog="make batch-estimate FILE=…", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--memory", type=int, default=10_240, help="MB of the function (MEMORY)")
    parser.add_argument("--tokens-per-s", type=float, required=True, help="generated by one environment (TOKENS_PER_S)")
    parser.add_argument("--prompt-tokens-per-s", type=float, required=True, help="of prompts (PROMPT_TOKENS_PER_S)")
    parser.add_argument("--items", type=int, default=50, help="ItemsPerInvocation of infra/batch.yaml (ITEMS)")
    parser.add_argument("--concurrency", type=int, default=8, help="MaxConcurrency of infra/batch.yaml (CONCURRENCY)")
    parser.add_argument("--cold-start-s", type=float, default=20, help="copy and load of the model (COLD_START_S)")
    given = parser.parse_args()
    if not given.file.is_file():
        print(f"batch-estimate: {given.file} is no file (FILE)", file=sys.stderr)
        return 2
    if min(given.memory, given.tokens_per_s, given.prompt_tokens_per_s, given.items, given.concurrency) <= 0:
        print("batch-estimate: memory, rates, items and concurrency must be above 0", file=sys.stderr)
        return 2
    try:
        found, model = _count(given.file)
    except (SettingsError, ModelError, EngineError) as error:
        print(f"batch-estimate: {error}", file=sys.stderr)
        return 2
    _print(found, given, model)
    return 1 if found.fatal else 0


def _count(file: Path) -> tuple[Prompts, str]:
    """What is in the file, and the name of the model it was counted with. Says which lines are wrong."""
    parts = application()
    logging.getLogger("bitnet").setLevel(logging.WARNING)
    found = Prompts()
    try:
        model: str = parts.engine.describe()["model"]["name"]
        for line in read(file, parts):
            found.count += not line.problem
            found.refused += bool(line.problem)
            found.fatal += line.fatal
            found.prompt_tokens += line.prompt_tokens
            found.answer_tokens += line.answer_tokens
            if line.problem and found.refused <= LINES_SHOWN:
                print(f"line {line.number}: {line.problem}", file=sys.stderr)
    finally:
        parts.engine.stop()
    return found, model


def _print(found: Prompts, given: argparse.Namespace, model: str) -> None:
    items = found.count + found.refused
    invocations = math.ceil(items / given.items)
    environments = min(given.concurrency, invocations)
    computing_s = found.prompt_tokens / given.prompt_tokens_per_s + found.answer_tokens / given.tokens_per_s
    billed_s = computing_s + environments * given.cold_start_s
    costs = {
        f"Lambda, {given.memory} MB": billed_s * given.memory / 1024 * GB_SECOND + invocations * INVOCATION,
        "Step Functions": (invocations * TRANSITIONS_PER_INVOCATION + 1) * TRANSITION,
        "S3": invocations * (S3_GET + 2 * S3_PUT),
        "CloudWatch Logs": items * LOG_BYTES_PER_PROMPT / 1e9 * LOG_GB,
    }
    print(f"{'prompts':<28}{found.count:>16,}")
    print(f"{'lines that are refused':<28}{found.refused:>16,}")
    print(f"{'tokens of prompts':<28}{found.prompt_tokens:>16,}   counted with {model}")
    print(f"{'tokens of answers, at most':<28}{found.answer_tokens:>16,}")
    rates = f"{given.prompt_tokens_per_s:g} and {given.tokens_per_s:g} tokens/s, as given"
    print(f"{'seconds of computing':<28}{computing_s:>16,.0f}   at {rates}")
    print(f"{'invocations':<28}{invocations:>16,}   of {given.items} prompts, {environments} at the same time")
    print(f"{'hours it takes':<28}{billed_s / max(environments, 1) / 3600:>16,.2f}")
    for name, dollars in costs.items():
        print(f"{name:<28}{dollars:>16,.4f} $")
    print(f"{'together, at most':<28}{sum(costs.values()):>16,.4f} $")
    if found.fatal:
        print(f"{found.fatal} lines are such that Step Functions would refuse the whole file", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
