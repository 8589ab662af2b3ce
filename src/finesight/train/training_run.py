"""Public function `train`: sets up a run, trains and writes the result."""

from __future__ import annotations

import ctypes
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from finesight.encode.batch import PackedBatch
from finesight.errors import UserError, console_format
from finesight.evaluate.python_functions import hash_functions
from finesight.model.kernels.runtime import HAS_TRITON, compile_in_parallel, is_compile_cache_empty
from finesight.progress import ProgressConsole
from finesight.settings.config import PYTHON_PREFIX, Recipe
from finesight.settings.manifest import MANIFEST_FILE, RECIPE_FILE, load_manifest
from finesight.settings.recipe import load_recipe
from finesight.settings.setting_types import StepsOrFraction
from finesight.train.callbacks import Callback, CallbackList, check_callbacks
from finesight.train.dataset_stats import save_tensors
from finesight.train.finalize import (
    RunResult,
    finalize_run,
    load_result,
    record_failure,
)
from finesight.train.logging import MetricsLogger, describe_run
from finesight.train.oom import translate_oom_errors
from finesight.train.parallel.distributed import init_distributed
from finesight.train.recipe_check import check_disk_space
from finesight.train.run_dir import RunDir
from finesight.train.run_report import RunReport
from finesight.train.setup import (
    MUTABLE_SETTINGS,
    InputCheck,
    build_manifest,
    build_state,
    library_versions,
)
from finesight.train.state import TrainState
from finesight.train.tracking import start_trackers
from finesight.train.trainer import Trainer
from finesight.train.vision_cache_builder import VisionFeatures

_M_TRIM_THRESHOLD = -1
"""Parameter of `mallopt` in glibc's malloc.h: free bytes from which the heap shrinks."""

_M_MMAP_THRESHOLD = -3
"""Parameter of `mallopt` in glibc's malloc.h: size from which freed blocks are returned."""

_DEFAULT_THRESHOLD = 128 << 10
"""Default value of both `mallopt` thresholds, in bytes."""

_LARGE_THRESHOLD = 1 << 30


@contextmanager
def configure_host(device: torch.device) -> Iterator[None]:
    """Apply the thread and allocator settings of the CPU for a device within the context.

    With a GPU, PyTorch uses one CPU thread, because more would compete with the data loader
    workers. On a CPU, freed memory stays in the process: by default, glibc returns large blocks to
    the system, and page faults of new blocks take a tenth of the step time of a small model. Blocks
    above 1 GiB are still returned.
    """
    num_threads = torch.get_num_threads()
    has_glibc = device.type == "cpu" and platform.libc_ver()[0] == "glibc"
    libc = ctypes.CDLL(None) if has_glibc else None
    if device.type == "cuda":
        torch.set_num_threads(1)
    elif libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.set_num_threads(num_threads)
        elif libc is not None:
            libc.mallopt(_M_MMAP_THRESHOLD, _DEFAULT_THRESHOLD)
            libc.mallopt(_M_TRIM_THRESHOLD, _DEFAULT_THRESHOLD)
            libc.malloc_trim(0)


def warm_up_kernels(state: TrainState) -> None:
    """Compile all Triton kernels in parallel, by running packs of the next step.

    This is done only if the Triton cache is empty. No parameter is updated. Errors are only logged
    at debug level, because the training step raises them again.
    """
    device = state.run.hardware.device
    has_kernels = state.engine.model.capabilities.kernels
    if not (HAS_TRITON and device.type == "cuda" and has_kernels):
        return
    if state.engine.parallel.is_sharded:
        return
    if not is_compile_cache_empty() or state.progress.step == len(state.data.sampler):
        return
    try:
        # Packs with and without shared prefix use other kernels.
        variants: dict[bool, PackedBatch] = {}
        for packed_batch in state.engine.step_dataset.get_step(state.progress.step).packs:
            # Split packs need all ranks.
            if packed_batch.context_shard is None:
                variants[packed_batch.prefix_length > 0] = packed_batch
        for packed_batch in variants.values():
            with torch.random.fork_rng([device]), compile_in_parallel(device):
                state.engine.graph_runner.warm_up(state.engine.device_loader.load(packed_batch))
    except Exception as error:
        logging.getLogger(__name__).debug("kernels were not compiled beforehand: %s", error)
    finally:
        state.engine.optimizer.zero_grad()


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    console: Console | None = None,
    check_inputs: InputCheck | None = None,
    stop_after: StepsOrFraction | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunResult | None:
    """Train a recipe from the start, or resume from its newest checkpoint.

    Args:
        resume: Whether to continue an existing run.
        console: Console for progress and messages; standard error by default.
        check_inputs: Further check of a new run, before the weights are loaded.
        stop_after: Number or fraction of the steps after which the run is evaluated and stops.
        callbacks: Functions that get the metrics of each step and evaluation, and may stop the run.

    Returns:
        Result of the run. In a distributed run, only the main process returns a result and writes
        the run directory; the other ranks return None.

    Raises:
        UserError: The user can fix the problem; raised before any file is written where possible.
        TrainingInterrupted: One of `SIGNALS` arrived, or `stop_after` is reached. A checkpoint of
            the last finished step is written first.
    """
    with init_distributed() as process_group, translate_oom_errors(), ExitStack() as stack:
        start = time.perf_counter()
        is_main = process_group.is_main
        check_callbacks(callbacks, process_group.world_size)
        run_dir = RunDir(recipe.output_dir)
        progress_console = ProgressConsole(console if is_main else Console(quiet=True))
        if not is_main:
            recipe = recipe.model_copy(update={"track": []})
        log = progress_console.log
        is_resumed = resume and run_dir.is_started
        if is_main:
            if run_dir.is_started:
                # No other process may write to the run while it is read.
                stack.enter_context(run_dir.lock())
            run_dir.check_available(resume)
        if resume and not is_resumed:
            log(f"{run_dir.path}: no run to resume; a new run starts")
        _warn_about_functions(run_dir, log)
        if resume and (result := load_result(run_dir)) is not None:
            log(_describe_finished_run(recipe, run_dir))
            if is_main and not run_dir.report_path.exists():
                RunReport(run_dir, progress_console).write()
            return result if is_main else None
        state = build_state(
            recipe, run_dir, progress_console, is_resumed, process_group, check_inputs
        )
        state.run.stop.after = stop_after
        if is_main:
            check_disk_space(
                recipe,
                state.engine.model,
                state.engine.parallel.num_trainable_params,
                state.estimate_checkpoint_bytes(),
                total_steps=len(state.data.sampler),
                num_finished=state.progress.step,
                num_existing=len(state.run.checkpoint_manager.steps()),
            )
        if is_main and not is_resumed:
            stack.enter_context(run_dir.lock())
            # Another process may have started meanwhile.
            run_dir.check_available(resume=False)
        state.check_ranks_match()
        with process_group.sync_errors():
            if is_main:
                _prepare_run_dir(state)
            trackers = start_trackers(recipe, run_dir.path, state.progress.step, log)
            tracking = stack.enter_context(trackers)
        report = RunReport(run_dir, progress_console) if is_main else None
        metrics_logger = MetricsLogger(state, tracking, CallbackList(callbacks))
        if is_main:
            warm_up_kernels(state)
        metrics_logger.log_start(time.perf_counter() - start)
        log(describe_run(state))
        result = _run_training(state, metrics_logger, report)
        if result is not None:
            metrics_logger.tracking_events.log_result(result)
        return result


def _run_training(
    state: TrainState, metrics_logger: MetricsLogger, report: RunReport | None
) -> RunResult | None:
    """Run all steps and write the result; the main process also records a failure."""
    trainer = Trainer(state, metrics_logger, VisionFeatures(state), report)
    recorder: AbstractContextManager[None] = nullcontext()
    if state.run.hardware.process_group.is_main:
        recorder = record_failure(state.run.run_dir, state.run.console, state.progress)
    with (
        state.run.stop.install_handlers(),
        configure_host(state.run.hardware.device),
        recorder,
    ):
        state.engine.objective.prepare(state)
        return trainer.run(partial(finalize_run, state))


def _describe_finished_run(recipe: Recipe, run_dir: RunDir) -> str:
    """Describe why a finished run is not continued, and how to train further."""
    text = f"{run_dir.path}: the run is already complete, so nothing was trained"
    changes = _list_changed_settings(recipe, run_dir)
    if changes:
        text += f"; changed settings have no effect: {', '.join(changes)}"
    further = run_dir.suggest_further_run(recipe, run_dir.path, "To train further")
    return f"{text}. {further.format(console_format.get())}"


def _list_changed_settings(recipe: Recipe, run_dir: RunDir) -> list[str]:
    """Return the names of settings that differ from those of a finished run."""
    try:
        recorded = load_recipe(run_dir.path / RECIPE_FILE)
    except UserError:
        return []
    names = []
    current_sections = recipe.model_dump(exclude={"output_dir", "track"})
    recorded_sections = recorded.model_dump(exclude={"output_dir", "track"})
    for section, settings in current_sections.items():
        other = recorded_sections[section]
        if not isinstance(settings, dict) or not isinstance(other, dict):
            if settings != other:
                names.append(section)
            continue
        for name, value in settings.items():
            is_mutable = section == "train" and name in MUTABLE_SETTINGS
            # The samples of a Python program were compared; the folder of the run may have moved.
            is_written = f"{section}.{name}" in ("data.train", "data.eval") and _is_in_folder(
                value, run_dir.samples_dir
            )
            if not (is_mutable or is_written) and value != other.get(name):
                names.append(f"{section}.{name}")
    return names


def _is_in_folder(files: Sequence[Mapping[str, Any]], folder: Path) -> bool:
    """Return whether the only data file of a setting is in a folder."""
    return len(files) == 1 and Path(files[0]["path"]).parent == folder


def _warn_about_functions(run_dir: RunDir, log: Callable[[str], None]) -> None:
    """Warn if a metric or reward of a resumed run has other code than before.

    The code of a function depends on the version of Python.
    """
    digests = hash_functions()
    if not digests or not run_dir.is_started:
        return
    manifest = load_manifest(run_dir.path / MANIFEST_FILE)
    if manifest.versions.get("python") != library_versions()["python"]:
        return
    for name, recorded in manifest.functions.items():
        if digests.get(name, recorded) != recorded:
            log(
                f"{run_dir.path}: {name.removeprefix(PYTHON_PREFIX)} is another function than at"
                " the start of the run, so its scores are not comparable to the earlier ones"
            )


def _prepare_run_dir(state: TrainState) -> None:
    """Write the files of a new run, or remove what a resumed run writes again."""
    run_dir = state.run.run_dir
    progress = state.progress
    if not progress.step:
        manifest = build_manifest(
            state.run.recipe,
            state.run.base_model,
            state.data.renderer,
            state.data.train.find_prompt_format(),
        )
        run_dir.initialize(state.run.recipe, manifest)
    save_tensors(run_dir.images_path, state.data.images())
    state.run.checkpoint_manager.quarantine_after(progress.step)
    run_dir.truncate_metrics(progress.step, progress.last_eval_step)
    run_dir.copy_functions(state.run.recipe)
    run_dir.write_skipped_samples(state.data.train.stats.skipped, progress.step)
