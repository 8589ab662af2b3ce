"""Test cases stored as YAML in tests/cases/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def load_cases(name: str) -> Any:
    """Load the cases of one file."""
    return yaml.safe_load((Path(__file__).parent / "cases" / f"{name}.yaml").read_text("utf-8"))
