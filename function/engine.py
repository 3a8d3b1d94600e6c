"""The native CLI as a child process: start, ask, stream, cancel, restart, stop. Protocol: docs/worker-protocol.md."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import select
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, Protocol

from function.metrics import Metrics

if TYPE_CHECKING:
    from function.model_store import ModelStore
    from function.settings import Settings

logger = logging.getLogger("bitnet.engine")

Event = dict[str, Any]  # an event of the protocol, decoded
State = Literal["not_loaded", "loading", "ready"]

LOG_LINES_KEPT = 20
LOG_LINE_CHARACTERS = 2000
STOPPING = "the server is stopping"
TOO_LATE = "there is no time left but DEADLINE_MARGIN_MS; try again, or give the function more time"
START_TIMEOUT_S = 120.0  # the 2B model takes a fifth of a second, and longer where its file comes from a slow disk
OPTION = re.compile(r"--(ctx-size|kv-type|parallel|threads)\b")  # of the CLI: settings have the same names
CANCEL_GRACE_S = 1.0  # at the end, for an engine that reads no more what it is told
EXIT_GRACE_S = 0.15  # from SIGTERM to SIGKILL; Lambda gives the whole environment 300 ms


class EngineError(Exception):
    """No answer from the engine: one line for the user, a stable `code`, and whether trying again may help."""

    code = "engine_failed"
    transient = False


class StartError(EngineError):
    """The engine ended before it was ready, or never was; the message is its own last line, if it wrote one."""

    code = "engine_start_failed"


class DiedError(EngineError):
    """The engine ended while it computed."""

    code = "engine_died"


class HungError(EngineError):
    """The engine did not keep the deadline and was killed."""

    code = "engine_hung"


class LateError(EngineError):
    """The deadline is too near for the engine to answer, so it was not asked."""

    code = "too_late"
    transient = True


class BusyError(EngineError):
    """The queue is full."""

    code = "overloaded"
    transient = True


class LoadingError(EngineError):
    """The deadline came before the model was loaded; loading goes on."""

    code = "model_loading"
    transient = True


class StoppingError(EngineError):
    """The engine is being stopped."""

    code = "stopping"
    transient = True


class RefusedError(Exception):
    """The engine refuses the request: `event` is its `error` event."""

    def __init__(self, event: Event) -> None:
        super().__init__(event["message"])
        self.event = event


class Mask(Protocol):
    """Says which tokens may follow: the caller's half of the protocol's `mask` events."""

    def answer(self, index: int, tokens: Sequence[int]) -> Mapping[str, Any]:
        """The fields of the worker's `mask`. `tokens` were drawn in the completion `index` since it was last asked."""


class Cancellation:
    """Lets whoever waits for an answer give it up, at any moment and from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._action: Callable[[], None] | None = None

    def cancel(self) -> None:
        """Ends the computation within one token, now or when it begins."""
        with self._lock:
            self._cancelled = True
            action = self._action
        if action:
            action()

    @property
    def cancelled(self) -> bool:
        """Whether it was given up."""
        return self._cancelled

    def attach(self, action: Callable[[], None] | None) -> None:
        """Sets what `cancel` does; does it at once if that was called before."""
        with self._lock:
            self._action = action
            cancelled = self._cancelled
        if cancelled and action:
            action()


class Engine:
    """One worker process, started on the first need, kept, and replaced if it dies. Any thread may use it."""

    def __init__(self, settings: Settings, store: ModelStore, metrics: Metrics | None = None) -> None:
        self._settings = settings
        self._store = store
        self._metrics = metrics or Metrics()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._loaded: Future[_Worker] | None = None
        self._worker: _Worker | None = None  # set before it is ready, so that a signal handler finds the process
        self._was_ready = False
        self._in_flight = 0
        self._waiting = 0  # for the model

    @property
    def state(self) -> State:
        """`loading` covers the copy of the model too; after a failure or a death it is `not_loaded` again."""
        loaded = self._loaded
        if loaded is None:
            return "not_loaded"
        if not loaded.done():
            return "loading"
        return "ready" if _usable(loaded) else "not_loaded"

    @property
    def model_name(self) -> str:
        """`general.name` of the model. There is one once a completion has had an event."""
        assert self._worker is not None
        name: str = self._worker.ready.result()["model"]["name"]
        return name

    @property
    def in_flight(self) -> int:
        """Completions that compute or wait."""
        return self._in_flight

    def describe(self, deadline: float | None = None, cancellation: Cancellation | None = None) -> Event:
        """The worker's `ready` event, about the model; waits for it, until `deadline` (of `time.monotonic()`).

        Raises:
            ModelError: there is no model.
            EngineError: there is no engine.
        """
        return self._ready_worker(deadline, cancellation or Cancellation()).ready.result()

    def load(self) -> Future[_Worker]:
        """Begins to load the model unless that has been done; does not wait. The future holds the error if it fails."""
        with self._lock:
            if self._loaded is None or (self._loaded.done() and not _usable(self._loaded)):
                self._loaded = Future()
                if self._stop.is_set():
                    self._loaded.set_exception(StoppingError(STOPPING))
                else:
                    try:
                        _start_thread("model-loader", self._load, self._loaded)
                    except StartError as error:
                        self._loaded.set_exception(error)
            return self._loaded

    def capacity(self, deadline: float | None = None) -> int:
        """How many are admitted at the same time. Waits for the model, and raises what `describe` does."""
        self.describe(deadline)
        return self._capacity()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Has a place among those that compute or wait: to be entered before anything is done for a completion.

        Raises:
            BusyError: there are as many as the worker computes at the same time, and QUEUE_LIMIT.
            StoppingError: no more are taken.
        """
        with self._lock:
            if self._stop.is_set():
                raise StoppingError(STOPPING)
            if self._in_flight >= self._capacity():
                waiting = f"of which {self._settings.queue_limit} may wait (QUEUE_LIMIT)"
                raise BusyError(f"there are {self._in_flight} requests already, {waiting}")
            self._in_flight += 1
        try:
            yield
        finally:
            with self._lock:
                self._in_flight -= 1

    def complete(
        self,
        requests: Sequence[Mapping[str, Any]],
        *,
        mask: Callable[[], Mask] | None = None,
        deadline: float | None = None,
        cancellation: Cancellation | None = None,
    ) -> Generator[Event]:
        """Computes completions in one batch: yields `token` events of those with `stream`, and `done` of each.

        `requests` have the fields of the protocol; `index` of an event counts their completions through: those of the
        first request's `n`, then those of the second's. `mask` makes what answers their masks. `deadline` is a value of
        `time.monotonic()`: generation stops `deadline_margin_ms` earlier. Closing the iterator cancels what is left to
        compute. A worker that dies is replaced and asked again, once, if nothing has been yielded yet.

        Raises:
            RefusedError: the engine does not take one of the requests.
            ModelError: there is no model.
            EngineError: there is no engine.
        """
        yield from self._ask("completion", requests, deadline, cancellation or Cancellation(), mask)

    def tokenize(self, content: str, *, add_bos: bool, special: bool, deadline: float | None = None) -> list[int]:
        """The token ids of a text. Does not wait for what is being computed. Raises what `complete` does."""
        tokens: list[int] = self._call("tokenize", deadline, content=content, add_bos=add_bos, special=special)[
            "tokens"
        ]
        return tokens

    def detokenize(self, tokens: Sequence[int], deadline: float | None = None) -> str:
        """The text of token ids. Does not wait for what is being computed. Raises what `complete` does."""
        content: str = self._call("detokenize", deadline, tokens=tokens)["content"]
        return content

    def vocabulary(self, deadline: float | None = None) -> Event:
        """The protocol's answer to `vocabulary`: some megabytes. Raises what `complete` does."""
        return self._call("vocabulary", deadline)

    def cancel_all(self) -> None:
        """Ends every request, running and queued, within one token, and takes no new ones."""
        self._stop.set()
        if (loaded := self._loaded) is not None:
            with suppress(InvalidStateError):  # whoever waits for the model
                loaded.set_exception(StoppingError(STOPPING))
        if (worker := self._worker) is not None:
            worker.cancel_all()

    def stop(self) -> None:
        """Ends the child. Takes no lock, so that a signal handler may call it; returns within 300 ms."""
        self._stop.set()
        if (worker := self._worker) is not None:
            worker.stop()

    def _load(self, loaded: Future[_Worker]) -> None:
        try:
            began = time.monotonic()
            path = self._store.fetch(self._stop)
            fetched = time.monotonic()
            self._worker = worker = _Worker(self._command(path))
            if self._stop.is_set():
                worker.stop()
            ready = worker.started()
            load_ms, total_ms = (round((time.monotonic() - start) * 1e3) for start in (fetched, began))
            self._metrics.loaded(load_ms, total_ms, again=self._was_ready)
            self._was_ready = True
            details = {name: ready[name] for name in ("n_ctx", "threads", "isa", "version")}
            logger.info(
                "model ready",
                extra=details | {"load_ms": load_ms, "total_ms": total_ms, "model_name": ready["model"]["name"]},
            )
        except BaseException as error:
            if isinstance(error, StartError):
                self._store.distrust()
                error = self._explained(error)
            with suppress(InvalidStateError):
                loaded.set_exception(error)
        else:
            with suppress(InvalidStateError):
                loaded.set_result(worker)

    def _call(self, op: str, deadline: float | None, **fields: Any) -> Event:
        (done,) = self._ask(op, [fields], deadline, Cancellation(), None)
        return done

    def _ask(
        self,
        op: str,
        requests: Sequence[Mapping[str, Any]],
        deadline: float | None,
        cancellation: Cancellation,
        mask: Callable[[], Mask] | None,
    ) -> Generator[Event]:
        for may_retry in (True, False):
            worker = self._ready_worker(deadline, cancellation)
            timed = [self._timed(request, deadline) if op == "completion" else request for request in requests]
            begun = False
            try:
                asked = worker.ask(op, timed, self._give_up_at(deadline), cancellation, mask() if mask else None)
                with closing(asked) as events:
                    for event in events:
                        begun = True
                        yield event
                return
            except DiedError:
                if self._stop.is_set():
                    raise StoppingError(STOPPING) from None
                if begun or not may_retry:
                    raise
                logger.warning("the worker died before it answered; asking a new one")

    def _command(self, model: Path) -> list[str]:
        settings = self._settings
        command = [str(settings.bitnet_cli), "worker", "--model", str(model)]
        command += ["--kv-type", settings.kv_type]
        if settings.ctx_size:
            command += ["--ctx-size", str(settings.ctx_size)]
        if settings.threads:
            command += ["--threads", str(settings.threads)]
        if settings.parallel:
            command += ["--parallel", str(settings.parallel)]
        return command

    def _explained(self, error: StartError) -> StartError:
        """The same in the words of whoever set the environment."""
        text = OPTION.sub(lambda option: option[1].upper().replace("-", "_"), str(error))
        source = self._settings.model_s3_uri if self._settings.model_path is None else None
        return StartError(f"{text}; the model is a copy of {source}" if source else text)

    def _ready_worker(self, deadline: float | None, cancellation: Cancellation) -> _Worker:
        loaded = self.load()
        if loaded.done():
            return loaded.result()
        with self._lock:
            if self._waiting > self._settings.queue_limit:
                raise BusyError(f"{self._waiting} requests are waiting for the model already (QUEUE_LIMIT)")
            self._waiting += 1
        try:
            give_up_at = self._give_up_at(deadline)
            if give_up_at is not None and time.monotonic() >= give_up_at:
                raise LateError(TOO_LATE)
            over = threading.Event()
            loaded.add_done_callback(lambda _: over.set())
            cancellation.attach(over.set)
            over.wait(_left_s(give_up_at))
            if not loaded.done():
                raise LoadingError("the model is still being loaded; try again, or give the function more time")
            return loaded.result()
        finally:
            cancellation.attach(None)
            with self._lock:
                self._waiting -= 1

    def _timed(self, request: Mapping[str, Any], deadline: float | None) -> dict[str, Any]:
        if deadline is None:
            return dict(request)
        left_ms = (deadline - time.monotonic()) * 1e3 - self._settings.deadline_margin_ms
        return {**request, "timeout_ms": max(1, int(left_ms))}

    def _give_up_at(self, deadline: float | None) -> float | None:
        """Half of the margin is the worker's, to answer; the other half ours, to say that it did not."""
        return None if deadline is None else self._settings.answer_by(deadline)

    def _capacity(self) -> int:
        """What the worker computes at the same time, one as long as there is no worker; and what waits for it."""
        ready = self._worker.ready if self._worker is not None else None
        usable = ready is not None and ready.done() and ready.exception() is None
        parallel = int(ready.result()["n_parallel"]) if ready is not None and usable else 1
        return parallel + self._settings.queue_limit


class _Worker:
    """One process of `bitnet worker`."""

    def __init__(self, command: list[str]) -> None:
        self.ready: Future[Event] = Future()
        self.dead = False
        self._ending = False
        self._ids = itertools.count(1)
        self._inboxes: dict[str, SimpleQueue[Event | None]] = {}
        self._lock = threading.Lock()  # of _inboxes and dead
        self._writing = threading.Lock()
        self._log: deque[str] = deque(maxlen=LOG_LINES_KEPT)
        pipe = subprocess.PIPE
        try:
            # Its own process group: a Ctrl-C in the terminal is for us, who then end it in order.
            # No environment: it needs none, and ours holds credentials.
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env={}, process_group=0)
        except OSError as error:
            raise StartError(f"cannot run {command[0]}: {error.strerror}") from error
        os.set_blocking(self._process.stdin.fileno(), False)  # type: ignore[union-attr]
        try:
            _start_thread("worker-events", self._dispatch, _start_thread("worker-log", self._drain_log))
        except StartError:
            self._process.kill()
            self._process.wait()
            raise

    def ask(
        self,
        op: str,
        requests: Sequence[Mapping[str, Any]],
        give_up_at: float | None,
        cancellation: Cancellation,
        mask: Mask | None,
    ) -> Generator[Event]:
        """Sends requests, answers their masks, yields their other events; cancels the rest if the caller goes away."""
        if give_up_at is not None and time.monotonic() >= give_up_at:  # else it would be ended for not having answered
            raise LateError(TOO_LATE)
        inbox: SimpleQueue[Event | None] = SimpleQueue()
        waits: dict[str, int] = {}  # `done` events to come of each request
        offsets: dict[str, int] = {}
        with self._lock:
            if self.dead:
                raise DiedError("the engine has ended")
            for request in requests:
                name = str(next(self._ids))
                self._inboxes[name] = inbox
                offsets[name] = sum(waits.values())
                waits[name] = request.get("n", 1)
        try:
            for name, request in zip(offsets, requests, strict=True):
                self._send({"op": op, "id": name, **request}, give_up_at)
            cancellation.attach(lambda: self._cancel(list(waits)))
            if self._ending:  # cancel_all may have come before the requests did
                self._cancel(list(waits))
            while waits:
                try:
                    event = inbox.get(timeout=_left_s(give_up_at))
                except Empty:
                    raise self._hung() from None
                if event is None:
                    raise DiedError(f"the engine ended while it computed: {self._epitaph()}")
                name = event["id"]
                if event["event"] == "error":
                    waits.pop(name)
                    raise RefusedError(event)
                index = offsets[name] + event.get("index", 0)
                if event["event"] == "mask":
                    assert mask is not None
                    answer = mask.answer(index, event["tokens"])
                    self._send({"op": "mask", "id": name, "index": event["index"], **answer}, give_up_at)
                    continue
                if event["event"] == "done":
                    waits[name] -= 1
                    if not waits[name]:
                        waits.pop(name)
                yield event | {"index": index}
        finally:
            cancellation.attach(None)
            with self._lock:
                for name in offsets:
                    self._inboxes.pop(name, None)
            self._cancel(list(waits))

    def started(self) -> Event:
        """The `ready` event. Ends a process that does not come to it."""
        try:
            return self.ready.result(START_TIMEOUT_S)
        except FutureTimeoutError:
            self._process.kill()
            raise StartError(f"the engine was not ready after {START_TIMEOUT_S:g} s and was ended") from None

    def cancel_all(self) -> None:
        self._ending = True
        with self._lock:
            names = list(reversed(self._inboxes))  # those in the queue first, so that none of them begins
        self._cancel(names, time.monotonic() + CANCEL_GRACE_S)

    def stop(self) -> None:
        """SIGTERM, at which the worker ends at once, then SIGKILL."""
        self._process.terminate()
        try:
            self._process.wait(EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(EXIT_GRACE_S)

    def _cancel(self, names: Iterable[str], give_up_at: float | None = None) -> None:
        with suppress(DiedError, HungError):
            for name in names:
                self._send({"op": "cancel", "id": name}, give_up_at)

    def _send(self, message: Mapping[str, Any], give_up_at: float | None = None) -> None:
        line = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        left_s = _left_s(give_up_at)
        if not self._writing.acquire(timeout=-1 if left_s is None else left_s):
            raise self._hung()
        try:
            self._write(line, give_up_at)
        except (OSError, ValueError) as error:  # ValueError: closed
            self.dead = True  # now, for the next one who asks: _dispatch may take a moment to see it
            self._process.kill()
            raise DiedError("the engine has ended") from error
        finally:
            self._writing.release()

    def _write(self, line: bytes, give_up_at: float | None) -> None:
        """Writes all of `line`, which a pipe takes no faster than the engine reads."""
        pipe = self._process.stdin.fileno()  # type: ignore[union-attr]
        room = select.poll()
        room.register(pipe, select.POLLOUT)
        left = memoryview(line)
        while left:
            try:
                left = left[os.write(pipe, left) :]
            except BlockingIOError:
                left_s = _left_s(give_up_at)
                if not room.poll(None if left_s is None else left_s * 1e3):
                    raise self._hung() from None

    def _hung(self) -> HungError:
        self._process.kill()
        return HungError("the engine did not stop at the deadline and was ended")

    def _dispatch(self, logs: threading.Thread) -> None:
        """Hands events to those who asked, until the worker ends; then says so to all of them."""
        try:
            self._deliver_all()
        finally:
            self._bury(logs)

    def _deliver_all(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        try:
            with stdout:
                for line in stdout:
                    self._deliver(json.loads(line))
        except Exception as error:  # it is no event, or there is no memory for it
            kind = type(error).__name__
            logger.error("what the worker wrote cannot be read; ending it", extra={"error_type": kind})

    def _bury(self, logs: threading.Thread) -> None:
        try:
            self._process.wait(EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        logs.join()
        with self._lock:
            self.dead = True
            inboxes = list(self._inboxes.values())
        if not self.ready.done():
            how = self._epitaph() if self._log else f"the engine ended before it was ready ({self._epitaph()})"
            self.ready.set_exception(StartError(how))
        logger.log(
            logging.INFO if self._process.returncode in (0, -15) else logging.ERROR,
            "worker ended",
            extra={"exit_code": self._process.returncode, "last_line": self._log[-1] if self._log else None},
        )
        for inbox in inboxes:
            inbox.put(None)
        with self._writing, suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]

    def _deliver(self, event: Event) -> None:
        if event["event"] == "ready":
            self.ready.set_result(event)
            return
        if event["id"] is None:
            logger.error("the worker refused a line", extra={"error_code": event["code"]})
            return
        with self._lock:
            inbox = self._inboxes.get(event["id"])
        if inbox is not None:  # else its caller has gone away
            inbox.put(event)

    def _drain_log(self) -> None:
        stderr = self._process.stderr
        assert stderr is not None
        with stderr:
            for raw in stderr:
                line = raw.decode(errors="replace").rstrip()[:LOG_LINE_CHARACTERS]
                self._log.append(line)
                logger.debug("worker", extra={"line": line})

    def _epitaph(self) -> str:
        code = self._process.returncode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return f"{self._log[-1].removeprefix('bitnet: ')} ({how})" if self._log else how


def _start_thread(name: str, function: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=function, args=arguments, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # as many as the system allows
        raise StartError(f"cannot start the engine: {error}") from None
    return thread


def _left_s(give_up_at: float | None) -> float | None:
    return None if give_up_at is None else max(0.0, give_up_at - time.monotonic())


def _usable(loaded: Future[_Worker]) -> bool:
    return loaded.exception() is None and not loaded.result().dead
