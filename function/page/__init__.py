"""The page to talk to, at `/`: small files put together into one answer that needs nothing from anywhere else.

The browser runs and shows only what has the hashes of the Content-Security-Policy, and asks nobody but the server that
the page came from.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
STYLE = "style.css"
SCRIPTS = ("request.js", "stream.js", "markup.js", "app.js")  # one module, in this order


@dataclass(frozen=True)
class Page:
    """An HTML document and the headers it comes with."""

    text: str
    headers: dict[str, str]


@functools.cache
def page() -> Page:
    """The page, put together on the first need."""
    style = _read(STYLE)
    script = "\n".join(_read(name) for name in SCRIPTS)
    text = _read("index.html").replace("/* style.css */", style).replace("/* scripts */", script)
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    headers = {
        "content-type": "text/html; charset=utf-8",
        "cache-control": "no-cache",
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "permissions-policy": "camera=(), geolocation=(), microphone=()",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
    }
    return Page(text, headers)


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    """The source as a browser compares it: https://www.w3.org/TR/CSP3/#match-element-to-source-list."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
