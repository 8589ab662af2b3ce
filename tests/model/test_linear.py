"""LoRA layers against finite differences and peft, and their number of operations."""

from __future__ import annotations

import peft
import pytest
import torch
from each_value import each
from hf_reference import max_relative_error
from lora_fixtures import GROUP_WIDTHS, make_group
from torch import Tensor, nn

from finesight.model.linear import (
    FusedLinear,
    LoraConfig,
    LoraLinear,
)


def with_random_adapter(
    group: FusedLinear, layers: dict[str, LoraConfig], dropout: float = 0.0
) -> LoraLinear:
    adapter = LoraLinear(group, layers, dropout)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    group.adapter = adapter
    return adapter


class SeparateLayers(nn.Module):
    """Separate linear layers, as in transformers."""

    def __init__(self, group: FusedLinear) -> None:
        super().__init__()
        rows = group.weight.split(list(group.output_sizes.values()))
        biases = group.bias.split(list(group.output_sizes.values()))
        for name, weight_OI, bias_O in zip(group.output_sizes, rows, biases, strict=True):
            layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0])
            layer.weight = nn.Parameter(weight_OI.clone())
            layer.bias = nn.Parameter(bias_O.clone())
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.children())


def peft_twin(group: FusedLinear, adapter: LoraLinear) -> nn.Module:
    config = peft.LoraConfig(
        r=max(low.rank for low in adapter.configs.values()),
        target_modules=list(adapter.configs),
        rank_pattern={name: low.rank for name, low in adapter.configs.items()},
        alpha_pattern={name: low.alpha for name, low in adapter.configs.items()},
    )
    twin = peft.get_peft_model(SeparateLayers(group), config).to(group.weight.dtype)
    own = dict(twin.named_parameters())
    with torch.no_grad():
        for name, (a_RI, b_OR) in adapter.factors().items():
            own[f"base_model.model.{name}.lora_A.default.weight"].copy_(a_RI)
            own[f"base_model.model.{name}.lora_B.default.weight"].copy_(b_OR)
    return twin


@each(
    "layers",
    [
        dict.fromkeys(GROUP_WIDTHS, LoraConfig(2, 3.0)),
        {"v_proj": LoraConfig(4, 8.0), "q_proj": LoraConfig(2, 1.0)},
    ],
)
@each("shape", [(7, 6), (2, 3, 6)])
def test_output_and_gradients_match_peft(
    layers: dict[str, LoraConfig], shape: tuple[int, ...]
) -> None:
    group = make_group(dtype=torch.float64)
    adapter = with_random_adapter(group, layers)
    twin = peft_twin(group, adapter)
    x = torch.randn(shape, dtype=torch.float64)
    results = []
    for layer in (group, twin):
        x = x.detach().requires_grad_()
        outputs = layer(x)
        sum((y.sin().sum() for y in outputs), torch.tensor(0.0)).backward()
        results.append([*outputs, x.grad])
    theirs = dict(twin.named_parameters())
    for name, band in adapter.slices.items():
        prefix = f"base_model.model.{name}"
        results[0] += [adapter.lora_A.grad[band.rank_slice], adapter.lora_B[name].grad]
        results[1] += [theirs[f"{prefix}.lora_{side}.default.weight"].grad for side in "AB"]
    for found, expected in zip(*results, strict=True):
        assert found.shape == expected.shape
        assert max_relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("trains_input", [True, False])
def test_gradients_match_finite_differences(trains_input: bool) -> None:
    group = make_group(dtype=torch.float64)
    layers = {"q_proj": LoraConfig(2, 3.0), "v_proj": LoraConfig(3, 1.0)}
    adapter = with_random_adapter(group, layers, dropout=0.3)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=trains_input)

    def outputs(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)  # The same mask each time.
        return group(x)

    assert torch.autograd.gradcheck(outputs, (x, *adapter.parameters()))


@torch.no_grad()
def test_dropout_applies_only_to_the_lora_branch() -> None:
    group = make_group()
    group.weight.zero_()
    group.bias.zero_()
    layers = dict.fromkeys(GROUP_WIDTHS, LoraConfig(6, 6.0))
    adapter = with_random_adapter(group, layers, dropout=0.5)
    adapter.lora_A.copy_(torch.eye(6).repeat(3, 1))
    for b_OR in adapter.lora_B.values():
        b_OR.copy_(torch.eye(6)[: len(b_OR)])
    x = torch.ones(64, 6)
    q, k, v = group(x)
    assert torch.equal(q[:, :3], k)
    assert torch.equal(q[:, :4], v)
    assert set(q.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(torch.cat(group.eval()(x), 1), torch.ones(64, 12))


def test_initial_values_of_an_adapter() -> None:
    """They depend on seed and path, and not on dtype or other layers; B is zero."""
    group, path = make_group(inputs=400), "model.layers.0.self_attn.qkv_proj"

    def make_adapter(
        *names: str, seed: int = 3, path: str = path, dtype: torch.dtype = torch.float32
    ) -> LoraLinear:
        adapter = LoraLinear(group, dict.fromkeys(names, LoraConfig(50, 16.0)), 0.0, dtype)
        adapter.reset_parameters(seed, path)
        return adapter

    x = torch.ones(2, 400)
    baseline = group(x)
    full = group.adapter = make_adapter(*GROUP_WIDTHS)
    assert all(map(torch.equal, group(x), baseline))
    q, v = (full.factors()[name].lora_A.detach() for name in ("q_proj", "v_proj"))
    assert torch.equal(make_adapter("v_proj").lora_A, v)
    assert torch.equal(make_adapter("v_proj", dtype=torch.bfloat16).lora_A, v.bfloat16())
    for other in (
        q,
        make_adapter("v_proj", seed=4).lora_A,
        make_adapter("v_proj", path="x").lora_A,
    ):
        assert not torch.equal(other, v)
    # Uniform on +-b as in peft: the standard deviation is b / sqrt(3).
    assert 0.0499 < float(v.abs().max()) <= 0.05
    assert float(v.std()) == pytest.approx(0.05 / 3**0.5, rel=0.02)
