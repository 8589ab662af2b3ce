"""Runs with frozen weights in NF4 or FP8: output files, and loading them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml
from gptq_fixtures import GptqConfig, with_untied_head, write_quantized_model
from hf_reference import CPU
from lora_fixtures import merge_to_folder
from tiny_model import TINY_PRESETS, create_tiny_model
from tiny_task import TinyTask

from finesight.config import TuneSettings
from finesight.errors import UserError
from finesight.infer.model_loader import load_inference_model, resolve_model_source
from finesight.model.quant import nf4
from finesight.model.quant.base import find_quantized_weights
from finesight.model.quant.fp8 import Fp8Weight
from finesight.model.trainable import configure_tuning
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.train.finalize import ParamAudit
from finesight.train.flops import FlopCounter

LORA = {"language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}
LANGUAGE = LORA | {"quantize": {"nf4": ["language"]}}
MIXED = LORA | {"merger": "full", "quantize": {"nf4": ["vision", "language"]}}
FP8 = LORA | {"quantize": {"fp8": ["vision", "language"]}}
FP8_NF4 = LORA | {"merger": "full", "quantize": {"fp8": ["language"], "nf4": ["vision"]}}
ONE_STEP = ("train.steps=1", "train.epochs=null")


@pytest.mark.parametrize("tune", [LANGUAGE, MIXED, FP8, FP8_NF4])
def test_saved_run_reloads_its_quantized_weights(task: TinyTask, tune: dict[str, Any]) -> None:
    """The reloaded model has the validation loss that the run recorded."""
    result = task.run(tune=tune)
    run, quantize = task.folder / "run", tune["quantize"]
    stored = json.loads((run / "manifest.json").read_text())["tune"]["quantize"]
    parts = resolve_model_source(str(run))
    for kind, found_parts in (("nf4", parts.nf4_parts), ("fp8", parts.fp8_parts)):
        if kind in quantize:
            assert stored[kind] == quantize[kind]
            named = f"(frozen weights of {' and '.join(quantize[kind])} in {kind.upper()})"
            assert named in task.console_output
        assert found_parts == tuple(quantize.get(kind, ()))
    base = ModelFolder(task.folder / "tiny")
    expected = load_model(base, torch.float32, CPU, parts.nf4_parts, fp8_parts=parts.fp8_parts)
    found = load_inference_model(str(run), "cpu").model
    kinds = {name: type(weight) for name, weight in find_quantized_weights(expected).items()}
    assert (Fp8Weight in kinds.values()) == ("fp8" in quantize)
    assert {name: type(weight) for name, weight in find_quantized_weights(found).items()} == kinds
    bits, expected_bits = dict(found.named_buffers()), dict(expected.named_buffers())
    assert bits.keys() == expected_bits.keys()
    assert all(torch.equal(bits[name], tensor) for name, tensor in expected_bits.items())
    again = task.run(*ONE_STEP, tune=tune, name="again", model=str(run))
    assert again.before.validation_loss == pytest.approx(result.after.validation_loss, rel=1e-6)


@pytest.mark.parametrize("tune", [MIXED, FP8 | {"vision": "lora"}])
def test_activation_checkpointing_is_bit_exact(task: TinyTask, tune: dict[str, Any]) -> None:
    tune = tune | {"lora": LORA["lora"] | {"dropout": 0.1}}
    retained = task.run(tune=tune, name="baseline")
    again = task.run("train.activation_checkpointing=true", tune=tune, name="checkpointed")
    assert retained.loss == again.loss
    assert retained.after == again.after


@pytest.mark.parametrize("tune", [MIXED, FP8 | {"merger": "full"}])
def test_full_model_has_published_weights(task: TinyTask, tune: dict[str, Any]) -> None:
    task.run("train.precision=bf16", tune=tune)
    base, trained = task.assert_layers_unchanged()
    name = "visual.merger.mlp.0.weight"
    assert not torch.equal(trained[name], base[name])


@pytest.mark.parametrize(
    ("tune", "summary"),
    [(LANGUAGE, "language in NF4"), (FP8, "vision and language in FP8")],
)
def test_merged_model_loads_unquantized(task: TinyTask, tune: dict[str, Any], summary: str) -> None:
    task.run(tune=tune)
    parts = resolve_model_source(str(task.folder / "run"))
    assert parts.quantization_summary == summary
    merged = merge_to_folder(
        parts.folder, parts.adapter, task.folder / "merged", manifest=parts.manifest
    )
    again = resolve_model_source(str(merged.folder))
    assert (again.nf4_parts, again.fp8_parts, again.adapter) == ((), (), None)
    assert again.quantization_summary == ""
    assert not find_quantized_weights(load_inference_model(str(merged.folder), "cpu").model)


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_resumed_run_keeps_quantization(task: TinyTask, kind: str) -> None:
    task.rewind_to_checkpoint()
    with pytest.raises(UserError, match=rf"tune\.quantize is {{.*'{kind}': \['language'\].* now"):
        task.run(f"tune.quantize.{kind}=[language]", resume=True)


@pytest.mark.parametrize(
    ("kind", "value", "parts"),
    [("nf4", "language", ["language"]), ("fp8", "[language, vision]", ["vision", "language"])],
)
def test_recipe_is_normalized(task: TinyTask, kind: str, value: str, parts: list[str]) -> None:
    task.run(f"tune.quantize.{kind}={value}", "train.optimizer=adamw_8bit", *ONE_STEP, tune=LORA)
    recipe = yaml.safe_load((task.folder / "run" / "recipe.yaml").read_text())
    assert recipe["tune"]["quantize"][kind] == parts
    assert recipe["train"]["optimizer"] == "adamw_8bit"


@pytest.mark.parametrize(("kind", "tune"), [("nf4", LANGUAGE), ("fp8", FP8)])
def test_quantized_experts_are_rejected(task: TinyTask, kind: str, tune: dict[str, Any]) -> None:
    """Quantization is refused for their part, and adapters leave them as they are."""
    folder = create_tiny_model(task.folder / "experts", "qwen3_vl_moe")
    with pytest.raises(UserError, match="experts, which remain in 16 bits") as refused:
        task.run(tune=tune, model=str(folder))
    assert refused.value.where == f"tune.quantize.{kind}"
    assert f"leave language out of {kind}" in refused.value.remedy
    task.run(*ONE_STEP, tune=LORA, model=str(folder), name="adapted")
    assert "(experts have no adapters and are frozen)" in task.console_output
    task.run(*ONE_STEP, tune=LORA, name="dense")
    assert "(experts" not in task.console_output


def test_layers_without_fp8_are_counted(task: TinyTask) -> None:
    """Gate, up and down of each of two layers, whose inner width is no multiple of 16."""
    folder = create_tiny_model(
        task.folder / "odd", preset=replace(TINY_PRESETS["test"], intermediate_size=136)
    )
    task.run("train.steps=1", "train.epochs=null", tune=FP8, model=str(folder))
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


def test_unsupported_gpu_is_rejected_early(task: TinyTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only requested FP8 parts are rejected."""
    monkeypatch.setattr("finesight.train.setup.resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr("finesight.train.setup.measure_peak_flops", lambda *_: 1.0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "an older card")
    with pytest.raises(UserError, match=r"an older card has compute capability 8\.0"):
        task.run("data.train=nowhere.jsonl", tune=FP8)
    assert not (task.folder / "run").exists()
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        task.run("data.train=nowhere.jsonl", tune=LORA)


def test_nf4_loss_matches_bf16(task: TinyTask) -> None:
    losses = []
    for number, nf4_parts in enumerate((None, ["vision", "merger", "language"])):
        tune = LORA | {"quantize": {"nf4": nf4_parts}}
        result = task.run("train.epochs=6", tune=tune, name=f"run{number}")
        losses.append((result.before.validation_loss, result.after.validation_loss))
    (before, after), (before_4, after_4) = losses
    assert before != before_4
    assert after < before - 0.3
    assert after_4 < before_4 - 0.3
    assert after_4 == pytest.approx(after, abs=0.15)


def test_missing_bitsandbytes_is_reported_early(
    task: TinyTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ImportError("No module named 'bitsandbytes'")

    monkeypatch.setattr(nf4, "_import_bitsandbytes", missing)
    with pytest.raises(UserError, match=r"pip install 'finesight\[quant\]'"):
        task.run("data.train=nowhere.jsonl", tune=LANGUAGE)
    assert not (task.folder / "run").exists()
    # What needs it not does without it.
    task.run("train.optimizer=adamw_8bit", tune=LORA)


@pytest.mark.parametrize("tune", [LORA, {"language": "frozen", "merger": "full"}])
def test_flops_match_dense_weights(tmp_path: Path, tune: dict[str, Any]) -> None:
    folder = ModelFolder(create_tiny_model(tmp_path / "tiny", "qwen2_5_vl"))
    counts = []
    for parts in ((), ("vision", "language")):
        model = load_model(folder, torch.float32, CPU, parts)
        configure_tuning(model, TuneSettings.model_validate(tune), 0)
        counts.append(vars(FlopCounter(model)) | {"_geometry": None})
    assert counts[0] == counts[1]


def test_bit_flip_in_frozen_codes_is_detected(tmp_path: Path) -> None:
    folder = ModelFolder(create_tiny_model(tmp_path / "tiny"))
    dense = load_model(folder, torch.float32, CPU)
    model = load_model(folder, torch.float32, CPU, ("language",))
    watch = ParamAudit(model, {})
    rows = {row.part: row for row in watch.compute_changes(())}
    expected = {row.part: row for row in ParamAudit(dense, {}).compute_changes(())}
    assert rows == expected
    assert rows["language"].num_changed == 0
    matrix = find_quantized_weights(model)["model.layers.1.mlp.gate_up_proj.weight"].matrices[1]
    matrix.codes[7] ^= 1
    assert {row.part: row.num_changed for row in watch.compute_changes(())} == {
        "vision": 0,
        "merger": 0,
        "language": 1,
        "embeddings": 0,
    }


def test_run_on_gptq_base_model(task: TinyTask) -> None:
    """Adapters on frozen quantized weights, and a fully trained merger."""
    four, dense = write_quantized_model(
        ModelFolder(task.folder / "tiny"), task.folder, GptqConfig(act_order=True)
    )
    tune = LORA | {"merger": "full"}
    results = [
        task.run(tune=tune, model=str(folder.path), name=folder.path.name + "-run")
        for folder in (dense, four)
    ]
    assert "(weights of language in 4 bits, as published)" in task.console_output
    assert results[0].loss == results[1].loss
    assert results[0].after == results[1].after
    run = task.folder / "int4-run"
    found = load_inference_model(str(run), "cpu").model
    base = find_quantized_weights(load_model(four, torch.float32, CPU))
    retained = find_quantized_weights(found)
    assert retained.keys() == base.keys()
    for name, weight in base.items():
        for bits, expected in zip(retained[name].buffers(), weight.buffers(), strict=True):
            assert torch.equal(bits, expected)
    with pytest.raises(UserError, match="language is full, but the model has 4-bit weights"):
        task.run(tune={"language": "full"}, model=str(four.path), name="whole")


def test_run_with_quantized_lm_head(task: TinyTask) -> None:
    tune = LORA | {"quantize": {"nf4": ["language", "embeddings"]}}
    with pytest.raises(UserError, match="head of this model is tied to the embedding table"):
        task.run(tune=tune, name="tied")
    _, dense = write_quantized_model(ModelFolder(task.folder / "tiny"), task.folder, GptqConfig())
    base = with_untied_head(dense)
    result = task.run("train.epochs=4", tune=tune, model=str(base.path))
    assert result.after.validation_loss < result.before.validation_loss
    model = load_inference_model(str(task.folder / "run"), "cpu").model
    assert "lm_head.weight" in find_quantized_weights(model)
    again = task.run(
        "train.steps=1",
        "train.epochs=null",
        tune=tune,
        name="again",
        model=str(task.folder / "run"),
    )
    assert again.before.validation_loss == pytest.approx(result.after.validation_loss, rel=1e-6)
