"""`finesight launch`: write and submit training jobs for torchrun, Slurm, SkyPilot or Kubeflow."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finesight.cli.options import AsJsonOption, OverridesArgument, RecipeArgument
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
"""Engines that support each option; other engines reject it."""


def launch(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    engine: Annotated[
        LaunchEngine, typer.Option("--on", help="Launcher or scheduler that runs the job.")
    ] = "torchrun",
    gpus_per_node: Annotated[
        int, typer.Option(min=1, max=64, help="GPUs of each node; each runs one process.")
    ] = 8,
    nodes: Annotated[
        str,
        typer.Option(
            metavar="N|MIN:MAX",
            help="Number of nodes. MIN:MAX (torchrun, slurm) is elastic: training continues with "
            "the nodes that are available.",
        ),
    ] = "1",
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the job and of its file. Default: from the last folder of output_dir."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            dir_okay=False,
            help="Job file. Default: NAME.sh (torchrun), NAME.sbatch, NAME.sky.yaml or "
            "NAME.trainjob.yaml.",
        ),
    ] = None,
    submit: Annotated[
        bool,
        typer.Option(
            "--submit",
            help="Start the job now, with sbatch (slurm), sky (skypilot) or kubectl (kubeflow). "
            "torchrun has no queue: run the script instead.",
        ),
    ] = False,
    partition: Annotated[
        str | None, typer.Option(help="slurm: partition. Default: of the cluster.")
    ] = None,
    account: Annotated[
        str | None, typer.Option(help="slurm: account to charge. Default: of the cluster.")
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(
            help="slurm: time limit as MINUTES or DAYS-HOURS:MINUTES:SECONDS, such as 1-12:00:00. "
            "Default: of the partition."
        ),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(help="skypilot, kubeflow: container image with finesight. Required for both."),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="skypilot, kubeflow: storage with recipe, data and output, mounted at /finesight. "
            "A bucket URL such as s3://bucket/folder (skypilot) or the name of a "
            "PersistentVolumeClaim (kubeflow). Required for both."
        ),
    ] = None,
    accelerator: Annotated[
        str | None, typer.Option(help="skypilot: GPU type, such as H100. Required.")
    ] = None,
    as_json: AsJsonOption = False,
) -> None:
    """Write a job file that trains a recipe on several GPUs or nodes.

    The job starts only with --submit, or with the printed command. It trains with --resume: after a
    stop or a failure, it continues from the newest checkpoint, also on another number of GPUs, with
    the same samples in each step. Slurm signals the job before its time limit, and the job writes a
    checkpoint.

    One machine needs no job file: torchrun --nproc-per-node 4 -m finesight train RECIPE.

    Example: finesight launch recipe.yaml --on slurm --nodes 1:4 --partition gpu --submit
    """
    from finesight.launch.launch_job import (
        FILE_SUFFIXES,
        LaunchJob,
        NodeSpec,
        build_submit_command,
        submit_job,
        write_job_file,
    )

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
    from finesight.launch.launch_scripts import (
        ContainerImage,
        SlurmOptions,
        build_kubeflow_job,
        build_skypilot_task,
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
