"""Counters of a process in Prometheus's text format.

https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Of each completion's record (`Call.record`): the counter, what it counts, and its unit in that of the record.
_SUMS = {
    "tokens_evaluated": ("bitnet_prompt_tokens_total", "Tokens of prompts.", 1),
    "tokens_cached": ("bitnet_prompt_tokens_cached_total", "Those of them that were in the KV cache.", 1),
    "prompt_ms": ("bitnet_prompt_seconds_total", "Time spent computing prompts.", 1e-3),
    "tokens_predicted": ("bitnet_predicted_tokens_total", "Tokens generated.", 1),
    "predicted_ms": ("bitnet_predicted_seconds_total", "Time spent generating.", 1e-3),
}


class Metrics:
    """Counts requests and what was computed for them. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._sums = dict.fromkeys(_SUMS, 0.0)

    def count(self, status: int, record: Mapping[str, Any]) -> None:
        """Counts a request that was answered."""
        with self._lock:
            self._requests[record.get("route") or "", status] += 1
            for name, (_, _, factor) in _SUMS.items():
                self._sums[name] += record.get(name, 0) * factor

    def text(self, in_flight: int) -> str:
        """All of them. `in_flight`: requests that compute or wait."""
        lines: list[str] = []

        def metric(name: str, kind: str, help_text: str, *values: str) -> None:
            lines.extend([f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"])
            lines.extend(f"{name}{value}" for value in values)

        with self._lock:
            requests = [
                f'{{route="{route}",status="{status}"}} {count}'
                for (route, status), count in sorted(self._requests.items())
            ]
            metric("bitnet_requests_total", "counter", "Requests answered.", *requests)
            metric("bitnet_requests_in_flight", "gauge", "Completions that compute or wait.", f" {in_flight}")
            for name, (metric_name, help_text, _) in _SUMS.items():
                metric(metric_name, "counter", help_text, f" {self._sums[name]!r}")
        return "\n".join(lines) + "\n"
