"""Frozen NF4 weights with double quantization, implemented with bitsandbytes.

Dettmers et al. 2023, arXiv:2305.14314.

Shapes: O outputs, I inputs of one layer; B = ceil(O I / 64) blocks of a matrix.
"""

from __future__ import annotations

import logging
import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from finesight.errors import UserError
from finesight.model.quant.base import HAS_TRITON, WeightTensorSpec
from finesight.model.quant.packed_4bit import Packed4BitMatrix, PackedInput, RmsNormParams

if HAS_TRITON:
    from finesight.model.kernels import int4_gemv as int4_gemv_kernels
    from finesight.model.kernels import quant_gemm as quant_gemm_kernels

BLOCK_SIZE, SCALE_BLOCK_SIZE = 64, 256
"""Elements of a matrix that share a scale, and scales that share a nested scale."""

CHUNK_ELEMENTS = 1 << 20
"""Elements quantized at once; a CPU needs 64 bytes of memory for each."""


def import_bitsandbytes(setting: str) -> Any:
    """Import bitsandbytes; raises UserError, naming the setting, if it is missing."""
    try:
        return _import_bitsandbytes()
    except ImportError as error:
        raise UserError(
            f"the package bitsandbytes cannot be imported: {error}",
            where=setting,
            expected="bitsandbytes, for quantization",
            remedy="pip install 'finesight[quant]'",
        ) from error


@lru_cache
def _import_bitsandbytes() -> Any:
    # On some CPUs bitsandbytes downloads code through the package `kernels` while it is imported,
    # and logs an error if that is missing. No code is downloaded here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    modules: dict[str, Any] = sys.modules
    previous = modules.get("kernels")
    modules["kernels"] = None
    try:
        import bitsandbytes
    finally:
        del modules["kernels"]
        if previous is not None:
            modules["kernels"] = previous
    return bitsandbytes


@lru_cache
def _scale_codebook(device: torch.device) -> Tensor:
    """Return the 256 values of an 8-bit scale code."""
    codebook: Tensor = _import_bitsandbytes().functional.create_dynamic_map().to(device)
    return codebook


@lru_cache
def _nf4_codebook(device: torch.device) -> Tensor:
    """Return the 16 NF4 values, normalized to a largest magnitude of 1."""
    codebook: Tensor = _import_bitsandbytes().functional.get_4bit_type("nf4", device=device)
    return codebook


class Nf4Matrix(Packed4BitMatrix):
    """NF4 matrix [O, I] with about 4.13 bits per element.

    `codes` [ceil(O I / 2), 1] packs two elements per byte, row by row. Each block is scaled by its
    largest magnitude, stored in 8 bits as `absmax_B` relative to the mean `absmax_mean`. Blocks of
    these are scaled by `nested_absmax` in fp32. The codes equal those of
    bitsandbytes.nn.Linear4bit.
    """

    codes: Tensor
    absmax_B: Tensor
    nested_absmax: Tensor
    absmax_mean: Tensor

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__(out_features, in_features)
        blocks = -(-self.num_elements // BLOCK_SIZE)
        self.register_buffer("codes", torch.empty(-(-self.num_elements // 2), 1, dtype=torch.uint8))
        self.register_buffer("absmax_B", torch.empty(blocks, dtype=torch.uint8))
        self.register_buffer("nested_absmax", torch.empty(-(-blocks // SCALE_BLOCK_SIZE)))
        self.register_buffer("absmax_mean", torch.empty(()))

    def tensor_specs(self) -> tuple[WeightTensorSpec, ...]:
        """Return the spec of the dense matrix, which is quantized while loading."""
        return self._dense_spec(self.quantize)

    @torch.no_grad()
    def quantize(self, values_OI: Tensor) -> None:
        """Quantize a matrix on the device of the codes."""
        self._check_shape(values_OI)
        functional = _import_bitsandbytes().functional
        # Created now: inside a CUDA graph capture it would be allocated in the graph's memory pool.
        _nf4_codebook(self.codes.device)
        flat = values_OI.flatten()
        absmax_chunks = []
        for start in range(0, self.num_elements, CHUNK_ELEMENTS):
            chunk = flat[start : start + CHUNK_ELEMENTS].to(self.codes.device)
            codes, state = functional.quantize_4bit(chunk, blocksize=BLOCK_SIZE, quant_type="nf4")
            self.codes[start // 2 : start // 2 + len(codes)].copy_(codes)
            absmax_chunks.append(state.absmax)
        absmax_B = torch.cat(absmax_chunks)
        self.absmax_mean.copy_(absmax_B.mean())
        codes_B, state = functional.quantize_blockwise(
            absmax_B - self.absmax_mean,
            code=_scale_codebook(absmax_B.device),
            blocksize=SCALE_BLOCK_SIZE,
        )
        self.absmax_B.copy_(codes_B)
        self.nested_absmax.copy_(state.absmax)

    def _quant_state(self, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        state = _import_bitsandbytes().functional.QuantState
        return state(
            absmax=self.absmax_B,
            shape=shape,
            blocksize=BLOCK_SIZE,
            quant_type="nf4",
            dtype=dtype,
            offset=self.absmax_mean,
            state2=state(
                absmax=self.nested_absmax,
                blocksize=SCALE_BLOCK_SIZE,
                code=_scale_codebook(self.codes.device),
                dtype=torch.float32,
            ),
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the dense matrix [O, I] in bf16, fp16 or fp32."""
        # As one row: on a CPU, bitsandbytes dequantizes with a new block at the start of each
        # row if rows are not multiples of a block, although it quantizes without.
        state = self._quant_state((self.num_elements,), dtype)
        flat: Tensor = _import_bitsandbytes().functional.dequantize_4bit(self.codes, state)
        return flat.reshape(self.out_features, self.in_features)

    def supports_kernels(self) -> bool:
        """Return True if the rows consist of full blocks."""
        return HAS_TRITON and self.codes.is_cuda and self.in_features % BLOCK_SIZE == 0

    def pack_input(self, x_1I: Tensor, norm: RmsNormParams | None) -> PackedInput:
        """Pack a row with adjacent inputs in a word; see `Packed4BitMatrix`."""
        return int4_gemv_kernels.pack_input(x_1I, norm, None)

    def gemv_packed(
        self, x: PackedInput, y_O: Tensor, bias_O: Tensor | None, residual_O: Tensor | None
    ) -> None:
        """Compute x W^T + bias + residual into `y_O`."""
        int4_gemv_kernels.nf4_gemv(x, *self._kernel_args(), y_O, bias_O, residual_O)

    def gemm(self, x_RI: Tensor, bias: Tensor | None) -> Tensor:
        """Compute x W^T + bias with tensor cores."""
        return quant_gemm_kernels.nf4_gemm(
            x_RI,
            *self._kernel_args(),
            bias,
            quant_gemm_kernels.choose_gemm_tiling(self.out_features, len(x_RI)),
        )

    def _kernel_args(self) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        codebooks = _scale_codebook(self.codes.device), _nf4_codebook(self.codes.device)
        return self.codes, self.absmax_B, self.nested_absmax, self.absmax_mean, codebooks
