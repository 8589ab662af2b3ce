"""Training loop of the main process, and the public function `train`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress

from rich.console import Console

from finesight.config import Recipe
from finesight.data.line_index import UnreadableFileError
from finesight.errors import TrainingInterrupted
from finesight.storage import require_free_space
from finesight.track.backends import require_packages
from finesight.track.tracker_manager import start_trackers
from finesight.train.async_checkpoint import build_async_checkpointer
from finesight.train.checkpoint import CheckpointManager
from finesight.train.console import TrainingConsole
from finesight.train.data_wait import time_data_waits
from finesight.train.dataloader_workers import DataWorkerError
from finesight.train.disk_space import check_disk_space, estimate_checkpoint_bytes
from finesight.train.evaluation import count_evals_since_best, load_eval_history, run_evaluation
from finesight.train.finalize import (
    RunResult,
    build_best_eval,
    finalize_run,
    load_result,
    write_run_report,
)
from finesight.train.host_settings import configure_host
from finesight.train.image_record import save_image_record
from finesight.train.kernel_warmup import warm_up_kernels
from finesight.train.live_report import LiveReport
from finesight.train.logging import MetricsLogger, describe_run
from finesight.train.lr_schedule import resolve_save_interval, resolve_steps
from finesight.train.oom import (
    GpuOutOfMemoryError,
    MemoryBudget,
    retry_on_oom,
    translate_oom_errors,
)
from finesight.train.parallel.distributed import (
    PeerFailedError,
    ProcessGroup,
    RankCommand,
    RankDesyncError,
    init_distributed,
)
from finesight.train.rank_worker import run_rank_worker
from finesight.train.run_dir import RunDir
from finesight.train.setup import TrainState, build_train_state
from finesight.train.signals import StopRequest
from finesight.train.step import iter_train_steps, train_step
from finesight.train.vision_cache import open_vision_cache
from finesight.train.vision_encoder_offload import EncoderOffloader, should_offload
from finesight.train.vision_store import VisionCache


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
            return _run_main_process(
                recipe, process_group, resume, TrainingConsole(console or Console(stderr=True))
            )
        run_rank_worker(recipe, process_group, resume)
        return None


def _run_main_process(
    recipe: Recipe, process_group: ProcessGroup, resume: bool, console: TrainingConsole
) -> RunResult:
    start = time.perf_counter()
    run_dir = RunDir(recipe.output_dir)
    run_dir.check_available(resume)
    with ExitStack() as stack, translate_oom_errors():
        is_resumed = resume and run_dir.is_started
        if is_resumed:
            # No other process may write to the run while it is read.
            stack.enter_context(run_dir.lock())
        if (result := load_result(run_dir)) is not None:
            console.log(f"{run_dir.path}: the run is already complete")
            if not run_dir.report_path.exists():
                write_run_report(run_dir, console)
            return result
        require_packages(recipe.track)
        state = build_train_state(
            recipe, run_dir, console, resume=is_resumed, process_group=process_group
        )
        checkpoint_manager = CheckpointManager(
            run_dir.checkpoint_dir, recipe.train.keep_checkpoints
        )
        check_disk_space(state, len(checkpoint_manager.steps()))
        if not is_resumed:
            stack.enter_context(run_dir.lock())
            # Another process may have started meanwhile.
            run_dir.check_available(resume=False)
        state.check_ranks_match()
        stop = StopRequest()
        stack.enter_context(_shut_down_workers_on_exit(process_group, stop))
        if not state.progress.step:
            run_dir.initialize(recipe, state.build_manifest())
        save_image_record(run_dir.images_path, state.images())
        checkpoint_manager.quarantine_after(state.progress.step)
        run_dir.truncate_metrics(state.progress.step, state.progress.last_eval_step)
        run_dir.copy_metric(recipe)
        run_dir.write_skipped_samples(state.train_data.stats.skipped)
        trackers = start_trackers(recipe, run_dir.path, state.progress.step, console.log)
        metrics_logger = MetricsLogger(state, console, stack.enter_context(trackers))
        warm_up_kernels(state)
        metrics_logger.log_start(time.perf_counter() - start)
        device = state.hardware.device
        with stop.install_handlers(), configure_host(device):
            result = Trainer(state, console, metrics_logger, stop).run()
        metrics_logger.log_result(result)
        return result


@contextmanager
def _shut_down_workers_on_exit(process_group: ProcessGroup, stop: StopRequest) -> Iterator[None]:
    """Send the shutdown command to the other ranks at the end of the context.

    It is also sent after an exception, except when the ranks are out of sync.
    """
    try:
        yield
    except RankDesyncError:
        raise
    except BaseException:
        _send_shutdown(process_group, stop)
        raise
    _send_shutdown(process_group, stop)


def _send_shutdown(process_group: ProcessGroup, stop: StopRequest) -> None:
    # Some ranks may have exited; they report their own errors.
    with suppress(RuntimeError, PeerFailedError):
        process_group.sync_command(RankCommand.SHUTDOWN, signal=stop.signal_number)


class Trainer:
    """Training loop of the main process: steps, evaluations, checkpoints and results."""

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
        self.checkpointer = build_async_checkpointer(state, self.checkpoint_manager)
        self.encoder_offloader = EncoderOffloader(state.model)
        self.process_group = state.hardware.process_group
        self.live_report = LiveReport(state.run_dir, console)

    def run(self) -> RunResult:
        """Run the training from the current step to the result."""
        progress = self.state.progress
        self.console.log(describe_run(self.state))
        if progress.step:
            self.console.log(f"resuming after step {progress.step} of {self.total_steps}")
        with self.live_report.run_in_background(progress):
            return self.train_and_finalize()

    def train_and_finalize(self) -> RunResult:
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
            return finalize_run(self.state, self.console, self.checkpoint_manager)
        except (
            TrainingInterrupted,
            DataWorkerError,
            UnreadableFileError,
            GpuOutOfMemoryError,
            PeerFailedError,
        ) as cause:
            self.metrics_logger.flush()
            self.save_checkpoint()
            self.checkpointer.wait()
            # A job scheduler may send the signal to the data loader workers as well.
            if not self.stop.is_requested:
                raise
            raise self.build_interruption() from cause
        finally:
            # Keep the lock of the run folder while files are written.
            if (error := self.checkpointer.join()) is not None:
                self.console.log(f"writing the last checkpoint failed: {error}")

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
                global_stats = self.process_group.sync_step(step_batch, self.stop.signal_number)
                self.stop.request(global_stats.signal)
                if global_stats.signal and not self.process_group.is_single_process:
                    self.stop.raise_if_requested()
                step_output = train_step(state, step_batch, self.stop, vision_cache, global_stats)
                progress.step += 1
                self.metrics_logger.log_step(step_output, data_wait)
                if not self.on_step_end():
                    break

    @contextmanager
    def open_vision_cache(self) -> Iterator[VisionCache | None]:
        """Build the vision cache if it pays off, and provide it within the context.

        The vision encoder is then offloaded from the GPU to the CPU. Evaluations reload it.

        Yields:
            Vision cache; None to encode images in every step.
        """
        state, start = self.state, time.perf_counter()
        self.process_group.sync_command(RankCommand.TRAIN)
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
        if not (should_evaluate or should_save or self.stop.is_requested):
            return True
        self.metrics_logger.flush()
        progress = self.state.progress
        if should_evaluate and progress.last_eval_step < progress.step:
            self.evaluate(f"step-{progress.step}")
        if should_save:
            self.save_checkpoint()
        self.stop.raise_if_requested()
        self.metrics_logger.restart_timer()
        return not (should_evaluate and self.should_stop_early())

    def should_stop_early(self) -> bool:
        """Return whether the last `eval.patience` evaluations did not improve the primary metric.

        The decision depends only on recorded metrics, so a resumed run stops at the same step.
        """
        if (
            self.early_stopping_patience is None
            or count_evals_since_best(load_eval_history(self.state.run_dir))
            < self.early_stopping_patience
        ):
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
        self.process_group.sync_command(RankCommand.EVALUATE)
        with self.encoder_offloader.reload():
            eval_result = run_evaluation(self.state, name, self.console, self.stop)
        self.metrics_logger.log_evaluation(eval_result, name, time.perf_counter() - start)
        progress.last_eval_step = progress.step
        best_eval = build_best_eval(eval_result)
        if best_eval.is_better_than(progress.best) and 0 < progress.step < self.total_steps:
            progress.best = best_eval
            self.save_checkpoint()
        if progress.step < self.total_steps:
            # Not in the report thread: data loader workers may be forked next, and would inherit
            # the locks of a thread that decodes images.
            self.live_report.write()

    def save_checkpoint(self) -> None:
        """Save a checkpoint of the last finished step, unless it exists."""
        state = self.state
        if state.progress.step:
            self.check_disk_space()
            # A checkpoint must not refer to an evaluation that a power failure can lose.
            state.run_dir.flush()
            # Raise errors of the previous checkpoint before the other ranks start to wait.
            self.checkpointer.wait()
            state.shard_group.sync_command(RankCommand.SAVE)
            tensors = state.optimizer.master_weights(), state.optimizer.optimizer_state()
            self.checkpointer.save(state.checkpoint_state(), *tensors)

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
