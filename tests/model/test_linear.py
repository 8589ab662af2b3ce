"""LoRA layers against finite differences and peft, and their number of operations."""

import pytest
import torch
from lora_fixtures import GROUP_WIDTHS, make_group
from torch import Tensor, nn

from finesight.model.linear import FusedLinear, LoraConfig, LoraLinear


def with_random_adapter(
    group: FusedLinear, layers: dict[str, LoraConfig], dropout: float = 0.0
) -> LoraLinear:
    adapter = LoraLinear(group, layers, dropout)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    group.adapter = adapter
    return adapter


@pytest.mark.parametrize("trains_input", [True, False])
def test_gradients_match_finite_differences(trains_input):
    group = make_group(dtype=torch.float64)
    layers = {"q_proj": LoraConfig(2, 3.0), "v_proj": LoraConfig(3, 1.0)}
    adapter = with_random_adapter(group, layers, dropout=0.3)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=trains_input)

    def outputs(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)  # The same mask each time.
        return group(x)

    assert torch.autograd.gradcheck(outputs, (x, *adapter.parameters()))


@torch.no_grad()
def test_dropout_applies_only_to_the_lora_branch():
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


def test_initial_values_of_an_adapter():
    """B is zero; A depends only on seed and name, and is uniform as in peft."""
    group = make_group(inputs=400)

    def make_adapter(
        *names: str, seed: int = 3, dtype: torch.dtype = torch.float32, layer: int = 0
    ) -> LoraLinear:
        adapter = LoraLinear(group, dict.fromkeys(names, LoraConfig(50, 16.0)), 0.0, dtype)
        adapter.reset_parameters(seed, f"model.layers.{layer}.self_attn.qkv_proj")
        return adapter

    x = torch.ones(2, 400)
    baseline = group(x)
    full = group.adapter = make_adapter(*GROUP_WIDTHS)
    assert all(map(torch.equal, group(x), baseline))
    v = full.factors()["v_proj"].lora_A.detach()
    assert torch.equal(make_adapter("v_proj", dtype=torch.bfloat16).lora_A, v.bfloat16())
    others = make_adapter("v_proj", seed=4), make_adapter("v_proj", layer=1), make_adapter("q_proj")
    assert not any(torch.equal(other.lora_A, v) for other in others)
    # Uniform on +-b: the standard deviation is b / sqrt(3).
    assert 0.0499 < float(v.abs().max()) <= 0.05
    assert float(v.std()) == pytest.approx(0.05 / 3**0.5, rel=0.02)
