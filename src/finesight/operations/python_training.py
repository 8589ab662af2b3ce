"""Training with samples, metrics, rewards and callbacks of a Python program.

The samples are written to the folder of the run, and the operation `train` reads them there. So the
run equals one that was started with these files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from finesight.errors import Step, TrainingInterrupted, UserError, console_format
from finesight.files.storage import is_written_folder, remove_folder, write_folder
from finesight.operations.operation import StrPath, format_call

if TYPE_CHECKING:
    from finesight.evaluate.python_functions import PythonFunction
    from finesight.samples.memory_samples import AnySample
    from finesight.train.callbacks import Callback
    from finesight.train.finalize import RunResult
    from finesight.train.run_dir import RunDir

    Splits: TypeAlias = Mapping[str, Sequence[AnySample]]
    Reward: TypeAlias = str | PythonFunction | Mapping[str, Any]

SPLIT_FILES = {"train": "train.jsonl", "eval": "eval.jsonl"}
"""Files of the samples and validation samples in the folder `samples` of a run."""

ARGUMENTS = {"train": "samples", "eval": "val_samples"}
"""Argument of each file."""


def train(
    model: StrPath,
    samples: Sequence[AnySample] | None = None,
    *,
    output_dir: StrPath,
    val_samples: Sequence[AnySample] | None = None,
    metric: str | PythonFunction | None = None,
    rewards: Reward | Sequence[Reward] = (),
    callbacks: Callback | Sequence[Callback] = (),
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
            dictionaries of `name` and `weight`. They need an objective that samples responses.
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
    from finesight.evaluate.python_functions import read_function, use_functions
    from finesight.operations.training import train as train_recipe
    from finesight.settings.recipe import recipe_from_dict
    from finesight.train.callbacks import check_callbacks
    from finesight.train.run_dir import RunDir

    functions: dict[str, PythonFunction] = {}
    both_splits = {"train": samples, "eval": val_samples}
    with translate_remedies():
        recipe = build_settings(settings)
        recipe["model"] = read_path(model, "model", "the name or folder of a model")
        # The result stands for the run in any working directory.
        folder = os.path.expanduser(read_path(output_dir, "output_dir", "a folder"))
        recipe["output_dir"] = os.path.abspath(folder)
        if not isinstance(resume, bool):
            raise _build_type_error(resume, "resume", "True or False")
        if metric is not None:
            metric_settings = {"metric": read_function(metric, "metric", functions)}
            recipe["eval"] = _join("eval", recipe.get("eval"), metric_settings)
        reward_list = _as_list(rewards)
        if reward_list:
            recipe["rewards"] = [_build_reward(reward, functions) for reward in reward_list]
        callback_list = _as_list(callbacks)
        world_size = read_world_size()
        check_callbacks(callback_list, world_size)
        _check_single_process([*functions], world_size)
        splits = {name: split for name, split in both_splits.items() if split is not None}
        _check_data(recipe, splits)
        run_dir = RunDir(Path(recipe["output_dir"]))
        files = {name: str(run_dir.samples_dir / SPLIT_FILES[name]) for name in splits}
        if files:
            recipe["data"] = {**(recipe.get("data") or {}), **files}
        # Nothing is written for invalid settings.
        recipe_from_dict(recipe)
        with use_functions(functions), _provide_samples(run_dir, splits, resume=resume):
            return train_recipe(recipe, resume=resume, callbacks=callback_list).value


def build_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of a recipe, in which `train` has the settings without a section."""
    from finesight.settings.config import Recipe

    recipe: dict[str, Any] = {}
    train_settings: dict[str, Any] = {}
    for name in ("train", "eval", "data"):
        if not isinstance(settings.get(name) or {}, Mapping):
            raise _build_type_error(settings[name], name, "a dictionary of settings")
    if callable((settings.get("eval") or {}).get("metric")):
        raise UserError(
            'eval={"metric": ...} is a function',
            where="train",
            expected="a name in eval, or the argument metric",
            remedy="pass metric=function",
        )
    for name, value in settings.items():
        if name in Recipe.model_fields:
            recipe[name] = value
        else:
            train_settings[name] = value
    if train_settings:
        recipe["train"] = _join("train", recipe.get("train"), train_settings)
    return recipe


def _join(section: str, given: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Join the dictionary of a section with arguments, which set other settings."""
    given = given or {}
    for name in arguments:
        if name in given:
            raise UserError(
                f'both {name} and {section}={{"{name}": ...}}',
                where="train",
                expected="one value of the setting",
                remedy=f'remove {name}, or "{name}" from {section}={{"{name}": ...}}',
            )
    return {**given, **arguments}


def _as_list(value: Any) -> list[Any]:
    """Return a list of functions, names or dictionaries. One of them is a list of one."""
    if value is None:
        return []
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [*value]
    return [value]


def read_path(value: object, where: str, expected: str) -> str:
    """Return a name or path as text. A result stands for its run."""
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    raise _build_type_error(value, where, expected)


def _build_type_error(value: object, where: str, expected: str) -> UserError:
    return UserError(
        f"a {type(value).__name__} ({value!r:.60})",
        where=where,
        expected=expected,
        remedy=_REMEDIES[where],
    )


_REMEDIES = {
    "model": 'pass a name or a path, such as "finesight-tiny", result.run_dir or model.name',
    "output_dir": 'output_dir="runs/first"',
    "resume": "resume=True",
    "train": 'train={"epochs": 3}, or epochs=3',
    "eval": 'eval={"every": 100}',
    "data": 'data={"train": "train.jsonl"}',
}


def _build_reward(reward: Reward, functions: dict[str, PythonFunction]) -> str | Mapping[str, Any]:
    """Return an item of `rewards` in a recipe."""
    from finesight.evaluate.python_functions import read_function

    if not isinstance(reward, Mapping):
        return read_function(reward, "rewards", functions)
    return {**reward, "name": read_function(reward.get("name", ""), "rewards", functions)}


def read_world_size() -> int:
    """Return the number of processes. The training reports an invalid variable."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdecimal() else 1


def _check_single_process(functions: Sequence[str], world_size: int) -> None:
    """Verify that one process trains if it calls functions of the program."""
    from finesight.settings.config import PYTHON_PREFIX

    if world_size == 1 or not functions:
        return
    name = functions[0].removeprefix(PYTHON_PREFIX)
    raise UserError(
        f"the function {name} in a training with {world_size} processes",
        where="train",
        expected="metrics and rewards in files",
        remedy=f'write it to a file, and pass metric="metric.py:{name}" or'
        f' rewards=["rewards.py:{name}"]',
    )


def _check_data(recipe: Mapping[str, Any], splits: Splits) -> None:
    """Verify that each split is given once. A metric requires validation samples."""
    names = recipe.get("data") or {}
    for name, argument in ARGUMENTS.items():
        if name in names and name in splits:
            raise UserError(
                f'both {argument} and data={{"{name}": ...}}',
                where="train",
                expected="samples of this program, or files",
                remedy=f'remove {argument}, or "{name}" from data={{"{name}": ...}}',
            )
    if "train" not in names and "train" not in splits:
        raise UserError(
            "neither samples nor data",
            where="train",
            expected="samples of this program, or files",
            remedy='samples=[finesight.Sample(...)], or data={"train": "train.jsonl"}',
        )
    has_metric = "metric" in (recipe.get("eval") or {})
    if not names and "eval" not in splits and has_metric:
        raise UserError(
            "a metric without validation samples",
            where="metric",
            expected="samples that the training does not use",
            remedy="val_samples=samples[:20], samples=samples[20:]",
        )


@contextmanager
def _provide_samples(run_dir: RunDir, splits: Splits, *, resume: bool) -> Iterator[None]:
    """Write the samples to the folder of the run.

    Those of a run to resume, or of a process that was killed before the run started, are compared
    instead. The run is locked within the context. Samples of a run that did not start are removed.

    Raises:
        UserError: A sample is invalid, the run has other samples, or the folder is in use.
    """
    # The other processes of a training start to read when all of them have come so far.
    is_main = os.environ.get("RANK", "0") == "0"
    if not splits or not is_main:
        yield
        return
    _check_available(run_dir, resume=resume)
    is_new_folder = not run_dir.path.exists()
    with run_dir.lock(is_lent=True):
        # Another process may have started meanwhile.
        _check_available(run_dir, resume=resume)
        if run_dir.is_started or run_dir.samples_dir.exists():
            _compare_samples(run_dir, splits)
            yield
            return
        try:
            write_samples(run_dir, splits)
            yield
        except BaseException:
            # An error of the clean-up would replace that of the samples or the training.
            with suppress(OSError, UserError):
                if not run_dir.is_started and is_written_folder(run_dir.samples_dir):
                    remove_folder(run_dir.samples_dir)
                if is_new_folder:
                    run_dir.path.rmdir()  # It fails if there are other files.
            raise


def _check_available(run_dir: RunDir, *, resume: bool) -> None:
    try:
        run_dir.check_available(resume)
    except UserError as error:
        if run_dir.is_started:
            error.remedy = f"set another folder: output_dir={str(run_dir.next_path)!r}"
            if not run_dir.is_finished:
                error.remedy = f"add resume=True to continue it, or {error.remedy}"
        raise


def write_samples(run_dir: RunDir, splits: Splits) -> None:
    """Write samples and images to the folder of the run."""
    from finesight.samples.memory_samples import (
        ImageStore,
        check_samples,
        convert_samples,
        write_sample_file,
    )

    for name, split in splits.items():
        check_samples(split, ARGUMENTS[name])
    with write_folder(run_dir.samples_dir) as folder:
        store = ImageStore(folder)
        for name, split in splits.items():
            converted = convert_samples(split, store, ARGUMENTS[name])
            write_sample_file(converted, folder / SPLIT_FILES[name])


def _compare_samples(run_dir: RunDir, splits: Splits) -> None:
    """Verify that samples are those of a run."""
    from finesight.samples.memory_samples import ImageStore, convert_samples, find_changed_sample

    store = ImageStore(run_dir.samples_dir, is_read_only=True)
    for name, split in splits.items():
        converted = convert_samples(split, store, ARGUMENTS[name])
        change = find_changed_sample(converted, run_dir.samples_dir / SPLIT_FILES[name])
        if change:
            raise UserError(
                f"not the samples of the run: {change}",
                where=ARGUMENTS[name],
                expected="the same samples in the same order, to resume the run",
                remedy="to train with these samples, set another folder:"
                f" output_dir={str(run_dir.next_path)!r}",
            )


@contextmanager
def translate_remedies() -> Iterator[None]:
    """Convert steps and settings in messages to calls and arguments.

    Of the settings, only those at the start of the location or expected value are converted.
    """
    token = console_format.set(_format_call)
    try:
        yield
    except TrainingInterrupted as error:
        text = str(error).replace("repeat the command with --resume", "repeat with resume=True")
        raise type(error)(text) from error
    except UserError as error:
        error.where = _translate_start(error.where)
        error.expected = _translate_start(error.expected)
        if isinstance(error.remedy, Step):
            error.remedy = error.remedy.format(_format_call)
        raise
    finally:
        console_format.reset(token)


def _translate_start(text: str) -> str:
    """Convert the name of a setting at the start of a text to that of an argument."""
    from finesight.settings.recipe import list_setting_names

    match = re.match(r"(?:train\.|eval\.(?=metric))([a-z_]+)(?![\w/-])", text)
    if match is None:
        return text
    # Some settings, such as the learning rate, have further ones below them.
    if not any(f"{name}.".startswith(f"{match[0]}.") for name in list_setting_names()):
        return text
    return match[1] + text[match.end() :]


def _parse_value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _format_arguments(settings: Mapping[str, Any]) -> str:
    """Format settings of a recipe as arguments of `train`."""
    arguments = {name: value for name, value in settings.items() if name != "train"}
    arguments |= settings.get("train", {})
    metric = arguments.get("eval", {}).pop("metric", None)
    if metric is not None:
        arguments["metric"] = metric
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items() if value != {})


def _format_call(step: Step) -> str:
    """Format the call of a step. One that trains has its settings as arguments."""
    if step.operation != "train":
        return format_call(step)
    settings: dict[str, Any] = {"output_dir": str(step.arguments["recipe"])}
    overrides = step.arguments.get("overrides") or ()
    assert isinstance(overrides, Sequence), "overrides of a step are texts"
    for override in overrides:
        key, _, value = override.partition("=")
        section, _, name = key.partition(".")
        if name:
            settings.setdefault(section, {})[name] = _parse_value(value)
        else:
            settings[section] = _parse_value(value)
    if step.arguments.get("resume"):
        settings["resume"] = True
    return f"finesight.train(..., {_format_arguments(settings)})"
