"""The API key: where it is kept, and whether a request carries it."""

from __future__ import annotations

import hmac
import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Any

from function import aws
from function.schema import ApiError

if TYPE_CHECKING:
    from function.settings import Settings

logger = logging.getLogger("bitnet.auth")

PUBLIC = frozenset(
    {("GET", "/"), ("GET", "/health"), ("GET", "/openapi.json")}
)  # these tell nothing and compute nothing
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 10
RETRY_AFTER_S = 1
INCORRECT = "Incorrect API key provided"  # OpenAI's words, by which clients know what is wrong


class ApiKey:
    """Lets requests with `Authorization: Bearer KEY` pass; all of them where no key is set.

    The key is `API_KEY`, or what lies at `API_KEY_ARN`: read once in the life of a process, at the first request that
    needs it. Several keys, with white space between, are all valid, so that one can be replaced while it is in use.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._reading: Future[tuple[bytes, ...]] | None = None

    def check(self, event: Mapping[str, Any], deadline: float | None = None) -> None:
        """Checks an HTTP event (payload 2.0), until `deadline` (of `time.monotonic()`).

        Raises:
            ApiError: 401, the key is missing or wrong; 500 or 503, the right one cannot be read, so nobody passes.
        """
        if not self._required:
            return
        http = event["requestContext"]["http"]
        if (http["method"], http["path"]) in PUBLIC:
            return
        given = next((value for name, value in event["headers"].items() if name.lower() == "authorization"), "")
        scheme, _, token = given.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise _unauthorized(f"{INCORRECT}: there is none; send 'Authorization: Bearer KEY'")
        # All of them, so that the time tells nothing of which one is nearly right.
        right = [hmac.compare_digest(token.strip().encode(errors="replace"), key) for key in self._valid(deadline)]
        if not any(right):
            raise _unauthorized(f"{INCORRECT}: it is none that is valid here")

    def document(self, document: dict[str, Any]) -> dict[str, Any]:
        """The OpenAPI document with what is asked of whoever has no key."""
        if not self._required:
            return document
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                if isinstance(operation, dict) and (method.upper(), path) not in PUBLIC:
                    operation["security"] = [{"apiKey": []}]
        schemes = {"apiKey": {"type": "http", "scheme": "bearer"}}
        return document | {"components": document["components"] | {"securitySchemes": schemes}}

    @property
    def _required(self) -> bool:
        return self._settings.api_key is not None or self._settings.api_key_arn is not None

    def _valid(self, deadline: float | None) -> tuple[bytes, ...]:
        with self._lock:
            if self._reading is None or (self._reading.done() and self._reading.exception() is not None):
                reading = Future[tuple[bytes, ...]]()
                threading.Thread(target=self._read, args=(reading,), name="api-key", daemon=True).start()
                self._reading = reading  # now that it will have a result
            reading = self._reading
        if deadline is None:
            return reading.result()
        try:
            return reading.result(max(0.0, self._settings.answer_by(deadline) - time.monotonic()))
        except FutureTimeoutError:
            raise _unavailable(self._settings.api_key_arn or "", "no answer in time", transient=True) from None

    def _read(self, reading: Future[tuple[bytes, ...]]) -> None:
        try:
            text = self._settings.api_key or _read(self._settings.api_key_arn or "")
            if not text.split():
                raise ApiError(500, "api_key_unavailable", "the API key is empty")
        except BaseException as error:
            reading.set_exception(error)
        else:
            reading.set_result(tuple(key.encode() for key in text.split()))


def _unauthorized(message: str) -> ApiError:
    error = ApiError(401, "invalid_api_key", message)
    error.headers["www-authenticate"] = "Bearer"
    return error


def _read(arn: str) -> str:
    """The text of an SSM parameter or of a secret of Secrets Manager. Why it cannot be read is logged, not answered."""
    from botocore.exceptions import BotoCoreError, ClientError

    service, region, _, resource = arn.split(":", 6)[2:6]
    try:
        client = aws.client(
            service, connect_timeout_s=CONNECT_TIMEOUT_S, read_timeout_s=READ_TIMEOUT_S, attempts=4, region=region
        )
        if service == "ssm":
            path = resource.removeprefix("parameter/")  # that of /a/b is parameter/a/b, and that of a is parameter/a
            answer = client.get_parameter(Name=f"/{path}" if "/" in path else path, WithDecryption=True)
            return str(answer["Parameter"]["Value"])
        secret = client.get_secret_value(SecretId=arn)
        return str(secret["SecretString"] if "SecretString" in secret else secret["SecretBinary"].decode("ascii"))
    except ClientError as error:
        status = aws.status_of(error)
        code = error.response.get("Error", {}).get("Code", "")
        raise _unavailable(arn, code, transient=status >= 500 or "Throttl" in code) from error
    except BotoCoreError as error:
        raise _unavailable(arn, str(error), transient=True) from error
    except UnicodeDecodeError:
        raise _unavailable(arn, "it is not printable ASCII", transient=False) from None


def _unavailable(arn: str, reason: str, *, transient: bool) -> ApiError:
    logger.error("the API key cannot be read", extra={"arn": arn, "reason": reason})
    status, retry_after_s = (503, RETRY_AFTER_S) if transient else (500, None)
    message = "the API key that requests are compared with cannot be read; the log has the reason"
    return ApiError(status, "api_key_unavailable", message, retry_after_s=retry_after_s)
