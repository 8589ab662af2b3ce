"""Plan, start and prepare training runs; convert those of other trainers."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from finesight.errors import Step, UserError, format_count
from finesight.files.hub_address import parse_address
from finesight.launch import DEFAULT_LAUNCHER
from finesight.operations import launch_options
from finesight.operations.model import list_gpus
from finesight.operations.operation import Outcome, Parameter, StrPath
from finesight.operations.options import (
    LanguageOption,
    OverridesArgument,
    RecipeArgument,
    TrustMetricOption,
)
from finesight.progress import ProgressConsole

if TYPE_CHECKING:
    from finesight.convert.external_config import ConversionNote
    from finesight.convert.recipe_converter import ConvertedRecipe
    from finesight.launch.trial_search import SearchRecord
    from finesight.plan.run_plan import RunPlan
    from finesight.settings.config import Recipe
    from finesight.settings.recipe import Overrides
    from finesight.train.callbacks import Callback
    from finesight.train.finalize import RunResult
else:
    Callback = Any

    class Recipe:
        """Settings, in signatures that are read without the packages of the recipe."""


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


GpusOption = Annotated[
    int | None,
    Parameter(
        "Number of GPUs, with one process on each. Default: of the launcher that started this "
        "command; otherwise one GPU of the name of --gpu, or all GPUs of this machine.",
        option="--gpus",
        minimum=1,
        maximum=10_000,
    ),
]

EXIT_DOES_NOT_FIT = 2


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    gpu: Annotated[str | None, Parameter(metavar="NAME")] = None,
    gpus: GpusOption = None,
    trust_metric: TrustMetricOption = False,
) -> Outcome[RunPlan]:
    """Estimate memory and time of a run and suggest settings that fit.

    Prints the tokens per sample, the FLOPs of each model part, and memory and training time in two
    columns: for the recipe as written, and for chosen settings that fit into 90 % of the memory.
    The last lines are the command that trains with the chosen settings and, for an unfinished run
    that can continue with them, the one that resumes it. The recipe is not modified.

    With several GPUs, memory is that of each GPU, and train.parallel is one of the chosen settings.
    If a run does not fit, the plan names the number of GPUs that it needs.

    Reads image headers and the configuration and tokenizer of the model, but no weights.

    Exit code: 0 if the run fits, 2 if no setting makes it fit.

    Example: finesight plan recipes/latex_ocr_qwen2_vl_2b.yaml --gpu "RTX 4090" --gpus 2

    Args:
        gpu: GPU to plan for, such as T4, "RTX 4090", A100-80GB or H200. Default: this machine,
            measured in about a second.
    """
    from finesight.evaluate.custom_metric import check_recipe_metric
    from finesight.plan.plan_format import format_plan, plan_to_dict
    from finesight.plan.run_plan import plan_run
    from finesight.settings.recipe import load_recipe
    from finesight.train.run_dir import RunDir

    settings = load_recipe(Path(recipe), overrides or ())
    given = _list_overrides(overrides)
    check_recipe_metric(settings, Path(recipe), given, trust=trust_metric)
    run_plan = plan_run(settings, gpu, ProgressConsole(), gpus)
    lines = format_plan(run_plan)
    new_folder: list[str] = []
    run_dir = RunDir(settings.output_dir)
    try:
        run_dir.check_available(resume=False)
    except UserError as error:
        if not os.path.lexists(settings.output_dir):
            raise
        lines = [*lines, f"note: {error.where} {error.what}: the training starts in a new one"]
        new_folder = [f"output_dir={run_dir.next_path}"]

    def list_train_steps(changes: Sequence[str], num_gpus: int) -> list[Step]:
        combined = _combine_overrides([*given, *changes])
        in_new_folder = _combine_overrides([*combined, *new_folder])
        steps = [build_train_step(recipe, in_new_folder, num_gpus)]
        if new_folder and _can_resume(settings, changes, run_plan.target.precision):
            step = build_train_step(recipe, combined, num_gpus, resume=True)
            steps.append(replace(step, purpose="to continue the unfinished run instead"))
        return steps

    fits = run_plan.chosen_estimate.fits
    advice = run_plan.advice
    steps: list[Step] = []
    if fits:
        steps = list_train_steps(run_plan.overrides, run_plan.target.num_gpus)
    elif advice is not None:
        arguments = {"recipe": recipe, "overrides": given, "gpu": gpu, "gpus": advice.num_gpus}
        steps = [Step("plan", arguments), *list_train_steps(advice.overrides, advice.num_gpus)]
    return Outcome(
        run_plan,
        lines,
        plan_to_dict(run_plan),
        steps,
        exit_code=0 if fits else EXIT_DOES_NOT_FIT,
    )


def _combine_overrides(overrides: Sequence[str]) -> list[str]:
    """Return overrides without those of settings that a later one sets again."""
    by_setting: dict[str, str] = {}
    for override in overrides:
        setting = override.partition("=")[0]
        # The last one must also be the last in order.
        by_setting.pop(setting, None)
        by_setting[setting] = override
    return [*by_setting.values()]


def _can_resume(settings: Recipe, changes: Sequence[str], precision: str) -> bool:
    """Return whether the folder of a recipe has an unfinished run that allows the changes.

    Args:
        changes: Overrides of a plan.
        precision: Precision of the plan, which must be that of the run.
    """
    from finesight.settings.manifest import RECIPE_FILE
    from finesight.settings.recipe import load_recipe
    from finesight.train.run_dir import RunDir
    from finesight.train.setup import MUTABLE_SETTINGS

    run_dir = RunDir(settings.output_dir)
    if not run_dir.is_started or run_dir.is_finished:
        return False
    for change in changes:
        section, _, name = change.partition("=")[0].partition(".")
        if section != "train" or name not in MUTABLE_SETTINGS - {"precision"}:
            return False
    try:
        starts = (line for line in run_dir.iter_metrics() if "precision" in line)
        start = next(starts, None)
        if start is None or start["precision"] != precision:
            return False
        recorded = load_recipe(run_dir.path / RECIPE_FILE)
    except UserError:
        return False

    def dump_results(recipe: Recipe) -> dict[str, Any]:
        return recipe.model_dump(exclude={"output_dir": True, "train": MUTABLE_SETTINGS})

    return dump_results(recorded) == dump_results(settings)


def build_train_step(
    recipe: StrPath, overrides: Sequence[str], num_gpus: int, *, resume: bool = False
) -> Step:
    """Return the step that trains on one GPU, or writes a job for several.

    Args:
        resume: Whether to continue the run on one GPU, as a job always does.
    """
    from finesight.plan.sharded_memory import GPUS_PER_MACHINE

    arguments: dict[str, object] = {"recipe": recipe, "overrides": overrides}
    if num_gpus == 1:
        if resume:
            arguments["resume"] = True
        return Step("train", arguments)
    sizes = range(min(num_gpus, GPUS_PER_MACHINE), 0, -1)
    gpus_per_node = next(size for size in sizes if num_gpus % size == 0)
    purpose = ""
    if num_gpus <= GPUS_PER_MACHINE:
        command = Step("train", arguments)
        purpose = f"or: torchrun --nproc-per-node {num_gpus} -m {command}"
    sizes_of_job = {"gpus_per_node": gpus_per_node, "nodes": str(num_gpus // gpus_per_node)}
    return Step("launch", arguments | sizes_of_job, purpose)


def _list_overrides(overrides: Overrides | None) -> Sequence[str]:
    if isinstance(overrides, Mapping):
        return [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
    return overrides or ()


def convert(source: StrPath, recipe: StrPath) -> Outcome[ConvertedRecipe]:
    """Convert a configuration or script of another trainer to a recipe.

    Writes the recipe, including defaults of the other program that differ. train.batch_size is the
    product of batch size per device, gradient accumulation steps and GPUs. Settings that finesight
    does not have are printed with a recommendation. Then run the printed `finesight import`
    and `finesight train` commands. Scripts are parsed, not executed.

    Example: finesight convert train_lora.yaml recipe.yaml

    Args:
        source: YAML or JSON of LLaMA-Factory, ms-swift or TRL; args.json of an ms-swift run; a
            shell script with the command of a training; or a Python script or notebook with a
            trainer of transformers, TRL or Unsloth.
        recipe: Recipe file to create.
    """
    from finesight.convert.recipe_converter import convert_config

    conversion = convert_config(Path(source), Path(recipe))
    lines = [f"{recipe}: from {conversion.program}, {source}", *_format_notes(conversion.notes)]
    imports = [Step("import", arguments) for arguments in conversion.imports]
    data = asdict(conversion) | {"import_commands": [*map(str, imports)]}
    del data["imports"]
    return Outcome(conversion, lines, data, [*imports, Step("train", {"recipe": recipe})])


def _format_notes(notes: Sequence[ConversionNote]) -> list[str]:
    lines = [f"  {note.key} {note.value}: {note.text}" for note in notes if note.kind == "note"]
    titles = {"different in finesight:": ("differs", "unknown"), "not needed:": ("ignored",)}
    for title, kinds in titles.items():
        names_by_reason = _group_by_reason(notes, kinds)
        if not names_by_reason:
            continue
        lines.append(title)
        reasons = sorted(names_by_reason) if "ignored" in kinds else names_by_reason
        for reason in reasons:
            lines.append(f"  {', '.join(names_by_reason[reason])}: {reason}")
    return lines


def _group_by_reason(notes: Sequence[ConversionNote], kinds: Sequence[str]) -> dict[str, list[str]]:
    """Return the settings of notes by their text, those of the first kind first."""
    names_by_reason: dict[str, list[str]] = {}
    for kind in kinds:
        for note in notes:
            if note.kind != kind:
                continue
            # The value of a setting without effect does not matter.
            name = note.key if kind == "ignored" else f"{note.key} {note.value}"
            names_by_reason.setdefault(note.text, []).append(name)
    return names_by_reason


def train(
    recipe: StrPath | Recipe | Mapping[str, Any],
    overrides: OverridesArgument = None,
    resume: bool = False,
    push: PushOption = None,
    force: ForceOption = False,
    trust_metric: TrustMetricOption = False,
    stop_after: Annotated[float | None, Parameter(metavar="STEPS", minimum=1e-9)] = None,
    callbacks: Sequence[Callback] = (),
) -> Outcome[RunResult]:
    """Fine-tune a model with a recipe, and evaluate it before and after training.

    All settings are described on the page "Recipe reference" of the documentation. The recipe.yaml
    of a run lists all of them with their values.

    SIGINT (Ctrl-C), SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 (sbatch --signal=USR1@300) stop the run
    after writing a checkpoint, with exit code 75. The same command with --resume continues the run
    as if it had not been stopped.

    Before the weights are loaded, the peak memory is predicted as by `finesight plan`. A run that
    cannot fit is rejected with exit code 2. A run of more than an hour on a CPU prints a warning
    with the estimated time.

    For several GPUs, run torchrun --nproc-per-node 4 -m finesight train RECIPE. train.batch_size
    counts the samples of all GPUs, so the result equals that of one GPU up to rounding. A run can
    resume on another number of GPUs.

    Example: finesight train recipes/latex_ocr_qwen2_vl_2b.yaml train.epochs=1 output_dir=runs/short

    Example: finesight train runs/short --resume

    Args:
        recipe: Recipe: YAML file of settings; or the folder of a run, for its recipe.yaml.
        resume: Continue the run in output_dir from its newest checkpoint, or start it if there is
            none. Repeat the same recipe and overrides, or give the run folder.
        stop_after: Evaluate the model and stop after this number of steps, with a checkpoint and
            exit code 75, or 0 under torchrun, which reports others as failures. Below 1: fraction
            of all steps. A run resumed there continues with another value, or without one. Default:
            all steps.
    """
    from finesight.evaluate.custom_metric import check_recipe_metric

    if stop_after is not None and not math.isfinite(stop_after):
        raise UserError(
            f"{stop_after}",
            where="--stop-after",
            expected="a number of steps, or a fraction below 1",
            remedy="for example --stop-after 0.3",
        )
    overrides = overrides or ()
    console = ProgressConsole()
    is_main = os.environ.get("RANK", "0") == "0"
    if push is not None:
        from finesight.hub.repository import check_publish, check_publish_address

        check_publish_address(parse_address(push))
    settings, file = _load_recipe(recipe, overrides)
    if push is not None and settings.tune.has_mode("full") and settings.tune.has_mode("lora"):
        merge = {"source": str(settings.output_dir), "out": "OUT"}
        export = Step("export", {"source": "OUT", "out": push, "confirm": True}, "then")
        raise UserError(
            "the run trains an adapter and complete parts, which must be merged first",
            where="--push",
            expected="tune with lora only, or with full only",
            remedy=Step("merge", merge, "remove --push; after training", export),
        )
    check_recipe_metric(settings, file, overrides, trust=trust_metric)
    if push is not None and is_main:
        check_publish(parse_address(push))
    # These imports take seconds. They follow the recipe checks so that errors appear at once.
    from finesight.plan.run_plan import check_fit
    from finesight.train.finalize import load_result
    from finesight.train.run_dir import RunDir
    from finesight.train.training_run import train as run_training

    if stop_after is not None and stop_after >= 1:
        stop_after = int(stop_after)
    main_result = run_training(
        settings,
        resume=resume,
        console=console.rich_console,
        check_inputs=partial(check_fit, force=force),
        stop_after=stop_after,
        callbacks=callbacks,
    )
    result = main_result or load_result(RunDir(settings.output_dir))
    if result is None:
        raise UserError(
            "no result after the end of the run",
            where=str(settings.output_dir),
            expected="an output folder shared by all ranks",
            remedy="check the log of rank 0",
        )
    if main_result is None:
        return Outcome(result, data=[])  # The main process prints the result.
    exit_code = 0
    if push is not None:
        from finesight.operations.deployment import upload_run

        exit_code = upload_run(settings.output_dir, push, console)
    next_steps = list_next_steps(settings)
    return Outcome(result, (), result.as_json(), next_steps, exit_code)


def list_next_steps(settings: Recipe) -> list[Step]:
    """Return the operations that use a finished run, with the reason for the proposed one."""
    from finesight.report.run_reader import read_run
    from finesight.report.run_verdict import judge_run
    from finesight.report.summary import is_native_run
    from finesight.samples.example_question import read_example

    run = str(settings.output_dir)
    run_record = read_run(settings.output_dir, with_plugins=False)
    proposed = judge_run(run_record).next_step
    next_steps = [read_example(settings.output_dir).build_step(run)]
    if is_native_run(run_record):
        next_steps.append(Step("serve", {"run_or_model": run}))
        label_step = find_label_step(settings)
        if label_step is not None:
            next_steps.append(label_step)
    else:
        next_steps.append(Step("web", {"run_or_model": run}))
    if proposed is None:
        return next_steps
    for index, step in enumerate(next_steps):
        if step.operation == proposed.operation:
            next_steps[index] = replace(step, purpose=proposed.purpose)
            return next_steps
    return [proposed, *next_steps]


def _load_recipe(
    recipe: StrPath | Recipe | Mapping[str, Any], overrides: Overrides
) -> tuple[Recipe, Path | None]:
    """Return settings and their file."""
    from finesight.settings.recipe import load_recipe, recipe_from_dict

    if isinstance(recipe, str | Path):
        file = Path(recipe)
        if os.path.isdir(file):  # False for an invalid path, which load_recipe reports
            file = _find_run_recipe(file, overrides)
        return load_recipe(file, overrides), file
    content = recipe if isinstance(recipe, Mapping) else recipe.model_dump(mode="json")
    return recipe_from_dict(content, overrides), None


def find_label_step(recipe: Recipe) -> Step | None:
    """Return the step that labels further images with a run; None if it trained no labels."""
    from finesight.label.label_store import find_label_folder, read_sources

    folder = find_label_folder(recipe)
    if folder is None:
        return None
    sources = [source for source in read_sources(folder) if os.path.exists(source)]
    arguments = {"run_or_model": str(recipe.output_dir), "sources": sources or ["IMAGES"]}
    return Step("label", arguments)


def _find_run_recipe(folder: Path, overrides: Overrides) -> Path:
    """Return the recipe file of a run folder.

    Raises UserError if the folder has no recipe, or if the recipe writes to another folder: a run
    that was moved or copied would continue elsewhere.
    """
    from finesight.settings.manifest import RECIPE_FILE
    from finesight.settings.recipe import load_recipe

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


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as 90s, 60m, 1.5h or 1h30m.

    Raises UserError for other text.
    """
    units = {"h": 3600.0, "m": 60.0, "s": 1.0}
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms])", text)
    seconds = sum(float(number) * units[unit] for number, unit in parts)
    if "".join(map("".join, parts)) != text or not seconds:
        raise UserError(
            f"{text!r} is not a duration",
            where="--budget",
            expected="hours, minutes and seconds, such as 60m or 1h30m",
            remedy="for example --budget 60m",
        )
    return seconds


def search(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    out: Annotated[StrPath | None, Parameter(metavar="FOLDER", path="folder")] = None,
    budget: Annotated[str, Parameter(metavar="TIME")] = "60m",
    trials: Annotated[int | None, Parameter(minimum=1)] = None,
    gpus: Annotated[str, Parameter(metavar="all|N,N")] = "all",
    trust_metric: TrustMetricOption = False,
    language: LanguageOption = None,
) -> Outcome[SearchRecord]:
    """Search for better settings of a recipe, by successive halving of training runs.

    Searches learning rate, LoRA rank, duration, maximum pixels of images (if the recipe sets them)
    and weights of several data files. The section `search` of the recipe changes the ranges and
    adds settings.

    Each trial is a run in FOLDER/trials. It stops after 1/9 and 1/3 of its steps, and resumes if
    its score is among the best third. Scores are those of eval.metric on a validation split of
    data.train, or by cross-validation with less than 300 samples. The first trial is the recipe
    itself. All trials are tested together, and the best of those that are clearly better than the
    recipe is chosen. data.eval is evaluated once, at the end.

    Writes FOLDER/search.json, FOLDER/report.html and FOLDER/best.yaml, a recipe for `finesight
    train`. Repeat the command after an interruption to continue. A trial that fails, for example
    for lack of memory, is recorded, and the search continues. Requires finesight[search].

    Example: finesight search recipe.yaml --budget 60m

    Args:
        out: Folder of the search. Default: output_dir of the recipe with -search.
        budget: Time of the search, such as 60m or 1h30m.
        trials: Maximum number of trials. Default: as many as the budget allows.
        gpus: GPUs of the search, with one trial on each: all, or numbers such as 0,2. Without a
            GPU, trials run on the CPU one after the other.
    """
    from finesight.evaluate.custom_metric import check_recipe_metric
    from finesight.evaluate.metric_difference import align_columns
    from finesight.launch import trial_search
    from finesight.settings.recipe import (
        SEARCH_SECTION,
        load_recipe,
        parse_recipe,
        read_recipe_text,
    )
    from finesight.train.recipe_check import check_recipe

    file = Path(recipe)
    budget_s = parse_duration(budget)
    log = ProgressConsole().log
    text = read_recipe_text(file)
    given = _list_overrides(overrides)
    settings = load_recipe(file, overrides or ())
    check_recipe_metric(settings, file, given, trust=trust_metric)
    check_recipe(settings)
    section = parse_recipe(text, file)[0].get(SEARCH_SECTION)
    folder = Path(out or f"{settings.output_dir}-search")
    devices = _select_gpus(gpus, settings)
    running = trial_search.TrialSearch(settings, section, folder, budget_s, trials, log)
    record = running.run(devices)
    page = folder / trial_search.PAGE_FILE
    best = folder / trial_search.BEST_FILE
    trial_search.write_search_page(record, page, language)
    table = align_columns(record.list_rows(), 2)
    lines = [*table.splitlines(), *record.reasons, f"page: {page}"]
    steps = [Step("train", {"recipe": str(best)})]
    if record.choice:
        trials_folder = folder / "trials"
        runs = [str(trials_folder / "000"), str(trials_folder / f"{record.choice:03}")]
        steps.append(Step("compare", {"runs": runs}))
    data = {"page": str(page), "best": str(best), **record.model_dump(mode="json")}
    return Outcome(record, lines, data, steps)


def _select_gpus(gpus: str, recipe: Recipe) -> list[str | None]:
    """Return the value of CUDA_VISIBLE_DEVICES of each concurrent trial; None without a GPU."""
    visible = list_gpus(recipe.train.device)
    known = [*map(str, range(len(visible)))]
    numbers = known if gpus == "all" else gpus.split(",")
    is_repeated = len(set(numbers)) < len(numbers)
    if is_repeated or not set(numbers) <= set(known):
        expected = "all: this machine has no GPU"
        remedy = "remove it to use the CPU"
        if known:
            expected = f"all, or different numbers of {', '.join(known)}"
            remedy = "remove it to use all GPUs"
        raise UserError(
            f"{gpus!r} with {format_count(len(known), 'GPU')}",
            where="--gpus",
            expected=expected,
            remedy=remedy,
        )
    return [visible[int(number)] for number in numbers] or [None]


@dataclass(frozen=True, slots=True)
class JobFile:
    """Job file, the command that starts its job, and the output of that command if it was run."""

    file: Path
    command: str
    output: str | None


def launch(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    engine: Annotated[
        str, Parameter(option="--on", choices=launch_options.list_names())
    ] = DEFAULT_LAUNCHER,
    gpus_per_node: Annotated[int, Parameter(minimum=1, maximum=64)] = 8,
    nodes: Annotated[str, Parameter(launch_options.describe_nodes(), metavar="N|MIN:MAX")] = "1",
    name: str | None = None,
    out: Annotated[
        StrPath | None,
        Parameter(launch_options.describe_files(), metavar="FILE", path="file"),
    ] = None,
    submit: Annotated[bool, Parameter(launch_options.describe_submission())] = False,
    push: PushOption = None,
    force: ForceOption = False,
    **options: Annotated[str | bool | None, launch_options.list_options()],
) -> Outcome[JobFile]:
    """Write a job file that trains a recipe on several GPUs or nodes.

    The job starts only with --submit, or with the printed command. It trains with --resume: after a
    stop or a failure, it continues from the newest checkpoint, also on another number of GPUs, with
    the same samples in each step. A scheduler may signal the job before its time limit, and the job
    writes a checkpoint.

    One machine needs no job file: torchrun --nproc-per-node 4 -m finesight train RECIPE.

    Example: finesight launch recipe.yaml --nodes 1:4 --gpus-per-node 4

    Args:
        engine: Launcher or scheduler that runs the job.
        gpus_per_node: GPUs of each node; each runs one process.
        name: Name of the job and of its file. Default: from the last folder of output_dir.
    """
    from finesight.launch import job_file
    from finesight.launch.launch_job import LaunchJob, NodeSpec
    from finesight.launch.launcher_component import LAUNCHERS

    if push is not None:
        from finesight.hub.repository import check_publish_address

        check_publish_address(parse_address(push))
    LAUNCHERS.find_plugin(engine)  # raises UserError if several packages define it
    launcher = LAUNCHERS[engine]
    node_spec = NodeSpec.parse(nodes, gpus_per_node)
    job = LaunchJob.from_recipe(
        Path(recipe), _list_overrides(overrides), name, node_spec, {"push": push, "force": force}
    )
    file = Path(out or f"{job.name}{launcher.file_suffix}")
    # None and False are options that are not given.
    given = {option: str(value) for option, value in options.items() if value not in (None, False)}
    job_file.write_job_file(file, job_file.build_job_text(launcher, job, given))
    output = None
    if submit:
        output = job_file.submit_job(launcher, file)
    command = shlex.join(job_file.build_submit_command(launcher, file))
    lines = [str(file), f"start with: {command}" if output is None else output]
    written = JobFile(file, command, output)
    # An elastic job must fit its minimum of GPUs.
    num_gpus = gpus_per_node * node_spec.min_nodes
    arguments = {"recipe": recipe, "overrides": _list_overrides(overrides), "gpus": num_gpus}
    step = Step("plan", arguments, "memory and time; --gpu NAME for GPUs of another machine")
    next_steps = [step]
    if submit:
        next_steps = []
    data = asdict(written) | {"submitted": submit}
    return Outcome(written, lines, data, next_steps)
