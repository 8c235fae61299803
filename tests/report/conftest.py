"""Headless Chromium for tests of pages, by its debugging pipe: nothing to install beside it."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--remote-debugging-pipe", "--window-size=1300,1200",
)  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Browser:
    """One tab; commands of the Chrome DevTools Protocol, answers awaited."""

    def __init__(self, program: str, profile: Path) -> None:
        # The browser reads commands from descriptor 3 and writes answers to 4.
        read_command, self._write = os.pipe()
        self._read, write_answer = os.pipe()

        def descriptors() -> None:
            os.dup2(read_command, 20)
            os.dup2(write_answer, 21)
            os.dup2(20, 3)
            os.dup2(21, 4)
            os.closerange(5, 64)

        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=descriptors,
            close_fds=False,
        )
        os.close(read_command)
        os.close(write_answer)
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._session = ""
        self.requested: list[str] = []
        self.complaints: list[str] = []
        (target,) = (
            t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page"
        )
        attached = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._read, 1 << 16)
            assert piece, "the browser is gone"
            self._buffer += piece
        text, _, self._buffer = self._buffer.partition(b"\0")
        answer = json.loads(text)
        parameters = answer.get("params", {})
        if answer.get("method") == "Network.requestWillBeSent":
            self.requested.append(parameters["request"]["url"])
        if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(parameters))
        return answer

    def open(self, path: Path) -> None:
        self.requested.clear()
        self.complaints.clear()
        self.send("Page.navigate", url=path.as_uri())
        while self("document.readyState") != "complete":
            pass

    def __call__(self, expression: str) -> Any:
        """Value of an expression on the page."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str) -> None:
        codes = {"Tab": 9, "ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "Escape": 27}
        for kind in ("rawKeyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key,
                windowsVirtualKeyCode=codes[key],
            )  # fmt: skip

    def point(self, selector: str, *, click: bool = False) -> None:
        """Move the mouse onto the middle of an element."""
        box = self(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const b ="
            " e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        place = {"x": box[0], "y": box[1]}
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **place)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.send(
                "Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place
            )

    def picture(self) -> bytes:
        found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(found["data"])

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()
