"""The local server, as a process of its own, over real HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.processes import alive, eventually, processor_ticks
from tests.s3 import S3, Request
from tests.server import Server

pytestmark = pytest.mark.usefixtures("engine_path")

TALE = {"prompt": "Once upon a time", "n_predict": 12, "temperature": 0}
TEXT = " there lived a king who had a son who had three sons"
ENDLESS = {"prompt": "Once upon a time", "n_predict": -1, "ignore_eos": True}
CANARY = "xylophonist"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "server.log"


@pytest.fixture
def server(log: Path) -> Iterator[Server]:
    with Server(log) as server:
        eventually(lambda: server.health()[0] == 200)
        yield server


@pytest.fixture
def endless(log: Path, endless_model: Path) -> Iterator[Server]:
    """A server whose completions can take a minute."""
    with Server(log, MODEL_PATH=endless_model, CTX_SIZE=32_768, PARALLEL=1, QUEUE_LIMIT=1) as server:
        eventually(lambda: server.health()[0] == 200)
        yield server


def test_an_answer_in_json(server: Server) -> None:
    status, body = server.post(TALE)
    assert (status, body["content"], body["stop_type"]) == (200, TEXT, "limit")


def test_curl_needs_no_headers(server: Server) -> None:
    command = ["curl", "--silent", "--fail", "-X", "POST", f"http://127.0.0.1:{server.port}/completion"]
    result = subprocess.run([*command, "-d", json.dumps(TALE)], capture_output=True, check=True)
    assert json.loads(result.stdout)["content"] == TEXT


def test_a_stream_token_by_token(endless: Server) -> None:
    with endless.stream(ENDLESS) as events:
        assert [next(events)["stop"] for _ in range(3)] == [False] * 3
        assert endless.health() == (200, {"status": "ok", "model": "ready"})
        assert next(events)["stop"] is False
    with endless.stream(TALE) as events:
        *tokens, last = events
        assert "".join(token["content"] for token in tokens) == TEXT
        assert len(tokens) == 12
        assert (last["stop"], last["content"], last["tokens_predicted"]) == (True, "", 12)


def test_who_hangs_up_on_a_stream_cancels_it(endless: Server) -> None:
    with endless.stream(ENDLESS) as events:
        next(events)
    assert endless.post(TALE)[1]["content"] == TEXT
    eventually(lambda: '"stop_type":"cancelled"' in endless.log())


def test_who_hangs_up_on_an_answer_cancels_it(endless: Server) -> None:
    connection = endless.connect()
    connection.request("POST", "/completion", json.dumps(ENDLESS))
    eventually(lambda: processor_ticks(endless.engine) > 20)  # it computes
    connection.close()
    assert endless.post(TALE)[1]["content"] == TEXT
    eventually(lambda: '"stop_type":"cancelled"' in endless.log())


def test_who_hangs_up_in_the_queue_leaves_it(endless: Server) -> None:
    with endless.stream(ENDLESS) as events:
        next(events)
        waiting = endless.connect()
        waiting.request("POST", "/completion", json.dumps(TALE))
        eventually(lambda: endless.in_flight() == 2)
        waiting.close()
        for _ in range(2000):  # tokens of the one that runs
            next(events)
        assert '"stop_type":"cancelled"' in endless.log()
    assert endless.post(TALE)[0] == 200


@contextmanager
def stalled(server: Server) -> Iterator[None]:
    """A client that reads nothing of a stream whose events fill all buffers."""
    body = json.dumps(ENDLESS | {"stream": True, "n_probs": 100})
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(
            f"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        eventually(lambda: server.in_flight() == 1)
        yield


class Impatient(Server):
    python = ("-c", "from function import local; local.UNREAD_MS = 500; local.main()")


def test_who_does_not_read_is_given_up(log: Path, endless_model: Path) -> None:
    with Impatient(log, MODEL_PATH=endless_model, CTX_SIZE=32_768) as server, stalled(server):
        eventually(lambda: '"stop_type":"cancelled"' in server.log())
        assert server.in_flight() == 0


def test_a_signal_while_somebody_does_not_read(endless: Server) -> None:
    with stalled(endless):
        eventually(lambda: processor_ticks(endless.engine) > 200)  # megabytes of events
        assert endless.end(signal.SIGTERM) == 0
    assert "shutdown exceeded" in endless.log()
    assert "Traceback" not in endless.log()


def test_a_signal_while_the_engine_stands_still(server: Server) -> None:
    """Its pipe is full, so nobody can tell it anything."""
    os.kill(server.engine, signal.SIGSTOP)
    long = json.dumps({"prompt": "word " * 20_000}).encode()
    with ThreadPoolExecutor(3) as clients:
        asked = [clients.submit(server.request, "POST", "/completion", long) for _ in range(3)]
        eventually(lambda: server.in_flight() == 3)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert all(answer.exception() or answer.result()[0].status >= 500 for answer in asked)
    assert "Traceback" not in server.log()


def test_a_request_that_breaks_off_is_forgotten(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b'POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"prompt":"a"}')
    assert server.post(TALE)[0] == 200
    assert server.log().count('"route":"/completion"') == 1


def test_the_queue_has_a_limit(endless: Server) -> None:
    with endless.stream(ENDLESS) as events, ThreadPoolExecutor(1) as thread:
        next(events)
        waiting = thread.submit(endless.post, TALE)
        eventually(lambda: endless.in_flight() == 2)
        response, body = endless.request("POST", "/completion", b'{"prompt":""}')
        assert response.status == 503
        assert response.getheader("retry-after") == "1"
        assert json.loads(body)["error"]["code"] == "overloaded"
        assert not waiting.done()
        assert endless.health()[0] == 200
        endless.process.send_signal(signal.SIGTERM)
        assert waiting.result()[1]["stop_type"] == "cancelled"


def test_many_clients_are_served_at_the_same_time(log: Path) -> None:
    with Server(log, QUEUE_LIMIT=16) as server, ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(server.post, [TALE | {"seed": n} for n in range(32)]))
    assert {(status, body["content"]) for status, body in answers} == {(200, TEXT)}
    assert sorted(body["generation_settings"]["seed"] for _, body in answers) == list(range(32))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(server: Server, number: signal.Signals) -> None:
    server.post(TALE)
    engine = server.engine
    assert server.end(number) == 0
    assert not alive(engine)
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_cancels_what_runs_and_answers_with_what_there_is(endless: Server, number: signal.Signals) -> None:
    engine = endless.engine
    with endless.stream(ENDLESS) as events, ThreadPoolExecutor(1) as thread:
        next(events)
        waiting = thread.submit(endless.post, ENDLESS)
        eventually(lambda: endless.in_flight() == 2)
        endless.process.send_signal(number)
        *_, last = events
        assert last["stop_type"] == "cancelled"
        assert waiting.result()[1]["stop_type"] == "cancelled"
    assert endless.process.wait(60) == 0
    assert not alive(engine)
    assert "Traceback" not in endless.log()


@dataclass
class Copy:
    """Of a model from S3, which waits until it may go on."""

    settings: dict[str, object]
    begun: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def copy(s3: S3, demo_model: Path, tmp_path: Path) -> Copy:
    copy = Copy({"MODEL_S3_URI": s3.put("m.gguf", demo_model.read_bytes()), "MODEL_CACHE_DIR": tmp_path / "cache"})

    def wait(_: Request) -> None:
        copy.begun.set()
        assert copy.go_on.wait(60)

    s3.before = wait
    return copy


def test_health_is_503_until_the_model_is_loaded(copy: Copy, log: Path) -> None:
    with Server(log, **copy.settings) as server, ThreadPoolExecutor(1) as thread:
        status, body = server.health()
        assert (status, body["error"]["code"]) == (503, "model_loading")
        early = thread.submit(server.post, TALE)
        copy.go_on.set()
        assert early.result()[1]["content"] == TEXT  # it has waited
        assert server.health() == (200, {"status": "ok", "model": "ready"})


def test_the_queue_for_the_model_has_a_limit(copy: Copy, log: Path) -> None:
    requests = {
        "/completion": TALE,
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
        "/tokenize": {"content": "a"},
    }
    with Server(log, **copy.settings, QUEUE_LIMIT=1) as server, ThreadPoolExecutor(6) as threads:
        asked = [
            threads.submit(server.request, "POST", path, json.dumps(request).encode())
            for path, request in requests.items()
            for _ in range(2)
        ]
        eventually(lambda: sum(answer.done() for answer in asked) == 4)
        refused = [answer.result()[1] for answer in asked if answer.done()]
        assert {json.loads(body)["error"]["code"] for body in refused} == {"overloaded"}
        assert server.health()[0] == 503
        copy.go_on.set()
        assert sorted(answer.result()[0].status for answer in asked) == [200] * 2 + [503] * 4


def test_who_hangs_up_while_the_model_is_loaded_leaves_the_queue(copy: Copy, log: Path) -> None:
    with Server(log, **copy.settings, QUEUE_LIMIT=1) as server, ThreadPoolExecutor(1) as thread:
        assert copy.begun.wait(60)
        gone = [server.connect() for _ in range(2)]
        for connection in gone:
            connection.request("POST", "/completion", json.dumps(TALE))
        eventually(lambda: server.in_flight() == 2)
        for connection in gone:
            connection.close()
        eventually(lambda: server.in_flight() == 0)
        early = thread.submit(server.post, TALE)
        eventually(lambda: server.in_flight() == 1)
        copy.go_on.set()
        assert early.result()[1]["content"] == TEXT


def test_a_signal_while_the_model_is_loaded(copy: Copy, log: Path) -> None:
    with Server(log, **copy.settings) as server, ThreadPoolExecutor(1) as thread:
        early = thread.submit(server.post, TALE)
        assert copy.begun.wait(60)
        server.process.send_signal(signal.SIGTERM)
        status, body = early.result()
        assert (status, body["error"]["code"]) == (503, "stopping")
        assert server.process.wait(60) == 0
        copy.go_on.set()


@pytest.mark.parametrize(
    ("settings", "code", "says"),
    [
        ({"MODEL_PATH": "/nowhere/m.gguf"}, 1, "/nowhere/m.gguf"),
        ({"BITNET_CLI": "/nowhere/bitnet"}, 1, "cannot run /nowhere/bitnet"),
        ({"CTX_SIZE": "1000000"}, 1, "256"),
        ({"CTX_SIZE": "big"}, 2, "'CTX_SIZE' must be an integer, got \"big\""),
        ({"PORT": "123456"}, 2, "'PORT' must be from 0 to 65535, got 123456"),
        ({"HOST": "192.0.2.1"}, 1, "cannot listen on 192.0.2.1, port 0 (HOST, PORT): Cannot assign"),
    ],
)
def test_what_cannot_work_ends_with_one_line(log: Path, settings: dict[str, str], code: int, says: str) -> None:
    with Server(log, **settings) as server:
        assert server.process.wait(60) == code
        last = server.log().splitlines()[-1]
        assert last.startswith("bitnet: ")
        assert says in last


def test_a_port_that_is_taken(log: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Server(log, PORT=port) as server:
            assert server.process.wait(60) == 1
            expected = f"bitnet: cannot listen on 127.0.0.1, port {port} (HOST, PORT): Address already in use"
            assert server.log().startswith(expected)
            assert server.log().count("\n") == 1


def test_a_body_that_lambda_would_not_take(server: Server) -> None:
    for size in (6 * 2**20 + 1, 100 * 2**20):
        response, body = server.request("POST", "/completion", b" " * size)
        assert (response.status, json.loads(body)["error"]["code"]) == (413, "too_long")
        assert json.loads(body)["error"]["message"] == f"the body must have at most 6291456 bytes, got {size}"
        assert f'"request_id":"{response.getheader("x-request-id")}","status":413' in server.log()
    response, body = server.request("POST", "/completion", b" " * (6 * 2**20))
    assert (response.status, json.loads(body)["error"]["message"]) == (
        400,
        "the body is empty: a JSON object is expected",
    )


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/completion", 405),
        ("PUT", "/completion", 405),
        ("POST", "/health", 405),
        ("GET", "/", 200),
        ("POST", "/", 405),
        ("POST", "/v1/models/x", 405),
        ("POST", "/openapi-json", 404),
        ("HEAD", "/completion", 405),
        ("HEAD", "/nowhere", 404),
        ("GET", "/%ff%00", 404),
        ("GET", "/v1/models/a%22%3F%23%5C%60%0A%ff/b", 404),
        ("GET", "/v1/models/bitnet%2Dfairy%2Dtales", 200),
        ("GET", "/health?x=1", 200),
        ("PROPFIND", "/x", 404),
    ],
)
def test_routes(server: Server, method: str, path: str, status: int) -> None:
    assert server.request(method, path)[0].status == status


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/"])
def test_head_is_get_without_the_body(server: Server, path: str) -> None:
    (head, nothing), (get, body) = server.request("HEAD", path), server.request("GET", path)
    assert (head.status, nothing, head.getheader("content-length")) == (get.status, b"", str(len(body)))


def test_what_is_no_http_is_refused(server: Server) -> None:
    for junk in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET /health HTTP/9.9\r\n\r\n", b"POST /completion\r\n" * 3):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(junk + b"\r\n\r\n")
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1000).startswith((b"HTTP/1.1 400", b""))
    assert server.post(TALE)[0] == 200


def test_a_connection_serves_several_requests(server: Server) -> None:
    with closing(server.connect()) as connection:
        for _ in range(3):
            connection.request("POST", "/completion", json.dumps(TALE))
            assert json.loads(connection.getresponse().read())["content"] == TEXT


def test_an_engine_that_was_killed_is_replaced(server: Server) -> None:
    engine = server.engine
    os.kill(engine, signal.SIGKILL)
    assert server.post(TALE)[1]["content"] == TEXT
    assert server.engine != engine


def test_no_text_reaches_the_log(log: Path) -> None:
    with Server(log, LOG_LEVEL="DEBUG") as server:
        for request in (
            {"prompt": f"{CANARY} {CANARY}", "n_predict": 20, "stop": [CANARY]},
            {"prompt": CANARY * 1000},
            {"prompt": CANARY, CANARY: CANARY},
            {"prompt": [CANARY], "n_predict": CANARY},
            CANARY,
        ):
            server.post(request)
        server.request("POST", "/completion", f'{{"prompt": "{CANARY}'.encode())
        server.request("POST", "/completion", f'{{"{CANARY}": 1, "{CANARY}": 1}}'.encode())
        server.request("GET", f"/{CANARY}?{CANARY}", headers={CANARY: CANARY})
        server.request(CANARY.upper(), "/")
        os.kill(server.engine, signal.SIGKILL)
        assert server.post(TALE)[1]["content"] == TEXT
        with server.stream(TALE) as events:
            assert len(list(events)) == 13
        assert server.end(signal.SIGTERM) == 0
        assert '"message":"worker ended"' in server.log()
        assert CANARY not in server.log().lower()
        assert "lived" not in server.log()
        assert "Once" not in server.log()
