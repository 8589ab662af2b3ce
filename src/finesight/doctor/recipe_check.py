"""Check that this machine meets the requirements of a recipe.

The checks cover extras, precision, files and disk space.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finesight.config import Recipe
from finesight.doctor import model_check
from finesight.doctor.diagnosis import (
    Diagnosis,
    format_command,
    make_error,
    make_ok,
    make_warning,
    user_error_to_diagnosis,
)
from finesight.doctor.extras_check import (
    EXTRA_DESCRIPTIONS,
    find_missing_packages,
    install_extra_command,
)
from finesight.doctor.gpu_check import MIN_BF16_CAPABILITY, TorchInfo
from finesight.doctor.machine_check import GB, WriteLocation
from finesight.doctor.package_check import InstalledPackages
from finesight.errors import UserError
from finesight.model_folder import resolve_model_path
from finesight.recipe import load_recipe
from finesight.track.backends import TRACKERS

MIN_FP8_CAPABILITY = (8, 9)
"""Minimum CUDA compute capability for FP8 matrix products."""

MIN_OUTPUT_BYTES = GB
"""Minimum free disk space of the output folder in bytes.

A run writes checkpoints, predictions and a report.
"""


@dataclass(frozen=True, slots=True)
class RecipeContext:
    """State of the machine against which a recipe is checked."""

    packages: InstalledPackages
    torch_info: TorchInfo
    output_location: WriteLocation


def load_or_diagnose(path: Path) -> Recipe | Diagnosis:
    """Load a recipe, or return a diagnosis if it is invalid."""
    try:
        return load_recipe(path)
    except UserError as error:
        return user_error_to_diagnosis(
            "recipe", error, format_command("finesight", "data", "show", str(path))
        )


def check_recipe(path: Path, recipe: Recipe, context: RecipeContext) -> list[Diagnosis]:
    """Detect problems that would stop `finesight train` on this machine.

    Args:
        path: Path of the recipe.
        recipe: Content of the recipe.
        context: State of the machine.
    """
    diagnoses = [
        *_check_extras(recipe, context.packages),
        *_check_precision(path, recipe, context.torch_info),
        *_check_output(path, context.output_location),
        *_check_data(recipe),
    ]
    folder = resolve_model_path(recipe.model)
    if folder.is_dir() and (folder / "config.json").is_file():
        diagnoses += model_check.check_model(folder, context.packages)
    if not any(diagnosis.severity == "error" for diagnosis in diagnoses):
        diagnoses.insert(0, make_ok("recipe", f"{path}: this machine meets all requirements"))
    return diagnoses


def _check_extras(recipe: Recipe, packages: InstalledPackages) -> Iterator[Diagnosis]:
    missing_by_extra = find_missing_packages(packages)
    for name, setting in _list_required_extras(recipe):
        if missing_by_extra.get(name):
            yield make_error(
                "recipe-needs-extra",
                f"{setting} requires the extra [{name}]: {EXTRA_DESCRIPTIONS[name]}",
                why=f"{', '.join(missing_by_extra[name])} is not installed, so the run cannot"
                " start",
                remedy=install_extra_command(packages, name),
            )


def _list_required_extras(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield (extra, setting) pairs for the extras that the settings of a recipe require."""
    if recipe.tune.quantize.nf4:
        yield "quant", "tune.quantize.nf4"
    if recipe.model.startswith("modelscope:"):
        yield "modelscope", "model"
    for tracker in recipe.track:
        yield TRACKERS[tracker.kind].extra, f"track={tracker.kind}"
    for file in (*recipe.data.train, *recipe.data.eval):
        if "://" in str(file.path):
            yield "objects", str(file.path)
        if str(file.path).endswith(".parquet"):
            yield "hub", str(file.path)


def _check_precision(path: Path, recipe: Recipe, torch_info: TorchInfo) -> Iterator[Diagnosis]:
    train = recipe.train
    if train.device == "cuda" and not torch_info.gpus:
        yield make_error(
            "no-cuda",
            "train.device is cuda, but torch finds no GPU",
            why="the run cannot start; `finesight doctor` without arguments shows the reason",
            remedy=format_command("finesight", "train", str(path), "train.device=auto"),
        )
    if train.device == "cpu" or not torch_info.gpus:
        return
    weakest = min(torch_info.gpus, key=lambda gpu: gpu.capability)
    capability = ".".join(map(str, weakest.capability))
    if train.precision == "bf16" and weakest.capability < MIN_BF16_CAPABILITY:
        yield make_error(
            "precision-unsupported",
            f"train.precision is bf16, but {weakest.name} ({capability}) does not support it",
            why="bf16 would be emulated and slow; it requires compute capability 8.0",
            remedy=format_command("finesight", "train", str(path), "train.precision=fp16"),
        )
    if recipe.tune.quantize.fp8 and weakest.capability < MIN_FP8_CAPABILITY:
        yield make_error(
            "precision-unsupported",
            f"tune.quantize.fp8 is set, but {weakest.name} ({capability}) does not support FP8",
            why="the run cannot start; FP8 requires compute capability 8.9",
            remedy=format_command("finesight", "train", str(path), "tune.quantize.fp8=null"),
        )


def _check_output(path: Path, location: WriteLocation) -> Iterator[Diagnosis]:
    change_output = format_command("finesight", "train", str(path), "output_dir=OTHER/DISK/run")
    if not location.is_writable:
        yield make_error(
            "not-writable",
            f"output folder {location.folder} is not writable",
            why="the run cannot start",
            remedy=change_output,
        )
    elif location.free_bytes < MIN_OUTPUT_BYTES:
        yield make_error(
            "disk-full",
            f"output folder {location.folder}: {location.free_bytes / GB:.3g} GB free",
            why="saving checkpoints may fail",
            remedy=change_output,
        )


def _check_data(recipe: Recipe) -> Iterator[Diagnosis]:
    for file in (*recipe.data.train, *recipe.data.eval):
        text = str(file.path)
        is_local_path = "://" not in text and not any(character in text for character in "*?[")
        if is_local_path and not os.path.exists(text):
            yield make_error(
                "data-missing",
                f"{text} does not exist",
                why=f"relative paths in a recipe start at the current folder, {Path.cwd()}",
                remedy=format_command("find", ".", "-name", Path(text).name),
            )
    if not recipe.data.eval:
        yield make_warning(
            "not-evaluated",
            "the recipe has no validation samples (data.eval)",
            why="the effect of training cannot be measured",
            remedy="finesight data import SOURCE OUT --train-fraction 0.9",
        )
