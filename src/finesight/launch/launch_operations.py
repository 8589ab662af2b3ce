"""`finesight search` and `finesight launch`: trials of settings, and jobs on several GPUs."""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from finesight.errors import Step, UserError, format_count
from finesight.files.hub_address import parse_address
from finesight.launch import DEFAULT_LAUNCHER, launch_options
from finesight.operations.model import list_gpus
from finesight.operations.operation import Outcome, Parameter, StrPath
from finesight.operations.options import (
    LanguageOption,
    OverridesArgument,
    RecipeArgument,
    TrustMetricOption,
    list_overrides,
)
from finesight.operations.training import ForceOption, PushOption
from finesight.progress import ProgressConsole

if TYPE_CHECKING:
    from finesight.launch.trial_search import SearchRecord
    from finesight.settings.config import Recipe


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
    given = list_overrides(overrides)
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
        Path(recipe), list_overrides(overrides), name, node_spec, {"push": push, "force": force}
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
    arguments = {"recipe": recipe, "overrides": list_overrides(overrides), "gpus": num_gpus}
    step = Step("plan", arguments, "memory and time; --gpu NAME for GPUs of another machine")
    next_steps = [step]
    if submit:
        next_steps = []
    data = asdict(written) | {"submitted": submit}
    return Outcome(written, lines, data, next_steps)
