"""Tests of the command `finesight init`: from data to a trained model, and detection."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import yaml
from label_fixtures import ask_server, draw_dots
from PIL import Image
from typer.testing import CliRunner

from finesight import model_folder
from finesight.cli import init
from finesight.cli.app import run_command
from finesight.data import import_source
from finesight.errors import UserError, suggest_similar_path
from finesight.model_folder import TINY_MODEL
from finesight.plan import run_plan

COLORS = ("red", "green", "blue", "white")


def write_image(path: Path, i: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (56, 28 + i), COLORS[i % 4]).save(path)


def write_table(folder: Path, num_rows: int, **columns: Any) -> Path:
    """Write images and a CSV table; each column is a function of the row number."""
    rows = []
    for i in range(num_rows):
        write_image(folder / "images" / f"{i}.png", i)
        rows.append({"file": f"images/{i}.png"} | {name: cell(i) for name, cell in columns.items()})
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def run_init(*words: str | Path) -> dict[str, Any]:
    result = CliRunner().invoke(init_app(), [*map(str, words), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def init_app() -> Any:
    import typer

    app = typer.Typer()
    app.command()(init.init)
    return app


def test_folder_of_images_becomes_a_trained_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    captions = {"caption": lambda i: f"a plain {COLORS[i % 4]} square number {i}"}
    write_table(Path("photos"), 24, **captions, url=lambda i: i)
    assert run_command(["init", "photos", "--yes"]) == 0
    printed = capsys.readouterr().out
    assert "task    captions (cider_d)\nexample <image> Describe the image. -> a plain " in printed
    assert "image: file" in printed
    assert "answer: caption\n        unused column: url\n" in printed
    assert "24 rows\n        comma-separated, UTF-8\n" in printed
    assert (
        "check   24 images, 24 unique; no issues found\nrun     100 steps of 8 samples: " in printed
    )
    assert "FLOPs" not in printed
    assert len(printed.splitlines()) < 20
    assert printed.endswith(
        "next:\n  finesight train photos-finetune/recipe.yaml\n"
        "  finesight chat photos-finetune/run\n"
    )
    content = Path("photos-finetune/recipe.yaml").read_text()
    assert content.count("#") >= 5
    recipe = yaml.safe_load(content)
    assert recipe["model"] == TINY_MODEL
    assert recipe["eval"]["metric"] == "captions"
    assert recipe["train"]["steps"] == 100
    assert "steps: 100  # 42.1 epochs; at least 100 steps\n" in content
    short = ["train.steps=2", "eval.limit=2", "eval.max_new_tokens=4"]
    assert run_command(["train", "photos-finetune/recipe.yaml", *short]) == 0
    # The complete command, with an image and the prompt of the training.
    command = capsys.readouterr().err.partition("Try it:  finesight ")[2].splitlines()[0]
    image = shlex.split(command)[2]
    assert re.fullmatch(r"photos/images/\d+\.png", image)
    assert shlex.split(command)[3:] == ["--prompt", "Describe the image."]
    assert run_command(shlex.split(command)) == 0
    assert run_command(["predict", "photos-finetune", image, "--prompt", "x"]) == 2
    assert "did you mean photos-finetune/run?" in capsys.readouterr().err
    monkeypatch.chdir("photos-finetune")
    assert run_command(["train", "recipe.yaml", "train.epochs=1"]) == 2
    printed = capsys.readouterr().err
    assert "train.epochs replaces train.steps: 100 of the recipe" in printed
    assert "run the command in the parent folder (cd ..)" in printed
    monkeypatch.chdir(tmp_path)
    question = ["photos/images/0.png", "--prompt", "Describe the image."]
    assert run_command(["predict", "photos-finetune/run", *question]) == 0
    assert "photos/images/0.png: " in capsys.readouterr().out
    files = {path: path.read_bytes() for path in Path("photos-finetune").rglob("*.*")}
    assert run_command(["init", "photos", "--yes"]) == 2
    assert "photos-finetune: exists already and is never overwritten" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("photos-finetune").rglob("*.*")} == files


@contextmanager
def run_server(command: str) -> Iterator[tuple[str, list[str]]]:
    """Run a printed command; yield the address it prints, and after the block its error output."""
    words = [sys.executable, "-m", *shlex.split(command), "--port", "0"]
    with subprocess.Popen(words, stdout=PIPE, stderr=PIPE, text=True) as process:
        errors: list[str] = []
        yield process.stdout.readline().split()[-1], errors
        process.send_signal(signal.SIGINT)
        errors += process.communicate(timeout=60)[1].splitlines()
        assert process.returncode == 0


def test_unlabeled_images_become_a_served_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    colors = draw_dots(Path("photos"), 200)
    assert run_command(["init", "photos", "--yes", "--prompt", "Which color?"]) == 0
    label, train, serve = capsys.readouterr().out.partition("next:\n")[2].split("\n", 2)
    assert run_command(shlex.split(train)[1:]) == 2
    command = "finesight label MODEL IMAGES --out photos-finetune/data"
    remedy = f'label images first: {command} --prompt "..." --train-fraction 0.8'
    assert remedy in capsys.readouterr().err
    # Without --train-fraction, all labels are training samples.
    labels = Path("photos-finetune/data/labels.jsonl")
    labels.parent.mkdir()
    labels.touch()
    assert suggest_similar_path(labels.with_name("labels_eval.jsonl")) == (
        f"label at least 2 images, some of them for validation: {command} --train-fraction 0.8"
    )
    labels.unlink()
    with run_server(label) as (address, errors):
        for index in range(30):
            with urllib.request.urlopen(f"{address}/items/{index}") as answer:
                sample_id = json.load(answer)["id"]
            decision = {"id": sample_id, "action": "save", "text": colors[Path(sample_id).name]}
            headers = {"content-type": "application/json"}
            body = json.dumps(decision).encode()
            with urllib.request.urlopen(
                urllib.request.Request(f"{address}/decision", body, headers)
            ) as answer:
                assert json.load(answer)["item"]["decision"] == "written"
    assert errors[-1] == f"next: {train.strip()}"
    assert run_command([*shlex.split(train)[1:], "train.steps=30"]) == 0
    assert f"next: {serve.strip()}\n" in capsys.readouterr().err
    labels = Path("photos-finetune/data/labels.jsonl").read_text().splitlines()
    image = Path("photos", Path(json.loads(labels[0])["id"]).name)
    with run_server(serve) as (address, _):
        assert ask_server(f"{address}/", image) == colors[image.name]


@pytest.fixture
def no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise UserError("no connection")

    monkeypatch.setattr(run_plan, "plan_run", fail)
    monkeypatch.setattr(model_folder, "locate_model", lambda name: None)


@pytest.mark.usefixtures("no_plan")
@pytest.mark.parametrize(
    ("columns", "metric", "prompt"),
    [
        ({"caption": lambda i: f"a photo of house {i} here"}, "captions", "Describe the image."),
        ({"latex": lambda i: rf"\frac{{{i}}}{{2}}"}, "latex", "Write the formula as LaTeX."),
        ({"plate": lambda i: f"AB {i}"}, "ocr", "Read the text."),
        ({"reading": lambda i: f"{i // 2 + 30}"}, "ocr", "Read the text."),
        (
            {
                "question": lambda i: ("Read the line.", "Transcribe.")[i % 2],
                "answer": lambda i: f"line {i}",
            },
            "ocr",
            None,
        ),
        (
            {
                "question": lambda i: ("Describe.", "Caption:")[i % 2],
                "answer": lambda i: f"a dog on grass {i}",
            },
            "captions",
            None,
        ),
        (
            {"label": lambda i: ("cat", "dog")[i % 2]},
            "classification",
            "Which of these classes does the image show: cat, dog? Answer with the class only.",
        ),
        (
            {"shop": lambda i: f"s{i}", "invoice_id": lambda i: i, "id": lambda i: i},
            "json",
            "Return shop, invoice_id as JSON.",
        ),
        ({"question": lambda i: f"How many {i}?", "answer": lambda i: i}, "qa", None),
        ({"question": lambda i: f"Is it {i % 3}?", "answer": lambda i: f"{i} of 9"}, "qa", None),
        ({"question": lambda i: f"is it {i % 3}", "answer": lambda i: f"{i} of 9"}, "qa", None),
        (
            {"question": lambda i: f"Is it {i}?", "answer": lambda i: ("yes", "no", "2")[i % 3]},
            "classification",
            None,
        ),
        (
            {
                "question": lambda i: f"Why {i}?",
                "answer": lambda i: f"because of {i} " + "a b " * 3,
            },
            "captions",
            None,
        ),
        (
            {"status": lambda i: f"{('invoice', 'order')[i % 2]} {('paid', 'open')[i % 3 // 2]}"},
            "classification",
            "Which of these classes does the image show: invoice open, invoice paid, order open, "
            "order paid? Answer with the class only.",
        ),
        (
            {"status": lambda i: f"the invoice is still {('paid', 'open', 'sent')[i % 3]}"},
            "classification",
            "Which of these classes does the image show: the invoice is still open, the invoice is "
            "still paid, the invoice is still sent? Answer with the class only.",
        ),
        (
            {"caption": lambda i: f"a {COLORS[i % 4]} car with {i % 3 + i // 8} doors"},
            "captions",
            "Describe the image.",
        ),
        (
            {"bbox": lambda i: "[1, 2, 20, 20]", "label": lambda i: f"thing {i}"},
            "grounding",
            "Locate the object.",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_task_of_a_table_is_detected(
    tmp_path: Path, columns: dict[str, Any], metric: str, prompt: str | None
) -> None:
    found = run_init(write_table(tmp_path, 24, **columns), "--out", tmp_path / "out")
    assert (found["metric"], found["prompt"]) == (metric, prompt)
    assert found["columns"]["image"] == "file"
    assert sum(found["samples"].values()) == 24
    assert found["samples"]["eval"] == 5
    assert found["fits"] is None


@pytest.mark.usefixtures("no_plan")
@pytest.mark.parametrize(
    ("question", "answer", "other"),
    [
        ("prefix", "suffix", ""),
        ("problem", "solution", "level"),
        ("Prompt", "Completion", "source"),
        ("input", "target", "split"),
        ("user_prompt", "model_response", "system_prompt"),
        ("question_text", "gt_answer", "question_id"),
        ("instruction,input", "output", "task"),
        ("query", "reply", ""),
        ("q", "a", ""),
    ],
)
def test_question_and_answer_are_known_by_name(
    tmp_path: Path, question: str, answer: str, other: str
) -> None:
    names = filter(None, [answer, other, *question.split(",")])
    columns = {name: (lambda i, name=name: f"{name} {i}") for name in names}
    found = run_init(write_table(tmp_path, 20, **columns), "--out", tmp_path / "out")
    assert found["columns"] == {"image": "file", "question": question, "answer": answer}
    assert found["prompt"] is None
    sample = json.loads((tmp_path / "out" / "data" / "eval.jsonl").read_text().splitlines()[0])
    asked, answered = (message["content"][-1]["text"] for message in sample["messages"])
    assert [line.split()[0] for line in asked.split("\n")] == question.split(",")
    assert answered.split()[0] == answer


@pytest.mark.usefixtures("no_plan")
@pytest.mark.parametrize(
    ("image", "remedy"),
    [
        ({"messages": None, "image_path": "{}.png"}, "rename the key image_path to images"),
        ({"messages": None, "media": {"files": ["{}.png"]}}, "move media.files to the key images"),
        (
            {"query": "q {}", "response": "a {}", "pic": {"path": "{}.png"}},
            "give --map image=pic --map answer=response --map question=query",
        ),
    ],
)
def test_unrecognized_images_are_no_text_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], image: dict[str, Any], remedy: str
) -> None:
    turns = [{"role": "user", "content": "q {}"}, {"role": "assistant", "content": "a {}"}]
    row = json.dumps({key: value or turns for key, value in image.items()})
    rows = []
    for i in range(12):
        write_image(tmp_path / f"{i}.png", i)
        rows.append(row.replace("{}", str(i)))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    words = ["init", str(tmp_path / "rows.jsonl"), "--yes", "--out", f"{tmp_path}/out"]
    assert run_command(words) == 2
    assert remedy in capsys.readouterr().err
    if remedy.startswith("give"):
        assert run_command([*words, *remedy.split()[1:]]) == 0
    else:
        file = tmp_path / "rows.jsonl"
        content = (
            file.read_text().replace('"media": {"files": ', '"images": ').replace('"]}}', '"]}')
        )
        file.write_text(content.replace('"image_path"', '"images"'))
        assert run_command(words) == 0
    assert "<image> q 0" in capsys.readouterr().out


OBJECTS = [((5, 6, 20, 16), "ball"), ((8, 20, 50, 27), "cube")]


def make_object_records(layout: str) -> list[dict[str, Any]]:
    """Return the rows of two objects in each of 12 images in a layout of known data sets."""
    rows = []
    for i in range(12):
        image = {"file_name": f"{i}.png", "width": 56, "height": 40}
        boxes = [box for box, _ in OBJECTS]
        sizes = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in boxes]
        labels = [label for _, label in OBJECTS]
        if layout == "objects":
            rows.append({**image, "objects": {"id": [1, 2], "bbox": sizes, "categories": labels}})
        elif layout == "list of objects":
            objects = [{"bbox": b, "category": c} for b, c in zip(sizes, labels, strict=True)]
            rows.append({**image, "objects": objects})
        elif layout in ("bbox_xyxy", "boxes", "bbox_xywh"):
            rows.append({**image, layout: sizes if "xywh" in layout else boxes, "label": labels})
        else:
            for (x1, y1, x2, y2), label in OBJECTS:
                values = (x1, y1, x2, y2)
                if layout in ("x,y,w,h", "bbox"):
                    values = (x1, y1, x2 - x1, y2 - y1)
                elif layout == "cx,cy,width,height":
                    values = ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)
                elif layout == "XMin,YMin,XMax,YMax":
                    values = (x1 / 56, y1 / 40, x2 / 56, y2 / 40)
                names = layout.split(",")
                box = {layout: values} if len(names) == 1 else dict(zip(names, values, strict=True))
                if layout == "cx,cy,width,height":
                    image = {"file_name": f"{i}.png"}
                rows.append({**image, "class": label, **box})
    return rows


@pytest.mark.usefixtures("no_plan")
@pytest.mark.parametrize("metadata", ["rows.jsonl", "metadata.jsonl"])
@pytest.mark.parametrize(
    "layout",
    [
        "objects",
        "list of objects",
        "bbox_xyxy",
        "boxes",
        "bbox_xywh",
        "bbox",
        "xmin,ymin,xmax,ymax",
        "x,y,w,h",
        "cx,cy,width,height",
        "XMin,YMin,XMax,YMax",
        "Roi.X1,Roi.Y1,Roi.X2,Roi.Y2",
    ],
)
def test_boxes_of_an_image_are_one_sample(tmp_path: Path, layout: str, metadata: str) -> None:
    rows = make_object_records(layout)
    for i in range(12):
        (tmp_path / "set").mkdir(exist_ok=True)
        Image.new("RGB", (56, 40), (i, 0, 0)).save(tmp_path / "set" / f"{i}.png")
    (tmp_path / "set" / metadata).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = run_init(tmp_path / "set", "--out", tmp_path / "out")
    assert found["samples"] == {"data": 12}
    assert found["metric"] == "detection"
    assert found["prompt"] == "Locate every object of these classes in the image: ball, cube."
    for line in (tmp_path / "out" / "data" / "data.jsonl").read_text().splitlines():
        parts = json.loads(line)["messages"][1]["content"]
        assert [(tuple(map(round, part["xyxy"])), part["label"]) for part in parts] == OBJECTS


def write_coco(folder: Path) -> None:
    boxes = [
        {"id": i, "image_id": i // 2, "category_id": 1, "bbox": [i, 1, 9, 9]} for i in range(44)
    ]
    images = [{"id": i, "file_name": f"images/{i}.png"} for i in range(22)]
    classes = [{"id": 1, "name": "ball"}]
    content = {"images": images, "annotations": boxes, "categories": classes}
    (folder / "coco.json").write_text(json.dumps(content))


def write_coco_classes(folder: Path) -> None:
    """Write one object per image, each of one of two classes."""
    boxes = [
        {"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [i, 1, 9, 9]} for i in range(22)
    ]
    images = [{"id": i, "file_name": f"images/{i}.png"} for i in range(22)]
    classes = [{"id": 1, "name": "ball"}, {"id": 2, "name": "cube"}]
    content = {"images": images, "annotations": boxes, "categories": classes}
    (folder / "coco.json").write_text(json.dumps(content))


def write_chats(folder: Path) -> None:
    lines = [
        {
            "images": [f"images/{i}.png"],
            "messages": [
                {"role": "user", "content": "<image>What is it?"},
                {"role": "assistant", "content": f"It is the photo number {i}."},
            ],
        }
        for i in range(22)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_texts(folder: Path) -> None:
    for i in range(22):
        (folder / "images" / f"{i}.txt").write_text(f"x_{{{i}}}")


@pytest.mark.usefixtures("no_plan")
@pytest.mark.parametrize(
    ("write", "source", "name", "metric", "prompt"),
    [
        (write_coco, "coco.json", "coco", "detection", None),
        (write_coco_classes, "coco.json", "coco", "detection", None),
        (write_chats, ".", "ms-swift", "captions", None),
        (write_texts, "images", "folder", "latex", "Write the formula as LaTeX."),
    ],
    ids=["boxes", "single-boxes", "conversations", "text-files"],
)
def test_other_formats_are_detected(
    tmp_path: Path, write: Any, source: str, name: str, metric: str, prompt: str | None
) -> None:
    for i in range(22):
        write_image(tmp_path / "images" / f"{i}.png", i)
    write(tmp_path)
    found = run_init(tmp_path / source, "--out", tmp_path / "out", "--yes")
    assert (found["format"], found["metric"], found["prompt"]) == (name, metric, prompt)
    assert found["has_data_errors"] is False


@pytest.mark.usefixtures("no_plan")
def test_split_of_the_source_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(24):
        split = "val" if i < 4 else "train"
        write_image(Path("user@home", "photos", split, COLORS[i % 2], f"{i}.png"), i)
    found = run_init("user@home/photos")
    assert found["samples"] == {"train": 20, "eval": 4}
    assert found["recipe"] == "photos-finetune/recipe.yaml"


@pytest.mark.usefixtures("no_plan")
def test_all_classes_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_source, "NUM_PREVIEW_ROWS", 10)
    table = write_table(tmp_path, 24, label=lambda i: "ab"[i > 11] if i < 23 else "c")
    found = run_init(table, "--out", tmp_path / "out")
    assert found["metric"] == "classification"
    assert "image show: a, b, c?" in found["prompt"]


@pytest.mark.usefixtures("no_plan")
def test_table_without_a_header_keeps_its_first_row(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text("".join(f"Is {i} even?,{i % 2 == 0}\n" for i in range(6)))
    words = [table, "--yes", "--no-header", "--map", "question=1", "--map", "answer=2"]
    assert run_init(*words, "--out", tmp_path / "out")["samples"] == {"data": 6}


def test_missing_model_is_an_error_before_the_import(tmp_path: Path) -> None:
    words = ["init", str(write_table(tmp_path, 3, text=str)), "--yes", "--out", f"{tmp_path}/out"]
    assert run_command([*words, "--model", "./missing"]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_plan")
@pytest.mark.parametrize("source", ["labels.csv", "."])
def test_bare_names_are_found_in_the_only_matching_subfolder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    table = write_table(tmp_path, 3, caption=lambda i: f"number {i}") / "labels.csv"
    table.write_text(table.read_text().replace("images/", ""))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert run_command(["init", source, "--yes", "--out", "work"]) == 0
    assert "table (columns; images found in images/), 3 rows" in capsys.readouterr().out
    line = json.loads(Path("work/data/data.jsonl").read_text().splitlines()[0])
    assert line["messages"][0]["content"][0]["image"] == "../../images/0.png"
    # A second folder with the same files is ambiguous, and nothing is left of a failed command.
    (tmp_path / "images").rename(tmp_path / "a")
    shutil.copytree("a", "b")
    assert run_command(["init", "labels.csv", "--yes", "--out", "work2"]) == 2
    error = capsys.readouterr().err
    assert "0.png: no such image" in error
    assert error.count(str(tmp_path.resolve())) == 1
    assert not Path("work2").exists()


@pytest.mark.parametrize(
    ("memory_gb", "model"),
    [(0, TINY_MODEL), (4, TINY_MODEL), (12, "Qwen/Qwen3.5-2B"), (24, "Qwen/Qwen3.5-4B")],
)
def test_model_is_chosen_by_gpu_memory(memory_gb: int, model: str) -> None:
    assert init.choose_model(round(memory_gb * 1e9)) == model


@pytest.mark.usefixtures("no_plan")
def test_questions_change_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "is_interactive", lambda: True)
    monkeypatch.setattr(init, "find_device", lambda: ("RTX 4090", round(24e9)))
    monkeypatch.chdir(write_table(tmp_path, 10, caption=lambda i: f"text {i}", shop=lambda i: i))
    answers: Sequence[str] = ("labels.csv", "caption,shop", "poems", "json", "Read it.", "")
    result = CliRunner().invoke(init_app(), [], input="\n".join(answers) + "\n")
    assert result.exit_code == 0, result.output
    assert result.output.count("]: ") == 6
    assert "unknown task 'poems'" in result.output
    assert "finesight train" not in result.output
    recipe = yaml.safe_load(Path("labels-finetune/recipe.yaml").read_text())
    assert recipe["model"] == "Qwen/Qwen3.5-4B"
    assert recipe["tune"]["language"] == "lora"
    assert recipe["image"]["max_pixels"] > 0
    assert "eval" not in recipe  # too few rows for a validation split
    assert "the run was not planned" in result.output
    line = json.loads(Path("labels-finetune/data/data.jsonl").read_text().splitlines()[3])
    assert line["messages"][0]["content"][1]["text"] == "Read it."
    assert json.loads(line["messages"][1]["content"][0]["text"]) == {
        "caption": "text 3",
        "shop": "3",
    }


def test_labels_with_one_answer_column_or_several(tmp_path: Path, capsys: Any) -> None:
    columns = {"No.": lambda i: i, "customer": lambda i: f"c{i}", "city": lambda i: f"t{i}"}
    source = write_table(tmp_path / "photos", 4, **columns)
    assert run_command(["init", str(source), "--yes", "--out", f"{tmp_path}/out"]) == 0
    printed = capsys.readouterr().out
    assert "        fields: customer,city\n        unused column: No.\n" in printed
    assert "for one column only: --map image=file --map answer=COLUMN\n" in printed
    hinted = ("--map", "image=file", "--map", "answer=city", "--out", tmp_path / "two")
    assert run_init(source, *hinted)["columns"] == {"image": "file", "answer": "city"}


@pytest.mark.parametrize(
    ("prompt", "metric"),
    [
        ("Which color?", "qa"),
        ("Describe it.", "captions"),
        ("Return name, price as JSON.", "json"),
        ("Was kostet es, als json?", "json"),
        ("以JSON返回名称。", "json"),
        ("Describe the jsonl file.", "captions"),
    ],
)
def test_question_about_unlabeled_images_selects_the_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: str, metric: str
) -> None:
    monkeypatch.chdir(tmp_path)
    draw_dots(Path("photos"), 3)
    found = run_init("photos", "--yes", "--prompt", prompt)
    assert found["metric"] == metric
    recipe = Path("photos-finetune/recipe.yaml").read_text()
    assert (
        "steps: 100  # for a few dozen labels; with hundreds, replace it by epochs: 5\n" in recipe
    )
    assert yaml.safe_load(recipe)["eval"]["metric"] == metric


def test_option_sets_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw_dots(Path("photos"), 3)
    found = run_init("photos", "--yes", "--task", "json")
    assert (found["metric"], found["prompt"]) == ("json", "Return the fields as JSON.")
    table = write_table(tmp_path / "table", 3, caption=lambda i: f"a photo of house {i}")
    found = run_init(table, "--task", "qa", "--out", "table-qa")
    assert (found["metric"], found["prompt"]) == ("qa", "Answer the question.")
    found = run_init(table, "--task", "classification", "--out", "table-classes")
    assert "image show: a photo of house 0, a photo of house 1, " in found["prompt"]
    # Answers that are no JSON cannot be evaluated as JSON.
    assert run_command(["init", "table", "--task", "json", "--yes", "--out", "table-json"]) == 2
    assert not Path("table-json").exists()
    draw_dots(Path("one"), 1)
    result = CliRunner().invoke(init_app(), ["one", "--yes"])
    assert "data    one: 1 image without labels\n" in result.output
    assert run_command(["init", "photos", "--task", "poems", "--out", "other"]) == 2


def test_classes_of_unlabeled_images_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init, "is_interactive", lambda: True)
    monkeypatch.chdir(tmp_path)
    draw_dots(Path("photos"), 3)
    answers: Sequence[str] = ("photos", "classification", "Which color?", "red,green", "")
    result = CliRunner().invoke(init_app(), [], input="\n".join(answers) + "\n")
    assert result.exit_code == 0, result.output
    assert result.output.count("]: ") == len(answers)
    label = "finesight label finesight-tiny photos --prompt 'Which color?' --out photos-finetune"
    options = "--classes red,green --no-suggestions --train-fraction 0.8"
    assert f"{label}/data {options}\n" in result.output
    recipe = yaml.safe_load(Path("photos-finetune/recipe.yaml").read_text())
    assert recipe["eval"]["metric"] == "classification"
    assert recipe["data"]["eval"] == "photos-finetune/data/labels_eval.jsonl"


@pytest.mark.parametrize(
    ("words", "options", "prompt"),
    [
        (["--task", "classification"], "--classes A,B ", "What is it?"),
        (["--task", "json"], "--kind fields --fields A,B ", "Return the fields as JSON."),
        (
            ["--prompt", "Return shop, date and total as JSON."],
            "--kind fields --fields shop,date,total ",
            "Return shop, date and total as JSON.",
        ),
    ],
)
def test_names_of_unlabeled_images_are_proposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], options: str, prompt: str
) -> None:
    monkeypatch.chdir(tmp_path)
    draw_dots(Path("photos"), 3)
    found = run_init("photos", "--yes", *words)
    assert found["prompt"] == prompt
    assert f" --out photos-finetune/data {options}--no-suggestions" in found["next"][0]
    assert found["placeholder"] == ("A,B" if "A,B" in options else None)


def test_fields_of_unlabeled_images_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init, "is_interactive", lambda: True)
    monkeypatch.chdir(tmp_path)
    draw_dots(Path("photos"), 3)
    answers = ("photos", "json", "", "total, date,", "")
    result = CliRunner().invoke(init_app(), [], input="\n".join(answers) + "\n")
    assert result.exit_code == 0, result.output
    assert "--kind fields --fields total,date --no-suggestions" in result.output
    assert "task    json; prompt: Return total, date as JSON.\n" in result.output


@pytest.mark.usefixtures("no_plan")
@pytest.mark.parametrize("num_missing", [0, 5])
def test_rows_without_images_are_mentioned(tmp_path: Path, num_missing: int) -> None:
    table = write_table(tmp_path, 24, label=lambda i: "ab"[i % 2])
    for i in range(num_missing):
        (table / f"images/{i}.png").unlink()
    words = [f"{table}/labels.csv", "--out", f"{tmp_path}/out", "--json"]
    result = CliRunner().invoke(init_app(), words, catch_exceptions=False)
    skipped = {"an image is missing or corrupt": num_missing} if num_missing else {}
    assert json.loads(result.stdout.splitlines()[-1])["skipped_rows"] == skipped
    warning = "warning: 5 of 24 rows have no readable image and were skipped"
    assert (warning in result.stderr) == bool(num_missing)


def test_images_without_labels_lead_to_labelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "photos" / "a.png", 0)
    assert run_command(["import", "photos", "data"]) == 2
    error = capsys.readouterr().err
    assert "  expected: images with labels\n" in error
    assert "or label them: finesight label MODEL photos --prompt TEXT" in error


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("title,id\nx,1\ny,2\n", "--map image=COLUMN"),
        ("image,question\na.png,What?\n", "no answer column among image, question"),
        ("", "no such file"),
    ],
    ids=["no-image-column", "no-answer-column", "missing"],
)
def test_unsuitable_data_are_rejected_without_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, words: str
) -> None:
    file = tmp_path / "table.csv"
    if content:
        file.write_text(content)
    assert run_command(["init", str(file), "--yes", "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_plan")
def test_unknown_columns_of_coordinates_are_no_classes(tmp_path: Path, capsys: Any) -> None:
    corners = {name: (lambda i, n=n: 3 + 5 * n + i % 4) for n, name in enumerate("pqrs")}
    source = str(write_table(tmp_path / "data", 8, **corners, label=lambda i: "ab"[i % 2]))
    words = ["init", source, "--yes", "--out", f"{tmp_path}/out"]
    assert run_command(words) == 2
    remedy = "--map image=file --map box=p,q,r,s"
    assert f"give {remedy}, or" in capsys.readouterr().err
    assert run_command([*words, *remedy.split()]) == 0
