"""Events as Lambda hands them to the function."""

from __future__ import annotations

import json
from typing import Any


def url_event(request: Any, *, path: str = "/completion", method: str = "POST", **changes: Any) -> dict[str, Any]:
    """What a Function URL sends, payload 2.0. A `request` that is a string is the body as it is.

    https://docs.aws.amazon.com/lambda/latest/dg/urls-invocation.html#urls-payloads
    """
    domain = "x.lambda-url.eu-west-1.on.aws"
    return {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": path,
        "rawQueryString": "",
        "headers": {"content-type": "application/json", "host": domain},
        "requestContext": {
            "accountId": "anonymous",
            "apiId": "x",
            "domainName": domain,
            "domainPrefix": "x",
            "http": {"method": method, "path": path, "protocol": "HTTP/1.1", "sourceIp": "127.0.0.1", "userAgent": "t"},
            "requestId": "1",
            "routeKey": "$default",
            "stage": "$default",
            "time": "01/Jan/2026:00:00:00 +0000",
            "timeEpoch": 1767225600000,
        },
        "body": request if isinstance(request, str) else json.dumps(request),
        "isBase64Encoded": False,
    } | changes
