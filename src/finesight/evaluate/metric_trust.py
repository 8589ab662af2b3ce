"""Trust in metric files: `metric.py` of an untrusted run folder is not executed.

A custom metric is a program, which the commands `train` and `eval` execute. A file that the user
names in a recipe or an option is executed, and its SHA-256 is recorded in a file of the user. A
file in a run folder is executed only if its SHA-256 is recorded: the user created the run, or
trusted the file with `--trust-metric`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from finesight.bounded_files import read_bytes, read_text
from finesight.config import MetricSpec, Recipe
from finesight.errors import UserError
from finesight.evaluate import custom_metric
from finesight.manifest import MANIFEST_FILE
from finesight.run_files import RECIPE_FILE
from finesight.storage import append_line, make_folder

OPTION = "--trust-metric"


def trust_file() -> Path:
    """Return the path of the list of trusted metric files: SHA-256 and path on each line."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(os.path.expanduser(state)) / "finesight" / "trusted_metrics"


def trust_metric(file: Path) -> None:
    """Record the SHA-256 of a metric file.

    If the home folder is not writable, the digest is not recorded: the caller still executes the
    file, and later commands ask again.
    """
    sha256, trusted = _sha256(file), trust_file()
    if sha256 in _read_trusted_digests(trusted):
        return
    with suppress(UserError, OSError):
        make_folder(trusted.parent)
        # JSON escapes line breaks in the path, which would start another entry.
        append_line(trusted, f"{sha256}  {json.dumps(str(file.resolve()))}")


def check_metric(metric: MetricSpec, *, named: bool, trust: bool) -> None:
    """Check whether a metric may be executed, and record its digest.

    Args:
        metric: Task name, or `FILE.py:FUNCTION`.
        named: Whether the user named the file in an option or in a recipe outside of run folders.
        trust: Whether the user passed `--trust-metric`.

    Raises:
        UserError: The file is in a run folder and its content is not trusted.
    """
    metric_location = custom_metric.parse_metric_path(metric)
    if metric_location is None or not os.path.isfile(metric_location[0]):
        return  # a task name, or a missing file that is reported later
    file = metric_location[0]
    if trust or named:
        trust_metric(file)
    elif _sha256(file) not in _read_trusted_digests(trust_file()):
        raise UserError(
            "an untrusted program in a run folder",
            where=str(file),
            expected=f"a metric file that you have executed before, or {OPTION}",
            remedy=f"review the file, then add {OPTION} to execute it (in Python"
            " trust_metric=True), or choose another metric",
        )


def check_recipe_metric(
    recipe: Recipe, path: Path | None, overrides: Iterable[str], *, trust: bool
) -> None:
    """Check whether a training run may execute the metric of its recipe; see `check_metric`.

    Args:
        recipe: Recipe of the run.
        path: Recipe file; None for settings created in Python.
        overrides: Recipe overrides; `eval.metric=...` counts as named by the user.
        trust: Whether the user passed `--trust-metric`.
    """
    if recipe.eval is None:
        return
    metric = custom_metric.resolve_metric_path(recipe.eval.metric, recipe.output_dir)
    is_overridden = any(
        one.partition("=")[0].strip() in ("eval", "eval.metric") for one in overrides
    )
    metric_location = custom_metric.parse_metric_path(metric)
    files = [file for file in (path, metric_location and metric_location[0]) if file is not None]
    is_from_run = any(os.path.isfile(file) and in_run_folder(file) for file in files)
    named = metric == recipe.eval.metric and (is_overridden or not is_from_run)
    check_metric(metric, named=named, trust=trust)


def in_run_folder(file: Path) -> bool:
    """Return True if a file is in a run folder, directly or through a link."""
    folders = (file.parent, file.resolve().parent)
    return any((f / MANIFEST_FILE).is_file() and (f / RECIPE_FILE).is_file() for f in folders)


def _sha256(file: Path) -> str:
    content = read_bytes(file, expected="a Python file with the metric function")
    return hashlib.sha256(content).hexdigest()


def _read_trusted_digests(trusted: Path) -> set[str]:
    """Read the recorded digests; empty if other users can write the list."""
    try:
        status = trusted.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            return set()
        text = read_text(trusted, expected="digests of metric files")
    except (UserError, OSError):
        return set()
    return {line.partition(" ")[0] for line in text.splitlines()}
