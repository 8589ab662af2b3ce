"""Tests of the command `finesight init`: from data to a trained model, and detection."""

import csv
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from case_files import load_cases
from click.testing import CliRunner
from image_fixtures import write_jsonl
from label_fixtures import draw_dots
from PIL import Image

from finesight import api, model_folder
from finesight.cli import app as app_module
from finesight.errors import UserError, suggest_similar_path
from finesight.ingest import import_source
from finesight.ingest import init_operation as init
from finesight.model_folder import TINY_MODEL
from finesight.plan import run_plan
from finesight.samples.sample import read_samples
from finesight.settings.config import TuneSettings
from finesight.settings.recipe_template import DetectedTask, StartModel, format_recipe

CASES = load_cases("init")

COLORS = ("red", "green", "blue", "white")
YES = ("--yes", "--out", "out")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise UserError("no connection")

    monkeypatch.setattr(run_plan, "plan_run", fail)
    monkeypatch.setattr(model_folder, "locate_model", lambda name: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def run_init(cli: Any) -> Callable[..., dict[str, Any]]:
    return lambda *words: dict(cli("init", *words, "--json").json)


def answer_questions(monkeypatch: pytest.MonkeyPatch, *answers: str) -> str:
    """Run init with these answers in a terminal, and return its output."""
    monkeypatch.setattr(app_module, "is_interactive", lambda: True)
    result = CliRunner().invoke(app_module.app, ["init"], input="\n".join(answers) + "\n")
    assert result.exit_code == 0, result.output
    assert result.output.count("]: ") == len(answers)
    return result.output


def write_image(path: Path, i: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (56, 28 + i), COLORS[i % 4]).save(path)


def write_table(folder: str, num_rows: int, **columns: str | list[str]) -> Path:
    """Write images and a CSV table.

    Args:
        columns: Cells by column: a text with the row number as {i}, or a list of texts that is
            repeated.
    """
    rows = []
    for i in range(num_rows):
        write_image(Path(folder, "images", f"{i}.png"), i)
        cells = {
            name: (cell if isinstance(cell, str) else cell[i % len(cell)]).replace("{i}", f"{i}")
            for name, cell in columns.items()
        }
        rows.append({"file": f"images/{i}.png"} | cells)
    with Path(folder, "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return Path(folder, "labels.csv")


def test_folder_of_images_becomes_a_trained_model(monkeypatch, cli):
    captions = [f"a plain {color} square number {{i}}" for color in COLORS]
    write_table("photos", 24, caption=captions, url="{i}")
    roles = ["--map", "image=file", "--map", "answer=caption"]
    printed = cli("init", "photos", *roles, "--yes")
    for words in (
        "task    captions (cider_d)\nexample <image> Describe the image. -> a plain ",
        "        24 images\n        unused columns: url\n",
        "24 rows, read as table (--map)\n        comma-separated, UTF-8\n",
        "check   24 images, 24 unique; no issues found\nrun     100 steps of 8 samples: ",
    ):
        assert words in printed.out
    assert len(printed.lines) < 20
    train, chat = "train photos-finetune/recipe.yaml", "chat photos-finetune/run"
    assert printed.next_steps == f"finesight {train}\n  finesight {chat}"
    content = Path("photos-finetune/recipe.yaml").read_text()
    assert content.count("#") >= 5
    recipe = yaml.safe_load(content)
    assert (recipe["model"], recipe["eval"]["metric"]) == (TINY_MODEL, "captions")
    assert "steps: 100  # 42.1 epochs; at least 100 steps\n" in content
    short = ["train.steps=2", "train.epochs=null", "eval.limit=2", "eval.max_new_tokens=4"]
    printed = cli("train", "photos-finetune/recipe.yaml", *short)
    # The complete command, with an image and the prompt of the training.
    command = shlex.split(printed.next_steps.splitlines()[0])[1:]
    image = command[2]
    assert re.fullmatch(r"photos/images/\d+\.png", image)
    assert command[3:] == ["--prompt", "Describe the image."]
    assert f"{image}: " in cli(*command).out
    error = cli("predict", "photos-finetune", image, "--prompt", "x", code=2).err
    assert "did you mean photos-finetune/run?" in error
    with monkeypatch.context() as patch:
        patch.chdir("photos-finetune")
        error = cli("train", "recipe.yaml", "train.epochs=1", code=2).err
    assert "run the command in the parent folder (cd ..)" in error
    files = {path: path.read_bytes() for path in Path("photos-finetune").rglob("*.*")}
    error = cli("init", "photos", *roles, "--yes", code=2).err
    assert "photos-finetune: exists already and is never overwritten" in error
    assert {path: path.read_bytes() for path in Path("photos-finetune").rglob("*.*")} == files


def test_unlabeled_images_are_labeled_before_the_training(cli):
    draw_dots(Path("photos"), 20)
    remedy = "label them: finesight label MODEL photos --prompt TEXT"
    assert remedy in cli("init", "photos", "--yes", code=2).err
    labels, split = Path("labels/labels.jsonl"), "--out labels --train-fraction 0.8"
    assert str(suggest_similar_path(labels)) == (
        f"label images first: finesight label MODEL IMAGES --prompt TEXT {split}"
    )
    labels.parent.mkdir()
    labels.touch()
    assert str(suggest_similar_path(labels.with_name("labels_eval.jsonl"))) == (
        f"label at least 2 images, some for validation: finesight label MODEL IMAGES {split}"
    )


@pytest.mark.usefixtures("no_plan")
@pytest.mark.parametrize(("columns", "metric", "prompt"), CASES["test_task_of_a_table_is_detected"])
def test_task_of_a_table_is_detected(tmp_path, columns, metric, prompt, run_init):
    chosen = ["--task", metric] if len(columns.keys() - {"id"}) > 1 and metric == "json" else []
    found = run_init(write_table(f"{tmp_path}", 24, **columns), "--out", tmp_path / "out", *chosen)
    assert (found["metric"], found["prompt"]) == (metric, prompt)
    assert found["columns"]["image"] == "file"
    assert sum(found["samples"].values()) == 24
    assert (found["samples"]["eval"], found["fits"]) == (5, None)


@pytest.mark.usefixtures("no_plan")
@pytest.mark.parametrize("columns", CASES["test_texts_without_a_question_need_a_task"])
def test_texts_without_a_question_need_a_task(columns, cli, run_init):
    table = write_table("data", 24, **columns)
    error = cli("init", table, "--yes", "--out", "out", code=2).err
    assert "texts without a question, whose task is not certain: " in error
    assert not Path("out").exists()
    for task, prompt in (("ocr", "Read the text."), ("captions", "Describe the image.")):
        assert f"--task {task}" in error
        assert f'--prompt "{prompt}"' in error
        found = run_init(table, "--out", task, "--task", task)
        assert (found["metric"], found["prompt"]) == (task, prompt)
    found = run_init(table, "--out", "asked", "--task", "ocr", "--prompt", "Read it.")
    assert (found["metric"], found["prompt"]) == ("ocr", "Read it.")


@pytest.mark.usefixtures("no_plan")
@pytest.mark.parametrize(("columns", "fields", "question"), CASES["fields"])
def test_task_of_fields_reads_all_columns_of_text(columns, fields, question, run_init):
    table = write_table("data", 12, **columns)
    found = run_init(table, "--task", "json", "--out", "out")
    assert found["columns"].get("fields") == fields
    assert found["columns"].get("question") == question
    sample = read_samples(Path("out/data/data.jsonl"))[0]
    answer = json.loads(sample.messages[-1].content[0].text)
    assert list(answer) == fields.split(",")


@pytest.mark.usefixtures("no_plan")
@pytest.mark.parametrize(
    ("question", "answer", "other"), CASES["test_question_and_answer_are_known_by_name"]
)
def test_question_and_answer_are_known_by_name(question, answer, other, run_init):
    names = filter(None, [answer, other, *question.split(",")])
    table = write_table("data", 20, **{name: f"{name} {{i}}" for name in names})
    found = run_init(table.parent, "--out", "out")
    assert found["columns"] == {"image": "file", "question": question, "answer": answer}
    assert found["prompt"] is None
    sample = read_samples(Path("out/data/eval.jsonl"))[0]
    asked, answered = (message.content[-1].text for message in sample.messages)
    assert [line.split()[0] for line in asked.split("\n")] == question.split(",")
    assert answered.split()[0] == answer


@pytest.mark.usefixtures("no_plan")
@pytest.mark.parametrize(
    ("question", "answer", "other"), CASES["test_columns_without_a_role_are_named"]
)
def test_columns_without_a_role_are_named(question, answer, other, run_init, cli):
    names = [answer, other, *question.split(",")]
    table = write_table("data", 20, **{name: f"{name} {{i}}" for name in names})
    error = cli("init", table.parent, *YES, code=2).err
    assert f"1 column without a known role: {other} ('{other} 0')" in error
    assert not Path("out").exists()
    options = shlex.split(error.partition("give ")[2].partition(";")[0])
    found = run_init(table.parent, "--out", "out", *options)
    assert found["columns"] == {"image": "file", "question": question, "answer": answer}


@pytest.mark.usefixtures("no_plan")
@pytest.mark.parametrize(
    ("row", "remedy", "fixed"), CASES["test_unrecognized_images_are_no_text_task"]
)
def test_unrecognized_images_are_no_text_task(row, remedy, fixed, cli):
    def write(row: dict[str, Any]) -> None:
        rows = [json.dumps(row).replace("{}", str(i)) for i in range(12)]
        Path("rows.jsonl").write_text("\n".join(rows))

    for i in range(12):
        write_image(Path(f"{i}.png"), i)
    write(row)
    assert remedy in cli("init", "rows.jsonl", *YES, code=2).err
    write(fixed or row)
    options = [] if fixed else remedy.split()[1:]
    assert "<image> q 0" in cli("init", "rows.jsonl", *YES, *options).out


BOXES, LABELS = [(5, 6, 20, 16), (8, 20, 50, 27)], ["ball", "cube"]
IMAGE_ROWS, OBJECT_ROWS = CASES["box_layouts"]["images"], CASES["box_layouts"]["objects"]


@pytest.mark.usefixtures("no_plan")
@pytest.mark.parametrize("metadata", ["rows.jsonl", "metadata.jsonl"])
@pytest.mark.parametrize("layout", [*range(len(IMAGE_ROWS)), *OBJECT_ROWS])
def test_boxes_of_an_image_are_one_sample(tmp_path, layout, metadata, run_init):
    source, out = tmp_path / "set", tmp_path / "out"
    rows = []
    for i in range(12):
        write_image(source / f"{i}.png", 0)
        Image.new("RGB", (56, 40), (i, 0, 0)).save(source / f"{i}.png")
        image = {"file_name": f"{i}.png"}
        if layout != "cx,cy,width,height":
            image |= {"width": 56, "height": 40}
        if isinstance(layout, int):
            rows.append(image | IMAGE_ROWS[layout])
            continue
        for values, label in zip(OBJECT_ROWS[layout], LABELS, strict=True):
            named = values if "," not in layout else zip(layout.split(","), values, strict=True)
            rows.append(image | {"class": label} | dict(named))
    write_jsonl(source / metadata, rows)
    found = run_init(source, "--out", out)
    assert (found["samples"], found["metric"]) == ({"data": 12}, "detection")
    assert found["prompt"] == "Locate every object of these classes in the image: ball, cube."
    for sample in read_samples(out / "data" / "data.jsonl"):
        parts = sample.messages[1].content
        assert [tuple(map(round, part.xyxy)) for part in parts] == BOXES
        assert [part.label for part in parts] == LABELS


@pytest.mark.usefixtures("no_plan")
def test_split_of_the_source_is_kept(run_init):
    for i in range(24):
        split = "val" if i < 4 else "train"
        write_image(Path("user@home", "photos", split, COLORS[i % 2], f"{i}.png"), i)
    found = run_init("user@home/photos")
    assert found["samples"] == {"train": 20, "eval": 4}
    assert found["recipe"] == "photos-finetune/recipe.yaml"


@pytest.mark.usefixtures("no_plan")
@pytest.mark.parametrize(
    ("num_pairs", "label", "objective"),
    [(24, {}, "dpo"), (23, {}, "sft"), (23, {"label": False}, "kto"), (0, {"label": True}, "kto")],
)
def test_preferences_select_the_objective(cli, num_pairs, label, objective):
    rows = []
    for i in range(24):
        write_image(Path(f"{i}.png"), i)
        row = {"prompt": "<image>Which number?", "images": [f"{i}.png"], "completion": f"No {i}."}
        if i < num_pairs:
            row |= {"chosen": row.pop("completion"), "rejected": f"No {i + 1}."}
        rows.append(row if i < num_pairs else row | label)
    Path("pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    printed = cli("init", "pairs.jsonl", *YES)
    assert (f"{num_pairs} preference pairs: an answer, and a rejected one" in printed.out) == (
        num_pairs > 0
    )
    recipe = yaml.safe_load(Path("out/recipe.yaml").read_text())
    train = recipe["train"]
    # Answers with the label false are not references.
    assert "eval" in recipe["data"]
    assert ("eval" in recipe) == (objective != "kto")
    assert train.get("objective") == objective
    assert train["learning_rate"] in ((1e-4, 2e-3) if objective == "sft" else (5e-6, 5e-4))


@pytest.mark.usefixtures("no_plan")
def test_all_classes_are_listed(monkeypatch, run_init):
    monkeypatch.setattr(import_source, "NUM_PREVIEW_ROWS", 10)
    table = write_table("data", 24, label=["a"] * 12 + ["b"] * 11 + ["c"])
    found = run_init(table, "--out", "out")
    assert found["metric"] == "classification"
    assert "image show: a, b, c?" in found["prompt"]


@pytest.mark.usefixtures("no_plan")
def test_numbers_of_class_folders_are_no_texts(run_init):
    for number in range(24):
        folder = Path("signs", f"{number % 12}")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, 0, 0)).save(folder / f"{number}.png")
    assert run_init("signs", "--out", "out")["metric"] == "classification"


@pytest.mark.usefixtures("no_plan")
def test_table_without_a_header_keeps_its_first_row(tmp_path, run_init):
    table = tmp_path / "pairs.csv"
    table.write_text("".join(f"Is {i} even?,{i % 2 == 0}\n" for i in range(6)))
    words = [table, "--yes", "--no-header", "--map", "question=1", "--map", "answer=2"]
    assert run_init(*words, "--out", tmp_path / "out")["samples"] == {"data": 6}


@pytest.mark.usefixtures("no_plan")
@pytest.mark.parametrize("source", ["labels.csv", "."])
def test_bare_names_are_found_in_the_only_matching_subfolder(tmp_path, source, cli):
    table = write_table(".", 3, caption="number {i}")
    table.write_text(table.read_text().replace("images/", ""))
    Path("empty").mkdir()
    printed = cli("init", source, "--task", "captions", *YES).out
    assert "3 rows, read as table (columns; images found in images/)" in printed
    sample = read_samples(Path("out/data/data.jsonl"))[0]
    assert sample.messages[0].content[0].image == "../../images/0.png"
    # A second folder with the same files is ambiguous, and nothing is left of a failed command.
    Path("images").rename("a")
    shutil.copytree("a", "b")
    words = ("--yes", "--out", "second", "--task", "captions")
    error = cli("init", "labels.csv", *words, code=2).err
    assert "0.png: no such image" in error
    assert error.count(str(tmp_path.resolve())) == 1
    assert not Path("second").exists()


@pytest.mark.parametrize(
    ("memory_gb", "model"),
    [(0, TINY_MODEL), (4, TINY_MODEL), (12, "Qwen/Qwen3.5-2B"), (24, "Qwen/Qwen3.5-4B")],
)
def test_model_is_chosen_by_gpu_memory(memory_gb, model):
    assert init.choose_model(round(memory_gb * 1e9)) == model


@pytest.mark.usefixtures("no_plan")
def test_questions_change_the_settings(monkeypatch):
    monkeypatch.setattr(init, "find_device", lambda: ("RTX 4090", round(24e9)))
    write_table(".", 10, caption="text {i}", shop="{i}")
    answers = ("labels.csv", "caption,shop", "poems", "json", "Read it.", "")
    output = answer_questions(monkeypatch, *answers)
    assert "unknown task 'poems'" in output
    assert "finesight train" not in output
    assert "the run was not planned" in output
    recipe = yaml.safe_load(Path("labels-finetune/recipe.yaml").read_text())
    assert (recipe["model"], recipe["tune"]["language"]) == ("Qwen/Qwen3.5-4B", "lora")
    assert recipe["image"]["max_pixels"] > 0
    assert "eval" not in recipe  # too few rows for a validation split
    question, answer = read_samples(Path("labels-finetune/data/data.jsonl"))[3].messages
    assert question.content[1].text == "Read it."
    assert json.loads(answer.content[0].text) == {"caption": "text 3", "shop": "3"}


@pytest.mark.usefixtures("no_plan")
def test_other_answer_asks_about_the_column_that_it_replaces(monkeypatch):
    write_table(".", 10, text="text {i}", label="{i}", shop="S")
    answers = ("labels.csv", "label", "yes", "classification", "Which?", TINY_MODEL)
    output = answer_questions(monkeypatch, *answers)
    assert "left out: label ('0'), shop ('S')" in output
    assert "also left out: text ('text 0')" in output


def test_several_gpus_are_planned_and_launched(monkeypatch, run_init, cli):
    """The recipe has the settings of these GPUs, and the next step starts as many."""
    planned, real = list[int | None](), run_plan.plan_run

    def plan_named(settings: Any, gpu: None, console: Any, gpus: int | None) -> Any:
        planned.append(gpus)
        return real(settings, "RTX 4090", console, gpus or 4)

    monkeypatch.setattr(init, "find_device", lambda: ("RTX 4090", round(24e9)))
    monkeypatch.setattr(run_plan, "plan_run", plan_named)
    table = write_table("photos", 12, caption="a photo of house {i} here")
    words = [table, "--model", TINY_MODEL, "--yes"]
    steps = run_init(*words, "--out", "two", "--gpus", "2")["next"]
    assert steps[0] == "finesight launch two/recipe.yaml --gpus-per-node 2"
    # Without the option, all GPUs of the machine.
    assert "--gpus-per-node 4" in run_init(*words, "--out", "four")["next"][0]
    printed = cli("init", *words, "--out", "one", "--gpus", "1")
    assert "finesight train one/recipe.yaml" in printed.next_steps
    assert planned == [2, None, 1]
    assert "on each of 2 GPUs" in cli("init", *words, "--out", "third", "--gpus", "2").out


def test_gpus_without_a_gpu_are_refused_before_files_are_written(cli, monkeypatch):
    monkeypatch.setattr(init, "find_device", lambda: ("CPU", 0))
    table = write_table("photos", 4, caption="a photo of house {i} here")
    error = cli("init", table, *YES, "--gpus", "2", code=2).err
    assert "--gpus: 2 GPUs, but this machine has no GPU" in error
    assert not Path("out").exists()


@pytest.mark.usefixtures("no_plan")
def test_python_function_asks_only_through_a_callable():
    table, asked = write_table("photos", 4, caption="a photo of house {i} here"), {}
    recipe = api.init(table, ask=lambda question, default: asked.setdefault(question, default))
    assert recipe == Path("labels-finetune/recipe.yaml")
    assert [*asked.values()] == ["caption", "captions", "Describe the image.", TINY_MODEL]
    assert "detection" in [*asked][1]
    assert api.init(table, out="out") == Path("out/recipe.yaml")


@pytest.mark.usefixtures("no_plan")
def test_option_sets_the_task(run_init, cli):
    table = write_table("table", 3, caption="a photo of house {i}")
    found = run_init(table, "--task", "qa", "--out", "table-qa")
    assert (found["metric"], found["prompt"]) == ("qa", "Answer the question.")
    found = run_init(table, "--task", "classification", "--out", "table-classes")
    assert "image show: a photo of house 0, a photo of house 1, " in found["prompt"]
    # Answers that are no JSON cannot be evaluated as JSON.
    cli("init", table, "--task", "json", *YES, code=2)
    cli("init", table, "--task", "poems", *YES, code=2)
    assert not Path("out").exists()


@pytest.mark.usefixtures("no_plan")
def test_rows_without_images_are_mentioned(cli):
    table = write_table("data", 24, label=["a", "b"])
    for i in range(5):
        Path(f"data/images/{i}.png").unlink()
    printed = cli("init", table, *YES, "--json")
    assert printed.json["skipped_rows"] == {"an image is missing or corrupt": 5}
    assert "warning: 5 of 24 rows have no readable image and were skipped" in printed.err


@pytest.mark.usefixtures("no_plan")
def test_images_in_another_folder_are_no_text_task(cli):
    write_table("data", 6, label="a")
    turns = [{"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": "one"}]
    rows = [{"image": f"images/{n}.png", "conversations": turns} for n in range(6)]
    questions = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    write_jsonl(Path("rows.jsonl"), [*rows, *[{"conversations": questions}] * 7])
    printed = cli("init", "rows.jsonl", *YES, code=2)
    assert "6 of 13 rows are invalid" in printed.err
    assert "change to the folder data, in which the paths start" in printed.err
    assert not Path("out").exists()


@pytest.mark.usefixtures("no_plan")
@pytest.mark.parametrize(
    ("column", "file", "vision"),
    [("clip", "clip.mp4", "lora"), ("photo", "a.png", "lora"), ("note", "a dog", "frozen")],
)
def test_vision_of_the_bundled_model_is_trained_on_media(column, file, vision, cli):
    pytest.importorskip("video_fixtures").write_video(Path("clip.mp4"))
    Image.new("RGB", (32, 32)).save("a.png")
    write_jsonl(Path("rows.jsonl"), [{column: file, "question": "Which?", "answer": "one"}])
    roles = ["answer=answer", "question=question"]
    if vision == "lora":
        roles.append(f"image={column}")
    options = [word for role in roles for word in ("--map", role)]
    printed = cli("init", "rows.jsonl", *YES, "--model", TINY_MODEL, *options).out
    assert ("a task of text only" in printed) == (vision == "frozen")
    tune = yaml.safe_load(Path("out/recipe.yaml").read_text())["tune"]
    assert (tune["vision"], tune["merger"]) == (vision, vision)


@pytest.mark.parametrize("line_break", ["\n", "\r", "\x85", "\u2028", "\u2029"])
@pytest.mark.parametrize("tune", [TuneSettings(language="lora"), None])
def test_names_with_line_breaks_are_no_settings(line_break, tune):
    """The names of folders are in values and comments of the recipe."""
    name = f"a{line_break}rewards: [exact]{line_break}#"
    start = StartModel(name, tune=tune, has_image_rule=True)
    task = DetectedTask("ocr", None, max_new_tokens=8)
    recipe = Path(name, "recipe.yaml")
    files = {Path(name, "train.jsonl"): "8 samples"}
    text = format_recipe(recipe, Path(name, "run"), start, "a test", task, files, 8)
    settings = yaml.safe_load(text)
    assert settings.keys() == {"model", "data", "tune", "train", "output_dir"}
    assert settings["model"] == name
    assert settings["data"]["train"] == f"{name}/train.jsonl"


@pytest.mark.usefixtures("no_plan")
@pytest.mark.parametrize("num_images", [1, 2, 3])
def test_rows_of_few_images_have_no_validation_samples(cli, num_images):
    """No split separates the images, so all rows are for training."""
    rows = [f"images/{i % num_images}.png,answer {i}" for i in range(24)]
    table = write_table("data", num_images, text="a")
    table.write_text("\n".join(["file,text", *rows]))
    printed = cli("init", table, "--task", "ocr", *YES, "--json")
    assert printed.json["samples"] == {"data": 24}
    assert "no validation samples: 24 rows in" in printed.err
    assert "eval" not in yaml.safe_load(Path("out/recipe.yaml").read_text())["data"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("title,id\nx,1\ny,2\n", "--map image=COLUMN"),
        ("image,question\na.png,What?\n", "no answer column among image, question"),
        ("", "no such file"),
    ],
    ids=["no-image-column", "no-answer-column", "missing"],
)
def test_unsuitable_data_are_rejected_without_files(content, words, cli):
    if content:
        Path("table.csv").write_text(content)
    assert words in cli("init", "table.csv", *YES, code=2).err
    table = write_table("data", 3, text="a line of words {i}")
    assert "./missing" in cli("init", table, *YES, "--model", "./missing", code=2).err
    assert not Path("out").exists()
    # Images without labels lead to labelling.
    error = cli("import", "data/images", "imported", code=2).err
    assert "  expected: images with labels\n" in error
    assert "or label them: finesight label MODEL data/images --prompt TEXT" in error


@pytest.mark.usefixtures("no_plan")
def test_unknown_columns_of_coordinates_are_no_classes(cli):
    corners = {name: [f"{3 + 5 * n + i}" for i in range(4)] for n, name in enumerate("pqrs")}
    table = write_table("data", 8, **corners, label=["a", "b"])
    remedy = "--map image=file --map box=p,q,r,s"
    assert f"give {remedy}, or" in cli("init", table, *YES, code=2).err
    cli("init", table, *YES, *remedy.split())
