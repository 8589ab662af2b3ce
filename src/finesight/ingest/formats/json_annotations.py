"""Annotation documents in JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finesight.errors import UserError
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


def count_ids(kind: str, names: Iterable[object], source: object) -> Counter[str]:
    """Count the IDs of items such as images. Raises UserError if two are equal."""
    ids = Counter(map(str, names))
    duplicate, count = next(iter(ids.most_common(1)), ("", 0))
    if count > 1:
        raise UserError(
            f"{count} {kind} have the id {duplicate}",
            where=str(source),
            expected=f"unique IDs of {kind}",
            remedy=f"assign new IDs to the {kind} and their annotations",
        )
    return ids
