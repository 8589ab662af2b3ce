"""Annotation documents in JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finesight.files.bounded_files import parse_unique_json
from finesight.ingest.folder_listing import is_json_file
from finesight.samples.sample import read_data_file


def read_document(file: Path, *markers: bytes, opening: bytes = b"{") -> Any:
    """Return the object or array in a JSON file that contains one of the markers, else None."""
    content = read_data_file(file) if is_json_file(file, opening) else b""
    if not any(marker in content for marker in markers):
        return None
    try:
        return parse_unique_json(content)
    except ValueError:
        return None  # JSON Lines or invalid: the row reader reports it
