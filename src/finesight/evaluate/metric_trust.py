"""Trust in metric files: a run folder of somebody else does not get its `metric.py` executed.

A metric of one's own is a program. Two commands execute it, `train` and `eval`. What the user
names, by a recipe or an option, is executed and its SHA-256 recorded in a file of the user. What a
run folder brings is executed only when its SHA-256 is recorded there: the run was made by this
user, or the file was trusted by `--trust-metric`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from finesight.bounded_files import read_bytes, read_text
from finesight.config import Metric, Recipe
from finesight.errors import UserError
from finesight.evaluate import own
from finesight.manifest import MANIFEST
from finesight.run_folder import RECIPE
from finesight.storage import append_line, make_folder

OPTION = "--trust-metric"


def trust_file() -> Path:
    """Return the path of the list of trusted metric files: SHA-256 and path on each line."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(os.path.expanduser(state)) / "finesight" / "trusted_metrics"


def trust_metric(file: Path) -> None:
    """Record the SHA-256 of a metric file.

    Where the home folder cannot be written, nothing is recorded: the caller executes the file all
    the same, and later commands ask again.
    """
    sha256, trusted = _sha256(file), trust_file()
    if sha256 in _recorded(trusted):
        return
    with suppress(UserError, OSError):
        make_folder(trusted.parent)
        # As JSON: a line end in the path would begin another entry.
        append_line(trusted, f"{sha256}  {json.dumps(str(file.resolve()))}")


def check_metric(metric: Metric, *, named: bool, trust: bool) -> None:
    """Decide whether a metric may be executed; one that may is recorded.

    Args:
        metric: The name of a task, or `FILE.py:FUNCTION`.
        named: The user named the file, by an option or by a recipe that is in no run folder.
        trust: The user gave `--trust-metric`.

    Raises:
        UserError: The file comes from a run folder, and its content was never trusted.
    """
    place = own.split(metric)
    if place is None or not os.path.isfile(place[0]):
        return  # a task, or an error that names the missing file later
    file = place[0]
    if trust or named:
        trust_metric(file)
    elif _sha256(file) not in _recorded(trust_file()):
        raise UserError(
            "is a program that a run folder brings, and you have not trusted it",
            where=str(file),
            expected=f"a metric file that you have run before, or {OPTION}",
            remedy=f"read the file, then add {OPTION} to execute it (from Python"
            " trust_metric=True), or choose another metric",
        )


def check_recipe_metric(
    recipe: Recipe, path: Path | None, overrides: Iterable[str], *, trust: bool
) -> None:
    """Decide whether a training run may execute the metric of its recipe, as `check_metric` does.

    Args:
        recipe: The settings.
        path: The file that they were read from; None for settings made by a program.
        overrides: Overrides of the recipe, `eval.metric=...` among them names the metric.
        trust: The user gave `--trust-metric`.
    """
    if recipe.eval is None:
        return
    metric = own.found(recipe.eval.metric, recipe.output)
    typed = any(one.partition("=")[0].strip() in ("eval", "eval.metric") for one in overrides)
    place = own.split(metric)
    files = [file for file in (path, place and place[0]) if file is not None]
    brought = any(os.path.isfile(file) and in_run_folder(file) for file in files)
    named = metric == recipe.eval.metric and (typed or not brought)
    check_metric(metric, named=named, trust=trust)


def in_run_folder(file: Path) -> bool:
    """Return True for a file in the folder of a run, directly or by a link."""
    folders = (file.parent, file.resolve().parent)
    return any((f / MANIFEST).is_file() and (f / RECIPE).is_file() for f in folders)


def _sha256(file: Path) -> str:
    content = read_bytes(file, expected="a Python file with the function of your metric")
    return hashlib.sha256(content).hexdigest()


def _recorded(trusted: Path) -> set[str]:
    """Read the digests in the user's list; none of a list that others could have written."""
    try:
        status = trusted.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            return set()
        text = read_text(trusted, expected="digests of metric files")
    except (UserError, OSError):
        return set()
    return {line.partition(" ")[0] for line in text.splitlines()}
