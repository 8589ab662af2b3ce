"""Device state and forward passes of the engine: prefill and decoding steps.

Shapes: R sequences of the batch, V vocabulary, W hidden size, T tokens of a packed batch, M image
tokens, K feature levels per image token, N adapters.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from finesight.encode.packing import PackedBatch, compute_cu_seqlens, copy_to_device, plan_packs
from finesight.encode.tokenization import EncodedSample
from finesight.infer.decode_step import fused_decode_step, supports_fused_decode
from finesight.infer.kv_cache import (
    DecodeAttention,
    KVCache,
    PrefillAttention,
    PrefillChunk,
    get_span_patches,
    has_paged_kernels,
)
from finesight.infer.scheduler import PromptState
from finesight.model.cuda_graph_cache import CudaGraphCache
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
        self,
        model: VisionLanguageModel,
        *,
        max_num_seqs: int,
        num_blocks: int,
        block_size: int,
        use_cuda_graphs: bool = True,
        matches_training: bool = False,
    ) -> None:
        self.model, self._fuses_layers = model, matches_training
        weight = model.model.embed_tokens.weight
        self.device = weight.device
        self.cache = KVCache(
            model.config.decoder,
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            dtype=weight.dtype,
            device=self.device,
        )
        self.max_num_seqs = max_num_seqs
        self.ids_R = torch.zeros(max_num_seqs, dtype=torch.int64, device=self.device)
        self.is_finite_R = torch.ones(max_num_seqs, dtype=torch.bool, device=self.device)
        self._position_ids_R = torch.zeros(max_num_seqs, dtype=torch.int64, device=self.device)
        can_capture = (
            use_cuda_graphs and model.supports_cuda_graphs and has_paged_kernels(self.cache)
        )
        self._cuda_graphs = CudaGraphCache(self.device) if can_capture else None
        # Linear attention needs the kernels of `fused_decode_step`.
        is_hybrid = model.config.decoder.linear_attention is not None
        self._use_fused_decode = supports_fused_decode(model) and (
            is_hybrid or not matches_training
        )
        self.feature_cache = _ImageFeatureCache(
            GPU_FEATURE_CACHE_BYTES if self.device.type == "cuda" else CPU_FEATURE_CACHE_BYTES
        )
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
        if self.model.lora_routing is not None:
            self.model.lora_routing.set_mask(
                self.model.lora_routing.build_mask(prompts[0].adapter_index)
            )
        load_image_features(self.model, prompts, self.feature_cache)
        chunks = [
            PrefillChunk(
                prompt.block_ids,
                prompt.num_computed_tokens,
                stop,
                prompt.num_tokens,
                prompt.state_slot,
            )
            for prompt, stop in zip(prompts, stops, strict=True)
        ]
        batch, features_MKD = _pack_chunks(prompts, chunks)
        attention = PrefillAttention(self.cache, chunks, self._fuses_layers)
        end_indices = np.cumsum([chunk.stop - chunk.start for chunk in chunks]) - 1
        is_last = np.array([c.stop == c.prompt_length for c in chunks])
        logit_indices_L = copy_to_device(
            end_indices[is_last] if is_last.any() else end_indices[:1], self.device
        )
        h_LW = self.model.forward_hidden(
            batch.to(self.device), attention, logit_indices_L, features_MKD
        )
        for prompt, chunk in zip(prompts, chunks, strict=True):
            prompt.num_computed_tokens = chunk.stop
            if chunk.stop == chunk.prompt_length:
                prompt.features = []
        return (
            self.model.compute_logits(self.model.apply_final_norm(h_LW)) if is_last.any() else None
        )

    def start_sequence(
        self, batch_index: int, prompt: PromptState, id_1: Tensor, num_generated: int = 0
    ) -> None:
        """Add a sequence to the decoding batch.

        Args:
            num_generated: Number of completion tokens in the KV cache, without the next one.
        """
        self.ids_R[batch_index : batch_index + 1] = id_1
        values = [
            prompt.num_tokens + num_generated,
            prompt.num_tokens,
            1,
            prompt.max_position + num_generated,
        ]
        cache = self.cache
        for buffer, value in zip(
            (cache.seq_lens_R, cache.prompt_lens_R, cache.active_R, self._position_ids_R),
            values,
            strict=True,
        ):
            buffer[batch_index].fill_(value)
        if cache.linear_states is not None:
            cache.linear_states.slots_R[batch_index].fill_(prompt.state_slot)
        if self.model.lora_routing is not None:
            self._lora_masks_RN[batch_index] = self.model.lora_routing.build_mask(
                prompt.adapter_index
            )[0]
        block_ids = copy_to_device(np.array(prompt.block_ids, dtype=np.int32), self.device)
        cache.block_table_RB[batch_index, : len(prompt.block_ids)] = block_ids

    def remove_sequence(self, batch_index: int, last_index: int) -> None:
        """Remove a sequence from the decoding batch; the last sequence takes its row."""
        cache = self.cache
        buffers: tuple[Tensor, ...] = (
            cache.seq_lens_R,
            cache.prompt_lens_R,
            cache.active_R,
            self._position_ids_R,
            self.ids_R,
        )
        if cache.linear_states is not None:
            buffers = (*buffers, cache.linear_states.slots_R)
        if batch_index != last_index:
            masks = () if self.model.lora_routing is None else (self._lora_masks_RN,)
            for buffer in (*buffers, cache.block_table_RB, *masks):
                buffer[batch_index] = buffer[last_index]
        for buffer in (cache.seq_lens_R, cache.active_R):
            buffer[last_index].fill_(0)
        if cache.linear_states is not None:
            cache.linear_states.slots_R[last_index].fill_(0)
        cache.block_table_RB[last_index].fill_(0)

    def decode(self, num_seqs: int, max_seq_len: int) -> Tensor:
        """Run one decoding step of the first `num_seqs` sequences.

        Writes the most probable tokens to `ids_R` and whether the logits are finite to
        `is_finite_R`.

        Returns:
            Logits [R, V], valid until the next step.
        """
        if self._cuda_graphs is None:
            return self._decode_step(num_seqs, max_seq_len)
        padded_num_seqs = min(pad_num_seqs(num_seqs), self.max_num_seqs)
        return self._cuda_graphs.run(
            padded_num_seqs, lambda: self._decode_step(padded_num_seqs, max_seq_len)
        )[:num_seqs]

    def _decode_step(self, num_seqs: int, max_seq_len: int) -> Tensor:
        """Run a decoding step; all results except the logits are written to static buffers."""
        position_ids_R = self._position_ids_R[:num_seqs]
        position_ids_R += self.cache.active_R[:num_seqs]
        if self.model.lora_routing is not None:
            self.model.lora_routing.set_mask(self._lora_masks_RN[:num_seqs])
        attention = DecodeAttention(self.cache, num_seqs, max_seq_len, self._fuses_layers)
        ids_R, position_ids_3R = self.ids_R[:num_seqs], position_ids_R.expand(3, -1)
        if self._use_fused_decode:
            logits_RV = fused_decode_step(self.model, ids_R, position_ids_3R, attention)
        else:
            h_RW = self.model.decode_step(ids_R, position_ids_3R, attention)
            logits_RV = self.model.compute_logits(self.model.apply_final_norm(h_RW))
        max_logits_R, ids_R = logits_RV.max(-1)
        self.ids_R[:num_seqs].copy_(ids_R)
        # The maximum is NaN if any logit is NaN.
        self.is_finite_R[:num_seqs].copy_(max_logits_R.isfinite())
        return logits_RV


def pad_num_seqs(num_seqs: int) -> int:
    """Round a batch size up to a size with a CUDA graph: 1, 2, 4 and multiples of 8."""
    return next((size for size in (1, 2, 4) if num_seqs <= size), -(-num_seqs // 8) * 8)


class _ImageFeatureCache:
    """LRU cache of vision features by adapter and pixel hash, with a memory limit."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._features: OrderedDict[tuple[int | None, bytes], Tensor] = OrderedDict()
        self._num_bytes = 0

    def clear(self) -> None:
        """Remove all features."""
        self._features.clear()
        self._num_bytes = 0

    def get(self, adapter_index: int | None, image_hash: bytes) -> Tensor | None:
        """Return the cached features [M, K, W] of an image, or None."""
        features = self._features.get((adapter_index, image_hash))
        if features is not None:
            self._features.move_to_end((adapter_index, image_hash))
        return features

    def put(self, adapter_index: int | None, image_hash: bytes, features_MKW: Tensor) -> None:
        """Add the features of an image, and evict the least recently used above the limit."""
        if (adapter_index, image_hash) in self._features:
            return
        # Copy: a view would keep the features of the full encoder batch alive.
        self._features[adapter_index, image_hash] = features_MKW.clone()
        self._num_bytes += features_MKW.nbytes
        while self._num_bytes > self._max_bytes:
            _, oldest = self._features.popitem(last=False)
            self._num_bytes -= oldest.nbytes


def load_image_features(
    model: VisionLanguageModel, prompts: Sequence[PromptState], feature_cache: _ImageFeatureCache
) -> None:
    """Set the vision features that prompts still need, from the cache or the encoder.

    Missing features are encoded in batches of images.
    """
    missing: list[tuple[PromptState, int, bytes]] = []
    for prompt in prompts:
        if prompt.features or not prompt.encoded.tokenized.spans:
            continue
        spans = prompt.encoded.tokenized.spans
        prompt.features = [None] * len(spans)
        for span_index, (span, image_hash) in enumerate(
            zip(spans, prompt.image_hashes, strict=True)
        ):
            if span.stop > prompt.num_computed_tokens:
                prompt.features[span_index] = feature_cache.get(prompt.adapter_index, image_hash)
                if prompt.features[span_index] is None:
                    missing.append((prompt, span_index, image_hash))
    if not missing:
        return
    to_encode = {digest: (prompt.encoded, number) for prompt, number, digest in missing}
    patch_counts = [
        len(get_span_patches(encoded, number)) for encoded, number in to_encode.values()
    ]
    encoded_features: dict[bytes, Tensor] = {}
    for pack_indices in plan_packs(patch_counts, MAX_ENCODER_PATCHES):
        image_hashes = [list(to_encode)[index] for index in pack_indices]
        encoded_features |= zip(
            image_hashes,
            _encode_images(model, [to_encode[digest] for digest in image_hashes]),
            strict=True,
        )
    for prompt, span_index, image_hash in missing:
        prompt.features[span_index] = encoded_features[image_hash]
        feature_cache.put(prompt.adapter_index, image_hash, encoded_features[image_hash])


def _encode_images(
    model: VisionLanguageModel, images: Sequence[tuple[EncodedSample, int]]
) -> Sequence[Tensor]:
    """Encode images in one vision-encoder pass and return the features [M, K, W] of each."""
    patches = [get_span_patches(encoded, span_index) for encoded, span_index in images]
    spans = [encoded.tokenized.spans[number] for encoded, number in images]
    device = model.model.embed_tokens.weight.device
    features_MKW = model.encode_images(
        copy_to_device(concat_patches(patches), device), [span.grid_thw for span in spans]
    )
    return torch.split(features_MKW, [span.stop - span.start for span in spans])


def _pack_chunks(
    prompts: Sequence[PromptState], chunks: Sequence[PrefillChunk]
) -> tuple[PackedBatch, Tensor | None]:
    """Pack prompt chunks into a batch with the vision features of their image tokens."""
    tokenized_prompts = [prompt.encoded.tokenized for prompt in prompts]
    slices = [slice(chunk.start, chunk.stop) for chunk in chunks]
    lengths = tuple(chunk.stop - chunk.start for chunk in chunks)
    cu_seqlens = compute_cu_seqlens(lengths)
    ids_T = np.concatenate(
        [o.ids_T[token_slice] for o, token_slice in zip(tokenized_prompts, slices, strict=True)]
    )
    position_ids_3T = np.concatenate(
        [o.position_ids_3T[:, cut] for o, cut in zip(tokenized_prompts, slices, strict=True)],
        axis=1,
    )
    visual_indices: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = [np.empty(0, dtype=np.int64)]
    features: list[Tensor] = []
    for prompt, chunk, chunk_offset in zip(prompts, chunks, cu_seqlens, strict=False):
        for span, image_features in zip(
            prompt.encoded.tokenized.spans, prompt.features, strict=True
        ):
            start, stop = max(span.start, chunk.start), min(span.stop, chunk.stop)
            if start < stop:
                assert image_features is not None, (
                    f"an image of {prompt.encoded.tokenized.id} has no features"
                )
                visual_indices.append(np.arange(start, stop) - chunk.start + int(chunk_offset))
                features.append(image_features[start - span.start : stop - span.start])
    empty_L = torch.empty(0, dtype=torch.int64)
    batch = PackedBatch(
        sample_ids=tuple(tokenized.id for tokenized in tokenized_prompts),
        lengths=lengths,
        grid_thw=(),
        ids_T=torch.from_numpy(ids_T.astype(np.int64)),
        position_ids_3T=torch.from_numpy(position_ids_3T.astype(np.int64)),
        cu_seqlens_S1=torch.from_numpy(cu_seqlens),
        patches_ND=torch.empty(0, 0, dtype=torch.uint8),
        visual_indices_M=torch.from_numpy(np.concatenate(visual_indices)),
        logit_indices_L=empty_L,
        labels_L=empty_L,
    )
    return batch, torch.cat(features) if features else None
