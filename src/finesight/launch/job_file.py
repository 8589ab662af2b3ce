"""Job file of a launcher: text, writing and submission."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from finesight.errors import UserError
from finesight.files.storage import check_new_path, has_content, write_new_file
from finesight.launch.launch_job import LaunchJob
from finesight.launch.launcher_component import (
    LAUNCHERS,
    LauncherComponent,
    format_option,
    join_names,
)


def build_job_text(launcher: LauncherComponent, job: LaunchJob, given: Mapping[str, str]) -> str:
    """Build the text of a job file.

    Args:
        given: Values of the options of single launchers.

    Raises UserError for an option of another launcher, for missing and invalid options, and for a
    job that the launcher does not support.
    """
    for name in given:
        if name not in launcher.options:
            owners = [one.name for one in LAUNCHERS.list_available() if name in one.options]
            raise UserError(
                f"{format_option(name)} is given with --on {launcher.name}",
                where="command line",
                expected=f"--on {join_names(owners)}",
                remedy=f"remove {format_option(name)}, or choose another engine",
            )
    launcher.check_options(given)
    nodes = job.node_spec
    if nodes.is_elastic and not launcher.supports_elastic_nodes:
        elastic = [one.name for one in LAUNCHERS.list_available() if one.supports_elastic_nodes]
        raise UserError(
            f"{nodes.min_nodes}:{nodes.max_nodes} nodes",
            where="--nodes",
            expected=f"one number: the number of nodes of a job in {launcher.title} is fixed",
            remedy=f"--nodes {nodes.max_nodes}, or --on {join_names(elastic)}",
        )
    text = LAUNCHERS.call(launcher.name, launcher.build, job, given)
    if not isinstance(text, str):
        problem = f"returns {text!r:.80} instead of a text"
        raise LAUNCHERS.build_call_error(launcher.name, launcher.build, problem)
    return text


def build_submit_command(launcher: LauncherComponent, file: Path) -> list[str]:
    """Return the words of the command that starts or submits a job file."""
    # A file name that starts with a dash would be an option.
    return [*launcher.command, f"./{file}" if str(file).startswith("-") else str(file)]


def write_job_file(file: Path, text: str) -> None:
    """Write a job file, unless it exists with this content.

    Raises UserError if it exists with other content.
    """
    content = text.encode("utf-8", "surrogateescape")  # encoding of paths that are not UTF-8
    if not has_content(file, content):
        check_new_path(file)
        write_new_file(file, content)


def submit_job(launcher: LauncherComponent, file: Path) -> str:
    """Submit a job file, and return the output of the submit command.

    Raises UserError for a launcher without a queue, and if the command is not installed or fails.
    """
    command = build_submit_command(launcher, file)
    if not launcher.has_queue:
        others = [one.name for one in LAUNCHERS.list_available() if one.has_queue]
        raise UserError(
            f"{launcher.name} has no job queue",
            where="--submit",
            expected=join_names(others),
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
