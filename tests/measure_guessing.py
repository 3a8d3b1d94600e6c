"""What guessing ahead gains: `python -m tests.measure_guessing MODEL [TEXTS]`. No test.

How much faster texts of 200 tokens are generated with guesses than without, by one thread and by two, some greedily and
some sampled, in turns; and whether they are the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.cli.bitnet import Bitnet
from tests.cli.worker import Worker, started

N_PREDICT = 200
PROMPTS = (
    "Once upon a time",
    "The wolf ate the goat. The wolf ate the goat. The wolf ate the goat. The wolf",
    "There was once a king who had three daughters, and the youngest of them was so beautiful",
    "Hansel and Gretel went into the wood",
    "The fisherman went to the sea and said",
)


def measure(worker: Worker, prompt: str, texts: int) -> str:
    """A line: the ratio of the times, guesses, right ones, equal texts."""
    milliseconds = {True: 0.0, False: 0.0}
    guesses = right = equal = 0
    for seed in range(texts):
        tokens = {}
        for speculate in (seed % 2 == 0, seed % 2 != 0):
            fields = {"seed": seed, "temperature": 0.8 if seed % 3 else 0, "speculate": speculate}
            done = worker.complete(prompt, n_predict=N_PREDICT, cache_prompt=False, ignore_eos=True, **fields)
            milliseconds[speculate] += done["timings"]["predicted_ms"]
            tokens[speculate] = done["tokens"]
            guesses += done["timings"]["draft_n"]
            right += done["timings"]["draft_n_accepted"]
        equal += tokens[True] == tokens[False]
    ratio = milliseconds[False] / milliseconds[True]
    return f"{ratio:.3f} times as fast, {right} of {guesses} guesses right, {equal} of {texts} texts equal: {prompt}"


def main() -> None:
    """Prints a line for each number of threads and prompt."""
    texts = int(sys.argv[2]) if len(sys.argv) > 2 else 24
    for threads in ("1", "2"):
        with started(Bitnet(Path("build/out/bitnet").resolve()), Path(sys.argv[1]), "--threads", threads) as worker:
            for prompt in PROMPTS:
                print(f"{threads} threads: {measure(worker, prompt, texts)}", flush=True)


if __name__ == "__main__":
    main()
