"""Training loop of every rank: steps, evaluations, checkpoints and stop requests.

Modules that import models are imported for their types only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import chain, starmap
from typing import TYPE_CHECKING, TypeVar

from finesight.errors import TrainingInterrupted, TrainingStopped
from finesight.evaluate.eval_result import find_best_eval
from finesight.evaluate.score_function import RewardError, ScoringError
from finesight.files.storage import require_free_space
from finesight.samples.line_index import UnreadableFileError
from finesight.train.callbacks import CallbackError
from finesight.train.checkpoint import (
    MAX_ASYNC_PARAMS,
    MIN_SAVE_INTERVAL_S,
    AsyncCheckpointer,
    resolve_save_interval,
)
from finesight.train.device_timing import time_data_waits
from finesight.train.evaluation import load_eval_history, resolve_eval_interval, run_evaluation
from finesight.train.master_weight_optimizer import resolve_steps
from finesight.train.oom import GpuOutOfMemoryError, MemoryBudget, release_memory
from finesight.train.parallel.distributed import (
    PeerFailedError,
    ProcessGroup,
    RankDesyncError,
    RankTimeoutError,
)
from finesight.train.prefetch import DataWorkerError
from finesight.train.state import StepOutput, TrainState
from finesight.train.step import train_step
from finesight.train.step_batch import GlobalStepStats, SkippedSample, StepBatch
from finesight.train.step_dataset import read_steps
from finesight.train.vision_cache import VisionCache

if TYPE_CHECKING:
    from finesight.train.logging import MetricsLogger
    from finesight.train.run_report import RunReport
    from finesight.train.vision_cache_builder import VisionFeatures

T = TypeVar("T")


def sync_step(
    process_group: ProcessGroup, step_batch: StepBatch, signal: int = 0
) -> GlobalStepStats:
    """Exchange step statistics with all ranks; all ranks must call this before each step.

    Args:
        step_batch: Step data of this rank.
        signal: Number of the stop signal that this rank received, or 0.

    Returns:
        Statistics over all ranks.

    Raises:
        PeerFailedError: A rank has failed, or the ranks have different data.
        RankDesyncError: The ranks are at different steps.
    """
    local_stats = GlobalStepStats.from_step(step_batch, signal)
    if process_group.is_single_process:
        return local_stats
    own_values = step_batch.split_checksum, *local_stats
    values = process_group.start_step(step_batch.step_index, own_values)
    checksums, supervised, samples, tokens, packs, skipped, signals = zip(*values, strict=True)
    if len(set(checksums)) > 1:
        raise PeerFailedError(
            "a sample that is split over the ranks differs between them",
            where="training",
            expected="the same files on every rank during the run",
            remedy="verify that every machine can read the images of the sample, then start"
            " again with --resume",
        )
    all_skipped = starmap(SkippedSample, chain.from_iterable(skipped))
    return GlobalStepStats(
        num_supervised_tokens=sum(supervised),
        num_samples=sum(samples),
        num_tokens=sum(tokens),
        max_packs=max(packs),
        skipped=tuple(all_skipped),
        signal=max(signals),
    )


RECOVERABLE_ERRORS = (
    TrainingInterrupted,
    ScoringError,
    DataWorkerError,
    UnreadableFileError,
    GpuOutOfMemoryError,
    PeerFailedError,
    RankDesyncError,
)
"""Errors of the main process after which it saves a checkpoint."""


class Trainer:
    """Training loop of every rank: steps, evaluations, checkpoints and results.

    Args:
        metrics_logger: Logger of steps and evaluations.
        vision_features: Vision cache of the run, if it pays off.
        report: Report of the run in progress; None on the other ranks.
    """

    def __init__(
        self,
        state: TrainState,
        metrics_logger: MetricsLogger,
        vision_features: VisionFeatures,
        report: RunReport | None,
    ) -> None:
        self.state = state
        self.console = state.run.console
        self.stop = state.run.stop
        self.metrics_logger = metrics_logger
        self.vision_features = vision_features
        self.report = report
        self.total_steps = len(state.data.sampler)
        settings = state.run.recipe.train
        eval_settings = state.run.recipe.eval
        self.save_interval = resolve_save_interval(settings, self.total_steps)
        # Without a metric, compute the cheap validation loss with every checkpoint.
        self.eval_interval = self.save_interval
        self.early_stopping_patience: int | None = None
        if eval_settings is not None:
            self.eval_interval = resolve_eval_interval(eval_settings, self.total_steps)
            self.early_stopping_patience = eval_settings.patience
        if state.data.validation is None:
            self.eval_interval = 0
        self.stop_step = resolve_steps(self.stop.after or 0, self.total_steps)
        on_gpu = state.run.hardware.device.type == "cuda"
        min_save_interval_s = 0.0
        if on_gpu and settings.save_every is None:
            min_save_interval_s = MIN_SAVE_INTERVAL_S
        self.checkpointer = AsyncCheckpointer(
            state.run.checkpoint_manager,
            is_async=on_gpu and state.engine.optimizer.num_params <= MAX_ASYNC_PARAMS,
            process_group=state.shard_group.new_group(),
            min_interval_s=min_save_interval_s,
        )
        self.process_group = state.run.hardware.process_group
        self.is_main = self.process_group.is_main
        # True from the first update of a step with several to the last one. Such weights are of no
        # step that a checkpoint could name, and the step is neither stopped nor repeated.
        self.is_within_step = False

    def run(self, finalize: Callable[[Callable[[], None]], T]) -> T:
        """Run the remaining steps and evaluations, and return the result.

        A checkpoint is saved when the run is interrupted or fails with a recoverable error.

        Args:
            finalize: Function that exports the weights and returns the result. Its argument waits
                for the last checkpoint.
        """
        progress = self.state.progress
        if progress.step:
            self.console.log(f"resuming after step {progress.step} of {self.total_steps}")
        try:
            if self.state.data.validation is not None and progress.last_eval_step < 0:
                self.evaluate("before")
            self.run_steps()
            self.save_checkpoint()
            is_evaluated = progress.last_eval_step == progress.step
            if self.metrics_logger.callbacks.stop_reason and self.early_stopping_patience is None:
                is_evaluated = False  # The evaluation in which the run stopped may be of a subset.
            if self.state.data.validation is not None and not is_evaluated:
                name = "after"
                if self.early_stopping_patience is not None:
                    name = f"step-{progress.step}"
                self.evaluate(name)
            result = finalize(self.checkpointer.wait)
            # The other ranks wait for the main process.
            self.process_group.all_gather_object(None)
            return result
        except Exception as error:
            self.handle_failure(error)
            raise
        finally:
            # Keep the lock of the run folder while files are written.
            try:
                self.checkpointer.wait()
            except Exception as write_error:
                self.console.log(f"writing the last checkpoint failed: {write_error}")

    def handle_failure(self, error: Exception) -> None:
        """End the run on all ranks, and save a checkpoint if the run can continue from it.

        Args:
            error: Error of this rank.

        Raises:
            TrainingInterrupted: A rank received a stop signal, and the checkpoint was saved.
            RankTimeoutError: A sharded run was stopped, and a rank did not respond.
        """
        is_recoverable = not self.is_main or isinstance(error, RECOVERABLE_ERRORS)
        is_recoverable = is_recoverable and not self.is_within_step
        is_sharded = self.state.engine.parallel.is_sharded
        # All ranks write a sharded checkpoint, so all have to respond.
        can_save = is_recoverable and not is_sharded
        if not isinstance(error, RankDesyncError):
            own_state = self.state.progress.step, is_recoverable, int(self.stop.signal or 0)
            try:
                states = self.process_group.sync_failure(own_state)
                steps, recoverable, signals = zip(*states, strict=True)
                self.stop.request(max(signals))
                if is_sharded:
                    can_save = all(recoverable) and len(set(steps)) == 1
            except RankTimeoutError:
                # Otherwise, the rank that does not respond has been reported before.
                if is_sharded and isinstance(error, TrainingInterrupted):
                    raise
        if can_save:
            self.metrics_logger.flush()
            self.save_checkpoint()
            self.checkpointer.wait()
            if isinstance(error, ScoringError):
                error.what += f"; {self.describe_scoring_failure(error)}"
        # A job scheduler may send the signal to the data loader workers as well.
        if can_save and self.stop.signal is not None:
            raise self.build_interruption() from error

    def describe_scoring_failure(self, error: ScoringError) -> str:
        """Return where a score function failed, and what the run can continue from."""
        step = self.state.progress.step
        stage = f"in the evaluation of step {step}"
        if isinstance(error, CallbackError):
            stage = f"in step {step}"
        elif isinstance(error, RewardError):
            stage = f"in step {step + 1}"
        written = "no checkpoint yet"
        if step:
            written = f"checkpoint of step {step} written"
        return f"{stage}, {written}"

    def run_steps(self) -> None:
        """Run the remaining steps with evaluations and checkpoints, until early stopping."""
        if not self.on_step_end() or self.state.progress.step == self.total_steps:
            return
        budget = self.state.progress.budget
        device = self.state.run.hardware.device
        with (
            self.vision_features.open(self.metrics_logger.log_vision_cache) as vision_cache,
            self.metrics_logger.show_progress(self.total_steps),
        ):
            while True:
                try:
                    self.run_steps_in_budget(vision_cache, budget)
                    break
                except GpuOutOfMemoryError as oom_error:
                    if oom_error.next_budget is None or self.is_within_step:
                        raise
                    # The step, which has updated no parameter, is repeated with smaller packs.
                    self.console.log(oom_error.describe_retry(budget))
                    budget = oom_error.next_budget
                # Outside the except block, because the traceback keeps tensors alive.
                release_memory(device)
            self.metrics_logger.flush()

    def run_steps_in_budget(self, vision_cache: VisionCache | None, budget: MemoryBudget) -> None:
        """Run the remaining steps within a memory budget."""
        state = self.state
        progress = state.progress
        state.apply_budget(budget)
        hardware = state.run.hardware
        device = hardware.device
        if state.run.recipe.needs.has_rollouts:
            step_batches = state.engine.objective.sample_steps(state, progress.step)
        else:
            dataset = state.engine.step_dataset.with_pack_tokens(budget.pack_tokens)
            if vision_cache is not None:
                dataset = replace(dataset, cache_reader=vision_cache.reader)
            step_batches = read_steps(
                dataset, progress.step, hardware.num_workers, pin_memory=device.type == "cuda"
            )
        with closing(step_batches):
            if state.writes_checkpoints:
                # Meanwhile, the workers read the first step.
                _, weights, optimizer_state = state.state_dict()
                self.checkpointer.allocate([weights, optimizer_state])
            for step_batch, data_wait in time_data_waits(step_batches, device):
                step_output = self.run_step(step_batch, vision_cache)
                progress.step += 1
                self.metrics_logger.log_step(step_output, data_wait)
                if not self.on_step_end():
                    break

    def run_step(self, step_batch: StepBatch, vision_cache: VisionCache | None) -> StepOutput:
        """Run one training step on all ranks, unless a rank received a stop signal.

        Raises:
            TrainingInterrupted: A stop was requested.
            PeerFailedError: A rank failed.
        """
        global_stats = sync_step(self.process_group, step_batch, int(self.stop.signal or 0))
        # A signal that arrives later is shared before the next step.
        if global_stats.signal and not self.process_group.is_single_process:
            self.stop.request(global_stats.signal)
            self.stop.raise_if_requested()
        arguments = self.state, step_batch, vision_cache, global_stats
        step_output = train_step(*arguments)
        for _ in range(1, self.state.engine.objective.num_updates):
            self.is_within_step = True
            step_output = train_step(*arguments, can_stop=False)
        self.is_within_step = False
        return step_output

    def on_step_end(self) -> bool:
        """Update the report, evaluate, save a checkpoint and stop the run if due.

        Otherwise, the host does not wait for the device.

        Returns:
            False if early stopping ends the run.
        """
        self.update_report()
        is_rung = self.is_due(self.stop_step)
        has_validation = self.state.data.validation is not None
        should_evaluate = self.is_due(self.eval_interval) or (is_rung and has_validation)
        should_save = self.is_due(self.save_interval) and self.decide_on_main(
            self.checkpointer.is_due()
        )
        # In a distributed run, all ranks stop before the next step.
        is_single_process = self.process_group.is_single_process
        should_stop = is_single_process and self.stop.signal is not None
        if not (should_evaluate or should_save or should_stop or is_rung):
            return not self.is_stopped_by_callback()
        self.metrics_logger.flush()
        progress = self.state.progress
        if should_evaluate and progress.last_eval_step < progress.step:
            self.evaluate(f"step-{progress.step}", is_complete=False)
        if should_save:
            self.save_checkpoint()
        if is_single_process:
            self.stop.raise_if_requested()
        if is_rung:
            raise TrainingStopped(
                f"step {progress.step} is reached; --resume without --stop-after continues the run"
            )
        self.metrics_logger.restart_timer()
        return not (self.is_stopped_by_callback() or (should_evaluate and self.should_stop_early()))

    def update_report(self) -> None:
        """Write the report of the run in progress if it is due; a GPU computes a step meanwhile."""
        if self.report is None or not self.report.write_if_due():
            return
        if not self.metrics_logger.has_pending_step:
            self.metrics_logger.restart_timer()

    def is_stopped_by_callback(self) -> bool:
        """Return whether a callback has stopped the run, which has one step at least."""
        step = self.state.progress.step
        reason = self.metrics_logger.callbacks.stop_reason
        if reason is None or not step:
            return False
        self.console.log(f"stopping after step {step} of {self.total_steps}: {reason}")
        return True

    def should_stop_early(self) -> bool:
        """Return whether the last `eval.patience` evaluations did not improve the primary metric.

        The main process decides for all ranks. The decision depends only on recorded metrics, so a
        resumed run stops at the same step.
        """
        if self.early_stopping_patience is None:
            return False
        _, num_evals = find_best_eval(load_eval_history(self.state.run.run_dir))
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

    def evaluate(self, name: str, *, is_complete: bool = True) -> None:
        """Evaluate the model, log the result, and checkpoint the best intermediate evaluation.

        Args:
            name: Name of the predictions file, such as `before` or `step-100`.
            is_complete: Whether to evaluate all samples, not only the common subset.
        """
        progress = self.state.progress
        start = time.perf_counter()
        with self.vision_features.offloader.hold(is_offloaded=False):
            eval_result = run_evaluation(self.state, name, is_complete)
        self.metrics_logger.log_evaluation(eval_result, name, time.perf_counter() - start)
        if self.report is not None and progress.step < self.total_steps:
            self.report.write(is_live=True)
        progress.last_eval_step = progress.step
        best_eval = eval_result.as_best_eval()
        is_best = self.decide_on_main(best_eval.is_better_than(progress.best))
        if is_best and 0 < progress.step < self.total_steps:
            progress.best = best_eval
            self.save_checkpoint()

    def save_checkpoint(self) -> None:
        """Save a checkpoint of the last finished step, unless it exists."""
        state = self.state
        step = state.progress.step
        if not step or not state.writes_checkpoints:
            return
        manager = state.run.checkpoint_manager
        with state.shard_group.sync_errors():
            if self.is_main:
                if step not in manager.steps():
                    require_free_space(
                        manager.checkpoint_dir,
                        state.estimate_checkpoint_bytes(),
                        f"a checkpoint of step {step}",
                        "free some space, then start again with --resume",
                    )
                # A checkpoint must not refer to an evaluation that a power failure can lose.
                state.run.run_dir.flush()
            # Raise errors of the previous checkpoint before the other ranks start to wait.
            self.checkpointer.wait()
        self.checkpointer.save(*state.state_dict())

    def decide_on_main(self, decision: bool) -> bool:
        """Return the decision of the main process on all ranks."""
        return self.process_group.broadcast_str("yes" if decision else "") == "yes"

    def build_interruption(self) -> TrainingInterrupted:
        """Build the exception that names the checkpoint of a stopped run and how to resume."""
        step = self.state.progress.step
        message = "no step was finished"
        if step:
            message = f"checkpoint of step {step} written"
        assert self.stop.signal is not None, "an interruption without a signal"
        run_dir = self.state.run.run_dir
        hint = ""
        if step and not self.state.run.recipe.tune.has_mode("full"):
            hint = f", or use {run_dir.checkpoint_dir / f'step-{step}'} as a model"
        return TrainingInterrupted(
            f"stopped by {self.stop.signal.name}, {message} in {run_dir.path};"
            f" repeat the command with --resume to continue{hint}"
        )
