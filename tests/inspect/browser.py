"""A headless Chromium that tests look at pages with, through chromedriver and plain HTTP."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.limits import HANGS_AFTER_S

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
MISSING = "no chromium and chromedriver here: the page is not looked at"
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--hide-scrollbars"),
]


class Window(NamedTuple):
    """A window of the browser.

    Attributes:
        url: of the session of chromedriver.
    """

    url: str

    def show(self, page: Path, *, width: int, scheme: str, height: int = 900) -> None:
        """Load the page into a window of so many CSS pixels, in the ``light`` or ``dark`` scheme.

        The size is set as for a telephone: windows themselves have a least width.
        """
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._command("Emulation.setDeviceMetricsOverride", size)
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self._command("Emulation.setEmulatedMedia", {"features": media})
        _ask(f"{self.url}/url", {"url": page.as_uri()})

    def run(self, script: str) -> Any:
        """What the body of a JavaScript function returns in the page."""
        return _ask(f"{self.url}/execute/sync", {"script": script, "args": []})

    def save(self, path: Path) -> None:
        """Write a picture of the whole page as PNG."""
        options = {"captureBeyondViewport": True}
        height = self.run("return document.documentElement.scrollHeight")
        width = self.run("return innerWidth")
        options["clip"] = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        path.write_bytes(base64.b64decode(self._command("Page.captureScreenshot", options)["data"]))

    def _command(self, name: str, options: dict[str, Any]) -> Any:
        return _ask(f"{self.url}/goog/cdp/execute", {"cmd": name, "params": options})


def _ask(url: str, body: dict[str, Any], method: str = "POST") -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=HANGS_AFTER_S) as answer:
        return json.loads(answer.read())["value"]


@contextlib.contextmanager
def browser() -> Iterator[Window]:
    """Start a browser, and end it with the block."""
    assert CHROMIUM is not None
    assert CHROMEDRIVER is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        driver = subprocess.Popen(
            [CHROMEDRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            assert driver.stdout is not None
            lines = iter(driver.stdout.readline, "")
            found = filter(None, (re.search(r"on port (\d+)\.", line) for line in lines))
            address = f"http://127.0.0.1:{next(found)[1]}/session"
            arguments = [*ARGUMENTS, f"--user-data-dir={profile}"]
            options = {"binary": CHROMIUM, "args": arguments}
            wanted = {"alwaysMatch": {"goog:chromeOptions": options}}
            session = _ask(address, {"capabilities": wanted})["sessionId"]
            try:
                yield Window(f"{address}/{session}")
            finally:
                _ask(f"{address}/{session}", {}, "DELETE")
        finally:
            driver.terminate()
            driver.wait(HANGS_AFTER_S)
