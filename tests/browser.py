"""A browser for tests: Chromium over the DevTools protocol on a pipe, standard library only."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless --disable-gpu --disable-quic --no-first-run --no-default-browser-check "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-extensions --hide-scrollbars --mute-audio --remote-debugging-pipe"
).split()


def find() -> str | None:
    """Path of a Chromium, None where there is none; CHROMIUM in the environment comes first."""
    given = os.environ.get("CHROMIUM")
    return next((path for name in (given, *NAMES) if name and (path := shutil.which(name))), None)


class Page:
    """One tab. `evaluate` runs JavaScript, `move` and `click` are a real mouse."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._number, self._rest = 0, b""
        self._session: str | None = None
        self._unseen: list[dict[str, Any]] = []

    def attach(self) -> None:
        """Open the tab."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        found = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and return its result.

        Raises:
            RuntimeError: The browser refused it, or went away.
        """
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])
            self._unseen.append(answer)

    def _receive(self, timeout: float = 60) -> dict[str, Any]:
        end = time.monotonic() + timeout
        while b"\0" not in self._rest:
            if not select.select([self._answers], [], [], max(0, end - time.monotonic()))[0]:
                raise RuntimeError("the browser does not answer")
            piece = os.read(self._answers, 1 << 16)
            if not piece:
                raise RuntimeError("the browser has ended")
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))

    def open(self, path: Path, width: int, height: int, dark: bool = False) -> None:
        """Load a file in a window of that size and wait until it has loaded."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self._unseen.clear()
        self.send("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited.

        Raises:
            RuntimeError: It threw.
        """
        options = {"returnByValue": True, "awaitPromise": True}
        found = self.send("Runtime.evaluate", expression=expression, **options)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"])[:800])
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 30) -> Any:
        """Wait until an expression is true.

        Raises:
            TimeoutError: It stays false.
        """
        end = time.monotonic() + seconds
        while not (found := self.evaluate(f"Boolean({expression})")):
            if time.monotonic() > end:
                raise TimeoutError(f"still false: {expression}")
            time.sleep(0.05)
        return found

    def place(self, element: str) -> tuple[float, float]:
        """Middle of an element (a JavaScript expression), scrolled into the window."""
        box = self.evaluate(
            f"(() => {{ const n = {element}; n.scrollIntoView({{block: 'center'}}); "
            "const b = n.getBoundingClientRect(); "
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        return box[0], box[1]

    def move(self, x: float, y: float) -> None:
        """Move the mouse there."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, element: str) -> None:
        """Click on the middle of an element."""
        x, y = self.place(element)
        self.move(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            options = {"x": x, "y": y, "button": "left", "clickCount": 1}
            self.send("Input.dispatchMouseEvent", type=kind, **options)

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Write a picture of the page."""
        found = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def complaints(self) -> list[str]:
        """Exceptions and error messages since the page was opened."""
        self.evaluate("0")  # what was said before is in by then
        found = []
        for event in self._unseen:
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(str(event["params"]["exceptionDetails"])[:500])
            elif event.get("method") == "Log.entryAdded":
                entry = event["params"]["entry"]
                if entry["level"] == "error":
                    found.append(entry["text"])
        return found


@contextlib.contextmanager
def browser(program: str) -> Iterator[Page]:
    """Start a Chromium with an empty profile, and end it."""
    to_browser, from_browser = os.pipe(), os.pipe()
    flags = list(_FLAGS)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        flags.append("--no-sandbox")  # Chromium refuses to start as root with it
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:

        def wire() -> None:  # the protocol is spoken on descriptors 3 and 4
            source, sink = os.dup(to_browser[0]), os.dup(from_browser[1])
            os.dup2(source, 3)
            os.dup2(sink, 4)

        process = subprocess.Popen(
            [program, *flags, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=wire,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        try:
            page = Page(to_browser[1], from_browser[0])
            page.attach()
            yield page
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
            os.close(to_browser[1])
            os.close(from_browser[0])
