"""`finesight quickstart`, `convert`, `train` and `launch`: prepare and start training runs."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import click

from finesight.errors import UserError, format_command
from finesight.operations.operation import Parameter
from finesight.operations.options import (
    AsJsonOption,
    OverridesArgument,
    RecipeArgument,
    TrustMetricOption,
    echo_result,
)

if TYPE_CHECKING:
    from finesight.convert.external_config import ConversionNote
    from finesight.convert.recipe_converter import ConvertedRecipe
    from finesight.launch.launch_job import LaunchJob

PushOption = Annotated[
    str | None,
    Parameter(
        "Upload the adapter or model to a private hub repository when the run is finished "
        "(also modelscope:OWNER/NAME). Token, connection and repository are checked before "
        "training. If the upload fails, the run is kept, and the exit code is 1.",
        option="--push",
        metavar="hf:OWNER/NAME",
    ),
]
ForceOption = Annotated[
    bool,
    Parameter(
        "Start even if the predicted peak memory exceeds that of the device.", option="--force"
    ),
]


def quickstart(
    out: Annotated[Path, Parameter("Folder for all files.", metavar="FOLDER")] = Path("quickstart"),
    as_json: AsJsonOption = False,
) -> None:
    """Generate train tickets, import and check them, and fine-tune finesight-tiny on them.

    Needs no network and no GPU, and takes about two minutes on two CPU cores. Run it again to
    resume after an interruption.

    Example: finesight quickstart --out /tmp/first
    """
    from rich.console import Console

    from finesight.operations.quickstart import run_quickstart

    result = run_quickstart(out, Console(stderr=as_json))
    if as_json:
        click.echo(json.dumps(result.as_json()))


def convert(
    source: Annotated[
        Path,
        Parameter(
            "YAML or JSON of LLaMA-Factory, ms-swift or TRL; args.json of an ms-swift run; a "
            "shell script with their command; or a Python script or notebook of TRL or Unsloth.",
            metavar="SOURCE",
            is_positional=True,
        ),
    ],
    recipe: Annotated[
        Path, Parameter("Recipe file to create.", metavar="RECIPE", is_positional=True)
    ],
    as_json: AsJsonOption = False,
) -> None:
    """Convert a configuration or script of another trainer to a recipe.

    Writes the recipe, including defaults of the other program that differ. train.batch_size is the
    product of batch size per device, gradient accumulation steps and GPUs. Settings that finesight
    does not have are printed with a recommendation. Then run the printed `finesight import`
    and `finesight train` commands. Scripts are parsed, not executed.

    Example: finesight convert train_lora.yaml recipe.yaml
    """
    from finesight.convert.recipe_converter import convert_config

    conversion = convert_config(source, recipe)
    lines = _format_conversion(source, recipe, conversion)
    echo_result(dataclasses.asdict(conversion), lines, as_json)


def _format_conversion(source: Path, recipe: Path, conversion: ConvertedRecipe) -> Iterator[str]:
    yield f"{recipe}: from {conversion.program}, {source}"
    for note in _notes_of_kind(conversion, "note"):
        yield f"  {note.key} {note.value}: {note.text}"
    differences = [*_notes_of_kind(conversion, "differs"), *_notes_of_kind(conversion, "unknown")]
    if differences:
        yield "different in finesight:"
        for reason, group in groupby(differences, _get_text):
            yield f"  {', '.join(f'{note.key} {note.value}' for note in group)}: {reason}"
    irrelevant = list(_notes_of_kind(conversion, "ignored"))
    if irrelevant:
        yield "not needed:"
        for reason, group in groupby(sorted(irrelevant, key=_get_text), _get_text):
            yield f"  {', '.join(note.key for note in group)}: {reason}"
    yield "next:"
    for command in conversion.import_commands:
        yield f"  {format_command(*shlex.split(command)[1:])}"
    yield f"  {format_command('train', recipe)}"


def _notes_of_kind(conversion: ConvertedRecipe, kind: str) -> Iterable[ConversionNote]:
    return (note for note in conversion.notes if note.kind == kind)


def _get_text(note: ConversionNote) -> str:
    return note.text


def train(
    recipe: Annotated[
        Path,
        Parameter(
            "Recipe: YAML file of settings; or the folder of a run, for its recipe.yaml.",
            metavar="RECIPE",
            is_positional=True,
        ),
    ],
    overrides: OverridesArgument = None,
    resume: Annotated[
        bool,
        Parameter(
            "Continue the run in output_dir from its newest checkpoint, or start it if there "
            "is none. Repeat the same recipe and overrides, or give the run folder.",
            option="--resume",
        ),
    ] = False,
    push: PushOption = None,
    force: ForceOption = False,
    trust_metric: TrustMetricOption = False,
    as_json: AsJsonOption = False,
) -> None:
    """Fine-tune a model with a recipe, and evaluate it before and after training.

    All settings are described on the page "Recipe reference" of the documentation. The recipe.yaml
    of a run lists all of them with their values.

    SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGUSR2 (sbatch --signal=USR1@300) stop the run after
    writing a checkpoint, with exit code 75. The same command with --resume continues the run as if
    it had not been stopped.

    Before the weights are loaded, the peak memory is predicted as by `finesight plan`. A run that
    cannot fit is rejected with exit code 2. A run of more than an hour on a CPU prints a warning
    with the estimated time.

    For several GPUs, run torchrun --nproc-per-node 4 -m finesight train RECIPE. train.batch_size
    counts the samples of all GPUs, so the result equals that of one GPU up to rounding. A run can
    resume on another number of GPUs.

    Example: finesight train recipes/latex_ocr_qwen2_vl_2b.yaml train.epochs=1 output_dir=runs/short

    Example: finesight train runs/short --resume
    """
    from finesight.evaluate.custom_metric import check_recipe_metric
    from finesight.recipe import load_recipe, parse_recipe, read_recipe_text

    if push is not None:
        from finesight.hub.address import parse_address
        from finesight.hub.repository import check_publish_address

        check_publish_address(parse_address(push))
    if os.path.isdir(recipe):  # False for an invalid path, which load_recipe reports
        recipe = _find_run_recipe(recipe, overrides or ())
    settings = load_recipe(recipe, overrides or ())
    if any(override.startswith("train.epochs=") for override in overrides or ()):
        content, _ = parse_recipe(read_recipe_text(recipe), recipe)
        section = content.get("train") if isinstance(content, dict) else None
        steps = section.get("steps") if isinstance(section, dict) else None
        if steps is not None and os.environ.get("RANK", "0") == "0":
            click.echo(f"train.epochs replaces train.steps: {steps} of the recipe", err=True)
    if push is not None and settings.tune.has_mode("full") and settings.tune.has_mode("lora"):
        raise UserError(
            "the run trains an adapter and complete parts, which must be merged first",
            where="--push",
            expected="tune with lora only, or with full only",
            remedy="remove --push; after training: finesight merge"
            f" {shlex.quote(str(settings.output_dir))} OUT, then finesight export OUT {push} --yes",
        )
    check_recipe_metric(settings, recipe, overrides or (), trust=trust_metric)
    if push is not None and os.environ.get("RANK", "0") == "0":
        from finesight.hub.repository import check_publish

        check_publish(parse_address(push))
    # This import takes seconds. It follows the recipe checks so that errors appear at once.
    from finesight.plan.run_plan import check_fit
    from finesight.train.training_run import train as run_training

    result = run_training(settings, resume=resume, check_inputs=partial(check_fit, force=force))
    if as_json and result is not None:
        click.echo(json.dumps(result.as_json()))
    if result is not None:
        from finesight.app.start_label import find_label_step

        if step := find_label_step(settings):
            click.echo(f"to label further images: finesight {shlex.join(step.words)}", err=True)
    if push is not None and result is not None:
        from finesight.operations.deployment import push_run

        push_run(settings.output_dir, push)


def _find_run_recipe(folder: Path, overrides: Sequence[str]) -> Path:
    """Return the recipe file of a run folder.

    Raises UserError if the folder has no recipe, or if the recipe writes to another folder: a run
    that was moved or copied would continue elsewhere.
    """
    from finesight.manifest import RECIPE_FILE
    from finesight.recipe import load_recipe

    file = folder / RECIPE_FILE
    if not file.is_file():
        raise UserError(
            f"a folder without {RECIPE_FILE}",
            where=str(folder),
            expected="a recipe, or the folder of a run",
            remedy="give the YAML file of a recipe",
        )
    output_dir = load_recipe(file, overrides).output_dir
    if output_dir.resolve() != folder.resolve():
        raise UserError(
            f"output_dir is {output_dir}, another folder",
            where=str(file),
            expected=f"the folder of the run, {folder}, relative to the working directory",
            remedy=f"change to the working directory of the run, add output_dir={folder}, or give"
            f" {file} to use its output_dir",
        )
    return file


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
        LaunchEngine, Parameter("Launcher or scheduler that runs the job.", option="--on")
    ] = "torchrun",
    gpus_per_node: Annotated[
        int, Parameter("GPUs of each node; each runs one process.", minimum=1, maximum=64)
    ] = 8,
    nodes: Annotated[
        str,
        Parameter(
            "Number of nodes. MIN:MAX (torchrun, slurm) is elastic: training continues with "
            "the nodes that are available.",
            metavar="N|MIN:MAX",
        ),
    ] = "1",
    name: Annotated[
        str | None,
        Parameter("Name of the job and of its file. Default: from the last folder of output_dir."),
    ] = None,
    out: Annotated[
        Path | None,
        Parameter(
            "Job file. Default: NAME.sh (torchrun), NAME.sbatch, NAME.sky.yaml or "
            "NAME.trainjob.yaml.",
            metavar="FILE",
            path="file",
        ),
    ] = None,
    submit: Annotated[
        bool,
        Parameter(
            "Start the job now, with sbatch (slurm), sky (skypilot) or kubectl (kubeflow). "
            "torchrun has no queue: run the script instead.",
            option="--submit",
        ),
    ] = False,
    partition: Annotated[
        str | None, Parameter("slurm: partition. Default: of the cluster.")
    ] = None,
    account: Annotated[
        str | None, Parameter("slurm: account to charge. Default: of the cluster.")
    ] = None,
    time: Annotated[
        str | None,
        Parameter(
            "slurm: time limit as MINUTES or DAYS-HOURS:MINUTES:SECONDS, such as 1-12:00:00. "
            "Default: of the partition."
        ),
    ] = None,
    image: Annotated[
        str | None,
        Parameter("skypilot, kubeflow: container image with finesight. Required for both."),
    ] = None,
    store: Annotated[
        str | None,
        Parameter(
            "skypilot, kubeflow: storage with recipe, data and output, mounted at /finesight. "
            "A bucket URL such as s3://bucket/folder (skypilot) or the name of a "
            "PersistentVolumeClaim (kubeflow). Required for both."
        ),
    ] = None,
    accelerator: Annotated[
        str | None, Parameter("skypilot: GPU type, such as H100. Required.")
    ] = None,
    push: PushOption = None,
    force: ForceOption = False,
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
    if push is not None:
        from finesight.hub.address import parse_address
        from finesight.hub.repository import check_publish_address

        check_publish_address(parse_address(push))
    train_options = [*(["--push", push] if push is not None else []), *["--force"] * force]
    node_spec = NodeSpec.parse(nodes, gpus_per_node)
    job = LaunchJob.from_recipe(recipe, overrides or (), name, node_spec, train_options)
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
        click.echo(json.dumps(result))
    elif submit:
        click.echo(f"{file}\n{submit_output}")
    else:
        click.echo(f"{file}\nstart with: {submit_command}")


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
    from finesight.launch.launch_job import (
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
