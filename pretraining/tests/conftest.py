"""Fixtures of the generated tasks: what is skipped where fonts or matplotlib are missing."""

from __future__ import annotations

import pytest
from synthetic_tasks import fonts

from finesight.errors import UserError


@pytest.fixture(scope="session")
def installed_fonts():
    """Skips where the fonts of pre-training are not installed."""
    try:
        return fonts.list_faces("seen"), fonts.list_faces("unseen")
    except UserError as error:
        pytest.skip(f"not all fonts are there: {error.remedy}")


@pytest.fixture(scope="session")
def chinese_fonts():
    """Skips where there is no font with Chinese."""
    try:
        return fonts.list_faces("seen", "chinese"), fonts.list_faces("unseen", "chinese")
    except UserError as error:
        pytest.skip(f"no font with Chinese: {error.remedy}")


@pytest.fixture(scope="session")
def mathtext():
    """Skips where formulas cannot be drawn."""
    return pytest.importorskip("matplotlib", reason="matplotlib draws the formulas")
