"""A real browser without a window, driven over a pipe by the Chrome DevTools protocol; no package is needed."""

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VARIABLE = "LIBPRUNE_CHROMIUM"
"""Names a Chromium where none of `PROGRAMS` is on the PATH."""
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "headless_shell")
_SECONDS = 60.0
"""The longest wait for an answer."""
_CHILD = """
import os, sys
reading, writing = int(sys.argv[1]), int(sys.argv[2])
os.dup2(reading, 100), os.dup2(writing, 101), os.dup2(100, 3), os.dup2(101, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Puts the two ends of the pipes where Chromium expects them, and becomes Chromium."""


def find_chromium() -> str | None:
    """The Chromium that the variable names, or the first on the PATH."""
    return os.environ.get(VARIABLE) or next(filter(None, map(shutil.which, PROGRAMS)), None)


class Tab:
    """A page in the browser, and what its console and its network said."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing, self._number, self._rest = reading, writing, 0, b""
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a method of the protocol; events that come before it are kept."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        os.write(
            self._writing, json.dumps({"id": self._number, "method": method, "params": params, **session}).encode()
        )
        os.write(self._writing, b"\0")
        while (message := self._read()).get("id") != self._number:
            self.events.append(message)
        assert "error" not in message, message
        return dict(message["result"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._reading], [], [], _SECONDS)[0], "the browser does not answer"
            part = os.read(self._reading, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(text))

    def show(self, path: Path, width: int, theme: str, script: bool = True) -> None:
        """Open a file in a window of this width, in a light or dark theme, with its script or without."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def value(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def mouse(self, kind: str, x: float, y: float) -> None:
        """An event of the mouse, such as `mouseMoved`, at a place in the window."""
        click = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **click)

    def click(self, x: float, y: float) -> None:
        """Press and release the left button."""
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.mouse(kind, x, y)

    def complaints(self) -> list[str]:
        """What the console, the policy or a script complained of since the page was opened."""
        kinds = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        return [json.dumps(event["params"])[:500] for event in self.events if event["method"] in kinds]

    def fetched(self) -> list[str]:
        """The addresses that were asked for since the page was opened, without those that are data."""
        asked = (e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent")
        return [url for url in asked if not url.startswith("data:")]


@contextmanager
def browsing(program: str, profile: Path) -> Iterator[Tab]:
    """A browser for as long as the block runs.

    Args:
        program: the path of a Chromium.
        profile: a folder for what it keeps.
    """
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
    command = [sys.executable, "-c", _CHILD, str(to_read), str(from_write), program, *options]
    command += [f"--user-data-dir={profile}", "about:blank"]
    with (profile.parent / "browser.log").open("w") as log:
        running = subprocess.Popen(command, pass_fds=(to_read, from_write), stderr=log, stdout=log)
    os.close(to_read)
    os.close(from_write)
    try:
        tab = Tab(from_read, to_write)
        yield tab
    finally:
        os.close(to_write)
        os.close(from_read)
        _end(running)


def _end(running: subprocess.Popen[bytes]) -> None:
    """A browser whose pipe is closed ends by itself; one that does not is ended."""
    until = time.monotonic() + 5
    while running.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    running.kill()
    running.wait()
