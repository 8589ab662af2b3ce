"""FP8 matmuls and their inputs from fused kernels: errors, batch independence, equal codes."""

import contextlib
import dataclasses

import pytest
import torch
from gptq_fixtures import with_untied_head
from hf_reference import CPU, max_relative_error
from lora_fixtures import quantize_linear
from tiny_model import TINY_PRESETS, TinyFamily, create_tiny_model
from torch import Tensor, nn

from finesight.errors import UserError
from finesight.model.fused_ops import quick_gelu
from finesight.model.layers import RmsNorm, add_norm
from finesight.model.linear import (
    FusedLinear,
    LoraConfig,
    LoraLinear,
    linear_concat,
    linear_concat_backward,
)
from finesight.model.quant import fp8
from finesight.model.quant.base import Fp8Rows, find_quantized_weights
from finesight.model.quant.fp8 import Fp8Matrix, Fp8Weight, quantize_fp8, require_fp8_support
from finesight.model.trainable import get_part
from finesight.model.weights_io import count_unquantized_layers, load_model
from finesight.model_folder import ModelFolder

WIDTHS = {"q_proj": 64, "k_proj": 16, "v_proj": 16}
INPUTS = 80
TYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = TYPES[1:]
OFF = 1 / 16
"""Largest relative error of an FP8 element with three mantissa bits."""

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


FAMILIES: dict[TinyFamily, int] = {"qwen2_vl": 3, "qwen2_5_vl": 2, "qwen3_vl": 2}
"""Fused linears of a vision block whose input is quantized by the preceding operation."""

GRIDS = ((1, 10, 12), (2, 4, 6))


def random_values(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_mixed_rows(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape[0], 1, generator=generator)


def make_layer(
    dtype: torch.dtype = torch.float32, device: str = "cpu", scale: int = 1, inputs: int = INPUTS
) -> FusedLinear:
    widths = {name: scale * width for name, width in WIDTHS.items()}
    group = FusedLinear(scale * inputs, widths, bias=True).to(device, dtype).requires_grad_(False)
    assert group.bias is not None
    group.bias.copy_(random_values(tuple(group.bias.shape), 1))
    # Layers differ in magnitude.
    shapes = ((width, scale * inputs) for width in widths.values())
    layers = [random_values(s, 2 + n) * 0.1 * (1 + n) for n, s in enumerate(shapes)]
    return quantize_linear(group, Fp8Matrix, Fp8Weight, weight_OI=torch.cat(layers))


def get_fp8_weight(group: FusedLinear) -> Fp8Weight:
    assert isinstance(group.weight, Fp8Weight)
    return group.weight


def random_rows(shape: tuple[int, int], seed: int = 9) -> Tensor:
    """Return rows with a wide range of magnitudes, between and within rows."""
    rows = random_values((shape[0], 1), seed + 1).mul(3).exp()
    return random_values(shape, seed) * rows * random_values((1, shape[1]), seed + 2).exp()


def compute_fused(group: FusedLinear, x: Tensor) -> Tensor:
    return torch.cat(group(x), -1)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_quantization_error_is_bounded(size):
    """The largest value of a row is exact. Beyond the largest code there is only NaN."""
    x_TI = random_rows((2048, 30))
    x_TI = x_TI / x_TI.abs().max() * size
    x_TI[3] = 0
    by_I = random_values((30,), 5).abs()
    for by, exact_TI in ((None, x_TI), (by_I, x_TI * by_I)):
        codes_TI, scales_T1 = quantize_fp8(x_TI, by)
        found_TI = codes_TI.float() * scales_T1
        bound = torch.maximum(exact_TI.abs() * OFF, scales_T1 * 2**-10) * (1 + 1e-5)
        assert bool(((found_TI - exact_TI).abs() <= bound).all())
        assert not codes_TI[3].float().any()
        if size == 1.0:
            largest_T, expected_T = (x.abs().amax(1) for x in (found_TI, exact_TI))
            torch.testing.assert_close(largest_T, expected_T, rtol=1e-6, atol=0)


@pytest.mark.parametrize("wrong", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("device", DEVICES)
def test_non_finite_values_stay_in_their_row(wrong, device):
    group = make_layer(torch.bfloat16, device)
    x_TI = random_values((3, INPUTS)).to(device, torch.bfloat16)
    x_TI[1, 7] = wrong
    y_TO = compute_fused(group, x_TI)
    for found in (y_TO, linear_concat_backward(y_TO, get_fp8_weight(group))):
        assert found.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("device", DEVICES)
def test_rows_are_independent_of_batch(device):
    """Bit-exact for FP8 codes, and up to the summation order of the matmul."""
    x_TI = random_rows((300, 64)).to(device, torch.bfloat16)
    alone = [quantize_fp8(x_TI[[n]]) for n in range(300)]
    for found, expected in zip(quantize_fp8(x_TI), zip(*alone, strict=True), strict=True):
        assert torch.equal(found, torch.cat(expected))
    group = make_layer(device=device)
    x_TI = random_rows((9, INPUTS)).to(device)
    few, many = compute_fused(group, x_TI[2:5]), compute_fused(group, x_TI)[2:5]
    # Sums of large values may be small.
    largest_T1 = few.abs().amax(1, keepdim=True)
    torch.testing.assert_close(many / largest_T1, few / largest_T1, rtol=0.0, atol=5e-7)


def test_evaluation_quantizes_only_weights():
    group, x_TI = make_layer().eval(), random_rows((12, INPUTS)).requires_grad_()
    dense_OI = torch.cat(list(get_fp8_weight(group).dequantize_layers()))
    found = compute_fused(group, x_TI)
    assert torch.equal(found, torch.nn.functional.linear(x_TI, dense_OI, group.bias))
    found.sum().backward()
    assert x_TI.grad is not None
    expected = torch.ones_like(found) @ dense_OI
    torch.testing.assert_close(x_TI.grad, expected, rtol=1e-5, atol=1e-5)
    fused_TO = linear_concat(x_TI.detach(), get_fp8_weight(group), group.bias)
    torch.testing.assert_close(fused_TO, found.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_adapter_uses_unquantized_inputs(training):
    """Adapter gradients equal those with dense weights; its input gradient is unrounded."""
    group, x_TI = make_layer().train(training), random_rows((20, INPUTS))
    adapter = LoraLinear(group, dict.fromkeys(WIDTHS, LoraConfig(3, 8.0)), 0.0).train(training)
    for seed, factor in enumerate(adapter.parameters()):
        factor.data.copy_(random_values(tuple(factor.shape), 10 + seed))
    baseline = compute_fused(group, x_TI)
    dy_TO = random_rows(tuple(baseline.shape), 30)
    low_SI = torch.zeros(baseline.shape[1], INPUTS)
    for name, (a_RI, b_OR) in adapter.factors().items():
        low_SI[adapter.slices[name].output_slice] = (8.0 / 3 * b_OR @ a_RI).detach()
    found = {}
    for own in (group.weight, nn.Parameter(low_SI, requires_grad=False)):
        x = x_TI.clone().requires_grad_()
        adapter.zero_grad()
        y_TO = torch.cat(adapter(x, own, None), 1)
        y_TO.backward(dy_TO)
        found[type(own)] = [p.grad.clone() for p in adapter.parameters() if p.grad is not None]
        assert x.grad is not None
        if isinstance(own, Fp8Weight):
            expected = linear_concat_backward(dy_TO, own) + dy_TO @ low_SI
            torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)
            base = linear_concat(x_TI, own, None) + x_TI @ low_SI.T
            torch.testing.assert_close(y_TO.detach(), base, rtol=1e-4, atol=1e-4)
    assert len(found[Fp8Weight]) == 4
    for mine, dense in zip(found[Fp8Weight], found[nn.Parameter], strict=True):
        assert torch.equal(mine, dense)


def test_layers_with_unsupported_sizes_are_unchanged(tmp_path):
    """Only linear layers of the selected parts are quantized."""
    odd = dataclasses.replace(TINY_PRESETS["test"], intermediate_size=136)
    folder = create_tiny_model(tmp_path / "tiny", "qwen2_5_vl", preset=odd)
    (folder / "sha256.json").unlink()
    base = with_untied_head(ModelFolder(folder))
    model = load_model(base, torch.float32, CPU, ("embeddings",), fp8_parts=("vision", "language"))
    sizes = {
        f"{path}.weight": (group.in_features, *group.output_sizes.values())
        for path, group in load_model(base, torch.float32, CPU).named_modules()
        if isinstance(group, FusedLinear)
    }
    own = {name for name in sizes if get_part(name) in ("vision", "language")}
    fitting = {name for name in own if not any(size % 16 for size in sizes[name])}
    quantized = find_quantized_weights(model)
    assert {name for name, one in quantized.items() if isinstance(one, Fp8Weight)} == fitting
    assert quantized.keys() - fitting == {"lm_head.weight"}
    assert fitting < own
    assert count_unquantized_layers(model, ("vision", "language")) == 6
    assert count_unquantized_layers(model, ("vision",)) == 0


@pytest.mark.parametrize(
    ("able", "is_supported"), [((7, 5), False), ((8, 0), False), ((8, 6), False), ((8, 9), True)]
)
def test_unsupported_gpu_is_rejected(able, is_supported, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: able)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    message = rf"compute capability {able[0]}\.{able[1]}"
    refused = contextlib.nullcontext() if is_supported else pytest.raises(UserError, match=message)
    with refused:
        require_fp8_support(torch.device("cuda"), "tune.quantize.fp8")
    require_fp8_support(CPU, "tune.quantize.fp8")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("inputs", [16, 1536, 8960, 16384, 17920])
def test_quantize_kernel_matches_eager(dtype, inputs):
    """Includes strided rows and rows longer than a program's registers."""
    x_TI = random_rows((37, inputs + 8)).clamp(-6e4, 6e4).to(dtype)[:, :inputs]
    x_TI[4] = 0
    for by in (None, random_values((inputs,), 6).abs()):
        expected = quantize_fp8(x_TI, by)
        found = quantize_fp8(x_TI.cuda(), None if by is None else by.cuda())
        assert torch.equal(found.scales_T1.cpu(), expected.scales_T1)
        ours, theirs = found.codes_TI.cpu().double(), expected.codes_TI.double()
        exact = x_TI.double() if by is None else x_TI.double() * by.double()
        exact /= expected.scales_T1.double()
        off = ours != theirs
        # In fp32 a value halfway between two codes may be rounded either way.
        halfway = (ours + theirs) / 2
        assert bool(((exact - halfway).abs() <= 1e-6 * halfway.abs())[off].all())
        assert float(off.double().mean()) < 0.01


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 33, 2000])
@pytest.mark.parametrize("scale", [1, 16])
def test_products_match_the_codes(rows, scale, device):
    """Compared with fp64, up to truncated GPU accumulation and one rounding to bf16."""
    dtype, bound = (torch.float32, 1e-6) if device == "cpu" else (torch.bfloat16, 4e-3)
    group = make_layer(dtype, device, scale)
    weight = get_fp8_weight(group)
    x_TI = random_rows((rows, scale * INPUTS)).to(device, dtype)
    dy_TO = random_rows((rows, scale * sum(WIDTHS.values())), 40).to(device, dtype)
    w_OI = torch.cat(list(weight.dequantize_layers())).double()
    scales_O = torch.cat([layer.scales_O for layer in weight.matrices])
    forward = quantize_fp8(x_TI), w_OI.T, linear_concat(x_TI, weight, None)
    back = (
        quantize_fp8(dy_TO, scales_O),
        w_OI / scales_O[:, None],
        linear_concat_backward(dy_TO, weight),
    )
    for rows_TI, right, found in (forward, back):
        exact = (rows_TI.codes_TI.double() * rows_TI.scales_T1) @ right
        assert float((found.double() - exact).norm() / exact.norm()) < bound
    compute_fused(group, x_TI.requires_grad_()).backward(dy_TO)
    assert torch.equal(x_TI.grad, back[2])


def equal(found: Fp8Rows, expected: Fp8Rows) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(one.float(), other.float()) for one, other in pairs)


def assert_nearly_equal(found: Tensor, expected: Tensor) -> None:
    """Check that all but a few elements are equal; those depend on the summation order."""
    off = found.float() != expected.float()
    assert float(off.double().mean()) < 0.01


def test_layer_accepts_codes_only_as_sole_reader():
    group, baseline = make_layer(inputs=64), FusedLinear(64, WIDTHS, bias=False)
    assert not group.accepts_fp8_input, "an input that something may go back to"
    with torch.no_grad():
        assert group.accepts_fp8_input
        assert not baseline.accepts_fp8_input
        assert not group.eval().accepts_fp8_input
        group.train().adapter = LoraLinear(group, {"v_proj": LoraConfig(2, 4.0)}, 0.0)
        assert not group.accepts_fp8_input
        with pytest.raises(AssertionError, match="FP8 input for a weight that is not FP8"):
            baseline(quantize_fp8(random_mixed_rows((3, 64))))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("width", [16, 48, 5120, 16384, 17920])
def test_fused_fp8_gelu_matches_two_steps(width, dtype, device):
    """Bit-exact: values are rounded to 16 bits before quantization."""
    x_TI = random_mixed_rows((37, width + 8), 5).to(device, dtype)[:, :width]
    x_TI[4] = 0
    assert equal(quantize_fp8(x_TI, gelu=True), quantize_fp8(quick_gelu(x_TI)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("width", [48, 1280, 2048])
@pytest.mark.parametrize("kind", [nn.LayerNorm, RmsNorm])
def test_fused_fp8_norm_matches_two_steps(kind, width, dtype):
    """Equal up to the summation order in fp32."""
    baseline = FusedLinear(width, WIDTHS, bias=False)
    norm = kind(width, eps=1e-6).to("cuda", dtype)
    x_ND, y_ND = (random_mixed_rows((50, width), seed).to("cuda", dtype) for seed in (3, 4))
    with torch.no_grad():
        norm.weight.copy_(random_mixed_rows((1, width), 5)[0])
        total_ND, rows = add_norm(x_ND, y_ND, norm, make_layer(dtype, "cuda", inputs=width))
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
def test_fused_fp8_decoder_norm_matches_two_steps(width, share, dtype):
    """Equal up to the summation order in fp32: FP8 stores change Triton's thread layout."""
    from finesight.model.kernels import norm as norm_kernels
    from finesight.model.kernels.runtime import SeededDropout

    drop = SeededDropout(torch.tensor([5], dtype=torch.int32, device="cuda"), 1, share, 1.0)
    x_TD = random_mixed_rows((50, width), 3).to("cuda", dtype)
    w_D = random_mixed_rows((1, width), 4)[0].to("cuda", dtype)
    n_TD = torch.empty_like(x_TD)
    dropped_TD, scale_T = norm_kernels.rms_norm_dropout(x_TD, w_D, 1e-6, n_TD, drop)
    rows = fp8.empty_fp8_rows(x_TD)
    found = norm_kernels.rms_norm_dropout(x_TD, w_D, 1e-6, None, drop, rows)
    assert_nearly_equal(found[0], dropped_TD)
    torch.testing.assert_close(found[1], scale_T, rtol=2**-22, atol=0)
    expected = quantize_fp8(n_TD)
    torch.testing.assert_close(rows.scales_T1, expected.scales_T1, rtol=2**-7, atol=0)
    assert_nearly_equal(rows.codes_TI, expected.codes_TI)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("family", "of_a_block"), FAMILIES.items())
def test_frozen_vision_encoder_passes_codes(family, of_a_block, device, tmp_path, monkeypatch):
    """The output equals that with per-layer quantization; on a GPU the sums of norms differ."""
    base = ModelFolder(create_tiny_model(tmp_path / family, family, preset=TINY_PRESETS["small"]))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = load_model(base, dtype, torch.device(device), fp8_parts=("vision",))
    visual = model.visual.requires_grad_(False).train()
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
