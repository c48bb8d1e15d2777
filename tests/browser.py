"""A Chromium of a test's own, driven by the DevTools protocol over pipes.

Messages are JSON that ends with NUL, on file descriptors 3 and 4.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Browser:
    """One page of one browser."""

    def __init__(self, to: BinaryIO, back: BinaryIO) -> None:
        self.to = to
        self.back = back
        self.sent = 0
        self.session: str | None = None
        self.loads = 0
        """Number of documents that have been loaded."""
        self.complaints: list[str] = []
        """Console output of the page, and exceptions of its scripts."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command, and return its result."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params}
        self.to.write(
            json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode()
            + b"\0"
        )
        self.to.flush()
        while True:
            answer = self.read()
            if answer.get("id") == self.sent:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def read(self) -> dict[str, Any]:
        """Read the next message."""
        line = bytearray()
        while (byte := self.back.read(1)) != b"\0":
            assert byte, "the browser has ended"
            line += byte
        message: dict[str, Any] = json.loads(line)
        self.loads += message.get("method") == "Page.loadEventFired"
        if message.get("method") in (
            "Runtime.consoleAPICalled",
            "Runtime.exceptionThrown",
            "Log.entryAdded",
        ):
            self.complaints.append(json.dumps(message["params"]))
        return message

    def open(self, url: str) -> None:
        """Open an address, and wait until it is loaded."""
        before = self.loads
        self.call("Page.navigate", url=url)
        self.wait_for_load(before)

    def wait_for_load(self, before: int) -> None:
        """Wait until another document has been loaded."""
        while self.loads == before:
            self.read()

    def submit(self, **values: str) -> None:
        """Type into the inputs of these names, press Enter and wait for the answer, without a
        script.
        """
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        for name, text in values.items():
            node = self.call("DOM.querySelector", nodeId=root, selector=f"input[name={name}]")[
                "nodeId"
            ]
            self.call("DOM.focus", nodeId=node)
            self.call("Input.insertText", text=text)
        before = self.loads
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key="Enter",
                code="Enter",
                windowsVirtualKeyCode=13,
                text="\r",
            )
        self.wait_for_load(before)

    @property
    def html(self) -> str:
        """The current document."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        text: str = self.call("DOM.getOuterHTML", nodeId=root)["outerHTML"]
        return text

    def evaluate(self, script: str) -> Any:
        """The value of a script, after its promise is resolved."""
        done = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def be_a_phone(self, *, dark: bool) -> None:
        """Show 390 points of width, in the dark or the light colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=390,
            height=844,
            deviceScaleFactor=2,
            mobile=True,
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self) -> bytes:
        """The whole page as a PNG."""
        return base64.b64decode(
            self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        )


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A headless browser, ended at the end of the block."""
    assert CHROMIUM is not None
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()

    def take_their_ends() -> None:
        for end, place in ((os.dup(theirs_in), 3), (os.dup(theirs_out), 4)):
            os.dup2(end, place)

    arguments = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--remote-debugging-pipe",
        f"--user-data-dir={profile}",
    ]
    with subprocess.Popen(
        [CHROMIUM, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        close_fds=False,
        preexec_fn=take_their_ends,
    ) as process:
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            with os.fdopen(ours_out, "wb") as to, os.fdopen(ours_in, "rb") as back:
                yield Browser(to, back)
        finally:
            process.kill()
