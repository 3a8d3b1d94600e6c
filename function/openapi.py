"""The OpenAPI document, made of the kinds that validate the requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from function import openai, schema

if TYPE_CHECKING:
    from function.settings import Settings

JSON = "application/json"
VERSION = "1"  # of the API

_STRING = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_MILLISECONDS = {"type": "number", "minimum": 0}


def _object(properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
    }


_EVENT = _object({"data": {"type": "string", "contentMediaType": JSON}})
_ERROR = _object(
    {
        "error": _object(
            {
                "message": _STRING,
                "type": {"enum": ["invalid_request_error", "unavailable_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": _STRING,
                "n_prompt": _COUNT,
                "n_ctx": _COUNT,
            },
            ("n_prompt", "n_ctx"),
        )
    }
)
_TIMINGS = _object(
    {
        "prompt_n": _COUNT,
        "prompt_ms": _MILLISECONDS,
        "prompt_per_second": _MILLISECONDS,
        "predicted_n": _COUNT,
        "predicted_ms": _MILLISECONDS,
        "predicted_per_second": _MILLISECONDS,
        "draft_n": _COUNT,
        "draft_n_accepted": _COUNT,
    }
)
_TOKEN_PROBABILITY = _object(
    {
        "id": _COUNT,
        "token": _STRING,
        "bytes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}},
        "logprob": {"type": "number"},
        "top_logprobs": {"type": "array"},
        "prob": {"type": "number"},
        "top_probs": {"type": "array"},
    },
    ("logprob", "top_logprobs", "prob", "top_probs"),
)
_COMPLETION: dict[str, Any] = _object(
    {
        "index": _COUNT,
        "content": _STRING,
        "tokens": {"type": "array", "items": _COUNT},
        "stop": {"const": True},
        "stop_type": {"enum": ["eos", "limit", "word", "deadline", "cancelled"]},
        "stopping_word": _STRING,
        "model": _STRING,
        "tokens_predicted": _COUNT,
        "tokens_evaluated": _COUNT,
        "tokens_cached": _COUNT,
        "truncated": {"type": "boolean"},
        "generation_settings": {"type": "object"},
        "timings": _TIMINGS,
        "completion_probabilities": {"type": "array", "items": _TOKEN_PROBABILITY},
    }
)
_COMPLETION["required"] = []  # response_fields chooses
_COMPLETIONS = {"anyOf": [_COMPLETION, {"type": "array", "items": _COMPLETION, "minItems": 2}]}
_USAGE = _object(
    {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "prompt_tokens_details": _object({"cached_tokens": _COUNT}),
    }
)
_MODEL = _object({"id": _STRING, "object": {"const": "model"}, "created": _COUNT, "owned_by": _STRING})


def _choices(content: dict[str, Any]) -> dict[str, Any]:
    head = {"index": _COUNT, "logprobs": {"type": ["object", "null"]}}
    choice = _object(head | {"finish_reason": {"enum": ["stop", "length", "tool_calls"]}, **content})
    return {"type": "array", "items": choice, "minItems": 1}


def _answer(kind: str, content: dict[str, Any]) -> dict[str, Any]:
    return _object(
        {
            "id": _STRING,
            "object": {"const": kind},
            "created": _COUNT,
            "model": _STRING,
            "choices": _choices(content),
            "usage": _USAGE,
            "timings": _TIMINGS,
        }
    )


_CALL = _object(
    {
        "id": _STRING,
        "type": {"const": "function"},
        "function": _object({"name": _STRING, "arguments": {"type": "string", "contentMediaType": JSON}}),
    }
)
_MESSAGE = _object(
    {
        "role": {"const": "assistant"},
        "content": {"type": ["string", "null"]},
        "refusal": {"type": "null"},
        "tool_calls": {"type": "array", "items": _CALL},
    },
    ("tool_calls",),
)
_CHAT = _answer("chat.completion", {"message": _MESSAGE})
_TEXT = _answer("text_completion", {"text": _STRING})


def _post(summary: str, request: dict[str, Any], response: dict[str, Any], *, streams: bool = False) -> dict[str, Any]:
    operation = _get(summary, response)
    operation["requestBody"] = {"required": True, "content": {JSON: {"schema": request}}}
    if streams:
        operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": _EVENT}
    return operation


def _get(summary: str, response: dict[str, Any], content_type: str = JSON) -> dict[str, Any]:
    error = {"description": "What is wrong.", "content": {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}}
    return {
        "summary": summary,
        "responses": {
            "200": {"description": "The answer.", "content": {content_type: {"schema": response}}},
            "4XX": error,
            "5XX": error,
        },
    }


def document(settings: Settings) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    completion = schema.document(schema.completion_kinds(settings), ["prompt"], schema.NEUTRAL)
    chat = schema.document(openai.chat_kinds(settings), ["messages"], openai.CHAT_NEUTRAL, openai.INERT)
    text = schema.document(openai.text_kinds(settings), ["prompt"], openai.TEXT_NEUTRAL, openai.INERT)
    tokenize = schema.document(schema.tokenize_kinds(settings), ["content"])
    template = schema.document(openai.template_kinds(settings), ["messages"])
    model = {"name": "model", "in": "path", "required": True, "schema": _STRING}
    piece = {"anyOf": [_STRING, {"type": "array", "items": _COUNT}]}
    tokens = {"type": "array", "items": {"anyOf": [_COUNT, _object({"id": _COUNT, "piece": piece})]}}
    page = {"/": {"get": _get("A page to talk to the model.", _STRING, "text/html")}} if settings.serve_page else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": "BitNet Lambda", "version": VERSION, "license": {"name": "Apache-2.0"}},
        "paths": page
        | {
            "/completion": {
                "post": _post("Continue a text, as llama.cpp does.", completion, _COMPLETIONS, streams=True)
            },
            "/v1/chat/completions": {"post": _post("Answer in a chat, as OpenAI does.", chat, _CHAT, streams=True)},
            "/v1/completions": {"post": _post("Continue a text, as OpenAI does.", text, _TEXT, streams=True)},
            "/v1/models": {
                "get": _get(
                    "The model.", _object({"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}})
                )
            },
            "/v1/models/{model}": {"get": _get("The model, by its name.", _MODEL) | {"parameters": [model]}},
            "/tokenize": {"post": _post("Text to token ids.", tokenize, _object({"tokens": tokens}))},
            "/detokenize": {
                "post": _post(
                    "Token ids to text.",
                    schema.document(schema.DETOKENIZE_KINDS, ["tokens"]),
                    _object({"content": _STRING}),
                )
            },
            "/apply-template": {
                "post": _post("A chat as the text of a prompt.", template, _object({"prompt": _STRING}))
            },
            "/props": {"get": _get("The model, the defaults, the chat template.", {"type": "object"})},
            "/health": {
                "get": _get("Whether it serves.", _object({"status": {"const": "ok"}, "model": _STRING})),
            },
            "/metrics": {"get": _get("Counters for Prometheus.", _STRING, "text/plain")},
            "/openapi.json": {"get": _get("This document.", {"type": "object"})},
        },
        "components": {"schemas": {"Error": _ERROR}},
    }
