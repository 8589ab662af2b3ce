"""Fixtures that every area uses."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from tiers import is_slow, may_contain_tests

TESTS = Path(__file__).parent
_ASSETS = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the slow test tiers."""
    parser.addoption(
        "--every-fault", action="store_true", help="tests/faults at every point, not at a few"
    )
    parser.addoption(
        "--type-blocks", action="store_true", help="tests/docs types what pages tell to type"
    )


def pytest_configure(config: pytest.Config) -> None:
    """What runs keep for later ones stays apart from what is on this machine. Here, as
    huggingface_hub reads it when it is imported, and processes that tests start inherit it."""
    gc.disable()  # until the tests are collected: imports leave little garbage
    settings.register_profile("finesight", deadline=None, derandomize=True)
    settings.load_profile("finesight")
    config.stash[_ASSETS] = tempfile.mkdtemp(prefix="finesight-assets-")
    os.environ.update(HF_ASSETS_CACHE=config.stash[_ASSETS])
    # So does the list of trusted metric files.
    os.environ.update(XDG_STATE_HOME=config.stash[_ASSETS])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import files without tests of the selected tier."""
    file = collection_path.relative_to(TESTS).as_posix()
    if collection_path.suffix != ".py" or may_contain_tests(file, config.getoption("markexpr")):
        return None
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the slow tier; tests marked `fuzz` belong to their own tier."""
    for item in items:
        test_id = f"{item.path.relative_to(TESTS).as_posix()}::{item.name}"
        fixtures = item.fixturenames if isinstance(item, pytest.Function) else ()
        if not item.get_closest_marker("fuzz") and is_slow(test_id, fixtures):
            item.add_marker("slow")


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


def pytest_collection_finish() -> None:
    """Exclude imported modules and collected tests from garbage collection.

    Training and evaluation collect garbage to free memory, over all objects of the test process.
    """
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def skip_fsync() -> Iterator[None]:
    """Do not wait for the disk: only a power loss loses unwritten data, which tests simulate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield
