"""What constrained decoding costs: `python -m tests.measure_structured MODEL [REPETITIONS]`. No test.

Tokens a second as the engine counts them, with and without a schema, in turns; greedy, so that each repetition computes
the same. Tokens that the schema leaves no choice about follow in one step and make it faster: an object of many keys
shows that, one long string has none of them and shows what the masks cost.
"""

from __future__ import annotations

import os
import statistics
import sys
from typing import Any

from function.engine import Engine
from function.model_store import ModelStore
from function.schema import parse_completion
from function.settings import Settings
from function.structured import Grammars

N_PREDICT = 64
STRING = {"type": "string", "minLength": 2000}
NUMBER = {"type": "integer", "minimum": 0, "maximum": 99}
KEYS = [f"{name}_in_the_year_{year}" for name in ("income", "expenses") for year in range(2000, 2010)]
OBJECT = {"type": "object", "properties": dict.fromkeys(KEYS, NUMBER), "required": KEYS, "additionalProperties": False}
CASES: dict[str, Any] = {"free": None, "a long string": STRING, "an object of many keys": OBJECT}


def main() -> None:
    """Prints the median of each case and its share of that without a schema."""
    settings = Settings.from_environment(os.environ | {"MODEL_PATH": sys.argv[1]})
    repetitions = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    engine = Engine(settings, ModelStore(settings))
    grammars = Grammars(engine)
    figures: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(repetitions):
        for name, schema in CASES.items():
            body = {"prompt": "Once upon a time", "n_predict": N_PREDICT, "temperature": 0, "ignore_eos": True}
            request = parse_completion(body | ({"json_schema": schema} if schema else {}), settings)
            mask = grammars.compile(request.structure, None, force=True) if request.structure else None
            asked = [fields | {"speculate": False} for fields in request.for_engine({}, add_bos=True)]
            (done,) = engine.complete(asked, mask=mask)
            assert done["tokens_predicted"] == N_PREDICT, done["tokens_predicted"]
            figures[name].append(done["timings"]["predicted_per_second"])
    engine.stop()
    free = statistics.median(figures["free"])
    for name, values in figures.items():
        median = statistics.median(values)
        print(f"{name}: {median:.1f} tokens/s ({min(values):.1f}–{max(values):.1f}), {median / free:.2f} of free")


if __name__ == "__main__":
    main()
