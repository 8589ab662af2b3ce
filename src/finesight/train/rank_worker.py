"""Training loop of the ranks other than the main process, which follow its commands."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

from rich.console import Console

from finesight.config import Recipe
from finesight.errors import TrainingInterrupted, UserError
from finesight.train.async_checkpoint import build_async_checkpointer
from finesight.train.checkpoint import CheckpointManager
from finesight.train.console import TrainingConsole
from finesight.train.dataloader import StepBatch
from finesight.train.evaluation import run_evaluation
from finesight.train.finalize import load_final_weights, load_result
from finesight.train.host_settings import configure_host
from finesight.train.oom import MemoryBudget, retry_on_oom, translate_oom_errors
from finesight.train.parallel.distributed import (
    GlobalStepStats,
    PeerFailedError,
    ProcessGroup,
    RankCommand,
    RankDesyncError,
    RankTimeoutError,
)
from finesight.train.param_audit import check_param_changes
from finesight.train.run_dir import RunDir
from finesight.train.setup import TrainState, build_train_state
from finesight.train.signals import StopRequest
from finesight.train.step import iter_train_steps, train_step
from finesight.train.vision_cache import open_vision_cache
from finesight.train.vision_encoder_offload import EncoderOffloader, should_offload
from finesight.train.vision_store import VisionCache


def run_rank_worker(recipe: Recipe, process_group: ProcessGroup, resume: bool) -> None:
    """Execute the commands of the main process until the run ends.

    Args:
        recipe: Settings of the run.
        process_group: Ranks of the run.
        resume: Whether the run is resumed.

    Raises:
        TrainingInterrupted: A signal stopped the run.
    """
    run_dir, console, stop = (
        RunDir(recipe.output_dir),
        TrainingConsole(Console(file=io.StringIO())),
        StopRequest(),
    )
    if resume and load_result(run_dir) is not None:
        return
    with translate_oom_errors():
        state = build_train_state(recipe, run_dir, console, resume, process_group)
        state.check_ranks_match()
        with stop.install_handlers(), configure_host(state.hardware.device):
            _RankWorker(state, console, stop).run()
    if stop.is_requested:
        raise TrainingInterrupted("stopped by the main process of the run")


class _RankWorker:
    """Training run of a rank that follows the commands of the main process."""

    def __init__(self, state: TrainState, console: TrainingConsole, stop: StopRequest) -> None:
        self.state, self.console, self.stop = state, console, stop
        self.process_group = state.hardware.process_group
        self.checkpoint_manager = CheckpointManager(
            state.run_dir.checkpoint_dir, state.recipe.train.keep_checkpoints
        )
        self.checkpointer = build_async_checkpointer(state, self.checkpoint_manager)
        self.encoder_offloader = EncoderOffloader(state.model)
        self.is_shut_down = False

    def run(self) -> None:
        """Execute commands until the main process ends the run.

        After a local error, the rank still takes part in the barriers and then raises the error.
        """
        try:
            self.run_commands()
            self.checkpointer.wait()
        except RankDesyncError:
            raise
        except Exception as error:
            self.drain_commands()
            # A stop signal on another rank is not an error.
            if not (isinstance(error, PeerFailedError) and self.stop.is_requested):
                raise

    def run_steps(self) -> None:
        """Run training steps until the last step or a stop signal."""
        state = self.state
        budget, device = state.progress.budget, state.hardware.device
        with ExitStack() as stack:
            with self.report_failure():
                cache_context = open_vision_cache(state, self.console, self.stop)
                vision_cache = stack.enter_context(cache_context).cache
            if vision_cache is not None and should_offload(device):
                stack.enter_context(self.encoder_offloader.offload())
            retry_on_oom(
                budget,
                device,
                self.console.log,
                lambda smaller_budget: self.run_steps_in_budget(smaller_budget, vision_cache),
            )

    def run_steps_in_budget(self, budget: MemoryBudget, vision_cache: VisionCache | None) -> None:
        """Run the remaining training steps within a memory budget."""
        state, previous_event = self.state, None
        state.apply_budget(budget)
        with closing(iter_train_steps(state, vision_cache)) as steps:
            while (step_batch := self.next_step(steps)) is not None:
                global_stats = self.sync_step(step_batch)
                if self.is_shut_down or global_stats.signal:
                    return
                step_output = train_step(state, step_batch, self.stop, vision_cache, global_stats)
                state.progress.step += 1
                # Wait for the previous step, as the main process does to log its metrics.
                if previous_event is not None:
                    previous_event.synchronize()
                previous_event = step_output.event

    @contextmanager
    def report_failure(self) -> Iterator[None]:
        """Report an exception in the context to the main process, which waits for this rank."""
        try:
            yield
        except TrainingInterrupted:
            # All ranks raise it.
            raise
        except Exception:
            global_stats = self.process_group.sync_command(
                RankCommand.FAILED, signal=self.stop.signal_number
            )
            self.is_shut_down = global_stats.command is RankCommand.SHUTDOWN
            raise

    def next_step(self, steps: Iterator[StepBatch]) -> StepBatch | None:
        """Return the data of the next step, or None after the last step."""
        with self.report_failure():
            return next(steps, None)

    def sync_step(self, step_batch: StepBatch) -> GlobalStepStats:
        """Execute the commands before a step; return the step statistics over all ranks."""
        while True:
            global_stats = self.process_group.sync_step(step_batch, self.stop.signal_number)
            self.stop.request(global_stats.signal)
            if global_stats.command is RankCommand.STEP or self.execute(global_stats):
                return global_stats

    def drain_commands(self) -> None:
        """Take part in all barriers until the run ends, ignoring errors.

        The other ranks would otherwise wait for this one until the timeout.
        """
        while not self.is_shut_down:
            try:
                self.run_commands()
            except (RankTimeoutError, RuntimeError):
                return
            except UserError:
                continue

    def run_commands(self) -> None:
        while not self.is_shut_down:
            global_stats = self.process_group.sync_command(
                RankCommand.WAIT, signal=self.stop.signal_number
            )
            self.stop.request(global_stats.signal)
            self.execute(global_stats)

    def execute(self, global_stats: GlobalStepStats) -> bool:
        """Execute a command of the main process other than a step.

        Returns:
            True if the command was the last one of the run.
        """
        state = self.state
        match global_stats.command:
            case RankCommand.SAVE:
                tensors = state.optimizer.master_weights(), state.optimizer.optimizer_state()
                self.checkpointer.save(state.checkpoint_state(), *tensors)
            case RankCommand.EVALUATE:
                with self.encoder_offloader.reload():
                    # All ranks handle a signal before the next step.
                    run_evaluation(state, "", self.console, StopRequest())
            case RankCommand.TRAIN:
                self.run_steps()
            case RankCommand.FINALIZE:
                with load_final_weights(
                    state, self.checkpoint_manager, global_stats.argument
                ) as param_changes:
                    check_param_changes(param_changes)
            case RankCommand.SHUTDOWN:
                self.is_shut_down = True
            case _:
                # The main process sends no command.
                pass
        return self.is_shut_down
