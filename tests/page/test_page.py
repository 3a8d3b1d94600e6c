"""The page in a real browser: what is typed, shown, kept, refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Page, Request, Route, expect

from tests.page.conftest import CONTEXT, open_page
from tests.processes import eventually
from tests.server import Server

QUESTION = "Tell me of a king."
TALE = " there lived a king who had a son who had three sons"


def ask(page: Page, words: str, **settings: object) -> None:
    """Sends `words`, and waits for nothing."""
    if settings:
        if not page.locator("#settings").is_visible():
            page.get_by_role("button", name="Settings").click()
        for name, value in settings.items():
            page.locator(f"#settings [name={name}]").fill(str(value))
        if page.locator("dialog:modal").count():
            page.get_by_role("button", name="Close the settings").click()
    page.get_by_role("textbox", name="Message").fill(words)
    page.get_by_role("textbox", name="Message").press("Enter")


def finish(page: Page) -> None:
    page.get_by_role("button", name="Send").wait_for()


def answers(page: Page) -> list[str]:
    return page.locator(".answer").all_text_contents()


def complete(page: Page) -> None:
    """Changes to completions."""
    page.get_by_text("Completion", exact=True).click()


def asked(page: Page, action: Callable[[], None], path: str = "v1/chat/completions") -> Request:
    """The request that `action` makes."""
    with page.expect_request(f"**/{path}") as request:
        action()
    return request.value


def body(request: Request) -> dict[str, Any]:
    assert request.post_data is not None
    decoded: dict[str, Any] = json.loads(request.post_data)
    return decoded


@pytest.mark.parametrize(
    "kept",
    [
        "{",
        "null",
        '{"mode":"foo"}',
        '{"mode":"toString"}',
        '{"turns":{}}',
        '{"turns":{"chat":[null],"completion":[]}}',
        '{"turns":{"chat":[],"completion":[{"ask":"a"}]}}',
        '{"former":{"completion":5}}',
        '{"settings":null}',
        '{"settings":{"system":5}}',
        '{"draft":7}',
    ],
)
def test_what_cannot_be_shown_is_forgotten(page: Page, kept: str) -> None:
    page.add_init_script(f"localStorage['bitnet-1'] = {json.dumps(kept)};")
    page.reload()
    ask(page, QUESTION, n_predict=2, temperature=0)
    finish(page)
    assert len(answers(page)) == 1
    complete(page)
    assert answers(page) == []


def streamed(server: Server, path: str, request: bytes) -> str:
    """The text of the answer that the server gives to the same request."""
    response, answer = server.request("POST", path, request)
    assert response.status == 200
    return text_of(answer)


def text_of(events: bytes) -> str:
    """The text in a stream of either route."""
    decoded = [json.loads(line[6:]) for line in events.splitlines() if line.startswith(b"data: {")]
    return "".join(
        event["content"]
        if "content" in event
        else "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        for event in decoded
    )


def test_an_answer_comes_piece_by_piece_until_it_is_stopped(page: Page, server: Server) -> None:
    ask(page, QUESTION, temperature=0)
    answer = page.locator(".answer")
    lengths: list[int] = []
    while len(lengths) < 3:
        page.wait_for_function(
            "length => document.querySelector('.answer').textContent.length > length", arg=max(lengths, default=0)
        )
        lengths.append(len(answer.text_content() or ""))
    assert server.in_flight() == 1
    page.get_by_role("button", name="Stop").click()
    finish(page)
    eventually(lambda: server.in_flight() == 0)
    assert '"stop_type":"cancelled"' in server.log()
    whole = answer.text_content() or ""
    assert whole.startswith("Yes, I am sure I am going to tell you")
    expect(page.locator(".figures")).to_have_text(
        re.compile(r"^≈ [\d,]+ tokens · ≈ [\d,.]+ tokens/s · first token [\d.]+ m?s · stopped$")
    )
    page.wait_for_timeout(200)
    assert answer.text_content() == whole


def test_a_conversation_and_its_figures(page: Page, server: Server) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("You tell tales.")
    first = body(asked(page, lambda: ask(page, QUESTION, temperature=0, n_predict=12)))
    expected = {
        "temperature": 0,
        "max_completion_tokens": 12,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    messages = [{"role": "system", "content": "You tell tales."}, {"role": "user", "content": QUESTION}]
    assert first == expected | {"messages": messages}
    finish(page)
    second = asked(page, lambda: ask(page, "And then?"))
    finish(page)
    told = answers(page)
    messages += [{"role": "assistant", "content": told[0]}, {"role": "user", "content": "And then?"}]
    assert body(second) == expected | {"messages": messages}
    assert second.post_data_buffer is not None
    assert told[1] == streamed(server, "/v1/chat/completions", second.post_data_buffer).strip()
    figures = page.locator(".figures").last.text_content() or ""
    time = "(first token|in one piece after)"
    pattern = rf"12 tokens · [\d,.]+ tokens/s · {time} [\d.]+ m?s · context \d+/32,768 · cut at the limit"
    assert re.fullmatch(pattern, figures)


def test_all_settings_are_sent(page: Page) -> None:
    complete(page)
    settings = {
        "temperature": 0.5,
        "n_predict": 5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 4294967295,
        "repeat_penalty": 1.1,
        "repeat_last_n": 32,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.5,
    }
    request = asked(page, lambda: ask(page, " Once", stop="Once\n\\n\\n\n\\\\n", **settings), "completion")
    assert body(request) == {"prompt": " Once", **settings, "stop": ["Once", "\n\n", "\\n"], "stream": True}
    response = request.response()
    assert response is not None
    assert response.status == 200
    finish(page)
    page.get_by_role("button", name="Back to the defaults").click()
    request = asked(page, lambda: ask(page, "Once"), "completion")
    assert body(request) == {"prompt": "Once", "stream": True}


def test_a_setting_that_cannot_be_is_shown_and_nothing_is_sent(page: Page) -> None:
    ask(page, QUESTION, top_p=7)
    expect(page.locator("#settings [name=top_p]")).to_be_focused()
    assert page.locator("article").count() == 0
    expect(page.get_by_role("textbox", name="Message")).to_have_value(QUESTION)


def test_a_completion_goes_on_where_it_ended(page: Page, server: Server) -> None:
    complete(page)
    ask(page, "Once upon a time", temperature=0, n_predict=12)
    finish(page)
    assert answers(page) == [TALE]
    page.get_by_role("button", name="Continue").click()
    finish(page)
    _, whole = server.post({"prompt": "Once upon a time", "temperature": 0, "n_predict": 24})
    assert page.locator(".ask").text_content() == "Once upon a time" + TALE
    assert answers(page) == [whole["content"].removeprefix(TALE)]


def test_retry_and_edit(page: Page) -> None:
    ask(page, QUESTION, temperature=0, n_predict=3)
    finish(page)
    short = answers(page)
    page.locator("#settings [name=n_predict]").fill("6")
    page.get_by_role("button", name="Retry").click()
    finish(page)
    (longer,) = answers(page)
    assert longer.startswith(short[0])
    assert longer != short[0]
    page.get_by_role("button", name="Edit").click()
    assert page.locator("article").count() == 0
    expect(page.get_by_role("textbox", name="Message")).to_have_value(QUESTION)


def test_an_answer_in_one_piece(page: Page, server: Server) -> None:
    """As a Function URL with BUFFERED gives it."""

    def buffer(route: Route) -> None:
        route.fulfill(response=route.fetch())

    page.route("**/v1/chat/completions", buffer)
    request = asked(page, lambda: ask(page, QUESTION, temperature=0, n_predict=40))
    finish(page)
    assert request.post_data_buffer is not None
    assert answers(page) == [streamed(server, "/v1/chat/completions", request.post_data_buffer)]
    expect(page.locator(".figures")).to_contain_text("40 tokens")
    expect(page.locator(".figures")).to_contain_text("in one piece after")


def test_reload_keeps_everything(page: Page, server: Server) -> None:
    ask(page, QUESTION, temperature=0, n_predict=8)
    finish(page)
    before, figures = answers(page), page.locator(".figures").all_text_contents()
    page.get_by_role("textbox", name="Message").fill("half a thou")
    page.reload()
    expect(page.locator(".figures")).to_have_text(figures)  # the context's size is asked for again
    assert answers(page) == before
    expect(page.get_by_role("textbox", name="Message")).to_have_value("half a thou")
    expect(page.locator("#settings [name=n_predict]")).to_have_value("8")
    ask(page, QUESTION, n_predict=30_000)
    page.wait_for_function("() => document.querySelectorAll('.answer')[1].textContent.length > 20")
    page.reload()  # in the middle of an answer
    eventually(lambda: server.in_flight() == 0)
    assert len(answers(page)[1]) > 20
    expect(page.locator(".figures").last).to_contain_text("stopped")


def test_begin_anew_and_bring_back(page: Page) -> None:
    ask(page, QUESTION, temperature=0, n_predict=8)
    finish(page)
    before = answers(page)
    page.get_by_role("button", name="New").click()
    assert answers(page) == []
    page.reload()
    page.get_by_role("button", name="Bring back what was here").click()
    assert answers(page) == before


def test_beginning_anew_ends_the_answer(page: Page, server: Server) -> None:
    ask(page, QUESTION, temperature=0)
    eventually(lambda: server.in_flight() == 1)
    page.get_by_role("button", name="New").click()
    finish(page)
    eventually(lambda: server.in_flight() == 0)
    assert page.locator("article").count() == 0


def test_two_tabs_show_one_conversation(context: BrowserContext, page: Page, server: Server) -> None:
    other = open_page(context, server, [])
    ask(page, QUESTION, temperature=0, n_predict=8)
    finish(page)
    expect(other.locator(".answer")).to_have_text(answers(page))


def test_what_does_not_fit_is_said_in_words(page: Page, complaints: list[str]) -> None:
    complete(page)
    ask(page, "x" * 20_001)
    expect(page.locator(".error")).to_have_text("'prompt' must have at most 20000 bytes of UTF-8, got 20001.")
    assert [complaint for complaint in complaints if "400 (Bad Request)" not in complaint] == []
    complaints.clear()


def test_a_context_that_is_full(tmp_path: Path, context: BrowserContext, engine_path: Path) -> None:
    with Server(tmp_path / "log", BITNET_CLI=engine_path) as server:
        page = open_page(context, server, [])
        ask(page, "the fox ran " * 100)
        expect(page.locator(".error")).to_have_text(
            re.compile(r"^The prompt has 3\d\d tokens and exceeds .* 256 tokens.*Begin a new chat, or ask for less\.$")
        )
        page.get_by_role("button", name="Edit").click()
        ask(page, QUESTION, temperature=0)
        finish(page)
        expect(page.locator(".figures")).to_contain_text("context 256/256 · cut at the limit")


def test_a_server_that_goes_and_comes_back(tmp_path: Path, context: BrowserContext, endless_model: Path) -> None:
    settings = {"MODEL_PATH": endless_model, "CTX_SIZE": CONTEXT}
    with Server(tmp_path / "first", **settings) as server:
        page = open_page(context, server, [])
        ask(page, QUESTION, temperature=0)
        page.wait_for_function("() => document.querySelector('.answer').textContent.length > 20")
        server.process.send_signal(signal.SIGKILL)
        error = page.locator(".error")
        expect(error).to_have_text("The connection broke before the end of the answer.")
        page.get_by_role("button", name="Retry").click()
        expect(error).to_have_text("The server does not answer. Is it running, and is this device online?")
    with Server(tmp_path / "second", PORT=server.port, **settings) as server:
        eventually(lambda: server.health()[0] == 200)
        page.locator("#settings [name=n_predict]").fill("5")
        page.get_by_role("button", name="Retry").click()
        expect(page.locator(".figures")).to_contain_text("5 tokens")
        expect(error).to_be_hidden()


def test_an_engine_that_ends_in_the_middle(page: Page, server: Server) -> None:
    ask(page, QUESTION, temperature=0)
    page.wait_for_function("() => document.querySelector('.answer').textContent.length > 20")
    os.kill(server.engine, signal.SIGKILL)
    expect(page.locator(".error")).to_contain_text("signal 9")
    first = asked(page, lambda: ask(page, "And then?", n_predict=3))
    assert [message["content"] for message in body(first)["messages"]] == ["And then?"]  # the broken turn is left out
    finish(page)
    expect(page.locator(".figures").last).to_contain_text("3 tokens")


@pytest.mark.parametrize("mode", ["chat", "completion"])
@pytest.mark.parametrize("language", ["curl", "Python"])
def test_the_code_makes_the_same_request(page: Page, tmp_path: Path, mode: str, language: str) -> None:
    words = 'It\'s "quoted" $HOME `date` \\n \\ é 🦊\nTell me.'
    if mode == "completion":
        complete(page)
    ask(page, words, temperature=0, n_predict=24, stop="zzz'\\n")
    finish(page)
    if mode == "chat":
        ask(page, "And then?")
        finish(page)
    answer = answers(page)[-1]
    assert answer
    code = code_of(page, language)
    if language == "curl":
        result = subprocess.run(["bash", "-c", code], capture_output=True, cwd=tmp_path, check=True)
        told = text_of(result.stdout)
    else:
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path, check=True)
        told = result.stdout.decode()
    assert told.strip() == answer.strip()


def code_of(page: Page, language: str) -> str:
    """The code of the last turn, as the button copies it."""
    page.get_by_role("button", name="Code", exact=True).last.click()
    page.get_by_text(language, exact=True).click()
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text }")
    page.get_by_role("dialog", name="The same request").get_by_role("button", name="Copy").click()
    copied: str = page.evaluate("window.copied")
    assert copied == page.locator("#snippet pre").text_content()
    page.keyboard.press("Escape")
    return copied


def test_the_code_of_what_is_not_sent_yet(page: Page) -> None:
    page.get_by_role("textbox", name="Message").fill("Not yet")
    page.get_by_role("button", name="Show as code").click()
    expect(page.locator("#snippet pre")).to_contain_text('"content": "Not yet"')


def test_an_api_key_is_sent_and_not_shown(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("API key").fill("secret-key")
    request = asked(page, lambda: ask(page, QUESTION, n_predict=3))
    assert request.headers["authorization"] == "Bearer secret-key"
    finish(page)
    for language, mention in (("curl", "Bearer $BITNET_API_KEY"), ("Python", 'os.environ["BITNET_API_KEY"]')):
        code = code_of(page, language)
        assert mention in code
        assert "secret-key" not in code
    page.reload()
    expect(page.get_by_label("API key")).to_have_value("secret-key")
    assert "secret-key" not in page.evaluate("JSON.stringify(localStorage)")


def test_an_api_key_is_asked_for(context: BrowserContext, server: Server) -> None:
    """With what a server that wants one answers."""
    error = {
        "message": "an API key is required",
        "type": "authentication_error",
        "code": "invalid_api_key",
        "param": None,
    }

    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer right":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": error})

    context.route(re.compile("/props$|/completions$"), guard)
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/")
    field = page.get_by_label("API key")
    expect(field).to_be_focused()
    expect(page.locator("#model")).to_have_text("an API key is needed")
    ask(page, QUESTION)
    expect(page.locator(".error")).to_have_text("An API key is required. Enter an API key in the settings.")
    field.fill("right")
    field.press("Enter")
    expect(page.locator("#model")).to_contain_text("context")
    page.locator("#settings [name=n_predict]").fill("3")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".figures")).to_contain_text("3 tokens")


def test_what_the_model_writes_is_text(page: Page) -> None:
    evil = "<img src=x onerror='window.hit=1'><script>window.hit=1</script> **bold** and `code`"
    evil += "\n```html\n<b>no</b>\n```\nend"
    turn = {"ask": evil, "system": "", "fields": {}, "answer": evil, "error": evil, "figures": {}}
    page.evaluate(
        "turn => { localStorage.setItem('bitnet-1', JSON.stringify({turns: {chat: [turn], completion: []}})) }", turn
    )
    page.evaluate("dispatchEvent(new StorageEvent('storage', {key: 'bitnet-1'}))")
    article = page.locator("article")
    assert article.locator("strong").all_text_contents() == ["bold"]
    assert article.locator("code").all_text_contents() == ["code", "<b>no</b>"]
    assert article.locator("img, script, b").count() == 0
    assert "<img src=x onerror='window.hit=1'>" in (article.locator(".answer").text_content() or "")
    assert page.evaluate("window.hit") is None


def test_the_policy_lets_nothing_in(context: BrowserContext, server: Server) -> None:
    """What a hole in the page could let in is put into it on its way; the policy is the server's."""
    evil = """<script>window.hit = "inline"</script><img src="data:," onerror="window.hit = 'handler'">
        <style>body { opacity: .5 }</style><p id="p" style="opacity: .5">p</p><script src="http://127.0.0.1:1/x.js"></script>"""

    def inject(route: Route) -> None:
        response = route.fetch()
        route.fulfill(
            response=response, body=response.text().replace("</body>", "").rstrip().removesuffix("</html>") + evil
        )

    complaints: list[str] = []
    context.route(f"http://127.0.0.1:{server.port}/", inject)
    page = open_page(context, server, complaints)
    page.wait_for_load_state("networkidle")
    assert page.evaluate("window.hit") is None
    assert page.evaluate(
        "[document.body, document.querySelector('#p')].map((node) => getComputedStyle(node).opacity)"
    ) == ["1", "1"]
    assert sum("Content Security Policy" in complaint for complaint in complaints) == 5
    reached = "fetch('http://127.0.0.1:1/').then(() => 'reached', (error) => error.name)"
    assert page.evaluate(reached) == "TypeError"
    assert any("connect-src" in complaint for complaint in complaints)
    for sink in ("document.body.innerHTML = '<b>x</b>'", "document.write('<b>x</b>')", "setTimeout('window.hit = 1')"):
        assert (
            page.evaluate(f"(() => {{ try {{ {sink}; return 'done' }} catch (error) {{ return error.name }} }})()")
            == "TypeError"
        )
    ask(page, QUESTION, n_predict=3)
    expect(page.locator(".figures")).to_contain_text("3 tokens")  # and the page itself still works


def test_the_keyboard_is_enough(page: Page, server: Server) -> None:
    message = page.get_by_role("textbox", name="Message")
    expect(message).to_be_focused()
    page.evaluate("localStorage.setItem('bitnet-1', JSON.stringify({settings: {temperature: '0'}}))")  # it never ends
    page.evaluate("dispatchEvent(new StorageEvent('storage', {key: 'bitnet-1'}))")
    page.keyboard.type("Tell me of a king.")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("And of a queen.")
    words = "Tell me of a king.\nAnd of a queen."
    expect(message).to_have_value(words)
    page.keyboard.press("Enter")
    expect(page.locator(".ask")).to_have_text(words)
    eventually(lambda: server.in_flight() == 1)
    page.keyboard.press("Escape")
    finish(page)
    eventually(lambda: server.in_flight() == 0)
    expect(message).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # Show as code
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Show as code")).to_be_focused()
    order = focus_order(page)
    assert order[:5] == ["mode", "new", "toggle", "retry", "edit"]
    assert order[-3:] == ["text", "code", "send"]


def focus_order(page: Page) -> list[str]:
    """Name or id of what Tab leads to, from the beginning to the end."""
    page.locator("h1").click()  # Tab goes on from there
    order: list[str] = []
    while len(order) < 30:
        page.keyboard.press("Tab")
        here: str = page.evaluate("document.activeElement.name || document.activeElement.id")
        order.append(here)
        if here == "send":
            break
    return order


def test_everything_that_takes_the_focus_has_a_name(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    ask(page, QUESTION, n_predict=3)
    finish(page)
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    focusable = [
        node
        for node in nodes
        if any(item["name"] == "focusable" and item["value"]["value"] for item in node.get("properties", []))
        and node["role"]["value"] not in ("RootWebArea", "generic", "dialog")
    ]
    assert len(focusable) > 20
    assert [node for node in focusable if not node.get("name", {}).get("value")] == []


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_scrolls_down_only(context: BrowserContext, server: Server, width: int) -> None:
    complaints: list[str] = []
    page = open_page(context, server, complaints)
    page.set_viewport_size({"width": width, "height": 700})
    ask(page, "long" * 200, n_predict=40, temperature=0)
    finish(page)
    assert too_wide(page) == []
    complete(page)
    ask(page, "word " * 100)
    finish(page)
    assert too_wide(page) == []
    page.get_by_role("button", name="Settings").click()
    assert too_wide(page) == []
    page.get_by_role("button", name="Close the settings").click()
    page.get_by_role("button", name="Code", exact=True).click()
    assert too_wide(page) == []
    assert complaints == []


def too_wide(page: Page) -> list[str]:
    """What reaches over the right edge, less what scrolls by itself."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter((node) => {
            const { right, width } = node.getBoundingClientRect();
            return width > 1 && right > innerWidth + 0.5 && !node.closest("pre");
        }).map((node) => node.outerHTML.slice(0, 80)).concat(
            document.documentElement.scrollWidth > innerWidth ? ["the document"] : [])"""
    )
    return found


def test_dark_and_light(context: BrowserContext, page: Page) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="light")
    light = page.evaluate(paper)
    page.emulate_media(color_scheme="dark")
    assert (light, page.evaluate(paper)) == ("rgb(250, 249, 246)", "rgb(19, 22, 23)")
    assert context.pages == [page]


def test_a_reader_who_scrolled_up_is_left_there(page: Page) -> None:
    page.set_viewport_size({"width": 800, "height": 400})
    ask(page, QUESTION, temperature=0)
    page.wait_for_function("() => document.querySelector('#scroller').scrollTop > 200")  # it follows
    page.evaluate("document.querySelector('#scroller').scrollTop = 0")
    latest = page.get_by_role("button", name="Go to the end")
    latest.wait_for()
    length = len(answers(page)[0])
    page.wait_for_function("length => document.querySelector('.answer').textContent.length > length + 100", arg=length)
    assert page.evaluate("document.querySelector('#scroller').scrollTop") == 0
    latest.click()
    expect(latest).to_be_hidden()
    page.keyboard.press("Escape")
    finish(page)
