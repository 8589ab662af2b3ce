"""State of a training run, which setup creates and the trainer updates.

It refers to model, data and optimizer by their types only, so that the trainer imports none of the
modules that load them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finesight.encode.packing import PackedBatch, pad_batch
from finesight.train.checkpoint import CheckpointManager, CheckpointState, TrainProgress
from finesight.train.dataloader import StepDataset
from finesight.train.oom import MemoryBudget
from finesight.train.parallel.distributed import SINGLE_PROCESS, ParallelStrategy, ProcessGroup
from finesight.train.sampler import DistributedSampler, SequentialSampler, TrainSampler

if TYPE_CHECKING:
    from finesight.config import Recipe
    from finesight.encode.renderer import Renderer
    from finesight.model.hf_backend import AnyModel
    from finesight.train.cuda_graphs import CudaGraphRunner
    from finesight.train.dataset_stats import TrainingData
    from finesight.train.flops import FlopCounter, NullFlopCounter
    from finesight.train.image_record import ImageStates
    from finesight.train.optimizer import LossScaler, LRSchedule, MasterWeightOptimizer
    from finesight.train.param_audit import ParamAudit
    from finesight.train.run_dir import RunDir
    from finesight.train.setup import BaseModelRef


@dataclass(frozen=True, slots=True)
class Hardware:
    """Hardware settings of a rank.

    Attributes:
        device: Device of the model.
        dtype: Compute dtype.
        num_workers: Number of data loader workers.
        peak_flops: Measured peak FLOP/s of the device.
        process_group: Ranks of the run.
    """

    device: torch.device
    dtype: torch.dtype
    num_workers: int
    peak_flops: float
    process_group: ProcessGroup = SINGLE_PROCESS

    @property
    def precision(self) -> str:
        names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
        return names[self.dtype]


@dataclass(frozen=True, slots=True)
class TrainState:
    """State of a training run: settings, data, model, optimizer and progress."""

    recipe: Recipe
    run_dir: RunDir
    checkpoint_manager: CheckpointManager
    hardware: Hardware
    base_model: BaseModelRef
    renderer: Renderer
    train_data: TrainingData
    validation_data: TrainingData | None
    sampler: TrainSampler
    step_dataset: StepDataset
    model: AnyModel
    parallel: ParallelStrategy
    optimizer: MasterWeightOptimizer
    graph_runner: CudaGraphRunner
    param_audit: ParamAudit
    loss_scaler: LossScaler
    lr_schedule: LRSchedule
    flop_counter: FlopCounter | NullFlopCounter
    resume_config: dict[str, Any]
    progress: TrainProgress
    pads_shapes: bool
    """True if packs are padded to a few shapes, for 16-bit training on a CPU.

    oneDNN compiles a kernel for every new shape.
    """
    padding_merge_size: int | None
    """Merge size for padding patches; None for encoders with a fixed image size."""

    def check_ranks_match(self) -> None:
        """Verify that all ranks have the same settings, model, data and images.

        Raises:
            UserError: The configurations differ.
        """
        train_settings = self.recipe.train.model_dump(mode="json")
        shared_settings = {
            name: train_settings[name]
            for name in ("parallel", "pack_tokens", "activation_checkpointing")
        }
        images = {split: states.digest for split, states in self.images().items()}
        self.hardware.process_group.check_identical(
            self.resume_config | shared_settings | {"images": images}
        )

    def images(self) -> dict[str, ImageStates]:
        """Return the image fingerprints of each split (`train`, `eval`)."""
        splits = {"train": self.train_data, "eval": self.validation_data}
        return {name: data.stats.images for name, data in splits.items() if data is not None}

    @property
    def shard_group(self) -> ProcessGroup:
        """Process group over which the model is sharded; a single process without sharding."""
        return self.hardware.process_group if self.parallel.is_sharded else SINGLE_PROCESS

    @property
    def max_unsplit_tokens(self) -> int | None:
        """Maximum number of tokens of a sample that is not split over the ranks.

        None if samples are never split.
        """
        sampler = self.step_dataset.with_pack_tokens(self.progress.budget.pack_tokens).sampler
        return sampler.max_unsplit_tokens if isinstance(sampler, DistributedSampler) else None

    def build_validation_dataset(self, pack_tokens: int) -> StepDataset | None:
        """Create the dataset of this rank's validation samples; None without validation data.

        It does not use shared prefixes: in evaluation mode, some families compute a token depending
        on the length of its sample (`model.families.qwen_vl`).

        Args:
            pack_tokens: Maximum number of tokens of a pack.
        """
        if self.validation_data is None:
            return None
        own_indices = self.hardware.process_group.shard(self.validation_data.stats.sample_indices)
        sampler = SequentialSampler(own_indices, self.recipe.train.batch_size)
        return self.validation_data.build_step_dataset(
            self.renderer, sampler, pack_tokens, self.recipe.data
        )

    def to_device(self, packed_batch: PackedBatch) -> PackedBatch:
        """Move a packed batch to the device, after padding it if `pads_shapes` is set."""
        packed_batch = self.parallel.prepare_batch(packed_batch)
        if self.pads_shapes and packed_batch.context_shard is None:
            return pad_batch(packed_batch, self.padding_merge_size)
        return packed_batch.to(self.hardware.device)

    def zero_grad(self) -> None:
        """Discard the gradients of a skipped or aborted step."""
        self.optimizer.zero_grad()
        self.parallel.zero_grad()

    def load_state(
        self, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor]
    ) -> None:
        """Restore master weights and optimizer state from complete checkpoint tensors."""
        self.optimizer.load_state(
            self.parallel.shard_state(weights), self.parallel.shard_state(optimizer_state)
        )
        self.parallel.sync_params()

    def apply_budget(self, budget: MemoryBudget) -> None:
        """Use a memory budget from the next step on."""
        self.progress.budget = budget
        self.model.activation_checkpointing = budget.activation_checkpointing

    def checkpoint_state(self) -> CheckpointState:
        """Return the state that a checkpoint stores in addition to tensors."""
        step = self.progress.step
        return CheckpointState(
            step=step,
            consumed_samples=min(step * self.recipe.train.batch_size, self.sampler.num_samples),
            last_eval_step=self.progress.last_eval_step,
            best=self.progress.best,
            loss_scale=self.loss_scaler.state_dict(),
            budget=self.progress.budget,
            nonfinite_steps=self.progress.nonfinite_steps,
            consecutive_nonfinite_steps=self.progress.consecutive_nonfinite_steps,
            resume_config=self.resume_config,
        )

    def estimate_checkpoint_bytes(self) -> int:
        """Return the bytes of a checkpoint: fp32 weights and optimizer state of all ranks."""
        moments = self.optimizer.optimizer_state().values()
        rank_bytes = 4 * self.optimizer.num_params + sum(moment.nbytes for moment in moments)
        return rank_bytes * self.shard_group.world_size
