"""Packed batch: the input of the model, copied to a device, sharded or padded.

Shapes: S sequences, T tokens, N patches, M placeholder tokens, L supervised tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from finesight.encode.context_shard import ContextShard
from finesight.vision.image_processing import GridTHW

PAD_MULTIPLE = 64
"""Multiple to which `pad_batch` pads the token, patch and logit dimensions."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Packed batch of concatenated sequences, with the patches of all images in token order.

    A sequence is one sample, or one response of a preference pair. With a shared prefix, the first
    sequence is the prefix of all others, which continue it.

    Attributes:
        cu_seqlens_S1: Cumulative sequence lengths, starting at 0 (int32).
        patches_ND: Patches. They store a single frame if all frames of every patch are equal, as
            for images.
        logit_indices_L: Indices of tokens whose logits predict a supervised token. Padding added by
            `pad_batch` has no label.
        hf_inputs: Other model inputs by name, for a batch of one sample of a non-native family.
        context_shard: Shard of a sample under context parallelism, else None. All other fields are
            sharded, too.
        prefix_length: Length of the shared prefix; 0 without one.
        loss_inputs: Inputs of the objective by name, each [L], such as advantages of tokens.
    """

    sample_ids: tuple[str, ...]
    lengths: tuple[int, ...]
    grid_thw: tuple[GridTHW, ...]
    ids_T: Tensor
    position_ids_3T: Tensor
    cu_seqlens_S1: Tensor
    patches_ND: Tensor
    visual_indices_M: Tensor
    logit_indices_L: Tensor
    labels_L: Tensor
    hf_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    context_shard: ContextShard | None = None
    prefix_length: int = 0
    loss_inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Number of samples; a context-parallel sample counts on rank 0 only."""
        is_first = self.context_shard is None or self.context_shard.rank == 0
        return len(self.sample_ids) if is_first else 0

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all samples, with the shared prefix counted for each sample."""
        return sum(self.lengths) + self.prefix_length * max(0, len(self.sample_ids) - 1)

    @property
    def num_supervised_tokens(self) -> int:
        return len(self.labels_L)

    def to(self, device: torch.device) -> PackedBatch:
        """Copy the batch to a device; copies from pinned memory are asynchronous."""
        return replace(
            self,
            ids_T=self.ids_T.to(device, non_blocking=True),
            position_ids_3T=self.position_ids_3T.to(device, non_blocking=True),
            cu_seqlens_S1=self.cu_seqlens_S1.to(device, non_blocking=True),
            patches_ND=self.patches_ND.to(device, non_blocking=True),
            visual_indices_M=self.visual_indices_M.to(device, non_blocking=True),
            logit_indices_L=self.logit_indices_L.to(device, non_blocking=True),
            labels_L=self.labels_L.to(device, non_blocking=True),
            hf_inputs=_copy_tensors(self.hf_inputs, device),
            loss_inputs=_copy_tensors(self.loss_inputs, device),
        )

    def select_shard(self, shard: ContextShard) -> PackedBatch:
        """Return the part of the batch that one rank processes under context parallelism.

        The batch must contain only the sample of the shard, with the patches of that rank.
        """
        token_indices_T = torch.cat(
            [torch.arange(*token_range) for token_range in shard.token_ranges]
        )
        local_index_T = torch.full((shard.num_tokens,), -1)
        local_index_T[token_indices_T] = torch.arange(len(token_indices_T))
        visual_indices_M = local_index_T[self.visual_indices_M]
        logit_indices_L = local_index_T[self.logit_indices_L]
        is_local_L = logit_indices_L >= 0
        labels_L = self.labels_L[is_local_L]
        logit_indices_L = logit_indices_L[is_local_L]
        if not len(logit_indices_L):
            # Add a token without a label, so that the backward pass runs on this rank, too.
            logit_indices_L = F.pad(logit_indices_L, (0, 1))
        return replace(
            self,
            lengths=(len(token_indices_T),),
            grid_thw=shard.grid_thw,
            ids_T=self.ids_T[token_indices_T],
            position_ids_3T=self.position_ids_3T[:, token_indices_T],
            cu_seqlens_S1=torch.tensor([0, len(token_indices_T)], dtype=torch.int32),
            visual_indices_M=visual_indices_M[visual_indices_M >= 0],
            logit_indices_L=logit_indices_L,
            labels_L=labels_L,
            context_shard=shard,
        )


def _copy_tensors(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def copy_to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """Copy a NumPy array to `device`, asynchronously on a GPU."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def compute_context_lengths(lengths: Sequence[int], prefix_length: int) -> tuple[int, ...]:
    """Return the number of context tokens of each sequence, including the shared prefix.

    The first of `lengths` is that of the shared prefix itself.
    """
    prefix, *others = lengths
    return prefix, *(prefix_length + length for length in others)


def compute_cu_seqlens(lengths: Sequence[int]) -> NDArray[np.int32]:
    """Return the cumulative lengths of packed sequences, starting at 0."""
    return np.cumsum([0, *lengths], dtype=np.int32)


def pad_batch(batch: PackedBatch, merge_size: int | None) -> PackedBatch:
    """Append a dummy sequence so that batch dimensions are multiples of PAD_MULTIPLE.

    Pads the tokens, patches and logit indices. The dummy sequence continues the shared prefix and
    has no labels, so `logit_indices_L` is longer than `labels_L`.

    Args:
        merge_size: Number of patches per side of a merged token; None for a vision encoder with a
            fixed image size, whose patches are not padded.
    """
    patches_ND = batch.patches_ND
    grid_thw = batch.grid_thw
    num_features = 0
    if merge_size is not None:
        patches_ND, grid_thw = pad_patches(patches_ND, grid_thw, merge_size)
        num_features = (len(patches_ND) - len(batch.patches_ND)) // merge_size**2
    num_tokens = num_features + 1
    num_tokens += -(len(batch.ids_T) + num_tokens) % PAD_MULTIPLE
    padded = _append_dummy_sequence(batch, num_tokens, num_features, patches_ND, grid_thw)
    num_padding_logits = -len(batch.logit_indices_L) % PAD_MULTIPLE
    return replace(padded, logit_indices_L=F.pad(batch.logit_indices_L, (0, num_padding_logits)))


def append_dummy_image(
    batch: PackedBatch, dummy_grid: GridTHW, num_features: int, patch_dim: int
) -> PackedBatch:
    """Append a dummy sequence with a blank image to a batch without images.

    With sharded parameters, all ranks must run the vision encoder in the same steps.

    Args:
        dummy_grid: Patch grid of the image (time, height, width).
    """
    assert not batch.grid_thw, f"the batch already has {len(batch.grid_thw)} images"
    patches_ND = batch.patches_ND.new_zeros(math.prod(dummy_grid), patch_dim)
    return _append_dummy_sequence(batch, num_features + 1, num_features, patches_ND, (dummy_grid,))


def dummy_batch() -> PackedBatch:
    """Return a packed batch with one dummy token that predicts itself."""
    zeros = torch.zeros(1, dtype=torch.int64)
    return PackedBatch(
        sample_ids=(),
        lengths=(1,),
        grid_thw=(),
        ids_T=zeros,
        position_ids_3T=zeros.expand(3, 1),
        cu_seqlens_S1=torch.tensor([0, 1], dtype=torch.int32),
        patches_ND=torch.empty(0, 0, dtype=torch.uint8),
        visual_indices_M=zeros[:0],
        logit_indices_L=zeros,
        labels_L=zeros,
    )


def _append_dummy_sequence(
    batch: PackedBatch,
    num_tokens: int,
    num_features: int,
    patches_ND: Tensor,
    grid_thw: tuple[GridTHW, ...],
) -> PackedBatch:
    """Append a dummy sequence whose first `num_features` tokens are image placeholders."""
    end = len(batch.ids_T)
    dummy_ids = batch.ids_T.new_zeros(num_tokens)
    offsets = torch.arange(num_tokens, device=dummy_ids.device)
    return replace(
        batch,
        lengths=(*batch.lengths, num_tokens),
        grid_thw=grid_thw,
        ids_T=torch.cat([batch.ids_T, dummy_ids]),
        position_ids_3T=torch.cat([batch.position_ids_3T, offsets.expand(3, -1)], dim=1),
        cu_seqlens_S1=torch.cat([batch.cu_seqlens_S1, batch.cu_seqlens_S1[-1:] + num_tokens]),
        patches_ND=patches_ND,
        visual_indices_M=torch.cat([batch.visual_indices_M, end + offsets[:num_features]]),
    )


def pad_patches(
    patches_ND: Tensor, grid_thw: tuple[GridTHW, ...], merge_size: int
) -> tuple[Tensor, tuple[GridTHW, ...]]:
    """Append a dummy image that pads the number of patches to a multiple of PAD_MULTIPLE."""
    num_merged = -len(patches_ND) % math.lcm(PAD_MULTIPLE, merge_size**2) // merge_size**2
    if num_merged:
        grid_thw = (*grid_thw, (1, merge_size, num_merged * merge_size))
    return F.pad(patches_ND, (0, 0, 0, num_merged * merge_size**2)), grid_thw
