"""Inputs that are put into FP8 by what makes them: the same codes, handed to the layers that read
them, and only where nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import distance
from torch import Tensor, nn

from finesight.hub import ModelFolder
from finesight.model import fp8
from finesight.model.fp8 import Fp8Weight, Rows, quantised, quantised_gelu
from finesight.model.fused import quick_gelu
from finesight.model.layers import RmsNorm, added_norm
from finesight.model.linear import GroupedLinear, joint_product
from finesight.model.lora import LoraGroup, LowRank
from finesight.model.rowwise import Fp8Matrix
from finesight.model.tiny import SIZES, TinyFamily, make_tiny
from finesight.model.tower import VisionTower
from finesight.model.weights import load_model

on_card = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=on_card)]
HALF = [torch.bfloat16, torch.float16]
WIDTHS = {"gate_proj": 48, "up_proj": 32}
FAMILIES: dict[TinyFamily, int] = {"qwen2_vl": 3, "qwen2_5_vl": 2, "qwen3_vl": 2}
"""Groups of a tower's block whose input comes in FP8."""

GRIDS = ((1, 10, 12), (2, 4, 6))


def numbers(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Rows of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape[0], 1, generator=generator)


def reader(inputs: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> GroupedLinear:
    """A frozen group whose weights are in FP8."""
    group = GroupedLinear(inputs, WIDTHS, bias=True).to(device, dtype).requires_grad_(False)
    assert group.bias is not None
    group.bias.copy_(numbers((1, sum(WIDTHS.values())), 1)[0])
    group.freeze_as(Fp8Matrix, Fp8Weight)
    assert isinstance(group.weight, Fp8Weight)
    group.to(device)
    for number, matrix in enumerate(group.weight.matrices):
        (piece,) = matrix.pieces()
        piece.fill(numbers(piece.shape, 2 + number))
    return group


def equal(found: Rows, expected: Rows) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(one.float(), other.float()) for one, other in pairs)


def assert_alike(found: Tensor, expected: Tensor) -> None:
    """All numbers but a few, whose last bit hung on the order of a sum."""
    off = found.float() != expected.float()
    assert float(off.double().mean()) < 0.01


@pytest.mark.parametrize("device", DEVICES)
def test_codes_give_what_the_numbers_give(device: str) -> None:
    group = reader(64, torch.bfloat16, device)
    x_TI = numbers((9, 64), 7).to(device, torch.bfloat16)
    with torch.no_grad():
        expected, rows = group(x_TI), quantised(x_TI)
        for found, other in zip(group(rows), expected, strict=True):
            assert found.dtype == torch.bfloat16
            assert torch.equal(found, other)
        joint_TO = joint_product(rows, group.weight, group.bias)
        assert torch.equal(joint_TO, joint_product(x_TI, group.weight, group.bias))


def test_a_group_takes_codes_where_nothing_else_reads_its_input() -> None:
    group, plain = reader(64), GroupedLinear(64, WIDTHS, bias=False)
    assert not group.takes_rows, "an input that something may go back to"
    with torch.no_grad():
        assert group.takes_rows
        assert not plain.takes_rows
        assert not group.eval().takes_rows
        group.train().adapter = LoraGroup(group, {"up_proj": LowRank(2, 4.0)}, 0.0)
        assert not group.takes_rows
        with pytest.raises(AssertionError, match="an input in FP8 for a weight that is not"):
            plain(quantised(numbers((3, 64))))


@pytest.mark.parametrize("kind", [nn.LayerNorm, RmsNorm])
@pytest.mark.parametrize("width", [48, 1280])
def test_a_norm_comes_as_its_reader_takes_it(kind: type[nn.Module], width: int) -> None:
    norm, group = kind(width, eps=1e-6), reader(width)
    x_ND, y_ND = numbers((5, width), 3), numbers((5, width), 4)
    for more in (None, y_ND):
        expected = x_ND if more is None else x_ND + more
        total_ND, n_ND = added_norm(x_ND, more, norm, group)
        assert torch.equal(total_ND, expected)
        assert torch.equal(n_ND, norm(expected))
        with torch.no_grad():
            total_ND, rows = added_norm(x_ND, more, norm, group)
            assert torch.equal(total_ND, expected)
            assert isinstance(rows, Rows)
            assert equal(rows, quantised(norm(expected)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("width", [16, 48, 5120, 16384, 17920])
def test_a_gelu_in_fp8_is_that_of_the_two_steps(
    width: int, dtype: torch.dtype, device: str
) -> None:
    """To the last bit: what is put into FP8 is rounded to 16 bits before."""
    x_TI = numbers((37, width + 8), 5).to(device, dtype)[:, :width]
    x_TI[4] = 0
    assert equal(quantised_gelu(x_TI), quantised(quick_gelu(x_TI)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_what_is_not_finite_shows_in_its_row_alone(wrong: float) -> None:
    group = reader(1280, torch.bfloat16, "cuda")
    x_ND = numbers((3, 1280)).to("cuda", torch.bfloat16)
    x_ND[1, 1279] = wrong
    norm = nn.LayerNorm(1280, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        _, normed = added_norm(x_ND, x_ND, norm, group)
        for rows in (normed, quantised_gelu(x_ND)):
            assert isinstance(rows, Rows)
            (y_NO, _) = group(rows)
            assert y_NO.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("width", [48, 1280, 2048])
@pytest.mark.parametrize("kind", [nn.LayerNorm, RmsNorm])
def test_a_norm_in_fp8_is_that_of_the_two_steps(
    kind: type[nn.Module], width: int, dtype: torch.dtype
) -> None:
    """But for sums of fp32 in another order, of which the last bit of 16 may hang."""
    plain = GroupedLinear(width, WIDTHS, bias=False)
    norm = kind(width, eps=1e-6).to("cuda", dtype)
    x_ND, y_ND = (numbers((50, width), seed).to("cuda", dtype) for seed in (3, 4))
    with torch.no_grad():
        norm.weight.copy_(numbers((1, width), 5)[0])
        total_ND, rows = added_norm(x_ND, y_ND, norm, reader(width, dtype, "cuda"))
        kept_ND, n_ND = added_norm(x_ND, y_ND, norm, plain)
    assert isinstance(rows, Rows)
    assert isinstance(n_ND, Tensor)
    assert torch.equal(total_ND, kept_ND)
    expected = quantised(n_ND)
    torch.testing.assert_close(rows.scales_T1, expected.scales_T1, rtol=2**-7, atol=0)
    assert_alike(rows.codes_TI, expected.codes_TI)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("width", [48, 1536])
def test_a_norm_of_the_decoder_in_fp8_is_that_of_the_two_steps(
    width: int, share: float, dtype: torch.dtype
) -> None:
    """But for sums of fp32 in another order: Triton lays numbers over threads otherwise where bytes
    are stored, too."""
    from finesight.model.kernels import norm as norm_kernels
    from finesight.model.kernels.drop import Drop

    drop = Drop(torch.tensor([5], dtype=torch.int32, device="cuda"), 1, share, 1.0)
    x_TD = numbers((50, width), 3).to("cuda", dtype)
    w_D = numbers((1, width), 4)[0].to("cuda", dtype)
    n_TD = torch.empty_like(x_TD)
    dropped_TD, scale_T = norm_kernels.rms_normed(x_TD, w_D, 1e-6, n_TD, drop)
    rows = fp8.room_for(x_TD)
    found = norm_kernels.rms_normed(x_TD, w_D, 1e-6, None, drop, rows)
    assert_alike(found[0], dropped_TD)
    torch.testing.assert_close(found[1], scale_T, rtol=2**-22, atol=0)
    expected = quantised(n_TD)
    torch.testing.assert_close(rows.scales_T1, expected.scales_T1, rtol=2**-7, atol=0)
    assert_alike(rows.codes_TI, expected.codes_TI)


def tower(folder: Path, family: TinyFamily, device: str) -> VisionTower:
    base = ModelFolder(make_tiny(folder / family, family, size=SIZES["small"]))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    visual = load_model(base, dtype, torch.device(device), fp8=("vision",)).visual
    return visual.requires_grad_(False).train()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("family", "of_a_block"), FAMILIES.items())
def test_a_frozen_tower_hands_codes_over(
    family: TinyFamily,
    of_a_block: int,
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it computes is what it computes when each layer puts its own input into FP8: on a card
    but for the sums of norms, and by far less than FP8 changes."""
    visual = tower(tmp_path, family, device)
    inputs = visual.patch_embed.proj.in_features
    generator = torch.Generator().manual_seed(0)
    patches_ND = torch.randint(0, 256, (168, inputs), generator=generator, dtype=torch.uint8)
    patches_ND = patches_ND.to(device)
    each, seen = Fp8Weight.each, list[type]()

    def watched(weight: Fp8Weight, x_TI: Tensor | Rows, bias: Tensor | None) -> tuple[Tensor, ...]:
        seen.append(type(x_TI))
        return each(weight, x_TI, bias)

    monkeypatch.setattr(Fp8Weight, "each", watched)
    handed = visual(patches_ND, GRIDS)
    assert seen.count(Rows) == of_a_block * len(visual.blocks)
    seen.clear()
    monkeypatch.setattr(GroupedLinear, "takes_rows", property(lambda _: False))
    own = visual(patches_ND, GRIDS)
    assert seen
    assert Rows not in seen
    assert device == "cuda" or torch.equal(handed, own)
    in_16_bits = visual.eval()(patches_ND, GRIDS)
    assert distance(handed, own) < 0.3 * distance(own, in_16_bits)
