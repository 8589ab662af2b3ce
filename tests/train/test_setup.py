"""What a run starts from, and what it refuses before anything is written."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_model import create_tiny_model
from tiny_task import TinyTask

from finesight.config import ImageRule, LongestSide, PixelRange
from finesight.errors import UserError
from finesight.infer.model_loader import load_inference_model
from finesight.manifest import Manifest
from finesight.model_folder import TINY_MODEL, locate_model
from finesight.recipe import load_recipe, recipe_from_dict
from finesight.train.oom import translate_oom_errors
from finesight.train.setup import BaseModelRef
from finesight.train.training_run import train

PIXEL_RANGE = PixelRange(min_pixels=1568, max_pixels=7056)
LONGEST_SIDE = LongestSide(longest_side=56)


def test_training_continues_from_run_and_adapter(task: TinyTask) -> None:
    lora = {"language": "lora", "lora": {"rank": 2, "dropout": 0.0}}
    first = task.run(tune=lora, name="first")
    checkpoint = str(task.folder / "first" / "checkpoints" / "step-6")
    for number, start in enumerate(
        (
            {"model": str(task.folder / "first")},
            {"adapter": str(task.folder / "first")},
            {"adapter": str(task.folder / "first" / "adapter")},
            {"model": checkpoint},
            {"adapter": checkpoint},
        )
    ):
        result = task.run(tune=lora, name=f"second{number}", **start)
        assert result.before.validation_loss == pytest.approx(first.after.validation_loss, rel=1e-6)
    with pytest.raises(UserError, match="rank 2"):
        task.run(tune={"language": "lora"}, name="third", adapter=str(task.folder / "first"))
    assert not (task.folder / "third").exists()
    for path in (str(task.folder / "tiny"), "a" * 5000):
        with pytest.raises(UserError, match=r"no adapter_config\.json"):
            task.run(name="fourth", adapter=path)
    with pytest.raises(UserError, match=r"already has an adapter[\s\S]*remove adapter"):
        task.run(
            tune=lora, name="fifth", model=str(task.folder / "first"), adapter=str(task.folder)
        )


@pytest.mark.parametrize("source", ["run", "run/checkpoints/step-1"])
def test_fully_trained_run_is_no_adapter(task: TinyTask, source: str) -> None:
    task.run("train.steps=1", "train.epochs=null", tune={"merger": "full"})
    with pytest.raises(UserError, match="has fully trained parts") as caught:
        task.run(tune={"language": "lora"}, name="second", adapter=str(task.folder / source))
    assert caught.value.where == "adapter"
    assert f"set model: {task.folder / 'run'} after" in caught.value.remedy


@pytest.mark.parametrize(
    ("tune", "start"),
    [
        ({"language": "lora", "lora": {"rank": 2}}, "adapter={0}/checkpoints/step-6"),
        ({"merger": "full"}, "model={0}"),
        ({"merger": "full", "language": "lora"}, "model={0}"),
    ],
)
def test_resuming_with_a_new_schedule_names_the_commands(
    task: TinyTask, tune: dict[str, object], start: str
) -> None:
    first, run = task.run(tune=tune), task.folder / "run"
    (run / "result.json").unlink()
    changes = "train.epochs=null", "train.steps=3", "train.learning_rate=0.001"
    with pytest.raises(UserError, match=r"train\.steps is 3 now") as caught:
        task.run(*changes, tune=tune, resume=True)
    resume, separator, further = caught.value.remedy.partition("; ")
    assert separator
    assert resume.endswith(f": finesight train {run} --resume")
    assert train(load_recipe(run / "recipe.yaml"), resume=True) == first
    words = shlex.split(further.partition(": ")[2])
    assert "train.learning_rate=0.001" in words
    assert words[-2:] == [start.format(run), f"output_dir={run}-2"]
    second = train(load_recipe(Path(words[2]), words[3:]))
    assert second.steps == 3
    assert second.before.validation_loss == pytest.approx(first.after.validation_loss, rel=1e-6)
    # The message about a finished run names the same setting.
    task.run("train.steps=3", "train.epochs=null", tune=tune, resume=True)
    setting = start.partition("=")[0]
    assert f"run/recipe.yaml {setting}={run} output_dir=" in task.console_output.replace("\n", " ")


def test_continued_run_is_continued_by_the_same_setting(task: TinyTask) -> None:
    lora = {"language": "lora", "lora": {"rank": 2}}
    task.run(tune=lora, name="first")
    for setting in ("model", "adapter"):
        start = {setting: str(task.folder / "first")}
        task.run("train.steps=1", "train.epochs=null", tune=lora, name=setting, **start)
        task.run(tune=lora, name=setting, resume=True, **start)
        run = task.folder / setting
        words = task.console_output.replace("\n", " ").partition("finesight train ")[2].split()
        assert words == [f"{run}/recipe.yaml", f"{setting}={run}", f"output_dir={run}-2"]
        result = train(load_recipe(Path(words[0]), words[1:]))
        assert result.steps == 1


@pytest.mark.parametrize(
    ("setting", "source"),
    [("model", "one"), ("adapter", "one"), ("adapter", "one/checkpoints/step-6")],
)
def test_continued_run_keeps_image_size_and_prompt(
    task: TinyTask, setting: str, source: str
) -> None:
    lora = {"language": "lora", "lora": {"rank": 2}}
    task.run(
        "data.system_prompt=Name colours.", "image={height: 56, width: 28}", tune=lora, name="one"
    )
    start = {setting: str(task.folder / source), "image": None}
    task.run(tune=lora, name="two", **start)
    task.run(
        "data.system_prompt=Speak.", "image={longest_side: 56}", tune=lora, name="three", **start
    )
    manifests = [
        json.loads((task.folder / name / "manifest.json").read_text())
        for name in ("one", "two", "three")
    ]
    assert manifests[1]["image_rule"] == manifests[0]["image_rule"] == {"height": 56, "width": 28}
    assert manifests[1]["system_prompt"] == manifests[0]["system_prompt"] == "Name colours."
    assert manifests[2]["image_rule"] == {"longest_side": 56}
    assert manifests[2]["system_prompt"] == "Speak."


@pytest.mark.parametrize(("rule", "min_pixels"), [(PIXEL_RANGE, 1568), (LONGEST_SIDE, 3136)])
def test_run_or_model_provides_missing_pixel_limit(rule: ImageRule, min_pixels: int) -> None:
    recipe = recipe_from_dict(
        {"model": TINY_MODEL, "data": {"train": "a.jsonl"}, "output_dir": "o"},
        ["image.max_pixels=5000"],
    )
    manifest = Manifest.model_construct(image_rule=rule, system_prompt=None)
    base_model = BaseModelRef(TINY_MODEL, locate_model(TINY_MODEL), None, manifest)
    expected = PixelRange(min_pixels=min_pixels, max_pixels=5000)
    assert base_model.build_renderer(recipe).image_rule == expected


@pytest.mark.parametrize("num_thoughts", [0, 5, 6])
def test_run_uses_thinking_mode_of_most_samples(task: TinyTask, num_thoughts: int) -> None:
    """Six of the eleven samples with reasoning select thinking mode; five do not."""
    data = task.folder / "train.jsonl"
    samples = [json.loads(line) for line in data.read_text().splitlines()]
    for sample in samples[:num_thoughts]:
        answer = sample["messages"][-1]
        answer["content"] = f"<think>\nIt is plain.\n</think>\n\n{answer['content']}"
    data.write_text("\n".join(map(json.dumps, samples)) + "\n")
    model = create_tiny_model(task.folder / "qwen3_5", "qwen3_5")
    task.recipe |= {"model": str(model), "tune": {"language": "lora", "lora": {"rank": 2}}}
    result = task.run(
        "train.steps=1", "train.epochs=null", eval={"metric": "qa", "max_new_tokens": 3}
    )
    is_thinking = num_thoughts == 6
    manifest = json.loads((task.folder / "run" / "manifest.json").read_text())
    assert manifest["enable_thinking"] is is_thinking
    assert (manifest["metric"], manifest["max_new_tokens"]) == ("qa", 3)
    assert manifest["prompts"] == ["Which colour?"]
    assert (
        load_inference_model(str(task.folder / "run"), "cpu").renderer.has_reasoning is is_thinking
    )
    lines = (task.folder / "run" / "predictions" / "before.jsonl").read_text().splitlines()
    assert all(("reasoning" in json.loads(line)) is is_thinking for line in lines)
    assert result.before is not None


def test_images_in_both_splits_are_reported(task: TinyTask) -> None:
    task.run()
    assert "are also in data.train" not in task.console_output
    task.run(f"data.eval={task.folder / 'train.jsonl'}", name="leaky")
    assert "11 images of data.eval also in data.train" in task.console_output


def test_resume_rejects_changed_settings_and_data(task: TinyTask) -> None:
    run = task.rewind_to_checkpoint()
    with pytest.raises(UserError) as caught:
        task.run("train.batch_size=5", "tune.lora.rank=4", "train.weight_decay=0.5", resume=True)
    assert "train.batch_size is 5 now" in caught.value.what
    assert "train.weight_decay=0.01" in caught.value.expected
    assert str(run / "checkpoints" / "step-4") in caught.value.where
    with (task.folder / "train.jsonl").open("a") as file:
        file.write((task.folder / "train.jsonl").read_text().splitlines()[0].replace("0", "1"))
    with pytest.raises(UserError, match=r"data\.train is"):
        task.run(resume=True)


def test_eval_without_data_is_rejected(task: TinyTask) -> None:
    data = {"train": task.recipe["data"]["train"]}
    with pytest.raises(UserError, match=r"data\.eval"):
        task.run(data=data, eval={"metric": "ocr"})
    assert task.run(data=data).before is None


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(1 << 60, dtype=torch.uint8),
        lambda: bytearray(1 << 62),
    ],
    ids=["tensor", "bytes"],
)
def test_host_out_of_memory_is_reported(allocate: Callable[[], object]) -> None:
    with pytest.raises(UserError, match="the CPU memory is full"), translate_oom_errors():
        allocate()


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="shapes"), translate_oom_errors():
        raise RuntimeError("shapes")
