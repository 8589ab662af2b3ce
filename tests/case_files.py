"""Test cases stored as YAML in tests/cases/."""

from pathlib import Path
from typing import Any

import yaml


def load_cases(name: str) -> Any:
    return yaml.load(
        (Path(__file__).parent / "cases" / f"{name}.yaml").read_bytes(), yaml.CSafeLoader
    )
