"""Which file of which repository on the Hugging Face hub is the model, and which ones the engine cannot run.

Also how the steps of the way from there to S3 say what they do.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass


class PipelineError(Exception):
    """A step of the way from the hub to S3 cannot be taken: one line that says why."""


def say(line: str) -> None:
    """To standard error."""
    print(f"model: {line}", file=sys.stderr)


def exit_code_of(step: Callable[[], object]) -> int:
    """Takes the step. What it cannot do it says in one line; an interrupted one can be started again."""
    try:
        step()
    except (PipelineError, OSError) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted; start again to go on")
        return 130
    return 0


@dataclass(frozen=True)
class Checkpoint:
    """A file at the hub. `sha256`: in hexadecimal; None where only the hub says what it is."""

    repository: str  # owner/name
    filename: str
    revision: str  # a commit, or a branch or tag whose commit the hub tells
    sha256: str | None = None


BITNET_2B = Checkpoint(
    repository="microsoft/bitnet-b1.58-2B-4T-gguf",
    filename="ggml-model-i2_s.gguf",
    revision="a1f2f1c765812aa8af3f6eda4a313707064bba15",
    sha256="4221b252fdd5fd25e15847adfeb5ee88886506ba50b8a34548374492884c2162",
)

ARCHITECTURES = ("bitnet-b1.58", "bitnet-25", "bitnet")  # general.architecture of GGUF files
LLAMA = "it is of the Llama architecture: SiLU, and no norms within attention and feed-forward"
# Repositories of other ternary models, whose graph is another one.
OTHERS = {
    r"bitnet_b1_58-(large|xl|3b)": "its feed-forward network uses SiLU instead of the squared ReLU",
    r"falcon-e|falcon3.*1\.58": LLAMA,
    r"llama3-8b-1\.58": LLAMA,
}
SUPPORTED = f"The engine runs {BITNET_2B.repository}, and other GGUF files of its architecture (README.md, 'Models')"


def refuse_others(repository: str, architecture: str | None = None) -> None:
    """Raises PipelineError for a repository of which it is known that the engine cannot run it.

    Args:
        repository: owner/name at the hub.
        architecture: what the hub says of its GGUF files, if it does.
    """
    for pattern, reason in OTHERS.items():
        if re.search(pattern, repository, re.IGNORECASE):
            raise PipelineError(f"{repository} is not supported: {reason}. {SUPPORTED}")
    if architecture is not None and architecture not in ARCHITECTURES:
        raise PipelineError(
            f"{repository} is not supported: its architecture must be one of {', '.join(ARCHITECTURES)}, "
            f"it is {architecture}. {SUPPORTED}"
        )
