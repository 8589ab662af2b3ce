"""Products in FP8: how far they and their gradients are off, what they hang on, what is kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from gptq import with_a_head
from oracle import CPU
from torch import Tensor, nn

from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.model import fp8
from finesight.model.few_bits import left_in_16_bits
from finesight.model.fp8 import Fp8Weight, quantised, refuse_device
from finesight.model.frozen import FrozenWeight, frozen_weights
from finesight.model.linear import GroupedLinear, joint_product, joint_product_back
from finesight.model.lora import LoraGroup, LowRank
from finesight.model.parts import part_of
from finesight.model.rowwise import Fp8Matrix
from finesight.model.tiny import SIZES, make_tiny
from finesight.model.weights import load_model

WIDTHS = {"q_proj": 64, "k_proj": 16, "v_proj": 16}
INPUTS = 80
TYPES = [torch.float32, torch.bfloat16, torch.float16]
OFF = 1 / 16
"""Of a number, at most, in FP8 of three bits after the first."""

on_card = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=on_card)]


def numbers(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(dtype: torch.dtype = torch.float32, device: str = "cpu", scale: int = 1) -> GroupedLinear:
    """Queries, keys and values of one input, their weights in FP8."""
    widths = {name: scale * width for name, width in WIDTHS.items()}
    group = GroupedLinear(scale * INPUTS, widths, bias=True).to(device, dtype)
    group.requires_grad_(False)
    assert group.bias is not None
    group.bias.copy_(numbers(tuple(group.bias.shape), 1))
    group.freeze_as(Fp8Matrix, Fp8Weight)
    assert isinstance(group.weight, Fp8Weight)
    group.to(device)
    for number, matrix in enumerate(group.weight.matrices):
        (piece,) = matrix.pieces()
        piece.fill(numbers(piece.shape, 2 + number) * 0.1 * (1 + number))
    return group


def weight_of(group: GroupedLinear) -> Fp8Weight:
    assert isinstance(group.weight, Fp8Weight)
    return group.weight


def uneven(shape: tuple[int, int], seed: int = 9) -> Tensor:
    """Rows of very different sizes, each with numbers of different sizes."""
    rows = numbers((shape[0], 1), seed + 1).mul(3).exp()
    return numbers(shape, seed) * rows * numbers((1, shape[1]), seed + 2).exp()


def together(group: GroupedLinear, x: Tensor) -> Tensor:
    return torch.cat(group(x), -1)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_no_number_is_off_by_more_than_stated(size: float) -> None:
    x_TI = uneven((50, 70))
    x_TI = x_TI / x_TI.abs().max() * size
    x_TI[3] = 0
    by_I = numbers((70,), 5).abs()
    for by, exact in ((None, x_TI), (by_I, x_TI * by_I)):
        codes_TI, scales_T1 = quantised(x_TI, by)
        off = (codes_TI.float() * scales_T1 - exact).abs()
        bound = torch.maximum(exact.abs() * OFF, scales_T1 * 2**-10) * (1 + 1e-5)
        assert bool((off <= bound).all())
        assert not codes_TI[3].float().any()


def test_the_largest_number_of_a_row_stays() -> None:
    """Beyond the largest code there is only NaN."""
    x_TI = uneven((4096, 16))
    codes_TI, scales_T1 = quantised(x_TI)
    found = (codes_TI.float() * scales_T1).abs().amax(1)
    torch.testing.assert_close(found, x_TI.abs().amax(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("wrong", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_finite_shows_in_its_row_alone(wrong: float, device: str) -> None:
    group = made(torch.bfloat16, device)
    x_TI = numbers((3, INPUTS)).to(device, torch.bfloat16)
    x_TI[1, 7] = wrong
    found = together(group, x_TI).isfinite().all(1)
    assert found.tolist() == [True, False, True]
    back = joint_product_back(together(group, x_TI), weight_of(group)).isfinite().all(1)
    assert back.tolist() == [True, False, True]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_outputs_and_gradients_are_off_by_eight_bits_and_no_more(
    dtype: torch.dtype, device: str
) -> None:
    """Each by the bound that two numbers off by a sixteenth give; as a whole by less than 4 %."""
    group = made(dtype, device)
    x_TI = uneven((40, INPUTS)).to(device, dtype).requires_grad_()
    y_TO = together(group, x_TI)
    dy_TO = uneven(tuple(y_TO.shape), 20).to(device, dtype)
    y_TO.backward(dy_TO)
    assert x_TI.grad is not None
    assert (y_TO.dtype, x_TI.grad.dtype) == (dtype, dtype)
    w_OI, bias = original().to(device), group.bias
    assert bias is not None
    forth = y_TO.detach().double() - bias.double(), x_TI.detach().double(), w_OI.T
    back = x_TI.grad.double(), dy_TO.double(), w_OI
    for found, left, right in (forth, back):
        exact = left @ right
        # With a scale for each row, cards give bf16 alone.
        given = torch.bfloat16 if device == "cuda" else dtype
        rounded = torch.finfo(given).eps * (exact.abs() + bias.abs().max())
        worst = (2 * OFF + OFF**2) * (left.abs() @ right.abs())
        assert bool(((found - exact).abs() <= worst * 1.1 + 4 * rounded).all())
        assert float((found - exact).norm() / exact.norm()) < 0.04


def original() -> Tensor:
    """What the weights were before they were in FP8."""
    shapes = ((width, INPUTS) for width in WIDTHS.values())
    parts = [numbers(shape, 2 + n) * 0.1 * (1 + n) for n, shape in enumerate(shapes)]
    return torch.cat(parts).double()


def test_the_way_back_is_that_of_the_codes_of_the_way_forth() -> None:
    """Nothing is rounded on it but the gradient."""
    group = made()
    dy_TO = uneven((30, sum(WIDTHS.values())))
    rows = quantised(dy_TO, torch.cat([m.scales_O for m in weight_of(group)._layers]))
    codes_OI = torch.cat([m.codes_OI for m in weight_of(group)._layers]).double()
    exact = rows.scales_T1.double() * (rows.codes_TI.double() @ codes_OI)
    found = joint_product_back(dy_TO, weight_of(group)).double()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6 * float(exact.abs().max()))


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_is_the_same_in_any_company(device: str) -> None:
    """To the last bit in FP8, and to that of a sum's order in the product."""
    x_TI = uneven((300, 64)).to(device, torch.bfloat16)
    alone = [quantised(x_TI[[n]]) for n in range(300)]
    for found, expected in zip(quantised(x_TI), zip(*alone, strict=True), strict=True):
        assert torch.equal(found, torch.cat(expected))
    group = made(device=device)
    x_TI = uneven((9, INPUTS)).to(device)
    few, many = together(group, x_TI[2:5]), together(group, x_TI)[2:5]
    # Sums of large numbers may be small ones.
    largest_T1 = few.abs().amax(1, keepdim=True)
    torch.testing.assert_close(many / largest_T1, few / largest_T1, rtol=0.0, atol=5e-7)


def test_products_side_by_side_are_those_one_by_one() -> None:
    """And inputs of more dimensions are rows."""
    group = made()
    x_TI = uneven((12, INPUTS))
    joint_TO = joint_product(x_TI, weight_of(group), group.bias)
    assert torch.equal(joint_TO, together(group, x_TI))
    shaped = [tuple(y.shape) for y in group(x_TI.view(3, 4, INPUTS))]
    assert shaped == [(3, 4, width) for width in WIDTHS.values()]
    assert torch.equal(together(group, x_TI.view(3, 4, INPUTS)).view(12, -1), joint_TO)
    assert [len(y) for y in group(x_TI[:0])] == [0, 0, 0]


def test_an_input_is_put_into_fp8_once_and_so_is_a_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = made()
    shapes = []

    def counted(x_TI: Tensor, by_I: Tensor | None = None) -> fp8.Rows:
        shapes.append((tuple(x_TI.shape), by_I is None))
        return quantised(x_TI, by_I)

    monkeypatch.setattr(fp8, "quantised", counted)
    x_TI = uneven((7, INPUTS)).requires_grad_()
    together(group, x_TI).sum().backward()
    assert shapes == [((7, INPUTS), True), ((7, sum(WIDTHS.values())), False)]


def test_outside_of_training_only_weights_are_in_fp8() -> None:
    group, x_TI = made().eval(), uneven((12, INPUTS)).requires_grad_()
    dense_OI = torch.cat(list(weight_of(group).dense()))
    found = together(group, x_TI)
    assert torch.equal(found, torch.nn.functional.linear(x_TI, dense_OI, group.bias))
    found.sum().backward()
    assert x_TI.grad is not None
    expected = torch.ones_like(found) @ dense_OI
    torch.testing.assert_close(x_TI.grad, expected, rtol=1e-5, atol=1e-5)
    joint_TO = joint_product(x_TI.detach(), weight_of(group), group.bias)
    torch.testing.assert_close(joint_TO, found.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_an_adapter_meets_the_numbers_as_they_were(training: bool) -> None:
    """Its gradients are those beside dense weights; what goes back through it is added whole."""
    group, x_TI = made().train(training), uneven((20, INPUTS))
    adapter = LoraGroup(group, dict.fromkeys(WIDTHS, LowRank(3, 8.0)), 0.0).train(training)
    for seed, factor in enumerate(adapter.parameters()):
        factor.data.copy_(numbers(tuple(factor.shape), 10 + seed))
    plain = together(group, x_TI)
    dy_TO = uneven(tuple(plain.shape), 30)
    low_SI = torch.zeros(plain.shape[1], INPUTS)
    for name, (a_RI, b_OR) in adapter.factors().items():
        low_SI[adapter.bands[name].columns] = (8.0 / 3 * b_OR @ a_RI).detach()
    found = {}
    for own in (group.weight, nn.Parameter(low_SI, requires_grad=False)):
        x = x_TI.clone().requires_grad_()
        adapter.zero_grad()
        y_TO = torch.cat(adapter(x, own, None), 1)
        y_TO.backward(dy_TO)
        found[type(own)] = [p.grad.clone() for p in adapter.parameters() if p.grad is not None]
        assert x.grad is not None
        if isinstance(own, Fp8Weight):
            expected = joint_product_back(dy_TO, own) + dy_TO @ low_SI
            torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)
            base = joint_product(x_TI, own, None) + x_TI @ low_SI.T
            torch.testing.assert_close(y_TO.detach(), base, rtol=1e-4, atol=1e-4)
    assert len(found[Fp8Weight]) == 4
    for mine, dense in zip(found[Fp8Weight], found[nn.Parameter], strict=True):
        assert torch.equal(mine, dense)


def test_a_second_copy_is_made_by_the_first_way_back() -> None:
    """Never by a layer without one; the first is the layers' own, whatever moves them."""
    group = made()
    weight, x_TI = weight_of(group), uneven((5, INPUTS))
    total = sum(WIDTHS.values())
    joint_product(x_TI, weight, None)
    assert weight._back is None
    assert sum(buffer.nbytes for buffer in weight.buffers()) == total * INPUTS + 4 * total
    assert len({buffer.untyped_storage().data_ptr() for buffer in weight.buffers()}) == 2
    back_TI = joint_product_back(numbers((5, total)), weight)
    assert weight._back is not None
    assert weight._back.codes.nbytes == total * INPUTS
    group.to(CPU)
    assert weight._back is None
    assert torch.equal(joint_product_back(numbers((5, total)), weight), back_TI)


def test_layers_whose_sizes_do_not_fit_stay_as_they_are(tmp_path: Path) -> None:
    """Nor does anything else of the parts but linear layers; and each part is its own."""
    odd = dataclasses.replace(SIZES["test"], inner=136)
    folder = make_tiny(tmp_path / "tiny", "qwen2_5_vl", size=odd)
    (folder / "sha256.json").unlink()
    base = with_a_head(ModelFolder(folder))
    usual = load_model(base, torch.float32, CPU)
    model = load_model(base, torch.float32, CPU, ("embeddings",), fp8=("vision", "language"))
    groups = {
        f"{path}.weight": module
        for path, module in usual.named_modules()
        if isinstance(module, GroupedLinear)
    }
    sizes = {name: (group.inputs, *group.outputs.values()) for name, group in groups.items()}
    own = {name for name in groups if part_of(name) in ("vision", "language")}
    fitting = {name for name in own if not any(size % 16 for size in sizes[name])}
    few = frozen_weights(model)
    assert {name for name, weight in few.items() if isinstance(weight, Fp8Weight)} == fitting
    assert few.keys() - fitting == {"lm_head.weight"}
    assert fitting < own
    assert left_in_16_bits(model, ("vision", "language")) == 6
    assert left_in_16_bits(model, ("vision",)) == 0
    language = {name for name in fitting if part_of(name) == "language"}
    alone = load_model(base, torch.float32, CPU, fp8=("language",))
    assert frozen_weights(alone).keys() == language


def test_other_weights_that_are_named_go_before(tmp_path: Path) -> None:
    folder = ModelFolder(make_tiny(tmp_path / "tiny"))
    model = load_model(folder, torch.float32, CPU, (), "int8", ("vision", "language"))
    few = frozen_weights(model)
    assert {part_of(name) for name in few} == {"language"}
    assert {type(weight) for weight in few.values()} == {FrozenWeight}


@pytest.mark.parametrize("able", [(7, 5), (8, 0), (8, 6)])
def test_a_card_that_cannot_is_refused(
    able: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: able)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    with pytest.raises(UserError, match=rf"compute capability {able[0]}\.{able[1]}") as refused:
        refuse_device(torch.device("cuda"), "tune.fp8")
    assert refused.value.where == "tune.fp8"
    refuse_device(CPU, "tune.fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    refuse_device(torch.device("cuda"), "tune.fp8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("inputs", [16, 1536, 8960, 16384, 17920])
def test_the_kernel_gives_the_codes_of_its_eager_twin(dtype: torch.dtype, inputs: int) -> None:
    """Also of rows that lie apart, and that are longer than it holds at once."""
    x_TI = uneven((37, inputs + 8)).clamp(-6e4, 6e4).to(dtype)[:, :inputs]
    x_TI[4] = 0
    for by in (None, numbers((inputs,), 6).abs()):
        expected = quantised(x_TI, by)
        found = quantised(x_TI.cuda(), None if by is None else by.cuda())
        assert torch.equal(found.scales_T1.cpu(), expected.scales_T1)
        ours, theirs = found.codes_TI.cpu().double(), expected.codes_TI.double()
        exact = x_TI.double() if by is None else x_TI.double() * by.double()
        exact /= expected.scales_T1.double()
        off = ours != theirs
        # In fp32 a number halfway between two codes may lie on either side of them.
        halfway = (ours + theirs) / 2
        assert bool(((exact - halfway).abs() <= 1e-6 * halfway.abs())[off].all())
        assert float(off.double().mean()) < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rows", [1, 33, 2000])
@pytest.mark.parametrize("scale", [1, 16])
def test_products_on_a_card_are_those_of_the_codes(rows: int, scale: int) -> None:
    """In fp64, but for what cards leave out of long sums and one rounding to bf16."""
    group = made(torch.bfloat16, "cuda", scale)
    weight = weight_of(group)
    x_TI = uneven((rows, scale * INPUTS)).cuda().bfloat16()
    dy_TO = uneven((rows, scale * sum(WIDTHS.values())), 40).cuda().bfloat16()
    w_OI = torch.cat(list(weight.dense())).double()
    scales_O = torch.cat([layer.scales_O for layer in weight._layers])
    forth = quantised(x_TI), w_OI.T, joint_product(x_TI, weight, None)
    back = quantised(dy_TO, scales_O), w_OI / scales_O[:, None], joint_product_back(dy_TO, weight)
    for rows_TI, right, found in (forth, back):
        exact = (rows_TI.codes_TI.double() * rows_TI.scales_T1) @ right
        assert float((found.double() - exact).norm() / exact.norm()) < 4e-3
