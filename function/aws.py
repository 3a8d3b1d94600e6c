"""Clients of AWS. They are made on the first need, for boto3 takes long to import."""

from __future__ import annotations

from typing import Any


def client(
    service: str,
    *,
    connect_timeout_s: float,
    read_timeout_s: float,
    attempts: int,
    region: str | None = None,
    **more: Any,
) -> Any:
    """A client of `service` in `region`, None standing for that of the environment. `more`: botocore's `Config`.

    Raises:
        BotoCoreError, ValueError: there is no region, or a setting of the environment cannot be used.
    """
    import boto3
    from botocore.config import Config

    retries: Any = {"mode": "standard", "max_attempts": attempts}
    config = Config(connect_timeout=connect_timeout_s, read_timeout=read_timeout_s, retries=retries, **more)
    session: Any = boto3.Session()
    return session.client(service, region_name=region, config=config)


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of `s3://bucket/key`."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def status_of(error: Any) -> int:
    """The HTTP status that a `ClientError` stands for; 0 if there is none."""
    status: int = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status
