"""LoRA layers against finite differences and peft, and their number of operations."""

from __future__ import annotations

import peft
import pytest
import torch
from lora_fixtures import GROUP_WIDTHS, make_group
from torch import Tensor, nn
from torch.profiler import profile

from finesight.model.linear import (
    FusedLinear,
    LoraConfig,
    LoraLinear,
    find_adaptable_layers,
    iter_adapters,
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


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize(
    "layers",
    [
        dict.fromkeys(GROUP_WIDTHS, LoraConfig(2, 3.0)),
        {"v_proj": LoraConfig(4, 8.0), "q_proj": LoraConfig(2, 1.0)},
    ],
    ids=["all", "some, of mixed ranks"],
)
@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6)], ids=["2-D", "3-D"])
def test_output_and_gradients_match_peft(
    layers: dict[str, LoraConfig], shape: tuple[int, ...]
) -> None:
    group = make_group(dtype=torch.float64)
    adapter = with_random_adapter(group, layers)
    twin = peft_twin(group, adapter)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    x_twin = x.detach().clone().requires_grad_()
    outputs, expected = group(x), twin(x_twin)
    sum((y.sin().sum() for y in outputs), torch.tensor(0.0)).backward()
    sum((y.sin().sum() for y in expected), torch.tensor(0.0)).backward()

    for found, wanted in zip(outputs, expected, strict=True):
        assert found.shape == wanted.shape
        assert relative(found, wanted) < 1e-12
    assert relative(x.grad, x_twin.grad) < 1e-12
    theirs = dict(twin.named_parameters())
    for name, band in adapter.slices.items():
        prefix = f"base_model.model.{name}"
        assert (
            relative(
                adapter.lora_A.grad[band.rank_slice], theirs[f"{prefix}.lora_A.default.weight"].grad
            )
            < 1e-12
        )
        assert (
            relative(adapter.lora_B[name].grad, theirs[f"{prefix}.lora_B.default.weight"].grad)
            < 1e-12
        )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("trains_input", [True, False])
def test_gradients_match_finite_differences(dropout: float, trains_input: bool) -> None:
    group = make_group(dtype=torch.float64)
    layers = {"q_proj": LoraConfig(2, 3.0), "v_proj": LoraConfig(3, 1.0)}
    adapter = with_random_adapter(group, layers, dropout)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=trains_input)

    def outputs(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)  # The same mask each time.
        return group(x)

    assert torch.autograd.gradcheck(outputs, (x, *adapter.parameters()))


def test_dropout_applies_only_to_the_lora_branch() -> None:
    group = make_group()
    with torch.no_grad():
        group.weight.zero_()
        group.bias.zero_()
    adapter = with_random_adapter(
        group, dict.fromkeys(GROUP_WIDTHS, LoraConfig(6, 6.0)), dropout=0.5
    )
    with torch.no_grad():
        adapter.lora_A.copy_(torch.eye(6).repeat(3, 1))
        for b_OR in adapter.lora_B.values():
            b_OR.copy_(torch.eye(6)[: len(b_OR)])
    x = torch.ones(64, 6)
    q, k, v = group(x)
    assert torch.equal(q[:, :3], k)
    assert torch.equal(q[:, :4], v)
    assert set(q.unique().tolist()) == {0.0, 2.0}
    group.eval()
    assert torch.equal(torch.cat(group(x), 1), torch.ones(64, 12))


def test_new_adapter_does_not_change_output() -> None:
    group = make_group()
    baseline = group(torch.ones(2, 6))
    full = LoraLinear(group, dict.fromkeys(GROUP_WIDTHS, LoraConfig(2, 16.0)), 0.0)
    full.reset_parameters(3, "model.layers.0.self_attn.qkv_proj")
    group.adapter = full
    for found, expected in zip(group(torch.ones(2, 6)), baseline, strict=True):
        assert torch.equal(found, expected)

    # Equal values if other layers are adapted as well, and in another dtype.
    alone = LoraLinear(group, {"v_proj": LoraConfig(2, 16.0)}, 0.0)
    alone.reset_parameters(3, "model.layers.0.self_attn.qkv_proj")
    assert torch.equal(alone.lora_A, full.factors()["v_proj"].lora_A)
    half = LoraLinear(group, {"v_proj": LoraConfig(2, 16.0)}, 0.0, torch.bfloat16)
    half.reset_parameters(3, "model.layers.0.self_attn.qkv_proj")
    assert torch.equal(half.lora_A, alone.lora_A.bfloat16())

    # Other values for another seed, layer or path.
    for seed, path in [(4, "model.layers.0.self_attn.qkv_proj"), (3, "model.layers.1.self_attn.x")]:
        alone.reset_parameters(seed, path)
        assert not torch.equal(alone.lora_A, full.factors()["v_proj"].lora_A)
    assert not torch.equal(full.factors()["q_proj"].lora_A, full.factors()["v_proj"].lora_A)


def test_lora_a_initialization_range() -> None:
    group = make_group({"o_proj": 3}, inputs=400)
    adapter = LoraLinear(group, {"o_proj": LoraConfig(50, 1.0)}, 0.0)
    adapter.reset_parameters(0, "model.layers.0.self_attn.o_proj")
    assert 0.0499 < float(adapter.lora_A.detach().abs().max()) <= 0.05
    # Standard deviation of the uniform distribution on +-b: b / sqrt(3).
    assert float(adapter.lora_A.detach().std()) == pytest.approx(0.05 / 3**0.5, rel=0.02)


def test_trainable_base_under_adapter_raises() -> None:
    group = make_group()
    with_random_adapter(group, {"q_proj": LoraConfig(2, 1.0)})
    group.weight.requires_grad_(True)
    with pytest.raises(AssertionError, match="base weight of an adapter must be frozen"):
        group(torch.ones(2, 6))


def test_num_ops_in_forward_and_backward() -> None:
    """Count operations on full activations.

    The fused linear computes one base matmul per layer, one for the stacked A and one per B,
    without copies.
    """
    group = make_group({"gate_proj": 8, "up_proj": 8})
    layers = dict.fromkeys(group.output_sizes, LoraConfig(2, 1.0))
    with_random_adapter(group, layers)
    x = torch.randn(5, 6, requires_grad=True)
    with profile() as forward:
        outputs = group(x)
    ones = [torch.ones(5, 8)] * 2
    with profile() as backward:
        inputs = [x, *group.adapter.parameters()]
        torch.autograd.grad(outputs, inputs, ones)
    products = ("aten::mm", "aten::addmm", "aten::addmm_")
    copies = ("aten::cat", "aten::copy_", "aten::add", "aten::add_", "aten::clone")

    def count(run: profile, names: tuple[str, ...]) -> int:
        return sum(event.count for event in run.key_averages() if event.key in names)

    assert count(forward, products) == 2 + 1 + 2
    # Each B: its own gradient and that of its input; A likewise; the base per layer.
    assert count(backward, products) == 2 * 2 + 2 + 2
    assert count(backward, copies) == 0


def test_layers_and_adapters_use_hub_names() -> None:
    model = nn.ModuleDict({"attn": nn.ModuleDict({"qkv_proj": make_group()})})
    assert list(find_adaptable_layers(model)) == ["attn.q_proj", "attn.k_proj", "attn.v_proj"]
    assert not list(iter_adapters(model))
    adapter = with_random_adapter(model["attn"]["qkv_proj"], {"k_proj": LoraConfig(1, 1.0)})
    assert [(path, a is adapter) for path, _, a in iter_adapters(model)] == [
        ("attn.qkv_proj", True)
    ]
