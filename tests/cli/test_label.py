"""Tests of `finesight label`."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from label_fixtures import draw_images
from typer.testing import CliRunner

from finesight.cli.app import app
from finesight.cli.label import find_label_command
from finesight.data.sample import ImagePart, Message, Sample, TextPart, read_samples, write_samples
from finesight.label.label_store import LABELS_FILE, LabelStore
from finesight.recipe import load_recipe
from finesight.train import console
from finesight.web import web_server

PROMPT = ("--prompt", "Describe the image.")


def run_label(*arguments: str | Path) -> tuple[int, str]:
    options = ["--max-new-tokens", "8", "--device", "cpu"]
    result = CliRunner().invoke(app, ["label", "finesight-tiny", *map(str, arguments), *options])
    return result.exit_code, result.stdout or str(result.exception)


def test_suggestions_are_printed_once_and_answered_on_the_page(tmp_path: Path) -> None:
    photos, out = draw_images(tmp_path), tmp_path / "labels"
    arguments = (photos, *PROMPT, "--out", out)
    printed = [run_label(*arguments, "--suggest-only", "--json")[1] for _ in range(2)]
    assert printed[0] == printed[1]
    items = [json.loads(line) for line in printed[0].splitlines()]
    confidences = [item["confidence"] for item in items]
    assert (len(items), confidences) == (3, sorted(confidences))
    command = [sys.executable, "-m", "finesight", "label", "finesight-tiny", *map(str, arguments)]
    with subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True) as page:
        address = page.stdout.readline().strip()
        decision = {"id": items[0]["id"], "action": "save", "text": "a cat"}
        body, headers = json.dumps(decision).encode(), {"content-type": "application/json"}
        request = urllib.request.Request(f"{address}/decision", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["item"]["decision"] == "corrected"
        page.send_signal(signal.SIGINT)
        assert page.wait(60) == 0
    (sample,) = read_samples(out / LABELS_FILE)
    assert sample.messages[-1].content == (TextPart(text="a cat"),)


def test_port_in_use_is_reported_before_the_suggestions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = draw_images(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, text = run_label(photos, *PROMPT, "--out", tmp_path / "labels", "--port", port)
    assert code != 0
    assert text.startswith(f"cannot listen on 127.0.0.1:{port} (")
    assert not (tmp_path / "labels").exists()


def test_next_command_keeps_the_earlier_training_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`data.train` replaces the files of the recipe, so the command lists them again."""
    monkeypatch.chdir(tmp_path)
    draw_images(tmp_path)
    Path("first").mkdir()
    recipe = "model: finesight-tiny\ndata: {train: old.jsonl}\noutput_dir: first\n"
    Path("first/recipe.yaml").write_text(recipe)
    monkeypatch.setattr(web_server, "serve_app", lambda *page: None)
    arguments = ["label", "first", "photos", *PROMPT, "--no-suggestions", "--port", "0"]
    assert "next:" not in CliRunner().invoke(app, arguments).stderr
    counts = {"open": 2, "accepted": 0, "corrected": 1, "skipped": 0}
    monkeypatch.setattr(LabelStore, "count_events", lambda store: counts)
    assert CliRunner().invoke(app, arguments).stderr.splitlines()[-1] == (
        "next: finesight train first/recipe.yaml"
        ' \'data.train=["old.jsonl", "labels/labels.jsonl"]\''
        " output_dir=first-2"
    )
    # With the recipe of `finesight init`, which names the labels.
    recipe = "model: finesight-tiny\ndata: {train: data/labels.jsonl}\noutput_dir: first\n"
    Path("recipe.yaml").write_text(recipe)
    Path("first-2").mkdir()
    last_line = CliRunner().invoke(app, [*arguments, "--out", "data"]).stderr.splitlines()[-1]
    assert last_line == "next: finesight train recipe.yaml output_dir=first-3"
    Path("recipe.yaml").write_text(recipe.replace("}", ", eval: data/labels_eval.jsonl}"))
    last_line = CliRunner().invoke(app, [*arguments, "--out", "data"]).stderr.splitlines()[-1]
    expected = "next: finesight label first photos --out data --train-fraction 0.8"
    assert last_line.replace(f"{tmp_path}/", "") == expected
    Path("first/recipe.yaml").write_text("model: [")
    last_line = CliRunner().invoke(app, arguments).stderr.splitlines()[-1]
    assert last_line == "next: finesight init labels/labels.jsonl"


@pytest.mark.parametrize(
    ("train", "reviewed", "fraction", "expected"),
    [
        # Training would use the validation samples, too.
        ("a.jsonl", ["a.jsonl", "eval.jsonl"], (), "check labels-review/labels.jsonl"),
        # The other files of the pattern would be missing.
        ("'[ab].jsonl'", ["a.jsonl"], (), "check labels-review/labels.jsonl"),
        (
            "a.jsonl",
            ["a.jsonl"],
            ("--train-fraction", "0.5"),
            "train first/recipe.yaml 'data.train=[\"labels-review/labels.jsonl\"]'"
            " data.eval=labels-review/labels_eval.jsonl output_dir=first-2",
        ),
    ],
)
def test_command_after_a_review_trains_no_validation_samples(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    train: str,
    reviewed: list[str],
    fraction: tuple[str, ...],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    draw_images(tmp_path, 1)
    question = (ImagePart(image="photos/0.png"), TextPart(text="Describe the image."))
    messages = (Message(role="user", content=question), Message(role="assistant", content="x"))
    for name in ("a", "b", "eval"):
        samples = [Sample(id=f"{name}{index}", messages=messages) for index in range(8)]
        write_samples(Path(f"{name}.jsonl"), samples)
    Path("first").mkdir()
    Path("first/recipe.yaml").write_text(
        f"model: finesight-tiny\ndata: {{train: {train}, eval: eval.jsonl}}\noutput_dir: first\n"
    )
    written = Path("labels-review/labels_eval.jsonl")
    monkeypatch.setattr(
        web_server, "serve_app", lambda *page: written.touch() if fraction else None
    )
    counts = {"open": 0, "accepted": 0, "corrected": 1, "skipped": 0}
    monkeypatch.setattr(LabelStore, "count_events", lambda store: counts)
    options = ["--review", *fraction, "--no-suggestions", "--port", "0"]
    result = CliRunner().invoke(app, ["label", "first", *reviewed, *options])
    assert result.stderr.splitlines()[-1] == f"next: finesight {expected}"


@pytest.mark.parametrize(
    ("source", "split", "expected"),
    [
        (
            "photos",
            "train",
            [{"path": "a.jsonl", "weight": 2.0, "limit": 5}, "b.jsonl", "labels/labels.jsonl"],
        ),
        (
            "a.jsonl",
            "train",
            ["b.jsonl", {"path": "labels-review/labels.jsonl", "weight": 2.0, "limit": 5}],
        ),
        ("eval.jsonl", "eval", [{"path": "labels-review/labels.jsonl", "limit": 9}]),
    ],
)
def test_next_command_keeps_weight_and_limit_of_data_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, split: str, expected: list[object]
) -> None:
    monkeypatch.chdir(tmp_path)
    draw_images(tmp_path, 1)
    question = (ImagePart(image="photos/0.png"), TextPart(text="Describe the image."))
    messages = (Message(role="user", content=question), Message(role="assistant", content="x"))
    for name in ("a", "eval"):
        write_samples(Path(f"{name}.jsonl"), [Sample(id=name, messages=messages)])
    Path("first").mkdir()
    train = "[{path: a.jsonl, weight: 2, limit: 5}, b.jsonl]"
    evaluation = "{path: eval.jsonl, limit: 9}"
    recipe = (
        f"model: finesight-tiny\ndata: {{train: {train}, eval: {evaluation}}}\noutput_dir: first\n"
    )
    Path("first/recipe.yaml").write_text(recipe)
    monkeypatch.setattr(web_server, "serve_app", lambda *page: None)
    counts = {"open": 0, "accepted": 0, "corrected": 1, "skipped": 0}
    monkeypatch.setattr(LabelStore, "count_events", lambda store: counts)
    options = PROMPT if source == "photos" else ("--review",)
    arguments = ["label", "first", source, *options, "--no-suggestions", "--port", "0"]
    words = shlex.split(CliRunner().invoke(app, arguments).stderr.splitlines()[-1])
    override = next(word for word in words if word.startswith("data."))
    assert json.loads(override.removeprefix(f"data.{split}=")) == expected
    data = load_recipe(Path("first/recipe.yaml"), [override]).data
    assert {(file.weight, file.limit) for file in data.train} == {(2.0, 5), (1.0, None)}
    assert data.eval[0].limit == 9


def test_further_rounds_continue_the_labels_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw_images(tmp_path, 1)
    monkeypatch.setattr(web_server, "serve_app", lambda *page: None)

    def run(run_or_model: str, *options: str) -> str:
        arguments = ["label", run_or_model, "photos", *PROMPT, "--no-suggestions", "--port", "0"]
        return CliRunner().invoke(app, [*arguments, *options]).stderr

    for out in ("mine", "labels"):
        run("finesight-tiny", "--out", out)
    Path("run").mkdir()
    text = "model: finesight-tiny\ndata: {train: [old.jsonl, mine/labels.jsonl]}\noutput_dir: run\n"
    Path("run/recipe.yaml").write_text(text)
    recipe = load_recipe(Path("run/recipe.yaml"))
    assert find_label_command(recipe) == ["finesight", "label", "run", "photos"]
    assert "continuing the labels in mine, training data of run" in run("run")
    assert run("run", "--out", "labels").endswith(
        "1 open, 0 written, 0 accepted, 0 corrected, 0 skipped: labels\n"
    )
    # A folder of reviewed labels contains no new images.
    Path("mine/sources.json").unlink()
    assert find_label_command(recipe) == []
    assert "continuing" not in run("run")


def test_review_ranks_existing_answers(tmp_path: Path) -> None:
    draw_images(tmp_path, 2)
    for index in range(2):
        question = (ImagePart(image=f"photos/{index}.png"), TextPart(text="Describe the image."))
        messages = (Message(role="user", content=question), Message(role="assistant", content="x"))
        write_samples(tmp_path / f"{index}.jsonl", [Sample(id=f"{index}", messages=messages)])
    files = [tmp_path / f"{index}.jsonl" for index in range(2)]
    code, text = run_label(*files, "--review", "--suggest-only", "--out", tmp_path / "labels")
    scores = [float(line.split()[0]) for line in text.splitlines()]
    assert (code, len(scores), scores) == (0, 2, sorted(scores, reverse=True))


def test_next_command_imports_labels_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data of the first import contains the earlier labels, some of them for validation."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(web_server, "serve_app", lambda *page: None)
    draw_images(tmp_path, 3)
    imported, reviewed = "labels-finetune/data/train", "labels-review/labels"
    for name, indices in (("labels/labels", (0, 1)), (imported, (0,)), (reviewed, (0,))):
        Path(name).parent.mkdir(parents=True)
        samples, path = [], os.path.relpath("photos", Path(name).parent)
        for index in indices:
            question = (ImagePart(image=f"{path}/{index}.png"), TextPart(text="Color?"))
            answer = Message(role="assistant", content="red")
            messages = (Message(role="user", content=question), answer)
            samples.append(Sample(id=f"photos/{index}.png", messages=messages))
        write_samples(Path(f"{name}.jsonl"), samples)
    run = Path("labels-finetune/run")
    run.mkdir()
    counts = {"open": 0, "accepted": 0, "corrected": 1, "skipped": 0}
    monkeypatch.setattr(LabelStore, "count_events", lambda store: counts)
    arguments = ["label", str(run), "photos/2.png", "--no-suggestions", "--port", "0"]
    Path("labels-review/reviewed.json").write_text(json.dumps([f"{imported}.jsonl"]))
    for data, expected in (
        (imported, "init labels/labels.jsonl --out labels-finetune-2"),
        (reviewed, "check labels/labels.jsonl"),
    ):
        (run / "recipe.yaml").write_text(
            f"model: finesight-tiny\ndata: {{train: {data}.jsonl}}\noutput_dir: {run}\n"
        )
        last_line = CliRunner().invoke(app, arguments).stderr.splitlines()[-1]
        assert last_line == f"next: finesight {expected}"


def test_progress_in_a_log_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = draw_images(tmp_path)
    (photos / "1.png").write_bytes(b"no image")
    monkeypatch.setattr(console, "LOG_INTERVAL_S", 0.0)
    arguments = [photos, *PROMPT, "--out", tmp_path / "labels", "--suggest-only", "--device", "cpu"]
    options = ["--max-new-tokens", "2", "--batch-size", "1"]
    result = CliRunner().invoke(app, ["label", "finesight-tiny", *map(str, arguments), *options])
    lines = [line for line in result.stderr.splitlines() if line.startswith("suggestions: ")]
    assert (lines[0], lines[-1]) == ("suggestions: 1/3", "suggestions: 3/3")


def test_reviews_have_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next command trains the reviewed training data, or keeps it for validation."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(web_server, "serve_app", lambda *page: None)
    counts = {"open": 0, "accepted": 0, "corrected": 1, "skipped": 0}
    monkeypatch.setattr(LabelStore, "count_events", lambda store: counts)
    draw_images(tmp_path, 1)
    question = (ImagePart(image="photos/0.png"), TextPart(text="Describe the image."))
    messages = (Message(role="user", content=question), Message(role="assistant", content="x"))

    def label(*arguments: str, train: str = "a.jsonl", evaluation: str = "eval.jsonl") -> list[str]:
        data = f"data: {{train: {train}, eval: {evaluation}}}"
        Path("run/recipe.yaml").write_text(f"model: finesight-tiny\n{data}\noutput_dir: run\n")
        arguments = ("label", "run", *arguments, "--no-suggestions", "--port", "0")
        lines = CliRunner().invoke(app, arguments).stderr.splitlines()
        return [line for line in lines if line.startswith(("reviewed", "continuing", "next"))]

    Path("run").mkdir()
    for name in ("a.jsonl", "eval.jsonl", "labels/labels.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        write_samples(Path(name), [Sample(id=name, messages=messages)])
    reviewed = {name: f"{name}/labels.jsonl" for name in ("labels-review", "labels-review-2")}
    train = "next: finesight train run/recipe.yaml"
    first = ["reviewed labels: labels-review"]
    first += [f"{train} 'data.train=[\"labels-review/labels.jsonl\"]' output_dir=run-2"]
    second = ["reviewed labels: labels-review-2"]
    second += [f"{train} 'data.eval=[\"labels-review-2/labels.jsonl\"]' output_dir=run-2"]
    assert label("a.jsonl", "--review") == first
    assert label("eval.jsonl", "--review", train=reviewed["labels-review"]) == second
    assert label("./a.jsonl", "--review") == first
    # After the training with the reviewed validation data.
    assert label("eval.jsonl", "--review", evaluation=reviewed["labels-review-2"]) == [
        "reviewed labels: labels-review-2",
        f"{train} output_dir=run-2",
    ]
    # New labels beside their own reviewed copies: the review is continued.
    Path("labels/sources.json").write_text('["photos"]')
    trained = {"train": "[a.jsonl, labels-review-3/labels.jsonl]"}
    assert label("labels/labels.jsonl", "--review", **trained) == [
        "reviewed labels: labels-review-3",
        f"{train} output_dir=run-2",
    ]
    assert find_label_command(load_recipe(Path("run/recipe.yaml"))) == [
        "finesight",
        "label",
        "run",
        "photos",
    ]
    assert label("photos", **trained) == [
        "continuing the labels in labels, training data of run",
        "next: finesight label run labels/labels.jsonl --review --out labels-review-3",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json"], "--json with --suggest-only"),
        (["--suggest-only", "--no-suggestions"], "one of the two options"),
        (["--kind", "other"], ""),
        (["--kind", "text", "--fields", "name"], "--fields with --kind fields"),
        (["--classes", "a,b", "--fields", "name"], "--fields with --kind fields"),
    ],
)
def test_invalid_options_are_rejected(tmp_path: Path, options: list[str], message: str) -> None:
    code, text = run_label(draw_images(tmp_path), *PROMPT, *options)
    assert code != 0
    assert message in text
