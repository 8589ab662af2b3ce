"""Tests of Muon: orthogonal steps, matrix by matrix."""

import pytest
import torch
from case_files import load_cases
from tiny_model import create_tiny_model
from torch import Tensor, nn

from finesight.model.linear import stacked_row_counts
from finesight.model.trainable import configure_tuning
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.settings.config import TrainSettings, TuneSettings
from finesight.train.master_weight_optimizer import MasterWeightOptimizer
from finesight.train.optim.muon import update
from finesight.train.optim.muon.update import ADAMW_RMS, Muon, newton_schulz

CASES = load_cases("muon")

QKV, MATRIX = "visual.blocks.0.attn.qkv.weight", "model.layers.0.mlp.down_proj.weight"
SHAPES = {
    QKV: (12, 4),
    "visual.blocks.0.norm1.weight": (6,),
    MATRIX: (5, 6),
    "model.layers.1.mlp.down_proj.weight": (5, 6),
    "model.embed_tokens.weight": (7, 6),
}


def make_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(s, generator=generator)) for name, s in SHAPES.items()}


def make_muon(
    named: dict[str, nn.Parameter],
    row_counts: dict[str, tuple[int, ...]] | None = None,
    **changes: object,
) -> MasterWeightOptimizer:
    given = {"optimizer": "muon", "learning_rate": 0.01, **changes}
    return MasterWeightOptimizer(named, TrainSettings.model_validate(given), row_counts or {})


def take_step(masters: MasterWeightOptimizer, named: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    terms = [(p * torch.randn(p.shape, generator=generator)).sum() for p in named.values()]
    torch.stack(terms).sum().backward()
    masters.step(1.0, masters.grad_norm())


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 20), (4, 30, 6)])
def test_update_is_approximately_orthogonal(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    y = newton_schulz(x)
    lengths = torch.linalg.svdvals(y)
    assert 0.6 < lengths.min() <= lengths.max() < 1.3
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    along = (y * (u @ vt)).sum((1, 2)) / min(shape[1:])
    assert (along > 0.8).all(), "the directions are those of the matrix itself"
    assert not newton_schulz(torch.zeros(shape)).any()


def take_reference_steps(
    master: Tensor, grads: list[Tensor], learning_rate: float, decay: float
) -> Tensor:
    """The published rule, one matrix at a time."""
    momentum = torch.zeros_like(master)
    for grad in grads:
        momentum = 0.95 * momentum + 0.05 * grad
        changed = newton_schulz((0.05 * grad + 0.95 * momentum)[None])[0]
        master = (
            master * (1 - learning_rate * decay)
            - learning_rate * ADAMW_RMS * max(master.shape) ** 0.5 * changed
        )
    return master


@pytest.mark.parametrize("most", [1 << 26, 30, 1])
def test_stacked_steps_match_single_matrices(monkeypatch, most):
    """The number of matrices in a stack does not matter."""
    monkeypatch.setattr(update, "MAX_STACK_ELEMENTS", most)
    generator = torch.Generator().manual_seed(2)
    shapes = [(4, 6), (4, 6), (9, 2)]
    masters, *grads = (
        [torch.randn(shape, generator=generator) for shape in shapes] for _ in range(4)
    )
    names = [f"model.layers.{number}.mlp.down_proj.weight" for number in range(3)]
    named = {name: nn.Parameter(one.clone()) for name, one in zip(names, masters, strict=True)}
    muon = make_muon(named, learning_rate=0.1, weight_decay=0.5, max_grad_norm=None)
    for of_step in grads:
        for name, grad in zip(names, of_step, strict=True):
            named[name].grad = 4 * grad
        muon.step(1.0, muon.grad_norm(), loss_scale=4.0)
    for name, master, of_matrix in zip(names, masters, zip(*grads, strict=True), strict=True):
        expected = take_reference_steps(master, [*of_matrix], 0.1, 0.5)
        torch.testing.assert_close(named[name].detach(), expected)


@pytest.mark.gpu
def test_cuda_graph_steps_match_eager_steps():
    generator = torch.Generator("cuda").manual_seed(4)
    shapes = [(64, 96), (64, 96), (128, 64)]
    names = [f"model.layers.{number}.mlp.down_proj.weight" for number in range(3)]
    start, *grads = (
        [torch.randn(shape, device="cuda", generator=generator) for shape in shapes]
        for _ in range(6)
    )
    changed = []
    for recorded in (True, False):
        named = {name: nn.Parameter(one.clone()) for name, one in zip(names, start, strict=True)}
        masters = make_muon(named, learning_rate=0.1, weight_decay=0.5, max_grad_norm=None)
        muon = masters.param_groups[0].optimizer
        assert isinstance(muon, Muon)
        for of_step, lr_factor in zip(grads, (1, 2, 3, 2, 1), strict=True):
            for name, grad in zip(names, of_step, strict=True):
                named[name].grad = grad.clone()
            muon.graphs = muon.graphs if recorded else None
            masters.step(lr_factor, masters.grad_norm())
        assert len(muon.graphs or ()) == recorded
        changed.append((muon.master_weights.params_E, muon.momentum_E))
    for one, other in zip(*changed, strict=True):
        assert torch.equal(one, other)


def test_fused_layers_step_like_separate_layers():
    stacked, apart = make_parameters(), make_parameters()
    names = [f"visual.blocks.0.attn.{number}.weight" for number in range(3)]
    pieces = apart.pop(QKV).detach().split(4)
    apart |= {name: nn.Parameter(p.clone()) for name, p in zip(names, pieces, strict=True)}
    grad = torch.randn((12, 4), generator=torch.Generator().manual_seed(3))
    (stacked[QKV] * grad).sum().backward()
    (torch.cat([apart[name] for name in names]) * grad).sum().backward()
    for named, row_counts in ((stacked, {QKV: (4, 4, 4)}), (apart, {})):
        masters = make_muon(named, row_counts, max_grad_norm=None)
        masters.step(1.0, masters.grad_norm())
    found = torch.cat([apart[name].detach() for name in names])
    torch.testing.assert_close(stacked[QKV].detach(), found)


def test_fused_layers_of_model_are_separated(tmp_path):
    """This includes the ranks of their adapters."""
    folder = ModelFolder(create_tiny_model(tmp_path / "tiny"))
    model = load_model(folder, torch.float32, torch.device("cpu"))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    rows = stacked_row_counts(model)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert rows[name] == (64, 32, 32)
    assert all(sum(of) == shapes[key][0] for key, of in rows.items())
    muon = make_muon({name: model.get_parameter(name)}, rows).param_groups[0].optimizer
    assert isinstance(muon, Muon)
    assert {tuple(view.shape) for views in muon.stacks for view in views} == {(64, 64), (32, 64)}
    tune = TuneSettings.model_validate({"language": "lora", "lora": {"rank": 4}})
    configure_tuning(model, tune, seed=0)
    assert stacked_row_counts(model)[name.replace("weight", "adapter.lora_A")] == (4, 4, 4)


def test_stacked_experts_step_like_separate_matrices():
    stack = "model.layers.0.mlp.experts.down_proj"
    generator = torch.Generator().manual_seed(3)
    start, grad = (torch.randn((3, 4, 6), generator=generator) for _ in range(2))
    named = {MATRIX: make_parameters()[MATRIX], stack: nn.Parameter(start.clone())}
    masters = make_muon(named, max_grad_norm=None, weight_decay=0.5)
    ((named[stack] * grad).sum() + named[MATRIX].sum()).backward()
    masters.step(1.0, masters.grad_norm())
    names = {"num_steps", f"momentum.{MATRIX}", f"momentum.{stack}"}
    assert masters.optimizer_state().keys() == names
    for changed, one, g in zip(named[stack].detach(), start, grad, strict=True):
        torch.testing.assert_close(changed, take_reference_steps(one, [g], 0.01, 0.5))


def test_non_matrix_parameters_use_adamw():
    named = make_parameters()
    for name in CASES["test_non_matrix_parameters_use_adamw"]:
        named[name] = nn.Parameter(torch.ones((4, 3, 2, 2) if "proj" in name else (4, 6)))
    masters = make_muon(named)
    take_step(masters, named, 5)
    moments = masters.optimizer_state()
    matrices = {name for name in SHAPES if "qkv" in name or "down_proj" in name}
    assert {name for name in named if f"momentum.{name}" in moments} == matrices
    for prefix in ("exp_avg", "exp_avg_sq"):
        assert {name for name in named if f"{prefix}.{name}" in moments} == set(named) - matrices
    assert masters.params_with_grad() == set(named)
