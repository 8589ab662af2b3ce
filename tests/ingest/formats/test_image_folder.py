"""Image folders with text files, and folders that are not a dataset."""

import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from box_fixtures import import_samples, list_answers, list_questions, write_box_image
from case_files import load_cases
from image_fixtures import write_gray_image, write_jsonl

from finesight.errors import UserError
from finesight.ingest.exporter import export_dataset
from finesight.ingest.import_source import ImportOptions, detect_columns, open_source
from finesight.ingest.importer import import_dataset
from finesight.samples.sample import LocatedSample, Sample, read_samples

CASES = load_cases("image_folder")

WHITE = (1, 1, 2, 2)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    for name in ("a.png", "inner/b.jpg", "inner/c.png"):
        write_box_image(root / name, WHITE)
    (root / "a.txt").write_text("A dog.\nIt barks.\n", encoding="utf-8")
    (root / "inner" / "b.txt").write_bytes(b"\xef\xbb\xbfEin H\xc3\xbcndchen\r\n")
    (root / ".hidden.txt").write_text("x", encoding="utf-8")
    return root


def test_text_file_is_the_answer(root: Path, tmp_path: Path) -> None:
    samples, summary = import_samples(root, tmp_path / "out", prompt="What is this?")
    assert list_answers(samples) == [["A dog.\nIt barks."], ["Ein Hündchen"]]
    assert list_questions(samples) == ["What is this?"] * 2
    assert [sample.id for sample in samples] == ["a", "b"]
    assert summary.detected_by == "2 images with a text file of the same name"
    (root / "d.txt").write_text("no image", encoding="utf-8")
    (root / "a.caption").write_text("another text", encoding="utf-8")
    _, other = import_samples(root, tmp_path / "others", prompt="What is this?")
    assert other.detected_by.endswith("name; other files, not read: 1 .caption, 1 .txt")
    assert summary.skipped_rows == {"images without a text file of the same name": 1}
    with pytest.raises(UserError, match="without text") as caught:
        import_samples(root, tmp_path / "other")
    assert "--prompt" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("content", "what"), [(b"\n", "a.txt: an empty text file"), (b"\xff", "byte 0 is not UTF-8")]
)
def test_invalid_text_files(root: Path, tmp_path: Path, content: bytes, what: str) -> None:
    (root / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=what):
        import_samples(root, tmp_path / "out", prompt="What is this?")


def test_two_texts_for_one_image_are_rejected(tmp_path: Path) -> None:
    write_box_image(tmp_path / "a.png", WHITE)
    question = {"role": "user", "content": [{"type": "image", "image": "a.png"}]}
    located_samples = []
    for text in ("one", "two"):
        messages = [question, {"role": "assistant", "content": text}]
        sample = Sample.model_validate({"id": text, "messages": messages})
        located_samples.append(LocatedSample(sample, tmp_path))
    with pytest.raises(UserError, match=r"2 texts for images/a\.txt") as caught:
        export_dataset(located_samples, tmp_path / "out", "folder", copy_images=True)
    assert "coco" in str(caught.value.remedy)


@pytest.mark.parametrize(("files", "remedy"), CASES["test_unknown_folders_are_rejected"])
def test_unknown_folders_are_rejected(tmp_path: Path, files: list[str], remedy: str) -> None:
    root = tmp_path / "set"
    root.mkdir()
    for name in files:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("?", encoding="utf-8")
    with pytest.raises(UserError, match="a folder without a known dataset format") as caught:
        import_samples(root, tmp_path / "out")
    assert remedy in str(caught.value.remedy)
    assert str(len(files)) not in "0" or "no file" in caught.value.what
    has_images = any(file.endswith("a.png") for file in files)
    assert ("not classes" in caught.value.what) == has_images
    has_only_images = files == ["a.png"]
    assert ("images with labels" if has_only_images else "coco") in caught.value.expected
    if not has_images:
        with pytest.raises(UserError) as requested:
            import_samples(root, tmp_path / "out", format="classes")
        assert requested.value.what == "0 class folders with images"


@pytest.mark.parametrize(("files", "remedy"), CASES["test_proposed_files_have_rows"])
def test_proposed_files_have_rows(tmp_path: Path, files: dict[str, str], remedy: str) -> None:
    """Check that an error proposes a file only if it has rows of several images."""
    root = tmp_path / "set"
    (root / "inner").mkdir(parents=True)
    for name, text in files.items():
        if name.endswith(".png"):
            write_gray_image(root / name)
        else:
            (root / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="a folder without a known dataset format") as caught:
        import_samples(root, tmp_path / "out")
    advice = str(caught.value.remedy)
    assert advice.startswith(remedy.format(root=root))
    if "such as /" in advice:
        write_gray_image(root / "a.png")
        proposed = Path(advice.removeprefix("give the file itself, such as ").partition(";")[0])
        detected = detect_columns(proposed, ImportOptions())
        assert open_source(detected.path, detected.options).row_bounds == (0, 1)


def write_images(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        write_gray_image(root / name, gray_level=number)
    return root


def test_class_folders(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set", "cat/1.jpg", "cat/more/2.jpg", "big dog/1.png")
    samples, summary = import_samples(root, tmp_path / "out")
    assert (summary.format, summary.detected_by) == ("classes", "one folder per class, 2 classes")
    assert list_answers(samples) == [["big dog"], ["cat"], ["cat"]]
    assert "Which of these classes does the image show: big dog, cat?" in list_questions(samples)[0]
    assert [sample.id for sample in samples] == ["big dog-1", "cat-1", "cat-more-2"]
    samples, _ = import_samples(root, tmp_path / "two", prompt="One of {labels}?")
    assert list_questions(samples)[0] == "One of big dog, cat?"
    root = write_images(tmp_path / "many", *(f"c{number}/1.png" for number in range(21)))
    samples, _ = import_samples(root, tmp_path / "unlisted")
    assert "Which class does the image show? Answer" in list_questions(samples)[0]
    with pytest.raises(UserError, match="can be imported only"):
        export_dataset([], tmp_path / "three", "classes", copy_images=False)


@pytest.mark.parametrize("metadata", ["csv", "jsonl", "parquet", None])
@pytest.mark.parametrize("validation", ["val", "test", None])
def test_split_folders(tmp_path: Path, metadata: str | None, validation: str | None) -> None:
    folders = ["train", *filter(None, [validation])]
    root = tmp_path / "set"
    for split in folders:
        names = [f"{label}/{split}-{n}.png" for label in ("cat", "dog") for n in range(2)]
        write_images(root / split, *names)
        rows = [{"file_name": name, "caption": name[:3].upper()} for name in names]
        file = root / split / f"metadata.{metadata}"
        if metadata == "csv":
            file.write_text(
                "\n".join(",".join(row) for row in ([*rows[0]], *map(dict.values, rows)))
            )
        elif metadata == "jsonl":
            write_jsonl(file, rows)
        elif metadata:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    for number, path in enumerate(sorted(root.rglob("*.png"))):  # no image in both splits
        write_gray_image(path, gray_level=number)
    summary = import_dataset(root, tmp_path / "out", ImportOptions(prompt="What?"))
    assert summary.format == ("imagefolder" if metadata else "classes")
    assert f"{validation} folder" in summary.detected_by or validation in (None, "val")
    counts = {part.file.name: part.num_samples for part in summary.output_files}
    assert counts == ({"train.jsonl": 4, "eval.jsonl": 4} if validation else {"data.jsonl": 4})
    last = read_samples(summary.output_files[-1].file)
    answers = {answer for (answer,) in list_answers(last)}
    assert answers == ({"CAT", "DOG"} if metadata else {"cat", "dog"})
    assert all(folders[-1] in sample.messages[0].content[0].image for sample in last)


def test_imagefolder_columns(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set", "a.png", "b.png")
    rows = [{"file_name": f"{name}.png", "x": 1, "y": name} for name in "ab"]
    write_jsonl(root / "metadata.jsonl", rows)
    with pytest.raises(UserError, match="no answer column among file_name, x, y"):
        import_samples(root, tmp_path / "out", prompt="What?")
    columns = {"fields": "x,y"}
    samples, summary = import_samples(root, tmp_path / "out", prompt="What?", columns=columns)
    assert list_answers(samples)[1] == ['{"x": 1, "y": "b"}']
    assert summary.unused_columns == ()
    with pytest.raises(UserError, match="no column 'yy' for --map answer=yy") as caught:
        import_samples(root, tmp_path / "two", prompt="What?", columns={"answer": "yy"})
    assert caught.value.remedy == "did you mean y?"
    write_jsonl(
        root / "metadata.jsonl", [{**row, "answer": "A", "cot": "It is so."} for row in rows]
    )
    with pytest.raises(UserError, match="'cot': a reasoning text") as caught:
        import_samples(root, tmp_path / "cot", prompt="What?")
    columns = dict(re.findall(r"--map (\w+)=(\w+)", caught.value.remedy))
    _, summary = import_samples(root, tmp_path / "cot", prompt="What?", columns=columns)
    assert summary.unused_columns == ("x", "y", "cot")


@pytest.mark.parametrize("requested", [None, "imagefolder"])
def test_encoding_of_imagefolder_metadata(tmp_path: Path, requested: str | None) -> None:
    root = write_images(tmp_path / "set", "a.png")
    (root / "metadata.csv").write_bytes("file_name,text\na.png,Stra\u00dfe\n".encode("cp1252"))
    options = {"prompt": "What?", "format": requested}
    samples, summary = import_samples(root, tmp_path / "out", **options, encoding="cp1252")
    assert list_answers(samples) == [["Stra\u00dfe"]]
    assert summary.text_format == "comma-separated, CP1252"
    with pytest.raises(UserError, match="not utf-8 text"):
        import_samples(root, tmp_path / "two", **options, encoding="utf-8")
    (root / "metadata.csv").rename(root / "metadata.jsonl")
    with pytest.raises(UserError, match="the source is not a"):
        import_samples(root, tmp_path / "three", **options, encoding="cp1252")


@pytest.mark.parametrize(
    ("names", "reason", "requested"), CASES["test_other_folders_are_no_classes"]
)
def test_other_folders_are_no_classes(tmp_path, names, reason, requested):
    root = write_images(tmp_path / "set", *(name for name in names if name.endswith("png")))
    for name in names:
        (root / name).touch()
    with pytest.raises(UserError, match="a folder without a known dataset format") as caught:
        import_samples(root, tmp_path / "out")
    assert reason in caught.value.what
    if requested is None:
        with pytest.raises(UserError, match=reason):
            import_samples(root, tmp_path / "out", format="classes")
    else:
        _, summary = import_samples(root, tmp_path / "out", format="classes")
        assert summary.text_format == requested
