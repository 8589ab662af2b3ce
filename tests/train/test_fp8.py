"""Runs with frozen weights in FP8: output files, and loading them."""

from __future__ import annotations

import json
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml
from hf_reference import CPU
from lora_fixtures import merge_to_folder
from tiny_model import TINY_PRESETS, create_tiny_model
from tiny_task import TinyTask

from finesight.errors import UserError
from finesight.infer.model_loader import load_inference_model, resolve_model_source
from finesight.model.quant.base import find_quantized_weights
from finesight.model.quant.fp8 import Fp8Weight
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder

LORA = {"language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}
BOTH = LORA | {"quantize": {"fp8": ["vision", "language"]}}
MIXED = LORA | {"merger": "full", "quantize": {"fp8": ["language"], "nf4": ["vision"]}}
ADAPTED = LORA | {"vision": "lora", "quantize": {"fp8": ["vision", "language"]}}


@pytest.mark.parametrize("tune", [BOTH, MIXED], ids=["adapter", "adapter on a whole model"])
def test_saved_run_reloads_its_fp8_weights(task: TinyTask, tune: dict[str, Any]) -> None:
    """The reloaded model has the validation loss that the run recorded."""
    result = task.run(tune=tune)
    run = task.folder / "run"
    assert (
        json.loads((run / "manifest.json").read_text())["tune"]["quantize"]["fp8"]
        == tune["quantize"]["fp8"]
    )
    assert (
        f"(frozen weights of {' and '.join(tune['quantize']['fp8'])} in FP8)" in task.console_output
    )
    parts = resolve_model_source(str(run))
    assert parts.fp8_parts == tuple(tune["quantize"]["fp8"])
    base = ModelFolder(task.folder / "tiny")
    expected = load_model(base, torch.float32, CPU, parts.nf4_parts, fp8_parts=parts.fp8_parts)
    found = load_inference_model(str(run), "cpu").model
    kinds = {name: type(weight) for name, weight in find_quantized_weights(expected).items()}
    assert Fp8Weight in kinds.values()
    assert {name: type(weight) for name, weight in find_quantized_weights(found).items()} == kinds
    bits = dict(found.named_buffers())
    for name, tensor in expected.named_buffers():
        assert torch.equal(bits[name], tensor), name
    again = task.run("train.steps=1", "train.epochs=null", tune=tune, name="again", model=str(run))
    assert again.before.validation_loss == pytest.approx(result.after.validation_loss, rel=1e-6)


def test_layers_without_fp8_are_counted(task: TinyTask) -> None:
    """Gate, up and down of each of two layers, whose inner width is no multiple of 16."""
    folder = create_tiny_model(
        task.folder / "odd", preset=replace(TINY_PRESETS["test"], intermediate_size=136)
    )
    task.run("train.steps=1", "train.epochs=null", tune=BOTH, model=str(folder))
    but = ", except 6 layers with unsupported sizes"
    assert f"(frozen weights of vision and language in FP8{but})" in task.console_output


def test_fp8_loss_matches_bf16(task: TinyTask) -> None:
    """The mean loss of each epoch within 2 %, on 11 samples of a model with random weights."""
    losses = []
    for number, parts in enumerate((None, ["vision", "language"])):
        result = task.run(
            "train.epochs=6", tune=LORA | {"quantize": {"fp8": parts}}, name=f"run{number}"
        )
        assert result.after.validation_loss < result.before.validation_loss - 0.3
        steps = [line["loss"] for line in task.read_metrics(f"run{number}") if "loss" in line]
        losses.append([fmean(steps[at : at + 3]) for at in range(0, len(steps), 3)])
    baseline, multiplied = losses
    assert baseline != multiplied
    assert multiplied == pytest.approx(baseline, rel=0.02)


def test_activation_checkpointing_is_bit_exact(task: TinyTask) -> None:
    tune = ADAPTED | {"lora": LORA["lora"] | {"dropout": 0.1}}
    retained = task.run(tune=tune, name="baseline")
    again = task.run("train.activation_checkpointing=true", tune=tune, name="checkpointed")
    assert retained.loss == again.loss
    assert retained.after == again.after


def test_full_model_has_published_weights(task: TinyTask) -> None:
    task.run("train.precision=bf16", tune=BOTH | {"merger": "full"})
    task.assert_layers_unchanged()


def test_merged_model_has_published_weights(task: TinyTask) -> None:
    task.run(tune=BOTH)
    parts = resolve_model_source(str(task.folder / "run"))
    assert parts.adapter is not None
    assert parts.quantization_summary == "vision and language in FP8"
    merged = merge_to_folder(
        parts.folder, parts.adapter, task.folder / "merged", manifest=parts.manifest
    )
    again = resolve_model_source(str(merged.folder))
    assert (again.fp8_parts, again.adapter, again.quantization_summary) == ((), None, "")
    assert not find_quantized_weights(load_inference_model(str(merged.folder), "cpu").model)


def test_resumed_run_keeps_fp8(task: TinyTask) -> None:
    task.rewind_to_checkpoint()
    with pytest.raises(UserError, match=r"tune\.quantize is {.*'fp8': \['language'\]} now"):
        task.run("tune.quantize.fp8=[language]", resume=True)


def test_recipe_is_normalized(task: TinyTask) -> None:
    task.run(
        "tune.quantize.fp8=[language, vision]", "train.steps=1", "train.epochs=null", tune=LORA
    )
    recipe = yaml.safe_load((task.folder / "run" / "recipe.yaml").read_text())
    assert recipe["tune"]["quantize"]["fp8"] == ["vision", "language"]


def test_moe_decoder_is_rejected(task: TinyTask) -> None:
    folder = create_tiny_model(task.folder / "experts", "qwen3_vl_moe")
    with pytest.raises(UserError, match="experts, which remain in 16 bits") as refused:
        task.run(tune=BOTH, model=str(folder))
    assert refused.value.where == "tune.quantize.fp8"
    assert "leave language out of fp8" in refused.value.remedy


def test_unsupported_gpu_is_rejected_early(task: TinyTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only requested FP8 parts are rejected."""
    monkeypatch.setattr("finesight.train.setup.resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr("finesight.train.setup.measure_peak_flops", lambda *_: 1.0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "an older card")
    with pytest.raises(UserError, match=r"an older card has compute capability 8\.0"):
        task.run("data.train=nowhere.jsonl", tune=BOTH)
    assert not (task.folder / "run").exists()
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        task.run("data.train=nowhere.jsonl", tune=LORA)
