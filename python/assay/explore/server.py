"""The page's server: on this machine's loopback, for whoever has the token, and for reading only.

Other users of the machine, and pages of other origins in the same browser, can reach the port. The token keeps both
out; the check of the Host header keeps out a name of a stranger's that leads to 127.0.0.1 (DNS rebinding); nothing is
allowed to other origins, and nothing that is asked for changes anything.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from assay._json import dumps
from assay.corpus.errors import CorpusError
from assay.explore.answers import facts, samples
from assay.explore.cuts import parse_cuts
from assay.explore.explorer import Explorer
from assay.report.html import visible
from assay.report.style import style

log = logging.getLogger("assay")

HOST = "127.0.0.1"
_HOSTS = (HOST, "localhost")
_LONGEST = 24_000
_WAIT = 30.0
_MOST_CONNECTIONS = 32
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# The report's own style stands in it; it has no script.
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_REPORT = "report.html"
_FILES = {"": ("page.html", "text/html"), "page.js": ("page.js", "text/javascript"), "page.css": ("", "text/css")}


class _Reply(NamedTuple):
    body: bytes
    kind: str
    policy: str = _POLICY


class _Refused(Exception):
    """An answer of this status, with one line for whoever asked."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status = status


class Server(ThreadingHTTPServer):
    """Serves one explorer, one question at a time, under a secret path."""

    daemon_threads = True
    request_queue_size = 64

    explorer: Explorer
    """Answers; set before anything is served."""

    def __init__(self, port: int) -> None:
        super().__init__((HOST, port), _Handler)
        self.token = secrets.token_urlsafe(24)
        # The report takes its time, in which the page goes on.
        self.turns = {name: threading.Lock() for name in ("page", "report")}
        self.places = threading.Semaphore(_MOST_CONNECTIONS)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_address[1]}/{self.token}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """On a thread of its own, as long as there are few."""
        if self.places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Gives its place up at the end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Somebody who went away is no error."""
        log.debug("a connection ended", exc_info=True)


def open_server(port: int = 0) -> Server:
    """Listen on 127.0.0.1, at a free port unless one is given. CorpusError if it is taken."""
    try:
        return Server(port)
    except (OSError, OverflowError) as error:
        raise CorpusError(f"--port {port}: cannot listen there ({error}); without it a free one is taken") from error


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 30
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer, or say in one line why not."""
        try:
            self._check()
            self._send(200, self._answer())
        except _Refused as refused:
            self.close_connection = True
            self._send(refused.status, _line(visible(str(refused))))
        except OSError:  # who asked has gone, or takes nothing: what answers raise is refused above
            self.close_connection = True
        except Exception:
            log.exception("a question of the page failed")
            self._send(500, _line("it failed; the terminal says how"))

    def _check(self) -> None:
        """What is not asked by the page itself is refused before anything is looked at."""
        hosts = self.headers.get_all("Host") or []
        host = hosts[0].rpartition(":")[0] or hosts[0] if len(hosts) == 1 else ""
        if host not in _HOSTS:
            raise _Refused(403, f"this is a page of {HOST} alone")
        if self.headers.get("Origin", f"http://{hosts[0]}") != f"http://{hosts[0]}":
            raise _Refused(403, "other pages may not ask")
        opened = self.headers.get("Sec-Fetch-Mode") == "navigate" and self.headers.get("Sec-Fetch-Dest") == "document"
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and not opened:
            raise _Refused(403, "other pages may not ask")  # they may have a link, as a terminal in a browser has
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            raise _Refused(400, "a question has no body")
        if len(self.path) > _LONGEST:
            raise _Refused(414, f"a question has at most {_LONGEST:,} characters")

    def _answer(self) -> _Reply:
        try:
            asked = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(asked.query, max_num_fields=8).items()}
        except ValueError as error:
            raise _Refused(400, "this is no address") from error
        token, slash, name = asked.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()) or not slash:
            raise _Refused(403, "open the address that `assay explore` printed")
        if name in _FILES:
            file, kind = _FILES[name]
            return _Reply(_file(file), kind)
        if name not in _QUESTIONS:
            raise _Refused(404, "there is nothing here")
        turn = self.server.turns["report" if name == _REPORT else "page"]
        if not turn.acquire(timeout=_WAIT):
            raise _Refused(503, "busy with another question")
        try:
            return _QUESTIONS[name](self.server.explorer, query)
        except (CorpusError, ImportError) as error:
            raise _Refused(409, str(error)) from error
        except ValueError as error:
            raise _Refused(400, str(error)) from error
        except OSError as error:
            raise _Refused(409, f"a file of the scores cannot be read any more: {error}") from error
        finally:
            turn.release()

    def _send(self, status: int, reply: _Reply) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Security-Policy", reply.policy)
        self.send_header("Content-Type", f"{reply.kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        self.wfile.write(reply.body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library itself refuses, such as other methods than GET, without repeating what was asked."""
        self.close_connection = True
        self._send(code, _line("only simple questions by GET are answered"))

    def version_string(self) -> str:
        """Not which Python this is."""
        return "assay"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the address has the token in it."""


def _file(name: str) -> bytes:
    if name:
        return (Path(__file__).parent / name).read_bytes()
    return str(style()).encode() + (Path(__file__).parent / "page.css").read_bytes()


def _line(text: str) -> _Reply:
    return _Reply(f"{text}\n".encode(), "text/plain")


def _json(answer: Any) -> _Reply:
    return _Reply(dumps(answer).encode(), "application/json")


def _count(explorer: Explorer, query: dict[str, str]) -> _Reply:
    return _json(explorer.count(parse_cuts(query.get("cuts", "[]"), explorer.names)))


def _near(explorer: Explorer, query: dict[str, str]) -> _Reply:
    cuts = parse_cuts(query.get("cuts", "[]"), explorer.names)
    place = query.get("at", "")
    if not place:
        return _json(samples(explorer.some(cuts, seed=0), None))
    named = {str(i): name for i, name in enumerate(explorer.names)}.get(place)
    if named not in {cut.score for cut in cuts}:
        raise ValueError("at: expected the number of a score that is cut at")
    return _json(samples(explorer.near(cuts, named), named))


_QUESTIONS: dict[str, Callable[[Explorer, dict[str, str]], _Reply]] = {
    "facts": lambda explorer, query: _json(facts(explorer)),
    "count": _count,
    "near": _near,
    _REPORT: lambda explorer, query: _Reply(explorer.report().encode(), "text/html", _REPORT_POLICY),
}
