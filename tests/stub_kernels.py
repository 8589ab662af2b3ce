"""No-op Triton kernels, to measure the allocations of fused models without a GPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from finesight.model import attention, fused_decoder, fused_ops, layers
from finesight.model.lora import fused
from finesight.model.quant import fp8
from finesight.model.quant.int8 import Int8Matrix
from finesight.train import loss

KERNEL_MODULES = {
    "model.kernels.primitives": "primitives",
    "model.kernels.elementwise": "elementwise",
    "model.kernels.fp8_quantize": "fp8_kernels",
    "model.kernels.lora_gemm": "lora_gemm_kernels",
    "model.kernels.norm": "norm_kernels",
    "model.kernels.swiglu": "swiglu_kernels",
    "model.kernels.rotary": "rotary_kernels",
    "model.kernels.varlen_attention": "varlen_kernels",
    "train.loss_kernels": "loss_kernels",
}
"""Kernel modules and their aliases in the modules that import them."""

KERNEL_USERS = (fused_decoder, layers, fused, fused_ops, attention, fp8, loss)
"""Modules that import kernels if Triton is installed."""


class _NoOpKernel:
    """Kernel that ignores every launch."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *inputs, **settings: None


def _jit(function: object = None, **settings: object) -> object:
    return _NoOpKernel() if function is not None else lambda kernel: _NoOpKernel()


def _make_triton_stub() -> dict[str, ModuleType]:
    """Return the parts of Triton that kernel modules need for import and buffer sizes."""
    language: Any = ModuleType("triton.language")
    language.tensor = language.constexpr = object
    triton: Any = ModuleType("triton")
    triton.jit, triton.language = _jit, language
    triton.cdiv = lambda number, size: -(-number // size)
    triton.next_power_of_2 = lambda number: 1 << (number - 1).bit_length()
    extra: Any = ModuleType("triton.language.extra")
    extra.libdevice = None
    return {"triton": triton, "triton.language": language, "triton.language.extra": extra}


def stub_triton_kernels(patch: pytest.MonkeyPatch) -> None:
    """Run the fused GPU path for fp32 models on a CPU.

    In 16 bits, CPU matmuls allocate memory of their own.
    """
    with patch.context() as at_import:
        for name, module in _make_triton_stub().items():
            at_import.setitem(sys.modules, name, module)
        made: dict[str, Any] = {
            n: importlib.import_module(f"finesight.{n}") for n in KERNEL_MODULES
        }
    for name, module in made.items():
        patch.delitem(sys.modules, f"finesight.{name}")
        for owner in KERNEL_USERS:
            patch.setattr(owner, KERNEL_MODULES[name], module, raising=False)
    patch.setattr(
        fused_decoder, "RmsNormStats", made["model.kernels.lora_gemm"].RmsNormStats, raising=False
    )
    patch.setattr(fused_decoder, "QkvLayout", made["model.kernels.rotary"].QkvLayout, raising=False)
    patch.setattr(fused_decoder, "supports_fused_layers", lambda x_TD: True)
    for owner in (layers, fused_ops, fp8, loss):
        patch.setattr(owner, "has_kernels", lambda x: True)
    patch.setattr(attention, "HAS_TRITON", True)
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
