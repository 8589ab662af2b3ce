"""The page to talk to a model, judged by axe-core."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from axe import Axe
from browser import DESK, PHONE, Browser
from page_visit import Visit
from served_page import Parrot, Served, served


@pytest.fixture(scope="module")
def axe() -> Axe:
    return Axe()


@pytest.fixture(scope="module")
def page() -> Iterator[Served]:
    with served(Parrot(lambda text: (text, ()))) as place:
        yield place


@pytest.mark.parametrize(
    ("width", "dark", "language"), [(PHONE, False, "en-GB,en"), (DESK, True, "zh-CN,zh")]
)
def test_nothing_serious(
    browser: Browser, axe: Axe, page: Served, width: int, dark: bool, language: str
) -> None:
    visit = Visit(browser, page.address, width, language)
    browser.visit(page.address, width, dark=dark)
    visit.until("return !!document.querySelector('.welcome');")
    visit.ask("Hello?")
    assert axe.grave(browser) == []
