"""Images for the tests of data formats."""

from pathlib import Path

import pytest
from image_fixtures import write_gray_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a.png of 40 x 20 pixels and b.png of 1000 x 500."""
    write_gray_image(tmp_path / "a.png", 40, 20)
    write_gray_image(tmp_path / "b.png", 1000, 500)
    return tmp_path
