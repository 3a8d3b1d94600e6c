"""Lambda's runtime loop: awslambdaric's, which also streams answers, lets signals in, and is sent one.

Lambda sends SIGTERM only if an extension is registered, an internal one is enough:
https://docs.aws.amazon.com/lambda/latest/dg/runtimes-extensions-api.html
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import logging
import os
import signal
import sys
import threading
from contextlib import closing
from typing import Any, NoReturn

from awslambdaric import bootstrap
from awslambdaric.lambda_runtime_client import ERROR_TYPE_HEADER, LambdaRuntimeClient, LambdaRuntimeClientError
from awslambdaric.lambda_runtime_marshaller import LambdaMarshaller

from function.engine import Engine, EngineError
from function.handler import Stream, application
from function.model_store import ModelError
from function.settings import SettingsError

HANDLER = "function.handler.lambda_handler"
RUNTIME_API = "/2018-06-01/runtime"
EXTENSION_API = "/2020-01-01/extension"
EXTENSION_NAME = "bitnet-shutdown"
STREAM_TYPE = "application/vnd.awslambda.http-integration-response"  # a JSON prelude, eight NUL bytes, the body
ERROR_BODY_HEADER = "Lambda-Runtime-Function-Error-Body"

logger = logging.getLogger("bitnet.runtime")


class Marshaller(LambdaMarshaller):  # type: ignore[misc]
    """awslambdaric's, which makes JSON of what the handler returns; a stream is passed on as it is."""

    def marshal_response(self, response: Any) -> tuple[Any, str]:
        """The body of the response and its content type."""
        return (response, STREAM_TYPE) if isinstance(response, Stream) else super().marshal_response(response)


class Client(LambdaRuntimeClient):  # type: ignore[misc]
    """awslambdaric's client of the Runtime API, which can stream too.

    https://docs.aws.amazon.com/lambda/latest/dg/runtimes-custom.html#runtimes-custom-response-streaming
    """

    marshaller = Marshaller()

    def post_invocation_result(
        self,
        invoke_id: str,
        result_data: str | bytes | Stream,
        content_type: str = "application/json",
        invocation_id: str | None = None,
    ) -> None:
        """Sends an answer, or each piece of it as soon as there is one."""
        if not isinstance(result_data, Stream):
            try:
                super().post_invocation_result(invoke_id, result_data, content_type, invocation_id)
            except RuntimeError:  # with which status is not told; if it was the last, there is no next invocation
                logger.warning("an answer was refused", extra={"request_id": invoke_id})
            return
        with closing(http.client.HTTPConnection(self.lambda_runtime_address)) as connection:
            endpoint = f"{RUNTIME_API}/invocation/{invoke_id}/response"
            connection.putrequest("POST", endpoint)
            connection.putheader("Content-Type", content_type)
            connection.putheader("Lambda-Runtime-Function-Response-Mode", "streaming")
            connection.putheader("Transfer-Encoding", "chunked")
            connection.putheader("Trailer", f"{ERROR_TYPE_HEADER}, {ERROR_BODY_HEADER}")
            if invocation_id is not None:
                connection.putheader("Lambda-Runtime-Invocation-Id", invocation_id)
            connection.putheader("Connection", "close")
            try:
                connection.endheaders()
                _send(connection, result_data)
                response = connection.getresponse()
                answer = response.read()
            except (OSError, http.client.HTTPException) as error:  # who asked may have hung up
                logger.warning("a stream was not taken to its end", extra={"error_type": type(error).__name__})
                return
            finally:
                if not isinstance(result_data.reply["body"], str):
                    result_data.reply["body"].close()  # which ends the computation, if it has not ended
        if response.status >= http.HTTPStatus.INTERNAL_SERVER_ERROR:  # then a runtime shall exit
            raise LambdaRuntimeClientError(endpoint, response.status, answer)
        if response.status != http.HTTPStatus.ACCEPTED:
            logger.warning("a stream was refused", extra={"status": response.status})


def main() -> None:
    """Serves invocations until Lambda ends the environment."""
    address = os.environ["AWS_LAMBDA_RUNTIME_API"]
    # awslambdaric waits for the next invocation in C; only if another thread does so can Python handle signals.
    client = Client(address, use_thread_for_polling_next=True)
    _register_extension(address)
    try:
        engine = application().engine
        signal.signal(signal.SIGTERM, lambda *_: _end(engine))
        if os.environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") == "provisioned-concurrency":
            engine.load().result()  # the init phase may take minutes there
    except (SettingsError, ModelError, EngineError) as error:
        # What cannot work shall not begin to serve: a deployment fails with this message.
        print(f"bitnet: {error}", file=sys.stderr, flush=True)
        client.post_init_error({"errorType": type(error).__name__, "errorMessage": str(error), "stackTrace": []})
        sys.exit(1)
    bootstrap.run(HANDLER, client)


def _send(connection: http.client.HTTPConnection, stream: Stream) -> None:
    """Sends the body in HTTP chunks."""
    reply = stream.reply
    prelude = json.dumps({"statusCode": reply["statusCode"], "headers": reply["headers"], "cookies": []})
    head = prelude.encode() + bytes(8)
    if isinstance(reply["body"], str):
        connection.send(_chunk(head + reply["body"].encode()) + b"0\r\n\r\n")
        return
    for piece in reply["body"]:
        connection.send(_chunk(head + piece.encode()))
        head = b""
    connection.send(b"0\r\n" + _trailers(stream) + b"\r\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _trailers(stream: Stream) -> bytes:
    """Tells Lambda of an error after the first byte, so that it counts as one."""
    failure = stream.call.failure
    if failure is None:
        return b""
    error = {"errorType": failure.code, "errorMessage": failure.message, "stackTrace": []}
    body = base64.b64encode(json.dumps(error).encode()).decode()
    return f"{ERROR_TYPE_HEADER}: {failure.code}\r\n{ERROR_BODY_HEADER}: {body}\r\n".encode()


def _end(engine: Engine) -> NoReturn:
    """Ends the child, then this process: Lambda allows some 300 ms. What runs is lost; Lambda tells its caller."""
    engine.stop()
    os._exit(0)


def _register_extension(address: str) -> None:
    """Registers an internal extension for no event at all, and waits for its events: without that, init never ends."""
    connection = http.client.HTTPConnection(address)
    try:
        body = json.dumps({"events": []})
        connection.request("POST", f"{EXTENSION_API}/register", body, {"Lambda-Extension-Name": EXTENSION_NAME})
        response = connection.getresponse()
        response.read()
    except OSError as error:
        logger.warning("no extension API: without it, no SIGTERM", extra={"error": str(error)})
        return
    identifier = response.getheader("Lambda-Extension-Identifier")
    if response.status != http.HTTPStatus.OK or identifier is None:
        logger.warning("the extension was not registered: without it, no SIGTERM", extra={"status": response.status})
        return
    threading.Thread(target=_wait_for_event, args=(connection, identifier), name="extension", daemon=True).start()


def _wait_for_event(connection: http.client.HTTPConnection, identifier: str) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):  # the platform goes away before its answer comes
        connection.request("GET", f"{EXTENSION_API}/event/next", headers={"Lambda-Extension-Identifier": identifier})
        connection.getresponse()


if __name__ == "__main__":
    main()
