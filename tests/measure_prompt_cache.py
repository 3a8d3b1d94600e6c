"""What a named prompt saves: `python -m tests.measure_prompt_cache MODEL [REPETITIONS]`. No test.

Seconds from the request to the first token for a prompt of 1,000 tokens, by an engine that has computed nothing yet:
without a file, while it writes one, and with it. Each in its turn, all in one run; the file is in the page cache.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from function.engine import Engine
from function.model_store import ModelStore
from function.settings import Settings

N_PROMPT = 1000


def seconds(settings: Settings, prompt: list[int], **fields: object) -> float:
    """Of one request to an engine of its own."""
    engine = Engine(settings, ModelStore(settings))
    engine.describe()
    warm_up = {"prompt": prompt[:1], "n_predict": 1, "cache_prompt": False}
    list(engine.complete([warm_up]))
    began = time.perf_counter()
    (done,) = engine.complete([{"prompt": prompt, "n_predict": 1, "temperature": 0, **fields}])
    taken = time.perf_counter() - began
    engine.stop()
    print(f"  {done['cache_file']}, {done['tokens_cached']} tokens cached: {taken:.3f} s", file=sys.stderr)
    return taken


def main() -> None:
    """Prints the medians and how they compare."""
    settings = Settings.from_environment(os.environ | {"MODEL_PATH": sys.argv[1], "PARALLEL": "1"})
    repetitions = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    prompt = [1000 + 7 * index % 1999 for index in range(N_PROMPT)]
    figures: dict[str, list[float]] = {"computed": [], "computed and saved": [], "restored": []}
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "prompt.kv"
            figures["computed"].append(seconds(settings, prompt))
            figures["computed and saved"].append(seconds(settings, prompt, cache_file=str(path), cache_save=True))
            figures["restored"].append(seconds(settings, prompt, cache_file=str(path)))
            size = path.stat().st_size
    computed = statistics.median(figures["computed"])
    for name, values in figures.items():
        median = statistics.median(values)
        print(f"{name}: {median:.3f} s ({min(values):.3f}–{max(values):.3f}), {computed / median:.1f} times as fast")
    print(f"file: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
