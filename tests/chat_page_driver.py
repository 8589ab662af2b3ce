"""Browser driver of the chat page."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from browser import DESKTOP_WIDTH, Browser

WAIT_TIMEOUT_S = 60.0
"""Timeout of all waits."""


class ChatPageDriver:
    """Chat page in a browser with a width and language."""

    def __init__(
        self, browser: Browser, address: str, width: int = DESKTOP_WIDTH, language: str = "en-GB,en"
    ) -> None:
        self.browser, self.driver = browser, browser.driver
        send_command = self.driver.execute_cdp_cmd
        send_command("Network.enable", {})
        # Cookies identify the browser, whose conversations the page shows.
        send_command("Network.clearBrowserCookies", {})
        send_command("Network.setExtraHTTPHeaders", {"headers": {"Accept-Language": language}})
        browser.visit(address, width)
        self.wait_for_script("return !!document.querySelector('h1 span, .sign-in');")

    def wait_for_script(self, script: str) -> None:
        """Wait until a script returns true."""
        self.wait_for(lambda: bool(self.browser.run(script)), script)

    def wait_for(self, happened: Callable[[], bool], what: str) -> None:
        """Wait until a condition holds."""
        end = time.monotonic() + WAIT_TIMEOUT_S
        while not happened():
            assert time.monotonic() < end, f"in {WAIT_TIMEOUT_S:g} seconds not: {what}"
            time.sleep(0.1)

    def attach_images(self, images: Sequence[Path]) -> None:
        """Attach images to the next question."""
        self._one("#files").send_keys("\n".join(map(str, images)))
        count = "return document.querySelectorAll('#attachments img').length"
        self.wait_for_script(f"{count} === {len(images)};")

    def ask(self, text: str, images: Sequence[Path] = ()) -> None:
        """Submit a question and wait for the answer."""
        turns = self.count_turns()
        self.submit(text, images)
        self.wait_for_script(f"return document.querySelectorAll('.turn').length === {turns + 1};")
        self.wait_until_idle()

    def submit(self, text: str, images: Sequence[Path] = ()) -> None:
        """Submit a question without waiting."""
        if images:
            self.attach_images(images)
        self.driver.execute_script(
            "arguments[0].focus(); document.execCommand('insertText', false, arguments[1]);",
            self._one("#question"),
            text,
        )
        self.click("#send")

    def wait_until_idle(self) -> None:
        """Wait until generation is complete."""
        self.wait_for_script(
            "return !document.querySelector('.streaming')"
            " && !document.querySelector('#send').hidden;"
        )

    def click_button(self, words: str) -> None:
        """Click the button with a text."""
        found = (
            "[...document.querySelectorAll('#tools button, #head button')]"
            f".find(at => at.textContent.trim() === {words!r} && !at.disabled)"
        )
        self.wait_for_script(f"return !!{found};")
        self.browser.run(f"{found}.click();")

    def click(self, selector: str) -> None:
        """Click an element in one script, since the page may replace it at any time."""
        self.wait_for_script(f"return !!document.querySelector({selector!r});")
        self.browser.run(f"document.querySelector({selector!r}).click();")

    def count_turns(self) -> int:
        """Return the number of displayed turns."""
        return int(self.browser.run("return document.querySelectorAll('.turn').length;"))

    def read_texts(self, selector: str) -> list[str]:
        """Return the texts of all matching elements."""
        script = f"return [...document.querySelectorAll({selector!r})].map(at => at.textContent);"
        return [str(text) for text in self.browser.run(script)]

    def _one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)
