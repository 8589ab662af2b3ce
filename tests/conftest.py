"""Fixtures that every area uses."""

import gc
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from module_loader import load_module
from tiers import (
    CORE_MARKERS,
    SLOW_MARKERS,
    is_longest,
    is_slow,
    may_contain_tests,
    needs_satellite,
)

import finesight.operations.operation  # noqa: F401 (which formats the steps of errors)
from finesight.errors import UserError

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Start two workers per core for the slow tier, whose tests often wait for other processes."""
    is_waiting_tier = config.getoption("markexpr") == SLOW_MARKERS
    return 2 * len(os.sched_getaffinity(0)) if is_waiting_tier else None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import files without tests of the selected tier."""
    if not collection_path.is_relative_to(TESTS):
        return None
    file = collection_path.relative_to(TESTS).as_posix()
    if collection_path.is_dir():
        is_core = config.getoption("markexpr") == CORE_MARKERS
        return True if is_core and needs_satellite(f"{file}/") else None
    if collection_path.suffix != ".py" or may_contain_tests(file, config.getoption("markexpr")):
        return None
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the slow tier and those of satellites, and move the longest to the front.

    A long test that starts last would leave the other workers idle. Tests marked `fuzz` belong to
    their own tier.
    """
    for item in items:
        test_id = f"{os.path.relpath(item.path, TESTS)}::{item.name}"
        fixtures = item.fixturenames if isinstance(item, pytest.Function) else ()
        if not item.get_closest_marker("fuzz") and is_slow(test_id, fixtures):
            item.add_marker("slow")
        if needs_satellite(test_id):
            item.add_marker("satellite")
    items.sort(key=lambda item: not is_longest(item.nodeid.removeprefix("tests/")))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a GPU test on a machine without a CUDA device."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip a GPU test that fails because an optional package is not installed."""
    try:
        return (yield)
    except (ImportError, UserError) as error:
        for name in ("bitsandbytes", "av"):
            is_missing = name in str(error) and importlib.util.find_spec(name) is None
            if is_missing and item.get_closest_marker("gpu"):
                pytest.skip(f"{name} is not installed")
        raise


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
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def thinking_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run of a model with a thinking mode, which tests only read."""
    from tiny_task import train_run

    return train_run(tmp_path_factory.mktemp("thinking") / "task")


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build the source archive of the checkout, and the wheel from it."""
    verify_wheel = load_module("tools/verify_wheel.py")
    return verify_wheel.build_archives(TESTS.parent, tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="session", autouse=True)
def skip_fsync() -> Iterator[None]:
    """Do not wait for the disk: only a power loss loses unwritten data, which tests simulate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield
