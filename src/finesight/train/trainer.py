"""Training loop of every rank, and the public function `train`."""

from __future__ import annotations

import ctypes
import logging
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress

import torch
from rich.console import Console

from finesight.config import Recipe
from finesight.data.line_index import UnreadableFileError
from finesight.errors import TrainingInterrupted
from finesight.model.quant.base import HAS_TRITON
from finesight.model.vlm import VisionLanguageModel
from finesight.storage import require_free_space
from finesight.track.backends import require_packages
from finesight.track.tracker_manager import start_trackers
from finesight.train.checkpoint import MAX_ASYNC_PARAMS, AsyncCheckpointer, CheckpointManager
from finesight.train.console import TrainingConsole
from finesight.train.dataloader import DataWorkerError, StepBatch
from finesight.train.evaluation import count_evals_since_best, load_eval_history, run_evaluation
from finesight.train.finalize import (
    LiveReport,
    RunResult,
    build_best_eval,
    finalize_run,
    load_result,
    write_run_report,
)
from finesight.train.image_record import save_image_record
from finesight.train.logging import MetricsLogger, describe_run, time_data_waits
from finesight.train.oom import (
    GpuOutOfMemoryError,
    MemoryBudget,
    retry_on_oom,
    translate_oom_errors,
)
from finesight.train.optimizer import resolve_save_interval, resolve_steps
from finesight.train.parallel.distributed import (
    PeerFailedError,
    ProcessGroup,
    RankDesyncError,
    RankTimeoutError,
    init_distributed,
)
from finesight.train.run_dir import RunDir
from finesight.train.setup import TrainState, build_train_state
from finesight.train.signals import StopRequest
from finesight.train.step import StepOutput, iter_train_steps, sync_step, train_step
from finesight.train.vision_cache import EncoderOffloader, open_vision_cache, should_offload
from finesight.train.vision_store import VisionCache


def estimate_checkpoint_bytes(state: TrainState) -> int:
    """Return the bytes of a checkpoint: fp32 weights and optimizer state of all ranks."""
    optimizer = state.optimizer
    rank_bytes = 4 * optimizer.num_params + sum(
        moment.nbytes for moment in optimizer.optimizer_state().values()
    )
    return rank_bytes * state.shard_group.world_size


def check_disk_space(state: TrainState, num_existing: int) -> None:
    """Verify that the disk has space for the checkpoints and trained weights of a run.

    The estimate includes the retained checkpoints, the best checkpoint and one that is being
    written.

    Args:
        state: State of the run.
        num_existing: Number of checkpoints that are already on disk, which need no more space.

    Raises:
        UserError: There is not enough free space.
    """
    recipe, total_steps = state.recipe, len(state.sampler)
    checkpoint_size, interval = (
        estimate_checkpoint_bytes(state),
        resolve_save_interval(recipe.train, total_steps),
    )
    num_remaining = 1 + ((total_steps - state.progress.step) // interval if interval else 0)
    num_new = max(
        1,
        min(recipe.train.keep_checkpoints + 2, num_remaining + 1 if interval else 1) - num_existing,
    )
    weight_bytes = 4 * state.parallel.num_trainable_params if recipe.tune.has_mode("lora") else 0
    if recipe.tune.has_mode("full"):
        weight_bytes += sum(parameter.nbytes for parameter in state.model.parameters())
    require_free_space(
        state.run_dir.path,
        num_new * checkpoint_size + weight_bytes,
        f"{num_new} checkpoints of {checkpoint_size / 1e9:.3g} GB and"
        f" {weight_bytes / 1e9:.3g} GB of trained weights",
        "free disk space, set another output_dir, or lower train.keep_checkpoints",
    )


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt` in glibc's malloc.h."""

_DEFAULT_THRESHOLD = 128 << 10
"""Default value of both `mallopt` thresholds, in bytes."""

_LARGE_THRESHOLD = 1 << 30


@contextmanager
def configure_host(device: torch.device) -> Iterator[None]:
    """Apply the CPU thread and allocator settings for a device within the context."""
    with _limit_cpu_threads(device), retain_freed_memory(device):
        yield


@contextmanager
def _limit_cpu_threads(device: torch.device) -> Iterator[None]:
    """Use one CPU thread of PyTorch within the context if the device is a GPU.

    More threads would compete with the data loader workers.
    """
    if device.type != "cuda":
        yield
        return
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def retain_freed_memory(device: torch.device) -> Iterator[None]:
    """Keep freed CPU memory in the process within the context, for training on a CPU.

    By default, glibc returns large blocks to the system. Page faults of new blocks then take a
    tenth of the step time of a small model. Blocks above 1 GiB are still returned.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_THRESHOLD)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _DEFAULT_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, _DEFAULT_THRESHOLD)
        libc.malloc_trim(0)


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


def train(
    recipe: Recipe, *, resume: bool = False, console: Console | None = None
) -> RunResult | None:
    """Train a recipe from the start, or resume from its newest checkpoint.

    Args:
        recipe: Settings of the run.
        resume: Whether to continue an existing run.
        console: Console for progress and messages; standard error by default.

    Returns:
        Result of the run. In a distributed run, only the main process returns a result and writes
        the run directory; the other ranks return None.

    Raises:
        UserError: The user can fix the problem; raised before any file is written where possible.
        TrainingInterrupted: One of `signals.SIGNALS` arrived. A checkpoint of the last finished
            step is written first.
    """
    with init_distributed() as process_group:
        if process_group.is_main:
            rich_console = console or Console(stderr=True)
        else:
            rich_console, recipe = Console(quiet=True), recipe.model_copy(update={"track": []})
        with translate_oom_errors():
            return _train_rank(recipe, process_group, resume, TrainingConsole(rich_console))


def _train_rank(
    recipe: Recipe, process_group: ProcessGroup, resume: bool, console: TrainingConsole
) -> RunResult | None:
    """Train on this rank; only the main process writes files and returns a result."""
    start, is_main = time.perf_counter(), process_group.is_main
    run_dir = RunDir(recipe.output_dir)
    if is_main:
        run_dir.check_available(resume)
    is_resumed = resume and run_dir.is_started
    with ExitStack() as stack:
        if is_resumed and is_main:
            # No other process may write to the run while it is read.
            stack.enter_context(run_dir.lock())
        if resume and (result := load_result(run_dir)) is not None:
            console.log(f"{run_dir.path}: the run is already complete")
            if is_main and not run_dir.report_path.exists():
                write_run_report(run_dir, console)
            return result if is_main else None
        require_packages(recipe.track)
        state = build_train_state(
            recipe, run_dir, console, resume=is_resumed, process_group=process_group
        )
        checkpoint_manager = CheckpointManager(
            run_dir.checkpoint_dir, recipe.train.keep_checkpoints
        )
        if is_main:
            check_disk_space(state, len(checkpoint_manager.steps()))
        if is_main and not is_resumed:
            stack.enter_context(run_dir.lock())
            # Another process may have started meanwhile.
            run_dir.check_available(resume=False)
        state.check_ranks_match()
        stop = StopRequest()
        with process_group.sync_errors():
            if is_main:
                _prepare_run_dir(state, checkpoint_manager)
            trackers = start_trackers(recipe, run_dir.path, state.progress.step, console.log)
            tracking = stack.enter_context(trackers)
        metrics_logger = MetricsLogger(state, console, tracking)
        if is_main:
            warm_up_kernels(state)
        metrics_logger.log_start(time.perf_counter() - start)
        with stop.install_handlers(), configure_host(state.hardware.device):
            result = Trainer(state, console, metrics_logger, stop).run()
        if result is not None:
            metrics_logger.log_result(result)
        return result


def _prepare_run_dir(state: TrainState, checkpoint_manager: CheckpointManager) -> None:
    """Write the files of a new run, or remove what a resumed run writes again."""
    run_dir, progress = state.run_dir, state.progress
    if not progress.step:
        run_dir.initialize(state.recipe, state.build_manifest())
    save_image_record(run_dir.images_path, state.images())
    checkpoint_manager.quarantine_after(progress.step)
    run_dir.truncate_metrics(progress.step, progress.last_eval_step)
    run_dir.copy_metric(state.recipe)
    run_dir.write_skipped_samples(state.train_data.stats.skipped)


RECOVERABLE_ERRORS = (
    TrainingInterrupted,
    DataWorkerError,
    UnreadableFileError,
    GpuOutOfMemoryError,
    PeerFailedError,
    RankDesyncError,
)
"""Errors of the main process after which it saves a checkpoint."""


class Trainer:
    """Training loop of every rank: steps, evaluations, checkpoints and results."""

    def __init__(
        self,
        state: TrainState,
        console: TrainingConsole,
        metrics_logger: MetricsLogger,
        stop: StopRequest,
    ) -> None:
        self.state, self.console, self.metrics_logger, self.stop = (
            state,
            console,
            metrics_logger,
            stop,
        )
        self.total_steps = len(state.sampler)
        settings, eval_settings = state.recipe.train, state.recipe.eval
        self.save_interval = resolve_save_interval(settings, self.total_steps)
        # Without a metric, compute the cheap validation loss with every checkpoint.
        eval_interval = self.save_interval
        if eval_settings is not None:
            eval_interval = resolve_steps(eval_settings.every or 0, self.total_steps)
        self.eval_interval = eval_interval if state.validation_data else 0
        self.early_stopping_patience = eval_settings.patience if eval_settings else None
        self.checkpoint_manager = CheckpointManager(
            state.run_dir.checkpoint_dir, settings.keep_checkpoints
        )
        on_gpu = state.hardware.device.type == "cuda"
        self.checkpointer = AsyncCheckpointer(
            self.checkpoint_manager,
            is_async=on_gpu and state.optimizer.num_params <= MAX_ASYNC_PARAMS,
            process_group=state.shard_group.new_group(),
        )
        self.encoder_offloader = EncoderOffloader(state.model)
        self.process_group = state.hardware.process_group
        self.is_main = self.process_group.is_main
        self.live_report = LiveReport(state.run_dir, console)

    def run(self) -> RunResult | None:
        """Run the training from the current step to the result."""
        progress = self.state.progress
        self.console.log(describe_run(self.state))
        if progress.step:
            self.console.log(f"resuming after step {progress.step} of {self.total_steps}")
        reporting = self.live_report.run_in_background(progress) if self.is_main else nullcontext()
        with reporting:
            return self.train_and_finalize()

    def train_and_finalize(self) -> RunResult | None:
        """Run the remaining steps and evaluations, and export the weights.

        A checkpoint is saved when the run is interrupted or fails with a recoverable error.
        """
        progress = self.state.progress
        try:
            if self.state.validation_data is not None and progress.last_eval_step < 0:
                self.evaluate("before")
            self.run_steps()
            self.save_checkpoint()
            if self.state.validation_data is not None and progress.last_eval_step < progress.step:
                self.evaluate(
                    "after" if self.early_stopping_patience is None else f"step-{progress.step}"
                )
            self.checkpointer.wait()
            self.live_report.stop()
            result = finalize_run(self.state, self.console, self.checkpoint_manager)
            # The other ranks wait for the main process.
            self.process_group.all_gather_str("")
            return result
        except Exception as error:
            self.handle_failure(error)
            raise
        finally:
            # Keep the lock of the run folder while files are written.
            if (write_error := self.checkpointer.join()) is not None:
                self.console.log(f"writing the last checkpoint failed: {write_error}")

    def handle_failure(self, error: Exception) -> None:
        """End the run on all ranks, and save a checkpoint if the run can continue from it.

        Args:
            error: Error of this rank.

        Raises:
            TrainingInterrupted: A rank received a stop signal.
        """
        is_recoverable = not self.is_main or isinstance(error, RECOVERABLE_ERRORS)
        is_sharded, can_save = self.state.parallel.is_sharded, is_recoverable
        if isinstance(error, RankDesyncError):
            can_save = is_recoverable and not is_sharded
        else:
            own_state = self.state.progress.step, is_recoverable, self.stop.signal_number
            # A rank that does not respond has been reported before.
            with suppress(RankTimeoutError):
                steps, recoverable, signals = zip(
                    *self.process_group.sync_failure(own_state), strict=True
                )
                self.stop.request(max(signals))
                if is_sharded:
                    can_save = all(recoverable) and len({*steps}) == 1
        if can_save:
            self.metrics_logger.flush()
            self.save_checkpoint()
            self.checkpointer.wait()
        # A job scheduler may send the signal to the data loader workers as well.
        if is_recoverable and self.stop.is_requested:
            raise self.build_interruption() from error

    def run_steps(self) -> None:
        """Run the remaining steps with evaluations and checkpoints, until early stopping."""
        if not self.on_step_end() or self.state.progress.step == self.total_steps:
            return
        budget, device = self.state.progress.budget, self.state.hardware.device
        with (
            self.open_vision_cache() as vision_cache,
            self.metrics_logger.show_progress(self.total_steps),
        ):
            retry_on_oom(
                budget,
                device,
                self.console.log,
                lambda smaller_budget: self.run_steps_in_budget(smaller_budget, vision_cache),
            )
            self.metrics_logger.flush()

    def run_steps_in_budget(self, budget: MemoryBudget, vision_cache: VisionCache | None) -> None:
        """Run the remaining steps within a memory budget."""
        state, progress = self.state, self.state.progress
        state.apply_budget(budget)
        with closing(iter_train_steps(state, vision_cache)) as steps:
            for step_batch, data_wait in time_data_waits(steps, state.hardware.device):
                step_output = self.train_step(step_batch, vision_cache)
                progress.step += 1
                self.metrics_logger.log_step(step_output, data_wait)
                if not self.on_step_end():
                    break

    def train_step(self, step_batch: StepBatch, vision_cache: VisionCache | None) -> StepOutput:
        """Run one training step on all ranks, unless a rank received a stop signal.

        Raises:
            TrainingInterrupted: A stop was requested.
            PeerFailedError: A rank failed.
        """
        global_stats = sync_step(self.process_group, step_batch, self.stop.signal_number)
        self.stop.request(global_stats.signal)
        # A signal that arrives later is shared before the next step.
        if global_stats.signal and not self.process_group.is_single_process:
            self.stop.raise_if_requested()
        return train_step(self.state, step_batch, self.stop, vision_cache, global_stats)

    @contextmanager
    def open_vision_cache(self) -> Iterator[VisionCache | None]:
        """Build the vision cache if it pays off, and provide it within the context.

        The vision encoder is then offloaded from the GPU to the CPU. Evaluations reload it.

        Yields:
            Vision cache; None to encode images in every step.
        """
        state, start = self.state, time.perf_counter()
        with open_vision_cache(state, self.console, self.stop) as result:
            self.metrics_logger.log_vision_cache(time.perf_counter() - start, result)
            offload_encoder = result.cache is not None and should_offload(state.hardware.device)
            with self.encoder_offloader.offload() if offload_encoder else nullcontext():
                yield result.cache

    def on_step_end(self) -> bool:
        """Evaluate, save a checkpoint and stop the run if due.

        Otherwise, the host does not wait for the device.

        Returns:
            False if early stopping ends the run.
        """
        should_evaluate, should_save = (
            self.is_due(self.eval_interval),
            self.is_due(self.save_interval),
        )
        # In a distributed run, all ranks stop before the next step.
        is_single_process = self.process_group.is_single_process
        should_stop = is_single_process and self.stop.is_requested
        if not (should_evaluate or should_save or should_stop):
            return True
        self.metrics_logger.flush()
        progress = self.state.progress
        if should_evaluate and progress.last_eval_step < progress.step:
            self.evaluate(f"step-{progress.step}")
        if should_save:
            self.save_checkpoint()
        if is_single_process:
            self.stop.raise_if_requested()
        self.metrics_logger.restart_timer()
        return not (should_evaluate and self.should_stop_early())

    def should_stop_early(self) -> bool:
        """Return whether the last `eval.patience` evaluations did not improve the primary metric.

        The main process decides for all ranks. The decision depends only on recorded metrics, so a
        resumed run stops at the same step.
        """
        if self.early_stopping_patience is None:
            return False
        num_evals = count_evals_since_best(load_eval_history(self.state.run_dir))
        if not self.decide_on_main(num_evals >= self.early_stopping_patience):
            return False
        self.console.log(
            f"stopping after step {self.state.progress.step} of {self.total_steps}:"
            f" {self.early_stopping_patience} evaluations without a better score (eval.patience)"
        )
        return True

    def is_due(self, interval: int) -> bool:
        """Return whether the finished step is a multiple of the interval.

        The result is False before the first step and after the last one.
        """
        step = self.state.progress.step
        return interval > 0 and 0 < step < self.total_steps and step % interval == 0

    def evaluate(self, name: str) -> None:
        """Evaluate the model, log the result, and checkpoint the best intermediate evaluation.

        Args:
            name: Name of the predictions file, such as `before` or `step-100`.
        """
        progress = self.state.progress
        start = time.perf_counter()
        with self.encoder_offloader.reload():
            eval_result = run_evaluation(self.state, name, self.console, self.stop)
        self.metrics_logger.log_evaluation(eval_result, name, time.perf_counter() - start)
        progress.last_eval_step = progress.step
        best_eval = build_best_eval(eval_result)
        is_best = self.decide_on_main(best_eval.is_better_than(progress.best))
        if is_best and 0 < progress.step < self.total_steps:
            progress.best = best_eval
            self.save_checkpoint()
        if self.is_main and progress.step < self.total_steps:
            # Not in the report thread: data loader workers may be forked next, and would inherit
            # the locks of a thread that decodes images.
            self.live_report.write()

    def save_checkpoint(self) -> None:
        """Save a checkpoint of the last finished step, unless it exists."""
        state = self.state
        if not state.progress.step or not (self.is_main or state.parallel.is_sharded):
            return
        with state.shard_group.sync_errors():
            if self.is_main:
                self.check_disk_space()
                # A checkpoint must not refer to an evaluation that a power failure can lose.
                state.run_dir.flush()
            # Raise errors of the previous checkpoint before the other ranks start to wait.
            self.checkpointer.wait()
        tensors = state.optimizer.master_weights(), state.optimizer.optimizer_state()
        self.checkpointer.save(state.checkpoint_state(), *tensors)

    def decide_on_main(self, decision: bool) -> bool:
        """Return the decision of the main process on all ranks."""
        return self.process_group.broadcast_str("yes" if decision else "") == "yes"

    def check_disk_space(self) -> None:
        """Verify that the disk has space for another checkpoint.

        Raises:
            UserError: There is not enough free space.
        """
        step, checkpoint_dir = self.state.progress.step, self.checkpoint_manager.checkpoint_dir
        if step not in self.checkpoint_manager.steps():
            require_free_space(
                checkpoint_dir,
                estimate_checkpoint_bytes(self.state),
                f"a checkpoint of step {step}",
                "free some space, then start again with --resume",
            )

    def build_interruption(self) -> TrainingInterrupted:
        """Build the exception that names the checkpoint of a stopped run and how to resume."""
        step = self.state.progress.step
        message = f"checkpoint of step {step} written" if step else "no step was finished"
        assert self.stop.signal is not None, "an interruption without a signal"
        return TrainingInterrupted(
            f"stopped by {self.stop.signal.name}, {message} in {self.state.run_dir.path};"
            " repeat the command with --resume to continue"
        )
