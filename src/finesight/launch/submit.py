"""A job's file written, and handed to its engine's own command."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from finesight.errors import UserError
from finesight.storage import refuse_existing, write_file

ENDINGS = {
    "torchrun": ".sh",
    "slurm": ".sbatch",
    "skypilot": ".sky.yaml",
    "kubeflow": ".trainjob.yaml",
}
"""Of the file for each engine."""

_COMMANDS = {
    "torchrun": ("bash",),
    "slurm": ("sbatch",),
    "skypilot": ("sky", "jobs", "launch", "--yes"),
    "kubeflow": ("kubectl", "create", "--filename"),
}


def command(engine: str, file: Path) -> list[str]:
    """What hands the file over."""
    # What begins with a dash would be taken for an option.
    return [*_COMMANDS[engine], f"./{file}" if str(file).startswith("-") else str(file)]


def write(file: Path, text: str) -> None:
    """Write the file, unless it says so already. Raises UserError where it says something else."""
    content = text.encode("utf-8", "surrogateescape")  # as paths that are no UTF-8 are given
    if file.is_file() and file.read_bytes() == content:
        return
    refuse_existing(file)
    write_file(file, content)


def submit(engine: str, file: Path) -> str:
    """Hand the file over; gives what the engine said. Raises UserError where it is not there, or
    refuses."""
    words = command(engine, file)
    if engine == "torchrun":
        raise UserError(
            "torchrun has no queue to submit to",
            where="--submit",
            expected="slurm, skypilot or kubeflow",
            remedy=f"start it where the GPUs are: {' '.join(words)}",
        )
    if shutil.which(words[0]) is None:
        raise UserError(
            f"{words[0]} is not installed here",
            where="--submit",
            expected=f"the command {words[0]}",
            remedy=f"on a machine that has it: {' '.join(words)}",
        )
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        told = done.stderr.strip() or done.stdout.strip()
        raise UserError(
            f"{words[0]} ended with {done.returncode}: {told}",
            where=str(file),
            expected="a job that is taken",
            remedy="mend what it says, in the file or by other options",
        )
    return done.stdout.strip()
