"""Lambda's runtime loop: awslambdaric, told to let signals in, and an extension so that Lambda sends one.

Lambda sends SIGTERM only if an extension is registered, an internal one is enough:
https://docs.aws.amazon.com/lambda/latest/dg/runtimes-extensions-api.html
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import signal
import sys
import threading
from typing import NoReturn

from awslambdaric import bootstrap
from awslambdaric.lambda_runtime_client import LambdaRuntimeClient

from function.engine import Engine, EngineError
from function.handler import application
from function.model_store import ModelError
from function.settings import SettingsError

HANDLER = "function.handler.lambda_handler"
EXTENSION_API = "/2020-01-01/extension"
EXTENSION_NAME = "bitnet-shutdown"

logger = logging.getLogger("bitnet.runtime")


def main() -> None:
    """Serves invocations until Lambda ends the environment."""
    address = os.environ["AWS_LAMBDA_RUNTIME_API"]
    # awslambdaric waits for the next invocation in C; only if another thread does so can Python handle signals.
    client = LambdaRuntimeClient(address, use_thread_for_polling_next=True)
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
    connection.request("GET", f"{EXTENSION_API}/event/next", headers={"Lambda-Extension-Identifier": identifier})
    connection.getresponse()  # never comes


if __name__ == "__main__":
    main()
