"""`finesight launch`: a recipe as a job for torchrun, Slurm, SkyPilot or Kubeflow."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finesight.errors import UserError

if TYPE_CHECKING:
    from finesight.launch.job import Job

Engine = Literal["torchrun", "slurm", "skypilot", "kubeflow"]

_OWN = {
    "partition": ("slurm",),
    "account": ("slurm",),
    "time": ("slurm",),
    "image": ("skypilot", "kubeflow"),
    "store": ("skypilot", "kubeflow"),
    "accelerator": ("skypilot",),
}
"""Options that only some engines know."""


def launch(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file of settings.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Settings in place of the recipe's: train.batch=64"
        ),
    ] = None,
    engine: Annotated[Engine, typer.Option("--on", help="What starts the processes.")] = "torchrun",
    gpus: Annotated[int, typer.Option(min=1, max=64, help="GPUs of each machine.")] = 8,
    nodes: Annotated[
        str,
        typer.Option(
            metavar="N|MIN:MAX",
            help="Machines; MIN:MAX for torchrun and slurm, which go on with as many as there are.",
        ),
    ] = "1",
    name: Annotated[
        str | None, typer.Option(help="Of the job and its file; by default, as the output is.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Where the job is written.")
    ] = None,
    submit: Annotated[
        bool, typer.Option("--submit", help="Hand it over: by sbatch, sky or kubectl.")
    ] = False,
    partition: Annotated[str | None, typer.Option(help="slurm: where to wait.")] = None,
    account: Annotated[str | None, typer.Option(help="slurm: who pays.")] = None,
    time: Annotated[str | None, typer.Option(help="slurm: how long at a time, 1-12:00:00.")] = None,
    image: Annotated[
        str | None, typer.Option(help="skypilot, kubeflow: an image with finesight in it.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Recipe, data and output: a bucket for skypilot, a volume's claim for kubeflow."
        ),
    ] = None,
    accelerator: Annotated[str | None, typer.Option(help="skypilot: the GPU, H100.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as one JSON object.")] = False,
) -> None:
    """Write a job that trains a recipe on several GPUs or machines, and submit it if asked to.

    A job that is stopped, by Slurm with a warning before its time is over, leaves a checkpoint;
    started again, it goes on from there, with as many processes as there are then: the same samples
    in every step.

    Example: finesight launch recipe.yaml --on slurm --nodes 1:4 --partition gpu --submit
    """
    from finesight.launch.job import Job, Machines
    from finesight.launch.submit import ENDINGS, command, write
    from finesight.launch.submit import submit as hand_over

    given = {
        "partition": partition,
        "account": account,
        "time": time,
        "image": image,
        "store": store,
        "accelerator": accelerator,
    }
    _check_options(engine, given)
    job = Job.of(recipe, overrides or (), name, Machines.of(nodes, gpus))
    file = out or Path(f"{job.name}{ENDINGS[engine]}")
    write(file, _text(engine, job, given))
    said = hand_over(engine, file) if submit else None
    by_hand = shlex.join(command(engine, file))
    if as_json:
        told = {"file": str(file), "command": by_hand, "submitted": submit, "said": said}
        typer.echo(json.dumps(told))
    elif submit:
        typer.echo(f"{file}\n{said}")
    else:
        typer.echo(f"{file}\nstart it: {by_hand}")


def _check_options(engine: Engine, given: dict[str, str | None]) -> None:
    for option, value in given.items():
        if value is not None and engine not in _OWN[option]:
            raise UserError(
                f"--{option} beside --on {engine}",
                where="command line",
                expected=f"--on {' or '.join(_OWN[option])}",
                remedy=f"leave --{option} out, or choose another engine",
            )


def _text(engine: Engine, job: Job, given: dict[str, str | None]) -> str:
    from finesight.launch.clouds import Image, kubeflow, skypilot
    from finesight.launch.scripts import Queue, slurm, torchrun

    if engine == "torchrun":
        return torchrun(job)
    if engine == "slurm":
        return slurm(job, Queue(given["partition"], given["account"], given["time"]))
    image = Image.of(given["image"], given["store"])
    return (
        kubeflow(job, image) if engine == "kubeflow" else skypilot(job, image, given["accelerator"])
    )
