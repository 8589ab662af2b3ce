"""Accessibility tests of the chat page with axe-core."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from axe import AxeChecker
from browser import DESKTOP_WIDTH, PHONE_WIDTH, Browser
from chat_page_driver import ChatPageDriver
from web_server_fixture import RunningWebPage, ScriptedService, run_web_page


@pytest.fixture(scope="module")
def axe() -> AxeChecker:
    return AxeChecker()


@pytest.fixture(scope="module")
def page() -> Iterator[RunningWebPage]:
    with run_web_page(ScriptedService(lambda text: (text, ()))) as location:
        yield location


def test_page_has_no_severe_violations(
    browser: Browser, axe: AxeChecker, page: RunningWebPage
) -> None:
    visit = ChatPageDriver(browser, page.address, PHONE_WIDTH, "zh-CN,zh")
    visit.ask("Hello?")
    assert axe.find_violations(browser) == []
    browser.visit(page.address, DESKTOP_WIDTH, dark=True)
    visit.wait_for_script("return !!document.querySelector('.welcome');")
    assert axe.find_violations(browser) == []
