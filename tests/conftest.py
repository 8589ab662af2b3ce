"""Fixtures that every area uses."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

_ASSETS = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the slow test tiers."""
    parser.addoption(
        "--every-fault", action="store_true", help="tests/faults at every point, not at a few"
    )
    parser.addoption(
        "--type-blocks", action="store_true", help="tests/docs types what pages tell to type"
    )
    parser.addoption("--slow", action="store_true", help="run tests marked slow, such as fuzzing")


def pytest_configure(config: pytest.Config) -> None:
    """What runs keep for later ones stays apart from what is on this machine. Here, as
    huggingface_hub reads it when it is imported, and processes that tests start inherit it."""
    config.stash[_ASSETS] = tempfile.mkdtemp(prefix="finesight-assets-")
    os.environ.update(HF_ASSETS_CACHE=config.stash[_ASSETS])
    # So does the list of trusted metric files.
    os.environ.update(XDG_STATE_HOME=config.stash[_ASSETS])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked slow unless `--slow` is given."""
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow test: run with --slow"))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removed with the last test."""
    shutil.rmtree(config.stash[_ASSETS], ignore_errors=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real images and model configurations beside the repository, if it exists."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no folder with real data and model configurations beside the repository")
    return folder
