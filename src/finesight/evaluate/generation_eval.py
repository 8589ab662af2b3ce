"""Evaluation by generation on validation samples: inputs, task metrics and intervals."""

from __future__ import annotations

import html
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finesight.encode.renderer import Renderer
from finesight.environment_components import EpisodeSettings, require_environment
from finesight.errors import Step, UserError, format_count, suggest_name
from finesight.evaluate import custom_metric
from finesight.evaluate.bootstrap import ConfidenceInterval
from finesight.evaluate.episode import open_environment, predict_episodes
from finesight.evaluate.eval_case import (
    MetricValues,
    ReferenceAnswer,
    get_reference_answer,
    note_lines,
)
from finesight.evaluate.eval_result import select_eval_samples
from finesight.evaluate.metric_difference import count_correct
from finesight.evaluate.prediction_file import create_case, format_prediction_line
from finesight.evaluate.score_format import format_score, format_score_interval
from finesight.evaluate.task_metrics import (
    check_references,
    compute_metrics,
    get_primary_metric,
)
from finesight.infer.prediction import Prediction, predict
from finesight.metric_components import METRICS
from finesight.model.backend_model import BackendModel
from finesight.model_folder import check_model_path
from finesight.samples.corpus import load_corpus
from finesight.samples.image_file import CorruptImageError
from finesight.samples.sample import LocatedSample, read_samples
from finesight.settings.config import EVAL_BATCH_SIZE, EvalSettings, MetricSpec
from finesight.settings.manifest import RECIPE_FILE, find_run_dir
from finesight.settings.recipe import load_recipe, parse_recipe, read_recipe_text


def load_eval_inputs(
    run_or_model: str,
    *,
    data: Path | None = None,
    metric: str | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
) -> tuple[list[LocatedSample], EvalSettings]:
    """Load the samples and settings of an evaluation.

    For a run or its checkpoint, arguments that are None default to its recipe; a custom metric is
    loaded from the copy in the run folder.

    Raises:
        UserError: Data or metric is missing, or the metric does not exist.
    """
    path = find_run_dir(Path(run_or_model)) / RECIPE_FILE
    recipe = None
    if path.is_file():
        recipe = load_recipe(path)
    else:
        check_model_path(run_or_model)
    settings: dict[str, Any] = {}
    if recipe is not None and recipe.eval is not None:
        own = recipe.eval.metric
        copied = custom_metric.resolve_metric_path(own, path.parent, prefer_copy=True)
        settings = recipe.eval.model_dump() | {"metric": copied}
    overrides = {"metric": metric, "limit": limit, "max_new_tokens": max_new_tokens}
    settings |= {name: value for name, value in overrides.items() if value is not None}
    if "metric" not in settings:
        expected = f"{', '.join(METRICS)}, or FILE.py:FUNCTION"
        raise _build_missing_error("metric", expected, run_or_model)
    if data is not None:
        samples = [LocatedSample(sample, data.parent) for sample in read_samples(data)]
    elif recipe is not None and recipe.data.eval:
        samples = load_corpus(recipe.data.eval).read_samples()
    else:
        raise _build_missing_error("data", "a JSONL file of validation samples", run_or_model)
    try:
        return samples, EvalSettings.model_validate(settings)
    except ValidationError as error:
        raise _build_settings_error(error, settings) from error


NO_ENVIRONMENT = "none"
"""Name of an environment that stands for answers without tools."""


def find_episode_settings(
    run_or_model: str, environment: str | None = None, max_new_tokens: int | None = None
) -> EpisodeSettings | None:
    """Return the environment of an evaluation; None for answers without tools.

    Args:
        environment: `FILE.py:CLASS`, a component or `NO_ENVIRONMENT`; by default, for a run or its
            checkpoint, that of its recipe, from the copy in the run folder.
        max_new_tokens: Maximum number of tokens of an episode; by default that of the recipe.

    Raises:
        UserError: The name is that of no environment.
    """
    if environment == NO_ENVIRONMENT:
        return None
    path = find_run_dir(Path(run_or_model)) / RECIPE_FILE
    settings = None
    if path.is_file():
        settings = _read_episode_settings(path)
    if environment is not None:
        settings = settings or EpisodeSettings(environment=environment)
        settings = replace(settings, environment=environment)
    elif settings is not None:
        copied = custom_metric.resolve_metric_path(
            settings.environment,
            path.parent,
            prefer_copy=True,
            copy_name=custom_metric.ENVIRONMENT_COPY,
        )
        settings = replace(settings, environment=copied)
    if settings is not None:
        require_environment(settings.environment)
    if settings is not None and max_new_tokens is not None:
        settings = replace(settings, max_tokens=max_new_tokens)
    return settings


def _read_episode_settings(path: Path) -> EpisodeSettings | None:
    """Return the environment in the recipe of a run.

    The model of a run needs no plug-ins of metrics, trackers and objectives, so that recipes
    without an environment are not validated.
    """
    content, _ = parse_recipe(read_recipe_text(path), path)
    train = content.get("train") if isinstance(content, dict) else None
    objective = train.get("objective") if isinstance(train, dict) else None
    if not isinstance(train, dict) or not isinstance(objective, str):
        return None
    section = train.get(objective)
    if not isinstance(section, dict) or not section.get("environment"):
        return None
    sampling = load_recipe(path).needs.sampling
    return None if sampling is None else sampling.episodes


def _build_settings_error(error: ValidationError, settings: dict[str, Any]) -> UserError:
    """Create the UserError for the first invalid setting, or for an unknown metric."""
    messages = {str(one["loc"][0]): one["msg"] for one in error.errors(include_url=False)}
    if "metric" in messages:
        value = str(settings["metric"])
        return UserError(
            f"unknown metric {value!r}",
            where="metric",
            expected=messages["metric"].removeprefix("not "),
            remedy=suggest_name(value, METRICS, "choose one of these"),
        )
    name = next(iter(messages))
    return UserError(
        f"{name} is {settings[name]}",
        where=name,
        expected=messages[name],
        remedy="correct the value, or omit it",
    )


def _build_missing_error(setting: str, expected: str, run_or_model: str) -> UserError:
    """Create the UserError for an evaluation without a metric or data."""
    reason = "is not a run folder with a recipe"
    remedy = f"set {setting}, or correct the run folder"
    if (Path(run_or_model) / RECIPE_FILE).is_file():
        reason = "has a recipe without it"
        remedy = f"set {setting}"
    return UserError(
        f"not set, and {run_or_model} {reason}", where=setting, expected=expected, remedy=remedy
    )


MAX_LISTED_DETAILS = 10

PredictOutput = tuple[list[Prediction], dict[int, str]]
"""Predictions in sample order, and the reason for each missing prediction by sample index."""


@dataclass(frozen=True, slots=True)
class EvalQuestions:
    """Validation samples that an evaluation answers, and their reference answers.

    Attributes:
        positions: Positions of the samples in those given.
    """

    positions: tuple[int, ...]
    samples: tuple[LocatedSample, ...]
    references: tuple[ReferenceAnswer, ...]


@dataclass(frozen=True, slots=True, repr=False)
class GenerationEvalResult:
    """Scores and predictions of an evaluation by generation.

    Attributes:
        primary_metric: Name of the primary score (higher is better).
        scores: Scores of the task, and `ended_with_eos`, the share of answers with an end token.
        corrupt_samples: (sample id, reason) of samples with unreadable images, which are excluded.
        intervals: 95 % confidence interval of each score; None if undefined.
        notes: Warnings and reasons for missing intervals, by the name of the score.
        positions: Positions of the predicted samples in those given.
        subset: The result of a subset of the same predictions, if one was requested.
    """

    metric: MetricSpec
    primary_metric: str
    scores: MetricValues
    predictions: tuple[Prediction, ...]
    corrupt_samples: tuple[tuple[str, str], ...]
    intervals: dict[str, ConfidenceInterval | None]
    details: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    positions: tuple[int, ...] = ()
    subset: GenerationEvalResult | None = None

    @property
    def primary_score(self) -> float:
        """The primary score."""
        return self.scores[self.primary_metric]

    def as_json(self) -> dict[str, Any]:
        """Return the scores as JSON data, without predictions."""
        return {
            "metric": self.metric,
            "num_samples": len(self.predictions),
            "corrupt_samples": len(self.corrupt_samples),
            "primary_metric": self.primary_metric,
            "scores": self.scores,
            "intervals": self.intervals,
            "notes": self.notes,
            "details": self.details,
        }

    def __repr__(self) -> str:
        scores = ", ".join(f"{name} {value:.4f}" for name, value in self.scores.items())
        num_samples = format_count(len(self.predictions), "sample")
        return f"<{type(self).__name__} of {num_samples}: {scores}>"

    def _repr_html_(self) -> str:
        """Return the table of scores, which a notebook shows."""
        return f"<pre>{html.escape(self.as_table())}</pre>"

    def as_table(self) -> str:
        """Format the scores as a text table; the primary score is marked."""
        num_samples = len(self.predictions)
        heading = f"{self.metric}: {format_count(num_samples, 'sample')}"
        if self.corrupt_samples:
            heading += f", {len(self.corrupt_samples)} skipped"
        lines = [f"{heading}, with 95 % intervals"]
        for name in self.scores:
            lines.append(self._format_score(name))
        lines += note_lines(self.notes.items())
        lines += self._list_worst_details()
        num_truncated = sum(map(_ended_within_reasoning, self.predictions))
        if num_truncated:
            end = "ended within the reasoning: raise eval.max_new_tokens (--max-new-tokens)"
            lines.append(f"{num_truncated} of {num_samples} completions {end}")
        return "\n".join(lines)

    def _format_score(self, name: str) -> str:
        """Format a score with its interval and, if known, the number of correct answers."""
        value = self.scores[name]
        title = name
        if name == self.primary_metric:
            title = f"{name}*"
        bounds = "-"
        interval = self.intervals[name]
        if interval is not None:
            bounds = format_score_interval(interval, len(self.predictions))
        line = f"{title:<18}  {format_score(value, len(self.predictions)):>8}   {bounds}"
        # Custom scores of a sample may be other values than 0 and 1.
        if custom_metric.is_custom_metric(self.metric):
            return line
        count = count_correct(name, value, len(self.predictions))
        if count is None:
            return line
        return f"{line}   {count} of {len(self.predictions)} correct"

    def _list_worst_details(self) -> list[str]:
        """Return lines with the most frequent confusions, and the fields with the lowest F1."""
        lines = []
        confusions = [row for row in self.details.get("confusion", []) if row[0] != row[1]]
        for expected, predicted, count in confusions[:MAX_LISTED_DETAILS]:
            lines.append(f"{expected!r} predicted as {predicted!r}: {count}")
        f1_by_field = {}
        for name, row in self.details.get("fields", {}).items():
            f1_by_field[name] = float(row["f1"])
        for name in sorted(f1_by_field, key=f1_by_field.__getitem__)[:MAX_LISTED_DETAILS]:
            f1_text = format_score(f1_by_field[name], len(self.predictions))
            lines.append(f"field {name}: f1 {f1_text}")
        return lines


def _ended_within_reasoning(prediction: Prediction) -> bool:
    """Return whether a completion reached the token limit before its answer."""
    has_only_reasoning = bool(prediction.reasoning) and not prediction.answer
    return has_only_reasoning and prediction.finish_reason == "length"


def evaluate(
    model: BackendModel,
    renderer: Renderer,
    samples: Sequence[LocatedSample],
    settings: EvalSettings,
    write_predictions: Callable[[bytes], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_batch_reduced: Callable[[int], None] | None = None,
    subset: Collection[int] | None = None,
    batch_size: int = EVAL_BATCH_SIZE,
    episodes: EpisodeSettings | None = None,
) -> GenerationEvalResult:
    """Generate predictions for validation samples and score them.

    Args:
        samples: Samples of which `settings.limit` are selected (`select_questions`).
        write_predictions: Writes the predictions with scores, one JSON object per line.
        on_progress: Callback for the number of finished completions after each step; an exception
            stops the evaluation.
        on_batch_reduced: Callback for the new batch size after the GPU runs out of memory.
        subset: Positions of questions whose predictions are also scored separately.
        batch_size: Answers generated at the same time; halved when GPU memory is exhausted.
        episodes: Environment whose tools the answers call; None without tools.

    Raises:
        UserError: There are no samples, samples have no reference answer for the metric, or no
            image can be read.
    """
    questions = select_questions(renderer, samples, settings)
    output = generate_predictions(
        model,
        renderer,
        questions.samples,
        settings,
        on_progress=on_progress,
        on_batch_reduced=on_batch_reduced,
        batch_size=batch_size,
        episodes=episodes,
    )
    return score_predictions(questions, output, settings, write_predictions, subset)


def select_questions(
    renderer: Renderer, samples: Sequence[LocatedSample], settings: EvalSettings
) -> EvalQuestions:
    """Select a random subset of `settings.limit` samples (`select_eval_samples`).

    Raises:
        UserError: There are no samples, or samples have no reference answer for the metric.
    """
    chosen = select_eval_samples(range(len(samples)), settings.limit)
    selected = [samples[i] for i in chosen]
    if not selected:
        arguments = {"source": "SOURCE", "out": "OUT", "eval_last": 200}
        raise UserError(
            f"{len(selected)} samples to evaluate",
            where="evaluation data",
            expected="at least one sample with an answer",
            remedy=Step("import", arguments, "set validation samples, for example by an import"),
        )
    references = []
    ids = []
    for located in selected:
        reference = get_reference_answer(located.sample, has_reasoning=renderer.renders_reasoning)
        references.append(reference)
        ids.append(located.sample.id)
    check_references(settings.metric, references, ids)
    return EvalQuestions(tuple(chosen), tuple(selected), tuple(references))


def generate_predictions(
    model: BackendModel,
    renderer: Renderer,
    samples: Sequence[LocatedSample],
    settings: EvalSettings,
    *,
    on_progress: Callable[[int], None] | None = None,
    on_batch_reduced: Callable[[int], None] | None = None,
    batch_size: int = EVAL_BATCH_SIZE,
    episodes: EpisodeSettings | None = None,
    run_dir: Path | None = None,
) -> PredictOutput:
    """Generate predictions for samples; those with unreadable images are skipped.

    The model's training mode is restored.

    Args:
        on_progress: Called after each step with the number of finished completions; an exception
            stops the evaluation.
        on_batch_reduced: Called with the new batch size after the GPU runs out of memory.
        batch_size: Answers generated at the same time; halved when GPU memory is exhausted.
        episodes: Environment whose tools the answers call, with limits that replace
            `settings.max_new_tokens`; None without tools.
        run_dir: Run whose copy replaces a missing file of the environment.
    """
    errors: dict[int, CorruptImageError] = {}
    predictions = predict_answers(
        model,
        renderer,
        samples,
        max_new_tokens=settings.max_new_tokens,
        batch_size=batch_size,
        on_progress=on_progress,
        on_corrupt_image=errors.__setitem__,
        on_batch_reduced=on_batch_reduced,
        episodes=episodes,
        run_dir=run_dir,
    )
    return predictions, {i: str(error).splitlines()[0] for i, error in errors.items()}


def predict_answers(
    model: BackendModel,
    renderer: Renderer,
    samples: Sequence[LocatedSample],
    *,
    max_new_tokens: int,
    batch_size: int,
    on_progress: Callable[[int], None] | None = None,
    on_corrupt_image: Callable[[int, CorruptImageError], None] | None = None,
    on_batch_reduced: Callable[[int], None] | None = None,
    episodes: EpisodeSettings | None = None,
    run_dir: Path | None = None,
) -> list[Prediction]:
    """Generate a prediction for each sample (`predict`), with the tools of an environment if set.

    Args:
        max_new_tokens: Maximum number of tokens of an answer; `episodes` has that of an episode.
        run_dir: Run whose copy replaces a missing file of the environment.
    """
    if episodes is None:
        return predict(
            model,
            renderer,
            samples,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            on_progress=on_progress,
            on_corrupt_image=on_corrupt_image,
            on_batch_reduced=on_batch_reduced,
        )
    with open_environment(episodes, run_dir) as environment:
        return predict_episodes(
            environment,
            episodes,
            model,
            renderer,
            samples,
            batch_size=batch_size,
            on_progress=on_progress,
            on_corrupt_image=on_corrupt_image,
            on_batch_reduced=on_batch_reduced,
        )


def score_predictions(
    questions: EvalQuestions,
    output: PredictOutput,
    settings: EvalSettings,
    write_predictions: Callable[[bytes], None] | None = None,
    subset: Collection[int] | None = None,
) -> GenerationEvalResult:
    """Score the predictions for the questions of an evaluation.

    Args:
        output: Predictions for all questions.
        write_predictions: Writes the predictions with scores, one JSON object per line.
        subset: Positions of questions whose predictions are also scored separately.

    Raises:
        UserError: No image can be read.
    """
    predictions, corrupt_reasons = output
    num_requested = len(questions.samples)
    readable = [i for i in range(num_requested) if i not in corrupt_reasons]
    positions = readable
    if subset is not None:
        positions = [i for i in readable if i in subset]
        num_requested = len(subset)
    if not positions:
        raise UserError(
            f"none of {num_requested} samples has a readable image",
            where="evaluation data",
            expected="complete image files",
            remedy=f"correct the first error: {next(iter(corrupt_reasons.values()))}",
        )
    by_position = dict(zip(readable, predictions, strict=True))
    cases = {}
    for i, prediction in by_position.items():
        cases[i] = create_case(prediction, questions.references[i])
    corrupt_samples = []
    for i, reason in sorted(corrupt_reasons.items()):
        corrupt_samples.append((questions.samples[i].sample.id, reason))

    def score(scored: Sequence[int]) -> tuple[GenerationEvalResult, list[MetricValues]]:
        metric_result = compute_metrics(settings.metric, [cases[i] for i in scored])
        result = GenerationEvalResult(
            metric=settings.metric,
            primary_metric=get_primary_metric(settings.metric, metric_result.scores),
            scores=metric_result.scores,
            predictions=tuple(by_position[i] for i in scored),
            corrupt_samples=tuple(corrupt_samples),
            intervals=metric_result.intervals(),
            details=metric_result.details,
            notes=metric_result.notes(),
            positions=tuple(questions.positions[i] for i in scored),
        )
        return result, metric_result.per_sample

    result, per_sample = score(readable)
    if write_predictions is not None:
        lines = map(format_prediction_line, predictions, cases.values(), per_sample)
        write_predictions("".join(lines).encode())
    if subset is None or positions == readable:
        return result
    subset_result, _ = score(positions)
    return replace(result, subset=subset_result)
