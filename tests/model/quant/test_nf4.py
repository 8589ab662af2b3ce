"""NF4 weights: codes equal to bitsandbytes, outputs and gradients equal to dequantized weights."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from finesight.model.linear import FusedLinear, LoraConfig, LoraLinear
from finesight.model.quant import nf4
from finesight.model.quant.nf4 import Nf4Matrix, import_bitsandbytes

SHAPES = [(80, 48), (5, 6), (7, 3), (128, 128), (33, 66), (96, 3420), (1, 1), (300, 64)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def random_values(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantize(values: Tensor) -> Nf4Matrix:
    matrix = Nf4Matrix(*values.shape).to(values.device)
    matrix.quantize(values)
    return matrix


def dequantize_reference(matrix: Nf4Matrix) -> Tensor:
    """Dequantize to fp32 by table lookup."""
    functional = import_bitsandbytes("test").functional
    scales_B = functional.create_dynamic_map().to(matrix.codes.device)[matrix.absmax_B.long()]
    coarse_B = matrix.nested_absmax.repeat_interleave(256)[: len(scales_B)]
    scales_E = (scales_B * coarse_B + matrix.absmax_mean).repeat_interleave(64)[
        : matrix.num_elements
    ]
    pairs = torch.stack([matrix.codes >> 4, matrix.codes & 15], 1).flatten()[: matrix.num_elements]
    values_16 = functional.get_4bit_type("nf4", device=matrix.codes.device)
    return (values_16[pairs.long()] * scales_E).view(matrix.out_features, matrix.in_features)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_match_bitsandbytes_linear4bit(shape, dtype, device):
    values = random_values(shape, dtype)
    kind = import_bitsandbytes("test").nn.Linear4bit
    theirs = kind(shape[1], shape[0], bias=False, compress_statistics=True, quant_type="nf4")
    theirs.load_state_dict({"weight": values})
    theirs = theirs.to(device)
    ours = quantize(values.to(device))
    state = theirs.weight.quant_state
    assert torch.equal(ours.codes, theirs.weight.data)
    assert torch.equal(ours.absmax_B, state.absmax)
    assert torch.equal(ours.nested_absmax, state.state2.absmax)
    assert torch.equal(ours.absmax_mean, state.offset)


def test_chunked_quantization_matches(monkeypatch):
    values = random_values((96, 3420))
    full = quantize(values)
    monkeypatch.setattr(nf4, "CHUNK_ELEMENTS", 64 * 100)
    pieces = dict(quantize(values).named_buffers())
    for name, buffer in full.named_buffers():
        assert torch.equal(pieces[name], buffer)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_matches_reference(shape, device):
    """Includes rows that are no multiple of a block, where bitsandbytes fails on a CPU."""
    matrix = quantize(random_values(shape).to(device))
    expected = dequantize_reference(matrix)
    for dtype in TYPES:
        dense = matrix.dequantize(dtype)
        assert dense.dtype == dtype
        # A multiplication and an addition in fp32, which a kernel may round once less.
        bound = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(dense.float(), expected, rtol=bound, atol=1e-6)


@pytest.mark.parametrize("adapted", [False, True])
def test_no_dense_weight_is_saved_for_backward(adapted):
    widths = {"q_proj": 40, "k_proj": 12, "v_proj": 12}
    group = FusedLinear(48, widths, bias=True).requires_grad_(False)
    group.set_quantized_weight(Nf4Matrix)
    for matrix in group.weight.matrices:
        matrix.quantize(random_values((matrix.out_features, 48)))
    if adapted:
        group.adapter = LoraLinear(group, dict.fromkeys(widths, LoraConfig(3, 8.0)), 0.0)
    saved: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        group(torch.ones(5, 48, requires_grad=True))
    assert not {(width, 48) for width in widths.values()} & set(saved)
    assert bool(saved) is adapted


def test_bitsandbytes_downloads_no_kernels(tmp_path):
    """An installed package `kernels` would download code for bitsandbytes."""
    (tmp_path / "kernels.py").write_text(
        "print('imported')\ndef get_kernel(*_, **__):\n    print('fetched')\n    raise OSError\n"
    )
    code = (
        "import sys\nfrom finesight.model.quant.nf4 import import_bitsandbytes\n"
        "assert import_bitsandbytes('x').functional\nassert 'kernels' not in sys.modules\n"
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
