"""How long a request takes beside the model's own time: `python -m tests.measure_overhead [N]`. No test.

Local server: from the request's first byte to the first byte of the answer's body, over a new connection to
127.0.0.1. Function: from the Runtime API's answer to `next` until the first chunk arrives there. From both is taken
what the engine says the prompt and the one token took.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from tests.e2e.runtime_api import RuntimeApi
from tests.events import url_event
from tests.processes import eventually
from tests.server import Server

REQUEST = {"prompt": "Once upon a time", "n_predict": 1, "temperature": 0, "stream": True}
WARM_UP = 20


def computed_ms(body: bytes) -> float:
    """The engine's own time, from the last event of a stream."""
    timings = json.loads(body.split(b"data: ")[-1])["timings"]
    return float(timings["prompt_ms"] + timings["predicted_ms"])


def local(count: int, folder: Path) -> list[float]:
    """Milliseconds of each request to the local server."""
    figures = []
    with Server(folder / "local") as server:
        eventually(lambda: server.health()[0] == 200)
        for _ in range(count):
            with closing(server.connect()) as connection:
                connection.connect()
                began = time.perf_counter()
                connection.request("POST", "/completion", json.dumps(REQUEST))
                response = connection.getresponse()
                body = response.read(1)
                first_ms = (time.perf_counter() - began) * 1e3
                figures.append(first_ms - computed_ms(body + response.read()))
    return figures


def function(count: int, folder: Path) -> list[float]:
    """Milliseconds of each invocation of the function."""
    figures = []
    with RuntimeApi(folder / "function", {"INVOKE_MODE": "RESPONSE_STREAM"}) as runtime:
        for _ in range(count):
            invocation = runtime.invoke(url_event(REQUEST))
            body = b"".join(invocation.rest())
            figures.append((invocation.first_chunk_at - invocation.handed_out_at) * 1e3 - computed_ms(body))
    return figures


def main() -> None:
    """Prints medians and 95th percentiles of N requests (200), after some to warm up."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as folder:
        for name, measure in (("local server", local), ("function", function)):
            figures = sorted(measure(WARM_UP + count, Path(folder))[WARM_UP:])
            percentile = figures[len(figures) * 95 // 100]
            print(f"{name}: median {statistics.median(figures):.2f} ms, 95th percentile {percentile:.2f} ms")


if __name__ == "__main__":
    main()
