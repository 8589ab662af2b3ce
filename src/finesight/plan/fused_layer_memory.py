"""Estimate the memory of a fused decoder layer (`model.fused_decoder`) in bytes.

Update this module if the allocations of a fused layer change. tests/plan/test_fused_layer_memory.py
compares it with measured allocations. A row is a token of the pack. In the MLP of the last layer,
it is a supervised token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from finesight.model.attention import MAX_TRITON_SEQLEN
from finesight.model.decoder import DecoderLayer
from finesight.model.fused_linear import FusedLinear
from finesight.model.kernels.launch_config import (
    CONCURRENT_PROGRAMS,
    LORA_DOWN_BACKWARD_TILE,
    MAX_PARTIAL_SUMS,
    SWIGLU_BACKWARD_TILE,
    SWIGLU_TILE,
    TARGET_PROGRAMS,
    TileConfig,
    columns_per_chunk,
    rows_per_chunk,
)
from finesight.model.layers import GatedMlp
from finesight.model.lora.fused import padding_columns
from finesight.model.lora.layer import LoraLinear
from finesight.model.quant.base import QuantizedWeight
from finesight.model.quant.fp8 import Fp8Weight
from finesight.plan.saved_activations import (
    FP32_BYTES,
    ComputeConfig,
    LayerInputShape,
    is_trainable,
    transposed_fp8_bytes,
)

FLASH_BACKWARD_TILE, FLASH_HEAD_DIM_MULTIPLE = 128, 32
"""Padding of torch's varlen attention backward pass: rows per sequence, and head size multiple.

The backward pass adds one query tile of rows per sequence, and rounds up the head size.
"""


@dataclass(frozen=True, slots=True)
class FusedLinearMemory:
    """Memory of linear layers that share one input and run as one product, in bytes.

    An example is the fused query, key and value projection. Sizes of inputs, padding columns,
    outputs and LoRA down-projections are per row.

    Attributes:
        element_size: Bytes of an element.
        input_bytes: Bytes of an input row.
        padding_bytes: Bytes of the padding columns of an input row.
        output_bytes: Bytes of an output row of all linear layers.
        lora_bytes: Bytes of a row of the LoRA down-projections.
        has_dropout: True if the LoRA input has dropout.
        dense_bytes: Temporary bytes of the dequantized weight.
        per_layer_bytes: Temporary bytes of the dequantized weights of the single linear layers,
            before concatenation.
        fp8_bytes: Bytes per row of FP8 inputs (forward) and of FP8 output gradients (backward).
        weight_grad_bytes: Bytes of the weight and bias gradients.
        lora_b_grad_bytes: Bytes of the LoRA up-projection gradients.
        lora_a_grad_bytes: Bytes of the LoRA down-projection gradient.
        persistent_bytes: Bytes that the first pack allocates and that remain, without the weight.
    """

    element_size: int
    input_bytes: int
    padding_bytes: int
    output_bytes: int
    lora_bytes: int
    has_dropout: bool
    dense_bytes: int
    per_layer_bytes: int
    fp8_bytes: tuple[int, int]
    weight_grad_bytes: int
    lora_b_grad_bytes: int
    lora_a_grad_bytes: int
    persistent_bytes: int

    @classmethod
    def from_linear(
        cls, linear: FusedLinear, element_size: int, needs_input_grad: bool
    ) -> FusedLinearMemory:
        """Build the estimate from fused linear layers.

        Args:
            linear: Fused linear layers.
            element_size: Bytes of an element.
            needs_input_grad: Whether the gradient of the input is computed.
        """
        lora = linear.adapter if isinstance(linear.adapter, LoraLinear) else None
        num_ranks, out_features = (
            0 if lora is None else len(lora.lora_A),
            sum(linear.output_sizes.values()),
        )
        is_fused = lora is not None and isinstance(linear.weight, nn.Parameter)
        padding_bytes = (
            padding_columns(linear.in_features, num_ranks) * element_size if is_fused else 0
        )
        is_fp8 = isinstance(linear.weight, Fp8Weight)
        parameters = [p for p in (linear.weight, linear.bias) if isinstance(p, nn.Parameter)]
        return cls(
            element_size=element_size,
            input_bytes=linear.in_features * element_size,
            padding_bytes=padding_bytes,
            output_bytes=out_features * element_size,
            lora_bytes=num_ranks * element_size,
            has_dropout=lora is not None and lora.dropout > 0.0,
            dense_bytes=_dequantized_bytes(linear, element_size),
            per_layer_bytes=_dequantized_bytes(linear, element_size)
            * (len(linear.output_sizes) > 1),
            fp8_bytes=(linear.in_features + FP32_BYTES, out_features + FP32_BYTES)
            if is_fp8
            else (0, 0),
            weight_grad_bytes=sum(p.nbytes for p in parameters if p.requires_grad),
            lora_b_grad_bytes=0
            if lora is None
            else sum(lora_B_OR.nbytes for lora_B_OR in lora.lora_B.values()),
            lora_a_grad_bytes=0 if lora is None else lora.lora_A.nbytes,
            persistent_bytes=out_features * padding_bytes
            + (transposed_fp8_bytes(linear) if needs_input_grad else 0),
        )

    @property
    def grad_bytes(self) -> int:
        """Bytes of all parameter gradients."""
        return self.weight_grad_bytes + self.lora_b_grad_bytes + self.lora_a_grad_bytes

    @property
    def padded_input_bytes(self) -> int:
        """Bytes of an input row, including padding columns."""
        return self.input_bytes + self.padding_bytes

    @property
    def input_grad_bytes(self) -> int:
        """Bytes per row of the input gradient and of the LoRA down-projection gradient."""
        return self.input_bytes + (self.padding_bytes or self.lora_bytes)

    @property
    def normed_input_bytes(self) -> int:
        """Bytes of a row of the norm output, in FP8 or with padding columns."""
        return self.fp8_bytes[0] or self.padded_input_bytes

    @property
    def lora_input_bytes(self) -> int:
        """Bytes per row of a separate copy of the norm output for LoRA.

        The copy exists with dropout, or if the linear layer itself reads FP8.
        """
        return self.input_bytes * (self.has_dropout or self.fp8_bytes[0] > 0)

    def forward_peak(self, num_rows: int, *, is_normed: bool = False) -> int:
        """Return the peak bytes of the linear layers' forward pass, including the output.

        Args:
            num_rows: Number of input rows.
            is_normed: Whether the preceding norm has already quantized the input to FP8.
        """
        fp8_bytes = 0 if is_normed else self.fp8_bytes[0]
        return self.dense_bytes + max(
            self.per_layer_bytes, num_rows * (self.output_bytes + fp8_bytes)
        )

    def backward_peak(self, num_rows: int) -> int:
        """Return the peak bytes of computing the input gradient, including this gradient."""
        # Without padding columns, the LoRA gradients of each linear are computed and then
        # concatenated.
        lora_bytes = num_rows * (
            self.padded_input_bytes + 2 * self.lora_bytes * (not self.padding_bytes)
        )
        matmul_bytes = self.dense_bytes + max(
            self.per_layer_bytes, num_rows * (self.padded_input_bytes + self.fp8_bytes[1])
        )
        return max(lora_bytes, matmul_bytes)

    def lora_backward_bytes(self, num_rows: int) -> int:
        """Return the additional bytes if the input gradient of LoRA is computed separately.

        Returns 0 without LoRA.
        """
        return (
            num_rows * self.input_bytes
            + self.lora_a_grad_bytes
            + self.lora_a_partial_sums(num_rows)
            if self.lora_bytes
            else 0
        )

    def lora_a_partial_sums(
        self,
        num_rows: int,
        tile: TileConfig = LORA_DOWN_BACKWARD_TILE,
        num_programs: int = CONCURRENT_PROGRAMS,
    ) -> int:
        """Return the bytes of partial sums of the LoRA down-projection gradient.

        Args:
            num_rows: Number of input rows.
            tile: Tile of the kernel.
            num_programs: Number of kernel programs. It limits the number of row blocks, each of
                which has an fp32 partial sum.
        """
        num_column_tiles = -(-(self.input_bytes // self.element_size) // tile.block_n)
        num_partials = -(-num_rows // rows_per_chunk(num_rows, num_column_tiles, num_programs))
        return num_partials * self.lora_a_grad_bytes // self.element_size * FP32_BYTES


def _dequantized_bytes(linear: FusedLinear, element_size: int) -> int:
    weight = linear.weight
    if isinstance(weight, Fp8Weight) or not isinstance(weight, QuantizedWeight):
        return 0
    return weight.num_elements * element_size


@dataclass(frozen=True, slots=True)
class FusedLayerMemory:
    """Memory of a fused decoder layer in bytes, from the memory of its four projections.

    Attributes:
        qkv_proj: Query, key and value projection.
        o_proj: Output projection of attention.
        gate_up_proj: Gate and up projection of the MLP.
        down_proj: Down projection of the MLP.
        num_heads: Number of query heads.
        head_dim: Size of a head.
        element_size: Bytes of an element.
        norm_grad_bytes: Bytes of the weight gradients of both norms; 0 for a frozen norm.
        has_input_grad: True if the layer input or the weight of the first norm needs a gradient.
        has_qkv_grad: True if queries, keys and values need a gradient.
        has_output_grad: True if the layer output needs a gradient.
    """

    qkv_proj: FusedLinearMemory
    o_proj: FusedLinearMemory
    gate_up_proj: FusedLinearMemory
    down_proj: FusedLinearMemory
    num_heads: int
    head_dim: int
    element_size: int
    norm_grad_bytes: tuple[int, int]
    has_input_grad: bool
    has_qkv_grad: bool
    has_output_grad: bool

    @classmethod
    def from_layer(
        cls, layer: DecoderLayer, has_input_grad: bool, compute: ComputeConfig
    ) -> FusedLayerMemory:
        """Build the estimate from a decoder layer whose projections can be fused.

        Args:
            layer: Decoder layer with true `fusible_linears`.
            has_input_grad: Whether the input of the layer needs a gradient.
            compute: Device properties.
        """
        attn, mlp, element_size = layer.self_attn, layer.mlp, compute.element_size
        assert isinstance(mlp, GatedMlp), f"expected a gated MLP, got {type(mlp).__name__}"
        norms = layer.input_layernorm, layer.post_attention_layernorm
        has_input_grad = has_input_grad or is_trainable(norms[0])
        has_qkv_grad = has_input_grad or is_trainable(attn.qkv_proj)
        has_mlp_input_grad = has_qkv_grad or is_trainable(attn.o_proj) or is_trainable(norms[1])
        has_down_grad = has_mlp_input_grad or is_trainable(mlp.gate_up_proj)
        return cls(
            qkv_proj=FusedLinearMemory.from_linear(attn.qkv_proj, element_size, has_input_grad),
            o_proj=FusedLinearMemory.from_linear(attn.o_proj, element_size, has_qkv_grad),
            gate_up_proj=FusedLinearMemory.from_linear(
                mlp.gate_up_proj, element_size, has_mlp_input_grad
            ),
            down_proj=FusedLinearMemory.from_linear(mlp.down_proj, element_size, has_down_grad),
            num_heads=attn.o_proj.in_features // attn.head_dim,
            head_dim=attn.head_dim,
            element_size=element_size,
            norm_grad_bytes=(_norm_grad_bytes(norms[0]), _norm_grad_bytes(norms[1])),
            has_input_grad=has_input_grad,
            has_qkv_grad=has_qkv_grad,
            has_output_grad=has_down_grad or is_trainable(mlp.down_proj),
        )

    @property
    def input_row_bytes(self) -> int:
        """Bytes of the layer input per token."""
        return self.qkv_proj.input_bytes

    @property
    def saves_input(self) -> bool:
        """True if the layer input is saved for the backward pass."""
        return self.has_qkv_grad

    @property
    def saves_attention(self) -> bool:
        """True if queries, keys and values are saved for the backward pass."""
        return self.has_qkv_grad

    @property
    def persistent_bytes(self) -> int:
        """Bytes that the first pack allocates and that remain allocated, without the weights."""
        return sum(
            product.persistent_bytes
            for product in (self.qkv_proj, self.o_proj, self.gate_up_proj, self.down_proj)
        )

    def saved_bytes(self, shape: LayerInputShape) -> int:
        """Return the bytes that the layer saves for the backward pass of a pack."""
        _, num_tokens, num_rows = shape
        saved = (
            self._saved_input_bytes(num_tokens)
            + self._saved_attention_bytes(num_tokens)
            + self._saved_mlp_bytes(num_tokens, num_rows)
        )
        return saved + self._prefix_copy_bytes(shape) * self.has_qkv_grad

    def _saved_input_bytes(self, num_tokens: int) -> int:
        """Return the bytes saved before attention.

        Counts the layer input, its norm scale, the norm output, and LoRA down-projections.
        """
        norm_bytes = self.qkv_proj.input_bytes * bool(self.qkv_proj.weight_grad_bytes)
        return (
            num_tokens
            * (self.qkv_proj.input_bytes + FP32_BYTES + norm_bytes + self.qkv_proj.lora_bytes)
            * self.has_qkv_grad
        )

    def _saved_attention_bytes(self, num_tokens: int) -> int:
        """Return the bytes saved by attention: QKV product, output, and log-sum-exp of scores."""
        row_bytes = (
            self.qkv_proj.output_bytes + self.o_proj.input_bytes + FP32_BYTES * self.num_heads
        )
        return num_tokens * row_bytes * self.has_qkv_grad

    def _prefix_copy_bytes(self, shape: LayerInputShape) -> int:
        """Return the bytes of keys and values with the shared prefix repeated for each sequence.

        Only long sequences need this copy. The Triton kernel for short ones reads the prefix
        without it.
        """
        if not shape.num_duplicates or max(shape.context_lengths) <= MAX_TRITON_SEQLEN:
            return 0
        return sum(shape.context_lengths) * (
            self.qkv_proj.output_bytes - self.num_heads * self.head_dim * self.element_size
        )

    def _saved_mlp_bytes(self, num_tokens: int, num_rows: int) -> int:
        """Return the bytes saved after attention.

        Counts the residual sum, its norm scale and norm output, the gate and up products, and LoRA
        down-projections. If the MLP runs for some tokens only, their attention outputs are copied.
        """
        o_proj, gate_up_proj = self.o_proj, self.gate_up_proj
        copied_bytes = o_proj.input_bytes * (num_rows < num_tokens or not self.has_qkv_grad)
        norm_bytes = gate_up_proj.input_bytes * bool(gate_up_proj.weight_grad_bytes)
        lora_bytes = o_proj.lora_bytes + gate_up_proj.lora_bytes + self.down_proj.lora_bytes
        return (
            num_rows
            * (
                copied_bytes
                + gate_up_proj.input_bytes
                + FP32_BYTES
                + norm_bytes
                + gate_up_proj.output_bytes
                + lora_bytes
            )
            * self.has_output_grad
        )

    def forward_workspace(self, shape: LayerInputShape) -> int:
        """Return the peak of the layer's forward pass minus the bytes that it saves.

        The result is negative if the peak occurs before all saved tensors exist.
        """
        peak = max(
            self._qkv_forward_peak(shape.num_tokens),
            self._mlp_forward_peak(shape.num_tokens, shape.mlp_rows),
        )
        return peak - self.saved_bytes(shape)

    def _qkv_forward_peak(self, num_tokens: int) -> int:
        qkv_proj = self.qkv_proj
        row_bytes = (
            qkv_proj.input_bytes + FP32_BYTES + qkv_proj.normed_input_bytes + qkv_proj.lora_bytes
        )
        return num_tokens * row_bytes + max(
            num_tokens * qkv_proj.lora_input_bytes,
            qkv_proj.forward_peak(num_tokens, is_normed=True),
        )

    def _mlp_forward_peak(self, num_tokens: int, num_rows: int) -> int:
        """Return the forward peak in bytes from the output projection to the layer output.

        Padded inputs remain allocated until the end of the MLP.
        """
        o_proj, gate_up_proj, down_proj = self.o_proj, self.gate_up_proj, self.down_proj
        is_partial = num_rows < num_tokens
        saved = self._saved_input_bytes(num_tokens) + self._saved_attention_bytes(num_tokens)
        if not self.has_qkv_grad:
            # No tensor is saved, but the caller holds the input, and the layer the QKV product.
            saved = num_tokens * (
                gate_up_proj.input_bytes
                + self.qkv_proj.output_bytes
                + o_proj.input_bytes * (not is_partial)
            )
        saved += num_rows * (gate_up_proj.input_bytes + o_proj.input_bytes) * is_partial
        input_row_bytes = (
            o_proj.padded_input_bytes * bool(o_proj.padding_bytes)
            + o_proj.lora_bytes
            + gate_up_proj.normed_input_bytes
            + gate_up_proj.lora_bytes
            + FP32_BYTES
        )
        live = saved + num_rows * (input_row_bytes + gate_up_proj.input_bytes)
        live_with_gate_up = live + num_rows * (
            gate_up_proj.output_bytes + down_proj.padded_input_bytes + down_proj.lora_bytes
        )
        return max(
            live + gate_up_proj.forward_peak(num_rows, is_normed=True),
            live_with_gate_up + self._down_partial_sums(num_rows),
            live_with_gate_up + down_proj.forward_peak(num_rows),
        )

    def _down_partial_sums(self, num_rows: int) -> int:
        """Return the bytes of partial sums of the down projection's LoRA input product.

        The SwiGLU kernel computes one fp32 partial sum per block of columns.
        """
        intermediate_size = self.down_proj.input_bytes // self.element_size
        num_partials = -(
            -intermediate_size // columns_per_chunk(num_rows, intermediate_size, SWIGLU_TILE)
        )
        return (
            num_partials
            * num_rows
            * max(1, self.down_proj.lora_bytes // self.element_size)
            * FP32_BYTES
        )

    def backward_workspace(self, shape: LayerInputShape) -> int:
        """Return the additional peak memory of the backward pass in bytes.

        The backward pass frees saved activations while it allocates gradients of the layer output
        and of the weights. The result is the maximum of allocated minus freed bytes.
        """
        if not self.has_output_grad:
            return 0
        _, num_tokens, num_rows = shape
        peak = self._mlp_backward_peak(num_rows)
        if self.has_qkv_grad:
            freed = self._saved_mlp_bytes(num_tokens, num_rows)
            attention_peak = max(
                self._attention_backward_peak(shape), self._qkv_backward_peak(num_tokens)
            )
            peak = max(peak, attention_peak + self._mlp_grad_bytes() - freed)
        return peak

    def _mlp_backward_peak(self, num_rows: int) -> int:
        """Return the backward peak in bytes from the layer output to the attention output."""
        o_proj, gate_up_proj, down_proj = self.o_proj, self.gate_up_proj, self.down_proj
        peak = live = num_rows * gate_up_proj.input_bytes
        peak = max(peak, live + down_proj.backward_peak(num_rows))
        live += down_proj.grad_bytes
        peak = max(
            peak,
            live
            + num_rows * down_proj.input_grad_bytes
            + down_proj.lora_a_partial_sums(num_rows, SWIGLU_BACKWARD_TILE, TARGET_PROGRAMS),
        )
        peak = max(
            peak, live + gate_up_proj.weight_grad_bytes + gate_up_proj.backward_peak(num_rows)
        )
        peak = max(
            peak,
            live
            + gate_up_proj.weight_grad_bytes
            + num_rows * gate_up_proj.input_grad_bytes
            + gate_up_proj.lora_backward_bytes(num_rows),
        )
        live += gate_up_proj.grad_bytes + num_rows * gate_up_proj.input_bytes
        peak = max(peak, live + self._norm_partial_sums(num_rows, self.norm_grad_bytes[1]))
        live += self.norm_grad_bytes[1]
        peak = max(peak, live + o_proj.weight_grad_bytes + o_proj.backward_peak(num_rows))
        peak = max(
            peak,
            live
            + o_proj.weight_grad_bytes
            + num_rows * o_proj.input_grad_bytes
            + o_proj.lora_backward_bytes(num_rows),
        )
        return max(peak, live + o_proj.grad_bytes + num_rows * o_proj.input_bytes)

    def _norm_partial_sums(self, num_rows: int, weight_bytes: int) -> int:
        """Return the bytes of partial sums of a norm weight gradient, one per kernel program."""
        if not weight_bytes:
            return 0
        num_partials = -(-num_rows // max(1, -(-num_rows // MAX_PARTIAL_SUMS)))
        return num_partials * weight_bytes // self.element_size * FP32_BYTES

    def _mlp_grad_bytes(self) -> int:
        """Return the bytes of weight gradients that exist when the attention backward pass begins.

        Includes the output projection, the MLP and its norm.
        """
        grad_bytes = (
            self.o_proj.grad_bytes + self.gate_up_proj.grad_bytes + self.down_proj.grad_bytes
        )
        return grad_bytes + self.norm_grad_bytes[1]

    def _attention_backward_peak(self, shape: LayerInputShape) -> int:
        """Return the peak bytes of the attention backward pass.

        Counts the gradients of the attention output, of the residual, and of queries, keys and
        values.
        """
        lengths, num_tokens, num_elements = (
            shape.context_lengths,
            shape.num_tokens,
            self.num_heads * self.head_dim,
        )
        live = num_tokens * (
            self.qkv_proj.input_bytes + self.o_proj.input_bytes + self.qkv_proj.output_bytes
        )
        if max(lengths) <= MAX_TRITON_SEQLEN:
            # Each sequence has its own gradient of the keys and values of the shared prefix.
            kv_grad_elements = (
                len(lengths)
                * lengths[0]
                * (self.qkv_proj.output_bytes // self.element_size - num_elements)
            )
            return live + FP32_BYTES * (
                num_tokens * self.num_heads + kv_grad_elements * (shape.num_duplicates > 0)
            )
        padded_rows = num_tokens + FLASH_BACKWARD_TILE * len(lengths)
        padded_head_dim = -(-self.head_dim // FLASH_HEAD_DIM_MULTIPLE) * FLASH_HEAD_DIM_MULTIPLE
        accumulator_bytes = padded_rows * self.num_heads * (padded_head_dim + 1) * FP32_BYTES
        # Each query head first has its own gradient of keys and values.
        is_grouped = self.qkv_proj.output_bytes < 3 * num_elements * self.element_size
        kv_grad_elements = 2 * sum(lengths) * num_elements * self.element_size * is_grouped
        return live + accumulator_bytes + kv_grad_elements + self._prefix_copy_bytes(shape)

    def _qkv_backward_peak(self, num_tokens: int) -> int:
        """Return the peak of the QKV projection's backward pass, minus freed attention tensors."""
        qkv_proj = self.qkv_proj
        live = num_tokens * (
            qkv_proj.input_bytes + 2 * qkv_proj.output_bytes
        ) - self._saved_attention_bytes(num_tokens)
        if not self.has_input_grad:
            # Only the LoRA gradient.
            lora_bytes = num_tokens * qkv_proj.lora_bytes
            lora_only = (
                lora_bytes + qkv_proj.lora_a_partial_sums(num_tokens) + qkv_proj.lora_a_grad_bytes
            )
            return live + max(2 * lora_bytes, lora_only, lora_bytes + qkv_proj.grad_bytes)
        peak = live + qkv_proj.backward_peak(num_tokens)
        peak = max(
            peak,
            live
            + num_tokens * qkv_proj.input_grad_bytes
            + qkv_proj.lora_backward_bytes(num_tokens),
        )
        live += qkv_proj.lora_a_grad_bytes + num_tokens * qkv_proj.input_bytes
        peak = max(peak, live + self._norm_partial_sums(num_tokens, self.norm_grad_bytes[0]))
        return max(
            peak,
            live
            + self.norm_grad_bytes[0]
            + qkv_proj.weight_grad_bytes
            + qkv_proj.lora_b_grad_bytes,
        )


def _norm_grad_bytes(norm: nn.Module) -> int:
    """Return the bytes of a norm's weight gradient; 0 if the norm is frozen."""
    return sum(p.nbytes for p in norm.parameters() if p.requires_grad)
