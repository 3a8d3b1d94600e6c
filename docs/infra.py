"""Draws docs/infra.svg, the picture of how the parts fit together (`make picture`); `--check` only compares.

Positions and sizes are in SVG user units (pixels at scale 1). The colours follow the reader's light or dark setting.
"""

import sys
from html import escape
from pathlib import Path

PICTURE = Path(__file__).with_suffix(".svg")
WIDTH, HEIGHT = 960, 1064
LABEL = "A request goes from the caller through the Python function to the native engine, its answer the same way back"
HEAD = (
    '<marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7"'
    ' orient="auto-start-reverse"><path class="head" d="M 0 0 L 10 5 L 0 10 z"/></marker>'
)

# class → CSS properties, in light and in dark. Plain rules, since not every viewer knows CSS variables.
LIGHT = {
    "paper": "fill: #ffffff",
    "text": "fill: #1f2328",
    "note": "fill: #59636e",
    "zone": "fill: #f6f8fa; stroke: #d1d9e0",
    "plain": "fill: #ffffff; stroke: #8c959f",
    "aws": "fill: #fff1e0; stroke: #d9821b",
    "python": "fill: #e4effc; stroke: #2f74c0",
    "native": "fill: #e3f5e6; stroke: #2c8a43",
    "line": "stroke: #6e7781",
    "head": "fill: #6e7781",
}
DARK = {
    "paper": "fill: #0d1117",
    "text": "fill: #e6edf3",
    "note": "fill: #a3acb8",
    "zone": "fill: #161b22; stroke: #30363d",
    "plain": "fill: #0d1117; stroke: #7d8590",
    "aws": "fill: #33230f; stroke: #d98c2b",
    "python": "fill: #12273f; stroke: #58a6ff",
    "native": "fill: #12291a; stroke: #3fb950",
    "line": "stroke: #8b949e",
    "head": "fill: #8b949e",
}
SHAPES = """text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
.title { font-size: 15px; font-weight: 600 } .name { font-size: 14px; font-weight: 600 } .note { font-size: 12px }
rect { stroke-width: 1.3 } .line { fill: none; stroke-width: 1.6 }
.to { marker-end: url(#head) } .from { marker-start: url(#head) }"""


def style() -> str:
    """The style sheet: shapes, the light colours, and the dark ones for readers who prefer those."""

    def rules(colours: dict[str, str]) -> str:
        return "\n".join(f"{name if name == 'text' else '.' + name} {{ {value} }}" for name, value in colours.items())

    return f"\n{SHAPES}\n{rules(LIGHT)}\n@media (prefers-color-scheme: dark) {{\n{rules(DARK)}\n}}\n"


def text(x: float, y: float, content: str, kind: str, anchor: str = "start") -> str:
    """One line of text with its baseline at y."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(content)}</text>'


def zone(x: float, y: float, width: float, height: float, title: str) -> str:
    """A titled area that other boxes stand on."""
    frame = f'<rect class="zone" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="12"/>'
    return frame + text(x + 16, y + 26, title, "title")


def box(x: float, y: float, width: float, kind: str, name: str, *notes: str) -> str:
    """A named box with lines of explanation; its height is box_height(number of notes)."""
    height = box_height(len(notes))
    parts = [f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="7"/>']
    parts.append(text(x + 12, y + 22, name, "name"))
    parts += [text(x + 12, y + 40 + 16 * row, note, "note") for row, note in enumerate(notes)]
    return "".join(parts)


def box_height(notes: int) -> int:
    """Height of a box with so many lines of explanation."""
    return 32 + 16 * notes if notes else 34


def line(path: str, heads: str = "to") -> str:
    """A line, by default with an arrow's head at its end; `path` is SVG path data, `heads` any of "to" and "from"."""
    return f'<path class="line {heads}" d="{path}"/>'


def account(top: float) -> list[str]:
    """What is around the function in an account: how it comes there, its batches, and who watches it."""
    left, middle, right, width = 44, 366, 688, 228
    first, second, third = top + 44, top + 132, top + 220
    return [
        zone(24, top, 912, 296, "In your account: template.yaml and infra/"),
        box(left, first, width, "plain", "GitHub or make deploy", "role by OIDC, within a boundary"),
        box(middle, first, width, "aws", "CloudFormation", "function, bucket, registry, batches"),
        box(right, first, width, "aws", "ECR", "the image, immutable tags"),
        box(left, second, width, "aws", "Step Functions", "Distributed Map: prompts/*.jsonl"),
        box(middle, second, width, "python", "The Lambda function", "alias live, reserved concurrency"),
        box(right, second, width, "aws", "S3", "results/, each written once"),
        box(left, third, width, "aws", "SQS, dead-letter queue", "one prompt a message"),
        box(middle, third, width, "aws", "SSM or Secrets Manager", "the API key, if the URL is open"),
        box(right, third, width, "aws", "CloudWatch, X-Ray", "metrics, log, dashboard, alarms"),
        line(f"M {left + width} {first + 24} H {middle - 6}"),
        line(f"M {middle + 114} {first + 48} V {second - 6}"),
        line(f"M {right} {first + 36} H {right - 30} V {second + 12} H {middle + width + 6}"),
        line(f"M {left + width} {second + 24} H {middle - 6}"),
        line(f"M {left + width} {third + 24} H {middle - 40} V {second + 36} H {middle - 6}"),
        line(f"M {middle + width} {second + 28} H {right - 6}"),
        line(f"M {middle + width} {second + 40} H {right - 46} V {third + 24} H {right - 6}"),
        line(f"M {middle + 114} {third} V {second + 54}"),
    ]


def draw() -> str:
    """The whole picture as SVG text."""
    left, python, native = 24, 300, 636
    parts = [
        zone(272, 24, 664, 540, "Lambda execution environment: one container image"),
        # Callers and services, from top to bottom.
        box(left, 70, 196, "plain", "HTTP client", "POST /completion", "JSON or server-sent events"),
        box(left, 168, 196, "aws", "Function URL", "IAM or an API key, HTTPS"),
        box(left, 250, 196, "plain", "aws lambda invoke", "{“prompt”: …}, plain JSON"),
        box(left, 362, 196, "aws", "CloudWatch Logs", "structured, no user text"),
        box(left, 476, 196, "aws", "S3", "model.gguf"),
        # The Python process.
        text(python, 82, "function/ (Python)", "note"),
        box(python, 94, 236, "python", "runtime.py", "awslambdaric, Runtime API"),
        box(python, 176, 236, "python", "handler.py", "an event in, a response out"),
        box(python, 258, 236, "python", "api.py, schema.py", "routes, validation, errors"),
        box(python, 340, 236, "python", "engine.py", "starts, asks, cancels, restarts"),
        box(
            python,
            460,
            236,
            "python",
            "model_store.py",
            "copies once, in parallel ranges;",
            "size and checksum verified",
        ),
        # The engine.
        text(native, 82, "build/out/bitnet worker (C++, static)", "note"),
        box(native, 94, 276, "native", "worker", "one JSON object a line"),
        box(native, 176, 276, "native", "scheduler · tokenizer · sampler", "KV cache, text ↔ tokens, stop"),
        box(native, 258, 276, "native", "transformer", "prefill in batches, decode by token"),
        box(native, 340, 276, "native", "kernels", "scalar · AVX2 · AVX-512, same bits"),
        box(
            native,
            460,
            276,
            "plain",
            "/tmp: model.gguf",
            "ternary weights, 1.6 or 2 bits each:",
            "mapped, then settled into memory",
        ),
        # Requests.
        line("M 122 136 V 162"),
        line("M 220 192 H 246 V 118 H 294"),
        line("M 220 274 H 246 V 192", heads=""),
        *(line(f"M {x} {y} V {y + 28}") for x in (python + 118, native + 138) for y in (145, 227, 309)),
        line("M 542 364 H 586 V 118 H 630", heads="to from"),
        text(580, 250, "pipe", "note", "end"),
        # Logs and the model.
        line("M 300 378 H 226"),
        line("M 220 492 H 294"),
        line("M 536 492 H 630"),
        line(f"M {native + 138} 460 V 394"),
        text(native + 146, 432, "weights", "note"),
        # The same at home.
        zone(272, 588, 664, 132, "Your machine: make run"),
        box(left, 634, 196, "plain", "curl, browser", "http://localhost:8080"),
        box(python, 634, 236, "python", "local.py", "uvicorn; several at a time"),
        box(native, 634, 276, "plain", "the same handler and engine", "build/model/demo/model.gguf, or yours"),
        line("M 220 658 H 294"),
        line("M 536 658 H 630"),
        *account(744),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{LABEL}">',
            "<!-- Made by docs/infra.py. -->",
            f"<style>{style()}</style>",
            f"<defs>{HEAD}</defs>",
            f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>',
            *parts,
            "</svg>\n",
        ]
    )


def main() -> None:
    """Writes the picture, or with --check exits with 1 if the one there is not what would be drawn."""
    if "--check" in sys.argv[1:]:
        if not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != draw():
            sys.exit(f"{PICTURE.name} is not what {Path(__file__).name} draws: run make picture")
    else:
        PICTURE.write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
