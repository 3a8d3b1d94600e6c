"""Requests as llama.cpp's users write them, from the documentation of its server.

https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from tests.processes import eventually
from tests.server import Server

pytestmark = pytest.mark.usefixtures("engine_path")

BOS = 4093
TALE: dict[str, Any] = {"prompt": "Once upon a time", "n_predict": 4, "temperature": 0}
TEXT = " there lived a king"
THERE, KING = 446, 594


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server") / "log") as server:
        eventually(lambda: server.health()[0] == 200)
        yield server


def ask(server: Server, request: dict[str, Any], path: str = "/completion") -> Any:
    response, body = server.request("POST", path, json.dumps(request).encode())
    assert response.status == 200, body
    return json.loads(body)


def test_the_first_example(server: Server) -> None:
    request = {"prompt": "Building a website can be done in 10 simple steps:", "n_predict": 128}
    body = ask(server, request)
    assert body["stop"] is True
    assert body["stop_type"] in ("eos", "limit")
    assert body["content"] or body["stop_type"] == "eos"  # the demo model may have nothing to say about websites
    assert body["tokens"] == []
    assert body["tokens_predicted"] == body["timings"]["predicted_n"]
    assert body["generation_settings"].keys() >= {
        "n_predict",
        "temperature",
        "samplers",
        "dry_base",
        "mirostat",
        "seed",
    }


def test_tokens_and_texts_as_a_prompt(server: Server) -> None:
    text = ask(server, TALE | {"return_tokens": True})
    assert text["content"] == TEXT
    whole = ask(server, {"content": "Once upon a time", "add_special": True}, "/tokenize")["tokens"]
    assert whole[0] == BOS
    once = ask(server, {"content": "Once"}, "/tokenize")["tokens"]
    for prompt in (
        whole,
        [BOS, "Once", *whole[1 + len(once) :]],
        ["Once", *whole[1 + len(once) :]],  # begins with a text: gets a BOS
        {"prompt_string": "Once upon a time"},
    ):
        body = ask(server, TALE | {"prompt": prompt, "return_tokens": True})
        assert (body["content"], body["tokens"]) == (TEXT, text["tokens"])
        assert body["tokens_evaluated"] == len(whole)


def test_several_prompts(server: Server) -> None:
    prompts = ["Once upon a time", [BOS, KING], [BOS, "A ", KING], {"prompt_string": "There"}]
    bodies = ask(server, TALE | {"prompt": prompts, "return_tokens": True})
    assert [body["index"] for body in bodies] == [0, 1, 2, 3]
    assert bodies[0]["content"] == TEXT
    alone = [ask(server, TALE | {"prompt": prompt, "return_tokens": True}) for prompt in prompts]
    assert [body["tokens"] for body in bodies] == [body["tokens"] for body in alone]
    several = ask(server, TALE | {"prompt": prompts[:2], "n_cmpl": 2})
    assert [body["index"] for body in several] == [0, 1, 2, 3]
    assert several[0]["content"] == several[1]["content"] == TEXT  # temperature 0
    assert ask(server, TALE | {"prompt": ["Once upon a time"]})["content"] == TEXT


def test_several_prompts_in_a_stream(server: Server) -> None:
    prompts = ["Once upon a time", "The king"]
    whole = ask(server, TALE | {"prompt": prompts})
    texts, ends = ["", ""], [0, 0]
    with server.stream(TALE | {"prompt": prompts}) as events:
        for event in events:
            texts[event["index"]] += event["content"]
            ends[event["index"]] += event["stop"]
    assert texts == [body["content"] for body in whole]
    assert ends == [1, 1]


def test_probabilities(server: Server) -> None:
    body = ask(server, TALE | {"n_probs": 3})
    tokens = body["completion_probabilities"]
    assert "".join(token["token"] for token in tokens) == TEXT
    for token in tokens:
        assert token.keys() == {"id", "token", "bytes", "logprob", "top_logprobs"}
        assert bytes(token["bytes"]).decode() == token["token"]
        best = token["top_logprobs"][0]
        assert {name: best[name] for name in ("id", "token", "bytes", "logprob")} == {
            name: token[name] for name in ("id", "token", "bytes", "logprob")
        }
        logprobs = [top["logprob"] for top in token["top_logprobs"]]
        assert len(logprobs) == 3
        assert logprobs == sorted(logprobs, reverse=True)
        assert sum(map(math.exp, logprobs)) <= 1.0001
    with server.stream(TALE | {"n_probs": 3}) as events:
        streamed = [token for event in events for token in event.get("completion_probabilities", [])]
    assert streamed == tokens
    assert "completion_probabilities" not in ask(server, TALE)


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ("lived a k", [" there", " lived"]),
        ("ived", [" there", " lived"]),
        ("e l", [" there"]),
        (" there", []),
        ("queen", [" there", " lived", " a", " king"]),
    ],
)
def test_probabilities_end_where_the_text_does(server: Server, stop: str, shown: list[str]) -> None:
    request = TALE | {"stop": [stop], "n_probs": 1}
    whole = ask(server, request)
    _, body = server.request("POST", "/completion", json.dumps(request | {"stream": True}).encode())
    pieces = [json.loads(line.removeprefix("data: ")) for line in body.decode().split("\n\n") if line]
    streamed = [token for piece in pieces for token in piece.get("completion_probabilities", [])]
    assert streamed == whole.get("completion_probabilities", [])
    assert [token["token"] for token in streamed] == shown
    request = {"prompt": TALE["prompt"], "max_tokens": 4, "temperature": 0, "stop": [stop], "logprobs": 0}
    (choice,) = ask(server, request, "/v1/completions")["choices"]
    assert choice["logprobs"]["tokens"] == shown


def test_probabilities_after_the_samplers(server: Server) -> None:
    body = ask(server, TALE | {"temperature": 1, "top_k": 2, "seed": 1, "n_probs": 3, "post_sampling_probs": True})
    for token in body["completion_probabilities"]:
        assert token.keys() == {"id", "token", "bytes", "prob", "top_probs"}
        assert len(token["top_probs"]) <= 2  # top_k
        assert sum(top["prob"] for top in token["top_probs"]) == pytest.approx(1, abs=1e-4)
        assert token["prob"] in [top["prob"] for top in token["top_probs"]]


@pytest.mark.parametrize("bias", [[[KING, 100]], [[" king", 100.0]], {str(KING): 100}, {" king": 100}])
def test_a_bias_for_a_token(server: Server, bias: Any) -> None:
    assert ask(server, TALE | {"logit_bias": bias})["content"] == " king king king king"


@pytest.mark.parametrize("bias", [[[THERE, False]], [[" there", False]], {str(THERE): False}, [[THERE, -100]]])
def test_a_bias_against_a_token(server: Server, bias: Any) -> None:
    assert THERE not in ask(server, TALE | {"logit_bias": bias, "return_tokens": True})["tokens"]


SAMPLED = TALE | {"n_predict": 40, "temperature": 1.5, "seed": 4}


@pytest.mark.parametrize(
    "fields",
    [
        {"dynatemp_range": 1.4},
        {"typical_p": 0.2},
        {"top_n_sigma": 0.5},
        {"xtc_probability": 1, "xtc_threshold": 0.01},
        {"dry_multiplier": 5, "dry_allowed_length": 1, "temperature": 0.1},
        {"mirostat": 1, "mirostat_tau": 1},
        {"mirostat": 2, "mirostat_tau": 1},
        {"samplers": ["top_k"], "top_k": 1},
        {"repeat_penalty": 2.0},
        {"min_p": 0.5},
    ],
)
def test_samplers_change_what_is_drawn(server: Server, fields: dict[str, Any]) -> None:
    body = ask(server, SAMPLED | fields)
    assert body["content"] == ask(server, SAMPLED | fields)["content"]
    assert body["content"] != ask(server, SAMPLED | {"temperature": fields.get("temperature", 1.5)})["content"]
    assert {name: body["generation_settings"][name] for name in fields} == fields


def test_how_far_back_a_repetition_counts(server: Server) -> None:
    prompt = ["there lived a king", *range(1000, 1064), "there lived a"]
    fields = TALE | {"prompt": prompt, "n_predict": 1, "logit_bias": [[KING, 20]], "dry_multiplier": 100}
    for window, repeated in ((0, True), (64, True), (-1, False), (None, False)):
        body = ask(server, fields | {"dry_penalty_last_n": window})
        assert (body["content"] == " king") == repeated


def test_the_default_samplers_in_their_default_order_change_nothing(server: Server) -> None:
    order = ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"]
    assert ask(server, SAMPLED | {"samplers": order})["content"] == ask(server, SAMPLED)["content"]
    assert ask(server, SAMPLED | {"samplers": ["temperature"]})["content"] != ask(server, SAMPLED)["content"]


def test_a_schema_and_a_grammar(server: Server) -> None:
    schema = {"items": {"type": "string", "maxLength": 5}, "minItems": 2, "maxItems": 3, "type": "array"}
    words = json.loads(ask(server, TALE | {"json_schema": schema, "n_predict": 100})["content"])
    assert 2 <= len(words) <= 3
    assert all(len(word) <= 5 for word in words)
    grammar = 'root ::= "- " item ("\\n- " item)*\nitem ::= "king" | "queen"'
    lines = ask(server, TALE | {"grammar": grammar, "n_predict": 30})["content"].split("\n")
    assert set(lines[:-1]) <= {"- king", "- queen"}


def test_response_fields(server: Server) -> None:
    body = ask(server, TALE | {"response_fields": ["content", "generation_settings/n_predict"]})
    assert body == {"content": TEXT, "generation_settings/n_predict": 4}


def test_a_time_limit_ends_at_the_first_line(server: Server) -> None:
    """The limit counts once there is a new line, which only the grammar lets come late."""
    grammar = r'root ::= "a"{20} "\n" "b"+'
    body = ask(server, TALE | {"grammar": grammar, "n_predict": 200, "t_max_predict_ms": 1})
    assert body["stop_type"] == "limit"
    assert "\n" in body["content"]
    assert body["tokens_predicted"] < 200


def test_zero_tokens_evaluate_the_prompt(server: Server) -> None:
    body = ask(server, TALE | {"n_predict": 0, "prompt": "A prompt that nobody had before"})
    assert (body["content"], body["tokens_predicted"], body["stop_type"]) == ("", 0, "limit")
    again = ask(server, TALE | {"n_predict": 0, "prompt": "A prompt that nobody had before"})
    assert again["tokens_cached"] == again["tokens_evaluated"] - 1


def test_what_a_stock_client_sends(server: Server) -> None:
    """The fields of the web page that comes with llama.cpp's server, with their defaults."""
    request = {
        "stream": False,
        "cache_prompt": True,
        "samplers": ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"],
        "temperature": 0.8,
        "dynatemp_range": 0,
        "dynatemp_exponent": 1,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "typical_p": 1,
        "xtc_probability": 0,
        "xtc_threshold": 0.1,
        "repeat_last_n": 64,
        "repeat_penalty": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "dry_multiplier": 0,
        "dry_base": 1.75,
        "dry_allowed_length": 2,
        "dry_penalty_last_n": -1,
        "n_predict": 3,
        "n_keep": 0,
        "n_indent": 0,
        "n_discard": 0,
        "id_slot": -1,
        "timings_per_token": False,
        "return_progress": False,
        "lora": [],
        "grammar": "",
        "logit_bias": [],
        "n_probs": 0,
        "min_keep": 0,
        "mirostat": 0,
        "mirostat_tau": 5.0,
        "mirostat_eta": 0.1,
        "t_max_predict_ms": 0,
        "seed": -1,
    }
    assert ask(server, request | {"prompt": "Once"})["tokens_predicted"] == 3


def test_pieces_of_a_text(server: Server) -> None:
    tokens = ask(server, {"content": "a king á", "with_pieces": True}, "/tokenize")["tokens"]
    assert tokens[0]["piece"] == "a"
    assert {"id": KING, "piece": " king"} in tokens
    assert [195] in [token["piece"] for token in tokens]  # half of á
