"""Sources made to hang, fill memory or crash an import: each is refused with a message."""

import json
import os
import re
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from box_fixtures import SCENES, write_scene
from image_fixtures import write_gray_image, write_jsonl

from finesight.errors import UserError
from finesight.ingest import importer
from finesight.ingest.import_source import ImportOptions
from finesight.ingest.importer import ImportSummary, import_dataset
from finesight.ingest.source_fetch import fetch_source
from finesight.samples import line_index
from finesight.samples.sample import read_samples

HANG_S = 60


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """Fail a test that waits for ever in place of the whole suite."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"nothing happened for {HANG_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def imported(source: Path, **request: object) -> ImportSummary:
    """Import a source as the command does, into `out` beside it."""
    out = source.parent / "out"
    options = ImportOptions(**request)  # type: ignore[arg-type]
    with fetch_source(str(source), out, options) as found:
        return import_dataset(found.path, out, found.options)


def refusal(source: Path, **request: object) -> UserError:
    """The error of an import that leaves nothing behind."""
    with pytest.raises(UserError) as caught:
        imported(source, **request)
    assert caught.value.where
    assert caught.value.remedy
    assert not (source.parent / "out").exists()
    return caught.value


SUFFIXES = ["jsonl", "json", "csv", "tsv", "parquet", "tar", "zip", "tgz"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pipes_and_devices_as_source(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"a.{suffix}")
    assert "a named pipe, not a regular file" in refusal(tmp_path / f"a.{suffix}").what
    (tmp_path / f"b.{suffix}").symlink_to("/dev/zero")
    assert "a device, not a regular file" in refusal(tmp_path / f"b.{suffix}").what


@pytest.mark.parametrize(
    "name", ["b.txt", "b.xml", "b.json", "b.parquet", "b.jpg", "data.yaml", "in/classes.txt"]
)
@pytest.mark.parametrize("is_link", [False, True])
def test_named_pipe_in_a_folder(tmp_path: Path, name: str, is_link: bool) -> None:
    write_gray_image(tmp_path / "set" / "a.jpg")
    (tmp_path / "set" / "a.txt").write_text("a house")
    pipe = tmp_path / "set" / name
    pipe.parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / "pipe" if is_link else pipe)
    if is_link:
        pipe.symlink_to(tmp_path / "pipe")
    error = refusal(tmp_path / "set", prompt="?")
    assert "a named pipe" in error.what
    assert error.where == str(pipe)


def test_list_of_images_that_is_a_pipe(tmp_path: Path) -> None:
    """A data.yaml may name files outside of its folder."""
    write_gray_image(tmp_path / "set" / "a.jpg")
    (tmp_path / "set" / "data.yaml").write_text("names: [dog]\ntrain: ../list.txt\n")
    os.mkfifo(tmp_path / "list.txt")
    assert "a named pipe" in refusal(tmp_path / "set").what


def test_named_pipe_in_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        pipe = zipfile.ZipInfo("a.txt")
        pipe.external_attr = 0o010644 << 16
        archive.writestr(pipe, "")
    assert "a link or a device" in refusal(tmp_path / "a.zip").what


def sparse(path: Path) -> Path:
    """Write a file whose second line has 64 MiB of zero bytes, which occupy no disk space."""
    with path.open("wb") as file:
        file.write(b'{"query": "a", "response": "b"}\n')
        file.seek(2**26)
        file.write(b"0\n")
    return path


def test_line_over_the_limit(tmp_path: Path) -> None:
    path = sparse(tmp_path / "a.jsonl")
    error = refusal(path)
    assert "a line of more than 33,554,432 bytes" in error.what
    assert error.where == f"{path}:2"


def test_line_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    for content in (b"a\n" + b"b" * 9 + b"\nc", b"a\n" + b"b" * 9 + b"\n"):
        path.write_bytes(content)
        monkeypatch.setattr(line_index, "MAX_LINE_BYTES", 10)
        assert len(line_index.IndexedLines.open(path)) == len([*line_index.read_lines(path)])
        monkeypatch.setattr(line_index, "MAX_LINE_BYTES", 9)
        for read in (line_index.IndexedLines.open, lambda path: [*line_index.read_lines(path)]):
            with pytest.raises(UserError, match=r"a\.jsonl:2: a line of more than 9 bytes"):
                read(path)


MANY = 10_001
"""Boxes, one more than a sample may have."""

LONG = "9" * 5000
"""More digits than Python turns into a number."""


def boxes_of(what: str) -> Any:
    """What a sample with too many boxes holds, by format."""
    box = {"bbox_2d": [1, 2, 3, 4]}
    swift = {"bbox": [[1, 2, 3, 4]] * MANY}
    requested = [{"role": "user", "content": "<image>?"}]
    return {
        "query-response": {"image": "a.png", "query": "?", "response": json.dumps([box] * MANY)},
        "ms-swift": {
            "messages": [*requested, {"role": "assistant", "content": "<bbox>" * MANY}],
            "images": ["a.png"],
            "objects": swift,
        },
        "qwen-vl": {
            "conversations": [
                {"from": "user", "value": "<img>a.png</img>?"},
                {"from": "assistant", "value": "<box>(1,1),(2,9)</box>" * MANY},
            ]
        },
        "samples": {
            "id": "1",
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "a.png"}]},
                {"role": "assistant", "content": [{"type": "box", "xyxy": [1, 2, 3, 4]}] * MANY},
            ],
        },
        "table": {"image": "a.png", "box": [[1, 2, 3, 4]] * MANY},
    }[what]


@pytest.mark.parametrize("name", ["query-response", "ms-swift", "qwen-vl", "samples", "table"])
def test_too_many_boxes_in_a_row(tmp_path: Path, name: str) -> None:
    write_gray_image(tmp_path / "a.png")
    source = write_jsonl(tmp_path / "a.jsonl", [boxes_of(name)])
    columns = {"image": "image", "box": "box"} if name == "table" else {}
    error = refusal(source, columns=columns, prompt="?" if name == "table" else None)
    assert "line 1: 10,001 boxes" in error.what
    assert "at most 10,000" in error.expected
    if name == "samples":
        with pytest.raises(UserError, match="10,001 boxes"):
            read_samples(source)


@pytest.mark.parametrize("name", ["yolo", "voc", "labelme", "coco"])
def test_too_many_boxes_of_an_image(tmp_path, name):
    first = next(iter(SCENES[name]["files"].values()))
    start, end = {
        "yolo": ("1 0.5", "\n"),
        "voc": ("<object><name>lawn", "</object>"),
        "labelme": ('{"label": "lawn"', "]]},"),
        "coco": ('{"image_id": 1, "category_id": 2', "},"),
    }[name]
    box = first[first.index(start) :]
    box = box[: box.index(end) + len(end)]
    source = write_scene(name, tmp_path / "set", box, box * MANY)
    assert re.search("10,00[1-3] (boxes|shapes)", refusal(source).what)


@pytest.mark.parametrize("number", [LONG, LONG[:400], "1e999", "NaN"])
@pytest.mark.parametrize("name", ["yolo", "voc", "labelme", "coco"])
def test_invalid_coordinates_are_refused(tmp_path, name, number):
    old = {"yolo": "0.45 0.2", "voc": "<xmax>12", "labelme": "[12, 5", "coco": "[4, 5, 8"}[name]
    refusal(write_scene(name, tmp_path / "set", old, re.sub(r"\d+$|0\.2$", number, old)))


def test_class_and_size_of_thousands_of_digits(tmp_path):
    refusal(write_scene("yolo", tmp_path / "yolo", "1 0.5 0.5 1 1", f"{LONG} 0.5 0.5 1 1"))
    refusal(write_scene("coco", tmp_path / "coco", '"width": 40', f'"width": {LONG[:400]}'))
    size = f"<size><width>{LONG}</width><height>{LONG}</height></size></annotation>"
    refusal(write_scene("voc", tmp_path / "voc", "</annotation>", size))


def test_notes_that_are_no_json_become_null(tmp_path: Path) -> None:
    content = '{"query": "?", "response": "x", "a": 1e999, "b": [NaN, {"c": -Infinity}], "d": 5}\n'
    (tmp_path / "a.jsonl").write_text(content)
    imported(tmp_path / "a.jsonl")
    written = (tmp_path / "out" / "data.jsonl").read_text()
    notes = json.loads(written, parse_constant=pytest.fail)["meta"]
    assert notes == {"a": None, "b": [None, {"c": None}], "d": 5}


def test_frames_a_second_without_end(tmp_path: Path) -> None:
    write_gray_image(tmp_path / "a.png")
    video = {"type": "video", "frames": ["a.png"], "fps": 1e999}
    messages = [{"role": "user", "content": [video]}, {"role": "assistant", "content": "x"}]
    source = write_jsonl(tmp_path / "a.jsonl", [{"id": "1", "messages": messages}])
    assert "fps" in refusal(source).what


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"query": "?", "answers": ["x"] * MANY}, "10,001 answers"),
        ({"query": "x" * 2**20, "answers": ["x"] * 1000}, "1,000 answers to a question"),
    ],
)
def test_too_many_answers(tmp_path: Path, record: dict[str, Any], what: str) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [record])
    assert what in refusal(source, columns={"question": "query", "answer": "answers"}).what


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"query": "?", "response": "x", "images": ["a.png"] * 30_001}, "30,001 images"),
        ({"conversations": [{"from": "user", "value": "x"}] * MANY}, "10,001 messages"),
        ({"query": "?", "response": "bbox_2d" + "[0," * 100_000}, "bbox_2d outside of JSON"),
        ({"query": "?", "response": "<|object_ref_start|>" * 50_000}, "the placeholder"),
        (
            {"conversations": [{"from": "user", "value": "<|vision_start|>" * 50_000}]},
            "the placeholder",
        ),
        ({"query": "?", "response": "x", "deep": [[]] * 10**6}, "1,000,002 lists and objects"),
        ({"query": "?", "response": '{"bbox_2d": %s}' % ("[" * 900 + "]" * 900)}, "bbox_2d"),
        ({"messages": [{"role": "user", "content": "x"}] * 9999}, "user, user and 9989 more"),
    ],
)
def test_rows_that_would_take_long(tmp_path: Path, record: dict[str, Any], what: str) -> None:
    write_gray_image(tmp_path / "a.png")
    assert what in refusal(write_jsonl(tmp_path / "a.jsonl", [record])).what


def test_texts_that_are_put_together_take_linear_time(tmp_path: Path) -> None:
    swift = {
        "messages": [
            {"role": "user", "content": "<ref-object>" * 50_000},
            {"role": "assistant", "content": "x"},
        ],
        "objects": {"ref": ["a" * 20] * 50_000},
    }
    openai = {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": "a.png"}]},
            {"role": "user", "content": "x" * 3_000_000},
            *[{"role": "user", "content": "x"}] * 4000,
            {"role": "assistant", "content": "x"},
        ]
    }
    write_gray_image(tmp_path / "a.png")
    for name, row, size in (("swift", swift, 1_000_000), ("openai", openai, 3_008_000)):
        out = tmp_path / name
        import_dataset(write_jsonl(tmp_path / f"{name}.jsonl", [row]), out, ImportOptions())
        (sample,) = read_samples(out / "data.jsonl")
        assert len(sample.messages[0].content[-1].text) == size


def test_more_classes_than_a_question_may_name(tmp_path):
    source = write_scene("coco", tmp_path / "set")
    document = json.loads(source.read_text())
    document["categories"] += [{"id": n, "name": f"{n}"} for n in range(3, 100_002)]
    source.write_text(json.dumps(document))
    assert "a question with 100,001 classes" in refusal(source).what
    assert imported(source, box_task="grounding").output_files[0].num_samples == 2


def test_json_over_the_limit_of_levels(tmp_path: Path) -> None:
    deep = "[" * 500 + "]" * 500
    (tmp_path / "a.jsonl").write_text(f'{{"query": "?", "response": "x", "k": {deep}}}\n')
    assert "recursion limit exceeded" in refusal(tmp_path / "a.jsonl").what


def test_a_small_source_that_becomes_a_large_one(tmp_path, monkeypatch):
    """The names of all classes stand in the question about each image."""
    write_gray_image(tmp_path / "a.png")
    categories = [{"id": n, "name": f"class {n}"} for n in range(1000)]
    images = [{"id": n, "file_name": "a.png"} for n in range(1000)]
    boxes = [{"image_id": 0, "category_id": 0, "bbox": [1, 1, 9, 9]}]
    document = {"images": images, "annotations": boxes, "categories": categories}
    (tmp_path / "a.json").write_text(json.dumps(document))
    monkeypatch.setattr(importer, "FREE_BYTES", 2**20)
    monkeypatch.setattr(importer, "MAX_EXPANSION_RATIO", 10)
    assert "bytes of samples out of" in refusal(tmp_path / "a.json").what


def test_large_files_of_labels(tmp_path):
    source = write_scene("yolo", tmp_path / "set", "1 0.5 0.5 1 1", "1 .5 .5 .1 .1" + " " * 2**24)
    assert "a file of more than 16,777,216 bytes" in refusal(source).what
    (source / "data.yaml").write_text("names: [dog]\n#" + " " * 2**19)
    assert "a file of more than 524,288 bytes" in refusal(source).what


def test_lists_of_paths_that_name_no_file(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_gray_image(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "data.yaml").write_text("names: [dog]\ntrain: list.txt\n")
    for line in ("/", ".", "a\0b.png", "x" * 5000 + ".png"):
        (tmp_path / "set" / "list.txt").write_text(f"a.png\n{line}\n")
        refusal(tmp_path / "set")


@pytest.mark.parametrize("request_", [{"eval_last": 1}, {"train_fraction": 0.5, "seed": 1}])
def test_no_file_without_samples_is_written(tmp_path: Path, request_: dict[str, Any]) -> None:
    """Images without a text are rows, too, but say nothing: here all that are trained on."""
    for number, name in enumerate("ab"):
        write_gray_image(tmp_path / "set" / f"{name}.png", gray_level=number)
    (tmp_path / "set" / "b.txt").write_text("a house")
    error = refusal(tmp_path / "set", prompt="?", **request_)
    assert "would contain no samples: its 1 rows have no training content" in error.what
