"""Accessibility checks of an open page with axe-core."""

from __future__ import annotations

import importlib.resources
from typing import Any

import pytest
from browser import Browser

SEVERE_IMPACTS = ("serious", "critical")


class AxeChecker:
    """axe-core checker. Tests are skipped without it."""

    def __init__(self) -> None:
        pytest.importorskip("axe_core_python", reason="axe-core-python is not installed")
        file = importlib.resources.files("axe_core_python") / "axe.min.js"
        self._script = file.read_text("utf-8")

    def find_violations(self, browser: Browser) -> list[str]:
        """Return serious violations of the open page, without its frames."""
        if not browser.run("return !!window.axe;"):
            browser.run(self._script)
        result: Any = browser.driver.execute_async_script(
            "const options = {iframes: false, resultTypes: ['violations']};"
            "axe.run(options).then(arguments[arguments.length - 1]);"
        )
        return [
            f"{one['id']}: {one['nodes'][0]['html'][:200]}"
            for one in result["violations"]
            if one["impact"] in SEVERE_IMPACTS
        ]

    def find_layout_problems(self, browser: Browser) -> list[str]:
        """Return serious violations, overflow and scrolled tables of the open page.

        It is shown narrow and wide, light and dark, and is not loaded again.
        """
        found = []
        for width, dark in browser.iter_layouts():
            problems = self.find_violations(browser)
            if overflow := browser.overflow_width():
                problems.append(f"overflow of {overflow} px")
            problems += [f"scrolled table {text!r}" for text in browser.scrolled_tables()]
            found += [f"{width} px, {'dark' if dark else 'light'}: {one}" for one in problems]
        return found
