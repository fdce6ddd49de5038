"""Debian's Chromium, driven through a pipe by the DevTools protocol: what a page does in front of a reader.

Playwright would bring a copy of Node (130 MB) to speak the same few messages, over browsers of its own choosing.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 20.0
_FLAGS = (
    *("--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-sync", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars"),
    "--remote-debugging-pipe",
)


class Browser:
    """A browser with a profile of its own, and every message that came from it."""

    def __init__(self, profile: Path) -> None:
        found = shutil.which("chromium")
        assert found, "these tests need Chromium: apt-get install -y --no-install-recommends chromium"
        theirs_in, self._out = _pipe()
        self._in, theirs_out = _pipe()
        flags = [*_FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else []), f"--user-data-dir={profile}"]
        # It reads descriptor 3 and writes 4.
        command = ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", found, *flags, "about:blank"]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, stdin=quiet, stdout=quiet, stderr=quiet, pass_fds=(theirs_in, theirs_out)
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._bytes, self._count = b"", 0
        self._replies: dict[int, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []

    def close(self) -> None:
        """End it, and only it."""
        os.close(self._out)
        try:
            self._process.wait(5)  # it goes when its pipe does
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The reply to one message. RuntimeError where it is an error."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {} if session is None else {"sessionId": session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + SECONDS
        while self._count not in self._replies:
            self.listen(end - time.monotonic())
        reply = self._replies.pop(self._count)
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']['message']}")
        result: dict[str, Any] = reply["result"]
        return result

    def listen(self, seconds: float) -> None:
        """Take what comes within some time. TimeoutError if nothing does."""
        if not select.select([self._in], [], [], max(seconds, 0))[0]:
            raise TimeoutError("Chromium does not answer")
        read = os.read(self._in, 1 << 20)
        if not read:
            raise RuntimeError("Chromium has ended")
        *messages, self._bytes = (self._bytes + read).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._replies[message["id"]] = message
            else:
                self.events.append(message)


class Page:
    """One tab."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.send(method, self._session, **params)

    def events(self, method: str) -> list[dict[str, Any]]:
        """What this tab has told of that kind."""
        own = [its for its in self.browser.events if its.get("sessionId") == self._session]
        return [its["params"] for its in own if its["method"] == method]

    def look(self, width: int, height: int, dark: bool = False) -> None:
        """From a window of this size, in these colours."""
        phone = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        """Until it is loaded."""
        before = len(self.events("Page.loadEventFired"))
        self.send("Page.navigate", url=url)
        end = time.monotonic() + SECONDS
        while len(self.events("Page.loadEventFired")) == before:
            self.browser.listen(end - time.monotonic())

    def js(self, expression: str) -> Any:
        """The value of an expression, or of what it promises. RuntimeError where it throws."""
        reply = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in reply:
            raise RuntimeError(f"{expression}: {reply['exceptionDetails']}")
        return reply["result"].get("value")

    def until(self, expression: str) -> Any:
        """The first value of an expression that counts as true."""
        end = time.monotonic() + SECONDS
        while not (value := self.js(expression)):
            if time.monotonic() > end:
                raise TimeoutError(f"never: {expression}; the page says: {self.js('document.body.innerText')[:2000]}")
            time.sleep(0.02)
        return value

    def drag(self, selector: str, start: float, stop: float) -> None:
        """With the mouse, from one share of an element's width to another."""
        self.js(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        box = self.js(f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()")
        y = box["top"] + box["height"] / 2
        at = [box["left"] + box["width"] * share for share in (start, (start + stop) / 2, stop)]
        for kind, x in (("mousePressed", at[0]), *(("mouseMoved", x) for x in at[1:]), ("mouseReleased", at[2])):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def screenshot(self, path: Path) -> None:
        """Of the whole page."""
        self.js("scrollTo(0, 0)")
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser for a while."""
    browser = Browser(profile)
    try:
        yield browser
    finally:
        browser.close()


def _pipe() -> tuple[int, int]:
    """With descriptors beyond those that the browser's shell puts in order."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 16) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]
