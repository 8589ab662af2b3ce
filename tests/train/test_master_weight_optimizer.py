"""Optimizers with fp32 master weights: AdamW, 8-bit AdamW, accumulation, scaling and state."""

import gc
import math
import mmap
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from finesight.components import NoSettings
from finesight.errors import UserError
from finesight.host_memory import MIN_FORK_BLOCK_BYTES
from finesight.model.kernels.param_tiles import BLOCK_SIZE
from finesight.model.quant.nf4 import import_bitsandbytes
from finesight.settings.config import TrainSettings
from finesight.train import master_weight_optimizer
from finesight.train.master_weight_optimizer import (
    LossScaler,
    LRSchedule,
    MasterWeightOptimizer,
    ParamGroup,
    break_bf16_ties,
    merge_fp32,
    resolve_steps,
    split_fp32,
)
from finesight.train.optim.adamw import update
from finesight.train.optim.adamw.update import AdamW
from finesight.train.optim.adamw_8bit.update import (
    AdamW8bit,
    OptimState8bit,
    create_dynamic_map,
)

EXPERTS = "model.layers.0.mlp.experts.down_proj"
MATRIX, OTHER = "model.layers.0.mlp.down_proj.weight", "visual.blocks.0.attn.qkv.weight"
VECTOR, BIAS = "visual.blocks.0.norm1.weight", "model.layers.0.mlp.down_proj.bias"
SHAPES = {
    MATRIX: (33, 50),
    OTHER: (64, 64),
    EXPERTS: (3, 20, 30),
    BIAS: (33,),
    VECTOR: (6,),
    "model.embed_tokens.weight": (70, 60),
}
OPTIMIZERS = ["adamw", "adamw_8bit", "muon"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def make_optimizer(
    named: dict[str, nn.Parameter], kind: str = "adamw_8bit", **changes: object
) -> MasterWeightOptimizer:
    given = {"optimizer": kind, "learning_rate": 1e-2, "weight_decay": 0.1, **changes}
    return MasterWeightOptimizer(named, TrainSettings.model_validate(given))


def make_parameters(
    dtype: torch.dtype = torch.float32, names: Iterable[str] = SHAPES, device: str = "cpu"
) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: nn.Parameter(values[name].to(device, dtype)) for name in names}


def backward(
    named: dict[str, nn.Parameter], seed: int, scale: float = 1.0, without: str = ""
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {n: torch.randn(p.shape, generator=generator).to(p) for n, p in named.items()}
    drawn.pop(without, None)
    (torch.stack([(named[n] * g).sum() for n, g in drawn.items()]).sum() * scale).backward()
    return drawn


def take_step(masters: MasterWeightOptimizer, named: dict[str, nn.Parameter], seed: int) -> None:
    backward(named, seed)
    masters.step(0.5, masters.grad_norm())


def read_state(masters: MasterWeightOptimizer) -> dict[str, Tensor]:
    state = {**masters.master_weights(), **masters.optimizer_state()}
    return {name: value.clone() for name, value in state.items()}


def assert_equal_states(one: MasterWeightOptimizer, other: MasterWeightOptimizer) -> None:
    found, expected = read_state(one), read_state(other)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_fp32_matches_torch_adamw_with_groups_and_clipping():
    """The loss scale is removed before clipping."""
    named, baseline = make_parameters(), make_parameters()
    learning_rates = {"visual": 1e-3, "model.layers": 1e-2, "model.embed": 3e-3}
    groups = [
        {
            "params": [parameter],
            "lr": 0.5 * next(lr for start, lr in learning_rates.items() if name.startswith(start)),
            "weight_decay": 0.1 if parameter.dim() > 1 else 0.0,
        }
        for name, parameter in baseline.items()
    ]
    reference = torch.optim.AdamW(groups)
    learning_rate = {"default": 1e-2, "vision": 1e-3, "embeddings": 3e-3}
    masters = make_optimizer(named, "adamw", learning_rate=learning_rate, max_grad_norm=0.7)
    for seed in range(5):
        backward(baseline, seed)
        torch.nn.utils.clip_grad_norm_(baseline.values(), 0.7)
        reference.step()
        reference.zero_grad()
        backward(named, seed, scale=1024.0)
        masters.step(0.5, masters.grad_norm(), 1024.0)
    for name in SHAPES:
        torch.testing.assert_close(named[name].detach(), baseline[name].detach(), rtol=1e-6, atol=0)


@DEVICES
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("num_steps", [0, 1, 4])
@pytest.mark.parametrize(
    ("kind", "names"), [*((kind, SHAPES) for kind in OPTIMIZERS), ("muon", (MATRIX,))]
)
def test_state_resumes_bit_exactly(kind, names, dtype, num_steps, device):
    """This includes a parameter that ends within a block, and Muon without AdamW parameters.

    The optimizer that loads the state has taken other steps, whose CUDA graphs store addresses.
    """
    named, again = (make_parameters(dtype, names, device) for _ in range(2))
    masters, others = make_optimizer(named, kind), make_optimizer(again, kind)
    for seed in range(num_steps):
        take_step(masters, named, seed)
        take_step(others, again, 20 + seed)
    others.load_state(
        {name: value.clone() for name, value in masters.master_weights().items()},
        {name: value.clone() for name, value in masters.optimizer_state().items()},
    )
    for seed in range(10, 14):
        take_step(masters, named, seed)
        take_step(others, again, seed)
    assert_equal_states(others, masters)
    assert all(torch.equal(parameter, again[name]) for name, parameter in named.items())
    assert read_state(others)["num_steps"] == (0 if names == (MATRIX,) else num_steps + 4)


@DEVICES
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_nonfinite_step_leaves_state_unchanged(kind, dtype, wrong, device):
    named, again = (make_parameters(dtype, device=device) for _ in range(2))
    masters, without = make_optimizer(named, kind), make_optimizer(again, kind)
    for seed in range(3):
        take_step(masters, named, seed)
        take_step(without, again, seed)
        backward(named, 10 + seed)
        named[VECTOR].grad[0] = wrong
        masters.step(1.0, masters.grad_norm())
        assert masters.grad_norm() == 0
    assert_equal_states(masters, without)


def test_loss_scale_halves_on_overflow_and_recovers():
    scaler = LossScaler(is_enabled=True)
    assert not scaler.update(math.inf)
    assert not scaler.update(math.nan)
    assert (scaler.scale, scaler.num_skipped) == (LossScaler.INIT_SCALE / 4, 2)
    for _ in range(LossScaler.GROWTH_INTERVAL):
        assert scaler.update(1.0)
    assert scaler.scale == LossScaler.INIT_SCALE / 2
    other = LossScaler(is_enabled=True)
    other.load_state_dict(scaler.state_dict())
    assert other.state_dict() == scaler.state_dict()
    for _ in range(14):
        assert not scaler.update(math.nan)
    assert scaler.update(math.nan), "at the minimum scale, the optimizer skips the step"
    assert (scaler.scale, scaler.num_skipped) == (1.0, 16)
    assert LossScaler(is_enabled=False).update(math.inf)


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_master_weights_match_fp32_adamw(dtype, micro):
    """Over many steps of sizes from far below to far above what the model's type can hold."""
    generator, shapes = torch.Generator().manual_seed(0), {MATRIX: (40, 32), BIAS: (64,)}
    named = {
        name: nn.Parameter((torch.randn(shape, generator=generator) ** 3).to(dtype))
        for name, shape in shapes.items()
    }
    baseline = {name: nn.Parameter(p.detach().float()) for name, p in named.items()}
    masters = make_optimizer(named, "adamw", learning_rate=1e-3, max_grad_norm=None)
    groups = [
        {"params": [baseline[MATRIX]], "weight_decay": 0.1},
        {"params": [baseline[BIAS]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, foreach=False, fused=False)
    for step in range(120):
        factor = 10.0 ** (step % 7 - 4)
        total = {name: torch.zeros(shape) for name, shape in shapes.items()}
        for number in range(micro):
            if number:
                masters.accumulate_gradients()
            for name, gradient in backward(named, 10 * step + number).items():
                total[name] += gradient
        for name, gradient in total.items():
            baseline[name].grad = gradient
        for group in reference.param_groups:
            group["lr"] = 1e-3 * factor
        reference.step()
        masters.step(factor, masters.grad_norm())
    found = read_state(masters)
    for name, expected in baseline.items():
        assert torch.equal(found[name], expected.detach()), name
        state = reference.state[expected]
        assert torch.equal(found[f"exp_avg.{name}"], state["exp_avg"])
        assert torch.equal(found[f"exp_avg_sq.{name}"], state["exp_avg_sq"])
        equal = break_bf16_ties(expected.detach()) if dtype == torch.bfloat16 else expected.detach()
        assert torch.equal(named[name].detach(), equal.to(dtype))
        assert torch.equal(
            masters.master_weights(break_ties=True)[name].to(dtype), named[name].detach()
        )


@pytest.mark.parametrize("signed", [True, False])
def test_values_round_to_nearest_level_of_bitsandbytes(signed):
    levels = create_dynamic_map(signed)
    published = import_bitsandbytes("test").functional.create_dynamic_map(signed=signed)
    assert torch.equal(levels, published)
    values_E = torch.randn(3 * BLOCK_SIZE, generator=torch.Generator().manual_seed(0)) ** 3
    values_E = values_E if signed else values_E.abs()
    values_E[BLOCK_SIZE : 2 * BLOCK_SIZE] = 0
    full = slice(0, 3 * BLOCK_SIZE)
    moment = OptimState8bit(len(values_E), values_E.device, signed)
    assert not moment.read(full).any()
    moment.write(values_E, full)
    values_BN = values_E.view(-1, BLOCK_SIZE)
    scale_B1 = values_BN.abs().amax(1, keepdim=True)
    nearest_BN = (scale_B1[..., None] * levels - values_BN[..., None]).abs().amin(2)
    error_BN = (moment.read(full) - values_E).abs().view(-1, BLOCK_SIZE)
    # The smallest ones of a moment without a sign are not rounded to zero.
    large = values_BN.abs() > 1e-6 * scale_B1
    torch.testing.assert_close(error_BN[large], nearest_BN[large], rtol=1e-3, atol=1e-7)
    assert not moment.read(slice(BLOCK_SIZE, 2 * BLOCK_SIZE)).any()


def test_rare_gradient_gives_a_small_update():
    """Were its second moment rounded to zero, the next step would be far too long."""
    parameter = nn.Parameter(torch.zeros(1, BLOCK_SIZE))
    masters = make_optimizer(
        {MATRIX: parameter}, learning_rate=1e-3, weight_decay=0, max_grad_norm=None
    )
    for step in range(20):
        parameter.grad = torch.zeros(1, BLOCK_SIZE)
        parameter.grad[0, :2] = torch.tensor([1.0, 1e-4 if step == 0 else 0.0])
        masters.step(1.0, masters.grad_norm())
    master_E = masters.master_weights()[MATRIX].flatten()
    assert 0 < float(master_E[1].abs()) < 20e-3
    assert not master_E[2:].any()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_8bit_steps_are_close_to_adamw(dtype, monkeypatch):
    """Chunks of a step may begin and end within a parameter."""
    changes = []
    for kind, chunk in (("adamw", 1 << 20), ("adamw_8bit", 1 << 20), ("adamw_8bit", 512)):
        monkeypatch.setattr(update, "MAX_CHUNK_ELEMENTS", chunk)
        named = make_parameters(dtype)
        masters = make_optimizer(named, kind)
        start = read_state(masters)
        for seed in range(20):
            take_step(masters, named, seed)
        changes.append({name: v - start[name] for name, v in masters.master_weights().items()})
    for name in SHAPES:
        baseline, small, chunked = (changed[name] for changed in changes)
        assert torch.equal(small, chunked)
        error = float((small - baseline).norm() / baseline.norm())
        # Vectors and embeddings keep their moments in fp32.
        assert error == 0.0 if name not in (MATRIX, OTHER, EXPERTS) else 0.0 < error < 0.1, name
    group = next(g for g in masters.param_groups if g.param_slices[0].name == MATRIX)
    assert len(group.master_weights) == (7 + 8) * BLOCK_SIZE
    for padding in (slice(33 * 50, 7 * BLOCK_SIZE), slice(7 * BLOCK_SIZE + 1800, 15 * BLOCK_SIZE)):
        assert not group.master_weights.read(padding).any()


def test_optimizer_memory_is_released_with_the_run(monkeypatch):
    """A run in a long-lived process, such as a notebook, frees its memory."""
    monkeypatch.setattr(master_weight_optimizer, "LARGE_PARAM_ELEMENTS", 1)
    named = make_parameters(torch.bfloat16)
    masters = make_optimizer(named)
    backward(named, 1)
    alive = [weakref.ref(parameter) for parameter in named.values()]
    del masters, named
    gc.collect()
    assert [one() for one in alive] == [None] * len(alive)


def read_gradients(masters: MasterWeightOptimizer) -> dict[str, Tensor | None]:
    return {
        piece.name: found
        for group in masters.param_groups
        for piece, found in zip(group.param_slices, group.gradients.per_parameter(), strict=True)
    }


def has_sums(masters: MasterWeightOptimizer) -> bool:
    return any(one is not None for group in masters.param_groups for one in group.gradients.sums)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems start workers without forks")
def test_large_states_are_not_in_data_loader_workers():
    """A forked process would keep a copy of all values that a step writes."""
    # The first and the last page may contain other data.
    parameter = nn.Parameter(torch.zeros(MIN_FORK_BLOCK_BYTES // 4 + mmap.PAGESIZE))
    one = MasterWeightOptimizer({MATRIX: parameter}, TrainSettings())

    def count_kept_bytes() -> int:
        """Return the bytes that this process gives to no process that it forks."""
        size = 0
        total = 0
        for line in Path("/proc/self/smaps").read_text().splitlines():
            words = line.split()
            if words[0] == "Size:":
                size = 1024 * int(words[1])
            elif words[0] == "VmFlags:" and "dc" in words:
                total += size
        return total

    before = count_kept_bytes()
    one.keep_out_of_forks()
    weights, moments = 1, 2
    assert count_kept_bytes() - before >= (weights + moments) * MIN_FORK_BLOCK_BYTES
    # An allocator may give freed memory to objects that forked processes use.
    del one
    gc.collect()
    assert count_kept_bytes() == before


@DEVICES
@pytest.mark.parametrize("large", [1, 100, 1 << 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_accumulated_in_fp32(dtype, large, device):
    """Some parameters get no gradient in some micro-batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(master_weight_optimizer, "LARGE_PARAM_ELEMENTS", large)
        named = make_parameters(dtype, device=device)
        masters = make_optimizer(named, "adamw")
    for step in range(3):
        expected = {name: torch.zeros(shape, device=device) for name, shape in SHAPES.items()}
        for micro, without in enumerate(("", OTHER, MATRIX, OTHER)):
            if micro:
                masters.accumulate_gradients()
                assert all(parameter.grad is None for parameter in named.values())
            for name, drawn in backward(named, 10 * step + micro, without=without).items():
                expected[name] += drawn.float()
        found = read_gradients(masters)
        assert all(torch.equal(found[name], total) for name, total in expected.items())
        length = torch.cat([total.flatten() for total in expected.values()]).norm()
        rtol = 1.3e-6 if device == "cpu" else 1e-5
        torch.testing.assert_close(masters.grad_norm(), length, rtol=rtol, atol=1e-5)
        masters.step(1.0, masters.grad_norm())
        assert masters.grad_norm() == 0


def test_large_gradients_are_accumulated_during_backward(monkeypatch):
    monkeypatch.setattr(master_weight_optimizer, "LARGE_PARAM_ELEMENTS", 1000)
    named = make_parameters(torch.bfloat16)
    masters = make_optimizer(named)
    backward(named, 1)
    assert named[MATRIX].grad is not None
    masters.accumulate_gradients()
    # From here on, also of the first micro-batch of a step.
    for seed in (2, 3):
        backward(named, seed)
        assert named[MATRIX].grad is None
        assert named[BIAS].grad is not None
        masters.step(1.0, masters.grad_norm())


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulated_single_gradient_gives_equal_step(dtype, kind):
    """Dropped gradients of an aborted step leave no state."""
    named, again = make_parameters(dtype), make_parameters(dtype)
    masters, others = make_optimizer(named, kind), make_optimizer(again, kind)
    for seed in range(4):
        backward(again, 7)
        others.accumulate_gradients()
        backward(again, 8)
        others.zero_grad()
        assert kind == "muon" or not has_sums(others)
        assert others.grad_norm() == 0
        for model in (named, again):
            backward(model, seed, without=OTHER if seed == 2 else "")
        others.accumulate_gradients()
        for one in (masters, others):
            one.step(1.0, one.grad_norm())
    assert_equal_states(others, masters)


def lr_factors(total: int, **settings: object) -> list[float]:
    schedule = LRSchedule(TrainSettings.model_validate(settings), total)
    return [schedule.lr_factor(step) for step in range(total)]


def test_learning_rate_schedule():
    for kind, warmup, expected in (
        ("cosine", 2, [0.5, 1, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
        ("linear", 0, [1, 0.8, 0.6, 0.4, 0.2]),
        ("constant", 2, [0.5, 1, 1, 1]),
    ):
        assert lr_factors(len(expected), lr_schedule=kind, warmup=warmup) == pytest.approx(expected)
        for total in (1, 2, 100):
            assert all(0 < value <= 1 for value in lr_factors(total, lr_schedule=kind))


def test_warmup_is_a_fraction_or_a_number_of_steps():
    assert [resolve_steps(*one) for one in ((0.03, 100), (0.03, 10), (7, 10))] == [3, 1, 7]
    with pytest.raises(UserError, match="100 warmup steps in a run of 50"):
        lr_factors(50, warmup=100)


SIZES = [(5000 * 16, 256, 4096), (5003, 77)]
"""Numbers of parameters: of which threads read several at once, and of which they cannot."""


class OptimizerSetup:
    def __init__(
        self, sizes: tuple[int, ...], dtype: torch.dtype, eight_bits: bool, device: str
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        named = {}
        for number, size in enumerate(sizes):
            values = torch.randn(size, generator=generator).to(device, dtype)
            named[str(number)] = nn.Parameter(values)
        group = ParamGroup("language", 0.1, 1e-2, named, {}, BLOCK_SIZE)
        self.pieces = group.param_slices
        self.masters = group.master_weights
        self.gradients = group.gradients
        self.grad_scale = torch.tensor(0.37, device=device)
        self.adamw = (AdamW8bit if eight_bits else AdamW)(group, NoSettings(), TrainSettings())

    def receive(self, number: int, gradient: Tensor) -> None:
        parameter = self.pieces[number].parameter
        parameter.grad = gradient.to(parameter)

    def step(self, may_synchronize: bool = True) -> None:
        torch.cuda.set_sync_debug_mode("default" if may_synchronize else "error")
        try:
            self.gradients.per_parameter()
            self.adamw.step(self.grad_scale, 1e-2, 0.1)
            self.gradients.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def read_state(self) -> tuple[Tensor, Tensor, Tensor]:
        location = slice(0, len(self.masters))
        retained = (self.masters, self.adamw.exp_avg, self.adamw.exp_avg_sq)
        return tuple(part.read(location).cpu() for part in retained)


@pytest.mark.gpu
@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gpu_step_matches_cpu(sizes, dtype, eight_bits):
    """One and several micro-batches, with parameters without gradients and without waits."""
    sides = [OptimizerSetup(sizes, dtype, eight_bits, device) for device in ("cpu", "cuda")]
    assert sides[1].gradients.tiles is not None
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        for micro in range(1 + step % 2 * 2):
            for side in sides:
                if micro:
                    side.gradients.accumulate()
            for number, size in enumerate(sizes):
                if number != 1 or step >= 2:
                    drawn = torch.randn(size, generator=generator) ** 3
                    for side in sides:
                        side.receive(number, drawn)
        for side in sides:
            side.step(may_synchronize=step == 0)
        for found, expected in zip(*(side.read_state() for side in sides), strict=True):
            off = (found - expected).abs()
            if not eight_bits:
                assert float(off.max()) < 1e-6 * float(expected.abs().max())
            else:
                # A number in the middle between two levels goes to one or the other.
                assert float((off > 1e-6 * expected.abs().max()).float().mean()) < 5e-3
                assert float(off.norm() / expected.norm()) < 5e-3


@pytest.mark.gpu
def test_unaligned_gradient_is_read():
    sides = [OptimizerSetup((4096,), torch.bfloat16, False, device) for device in ("cpu", "cuda")]
    for side in sides:
        wide = torch.arange(4099.0).to(side.masters.params_E)
        side.pieces[0].parameter.grad = wide[3:]
        side.step()
    for found, expected in zip(*(side.read_state() for side in sides), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def split(wide_N: Tensor) -> tuple[Tensor, Tensor]:
    narrow_N = torch.empty(len(wide_N), dtype=torch.bfloat16)
    residual_N = torch.empty(len(wide_N), dtype=torch.int16)
    split_fp32(wide_N, narrow_N, residual_N)
    return narrow_N, residual_N


def test_split_roundtrip_for_any_bits():
    """Normal values, denormals, infinities and NaN."""
    generator = torch.Generator().manual_seed(0)
    bits_N = torch.randint(-(2**31), 2**31, (1 << 18,), generator=generator).to(torch.int32)
    merged_N = merge_fp32(*split(bits_N.view(torch.float32)))
    assert torch.equal(merged_N.view(torch.int32), bits_N)


def test_upper_half_is_rounded_to_nearest_with_ties_away_from_zero():
    """The rounding of torch gives the same value for exported weights."""
    wide_N = torch.randn(1 << 16, generator=torch.Generator().manual_seed(2))
    ties_N = torch.tensor([0x3F808000 + 0x10000 * n for n in range(1000)], dtype=torch.int32)
    wide_N[:1000] = ties_N.view(torch.float32)
    wide_N[500:1000] *= -1
    narrow_N, exported_N = split(wide_N)[0], break_bf16_ties(wide_N)
    assert torch.equal(exported_N.bfloat16(), narrow_N)
    is_tie_N = wide_N.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(narrow_N[~is_tie_N], wide_N[~is_tie_N].bfloat16())
    assert (narrow_N[is_tie_N].float().abs() > wide_N[is_tie_N].abs()).all()
    torch.testing.assert_close(exported_N, wide_N, rtol=2**-23, atol=0)
