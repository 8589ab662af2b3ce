"""A sound source of every kind that an import reads, and ways to spoil it.

A case is made from a seed and its number alone. `python tests/data/fuzzed_sources.py SEED NUMBER
FOLDER` writes its source into a folder and tells how it is imported.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import yaml
from PIL import Image
from pyarrow import parquet

from finesight.data.import_source import ImportOptions

Files = dict[str, bytes]


@dataclass
class Source:
    """Files by their names, which of them is imported (`.` is the folder of all), and how."""

    kind: str
    files: Files
    path: str = "."
    request: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, rng: random.Random) -> Path:
        """Write the files below a folder, some of them spoilt as files; return what to import."""
        for name, content in self.files.items():
            location = os.path.join(os.fsencode(folder), os.fsencode(name))
            try:
                os.makedirs(os.path.dirname(location), exist_ok=True)
                _put(location, content, rng)
            except (OSError, ValueError):
                continue  # a name that no file can have
        return folder / self.path


def _put(location: bytes, content: bytes, rng: random.Random) -> None:
    match rng.randrange(300):
        case 0:
            os.mkfifo(location)
        case 1:
            os.symlink(b"/dev/zero", location)
        case 2:
            os.symlink(os.path.basename(location), location)
        case 3:
            os.mkdir(location)
        case 4:
            os.symlink(b"..", location)
        case _:
            with open(location, "wb") as file:
                file.write(content)


def image(kind: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (9, 99, 199)).save(content, kind)
    return content.getvalue()


PNG, JPEG = image(), image("JPEG")

IMPORT_OPTIONS = "Where is the dog?"

ROWS: dict[str, dict[str, Any]] = {
    "query-response": {
        "id": "a",
        "image": ["a.png"],
        "query": f"<image>{IMPORT_OPTIONS}",
        "response": 'There: {"bbox_2d": [1, 2, 30, 25], "label": "dog"}',
        "history": [["Hello", "Hi"]],
        "system": "Be brief.",
        "note": [1, {"b": None}],
    },
    "llava": {
        "id": 7,
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": f"<image>\n{IMPORT_OPTIONS}"},
            {"from": "gpt", "value": "On the lawn."},
        ],
    },
    "llama-factory": {
        "conversations": [
            {"from": "human", "value": f"<image>{IMPORT_OPTIONS}<image>"},
            {"from": "gpt", "value": "There."},
        ],
        "images": ["a.png", "b.jpg"],
        "system": "Be brief.",
    },
    "alpaca": {
        "instruction": f"<image>{IMPORT_OPTIONS}",
        "input": "Now.",
        "output": "There.",
        "history": [["a", "b"]],
        "images": ["a.png"],
    },
    "ms-swift": {
        "messages": [
            {"role": "user", "content": "<image>Find <ref-object> and <ref-object>"},
            {"role": "assistant", "content": "<ref-object><bbox><bbox> there"},
        ],
        "images": ["a.png"],
        "objects": {
            "ref": ["dog", "cat", "dog"],
            "bbox": [[1, 2, 30, 25], [0.5, 1e0, 9, 8]],
            "bbox_type": "real",
            "image_id": [0, 0],
        },
    },
    "swift-pairs": {
        "conversation": [{"human": f"<image>{IMPORT_OPTIONS}", "assistant": "There."}],
        "system": "Be brief.",
        "images": [{"bytes": None, "path": "a.png"}],
    },
    "openai": {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": IMPORT_OPTIONS},
                    {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
                    {"type": "image"},
                ],
            },
            {"role": "assistant", "content": "There.", "weight": 1},
        ],
        "images": ["b.jpg"],
    },
    "qwen-vl": {
        "conversations": [
            {"from": "user", "value": f"Picture 1: <img>a.png</img>\n{IMPORT_OPTIONS}"},
            {"from": "assistant", "value": "<ref>dog</ref><box>(88,99),(500,700)</box> there"},
        ]
    },
    "conversations": {
        "conversations": [
            {"from": "user", "value": f"{IMPORT_OPTIONS}<|vision_start|>a.png<|vision_end|>"},
            {
                "from": "assistant",
                "value": "<|object_ref_start|>dog<|object_ref_end|>"
                "<|box_start|>(88,99),(500,700)<|box_end|>",
            },
        ]
    },
    "image-path": {
        "conversations": [
            {"role": "user", "value": "a.png"},
            {"role": "assistant", "value": "x ^ { 2 }"},
        ]
    },
    "samples": {
        "id": "a",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": "a.png"},
                    {"type": "text", "text": f"{IMPORT_OPTIONS} \u00e9\u2028"},
                    {"type": "video", "frames": ["a.png", "a.png"], "fps": 2.0},
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "box", "image": 0, "label": "dog", "xyxy": [1, 2, 20, 21]},
                    {"type": "text", "text": "ok"},
                ],
            },
        ],
        "references": ["x"],
        "meta": {"k": [1, {"b": None}]},
    },
    "table": {
        "image": "a.png",
        "answer": ["a dog", "one dog"],
        "question": IMPORT_OPTIONS,
        "box": [[1, 2, 30, 25]],
        "label": ["dog"],
        "rest": {"a": [1.5, None, True]},
    },
}
"""A row of every format of rows, by the name of its kind."""

MAPPED = {role: role for role in ("image", "answer", "question", "box", "label")}
REQUESTS: dict[str, dict[str, Any]] = {
    "image-path": {"prompt": "Read."},
    "table": {"columns": MAPPED},
}

COCO = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": 40, "height": 30, "license": 3},
        {"id": 2, "file_name": "b.jpg"},
    ],
    "annotations": [
        {"id": 7, "image_id": 1, "category_id": 2, "bbox": [1, 2, 20, 20], "iscrowd": 0},
        {"id": 8, "image_id": 1, "category_id": 2, "segmentation": [[1, 2, 3, 4]], "iscrowd": 1},
        {"id": 9, "image_id": 2, "category_id": 2, "bbox": [1.5, 2, 3, 4]},
    ],
    "categories": [{"id": 2, "name": "dog"}, {"id": 3, "name": "cat {x}"}],
}
CAPTIONS = {
    "images": COCO["images"],
    "annotations": [
        {"id": n, "image_id": n % 2 + 1, "caption": f"A dog, number {n}."} for n in range(3)
    ],
}
LABELME = {
    "version": "5.5.0",
    "shapes": [
        {"label": "dog", "shape_type": "rectangle", "points": [[10.5, 20.0], [30.0, 5.5]]},
        {"label": "cat", "shape_type": "polygon", "points": [[1, 2], [3, 9], [9, 1]]},
        {"label": "x", "shape_type": "point", "points": [[1, 2]]},
    ],
    "imagePath": "a.png",
    "imageData": None,
    "imageHeight": 30,
    "imageWidth": 40,
}
VOC = """<annotation><folder>set</folder><filename>a.png</filename>
 <size><width>40</width><height>30</height><depth>3</depth></size>
 <object><name>dog</name><difficult>0</difficult><truncated>1</truncated>
  <bndbox><xmin>4</xmin><ymin>2</ymin><xmax>19.5</xmax><ymax>30</ymax></bndbox></object>
 <object><name>cat</name><part><name>head</name></part></object>
</annotation>
"""
CVAT = """<annotations><version>1.1</version>
 <meta><task><labels><label><name>dog</name></label></labels></task></meta>
 <image id="0" name="a.png" width="40" height="30">
  <box label="dog" occluded="1" xtl="4" ytl="2" xbr="19.50" ybr="30" rotation="0" z_order="0" >
   <attribute name="kind">pug</attribute></box>
  <polygon label="dog" points="1,2;3.5,9;9,1" ></polygon> <points label="nose" points="1,2" />
 </image> <image id="1" name="b.jpg"> <tag label="cat" /> </image></annotations>
"""
FIFTYONE = {
    "classes": ["dog", "cat"],
    "labels": {
        "a": [{"label": 0, "bounding_box": [0.1, 0.2, 0.3, 0.05], "attributes": {"n": 1}}],
        "b": None,
    },
}
REGION = {
    "id": "r1",
    "type": "rectanglelabels",
    "from_name": "label",
    "original_width": 40,
    "original_height": 30,
    "image_rotation": 0,
    "value": {"x": 10, "y": 20, "width": 30, "height": 5, "rotation": 5, "rectanglelabels": ["x"]},
}
POINTS = {"points": [[1, 2], [30, 9], [9, 1]], "polygonlabels": ["y"]}
CHOICE = {"id": "c", "type": "choices", "from_name": "kind", "value": {"choices": ["a", "b"]}}
LABEL_STUDIO = [
    {
        "id": 1,
        "data": {"image": "/data/upload/1/0a1b2c3d-a.png"},
        "annotations": [
            {"result": [REGION, CHOICE], "updated_at": "2026-01-02", "was_cancelled": False},
            {"result": [], "was_cancelled": True},
        ],
        "predictions": [],
    },
    {
        "id": 2,
        "data": {"image": "/data/local-files/?d=set/b.jpg"},
        "annotations": [],
        "predictions": [{"result": [{**REGION, "id": "p", "value": POINTS}], "score": 0.5}],
    },
]
JSON_MIN = [
    {
        "image": "/data/local-files/?d=a.png",
        "id": 1,
        "kind": {"choices": ["a", "b"]},
        "text": ["one", "two"],
        "annotator": 1,
        "annotation_id": 1,
    }
]
DESCRIPTION = {
    "path": ".",
    "train": "images/train",
    "val": ["val.txt"],
    "nc": 2,
    "names": {0: "dog", 1: "cat"},
}
LABELS = "0 0.5 0.5 0.25 0.5\n1 0.1 0.1 0.2 0.2\n1 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2\n"


def as_json(data: Any, rng: random.Random) -> bytes:
    text = json.dumps(data, ensure_ascii=rng.random() < 0.5)
    for number in (LONG, "1e999", "-0"):
        if rng.random() < 0.5:
            text = text.replace(f'"{number}"', number)
    return text.encode("utf-8", "surrogatepass")


def lines(kind: str, rng: random.Random) -> Source:
    """Two or three rows as JSON Lines or as an array, one of them spoilt."""
    good = ROWS[kind]
    records = [good, spoilt_data(rng, good), good][: rng.choice((2, 3))]
    images = {"a.png": PNG, "b.jpg": JPEG}
    request = REQUESTS.get(kind, {})
    content = b"\n".join(as_json(record, rng) for record in records) + b"\n"
    name = "rows.jsonl"
    if rng.random() < 0.3:
        content = b"[" + b",\n".join(as_json(record, rng) for record in records) + b"]"
        name = rng.choice(("rows.json", "rows.jsonl"))
    return Source(kind, {name: content, **images}, name, request)


def table(suffix: str, rng: random.Random) -> Source:
    """A table as text."""
    out = io.StringIO()
    writer = csv.writer(out, delimiter="\t" if suffix == "tsv" else rng.choice(",,;"))
    record = spoilt_data(rng, ROWS["table"])
    head = [str(key) for key in record] if isinstance(record, dict) else ["image"]
    writer.writerow(head)
    for one in (ROWS["table"], record):
        row = one if isinstance(one, dict) else {}
        writer.writerow([str(row.get(key, "")) for key in head])
    content = out.getvalue().encode("utf-8", "surrogatepass")
    name = f"rows.{suffix}"
    return Source(suffix, {name: content, "a.png": PNG}, name, {"columns": MAPPED})


def folder(rng: random.Random) -> Source:
    text = weird_text(rng).encode("utf-8", "surrogatepass")
    files = {"a.png": PNG, "a.txt": b"a dog\n", "in/b.jpg": JPEG, "in/b.txt": text}
    return Source("folder", files, request={"prompt": "What?"})


def yolo(rng: random.Random) -> Source:
    labels = spoilt_text(rng, LABELS)
    if rng.random() < 0.5:
        files = {"a.png": PNG, "a.txt": labels, "b.jpg": JPEG, "b.txt": LABELS.encode()}
        return Source("yolo", {**files, "classes.txt": b"dog\ncat\n"})
    output = spoilt_data(rng, DESCRIPTION) if rng.random() < 0.5 else DESCRIPTION
    try:
        text = yaml.safe_dump(output, allow_unicode=True)
    except yaml.YAMLError:
        text = repr(output)
    files = {
        "data.yaml": text.encode("utf-8", "surrogatepass"),
        "val.txt": b"./images/val/b.jpg\n",
        "images/train/a.png": PNG,
        "labels/train/a.txt": labels,
        "images/val/b.jpg": JPEG,
        "labels/val/b.txt": LABELS.encode(),
    }
    return Source("yolo", files)


def voc(rng: random.Random) -> Source:
    files = {"a.png": PNG, "a.xml": spoilt_text(rng, VOC), "b.xml": VOC.encode()}
    return Source("voc", files, request={"box_task": rng.choice(("detection", "grounding"))})


def labelme(rng: random.Random) -> Source:
    output = as_json(spoilt_data(rng, LABELME), rng)
    files = {"a.png": PNG, "a.json": output, "b.json": as_json(LABELME, rng)}
    return Source("labelme", files, request={"box_task": rng.choice(("detection", "grounding"))})


def cvat(rng: random.Random) -> Source:
    files = {"a.png": PNG, "b.jpg": JPEG, "annotations.xml": spoilt_text(rng, CVAT)}
    return Source("cvat", files, request={"box_task": rng.choice(("detection", "grounding"))})


def fiftyone(rng: random.Random) -> Source:
    manifest = as_json(spoilt_data(rng, {"a.png": "a.png", "b.jpg": "b.jpg"}), rng)
    labels = as_json(spoilt_data(rng, FIFTYONE), rng)
    return Source(
        "fiftyone", {"a.png": PNG, "b.jpg": JPEG, "data.json": manifest, "labels.json": labels}
    )


def label_studio(rng: random.Random) -> Source:
    output = as_json(spoilt_data(rng, rng.choice((LABEL_STUDIO, JSON_MIN))), rng)
    return Source("label-studio", {"a.png": PNG, "b.jpg": JPEG, "a.json": output}, "a.json")


def coco(rng: random.Random) -> Source:
    document = spoilt_data(rng, rng.choice((COCO, CAPTIONS)))
    files = {"a.json": as_json(document, rng), "images/a.png": PNG, "images/b.jpg": JPEG}
    if rng.random() < 0.2:
        files["a.png"] = PNG
    return Source("coco", files, "a.json", {"box_task": rng.choice(("detection", "grounding"))})


def typed_table(rng: random.Random) -> Source:
    """A Parquet file, also with columns of rare types."""
    rows = 3
    columns: dict[str, Any] = {
        "image": [{"bytes": PNG, "path": "a.png"}] * rows,
        "answer": ["x"] * rows,
        "box": [[1, 2, 30, 25]] * rows,
    }
    for number in range(rng.choice((0, 1, 1, 2))):
        column = rare_column(rng, rows)
        columns[rng.choice(("answer", "box", "image", f"more{number}", "id"))] = column
    if rng.random() < 0.2:
        turns = [{"role": "user", "content": IMPORT_OPTIONS}, {"role": "assistant", "content": "x"}]
        columns = {"id": ["1", "2", "2"], "messages": [turns] * rows}
    request = {"columns": {"image": "image", "answer": "answer", "box": "box"}, "prompt": "?"}
    if "messages" in columns:
        request = {"format": "samples"} if rng.random() < 0.5 else {}
    out = io.BytesIO()
    compression = rng.choice(("snappy", "zstd", "gzip", "none"))
    try:
        parquet.write_table(
            pyarrow.table(columns),
            out,
            row_group_size=rng.choice((1, 2, 100)),
            compression=compression,
            use_dictionary=rng.random() < 0.5,
        )
    except pyarrow.ArrowException:  # what cannot be written cannot be read
        return typed_table(rng)
    return Source("parquet", {"a.parquet": out.getvalue(), "a.png": PNG}, "a.parquet", request)


WIDE = (0, 1, -1, 2**31, 2**53, 2**61, -(2**61), 2**63 - 1, -(2**63), 86_400_000)


def rare_column(rng: random.Random, rows: int) -> Any:
    """A column of a type that Python has no full counterpart of."""
    zone = rng.choice((None, "UTC", "Asia/Shanghai", "+08:00", "Mars/Olympus"))
    unit = rng.choice(("s", "ms", "us", "ns"))
    wide: list[Any] = [
        pyarrow.timestamp(rng.choice(("ms", "us", "ns")), zone),
        pyarrow.duration(unit),
        pyarrow.time64(rng.choice(("us", "ns"))),
        pyarrow.date64(),
        pyarrow.int64(),
    ]
    kind = rng.choice(wide)
    values = [rng.choice(WIDE) for _ in range(rows)]
    if kind == pyarrow.date64():
        values = [int(n / 86_400_000) * 86_400_000 for n in values]
    column = pyarrow.array(values, pyarrow.int64()).view(kind)
    match rng.randrange(9):
        case 0:
            days = [rng.choice((0, 2**30, -(2**30), 2**31 - 1)) for _ in range(rows)]
            column = pyarrow.array(days, pyarrow.int32()).view(pyarrow.date32())
        case 1:
            column = pyarrow.array([1.5, float("nan"), float("inf")][:rows], pyarrow.float32())
        case 2:
            column = pyarrow.array(["1.5", None, "9" * 20]).cast(pyarrow.decimal128(38, 10))
        case 3:
            text = [b"\xff", "\u4e2d".encode(), b"\0"]
            column = pyarrow.array(text).view(pyarrow.binary())
            column = column if rng.random() < 0.5 else column.view(pyarrow.string())
        case 4:
            column = pyarrow.array([True, None, False])
        case 5:
            column = pyarrow.array([[("a", 1)], [], None], pyarrow.map_(pyarrow.string(), "int32"))
        case _:
            pass
    match rng.randrange(6):
        case 0:
            return pyarrow.StructArray.from_arrays([column], ["a"])
        case 1:
            return pyarrow.ListArray.from_arrays(list(range(rows + 1)), column)
        case 2:
            return column.take(pyarrow.array([0, None, 1]))
        case _:
            return column


def web_dataset(rng: random.Random) -> Source:
    output = as_json(spoilt_data(rng, {"caption": "a dog", "box": [1, 2, 30, 25]}), rng)
    members = {"1.png": PNG, "1.txt": b"a dog", "1.json": output, "2.png": PNG, "2.txt": b"x"}
    members |= {"2.json": b"{}"}
    request = {"columns": {"image": "image", "answer": "txt"}, "prompt": "?"}
    return Source("web-dataset", {"a.tar": tarred(members, rng)}, "a.tar", request)


def archive(rng: random.Random) -> Source:
    """A zip or tar of another source."""
    inner = rng.choice(MAKERS[:-1])(rng)
    request = dict(inner.request)
    name = rng.choice(("a.zip", "a.tar.gz", "a.tgz"))
    if name == "a.zip":
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
            for path, content in inner.files.items():
                file.writestr(weird_name(rng, path), content)
        return Source("archive", {name: out.getvalue()}, name, request)
    content = gzip.compress(tarred(inner.files, rng))
    return Source("archive", {name: content}, name, request)


def tarred(members: Files, rng: random.Random) -> bytes:
    out = io.BytesIO()
    form = rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT))
    with tarfile.open(fileobj=out, mode="w", format=form) as file:
        for path, content in members.items():
            member = tarfile.TarInfo(weird_name(rng, path))
            member.size = len(content)
            if rng.randrange(100) == 0:
                member.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE))
            try:
                file.addfile(member, io.BytesIO(content))
            except (ValueError, UnicodeError):  # a name too long for the form
                continue
    return out.getvalue()


def weird_name(rng: random.Random, name: str) -> str:
    if rng.randrange(60):
        return name
    return rng.choice(
        (f"../{name}", f"/{name}", f"a\\{name}", f"./{name}", name.upper(), f"{name}/x", "x" * 300)
    )


def row_maker(kind: str) -> Callable[[random.Random], Source]:
    return lambda rng: lines(kind, rng)


MAKERS: list[Callable[[random.Random], Source]] = [
    *map(row_maker, ROWS),
    lambda rng: table("csv", rng),
    lambda rng: table("tsv", rng),
    folder,
    yolo,
    voc,
    labelme,
    cvat,
    fiftyone,
    label_studio,
    coco,
    typed_table,
    web_dataset,
    archive,
]

LONG = "9" * 5000
"""More digits than Python turns into a number."""

LARGE = 4_000_000
"""Characters of what is spoilt, about: enough for what takes the square of its length."""

JSON_PATHS = (
    None,
    True,
    0,
    -1,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    10**400,
    2**63,
    [],
    {},
    [[]],
)
TEXTS = ("", "NaN", "\0", "a\0b", "\ud800", "\u202e", "1", "x" * 300, "a" * 100_000, "..", ".", "/")
PATHS = ("/dev/zero", "/etc/passwd", "~", "file:///x", "http://x/a.png", "a.png\0", "data:,x")
MARKS = ("<|im_end|>", "<image>", "<|vision_start|>", "<|box_start|>(1,2),(3,4)<|box_end|>", "[")
SHORT = ('{"bbox_2d": [1, 2]}', "<bbox>", "<box>(1,2),(3,4)</box>", "<img>", "<ref>", "```[", "{x}")
WEIRD = (*JSON_PATHS, *TEXTS, *PATHS, *MARKS, *SHORT, LONG, "1e999", "-0", "\u0663")


def weird_text(rng: random.Random) -> str:
    return str(rng.choice((*TEXTS, *MARKS, *SHORT))) * rng.choice((1, 1, 1, 50))


def some_way(rng: random.Random, node: Any) -> list[Any]:
    """The keys that lead to some value inside of one; none where there is nothing inside."""
    way: list[Any] = []
    while node and isinstance(node, dict | list):
        way.append(rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node)))
        node = node[way[-1]]
        if rng.random() < 0.3:
            break
    return way


def at(node: Any, way: list[Any]) -> Any:
    for key in way:
        node = node[key]
    return node


def spoilt_data(rng: random.Random, data: Any) -> Any:
    """A copy with a few values exchanged, lost, added, repeated or wrapped; or as it was."""
    text = json.dumps(data)
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        data = json.loads(text)
        way = some_way(rng, data)
        if not way:
            break
        key = way.pop()
        holder = at(data, way)
        match rng.randrange(9):
            case 0 | 1 | 2:
                holder[key] = rng.choice(WEIRD)
            case 3:
                del holder[key]
            case 4:
                holder[key] = [holder[key]]
            case 5:
                times = rng.choice((2, 20, 2000, 20_000))
                holder[key] = [holder[key]] * most_times(times, json.dumps(holder[key]))
            case 6:
                holder[key] = nested(holder[key], rng.choice((2, 50, 300)))
            case 7 if isinstance(holder[key], str):
                holder[key] = spoilt_string(rng, holder[key])
            case _:
                holder[key] = json.loads(json.dumps(at(data, some_way(rng, data))))
        text = json.dumps(data)
        if len(text) > LARGE:
            break
    return json.loads(text)


def nested(value: Any, levels: int) -> Any:
    for _ in range(levels):
        value = [value]
    return value


def spoilt_string(rng: random.Random, text: str) -> str:
    location = rng.randrange(len(text) + 1)
    added = rng.choice((*TEXTS, *MARKS, *SHORT, "\n", '"', " "))
    added *= most_times(rng.choice((1, 1, 2, 3000, 100_000)), added)
    return text[:location] + added + text[location:]


def most_times(times: int, text: str) -> int:
    """So many times, as far as a case of some megabytes may hold the text."""
    return max(1, min(times, LARGE // max(1, len(text))))


def spoilt_text(rng: random.Random, text: str) -> bytes:
    """Text of a label file with words exchanged, or as it was."""
    for _ in range(rng.choice((0, 1, 1, 2))):
        words = text.split(" ")
        location = rng.randrange(len(words))
        value = str(rng.choice(WEIRD)).translate({ord(c): None for c in "\ud800"})
        words[location] = rng.choice((value, words[location] * 3, "", f"{words[location]}{value}"))
        text = " ".join(words)
        if rng.randrange(10) == 0:
            text *= most_times(rng.choice((3, 2000)), text)
    return text.encode("utf-8", "surrogatepass")


def spoilt_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bytes changed, lost, repeated or cut off."""
    found = bytearray(content or b"x")
    for _ in range(rng.choice((1, 2, 5, 20))):
        location = rng.randrange(len(found))
        match rng.randrange(7):
            case 0 | 1:
                found[location] = rng.randrange(256)
            case 2:
                found[location] = rng.choice(b":-{}[]&*!|>'\"%@`#,? \n\t\0<>/")
            case 3:
                del found[location : location + rng.randrange(1, 20)]
            case 4:
                found[location:location] = found[rng.randrange(len(found)) :][:20]
            case 5:
                found[location : location + 8] = rng.choice((b"\xff" * 8, b"\0" * 8, b"\x7f" * 8))
            case _:
                del found[location:]
        found = found or bytearray(b"x")
    return bytes(found)


REQUEST_CHANGES: tuple[dict[str, Any], ...] = (
    {"on_invalid_row": "skip"},
    {"train_fraction": 0.5},
    {"eval_last": 1},
    {"limit": 1},
    {"row_range": (0, 1)},
    {"copy_images": True},
    {"prompt": "{labels}?"},
    {"prompt": ""},
    {"box_format": "xywh"},
    {"box_units": "1000"},
)


def case(seed: int, number: int) -> tuple[Source, random.Random]:
    """The source of a case, and the random numbers to write it with."""
    rng = random.Random(f"{seed} {number}")
    source = MAKERS[number % len(MAKERS)](rng)
    if rng.random() < 0.4:
        name = rng.choice(list(source.files))
        source.files[name] = spoilt_bytes(rng, source.files[name])
    if rng.random() < 0.05:
        name = rng.choice(list(source.files))
        other = rng.choice((f"{name}\udcd6", "\udcd6\udcd0.png", " ", "x" * 250, f"{name}.png"))
        source.files[other] = source.files[name]
    if rng.random() < 0.3:
        source.request = source.request | rng.choice(REQUEST_CHANGES)
    if rng.random() < 0.03:
        source.request = source.request | {"format": rng.choice((*ROWS, "coco", "voc", "yolo"))}
    return source, rng


def main() -> None:
    """Write a case's source and print how it is imported."""
    seed, number, folder_name = sys.argv[1:]
    source, rng = case(int(seed), int(number))
    path = source.write(Path(folder_name), rng)
    print(f"{source.kind}: {path} {ImportOptions(**source.request)}")


if __name__ == "__main__":
    main()
