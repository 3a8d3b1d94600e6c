"""The page as an answer: what it contains, and the headers that guard it. What it does is in tests/page."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Iterator

import pytest
from awslambdaric.lambda_context import LambdaContext

from function.handler import Stream, application, lambda_handler
from function.page import FOLDER, page
from tests.events import url_event


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    application.cache_clear()
    yield
    application.cache_clear()


def get() -> tuple[int, dict[str, str], str]:
    """`GET /` of a Function URL."""
    context = LambdaContext("request-1", None, None, int(time.time() * 1000) + 60_000)
    reply = lambda_handler(url_event("", path="/", method="GET"), context)
    assert not isinstance(reply, Stream | list)
    return reply["statusCode"], reply["headers"], reply["body"]


def test_the_function_has_it_only_if_it_shall(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get()[0] == 404
    for value, status in (("true", 200), ("false", 404)):
        monkeypatch.setenv("SERVE_PAGE", value)
        application.cache_clear()
        assert get()[0] == status


def test_its_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_PAGE", "true")
    _, headers, text = get()
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert headers["x-content-type-options"] == "nosniff"
    policy = dict(directive.split(" ", 1) for directive in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for directive, tag in (("script-src", "script"), ("style-src", "style")):
        (source,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"


def test_it_is_all_of_its_files_and_nothing_else() -> None:
    text = page().text
    for path in FOLDER.iterdir():
        if path.suffix in (".css", ".js"):
            assert path.read_text(encoding="utf-8") in text
    assert len(text.encode()) < 64 * 1024
    assert re.findall(r"""(?:src|href)=["']?(?!data:)[^"'\s>]+|\burl\(|@import|\bimport\(""", text) == []
    assert re.findall(r"""\sstyle=|\son[a-z]+=["']|innerHTML|\beval\b""", text) == []
