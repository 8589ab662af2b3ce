"""Training job: recipe, nodes and commands."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finesight.errors import Step, UserError
from finesight.launch.name_format import JOB_NAME
from finesight.settings.manifest import RESULT_FILE
from finesight.settings.recipe import load_recipe

_NODES_PATTERN = re.compile("([0-9]{1,5})(?::([0-9]{1,5}))?")


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """Minimum and maximum number of nodes of a job, and the GPUs (processes) per node."""

    min_nodes: int
    max_nodes: int
    gpus_per_node: int

    @classmethod
    def parse(cls, nodes: str, gpus_per_node: int) -> NodeSpec:
        """Parse the option `--nodes`: a number of nodes, or MIN:MAX for an elastic job.

        Raises UserError for other text.
        """
        match = _NODES_PATTERN.fullmatch(nodes)
        min_nodes, max_nodes = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= min_nodes <= max_nodes:
            raise UserError(
                f"invalid number of nodes {nodes!r}",
                where="--nodes",
                expected="a number, or MIN:MAX with 1 <= MIN <= MAX",
                remedy="for example --nodes 2, or --nodes 1:4",
            )
        return cls(min_nodes, max_nodes, gpus_per_node)

    @property
    def is_elastic(self) -> bool:
        return self.min_nodes < self.max_nodes


@dataclass(frozen=True, slots=True)
class LaunchJob:
    """A training job to write for a launcher.

    Attributes:
        recipe: Recipe file, relative to `working_dir` unless absolute.
        overrides: Recipe overrides as typed.
        output_dir: Output folder of the run, relative to `working_dir` unless absolute.
        working_dir: Folder in which the processes start.
    """

    name: str
    recipe: Path
    overrides: tuple[str, ...]
    output_dir: Path
    working_dir: Path
    node_spec: NodeSpec
    python: str = sys.executable
    train_options: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def from_recipe(
        cls,
        recipe: Path,
        overrides: Sequence[str],
        name: str | None,
        node_spec: NodeSpec,
        train_options: Mapping[str, object] | None = None,
    ) -> LaunchJob:
        """Build the job of a recipe. Without `name`, the output folder names it.

        Raises UserError for an invalid recipe or job name.
        """
        output_dir = load_recipe(recipe, overrides).output_dir
        words = re.sub("[^a-z0-9]+", "-", output_dir.name.lower()).lstrip("-0123456789")
        job_name = (words[:63].strip("-") or "finesight") if name is None else name
        return cls(
            JOB_NAME.check("--name", job_name, "latex-2b"),
            recipe,
            tuple(overrides),
            output_dir,
            Path.cwd(),
            node_spec,
            train_options=train_options or {},
        )

    @property
    def python_arguments(self) -> str:
        """Arguments of the Python interpreter for training with `--resume`, quoted for a shell."""
        # A path that starts with a dash would be an option.
        recipe = f"./{self.recipe}" if str(self.recipe).startswith("-") else str(self.recipe)
        arguments = {"recipe": recipe, "overrides": self.overrides, "resume": True}
        return f"-m {Step('train', arguments | {**self.train_options})}"

    @property
    def result_file(self) -> str:
        """Path of the file that a finished run contains, quoted for a shell."""
        return shlex.quote(str(self.output_dir / RESULT_FILE))

    def require_mounted(self, store: str) -> None:
        """Raise UserError for a recipe or output outside the mounted storage."""
        for where, path in (("RECIPE", self.recipe), ("output", self.output_dir)):
            if path.is_absolute() or ".." in path.parts:
                raise UserError(
                    f"{path} is outside the mounted {store}",
                    where=where,
                    expected="a path relative to the root of the store",
                    remedy="move recipe, data and output to the store, and use relative paths",
                )
