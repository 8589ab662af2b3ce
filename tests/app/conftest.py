"""Workspace with generated images, and a shared browser."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import browser as browser
from PIL import Image
from studio_fixtures import make_page

from finesight.app.jobs import JobStore
from finesight.app.studio_page import StudioPage

COLORS = ("red", "green", "blue", "gray")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Workspace with 24 images of one color in `photos`, each with a caption."""
    workspace = tmp_path / "work"
    for index in range(24):
        color = COLORS[index % 4]
        file = workspace / "photos" / f"{index:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (56 + index, 56), color).save(file)
        file.with_suffix(".txt").write_text(f"{color}\n")
    return workspace


@pytest.fixture
def page(folder: Path) -> StudioPage:
    return make_page(folder)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Arguments of the commands that a page would start."""
    commands: list[list[str]] = []

    def start(jobs, step, target, arguments, **options):
        commands.append(arguments)
        return SimpleNamespace(id="1")

    monkeypatch.setattr(JobStore, "start", start)
    return commands
