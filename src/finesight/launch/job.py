"""What is to be started, on how many machines, by which command."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finesight.errors import UserError
from finesight.recipe import load_recipe
from finesight.run_folder import RESULT

RESTARTS = 3
"""How often a launcher starts the processes again after one of them has failed."""

PORT = 29400
"""Where the processes find each other, on the first machine; torchrun's own choice."""

_NAME = re.compile("[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
"""RFC 1035's label, the strictest of what the engines ask of a job's name."""

_MACHINES = re.compile("([0-9]{1,5})(?::([0-9]{1,5}))?")


@dataclass(frozen=True, slots=True)
class Machines:
    """From `least` to `most` machines with `gpus` GPUs each, a process for each GPU."""

    least: int
    most: int
    gpus: int

    @classmethod
    def of(cls, nodes: str, gpus: int) -> Machines:
        """`nodes` is a number or, for jobs that may grow and shrink, MIN:MAX. Raises UserError."""
        found = _MACHINES.fullmatch(nodes)
        least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= least <= most:
            raise UserError(
                f"{nodes!r} machines",
                where="--nodes",
                expected="a number, or MIN:MAX with 1 <= MIN <= MAX",
                remedy="for example --nodes 2, or --nodes 1:4",
            )
        return cls(least, most, gpus)

    @property
    def elastic(self) -> bool:
        return self.least < self.most

    def fixed(self, engine: str) -> int:
        """Their number, for an engine that knows one only. Raises UserError for a range."""
        if self.elastic:
            raise UserError(
                f"{self.least}:{self.most} machines",
                where="--nodes",
                expected=f"one number: a job of {engine} has as many machines as it began with",
                remedy=f"--nodes {self.most}, or --on torchrun or slurm",
            )
        return self.least


@dataclass(frozen=True, slots=True)
class Job:
    """A training on such machines. `recipe` is as it was given, relative to `folder`, in which the
    command ran; so is `output`."""

    name: str
    recipe: Path
    overrides: tuple[str, ...]
    output: Path
    folder: Path
    machines: Machines
    python: str = sys.executable

    @classmethod
    def of(
        cls, recipe: Path, overrides: Sequence[str], name: str | None, machines: Machines
    ) -> Job:
        """Raises UserError for a recipe with mistakes, and for a name that an engine refuses."""
        output = load_recipe(recipe, overrides).output
        chosen = _name_from(output.name) if name is None else name
        if not _NAME.fullmatch(chosen):
            raise UserError(
                f"the name {chosen!r}",
                where="--name",
                expected="up to 63 small letters, digits and dashes, a letter first, no dash last",
                remedy="for example --name latex-2b",
            )
        return cls(chosen, recipe, tuple(overrides), output, Path.cwd(), machines)

    @property
    def arguments(self) -> str:
        """The command's words after `python`, quoted for a shell. It goes on where a checkpoint is,
        and begins where there is none."""
        words = ["-m", "finesight", "train", *self._given(), "--resume"]
        return shlex.join(words)

    @property
    def result(self) -> str:
        """The file that a run leaves at its end, quoted for a shell."""
        return shlex.quote(str(self.output / RESULT))

    def _given(self) -> list[str]:
        # What begins with a dash would be taken for an option.
        recipe = str(self.recipe)
        return [f"./{recipe}" if recipe.startswith("-") else recipe, *self.overrides]

    def inside(self, store: str) -> None:
        """Raises UserError unless recipe and output lie within the folder that every machine gets
        from `store`."""
        for where, path in (("RECIPE", self.recipe), ("output", self.output)):
            if path.is_absolute() or ".." in path.parts:
                raise UserError(
                    f"{path} lies outside of what the machines get from {store}",
                    where=where,
                    expected="a path relative to the top of the store",
                    remedy="put recipe, data and output into the store, and name them from there",
                )


def _name_from(text: str) -> str:
    """The nearest name that all engines take; `finesight` where nothing is left."""
    words = re.sub("[^a-z0-9]+", "-", text.lower()).lstrip("-0123456789")
    return words[:63].strip("-") or "finesight"


def one_word(value: str | None, option: str) -> str | None:
    """A value for a directive, which knows no quotes. Raises UserError for one of other signs."""
    if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.,:/@+-]*", value):
        raise UserError(
            f"{value!r} is not a name",
            where=option,
            expected="letters, digits and _ . , : / @ + -",
            remedy="give the name as the engine lists it",
        )
    return value
