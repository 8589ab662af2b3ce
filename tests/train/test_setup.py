"""Setup of a run: its starting point, and settings that are rejected before anything is written."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_model import create_tiny_model
from tiny_task import edit_samples, make_task, write_recipe

from finesight.encode.batch import PackedBatch
from finesight.errors import UserError
from finesight.evaluate.eval_result import BestEval
from finesight.infer.model_loader import load_inference_model
from finesight.model_folder import TINY_MODEL, locate_model
from finesight.progress import ProgressConsole
from finesight.settings.config import LongestSide, PixelRange
from finesight.settings.manifest import Manifest
from finesight.settings.recipe import load_recipe, recipe_from_dict
from finesight.train.oom import MemoryBudget, max_unsplit_packs, translate_oom_errors
from finesight.train.recipe_check import check_recipe
from finesight.train.run_dir import RunDir
from finesight.train.setup import (
    build_data,
    build_device_loader,
    build_hardware,
    build_optimizer,
    build_progress,
    build_run,
    build_state,
    build_step_dataset,
    build_train_engine,
    load_base_model,
    load_latest_checkpoint,
    parallelize_model,
    select_device,
    start_device,
)
from finesight.train.state import BaseModelRef
from finesight.train.step import train_step
from finesight.train.training_run import train

LORA = {"language": "lora", "lora": {"rank": 2, "dropout": 0.0}}
ONE_STEP = ("train.steps=1", "train.epochs=null")


def test_training_continues_from_run_and_adapter(task):
    """Each source has the weights, the image size and the system prompt of the first run."""
    image_and_prompt = "image={height: 56, width: 28}", "data.system_prompt=Name colours."
    first = task.run(*image_and_prompt, tune=LORA, name="first")
    run = task.folder / "first"
    task.recipe |= {"image": None, "tune": LORA}
    checkpoint = run / "checkpoints" / "step-6"
    for setting, source in (
        *(("model", source) for source in (run, checkpoint)),
        *(("adapter", source) for source in (run, checkpoint, run / "adapter")),
    ):
        # An adapter folder has no manifest.
        settings = image_and_prompt if source.name == "adapter" else ()
        start, name = {setting: str(source)}, f"{setting}-{source.name}"
        result = task.run(*ONE_STEP, *settings, name=name, **start)
        loss = result.before.validation_loss
        assert loss == pytest.approx(first.after.validation_loss, rel=1e-6)
        manifest = json.loads((task.folder / name / "manifest.json").read_text())
        assert manifest["image_rule"] == {"height": 56, "width": 28}
        assert manifest["system_prompt"] == "Name colours."
    other = "image={longest_side: 56}", "data.system_prompt=Speak."
    task.run(*ONE_STEP, *other, name="other", adapter=str(run))
    manifest = json.loads((task.folder / "other" / "manifest.json").read_text())
    assert manifest["image_rule"] == {"longest_side": 56}
    assert manifest["system_prompt"] == "Speak."


def test_wrong_starting_points_are_rejected(task):
    task.run(*ONE_STEP, tune=LORA, name="first")
    task.run(*ONE_STEP, tune={"merger": "full"}, name="full")
    run, full = str(task.folder / "first"), task.folder / "full"
    other_rank = {"language": "lora", "lora": {"rank": 8}}
    for tune, start, words in (
        (other_rank, {"adapter": run}, "rank 2"),
        (LORA, {"adapter": str(task.folder / "tiny")}, r"no adapter_config\.json"),
        (LORA, {"adapter": "a" * 5000}, r"no adapter_config\.json"),
        (LORA, {"model": run, "adapter": run}, r"already has an adapter[\s\S]*remove adapter"),
        (LORA, {"adapter": str(full)}, "has fully trained parts"),
        (LORA, {"adapter": f"{full}/checkpoints/step-1"}, "has fully trained parts"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            task.run(tune=tune, name="second", **start)
        if "fully" in words:
            assert caught.value.where == "adapter"
            assert f"set model: {full} after" in caught.value.remedy
    assert not (task.folder / "second").exists()


@pytest.mark.parametrize(
    ("tune", "start"),
    [
        (LORA, "adapter={0}/checkpoints/step-6"),
        ({"merger": "full"}, "model={0}"),
        ({"merger": "full", "language": "lora"}, "model={0}"),
    ],
)
def test_resuming_with_a_new_schedule_names_the_commands(task, tune, start):
    first, run = task.run(tune=tune), task.folder / "run"
    (run / "result.json").unlink()
    changes = "train.epochs=null", "train.steps=3", "train.learning_rate=0.001"
    with pytest.raises(UserError, match=r"train\.steps is 3 now") as caught:
        task.run(*changes, tune=tune, resume=True)
    resume, separator, further = str(caught.value.remedy).partition("; ")
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


@pytest.mark.parametrize(
    ("rule", "min_pixels"),
    [(PixelRange(min_pixels=1568, max_pixels=7056), 1568), (LongestSide(longest_side=56), 3136)],
)
def test_run_or_model_provides_missing_pixel_limit(rule, min_pixels):
    recipe = recipe_from_dict(
        {"model": TINY_MODEL, "data": {"train": "a.jsonl"}, "output_dir": "o"},
        ["image.max_pixels=5000"],
    )
    manifest = Manifest.model_construct(image_rule=rule, system_prompt=None)
    base_model = BaseModelRef(TINY_MODEL, locate_model(TINY_MODEL), None, manifest)
    expected = PixelRange(min_pixels=min_pixels, max_pixels=5000)
    assert base_model.build_renderer(recipe).image_rule == expected


@pytest.mark.parametrize("num_thoughts", [0, 5, 6])
def test_run_uses_thinking_mode_of_most_samples(task, num_thoughts):
    """Six of the eleven samples with reasoning select thinking mode; five do not."""
    run = task.folder / "run"
    with edit_samples(task.folder / "train.jsonl") as samples:
        for sample in samples[:num_thoughts]:
            answer = sample["messages"][-1]
            answer["content"] = f"<think>\nIt is plain.\n</think>\n\n{answer['content']}"
    model = str(create_tiny_model(task.folder / "qwen3_5", "qwen3_5"))
    task.run(*ONE_STEP, model=model, tune=LORA, eval={"metric": "qa", "max_new_tokens": 3})
    is_thinking = num_thoughts == 6
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["enable_thinking"] is is_thinking
    assert (manifest["metric"], manifest["max_new_tokens"]) == ("qa", 3)
    assert manifest["prompts"] == ["<image>Which colour?"]
    assert load_inference_model(str(run), "cpu").renderer.has_reasoning is is_thinking
    lines = (run / "predictions" / "before.jsonl").read_text().splitlines()
    assert all(("reasoning" in json.loads(line)) is is_thinking for line in lines)


def test_images_in_both_splits_are_reported(task):
    task.run(*ONE_STEP)
    assert "are also in data.train" not in task.console_output
    task.run(*ONE_STEP, f"data.eval={task.folder / 'train.jsonl'}", name="leaky")
    assert "11 images of data.eval also in data.train" in task.console_output


def test_resume_rejects_changed_settings_and_data(task):
    run = task.rewind_to_checkpoint()
    with pytest.raises(UserError) as caught:
        task.run("train.batch_size=5", "tune.lora.rank=4", "train.weight_decay=0.5", resume=True)
    assert caught.value.what == "train.batch_size is 5 now; train.weight_decay is 0.5 now"
    assert caught.value.expected == "train.batch_size=4; train.weight_decay=0.01"
    assert str(run / "checkpoints" / "step-4") in caught.value.where
    with (task.folder / "train.jsonl").open("a") as file:
        file.write((task.folder / "train.jsonl").read_text().splitlines()[0].replace("0", "1"))
    with pytest.raises(UserError, match=r"data\.train is"):
        task.run(resume=True)


def test_eval_without_data_is_rejected(task):
    data = {"train": task.recipe["data"]["train"]}
    with pytest.raises(UserError, match=r"data\.eval"):
        task.run(data=data, eval={"metric": "ocr"})
    assert task.run(data=data).before is None


def test_host_out_of_memory_is_reported():
    for allocate in (lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: bytearray(1 << 62)):
        with pytest.raises(UserError, match="the CPU memory is full"), translate_oom_errors():
            allocate()
        with pytest.raises(RuntimeError, match="shapes"), translate_oom_errors():
            raise RuntimeError("shapes")


def test_memory_budget_is_reduced_to_the_minimum():
    budget = MemoryBudget(pack_tokens=8192, activation_checkpointing=False)
    pack = PackedBatch(("a", "b"), (900, 101), (), *[torch.empty(0)] * 7)
    one = PackedBatch(("a",), (900,), (), *[torch.empty(0)] * 7)
    half = budget.next_smaller(pack, is_training=True)
    assert half == MemoryBudget(pack_tokens=500, activation_checkpointing=False)
    assert half.next_smaller(one, is_training=False) is None
    duplicate = half.next_smaller(one, is_training=True)
    assert duplicate == MemoryBudget(pack_tokens=500, activation_checkpointing=True)
    assert duplicate.next_smaller(one, is_training=True) is None
    split = duplicate.next_smaller(one, is_training=True, world_size=2)
    assert split == MemoryBudget(pack_tokens=224, activation_checkpointing=True)
    assert max_unsplit_packs(2) * split.pack_tokens < 900, "that sample is split from then on"
    assert split.next_smaller(one, is_training=True, world_size=2) is None
    assert duplicate.next_smaller(one, is_training=True, world_size=64) == MemoryBudget(
        pack_tokens=14, activation_checkpointing=True
    )


@pytest.fixture
def recipe(tmp_path):
    settings = make_task(tmp_path / "task") | {"tune": LORA, "output_dir": str(tmp_path / "run")}
    return load_recipe(write_recipe(tmp_path / "recipe.yaml", settings, batch_size=4))


def test_each_builder_works_alone(recipe):
    console = ProgressConsole(Console(quiet=True))
    device, dtype = select_device(recipe)
    hardware = build_hardware(recipe, device, dtype, start_device(device, dtype))
    assert (hardware.device.type, hardware.precision) == ("cpu", "fp32")
    checked = check_recipe(recipe)
    data = build_data(checked, hardware, console)
    assert [*data.splits] == ["train", "eval"]
    run = build_run(checked, hardware, data, RunDir(recipe.output_dir), console)
    assert run.resume_config["train.batch_size"] == 4
    assert load_latest_checkpoint(run, resume=True) is None
    model = load_base_model(recipe, checked.base_model, hardware, console)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("adapter" in name for name in names)
    parallel = parallelize_model(recipe, model, hardware.dtype, hardware.process_group)
    optimizer = build_optimizer(recipe, hardware.process_group, parallel, {})
    assert optimizer.master_weights().keys() == names
    step_dataset = build_step_dataset(recipe, data, data.sampler, model)
    assert step_dataset.get_step(0).num_samples == 4
    batch = step_dataset.get_step(0).packs[0]
    assert build_device_loader(model, parallel, hardware).load(batch) == batch
    engine = build_train_engine(run, data, model, checked.objective)
    assert engine.optimizer.num_params == optimizer.num_params
    assert build_progress(recipe).budget.pack_tokens == recipe.train.pack_tokens
    assert not run.run_dir.path.exists()


def test_state_dict_contains_all_that_a_step_depends_on(recipe):
    """Another process continues with the same loss and the same weights, bit for bit."""
    run_dir = RunDir(recipe.output_dir)
    console = ProgressConsole(Console(quiet=True))
    states = [build_state(recipe, run_dir, console, resume=False) for _ in range(2)]
    first, second = states
    train_step(first, first.engine.step_dataset.get_step(0))
    first.progress.budget = MemoryBudget(pack_tokens=99, activation_checkpointing=1)
    first.progress.step = 1
    first.progress.last_eval_step = 1
    first.progress.best = BestEval(step=1, validation_loss=2.5)
    first.progress.nonfinite_steps = 3
    first.progress.consecutive_nonfinite_steps = 2
    for name, initial in second.progress:
        assert getattr(first.progress, name) != initial, f"{name} is not tested"
    second.load_state_dict(first.state_dict())
    assert second.progress == first.progress
    losses = []
    for state in states:
        losses.append(train_step(state, state.engine.step_dataset.get_step(1)).wait())
    assert losses[0] == losses[1]
    (_, weights, moments), (_, others, other_moments) = (state.state_dict() for state in states)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert all(torch.equal(moments[name], other_moments[name]) for name in moments)
