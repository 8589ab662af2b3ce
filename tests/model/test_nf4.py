"""Four bits: those of bitsandbytes, products and gradients those of the dense numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from finesight.errors import UserError
from finesight.model import nf4
from finesight.model.frozen import FrozenWeight, frozen_weights
from finesight.model.linear import GroupedLinear
from finesight.model.lora import LoraGroup, LowRank
from finesight.model.nf4 import Nf4Matrix, bitsandbytes

SHAPES = [(80, 48), (5, 6), (7, 3), (128, 128), (33, 66), (96, 3420), (1, 1), (300, 64)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = {"q_proj": 40, "k_proj": 12, "v_proj": 12}
INPUTS = 48

on_card = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=on_card)]


def numbers(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantised(values: Tensor) -> Nf4Matrix:
    matrix = Nf4Matrix(*values.shape).to(values.device)
    matrix.fill(values)
    return matrix


def by_hand(matrix: Nf4Matrix) -> Tensor:
    """The fp32 numbers that the bits stand for, looked up one by one."""
    functional = bitsandbytes("test").functional
    scales_B = functional.create_dynamic_map().to(matrix.codes.device)[matrix.scales_B.long()]
    coarse_B = matrix.coarse.repeat_interleave(256)[: len(scales_B)]
    scales_E = (scales_B * coarse_B + matrix.mean).repeat_interleave(64)[: matrix.numbers]
    pairs = torch.stack([matrix.codes >> 4, matrix.codes & 15], 1).flatten()[: matrix.numbers]
    values_16 = functional.get_4bit_type("nf4", device=matrix.codes.device)
    return (values_16[pairs.long()] * scales_E).view(matrix.outputs, matrix.inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_are_those_of_linear4bit(
    shape: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    values = numbers(shape, dtype)
    kind = bitsandbytes("test").nn.Linear4bit
    theirs = kind(shape[1], shape[0], bias=False, compress_statistics=True, quant_type="nf4")
    theirs.load_state_dict({"weight": values})
    theirs = theirs.to(device)
    ours = quantised(values.to(device))
    state = theirs.weight.quant_state
    assert torch.equal(ours.codes, theirs.weight.data)
    assert torch.equal(ours.scales_B, state.absmax)
    assert torch.equal(ours.coarse, state.state2.absmax)
    assert torch.equal(ours.mean, state.offset)


def test_quantised_piece_by_piece_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = numbers((96, 3420))
    whole = quantised(values)
    monkeypatch.setattr(nf4, "AT_ONCE", 64 * 100)
    pieces = dict(quantised(values).named_buffers())
    for name, buffer in whole.named_buffers():
        assert torch.equal(pieces[name], buffer)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_is_what_the_bits_stand_for(shape: tuple[int, int], device: str) -> None:
    """Also where rows are no multiple of a block, which bitsandbytes gets wrong on a CPU."""
    matrix = quantised(numbers(shape).to(device))
    expected = by_hand(matrix)
    for dtype in TYPES:
        dense = matrix.dense(dtype)
        assert dense.dtype == dtype
        # A product and a sum in fp32, which a kernel may round once less.
        bound = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(dense.float(), expected, rtol=bound, atol=1e-6)


def test_errors_are_those_of_four_bits() -> None:
    """Of numbers from the normal distribution about a tenth of their size, as published."""
    values = numbers((512, 512))
    off = quantised(values).dense(torch.float32) - values
    assert 0.085 < float(off.norm() / values.norm()) < 0.1


def test_a_number_takes_about_four_bits() -> None:
    matrix = quantised(numbers((512, 1024), torch.bfloat16))
    taken = sum(buffer.nbytes for buffer in matrix.buffers())
    # 4 for the code, 8 / 64 for the scale, 32 / (64 * 256) for the scale of scales.
    assert 8 * taken / matrix.numbers == pytest.approx(4 + 0.125 + 0.002, abs=0.001)
    assert matrix.numbers == 512 * 1024


def groups(
    dtype: torch.dtype, adapted: bool, dropout: float = 0.0, device: str = "cpu"
) -> tuple[GroupedLinear, GroupedLinear]:
    """A group in NF4, and one of the dense numbers that its bits stand for."""
    pair = []
    for four_bits in (True, False):
        group = GroupedLinear(INPUTS, WIDTHS, bias=True).to(device, dtype)
        group.requires_grad_(False)
        assert group.bias is not None
        group.bias.copy_(numbers(tuple(group.bias.shape), seed=1))
        if four_bits:
            group.freeze_as(Nf4Matrix)
            assert isinstance(group.weight, FrozenWeight)
            group.to(device)
            for number, matrix in enumerate(group.weight.matrices):
                matrix.fill(numbers((matrix.outputs, INPUTS), seed=number))
        else:
            (first,) = pair
            assert isinstance(group.weight, torch.nn.Parameter)
            group.weight.copy_(torch.cat(list(first.weight.dense())))
        if adapted:
            group.adapter = LoraGroup(group, dict.fromkeys(WIDTHS, LowRank(3, 8.0)), dropout)
            for seed, factor in enumerate(group.adapter.parameters()):
                factor.data.copy_(numbers(tuple(factor.shape), seed=10 + seed))
        pair.append(group)
    return pair[0], pair[1]


def outcome(group: GroupedLinear, x: Tensor) -> list[Tensor]:
    """Outputs, and gradients of the input and of the adapter."""
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    outputs = group(x)
    torch.stack([(y.float() ** 2).sum() for y in outputs]).sum().backward()
    learned = [] if group.adapter is None else [p.grad for p in group.adapter.parameters()]
    return [*(y.detach() for y in outputs), x.grad, *learned]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, INPUTS), (2, 3, INPUTS), (1, INPUTS)], ids=str)
@pytest.mark.parametrize("adapted", [False, True])
def test_outputs_and_gradients_are_those_of_the_dense_numbers(
    dtype: torch.dtype, shape: tuple[int, ...], adapted: bool
) -> None:
    """On a CPU to the last bit: the same products of the same numbers."""
    four_bits, dense = groups(dtype, adapted, dropout=0.3)
    x = numbers(shape, dtype)
    for found, expected in zip(outcome(four_bits, x), outcome(dense, x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 40, 2000])
@pytest.mark.parametrize("inputs", [48, 128])
def test_products_on_a_card_are_those_of_the_dense_numbers(
    dtype: torch.dtype, rows: int, inputs: int
) -> None:
    matrix = quantised(numbers((256, inputs), torch.bfloat16).cuda())
    x = numbers((rows, inputs), dtype, seed=2).cuda().requires_grad_()
    y = matrix(x, None)
    y.float().square().sum().backward()
    dense = matrix.dense(torch.float32).double()
    expected = x.detach().double() @ dense.T
    bound = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert float((y - expected).abs().max() / expected.abs().max()) < bound
    back = (2 * y.detach()).double() @ dense
    assert x.grad is not None
    assert float((x.grad - back).abs().max() / back.abs().max()) < bound


@pytest.mark.parametrize("adapted", [False, True])
def test_nothing_dense_is_kept_for_the_way_back(adapted: bool) -> None:
    group, _ = groups(torch.float32, adapted)
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        group(torch.ones(5, INPUTS, requires_grad=True))
    assert not [shape for shape in kept if shape in {(width, INPUTS) for width in WIDTHS.values()}]
    assert bool(kept) is adapted


def test_weights_are_found_under_the_name_of_a_parameter() -> None:
    group, dense = groups(torch.float32, adapted=True)
    model = torch.nn.ModuleDict({"qkv_proj": group, "other": dense})
    assert list(frozen_weights(model)) == ["qkv_proj.weight"]
    assert frozen_weights(model)["qkv_proj.weight"].numbers == 64 * INPUTS
    names = dict(model.named_parameters())
    assert "other.weight" in names
    assert "qkv_proj.weight" not in names
    assert "qkv_proj.adapter.a" in names


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("No module named 'bitsandbytes'")

    monkeypatch.setattr(nf4, "_imported", missing)
    with pytest.raises(UserError, match=r"tune\.nf4: [\s\S]*pip install 'finesight\[quant\]'"):
        bitsandbytes("tune.nf4")


def test_no_code_is_fetched_and_nothing_is_said(tmp_path: Path) -> None:
    """The package `kernels`, where it is installed, would download what bitsandbytes asks for."""
    (tmp_path / "kernels.py").write_text(
        "print('imported')\ndef get_kernel(*_, **__):\n    print('fetched')\n    raise OSError\n"
    )
    code = (
        "import sys\nfrom finesight.model.nf4 import bitsandbytes\n"
        "assert bitsandbytes('x').functional\nassert 'kernels' not in sys.modules\n"
        "import kernels\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "imported\n", "")
