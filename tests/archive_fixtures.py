"""Datasets in archives, for tests of the sources of an import."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

from hub_fixtures import make_png

from finesight.data.sample import Sample


def get_text(sample: Sample, message: int) -> str:
    return "".join(getattr(part, "text", "") for part in sample.messages[message].content)


def read_image_bytes(sample: Sample, out: Path) -> bytes:
    return (out / sample.messages[0].content[0].image).read_bytes()


def build_coco_files(folder: str = "") -> dict[str, bytes]:
    """Write the COCO layout: a document, and images in a folder beside it."""
    document = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 64, "height": 48} for n in (1, 2)],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": [1, 2, 3, 4]} for n in (1, 2)
        ],
        "categories": [{"id": 1, "name": "dog"}],
    }
    images = {f"{folder}images/{n}.png": make_png(n) for n in (1, 2)}
    return {f"{folder}instances.json": json.dumps(document).encode(), **images}


def make_zip(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def make_tar(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()
