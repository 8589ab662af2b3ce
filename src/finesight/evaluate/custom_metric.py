"""Custom metrics: a Python function in a file, set in a recipe as `metric.py:function`.

The function receives an `EvalCase` and returns a float or a dict of floats; higher is better. The
scores of a set are their means. The first name, or the name in the variable HEADLINE of the file,
is the primary metric. The file is executed in a process of its own, without a sandbox.

A file that the user names in a recipe or an option is executed, and its SHA-256 is recorded in a
file of the user. A file in a run folder is executed only if its SHA-256 is recorded: the user
created the run, or trusted the file with `--trust-metric`.
"""

from __future__ import annotations

import hashlib
import json
import os
import runpy
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from finesight.errors import UserError
from finesight.evaluate.bootstrap import UNBOUNDED
from finesight.evaluate.eval_case import (
    EvalCase,
    MetricFn,
    MetricResult,
    MetricValues,
    mean_metrics,
)
from finesight.evaluate.python_functions import is_python_function
from finesight.evaluate.score_function import (
    EXPECTED_FUNCTION,
    AnyScoreFunction,
    ScoreFunction,
    ScoreKind,
    build_function_error,
    build_result_error,
)
from finesight.files.bounded_files import read_bytes, read_text
from finesight.files.storage import append_line, make_folder, state_folder
from finesight.settings.config import MetricSpec, Recipe
from finesight.settings.manifest import MANIFEST_FILE, RECIPE_FILE

METRIC_COPY_FILE = "metric.py"

ENVIRONMENT_COPY = "environment.py"
"""Copy of the file of an environment in a run folder."""


def parse_metric_path(metric: str) -> tuple[Path, str] | None:
    """Split `path/to/metric.py:function` into file and function; None for other metrics."""
    if is_python_function(metric):
        return None
    file, colon, function = metric.rpartition(":")
    if not colon:
        return None
    return Path(os.path.expanduser(file)), function


def is_custom_metric(metric: str) -> bool:
    """Return whether a metric is a function of the user, in a file or of the running program."""
    return is_python_function(metric) or parse_metric_path(metric) is not None


def list_functions(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Return the section, `FILE.py:FUNCTION` and name of the copy of each function of a recipe."""
    entries = []
    for number, reward in enumerate(recipe.rewards, 1):
        entries.append(("rewards", reward.name, f"reward_{number}.py"))
    sampling = recipe.needs.sampling
    if sampling is not None and sampling.episodes is not None:
        environment = sampling.episodes.environment
        entries.append((f"{sampling.section}.environment", environment, ENVIRONMENT_COPY))
    if recipe.eval:
        entries.append(("eval", recipe.eval.metric, METRIC_COPY_FILE))
    return [one for one in entries if parse_metric_path(one[1]) is not None]


def resolve_metric_path(
    metric: str, run_dir: Path, *, prefer_copy: bool = False, copy_name: str = METRIC_COPY_FILE
) -> str:
    """Return a metric or reward with its file replaced by the copy in a run folder.

    By default, the copy is used only if the file is missing. Other names are returned unchanged.
    """
    location = parse_metric_path(metric)
    copy = run_dir / copy_name
    if location is None or not copy.is_file():
        return metric
    file, function = location
    if os.path.isfile(file) and not prefer_copy:
        return metric
    return f"{copy}:{function}"


def load_custom_metric(file: Path, function: str) -> MetricFn:
    """Return a function that scores a list of cases by a custom metric.

    Each call executes the file. It raises ScoringError if the file or the custom function fails.

    Raises:
        UserError: The file does not exist.
    """
    require_metric_file(file)
    return partial(score_cases, partial(open_function, file, function, "metric"), str(file))


def open_function(
    file: Path, function: str, kind: ScoreKind, max_bytes: int | None = None
) -> ScoreFunction:
    """Return a function of a Python file, which runs in a process of its own."""
    load = partial(load_function, file, function)
    return ScoreFunction(load, str(file), function, kind, max_bytes)


def score_cases(
    open_metric: Callable[[], AnyScoreFunction], where: str, cases: Sequence[EvalCase]
) -> MetricResult:
    """Score cases by one function.

    Raises:
        ScoringError: The function fails, or its scores have different names.
    """
    per_sample: list[MetricValues] = []
    with open_metric() as score_function:
        headline = score_function.load()
        for case in cases:
            scores = score_function.score(case)
            assert scores is not None, f"a metric without a score of sample {case.id!r}"
            per_sample.append(scores)
    names = ", ".join(per_sample[0])
    for scores in per_sample:
        if scores.keys() != per_sample[0].keys():
            raise build_result_error(f"the scores {', '.join(scores)} after {names}", where)
    first = headline or next(iter(per_sample[0]))
    if first not in per_sample[0]:
        raise build_result_error(f"HEADLINE is {first!r}, the scores are {names}", where)
    ordered = [{first: scores[first]} | scores for scores in per_sample]
    return MetricResult(ordered, mean_metrics(ordered, bounds=UNBOUNDED))


def load_function(file: Path, function: str) -> tuple[Callable[[EvalCase], Any], dict[str, Any]]:
    """Execute a Python file in a worker process, and return a function and its variables.

    Raises:
        UserError: The file fails, or the function does not exist.
    """
    namespace = execute_file(file)
    found = namespace.get(function)
    if not callable(found):
        functions = [name for name, value in namespace.items() if callable(value)]
        names = sorted(name for name in functions if not name.startswith("_"))
        remedy = f"define {function}(case)"
        if names:
            remedy = f"use one of {', '.join(names)}"
        raise UserError(
            f"no function {function!r}",
            where=str(file),
            expected=EXPECTED_FUNCTION,
            remedy=remedy,
        )
    return found, namespace


def execute_file(file: Path) -> dict[str, Any]:
    """Execute a Python file in a worker process, and return its variables.

    Raises:
        UserError: The file does not exist, or fails.
    """
    require_metric_file(file)
    try:
        return runpy.run_path(str(file))
    except BaseException as error:  # The interrupt of the user does not reach this process.
        raise build_function_error(error, str(file), "during execution of the file") from error


def require_metric_file(file: Path) -> None:
    """Raise UserError if a metric file does not exist; the file is not executed."""
    if not os.path.isfile(file):
        raise UserError(
            "no such file",
            where=str(file),
            expected="a Python file with the metric function",
            remedy="correct the path, which is relative to the working directory",
        )


def trust_file() -> Path:
    """Return the path of the list of trusted metric files: SHA-256 and path on each line.

    Raises UserError without a home folder.
    """
    return state_folder() / "trusted_metrics"


def trust_metric(file: Path) -> None:
    """Record the SHA-256 of a metric file.

    If the home folder is not writable, the digest is not recorded: the caller still executes the
    file, and later commands ask again.
    """
    sha256 = _sha256(file)
    if sha256 in _read_trusted_digests():
        return
    with suppress(UserError, OSError):
        trusted = trust_file()
        make_folder(trusted.parent)
        # JSON escapes line breaks in the path, which would start another entry.
        append_line(trusted, f"{sha256}  {json.dumps(str(file.resolve()))}")


def check_metric(
    metric: MetricSpec,
    *,
    named: bool,
    trust: bool,
    alternative: str = "choose another metric or reward",
) -> None:
    """Check whether a metric may be executed, and record its digest.

    Args:
        metric: Task name, or `FILE.py:FUNCTION`.
        named: Whether the user named the file in an option or in a recipe outside of run folders.
        alternative: Remedy that executes nothing.

    Raises:
        UserError: The file is in a run folder and its content is not trusted.
    """
    metric_location = parse_metric_path(metric)
    if metric_location is None or not os.path.isfile(metric_location[0]):
        return  # a task name, or a missing file that is reported later
    file = metric_location[0]
    if trust or named:
        trust_metric(file)
    elif _sha256(file) not in _read_trusted_digests():
        raise UserError(
            "an untrusted program in a run folder",
            where=str(file),
            expected="a file that you have executed before, or --trust-metric",
            remedy="review the file, then add --trust-metric to execute it (in Python"
            f" trust_metric=True), or {alternative}",
        )


def check_recipe_metric(
    recipe: Recipe, path: Path | None, overrides: Iterable[str], *, trust: bool
) -> None:
    """Check whether a run may execute the metric and rewards of its recipe; see `check_metric`.

    Args:
        path: Recipe file; None for settings created in Python.
        overrides: Recipe overrides; `eval.metric=...` and `rewards=...` are named by the user.
    """
    overridden = {one.partition("=")[0].strip() for one in overrides}
    for section, spec, copy_name in list_functions(recipe):
        resolved = resolve_metric_path(spec, recipe.output_dir, copy_name=copy_name)
        location = parse_metric_path(resolved)
        files = []
        if path is not None:
            files.append(path)
        if location is not None:
            files.append(location[0])
        is_from_run = any(os.path.isfile(file) and in_run_folder(file) for file in files)
        is_overridden = not overridden.isdisjoint((section, f"{section}.metric"))
        named = spec == resolved and (is_overridden or not is_from_run)
        check_metric(resolved, named=named, trust=trust)


def in_run_folder(file: Path) -> bool:
    """Return True if a file is in a run folder, directly or through a link."""
    folders = (file.parent, file.resolve().parent)
    return any((f / MANIFEST_FILE).is_file() and (f / RECIPE_FILE).is_file() for f in folders)


def _sha256(file: Path) -> str:
    content = read_bytes(file, expected="a Python file with the metric function")
    return hashlib.sha256(content).hexdigest()


def _read_trusted_digests() -> set[str]:
    """Read the recorded digests; empty if other users can write the list."""
    try:
        trusted = trust_file()
        status = trusted.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            return set()
        text = read_text(trusted, expected="digests of metric files")
    except (UserError, OSError):
        return set()
    return {line.partition(" ")[0] for line in text.splitlines()}
