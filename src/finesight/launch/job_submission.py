"""Write a job file, and submit it with sbatch, sky or kubectl."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from finesight.errors import UserError
from finesight.storage import raise_if_exists, write_file

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
