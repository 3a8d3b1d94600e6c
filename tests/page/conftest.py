"""A real Chromium, the page of a real local server, and the engine with the demo model behind it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.processes import eventually
from tests.server import Server

CONTEXT = 32_768


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium; where there is none (a snap is confined), the one that Playwright has installed."""
    chromium = shutil.which("chromium")
    with sync_playwright() as playwright:
        executable = None if chromium is None or chromium.startswith("/snap/") else chromium
        browser = playwright.chromium.launch(executable_path=executable)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, endless_model: Path, engine_path: Path) -> Iterator[Server]:
    """A server whose answers can take a minute."""
    assert engine_path.exists()
    log = tmp_path_factory.mktemp("page") / "log"
    with Server(log, MODEL_PATH=endless_model, CTX_SIZE=CONTEXT, MAX_PROMPT_BYTES=20_000) as server:
        eventually(lambda: server.health()[0] == 200)
        yield server


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    with browser.new_context() as context:
        yield context


@pytest.fixture
def complaints() -> list[str]:
    """What the browser's console says; a test that expects some takes them out."""
    return []


@pytest.fixture
def page(context: BrowserContext, server: Server, complaints: list[str]) -> Iterator[Page]:
    """The page, ready. At the end there must be nothing in the console."""
    page = open_page(context, server, complaints)
    yield page
    assert complaints == []


def open_page(context: BrowserContext, server: Server, complaints: list[str]) -> Page:
    page = context.new_page()
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"uncaught: {error}"))
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.get_by_text("context").first.wait_for()  # of the model, in the header
    return page
