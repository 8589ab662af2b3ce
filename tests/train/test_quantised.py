"""Runs whose frozen weights are in four bits: what they write, and what reads it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gptq import Way, publish, with_a_head
from oracle import CPU
from safetensors import safe_open
from small_run import Task

from finesight.config import Tune
from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.infer.load import find_parts, load_answerer
from finesight.model import nf4
from finesight.model.frozen import frozen_weights
from finesight.model.merge import merge_folder
from finesight.model.parts import apply_tuning
from finesight.model.tiny import make_tiny
from finesight.model.weights import load_model
from finesight.train.flops import Arithmetic
from finesight.train.moved import Watch

LORA = {"language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}
LANGUAGE = LORA | {"nf4": ["language"]}
MIXED = LORA | {"merger": "full", "nf4": ["vision", "language"]}


def answers(run: Path) -> list[dict[str, Any]]:
    lines = (run / "predictions" / "after.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("tune", [LANGUAGE, MIXED], ids=["adapter", "adapter on a whole model"])
def test_a_run_is_loaded_again_with_the_bits_it_was_trained_on(
    task: Task, tune: dict[str, Any]
) -> None:
    """Its held-out loss, measured through what the run has written, is the one that it noted."""
    result = task.run(tune=tune)
    run = task.folder / "run"
    assert json.loads((run / "manifest.json").read_text())["tune"]["nf4"] == tune["nf4"]
    assert f"(weights of {' and '.join(tune['nf4'])} in NF4)" in task.screen
    assert find_parts(str(run)).nf4 == tuple(tune["nf4"])
    base = ModelFolder(task.folder / "tiny")
    expected = dict(load_model(base, torch.float32, CPU, tune["nf4"]).named_buffers())
    found = dict(load_answerer(str(run), "cpu").model.named_buffers())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    again = task.run("train.steps=1", "train.epochs=null", tune=tune, name="again", model=str(run))
    assert again.before is not None
    assert result.after is not None
    assert again.before.held_out_loss == pytest.approx(result.after.held_out_loss, rel=1e-6)


def test_a_whole_model_beside_the_adapter_holds_the_published_weights(task: Task) -> None:
    task.run("train.precision=bf16", tune=MIXED)
    names = {}
    for folder in (task.folder / "tiny", task.folder / "run" / "model"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            names[folder.name] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    own, written = names["tiny"], names["model"]
    assert own.keys() == written.keys()
    for name, tensor in own.items():
        if name.startswith(("model.layers.", "visual.blocks.")) and tensor.dim() == 2:
            assert torch.equal(written[name], tensor), name
    assert not torch.equal(written["visual.merger.mlp.0.weight"], own["visual.merger.mlp.0.weight"])


def test_a_run_in_four_bits_learns_as_the_other_does(task: Task) -> None:
    losses = []
    for number, nf4_parts in enumerate((None, ["vision", "merger", "language"])):
        tune = LORA | {"nf4": nf4_parts}
        result = task.run("train.epochs=6", tune=tune, name=f"run{number}")
        assert result.before is not None
        assert result.after is not None
        losses.append((result.before.held_out_loss, result.after.held_out_loss))
    (before, after), (before_4, after_4) = losses
    assert before != before_4
    assert after < before - 0.3
    assert after_4 < before_4 - 0.3
    assert after_4 == pytest.approx(after, abs=0.15)


def test_recomputed_activations_change_nothing(task: Task) -> None:
    tune = MIXED | {"lora": LORA["lora"] | {"dropout": 0.1}}
    kept = task.run(tune=tune, name="kept")
    again = task.run("train.recompute=true", tune=tune, name="recomputed")
    assert kept.loss == again.loss
    assert kept.after == again.after


def test_a_missing_package_is_told_before_anything_is_read_or_written(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ImportError("No module named 'bitsandbytes'")

    monkeypatch.setattr(nf4, "_imported", missing)
    with pytest.raises(UserError, match=r"pip install 'finesight\[quant\]'"):
        task.run("data.train=nowhere.jsonl", tune=LANGUAGE)
    assert not (task.folder / "run").exists()
    # What needs it not does without it.
    task.run("train.optimizer=adamw8bit", tune=LORA)


def test_what_becomes_of_experts_is_said(task: Task) -> None:
    """Four bits are refused for their part, and adapters leave them as they are."""
    folder = make_tiny(task.folder / "experts", "qwen3_vl_moe")
    with pytest.raises(UserError, match="experts, which stay in 16 bits") as refused:
        task.run(tune=LANGUAGE, model=str(folder))
    assert refused.value.where == "tune.nf4"
    task.run("train.steps=1", "train.epochs=null", tune=LORA, model=str(folder), name="adapted")
    assert "(experts carry no adapters: they stay as they are)" in task.screen
    task.run("train.steps=1", "train.epochs=null", tune=LORA, name="dense")
    assert "(experts" not in task.screen


def test_a_resumed_run_keeps_its_four_bits(task: Task) -> None:
    task.unfinished()
    with pytest.raises(UserError, match=r"tune\.nf4 is \['language'\] now"):
        task.run("tune.nf4=[language]", resume=True)


def test_a_recipe_is_written_as_it_was_meant(task: Task) -> None:
    task.run("tune.nf4=language", "train.optimizer=adamw8bit", tune=LORA)
    recipe = yaml.safe_load((task.folder / "run" / "recipe.yaml").read_text())
    assert recipe["tune"]["nf4"] == ["language"]
    assert recipe["train"]["optimizer"] == "adamw8bit"


def test_a_merged_model_is_loaded_as_it_is(task: Task) -> None:
    task.run(tune=LANGUAGE)
    parts = find_parts(str(task.folder / "run"))
    assert parts.adapter is not None
    merged = merge_folder(
        parts.folder, parts.adapter, task.folder / "merged", manifest=parts.manifest
    )
    again = find_parts(str(merged.folder))
    assert (again.nf4, again.adapter) == ((), None)
    assert not frozen_weights(load_answerer(str(merged.folder), "cpu").model)


@pytest.mark.parametrize("tune", [LORA, {"language": "frozen", "merger": "full"}])
def test_the_arithmetic_is_that_of_dense_weights(tmp_path: Path, tune: dict[str, Any]) -> None:
    folder = ModelFolder(make_tiny(tmp_path / "tiny", "qwen2_5_vl"))
    counts = []
    for parts in ((), ("vision", "language")):
        model = load_model(folder, torch.float32, CPU, parts)
        apply_tuning(model, Tune.model_validate(tune), 0)
        counts.append(vars(Arithmetic(model)) | {"_geometry": None})
    assert counts[0] == counts[1]


def test_one_bit_of_frozen_codes_is_noticed(tmp_path: Path) -> None:
    folder = ModelFolder(make_tiny(tmp_path / "tiny"))
    dense = load_model(folder, torch.float32, CPU)
    model = load_model(folder, torch.float32, CPU, ("language",))
    watch = Watch(model, {})
    rows = {row.part: row for row in watch.changes(())}
    expected = {row.part: row for row in Watch(dense, {}).changes(())}
    assert rows == expected
    assert rows["language"].changed == 0
    matrix = frozen_weights(model)["model.layers.1.mlp.gate_up_proj.weight"].matrices[1]
    matrix.codes[7] ^= 1
    assert {row.part: row.changed for row in watch.changes(())} == {
        "vision": 0,
        "merger": 0,
        "language": 1,
        "embeddings": 0,
    }


def test_a_run_on_a_model_published_in_four_bits(task: Task) -> None:
    """Adapters beside weights that stay as they are, and a merger that learns whole."""
    four, dense = publish(ModelFolder(task.folder / "tiny"), task.folder, Way(act_order=True))
    tune = LORA | {"merger": "full"}
    results = [
        task.run(tune=tune, model=str(folder.path), name=folder.path.name + "-run")
        for folder in (dense, four)
    ]
    assert "(weights of language in four bits, as published)" in task.screen
    assert results[0].loss == results[1].loss
    assert results[0].after == results[1].after
    run = task.folder / "int4-run"
    found = load_answerer(str(run), "cpu").model
    base = frozen_weights(load_model(four, torch.float32, CPU))
    kept = frozen_weights(found)
    assert kept.keys() == base.keys()
    for name, weight in base.items():
        for bits, expected in zip(kept[name].buffers(), weight.buffers(), strict=True):
            assert torch.equal(bits, expected)
    with pytest.raises(UserError, match="language is full, and the model has its weights in four"):
        task.run(tune={"language": "full"}, model=str(four.path), name="whole")


def test_a_run_with_its_head_in_four_bits(task: Task) -> None:
    tune = LORA | {"nf4": ["language", "embeddings"]}
    with pytest.raises(UserError, match="head is the table of its embeddings"):
        task.run(tune=tune, name="tied")
    _, dense = publish(ModelFolder(task.folder / "tiny"), task.folder, Way())
    base = with_a_head(dense)
    result = task.run("train.epochs=4", tune=tune, model=str(base.path))
    assert result.before is not None
    assert result.after is not None
    assert result.after.held_out_loss < result.before.held_out_loss
    model = load_answerer(str(task.folder / "run"), "cpu").model
    assert "lm_head.weight" in frozen_weights(model)
    again = task.run(
        "train.steps=1",
        "train.epochs=null",
        tune=tune,
        name="again",
        model=str(task.folder / "run"),
    )
    assert again.before is not None
    assert again.before.held_out_loss == pytest.approx(result.after.held_out_loss, rel=1e-6)
