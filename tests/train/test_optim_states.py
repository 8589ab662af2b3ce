"""Master weights: exact restoration and rounding. Muon: orthogonal steps, matrix by matrix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from case_files import load_cases
from tiny_model import create_tiny_model
from torch import Tensor, nn

from finesight.config import TrainSettings, TuneSettings
from finesight.model.linear import stacked_row_counts
from finesight.model.trainable import configure_tuning
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.train.optim_states import (
    ADAMW_RMS,
    MatrixSlice,
    Muon,
    SplitBf16Master,
    break_bf16_ties,
    merge_fp32,
    newton_schulz,
    split_fp32,
)
from finesight.train.optimizer import MasterWeightOptimizer

CASES = load_cases("optim_states")

NAMES = {
    "visual.blocks.0.attn.qkv.weight": (12, 4),
    "visual.blocks.0.norm1.weight": (6,),
    "model.layers.0.mlp.down_proj.weight": (5, 6),
    "model.layers.1.mlp.down_proj.weight": (5, 6),
    "model.embed_tokens.weight": (7, 6),
}


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in NAMES.items()
    }


def settings(**changes: object) -> TrainSettings:
    return TrainSettings.model_validate({"optimizer": "muon", "learning_rate": 0.01, **changes})


def take(masters: MasterWeightOptimizer, named: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    terms = [
        (p * torch.randn(p.shape, generator=generator).to(p.device)).sum() for p in named.values()
    ]
    torch.stack(terms).sum().backward()
    masters.step(1.0, masters.grad_norm())


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 20), (4, 30, 6)])
def test_update_is_approximately_orthogonal(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    y = newton_schulz(x)
    lengths = torch.linalg.svdvals(y)
    assert lengths.min() > 0.6
    assert lengths.max() < 1.3
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    along = (y * (u @ vt)).sum((1, 2)) / min(shape[1:])
    assert (along > 0.8).all(), "the directions are those of the matrix itself"


def test_weak_directions_get_equal_updates() -> None:
    generator = torch.Generator().manual_seed(6)
    u, v = (torch.linalg.qr(torch.randn(16, 4, generator=generator))[0] for _ in range(2))
    changed = newton_schulz((u * torch.tensor([1.0, 0.3, 0.1, 0.03]) @ v.T)[None])[0]
    along = (u * (changed @ v)).sum(0)
    assert along.min() > 0.6
    assert along.max() < 1.3


def test_zero_gradient_gives_zero_update() -> None:
    assert not newton_schulz(torch.zeros(2, 4, 3)).any()


def reference(master: Tensor, grads: list[Tensor], learning_rate: float, decay: float) -> Tensor:
    """The published rule, one matrix at a time."""
    momentum = torch.zeros_like(master)
    for grad in grads:
        momentum = 0.95 * momentum + 0.05 * grad
        ahead = 0.05 * grad + 0.95 * momentum
        changed = newton_schulz(ahead[None])[0]
        master = (
            master * (1 - learning_rate * decay)
            - learning_rate * ADAMW_RMS * max(master.shape) ** 0.5 * changed
        )
    return master


@pytest.mark.parametrize("most", [1 << 26, 30, 1])
def test_stacked_steps_match_single_matrices(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """However many of one shape are stacked at a time."""
    monkeypatch.setattr("finesight.train.optim_states.MAX_STACK_ELEMENTS", most)
    generator = torch.Generator().manual_seed(2)
    shapes = [(4, 6), (4, 6), (9, 2)]
    masters = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]
    flat = torch.cat([master.flatten() for master in masters])
    locations = [slice(0, 24), slice(24, 48), slice(48, 66)]
    grad_E = torch.zeros_like(flat)
    muon = Muon(
        SplitBf16Master(flat),
        grad_E,
        [MatrixSlice(p, *shape) for p, shape in zip(locations, shapes, strict=True)],
    )
    for of_step in grads:
        grad_E.copy_(torch.cat([grad.flatten() for grad in of_step]))
        muon.step(0.1, 0.5, torch.ones(()))
    for location, master, number in zip(locations, masters, range(3), strict=True):
        expected = reference(master, [of_step[number] for of_step in grads], 0.1, 0.5)
        torch.testing.assert_close(flat[location].view(master.shape), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph_steps_match_eager_steps() -> None:
    generator = torch.Generator("cuda").manual_seed(4)
    shapes = [(64, 96), (64, 96), (128, 64)]
    locations = [slice(0, 6144), slice(6144, 12288), slice(12288, 20480)]
    matrices = [MatrixSlice(p, *shape) for p, shape in zip(locations, shapes, strict=True)]
    start = torch.randn(20480, device="cuda", generator=generator)
    grads = [torch.randn(20480, device="cuda", generator=generator) for _ in range(5)]
    changed = []
    for recorded in (True, False):
        master_E, grad_E = start.clone(), torch.zeros_like(start)
        muon = Muon(SplitBf16Master(master_E), grad_E, matrices)
        for grad, learning_rate in zip(grads, (0.1, 0.2, 0.3, 0.2, 0.1), strict=True):
            grad_E.copy_(grad)
            muon.is_warmed_up &= recorded
            muon.step(learning_rate, 0.5, torch.ones((), device="cuda"))
        assert (muon.graph is not None) is recorded
        changed.append((master_E, muon.momentum_E))
    for one, other in zip(*changed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_skipped_step_changes_no_state(dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(5)
    grads = torch.randn(4, 6144, device="cuda", generator=generator)
    changed = []
    for broken in (True, False):
        masters = SplitBf16Master(torch.ones(6144, device="cuda", dtype=dtype))
        grad_E = torch.zeros(6144, device="cuda")
        muon = Muon(masters, grad_E, [MatrixSlice(slice(0, 6144), 64, 96)])
        for grad in grads:
            if broken:
                grad_E.fill_(torch.nan)
                muon.step(0.1, 0.5, torch.full((), torch.nan, device="cuda"))
            grad_E.copy_(grad)
            muon.step(0.1, 0.5, torch.ones((), device="cuda"))
        changed.append((masters.read(slice(0, 6144)), muon.momentum_E))
    for one, other in zip(*changed, strict=True):
        assert torch.equal(one, other)


def test_fused_layers_step_like_separate_layers() -> None:
    stacked, apart = parameters(), parameters()
    name = "visual.blocks.0.attn.qkv.weight"
    pieces = apart.pop(name).detach().split(4)
    apart |= {
        f"visual.blocks.0.attn.{n}.weight": nn.Parameter(p.clone()) for n, p in enumerate(pieces)
    }
    one = MasterWeightOptimizer(stacked, settings(max_grad_norm=None), {name: (4, 4, 4)})
    other = MasterWeightOptimizer(apart, settings(max_grad_norm=None))
    grad = torch.randn((12, 4), generator=torch.Generator().manual_seed(3))
    (stacked[name] * grad).sum().backward()
    for n, piece in enumerate(grad.split(4)):
        (apart[f"visual.blocks.0.attn.{n}.weight"] * piece).sum().backward()
    for masters in (one, other):
        masters.step(1.0, masters.grad_norm())
    found = torch.cat([apart[f"visual.blocks.0.attn.{n}.weight"].detach() for n in range(3)])
    torch.testing.assert_close(stacked[name].detach(), found)


def test_stacked_experts_step_like_separate_matrices() -> None:
    matrix, stack = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.experts.down_proj"
    generator = torch.Generator().manual_seed(3)
    start, grad = (torch.randn((3, 4, 6), generator=generator) for _ in range(2))
    named = {matrix: parameters()[matrix], stack: nn.Parameter(start.clone())}
    masters = MasterWeightOptimizer(named, settings(max_grad_norm=None, weight_decay=0.5))
    ((named[stack] * grad).sum() + named[matrix].sum()).backward()
    masters.step(1.0, masters.grad_norm())
    assert masters.optimizer_state().keys() == {
        "num_steps",
        f"momentum.{matrix}",
        f"momentum.{stack}",
    }
    for changed, one, g in zip(named[stack].detach(), start, grad, strict=True):
        torch.testing.assert_close(changed, reference(one, [g], 0.01, 0.5))


@pytest.mark.parametrize("table", CASES["test_non_matrix_parameters_use_adamw"])
def test_non_matrix_parameters_use_adamw(table: str) -> None:
    shape = (4, 3, 2, 2) if "proj" in table else (4, 6)
    named = {table: nn.Parameter(torch.ones(shape))}
    masters = MasterWeightOptimizer(named, settings())
    take(masters, named, 5)
    assert f"exp_avg_sq.{table}" in masters.optimizer_state()


def test_vectors_and_embeddings_use_adamw() -> None:
    named = parameters()
    masters = MasterWeightOptimizer(named, settings())
    take(masters, named, 5)
    moments = masters.optimizer_state()
    assert {name for name in NAMES if f"exp_avg_sq.{name}" in moments} == {
        "visual.blocks.0.norm1.weight",
        "model.embed_tokens.weight",
    }
    assert {
        name for name in NAMES if f"exp_avg.{name}" in moments or f"momentum.{name}" in moments
    } == set(NAMES)
    assert masters.params_with_grad() == set(NAMES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph_uses_loaded_state() -> None:
    """A CUDA graph stores addresses, so a new state tensor would be ignored."""
    named, again = (
        {name: nn.Parameter(p.detach().cuda()) for name, p in parameters().items()}
        for _ in range(2)
    )
    masters, others = (
        MasterWeightOptimizer(named, settings()),
        MasterWeightOptimizer(again, settings()),
    )
    for seed in range(3):
        take(masters, named, seed)
        take(others, again, 10 + seed)
    steps = [group.optimizer for group in others.param_groups if isinstance(group.optimizer, Muon)]
    assert steps
    assert all(own.graph for own in steps)
    others.load_state(
        {name: value.clone() for name, value in masters.master_weights().items()},
        {name: value.clone() for name, value in masters.optimizer_state().items()},
    )
    take(masters, named, 9)
    take(others, again, 9)
    for name, parameter in named.items():
        assert torch.equal(parameter, again[name]), name


def test_fused_layers_of_model_are_separated(tmp_path: Path) -> None:
    """Those of the weights, and the ranks of their adapters."""
    model = load_model(
        ModelFolder(create_tiny_model(tmp_path / "tiny")), torch.float32, torch.device("cpu")
    )
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    rows = stacked_row_counts(model)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert rows[name] == (64, 32, 32)
    assert all(sum(of) == shapes[key][0] for key, of in rows.items())
    masters = MasterWeightOptimizer({name: model.get_parameter(name)}, settings(), rows)
    muon = masters.param_groups[0].optimizer
    assert isinstance(muon, Muon)
    assert {tuple(view.shape) for views in muon.stacks for view in views} == {(64, 64), (32, 64)}
    configure_tuning(
        model, TuneSettings.model_validate({"language": "lora", "lora": {"rank": 4}}), seed=0
    )
    assert stacked_row_counts(model)[name.replace("weight", "adapter.lora_A")] == (4, 4, 4)


TYPES = [torch.float32, torch.bfloat16, torch.float16]


def from_bits(*bits: int) -> Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def halves(wide_N: Tensor) -> tuple[Tensor, Tensor]:
    narrow_N = torch.empty(len(wide_N), dtype=torch.bfloat16)
    rest_N = torch.empty(len(wide_N), dtype=torch.int16)
    split_fp32(wide_N, narrow_N, rest_N)
    return narrow_N, rest_N


def round_to_dtype(wide_N: Tensor, dtype: torch.dtype) -> Tensor:
    return halves(wide_N)[0] if dtype == torch.bfloat16 else wide_N.to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_split_roundtrip_for_any_bits() -> None:
    """Normal values, denormals, infinities and NaN."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 18,), generator=generator).to(torch.int32)
    assert same_bits(merge_fp32(*halves(bits.view(torch.float32))), bits.view(torch.float32))


@pytest.mark.parametrize("sign", [0, 1 << 31], ids=["plus", "minus"])
@pytest.mark.parametrize(("bits", "upper"), CASES["test_upper_half_rounds_to_nearest"])
def test_upper_half_rounds_to_nearest(bits: int, upper: int, sign: int) -> None:
    wide_N = from_bits(bits | sign)
    narrow_N, rest_N = halves(wide_N)
    assert narrow_N.view(torch.int16).item() & 0xFFFF == upper | sign >> 16
    assert same_bits(merge_fp32(narrow_N, rest_N), wide_N)


def test_rounding_is_half_to_even_except_ties() -> None:
    wide_N = torch.randn(1 << 18, generator=torch.Generator().manual_seed(1))
    wide_N[:1000] = from_bits(*(0x3F808000 + 0x10000 * n for n in range(1000)))
    narrow_N, _ = halves(wide_N)
    middle_N = wide_N.view(torch.int32) & 0xFFFF == 0x8000
    assert int(middle_N.sum()) >= 1000
    assert torch.equal(narrow_N[~middle_N], wide_N.bfloat16()[~middle_N])
    assert int((narrow_N != wide_N.bfloat16()).sum()) >= 500


def test_exported_value_rounds_to_compute_value() -> None:
    wide_N = torch.randn(1 << 16, generator=torch.Generator().manual_seed(2))
    wide_N[:1000] = from_bits(*(0x3F808000 + 0x10000 * n for n in range(1000)))
    wide_N[500:1000] *= -1
    published_N = break_bf16_ties(wide_N)
    assert torch.equal(published_N.bfloat16(), halves(wide_N)[0])
    torch.testing.assert_close(published_N, wide_N, rtol=2**-23, atol=0)
    assert int((published_N != wide_N).sum()) < 1010


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_small_updates_match_fp32(dtype: torch.dtype) -> None:
    """Each far below what the model's own type can hold."""
    generator = torch.Generator().manual_seed(3)
    start_E = (torch.randn(3000, generator=generator) * 1e-3).to(dtype)
    values, basic_E = SplitBf16Master(start_E.clone()), start_E.float()
    for _ in range(300):
        change_E = torch.randn(3000, generator=generator) * 1e-6
        basic_E.add_(change_E).mul_(0.9999)
        for location in (slice(0, 1000), slice(1000, 3000)):
            own_N = values.read(location)
            own_N.add_(change_E[location]).mul_(0.9999)
            values.write(own_N, location)
    full = slice(0, 3000)
    assert same_bits(values.read(full), basic_E)
    assert torch.equal(round_to_dtype(basic_E, dtype), values.params_E)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_loaded_values_are_exact(dtype: torch.dtype) -> None:
    values = SplitBf16Master(torch.zeros(10, dtype=dtype))
    given_N = torch.randn(6, generator=torch.Generator().manual_seed(4))
    values.load(given_N, slice(2, 8))
    assert same_bits(values.read(slice(2, 8)), given_N)
    assert torch.equal(values.params_E[2:8], round_to_dtype(given_N, dtype))
    assert not values.params_E[:2].any()
    assert not values.params_E[8:].any()
