"""`make bench`: measures the engine on this machine and draws what it found.

Writes a random model as large as microsoft/bitnet-b1.58-2B-4T (or takes MODEL), packs it, and runs `bitnet bench` on
both files: by instruction set, by threads, by context, by tokens at once. Every round asks for each figure once, so
that all of them see the same minutes; medians are shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[2]
CLI = ROOT / "build/out/bitnet"
DEPTHS = (0, 512, 1024, 2048, 3072, 4000)
SEQUENCES = (1, 2, 4, 8)
PROMPTS = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Run:
    """One `bitnet bench`: a model file and options."""

    file: Path
    options: tuple[tuple[str, object], ...]

    def command(self) -> list[str]:
        """The command line, as one would type it."""
        given = [str(word) for name, value in self.options for word in (f"--{name.replace('_', '-')}", value)]
        return [str(CLI), "bench", "--model", str(self.file), "--repetitions", "1", "--json", *given]


@dataclass
class Results:
    """All samples of all runs; figures are named as `bitnet bench` names them."""

    samples: dict[Run, list[Mapping[str, Any]]] = field(default_factory=dict)

    def measure(self, runs: Iterable[Run], rounds: int) -> None:
        """Asks for each run once a round."""
        unique = list(dict.fromkeys(runs))
        for number in range(rounds):
            for index, run in enumerate(unique):
                print(f"\rround {number + 1}/{rounds}, {index + 1}/{len(unique)}", end="", file=sys.stderr, flush=True)
                output = subprocess.run(run.command(), check=True, capture_output=True, text=True).stdout
                self.samples.setdefault(run, []).append(json.loads(output))
        print(file=sys.stderr)

    def median(self, run: Run, name: str) -> float:
        """The median of a figure."""
        return statistics.median(float(sample[name]) for sample in self.samples[run])

    def spread(self, run: Run, name: str) -> float:
        """The distance between its largest and smallest sample."""
        values = [float(sample[name]) for sample in self.samples[run]]
        return max(values) - min(values)


def run(file: Path, **options: object) -> Run:
    """A run of `file`; `isa`, `threads`, `depth` and so on are the options of `bitnet bench`."""
    return Run(file, tuple(options.items()))


def instruction_sets() -> list[str]:
    """Those that this processor has, the best one first."""
    have = []
    for isa in ("amx", "avx512-vbmi", "avx512", "avx2"):
        options = ["--isa", isa, "--prompt-tokens", "1", "--predict-tokens", "1"]
        command = [str(CLI), "bench", "--model", str(ROOT / "build/model/demo/model.gguf"), *options]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            have.append(isa)
    return have


def files(model: Path | None, output: Path) -> tuple[Path, Path]:
    """What is measured: `model`, or a random one that is made in `output` once; and the same packed by this engine."""
    plain = model or output / "model.gguf"
    if not plain.exists():
        subprocess.run([ROOT / ".venv/bin/python", ROOT / "build/model/synthesize.py", plain], check=True)
    packed = output / f"{plain.stem}.packed.gguf"
    subprocess.run([CLI, "pack", "--model", plain, "--output", packed], check=True)
    return plain, packed


PREFILL, DECODE = "prefill_tokens_per_second", "decode_tokens_per_second"
BANDWIDTH, BYTES = "read_bandwidth_bytes_per_second", "decode_bytes_per_token"
KEPT = "decode_of_short_context"


def main() -> None:
    """Measures and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a GGUF file as published; default: a random one of the same size")
    parser.add_argument("--threads", type=int, required=True, help="most threads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "build/out/bench")
    arguments = parser.parse_args()
    if arguments.model and not arguments.model.is_file():
        parser.error(f"{arguments.model} is no file (MODEL)")
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    plain, packed = files(arguments.model, output)

    isas, threads = instruction_sets(), arguments.threads
    by_isa = {
        (name, isa): run(file, isa=isa, threads=threads, prompt_tokens=512, predict_tokens=64)
        for name, file in (("as published", plain), ("packed", packed))
        for isa in isas
    }
    by_depth = {
        (kv, depth): run(
            packed, threads=threads, ctx_size=4096, kv_type=kv, depth=depth, prompt_tokens=0, predict_tokens=32
        )
        for kv in ("f16", "i8")
        for depth in DEPTHS
    }
    by_threads = {n: run(packed, threads=n, prompt_tokens=128, predict_tokens=32) for n in range(1, threads + 1)}
    by_sequences = {n: run(packed, threads=threads, sequences=n, prompt_tokens=0, predict_tokens=32) for n in SEQUENCES}
    by_prompt = {n: run(packed, threads=threads, prompt_tokens=n, predict_tokens=0) for n in PROMPTS}
    results = Results()
    groups = (by_isa, by_depth, by_threads, by_sequences, by_prompt)
    results.measure([r for group in groups for r in group.values()], arguments.rounds)

    print(
        "| file | instructions | prefill, tokens/s | decode, tokens/s | bytes a token | read bandwidth | of it used |"
    )
    print("|---|---|---|---|---|---|---|")
    for (name, isa), r in by_isa.items():
        bandwidth, size = results.median(r, BANDWIDTH), results.median(r, BYTES)
        speeds = " | ".join(f"{results.median(r, n):.1f} ± {results.spread(r, n):.1f}" for n in (PREFILL, DECODE))
        used = statistics.median(s[DECODE] * s[BYTES] / s[BANDWIDTH] for s in results.samples[r])
        print(f"| {name} | {isa} | {speeds} | {size / 1e6:.0f} MB | {bandwidth / 1e9:.0f} GB/s | {used:.0%} |")
    for title, group, name in (
        ("context", by_depth, DECODE),
        ("threads", by_threads, DECODE),
        ("sequences", by_sequences, DECODE),
        ("prompt tokens", by_prompt, PREFILL),
    ):
        print(f"\n| {title} | tokens/s |\n|---|---|")
        for key, r in group.items():
            print(f"| {' '.join(map(str, key)) if isinstance(key, tuple) else key} | {results.median(r, name):.1f} |")
    for (kv, depth), r in by_depth.items():
        if KEPT in results.samples[r][0]:
            print(
                f"\n{kv} cache, {depth} tokens of context: {results.median(r, KEPT):.0%} of the speed at 128, in turns"
            )

    import matplotlib.pyplot as plt

    figure, ((top_left, top_right), (bottom_left, bottom_right)) = plt.subplots(
        2, 2, figsize=(11, 8), layout="constrained"
    )
    for kv in ("f16", "i8"):
        curve = [results.median(by_depth[kv, depth], DECODE) for depth in DEPTHS]
        draw(top_left, DEPTHS, curve, f"{kv} cache")
    finish(top_left, "Decode by context", "tokens of context")
    draw(top_right, by_threads, [results.median(r, DECODE) for r in by_threads.values()], "decode")
    draw(top_right, by_threads, [results.median(r, PREFILL) for r in by_threads.values()], "prefill of 128")
    top_right.set_xticks(list(by_threads))
    finish(top_right, "By threads", "threads")
    places = range(len(by_isa))
    for shift, name, label in ((-0.2, PREFILL, "prefill of 512"), (0.2, DECODE, "decode")):
        bottom_left.bar(
            [p + shift for p in places], [results.median(r, name) for r in by_isa.values()], 0.4, label=label
        )
    bottom_left.set_xticks(list(places), [f"{name}\n{isa}" for name, isa in by_isa], fontsize=7)
    finish(bottom_left, "By file and instructions", "")
    size = results.median(by_sequences[1], BYTES)
    at_once = [*SEQUENCES, *PROMPTS]
    bound = [n * results.median(by_sequences[1], BANDWIDTH) / size for n in at_once]
    top = max(results.median(r, PREFILL) for r in by_prompt.values())
    bottom_right.plot(at_once, bound, "--", color="grey", label="memory's bound")
    draw(
        bottom_right,
        SEQUENCES,
        [results.median(r, DECODE) for r in by_sequences.values()],
        "decode, texts side by side",
    )
    draw(bottom_right, PROMPTS, [results.median(r, PREFILL) for r in by_prompt.values()], "prefill")
    bottom_right.set(xscale="log", yscale="log", ylim=(None, 3 * top))
    finish(bottom_right, "Roofline: what bounds it", "tokens computed in one reading of the weights", from_zero=False)
    figure.savefig(output / "performance.svg", metadata={"Date": None})
    (output / "results.json").write_text(
        json.dumps([{"command": r.command()[1:], "samples": s} for r, s in results.samples.items()], indent=1)
    )
    print(f"\n{output / 'performance.svg'}, {output / 'results.json'}", file=sys.stderr)


def draw(axes: Axes, x: Iterable[int], y: Iterable[float], label: str) -> None:
    """A curve with its points."""
    axes.plot(list(x), list(y), "o-", label=label, markersize=4)


def finish(axes: Axes, title: str, x_label: str, *, from_zero: bool = True) -> None:
    """Titles and a legend."""
    axes.set(title=title, xlabel=x_label, ylabel="tokens a second")
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
