"""Search for the settings of a recipe by successive halving of training runs.

A trial is a run with other settings. It stops at rungs, fractions of its steps, where its answers
to a validation split of the training data are scored. The best third of the trials of a rung
resume; the others are pruned (asynchronous successive halving, Li et al. 2020). If starting and
evaluating take longer than training, trials are trained completely. The first trials change the
learning rate only. Then a tree-structured Parzen estimator (Bergstra et al. 2011) proposes settings
from the scores of earlier trials.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import chain, islice
from pathlib import Path
from signal import SIGTERM
from statistics import fmean
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ValidationError

from finesight.errors import TrainingInterrupted, UserError, format_count
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.metric_difference import (
    MetricDifference,
    compare_family,
    pair_cases,
)
from finesight.evaluate.prediction_file import read_predictions
from finesight.evaluate.score_format import format_score, format_score_interval
from finesight.evaluate.task_metrics import compute_metrics, get_primary_metric
from finesight.evaluate.verdict import Estimators
from finesight.files.bounded_files import read_bytes
from finesight.files.storage import (
    check_new_path,
    check_writable_folder,
    sha256_file,
    write_file,
    write_folder,
)
from finesight.report.charts import build_parallel_plot
from finesight.report.html import PageFile, render_page
from finesight.report.i18n import Language, detect_language, translate, use_language
from finesight.samples.corpus import Corpus, load_corpus
from finesight.samples.image_file import get_file, split_page
from finesight.samples.image_split import group_rows, split_by_image
from finesight.samples.sample import LocatedSample, Sample, relocate_sample, write_samples
from finesight.settings.config import MetricSpec, Recipe
from finesight.settings.recipe import dump_recipe, recipe_from_dict
from finesight.train.dataset_stats import list_sample_images
from finesight.train.evaluation import load_eval_history
from finesight.train.run_dir import RunDir
from finesight.train.state import StopRequest

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

RECORD_FILE = "search.json"
BEST_FILE = "best.yaml"
PAGE_FILE = "report.html"

REDUCTION_FACTOR = 3
"""Inverse share of trials that pass a rung."""

RUNGS = (1, 3, 9)
"""Ends of the rungs in ninths of the steps."""

NUM_FOLDS = 3
"""Folds of cross-validation."""

MIN_SPLIT_SAMPLES = 300
"""Number of samples from which one split replaces cross-validation."""

VALIDATION_FRACTION = 0.2
"""Fraction of the samples in the validation split, without cross-validation."""

MAX_VALIDATION_SAMPLES = 400
"""Maximum number of samples in the validation split, without cross-validation."""

PATIENCE = 8
"""Trials after the best one after which the search ends if the best two do not differ clearly."""

NUM_RANDOM_TRIALS = 6
"""Trials before the sampler uses scores, with the recipe itself."""

LEARNING_RATE_FACTORS = (3.0, 1 / 3)
"""Factors of the learning rate in the first trials: no other setting has a larger effect."""

MAX_PROPOSALS = 100
"""Maximum number of proposals of known settings in succession, after which the search ends."""

MAX_FAILURES = 3
"""Consecutive failed trials after which the search ends with the error of the last one."""

MAX_PLOTTED_TRIALS = 8


class RungScore(BaseModel):
    """Score of a trial at a rung with any 95 % interval, its samples and seconds.

    `train_s` are the seconds of all steps so far. The validation loss decides between equal scores,
    such as 0 after the first steps.
    """

    rung: int
    seconds: float
    train_s: float
    score: float
    loss: float
    interval: tuple[float, float] | None
    num_samples: int | None = None

    @property
    def rank(self) -> tuple[float, float]:
        """Sort key, larger for a better score."""
        return self.score, -self.loss


class TrialRecord(BaseModel):
    """A trial: its settings that differ from the recipe, and its scores at the rungs."""

    number: int
    settings: dict[str, Any]
    state: Literal["running", "complete", "pruned", "fail"] = "running"
    rungs: list[RungScore] = []
    error: str = ""


class SearchRecord(BaseModel):
    """Content of `search.json`: the searched recipe, its trials, and the choice.

    Attributes:
        data: Digest of the training data.
        space: Distributions of the searched settings, as text.
        num_folds: Number of runs of a trial, 1 without cross-validation.
        seconds: Seconds of all searches in the folder so far.
        choice: Number of the chosen trial; None before the end of the search.
        reasons: Why the search ended, and the reason for the choice.
        test: Scores of the default recipe and the chosen trial on `data.eval`, by trial.
    """

    recipe: dict[str, Any]
    data: str
    space: dict[str, str]
    metric: str
    num_folds: int = 1
    seconds: float = 0.0
    trials: list[TrialRecord] = []
    choice: int | None = None
    reasons: list[str] = []
    test: dict[int, float] = {}

    def rank_trials(self) -> list[TrialRecord]:
        """Return the trials with a score, sorted by rung and score, last rung first."""
        scored = [one for one in self.trials if one.rungs]
        scored.sort(key=lambda one: (one.rungs[-1].rung, *one.rungs[-1].rank), reverse=True)
        return scored

    def list_rows(self) -> list[tuple[str, ...]]:
        """Return the rows of a table of the trials, best first, after a header."""
        rows: list[tuple[str, ...]] = [
            ("trial", "state", "progress", "seconds", "score", "95 % interval", "settings")
        ]
        unscored = [one for one in self.trials if not one.rungs]
        for one in [*self.rank_trials(), *unscored]:
            progress = "0"
            score = ""
            interval = ""
            if one.rungs:
                last = one.rungs[-1]
                progress = f"{last.rung}/{RUNGS[-1]}"
                score = format_score(last.score, last.num_samples)
                if last.interval:
                    interval = format_score_interval(last.interval, last.num_samples)
            seconds = sum(rung.seconds for rung in one.rungs)
            settings = "; ".join(filter(None, (format_settings(one.settings), one.error)))
            number = str(one.number)
            rows.append((number, one.state, progress, f"{seconds:.0f}", score, interval, settings))
        return rows


def import_optuna() -> ModuleType:
    """Import optuna without its messages. Raises UserError if it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed",
            where="search",
            expected="the extra search",
            remedy="pip install 'finesight[search]'",
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def build_search_space(recipe: Recipe, section: object) -> dict[str, BaseDistribution]:
    """Build the distribution of each searched setting. Each contains the value of the recipe.

    Args:
        section: Section `search` of the recipe: by dotted setting, a list of values, a range, or
            null to keep the setting.

    Raises:
        UserError: The section names an unknown setting or an invalid value.
    """
    kinds = import_optuna().distributions
    content = recipe.model_dump(mode="json")
    space = _list_default_values(recipe)
    if not isinstance(section, Mapping | None):
        raise _build_space_error("search", section)
    aliases = {"train.learning_rate": "train.learning_rate.default"}
    for name, values in (section or {}).items():
        space[aliases.get(str(name), str(name))] = values
    distributions: dict[str, BaseDistribution] = {}
    for name, values in space.items():
        if values is None:
            continue
        default = find_setting(content, name)
        try:
            if isinstance(values, Mapping):
                limits = _widen_range(values["low"], values["high"], default)
                kind = kinds.FloatDistribution
                if isinstance(limits["low"], int):
                    kind = kinds.IntDistribution
                distributions[name] = kind(**{**values} | limits)
                values = [*limits.values()]
            elif isinstance(values, list):
                values = [*dict.fromkeys([default, *values])]
                distributions[name] = kinds.CategoricalDistribution(values)
            else:
                raise TypeError(values)
        except (LookupError, ValueError, TypeError) as error:
            raise _build_space_error(f"search.{name}", values) from error
        for value in values:
            recipe_from_dict(content, {name: value})  # reports an invalid value
    if not distributions:
        raise _build_space_error("search", section)
    return distributions


def _list_default_values(recipe: Recipe) -> dict[str, Any]:
    """Return the values or the range of each setting that is searched by default."""
    train = recipe.train
    space: dict[str, Any] = {}
    base_lr = train.learning_rate.default
    space["train.learning_rate.default"] = {"low": base_lr / 5, "high": base_lr * 5, "log": True}
    if recipe.tune.has_mode("lora"):
        space["tune.lora.rank"] = [8, 16, 32, 64, 128]
    if train.steps is None:
        epochs = train.epochs or 1.0
        space["train.epochs"] = [epochs / 2, epochs, 2 * epochs]
    else:
        space["train.steps"] = [math.ceil(train.steps / 2), train.steps, 2 * train.steps]
    pixels = dict(recipe.image or ()).get("max_pixels")
    if pixels:
        space["image.max_pixels"] = [pixels // 2, pixels, 2 * pixels]
    for index, file in enumerate(recipe.data.train[1:], start=1):
        bounds = {"low": file.weight / 4, "high": file.weight * 4, "log": True}
        space[f"data.train.{index}.weight"] = bounds
    return space


def _widen_range(low: Any, high: Any, default: Any) -> dict[str, int] | dict[str, float]:
    """Return the limits of a range with the default, as integers if both ends are."""
    if isinstance(low, int) and isinstance(high, int):
        integers = (int(low), int(high), int(default))
        return {"low": min(integers), "high": max(integers)}
    numbers = (float(low), float(high), float(default))
    return {"low": min(numbers), "high": max(numbers)}


def _build_space_error(where: str, value: object) -> UserError:
    return UserError(
        f"not a search space: {value!r:.80}",
        where=where,
        expected="by setting, values such as [1, 2], or {low: 1e-5, high: 1e-3, log: true} around"
        " the value of the recipe",
        remedy="correct it, or write null to keep the setting of the recipe",
    )


def find_setting(content: Any, name: str) -> Any:
    """Return the value of a dotted setting in the content of a recipe, if any."""
    for key in name.split("."):
        if isinstance(content, list):
            index = int(key) if key.isdecimal() else -1
            content = dict(enumerate(map(dict, content))).get(index)
        elif isinstance(content, Mapping):
            content = content.get(key)
        else:
            content = None
    return content


def write_splits(recipe: Recipe, corpus: Corpus, folder: Path) -> int:
    """Write training and validation splits of the training data without shared images.

    Each split has the files `validation.jsonl` and, for each source, `train-INDEX.jsonl`. Small
    data have `NUM_FOLDS` splits, whose validation samples are all samples.

    Returns:
        The number of splits.
    """
    num_splits = 1 if len(corpus) >= MIN_SPLIT_SAMPLES else NUM_FOLDS
    if folder.exists():
        return num_splits
    samples = corpus.read_samples()
    keys = _list_image_keys(samples)
    if num_splits == 1:
        size = min(MAX_VALIDATION_SAMPLES, VALIDATION_FRACTION * len(samples))
        _, validation_rows = split_by_image(keys, 1 - size / len(samples), recipe.train.seed)
        splits = [validation_rows]
    else:
        splits = [[] for _ in range(num_splits)]
        for group in sorted(group_rows(keys), key=len, reverse=True):
            min(splits, key=len).extend(group)
    with write_folder(folder) as staging:
        for number, rows in enumerate(splits, start=1):
            name = f"fold-{number}"
            (staging / name).mkdir()
            moved = [relocate_sample(one, folder / name) for one in samples]
            _write_fold(staging / name, moved, corpus.source_sizes, frozenset(rows))
        if recipe.data.eval:
            test = load_corpus(recipe.data.eval).read_samples()
            write_samples(staging / "test.jsonl", (relocate_sample(one, folder) for one in test))
    return num_splits


def _list_image_keys(samples: Sequence[LocatedSample]) -> list[frozenset[str]]:
    """Return the hashes of the images of each sample. Equal files have equal hashes.

    Images in tar and Parquet files are compared by name.
    """
    paths = [*map(list_sample_images, samples)]
    hashes: dict[Path, str] = {}
    for path in set(chain.from_iterable(paths)):
        if get_file(path).is_file():
            _, page = split_page(path.name)
            hashes[path] = sha256_file(get_file(path)) + page
    keys = []
    for own_paths in paths:
        keys.append(frozenset(hashes.get(path, str(path)) for path in own_paths))
    return keys


def _write_fold(
    folder: Path, samples: Sequence[Sample], sizes: Sequence[int], validation_rows: Set[int]
) -> None:
    """Write the validation samples of a fold, and the training samples of each source.

    Args:
        samples: Samples of all sources.
        sizes: Number of samples of each source.

    Raises:
        UserError: No sample of a source remains for training, or none for validation.
    """
    write_samples(folder / "validation.jsonl", (samples[row] for row in sorted(validation_rows)))
    start = 0
    for index, size in enumerate(sizes):
        rows = range(start, start + size)
        kept = [samples[row] for row in rows if row not in validation_rows]
        if not kept or not validation_rows:
            raise UserError(
                f"{format_count(size, 'sample')}, too few for a validation split",
                where=f"data.train.{index}",
                expected=f"at least {NUM_FOLDS} samples with different images",
                remedy="add samples, or remove the file",
            )
        write_samples(folder / f"train-{index}.jsonl", kept)
        start += size


class TrialSearch:
    """Search in a folder, which continues an earlier one with the same recipe.

    Each rung of a trial is a process that trains on one GPU. A crash or full memory ends only it.

    Args:
        recipe: Recipe with a metric. Its split `data.eval` is only used for the final evaluation.
        space: Section `search` of the recipe.
        budget_s: Seconds of all searches in the folder.
        max_trials: Maximum number of trials, including the recipe itself; None for any.
        log: Function that prints a line of progress.
    """

    def __init__(
        self,
        recipe: Recipe,
        space: object,
        out: Path,
        budget_s: float,
        max_trials: int | None,
        log: Callable[[str], None],
    ) -> None:
        if recipe.train.steps is None and recipe.train.epochs is None:
            recipe = recipe_from_dict(recipe.model_dump(mode="json"), {"train.epochs": 1.0})
        if recipe.eval is None:
            raise UserError(
                f"eval is {recipe.eval}, so trials cannot be compared",
                where="eval.metric",
                expected="a metric of generated answers, such as captions or json",
                remedy="add eval.metric=NAME",
            )
        self._out = out
        self._budget_s = budget_s
        self._max_trials = max_trials
        self._log = log
        self._metric = recipe.eval.metric
        self._eval_limit = recipe.eval.limit
        self._space = build_search_space(recipe, space)
        corpus = load_corpus(recipe.data.train)
        self.record = self._load_record(
            SearchRecord(
                recipe=recipe.model_dump(mode="json"),
                data=corpus.fingerprint,
                space={name: str(one) for name, one in self._space.items()},
                metric=self._metric,
            )
        )
        self._lock = threading.RLock()
        self._stop = StopRequest()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._is_stopped = False
        self._start_s = time.monotonic() - self.record.seconds
        self.record.num_folds = write_splits(recipe, corpus, out / "data")
        if not (out / RECORD_FILE).exists():
            # The record marks the folder as that of a search, which the next command continues.
            self._save()
        self._waiting = [one for one in self.record.trials if one.state == "running"]

    def _load_record(self, new: SearchRecord) -> SearchRecord:
        """Return the record of an earlier search in the folder, else a new one.

        Raises UserError for a search with another recipe or other data, and for other files.
        """
        file = self._out / RECORD_FILE
        if not os.path.lexists(file):
            check_writable_folder(self._out)
            if self._out.is_dir() and any(self._out.glob("[!.]*")):
                check_new_path(self._out)
            return new
        expected = "the search of this recipe"
        try:
            record = SearchRecord.model_validate_json(read_bytes(file, expected=expected))
        except ValidationError as error:
            problem = f"not a record of a search: {error.errors()[0]['msg']}"
        else:
            names = {"recipe", "data", "space"}
            if record.model_dump(include=names) == new.model_dump(include=names):
                return record
            problem = "a search with other settings, ranges or data"
        raise UserError(
            f"contains {problem}",
            where=str(file),
            expected=expected,
            remedy="choose another folder with --out",
        )

    def _propose(self) -> Iterator[dict[str, Any]]:
        """Yield changed settings that a sampler proposes from the scores of ended trials."""
        optuna = import_optuna()
        recipe = self.record.recipe
        trials = self.record.trials
        defaults = {name: find_setting(recipe, name) for name in self._space}
        # With the same seed, all trials would have the same random settings.
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=NUM_RANDOM_TRIALS, seed=recipe["train"]["seed"] + len(trials)
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for one in trials:
            if one.state in ("complete", "pruned"):
                trial = optuna.trial.create_trial(
                    state=optuna.trial.TrialState[one.state.upper()],
                    value=one.rungs[-1].score if one.state == "complete" else None,
                    params=defaults | one.settings,
                    distributions=self._space,
                    intermediate_values={rung.rung: rung.score for rung in one.rungs},
                )
                study.add_trial(trial)
        name = "train.learning_rate.default"
        learning_rates = self._space.get(name)
        if isinstance(learning_rates, optuna.distributions.FloatDistribution):
            for factor in LEARNING_RATE_FACTORS:
                value = defaults[name] * factor
                if learning_rates.low <= value <= learning_rates.high:
                    yield {name: value}
        while True:
            proposed = study.ask(self._space).params.items()
            yield {name: value for name, value in proposed if value != defaults[name]}

    def run(self, gpus: Sequence[str | None]) -> SearchRecord:
        """Run trials until the search ends, then choose settings and evaluate the choice.

        A complete search is not continued, because its choice has been evaluated on `data.eval`.

        Args:
            gpus: Value of CUDA_VISIBLE_DEVICES of each concurrent trial; None for the current one.

        Raises:
            TrainingInterrupted: A signal arrived. The next search in the folder continues.
            UserError: The default recipe or several trials in succession failed, or the budget does
                not suffice for the default recipe.
        """
        if self.record.choice is not None:
            self._log(f"{self._out}: the search is complete; choose another --out for a new one")
            return self.record
        with ThreadPoolExecutor(len(gpus)) as pool, self._stop.install_handlers():
            for function, devices in ((self._run_trials, gpus), (self._choose, gpus[:1])):
                jobs = [pool.submit(function, gpu) for gpu in devices]
                while wait(jobs, timeout=0.5).not_done:
                    has_failed = any(job.done() and job.exception() for job in jobs)
                    self._is_stopped |= has_failed or self._stop.signal is not None
                    while self._is_stopped and self._processes:
                        self._processes.pop().send_signal(SIGTERM)
                self._save()
                for job in jobs:
                    job.result()
                if self._stop.signal is not None:
                    raise TrainingInterrupted(
                        f"stopped by {self._stop.signal.name}; repeat the command to continue"
                    )
        return self.record

    def _save(self) -> None:
        self.record.seconds = time.monotonic() - self._start_s
        content = self.record.model_dump_json(indent=1) + "\n"
        write_file(self._out / RECORD_FILE, content.encode())

    def _run_command(self, gpu: str | None, log: Path, *words: object) -> str | None:
        """Run a command of finesight, and return its error; empty without one, None if stopped."""
        report = log.with_suffix(".error")
        environment = {**os.environ, "FINESIGHT_OUTCOME": str(report)}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with log.open("ab") as file, self._lock:
            if self._is_stopped:
                return None
            # In its own session, so that it receives a signal once.
            process = subprocess.Popen(
                [sys.executable, "-m", "finesight", *map(str, words)],
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
            self._processes.append(process)
        code = process.wait()
        error: dict[str, Any] = {}
        if report.is_file():
            error = json.loads(report.read_bytes()).get("error") or {}
            report.unlink()
        if self._is_stopped:
            return None
        if code in (0, 75):
            return ""
        reported = ": ".join(error[part] for part in ("where", "what") if error.get(part))
        return reported or f"exit code {code}, often for lack of memory; its messages are in {log}"

    def _run_trials(self, gpu: str | None) -> None:
        while not self._is_stopped and (record := self._next_trial()) is not None:
            self._run_trial(gpu, record)

    def _next_trial(self) -> TrialRecord | None:
        """Return an unfinished or a new trial; None at the end of the search."""
        with self._lock:
            if self._waiting:
                return self._waiting.pop(0)
            reason = self._find_end()
            if reason:
                self.record.reasons = [reason]
                return None
            trials = self.record.trials
            known = [one.settings for one in trials]
            proposals: Iterable[dict[str, Any]] = [{}]  # the recipe itself
            if trials:
                proposals = islice(self._propose(), MAX_PROPOSALS)
            for settings in proposals:
                if settings not in known:
                    trials.append(TrialRecord(number=len(trials), settings=settings))
                    return trials[-1]
            self.record.reasons = ["all proposed settings have been tried"]
            return None

    def _find_end(self) -> str:
        """Return the reason to start no further trial; empty if there is none."""
        trials = self.record.trials
        if self._max_trials is not None and len(trials) >= self._max_trials:
            return format_count(len(trials), "trial")
        new = TrialRecord(number=len(trials), settings={})
        if trials and not self._can_afford(new, self._list_rungs(new)[0]):
            return f"the budget of {self._budget_s:.0f} s has ended"
        ranked = self._rank_complete()
        if len(ranked) < 2:
            return ""
        best, second, *_ = ranked
        later = [one for one in trials[best.number + 1 :] if one.rungs]
        if len(later) >= PATIENCE:
            (difference,) = compare_primary(
                self._metric, self._read_cases(second), [self._read_cases(best)]
            )
            if difference.verdict != "better":
                return f"no clear difference of the best two trials: {difference.describe()}"
        return ""

    def measure_recipe(self) -> tuple[float, float]:
        """Return the seconds to start and evaluate the recipe itself, and those of its steps."""
        rungs = self.record.trials[0].rungs
        start_s = max(0.0, rungs[0].seconds - rungs[0].train_s)
        train_s = rungs[-1].train_s * RUNGS[-1] / rungs[-1].rung
        return start_s, train_s

    def _list_rungs(self, record: TrialRecord) -> tuple[int, ...]:
        """Return the rungs of a trial.

        The first rung of the recipe itself shows whether it fits the budget.
        """
        if not record.number:
            return RUNGS[::2]
        if not self.record.trials[0].rungs:  # on another GPU
            return RUNGS
        start_s, train_s = self.measure_recipe()
        # If a third passes each rung, a trial starts 1 + 1/3 + 1/9 times, and trains
        # 1/9 + 2/9 * 1/3 + 6/9 * 1/9 of its steps.
        is_faster = 13 / 9 * start_s + 7 / 27 * train_s < start_s + train_s
        if is_faster or record.rungs:
            return RUNGS
        return RUNGS[-1:]

    def _can_afford(self, record: TrialRecord, rung: int) -> bool:
        """Return whether the budget suffices for a trial up to the end of a rung.

        The expected time is that of the default recipe, scaled by the last rung of the trial.
        """
        if not self.record.trials[0].rungs:
            return True
        start_s, train_s = self.measure_recipe()
        done = [0, *(one.rung for one in record.rungs)]
        expected_s = start_s + train_s * (rung - done[-1]) / RUNGS[-1]
        if record.number and record.rungs:
            usual_s = start_s + train_s * (done[-1] - done[-2]) / RUNGS[-1]
            expected_s *= record.rungs[-1].seconds / usual_s
        return time.monotonic() - self._start_s + expected_s <= self._budget_s

    def _rank_complete(self) -> list[TrialRecord]:
        return [one for one in self.record.rank_trials() if one.state == "complete"]

    def _run_trial(self, gpu: str | None, record: TrialRecord) -> None:
        """Train a trial from rung to rung until it is complete, pruned, failed or stopped."""
        last = 0
        if record.rungs:
            last = record.rungs[-1].rung
        for rung in self._list_rungs(record):
            if rung <= last:
                continue
            if not self._can_afford(record, rung):
                if record.number == 0:
                    minutes = math.ceil(sum(self.measure_recipe()) / 60)
                    raise UserError(
                        f"a budget of {self._budget_s:.0f} s, too short for the recipe itself",
                        where="--budget",
                        expected=f"several times the duration of a run of up to {minutes} minutes",
                        remedy="repeat the command with a larger --budget to continue",
                    )
                return
            start_s = time.monotonic()
            error = self._train(gpu, record, rung)
            if error is None:
                return
            with self._lock:
                if error:
                    self._fail(record, error)
                else:
                    self._score(record, rung, time.monotonic() - start_s)
                self._save()
                if record.state != "running":
                    return

    def _train(self, gpu: str | None, record: TrialRecord, rung: int) -> str | None:
        """Train a trial to a rung, and return its error like `_run_command`."""
        options = ["--resume"]
        if rung < RUNGS[-1]:
            options.append(f"--stop-after={rung / RUNGS[-1]}")
        for run in self._list_runs(record):
            recipe = run.with_suffix(".yaml")
            recipe.parent.mkdir(parents=True, exist_ok=True)
            write_file(recipe, dump_recipe(self._build_recipe(record, run)).encode())
            error = self._run_command(gpu, run.with_suffix(".log"), "train", recipe, *options)
            if error is None or error:
                return error
        return ""

    def _list_runs(self, record: TrialRecord) -> list[Path]:
        """Return the run of a trial, or those of all folds."""
        folder = self._out / "trials" / f"{record.number:03}"
        num_folds = self.record.num_folds
        if num_folds > 1:
            return [folder / f"fold-{n + 1}" for n in range(num_folds)]
        return [folder]

    def _build_recipe(self, record: TrialRecord, run: Path) -> Recipe:
        """Build the recipe of a trial, with the training and validation split of its fold."""
        fold = run.name if self.record.num_folds > 1 else "fold-1"
        folder = self._out / "data" / fold
        changes = {**record.settings}
        for index in range(len(self.record.recipe["data"]["train"])):
            changes[f"data.train.{index}.path"] = str(folder / f"train-{index}.jsonl")
            changes[f"data.train.{index}.limit"] = None
        changes |= {
            "data.eval": [{"path": str(folder / "validation.jsonl")}],
            "eval.every": 0,
            "eval.patience": None,
            "eval.limit": None,
            "train.keep_checkpoints": 1,
            "track": [],
            "output_dir": str(run),
        }
        return recipe_from_dict(self.record.recipe, changes)

    def _score(self, record: TrialRecord, rung: int, seconds: float) -> None:
        """Record the score of a trial at a rung, and whether it continues."""
        cases = self._read_cases(record)
        name, score, interval = self._summarize(cases)
        runs = [*map(RunDir, self._list_runs(record))]
        lines = chain.from_iterable(map(RunDir.iter_metrics, runs))
        reached = RungScore(
            rung=rung,
            seconds=seconds,
            train_s=sum(line.get("step_s", 0.0) for line in lines),
            score=score,
            loss=fmean(load_eval_history(run)[-1].validation_loss for run in runs),
            interval=interval,
            num_samples=len(cases),
        )
        record.rungs.append(reached)
        ranks = []
        for one in self.record.trials:
            ranks += [each.rank for each in one.rungs if each.rung == rung]
        ranks.sort(reverse=True)
        if rung == RUNGS[-1]:
            record.state = "complete"
        elif record.number and reached.rank < ranks[max(1, len(ranks) // REDUCTION_FACTOR) - 1]:
            record.state = "pruned"
        text = f"{name} {format_score(score, len(cases))}"
        if interval:
            text += f" ({format_score_interval(interval, len(cases))})"
        text += f", {record.state} at {rung}/{RUNGS[-1]} of its steps"
        self._log(f"trial {record.number}: {text}; {format_settings(record.settings)}")

    def _summarize(self, cases: list[EvalCase]) -> tuple[str, float, tuple[float, float] | None]:
        """Return the name, score and 95 % interval of the primary metric."""
        result = compute_metrics(self._metric, cases)
        name = get_primary_metric(self._metric, result.scores)
        return name, result.scores[name], result.intervals()[name]

    def _read_cases(self, record: TrialRecord) -> list[EvalCase]:
        """Read the answers of the last evaluation of a trial, of all folds."""
        cases = []
        for run in map(RunDir, self._list_runs(record)):
            step = load_eval_history(run)[-1].step
            name = f"step-{step}"
            if run.is_finished:
                name = "after"
            cases += [one.case for one in read_predictions(run.predictions_dir / f"{name}.jsonl")]
        return cases

    def _fail(self, record: TrialRecord, error: str) -> None:
        """Record a failed trial. Raises UserError if the search cannot continue."""
        record.error = error
        self._log(f"trial {record.number} failed: {error}; {format_settings(record.settings)}")
        if record.number:
            record.state = "fail"
        ended = [one.state for one in self.record.trials if one.state != "running"]
        if not record.number or ended[-MAX_FAILURES:] == ["fail"] * MAX_FAILURES:
            subject = "all trials" if record.number else "the recipe itself"
            raise UserError(
                f"{subject} failed: {error}",
                where=str(self._list_runs(record)[0]),
                expected="a recipe and ranges of settings that can be trained",
                remedy="correct the recipe or its section search, and choose another --out",
            )

    def _choose(self, gpu: str | None) -> None:
        """Evaluate the best trial that is clearly better than the recipe, else the recipe.

        The best of many equal trials has a higher score by chance. Therefore, all trials with a
        score are one family, also those that were pruned for it. The split `data.eval` of the
        recipe has no part in the choice.
        """
        record = self.record
        default = record.trials[0]
        ranked = self._rank_complete()
        best = ranked[0]
        others = [one for one in ranked if one is not default]
        answers = [*map(self._read_cases, others)]
        num_pruned = len(record.rank_trials()) - len(ranked)
        compared = compare_primary(self._metric, self._read_cases(default), answers, num_pruned)
        choice = default
        reasons = [*record.reasons]
        if best is default:
            reasons.append("no trial has a higher score than the recipe")
        for trial, difference in zip(others, compared, strict=True):
            if difference.verdict == "better":
                choice = trial
            if trial in (best, choice):
                reasons.append(f"the recipe and trial {trial.number}: {difference.describe()}")
            if choice is trial:
                break
        reasons.append(f"chosen: trial {choice.number}, {format_settings(choice.settings)}")
        test = self._out / "data" / "test.jsonl"
        if test.is_file():
            trials = [default]
            if choice is not default:
                trials.append(choice)
            results = self._test_trials(gpu, test, trials)
            if results is None:
                return
            reasons += results
        content = record.recipe | {"output_dir": str(self._out / "best")}
        best_recipe = dump_recipe(recipe_from_dict(content, choice.settings))
        write_file(self._out / BEST_FILE, best_recipe.encode())
        record.choice = choice.number
        record.reasons = reasons

    def _test_trials(
        self, gpu: str | None, test: Path, trials: Sequence[TrialRecord]
    ) -> list[str] | None:
        """Evaluate one or two trials on `data.eval`, and describe the scores; None if stopped."""
        results = []
        cases = []
        limit = []
        if self._eval_limit is not None:
            limit = [f"--limit={self._eval_limit}"]
        for one in trials:
            out = self._out / f"test-{one.number:03}.jsonl"
            if not out.exists():  # an interrupted search may have the answers already
                run = self._list_runs(one)[0]
                words = ("eval", run, f"--data={test}", f"--out={out}", "--device", "auto", *limit)
                error = self._run_command(gpu, out.with_suffix(".log"), *words)
                if error is None:
                    return None
                if error:
                    remedy = "correct the data, and repeat the command"
                    raise UserError(error, where="data.eval", remedy=remedy)
            cases.append([each.case for each in read_predictions(out)])
            name, score, _ = self._summarize(cases[-1])
            self.record.test[one.number] = score
            score_text = format_score(score, len(cases[-1]))
            results.append(f"trial {one.number} on data.eval: {name} {score_text}")
        if len(cases) == 2:
            (difference,) = compare_primary(self._metric, cases[0], cases[1:])
            results.append(f"both on data.eval: {difference.describe()}")
        return results


def compare_primary(
    metric: MetricSpec,
    before: Sequence[EvalCase],
    others: Sequence[Sequence[EvalCase]],
    num_others: int = 0,
) -> list[MetricDifference]:
    """Compare the primary metric of several sets of answers with those before, as one family.

    Args:
        others: Sets of answers to the same samples.
        num_others: Number of further trials that could have been chosen, such as pruned ones.
    """
    pairs = []
    recipe_cases: list[EvalCase] = []
    old: Estimators = {}
    for after in others:
        paired, trial_cases = pair_cases(before, after)
        # All trials have the same samples, unless one has skipped some.
        if paired != recipe_cases:
            recipe_cases = paired
            old = compute_metrics(metric, recipe_cases).estimators
        new = compute_metrics(metric, trial_cases).estimators
        scores = {name: one.score for name, one in new.items()}
        name = get_primary_metric(metric, scores)
        pairs.append(({name: old[name]}, {name: new[name]}))
    return [*chain.from_iterable(compare_family(pairs, num_others=num_others))]


def format_settings(settings: Mapping[str, Any]) -> str:
    """Format the changed settings of a trial as overrides."""
    if not settings:
        return "the recipe itself"
    texts = []
    for name, value in settings.items():
        text = f"{value:.3g}" if isinstance(value, float) else f"{value}"
        texts.append(f"{name}={text}")
    return " ".join(texts)


def write_search_page(record: SearchRecord, file: Path, language: Language | None) -> None:
    """Write the page of a search: the choice, a parallel plot of the best trials, and all trials.

    Raises UserError if the file exists, and is not the page of this search.
    """
    header, *rows = record.list_rows()
    shown = record.rank_trials()[:MAX_PLOTTED_TRIALS]
    axes: dict[str, list[Any]] = {}
    for name in record.space:
        default = find_setting(record.recipe, name)
        axes[name] = [one.settings.get(name, default) for one in shown]
    axes[record.metric] = [round(one.rungs[-1].score, 4) for one in shown]
    with use_language(language or detect_language()):
        caption = translate("settings in their order, and the score, of the best trials")
        names = [translate("trial {}", one.number) for one in shown]
        chart = build_parallel_plot(translate("Best trials"), caption, axes, names)
        page = render_page(
            "search",
            {"charts": [chart.data]},
            ["charts"],
            title=translate("Search of settings"),
            charts=[chart],
            reasons=record.reasons,
            header=header,
            rows=rows,
        )
        PageFile(file, "search", [file.parent]).write(page)
