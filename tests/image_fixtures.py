"""Small images and files for tests of data."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image


def write_gray_image(path: Path, width: int = 40, height: int = 20, gray_level: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (width, height), gray_level).save(path)
    return path


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
