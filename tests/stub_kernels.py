"""Placeholders of Triton kernels, to measure the allocations of fused models without a GPU."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from finesight.model import attention, fused_decoder, fused_ops, layers
from finesight.model.quant import fp8
from finesight.model.quant.int8 import Int8Matrix
from finesight.train import loss

without_triton = pytest.mark.skipif(
    find_spec("triton") is not None, reason="requires an installation without Triton"
)


def stub_triton_kernels(patch: pytest.MonkeyPatch) -> None:
    """Run the fused GPU path for fp32 models on a CPU.

    In 16 bits, CPU matmuls allocate memory of their own.
    """
    patch.setattr(fused_decoder, "supports_fused_layers", lambda x_TD: True)
    for owner in (layers, fused_ops, fp8, loss):
        patch.setattr(owner, "has_kernels", lambda x: True)
    patch.setattr(attention, "supports_varlen_attention", lambda q_THD: True)
    patch.setattr(attention, "_flash_attention", lambda q_THD, *rest: torch.empty(q_THD.shape))
    for owner in (fp8, layers):
        patch.setattr(owner, "quantize_fp8", _quantize_stub)
    patch.setattr(fp8, "fp8_linear", _matmul_stub)
    patch.setattr(Int8Matrix, "dequantize", _dequantize_stub)


def _quantize_stub(x_TI: Tensor, by_I: Tensor | None = None) -> fp8.Fp8Rows:
    codes_TI = torch.empty(x_TI.shape, dtype=torch.float8_e4m3fn)
    return fp8.Fp8Rows(codes_TI, torch.empty(len(x_TI), 1))


def _matmul_stub(
    x: fp8.Fp8Rows, w_OI: Tensor, scales_O: Tensor, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return torch.empty(len(x.codes_TI), len(w_OI), dtype=dtype)


def _dequantize_stub(matrix: Int8Matrix, dtype: torch.dtype) -> Tensor:
    return torch.empty(matrix.out_features, matrix.in_features, dtype=dtype)
