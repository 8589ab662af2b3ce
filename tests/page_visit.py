"""What somebody does on the page of `finesight web`, in a browser."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from browser import DESK, Browser

PATIENCE = 60.0
"""Seconds until something that should happen has not happened."""


class Visit:
    """The page in a browser, opened at a width, by somebody who prefers a language."""

    def __init__(
        self, browser: Browser, address: str, width: int = DESK, language: str = "en-GB,en"
    ) -> None:
        self.browser, self.driver = browser, browser.driver
        tell = self.driver.execute_cdp_cmd
        tell("Network.enable", {})
        tell("Network.setExtraHTTPHeaders", {"headers": {"Accept-Language": language}})
        browser.visit(address, width)
        self.until("return !!document.querySelector('#title h1 span, .sign-in');")

    def until(self, script: str) -> None:
        """Wait until a script gives true."""
        self.wait(lambda: bool(self.browser.run(script)), script)

    def wait(self, happened: Callable[[], bool], what: str) -> None:
        """Wait until something has happened."""
        end = time.monotonic() + PATIENCE
        while not happened():
            assert time.monotonic() < end, f"in {PATIENCE:g} seconds not: {what}"
            time.sleep(0.1)

    def attach(self, pictures: Sequence[Path]) -> None:
        """Choose pictures for the next question."""
        field = self._one("#composer input[type=file]")
        self.driver.execute_script("arguments[0].value = ''", field)
        field.send_keys("\n".join(map(str, pictures)))
        count = "return document.querySelectorAll('#composer img').length"
        self.until(f"{count} === {len(pictures)};")

    def ask(self, text: str, pictures: Sequence[Path] = ()) -> None:
        """Ask, and wait for the end of the answer."""
        turns = self.turns()
        self.begin(text, pictures)
        self.until(f"return document.querySelectorAll('.turn').length === {turns + 1};")
        self.settled()

    def begin(self, text: str, pictures: Sequence[Path] = ()) -> None:
        """Ask, without waiting."""
        if pictures:
            self.attach(pictures)
        self.driver.execute_script(
            "arguments[0].focus(); document.execCommand('insertText', false, arguments[1]);",
            self._one("#composer textarea"),
            text,
        )
        self.browser.settle()
        self.click("#composer .submit-button")

    def settled(self) -> None:
        """Wait until nothing grows, and another question may be asked."""
        self.until(
            "return !document.querySelector('.growing')"
            " && document.querySelector('#now').textContent.trim() === ''"
            " && !!document.querySelector('#composer .submit-button');"
        )

    def press(self, words: str) -> None:
        """Press the button that says so."""
        found = (
            "[...document.querySelectorAll('#tools button, #head button')]"
            f".find(at => at.textContent.trim() === {words!r} && !at.disabled)"
        )
        self.until(f"return !!{found};")
        self.browser.run(f"{found}.click();")

    def click(self, selector: str) -> None:
        """Press one element: at once, as Gradio may draw it anew at any time."""
        self.until(f"return !!document.querySelector({selector!r});")
        self.browser.run(f"document.querySelector({selector!r}).click();")

    def turns(self) -> int:
        """How many are shown."""
        return int(self.browser.run("return document.querySelectorAll('.turn').length;"))

    def texts(self, selector: str) -> list[str]:
        """The texts of all such elements, as they are there."""
        script = f"return [...document.querySelectorAll({selector!r})].map(at => at.textContent);"
        return [str(text) for text in self.browser.run(script)]

    def _one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)
