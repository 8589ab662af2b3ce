"""Frozen INT4 weights: published by GPTQ in AutoGPTQ's layout, or rounded to nearest while loading.

GPTQ: Frantar et al. 2022, arXiv:2210.17323.

Shapes: O outputs, I inputs of one layer, G groups of inputs that share a scale and a zero point.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finesight.errors import UserError
from finesight.model.kernels import quant_gemm as quant_gemm_kernels
from finesight.model.kernels import quant_gemv as quant_gemv_kernels
from finesight.model.linear import FusedLinear, hub_name
from finesight.model.quant.base import (
    Packed4BitMatrix,
    PackedInput,
    QuantizedWeight,
    RmsNormParams,
    WeightTensorSpec,
)
from finesight.model_folder import ModelFolder

DEFAULT_GROUP_SIZE = 64
"""Group size of weights that are rounded to INT4 while loading."""

KERNEL_GROUP_SIZES = (32, 64, 128)

PACK_FACTOR = 8
"""Number of 4-bit codes in a 32-bit integer."""


class Int4Matrix(Packed4BitMatrix):
    """GPTQ matrix [O, I] with 4-bit codes and the values scale * (code - zero).

    It takes about 4.19 bits per element with groups of 128 inputs. Columns are sorted by group;
    `permutation_I` holds their original positions. A byte of `codes` [O, I / 2] holds an element of
    the first half of a row in its low bits and one of the second half in its high bits.
    """

    codes: Tensor
    scales_OG: Tensor
    zeros_OG: Tensor
    permutation_I: Tensor

    def __init__(self, out_features: int, in_features: int, *, group_size: int, where: str) -> None:
        super().__init__(out_features, in_features)
        self.group_size = group_size
        self.where = where
        self._num_groups = -(-in_features // group_size)
        self._loaded: dict[str, Tensor] = {}
        group_shape = out_features, self._num_groups
        for name, shape, dtype in (
            ("codes", (out_features, in_features // 2), torch.uint8),
            ("scales_OG", group_shape, torch.float16),
            ("zeros_OG", group_shape, torch.uint8),
            ("permutation_I", (in_features,), torch.int32),
        ):
            self.register_buffer(name, torch.empty(shape, dtype=dtype))

    def tensor_specs(self) -> tuple[WeightTensorSpec, ...]:
        inputs = self.in_features
        outputs = self.out_features
        groups = self._num_groups
        file_tensors: dict[str, tuple[tuple[int, ...], str]] = {
            "qweight": ((inputs // PACK_FACTOR, outputs), "I32"),
            "qzeros": ((groups, outputs // PACK_FACTOR), "I32"),
            "scales": ((groups, outputs), "F16"),
            "g_idx": ((inputs,), "I32"),
        }
        return tuple(
            WeightTensorSpec(name, shape, (dtype,), partial(self.load_tensor, name))
            for name, (shape, dtype) in file_tensors.items()
        )

    @torch.no_grad()
    def load_tensor(self, name: str, values: Tensor) -> None:
        """Load one of AutoGPTQ's tensors: `qweight`, `qzeros`, `scales` or `g_idx`.

        The matrix is assembled when all four tensors are loaded.
        """
        self._loaded[name] = values.to(self.device)
        if len(self._loaded) != len(self.tensor_specs()):
            return
        loaded = self._loaded
        self._loaded = {}
        self._set_permutation(loaded["g_idx"])
        self.scales_OG.copy_(loaded["scales"].T)
        # AutoGPTQ stores zero points minus 1, and zero as 15.
        self.zeros_OG.copy_(_unpack_codes(loaded["qzeros"].T).add_(1).bitwise_and_(15))
        codes_IO = _unpack_codes(loaded["qweight"])
        if not self.is_unpermuted:
            codes_IO = codes_IO.index_select(0, self.permutation_I)
        low, high = codes_IO.chunk(2)
        self.codes.copy_(high.bitwise_left_shift_(4).bitwise_or_(low).T)

    def _set_permutation(self, group_I: Tensor) -> None:
        sorted_I, permutation_I = torch.sort(group_I, stable=True)
        positions_I = torch.arange(self.in_features, device=group_I.device)
        if not torch.equal(sorted_I.long(), positions_I // self.group_size):
            raise UserError(
                f"group sizes in g_idx of a layer differ from {self.group_size}",
                where=self.where,
                expected=f"{self._num_groups} groups of {self.group_size} inputs each",
                remedy="use the config.json that was published with the weights",
            )
        self.permutation_I.copy_(permutation_I)
        self.is_unpermuted = torch.equal(permutation_I, positions_I)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        if not self.has_kernels:
            return super().dequantize(dtype)
        quant_params = self.scales_OG, self.zeros_OG, self.permutation_I, self.group_size
        return quant_gemv_kernels.dequantize_int4(self.codes, *quant_params, dtype)

    def dequantize_rows(self, rows: slice) -> Tensor:
        codes = self.codes[rows]
        values_RI = torch.cat([codes & 15, codes >> 4], dim=1).float()
        values_RI -= self._expand_groups(self.zeros_OG[rows])
        values_RI *= self._expand_groups(self.scales_OG[rows])
        return torch.empty_like(values_RI).index_copy_(1, self.permutation_I.long(), values_RI)

    def _expand_groups(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.group_size, dim=1)[:, : self.in_features]

    def supports_kernels(self) -> bool:
        is_aligned = self.in_features % (2 * self.group_size) == 0
        return self.has_kernels and is_aligned and self.group_size in KERNEL_GROUP_SIZES

    def pack_input(self, x_1I: Tensor, norm: RmsNormParams | None) -> PackedInput:
        if not self.is_unpermuted and norm is not None:
            x_1I = F.rms_norm(x_1I, norm.weight_I.shape, norm.weight_I, norm.eps)
            norm = None
        return quant_gemv_kernels.pack_input(self._permute_input(x_1I), norm, self.group_size)

    def gemv_packed(
        self, x: PackedInput, y_O: Tensor, bias_O: Tensor | None, residual_O: Tensor | None
    ) -> None:
        quant_params = self.codes, self.scales_OG, self.zeros_OG, self.group_size
        quant_gemv_kernels.int4_gemv(x, *quant_params, y_O, bias_O, residual_O)

    def gemm(self, x_RI: Tensor, bias: Tensor | None) -> Tensor:
        return quant_gemm_kernels.gemm(
            quant_gemm_kernels.int4_gemm_kernel,
            self._permute_input(x_RI),
            (self.codes, self.scales_OG, self.zeros_OG),
            bias,
            self.out_features,
            group_size=self.group_size,
        )

    def _permute_input(self, x_RI: Tensor) -> Tensor:
        return x_RI if self.is_unpermuted else x_RI.index_select(1, self.permutation_I)


class RtnInt4Matrix(Int4Matrix):
    """INT4 matrix [O, I] rounded to nearest while loading, with about 4.38 bits per element."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__(
            out_features, in_features, group_size=DEFAULT_GROUP_SIZE, where="--weight-format"
        )

    tensor_specs = Packed4BitMatrix.tensor_specs

    def quantize(self, values_OI: Tensor) -> None:
        self.permutation_I.copy_(torch.arange(self.in_features))
        super().quantize(values_OI)

    def quantize_rows(self, rows: slice, values_RI: Tensor) -> None:
        num_padding = -self.in_features % self.group_size
        w_RGE = F.pad(values_RI, (0, num_padding)).view(len(values_RI), -1, self.group_size)
        minimum = w_RGE.amin(2).clamp(max=0)
        maximum = w_RGE.amax(2).clamp(min=0)
        # Use at least the smallest positive fp16 value, to avoid division by zero.
        scales = ((maximum - minimum) / 15).half().clamp(min=2**-24)
        zeros = (-minimum / scales.float()).round().clamp(0, 15)
        codes = (w_RGE / scales.float()[..., None]).round() + zeros[..., None]
        low, high = codes.clamp(0, 15).byte().flatten(1)[:, : self.in_features].chunk(2, 1)
        self.codes[rows] = low | (high << 4)
        self.scales_OG[rows] = scales
        self.zeros_OG[rows] = zeros.byte()


def _unpack_codes(packed: Tensor) -> Tensor:
    """Unpack int32 [A, B] to uint8 codes [8 A, B], lowest bits first."""
    rows, columns = packed.shape
    codes = torch.empty(rows, PACK_FACTOR, columns, dtype=torch.uint8, device=packed.device)
    for position in range(PACK_FACTOR):
        codes[:, position] = (packed >> (4 * position)) & 15
    return codes.flatten(0, 1)


def gptq_group_size(folder: ModelFolder) -> int | None:
    """Return the GPTQ group size of a model folder, or None without quantization.

    The size is -1 for one group per row. Raises UserError for other quantization methods or bit
    widths.
    """
    quantization_config = folder.config.get("quantization_config")
    if quantization_config is None:
        return None
    settings = quantization_config if isinstance(quantization_config, dict) else {}
    group_size = settings.get("group_size")
    supported = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq"}
    actual = {"checkpoint_format": "gptq", **settings}
    is_valid_group_size = (
        isinstance(group_size, int)
        and not isinstance(group_size, bool)
        and (group_size > 0 or group_size == -1)
    )
    if not is_valid_group_size or any(actual.get(key) != value for key, value in supported.items()):
        listed = {key: actual.get(key) for key in (*supported, "group_size")}
        raise UserError(
            f"unsupported quantization: quantization_config has {listed}",
            where=str(folder.path / "config.json"),
            expected="weights in bf16, fp16 or fp32, or four bits by GPTQ (quant_method gptq,"
            " bits 4, checkpoint_format gptq, group_size -1 or a number of inputs)",
            remedy="use the same model without quantization; tune.quantize.nf4=[language] in a "
            "recipe quantizes it while loading",
        )
    assert isinstance(group_size, int)
    return group_size


def quantize_gptq_layers(
    model: nn.Module, layer_names: Collection[str], group_size: int, where: str
) -> None:
    """Replace the weights of layers that GPTQ quantized by empty INT4 matrices."""
    for path, module in list(model.named_modules()):
        if not isinstance(module, FusedLinear):
            continue
        names = [hub_name(path, output) for output in module.output_sizes]
        quantized = [name for name in names if name in layer_names]
        if not quantized:
            continue
        if isinstance(module.weight, QuantizedWeight):
            raise UserError(
                f"{quantized[0]} cannot be quantized: it is already in four bits by GPTQ",
                where="tune.quantize.nf4, tune.quantize.fp8 or --weight-format",
                expected="layers that are not quantized",
                remedy="remove that part from nf4 and fp8, or --weight-format, or use the model "
                "without quantization",
            )
        sizes = (module.in_features, *module.output_sizes.values())
        if quantized != names or any(size % PACK_FACTOR for size in sizes):
            raise UserError(
                f"of the fused layers {', '.join(names)}, {', '.join(quantized)} are quantized, "
                f"with sizes {sizes}",
                where=where,
                expected=f"all of them or none, and sizes that are multiples of {PACK_FACTOR}",
                remedy="use a model that quantizes all linear layers of a shared input",
            )
        resolved_group_size = module.in_features if group_size == -1 else group_size
        with torch.device("meta"):
            module.set_quantized_weight(
                partial(Int4Matrix, group_size=resolved_group_size, where=path)
            )
