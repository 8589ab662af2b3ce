"""State of a training run: run context, data, model and optimizer, progress."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finesight.encode.renderer import Renderer
from finesight.encode.renderer_builder import build_renderer
from finesight.environment_components import EpisodeSettings
from finesight.errors import TrainingInterrupted, UserError
from finesight.model_folder import ModelFolder
from finesight.objective_components import get_accepted_samples
from finesight.progress import ProgressConsole
from finesight.settings.config import PixelLimits, PixelRange, Recipe
from finesight.settings.manifest import Manifest
from finesight.settings.setting_types import StepsOrFraction
from finesight.train.checkpoint import (
    Checkpoint,
    CheckpointManager,
    CheckpointState,
    TrainProgress,
)
from finesight.train.dataset_stats import ImageStates, TrainingData
from finesight.train.device_loader import DeviceLoader
from finesight.train.flops import FlopCounter
from finesight.train.master_weight_optimizer import LossScaler, LRSchedule, MasterWeightOptimizer
from finesight.train.objectives.objective import Objective
from finesight.train.oom import MemoryBudget
from finesight.train.parallel.distributed import SINGLE_PROCESS, ParallelStrategy, ProcessGroup
from finesight.train.param_audit import ParamAudit
from finesight.train.run_dir import RunDir, Split
from finesight.train.sampler import DistributedSampler, TrainSampler
from finesight.train.step_batch import GlobalStepStats, StepBatch
from finesight.train.step_dataset import StepDataset

if TYPE_CHECKING:
    from finesight.model.backend_model import BackendModel
    from finesight.train.cuda_graphs import CudaGraphRunner

PREEMPTION_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals that job schedulers send before the time limit (`sbatch --signal=USR1@300`)."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *PREEMPTION_SIGNALS)
"""Signals that stop a run with a checkpoint. `nohup` ignores SIGHUP, which stays so."""


class StopRequest:
    """Request to stop the run gracefully, set by a signal, or `after` a part of its steps."""

    def __init__(self) -> None:
        self.after: StepsOrFraction | None = None
        self.signal: signal.Signals | None = None
        """Received signal, possibly of another rank."""
        self._has_arrived = False

    @contextmanager
    def install_handlers(self) -> Iterator[None]:
        """Install signal handlers within the context, which set the stop request.

        A second signal has its previous effect, except for preemption signals, which are then
        ignored. In other threads than the main thread, no handlers are installed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous_handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
        if previous_handlers[signal.SIGHUP] is signal.SIG_IGN:
            del previous_handlers[signal.SIGHUP]

        def handle_signal(signal_number: int, frame: FrameType | None) -> None:
            # A signal relayed by another rank does not count as the first one.
            if not self._has_arrived:
                self._has_arrived = True
                self.request(signal_number)
            elif signal_number not in PREEMPTION_SIGNALS:
                previous = previous_handlers[signal.Signals(signal_number)]
                signal.signal(signal_number, previous or signal.SIG_DFL)
                os.kill(os.getpid(), signal_number)

        for signum in previous_handlers:
            signal.signal(signum, handle_signal)
        try:
            yield
        finally:
            for signum, handler in previous_handlers.items():
                signal.signal(signum, handler or signal.SIG_DFL)

    def request(self, signal_number: int) -> None:
        """Set the stop request for a signal, possibly of another rank; ignore 0."""
        if signal_number and self.signal is None:
            self.signal = signal.Signals(signal_number)

    def raise_if_requested(self) -> None:
        """Raise if a stop was requested.

        Raises:
            TrainingInterrupted: A signal has arrived.
        """
        if self.signal is not None:
            raise TrainingInterrupted(f"{self.signal.name} has arrived")


@dataclass(frozen=True, slots=True)
class Hardware:
    """Hardware settings of a rank.

    Attributes:
        device: Device of the model.
        dtype: Compute dtype.
        num_workers: Number of data loader workers.
        peak_flops: Measured peak FLOP/s of the device.
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
class BaseModelRef:
    """Base model that a run starts from.

    Attributes:
        name: Name stored in manifests and adapters: an absolute path, or the name of a hub model.
        adapter: Folder of an adapter to continue training; None to start with a new one.
        manifest: Manifest of the run that produced the model or adapter, if any.
    """

    name: str
    folder: ModelFolder
    adapter: Path | None
    manifest: Manifest | None

    def build_renderer(self, recipe: Recipe) -> Renderer:
        """Create the renderer (tokenizer, chat template and image processor) of a recipe.

        Image settings and the system prompt that the recipe does not set are read from the manifest
        of the run that produced the model.
        """
        image_rule = recipe.image
        system_prompt = recipe.data.system_prompt
        if self.manifest is not None:
            run_rule = self.manifest.image_rule
            if isinstance(image_rule, PixelLimits) and isinstance(run_rule, PixelRange):
                image_rule = image_rule.complete(run_rule)
            if image_rule is None:
                image_rule = run_rule
            if system_prompt is None:
                system_prompt = self.manifest.system_prompt
        renderer = build_renderer(self.folder, image_rule, system_prompt)
        if recipe.data.augment is not None and not renderer.is_native:
            raise UserError(
                f"augmented images for a model of the family {self.folder.family}",
                where="data.augment",
                expected="a natively implemented model family",
                remedy="remove data.augment, or choose another model",
            )
        needs = recipe.needs
        renderer.responses = needs.responses
        renderer.objective = recipe.train.objective
        renderer.accepted_samples = get_accepted_samples(recipe.train.objective)
        renderer.supervise = recipe.data.supervise
        renderer.max_length = recipe.data.max_length
        return renderer


@dataclass(frozen=True, slots=True)
class RunContext:
    """Settings, files and hardware of a run, which do not change.

    Attributes:
        resume_config: Settings and fingerprints that must be the same when the run is resumed.
        console: Console for progress and messages.
        episodes: Environment of sampling, which evaluations use as well; None without tools.
        stop: Stop request of signal handlers, checked between batches.
    """

    recipe: Recipe
    run_dir: RunDir
    checkpoint_manager: CheckpointManager
    hardware: Hardware
    base_model: BaseModelRef
    resume_config: dict[str, Any]
    console: ProgressConsole
    episodes: EpisodeSettings | None = None
    stop: StopRequest = field(default_factory=StopRequest)


@dataclass(frozen=True, slots=True)
class RunData:
    """Training and validation data of a run, and its steps."""

    renderer: Renderer
    train: TrainingData
    validation: TrainingData | None
    sampler: TrainSampler

    @property
    def splits(self) -> dict[Split, TrainingData]:
        """Data by the name of the split, `train` and possibly `eval`."""
        splits: dict[Split, TrainingData | None] = {"train": self.train, "eval": self.validation}
        return {name: data for name, data in splits.items() if data is not None}

    def images(self) -> dict[str, ImageStates]:
        """Return the image fingerprints of each split."""
        return {name: data.stats.images for name, data in self.splits.items()}


@dataclass(frozen=True, slots=True)
class TrainEngine:
    """Model and optimizer of a run, with the components and data of a training step.

    Attributes:
        param_audit: Record of the parameters before the first step, also of a resumed run.
    """

    model: BackendModel
    objective: Objective[Any]
    parallel: ParallelStrategy
    step_dataset: StepDataset
    device_loader: DeviceLoader
    optimizer: MasterWeightOptimizer
    graph_runner: CudaGraphRunner
    loss_scaler: LossScaler
    lr_schedule: LRSchedule
    flop_counter: FlopCounter | None
    param_audit: ParamAudit

    def zero_grad(self) -> None:
        """Discard the gradients of a skipped or aborted step."""
        self.optimizer.zero_grad()
        self.parallel.zero_grad()

    def restore_tensors(
        self, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor]
    ) -> None:
        """Restore master weights and optimizer state from complete checkpoint tensors."""
        self.optimizer.load_state(
            self.parallel.shard_state(weights), self.parallel.shard_state(optimizer_state)
        )
        self.parallel.sync_params()


@dataclass(frozen=True, slots=True)
class TrainState:
    """State of a training run."""

    run: RunContext
    data: RunData
    engine: TrainEngine
    progress: TrainProgress

    def check_ranks_match(self) -> None:
        """Verify that all ranks have the same settings, model, data and images.

        Raises:
            UserError: The configurations differ.
        """
        names = {"parallel", "pack_tokens", "activation_checkpointing"}
        shared_settings = self.run.recipe.train.model_dump(mode="json", include=names)
        images: dict[str, str] = {}
        for split, states in self.data.images().items():
            # Copies of the images on other machines may have other modification times.
            images[split] = hashlib.sha256(states[:, :2].tobytes()).hexdigest()
        self.run.hardware.process_group.check_identical(
            self.run.resume_config | shared_settings | {"images": images}
        )

    @property
    def writes_checkpoints(self) -> bool:
        """Whether this rank writes checkpoints: all ranks of a sharded model, else the main one."""
        return self.run.hardware.process_group.is_main or self.engine.parallel.is_sharded

    @property
    def shard_group(self) -> ProcessGroup:
        """Process group over which the model is sharded; a single process without sharding."""
        if self.engine.parallel.is_sharded:
            return self.run.hardware.process_group
        return SINGLE_PROCESS

    @property
    def max_unsplit_tokens(self) -> int | None:
        """Maximum number of tokens of a sample that is not split over the ranks.

        None if samples are never split.
        """
        pack_tokens = self.progress.budget.pack_tokens
        sampler = self.engine.step_dataset.with_pack_tokens(pack_tokens).sampler
        if not isinstance(sampler, DistributedSampler):
            return None
        return sampler.max_unsplit_tokens

    def apply_budget(self, budget: MemoryBudget) -> None:
        """Use a memory budget from the next step on."""
        self.progress.budget = budget
        self.engine.model.activation_checkpointing = budget.activation_checkpointing

    @property
    def consumed_samples(self) -> int:
        """Number of samples of the finished steps."""
        consumed_samples = self.progress.step * self.run.recipe.train.batch_size
        # The last step may be smaller.
        return min(consumed_samples, self.data.sampler.num_samples)

    def state_dict(self) -> Checkpoint:
        """Return all that a resumed run needs: progress, loss scale, weights and optimizer state.

        The tensors are those of this rank, computed on access. There are no random states: seeds
        derive from those of the run, the step and the pack.
        """
        state = CheckpointState(
            consumed_samples=self.consumed_samples,
            loss_scale=self.engine.loss_scaler.state_dict(),
            resume_config=self.run.resume_config,
            **dict(self.progress),
        )
        optimizer = self.engine.optimizer
        return Checkpoint(state, optimizer.master_weights(), optimizer.optimizer_state())

    def load_state_dict(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, whose tensors are complete."""
        state, weights, optimizer_state = checkpoint
        self.progress.restore(state)
        self.engine.loss_scaler.load_state_dict(state.loss_scale)
        self.engine.restore_tensors(weights, optimizer_state)

    def estimate_checkpoint_bytes(self) -> int:
        """Return the bytes of a checkpoint: fp32 weights and optimizer state of all ranks."""
        optimizer = self.engine.optimizer
        weight_bytes = 4 * optimizer.num_params
        state_bytes = sum(tensor.nbytes for tensor in optimizer.optimizer_state().values())
        return (weight_bytes + state_bytes) * self.shard_group.world_size


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Result of a training step, which the device may still be computing.

    Attributes:
        step_batch: Step data of this rank.
        global_stats: Statistics over all ranks.
        budget: Memory budget of the step.
        lr_factor: Factor of the learning rate schedule.
        is_applied: False if the gradients overflowed in fp16, or no sample was valid.
        results: Gradient norm, mean loss and mean metrics of the objective. The CPU tensor is valid
            after `event`. If norm or loss are not finite, the device has skipped the update.
        event: CUDA event after the copy to the CPU; None on a CPU.
    """

    step_batch: StepBatch
    global_stats: GlobalStepStats
    budget: MemoryBudget
    lr_factor: float
    is_applied: bool
    results: Tensor
    event: torch.cuda.Event | None

    def wait(self) -> tuple[float, float]:
        """Wait for the device, and return the loss and the gradient norm."""
        if self.event is not None:
            self.event.synchronize()
        norm, loss, *_ = self.results.tolist()
        return loss, norm
