"""A valid source of every kind that an import reads, and ways to spoil it."""

import csv
import gzip
import io
import json
import os
import random
import tarfile
import zipfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import yaml
from case_files import load_cases
from image_fixtures import encode_image
from mutations import VALUES, iter_entries, mutated_value
from PIL import Image
from pyarrow import parquet

_CASES = load_cases("fuzzed_sources")
ROWS: dict[str, dict[str, Any]] = _CASES["rows"]
"""A row of every format of rows, by the name of its kind."""

SOURCES: dict[str, dict[str, Any]] = _CASES["sources"]
MAPPED = {role: role for role in ("image", "answer", "question", "box", "label")}
REQUESTS = {"image-path": {"prompt": "Read."}, "table": {"columns": MAPPED}}
LONG = "9" * 5000
"""More digits than Python turns into a number."""

LARGE = 4_000_000
"""Characters of a repeated value, about: enough to notice quadratic time."""

TEXTS = ("", "NaN", "\0", "a\0b", "\ud800", "\u202e", "1", "x" * 300, "a" * 100_000, "..", ".", "/")
MARKS = ("<|im_end|>", "<image>", "<|vision_start|>", "<|box_start|>(1,2),(3,4)<|box_end|>", "[")
SHORT = ('{"bbox_2d": [1, 2]}', "<bbox>", "<box>(1,2),(3,4)</box>", "<img>", "<ref>", "```[", "{x}")
PATHS = ("~", "http://x/a.png", "a.png\0", "data:,x")
WEIRD = (*VALUES, *TEXTS, *PATHS, *MARKS, *SHORT, LONG, "1e999", "-0", "\u0663")
WIDE = (0, 1, -1, 2**31, 2**53, 2**61, -(2**61), 2**63 - 1, -(2**63), 86_400_000)


@dataclass
class Source:
    """Files by name, the imported one (`.` is their folder), and import options."""

    kind: str
    files: dict[str, bytes]
    path: str = "."
    request: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, rng: random.Random) -> Path:
        """Write the files below a folder, some as special files; return what to import."""
        for name, content in self.files.items():
            location = os.path.join(os.fsencode(folder), os.fsencode(name))
            try:
                os.makedirs(os.path.dirname(location), exist_ok=True)
                put_file(location, content, rng)
            except (OSError, ValueError):
                continue  # a name that no file can have
        return folder / self.path


def put_file(location: bytes, content: bytes, rng: random.Random) -> None:
    """Write a file, rarely as a pipe, a folder or a link."""
    kind, links = rng.randrange(300), (b"/dev/zero", os.path.basename(location), b"..")
    if kind < len(links):
        os.symlink(links[kind], location)
    elif kind in (3, 4):
        (os.mkfifo if kind == 3 else os.mkdir)(location)
    else:
        Path(os.fsdecode(location)).write_bytes(content)


def _image(kind: str) -> bytes:
    return encode_image(Image.new("RGB", (40, 30), (9, 99, 199)), kind)


PNG, JPEG = _image("PNG"), _image("JPEG")


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _as_json(data: Any, rng: random.Random) -> bytes:
    text = json.dumps(data, ensure_ascii=rng.random() < 0.5)
    for number in (LONG, "1e999", "-0"):
        if rng.random() < 0.5:
            text = text.replace(f'"{number}"', number)
    return _encode(text)


def _as_yaml(data: Any) -> bytes:
    try:
        return _encode(yaml.safe_dump(data, allow_unicode=True))
    except yaml.YAMLError:
        return _encode(repr(data))


def encode_files(files: dict[str, Any], rng: random.Random | None = None) -> dict[str, bytes]:
    """Encode the contents of a source: an image, a text, or data as JSON or YAML."""
    found = {}
    for name, content in files.items():
        if content is None:
            found[name] = JPEG if name.endswith("jpg") else PNG
        elif isinstance(content, bytes | str):
            found[name] = content if isinstance(content, bytes) else _encode(content)
        elif name.endswith("yaml"):
            found[name] = _as_yaml(content)
        else:
            found[name] = _as_json(content, rng or random.Random(0))
    return found


def make_files(kind: str, rng: random.Random) -> Source:
    """Make the source of a format of files, with spoilt annotations."""
    case, files = SOURCES[kind], {}
    for name, content in case["files"].items():
        spoil = spoilt_text if isinstance(content, str) else spoilt_data
        files[name] = spoil(rng, content) if name in case["spoilt"] else content
    files = encode_files(files, rng)
    request = rng.choice(case.get("requests", [{}]))
    if case.get("path", "").endswith(".tar"):
        files = {case["path"]: make_tar(files, rng)}
    return Source(kind, files, case.get("path", "."), request)


def make_rows(kind: str, rng: random.Random) -> Source:
    """Make two or three rows as JSON Lines or as an array, one of them spoilt."""
    good = ROWS[kind]
    records = [good, spoilt_data(rng, good), good][: rng.choice((2, 3))]
    lines = [_as_json(record, rng) for record in records]
    name, content = "rows.jsonl", b"\n".join(lines) + b"\n"
    if rng.random() < 0.3:
        name = rng.choice(("rows.json", "rows.jsonl"))
        content = b"[" + b",\n".join(lines) + b"]"
    images = {"a.png": PNG, "b.jpg": JPEG}
    return Source(kind, {name: content, **images}, name, REQUESTS.get(kind, {}))


def make_table(suffix: str, rng: random.Random) -> Source:
    out = io.StringIO()
    writer = csv.writer(out, delimiter="\t" if suffix == "tsv" else rng.choice(",,;"))
    record = spoilt_data(rng, ROWS["table"])
    head = [str(key) for key in record] if isinstance(record, dict) else ["image"]
    writer.writerow(head)
    for row in (ROWS["table"], record):
        writer.writerow([str(row.get(key, "") if isinstance(row, dict) else "") for key in head])
    name = f"rows.{suffix}"
    files = {name: _encode(out.getvalue()), "a.png": PNG}
    return Source(suffix, files, name, {"columns": MAPPED})


def make_parquet(rng: random.Random) -> Source:
    """Make a Parquet file, also with columns of rare types."""
    rows = 3
    columns: dict[str, Any] = {
        "image": [{"bytes": PNG, "path": "a.png"}] * rows,
        "answer": ["x"] * rows,
        "box": [[1, 2, 30, 25]] * rows,
    }
    request = {"columns": {name: name for name in columns}, "prompt": "?"}
    for number in range(rng.choice((0, 1, 1, 2))):
        name = rng.choice(("answer", "box", "image", f"more{number}", "id"))
        columns[name] = rare_column(rng, rows)
    if rng.random() < 0.2:
        turns = [{"role": role, "content": "x"} for role in ("user", "assistant")]
        columns = {"id": ["1", "2", "2"], "messages": [turns] * rows}
        request = {"format": "samples"} if rng.random() < 0.5 else {}
    out = io.BytesIO()
    options = {
        "row_group_size": rng.choice((1, 2, 100)),
        "compression": rng.choice(("snappy", "zstd", "gzip", "none")),
        "use_dictionary": rng.random() < 0.5,
    }
    try:
        parquet.write_table(pyarrow.table(columns), out, **options)
    except pyarrow.ArrowException:  # what cannot be written cannot be read
        return make_parquet(rng)
    return Source("parquet", {"a.parquet": out.getvalue(), "a.png": PNG}, "a.parquet", request)


def rare_column(rng: random.Random, rows: int) -> Any:
    """Make a column of a type that Python has no full counterpart of."""
    zone = rng.choice((None, "UTC", "Asia/Shanghai", "+08:00", "Mars/Olympus"))
    kinds = [pyarrow.timestamp(unit, zone) for unit in ("ms", "us", "ns")]
    kinds += [pyarrow.duration(unit) for unit in ("s", "ms", "us", "ns")]
    kinds += [*map(pyarrow.time64, ("us", "ns")), *[pyarrow.date64(), pyarrow.int64()] * 2]
    kind, values = rng.choice(kinds), [rng.choice(WIDE) for _ in range(rows)]
    if kind == pyarrow.date64():
        values = [int(n / 86_400_000) * 86_400_000 for n in values]
    days = [rng.choice((0, 2**30, -(2**30), 2**31 - 1)) for _ in range(rows)]
    binary = pyarrow.array([b"\xff", "\u4e2d".encode(), b"\0"]).view(pyarrow.binary())
    column = rng.choice(
        [
            *[pyarrow.array(values, pyarrow.int64()).view(kind)] * 4,
            pyarrow.array(days, pyarrow.int32()).view(pyarrow.date32()),
            pyarrow.array([1.5, float("nan"), float("inf")], pyarrow.float32()),
            pyarrow.array(["1.5", None, "9" * 20]).cast(pyarrow.decimal128(38, 10)),
            rng.choice((binary, binary.view(pyarrow.string()))),
            pyarrow.array([True, None, False]),
            pyarrow.array([[("a", 1)], [], None], pyarrow.map_(pyarrow.string(), "int32")),
        ]
    )
    struct = pyarrow.StructArray.from_arrays([column], ["a"])
    nested = pyarrow.ListArray.from_arrays(list(range(rows + 1)), column)
    missing = column.take(pyarrow.array([0, None, 1]))
    return rng.choice([column, column, column, struct, nested, missing])


def make_archive(rng: random.Random) -> Source:
    """Make a zip or tar of another source."""
    inner = rng.choice(MAKERS[:-1])(rng)
    name = rng.choice(("a.zip", "a.tar.gz", "a.tgz"))
    if name != "a.zip":
        content = gzip.compress(make_tar(inner.files, rng))
        return Source("archive", {name: content}, name, dict(inner.request))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for path, data in inner.files.items():
            file.writestr(weird_name(rng, path), data)
    return Source("archive", {name: out.getvalue()}, name, dict(inner.request))


def make_tar(members: dict[str, bytes], rng: random.Random) -> bytes:
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
    names = (f"../{name}", f"/{name}", f"a\\{name}", f"./{name}", name.upper(), f"{name}/x")
    return name if rng.randrange(60) else rng.choice((*names, "x" * 300))


MAKERS = [
    *(partial(make_rows, kind) for kind in ROWS),
    *(partial(make_table, suffix) for suffix in ("csv", "tsv")),
    *(partial(make_files, kind) for kind in SOURCES),
    make_parquet,
    make_archive,
]


def spoilt_data(rng: random.Random, data: Any) -> Any:
    """Return data unchanged, with some values changed, or also with one that has grown."""
    if rng.random() < 0.2:
        return data
    data = mutated_value(rng, data, values=WEIRD)
    entries = list(iter_entries(data, 200))
    if entries and rng.random() < 0.4:
        holder, key = rng.choice(entries)
        holder[key] = grown_value(rng, holder[key])
    return data


def grown_value(rng: random.Random, value: Any) -> Any:
    """Repeat or nest a value, or lengthen its text."""
    added = str(rng.choice((*TEXTS, *MARKS, *SHORT, "\n", '"', " ")))
    length = max(1, len(json.dumps(value)), len(added))
    times = max(1, min(rng.choice((2, 20, 2000, 100_000)), LARGE // length))
    match rng.randrange(3):
        case 0:
            return [value] * times
        case 1:
            for _ in range(rng.choice((2, 50, 300))):
                value = [value]
            return value
    text = str(value)
    location = rng.randrange(len(text) + 1)
    return text[:location] + added * times + text[location:]


def spoilt_text(rng: random.Random, text: str) -> bytes:
    """Return the text of a label file with words exchanged, or as it was."""
    for _ in range(rng.choice((0, 1, 1, 2))):
        words = text.split(" ")
        location = rng.randrange(len(words))
        value = str(rng.choice(WEIRD)).replace("\ud800", "")
        words[location] = rng.choice((value, words[location] * 3, "", f"{words[location]}{value}"))
        text = " ".join(words)
        if rng.randrange(10) == 0:
            text *= max(1, min(rng.choice((3, 2000)), LARGE // max(1, len(text))))
    return _encode(text)
