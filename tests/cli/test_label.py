"""Tests of `finesight label`."""

import json
import os
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from case_files import load_cases
from image_fixtures import make_sample
from label_fixtures import draw_images

from finesight.app import server
from finesight.label.label_store import JOURNAL_FILE, LABELS_FILE, LabelStore
from finesight.operations.training import find_label_step
from finesight.samples.sample import TextPart, read_samples, write_samples
from finesight.settings.recipe import load_recipe

CASES = load_cases("label")

PROMPT = ("--prompt", "Describe the image.")
TINY = ("finesight-tiny", "--device", "cpu", "--max-new-tokens", "8")
FIRST_LABELS = "labels/labels.jsonl"
REVIEWED = "labels-review/labels.jsonl"


@pytest.fixture(autouse=True)
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the images photos/0.png to photos/2.png into the working directory."""
    monkeypatch.chdir(tmp_path)
    draw_images(tmp_path)


@pytest.fixture
def label(cli, monkeypatch) -> Callable[..., list[str]]:
    """Label with a page that ends at once and has written one label; return the messages."""
    monkeypatch.setattr(server, "serve_app", lambda *page: None)
    counts = {"open": 0, "accepted": 0, "corrected": 1, "skipped": 0}
    monkeypatch.setattr(LabelStore, "count_events", lambda store: counts)

    def run(*words: object) -> list[str]:
        return cli("label", *words, "--no-suggestions", "--port", "0").err.splitlines()

    return run


def write_data(name: str, *images: int, question: str = "Describe the image.") -> None:
    """Write labeled samples about images of the folder photos, and the journal of labels."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    if Path(name).name == LABELS_FILE:
        Path(name).with_name(JOURNAL_FILE).touch()
    folder, samples = os.path.relpath("photos", Path(name).parent), []
    for image in images:
        content = f"{folder}/{image}.png", question
        samples.append(make_sample(f"{name}/{image}", Path(), *content, answer="red").sample)
    write_samples(Path(name), samples)


def write_recipe(train: str, evaluation: str | None = None, run: str = "run") -> Path:
    """Write the recipe of a run."""
    Path(run).mkdir(parents=True, exist_ok=True)
    data = (
        f"{{train: {train}}}" if evaluation is None else f"{{train: {train}, eval: {evaluation}}}"
    )
    text = f"model: finesight-tiny\ndata: {data}\noutput_dir: {run}\n"
    Path(run, "recipe.yaml").write_text(text)
    return Path(run, "recipe.yaml")


def test_suggestions_are_printed_once_and_answered_on_the_page(cli):
    words = ("photos", *PROMPT, "--out", "labels")
    teachers = (("--teacher", "finesight-tiny"), ())
    printed = [cli("label", *TINY, *words, *one, "--suggest-only", "--json") for one in teachers]
    assert printed[0].out == printed[1].out
    items = printed[0].records
    confidences = [item["confidence"] for item in items]
    assert (len(items), confidences) == (3, sorted(confidences))
    command = [sys.executable, "-m", "finesight", "label", *TINY, *words, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as page:
        address = page.stdout.readline().strip()
        decision = {"id": items[0]["id"], "action": "save", "text": "a cat"}
        body, headers = json.dumps(decision).encode(), {"content-type": "application/json"}
        request = urllib.request.Request(f"{address}/decision", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["item"]["decision"] == "corrected"
        page.send_signal(signal.SIGINT)
        assert page.wait(60) == 0
    (sample,) = read_samples(Path("labels", LABELS_FILE))
    assert sample.messages[-1].content == (TextPart(text="a cat"),)


def test_next_command_keeps_the_earlier_training_data(label, monkeypatch):
    """`data.train` replaces the files of the recipe, so the command lists them again."""
    write_recipe("old.jsonl", run="first")
    words = ("first", "photos", *PROMPT)
    with monkeypatch.context() as patch:
        patch.setattr(LabelStore, "count_events", lambda store: {"open": 3, "skipped": 1})
        assert not any(line.startswith("next:") for line in label(*words))
    train = f'\'data.train=["old.jsonl", "{FIRST_LABELS}"]\' output_dir=first-2'
    assert label(*words)[-1] == f"next: finesight train first/recipe.yaml {train}"
    Path("first/recipe.yaml").write_text("model: [")
    assert label(*words)[-1] == f"next: finesight init {FIRST_LABELS}"


@pytest.mark.parametrize(
    ("train", "reviewed", "fraction", "expected"),
    CASES["test_command_after_a_review_trains_no_validation_samples"],
)
def test_command_after_a_review_trains_no_validation_samples(
    label, monkeypatch, train, reviewed, fraction, expected
):
    for name in ("a", "b", "eval"):
        write_data(f"{name}.jsonl", 0, 1, 2)
    write_recipe(train, "eval.jsonl")
    written = Path("labels-review/labels_eval.jsonl")
    if fraction:
        monkeypatch.setattr(server, "serve_app", lambda *page: written.touch())
    lines = label("run", *reviewed, "--review", *fraction)
    assert lines[-1] == f"next: finesight {expected}"


FILE_A = {"weight": 2.0, "limit": 5}


@pytest.mark.parametrize(
    ("source", "split", "expected"),
    [
        ("photos", "train", [{"path": "a.jsonl", **FILE_A}, "b.jsonl", FIRST_LABELS]),
        ("a.jsonl", "train", ["b.jsonl", {"path": REVIEWED, **FILE_A}]),
        ("eval.jsonl", "eval", [{"path": REVIEWED, "limit": 9}]),
    ],
)
def test_next_command_keeps_weight_and_limit_of_data_files(label, source, split, expected):
    for name in ("a", "eval"):
        write_data(f"{name}.jsonl", 0)
    train = "[{path: a.jsonl, weight: 2, limit: 5}, b.jsonl]"
    recipe = write_recipe(train, "{path: eval.jsonl, limit: 9}")
    options = PROMPT if source == "photos" else ("--review",)
    words = shlex.split(label("run", source, *options)[-1])
    override = next(word for word in words if word.startswith("data."))
    assert json.loads(override.removeprefix(f"data.{split}=")) == expected
    data = load_recipe(recipe, [override]).data
    assert {(file.weight, file.limit) for file in data.train} == {(2.0, 5), (1.0, None)}
    assert data.eval[0].limit == 9


def test_further_rounds_continue_the_labels_of_the_run(label):
    for out in ("mine", "labels"):
        label("finesight-tiny", "photos", *PROMPT, "--out", out)
    recipe = load_recipe(write_recipe("[old.jsonl, mine/labels.jsonl]"))
    words = ("run", "photos", *PROMPT)
    continuing = "continuing the labels in mine, training data of run"
    assert str(find_label_step(recipe)) == "finesight label run photos"
    assert continuing in label(*words)
    assert "0 open, 0 accepted, 1 corrected, 0 skipped: labels" in label(*words, "--out", "labels")
    # A folder of reviewed labels contains no new images.
    Path("mine/sources.json").unlink()
    assert find_label_step(recipe) is None
    assert continuing not in label(*words)


def test_next_command_imports_labels_again(label):
    """The data of the first import contains the earlier labels, some of them for validation."""
    imported, run = "labels-finetune/data/train.jsonl", "labels-finetune/run"
    write_data(FIRST_LABELS, 0, 1, question="Color?")
    for name in (imported, REVIEWED):
        write_data(name, 0, question="Color?")
    Path("labels-review/reviewed.json").write_text(json.dumps([imported]))
    for data, expected in (
        (imported, f"init {FIRST_LABELS} --out labels-finetune-2"),
        (REVIEWED, f"check {FIRST_LABELS}"),
    ):
        write_recipe(data, run=run)
        assert label(run, "photos/2.png")[-1] == f"next: finesight {expected}"


def test_reviews_have_a_folder_each(label):
    """The next command trains the reviewed training data, or keeps it for validation."""

    def run(*words: str, train: str = "a.jsonl", evaluation: str = "eval.jsonl") -> list[str]:
        write_recipe(train, evaluation)
        lines = label("run", *words)
        return [line for line in lines if line.startswith(("reviewed", "continuing", "next"))]

    for name in ("a.jsonl", "eval.jsonl", FIRST_LABELS):
        write_data(name, 0)
    second = "labels-review-2/labels.jsonl"
    train, again = "next: finesight train run/recipe.yaml", "output_dir=run-2"
    first_lines = [
        "reviewed labels: labels-review",
        f"{train} 'data.train=[\"{REVIEWED}\"]' {again}",
    ]
    assert run("a.jsonl", "--review") == first_lines
    assert run("eval.jsonl", "--review", train=REVIEWED) == [
        "reviewed labels: labels-review-2",
        f"{train} 'data.eval=[\"{second}\"]' {again}",
    ]
    assert run("./a.jsonl", "--review") == first_lines
    # After the training with the reviewed validation data.
    lines = ["reviewed labels: labels-review-2", f"{train} {again}"]
    assert run("eval.jsonl", "--review", evaluation=second) == lines
    # New labels beside their own reviewed copies: the review is continued.
    Path("labels/sources.json").write_text('["photos"]')
    trained = "[a.jsonl, labels-review-3/labels.jsonl]"
    lines = ["reviewed labels: labels-review-3", f"{train} {again}"]
    assert run(FIRST_LABELS, "--review", train=trained) == lines
    command = find_label_step(load_recipe(Path("run/recipe.yaml")))
    assert str(command) == "finesight label run photos"
    assert run("photos", train=trained) == [
        "continuing the labels in labels, training data of run",
        f"next: finesight label run {FIRST_LABELS} --out labels-review-3 --review",
    ]


@pytest.mark.parametrize(("options", "message"), CASES["test_invalid_options_are_rejected"])
def test_invalid_options_are_rejected(options, message, cli):
    assert message in cli("label", *TINY, "photos", *PROMPT, *options, code=2).err
