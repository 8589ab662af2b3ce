"""Audit of parameters: changes of trained and frozen parts, and what it explains."""

import copy
from pathlib import Path

import pytest
import torch
from hf_reference import make_config, make_native_model, make_reference_model
from lora_fixtures import (
    TUNE_SETTINGS,
    edit_adapter_config,
    make_group,
    quantize_linear,
    write_random_adapter,
)
from torch import nn

from finesight.errors import UserError
from finesight.model.linear import LoraConfig, LoraLinear, iter_adapters
from finesight.model.lora.merge import merge_adapters
from finesight.model.lora.peft_io import load_adapter
from finesight.model.quant.int8 import Int8Matrix
from finesight.model.quant.nf4 import Nf4Matrix
from finesight.model.trainable import configure_tuning, get_part
from finesight.model.vlm import VisionLanguageModel
from finesight.settings.config import TuneSettings
from finesight.train.finalize import check_param_changes
from finesight.train.param_audit import SAMPLE_SIZE, ParamAudit


def make_audit(dtype: torch.dtype) -> tuple[nn.Module, dict[str, torch.Tensor], ParamAudit]:
    torch.manual_seed(0)
    model = nn.Module()
    model.visual = nn.ModuleDict({"blocks": nn.Linear(3, 5)})
    model.model = nn.ModuleDict({"layers": nn.Linear(3, 5), "norm": nn.LayerNorm(2)})
    named = dict(model.to(dtype).named_parameters())
    masters = {n: p.detach().float() for n, p in named.items() if n.startswith("model.layers")}
    return model, masters, ParamAudit(model, masters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trained_parts_change_and_frozen_parts_do_not(dtype):
    model, masters, audit = make_audit(dtype)
    weight = masters["model.layers.weight"]
    before = weight.norm()
    weight.mul_(1.5)
    rows = audit.compute_changes({"model.layers.weight"})
    check_param_changes(rows)
    (trained,) = (row for row in rows if row.is_trained)
    counts = trained.part, trained.num_tensors, trained.num_params, trained.num_changed
    assert counts == ("language", 2, 20, 1)
    start = (before**2 + masters["model.layers.bias"].norm() ** 2).sqrt()
    assert trained.relative_change == pytest.approx((0.5 * before / start).item(), rel=1e-5)
    frozen = {(row.part, row.num_changed) for row in rows if not row.is_trained}
    assert frozen == {("vision", 0), ("language", 0)}
    with torch.no_grad():
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        model.visual["blocks"].weight.view(bits)[2, 1] ^= 1
    with pytest.raises(RuntimeError, match="1 of 2 frozen tensors of vision changed"):
        check_param_changes(audit.compute_changes(masters))


def test_untrained_part_is_explained():
    _, masters, audit = make_audit(torch.float32)
    with pytest.raises(UserError, match=r"training did not change the 2[\s\S]*learning_rate"):
        check_param_changes(audit.compute_changes(masters))
    masters["model.layers.weight"].mul_(0.99)  # weight decay
    with pytest.raises(UserError, match=r"no gradient reached the 2 trainable tensors of language"):
        check_param_changes(audit.compute_changes({"model.norm.weight"}))


def test_change_outside_the_sample_is_detected():
    masters = {"model.embed_tokens.weight": torch.zeros(2 * SAMPLE_SIZE + 1)}
    audit = ParamAudit(nn.Module(), masters)
    masters["model.embed_tokens.weight"][1] = 1e-30
    (row,) = audit.compute_changes(masters)
    assert (row.num_changed, row.relative_change) == (1, 0.0)


def load_start(folder: Path, start: str, tune_name: str) -> VisionLanguageModel:
    """Return a model with a new adapter, or with one that the run continues."""
    config = make_config("qwen2_vl")
    model = make_native_model(config, make_reference_model(config))
    if start == "new":
        configure_tuning(model, TuneSettings.model_validate(TUNE_SETTINGS[tune_name]), seed=0)
        return model
    folder.mkdir()
    write_random_adapter(folder, tune_name=tune_name)
    edit_adapter_config(folder, use_rslora=start == "rank-stabilized")
    load_adapter(model, folder)
    return model


def merge_parts(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """Return all weights of each part in one vector, after the adapters are merged."""
    merged = copy.deepcopy(model)
    merge_adapters(merged)
    weights: dict[str, list[torch.Tensor]] = {}
    for name, parameter in merged.named_parameters():
        weights.setdefault(get_part(name), []).append(parameter.detach().double().flatten())
    return {part: torch.cat(vectors) for part, vectors in weights.items()}


@pytest.mark.parametrize("start", ["new", "continued", "rank-stabilized"])
@pytest.mark.parametrize("tune_name", TUNE_SETTINGS)
def test_change_of_adapters_is_that_of_the_merged_weights(tmp_path, tune_name, start):
    model = load_start(tmp_path / "adapter", start, tune_name)
    factors = [one for _, _, adapter in iter_adapters(model) for one in adapter.parameters()]
    masters = {}
    for name, parameter in model.named_parameters():
        if any(parameter is one for one in factors):
            masters[name] = parameter.detach()
    audit = ParamAudit(model, masters)
    before = merge_parts(model)
    base = copy.deepcopy(model)
    for _, linear, _ in iter_adapters(base):
        linear.adapter = None
    initial = merge_parts(base)
    unchanged = audit.compute_changes(set())
    assert [row.relative_change for row in unchanged] == pytest.approx([0] * len(unchanged))
    with torch.no_grad():
        for factor in factors:
            factor.add_(torch.randn(factor.shape), alpha=0.01)
    after = merge_parts(model)
    rows = audit.compute_changes(masters)
    trained = {row.part: row.relative_change for row in rows if row.is_trained}
    expected = {}
    for part in trained:
        change = (after[part] - before[part]).norm() / initial[part].norm()
        expected[part] = change.item()
    assert trained == pytest.approx(expected, rel=1e-4)
    assert min(trained.values()) > 1e-6
    assert {row.relative_change for row in rows if not row.is_trained} == {0.0}


@pytest.mark.parametrize("matrix_type", [Nf4Matrix, Int8Matrix])
def test_change_is_relative_to_dequantized_weights(matrix_type):
    linear = quantize_linear(make_group(inputs=64), matrix_type)
    linear.adapter = LoraLinear(linear, {"k_proj": LoraConfig(2, 6.0)}, 0.0)
    model = nn.Module()
    model.model = nn.ModuleDict({"layers": nn.ModuleDict({"qkv": linear})})
    path = "model.layers.qkv.adapter"
    masters = {f"{path}.{name}": p.detach() for name, p in linear.adapter.named_parameters()}
    audit = ParamAudit(model, masters)
    lora_A_RI, lora_B_OR = linear.adapter.factors()["k_proj"]
    nn.init.normal_(lora_A_RI)
    nn.init.normal_(lora_B_OR)
    rows = audit.compute_changes(masters)
    (trained,) = (row for row in rows if row.is_trained)
    base_norm = torch.cat([linear.weight.dequantize().flatten(), linear.bias]).norm()
    change = 3.0 * (lora_B_OR @ lora_A_RI).norm() / base_norm
    assert trained.relative_change == pytest.approx(change.item(), rel=1e-5)
