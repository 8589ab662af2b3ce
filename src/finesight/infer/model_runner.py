"""Device state and forward passes of the engine: prefill, and eager and fused decoding steps.

The fused decoding step of the Qwen2, Qwen3 and Qwen3.5 decoders computes the same as
`Decoder.forward` for one new token per sequence. At small batch sizes a step is bound by reading
the weights and by kernel launches, so operations are fused to reduce the number of launches.

Shapes: R sequences of the batch, V vocabulary, W or D hidden size, T tokens of a packed batch, M
image tokens, K feature levels per image token, N adapters, I intermediate size.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from finesight.encode.batch import PackedBatch, copy_to_device
from finesight.encode.packing import pack, plan_packs
from finesight.encode.tokenization import EncodedSample, LruCache, VisualSpan
from finesight.infer.block_manager import get_span_patches
from finesight.infer.kv_cache import KVCache
from finesight.infer.paged_attention import (
    DecodeAttention,
    PrefillAttention,
    PrefillChunk,
    has_paged_kernels,
)
from finesight.infer.scheduler import PromptState
from finesight.model.cuda_graph_cache import CudaGraphCache
from finesight.model.decoder import DecoderAttention, DecoderLayer
from finesight.model.fused_ops import sigmoid_gate
from finesight.model.gated_delta_net import L2_NORM_EPS, supports_kernels
from finesight.model.hybrid_decoder import GatedAttention, GatedDeltaNet, HybridDecoderLayer
from finesight.model.kernels import decoding
from finesight.model.kernels import gated_delta_net as delta_net_kernels
from finesight.model.kernels.runtime import HAS_TRITON
from finesight.model.layers import (
    GatedMlp,
    RmsNorm,
    RotaryCosSin,
    SparseMoeBlock,
    ZeroCenteredRmsNorm,
)
from finesight.model.linear import FusedLinear, add_lora_delta, single_output
from finesight.model.lora.multi import MultiLoraLinear
from finesight.model.quant.base import Packed4BitMatrix, QuantizedWeight, RmsNormParams, pack_inputs
from finesight.model.vlm import VisionLanguageModel
from finesight.vision.image_processing import concat_patches

MAX_ENCODER_PATCHES = 1 << 15
"""Maximum number of patches per vision-encoder pass over several images.

This limits activation memory.
"""

GPU_FEATURE_CACHE_BYTES = 1 << 28
"""Size of the image-feature cache on a GPU: 37 images of 1,000 tokens for 7B models."""

CPU_FEATURE_CACHE_BYTES = 1 << 26


class ModelRunner:
    """Runs a model with its KV cache and the device state of the decoding batch.

    Rows 0 to num_seqs - 1 of the batch are in use. No method synchronizes with the device.
    """

    def __init__(
        self, model: VisionLanguageModel, cache: KVCache, use_cuda_graphs: bool = True
    ) -> None:
        self.model = model
        self.cache = cache
        self.device = cache.device
        self.max_num_seqs = max_num_seqs = len(cache.seq_lens_R)
        self.ids_R = torch.zeros(max_num_seqs, dtype=torch.int64, device=self.device)
        self.is_finite_R = torch.ones(max_num_seqs, dtype=torch.bool, device=self.device)
        self._position_ids_R = torch.zeros(max_num_seqs, dtype=torch.int64, device=self.device)
        self._cuda_graphs: CudaGraphCache | None = None
        if model.supports_cuda_graphs and has_paged_kernels(self.cache) and use_cuda_graphs:
            self._cuda_graphs = CudaGraphCache(self.device)
        # The fused layers of training are another fused decoding step.
        self._use_fused_decode = supports_fused_decode(model) and not cache.matches_training
        feature_bytes = CPU_FEATURE_CACHE_BYTES
        if self.device.type == "cuda":
            feature_bytes = GPU_FEATURE_CACHE_BYTES
        self.feature_cache = ImageFeatureCache(feature_bytes)
        lora_routing = model.lora_routing
        if lora_routing is not None:
            self._lora_masks_RN = torch.zeros_like(lora_routing.build_mask(None)).repeat(
                max_num_seqs, 1
            )

    def prefill(self, prompts: Sequence[PromptState], stops: Sequence[int]) -> Tensor | None:
        """Run one prefill step of prompts that use the same adapter.

        Args:
            prompts: Prompts to process, starting at their first token without cached keys and
                values.

        Returns:
            Next-token logits [n, V] of the n prompts that are complete, or None.
        """
        if (routing := self.model.lora_routing) is not None:
            routing.set_mask(routing.build_mask(prompts[0].adapter_index))
        if self.cache.matches_training:
            # Training encodes the images of one prompt together, and results depend on the batch.
            for prompt in prompts:
                load_image_features(self.model, [prompt], self.feature_cache, sys.maxsize)
        else:
            load_image_features(self.model, prompts, self.feature_cache, MAX_ENCODER_PATCHES)
        chunks = [
            PrefillChunk(p.block_ids, p.num_computed_tokens, stop, p.num_tokens, p.state_slot)
            for p, stop in zip(prompts, stops, strict=True)
        ]
        batch, features_MKD = _pack_chunks(prompts, chunks)
        attention = PrefillAttention(self.cache, chunks)
        end_indices = np.cumsum([chunk.stop - chunk.start for chunk in chunks]) - 1
        is_complete = np.array([chunk.stop == chunk.prompt_length for chunk in chunks])
        logit_indices = end_indices[is_complete]
        if not is_complete.any():
            # The forward pass returns one row at least, which is not used.
            logit_indices = end_indices[:1]
        logit_indices_L = copy_to_device(logit_indices, self.device)
        h_LW = self.model.forward_hidden(
            batch.to(self.device), attention, logit_indices_L, features_MKD
        )
        for prompt, chunk in zip(prompts, chunks, strict=True):
            prompt.num_computed_tokens = chunk.stop
            if chunk.stop == chunk.prompt_length:
                prompt.features = []
        if not is_complete.any():
            return None
        return self.model.compute_logits(self.model.apply_final_norm(h_LW))

    def copy_states(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy linear attention states from the first to the second slot of each pair."""
        for source, target in pairs:
            assert self.cache.linear_states is not None, "a cache without linear attention states"
            self.cache.linear_states.copy(source, target)

    def start_sequence(
        self, batch_index: int, prompt: PromptState, id_1: Tensor, num_generated: int = 0
    ) -> None:
        """Add a sequence to the decoding batch.

        Args:
            num_generated: Number of completion tokens in the KV cache, without the next one.
        """
        self.ids_R[batch_index : batch_index + 1] = id_1
        cache = self.cache
        for buffer, value in (
            (cache.seq_lens_R, prompt.num_tokens + num_generated),
            (cache.prompt_lens_R, prompt.num_tokens),
            (cache.active_R, 1),
            (cache.state_slots_R, prompt.state_slot),
            (self._position_ids_R, prompt.max_position + num_generated),
        ):
            buffer[batch_index].fill_(value)
        if (routing := self.model.lora_routing) is not None:
            self._lora_masks_RN[batch_index] = routing.build_mask(prompt.adapter_index)[0]
        block_ids = copy_to_device(np.array(prompt.block_ids, dtype=np.int32), self.device)
        cache.block_table_RB[batch_index, : len(prompt.block_ids)] = block_ids

    def remove_sequence(self, batch_index: int, last_index: int) -> None:
        """Remove a sequence from the decoding batch; the last sequence takes its row."""
        cache = self.cache
        reset = [cache.seq_lens_R, cache.active_R, cache.state_slots_R, cache.block_table_RB]
        if batch_index != last_index:
            moved = [*reset, cache.prompt_lens_R, self._position_ids_R, self.ids_R]
            if self.model.lora_routing is not None:
                moved.append(self._lora_masks_RN)
            for buffer in moved:
                buffer[batch_index] = buffer[last_index]
        for buffer in reset:
            buffer[last_index].fill_(0)

    def decode(self, num_seqs: int, max_seq_len: int) -> Tensor:
        """Run one decoding step of the first `num_seqs` sequences.

        Writes the most probable tokens to `ids_R` and whether the logits are finite to
        `is_finite_R`.

        Returns:
            Logits [R, V], valid until the next step.
        """
        if self._cuda_graphs is None:
            return self._decode_step(num_seqs, max_seq_len)
        # Each size needs a CUDA graph of its own, so only few sizes are used.
        sizes = 1, 2, 4, -(-num_seqs // 8) * 8
        padded_num_seqs = min(next(n for n in sizes if num_seqs <= n), self.max_num_seqs)
        return self._cuda_graphs.run(
            padded_num_seqs, lambda: self._decode_step(padded_num_seqs, max_seq_len)
        )[:num_seqs]

    def _decode_step(self, num_seqs: int, max_seq_len: int) -> Tensor:
        """Run a decoding step; all results except the logits are written to static buffers."""
        position_ids_R = self._position_ids_R[:num_seqs]
        position_ids_R += self.cache.active_R[:num_seqs]
        if self.model.lora_routing is not None:
            self.model.lora_routing.set_mask(self._lora_masks_RN[:num_seqs])
        attention = DecodeAttention(self.cache, num_seqs, max_seq_len)
        ids_R = self.ids_R[:num_seqs]
        position_ids_3R = position_ids_R.expand(3, -1)
        if self._use_fused_decode:
            logits_RV = fused_decode_step(self.model, ids_R, position_ids_3R, attention)
        else:
            decoder = self.model.model
            h_RW = decoder(decoder.embed(ids_R), position_ids_3R, attention)
            logits_RV = self.model.compute_logits(self.model.apply_final_norm(h_RW))
        max_logits_R, ids_R = logits_RV.max(-1)
        self.ids_R[:num_seqs].copy_(ids_R)
        # The maximum is NaN if any logit is NaN.
        self.is_finite_R[:num_seqs].copy_(max_logits_R.isfinite())
        return logits_RV


ImageFeatureCache = LruCache[tuple[int | None, bytes], Tensor]
"""Cache of vision features [M, K, W] by adapter and pixel hash."""


class _MissingFeatures(NamedTuple):
    """An image or video of a prompt whose vision features are not cached."""

    prompt: PromptState
    span_index: int
    image_hash: bytes


def load_image_features(
    model: VisionLanguageModel,
    prompts: Sequence[PromptState],
    feature_cache: ImageFeatureCache,
    max_patches: int,
) -> None:
    """Set the vision features that prompts still need, from the cache or the encoder.

    Missing features are encoded in batches of images with at most `max_patches` patches.
    """
    missing: list[_MissingFeatures] = []
    for prompt in prompts:
        if prompt.encoded.tokenized.spans and not prompt.features:
            missing += _set_cached_features(prompt, feature_cache)
    if not missing:
        return
    encoded_features = _encode_missing(model, missing, max_patches)
    for prompt, span_index, image_hash in missing:
        prompt.features[span_index] = features_MKW = encoded_features[image_hash]
        # Copy: a view would keep the features of the full encoder batch alive.
        key = prompt.adapter_index, image_hash
        feature_cache.put(key, features_MKW.clone(), features_MKW.nbytes)


def _set_cached_features(
    prompt: PromptState, feature_cache: ImageFeatureCache
) -> list[_MissingFeatures]:
    """Set the cached vision features that a prompt still needs, and return those missing."""
    spans = prompt.encoded.tokenized.spans
    prompt.features = [None] * len(spans)
    missing = []
    for index, (span, image_hash) in enumerate(zip(spans, prompt.image_hashes, strict=True)):
        if span.stop > prompt.num_computed_tokens:
            prompt.features[index] = feature_cache.get((prompt.adapter_index, image_hash))
            if prompt.features[index] is None:
                missing.append(_MissingFeatures(prompt, index, image_hash))
    return missing


def _encode_missing(
    model: VisionLanguageModel, missing: Sequence[_MissingFeatures], max_patches: int
) -> dict[bytes, Tensor]:
    """Encode images and videos, and return their features by hash; equal ones are encoded once."""
    to_encode: dict[bytes, tuple[NDArray[np.uint8], VisualSpan]] = {}
    for prompt, index, image_hash in missing:
        patches = get_span_patches(prompt.encoded, index)
        to_encode[image_hash] = patches, prompt.encoded.tokenized.spans[index]
    image_hashes = list(to_encode)
    device = model.model.embed_tokens.weight.device
    encoded_features: dict[bytes, Tensor] = {}
    for pack_indices in plan_packs([len(item) for item, _ in to_encode.values()], max_patches):
        packed_hashes = [image_hashes[index] for index in pack_indices]
        packed_patches = []
        grids = []
        lengths = []
        for image_hash in packed_hashes:
            patches, span = to_encode[image_hash]
            packed_patches.append(patches)
            grids.append(span.grid_thw)
            lengths.append(span.stop - span.start)
        features_MKW = model.encode_images(
            copy_to_device(concat_patches(packed_patches), device), grids
        )
        encoded_features |= zip(packed_hashes, torch.split(features_MKW, lengths), strict=True)
    return encoded_features


def _pack_chunks(
    prompts: Sequence[PromptState], chunks: Sequence[PrefillChunk]
) -> tuple[PackedBatch, Tensor | None]:
    """Pack prompt chunks into a batch with the vision features of their image tokens."""
    samples: list[EncodedSample] = []
    features: list[Tensor] = []
    for prompt, chunk in zip(prompts, chunks, strict=True):
        tokenized = prompt.encoded.tokenized
        spans = []
        for span, image_features in zip(tokenized.spans, prompt.features, strict=True):
            start = max(span.start, chunk.start)
            stop = min(span.stop, chunk.stop)
            if start < stop:
                assert image_features is not None, f"an image of {tokenized.id} has no features"
                features.append(image_features[start - span.start : stop - span.start])
                spans.append(replace(span, start=start - chunk.start, stop=stop - chunk.start))
        tokenized = replace(
            tokenized,
            ids_T=tokenized.ids_T[chunk.start : chunk.stop],
            loss_mask_T=np.zeros(chunk.stop - chunk.start, dtype=np.bool_),
            position_ids_3T=tokenized.position_ids_3T[:, chunk.start : chunk.stop],
            spans=tuple(spans),
        )
        samples.append(EncodedSample(tokenized, np.empty((0, 0), dtype=np.uint8)))
    return pack(samples), torch.cat(features) if features else None


_LAYER_TYPES = DecoderLayer, HybridDecoderLayer


def supports_fused_decode(model: VisionLanguageModel) -> bool:
    """Return whether `fused_decode_step` supports a model.

    It requires Triton, a CUDA GPU, 16-bit weights and known decoder layers.
    """
    weight = model.model.embed_tokens.weight
    is_16_bit = weight.dtype in (torch.bfloat16, torch.float16)
    linear_attention = model.config.decoder.linear_attention
    has_known_layers = all(isinstance(layer, _LAYER_TYPES) for layer in model.model.layers)
    if linear_attention is not None and not supports_kernels(linear_attention, weight):
        return False
    return HAS_TRITON and weight.is_cuda and is_16_bit and has_known_layers


def fused_decode_step(
    model: VisionLanguageModel, ids_R: Tensor, position_ids_3R: Tensor, attention: DecodeAttention
) -> Tensor:
    """Compute the next-token logits [R, V] of one decoding step with fused kernels."""
    decoder = model.model
    x_RD = decoder.embed(ids_R)
    rotary = decoder.compute_rotary(position_ids_3R, attention, x_RD.dtype)
    assert isinstance(rotary, RotaryCosSin), f"unsupported rotary embedding {type(rotary).__name__}"
    for layer in decoder.layers:
        assert isinstance(layer, _LAYER_TYPES), f"unsupported layer {type(layer).__name__}"
        norm = layer.input_layernorm
        if layer.self_attn is not None:
            x_RD = _attention_block(norm, layer.self_attn, x_RD, rotary, attention)
        else:
            assert isinstance(layer.attn, GatedDeltaNet), "a layer without attention"
            x_RD = _linear_attention_block(norm, layer.attn, x_RD, attention)
        mlp = layer.mlp
        mlp_norm = layer.post_attention_layernorm
        if isinstance(mlp, SparseMoeBlock):
            x_RD = x_RD + mlp(mlp_norm(x_RD))
        else:
            x_RD = _linear_add(mlp.down_proj, _swiglu_mlp(mlp_norm, mlp, x_RD), x_RD)
    lm_head = model.lm_head
    if lm_head is None and len(x_RD) == 1:
        weight = decoder.embed_tokens.weight
        logits_1V: Tensor = decoding.fused_gemv(x_RD, weight, **_get_norm_args(decoder.norm))
        return logits_1V
    if lm_head is None or not _supports_gemv(lm_head):
        return model.compute_logits(model.apply_final_norm(x_RD))
    return _norm_linear(lm_head, x_RD, decoder.norm)


def _attention_block(
    norm: RmsNorm,
    self_attn: DecoderAttention | GatedAttention,
    x_RD: Tensor,
    rotary: RotaryCosSin,
    attention: DecodeAttention,
) -> Tensor:
    head_dim = self_attn.head_dim
    cache = attention.cache
    q_RE, k_RE, v_RE = _project(self_attn.qkv_proj, norm, x_RD)
    k_RKD = torch.unflatten(k_RE, 1, (-1, head_dim))
    v_RKD = torch.unflatten(v_RE, 1, (-1, head_dim))
    gate_RHD = None
    norm_offset = 0.0
    if isinstance(self_attn, GatedAttention):
        layer_index = self_attn.attention_index
        q_RHD, gate_RHD = torch.unflatten(q_RE, 1, (-1, 2 * head_dim)).chunk(2, dim=-1)
        norm_offset = 1.0  # its norms are zero-centered
    else:
        layer_index = self_attn.layer_index
        q_RHD = torch.unflatten(q_RE, 1, (-1, head_dim))
    qk_norms = None
    if self_attn.q_norm is not None and self_attn.k_norm is not None:
        qk_norms = decoding.QKNorms(
            self_attn.q_norm.weight, self_attn.k_norm.weight, self_attn.q_norm.eps, norm_offset
        )
    q_RHD = decoding.rope_and_cache(
        q_RHD, k_RKD, v_RKD, qk_norms, rotary.cos_T1D, rotary.sin_T1D, attention.slot_mapping_R,
        cache.keys_LPSKD[layer_index], cache.values_LPSKD[layer_index],
    )  # fmt: skip
    o_RHD = attention.attend(layer_index, q_RHD)
    if gate_RHD is not None:
        o_RHD = sigmoid_gate(o_RHD, gate_RHD)
    return _linear_add(self_attn.o_proj, o_RHD.flatten(1), x_RD)


def _linear_attention_block(
    norm: RmsNorm, attn: GatedDeltaNet, x_RD: Tensor, attention: DecodeAttention
) -> Tensor:
    qkv_RN, z_RE, b_RH, a_RH = _project(attn.in_proj, norm, x_RD)
    states = attention.cache.linear_states
    config = attn.config
    assert states is not None, "a cache without linear attention states"
    conv_SWN, delta_SHDV = states.get_layer(attn.attention_index)
    slots_R = attention.state_slots_R
    qkv_RN = delta_net_kernels.causal_conv_step(
        qkv_RN, attn.conv1d.weight.squeeze(1), conv_SWN, slots_R, config.num_key_heads,
        config.num_value_heads, config.value_head_dim, L2_NORM_EPS,
    )  # fmt: skip
    o_RE = delta_net_kernels.gated_delta_step(
        qkv_RN, a_RH, b_RH, attn.A_log, attn.dt_bias, z_RE, attn.norm.weight, delta_SHDV, slots_R,
        config.num_key_heads, attn.norm.eps,
    )  # fmt: skip
    return _linear_add(attn.out_proj, o_RE, x_RD)


def _project(linear: FusedLinear, norm: RmsNorm, x_RD: Tensor) -> tuple[Tensor, ...]:
    """Apply RMSNorm and a fused linear layer; the rows of the outputs may be strided."""
    if not _supports_gemv(linear):
        projected: tuple[Tensor, ...] = linear(norm(x_RD))
        return projected
    sizes = list(linear.output_sizes.values())
    return torch.split(_norm_linear(linear, x_RD, norm), sizes, dim=1)


def _swiglu_mlp(norm: RmsNorm, mlp: GatedMlp, x_RD: Tensor) -> Tensor:
    gate_up_proj = mlp.gate_up_proj
    if not _supports_gemv(gate_up_proj):
        gate_RI, up_RI = gate_up_proj(norm(x_RD))
        return F.silu(gate_RI).mul_(up_RI)
    if len(x_RD) == 1:
        return _linear_single_row(gate_up_proj, x_RD, norm=norm, is_gated=True)
    y_RI: Tensor = decoding.swiglu(_norm_linear(gate_up_proj, x_RD, norm))
    return y_RI


def _norm_linear(linear: FusedLinear, x_RD: Tensor, norm: RmsNorm) -> Tensor:
    """Apply RMSNorm and a fused linear layer, and return the concatenated outputs."""
    if len(x_RD) == 1:
        return _linear_single_row(linear, x_RD, norm=norm)
    normed_RD = norm(x_RD)
    if isinstance(linear.weight, QuantizedWeight):
        return torch.cat(linear(normed_RD), 1)
    y_RO = F.linear(normed_RD, linear.weight, linear.bias)
    if isinstance(linear.adapter, MultiLoraLinear):
        return linear.adapter.add_delta(y_RO, normed_RD)
    return y_RO


def _linear_add(linear: FusedLinear, x_RI: Tensor, residual_RD: Tensor) -> Tensor:
    """Apply a linear layer and add the residual: residual + x W^T."""
    if not _supports_gemv(linear) or linear.bias is not None:
        return residual_RD + single_output(linear(x_RI))
    if len(x_RI) == 1:
        return _linear_single_row(linear, x_RI, residual=residual_RD)
    if isinstance(linear.weight, QuantizedWeight):
        return residual_RD + single_output(linear(x_RI))
    y_RD = torch.addmm(residual_RD, x_RI, linear.weight.T)
    if isinstance(linear.adapter, MultiLoraLinear):
        return linear.adapter.add_delta(y_RD, x_RI)
    return y_RD


def _linear_single_row(
    linear: FusedLinear,
    x_1I: Tensor,
    *,
    norm: RmsNorm | None = None,
    residual: Tensor | None = None,
    is_gated: bool = False,
) -> Tensor:
    """Apply a fused linear layer and its multi-LoRA delta to a single row."""
    norm_kwargs = {} if norm is None else _get_norm_args(norm)
    lora_delta = None
    multi_lora = linear.adapter
    if isinstance(multi_lora, MultiLoraLinear):
        low_1S = decoding.fused_gemv(
            x_1I, multi_lora.lora_A_SI, output_scale_1O=multi_lora.rank_scales_TS, **norm_kwargs
        )
        lora_delta = decoding.GemvLoraDelta(low_1S, multi_lora.lora_B_OS)
    if isinstance(linear.weight, QuantizedWeight):
        y_1O = _linear_4bit(linear.weight, x_1I, linear.bias, norm, residual)
        if lora_delta is not None:
            add_lora_delta(y_1O, lora_delta.low_1S, lora_delta.lora_B_OS)
        return decoding.swiglu(y_1O) if is_gated else y_1O
    out_1O: Tensor = decoding.fused_gemv(
        x_1I,
        linear.weight,
        bias_O=linear.bias,
        lora_delta=lora_delta,
        residual_1O=residual,
        is_gated=is_gated,
        **norm_kwargs,
    )
    return out_1O


def _linear_4bit(
    weight: QuantizedWeight,
    x_1I: Tensor,
    bias_O: Tensor | None,
    norm: RmsNorm | None,
    residual: Tensor | None,
) -> Tensor:
    """Apply a fused linear layer with 4-bit weights to a single row.

    One kernel packs the input, and one kernel per matrix computes the product.
    """
    rms_norm = None
    if norm is not None:
        weight_I: Tensor = norm.weight
        if isinstance(norm, ZeroCenteredRmsNorm):
            weight_I = norm.scale(x_1I.dtype)
        rms_norm = RmsNormParams(weight_I, norm.eps)
    matrices = [matrix for matrix in weight.matrices if isinstance(matrix, Packed4BitMatrix)]
    output_sizes = [matrix.out_features for matrix in matrices]
    y_1O = x_1I.new_empty(1, sum(output_sizes))
    biases = _split_optional(bias_O, output_sizes)
    residuals = _split_optional(residual, output_sizes)
    packed_inputs = pack_inputs(matrices, x_1I, rms_norm)
    for matrix, x, y_O, bias, layer_residual in zip(
        matrices, packed_inputs, torch.split(y_1O[0], output_sizes), biases, residuals, strict=True
    ):
        matrix.gemv_packed(x, y_O, bias, layer_residual)
    return y_1O


def _split_optional(x: Tensor | None, sizes: list[int]) -> Sequence[Tensor | None]:
    """Split a row at the outputs of several matrices; None for each without a row."""
    if x is None:
        return [None] * len(sizes)
    return torch.split(x.view(-1), sizes)


def _get_norm_args(norm: RmsNorm) -> dict[str, Any]:
    """Return the arguments of `fused_gemv` for a norm."""
    offset = 1.0 if isinstance(norm, ZeroCenteredRmsNorm) else 0.0
    return {"norm_I": norm.weight, "eps": norm.eps, "norm_offset": offset}


def _supports_gemv(linear: FusedLinear) -> bool:
    """Return True if the GEMV kernels support a linear layer.

    They support unquantized and packed 4-bit weights without a training adapter.
    """
    if linear.adapter is not None and not isinstance(linear.adapter, MultiLoraLinear):
        return False
    weight = linear.weight
    return not isinstance(weight, QuantizedWeight) or all(
        isinstance(matrix, Packed4BitMatrix) and matrix.supports_kernels()
        for matrix in weight.matrices
    )
