"""Test cases stored as YAML in tests/cases/."""

import re
from pathlib import Path
from typing import Any

import yaml

CASES_FOLDER = Path(__file__).parent / "cases"

REPEATED = re.compile(r"<(.) \* (\d+)>")
"""A character and how often it occurs in a string with the tag `!repeat`, such as `<x * 1000>`."""


class CaseLoader(yaml.CSafeLoader):
    """Loader of safe YAML with the tag `!repeat` for long strings."""


def _repeat(loader: CaseLoader, node: yaml.ScalarNode) -> str:
    text = loader.construct_scalar(node)
    repeated, count = REPEATED.subn(lambda part: part[1] * int(part[2]), text)
    assert count, f"no repetition in {text!r}"
    return repeated


CaseLoader.add_constructor("!repeat", _repeat)


def load_cases(name: str) -> Any:
    """Load the file NAME.yaml, or the files of the folder NAME by their names."""
    folder = CASES_FOLDER / name
    if folder.is_dir():
        return {path.stem: load_cases(f"{name}/{path.stem}") for path in sorted(folder.iterdir())}
    path = CASES_FOLDER / f"{name}.yaml"
    return yaml.load(path.read_bytes(), CaseLoader)
