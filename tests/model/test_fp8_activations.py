"""FP8 inputs from fused kernels: equal codes, used only by a sole reader."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_reference import max_relative_error
from tiny_model import TINY_PRESETS, TinyFamily, create_tiny_model
from torch import Tensor, nn

from finesight.model.fused_ops import quick_gelu
from finesight.model.layers import RmsNorm, add_norm
from finesight.model.linear import FusedLinear, LoraConfig, LoraLinear, linear_concat
from finesight.model.quant import fp8
from finesight.model.quant.base import Fp8Rows
from finesight.model.quant.fp8 import Fp8Matrix, Fp8Weight, quantize_fp8, quantize_fp8_gelu
from finesight.model.vision_encoder import VisionEncoder
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HALF = [torch.bfloat16, torch.float16]
WIDTHS = {"gate_proj": 48, "up_proj": 32}
FAMILIES: dict[TinyFamily, int] = {"qwen2_vl": 3, "qwen2_5_vl": 2, "qwen3_vl": 2}
"""Fused linears of a vision block whose input is quantized by the preceding operation."""

GRIDS = ((1, 10, 12), (2, 4, 6))


def random_rows(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return rows of different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape[0], 1, generator=generator)


def make_fp8_layer(
    inputs: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> FusedLinear:
    """Return a frozen fused linear with FP8 weights."""
    group = FusedLinear(inputs, WIDTHS, bias=True).to(device, dtype).requires_grad_(False)
    assert group.bias is not None
    group.bias.copy_(random_rows((1, sum(WIDTHS.values())), 1)[0])
    group.set_quantized_weight(Fp8Matrix, Fp8Weight)
    assert isinstance(group.weight, Fp8Weight)
    group.to(device)
    for number, matrix in enumerate(group.weight.matrices):
        (piece,) = matrix.tensor_specs()
        piece.load(random_rows(piece.shape, 2 + number))
    return group


def equal(found: Fp8Rows, expected: Fp8Rows) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(one.float(), other.float()) for one, other in pairs)


def assert_nearly_equal(found: Tensor, expected: Tensor) -> None:
    """Check that all but a few elements are equal; those depend on the summation order."""
    off = found.float() != expected.float()
    assert float(off.double().mean()) < 0.01


@pytest.mark.parametrize("device", DEVICES)
def test_fp8_codes_give_the_same_output(device: str) -> None:
    group = make_fp8_layer(64, torch.bfloat16, device)
    x_TI = random_rows((9, 64), 7).to(device, torch.bfloat16)
    with torch.no_grad():
        expected, rows = group(x_TI), quantize_fp8(x_TI)
        for found, other in zip(group(rows), expected, strict=True):
            assert found.dtype == torch.bfloat16
            assert torch.equal(found, other)
        fused_TO = linear_concat(rows, group.weight, group.bias)
        assert torch.equal(fused_TO, linear_concat(x_TI, group.weight, group.bias))


def test_layer_accepts_codes_only_as_sole_reader() -> None:
    group, baseline = make_fp8_layer(64), FusedLinear(64, WIDTHS, bias=False)
    assert not group.accepts_fp8_input, "an input that something may go back to"
    with torch.no_grad():
        assert group.accepts_fp8_input
        assert not baseline.accepts_fp8_input
        assert not group.eval().accepts_fp8_input
        group.train().adapter = LoraLinear(group, {"up_proj": LoraConfig(2, 4.0)}, 0.0)
        assert not group.accepts_fp8_input
        with pytest.raises(AssertionError, match="FP8 input for a weight that is not FP8"):
            baseline(quantize_fp8(random_rows((3, 64))))


@pytest.mark.parametrize("kind", [nn.LayerNorm, RmsNorm])
@pytest.mark.parametrize("width", [48, 1280])
def test_norm_output_matches_reader_format(kind: type[nn.Module], width: int) -> None:
    norm, group = kind(width, eps=1e-6), make_fp8_layer(width)
    x_ND, y_ND = random_rows((5, width), 3), random_rows((5, width), 4)
    for more in (None, y_ND):
        expected = x_ND if more is None else x_ND + more
        total_ND, n_ND = add_norm(x_ND, more, norm, group)
        assert torch.equal(total_ND, expected)
        assert torch.equal(n_ND, norm(expected))
        with torch.no_grad():
            total_ND, rows = add_norm(x_ND, more, norm, group)
            assert torch.equal(total_ND, expected)
            assert isinstance(rows, Fp8Rows)
            assert equal(rows, quantize_fp8(norm(expected)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("width", [16, 48, 5120, 16384, 17920])
def test_fused_fp8_gelu_matches_two_steps(width: int, dtype: torch.dtype, device: str) -> None:
    """Bit-exact: values are rounded to 16 bits before quantization."""
    x_TI = random_rows((37, width + 8), 5).to(device, dtype)[:, :width]
    x_TI[4] = 0
    assert equal(quantize_fp8_gelu(x_TI), quantize_fp8(quick_gelu(x_TI)))


@pytest.mark.gpu
@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_non_finite_values_stay_in_their_row(wrong: float) -> None:
    group = make_fp8_layer(1280, torch.bfloat16, "cuda")
    x_ND = random_rows((3, 1280)).to("cuda", torch.bfloat16)
    x_ND[1, 1279] = wrong
    norm = nn.LayerNorm(1280, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        _, normed = add_norm(x_ND, x_ND, norm, group)
        for rows in (normed, quantize_fp8_gelu(x_ND)):
            assert isinstance(rows, Fp8Rows)
            (y_NO, _) = group(rows)
            assert y_NO.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("width", [48, 1280, 2048])
@pytest.mark.parametrize("kind", [nn.LayerNorm, RmsNorm])
def test_fused_fp8_norm_matches_two_steps(
    kind: type[nn.Module], width: int, dtype: torch.dtype
) -> None:
    """Equal up to the summation order in fp32."""
    baseline = FusedLinear(width, WIDTHS, bias=False)
    norm = kind(width, eps=1e-6).to("cuda", dtype)
    x_ND, y_ND = (random_rows((50, width), seed).to("cuda", dtype) for seed in (3, 4))
    with torch.no_grad():
        norm.weight.copy_(random_rows((1, width), 5)[0])
        total_ND, rows = add_norm(x_ND, y_ND, norm, make_fp8_layer(width, dtype, "cuda"))
        stored_ND, n_ND = add_norm(x_ND, y_ND, norm, baseline)
    assert isinstance(rows, Fp8Rows)
    assert isinstance(n_ND, Tensor)
    assert torch.equal(total_ND, stored_ND)
    expected = quantize_fp8(n_ND)
    torch.testing.assert_close(rows.scales_T1, expected.scales_T1, rtol=2**-7, atol=0)
    assert_nearly_equal(rows.codes_TI, expected.codes_TI)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("width", [48, 1536])
def test_fused_fp8_decoder_norm_matches_two_steps(
    width: int, share: float, dtype: torch.dtype
) -> None:
    """Equal up to the summation order in fp32: FP8 stores change Triton's thread layout."""
    from finesight.model.kernels import norm as norm_kernels
    from finesight.model.kernels.runtime import SeededDropout

    drop = SeededDropout(torch.tensor([5], dtype=torch.int32, device="cuda"), 1, share, 1.0)
    x_TD = random_rows((50, width), 3).to("cuda", dtype)
    w_D = random_rows((1, width), 4)[0].to("cuda", dtype)
    n_TD = torch.empty_like(x_TD)
    dropped_TD, scale_T = norm_kernels.rms_norm_dropout(x_TD, w_D, 1e-6, n_TD, drop)
    rows = fp8.empty_fp8_rows(x_TD)
    found = norm_kernels.rms_norm_dropout(x_TD, w_D, 1e-6, None, drop, rows)
    assert_nearly_equal(found[0], dropped_TD)
    torch.testing.assert_close(found[1], scale_T, rtol=2**-22, atol=0)
    expected = quantize_fp8(n_TD)
    torch.testing.assert_close(rows.scales_T1, expected.scales_T1, rtol=2**-7, atol=0)
    assert_nearly_equal(rows.codes_TI, expected.codes_TI)


def make_vision_encoder(folder: Path, family: TinyFamily, device: str) -> VisionEncoder:
    base = ModelFolder(create_tiny_model(folder / family, family, preset=TINY_PRESETS["small"]))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    visual = load_model(base, dtype, torch.device(device), fp8_parts=("vision",)).visual
    return visual.requires_grad_(False).train()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("family", "of_a_block"), FAMILIES.items())
def test_frozen_vision_encoder_passes_codes(
    family: TinyFamily,
    of_a_block: int,
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The output equals that with per-layer quantization.

    On a GPU the sums of norms differ.
    """
    visual = make_vision_encoder(tmp_path, family, device)
    inputs = visual.patch_embed.proj.in_features
    generator = torch.Generator().manual_seed(0)
    patches_ND = torch.randint(0, 256, (168, inputs), generator=generator, dtype=torch.uint8)
    patches_ND = patches_ND.to(device)
    each, seen = Fp8Weight.linear_fp8, list[type]()

    def watched(
        weight: Fp8Weight, x_TI: Tensor | Fp8Rows, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        seen.append(type(x_TI))
        return each(weight, x_TI, bias)

    monkeypatch.setattr(Fp8Weight, "linear_fp8", watched)
    handed = visual(patches_ND, GRIDS)
    assert seen.count(Fp8Rows) == of_a_block * len(visual.blocks)
    seen.clear()
    monkeypatch.setattr(FusedLinear, "accepts_fp8_input", property(lambda _: False))
    own = visual(patches_ND, GRIDS)
    assert seen
    assert Fp8Rows not in seen
    assert device == "cuda" or torch.equal(handed, own)
    in_16_bits = visual.eval()(patches_ND, GRIDS)
    assert max_relative_error(handed, own) < 0.3 * max_relative_error(own, in_16_bits)
