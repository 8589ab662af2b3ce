"""Headless Chromium for page tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from case_files import load_cases

PHONE_WIDTH, DESKTOP_WIDTH = 390, 1440
"""Tested page widths in CSS pixels."""

XSS_PAYLOADS = tuple(load_cases("xss_payloads"))
"""Texts that execute a script if a page does not escape them."""

COUNT_ALERTS_SCRIPT = (
    "window.alert = (number) => top.ran.push(number); if (top === window) window.ran = [];"
)


WAIT_PAINT_SCRIPT = """return new Promise((resolve) =>
  requestAnimationFrame(() => requestAnimationFrame(() => resolve(true))));"""

UNLABELED_SCRIPT = """
const named = (at) => at.getAttribute("aria-label") || at.textContent.trim() || at.labels?.length;
const found = [...document.querySelectorAll("button, summary, a")].filter((at) => !named(at));
found.push(...[...document.querySelectorAll("img")].filter((at) => !at.alt));
found.push(...[...document.querySelectorAll("select, input, textarea, [role=region]")].filter(
  (at) => !at.getAttribute("aria-label") && !at.labels?.length));
found.push(...[...document.querySelectorAll("[tabindex='0']")].filter((at) => !named(at)));
let level = 0;
for (const heading of document.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
  if (Number(heading.tagName[1]) > level + 1) found.push(heading);
  level = Number(heading.tagName[1]);
}
if (document.querySelectorAll("h1").length !== 1) found.push(document.body);
if (!document.documentElement.lang || !document.title) found.push(document.documentElement);
return found.map((at) => at.outerHTML.slice(0, 120));
"""

NAMED_KEYS: dict[str, dict[str, Any]] = {
    "Enter": {"text": "\r", "windowsVirtualKeyCode": 13},
    "Tab": {"windowsVirtualKeyCode": 9},
}


class Browser:
    """Chromium that records console messages and requests."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self._send_command("Page.addScriptToEvaluateOnNewDocument", {"source": COUNT_ALERTS_SCRIPT})
        # Transitions end at once, so that a new color scheme has its final colors.
        self._send_command("Animation.enable", {})
        self._send_command("Animation.setPlaybackRate", {"playbackRate": 1000})

    def open(
        self, page: Path, width: int = DESKTOP_WIDTH, height: int = 900, *, dark: bool = False
    ) -> None:
        """Open a file with a width and color scheme."""
        self.visit(page.as_uri(), width, height, dark=dark)

    def visit(
        self, address: str, width: int = DESKTOP_WIDTH, height: int = 900, *, dark: bool = False
    ) -> None:
        """Open a URL with a width and color scheme."""
        self._emulate(width, height, dark)
        self.driver.get("about:blank")
        self.messages(), self.requests()
        self.driver.get(address)
        self.run(WAIT_PAINT_SCRIPT)  # keys that come before a page is painted are dropped

    def iter_layouts(self) -> Iterator[tuple[int, bool]]:
        """Show the open page with each width, light and dark, and yield width and darkness."""
        for width, dark in product((PHONE_WIDTH, DESKTOP_WIDTH), (False, True)):
            self._emulate(width, 900, dark)
            self.run(WAIT_PAINT_SCRIPT)
            yield width, dark

    def _emulate(self, width: int, height: int, dark: bool) -> None:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send_command("Emulation.setDeviceMetricsOverride", screen)
        self._send_command("Emulation.setEmulatedMedia", {"features": [scheme]})

    def settle(self) -> None:
        """Wait for pending scripts and requests."""
        self.run("return new Promise((resolve) => setTimeout(resolve, 200));")

    def run(self, script: str) -> Any:
        """Execute a function body in the page and return its value."""
        return self.driver.execute_script(script)

    def press(self, *keys: str) -> None:
        """Press and release keys by their JavaScript names."""
        for key in keys:
            text = {"text": key} if len(key) == 1 else NAMED_KEYS.get(key, {})
            self._send_command("Input.dispatchKeyEvent", {"type": "keyDown", "key": key, **text})
            self._send_command("Input.dispatchKeyEvent", {"type": "keyUp", "key": key})

    def executed_payloads(self) -> list[int]:
        """Return the numbers of executed payloads."""
        return [int(number) for number in self.run("return window.ran;")]

    def messages(self) -> list[str]:
        """Return console messages since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return requested URLs since the last call, without data URLs."""
        entries = [json.loads(entry["message"]) for entry in self.driver.get_log("performance")]
        sent = [
            entry["message"]["params"]["request"]["url"]
            for entry in entries
            if entry["message"]["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in sent if not url.startswith(("data:", "about:"))]

    def overflow_width(self) -> int:
        """Return the horizontal overflow of the page in pixels."""
        return int(
            self.run(
                "const page = document.documentElement;"
                " return Math.max(page.scrollWidth, document.body.scrollWidth) - page.clientWidth;"
            )
        )

    def scrolled_tables(self) -> list[str]:
        """Return the starts of tables that are wider than their place."""
        script = """return [...document.querySelectorAll(".scroll")]
          .filter((at) => at.querySelector("table") && at.scrollWidth > at.clientWidth)
          .map((at) => at.innerText.slice(0, 80));"""
        return [str(text) for text in self.run(script)]

    def unlabeled_elements(self) -> list[str]:
        """Return elements without a label, and skipped heading levels."""
        return [str(found) for found in self.run(UNLABELED_SCRIPT)]

    def _send_command(self, command: str, parameters: dict[str, Any]) -> None:
        self.driver.execute_cdp_cmd(command, parameters)


@contextmanager
def launch_chromium() -> Iterator[Browser]:
    """Run a browser within the block. Skips the test without Chromium."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no chromium and chromedriver on the search path")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    started = webdriver.Chrome(options=options, service=service)
    try:
        yield Browser(started)
    finally:
        started.quit()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium. Tests are skipped without it."""
    with launch_chromium() as started:
        yield started
