"""A real headless Chromium, driven by the WebDriver protocol (https://www.w3.org/TR/webdriver2/)."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gateway import guard
from tests import leaks

CHROMIUM = Path(__file__).parents[2] / ".tools" / "chromium"
PATIENCE = 25.0
"""Seconds that something may take to be seen on a machine under load."""
DESKTOP, PHONE = (1280, 900), (360, 740)
TAB, ENTER, SPACE = "\ue004", "\ue007", " "

_LOOK_EVERY = 0.05
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
_STARTED = re.compile(r"started successfully on port (\d+)")
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-breakpad", "--disable-dev-shm-usage"),
    *("--no-proxy-server", "--lang=en", "--hide-scrollbars"),
)


class Browser:
    """One window. Everything that waits does so until it is seen, and fails with what was seen instead."""

    def __init__(self, session: str) -> None:
        self._session = session
        self.element = Elements(self)

    def send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One command."""
        return _send(method, f"{self._session}{path}", body)

    def devtools(self, command: str, **parameters: Any) -> Any:
        """One command of the DevTools protocol."""
        return self.send("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, url: str) -> None:
        """Goes there."""
        self.send("POST", "/url", {"url": url})

    def go(self, page: str) -> None:
        """Goes to another page of the dashboard."""
        self.script("location.hash = arguments[0]", page)

    def script(self, text: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self.send("POST", "/execute/sync", {"script": text, "args": arguments})

    def until(self, text: str, *arguments: Any, patience: float = PATIENCE) -> Any:
        """What a script returns, once that is true."""
        deadline = time.monotonic() + patience
        while not (found := self.script(text, *arguments)):
            assert time.monotonic() < deadline, f"never true: {text} {arguments}; the page says:\n{self.text()}"
            time.sleep(_LOOK_EVERY)
        return found

    def text(self) -> str:
        """What the page says, banner and all."""
        return str(self.script("return document.body.innerText"))

    def sees(self, *texts: str, patience: float = PATIENCE) -> None:
        """Returns when the page says all of these."""
        self.until(
            "return [...arguments].every((text) => document.body.innerText.includes(text))", *texts, patience=patience
        )

    def sees_no_more(self, text: str, within: str = "body", patience: float = PATIENCE) -> None:
        """Returns when a part of the page does not say this."""
        self.until(
            "return !document.querySelector(arguments[0]).innerText.includes(arguments[1])",
            within,
            text,
            patience=patience,
        )

    def click(self, selector: str) -> None:
        """Clicks on what a selector names, as a mouse does."""
        self.send("POST", f"/element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Types text into a field in place of what is there."""
        found = self._find(selector)
        self.send("POST", f"/element/{found}/clear", {})
        self.send("POST", f"/element/{found}/value", {"text": text})

    def press(self, *keys: str) -> None:
        """Presses keys, one after the other, wherever the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.send("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def focused(self) -> str:
        """What the element that has the focus says."""
        found = self.script(
            "const has = document.activeElement; if (has === document.body) return '';"
            "return has.innerText || has.getAttribute('aria-label') || has.id || ''"
        )
        return str(found).strip()

    def tab_to(self, text: str, most: int = 60) -> None:
        """Presses the tabulator key until the focus is on what says this."""
        seen = []
        for _ in range(most):
            self.press(TAB)
            seen.append(self.focused())
            if seen[-1].startswith(text):
                return
        raise AssertionError(f"the focus never came to {text!r}; it was on {seen}")

    def size(self, size: tuple[int, int]) -> None:
        """Makes the page so many pixels wide and high."""
        width, height = size
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def scheme(self, name: str) -> None:
        """Prefers a colour scheme, ``dark`` or ``light``."""
        self.devtools(
            "Emulation.setEmulatedMedia", media="", features=[{"name": "prefers-color-scheme", "value": name}]
        )

    def screenshot(self, path: Path) -> None:
        """Takes a picture of the whole page."""
        data = self.devtools("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def problems(self) -> list[str]:
        """What the console has complained about since last time, without servers that are gone, and refusals."""
        found = self.send("POST", "/se/log", {"type": "browser"})
        return [
            each["message"]
            for each in found
            if not any(expected in each["message"] for expected in ("net::ERR", "(Bad Request)"))
        ]

    def _find(self, selector: str) -> str:
        found = self.until("return document.querySelector(arguments[0])", selector)
        return str(found[_ELEMENT])


class Elements:
    """Reads of elements."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser

    def __call__(self, selector: str) -> list[str]:
        """What the elements that a selector names say."""
        found: list[str] = self._browser.script(
            "return [...document.querySelectorAll(arguments[0])].map((each) => each.innerText ?? each.textContent)",
            selector,
        )
        return found


@contextmanager
def chromium(directory: Path) -> Iterator[Browser]:
    """A browser with a profile of its own, until the end of the block.

    It outlives single tests, with all its processes.
    """
    command = guarded(str(CHROMIUM / "chromedriver"), "--port=0", "--log-level=WARNING")
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    leaks.keep(driver.pid)
    try:
        assert driver.stdout is not None
        port = next(match[1] for line in driver.stdout if (match := _STARTED.search(line)))
        sessions = f"http://127.0.0.1:{port}/session"
        options = {
            "binary": str(CHROMIUM / "chromium"),
            "args": [*_FLAGS, f"--user-data-dir={directory / 'profile'}"],
        }
        wanted = {
            "acceptInsecureCerts": True,
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        made = _send("POST", sessions, {"capabilities": {"alwaysMatch": wanted}})
        browser = Browser(f"{sessions}/{made['sessionId']}")
        browser.size(DESKTOP)
        try:
            yield browser
        finally:
            browser.send("DELETE", "")
    finally:
        driver.terminate()
        driver.communicate(timeout=PATIENCE)


def guarded(*command: str) -> list[str]:
    """A command whose process ends with this one, however that ends."""
    return [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), *command]


def eventually(condition: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """What a condition gives, once that is true."""
    deadline = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(_LOOK_EVERY)
    return found


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _send(method: str, url: str, body: dict[str, Any] | None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with _DIRECT.open(request, timeout=60.0) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        with error:
            raise AssertionError(f"{method} {url}: {json.load(error)['value']['message']}") from None
