"""Signs requests to a Function URL whose AuthType is AWS_IAM, with botocore's signer.

    client = openai.OpenAI(
        base_url=f"{function_url}/v1", api_key="unused", http_client=openai.DefaultHttpxClient(auth=SigV4())
    )

The caller needs both `lambda:InvokeFunctionUrl` and `lambda:InvokeFunction`:
https://docs.aws.amazon.com/lambda/latest/dg/urls-auth.html
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from botocore.credentials import Credentials

SERVICE = "lambda"
UNSIGNED = {"authorization", "x-amz-content-sha256", "x-amz-date", "x-amz-security-token"}  # those that signing makes


class SigV4:
    """An `auth` of httpx clients, sync and async: `httpx.Client(auth=SigV4())`.

    Credentials are found as boto3 finds them, and renewed as it does; the region is that of the URL.
    """

    def __init__(self, region: str | None = None, credentials: Credentials | None = None) -> None:
        self._region = region
        self._credentials = credentials

    def __call__(self, request: Any) -> Any:
        """Signs an `httpx.Request` of whichever version of httpx; its Authorization is replaced.

        Raises:
            ValueError: there are no credentials, or no region and the URL has none.
        """
        content_type = request.headers.get("content-type")
        headers = self.headers(request.method, str(request.url), request.content, content_type)
        for name in UNSIGNED & {name.lower() for name in request.headers}:
            del request.headers[name]
        request.headers.update(headers)
        return request

    def headers(self, method: str, url: str, body: bytes, content_type: str | None = None) -> dict[str, str]:
        """The headers that sign a request. `content_type` is that of its header, which is signed too."""
        from botocore.auth import SigV4Auth
        from botocore.awsrequest import AWSRequest

        given = {} if content_type is None else {"content-type": content_type}
        request = AWSRequest(method, url, given, body)
        SigV4Auth(self._resolved().get_frozen_credentials(), SERVICE, self._region or _region(url)).add_auth(request)
        return {name: value for name, value in request.headers.items() if name.lower() in UNSIGNED}

    def _resolved(self) -> Credentials:
        if self._credentials is None:
            from botocore.session import get_session

            self._credentials = get_session().get_credentials()
            if self._credentials is None:
                raise ValueError("no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
        return self._credentials


def is_function_url(url: str) -> bool:
    """Whether it is Lambda's own, which wants a signature unless its AuthType is NONE."""
    return re.match(r"https://[a-z0-9]+\.lambda-url\.", url) is not None


def _region(url: str) -> str:
    match = re.search(r"\.lambda-url\.([a-z0-9-]+)\.on\.aws", url)
    if match is None:
        raise ValueError(f"the region is not in the URL {url}: say SigV4(region=…)")
    return match[1]
