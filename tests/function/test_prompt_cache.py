"""KV of named prompts that outlives the engine: in files and in S3."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from function.api import Api, Call
from function.engine import Engine
from function.model_store import ModelStore
from function.settings import Settings
from tests.events import url_event
from tests.processes import eventually
from tests.s3 import BUCKET, S3, Answer, Request

pytestmark = pytest.mark.usefixtures("engine_path")

SYSTEM = "There was once a king who had a golden tree in his garden, and on the tree were golden apples. " * 8
KEY = "xylophonist"
REQUEST = {"prompt": SYSTEM + "What then?", "n_predict": 8, "temperature": 0}
NAMED = REQUEST | {"prompt_cache_key": KEY}
Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def settings(tmp_path: Path, endless_model: Path) -> Settings:
    return replace(Settings(), model_path=endless_model, ctx_size=1024, prompt_cache_dir=tmp_path / "prompts")


@contextmanager
def environment(settings: Settings) -> Iterator[Ask]:
    """An execution environment of its own, whose engine has computed nothing yet."""
    engine = Engine(settings, ModelStore(settings))
    api = Api(settings, engine)

    def ask(request: dict[str, Any], time_s: float | None = None) -> dict[str, Any]:
        call = Call("1", None if time_s is None else time.monotonic() + time_s)
        reply = api.http(url_event(request), call)
        assert isinstance(reply["body"], str)
        assert reply["statusCode"] == 200, reply["body"]
        body: dict[str, Any] = json.loads(reply["body"])
        return body | {"cache_file": call.record.get("cache_file")}

    try:
        yield ask
    finally:
        engine.stop()


def files(settings: Settings) -> list[Path]:
    assert settings.prompt_cache_dir is not None
    return sorted(settings.prompt_cache_dir.iterdir())


def objects(s3: S3) -> list[str]:
    return [entry["Key"] for entry in s3.client().list_objects_v2(Bucket=BUCKET).get("Contents", [])]


def test_another_environment_begins_where_the_prompt_ended(settings: Settings) -> None:
    with environment(settings) as ask:
        first = ask(NAMED)
        assert (first["cache_file"], first["tokens_cached"]) == ("saved", 0)
    with environment(settings) as ask:
        second = ask(NAMED)
        assert (second["cache_file"], second["content"]) == ("restored", first["content"])
        assert second["tokens_cached"] == second["tokens_evaluated"] - 1
    with environment(settings) as ask:
        other = ask(NAMED | {"prompt": SYSTEM + "And who came?"})
        assert other["cache_file"] == "restored"
        assert 100 < other["tokens_cached"] < second["tokens_cached"]
        with environment(settings) as fresh:
            plain = fresh(REQUEST | {"prompt": SYSTEM + "And who came?"})
        assert (plain["content"], plain["tokens_cached"], plain["cache_file"]) == (other["content"], 0, None)


def test_a_stream_and_a_chat_are_kept_too(settings: Settings) -> None:
    chat = {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Why?"}], "max_tokens": 4}
    for expected in ("saved", "restored"):
        engine = Engine(settings, ModelStore(settings))
        try:
            call = Call("1")
            event = url_event(chat | {"prompt_cache_key": KEY, "stream": True}, path="/v1/chat/completions")
            text = "".join(Api(settings, engine).http(event, call)["body"])
            assert text.endswith("data: [DONE]\n\n")
            assert call.record["cache_file"] == expected
        finally:
            engine.stop()


def test_who_does_not_name_it_or_wants_no_cache_leaves_nothing(settings: Settings, tmp_path: Path) -> None:
    with environment(settings) as ask:
        ask(REQUEST)
        ask(NAMED | {"cache_prompt": False})
    assert not (tmp_path / "prompts").exists()
    with environment(replace(settings, prompt_cache_dir=None)) as ask:
        assert ask(NAMED)["cache_file"] is None


def test_s3_keeps_it_for_environments_elsewhere(settings: Settings, s3: S3, tmp_path: Path) -> None:
    here = replace(settings, prompt_cache_s3_uri=f"s3://{BUCKET}/prompts/")
    with environment(here) as ask:
        first = ask(NAMED)
        (key,) = objects(s3)
        assert key.startswith("prompts/")
        assert KEY not in key
    elsewhere = replace(here, prompt_cache_dir=tmp_path / "elsewhere")
    with environment(elsewhere) as ask:
        second = ask(NAMED)
        assert (second["cache_file"], second["content"]) == ("restored", first["content"])
        before = len(s3.requests)
        ask(NAMED | {"prompt": SYSTEM + "And then?"})
        assert len(s3.requests) == before  # the file is here
    assert [path.suffix for path in files(elsewhere)] == [".kv"]


@pytest.mark.parametrize("spoil", ["first byte", "last byte", "cut", "empty"])
def test_a_damaged_file_costs_nothing_but_its_use(settings: Settings, spoil: str) -> None:
    with environment(settings) as ask:
        first = ask(NAMED)
    (path,) = files(settings)
    data = path.read_bytes()
    spoilt = {
        "first byte": bytes([data[0] ^ 1]) + data[1:],
        "last byte": data[:-1] + bytes([data[-1] ^ 1]),
        "cut": data[:-100],
        "empty": b"",
    }[spoil]
    path.write_bytes(spoilt)
    with environment(settings) as ask:
        body = ask(NAMED)
        assert (body["cache_file"], body["tokens_cached"]) == ("invalid", 0)
        assert body["content"] == first["content"]
        ask(NAMED | {"prompt": "B" + SYSTEM})
    with environment(settings) as ask:
        assert "restored" in ask(NAMED | {"prompt": "B" + SYSTEM})["cache_file"]


@pytest.mark.parametrize("size", [0, -1])
def test_a_damaged_object_is_replaced_though_the_prompt_stays_the_same(
    settings: Settings, s3: S3, tmp_path: Path, size: int
) -> None:
    settings = replace(settings, prompt_cache_s3_uri=f"s3://{BUCKET}/prompts")
    with environment(settings) as ask:
        ask(NAMED)
    (name,) = objects(s3)
    data = files(settings)[0].read_bytes()
    s3.client().put_object(Bucket=BUCKET, Key=name, Body=data[:size])
    elsewhere = replace(settings, prompt_cache_dir=tmp_path / "elsewhere")
    with environment(elsewhere) as ask:
        assert ask(NAMED)["cache_file"] == "invalid"
        assert ask(NAMED)["cache_file"] == "saved"
    with environment(replace(settings, prompt_cache_dir=tmp_path / "anywhere")) as ask:
        assert ask(NAMED)["cache_file"] == "restored"


def test_the_file_of_another_type_of_cache_is_another_one(settings: Settings) -> None:
    with environment(settings) as ask:
        ask(NAMED)
    with environment(replace(settings, kv_type="f32")) as ask:
        assert ask(NAMED)["cache_file"] == "saved"
    assert len(files(settings)) == 2


def test_a_key_whose_file_no_longer_helps_is_written_again(settings: Settings) -> None:
    with environment(settings) as ask:
        ask(NAMED)
    other = NAMED | {"prompt": "Another " + SYSTEM}
    with environment(settings) as ask:
        assert ask(other)["tokens_cached"] <= 1  # the first token of every prompt
        assert ask(other)["cache_file"] == "saved"
    with environment(settings) as ask:
        body = ask(other)
        assert (body["cache_file"], body["tokens_cached"]) == ("restored", body["tokens_evaluated"] - 1)


def no_permission(_: Request, answer: Answer) -> None:
    answer.status, answer.body = 403, b""


def broken(_: Request, answer: Answer) -> None:
    answer.status, answer.body = 500, b""


@pytest.mark.parametrize("fault", [no_permission, broken])
def test_an_s3_that_fails_costs_no_request(
    settings: Settings, s3: S3, fault: Any, caplog: pytest.LogCaptureFixture
) -> None:
    s3.fault = fault
    with environment(replace(settings, prompt_cache_s3_uri=f"s3://{BUCKET}/prompts")) as ask, caplog.at_level("DEBUG"):
        assert ask(NAMED)["cache_file"] == "saved"
        asked = len(s3.requests)
        ask(NAMED | {"prompt_cache_key": "other"})
        assert len(s3.requests) == asked  # left alone for a while
    assert "a prompt's cache cannot be copied to S3" in caplog.messages or fault is broken
    assert all(KEY not in str(vars(record)) and "golden" not in str(vars(record)) for record in caplog.records)


@pytest.mark.parametrize(("method", "says"), [("HEAD", "from"), ("PUT", "to")])
def test_an_s3_that_does_not_answer_costs_no_answer(
    settings: Settings, s3: S3, method: str, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = threading.Event()

    def wait(request: Request) -> None:
        assert request.method != method or go_on.wait(60)

    s3.before = wait
    with environment(replace(settings, prompt_cache_s3_uri=f"s3://{BUCKET}/prompts")) as ask, caplog.at_level("INFO"):
        ask(REQUEST)  # loads the model
        assert ask(NAMED, time_s=4)["cache_file"] == "saved"
        (failure,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert (failure.message, vars(failure)["error_type"]) == (
            f"a prompt's cache cannot be copied {says} S3",
            "TimeoutError",  # ours: the request had no time left to wait
        )
        go_on.set()
        eventually(lambda: not [thread for thread in threading.enumerate() if thread.name == "prompt-cache"])
    assert len(objects(s3)) == (method == "PUT")  # it was not waited for, but not ended either


def test_a_folder_that_cannot_be_used_costs_no_request(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with environment(replace(settings, prompt_cache_dir=tmp_path / "file" / "prompts")) as ask:
        body = ask(NAMED)
        assert (body["cache_file"], body["tokens_predicted"]) == (None, 8)


def test_what_a_killed_process_left_goes(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    unfinished = [folder / ("0" * 64 + end) for end in (".140.part.9DA8cc11", ".140.part", ".kv.7.tmp")]
    others = [folder / "notes.tmp", folder / ("0" * 64 + ".kv"), folder / ("1" * 64 + ".kv.7.tmp")]
    for path in unfinished + others:
        path.touch()
    for path in unfinished + others[:-1]:  # the last is being written
        os.utime(path, (time.time() - 3600, time.time() - 3600))
    with environment(settings) as ask:
        assert ask(NAMED)["cache_file"] == "saved"
    assert set(others) < set(files(settings))
    assert not set(unfinished) & set(files(settings))


def test_the_files_used_least_recently_go(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    with environment(settings) as ask:
        ask(NAMED)
        (first,) = files(settings)
    size = first.stat().st_size
    with environment(replace(settings, prompt_cache_bytes=size * 5 // 2)) as ask, caplog.at_level(logging.WARNING):
        ask(NAMED | {"prompt_cache_key": "second"})
        os.utime(first, (time.time() + 5, time.time() + 5))  # used since
        ask(NAMED | {"prompt_cache_key": "third"})
    assert len(files(settings)) == 2
    assert first in files(settings)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
