"""Modules of folders that are no packages, loaded by their path."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def load_module(path: str) -> ModuleType:
    """The Python file at `path`, relative to the project, as a module of its own name."""
    file = ROOT / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None, f"{path} is not there"
    assert spec.loader is not None, f"{path} cannot be loaded"
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses and pydantic look their module up
    spec.loader.exec_module(module)
    return module
