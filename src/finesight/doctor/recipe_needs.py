"""A recipe against this machine: extras, precision, the model's folder, room for what it writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finesight.config import Recipe
from finesight.doctor import model_folder
from finesight.doctor.extras import GIVES, install_extra, missing
from finesight.doctor.findings import Finding, fault, fine, hint, told, typed
from finesight.doctor.graphics import BF16, Torch
from finesight.doctor.machine import GB, Place
from finesight.doctor.packages import Packages
from finesight.errors import UserError
from finesight.hub import named
from finesight.recipe import load_recipe
from finesight.track.kinds import EXTRAS

FP8 = (8, 9)
"""Compute capability from which a card multiplies FP8."""

LEAST = GB
"""Free bytes where a run is written: its checkpoints, answers and report."""


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What a recipe is held against: installed packages, what torch says, and where it writes."""

    packages: Packages
    torch: Torch
    output: Place


def read(path: Path) -> Recipe | Finding:
    """The recipe, or what is wrong with it."""
    try:
        return load_recipe(path)
    except UserError as error:
        return told("recipe", error, typed("finesight", "data", "show", str(path)))


def judge(path: Path, recipe: Recipe, around: Circumstances) -> list[Finding]:
    """Everything that would stop `finesight train` on this machine, as far as it shows before."""
    found = [
        *_extras(recipe, around.packages),
        *_precision(path, recipe, around.torch),
        *_room(path, around.output),
        *_data(recipe),
    ]
    folder = named(recipe.model)
    if folder.is_dir() and (folder / "config.json").is_file():
        found += model_folder.judge(folder, around.packages)
    if not any(one.severity == "fault" for one in found):
        found.insert(0, fine("recipe", f"{path}: nothing on this machine stands against it"))
    return found


def _extras(recipe: Recipe, packages: Packages) -> Iterator[Finding]:
    lacking = missing(packages)
    for name, setting in _wanted(recipe):
        if lacking.get(name):
            yield fault(
                "recipe-needs-extra",
                f"{setting} needs the extra [{name}]: {GIVES[name]}",
                why=f"{', '.join(lacking[name])} is not installed, and the run would be refused",
                remedy=install_extra(packages, name),
            )


def _wanted(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Extras that settings ask for, and which setting it is."""
    if recipe.tune.nf4:
        yield "quant", "tune.nf4"
    for tracker in recipe.track:
        yield EXTRAS[tracker.kind], f"track={tracker.kind}"
    for file in (*recipe.data.train, *recipe.data.eval):
        if "://" in str(file.path):
            yield "objects", str(file.path)
        if str(file.path).endswith(".parquet"):
            yield "hub", str(file.path)


def _precision(path: Path, recipe: Recipe, torch: Torch) -> Iterator[Finding]:
    train = recipe.train
    if train.device == "cuda" and not torch.cards:
        yield fault(
            "no-cuda",
            "train.device is cuda, and torch sees no card",
            why="the run would be refused; `finesight doctor` alone says why there is none",
            remedy=typed("finesight", "train", str(path), "train.device=auto"),
        )
    if train.device == "cpu" or not torch.cards:
        return
    worst = min(torch.cards, key=lambda card: card.capability)
    able = ".".join(map(str, worst.capability))
    if train.precision == "bf16" and worst.capability < BF16:
        yield fault(
            "precision-unsupported",
            f"train.precision is bf16, and {worst.name} ({able}) does not multiply it",
            why="it would be imitated, many times more slowly; 8.0 or newer does",
            remedy=typed("finesight", "train", str(path), "train.precision=fp16"),
        )
    if recipe.tune.fp8 and worst.capability < FP8:
        yield fault(
            "precision-unsupported",
            f"tune.fp8 is set, and {worst.name} ({able}) does not multiply FP8",
            why="the run would be refused; 8.9 or newer does",
            remedy=typed("finesight", "train", str(path), "tune.fp8=null"),
        )


def _room(path: Path, place: Place) -> Iterator[Finding]:
    elsewhere = typed("finesight", "train", str(path), "output=OTHER/DISK/run")
    if not place.writable:
        yield fault(
            "not-writable",
            f"output {place.folder} cannot be written to",
            why="the run would be refused",
            remedy=elsewhere,
        )
    elif place.free < LEAST:
        yield fault(
            "disk-full",
            f"output {place.folder}: {place.free / GB:.3g} GB free",
            why="checkpoints would soon be refused",
            remedy=elsewhere,
        )


def _data(recipe: Recipe) -> Iterator[Finding]:
    for file in (*recipe.data.train, *recipe.data.eval):
        text = str(file.path)
        plain = "://" not in text and not any(mark in text for mark in "*?[")
        if plain and not os.path.exists(text):
            yield fault(
                "data-missing",
                f"there is no {text}",
                why=f"paths in a recipe count from where a command runs, {Path.cwd()}",
                remedy=typed("find", ".", "-name", Path(text).name),
            )
    if not recipe.data.eval:
        yield hint(
            "not-measured",
            "the recipe holds nothing out (data.eval)",
            why="whether the model got better will not be known",
            remedy="finesight data import SOURCE OUT --split 0.9",
        )
