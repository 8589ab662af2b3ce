"""HTML of the studio: lists of the workspace, jobs, curves, and the report pages.

The page shows what is on disk for the selection in its URL, so a reload loses nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from finesight.app.answer_preview import read_answer_preview
from finesight.app.job_results import describe_result, explain_metric, list_commands
from finesight.app.jobs import Job, JobStore
from finesight.app.option_labels import OPTION_HINTS, OPTION_LABELS
from finesight.app.pages import describe_error
from finesight.app.program_question import Content
from finesight.app.program_use import (
    build_default_content,
    list_image_names,
    list_snippets,
    read_example_content,
)
from finesight.app.studio_side import RunningJob, describe_running, find_step_states
from finesight.app.workspace import (
    DATA_FILES,
    Workspace,
    WorkspaceContent,
    WorkspaceDataset,
    as_argument,
)
from finesight.errors import LABEL_TRAIN_FRACTION, Remedy, Step, UserError
from finesight.evaluate.answer_tables import (
    ANSWER_FILES,
    JSONL_FILE,
    AnswerTable,
    can_write_workbooks,
)
from finesight.evaluate.bootstrap import MIN_SAMPLES_UNBOUNDED
from finesight.files.bounded_files import read_text
from finesight.ingest.source_options import SourceOptions
from finesight.label.label_store import JOURNAL_FILE
from finesight.launch.launcher_component import LAUNCHERS
from finesight.metric_components import METRICS
from finesight.model_folder import TINY_MODEL
from finesight.objective_components import list_reward_objectives
from finesight.operations import find_operation
from finesight.operations.operation import Parameter, format_step, list_parameters
from finesight.report.charts import build_run_charts, build_sparkline
from finesight.report.i18n import Language, translate
from finesight.report.metric_rows import format_metric_name
from finesight.report.run_reader import RunRecord, read_run
from finesight.report.run_verdict import RunVerdict, compare_evaluations, judge_run
from finesight.report.summary import (
    NUM_RECENT_STEPS,
    RunStatus,
    get_model_name,
    get_run_status,
)
from finesight.settings.manifest import (
    ADAPTER_FOLDER,
    GUARD_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    RESULT_FILE,
)

STEPS = ("data", "label", "check", "plan", "train", "results", "chat", "export")
STEP_NAMES = {step: step.title() for step in STEPS}
STEP_NAMES |= {"chat": "Use", "export": "Use in a program"}

NO_RUN = "-"
"""Name in the URL for labelling without a run."""


@dataclass(frozen=True, slots=True)
class FormField:
    """Field of a form: a text, or a choice of names with a description of the empty one.

    Attributes:
        label: Label; empty for that of its option, with the hint of the option.
        default: Description of the empty choice.
        hint: Description below the field.
        folder: Folder of the workspace in which the text is the name of a new item.
        kinds: Kinds of answers for which the field is shown; empty for all.
        is_advanced: Whether the field is folded.
        name: ID: form and parameter, such as `import:prompt`.
        parameter: Parameter of the operation; None for a field that the page has in addition.
    """

    label: str = ""
    placeholder: str = ""
    value: str = ""
    lines: int = 1
    choices: Sequence[str] = ()
    default: str = ""
    hint: str = ""
    folder: str = ""
    kinds: Sequence[str] = ()
    is_advanced: bool = False
    name: str = ""
    parameter: Parameter | None = None


IMPORT_SHARE = "0.9"
"""Default share of an import for training."""

FORMS: dict[str, Mapping[str, FormField | None]] = {
    "import": {
        "source": FormField("File or folder in the workspace", "photos"),
        "out": FormField("Name of the data set", "tickets", folder="data"),
        "prompt": FormField("Question for each image", "Read the ticket."),
        "columns": FormField(
            "Columns (empty: detected)", "image=path answer=caption", is_advanced=True
        ),
        "train_fraction": FormField(value=IMPORT_SHARE),
        "explain": None,
    },
    "label": {
        "sources": FormField("Images to label: a file or folder", "photos"),
        "prompt": FormField("Question for each image", "Read the ticket.", lines=2),
        "out": FormField("Name of the data set", value="labels"),
        "run_or_model": FormField("Model without a run", value=TINY_MODEL, is_advanced=True),
        "kind": FormField("Kind of the answers", default="detect automatically"),
        "classes": FormField("Classes", "red, green, blue", kinds=("classes", "boxes", "points")),
        "fields": FormField("Fields", "merchant, date, amount", kinds=("fields",)),
        "train_fraction": FormField(
            "Fraction of training samples", value=str(LABEL_TRAIN_FRACTION), is_advanced=True
        ),
        "split": FormField("Samples to review", choices=["for validation"], default="for training"),
        "review": None,
    },
    # The page checks samples of one format, and has a button for the corrected copy.
    "check": dict.fromkeys(("against", "fix", "html", *SourceOptions.__annotations__)),
    # The page trains on one GPU.
    "plan": {"gpus": FormField(value="1")},
    "recipe": {
        "name": FormField("Name of the recipe and its run", "tickets"),
        "model": FormField("Model: a name on a hub, or a folder", value=TINY_MODEL),
        "eval.metric": FormField(
            "Metric (empty: chosen from the answers)", choices=[*METRICS], is_advanced=True
        ),
        "train.epochs": FormField("Epochs", "from the data", is_advanced=True),
        "train.steps": FormField("Steps instead of epochs", "from the data", is_advanced=True),
        "train.learning_rate": FormField("Learning rate", "from the model", is_advanced=True),
        "train.objective": FormField(
            "Train by rewards",
            choices=list_reward_objectives(),
            default="on the answers",
            is_advanced=True,
        ),
    },
    "editor": {"text": FormField("Settings of the recipe", lines=12)},
    "train": {"resume": None},
    "search": {"budget": FormField("Time of the search"), "out": None},
    "eval": {},
    "guard": {},
    "web": {"adapter": FormField("Compare with another run", default="none")},
    "predict": {
        "images": FormField("File or folder in the workspace", "photos"),
        "prompt": FormField("Question for each image", "Read the ticket.", lines=2),
        "out": FormField("Name of the table", folder="answers", is_advanced=True),
        **dict.fromkeys(("data", "draw", "pages")),
    },
    "serve": {"adapter": FormField("Serve another run of the model, too", default="none")},
    "merge": {"out": FormField("Name of the merged model", "tickets", folder="models")},
}
"""Fields of each form that the page shows first, describes in its own words or, with None, leaves
out. The other options of the operation follow."""

FORMS_OF_STEPS = {
    "data": ("import",),
    "label": ("label",),
    "check": ("check",),
    "plan": ("plan", "recipe", "editor"),
    "train": ("train", "search"),
    "results": ("eval", "guard"),
    "chat": ("predict", "web"),
    "export": ("serve", "merge"),
}

HIDDEN_OPTIONS = (
    "host",
    "port",
    "password_file",
    "no_auth",
    "trusted_proxy",
    "key_file",
    "socket_file",
    "open_page",
    "suggest_only",
    "push",
    "label_studio",
    "label_studio_files",
    "label_studio_url",
    "label_studio_prompt",
    "teacher_key",
    "allow_host",
    "allow_media_host",
    "trust_metric",
    "environment",
    "language",
    "seed",
    "stop_after",
    "update",
    "max_shard_gb",
    "num_samples",
    "max_queue",
    "timeout",
    "teacher_pixels",
    "teacher_concurrency",
)
"""Parameters that the page sets itself or that need a terminal, and hosts that the owner allows."""

YES_NO = ("yes", "no")

PROPOSALS = {
    "check": "Write a corrected copy",
    "label": "Label more images",
    "report": "Report",
    "serve": "Start a server",
    "train": "Train again",
}
"""Button of a proposed step by operation."""


def build_form(form: str, runs: Sequence[str] = ()) -> list[FormField]:
    """Build the fields of a form.

    Args:
        runs: Other runs of the workspace, from which an option for a run is chosen.
    """
    known = [] if form in ("recipe", "editor") else list_parameters(find_operation(form))
    parameters, own = {one.name: one for one in known}, FORMS[form]
    fields = []
    for name in dict.fromkeys((*own, *parameters)):
        parameter, field = parameters.get(name), own.get(name)
        is_option = parameter is not None and not parameter.is_positional
        is_left_out = name in HIDDEN_OPTIONS or (name in own and field is None)
        if is_left_out or not (field or is_option):
            continue
        field = field or FormField()
        if parameter is not None:
            field = _describe_parameter(form, parameter, field, runs)
        fields.append(replace(field, name=f"{form}:{name}"))
    return fields


def _describe_parameter(
    form: str, parameter: Parameter, field: FormField, runs: Sequence[str]
) -> FormField:
    """Complete a field by its parameter, and without a label by its texts."""
    default, is_flag = parameter.default, parameter.kind == "flag"
    is_run = parameter.metavar == "RUN"
    choices: Sequence[str]
    if is_flag:
        choices = YES_NO
    elif is_run:
        choices = runs
    else:
        # The empty choice keeps the default.
        choices = [one for one in parameter.choices if one != default]
    if field.label:
        is_advanced = field.is_advanced or (is_run and not runs)
        return replace(field, choices=choices, parameter=parameter, is_advanced=is_advanced)
    shown = "" if is_flag or default in (None, ()) else str(default)
    label = OPTION_LABELS.get(f"{form}:{parameter.name}") or OPTION_LABELS.get(parameter.name)
    hint = OPTION_HINTS.get(f"{form}:{parameter.name}") or OPTION_HINTS.get(parameter.name)
    return FormField(
        # An option of a plug-in or a later command has no label yet.
        label=label or parameter.name.replace("_", " ").capitalize(),
        placeholder=shown,
        value=field.value,
        choices=choices,
        default=shown,
        hint=hint or parameter.help,
        is_advanced=True,
        parameter=parameter,
    )


@cache
def list_field_names() -> dict[str, str]:
    """Return the labels of fields, and of a button, by option of the commands."""
    fields = (one for form in reversed(FORMS) for one in reversed(build_form(form)))
    names = {one.parameter.option: one.label for one in fields if one.parameter is not None}
    return names | {"--resume": "Start or resume"}


COMMAND_STEPS = {form: step for step, forms in FORMS_OF_STEPS.items() for form in forms} | {
    **{"init": "plan", "chat": "chat", "export": "export"},
    **dict.fromkeys(("report", "compare"), "results"),
}
"""Step of the page by command."""

_NEXT_COLUMN = re.compile(r"(=[^\s,;=]+) --map(?= \w+=)")
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")

JOB_TITLES = {
    "import": "Import",
    "label": "Labelling page",
    "check": "Data check",
    "plan": "Estimate",
    "train": "Training",
    "search": "Search for better settings",
    "eval": "Evaluation",
    "guard": "Comparison with the base model",
    "web": "Chat page",
    "predict": "Reading of images",
    "serve": "Server",
    "merge": "Merged model",
    "export": "Model for other programs",
}
"""Name of each command on the page."""

MISSING_MESSAGES = {
    "data": "No data set is selected. Select one, or import one in the step Data.",
    "recipe": "No recipe is selected. Select one, or create one in the step Plan.",
    "run": "No run is selected. Select one, or train one in the step Train.",
    "label:sources": "No images are given. Enter a file or folder, or upload images in the step"
    " Data.",
    "label:fields": "No fields are given. Enter their names, such as item, price.",
    "label:split": "The data set has no validation samples. Review those for training.",
    "files": "Upload files, or enter one file or folder.",
    "operation": "This is no longer proposed. Reload the page.",
    "merge:out": "No merged model is given. Merge one, or enter its name.",
}
"""Message about a missing item or an empty field by its name."""

CHECK_ERROR_EXIT_CODE = 2

OUTCOMES = {
    "check": {CHECK_ERROR_EXIT_CODE: "errors found", 3: "warnings found"},
    "plan": {2: "does not fit"},
    "train": {75: "checkpoint saved"},
    "results": {3: "regression found", 4: "unreadable images skipped"},
    "chat": {4: "unreadable images skipped"},
}
"""Meaning of the exit codes of the commands of a step."""

MAX_LISTED_BYTES, MAX_SELECTED_BYTES = 1 << 18, 1 << 23
"""Maximum size of the metrics of a listed run, and of the selected one.

A page reads those of all listed runs. Of larger ones, the middle is left out.
"""

MAX_LISTED_RUNS = 200
NUM_FIRST_RUNS = 8
"""Number of runs that a page lists, and of those that it shows before *More runs*."""

MAX_REPORT_EXAMPLES = 200
MAX_COMPARED_RUNS = 8
MAX_LISTED_JOBS = 5
MAX_PAGE_BYTES = 100 << 20


@dataclass(frozen=True, slots=True)
class Selection:
    """Selection in the URL: step, items of the workspace, job, and what to label."""

    step: str = "data"
    data: str = ""
    recipe: str = ""
    run: str = ""
    job: str = ""
    lang: Language = "en"
    images: str = ""
    prompt: str = ""
    kind: str = ""

    @classmethod
    def parse(cls, params: Mapping[str, str], language: Language) -> Selection:
        """Read a selection from query parameters. Invalid values are ignored."""
        names = {"data", "recipe", "run", "job", "images", "prompt", "kind"} & params.keys()
        step = params.get("step", "")
        items = {name: params[name] for name in names}
        return cls(step=step if step in STEPS else STEPS[0], lang=language, **items)

    def link(self, **changes: str) -> str:
        """Return the URL of the page after changes. Without `job`, the newest job is selected."""
        values = {**asdict(self), "job": "", **changes}
        return "./?" + urlencode({key: value for key, value in values.items() if value})

    def link_job(self, job: Job) -> str:
        """Return the URL of a job in its step, with its target selected."""
        keys = {"data": "data", "check": "data", "plan": "recipe", "train": "recipe"}
        items = {keys.get(job.step, "run"): job.target or NO_RUN}  # Only labelling needs no run.
        if job.step == "label":
            items["data"] = job.out
        return self.link(step=job.step, job=job.id, **items)


@dataclass(frozen=True, slots=True)
class RunCard:
    """Listed run.

    Attributes:
        verdict: Verdict on its metrics, without counts of its answers.
        curve: Points of the line of its training loss; empty without any.
        image: URL of the image of one of its samples.
        changed_at: Time of its last metric or result.
    """

    path: Path
    status: RunStatus
    verdict: RunVerdict
    curve: str
    image: str
    changed_at: datetime

    @property
    def metric(self) -> str:
        """Display name of the primary metric; empty without one."""
        row = self.verdict.primary_row
        return format_metric_name(row.name) if row else ""

    @property
    def explanation(self) -> str:
        """Translated explanation of the primary metric; empty without one."""
        row = self.verdict.primary_row
        return explain_metric(row.name) if row else ""


@dataclass(frozen=True, slots=True)
class ListedRun:
    """Record of a listed run without most of its steps."""

    record: RunRecord
    curve: str


@dataclass(frozen=True, slots=True)
class StudioState:
    """Selected items of the workspace and job of the step, which the selection names."""

    selection: Selection
    content: WorkspaceContent
    dataset: WorkspaceDataset | None
    recipe: Path | None
    run: Path | None
    jobs: Sequence[Job]
    job: Job | None

    @property
    def target(self) -> str:
        """Item that the jobs of the step belong to."""
        item: object = self.run
        if self.selection.step in ("data", "check"):
            item = self.dataset.path if self.dataset else ""
        elif self.selection.step in ("plan", "train"):
            item = self.recipe
        return str(item or "")


class StudioView:
    """Renders the page of a workspace."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.jobs = workspace, JobStore(workspace.folder)

    def read_state(self, selection: Selection, *, use_newest: bool = True) -> StudioState:
        """Find the selected items.

        Args:
            use_newest: Select the newest items of kinds that the selection does not name.
        """
        content = self.workspace.scan()
        dataset = _select(content.datasets, selection.data, lambda x: str(x.path), use_newest)
        if selection.run == NO_RUN and selection.step != "label":
            selection = replace(selection, run="")

        def select(paths: Sequence[Path], name: str, step: str, file: str) -> Any:
            """Prefer items of running commands, then the newest one with the selected data."""
            active = [job.target for job in self.jobs.list_running() if job.step == step]
            found = [path for path in paths if str(path) in active]
            if dataset and not (name or found) and use_newest:
                found = [*islice((x for x in paths if self._uses_data(x / file, dataset)), 1)]
            return _select([*found, *paths], name, str, use_newest)

        recipe = select(content.recipes, selection.recipe, "train", "")
        run = select(content.runs, selection.run, selection.step, RECIPE_FILE)
        if selection.step == "train" and recipe is not None:
            # Command, log and curves are those of the recipe, so its run is selected too.
            output_dir = self.find_run(recipe)
            run = next((path for path in content.runs if path == output_dir), None)
            selection = replace(selection, run=str(output_dir or ""))
        state = StudioState(selection, content, dataset, recipe, run, (), None)
        # An import and labelling create a data set, so they belong to no item.
        target = None if selection.step in ("data", "label") else state.target
        jobs = self.jobs.list_jobs(selection.step, target)
        # The page shows one command. A running one can still be stopped, so it precedes newer ones
        # that have ended.
        order = sorted(jobs, key=lambda job: job.status != "running")
        job = _select(order, selection.job, lambda job: job.id, use_newest)
        selection = replace(
            selection,
            data=str(dataset.path) if dataset else selection.data,
            recipe=str(recipe or selection.recipe),
            run=str(run or selection.run),
            job=job.id if job else selection.job,
        )
        return replace(state, selection=selection, jobs=jobs[:MAX_LISTED_JOBS], job=job)

    def describe(self, state: StudioState) -> dict[str, Any]:
        """Return the values of the parts of the page above and below its forms."""
        selection, job = state.selection, state.job
        status = ""
        if job is not None:
            status = "stopping" if job.is_stopping else job.status
        weights = self.workspace.find_weights(state.run) if state.run else None
        is_running_server = job is not None and job.is_server and status == "running"
        outcome = job.read_outcome() if job else None
        error = outcome.error if outcome and status == "failed" else None
        result = outcome.result if outcome and status == "finished" else {}
        next_step = self._find_next_step(state)
        meaning = "ended without a result, often for lack of memory" if status == "killed" else ""
        if job is not None and outcome is not None and status != "failed":
            meaning = OUTCOMES.get(job.step, {}).get(outcome.exit_code, "")
        return {
            "state": state,
            "is_practice": self._uses_tiny_model(state),
            "link": selection.link,
            "url": selection.link(job=selection.job),
            "selection": selection,
            "content": state.content,
            "job": job,
            "status": status,
            "running": self._list_running(state),
            "step_states": find_step_states(
                STEPS, selection.step, self._list_done_steps(state), next_step
            ),
            "log": job.read_log() if job else "",
            "error": describe_error(UserError(**dict(error)), name_actions) if error else "",
            "proposals": self.list_proposals(state),
            "outcome": meaning,
            "sentences": describe_result(job, result) if job else [],
            "commands": list_commands(job, result) if job else {},
            "program": self._describe_program(state) if is_running_server else None,
            "answer_files": self._list_answer_files(job),
            "answers": self._preview_answers(job),
            "needs_openpyxl": not can_write_workbooks(),
            "warning": self._warn_of_few_samples(state),
            "is_ready": is_running_server and job is not None and job.is_ready,
            "workspace": self.workspace.folder.name,
            "name_item": name_item,
            "runs": [self.build_card(run) for run in state.content.runs[:MAX_LISTED_RUNS]],
            "num_first_runs": NUM_FIRST_RUNS,
            "find_image": self.find_image,
            "verdict": self.judge(state),
            "explain_metric": explain_metric,
            "is_good": self._is_good(state),
            "num_unlisted_runs": max(0, len(state.content.runs) - MAX_LISTED_RUNS),
            "charts": self._build_charts(state),
            "page": self._find_page(state),
            "weights": str(weights or ""),
            "saved_at": self._read_saved_time(state.recipe),
            "next_data": _find_next_data(state),
            "next_step": next_step,
            "adapter": f"{state.run}/{ADAPTER_FOLDER}" if state.run else "",
            "launch_command": _format_launch(state.recipe),
            "launchers": ", ".join(one.name for one in LAUNCHERS.list_available() if one.has_queue),
            "step_names": STEP_NAMES,
            "name_job": name_job,
            "no_run": NO_RUN,
        }

    def _describe_program(self, state: StudioState) -> dict[str, Any] | None:
        """Return code and the example question for the selected server; None until it is ready."""
        job = state.job
        models = job.read_model_names() if job is not None else []
        if job is None or not models:
            return None
        has_key = "--key-file" in job.arguments
        example = self.read_example(job)
        content = example or build_default_content(self.workspace.read_prompt(state.run, None))
        # The page has no data of the image, which the test shows.
        return {
            "address": job.address,
            "model": models[0],
            "has_key": has_key,
            "has_example": example is not None,
            "images": ", ".join(list_image_names(content)),
            "snippets": list_snippets(job.address, models[0], content, has_key=has_key),
        }

    def read_example(self, job: Job) -> Content | None:
        """Return the example question of the run of a server, or None."""
        with contextlib.suppress(UserError):
            return read_example_content(self.workspace, self.workspace.resolve(job.target, "job"))
        return None

    def _list_answer_files(self, job: Job | None) -> list[str]:
        """Return the files of answers that a command has written."""
        if job is None or job.arguments[0] != "predict" or job.status != "finished":
            return []
        return [name for name in ANSWER_FILES if self.find_answers(job, name) is not None]

    def _preview_answers(self, job: Job | None) -> AnswerTable | None:
        """Return the first answers of a finished reading."""
        if job is None or job.status != "finished":
            return None
        file = self.find_answers(job, JSONL_FILE)
        return read_answer_preview(file) if file is not None else None

    def find_answers(self, job: Job, name: str) -> Path | None:
        """Return a file of answers that a command has written; None for other files."""
        if job.arguments[0] != "predict" or name not in ANSWER_FILES or not job.out:
            return None
        with contextlib.suppress(UserError):
            file = self.workspace.folder / self.workspace.resolve(f"{job.out}/{name}", "job")
            if file.is_file():
                return file
        return None

    def _warn_of_few_samples(self, state: StudioState) -> str:
        """Return a warning about few validation samples of the data or recipe; empty if enough."""
        step, num_samples = state.selection.step, MIN_SAMPLES_UNBOUNDED  # if it is unknown
        if step in ("data", "label", "check") and state.dataset is not None:
            num_samples = state.dataset.num_eval
        elif step in ("plan", "train") and state.recipe is not None:
            known = {str(one.eval_file): one.num_eval for one in state.content.datasets}
            with contextlib.suppress(UserError, KeyError):
                files = self.workspace.load_recipe(state.recipe).data.eval
                num_samples = sum(known[str(file.path)] for file in files)
        text = (
            "{} validation samples show only very large changes; with {} or more, smaller ones"
            " become clear. Label more images, or import with a smaller fraction for training."
        )
        is_few = num_samples < MIN_SAMPLES_UNBOUNDED
        return translate(text, num_samples, MIN_SAMPLES_UNBOUNDED) if is_few else ""

    def list_proposals(self, state: StudioState) -> list[tuple[str, Step]]:
        """Return the steps that a command or run proposes, with the buttons that follow them."""
        step, job = state.selection.step, state.job
        if step in ("train", "results") and state.run is not None:
            verdict = self.judge(state)
            advice = verdict.next_step if verdict else None
            return [(PROPOSALS[advice.operation], advice)] if advice else []
        outcome = job.read_outcome() if job and job.status == "finished" else None
        steps = outcome.next_steps if outcome else ()
        if step == "plan" and job is not None:
            saved_at = self._read_saved_time(state.recipe)
            if saved_at is not None and saved_at > job.started_at:
                return []
            # Settings for more GPUs than those of the plan are only a proposal. The second step
            # continues an unfinished run with the settings of the first, as the studio does anyway.
            if not steps or steps[0].operation == "plan":
                return []
            selected = _select_settings(steps[0])
            if selected is None:
                return []
            return [("Use these settings", selected)]
        return [(PROPOSALS["check"], one) for one in steps if step == one.operation == "check"]

    def judge(self, state: StudioState) -> RunVerdict | None:
        """Return the verdict on the selected run; None while it runs and in other steps."""
        if state.selection.step not in ("train", "results") or state.run is None:
            return None
        if state.job is not None and state.job.status == "running":
            return None
        return judge_run(self._read_run(state.run, MAX_SELECTED_BYTES), run=state.run)

    def _list_running(self, state: StudioState) -> list[RunningJob]:
        """Return the running commands with their progress."""
        running: list[RunningJob] = []
        for job in self.jobs.list_running():
            status = None
            run = self.find_run(Path(job.target)) if job.arguments[0] == "train" else None
            if run in state.content.runs:
                status = self.read_status(run)
            running.append(describe_running(job, status))
        return running

    def _uses_data(self, recipe: Path, dataset: WorkspaceDataset) -> bool:
        """Return whether a recipe names a file of a data set."""
        return f"{dataset.path}/" in self.workspace.read_recipe(recipe)[0]

    def _list_done_steps(self, state: StudioState) -> list[str]:
        """Return the steps whose result exists for the selected data set.

        A recipe or run of other data is no result.
        """
        dataset = state.dataset
        recipe = state.recipe
        run = state.run
        if dataset is None:
            return []
        if recipe is not None and not self._uses_data(recipe, dataset):
            recipe = None
        if run is not None and not self._uses_data(run / RECIPE_FILE, dataset):
            run = None
        is_trained = run is not None and self.read_status(run).kind == "finished"
        has_result = {
            "data": True,
            # Imported data have labels, but the step Label has not written them.
            "label": (self.workspace.folder / dataset.path / JOURNAL_FILE).is_file(),
            "check": self._is_checked(dataset),
            "plan": recipe is not None,
            "train": is_trained,
            "results": is_trained,
            "chat": self._is_used(run, "chat"),
            "export": self._is_used(run, "export"),
        }
        return [step for step in STEPS if has_result[step]]

    def _is_checked(self, dataset: WorkspaceDataset) -> bool:
        """Return whether a data set has a check, whose newest one has found no errors."""
        jobs = self.jobs.list_jobs("check", str(dataset.path))
        outcome = jobs[0].read_outcome() if jobs else None
        has_errors = outcome is not None and outcome.exit_code == CHECK_ERROR_EXIT_CODE
        return not has_errors and (self.workspace.folder / dataset.check_page).is_file()

    def _is_used(self, run: Path | None, step: str) -> bool:
        """Return whether a command of a step has finished for a run, or its server is ready."""
        if run is None:
            return False
        for job in self.jobs.list_jobs(step, str(run)):
            status = job.status
            if status == "finished" or (status == "running" and job.is_server and job.is_ready):
                return True
        return False

    def _is_good(self, state: StudioState) -> bool:
        """Return whether the selected run is better than its model, and can be used."""
        verdict = self.judge(state)
        is_better = verdict is not None and verdict.level == "better"
        return is_better and bool(self._find_next_step(state))

    def _uses_tiny_model(self, state: StudioState) -> bool:
        """Return whether the selected run, or a training that the page starts, uses finesight-tiny.

        Data and labels without a run are trained with the model of the last recipe.
        """
        step = state.selection.step
        if step in ("label", "results", "chat", "export"):
            if state.run is not None:
                return get_model_name(self._read_run(state.run)) == TINY_MODEL
            if step != "label":
                return False
        recipes = [state.recipe] if state.recipe else state.content.recipes[:1]
        with contextlib.suppress(UserError):
            return all(self.workspace.load_recipe(one).model == TINY_MODEL for one in recipes)
        return False

    def select_arguments(self, operation: str, state: StudioState) -> dict[str, Any]:
        """Return the arguments of an operation that are selected.

        Raises UserError if no such item is selected.
        """
        dataset, recipe = state.dataset, state.recipe
        if operation == "check":
            if dataset is None:
                raise build_missing_error("data")
            against = [as_argument(dataset.eval_file)] if dataset.eval_file else []
            page = {"html": str(dataset.check_page), "language": state.selection.lang}
            return {"sources": [as_argument(dataset.train_file)], "against": against, **page}
        if operation in ("plan", "train", "search"):
            if recipe is None:
                raise build_missing_error("recipe")
            # `resume` also starts a run that does not exist yet.
            resume = {"resume": True} if operation == "train" else {}
            return {"recipe": as_argument(recipe), **resume}
        if state.run is None:
            raise build_missing_error("run")
        weights = self.workspace.find_weights(state.run)
        if weights is None:
            raise UserError(
                "the run has no weights yet",
                where=str(state.run),
                expected="a finished run, or a LoRA run with a checkpoint",
                remedy="select another run, or resume this one in the step Train",
            )
        name = {"merge": "source", "guard": "run"}.get(operation, "run_or_model")
        return {name: as_argument(weights)}

    def render_report(self, params: Mapping[str, Sequence[str]], selection: Selection) -> str:
        """Render the report of the selected run, or the comparison of several."""
        from finesight.report.compare_page import render_report  # slow to import

        known = {str(run) for run in self.workspace.scan().runs}
        runs = [Path(run) for run in params.get("run", []) if run in known]
        if not runs:
            raise UserError("no run is selected", expected="a run", remedy="select a run")
        folders = [self.workspace.folder / run for run in runs[:MAX_COMPARED_RUNS]]
        arguments = (folders, MAX_REPORT_EXAMPLES, selection.lang)
        return str(self.workspace.run_job(render_report, *arguments))

    def read_check_page(self, selection: Selection) -> str:
        """Return the page of the last check of the selected data set."""
        dataset = self.read_state(selection).dataset
        file = self.workspace.folder / dataset.check_page if dataset else None
        if file is None or not (file.is_file() and self.workspace.contains(file)):
            raise UserError("no check", expected="a checked data set", remedy="run the check")
        return read_text(file, expected="a page", remedy="run the check", max_bytes=MAX_PAGE_BYTES)

    def _build_charts(self, state: StudioState) -> list[Any]:
        """Return the curves of the run that the selected recipe has started."""
        if state.selection.step != "train" or state.recipe is None or state.run is None:
            return []
        return build_run_charts(self._read_run(state.run, MAX_SELECTED_BYTES))

    def find_run(self, recipe: Path) -> Path | None:
        """Return the output folder of a recipe, which may not exist yet."""
        folder = self.workspace.folder
        with contextlib.suppress(UserError):
            output_dir = folder / self.workspace.load_recipe(recipe).output_dir
            return Path(os.path.relpath(os.path.realpath(output_dir), folder))
        return None

    def _read_saved_time(self, recipe: Path | None) -> datetime | None:
        with contextlib.suppress(OSError):
            if recipe is not None:
                saved_s = (self.workspace.folder / recipe).stat().st_mtime
                return datetime.fromtimestamp(saved_s, UTC)
        return None

    def _find_page(self, state: StudioState) -> str:
        """Return the URL of the report or check to embed, with its version."""
        if state.selection.step == "results" and state.run:
            name, query = "report", {"run": str(state.run)}
            times = _read_times(self.workspace.folder / state.run)
        elif state.selection.step == "check" and state.dataset:
            name, query = "check", {"data": str(state.dataset.path)}
            times = _read_times(self.workspace.folder, str(state.dataset.check_page))
        else:
            return ""
        query |= {"lang": state.selection.lang, "version": str(max(times))}
        return f"view/{name}?{urlencode(query)}" if any(times) else ""

    def _find_next_step(self, state: StudioState) -> str:
        """Return the step after the selected one once its result exists; empty while it runs."""
        if state.job is not None and state.job.status == "running":
            return ""
        step, run = state.selection.step, state.run
        has_weights = run is not None and self.workspace.find_weights(run) is not None
        has_result = {
            "data": state.dataset is not None,
            "label": state.dataset is not None,
            "check": bool(self._find_page(state)),
            "plan": state.recipe is not None,
            "train": run is not None and self.read_status(run).kind == "finished",
            "results": has_weights,
            "chat": has_weights,
        }
        if not has_result.get(step):
            return ""
        # Imported data have labels.
        return "check" if step == "data" else STEPS[STEPS.index(step) + 1]

    def read_status(self, run: Path) -> RunStatus:
        """Return the status and progress of a run."""
        status = get_run_status(self._read_run(run))
        if status.kind == "killed":
            # It may have ended after its result was read, and is read again.
            status = get_run_status(self._read_run(run))
        if status.kind not in ("finished", "running"):
            # Before its first metric, the new process of a run has left no trace in its folder.
            jobs = (job for job in self.jobs.list_running() if job.arguments[0] == "train")
            if any(self.find_run(Path(job.target)) == run for job in jobs):
                return replace(status, kind="resuming")
        return status

    def build_card(self, run: Path) -> RunCard:
        """Return what the list shows of a run."""
        folder = self.workspace.folder / run
        changed_ns = max(*_read_times(folder), _read_times(folder, RECIPE_FILE)[0])
        listed = self._read_listed(run)
        return RunCard(
            path=run,
            status=self.read_status(run),
            verdict=compare_evaluations(listed.record),
            curve=listed.curve,
            image=self.find_image("run", run),
            changed_at=datetime.fromtimestamp(changed_ns / 1e9).astimezone(),
        )

    def find_image(self, kind: str, path: Path) -> str:
        """Return the URL of the image of a data set (`data`) or a run, with its version."""
        names = (RECIPE_FILE,) if kind == "run" else tuple(DATA_FILES)
        version = max(_read_times(self.workspace.folder / path, *names))
        return "view/image?" + urlencode({kind: str(path), "version": version})

    def _read_run(self, run: Path, max_bytes: int = 0) -> RunRecord:
        """Read a run, unless it has not changed since the last time.

        Args:
            max_bytes: Maximum size of its metrics, of which the middle is left out. 0: only what
                the list of runs shows.
        """
        if not max_bytes:
            return self._read_listed(run).record
        folder = self.workspace.folder / run
        return _read_run_version(folder, _read_times(folder), max_bytes)

    def _read_listed(self, run: Path) -> ListedRun:
        folder = self.workspace.folder / run
        return _read_listed_run(folder, _read_times(folder))


def _select_settings(step: Step) -> Step | None:
    """Return a step with the settings that a plan proposes, or None without any.

    The studio resumes the run of a recipe, so it needs no other output folder.
    """
    overrides: Any = step.arguments.get("overrides") or ()
    settings = [one for one in overrides if not one.startswith("output_dir=")]
    if not settings:
        return None
    return replace(step, arguments={**step.arguments, "overrides": settings})


def build_missing_error(name: str) -> UserError:
    """Build the error for an item that is not selected, or a field that is empty."""
    return UserError(MISSING_MESSAGES[name], where=name)


def _select(items: Sequence[Any], name: str, get_name: Any, use_first: bool) -> Any:
    """Return the item with a name, or None. Without a name, return the first one or None."""
    if not name:
        return items[0] if items and use_first else None
    return next((item for item in items if get_name(item) == name), None)


def _read_times(folder: Path, *names: str) -> tuple[int, ...]:
    """Return the times of files, by default those of a run, in ns; 0 for missing ones."""
    files = [folder / name for name in names or (METRICS_FILE, RESULT_FILE, GUARD_FILE)]
    return tuple(file.stat().st_mtime_ns if file.is_file() else 0 for file in files)


@lru_cache(maxsize=4)
def _read_run_version(folder: Path, versions: tuple[int, ...], max_bytes: int) -> RunRecord:
    # A run without its plug-ins must not hide the other runs.
    return read_run(folder, with_plugins=False, max_bytes=max_bytes)


@lru_cache(maxsize=2000)
def _read_listed_run(folder: Path, versions: tuple[int, ...]) -> ListedRun:
    """Return what the card of a run needs, since there may be many runs."""
    record = read_run(folder, with_plugins=False, max_bytes=MAX_LISTED_BYTES)
    listed = replace(
        record,
        steps=record.steps[-NUM_RECENT_STEPS:],
        recipe={},
        recipe_text="",
        skipped_samples=[],
        param_changes=None,
        guard={},
    )
    return ListedRun(listed, build_sparkline(record.steps))


def name_job(job: Job) -> str:
    """Return the name of a command on the page.

    Commands of another version have the name of a terminal.
    """
    return translate(JOB_TITLES.get(job.arguments[0], job.arguments[0]))


def name_item(item: Path | str) -> str:
    """Return the name of an item on the page, without the usual folder of its kind."""
    path = Path(item)
    if len(path.parts) == 2 and path.parts[0] in ("data", "models", "recipes", "runs"):
        return path.stem if path.suffix == ".yaml" else path.name
    return str(path)


def _format_launch(recipe: Path | None) -> str:
    """Return the command that writes the file of a job.

    It is empty without a recipe.
    """
    if recipe is None:
        return ""
    return f"finesight launch {shlex.quote(str(recipe))} --on LAUNCHER"


def _find_next_data(state: StudioState) -> str:
    """Return the data set for the links to other steps: after a review, that of the review."""
    dataset, selection = state.dataset, state.selection
    if selection.step == "label" and dataset is not None and dataset.source is None:
        reviews = (str(one.path) for one in state.content.datasets if one.source in dataset.files)
        return next(reviews, selection.data)
    return selection.data


def _name_step(step: Step) -> str:
    command, name = format_step(step), COMMAND_STEPS.get(step.operation)
    # A new recipe combines data sets. The page cannot fix data.
    name = "plan" if "data.train=" in command else name
    if name is None or "fix" in step.arguments:
        return command
    return translate("the step “{}”", translate(STEP_NAMES[name]))


def name_actions(advice: Remedy) -> str:
    """Replace operations and options in advice by steps and fields of the page.

    Messages of functions and commands name what a terminal has. Fields of other options have their
    names.
    """
    if isinstance(advice, Step):
        return advice.format(_name_step)

    def name_field(match: re.Match[str]) -> str:
        name = list_field_names().get(match[0])
        return f"“{re.split(r' ?[(（]', translate(name))[0]}”" if name else match[0]

    return _OPTION.sub(name_field, _NEXT_COLUMN.sub(r"\1", advice))
