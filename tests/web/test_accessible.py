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


def test_nothing_serious(browser: Browser, axe: Axe, page: Served) -> None:
    visit = Visit(browser, page.address, PHONE, "zh-CN,zh")
    visit.ask("Hello?")
    assert axe.grave(browser) == []
    browser.visit(page.address, DESK, dark=True)
    visit.until("return !!document.querySelector('.welcome');")
    assert axe.grave(browser) == []
