"""axe-core, which judges how accessible a page is that is open in a browser."""

from __future__ import annotations

import importlib.resources
from typing import Any

import pytest
from browser import Browser

GRAVE = ("serious", "critical")


class Axe:
    """The checker; tests are skipped where it is not installed."""

    def __init__(self) -> None:
        pytest.importorskip("axe_core_python", reason="axe-core-python is not installed")
        file = importlib.resources.files("axe_core_python") / "axe.min.js"
        self._script = file.read_text("utf-8")

    def grave(self, browser: Browser) -> list[str]:
        """The serious findings in the page that is open."""
        browser.run(self._script)
        told: Any = browser.driver.execute_async_script(
            "const done = arguments[arguments.length - 1]; axe.run().then(done);"
        )
        return [
            f"{one['id']}: {one['nodes'][0]['html'][:200]}"
            for one in told["violations"]
            if one["impact"] in GRAVE
        ]
