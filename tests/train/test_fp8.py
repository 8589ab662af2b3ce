"""Runs whose frozen weights are multiplied in FP8: what they write, and what reads it again."""

from __future__ import annotations

import json
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml
from oracle import CPU
from safetensors import safe_open
from small_run import Task

from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.infer.load import find_parts, load_answerer
from finesight.model.fp8 import Fp8Weight
from finesight.model.frozen import frozen_weights
from finesight.model.merge import merge_folder
from finesight.model.tiny import SIZES, make_tiny
from finesight.model.weights import load_model

LORA = {"language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}
BOTH = LORA | {"fp8": ["vision", "language"]}
MIXED = LORA | {"merger": "full", "fp8": ["language"], "nf4": ["vision"]}
ADAPTED = LORA | {"vision": "lora", "fp8": ["vision", "language"]}


@pytest.mark.parametrize("tune", [BOTH, MIXED], ids=["adapter", "adapter on a whole model"])
def test_a_run_is_loaded_again_with_the_bits_it_was_trained_on(
    task: Task, tune: dict[str, Any]
) -> None:
    """Its held-out loss, measured through what the run has written, is the one that it noted."""
    result = task.run(tune=tune)
    run = task.folder / "run"
    assert json.loads((run / "manifest.json").read_text())["tune"]["fp8"] == tune["fp8"]
    assert f"(frozen weights of {' and '.join(tune['fp8'])} multiplied in FP8)" in task.screen
    parts = find_parts(str(run))
    assert parts.fp8 == tuple(tune["fp8"])
    base = ModelFolder(task.folder / "tiny")
    expected = load_model(base, torch.float32, CPU, parts.nf4, fp8=parts.fp8)
    found = load_answerer(str(run), "cpu").model
    kinds = {name: type(weight) for name, weight in frozen_weights(expected).items()}
    assert Fp8Weight in kinds.values()
    assert {name: type(weight) for name, weight in frozen_weights(found).items()} == kinds
    bits = dict(found.named_buffers())
    for name, tensor in expected.named_buffers():
        assert torch.equal(bits[name], tensor), name
    again = task.run("train.steps=1", "train.epochs=null", tune=tune, name="again", model=str(run))
    assert again.before is not None
    assert result.after is not None
    assert again.before.held_out_loss == pytest.approx(result.after.held_out_loss, rel=1e-6)


def test_layers_that_stay_in_16_bits_are_counted(task: Task) -> None:
    """Gate, up and down of each of two layers, whose inner width is no multiple of 16."""
    folder = make_tiny(task.folder / "odd", size=replace(SIZES["test"], inner=136))
    task.run("train.steps=1", "train.epochs=null", tune=BOTH, model=str(folder))
    but = ", but for 6 layers whose sizes do not allow it"
    assert f"(frozen weights of vision and language multiplied in FP8{but})" in task.screen


def test_a_run_in_fp8_learns_as_the_other_does(task: Task) -> None:
    """The mean loss of each epoch within 2 %, on 11 samples of a model with random weights."""
    losses = []
    for number, parts in enumerate((None, ["vision", "language"])):
        result = task.run("train.epochs=6", tune=LORA | {"fp8": parts}, name=f"run{number}")
        assert result.before is not None
        assert result.after is not None
        assert result.after.held_out_loss < result.before.held_out_loss - 0.3
        steps = [line["loss"] for line in task.history(f"run{number}") if "loss" in line]
        losses.append([fmean(steps[at : at + 3]) for at in range(0, len(steps), 3)])
    plain, multiplied = losses
    assert plain != multiplied
    assert multiplied == pytest.approx(plain, rel=0.02)


def test_recomputed_activations_change_nothing(task: Task) -> None:
    tune = ADAPTED | {"lora": LORA["lora"] | {"dropout": 0.1}}
    kept = task.run(tune=tune, name="kept")
    again = task.run("train.recompute=true", tune=tune, name="recomputed")
    assert kept.loss == again.loss
    assert kept.after == again.after


def test_a_whole_model_beside_the_adapter_holds_the_published_weights(task: Task) -> None:
    task.run("train.precision=bf16", tune=BOTH | {"merger": "full"})
    names = {}
    for folder in (task.folder / "tiny", task.folder / "run" / "model"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            names[folder.name] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    own, written = names["tiny"], names["model"]
    assert own.keys() == written.keys()
    for name, tensor in own.items():
        if name.startswith(("model.layers.", "visual.blocks.")) and tensor.dim() == 2:
            assert torch.equal(written[name], tensor), name


def test_a_merged_model_has_its_weights_as_published(task: Task) -> None:
    task.run(tune=BOTH)
    parts = find_parts(str(task.folder / "run"))
    assert parts.adapter is not None
    assert parts.quantised == "vision and language in FP8"
    merged = merge_folder(
        parts.folder, parts.adapter, task.folder / "merged", manifest=parts.manifest
    )
    again = find_parts(str(merged.folder))
    assert (again.fp8, again.adapter, again.quantised) == ((), None, "")
    assert not frozen_weights(load_answerer(str(merged.folder), "cpu").model)


def test_a_resumed_run_keeps_its_way_to_multiply(task: Task) -> None:
    task.unfinished()
    with pytest.raises(UserError, match=r"tune\.fp8 is \['language'\] now"):
        task.run("tune.fp8=[language]", resume=True)


def test_a_recipe_is_written_as_it_was_meant(task: Task) -> None:
    task.run("tune.fp8=[language, vision]", "train.steps=1", "train.epochs=null", tune=LORA)
    recipe = yaml.safe_load((task.folder / "run" / "recipe.yaml").read_text())
    assert recipe["tune"]["fp8"] == ["vision", "language"]


def test_a_decoder_with_experts_is_refused(task: Task) -> None:
    folder = make_tiny(task.folder / "experts", "qwen3_vl_moe")
    with pytest.raises(UserError, match="experts, which stay in 16 bits") as refused:
        task.run(tune=BOTH, model=str(folder))
    assert refused.value.where == "tune.fp8"
    assert "leave language out of fp8" in refused.value.remedy


def test_a_card_that_cannot_is_refused_before_anything_is_read(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where it was asked for."""
    monkeypatch.setattr("finesight.train.prepare.resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr("finesight.train.prepare.measured_peak", lambda *_: 1.0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "an older card")
    with pytest.raises(UserError, match=r"an older card has compute capability 8\.0"):
        task.run("data.train=nowhere.jsonl", tune=BOTH)
    assert not (task.folder / "run").exists()
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        task.run("data.train=nowhere.jsonl", tune=LORA)
