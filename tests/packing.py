"""A JSONL file with its pictures, packed as tars and as Parquet: the same samples."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

Row = dict[str, Any]


def rows_of(table: Path) -> list[Row]:
    return [json.loads(line) for line in table.read_text().splitlines()]


def tar_of(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pictures_of(row: Row) -> Iterator[str]:
    for message in row["messages"]:
        if not isinstance(message["content"], str):
            yield from (part["image"] for part in message["content"] if part["type"] == "image")


def as_tars(table: Path, folder: Path, each: int) -> str:
    """Shards of so many samples; the pattern that fits them."""
    folder.mkdir()
    rows = rows_of(table)
    for number, start in enumerate(range(0, len(rows), each)):
        files: dict[str, bytes] = {}
        for row in rows[start : start + each]:
            text = json.dumps(row)
            for place, name in enumerate(pictures_of(row)):
                beside = f"{row['id']}.{place}{Path(name).suffix}"
                files[f"sub/{beside}"] = (table.parent / name).read_bytes()
                text = text.replace(json.dumps(name), json.dumps(beside))
            files[f"sub/{row['id']}.json"] = text.encode()
        tar_of(folder / f"{number:03d}.tar", files)
    return str(folder / "*.tar")


def as_parquet(
    table: Path, path: Path, group: int = 4, texts: bool = False, rows: Sequence[Row] = ()
) -> Path:
    """One file with its pictures in it, in row groups of so many rows; messages as `texts` of JSON,
    or as lists of structs."""
    packed = []
    for row in rows or rows_of(table):
        images = [
            {"path": name, "bytes": (table.parent / name).read_bytes()} for name in pictures_of(row)
        ]
        messages = json.dumps(row["messages"]) if texts else list(map(_struct, row["messages"]))
        packed.append(row | {"messages": messages, "images": images})
    parquet.write_table(pyarrow.Table.from_pylist(packed), path, row_group_size=group)
    return path


def _struct(message: Row) -> Row:
    """A column has one type: content is always a list there, and `image` a text."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    named = [part | {"image": str(part["image"])} if "image" in part else part for part in parts]
    return message | {"content": named}
