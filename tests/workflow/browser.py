"""A headless Chromium, driven over its DevTools protocol: what a page asks for, says and shows."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 120  # seconds


@dataclass
class Page:
    """A page that was loaded: all requests it made, and everything it wrote to the console."""

    socket: Any
    requests: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)
    loaded: bool = False
    number: int = 0

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol; events that arrive meanwhile are kept."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self._event(message)

    def _event(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            self.console.append(str([arg.get("value") for arg in params["args"]]))
        elif method == "Runtime.exceptionThrown":
            self.console.append(params["exceptionDetails"]["text"])
        elif method == "Log.entryAdded":
            self.console.append(params["entry"]["text"])
        elif method == "Page.loadEventFired":
            self.loaded = True

    def load(self, url: str) -> None:
        for domain in ("Network", "Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + PATIENCE
        while not self.loaded and time.monotonic() < deadline:
            self.call("Runtime.evaluate", expression="0")
            time.sleep(0.05)
        assert self.loaded, f"{url} did not load"

    def value(self, expression: str) -> Any:
        """Value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self) -> bytes:
        """PNG of what is seen without scrolling."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


class Browser:
    """Chromium without a window and without a network; a context manager."""

    def __init__(self, folder: Path):
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--remote-debugging-port=0", "--remote-allow-origins=*", f"--user-data-dir={folder}"]
        options += ["--window-size=1280,1000", "--disable-background-networking", "--disable-component-update"]
        self.folder = folder
        self.process = subprocess.Popen([str(CHROMIUM), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def open(self, path: Path) -> Page:
        """Load a local file in a new page."""
        import websocket

        port_file, deadline = self.folder / "DevToolsActivePort", time.monotonic() + PATIENCE
        while not port_file.exists() or not port_file.read_text().strip():
            assert self.process.poll() is None, "Chromium ended at its start"
            assert time.monotonic() < deadline, "Chromium opened no debugging port"
            time.sleep(0.1)
        port = port_file.read_text().split()[0]
        request = urllib.request.Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            address = json.load(answer)["webSocketDebuggerUrl"]
        page = Page(websocket.create_connection(address, timeout=PATIENCE, suppress_origin=True))
        page.load(path.resolve().as_uri())
        return page
