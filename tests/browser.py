"""Headless Chromium for page tests, and accessibility checks with axe-core."""

import importlib.resources
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from case_files import load_cases

PHONE_WIDTH, DESKTOP_WIDTH = 390, 1440
"""Tested page widths in CSS pixels."""

WAIT_TIMEOUT_S = 60.0
"""Timeout of all waits."""

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

KEY_CODES = {"Enter": 13, "Escape": 27, "Tab": 9, "Delete": 46, "ArrowLeft": 37, "ArrowRight": 39}


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

    def open_checked(self, file: Path, width: int = DESKTOP_WIDTH, *, dark: bool = False) -> None:
        """Open a file and check that it fits, is accessible, and requests nothing else."""
        self.open(file, width, dark=dark)
        assert self.messages() == []
        assert self.requests() == [file.as_uri()]
        assert self.overflow_width() == 0
        assert self.unlabeled_elements() == []

    def visit(
        self, address: str, width: int = DESKTOP_WIDTH, height: int = 900, *, dark: bool = False
    ) -> None:
        """Open a URL with a width and color scheme."""
        self._emulate(width, height, dark)
        self.driver.get("about:blank")
        self.messages(), self.requests()
        self.driver.get(address)
        self.run(WAIT_PAINT_SCRIPT)

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

    def wait_for(self, script: str, timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Wait until an expression or function body returns true."""
        body = script if "return " in script else f"return !!({script});"
        end = time.monotonic() + timeout_s
        while not self.run(body):
            if time.monotonic() > end:
                text = self.run("return document.body.innerText;")
                raise AssertionError(f"not within {timeout_s} s: {script}\n{text}")
            time.sleep(0.02)

    def count(self, selector: str) -> int:
        """Count the elements of a CSS selector."""
        return int(self.run(f"return document.querySelectorAll({selector!r}).length;"))

    def read_texts(self, selector: str) -> list[str]:
        """Return the texts of the elements of a CSS selector."""
        script = f"return [...document.querySelectorAll({selector!r})].map((e) => e.textContent);"
        return [str(text) for text in self.run(script)]

    def click(self, selector: str) -> None:
        """Click an element in one script, since the page may replace it at any time."""
        self.wait_for(f"document.querySelector({selector!r})")
        self.run(f"document.querySelector({selector!r}).click();")

    def press(self, *keys: str, modifiers: int | None = None) -> None:
        """Press keys by their JavaScript names, with modifiers: 2 for Ctrl, 8 for Shift."""
        self.run(WAIT_PAINT_SCRIPT)  # keys that come before a page is painted are dropped
        for key in keys:
            values: dict[str, Any] = {"key": key, "modifiers": modifiers or 0}
            if key in KEY_CODES:
                values["windowsVirtualKeyCode"] = KEY_CODES[key]
            if len(key) == 1 or (key == "Enter" and modifiers is None):
                values["text"] = "\r" if key == "Enter" else key
            for kind in ("keyDown", "keyUp"):
                self._send_command("Input.dispatchKeyEvent", {"type": kind, **values})

    def executed_payloads(self) -> list[int]:
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

    def find_violations(self) -> list[str]:
        """Return serious violations of accessibility rules, without those in frames."""
        if not self.run("return !!window.axe;"):
            pytest.importorskip("axe_core_python", reason="axe-core-python is not installed")
            file = importlib.resources.files("axe_core_python") / "axe.min.js"
            self.run(file.read_text("utf-8"))
        result: Any = self.driver.execute_async_script(
            "const options = {iframes: false, resultTypes: ['violations']};"
            "axe.run(options).then(arguments[arguments.length - 1]);"
        )
        return [
            f"{one['id']}: {one['nodes'][0]['html'][:200]}"
            for one in result["violations"]
            if one["impact"] in ("serious", "critical")
        ]

    def find_layout_problems(self) -> list[str]:
        """Return violations, overflow and scrolled tables in all layouts, without reloading."""
        found = []
        for width, dark in self.iter_layouts():
            problems = self.find_violations()
            if overflow := self.overflow_width():
                problems.append(f"overflow of {overflow} px")
            problems += [f"scrolled table {text!r}" for text in self.scrolled_tables()]
            found += [f"{width} px, {'dark' if dark else 'light'}: {one}" for one in problems]
        return found

    def assert_nothing_executed(self, file: Path) -> None:
        """Check that no text of the open page was executed or requested anything."""
        self.settle()
        assert self.executed_payloads() == []
        assert self.messages() == []
        assert self.requests() == [file.as_uri()]

    def _send_command(self, command: str, parameters: dict[str, Any]) -> None:
        self.driver.execute_cdp_cmd(command, parameters)


click, count, read_texts = Browser.click, Browser.count, Browser.read_texts
open_page, assert_nothing_executed = Browser.open_checked, Browser.assert_nothing_executed
wait_for = Browser.wait_for


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
