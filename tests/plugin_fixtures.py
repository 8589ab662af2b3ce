"""Packages with entry points for tests of plug-ins."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest


def install(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Add a folder of packages to the path of this process, and of those that it starts."""
    patch.syspath_prepend(folder)
    patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))


def write_package(folder: Path, name: str, entries: dict[str, str], code: str = "") -> None:
    """Write an installed package with entry points by kind and name."""
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    groups = [(*key.split(), target) for key, target in entries.items()]
    lines = [f"[finesight.{kind}]\n{entry} = {target}\n" for kind, entry, target in groups]
    (metadata / "entry_points.txt").write_text("".join(lines))
    (folder / f"{name}.py").write_text(code)
