"""`finesight launch`: training jobs for torchrun, Slurm, SkyPilot or Kubeflow."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finesight.errors import UserError

if TYPE_CHECKING:
    from finesight.launch.launch_job import LaunchJob

LaunchEngine = Literal["torchrun", "slurm", "skypilot", "kubeflow"]

_ENGINES_BY_OPTION = {
    "partition": ("slurm",),
    "account": ("slurm",),
    "time": ("slurm",),
    "image": ("skypilot", "kubeflow"),
    "store": ("skypilot", "kubeflow"),
    "accelerator": ("skypilot",),
}
"""Engines that support an option."""


def launch(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe in YAML.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of settings: train.batch_size=64"),
    ] = None,
    engine: Annotated[
        LaunchEngine, typer.Option("--on", help="Launcher or scheduler of the job.")
    ] = "torchrun",
    gpus_per_node: Annotated[int, typer.Option(min=1, max=64, help="GPUs per node.")] = 8,
    nodes: Annotated[
        str,
        typer.Option(
            metavar="N|MIN:MAX",
            help="Number of nodes. MIN:MAX is elastic (torchrun, slurm): training continues with"
            " the available nodes.",
        ),
    ] = "1",
    name: Annotated[
        str | None, typer.Option(help="Name of the job and its file. Default: from output_dir.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Job file.")
    ] = None,
    submit: Annotated[
        bool, typer.Option("--submit", help="Submit the job with sbatch, sky or kubectl.")
    ] = False,
    partition: Annotated[str | None, typer.Option(help="slurm: partition.")] = None,
    account: Annotated[str | None, typer.Option(help="slurm: account.")] = None,
    time: Annotated[
        str | None, typer.Option(help="slurm: time limit of a job, 1-12:00:00.")
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="skypilot, kubeflow: container image with finesight.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Storage of recipe, data and output: bucket (skypilot) or volume claim (kubeflow)."
        ),
    ] = None,
    accelerator: Annotated[
        str | None, typer.Option(help="skypilot: GPU type, such as H100.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    """Write a training job for several GPUs or nodes, and submit it with --submit.

    A stopped job writes a checkpoint; Slurm signals the job before its time limit. A restarted job
    resumes with the available world size and uses the same samples in each step.

    Example: finesight launch recipe.yaml --on slurm --nodes 1:4 --partition gpu --submit
    """
    from finesight.launch.job_submission import (
        FILE_SUFFIXES,
        build_submit_command,
        submit_job,
        write_job_file,
    )
    from finesight.launch.launch_job import LaunchJob, NodeSpec

    engine_options = {
        "partition": partition,
        "account": account,
        "time": time,
        "image": image,
        "store": store,
        "accelerator": accelerator,
    }
    _check_options(engine, engine_options)
    job = LaunchJob.from_recipe(recipe, overrides or (), name, NodeSpec.parse(nodes, gpus_per_node))
    file = out or Path(f"{job.name}{FILE_SUFFIXES[engine]}")
    write_job_file(file, _build_job_text(engine, job, engine_options))
    submit_output = submit_job(engine, file) if submit else None
    submit_command = shlex.join(build_submit_command(engine, file))
    if as_json:
        result = {
            "file": str(file),
            "command": submit_command,
            "submitted": submit,
            "output": submit_output,
        }
        typer.echo(json.dumps(result))
    elif submit:
        typer.echo(f"{file}\n{submit_output}")
    else:
        typer.echo(f"{file}\nstart with: {submit_command}")


def _check_options(engine: LaunchEngine, engine_options: dict[str, str | None]) -> None:
    for option, value in engine_options.items():
        if value is not None and engine not in _ENGINES_BY_OPTION[option]:
            raise UserError(
                f"--{option} is given with --on {engine}",
                where="command line",
                expected=f"--on {' or '.join(_ENGINES_BY_OPTION[option])}",
                remedy=f"remove --{option}, or choose another engine",
            )


def _build_job_text(
    engine: LaunchEngine, job: LaunchJob, engine_options: dict[str, str | None]
) -> str:
    from finesight.launch.cloud_manifests import (
        ContainerImage,
        build_kubeflow_job,
        build_skypilot_task,
    )
    from finesight.launch.launch_scripts import (
        SlurmOptions,
        build_slurm_script,
        build_torchrun_script,
    )

    if engine == "torchrun":
        return build_torchrun_script(job)
    if engine == "slurm":
        return build_slurm_script(
            job,
            SlurmOptions(
                engine_options["partition"], engine_options["account"], engine_options["time"]
            ),
        )
    image = ContainerImage.from_options(engine_options["image"], engine_options["store"])
    return (
        build_kubeflow_job(job, image)
        if engine == "kubeflow"
        else build_skypilot_task(job, image, engine_options["accelerator"])
    )
