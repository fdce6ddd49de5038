"""Who may ask the page's server, and for what."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import sys
import threading
import time
from dataclasses import replace

import pytest

from assay.cli import main
from assay.corpus.errors import CorpusError
from assay.corpus.scores_folder import open_scores
from assay.explore import open_explorer, open_server
from tests.report.small_report import make_scores

pytest.importorskip("duckdb")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("server")
    return make_scores(root, {"text": list("abcdef"), "label": [0, 1] * 3}, {"x": range(6), "y": [1] * 6})


@pytest.fixture(scope="module")
def server(folder):
    explorer = open_explorer(
        open_scores(str(folder)), ["label"], lambda where: f"select {where}", lambda ranked: [], lambda: "<p>all"
    )
    with open_server() as server:
        server.explorer = explorer
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, path, method="GET", host=None, body=None, **headers):
    """Status, headers and body of what comes back. ``path``: below the token, unless it begins with /."""
    port = server.server_address[1]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    path = path if path.startswith("/") else f"/{server.token}/{path}"
    connection.putrequest(method, path, skip_host=True)
    for name, value in {"Host": host or f"127.0.0.1:{port}", **headers}.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders(body)
    reply = connection.getresponse()
    found = reply.status, dict(reply.getheaders()), reply.read().decode()
    connection.close()
    return found


def test_the_page_and_its_answers(server):
    for path, kind in {"": "text/html", "page.js": "text/javascript", "page.css": "text/css"}.items():
        status, headers, body = ask(server, path)
        assert (status, headers["Content-Type"]) == (200, f"{kind}; charset=utf-8")
        assert "innerHTML" not in body
        assert "http://" not in body.replace("http://www.w3.org/2000/svg", "")
    found = json.loads(ask(server, 'count?cuts=[[0,"high",2.5]]')[2])
    assert (found["kept"], found["command"], found["groups"]) == (3, 'select "x" >= 2.5', [[1, 2]])
    assert ask(server, "", host="localhost:8888")[0] == 200  # through a tunnel
    status, headers, body = ask(server, "report.html")
    assert (status, headers["Content-Type"], body) == (200, "text/html; charset=utf-8", "<p>all")
    assert headers["Content-Security-Policy"].startswith(
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:;"
    )
    assert "script-src" not in headers["Content-Security-Policy"]


def test_every_answer_forbids_the_rest(server):
    for path in ("", "page.js", "count", "nothing", "/"):
        headers = ask(server, path)[1]
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src")
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert not [name for name in headers if name.startswith("Access-Control")]
        assert headers["Server"] == "assay"


def test_others_may_not_ask(server):
    own = f"http://127.0.0.1:{server.server_address[1]}"
    assert ask(server, "count", Origin=own)[0] == 200
    assert ask(server, "count", Sec_Fetch_Site="same-origin")[0] == 200
    for host in (
        "evil.example",
        f"evil.example:{server.server_address[1]}",
        "127.0.0.1.evil.example",
        "[::1]",
        "0.0.0.0",
    ):
        assert ask(server, "count", host=host)[0] == 403
    for origin in ("http://evil.example", "null", "https://" + own[7:], "http://127.0.0.1:1"):
        assert ask(server, "count", Origin=origin)[0] == 403
    for site in ("cross-site", "same-site"):
        assert ask(server, "count", Sec_Fetch_Site=site)[0] == 403
        assert ask(server, "", Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate", Sec_Fetch_Dest="iframe")[0] == 403
        # A link to the page, as a terminal in a browser has it.
        assert ask(server, "", Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate", Sec_Fetch_Dest="document")[0] == 200
    token = server.token
    wrong = ["/", "/count", f"/{token[:-1]}/", f"/{token}x/count", f"/{token}", "//", f"/x/../{token}/", f"/?{token}"]
    for path in wrong:
        status, _, body = ask(server, path)
        assert status == 403, path
        assert token not in body


def test_it_only_reads(server):
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE"):
        assert ask(server, "count", method)[0] == 501, method
    assert ask(server, "count", body=b"x", Content_Length="1")[0] == 400
    for path in ("../server.py", "page.html", "server.py", "%2e%2e/server.py", "..%2fserver.py", "page.js/", "nothing"):
        assert ask(server, path)[0] == 404, path


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("count?cuts=", 200, "kept"),
        ("count?cuts=x", 400, "Expecting value"),
        ("count?cuts=[[5,%22high%22,1]]", 400, "from 0 to 0"),
        ("near?at=0", 400, "expected the number of a score that is cut at"),
        ("near?at=-1&cuts=[[0,%22high%22,1]]", 400, "expected the number"),
        ("near?at=0&cuts=[[0,%22high%22,1]]", 200, "kept"),
        ("count?" + "&".join("a=b" for _ in range(9)), 400, "no address"),
        ("count?cuts=" + "[" * 15_000, 400, "nested"),
        ("count?cuts=" + "x" * 24_000, 414, "24,000"),
        ("count?cuts=" + "x" * 70_000, 414, "simple questions"),
    ],
    ids=range(10),
)
def test_what_it_cannot_answer_is_one_line(server, path, status, said):
    found, _, body = ask(server, path)
    assert (found, said in body) == (status, True), body
    assert status == 200 or body.count("\n") == 1


def test_a_fault_of_its_own_is_told_to_the_terminal_alone(server, monkeypatch, caplog):
    monkeypatch.setattr(type(server.explorer), "count", lambda *_: 1 / 0)
    status, _, body = ask(server, "count")
    assert (status, "zero" in body) == (500, False)
    assert "ZeroDivisionError" in caplog.text


def test_who_takes_nothing_is_no_fault(server, monkeypatch, caplog):
    monkeypatch.setattr(server, "explorer", replace(server.explorer, report=lambda: "x" * (16 << 20)))
    monkeypatch.setattr(server.RequestHandlerClass, "timeout", 0.2)
    with socket.create_connection(server.server_address) as other:
        head = f"Host: 127.0.0.1:{server.server_address[1]}\r\n\r\n"
        other.sendall(f"GET /{server.token}/report.html HTTP/1.1\r\n{head}".encode())
        time.sleep(0.5)
    assert not [its for its in caplog.records if its.levelname == "ERROR"]
    assert ask(server, "facts")[0] == 200


def test_a_report_without_matplotlib_is_one_line(server, monkeypatch):
    def missing():
        raise ImportError("matplotlib is not installed")

    monkeypatch.setattr(server, "explorer", replace(server.explorer, report=missing))
    assert ask(server, "report.html")[::2] == (409, "matplotlib is not installed\n")


def test_the_page_goes_on_while_a_report_is_made(server, monkeypatch):
    go_on, asked = threading.Event(), threading.Event()

    def slow():
        asked.set()
        assert go_on.wait(20)
        return "made"

    monkeypatch.setattr(server, "explorer", replace(server.explorer, report=slow))
    monkeypatch.setattr("assay.explore.server._WAIT", 0.01)
    found = []
    thread = threading.Thread(target=lambda: found.append(ask(server, "report.html")))
    thread.start()
    assert asked.wait(20)
    assert ask(server, "report.html")[::2] == (503, "busy with another question\n")
    assert ask(server, "count")[0] == 200
    go_on.set()
    thread.join()
    assert found[0][::2] == (200, "made")


def test_a_table_that_is_gone_is_one_line(server, monkeypatch):
    def gone(*_):
        raise FileNotFoundError(2, "No such file or directory", "/scores/a\x1b.parquet")

    monkeypatch.setattr(type(server.explorer), "near", gone)
    status, _, body = ask(server, "near?at=0&cuts=[[0,%22high%22,1]]")
    assert (status, body.count("\n")) == (409, 1)
    assert "a\\x1b.parquet" in body


def test_a_question_has_its_time(server, monkeypatch):
    monkeypatch.setattr("assay.explore.explorer.SECONDS", -1.0)
    status, _, body = ask(server, 'count?cuts=[[0,"high",2.5]]')
    assert (status, body) == (409, "this takes too long here; `assay select` has no such limit\n")


def test_many_idle_connections_keep_nobody_out_for_long(server):
    idle = [socket.create_connection(server.server_address) for _ in range(32)]
    for connection in idle:
        connection.close()
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            assert ask(server, "count")[0] == 200
            break
        except (ConnectionError, http.client.HTTPException):
            time.sleep(0.02)
    else:
        raise AssertionError("nobody is let in")


def test_a_taken_port_is_one_line(server, folder, capsys):
    port = server.server_address[1]
    assert main(["explore", str(folder), "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"assay: --port {port}: cannot listen there (")
    assert error.count("\n") == 1
    with pytest.raises(CorpusError, match="--port 70000"):
        open_server(70000)


def test_misuse_is_one_line(folder, capsys, monkeypatch):
    wrong = {
        ("--port", "70000"): "--port 70000: expected a number from 0 to 65535",
        ("--group", "nothing"): "--group nothing: is no column of the corpus; it has text, label",
    }
    for arguments, message in wrong.items():
        assert main(["explore", str(folder), *arguments]) == 2
        assert capsys.readouterr().err == f"assay: {message}\n"
    monkeypatch.setitem(sys.modules, "duckdb", None)
    assert main(["explore", str(folder)]) == 2
    assert "duckdb is not installed; it comes with `pip install 'assay[sql]'`" in capsys.readouterr().err


def test_ctrl_c_ends_it_well(folder, capfd, monkeypatch):
    """With exit status 0, after it has said where the page is."""
    pytest.importorskip("matplotlib")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr("assay.explore.server.secrets.token_urlsafe", lambda size: "t" * size)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background has not got
    replies = []

    def get(path):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", path)
        reply = connection.getresponse()
        return reply.status, reply.read().decode()

    def interrupt():
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with contextlib.suppress(OSError, http.client.HTTPException):
                replies.extend([get("/"), get(f"/{'t' * 24}/near"), get(f"/{'t' * 24}/report.html")])
                break
            time.sleep(0.02)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        assert main(["explore", str(folder), "--port", str(port)]) == 0
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().out.startswith(f"open http://127.0.0.1:{port}/{'t' * 24}/\n")
    (refused, _), (shown, rows), (whole, page) = replies
    assert (refused, shown, whole) == (403, 200, 200)
    assert len(json.loads(rows)["kept"]) == 4
    assert "The scores, one by one" in page


def test_a_token_is_one_of_many(monkeypatch):
    with open_server() as one, open_server() as other:
        assert one.token != other.token
        assert len(one.token) == 32
        assert one.server_address[0] == "127.0.0.1"
