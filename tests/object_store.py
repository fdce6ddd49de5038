"""An object store of S3's kind on loopback, by moto, that can be told to misbehave."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.request import Request, urlopen

from werkzeug.serving import WSGIRequestHandler, make_server

Environ = dict[str, Any]
Application = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]
BUCKET = "bucket"
BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
BROKEN = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>We encountered an error.</Message></Error>"
ANSWERS = {"throttled": ("503 Slow Down", BUSY), "error": ("500 Internal Server Error", BROKEN)}


class ObjectStore:
    """The server. While it misbehaves, each n-th request whose method and path begin and end as told meets a fault.

    Faults: "slow" (an answer begins late), "throttled" (503), "error" (500), "cut" (the connection ends in the middle
    of the body, as its length shows). ``met`` counts them, ``requests`` all that is asked.
    """

    def __init__(self, application: Application) -> None:
        self.application = application
        self.every: dict[str, int] = {}
        self.method, self.ending = "", ""
        self.met: Counter[str] = Counter()
        self.requests = 0
        self._numbers = itertools.count(1)

    def __call__(self, environ: Environ, start: Callable[..., Any]) -> Iterable[bytes]:
        self.requests += 1
        due = self._due(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        self.met.update(due)
        for fault in due:
            if fault == "slow":
                time.sleep(0.2)
            elif fault in ANSWERS:
                status, body = ANSWERS[fault]
                start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
                return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
        body = self.application(environ, start)
        return _half(body) if "cut" in due else body

    def _due(self, method: str, path: str) -> list[str]:
        if not (method.startswith(self.method) and path.endswith(self.ending)):
            return []
        number = next(self._numbers)
        return [fault for fault, every in self.every.items() if number % every == 0]

    @contextlib.contextmanager
    def misbehaving(self, method: str = "", ending: str = "", **every: int) -> Iterator[None]:
        """Each ``every[fault]``-th request of this method, of paths that end so, meets the fault."""
        self.method, self.ending, self.every = method, ending, every
        self.met.clear()
        try:
            yield
        finally:
            self.every = {}


def _half(body: Iterable[bytes]) -> Iterator[bytes]:
    whole = b"".join(body)
    yield whole[: len(whole) // 2]
    if len(whole) > 1:
        raise ConnectionAbortedError("planted: the connection ends here")


class _Silent(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        """Its requests are counted, and its planted errors expected."""


@contextlib.contextmanager
def serve() -> Iterator[tuple[ObjectStore, dict[str, Any]]]:
    """A store with a bucket, and what fsspec needs to find it."""
    from moto.server import DomainDispatcherApplication, create_backend_app

    store = ObjectStore(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=_Silent)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        urlopen(Request(f"{url}/moto-api/reset", method="POST"))  # moto keeps one state for all servers of a process
        urlopen(Request(f"{url}/{BUCKET}", method="PUT"))
        yield store, {"endpoint_url": url, "key": "k", "secret": "s"}
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
