"""Figures of what is computed: counters in Prometheus's text format, and on Lambda metrics for CloudWatch.

https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/CloudWatch_Embedded_Metric_Format_Specification.html
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
NAMESPACE = "BitNet"  # of CloudWatch's metrics; template.yaml's alarms and dashboard name it too

# Of each completion's record (`Call.record`): the counter, what it counts, and its unit in that of the record.
_SUMS = {
    "tokens_evaluated": ("bitnet_prompt_tokens_total", "Tokens of prompts.", 1),
    "tokens_cached": ("bitnet_prompt_tokens_cached_total", "Those of them that were in the KV cache.", 1),
    "prompt_ms": ("bitnet_prompt_seconds_total", "Time spent computing prompts.", 1e-3),
    "tokens_predicted": ("bitnet_predicted_tokens_total", "Tokens generated.", 1),
    "predicted_ms": ("bitnet_predicted_seconds_total", "Time spent generating.", 1e-3),
    "queue_ms": ("bitnet_queue_seconds_total", "Time that completions waited, for the model too.", 1e-3),
}
# The same for CloudWatch: the metric and its unit there.
_MEASURES = {
    "tokens_evaluated": ("PromptTokens", "Count"),
    "tokens_cached": ("CachedTokens", "Count"),
    "tokens_predicted": ("PredictedTokens", "Count"),
    "first_token_ms": ("TimeToFirstToken", "Milliseconds"),
    "queue_ms": ("QueueTime", "Milliseconds"),
}


class Metrics:
    """Counts requests and what was computed for them. Any thread may use it.

    With `function_name` it also writes metrics to the standard output, where CloudWatch finds them. Their only
    dimension is the function's name, since each combination of dimensions is billed as a metric of its own.
    """

    def __init__(self, function_name: str | None = None) -> None:
        self._function_name = function_name
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._sums = dict.fromkeys(_SUMS, 0.0)
        self._restarts = 0
        if function_name:  # slow to import: now, while Lambda initialises, not when somebody waits
            import aws_lambda_powertools.metrics.provider.cloudwatch_emf.cloudwatch

            self._provider = (
                aws_lambda_powertools.metrics.provider.cloudwatch_emf.cloudwatch.AmazonCloudWatchEMFProvider
            )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Metrics:
        """For CloudWatch too if this runs on Lambda."""
        return cls(environment.get("AWS_LAMBDA_FUNCTION_NAME"))

    def count(self, status: int, record: Mapping[str, Any], request_id: str = "") -> None:
        """Counts a request that was answered."""
        with self._lock:
            self._requests[record.get("route") or "", status] += 1
            for name, (_, _, factor) in _SUMS.items():
                self._sums[name] += record.get(name, 0) * factor
        measured = {metric: (unit, record[name]) for name, (metric, unit) in _MEASURES.items() if name in record}
        if "tokens_per_second" in record:
            measured["TokensPerSecond"] = ("Count/Second", record["tokens_per_second"])
        if "stop_type" in record:
            measured[f"Stop{record['stop_type'].capitalize()}"] = ("Count", 1)
        if status >= 500:
            measured["ServerErrors"] = ("Count", 1)
        self._write(measured, request_id)

    def copied(self, milliseconds: float, size: int) -> None:
        """The model, of so many bytes, was copied from S3."""
        self._write({"ModelCopyTime": ("Milliseconds", milliseconds), "ModelCopyBytes": ("Bytes", size)})

    def loaded(self, load_ms: float, total_ms: float, *, again: bool) -> None:
        """The engine is ready: it took `load_ms` to start and with the copy of the model `total_ms`.

        `again`: it replaces one that has died.
        """
        if again:
            with self._lock:
                self._restarts += 1
            self._write({"EngineRestarts": ("Count", 1), "ModelLoadTime": ("Milliseconds", load_ms)})
        else:
            self._write(
                {
                    "ColdStarts": ("Count", 1),
                    "ColdStartTime": ("Milliseconds", total_ms),
                    "ModelLoadTime": ("Milliseconds", load_ms),
                }
            )

    def text(self, in_flight: int) -> str:
        """All of them for Prometheus. `in_flight`: requests that compute or wait."""
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
            metric("bitnet_engine_restarts_total", "counter", "Engines that replaced a dead one.", f" {self._restarts}")
            for name, (metric_name, help_text, _) in _SUMS.items():
                metric(metric_name, "counter", help_text, f" {self._sums[name]!r}")
        return "\n".join(lines) + "\n"

    def _write(self, measured: Mapping[str, tuple[str, float]], request_id: str = "") -> None:
        if not self._function_name or not measured:
            return
        emf = self._provider(namespace=NAMESPACE, dimension_set={"FunctionName": self._function_name})
        for name, (unit, value) in measured.items():
            emf.add_metric(name, unit, value)
        if request_id:
            emf.add_metadata("request_id", request_id)
        sys.stdout.write(json.dumps(emf.serialize_metric_set()) + "\n")  # in one piece: threads may write at once
        sys.stdout.flush()
