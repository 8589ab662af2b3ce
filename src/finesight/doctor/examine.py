"""What is looked at, and in which order: a machine, or a run, a recipe or a model by its path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from finesight.doctor import (
    environment,
    extras,
    graphics,
    hubs,
    machine,
    model_folder,
    packages,
    recipe_needs,
    run_answers,
    run_course,
    run_end,
    smoke,
)
from finesight.doctor.findings import Finding, Section
from finesight.errors import UserError
from finesight.hub import named
from finesight.manifest import MANIFEST
from finesight.report.record import read_record


def examine_machine(
    around: Mapping[str, str], *, hub: hubs.Hub | None = None, try_out: bool = True
) -> list[Section]:
    """This machine and what is installed on it. `hub` is asked whether it answers; nothing else
    leaves the machine. `try_out` goes the whole path with the small model on every device."""
    installed = packages.gather()
    torch = graphics.ask_torch()
    cards = graphics.judge(graphics.gather(around), torch, installed, around)
    sections = [
        _section("machine", machine.judge(machine.gather(around, Path.cwd()))),
        _section("packages", packages.judge(installed)),
        _section("torch and cards", cards),
        _section("environment", environment.judge(around, installed)),
    ]
    if hub is not None:
        sections.append(_section(f"hub {hub}", hubs.judge(hubs.ask(hub, around))))
    if try_out and not torch.problem:
        sections.append(_section("trial", smoke.judge(smoke.gather(torch))))
    return [*sections, _section("extras", extras.judge(installed))]


def examine(subject: str) -> list[Section]:
    """A run, a recipe, an adapter's or a model's folder. Raises UserError for anything else."""
    path = named(subject)
    if path.is_file() and path.suffix.lower() in (".yaml", ".yml"):
        return examine_recipe(path)
    if (path / MANIFEST).is_file() and not (path / "config.json").is_file():
        return examine_run(path)
    if path.is_dir():
        if (path / model_folder.ADAPTER_CONFIG).is_file():
            return [_section("adapter", model_folder.judge_adapter(path))]
        return [_section("model", model_folder.judge(path, packages.gather()))]
    raise UserError(
        f"there is no folder and no recipe {subject!r}",
        where="finesight doctor",
        expected="a run, a recipe, an adapter's or a model's folder; nothing, for this machine",
        remedy="correct the path; a hub's model has to be downloaded first (finesight download)",
    )


def examine_run(folder: Path) -> list[Section]:
    """A run by its own records: nothing is loaded or computed."""
    record = read_record(folder)
    return [
        _section("end", run_end.judge(record)),
        _section("course", run_course.judge(record)),
        _section("answers", run_answers.judge(record)),
    ]


def examine_recipe(path: Path) -> list[Section]:
    """A recipe against this machine."""
    recipe = recipe_needs.read(path)
    if isinstance(recipe, Finding):
        return [_section("recipe", [recipe])]
    output = machine.place("output", recipe.output)
    needs = recipe_needs.Circumstances(packages.gather(), graphics.ask_torch(), output)
    return [_section("recipe", recipe_needs.judge(path, recipe, needs))]


def _section(title: str, found: list[Finding]) -> Section:
    return Section(title, tuple(found))
