"""Runs with frozen weights in NF4 or FP8: output files, and loading them."""

import json
from typing import Any

import pytest
import torch
from gptq_fixtures import GptqConfig, with_untied_head, write_quantized_model
from hf_reference import CPU
from lora_fixtures import merge_to_folder
from safetensors.torch import load_file
from tiny_model import create_tiny_model

from finesight.errors import UserError
from finesight.infer.model_loader import load_inference_model, resolve_model_source
from finesight.model.quant import nf4
from finesight.model.quant.base import find_quantized_weights
from finesight.model.quant.fp8 import Fp8Weight
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.train.param_audit import ParamAudit

LORA: dict[str, Any] = {"language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}
LANGUAGE = LORA | {"quantize": {"nf4": ["language"]}}
MIXED = LORA | {"merger": "full", "quantize": {"nf4": ["vision", "language"]}}
FP8 = LORA | {"quantize": {"fp8": ["vision", "language"]}}
FP8_NF4 = LORA | {"merger": "full", "quantize": {"fp8": ["language"], "nf4": ["vision"]}}
FULL_FINETUNE = dict.fromkeys(("vision", "merger", "language", "embeddings"), "full")
ONE_STEP = ("train.steps=1", "train.epochs=null")


def assert_equal_buffers(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    buffers, others = dict(found.named_buffers()), dict(expected.named_buffers())
    assert buffers.keys() == others.keys()
    assert all(torch.equal(buffers[name], tensor) for name, tensor in others.items())


@pytest.mark.parametrize(
    ("tune", "summary"),
    [
        (LANGUAGE, "language in NF4"),
        (MIXED, ""),
        (FP8, "vision and language in FP8"),
        (FP8_NF4, ""),
    ],
)
def test_saved_run_reloads_its_quantized_weights(task, tune, summary):
    """The reloaded model has the validation loss that the run recorded."""
    result = task.run(tune=tune)
    run, quantize = task.folder / "run", tune["quantize"]
    stored = json.loads((run / "manifest.json").read_text())["tune"]["quantize"]
    source = resolve_model_source(str(run))
    assert (source.nf4_parts, source.fp8_parts) == tuple(
        tuple(quantize.get(kind, ())) for kind in ("nf4", "fp8")
    )
    for kind, parts in quantize.items():
        assert stored[kind] == parts
        text = f"(frozen weights of {' and '.join(parts)} in {kind.upper()})"
        assert text in task.console_output
    base = ModelFolder(task.folder / "tiny")
    expected = load_model(base, torch.float32, CPU, source.nf4_parts, fp8_parts=source.fp8_parts)
    found = load_inference_model(str(run), "cpu").model
    kinds, others = (
        {name: type(weight) for name, weight in find_quantized_weights(model).items()}
        for model in (expected, found)
    )
    assert kinds == others
    assert (Fp8Weight in kinds.values()) == ("fp8" in quantize)
    assert_equal_buffers(found, expected)
    again = task.run(*ONE_STEP, tune=tune, name="again", model=str(run))
    assert again.before.validation_loss == pytest.approx(result.after.validation_loss, rel=1e-6)
    if not summary:
        return
    # A merged model is not quantized.
    assert source.quantization_summary == summary
    merged = merge_to_folder(
        source.folder, source.adapter, task.folder / "merged", manifest=source.manifest
    )
    other = resolve_model_source(str(merged.folder))
    assert (other.nf4_parts, other.fp8_parts, other.adapter) == ((), (), None)
    assert not find_quantized_weights(load_inference_model(str(merged.folder), "cpu").model)


@pytest.mark.parametrize("tune", [MIXED, FP8 | {"vision": "lora"}, FULL_FINETUNE])
def test_activation_checkpointing_is_bit_exact(task, tune):
    """Also of dense weights, and of half of the layers."""
    tune = tune | {"lora": LORA["lora"] | {"dropout": 0.1}}
    results = [
        task.run(f"train.activation_checkpointing={value}", tune=tune, name=value)
        for value in ("false", "true", "0.5")
    ]
    assert len({(result.loss, result.after.validation_loss) for result in results}) == 1


@pytest.mark.parametrize("tune", [MIXED, FP8 | {"merger": "full"}])
def test_full_model_has_published_weights(task, tune):
    task.run("train.precision=bf16", tune=tune)
    base, trained = (
        load_file(task.folder / name / "model.safetensors") for name in ("tiny", "run/model")
    )
    assert base.keys() == trained.keys()
    for name, tensor in base.items():
        if name.startswith(("model.layers.", "visual.blocks.")) and tensor.dim() == 2:
            assert torch.equal(trained[name], tensor), name
    name = "visual.merger.mlp.0.weight"
    assert not torch.equal(trained[name], base[name])


@pytest.mark.parametrize(("kind", "tune"), [("nf4", LANGUAGE), ("fp8", FP8)])
def test_quantized_experts_are_rejected(task, kind, tune):
    """Quantization is refused for their part, and adapters leave them as they are."""
    folder = create_tiny_model(task.folder / "experts", "qwen3_vl_moe")
    with pytest.raises(UserError, match="experts, which remain in 16 bits") as refused:
        task.run(tune=tune, model=str(folder))
    assert refused.value.where == f"tune.quantize.{kind}"
    assert f"leave language out of {kind}" in refused.value.remedy
    frozen = "(experts have no adapters and are frozen)"
    task.run(*ONE_STEP, tune=LORA, model=str(folder), name="adapted")
    assert frozen in task.console_output
    task.run(*ONE_STEP, tune=LORA, name="dense")
    assert frozen not in task.console_output


def test_unsupported_machine_is_rejected_before_reading_data(task, monkeypatch):
    """Only requested formats are rejected."""

    def fail_to_import() -> None:
        raise ImportError("No module named 'bitsandbytes'")

    monkeypatch.setattr(nf4, "_import_bitsandbytes", fail_to_import)
    with pytest.raises(UserError, match=r"pip install 'finesight\[quant\]'"):
        task.run("data.train=nowhere.jsonl", tune=LANGUAGE)
    task.run(*ONE_STEP, "train.optimizer=adamw_8bit", tune=LORA, name="without")
    monkeypatch.setattr("finesight.train.setup.resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr("finesight.train.setup.start_device", lambda *_: 1.0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "an older card")
    for tune, words in (
        (FP8, r"an older card has compute capability 8\.0"),
        (LORA, r"nowhere\.jsonl"),
    ):
        with pytest.raises(UserError, match=words):
            task.run("data.train=nowhere.jsonl", tune=tune)
    assert not (task.folder / "run").exists()


def test_bit_flip_in_frozen_codes_is_detected(tmp_path):
    folder = ModelFolder(create_tiny_model(tmp_path / "tiny"))
    dense, model = (load_model(folder, torch.float32, CPU, parts) for parts in ((), ("language",)))
    audit = ParamAudit(model, {})
    assert audit.compute_changes(()) == ParamAudit(dense, {}).compute_changes(())
    name = "model.layers.1.mlp.gate_up_proj.weight"
    find_quantized_weights(model)[name].matrices[1].codes[7] ^= 1
    changed = {row.part: row.num_changed for row in audit.compute_changes(())}
    assert changed == {"vision": 0, "merger": 0, "language": 1, "embeddings": 0}


def test_run_on_gptq_base_model(task):
    """Adapters on frozen quantized weights, and a fully trained merger."""
    config = GptqConfig(act_order=True)
    four, dense = write_quantized_model(ModelFolder(task.folder / "tiny"), task.folder, config)
    tune = LORA | {"merger": "full"}
    expected, result = (
        task.run(tune=tune, model=str(folder.path), name=folder.path.name + "-run")
        for folder in (dense, four)
    )
    assert "(weights of language in 4 bits, as published)" in task.console_output
    assert (result.loss, result.after) == (expected.loss, expected.after)
    found = load_inference_model(str(task.folder / "int4-run"), "cpu").model
    base = find_quantized_weights(load_model(four, torch.float32, CPU))
    weights = find_quantized_weights(found)
    assert weights.keys() == base.keys()
    for name, weight in base.items():
        assert_equal_buffers(weights[name], weight)
    with pytest.raises(UserError, match="language is full, but the model has 4-bit weights"):
        task.run(tune={"language": "full"}, model=str(four.path), name="whole")


def test_run_with_quantized_lm_head(task):
    tune = LORA | {"quantize": {"nf4": ["language", "embeddings"]}}
    with pytest.raises(UserError, match="head of this model is tied to the embedding table"):
        task.run(tune=tune, name="tied")
    _, dense = write_quantized_model(ModelFolder(task.folder / "tiny"), task.folder, GptqConfig())
    result = task.run(tune=tune, model=str(with_untied_head(dense).path))
    run = str(task.folder / "run")
    assert result.after.validation_loss < result.before.validation_loss
    assert "lm_head.weight" in find_quantized_weights(load_inference_model(run, "cpu").model)
    again = task.run(*ONE_STEP, tune=tune, name="again", model=run)
    assert again.before.validation_loss == pytest.approx(result.after.validation_loss, rel=1e-6)
