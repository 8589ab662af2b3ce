"""Loading of packed batches to the device of a rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from finesight.encode.batch import PackedBatch, pad_batch
from finesight.train.parallel.distributed import ParallelStrategy


@dataclass(frozen=True, slots=True)
class DeviceLoader:
    """Loader of packed batches to the device.

    Attributes:
        pads_shapes: Whether to pad packs to a few shapes, for 16-bit training on a CPU. oneDNN
            compiles a kernel for every new shape.
        padding_merge_size: Merge size for padding patches; None for encoders with a fixed image
            size.
    """

    parallel: ParallelStrategy
    device: torch.device
    pads_shapes: bool
    padding_merge_size: int | None

    def load(self, packed_batch: PackedBatch) -> PackedBatch:
        """Move a packed batch to the device, after padding it if `pads_shapes` is set."""
        packed_batch = self.parallel.prepare_batch(packed_batch)
        if self.pads_shapes and packed_batch.context_shard is None:
            return pad_batch(packed_batch, self.padding_merge_size)
        return packed_batch.to(self.device)
