"""Parallel compilation of all Triton kernels before the first step of a run."""

from __future__ import annotations

import logging

import torch

from finesight.model.quant.base import HAS_TRITON
from finesight.model.vlm import VisionLanguageModel
from finesight.train.setup import TrainState

if HAS_TRITON:
    from finesight.model.kernels.parallel_compile import compile_in_parallel, is_compile_cache_empty


def warm_up_kernels(state: TrainState) -> None:
    """Compile all Triton kernels in parallel, by running packs of the next step.

    This is done only if the Triton cache is empty. No parameter is updated. Errors are only logged
    at debug level, because the training step raises them again.
    """
    device = state.hardware.device
    is_native = isinstance(state.model, VisionLanguageModel)
    if not (HAS_TRITON and device.type == "cuda" and is_native) or state.parallel.is_sharded:
        return
    if not is_compile_cache_empty() or state.progress.step == len(state.sampler):
        return
    try:
        packs = state.step_dataset.get_step(state.progress.step).packs
        # Split packs need all ranks. Packs with and without shared prefix use other kernels.
        unsplit = [packed_batch for packed_batch in packs if packed_batch.context_shard is None]
        variants = {packed_batch.prefix_length > 0: packed_batch for packed_batch in unsplit}
        for packed_batch in variants.values():
            with torch.random.fork_rng([device]), compile_in_parallel(device):
                state.graph_runner.warm_up(state.to_device(packed_batch))
    except Exception as error:
        logging.getLogger(__name__).debug("kernels were not compiled beforehand: %s", error)
    finally:
        state.optimizer.zero_grad()
