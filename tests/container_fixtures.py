"""JSONL files with their images, packed as tar and Parquet with the same samples."""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from image_fixtures import encode_image
from PIL import Image
from pyarrow import parquet

DataRow = dict[str, Any]


def read_rows(table: Path) -> list[DataRow]:
    return [json.loads(line) for line in table.read_text().splitlines()]


def make_tar(files: Mapping[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    path.write_bytes(make_tar(files))
    return path


def list_images(row: DataRow) -> Iterator[str]:
    for message in row["messages"]:
        if not isinstance(message["content"], str):
            yield from (part["image"] for part in message["content"] if part["type"] == "image")


def write_tar_shards(table: Path, folder: Path, each: int) -> str:
    """Shards of so many samples; the pattern that fits them."""
    folder.mkdir()
    rows = read_rows(table)
    for number, start in enumerate(range(0, len(rows), each)):
        files: dict[str, bytes] = {}
        for row in rows[start : start + each]:
            text = json.dumps(row)
            for image_path, name in enumerate(list_images(row)):
                image_files = f"{row['id']}.{image_path}{Path(name).suffix}"
                files[f"sub/{image_files}"] = (table.parent / name).read_bytes()
                text = text.replace(json.dumps(name), json.dumps(image_files))
            files[f"sub/{row['id']}.json"] = text.encode()
        write_tar(folder / f"{number:03d}.tar", files)
    return str(folder / "*.tar")


def write_parquet(
    table: Path, path: Path, group: int = 4, texts: bool = False, rows: Sequence[DataRow] = ()
) -> Path:
    """Write one file with its images; messages are lists of structs, or JSON texts."""
    packed = []
    for row in rows or read_rows(table):
        files = [(name, (table.parent / name).read_bytes()) for name in list_images(row)]
        images = [{"path": name, "bytes": data} for name, data in files]
        messages = json.dumps(row["messages"]) if texts else list(map(_to_struct, row["messages"]))
        packed.append(row | {"messages": messages, "images": images})
    parquet.write_table(pyarrow.Table.from_pylist(packed), path, row_group_size=group)
    return path


def _to_struct(message: DataRow) -> DataRow:
    """A column has one type: content is always a list there, and `image` a text."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    named = [part | {"image": str(part["image"])} if "image" in part else part for part in parts]
    return message | {"content": named}


def make_png(gray_level: int, width: int = 64, height: int = 48) -> bytes:
    """Return a PNG of one color, which differs for each gray level."""
    color = (gray_level % 256, gray_level // 256, 7)
    return encode_image(Image.new("RGB", (width, height), color))


def make_parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    """Return a Parquet file with images as {bytes, path}, as `datasets` writes it."""
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    return file.getvalue()
