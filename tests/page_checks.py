"""Checks of pages in a browser."""

from __future__ import annotations

from pathlib import Path

from browser import DESKTOP_WIDTH, Browser


def open_page(
    browser: Browser, file: Path, width: int = DESKTOP_WIDTH, *, dark: bool = False
) -> None:
    """Open a page and check that it fits, is accessible, and requests nothing else."""
    browser.open(file, width, dark=dark)
    assert browser.messages() == []
    assert browser.requests() == [file.as_uri()]
    assert browser.overflow_width() == 0
    assert browser.unlabeled_elements() == []


def assert_nothing_executed(browser: Browser, file: Path) -> None:
    """Check that no text of the open page was executed or requested anything."""
    browser.settle()
    assert browser.executed_payloads() == []
    assert browser.messages() == []
    assert browser.requests() == [file.as_uri()]


def count(browser: Browser, selector: str) -> int:
    """Count the elements of a CSS selector."""
    return int(browser.run(f"return document.querySelectorAll({selector!r}).length;"))


def read_texts(browser: Browser, selector: str) -> list[str]:
    """Return the texts of the elements of a CSS selector."""
    texts: list[str] = browser.run(
        f"return [...document.querySelectorAll({selector!r})].map((e) => e.textContent);"
    )
    return texts


def click(browser: Browser, selector: str) -> None:
    """Click the first element of a CSS selector."""
    browser.run(f"document.querySelector({selector!r}).click();")
