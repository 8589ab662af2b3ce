"""Training job of `finesight launch`: recipe, nodes, commands, job file and submission."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finesight.errors import UserError
from finesight.manifest import RESULT_FILE
from finesight.recipe import load_recipe
from finesight.storage import raise_if_exists, write_file

MAX_RESTARTS = 3
"""Maximum number of restarts by torchrun or SkyPilot after a failed process."""

RENDEZVOUS_PORT = 29400
"""Port on the first node where nodes find each other; the default of torchrun."""

_JOB_NAME_PATTERN = re.compile("[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
"""Format of job names: RFC 1035 label, the strictest format among the engines."""

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

    def require_fixed(self, engine: str) -> int:
        """Return the number of nodes for an engine that does not support elastic jobs.

        Raises UserError for a range of nodes.
        """
        if self.is_elastic:
            raise UserError(
                f"{self.min_nodes}:{self.max_nodes} nodes",
                where="--nodes",
                expected=f"one number: the number of nodes of a job in {engine} is fixed",
                remedy=f"--nodes {self.max_nodes}, or --on torchrun or slurm",
            )
        return self.min_nodes


@dataclass(frozen=True, slots=True)
class LaunchJob:
    """A training job to write for an engine.

    Attributes:
        name: Name of the job in the scheduler.
        recipe: Recipe file, relative to `working_dir` unless absolute.
        overrides: Recipe overrides as typed.
        output_dir: Output folder of the run, relative to `working_dir` unless absolute.
        working_dir: Folder in which the processes start.
        node_spec: Numbers of nodes and GPUs.
        python: Python interpreter of the processes.
    """

    name: str
    recipe: Path
    overrides: tuple[str, ...]
    output_dir: Path
    working_dir: Path
    node_spec: NodeSpec
    python: str = sys.executable

    @classmethod
    def from_recipe(
        cls, recipe: Path, overrides: Sequence[str], name: str | None, node_spec: NodeSpec
    ) -> LaunchJob:
        """Build the job of a recipe. Without `name`, the output folder names it.

        Raises UserError for an invalid recipe or job name.
        """
        output_dir = load_recipe(recipe, overrides).output_dir
        job_name = _sanitize_name(output_dir.name) if name is None else name
        if not _JOB_NAME_PATTERN.fullmatch(job_name):
            raise UserError(
                f"the name {job_name!r}",
                where="--name",
                expected="up to 63 lowercase letters, digits and dashes; starts with a letter,"
                " does not end with a dash",
                remedy="for example --name latex-2b",
            )
        return cls(job_name, recipe, tuple(overrides), output_dir, Path.cwd(), node_spec)

    @property
    def python_arguments(self) -> str:
        """Arguments of the Python interpreter for training with `--resume`, quoted for a shell."""
        words = ["-m", "finesight", "train", *self._recipe_arguments(), "--resume"]
        return shlex.join(words)

    @property
    def result_file(self) -> str:
        """Path of the file that a finished run contains, quoted for a shell."""
        return shlex.quote(str(self.output_dir / RESULT_FILE))

    def _recipe_arguments(self) -> list[str]:
        # A path that starts with a dash would be an option.
        recipe = str(self.recipe)
        return [f"./{recipe}" if recipe.startswith("-") else recipe, *self.overrides]

    def require_inside_store(self, store: str) -> None:
        """Raise UserError unless recipe and output folder are relative paths in the storage."""
        for where, path in (("RECIPE", self.recipe), ("output", self.output_dir)):
            if path.is_absolute() or ".." in path.parts:
                raise UserError(
                    f"{path} is outside the mounted {store}",
                    where=where,
                    expected="a path relative to the root of the store",
                    remedy="move recipe, data and output to the store, and use relative paths",
                )


def _sanitize_name(text: str) -> str:
    """Convert a folder name to a valid job name, `finesight` if no valid character remains."""
    words = re.sub("[^a-z0-9]+", "-", text.lower()).lstrip("-0123456789")
    return words[:63].strip("-") or "finesight"


def validate_name(value: str | None, option: str) -> str | None:
    """Return an option value that is safe to write into a job file without quotes.

    Raises UserError for a value with other characters than those of names.
    """
    if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.,:/@+-]*", value):
        raise UserError(
            f"{value!r} is not a name",
            where=option,
            expected="letters, digits and _ . , : / @ + -",
            remedy="use the name as listed by the engine",
        )
    return value


FILE_SUFFIXES = {
    "torchrun": ".sh",
    "slurm": ".sbatch",
    "skypilot": ".sky.yaml",
    "kubeflow": ".trainjob.yaml",
}
"""Suffix of the default job file name, by engine."""

_SUBMIT_COMMANDS = {
    "torchrun": ("bash",),
    "slurm": ("sbatch",),
    "skypilot": ("sky", "jobs", "launch", "--yes"),
    "kubeflow": ("kubectl", "create", "--filename"),
}


def build_submit_command(engine: str, file: Path) -> list[str]:
    """Return the words of the command that starts or submits a job file."""
    # A file name that starts with a dash would be an option.
    return [*_SUBMIT_COMMANDS[engine], f"./{file}" if str(file).startswith("-") else str(file)]


def write_job_file(file: Path, text: str) -> None:
    """Write a job file, unless it exists with this content.

    Raises UserError if it exists with other content.
    """
    content = text.encode("utf-8", "surrogateescape")  # encoding of paths that are not UTF-8
    if file.is_file() and file.read_bytes() == content:
        return
    raise_if_exists(file)
    write_file(file, content)


def submit_job(engine: str, file: Path) -> str:
    """Submit a job file, and return the output of the submit command.

    Raises UserError for torchrun, which has no job queue, and if the command is not installed or
    fails.
    """
    command = build_submit_command(engine, file)
    if engine == "torchrun":
        raise UserError(
            "torchrun has no job queue",
            where="--submit",
            expected="slurm, skypilot or kubeflow",
            remedy=f"start it on the GPU nodes: {' '.join(command)}",
        )
    if shutil.which(command[0]) is None:
        raise UserError(
            f"{command[0]} is not installed",
            where="--submit",
            expected=f"the command {command[0]}",
            remedy=f"run on a machine with the command: {' '.join(command)}",
        )
    completed = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False
    )
    if completed.returncode:
        message = completed.stderr.strip() or completed.stdout.strip()
        raise UserError(
            f"{command[0]} failed with exit code {completed.returncode}: {message}",
            where=str(file),
            expected="an accepted job",
            remedy="fix the reported problem, in the file or with other options",
        )
    return completed.stdout.strip()
