"""A foreign file becomes a folder of samples, whole or not at all, with every row accounted for."""

import base64
import json
import os
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from case_files import load_cases
from image_fixtures import write_gray_image, write_jsonl
from PIL import Image

from finesight.errors import UserError
from finesight.files.storage import verify_folder
from finesight.ingest.formats.dataset_format import (
    NOTE_CLIPPED_BOX,
    NOTE_KEPT_JSON,
    NOTE_SKIPPED_BOX,
    decode_base64_text,
)
from finesight.ingest.import_source import ImportOptions
from finesight.ingest.importer import (
    REASON_IMAGE_IN_EVAL,
    REASON_NOT_SELECTED,
    ImportSummary,
    import_dataset,
)
from finesight.ingest.mapping import parse_mapping
from finesight.ingest.mapping_format import build_mapping_format
from finesight.samples.sample import ImagePart, Sample, read_samples

ANSWERS = ImportOptions(columns={"image": "image", "answer": "answer"}, prompt="?")


def table(folder: Path, *images: str, **more: Any) -> Path:
    """Write rows.jsonl with a row for each letter; equal letters use the same image."""
    for shade, letter in enumerate(sorted(set(images))):
        write_gray_image(folder / "in" / f"{letter}.png", gray_level=shade)
    rows = [
        {"image": f"in/{letter}.png", "answer": f"{letter}{n}", **more}
        for n, letter in enumerate(images)
    ]
    return write_jsonl(folder / "rows.jsonl", rows)


def words(path: Path) -> list[str]:
    """The last words of every sample."""
    return [sample.messages[-1].content[-1].text for sample in read_samples(path)]


def list_image_paths(samples: list[Sample], folder: Path) -> list[Path]:
    parts = (part for sample in samples for part in sample.iter_parts())
    return [folder / part.image for part in parts if isinstance(part, ImagePart)]


def check_row_counts(summary: ImportSummary) -> bool:
    used = sum(written.num_rows for written in summary.output_files)
    return summary.num_rows == used + sum(summary.skipped_rows.values())


def test_paths_are_relative_to_output_folder(tmp_path, monkeypatch):
    source = table(tmp_path, "a")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    monkeypatch.chdir(tmp_path)
    for out in (Path("one"), tmp_path / "two" / "three", Path("link") / "four"):
        import_dataset(Path("rows.jsonl"), out, ANSWERS)
        samples = read_samples(out / "data.jsonl")
        assert not os.path.isabs(samples[0].messages[0].content[0].image)
        assert list_image_paths(samples, out)[0].samefile(tmp_path / "in" / "a.png")
    assert source.exists()


def test_rows_and_limit(tmp_path: Path) -> None:
    source = table(tmp_path, *"abcdefgh")

    def chosen(name: str, **request: Any) -> list[str]:
        request = {"columns": ANSWERS.columns, "prompt": "?", **request}
        summary = import_dataset(source, tmp_path / name, ImportOptions(**request))
        assert check_row_counts(summary)
        assert summary.skipped_rows[REASON_NOT_SELECTED] == 8 - summary.output_files[0].num_rows
        return words(tmp_path / name / "data.jsonl")

    assert chosen("1", limit=2) == ["a0", "b1"]
    assert chosen("2", row_range=(2, 5)) == ["c2", "d3", "e4"]
    assert chosen("3", row_range=(5, None), limit=2) == ["f5", "g6"]
    assert chosen("4", row_range=(-2, None)) == ["g6", "h7"]
    with pytest.raises(UserError, match="no rows are selected of 8"):
        chosen("5", row_range=(8, 9))


def test_eval_rows_and_their_images_leave_training(tmp_path: Path) -> None:
    request = ImportOptions(columns=ANSWERS.columns, prompt="?", eval_last=2)
    summary = import_dataset(table(tmp_path, *"abdcad"), tmp_path / "out", request)
    assert words(tmp_path / "out" / "train.jsonl") == ["b1", "c3"]
    assert words(tmp_path / "out" / "eval.jsonl") == ["a4", "d5"]
    assert summary.skipped_rows == {REASON_IMAGE_IN_EVAL: 2}
    assert check_row_counts(summary)


def save_copies(folder: Path, image: Image.Image) -> list[Path]:
    """Save an image in formats, modes and orientations with equal pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = image.convert("RGBA")
    clear.putpixel((0, 0), (1, 2, 3, 0))
    white = image.copy()
    white.putpixel((0, 0), (255, 255, 255))
    saved = {
        "a.png": image,
        "fast.png": image,
        "rgba.png": image.convert("RGBA"),
        "a.bmp": image,
        "a.tif": image,
        "a.webp": image,
        "turned.png": image.transpose(Image.Transpose.ROTATE_90),
        "clear.png": clear,
        "white.png": white,
    }
    options = {
        "fast.png": {"compress_level": 1},
        "a.webp": {"lossless": True},
        "turned.png": {"exif": exif},
    }
    folder.mkdir()
    for name, copy in saved.items():
        copy.save(folder / name, **options.get(name, {}))
    return [folder / name for name in saved]


@pytest.mark.parametrize("size", [(9, 5), (200, 100)])
def test_images_with_equal_pixels_stay_together(tmp_path: Path, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for _ in range(9)]
    copies = save_copies(tmp_path / "copies", images.pop())
    images[0].save(tmp_path / "photo.jpg", quality=80)
    with Image.open(tmp_path / "photo.jpg") as photo:
        photo.save(tmp_path / "photo.png")
    start, rest = (tmp_path / "photo.jpg").read_bytes().split(b"\xff\xe0", 1)
    (tmp_path / "tagged.jpg").write_bytes(start + b"\xff\xfe\0\4hi\xff\xe0" + rest)
    photos = [tmp_path / name for name in ("photo.jpg", "photo.png", "tagged.jpg")]
    groups = [copies[:-2], copies[-2:], photos]
    for number, image in enumerate(images[1:]):
        groups.append([tmp_path / f"{number}.{('jpg', 'png')[number % 2]}"])
        image.save(groups[-1][0], quality=80)
    rows = [{"image": str(path), "answer": f"{n}"} for n, g in enumerate(groups) for path in g]
    for seed in range(4):
        options = replace(ANSWERS, train_fraction=0.5, seed=seed)
        out = tmp_path / f"out{seed}"
        import_dataset(write_jsonl(tmp_path / "rows.jsonl", rows), out, options)
        train, evaluation = (words(out / f"{name}.jsonl") for name in ("train", "eval"))
        assert not set(train) & set(evaluation)
        assert len(set(train) | set(evaluation)) == len(groups)


def test_all_rows_in_eval_write_no_training_file(tmp_path):
    summary = import_dataset(
        table(tmp_path, *"ab"), tmp_path / "out", replace(ANSWERS, eval_last=2)
    )
    assert [written.file.name for written in summary.output_files] == ["eval.jsonl"]
    assert [path.name for path in (tmp_path / "out").glob("*.jsonl")] == ["eval.jsonl"]


def test_answers_become_samples_or_references(tmp_path: Path) -> None:
    source = table(tmp_path, *"ab", answers=["x", "y", "z"])
    request = ImportOptions(
        columns={"image": "image", "answer": "answers"}, prompt="?", eval_last=1
    )
    summary = import_dataset(source, tmp_path / "out", request)
    assert words(tmp_path / "out" / "train.jsonl") == ["x", "y", "z"]
    (sample,) = read_samples(tmp_path / "out" / "eval.jsonl")
    assert sample.messages[-1].content[0].text == "x"
    assert sample.references == ("y", "z")
    assert [(w.num_rows, w.num_samples) for w in summary.output_files] == [(1, 3), (1, 1)]
    assert summary.unused_columns == ("answer",)


def test_made_ids_differ_from_ids_of_other_rows(tmp_path: Path) -> None:
    rows = [{"id": name, "query": "q", "response": "r"} for name in ("a", "a", "a", "a-row1")]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    import_dataset(source, tmp_path / "out", ImportOptions())
    ids = [sample.id for sample in read_samples(tmp_path / "out" / "data.jsonl")]
    assert ids == ["a-row1-copy", "a-row2", "a-row3", "a-row1"]


@pytest.mark.parametrize(
    ("row", "what", "remedy"),
    [
        (
            {"image_path": "a", "caption": "x"},
            "image_path, caption",
            "--map image=COLUMN --map answer=caption",
        ),
        ({"conversations": [{"from": "a", "text": "x"}]}, "conversations", "the closest is conv"),
        ({"query": "a", "answer": "x"}, "query, answer", "the closest is query"),
        ({"image": "a.png", "text": "x"}, "image, text", "--map image=image --map answer=text"),
    ],
)
def test_unknown_format_suggests_closest_one(tmp_path, row, what, remedy):
    source = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError, match=what) as caught:
        import_dataset(source, tmp_path / "out", ImportOptions())
    assert remedy in caught.value.remedy
    assert "qwen-vl" in caught.value.expected


def test_format_option_overrides_detection(tmp_path: Path) -> None:
    turns = [{"from": "user", "value": "see a.png?"}, {"from": "assistant", "value": "x"}]
    source = write_jsonl(tmp_path / "a.jsonl", [{"conversations": turns}])
    summary = import_dataset(source, tmp_path / "out", ImportOptions(format="conversations"))
    assert summary.detected_by == "--format"
    with pytest.raises(UserError, match="no such image"):
        import_dataset(source, tmp_path / "2", ImportOptions(format="image-path", prompt="?"))
    with pytest.raises(UserError, match="unknown format 'conversation'") as caught:
        import_dataset(source, tmp_path / "3", ImportOptions(format="conversation"))
    assert caught.value.remedy == "did you mean conversations?"
    turns[0]["value"] = "<|vision_start|>b.png<|vision_end|>?"
    write_gray_image(tmp_path / "b.png")
    source = write_jsonl(tmp_path / "b.jsonl", [{"conversations": turns}])
    with pytest.raises(UserError, match="1 of 1 rows are invalid") as caught:
        import_dataset(source, tmp_path / "4", ImportOptions(format="ms-swift"))
    assert caught.value.remedy.startswith("give --format conversations: line 1 has turns")
    table = ImportOptions(format="table", columns={"image": "conversations"})
    with pytest.raises(UserError, match="1 of 1 rows are invalid") as caught:
        import_dataset(source, tmp_path / "5", table)
    assert "--format conversations without --map" in caught.value.remedy


@pytest.mark.parametrize(
    ("options", "where"), load_cases("importer")["test_inapplicable_options_are_rejected"]
)
def test_inapplicable_options_are_rejected(tmp_path, options, where):
    with pytest.raises(UserError) as caught:
        import_dataset(table(tmp_path, *"ab"), tmp_path / "out", ImportOptions(**options))
    assert caught.value.where == where
    assert caught.value.expected
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()


NOTES = (NOTE_CLIPPED_BOX, NOTE_SKIPPED_BOX)


def skip_options(limit: int | None = None) -> ImportOptions:
    return ImportOptions(columns=ANSWERS.columns, prompt="?", on_invalid_row="skip", limit=limit)


def test_invalid_rows_are_skipped_by_reason(tmp_path: Path) -> None:
    source = table(tmp_path, *"abcdefgh")
    (tmp_path / "in" / "b.png").unlink()
    (tmp_path / "in" / "c.png").write_text("text")
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rows[3]["answer"] = ""
    rows[4]["answer"] = "an <image> in the text"
    write_jsonl(source, rows)
    summary = import_dataset(source, tmp_path / "out", skip_options(limit=7))
    samples = read_samples(tmp_path / "out" / "data.jsonl")
    assert [one.messages[-1].content[0].text for one in samples] == ["a0", "f5", "g6"]
    assert summary.skipped_rows == {
        REASON_NOT_SELECTED: 1,
        "an image is missing or corrupt": 2,
        "turns have an invalid order or are empty": 1,
        "unsupported placeholders in the text": 1,
    }
    assert summary.num_rows == summary.output_files[0].num_rows + sum(summary.skipped_rows.values())
    assert summary.skipped_rows_file == tmp_path / "out" / "skipped_rows.jsonl"
    listed = [json.loads(line) for line in summary.skipped_rows_file.read_text().splitlines()]
    assert [line["location"] for line in listed] == ["line 2", "line 3", "line 4", "line 5"]
    assert listed[0]["reason"] == "an image is missing or corrupt"
    assert all("remedy:" in line["error"] for line in listed)
    verify_folder(tmp_path / "out")


def test_no_list_is_written_without_invalid_rows(tmp_path: Path) -> None:
    summary = import_dataset(table(tmp_path, "a"), tmp_path / "out", skip_options())
    assert summary.skipped_rows_file is None
    assert not (tmp_path / "out" / "skipped_rows.jsonl").exists()


@pytest.mark.parametrize("in_text", [False, True])
def test_invalid_boxes_of_tables_and_answers(tmp_path: Path, in_text: bool) -> None:
    write_gray_image(tmp_path / "a.png")
    valid, strays, wide, inverted = (
        [2, 3, 20, 10],
        [[5, 5, 5, 9], [50, 3, 60, 12]],
        [30, 3, 43, 22],
        [9, 9, 3, 3],
    )
    name = "answer" if in_text else "box"
    options = ImportOptions(columns={"image": "image", name: name}, prompt="?")
    for policy, others, expected in (
        ("drop", strays, [valid]),
        ("clip", [*strays, wide], [valid, [30, 3, 40, 20]]),
        ("drop", [wide], None),
        ("clip", [inverted], None),
    ):
        boxes = [valid, *others]
        text = json.dumps([{"bbox_2d": box, "label": "x"} for box in boxes])
        row = {"image": "a.png", name: text if in_text else boxes}
        source, out = write_jsonl(tmp_path / "rows.jsonl", [row]), tmp_path / policy
        if expected is None:
            with pytest.raises(UserError, match="the answer would be incomplete") as caught:
                import_dataset(source, tmp_path / "x", replace(options, on_invalid_box=policy))
            assert ("--on-invalid-box clip" in caught.value.remedy) == (others == [wide])
            continue
        summary = import_dataset(source, out, replace(options, on_invalid_box=policy))
        (sample,) = read_samples(out / "data.jsonl")
        assert [list(part.xyxy) for part in sample.messages[-1].content] == expected
        assert sum(summary.source_notes.get(note, 0) for note in NOTES) == len(others)


@pytest.mark.parametrize("box", [[9, 9, 9, 9], [30, 3, 43, 22]])
@pytest.mark.parametrize("name", ["answer", "box", "<bbox>"])
def test_policies_of_the_remedy_succeed(tmp_path: Path, name: str, box: list[int]) -> None:
    """A box in a sentence cannot be dropped."""
    write_gray_image(tmp_path / "a.png")
    boxes = [[2, 3, 20, 10], box]
    text = json.dumps([{"bbox_2d": one, "label": "x"} for one in boxes])
    row = {"image": "a.png", name: boxes if name == "box" else text}
    options = ImportOptions(columns={"image": "image", name: name}, prompt="?")
    if name == "<bbox>":
        turns = {"user": "<image>Where?", "assistant": "At <bbox> and <bbox>."}
        messages = [{"role": role, "content": content} for role, content in turns.items()]
        row = {"messages": messages, "images": ["a.png"], "objects": {"bbox": boxes}}
        options = ImportOptions()
    source = write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError) as caught:
        import_dataset(source, tmp_path / "x", options)
    named = re.findall(r"clip|drop", str(caught.value.remedy))
    assert bool(named) == (name != "<bbox>" or box[0] != box[2])
    for policy in named:
        import_dataset(source, tmp_path / policy, replace(options, on_invalid_box=policy))


def test_many_invalid_boxes_are_a_wrong_convention(tmp_path: Path) -> None:
    options = ImportOptions(columns={"image": "image", "box": "box"}, prompt="?")
    rows = [{"image": f"{number}.png", "box": [30, 10, 50, 15]} for number in range(10)]
    for row in rows:
        write_gray_image(tmp_path / str(row["image"]))
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match="10 of 10 rows are invalid") as caught:
        import_dataset(source, tmp_path / "out", replace(options, on_invalid_row="skip"))
    assert "the box convention is probably wrong" in caught.value.what
    summary = import_dataset(source, tmp_path / "out", replace(options, on_invalid_box="clip"))
    assert summary.source_notes == {NOTE_CLIPPED_BOX: 10}


def test_all_invalid_rows_raise(tmp_path: Path) -> None:
    source = table(tmp_path, "a")
    (tmp_path / "in" / "a.png").unlink()
    with pytest.raises(UserError, match="1 of 1 rows are invalid") as caught:
        import_dataset(source, tmp_path / "out", skip_options())
    assert "--on-invalid-row" not in caught.value.remedy


def test_many_invalid_boxes_raise_format_error(tmp_path: Path) -> None:
    write_gray_image(tmp_path / "a.png", 40, 20)
    boxes = [*[[20, 10, 5, 5]] * 2, *[[1, 2, 30, 14]] * 8]
    rows = [{"image": "a.png", "query": "?", "response": f'{{"bbox_2d": {b}}}'} for b in boxes]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match="rows have invalid boxes") as caught:
        import_dataset(source, tmp_path / "out", ImportOptions(on_invalid_row="skip"))
    assert "--box-format xywh" in caught.value.remedy
    write_jsonl(source, [*rows, *rows[2:], *rows[2:]])
    summary = import_dataset(source, tmp_path / "out", ImportOptions(on_invalid_row="skip"))
    assert summary.skipped_rows == {"a box is invalid or outside its image": 2}


def test_images_of_skipped_rows_are_removed(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    data = [write_gray_image(tmp_path / f"{n}.png", gray_level=n).read_bytes() for n in range(3)]
    rows = [
        {"image": {"bytes": d, "path": None}, "answer": a}
        for d, a in zip(data, ("x", "", "y"), strict=True)
    ]
    rows.append({"image": {"bytes": b"text", "path": None}, "answer": "z"})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    summary = import_dataset(tmp_path / "rows.parquet", tmp_path / "out", skip_options())
    retained = sorted((tmp_path / "out" / "images").iterdir())
    assert [path.read_bytes() for path in retained] == [data[0], data[2]]
    assert (summary.num_images, summary.output_files[0].num_rows) == (2, 2)


def test_missing_option_is_no_invalid_row(tmp_path: Path) -> None:
    for shade, name in enumerate("ab"):
        write_gray_image(tmp_path / "set" / f"{name}.png", gray_level=shade)
    (tmp_path / "set" / "a.txt").write_text("A house.")
    for on_invalid_row in ("fail", "skip"):
        with pytest.raises(UserError, match="a question without text") as caught:
            import_dataset(
                tmp_path / "set", tmp_path / "out", ImportOptions(on_invalid_row=on_invalid_row)
            )
        assert "--prompt" in caught.value.remedy
        assert "--on-invalid-row" not in caught.value.remedy


def test_a_source_has_one_notation_of_boxes(tmp_path: Path) -> None:
    write_gray_image(tmp_path / "a.png", width=40, height=20)
    plain, rich = '[{"bbox_2d": [1, 2, 3, 4]}]', '[{"bbox_2d": [1, 2, 3, 4], "color": "red"}]'
    for number, answers in enumerate([(plain, plain), (plain, rich), (rich, rich)]):
        rows = [{"image": "a.png", "query": "?", "response": one} for one in answers]
        write_jsonl(tmp_path / f"{number}.jsonl", rows)
        summary = import_dataset(
            tmp_path / f"{number}.jsonl", tmp_path / str(number), ImportOptions()
        )
        samples = read_samples(tmp_path / str(number) / "data.jsonl")
        contents = [sample.messages[-1].content for sample in samples]
        assert [len(content) for content in contents] == [3 if number else 1] * 2
        assert summary.source_notes.get(NOTE_KEPT_JSON, 0) == (number == 1)


def test_images_are_equal_only_in_all_pixels(tmp_path: Path) -> None:
    """Two images differ outside of the compared grid, and a copy has another format."""
    Image.new("RGB", (600, 600)).save(tmp_path / "a.png")
    Image.new("RGB", (600, 600)).save(tmp_path / "b.bmp")
    image = Image.new("RGB", (600, 600))
    image.putpixel((0, 0), (1, 1, 1))
    image.save(tmp_path / "c.png")
    for other, is_equal in (("b.bmp", True), ("c.png", False)):
        rows = [{"image": name, "query": "?", "response": "!"} for name in ("a.png", other)]
        write_jsonl(tmp_path / "rows.jsonl", rows)
        options = ImportOptions(train_fraction=0.5)
        with pytest.raises(UserError, match="in 1 group without") if is_equal else nullcontext():
            import_dataset(tmp_path / "rows.jsonl", tmp_path / other[0], options)


def test_more_invalid_than_valid_rows_are_not_skipped_without_consent(tmp_path: Path) -> None:
    source = table(tmp_path, *"abcde")
    rows = source.read_text().replace('"c1"', '""').splitlines()
    rows = [json.dumps({**json.loads(row), "answer": ""}) for row in rows[:3]] + rows[3:]
    source.write_text("\n".join(rows))
    skips = replace(ANSWERS, on_invalid_row="skip")
    with pytest.raises(UserError, match="3 of 5 rows are invalid") as caught:
        import_dataset(source, tmp_path / "out", replace(skips, requires_most_rows=True))
    assert "--on-invalid-row skip" in str(caught.value.remedy)
    summary = import_dataset(source, tmp_path / "out", skips)
    assert sum(summary.skipped_rows.values()) == 3
    again = ImportOptions(requires_most_rows=True, on_invalid_row="skip")
    import_dataset(tmp_path / "out" / "data.jsonl", tmp_path / "again", again)


def test_answers_in_base64_are_not_trained(tmp_path: Path) -> None:
    content = json.dumps({"gauge": "4.2 bar", "state": "正常"}, ensure_ascii=False).encode()
    source = table(tmp_path, "a", "b")
    rows = [json.loads(row) for row in source.read_text().splitlines()]
    rows[1]["answer"] = base64.b64encode(content).decode()
    write_jsonl(source, rows)
    with pytest.raises(UserError, match="the answer is in base64, the text") as caught:
        import_dataset(source, tmp_path / "out", ANSWERS)
    assert "[base64, json]" in str(caught.value.remedy)
    assert "without parse keeps the answer in base64" in str(caught.value.remedy)
    roles = {"version": 1, "images": "image", "question": {"const": "?"}, "answer": "answer"}
    mapping = build_mapping_format(parse_mapping(roles, "m.yaml"), "m")
    import_dataset(source, tmp_path / "mapped", ImportOptions(mapping=mapping))
    kept = read_samples(tmp_path / "mapped" / "data.jsonl")[1].messages[-1].content[-1]
    assert kept.text == rows[1]["answer"]


@pytest.mark.parametrize(
    ("text", "is_text"),
    [
        ("\u0645\u06cc\u200c\u0631\u0648\u062f, by bus and on foot", True),  # a joiner in Persian
        ("\ufeffThe valve is closed, the gauge\r\nshows\t4.2 bar", True),
        ("A family \U0001f468\u200d\U0001f469\u200d\U0001f467 on the beach at noon", True),
        ("The valve is closed\x00 and the gauge", False),
        ("The valve is closed\u0378 and the gauge", False),  # no character has this number
    ],
)
def test_texts_in_base64_have_no_control_characters(text: str, is_text: bool) -> None:
    decoded = decode_base64_text(base64.b64encode(text.encode()).decode())
    assert decoded == (text if is_text else None)


@pytest.mark.parametrize(
    "answer",
    [
        "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "Rindfleischetikettierungsueberwachungsaufgabe",
        "1234567890123456789012345678901234567890",
        "The cup is red and the hat is blue today",
    ],
)
def test_long_words_and_hashes_are_no_base64(answer: str, tmp_path: Path) -> None:
    write_gray_image(tmp_path / "a.png")
    source = write_jsonl(tmp_path / "rows.jsonl", [{"image": "a.png", "answer": answer}])
    import_dataset(source, tmp_path / "out", ANSWERS)
    (sample,) = read_samples(tmp_path / "out" / "data.jsonl")
    assert sample.messages[-1].content[-1].text == answer
