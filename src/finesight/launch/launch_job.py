"""Training job: recipe, nodes, commands, job file and submission.

The formats of job files are documented by torchrun (docs.pytorch.org, "torchrun (Elastic
Launch)"), Slurm (slurm.schedmd.com, manual pages of sbatch, srun, scancel and scontrol) and
TrainJob (github.com/kubeflow/trainer, pkg/apis/trainer/v1alpha1/trainjob_types.go).
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from finesight.errors import Step, UserError
from finesight.manifest import RESULT_FILE
from finesight.recipe import load_recipe
from finesight.storage import check_new_path, has_content, write_new_file

MAX_RESTARTS = 3
"""Maximum number of restarts by torchrun after a failed process."""

RENDEZVOUS_PORT = 29400
"""Port on the first node where nodes find each other; the default of torchrun."""

_NODES_PATTERN = re.compile("([0-9]{1,5})(?::([0-9]{1,5}))?")


@dataclass(frozen=True, slots=True)
class _NameFormat:
    """Format of a name as a regular expression, and in words."""

    pattern: str
    expected: str

    def check(self, option: str, name: str | None, example: str) -> str:
        """Return the name that an option gives. Raises UserError if it is missing or invalid."""
        if name is not None and re.fullmatch(self.pattern, name):
            return name
        raise UserError(
            "is missing" if name is None else f"invalid name {name!r}",
            where=option,
            expected=self.expected,
            remedy=f"for example {option} {example}",
        )


_JOB_NAME = _NameFormat(
    "[a-z]([-a-z0-9]{0,61}[a-z0-9])?",
    "up to 63 lowercase letters, digits and dashes; starts with a letter, does not end with a dash",
)
"""RFC 1035 label, the strictest format among the engines."""

_CLAIM_NAME = _NameFormat(
    "[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?",
    "a PersistentVolumeClaim, which outlives the nodes, of lowercase letters, digits, - and .",
)
"""RFC 1123 subdomain."""

_PLAIN_NAME = _NameFormat(
    "[A-Za-z0-9][A-Za-z0-9_.,:/@+-]*", "a name of letters, digits and _ . , : / @ + -"
)
"""Names of images, partitions and accounts, which need no quotes in a job file."""


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
    """A training job to write for an engine.

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
            _JOB_NAME.check("--name", job_name, "latex-2b"),
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

    def require_container(self, store: str) -> None:
        """Raise UserError for a range of nodes, or a recipe or output outside the storage."""
        nodes = self.node_spec
        if nodes.is_elastic:
            raise UserError(
                f"{nodes.min_nodes}:{nodes.max_nodes} nodes",
                where="--nodes",
                expected="one number: the number of nodes of a job in Kubeflow is fixed",
                remedy=f"--nodes {nodes.max_nodes}, or --on torchrun or slurm",
            )
        for where, path in (("RECIPE", self.recipe), ("output", self.output_dir)):
            if path.is_absolute() or ".." in path.parts:
                raise UserError(
                    f"{path} is outside the mounted {store}",
                    where=where,
                    expected="a path relative to the root of the store",
                    remedy="move recipe, data and output to the store, and use relative paths",
                )


FILE_SUFFIXES = {
    "torchrun": ".sh",
    "slurm": ".sbatch",
    "kubeflow": ".trainjob.yaml",
}
"""Suffix of the default job file name, by engine."""

_SUBMIT_COMMANDS = {
    "torchrun": ("bash",),
    "slurm": ("sbatch",),
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
    if not has_content(file, content):
        check_new_path(file)
        write_new_file(file, content)


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
            expected="slurm or kubeflow",
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


PREEMPTION_WARNING_S = 300
"""Seconds before the time limit at which Slurm signals the job, enough to save a checkpoint."""

CHECKPOINT_TIMEOUT_S = 3600
"""Seconds that torchrun waits for its processes after a signal, while they save a checkpoint.

Its default is 30.
"""


def _render_template(template: str, job: LaunchJob, **values: object) -> str:
    """Render a job file.

    The filters `quote` and `yaml` quote a value for a shell and for YAML; `block` writes a text of
    several lines for YAML.
    """
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    # An item of a list, since a document would have an end mark.
    environment.filters["yaml"] = lambda value: yaml.safe_dump(
        [value], default_flow_style=True, width=2**30
    )[1:-2]
    environment.filters["block"] = lambda value: yaml.safe_dump(value, default_style="|")
    return environment.get_template(template).render(
        job=job,
        nodes=job.node_spec,
        timeout=CHECKPOINT_TIMEOUT_S,
        restarts=MAX_RESTARTS,
        port=RENDEZVOUS_PORT,
        mount=MOUNT_PATH,
        **values,
    )


def build_torchrun_script(job: LaunchJob) -> str:
    """Build a shell script that starts torchrun, to run on each node of a job.

    With several nodes, the user sets MASTER_ADDR to the name or IPv4 address of one node.
    """
    return _render_template("torchrun_job.sh", job)


def build_slurm_script(job: LaunchJob, options: Mapping[str, str]) -> str:
    """Build an sbatch script that starts one task per GPU.

    Slurm signals the job PREEMPTION_WARNING_S before its time limit; the processes save a
    checkpoint, and the job is requeued, as after preemption. It resumes with any number of nodes.

    Args:
        options: Options of sbatch, such as the partition.

    Raises UserError for an invalid value of an option.
    """
    for name, value in options.items():
        _PLAIN_NAME.check(f"--{name}", value, "NAME, as the cluster lists it")
    return _render_template("slurm_job.sh", job, options=options, warning=PREEMPTION_WARNING_S)


MOUNT_PATH = "/finesight"
"""Path in the container where the storage with recipe, data and output is mounted."""


@dataclass(frozen=True, slots=True)
class ContainerImage:
    """Container image with finesight, and the storage mounted at MOUNT_PATH in it."""

    name: str
    store: str

    @classmethod
    def from_options(cls, name: str | None, store: str | None) -> ContainerImage:
        """Build from the options `--image` and `--store`.

        Raises UserError if one of them is missing or invalid.
        """
        return cls(
            _PLAIN_NAME.check("--image", name, "registry.example/finesight:1"),
            _CLAIM_NAME.check("--store", store, "training-data, as in `kubectl get pvc`"),
        )


def build_kubeflow_job(job: LaunchJob, image: ContainerImage) -> str:
    """Build the YAML of a Kubeflow TrainJob for the runtime torch-distributed.

    The runtime passes the number of nodes and the rendezvous endpoint to torchrun in environment
    variables. `image.store` is the name of a PersistentVolumeClaim.

    Raises UserError for invalid options, and for a recipe or output folder outside of the storage.
    """
    job.require_container(image.store)
    command = (
        f"cd {MOUNT_PATH} && exec torchrun --max-restarts={MAX_RESTARTS} {job.python_arguments}"
    )
    return _render_template("kubeflow_job.j2", job, image=image, command=command)
