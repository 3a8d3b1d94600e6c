"""Settings from the environment."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

import pytest

from function.settings import Settings, SettingsError, lambda_threads


def test_nothing_set_gives_the_defaults() -> None:
    assert Settings.from_environment({}) == Settings()
    assert Settings.from_environment({field.name.upper(): "" for field in fields(Settings)}) == Settings()


def test_every_setting_is_read() -> None:
    environment = {
        "MODEL_PATH": "/m.gguf",
        "MODEL_S3_URI": "s3://bucket/some/key.gguf",
        "MODEL_CACHE_DIR": "/c",
        "DEMO_MODEL": "/d",
        "COPY_THREADS": "3",
        "COPY_PART_BYTES": "65536",
        "BITNET_CLI": "/b",
        "CTX_SIZE": "100",
        "THREADS": "5",
        "PARALLEL": "3",
        "KV_TYPE": "f32",
        "PROMPT_CACHE_S3_URI": "s3://bucket/prompts",
        "N_PREDICT": "11",
        "TEMPERATURE": "0.5",
        "TOP_K": "6",
        "TOP_P": "0.75",
        "MIN_P": "0.25",
        "REPEAT_PENALTY": "1.5",
        "REPEAT_LAST_N": "7",
        "MAX_N_PREDICT": "12",
        "MAX_PROMPT_BYTES": "13",
        "QUEUE_LIMIT": "14",
        "DEADLINE_MARGIN_MS": "1500",
        "PROMPT_CACHE_DIR": "/p",
        "PROMPT_CACHE_BYTES": "15",
        "API_KEY": "first second",
        "API_KEY_ARN": "arn:aws:ssm:eu-west-1:123456789012:parameter/bitnet/key",
        "BATCH_RESULTS_S3_URI": "s3://bucket/results",
        "INVOKE_MODE": "RESPONSE_STREAM",
        "CORS_ALLOW_ORIGINS": "https://a.example,http://localhost:3000",
        "SERVE_PAGE": "true",
        "HOST": "::1",
        "PORT": "0",
        "LOG_LEVEL": "DEBUG",
    }
    assert environment.keys() == {field.name.upper() for field in fields(Settings)}
    settings = Settings.from_environment(environment)
    for name, text in environment.items():
        assert str(getattr(settings, name.lower())) == {"true": "True"}.get(text, text)
    assert settings.model_path == Path("/m.gguf")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("SERVE_PAGE", "yes", "'SERVE_PAGE' must be one of true, false, got \"yes\""),
        ("CTX_SIZE", "-1", "'CTX_SIZE' must be from 0 to 1073741824, got -1"),
        ("MODEL_PATH", "~nosuch/x", "'MODEL_PATH' must be a path, got that of an unknown user, \"~nosuch/x\""),
        ("MODEL_S3_URI", "s3://bucket/\udcff", "'MODEL_S3_URI' must be s3://bucket/key"),
        ("CTX_SIZE", "many", "'CTX_SIZE' must be an integer, got \"many\""),
        ("TEMPERATURE", "nan", "'TEMPERATURE' must be from 0 to 100, got nan"),
        ("TEMPERATURE", "warm", "'TEMPERATURE' must be a number, got \"warm\""),
        ("KV_TYPE", "f64", "'KV_TYPE' must be one of f16, f32, i8, got \"f64\""),
        ("INVOKE_MODE", "STREAM", "'INVOKE_MODE' must be one of BUFFERED, RESPONSE_STREAM, got \"STREAM\""),
        ("CORS_ALLOW_ORIGINS", "a.example", "'CORS_ALLOW_ORIGINS' must be * or origins such as https://example.org"),
        ("CORS_ALLOW_ORIGINS", "https://a.example/page", "separated by commas, got"),
        ("LOG_LEVEL", "info", "'LOG_LEVEL' must be one of DEBUG"),
        ("MODEL_S3_URI", "https://bucket/key", "'MODEL_S3_URI' must be s3://bucket/key"),
        ("MODEL_S3_URI", "s3://bucket/", "'MODEL_S3_URI' must be s3://bucket/key"),
        (
            "API_KEY_ARN",
            "bitnet/key",
            "'API_KEY_ARN' must be the ARN of an SSM parameter or a secret of Secrets Manager",
        ),
        ("API_KEY_ARN", "arn:aws:s3:::bucket/key", "of Secrets Manager, got"),
        ("API_KEY", " ", "'API_KEY' must be printable ASCII"),
        ("PORT", "65536", "'PORT' must be from 0 to 65535, got 65536"),
        ("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "abc", "'AWS_LAMBDA_FUNCTION_MEMORY_SIZE' must be an integer, got \"abc\""),
    ],
)
def test_a_wrong_setting_is_named_with_limit_and_value(name: str, text: str, says: str) -> None:
    with pytest.raises(SettingsError, match="must be") as caught:
        Settings.from_environment({name: text})
    assert says in str(caught.value)


def test_a_key_is_not_shown() -> None:
    assert "hush" not in repr(Settings.from_environment({"API_KEY": "hush"}))
    with pytest.raises(SettingsError) as caught:
        Settings.from_environment({"API_KEY": "hüsh"})
    assert "sh" not in str(caught.value).replace("must be printable", "")


def test_n_predict_and_its_limit_agree() -> None:
    assert Settings.from_environment({"MAX_N_PREDICT": "50"}).n_predict == 50
    with pytest.raises(SettingsError, match="'N_PREDICT' must be at most MAX_N_PREDICT, 50, got 51"):
        Settings.from_environment({"MAX_N_PREDICT": "50", "N_PREDICT": "51"})


def test_threads_on_lambda_follow_memory_and_affinity() -> None:
    seen = len(os.sched_getaffinity(0))
    assert [lambda_threads(mb) for mb in (128, 1769)] == [1, 1]
    assert lambda_threads(10_240) == min(seen, 6)
    assert Settings.from_environment({"AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "1769"}).threads == 1
    assert Settings.from_environment({"AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "1769", "THREADS": "4"}).threads == 4
    assert Settings.from_environment({}).threads == 0
