"""A foreign file becomes a folder of samples, whole or not at all, with every row accounted for."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from scenery import paint, write_jsonl

from finesight import storage
from finesight.config import DataFile
from finesight.data.importing import SHOWN_IN_EVAL, UNSELECTED, Summary, import_file
from finesight.data.jsonl import read_samples
from finesight.data.opening import Request
from finesight.data.sample import BoxPart, ImagePart, Sample
from finesight.data.sources import load_sources
from finesight.digests import verify_folder
from finesight.errors import UserError

ANSWERS = Request(columns={"image": "image", "answer": "answer"}, prompt="?")


def table(folder: Path, *pictures: str, **more: Any) -> Path:
    """rows.jsonl with a row for each letter; equal letters show the same picture."""
    for shade, letter in enumerate(sorted(set(pictures))):
        paint(folder / "in" / f"{letter}.png", shade=shade)
    rows = [
        {"image": f"in/{letter}.png", "answer": f"{letter}{n}", **more}
        for n, letter in enumerate(pictures)
    ]
    return write_jsonl(folder / "rows.jsonl", rows)


def words(path: Path) -> list[str]:
    """The last words of every sample."""
    return [sample.messages[-1].content[-1].text for sample in read_samples(path)]


def pictures_of(samples: list[Sample], folder: Path) -> list[Path]:
    parts = (part for sample in samples for part in sample.parts())
    return [folder / part.image for part in parts if isinstance(part, ImagePart)]


def balanced(summary: Summary) -> bool:
    used = sum(written.rows for written in summary.written)
    return summary.rows == used + sum(summary.left_out.values())


def test_one_file_when_nothing_is_held_out(tmp_path: Path) -> None:
    summary = import_file(table(tmp_path, *"abc"), tmp_path / "out", ANSWERS)
    assert words(tmp_path / "out" / "data.jsonl") == ["a0", "b1", "c2"]
    assert (summary.format, summary.known_by, summary.pictures) == ("table", "--map", 3)
    assert summary.left_out == {}
    assert balanced(summary)
    verify_folder(tmp_path / "out")


def test_paths_are_relative_to_the_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = table(tmp_path, "a")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    monkeypatch.chdir(tmp_path)
    for out in (Path("one"), tmp_path / "two" / "three", Path("link") / "four"):
        import_file(Path("rows.jsonl"), out, ANSWERS)
        samples = read_samples(out / "data.jsonl")
        assert not os.path.isabs(samples[0].messages[0].content[0].image)
        assert pictures_of(samples, out)[0].samefile(tmp_path / "in" / "a.png")
    assert source.exists()


def test_rows_and_limit(tmp_path: Path) -> None:
    source = table(tmp_path, *"abcdefgh")

    def chosen(name: str, **request: Any) -> list[str]:
        request = {"columns": ANSWERS.columns, "prompt": "?", **request}
        summary = import_file(source, tmp_path / name, Request(**request))
        assert balanced(summary)
        assert summary.left_out[UNSELECTED] == 8 - summary.written[0].rows
        return words(tmp_path / name / "data.jsonl")

    assert chosen("1", limit=2) == ["a0", "b1"]
    assert chosen("2", rows=(2, 5)) == ["c2", "d3", "e4"]
    assert chosen("3", rows=(5, None), limit=2) == ["f5", "g6"]
    assert chosen("4", rows=(-2, None)) == ["g6", "h7"]
    with pytest.raises(UserError, match="no rows are selected of 8"):
        chosen("5", rows=(8, 9))


def test_last_rows_are_held_out_and_their_pictures_leave_training(tmp_path: Path) -> None:
    request = Request(columns=ANSWERS.columns, prompt="?", eval_last=2)
    summary = import_file(table(tmp_path, *"abdcad"), tmp_path / "out", request)
    assert words(tmp_path / "out" / "train.jsonl") == ["b1", "c3"]
    assert words(tmp_path / "out" / "eval.jsonl") == ["a4", "d5"]
    assert summary.left_out == {SHOWN_IN_EVAL: 2}
    assert balanced(summary)


def test_copies_of_a_picture_are_the_same_picture(tmp_path: Path) -> None:
    source = table(tmp_path, *"abc")
    paint(tmp_path / "in" / "c.png", shade=0)  # now like a.png, under its own name
    request = Request(columns=ANSWERS.columns, prompt="?", eval_last=1)
    import_file(source, tmp_path / "out", request)
    assert words(tmp_path / "out" / "train.jsonl") == ["b1"]


def test_everything_held_out_writes_no_training_file(tmp_path: Path) -> None:
    request = Request(columns=ANSWERS.columns, prompt="?", eval_last=2)
    summary = import_file(table(tmp_path, *"ab"), tmp_path / "out", request)
    assert [written.file.name for written in summary.written] == ["eval.jsonl"]
    assert not (tmp_path / "out" / "train.jsonl").exists()


def test_split_by_picture(tmp_path: Path) -> None:
    request = Request(columns=ANSWERS.columns, prompt="?", split=0.75, seed=3)
    summary = import_file(table(tmp_path, *"aabbccdd"), tmp_path / "out", request)
    train, held_out = (
        {word[0] for word in words(tmp_path / "out" / name)}
        for name in ("train.jsonl", "eval.jsonl")
    )
    assert len(train) == 3
    assert len(held_out) == 1
    assert not train & held_out
    assert balanced(summary)


def test_answers_are_samples_in_training_and_references_in_evaluation(tmp_path: Path) -> None:
    source = table(tmp_path, *"ab", answers=["x", "y", "z"])
    request = Request(columns={"image": "image", "answer": "answers"}, prompt="?", eval_last=1)
    summary = import_file(source, tmp_path / "out", request)
    assert words(tmp_path / "out" / "train.jsonl") == ["x", "y", "z"]
    (sample,) = read_samples(tmp_path / "out" / "eval.jsonl")
    assert sample.messages[-1].content[0].text == "x"
    assert sample.references == ("y", "z")
    assert [(w.rows, w.samples) for w in summary.written] == [(1, 3), (1, 1)]
    assert summary.unused_columns == ("answer",)


def test_copied_pictures(tmp_path: Path) -> None:
    request = Request(columns=ANSWERS.columns, prompt="?", copy_pictures=True)
    import_file(table(tmp_path, *"aba"), tmp_path / "out", request)
    names = sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir())
    assert names == ["a.png", "b.png"]
    samples = read_samples(tmp_path / "out" / "data.jsonl")
    assert {sample.messages[0].content[0].image for sample in samples} == {
        "pictures/a.png",
        "pictures/b.png",
    }


def test_pictures_out_of_a_parquet_table(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    data = [paint(tmp_path / f"{n}.png", 40 + n, 20).read_bytes() for n in range(3)]
    rows = [
        {"image": {"bytes": data[n], "path": f"{n}.png"}, "bbox": [1.0, 2.0, 30.0, 4.0]}
        for n in (0, 1, 1, 2)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    request = Request(
        columns={"image": "image", "box": "bbox"}, prompt="?", box_format="xywh", eval_last=1
    )
    summary = import_file(tmp_path / "rows.parquet", tmp_path / "out", request)
    assert summary.pictures == 3
    train = read_samples(tmp_path / "out" / "train.jsonl")
    held_out = read_samples(tmp_path / "out" / "eval.jsonl")
    found = pictures_of(train + held_out, tmp_path / "out")
    assert [path.read_bytes() for path in found] == [data[0], data[1], data[1], data[2]]
    assert train[0].messages[-1].content == (BoxPart(xyxy=(1, 2, 31, 6)),)
    verify_folder(tmp_path / "out")


def test_ids_are_made_unique(tmp_path: Path) -> None:
    source = write_jsonl(
        tmp_path / "rows.jsonl",
        [{"id": name, "query": "q", "response": "r"} for name in ("x", "y", "x")],
    )
    import_file(source, tmp_path / "out", Request())
    assert [s.id for s in read_samples(tmp_path / "out" / "data.jsonl")] == [
        "x-row1",
        "y",
        "x-row3",
    ]


def test_what_import_wrote_can_be_imported_and_loaded(tmp_path: Path) -> None:
    import_file(table(tmp_path, *"ab"), tmp_path / "one", ANSWERS)
    first = tmp_path / "one" / "data.jsonl"
    summary = import_file(first, tmp_path / "two" / "deeper", Request())
    assert summary.format == "samples"
    again = tmp_path / "two" / "deeper" / "data.jsonl"
    paths = [
        pictures_of([located.sample], located.folder)[0].resolve()
        for located in load_sources((DataFile(path=first), DataFile(path=again))).read()
    ]
    assert paths[:2] == paths[2:]


def test_clipped_boxes_are_counted(tmp_path: Path) -> None:
    source = table(tmp_path, *"ab", box=[0, 0, 40.5, 20])
    request = Request(columns={"image": "image", "box": "box"}, prompt="?")
    assert import_file(source, tmp_path / "out", request).clipped_boxes == 2


def test_bad_rows_are_listed_and_nothing_is_written(tmp_path: Path) -> None:
    source = table(tmp_path, *"abcdefgh")
    for letter in "abcdef":
        (tmp_path / "in" / f"{letter}.png").unlink()
    (tmp_path / "in" / "g.png").write_text("text")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        import_file(source, tmp_path / "out", ANSWERS)
    error = caught.value
    assert error.where == str(source)
    assert "7 of 8 rows cannot be used" in error.what
    assert "line 1: in/a.png: no such picture" in error.what
    assert "line 5" in error.what
    assert "line 6" not in error.what
    assert "and 2 more" in error.what
    assert error.expected
    assert error.remedy
    assert sorted(tmp_path.iterdir()) == before


class FullDisk(storage.Disk):
    def write(self, file: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "no space")


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    source = table(tmp_path, *"ab")
    before = sorted(tmp_path.iterdir())
    with storage.using(FullDisk()), pytest.raises(UserError, match="cannot be written"):
        import_file(source, tmp_path / "out", ANSWERS)
    assert sorted(tmp_path.iterdir()) == before


def test_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        import_file(table(tmp_path, "a"), tmp_path / "out", ANSWERS)
    assert list((tmp_path / "out").iterdir()) == []


def test_unsure_names_the_nearest_format_and_the_choices(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"image_path": "a.png", "caption": "x"}])
    with pytest.raises(UserError, match="image_path, caption") as caught:
        import_file(source, tmp_path / "out", Request())
    assert "--map image=image_path --map answer=caption" in caught.value.remedy
    assert "qwen-vl" in caught.value.expected
    source = write_jsonl(tmp_path / "b.jsonl", [{"conversations": [{"from": "a", "text": "x"}]}])
    with pytest.raises(UserError) as caught:
        import_file(source, tmp_path / "out", Request())
    assert "the nearest is conversations" in caught.value.remedy
    source = write_jsonl(tmp_path / "c.jsonl", [{"query": "a", "answer": "x"}])
    with pytest.raises(UserError) as caught:
        import_file(source, tmp_path / "out", Request())
    assert "the nearest is query" in caught.value.remedy
    source = write_jsonl(tmp_path / "d.jsonl", [{"image": "a.png", "text": "x"}])
    with pytest.raises(UserError) as caught:
        import_file(source, tmp_path / "out", Request())
    assert "--map image=image --map answer=text" in caught.value.remedy


def test_the_format_may_be_named(tmp_path: Path) -> None:
    turns = [{"from": "user", "value": "see a.png?"}, {"from": "assistant", "value": "x"}]
    source = write_jsonl(tmp_path / "a.jsonl", [{"conversations": turns}])
    summary = import_file(source, tmp_path / "out", Request(format="conversations"))
    assert summary.known_by == "--format"
    with pytest.raises(UserError, match="no such picture"):
        import_file(source, tmp_path / "2", Request(format="picture-path", prompt="?"))
    with pytest.raises(UserError, match="unknown format 'conversation'") as caught:
        import_file(source, tmp_path / "3", Request(format="conversation"))
    assert caught.value.remedy == "did you mean conversations?"
    with pytest.raises(UserError, match="1 of 1 rows cannot be used") as caught:
        import_file(source, tmp_path / "4", Request(format="ms-swift"))
    assert caught.value.remedy.startswith("give --format conversations: line 1 has turns")


def test_rows_unlike_the_first_ones_name_their_format(tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    rows: list[dict[str, Any]] = [{"messages": said("Hello")}] * 100
    rows.append({"messages": said("<image>House?"), "images": ["a.png"]})
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match="1 of 101 rows cannot be used") as caught:
        import_file(source, tmp_path / "out", Request())
    assert caught.value.remedy.startswith("give --format ms-swift: line 101 has messages")
    summary = import_file(source, tmp_path / "out", Request(format="ms-swift"))
    assert summary.written[0].samples == 101


def said(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}]


@pytest.mark.parametrize(
    ("request_", "where"),
    [
        (Request(columns={"picture": "image"}), "columns"),
        (Request(format="table"), "--format table"),
        (Request(format="query", columns={"image": "image"}), "--map"),
        (Request(format="samples", prompt="?"), "--prompt"),
        (Request(format="samples", box_format="xywh"), "--box-format or --box-units"),
        (Request(columns={"image": "image"}, prompt="?", split=1.0), "split"),
        (Request(columns={"image": "image"}, prompt="?", split=0.5, eval_last=1), "split"),
        (
            Request(columns={"image": "image", "answer": "answer"}, prompt="?", eval_last=9),
            "the last rows, held out",
        ),
    ],
)
def test_wishes_that_do_not_fit(tmp_path: Path, request_: Request, where: str) -> None:
    with pytest.raises(UserError) as caught:
        import_file(table(tmp_path, *"ab"), tmp_path / "out", request_)
    assert caught.value.where == where
    assert caught.value.expected
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_real_captions(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "captions" / "captions.jsonl"
    columns = {"image": "image", "answer": "captions"}
    request = Request(columns=columns, prompt="COCO Yes:")
    summary = import_file(source, tmp_path / "train", request)
    assert (summary.rows, summary.left_out) == (101, {})
    assert [(w.rows, w.samples) for w in summary.written] == [(101, 505)]
    request = Request(columns=columns, prompt="COCO Yes:", eval_last=101)
    summary = import_file(source, tmp_path / "eval", request)
    assert [(w.rows, w.samples) for w in summary.written] == [(101, 101)]
    originals = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    samples = read_samples(tmp_path / "eval" / "eval.jsonl")
    for sample, original in zip(samples, originals, strict=True):
        answers = (sample.messages[-1].content[0].text, *sample.references)
        assert list(answers) == original["captions"]
    assert all(path.is_file() for path in pictures_of(samples, tmp_path / "eval"))


@pytest.mark.parametrize("form", ["xyxy", "xywh"])
def test_real_boxes(shared: Path, tmp_path: Path, form: str) -> None:
    source = shared / "data" / "grounding" / "grounding.jsonl"
    columns = {"image": "image", "question": "question", "box": f"bbox_{form}"}
    summary = import_file(source, tmp_path / "out", Request(columns=columns, box_format=form))
    assert (summary.rows, summary.left_out, summary.clipped_boxes) == (534, {}, 0)
    assert [(w.rows, w.samples) for w in summary.written] == [(534, 534)]
    originals = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    for sample, original in zip(
        read_samples(tmp_path / "out" / "data.jsonl"), originals, strict=True
    ):
        assert list(sample.messages[-1].content[0].xyxy) == original["bbox_xyxy"]


def test_real_boxes_of_undeclared_form_are_refused(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "grounding" / "grounding.jsonl"
    columns = {"image": "image", "question": "question", "box": "bbox_xywh"}
    with pytest.raises(UserError, match="of 534 rows cannot be used") as caught:
        import_file(source, tmp_path / "out", Request(columns=columns))
    assert "--box-format xywh" in caught.value.remedy


def test_real_formulas(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "latex_ocr" / "latex_ocr.jsonl"
    columns = {"image": "image", "answer": "latex"}
    summary = import_file(
        source, tmp_path / "out", Request(columns=columns, prompt="LaTeX?", split=0.9)
    )
    assert (summary.rows, summary.left_out) == (1000, {})
    assert sum(written.samples for written in summary.written) == 1000
    train = pictures_of(read_samples(tmp_path / "out" / "train.jsonl"), tmp_path / "out")
    held_out = pictures_of(read_samples(tmp_path / "out" / "eval.jsonl"), tmp_path / "out")
    assert not {p.read_bytes() for p in train} & {p.read_bytes() for p in held_out}
    assert abs(len(held_out) - 100) <= 1
