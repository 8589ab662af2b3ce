"""Each proposed step can be executed: the next steps of commands, and remedies of refusals."""

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hf_models import make_llava
from image_fixtures import make_noise_image
from tiny_model import TinyFamily, create_tiny_model
from tiny_task import TinyTask, make_task, write_recipe

from finesight.family_components import FAMILIES
from finesight.operations.model import load_adapters
from finesight.operations.training import train
from finesight.samples.example_question import read_example, read_public_example
from finesight.serve import api_server

TUNES: dict[str, dict[str, Any]] = {
    "lora": {"language": "lora", "lora": {"rank": 2}},
    "full": {"vision": "full", "merger": "full", "language": "full"},
    "frozen vision": {"merger": "full", "language": "lora", "lora": {"rank": 2}},
}


class Served(Exception):
    """Raised in place of a server that is about to listen."""


@pytest.fixture
def execute(cli: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Execute a proposed command, a server until it listens; return the steps it proposes."""

    def serve(*arguments: object, **options: object) -> None:
        raise Served

    monkeypatch.setattr(api_server, "run_api_server", serve)

    def run(command: str) -> list[str]:
        program, *words = shlex.split(command.partition("  # ")[0])
        assert program == "finesight"
        if words[0] == "serve":
            with pytest.raises(Served):
                cli(*words, "--port", "0")
            return []
        return read_steps(cli(*words).err)

    return run


def read_steps(text: str) -> list[str]:
    lines = text.partition("next:")[2].splitlines()
    return [line.strip() for line in lines if line.strip()]


def train_task(folder: Path, model: Path, tune: dict[str, Any], *overrides: str) -> Sequence[str]:
    """Train a task for one epoch, and return the proposed commands."""
    task = make_task(folder / "task")
    del task["image"]
    task |= {"model": str(model), "tune": tune, "output_dir": str(folder / "run")}
    task["train"] |= {"epochs": 1, "pack_tokens": 2000}
    recipe = write_recipe(folder / "recipe.yaml", task)
    return read_steps_of(recipe, *overrides)


def read_steps_of(recipe: Path, *overrides: str) -> list[str]:
    """Return the commands of the proposed steps, without their purposes."""
    return [str(replace(step, purpose="")) for step in train(recipe, overrides).next_steps]


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("family", ["qwen", "qwen2_vl", "qwen3_5"])
def test_steps_of_a_training_and_a_merge(family, tune, tmp_path, cli, execute):
    steps = train_task(tmp_path, create_tiny_model(tmp_path / "tiny", family), TUNES[tune])
    assert [step.split()[1] for step in steps] == ["predict", "serve"]
    for step in steps:
        execute(step)
    out = tmp_path / "merged"
    (step,) = read_steps(cli("merge", tmp_path / "run", out, "--num-samples", 1).err)
    execute(step)
    assert step.split()[1] == ("serve" if family == "qwen" else "export")


@pytest.mark.parametrize("tune", TUNES)
def test_transformers_backend(tune, tmp_path, cli, execute):
    """Neither the server nor the merge accepts such a model, but the chat page does."""
    model = make_llava(tmp_path / "llava")
    steps = train_task(tmp_path, model, TUNES[tune])
    assert [step.split()[1] for step in steps] == ["predict", "web"]
    execute(steps[0])
    run = tmp_path / "run"
    loaded = load_adapters(str(run), ())  # as the page does
    assert set(loaded.adapters.values()) == {None}
    for command, remedy in (
        (("serve", run), f"finesight web {run}"),
        (("export", run), f"finesight web {run}"),
        (("merge", run, tmp_path / "out"), "PeftModel"),
        (("export", run, tmp_path / "out", "--quantize", "w4a16"), "PeftModel"),
        (("plan", tmp_path / "recipe.yaml"), "train without a plan"),
        (("serve", run, "--adapter", run), "finesight web"),
    ):
        assert remedy in cli(*command, code=2).err
    assert "finesight merge" not in (run / "report.html").read_text()
    for words in (("show",), ("check",)):
        (step,) = read_steps(cli(*words, tmp_path / "recipe.yaml").err)
        assert step.split()[1] == "train"


def test_families_of_exports_are_those_that_exports_accept(tmp_path, cli):
    for family in get_args(TinyFamily):
        model = create_tiny_model(tmp_path / family, family)
        is_served = "serving" in FAMILIES[family].exports
        cli("export", model, code=0 if is_served else 2)
    assert "finesight serve" in cli("export", tmp_path / "qwen", code=2).err


def test_plan_of_a_finished_run_proposes_another_folder(tmp_path, cli, execute):
    task = TinyTask(tmp_path)
    task.run("train.epochs=1")
    (step,) = read_steps(cli("plan", tmp_path / "recipe.yaml").err)
    assert step.endswith(f"output_dir={tmp_path / 'run-2'}")
    execute(f"{step} train.steps=1")
    assert (tmp_path / "run-2" / "result.json").exists()


def write_text_samples(path: Path) -> Path:
    turns = [
        [{"role": "user", "content": f"What {n}?"}, {"role": "assistant", "content": f"This {n}"}]
        for n in range(12)
    ]
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    return path


def test_text_samples_are_planned_and_asked_without_image(tmp_path, cli, execute, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_text_samples(tmp_path / "text.jsonl")
    steps = read_steps(cli("init", data, "--yes").err)
    assert [step.split()[1] for step in steps] == ["train", "chat"]
    steps = execute(f"{steps[0]} train.steps=1")
    assert shlex.split(steps[0])[1:4] == ["predict", "text-finetune/run", "--prompt"]
    execute(steps[0])


def test_steps_avoid_existing_files(tmp_path, cli, execute, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_text_samples(tmp_path / "text.jsonl")
    (tmp_path / "text-finetune").mkdir()
    (step,) = read_steps(cli("check", data).err)
    assert step == f"finesight init {data} --out text-finetune-2"
    execute(f"{step} --yes")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[0]["images"] = ["missing.png"]
    rows[0]["messages"][0]["content"] = "<image>What?"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text-fixed").mkdir()
    (step,) = read_steps(cli("check", data, code=2).err)
    assert step == f"finesight check {data} --fix {tmp_path / 'text-fixed-2'}"


def test_pairs_are_proposed_if_there_are_any(tmp_path, cli, execute, monkeypatch):
    """A reward of 1 for every response leaves no worse answer."""
    monkeypatch.chdir(tmp_path)
    TinyTask(tmp_path).run()
    (tmp_path / "reward.py").write_text(
        "def best(case):\n    return 1.0\n\ndef worst(case):\n    return 0.0\n"
    )
    for name, expected in (("best", "init"), ("worst", "pairs")):
        options = ("--reward", f"{tmp_path / 'reward.py'}:{name}", "--best-of", 4)
        limits = ("--max-new-tokens", 64, "--trust-metric")
        out = tmp_path / name
        found = cli("sample", tmp_path / "run", tmp_path / "train.jsonl", out, *options, *limits)
        (step,) = read_steps(found.err)
        assert step.split()[1] == expected
        execute(f"{step} --yes" if expected == "init" else step)


def write_run(folder: Path, *questions: list[dict[str, str]]) -> Path:
    """Write a run without predictions, whose training samples have these questions."""
    lines = []
    for number, question in enumerate(questions):
        turns = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "red"},
        ]
        lines.append(json.dumps({"id": str(number), "messages": turns}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    data = {"train": [str(folder / "train.jsonl")]}
    recipe = {"model": "m", "output_dir": str(folder), "data": data}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder


def ask(text: str, *images: str) -> list[dict[str, str]]:
    parts = [{"type": "image", "image": image} for image in images]
    return [*parts, {"type": "text", "text": text}]


PLACEHOLDER = (("IMAGE",), "TEXT")


def test_example_of_a_run_without_validation_is_a_training_question(tmp_path: Path) -> None:
    task = TinyTask(tmp_path)
    del task.recipe["data"]["eval"]
    task.run("train.epochs=1")
    run = tmp_path / "run"
    assert read_example(run) == ((str(tmp_path / "train0.png"),), "Which colour?")
    (tmp_path / "train0.png").unlink()
    assert read_example(run).images == (str(tmp_path / "train1.png"),)
    (tmp_path / "train.jsonl").unlink()
    assert read_example(run).images == ("IMAGE",)


def test_example_is_a_command_that_can_be_typed(tmp_path: Path) -> None:
    """Questions with absent files, many images, boxes or long texts are left out."""
    make_noise_image(30, 20).save(tmp_path / "a.png")
    box = {"type": "box", "xyxy": [1, 2, 10, 8], "label": "cat"}
    unsuitable = [
        ask("What?", "missing.png"),
        ask("What?", "data:image/png;base64," + "A" * 10_000),
        ask("What?", *["a.png"] * 5000),
        ask("x" * 200_000, "a.png"),
        [*ask("What is in", "a.png"), box],
    ]
    for question in unsuitable:
        assert read_example(write_run(tmp_path, question)) == PLACEHOLDER
    run = write_run(tmp_path, *unsuitable, ask("Why?", "a.png", "a.png"))
    image = str(tmp_path / "a.png")
    assert read_example(run) == ((image, image), "Why?")
    assert read_public_example(run) == PLACEHOLDER, "reports have no training samples"
    run = write_run(tmp_path, *unsuitable * 10, ask("Why?", "a.png"))
    assert read_example(run) == PLACEHOLDER, "few samples are read"
