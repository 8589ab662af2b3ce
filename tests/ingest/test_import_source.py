"""A source read leniently, faults and all, and what an opened source refuses."""

import re
from pathlib import Path
from typing import Any

import pytest
from image_fixtures import write_gray_image, write_jsonl

from finesight.errors import UserError
from finesight.ingest import import_source
from finesight.ingest.import_source import (
    ImportOptions,
    UnvalidatedRow,
    open_source,
    open_unvalidated,
)
from finesight.ingest.importer import import_dataset
from finesight.samples.boxes import InvalidBoxError
from finesight.samples.frames import PIXELS, BoxFrame
from finesight.samples.sample import (
    BoxPart,
    ImagePart,
    Message,
    Sample,
    TextPart,
    create_region,
    read_samples,
)
from finesight.settings.recipe_template import detect_task


def read_unvalidated(source: Path, **wishes: Any) -> list[UnvalidatedRow]:
    (source.parent / "saved").mkdir(exist_ok=True)
    drafts = open_unvalidated(source, ImportOptions(**wishes), source.parent / "saved")
    rows = list(drafts)
    assert len(drafts) == len(rows)
    again = [row.samples for row in drafts]
    assert again == [row.samples for row in rows], "a second reading differs"
    return rows


def sample(*answer: dict[str, Any], image: str = "a.png") -> dict[str, Any]:
    requested = [{"type": "image", "image": image}, {"type": "text", "text": "?"}]
    messages = [
        {"role": "user", "content": requested},
        {"role": "assistant", "content": list(answer)},
    ]
    return {"id": "1", "messages": messages}


def box(*xyxy: float, **more: Any) -> dict[str, Any]:
    return {"type": "box", "xyxy": xyxy, **more}


def test_invalid_samples_are_preserved(tmp_path: Path) -> None:
    image = write_gray_image(tmp_path / "a.png", 40, 20)
    rows = [
        sample(box(30, 2, 1, 14, label="reversed")),
        sample(box(-5, -5, 900, 900)),
        sample(box(1, 2, 3, 4, image=1)),
        sample(),
        {
            "id": "2",
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}],
        },
        {"id": "3", "messages": [{"role": "nobody", "content": ""}]},
    ]
    found = read_unvalidated(write_jsonl(tmp_path / "data.jsonl", rows))
    assert [row.location for row in found] == [f"line {n}" for n in range(1, 7)]
    assert [len(row.samples) for row in found] == [1, 1, 1, 1, 1, 0]
    assert [row.error is None for row in found] == [True] * 5 + [False]
    (reversed_box,) = found[0].boxes
    assert reversed_box.coordinates == (30, 2, 1, 14)
    assert (reversed_box.image_path, reversed_box.frame) == (image, PIXELS)
    outside = found[1].samples[0].messages[-1].content[0]
    assert isinstance(outside, BoxPart)
    assert outside.xyxy == (-5, -5, 900, 900)


def test_missing_images_remain_in_the_sample(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_text("no image")
    rows = [sample(box(1, 2, 3, 4), image=name) for name in ("gone/a.png", "b.png")]
    found = read_unvalidated(write_jsonl(tmp_path / "data.jsonl", rows))
    parts = [row.samples[0].messages[0].content[0] for row in found]
    assert parts == [
        ImagePart(image=str(tmp_path / "gone" / "a.png")),
        ImagePart(image=str(tmp_path / "b.png")),
    ]
    assert [len(row.boxes) for row in found] == [1, 1]


def test_foreign_source_gives_raw_boxes_and_corners(tmp_path: Path) -> None:
    image = write_gray_image(tmp_path / "a.png", 40, 20)
    rows = [
        {"image": "a.png", "query": "?", "response": f'{{"bbox_2d": {numbers}}}'}
        for numbers in ([10, 5, 2, 3], [1, 2, 3], [500, 500, 100, 100])
    ]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    first, broken, _ = read_unvalidated(source, box_format="xywh")
    assert first.samples[0].messages[-1].content == (BoxPart(xyxy=(10, 5, 12, 8)),)
    assert first.boxes[0].coordinates == (10, 5, 2, 3)
    assert first.boxes[0].frame == BoxFrame("xywh")
    assert isinstance(broken.error, InvalidBoxError)
    *_, shares = read_unvalidated(source, box_units="1000")
    assert shares.boxes[0].image_path == image
    assert shares.samples[0].messages[-1].content == (BoxPart(xyxy=(20, 10, 4, 2)),)


def test_embedded_images_are_saved_unchanged(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"image": {"bytes": data, "path": None}, "n": 1} for data in (b"text", b"\xff\xd8cut")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = read_unvalidated(
        tmp_path / "rows.parquet", columns={"image": "image", "answer": "n"}, prompt="?"
    )
    names = [Path(row.samples[0].messages[0].content[0].image) for row in found]
    assert [path.read_bytes() for path in names] == [b"text", b"\xff\xd8cut"]


@pytest.mark.parametrize(
    ("answers", "metric"),
    [
        ([str(n % 13) for n in range(200)], "classification"),
        ([f"{n % 100:02}.{n % 7}" for n in range(200)], "ocr"),
        ([str(n % 60) for n in range(200)], "ocr"),
    ],
    ids=["counts", "decimals", "readings"],
)
def test_few_integers_are_classes(answers: list[str], metric: str) -> None:
    requested = [Message(role="user", content=(ImagePart(image="a.png"),))]
    samples = [
        Sample(
            id=str(n),
            messages=(*requested, Message(role="assistant", content=(TextPart(text=answer),))),
        )
        for n, answer in enumerate(answers)
    ]
    assert detect_task(samples).metric == metric


def test_most_regions_choose_the_metric() -> None:
    def detect(num_points: int) -> str:
        regions = [create_region((1, 1, 9, 9), "a", is_point=n < num_points) for n in range(5)]
        turns = [Message(role="user", content="?"), Message(role="assistant", content=regions)]
        return detect_task([Sample(id="1", messages=turns)]).metric

    assert [detect(count) for count in (0, 2, 3, 5)] == ["detection"] * 2 + ["pointing"] * 2


@pytest.mark.parametrize("image", ["image", "file"])
def test_table_of_instructions_has_the_same_roles_in_a_folder(tmp_path: Path, image: str) -> None:
    lines = [f"{image},instruction,input,output"]
    lines += [f"{index}.png,What is it?,Pet number {index}.,pet {index}" for index in range(6)]
    for index in range(6):
        write_gray_image(tmp_path / f"{index}.png")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    expected = {"image": image, "question": "instruction,input", "answer": "output"}
    for source in (tmp_path / "labels.csv", tmp_path):
        detected = import_source.detect_columns(source, ImportOptions())
        assert (detected.path.name, detected.options.columns) == ("labels.csv", expected)
    marked = (tmp_path / "labels.csv").read_text().replace("What", "<image>What")
    (tmp_path / "labels.csv").write_text(marked)
    detected = import_source.detect_columns(tmp_path / "labels.csv", ImportOptions())
    assert not detected.options.columns


@pytest.mark.parametrize(
    ("values", "option"),
    [("p {i},r {i}", "--map question=a --map answer=b"), ("10,20,110,80", "--map box=a,b,c,d")],
)
def test_columns_of_unknown_names_are_asked_for(tmp_path: Path, values: str, option: str) -> None:
    lines = [",".join(("image", *"abcd"[: values.count(",") + 1]))]
    for index in range(4):
        write_gray_image(tmp_path / f"{index}.png", 200, 100)
        lines.append(f"{index}.png,{values.format(i=index)}")
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        import_source.detect_columns(tmp_path / "rows.csv", ImportOptions())
    assert option in caught.value.remedy


@pytest.mark.parametrize("line", ["{i}.png,A dog.", "{i}.png,10,20,60,50,dog"])
def test_suggested_columns_of_a_table_without_header_work(tmp_path: Path, line: str) -> None:
    for index in range(4):
        write_gray_image(tmp_path / f"{index}.png", 200, 100)
    (tmp_path / "rows.csv").write_text("\n".join(line.format(i=i) for i in range(4)))
    with pytest.raises(UserError) as caught:
        import_source.open_source(tmp_path / "rows.csv", ImportOptions())
    columns = dict(re.findall(r"--map (\w+)=([\d,]+)", caught.value.remedy))
    import_dataset(
        tmp_path / "rows.csv", tmp_path / "out", ImportOptions(columns=columns, prompt="?")
    )
    (sample, *others) = read_samples(tmp_path / "out" / "data.jsonl")
    assert len(others) == 3
    expected = ["A dog."] if "A" in line else ["dog"]
    assert [getattr(p, "label", None) or p.text for p in sample.messages[1].content] == expected


@pytest.mark.parametrize(
    ("num_images", "other", "is_found"),
    [(2, "", False), (3, "", True), (4, "", True), (3, "other/3.png", False), (3, "3.png", False)],
)
def test_image_folder_has_most_images_of_the_first_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_images: int, other: str, is_found: bool
) -> None:
    monkeypatch.setattr(import_source, "NUM_PREVIEW_ROWS", 4)
    (tmp_path / "images").mkdir()
    for index in range(num_images):
        write_gray_image(tmp_path / f"images/{index}.png")
    if other:
        write_gray_image(tmp_path / other)
    rows = [f"{index}.png,red" for index in range(20)]
    (tmp_path / "table.csv").write_text("\n".join(["image,answer", *rows]))
    options = ImportOptions(columns={"image": "image", "answer": "answer"}, prompt="Color?")
    found = open_source(tmp_path / "table.csv", options).image_folder
    assert found == (tmp_path / "images" if is_found else None)


@pytest.mark.parametrize(("limit", "boxes"), [(None, [2, 1, 1, 1]), (4, [2, 1, 1]), (2, [1, 1])])
def test_rows_of_an_object_are_merged_by_image_and_question(tmp_path, limit, boxes):
    for name in ("a", "b"):
        write_gray_image(tmp_path / f"{name}.png")
    lines = ["i,q,x1,y1,x2,y2,c"]
    lines += [f"{i}.png,{q},1,2,9,9,x" for i, q in ("a1", "b1", "a1", "a2", "b2")]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    columns = {"image": "i", "question": "q", "box": "x1,y1,x2,y2", "label": "c"}
    options = ImportOptions(columns=columns, limit=limit)
    summary = import_dataset(tmp_path / "rows.csv", tmp_path / "out", options)
    samples = read_samples(summary.output_files[0].file)
    assert [len(sample.messages[-1].content) for sample in samples] == boxes
    assert [sample.id for sample in samples][:2] == ["rows-1", "rows-2"]
    assert ("rows with boxes" in summary.detected_by) == (len(boxes) < (limit or 5))


@pytest.mark.parametrize(
    ("content", "options"),
    [
        (
            "cup,4,2,10,8,a.png,40,20\nball,20,6,18,8,b.png,40,20\n",
            "--map image=6 --map box=2,3,4,5 --box-format xywh --map label=1",
        ),
        ("3,a.png,1\n4,b.png,2\n", "--map image=2 --map answer=COLUMN"),
        ("a.png,1,item\nb.png,2,item\n", "--map image=1 --map answer=COLUMN"),
        ("7,cat,1\n8,dog,2\n", "--no-header --map image=COLUMN --map answer=2"),
    ],
)
def test_columns_without_names_are_proposed_by_values(
    tmp_path: Path, content: str, options: str
) -> None:
    for name in ("a.png", "b.png"):
        write_gray_image(tmp_path / name, 40, 20)
    source = tmp_path / "rows.csv"
    source.write_text(content)
    with pytest.raises(UserError) as caught:
        open_source(source, ImportOptions())
    assert f"{options} (in the first row, 1 is " in str(caught.value.remedy)
    if "COLUMN" in options:
        return
    words = options.split()
    columns = dict(word.split("=", 1) for word in words if "=" in word)
    found = ImportOptions(columns=columns, box_format="xywh", prompt="Find.")
    assert import_dataset(source, tmp_path / "out", found).num_rows == 2
    (box_part,) = next(iter(read_samples(tmp_path / "out" / "data.jsonl"))).messages[-1].content
    assert isinstance(box_part, BoxPart)
    assert (box_part.label, box_part.xyxy) == ("cup", (4, 2, 14, 10))
