"""Files of a training with another program: read them, find them, and report problems."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from finesight.errors import Remedy, UserError, suggest_similar_path
from finesight.files.bounded_files import load_yaml, parse_json, read_text

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")

_EXPECTED = (
    "a configuration of ms-swift, LLaMA-Factory or TRL in YAML or JSON, a shell script with their"
    " command, or a Python script or notebook with a trainer of transformers, TRL or Unsloth"
)
MAX_CODE_CHARS = 200_000
"""Maximum length of code, of which many parts are compared with each other."""

_MAX_PARENTS = 3
"""Number of folders above a file in which the files that it names are searched."""


def build_source_error(path: Path, what: str, remedy: Remedy) -> UserError:
    """Build the error for a file that cannot be converted."""
    return UserError(what, where=str(path), expected=_EXPECTED, remedy=remedy)


def read_source(path: Path) -> str:
    """Read a configuration or script, with line breaks of Unix.

    Raises UserError for a file that is missing, too large or not UTF-8.
    """
    if os.path.exists(path):
        remedy = "use a UTF-8 file of at most 4 MB"
    else:
        remedy = str(suggest_similar_path(path))
    text = read_text(path, expected=_EXPECTED, remedy=remedy, max_bytes=4_000_000)
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def check_code_length(text: str, path: Path) -> None:
    """Raise UserError for code that is longer than that of a training."""
    if len(text) > MAX_CODE_CHARS:
        what = f"has more than {MAX_CODE_CHARS:,} characters of code"
        raise build_source_error(path, what, "convert a copy with the code of the training only")


def parse_settings_file(path: Path) -> object:
    """Parse a YAML or JSON file. Raises UserError for invalid content."""
    text = read_source(path)
    try:
        return parse_json(text) if path.suffix == ".json" else load_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        what = f"cannot be read: {' '.join(str(error).split())}"
        raise build_source_error(path, what, "correct the file") from error


def load_settings_file(path: Path) -> dict[str, object]:
    """Load the named settings of a YAML or JSON file. Raises UserError if there are none."""
    content = parse_settings_file(path)
    if not isinstance(content, dict) or not content:
        remedy = "use the file that started the training"
        raise build_source_error(path, "has no named settings", remedy)
    return {str(key): value for key, value in content.items()}


def find_file(name: str, origin: Path) -> Path | None:
    """Find a file that another file, `origin`, names; None if it is missing.

    Programs start in a folder above their scripts and configurations, so that paths are relative
    to the working directory, to the folder of `origin` or to one of its parents.
    """
    for folder in iter_folders(origin):
        path = folder / name
        if os.path.isfile(path):  # Unlike Path.is_file, it accepts names of any length.
            return path
    return None


def iter_folders(origin: Path) -> Iterator[Path]:
    """Yield the folders to which paths in a file, `origin`, may be relative."""
    yield Path()
    yield origin.parent
    yield from origin.parent.resolve().parents[:_MAX_PARENTS]
