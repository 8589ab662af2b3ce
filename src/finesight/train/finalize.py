"""Results of a run: parameter audit, exported weights, `result.json`, final and live report."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from math import fsum, isfinite
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from finesight.encode.renderer import is_native
from finesight.errors import TrainingInterrupted, UserError, format_count
from finesight.evaluate import custom_metric
from finesight.evaluate.eval_case import note_lines
from finesight.evaluate.eval_result import BestEval, EvalResult, find_best_eval
from finesight.evaluate.metric_difference import (
    REASON_NO_PREDICTIONS,
    MetricDifference,
    align_columns,
    build_unsampled_difference,
    compare_cases,
    count_correct,
)
from finesight.evaluate.prediction_file import read_predictions
from finesight.evaluate.score_format import format_score, format_score_change
from finesight.files.bounded_files import read_bytes
from finesight.files.storage import write_file, write_folder
from finesight.model.backend import save_auto_model
from finesight.model.backend_model import BackendModel
from finesight.model.linear import iter_adapters
from finesight.model.lora.peft_io import save_adapter
from finesight.model_folder import ModelFolder
from finesight.progress import ProgressConsole
from finesight.settings.config import ImageRule
from finesight.settings.manifest import PARAM_AUDIT_FILE, RESULT_FILE
from finesight.train.checkpoint import TrainProgress
from finesight.train.evaluation import load_eval_history
from finesight.train.param_audit import ParamChange, format_param_changes
from finesight.train.recipe_check import MAX_TRUNCATED_SHARE, suggest_completion_length
from finesight.train.run_dir import RunDir
from finesight.train.run_report import RunReport
from finesight.train.state import TrainState
from finesight.vision.processor_limits import write_processor_limits

MAX_FAILED_SHARE = 0.5
"""Share of failed episodes above which they are the reason for missing rewards."""


@dataclass(frozen=True, slots=True)
class UnusedResponses:
    """Responses of a run of which none contributed to the loss.

    Attributes:
        rewards: Names of the rewards.
        truncated_share: Share of truncated responses.
        is_masked: Whether truncated responses are excluded from the loss.
        section: Section of the recipe with the settings of responses.
        length_remedy: What to do about truncated responses.
        environment: Environment of the responses; empty without one.
        failed_share: Share of responses whose environment failed.
    """

    rewards: str
    truncated_share: float
    is_masked: bool
    section: str
    length_remedy: str
    environment: str = ""
    failed_share: float = 0.0

    def describe(self) -> tuple[str, str, str, str]:
        """Return problem, setting, expected value and remedy."""
        if self.failed_share > MAX_FAILED_SHARE:
            problem = f"the environment failed in {self.failed_share:.0%} of the episodes"
            setting = f"{self.section}.environment"
            remedy = f"correct {self.environment}; warnings above name the errors"
            return problem, setting, "episodes with a reward", remedy
        truncated = f"{self.truncated_share:.0%} of the responses were truncated"
        if self.truncated_share > MAX_TRUNCATED_SHARE:
            reason = "so the rewards were equal"
            if self.is_masked:
                setting = f"{self.section}.mask_truncated_completions"
                reason = f"and {setting} excludes them from the loss"
            setting = f"{self.section}.max_completion_length"
            return f"{truncated}, {reason}", setting, "complete responses", self.length_remedy
        problem = f"the responses had equal rewards or none ({self.rewards})"
        remedy = "use rewards that score partly correct answers, raise"
        remedy += f" {self.section}.temperature, or"
        remedy += " train with train.objective=sft first"
        return problem, "rewards", "responses of which some have a higher reward", remedy


def check_param_changes(
    param_changes: Iterable[ParamChange], unused: UnusedResponses | None = None
) -> None:
    """Verify that frozen parts are unchanged and trainable parts have changed.

    Args:
        unused: Responses of a run without any group of different rewards; None for other runs.

    Raises:
        RuntimeError: A frozen part changed, which is a bug.
        UserError: A trainable part did not change.
    """
    for change in param_changes:
        if not change.is_trained and change.num_changed:
            raise RuntimeError(
                f"{change.num_changed} of {change.num_tensors} frozen tensors of {change.part}"
                " changed"
            )
        if change.is_trained and not (change.num_changed and change.num_with_grad):
            problem = "training did not change"
            if change.num_changed:
                problem = "no gradient reached"
            problem += f" the {change.num_tensors} trainable tensors of {change.part}"
            where = f"tune.{change.part}"
            expected = "updates of all trainable parts"
            remedy = "add samples that use it (images, for vision and merger), increase"
            remedy += f" train.learning_rate.{change.part}, or set tune.{change.part}=frozen"
            if unused is not None:
                reason, where, expected, remedy = unused.describe()
                problem += f": {reason}"
            raise UserError(problem, where=where, expected=expected, remedy=remedy)


FRAME_HEIGHT = 600
"""Height in pixels of the report of a run in a notebook, which shows its first screen."""


class RunResult(BaseModel):
    """Content of `result.json`, which marks a run as complete.

    Attributes:
        steps: Number of finished steps.
        samples: Number of consumed samples.
        loss: Loss of the last step with a finite loss.
        before: Evaluation before training; None without validation data.
        after: Evaluation with the exported weights; None without validation data. Both have the
            same samples if possible: all, or the common subset of the run.
        param_changes: Result of the parameter audit.
        metric_differences: Differences of the metrics between `before` and `after`.
        best_eval: Best evaluation after the first step on the common subset of the run.
        weights_step: Step of the exported weights in `adapter/` and `model/`.
        stopped_early: Whether early stopping ended the run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_dir: str
    steps: int
    samples: int
    skipped_samples: int
    loss: float | None
    before: EvalResult | None
    after: EvalResult | None
    param_changes: tuple[ParamChange, ...]
    metric_differences: tuple[MetricDifference, ...] = ()
    best_eval: BestEval | None = None
    weights_step: int | None = None
    stopped_early: bool = False

    def __repr__(self) -> str:
        text = f"{self.run_dir!r}: {format_count(self.steps, 'step')}"
        if self.before is not None and self.after is not None:
            name = self.after.primary_metric or "validation_loss"
            before, after = get_ranking_score(self.before), get_ranking_score(self.after)
            text += f", {name} {before:.4f} before, {after:.4f} after"
        return f"<{type(self).__name__} {text}>"

    __str__ = __repr__

    def __fspath__(self) -> str:
        """Return the folder, so that the result stands for a run where a path does."""
        return self.run_dir

    def _repr_html_(self) -> str | None:
        """Return the report without examples in a frame, which a notebook shows.

        It is None if the run was moved, or the working directory changed.
        """
        if not RunDir(Path(self.run_dir)).is_started:
            return None
        # Training alone needs no report.
        from finesight.report.run_page import render_run_page

        page = html.escape(render_run_page(Path(self.run_dir), max_examples=0))
        # The frame has no access to the notebook.
        frame = f'srcdoc="{page}" sandbox="allow-scripts"'
        return f'<iframe {frame} width="100%" height="{FRAME_HEIGHT}"></iframe>'

    def as_json(self) -> dict[str, Any]:
        """Return the content of `result.json`."""
        return self.model_dump(mode="json")

    def as_table(self) -> str:
        """Format the metrics before and after training as a table.

        The result is empty without validation data.
        """
        if self.before is None or self.after is None:
            return ""
        lines = []
        if self.metric_differences:
            lines.append(format_differences(self.metric_differences, self.after.primary_metric))
        old = self.before.as_best_eval()
        new = self.after.as_best_eval()
        text = "{}: not compared: the samples before ({}) and after training ({}) differ"
        if not old.has_scores_of(new):
            lines.append(text.format("scores", old.num_samples, new.num_samples))
        if not old.has_loss_of(new):
            counts = old.num_loss_samples, new.num_loss_samples
            lines.append(text.format("validation_loss", *counts))
        return "\n".join(lines)


def _find_unused_responses(state: TrainState) -> UnusedResponses | None:
    """Return the responses of a run without different rewards, None for other runs."""
    recipe = state.run.recipe
    sampling = recipe.needs.sampling
    if not recipe.rewards or sampling is None:
        return None
    shares: list[float] = []
    failed: list[float] = []
    for line in state.run.run_dir.iter_metrics():
        # With a KL divergence, the update also contains groups with equal rewards.
        has_different_rewards = line.get("frac_reward_zero_std", 1) < 1
        if line.get("num_supervised_tokens") and has_different_rewards:
            return None
        # Without a reward, the reward function is the reason.
        if "reward" in line:
            shares.append(line["completions/clipped_ratio"])
        if "episodes/error_ratio" in line:
            failed.append(line["episodes/error_ratio"])
    environment = ""
    if sampling.episodes is not None:
        environment = sampling.episodes.environment
    return UnusedResponses(
        rewards=", ".join(reward.name for reward in recipe.rewards),
        truncated_share=fsum(shares) / max(1, len(shares)),
        is_masked=sampling.masks_truncated,
        section=sampling.section,
        length_remedy=suggest_completion_length(recipe, state.data.train),
        environment=environment,
        failed_share=fsum(failed) / max(1, len(failed)),
    )


def finalize_run(state: TrainState, wait_for_checkpoint: Callable[[], None]) -> RunResult | None:
    """Audit the parameters, export the trained weights, and write the result and the report.

    All ranks must call this function. Only the main process writes files and returns a result.

    LoRA weights are exported to `adapter/`, fully fine-tuned parts to `model/`. If both exist, the
    base model of the adapter is `model/`. The weights are those of the last step; with early
    stopping, they are those of the best evaluation.

    Args:
        wait_for_checkpoint: Function that waits for the last checkpoint. Weights are written
            meanwhile, but their folder appears after it.

    Raises:
        RuntimeError: A frozen part changed, which is a bug.
        UserError: A trainable part did not change.
    """
    run_dir = state.run.run_dir
    console = state.run.console
    process_group = state.run.hardware.process_group
    eval_history = load_eval_history(run_dir) if process_group.is_main else []
    best_eval, _ = find_best_eval(eval_history)
    before: EvalResult | None = None
    after: EvalResult | None = None
    step = state.progress.step
    if len(eval_history) > 1:
        after, step = _choose_final_eval(state, eval_history[-1], best_eval)
        before, after = pair_results(eval_history[0], after)
    step = int(process_group.broadcast_str(str(step)))
    if state.engine.parallel.is_sharded:
        wait_for_checkpoint()  # The weights are read from it.
    if not state.writes_checkpoints:
        return None
    if step != state.progress.step:
        remedy = "set eval.patience=null and resume to use the weights of the last step"
        _, weights, optimizer_state = state.run.checkpoint_manager.load(step, remedy)
        state.engine.restore_tensors(weights, optimizer_state)
    param_changes = _audit_and_save(state, step, wait_for_checkpoint)
    wait_for_checkpoint()
    if not process_group.is_main:
        return None
    loss, num_late_skipped = _summarize_steps(run_dir)
    differences: list[MetricDifference] = []
    if before is not None and after is not None:
        differences = _compute_differences(state, before, after)
    run_result = RunResult(
        run_dir=str(run_dir.path),
        steps=state.progress.step,
        samples=state.consumed_samples,
        skipped_samples=len(state.data.train.stats.skipped) + num_late_skipped,
        loss=loss,
        before=before,
        after=after,
        param_changes=tuple(param_changes),
        metric_differences=tuple(differences),
        best_eval=best_eval.as_best_eval() if best_eval else None,
        weights_step=after.step if after else state.progress.step,
        stopped_early=state.progress.step < len(state.data.sampler),
    )
    run_dir.flush()
    run_dir.write(RESULT_FILE, run_result.as_json())
    _log_summary(run_result, eval_history[-1] if eval_history else None, run_dir, console)
    RunReport(run_dir, console).write()
    return run_result


def _choose_final_eval(
    state: TrainState, last_eval: EvalResult, best_eval: EvalResult | None
) -> tuple[EvalResult, int]:
    """Choose the evaluation of the weights to export; return it and its step.

    With early stopping, these are the weights of the best evaluation, whose predictions become
    those after training. Otherwise, they are those of the last step.
    """
    run_dir = state.run.run_dir
    settings = state.run.recipe.eval
    last_step = state.progress.step
    if best_eval is None or settings is None or not settings.patience:
        return last_eval, last_step
    step = best_eval.step
    if step != last_step:
        text = f"restoring the weights of step {step}, which have the best evaluation"
        state.run.console.log(text)
    predictions = run_dir.predictions_dir / f"step-{step}.jsonl"
    if predictions.is_file():
        write_file(run_dir.predictions_dir / "after.jsonl", predictions.read_bytes())
    return best_eval, step


def _audit_and_save(
    state: TrainState,
    step: int,
    wait_for_checkpoint: Callable[[], None],
) -> list[ParamChange]:
    """Check and record the parameter changes, and export the weights; all ranks call this."""
    is_main = state.run.hardware.process_group.is_main
    params_with_grad = state.engine.optimizer.params_with_grad()
    param_changes = state.engine.param_audit.compute_changes(params_with_grad, state.shard_group)
    with state.engine.parallel.summon_full_params():
        if is_main:
            state.run.run_dir.write(PARAM_AUDIT_FILE, [*map(asdict, param_changes)])
            state.run.console.log(format_param_changes(param_changes))
        check_param_changes(param_changes, _find_unused_responses(state))
        if is_main:
            with state.run.console.activity("saving the trained weights"):
                _save_weights(state, step, wait_for_checkpoint)
    return param_changes


def _summarize_steps(run_dir: RunDir) -> tuple[float | None, int]:
    """Return the last finite loss, and the number of samples that were skipped in a step."""
    loss = None
    num_skipped = 0
    for line in run_dir.iter_metrics():
        line_loss = line.get("loss")
        # The loss of a skipped step is NaN.
        if line_loss is not None and isfinite(line_loss):
            loss = line_loss
        num_skipped += len(line.get("skipped_samples", ()))
    return loss, num_skipped


def _compute_differences(
    state: TrainState, before: EvalResult, after: EvalResult
) -> list[MetricDifference]:
    """Compute the metric differences between the evaluations before and after training.

    Metrics of different samples are omitted.
    """
    old = before.as_best_eval()
    new = after.as_best_eval()
    losses = before.validation_loss, after.validation_loss
    differences = []
    if old.has_loss_of(new):
        differences.append(build_unsampled_difference("validation_loss", *losses))
    settings = state.run.recipe.eval
    if settings is None or not old.has_scores_of(new):
        return differences
    run_dir = state.run.run_dir
    metric = custom_metric.resolve_metric_path(settings.metric, run_dir.path)
    old_file = run_dir.predictions_dir / "before.jsonl"
    new_file = run_dir.predictions_dir / "after.jsonl"
    sampled: list[MetricDifference] = []
    if old_file.is_file() and new_file.is_file():
        old_cases = [prediction.case for prediction in read_predictions(old_file)]
        new_cases = [prediction.case for prediction in read_predictions(new_file)]
        sampled = compare_cases(metric, old_cases, new_cases, num_samples=new.num_samples)
    if sampled:
        return differences + sampled
    # Scores are known, but not the intervals.
    for name, score in before.scores.items():
        if name in after.scores:
            new_score = after.scores[name]
            differences.append(
                build_unsampled_difference(name, score, new_score, REASON_NO_PREDICTIONS)
            )
    return differences


def get_ranking_score(result: EvalResult | BestEval) -> float:
    """Return the primary score of an evaluation; without a metric, the validation loss."""
    if result.primary_score is None:
        return result.validation_loss
    return result.primary_score


def _log_summary(
    result: RunResult, last: EvalResult | None, run_dir: RunDir, console: ProgressConsole
) -> None:
    """Log the metrics, and the best checkpoint if it is not the exported one.

    The checkpoints are compared by the last evaluation, on the common subset of the run.
    """
    before = result.before
    after = result.after
    best = result.best_eval
    # Only the main process needs the report.
    from finesight.report.run_reader import read_run
    from finesight.report.run_verdict import judge_run
    from finesight.report.summary import describe_rewards

    run_record = read_run(run_dir.path)
    for text in (describe_rewards(run_record), judge_run(run_record).sentence):
        if text:
            console.log(text)
    if before is None or after is None or last is None:
        return
    if table := result.as_table():
        console.log(table)
    if best is None or best.step == after.step:
        return
    # The validation loss is a mean over tokens.
    count = None if best.primary_score is None else last.num_samples
    best_score = format_score(get_ranking_score(best), count)
    last_score = format_score(get_ranking_score(last), count)
    if best_score == last_score:
        return
    subset = ""
    if last.full is not None:
        subset = f"Common subset of {last.num_loss_samples} samples: "
    console.log(
        f"{subset}The best {best.primary_metric or 'validation loss'} is that after step"
        f" {best.step} ({best_score}); its checkpoint is"
        f" {run_dir.checkpoint_dir / f'step-{best.step}'}"
    )


def _save_weights(state: TrainState, step: int, wait_for_checkpoint: Callable[[], None]) -> None:
    """Export fully fine-tuned parts to `model/`, and adapters to `adapter/`."""
    run_dir = state.run.run_dir
    base = state.run.base_model
    model = state.engine.model
    has_full_parts = state.run.recipe.tune.has_mode("full")
    has_adapter = next(iter_adapters(model), None) is not None
    if has_full_parts and not run_dir.model_dir.exists():
        with write_folder(run_dir.model_dir, wait_for_checkpoint) as folder:
            image_rule = state.data.renderer.image_rule
            save_full_model(folder, model, base.folder, state.run.hardware.dtype, image_rule)
    if not has_adapter or run_dir.adapter_dir.exists():
        return
    adapter_base = base.folder
    base_name = base.name
    if has_full_parts:
        # The base of the adapter is the trained model.
        adapter_base = ModelFolder(run_dir.model_dir)
        base_name = str(run_dir.model_dir.resolve())
    weights: Mapping[str, Tensor]
    if state.engine.parallel.is_sharded:
        _, weights, _ = state.run.checkpoint_manager.load(step, "start again with --resume")
    else:
        weights = state.engine.optimizer.master_weights(break_ties=True)
    with write_folder(run_dir.adapter_dir, wait_for_checkpoint) as folder:
        save_adapter(
            folder,
            model,
            base_model=base_name,
            base_fingerprint=adapter_base.fingerprint(),
            master_values=weights,
        )


def save_full_model(
    folder: Path, model: BackendModel, base: ModelFolder, dtype: torch.dtype, image_rule: ImageRule
) -> None:
    """Write a model without its adapters, and the files of its base model, to a folder.

    The folder must exist; use `storage.write_folder` for an atomic write.
    """
    lora_layers = [(layer, adapter) for _, layer, adapter in iter_adapters(model)]
    for layer, _ in lora_layers:
        layer.adapter = None
    try:
        save_auto_model(model, base, folder, dtype)
    finally:
        for layer, adapter in lora_layers:
            layer.adapter = adapter
    if is_native(base):
        write_processor_limits(folder, base, image_rule)


def load_result(run_dir: RunDir) -> RunResult | None:
    """Read the result of a run; return None if the run is not finished.

    Raises:
        UserError: `result.json` is invalid.
    """
    if not run_dir.is_finished:
        return None
    path = run_dir.path / RESULT_FILE
    expected = "the file as training wrote it"
    remedy = "delete it; --resume then writes it again"
    try:
        return RunResult.model_validate_json(read_bytes(path, expected=expected, remedy=remedy))
    except ValidationError as error:
        problem = f"not a valid result: {error.errors(include_url=False)[0]['msg']}"
        raise UserError(problem, where=str(path), expected=expected, remedy=remedy) from error


@contextmanager
def record_failure(
    run_dir: RunDir, console: ProgressConsole, progress: TrainProgress
) -> Iterator[None]:
    """Record an exception in the context in `metrics.jsonl` and in the report; raise it again."""
    try:
        yield
    except Exception as error:
        status = "failed"
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, TrainingInterrupted):
            status = "interrupted"
            reason = str(error)
        elif isinstance(error, UserError):
            reason = error.what
            if error.where:
                reason = f"{error.where}: {error.what}"
        ended_at = datetime.now(UTC).isoformat(timespec="seconds")
        end = {"ended_at": ended_at, "status": status, "reason": reason}
        # A full disk must not hide the original error.
        with suppress(UserError, OSError):
            run_dir.append_metrics({"step": progress.step, **end})
        RunReport(run_dir, console).write()
        raise


def pair_results(before: EvalResult, after: EvalResult) -> tuple[EvalResult, EvalResult]:
    """Return two results of the same samples: of all, or of the common subset.

    If both have other samples, the results of all samples are returned.
    """

    def count_equal_sets(pair: tuple[EvalResult, EvalResult]) -> int:
        old = pair[0].as_best_eval()
        new = pair[1].as_best_eval()
        return 2 * old.has_scores_of(new) + old.has_loss_of(new)

    pairs = (before.on_all_samples, after.on_all_samples), (before, after)
    return max(pairs, key=count_equal_sets)


def format_differences(
    differences: Sequence[MetricDifference], primary_metric: str | None = None
) -> str:
    """Format one line per score; the primary metric is marked."""
    rows = [("score", "before", "after", "difference", "95 % interval", "")]
    for one in differences:
        name = one.name
        if name == primary_metric:
            name += "*"
        count = one.num_samples
        values = format_score(one.before, count), format_score(one.after, count)
        change = format_score_change(one.after - one.before, count)
        rows.append((name, *values, change, one.interval_text, one.verdict))
    notes = note_lines((one.name, one.note) for one in differences)
    for one in differences:
        old = count_correct(one.name, one.before, one.num_samples)
        new = count_correct(one.name, one.after, one.num_samples)
        if one.is_proportion and old is not None and new is not None:
            text = f"{old} of {one.num_samples} answers correct before, {new} after"
            notes.append(f"{one.name}: {text}")
        if one.name == "ended_with_eos" and one.after < 1:
            text = "share of answers that ended before eval.max_new_tokens: raise it for the others"
            notes.append(f"{one.name}: {text}")
    return "\n".join([align_columns(rows, 1), *notes])
