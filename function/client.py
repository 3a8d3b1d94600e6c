"""Asks a running API over HTTP, with a key or signed: what the chat and the smoke test stand on."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

from function.sigv4 import SigV4, is_function_url

TIMEOUT_S = 900  # Lambda's longest
JSON = "application/json"
KEY = "BITNET_API_KEY"  # the environment variable of whoever asks; a server's own is API_KEY


class Client:
    """The API at `url`."""

    def __init__(
        self, url: str, key: str | None = None, *, sign: bool | None = None, region: str | None = None
    ) -> None:
        """`sign`: None stands for Lambda's own URLs without a key; `region`: None for that of the URL."""
        self.url = url.rstrip("/")
        self._key = key
        self._signer = SigV4(region) if (is_function_url(url) and not key if sign is None else sign) else None

    @contextmanager
    def open(self, path: str, body: bytes | None = None) -> Iterator[http.client.HTTPResponse]:
        """The answer to a GET, or to a POST of JSON; its connection ends with the context.

        Raises:
            OSError, http.client.HTTPException: there is no answer.
            ValueError: there are no AWS credentials, or the URL is none.
        """
        url = self.url + path
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"the URL must begin with http:// or https://, got '{self.url}'")
        method = "GET" if body is None else "POST"
        headers = {} if body is None else {"content-type": JSON}
        if self._signer:
            headers |= self._signer.headers(method, url, body or b"", headers.get("content-type"))
        elif self._key:
            headers["authorization"] = f"Bearer {self._key}"
        connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        with closing(connect(parts.netloc, timeout=TIMEOUT_S)) as connection:
            connection.request(method, parts.path, body, headers)
            yield connection.getresponse()
