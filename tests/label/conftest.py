"""Browser of the page tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser import Browser, launch_chromium


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium. Tests are skipped without it."""
    with launch_chromium() as started:
        yield started
