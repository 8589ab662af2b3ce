"""Training with samples, metrics, rewards and callbacks of a Python program.

The samples are written to the folder of the run, and the operation `train` reads them there. So the
run equals one that was started with these files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from finesight.errors import Step, UserError
from finesight.operations.operation import StrPath, format_call, to_name

if TYPE_CHECKING:
    from finesight.data.memory_samples import AnySample
    from finesight.evaluate.python_functions import PythonFunction
    from finesight.train.callbacks import Callback
    from finesight.train.finalize import RunResult

    Reward: TypeAlias = str | PythonFunction | Mapping[str, Any]

SPLIT_FILES = {"train": "train.jsonl", "eval": "eval.jsonl"}
"""Files of the samples and validation samples in the folder `samples` of a run."""

ARGUMENTS = {"train": "samples", "eval": "val_samples"}


def train(
    model: StrPath,
    samples: Sequence[AnySample] | None = None,
    *,
    output_dir: StrPath,
    val_samples: Sequence[AnySample] | None = None,
    metric: str | PythonFunction | None = None,
    rewards: Sequence[Reward] = (),
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    **settings: Any,
) -> RunResult:
    """Fine-tune a model with samples of this program, and evaluate it before and after training.

    Other arguments are settings of a recipe: those of its section `train` by name, such as
    `epochs=3`, and other sections as dictionaries, such as `tune={"language": "lora"}`. Without
    `samples`, `data` names files.

    Args:
        model: Name or folder of the model, as in a recipe.
        samples: Samples to train on.
        output_dir: Folder of the run. It also gets the samples with their images.
        val_samples: Samples of the evaluations.
        metric: Name of a metric, or a function of an `EvalCase` that returns a number, or several
            by name. Higher is better.
        rewards: Names of rewards, functions of an `EvalCase` that return a number or None, or
            dictionaries of `name` and `weight`. They need an objective such as `grpo`.
        callbacks: Functions of a step and its metrics, or of a step and the scores of an
            evaluation. They may raise `StopTraining`.
        resume: Continue the run in `output_dir` from its newest checkpoint, or start it if there
            is none.

    Returns:
        Result of the run, which is complete.

    Raises:
        UserError: An argument is invalid, or the samples are not those of the run to resume.
        TrainingInterrupted: The run was interrupted and has saved a checkpoint.
    """
    from finesight.evaluate.python_functions import use_functions
    from finesight.operations.training import train as train_recipe

    functions: dict[str, PythonFunction] = {}
    with _translate_remedies():
        recipe = _build_settings(settings)
        recipe |= {"model": to_name(model, "model"), "output_dir": to_name(output_dir)}
        if metric is not None:
            eval_settings = recipe.get("eval") or {}
            recipe["eval"] = {**eval_settings, "metric": _name_function(metric, functions)}
        if rewards:
            recipe["rewards"] = [_build_reward(reward, functions) for reward in rewards]
        _check_single_process([*functions.values(), *callbacks])
        splits = {"train": samples, "eval": val_samples}
        _check_data(recipe, splits)
        _write_splits(recipe, splits, resume=resume)
        with use_functions(functions):
            return train_recipe(recipe, resume=resume, callbacks=callbacks).value


def _build_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of a recipe, in which `train` has the settings without a section."""
    from finesight.config import Recipe

    recipe: dict[str, Any] = {}
    train_settings: dict[str, Any] = {}
    for name, value in settings.items():
        if name in Recipe.model_fields:
            recipe[name] = value
        else:
            train_settings[name] = value
    if train_settings:
        recipe["train"] = {**recipe.get("train", {}), **train_settings}
    return recipe


def _name_function(metric: str | PythonFunction, functions: dict[str, PythonFunction]) -> str:
    from finesight.evaluate.python_functions import name_function

    if callable(metric):
        return name_function(metric, functions)
    return to_name(metric, "metric")


def _build_reward(reward: Reward, functions: dict[str, PythonFunction]) -> str | Mapping[str, Any]:
    """Return an item of `rewards` in a recipe."""
    if not isinstance(reward, Mapping):
        return _name_function(reward, functions)
    return {**reward, "name": _name_function(reward.get("name", ""), functions)}


def _check_single_process(functions: Sequence[Callable[..., Any]]) -> None:
    """Verify that one process trains if it calls functions of the program."""
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes == 1 or not functions:
        return
    name = getattr(functions[0], "__name__", type(functions[0]).__name__)
    raise UserError(
        f"the function {name} in a training with {num_processes} processes",
        where="train",
        expected="metrics and rewards in files, and no callbacks",
        remedy=f'write it to a file, and pass metric="metric.py:{name}" or'
        f' rewards=["rewards.py:{name}"]; instead of callbacks, use track or eval',
    )


def _check_data(
    recipe: Mapping[str, Any], splits: Mapping[str, Sequence[AnySample] | None]
) -> None:
    """Verify that the data are given once, and those of a metric at all."""
    data = recipe.get("data")
    if (data is None) == (splits["train"] is None):
        raise UserError(
            "neither samples nor data" if data is None else "both samples and data",
            where="train",
            expected="samples of this program, or files",
            remedy='samples=[finesight.Sample(...)], or data={"train": "train.jsonl"}',
        )
    has_metric = "metric" in (recipe.get("eval") or {})
    if data is None and splits["eval"] is None and has_metric:
        raise UserError(
            "a metric without validation samples",
            where="metric",
            expected="samples that the training does not use",
            remedy="val_samples=samples[:20], samples=samples[20:]",
        )


def _write_splits(
    recipe: dict[str, Any],
    splits: Mapping[str, Sequence[AnySample] | None],
    *,
    resume: bool,
) -> None:
    """Write the samples to the folder of the run, or compare those of a run to resume.

    Raises:
        UserError: A sample is invalid, the run has other samples, or the folder is in use.
    """
    from finesight.data.memory_samples import (
        ImageStore,
        convert_samples,
        find_changed_sample,
        write_sample_file,
    )
    from finesight.manifest import SAMPLES_FOLDER
    from finesight.train.run_dir import RunDir

    given = {name: split for name, split in splits.items() if split is not None}
    if not given:
        return
    run_dir = RunDir(Path(os.path.expanduser(recipe["output_dir"])))
    run_dir.check_available(resume)
    folder = run_dir.path / SAMPLES_FOLDER
    # The other processes of a training start to read when all of them have come so far.
    is_main = os.environ.get("RANK", "0") == "0"
    store = ImageStore(folder, is_read_only=run_dir.is_started or not is_main)
    data: dict[str, str] = {}
    for name, split in given.items():
        file = folder / SPLIT_FILES[name]
        data[name] = str(file)
        converted = convert_samples(split, store, ARGUMENTS[name])
        if not store.is_read_only:
            write_sample_file(converted, file)
        elif run_dir.is_started and (change := find_changed_sample(converted, file)):
            raise UserError(
                f"not the samples of the run: {change}",
                where=ARGUMENTS[name],
                expected="the same samples in the same order, to resume the run",
                remedy=f"to train with these samples, set another folder:"
                f" output_dir={run_dir.next_path}",
            )
    recipe["data"] = data


_SETTING_PATTERN = re.compile(
    r"(?<![\w./-])(?P<section>train|tune|eval|image|data)\."
    r"(?!(?:jsonl?|parquet|tar|[ct]sv|py|ya?ml)\b)"  # the name of a file
    r"(?P<name>[a-z_]+)(?:=(?P<value>[^\s,;:?)]+))?"
)
_OPTION_PATTERN = re.compile(r"\boutput_dir=(?P<path>[^\s,;:\"]+)")


@contextmanager
def _translate_remedies() -> Iterator[None]:
    """Convert settings and options in errors to the arguments of `train`."""
    try:
        yield
    except UserError as error:
        if isinstance(error.remedy, Step):
            error.remedy = error.remedy.format(format_call)
        remedy = re.sub(r"did you mean ([\w.]+): ([\w.-]+)\?", r"use \1=\2", str(error.remedy))
        error.remedy = _write_arguments(remedy)
        error.where = _write_arguments(error.where)
        error.what = _write_arguments(error.what)
        raise


def _write_arguments(text: str) -> str:
    text = text.replace("--resume (in Python, resume=True)", "resume=True")
    text = text.replace("--resume", "resume=True")
    text = _SETTING_PATTERN.sub(_write_setting, text)
    return _OPTION_PATTERN.sub(lambda match: f"output_dir={match['path']!r}", text)


def _write_setting(match: re.Match[str]) -> str:
    section = match["section"]
    name = match["name"]
    is_argument = section == "train" or name == "metric"
    if match["value"] is None:
        return name if is_argument else match[0]
    try:
        value = json.loads(match["value"])
    except ValueError:
        value = match["value"]
    if is_argument:
        return f"{name}={value!r}"
    return f"{section}={ {name: value}!r}"
