"""Page of the studio: forms and buttons that start commands, and its web application."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

from anyio import to_thread
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from finesight.app.access import Access, AccessMiddleware
from finesight.app.pages import (
    VIEW_HEADERS,
    create_app,
    describe_error,
    parse_body,
    read_language,
    render_page,
    translate_texts,
)
from finesight.app.server import make_proxy_route
from finesight.app.studio_view import (
    CHECK_EXIT_CODES,
    LABELS_NAME,
    STEP_NAMES,
    Selection,
    StudioState,
    StudioView,
    name_actions,
)
from finesight.app.uploads import UploadStore
from finesight.app.workspace import STUDIO_FOLDER, TABLE_SUFFIXES, as_argument
from finesight.config import METRIC_NAMES
from finesight.data.image_header import IMAGE_SUFFIXES
from finesight.data.import_source import count_unlabeled_images
from finesight.errors import LABEL_TRAIN_FRACTION, UserError
from finesight.label.label_store import JOURNAL_FILE, AnswerKind
from finesight.model_folder import TINY_MODEL
from finesight.operations import find_operation
from finesight.operations.operation import OperationParameter, list_parameters
from finesight.storage import translate_os_errors

MAX_FIELD_CHARS, MAX_UPLOADS = 100_000, 10_000

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0e-\x1f\ud800-\udfff]")

Text = Annotated[str, Field(max_length=MAX_FIELD_CHARS)]
Name = Annotated[str, Field(max_length=64)]

API_KEY_FILE = "api-key"
DEFAULT_LABEL_FRACTION = str(LABEL_TRAIN_FRACTION)
DEFAULT_IMPORT_FRACTION = "0.9"

SCRIPT_TEXTS = ("The server does not answer.", "Mark at least two runs.")
"""Texts of the script, which are translated on the page."""


@dataclass(frozen=True, slots=True)
class ServerAccess:
    """Options by which the studio and its server are reached and protected.

    Attributes:
        api_port: Port of the HTTP API. 0: any free port.
        password: Password of the studio. None admits everyone.
        converter: Converter of llama.cpp for GGUF files. It runs as a program of this user.
    """

    password: str | None = None
    converter: Path | None = None
    api_port: int = 7872


@dataclass(frozen=True, slots=True)
class FormField:
    """Field of a form: a text, or a choice of names with a description of the empty one.

    Attributes:
        hint: Description below the field.
        kinds: Kinds of answers for which the field is shown; empty for all.
        is_advanced: Whether the field is folded.
    """

    name: str
    label: str
    placeholder: str = ""
    value: str = ""
    lines: int = 1
    choices: Sequence[str] = ()
    default: str = ""
    hint: str = ""
    kinds: Sequence[str] = ()
    is_advanced: bool = False


KINDS_OF_FIELDS = {"classes": ("classes", "boxes"), "fields": ("fields",)}
"""Kinds of answers by field of the label form that is shown for these kinds only."""

FORMS: dict[str, tuple[FormField, ...]] = {
    "import": (
        FormField("source", "Or a file or folder in the workspace", "photos"),
        FormField("name", "Name of the data set", "tickets"),
        FormField("prompt", "Prompt", "Read the ticket."),
        FormField(
            "columns",
            "Columns (empty: detected)",
            "image=path answer=caption",
            is_advanced=True,
        ),
    ),
    "label": (
        FormField("images", "Images to label: a file or folder", "photos"),
        FormField("label-prompt", "Prompt", "Read the ticket.", lines=2),
        FormField("labels-name", "Name of the data set", value=LABELS_NAME),
        FormField("label-model", "Model without a run", value=TINY_MODEL, is_advanced=True),
        FormField(
            "kind",
            "Kind of the answers",
            choices=get_args(AnswerKind),
            default="detect automatically",
        ),
        FormField("classes", "Classes", "red, green, blue", kinds=KINDS_OF_FIELDS["classes"]),
        FormField("fields", "Fields", "merchant, date, amount", kinds=KINDS_OF_FIELDS["fields"]),
        FormField(
            "label-fraction",
            "Fraction of training samples",
            value=DEFAULT_LABEL_FRACTION,
            is_advanced=True,
        ),
        FormField(
            "review-split",
            "Samples to review",
            choices=("for validation",),
            default="for training",
            is_advanced=True,
        ),
    ),
    "recipe": (
        FormField("recipe-name", "Name of the recipe and its run", "tickets"),
        FormField("model", "Model: a name on a hub, or a folder", value=TINY_MODEL),
        FormField(
            "eval.metric",
            "Metric (empty: chosen from the answers)",
            choices=[*METRIC_NAMES],
            is_advanced=True,
        ),
        FormField("train.epochs", "Epochs", "from the data", is_advanced=True),
        FormField("train.steps", "Steps instead of epochs", "from the data", is_advanced=True),
        FormField("train.learning_rate", "Learning rate", "from the model", is_advanced=True),
    ),
    "editor": (FormField("editor", "Selected recipe", lines=12),),
    "merge": (FormField("merged-name", "Name of the merged model", "tickets"),),
}
"""Fields of the forms of the page, by form."""

SERVER_PARAMETERS = ("host", "port", "password_file", "no_auth", "trusted_proxy", "key_file")
PAGE_PARAMETERS = ("socket_file", "open_page", "suggest_only", "push")
LABEL_STUDIO = ("label_studio", "label_studio_files", "label_studio_url", "label_studio_prompt")
OWN_PARAMETERS = {
    "import": ["prompt", "columns"],
    "label": ["prompt", "out", "kind", "classes", "fields", "review", "train_fraction"],
    "check": ["against", "html", "language"],
    "plan": [],
    "train": ["resume", "trust_metric"],
    "eval": ["trust_metric"],
    "web": [],
    "serve": [],
    "merge": [],
}
"""Operations that the page starts, with the options that it sets itself or has no use for."""

OPERATIONS_OF_STEPS = {
    "data": ("import",),
    "label": ("label",),
    "check": ("check",),
    "plan": ("plan",),
    "train": ("train",),
    "results": ("eval",),
    "chat": ("web",),
    "export": ("serve", "merge"),
}
"""Operations of each step with options."""

YES_NO = ("yes", "no")

RUN_LABELS = {"web": "Compare with another run", "serve": "Serve another run of the model, too"}
"""Label of the field for another run, by operation."""

QUESTIONS = (
    ("Describe images", "Describe the image."),
    ("Read text", "Read the text."),
    ("Read fields", "Read the fields as JSON."),
    ("Find objects", ""),
    ("Classify", "Which class does the image show?"),
    ("Answer questions", ""),
)
"""Tasks with a proposed prompt; empty for data sets with questions of their own."""

MISSING_MESSAGES = {
    "data": "No data set is selected. Select one, or import one in the step Data.",
    "recipe": "No recipe is selected. Select one, or create one in the step Plan.",
    "run": "No run is selected. Select one, or train one in the step Train.",
    "images": "No images are given. Enter a file or folder, or upload images in the step Data.",
    "review-split": "The data set has no validation samples. Review those for training.",
    "merged-name": "No merged model is given. Merge one, or enter its name.",
}
"""Message about a missing item or an empty field by its name."""


class Form(BaseModel, frozen=True):
    """Body of an action: texts by field, IDs of uploads, and further data sets of a recipe."""

    texts: dict[Name, Text] = {}
    uploads: Annotated[list[Name], Field(max_length=MAX_UPLOADS)] = []
    others: Annotated[list[Text], Field(max_length=1000)] = []

    def get(self, name: str) -> str:
        """Return the text of a field without outer spaces; empty for a missing one."""
        return self.texts.get(name, "").strip()


Action = Callable[[StudioState, Form], str]
"""Handler of a button: takes the state and the form, and returns the URL to open."""


def list_options(operation: str) -> list[OperationParameter]:
    """Return the options of an operation that the page does not set itself."""
    own = {*SERVER_PARAMETERS, *PAGE_PARAMETERS, *LABEL_STUDIO, *OWN_PARAMETERS[operation]}
    parameters = list_parameters(find_operation(operation).load())
    return [one for one in parameters if not one.is_positional and one.name not in own]


def _build_field(
    operation: str, parameter: OperationParameter, runs: Sequence[str] = ()
) -> FormField:
    """Build the field of an option; an empty one keeps the default.

    Args:
        runs: Other runs of the workspace, from which an option for a run is chosen.
    """
    name = f"{operation}:{parameter.name}"
    if parameter.info.metavar == "RUN" and runs:
        return FormField(name, RUN_LABELS[operation], choices=runs, default="none")
    is_flag = parameter.kind == "flag"
    default = parameter.default
    is_shown = not is_flag and default not in (None, (), "")
    return FormField(
        name,
        parameter.option.partition("/")[0],
        placeholder=str(default) if is_shown else parameter.info.metavar,
        # The empty choice keeps the default.
        choices=YES_NO if is_flag else [one for one in parameter.choices if one != default],
        default=str(default) if is_shown else "",
        hint=parameter.help,
        is_advanced=True,
    )


@dataclass(slots=True)
class StudioPage:
    """Forms of the steps and their actions. The lists and jobs are HTML from `StudioView`."""

    view: StudioView
    access: ServerAccess
    uploads: UploadStore
    actions: dict[str, Action] = field(init=False)

    def __post_init__(self) -> None:
        self.actions = {
            "import": self._import,
            "delete": self._delete,
            "label": self._label,
            "review": partial(self._label, review=True),
            "start": self._start_listed,
            "create-recipe": self._create_recipe,
            "save-recipe": self._save_recipe,
            "chat": self._chat,
            "serve": self._serve,
            "evaluate": self._evaluate,
            "merge": self._merge,
            "export": self._export,
            "stop": self._stop,
            "stop-again": partial(self._stop, again=True),
        }
        if self.access.converter is not None:
            self.actions["write-gguf"] = partial(self._export, write_gguf=True)

    def run_action(self, name: str, selection: Selection, form: Form) -> str:
        """Run the action of a button, and return the URL to open."""
        _check_texts(form)
        # An action applies to the items that the page shows, which its URL names.
        state = self.view.read_state(selection, use_newest=False)
        with translate_os_errors(self.view.workspace.folder):
            return self.actions[name](state, form)

    def render(self, selection: Selection) -> str:
        """Render the page with the values of its forms."""
        state = self.view.read_state(selection)
        values = self.read_values(state)
        digest = ""
        if state.recipe is not None:
            values["editor"], digest = self.view.workspace.read_recipe(state.recipe)
        # A review replaces the reviewed data set. Both have the same validation samples.
        used = state.dataset.files if state.dataset else set()
        others = [str(one.path) for one in state.content.datasets if not one.files & used]
        job = state.job
        runs = [str(run) for run in state.content.runs if run != state.run]
        return render_page(
            "studio.html",
            selection.lang,
            selection=state.selection,
            forms=FORMS,
            options={
                operation: [_build_field(operation, one, runs) for one in list_options(operation)]
                for operation in OPERATIONS_OF_STEPS.get(selection.step, ())
            },
            values=values,
            others=others,
            digest=digest,
            questions=QUESTIONS,
            has_data=bool(state.content.datasets),
            has_recipe=bool(state.content.recipes),
            has_weights=state.run is not None
            and self.view.workspace.find_weights(state.run) is not None,
            is_import_open=not state.content.datasets
            or (job is not None and bool(job.form) and job.status != "finished"),
            needs_prompt=not values["label-prompt"] and state.run is None,
            has_converter=self.access.converter is not None,
            settings={"texts": translate_texts(SCRIPT_TEXTS, selection.lang)},
        )

    def read_values(self, state: StudioState) -> dict[str, str]:
        """Return the values of the fields for the selected items, or those of the last command."""
        values = {one.name: one.value for fields in FORMS.values() for one in fields}
        values |= {f"{op}:{one.name}": "" for op in OWN_PARAMETERS for one in list_options(op)}
        values["import:train_fraction"] = DEFAULT_IMPORT_FRACTION
        selection, job = state.selection, state.job
        values["label-prompt"] = self.view.workspace.read_prompt(state.run, state.dataset)
        # Commands apply to the model that was merged last.
        merged = [job.arguments[2] for job in state.jobs if job.arguments[0] == "merge"]
        merged += [str(path) for path in state.content.models if path.parent == Path("models")]
        values["merged-name"] = Path((merged or [""])[0]).name
        is_label = selection.step == "label"
        # New images to label precede those of an earlier command.
        if job is not None and not selection.images and (is_label or job.status != "finished"):
            values |= job.form
        if selection.images:
            values["images"] = selection.images
            values["labels-name"] = (*Path(selection.images).parts, "", "")[1]
        return values

    def _read_options(self, operation: str, form: Form) -> list[str]:
        """Return the words of the options of an operation that a form sets."""
        words = []
        for parameter in list_options(operation):
            field = f"{operation}:{parameter.name}"
            text = form.get(field)
            if not text:
                continue
            if ".py:" in text:
                raise UserError(
                    f"{text!r:.80} is a program",
                    where=field,
                    expected="a name of finesight",
                    remedy="use it in a terminal",
                )
            try:
                words += parameter.format_words(self._parse_option(parameter, text))
            except UserError as error:
                # The page marks the field.
                raise UserError(
                    error.what, where=field, expected=error.expected, remedy=error.remedy
                ) from error
        return words

    def _parse_option(self, parameter: OperationParameter, text: str) -> object:
        """Return the value of an option that a user has entered. Paths are in the workspace."""
        if parameter.kind == "flag":
            return text == YES_NO[0]
        if parameter.info.path == "name":
            check = self.view.workspace.check_model
            return [*map(check, text.split())] if parameter.is_multiple else check(text)
        if parameter.is_multiple:
            return text.split()
        if parameter.kind == "path":
            must_exist = parameter.info.path.startswith("existing")
            path = self.view.workspace.resolve(text, parameter.name, must_exist=must_exist)
            return as_argument(path)
        if parameter.kind in ("integer", "number"):
            with contextlib.suppress(ValueError):
                number = int(text) if parameter.kind == "integer" else float(text)
                return parameter.convert(number)
        return parameter.convert(text)

    def _build_import(self, form: Form) -> tuple[Path, list[str]]:
        """Return the data set and the import command of a form. The source may be missing yet."""
        source, prompt, columns = form.get("source"), form.get("prompt"), form.get("columns")
        target = self.view.workspace.check_new_name("data", form.get("name"))
        path = self.view.workspace.resolve(source, "source") if source else Path("uploads/…")
        arguments = ["import", as_argument(path), str(target)]
        arguments += ["--prompt", prompt] if prompt else []
        try:
            pairs = shlex.split(columns)
        except ValueError as error:
            raise UserError(
                f"{columns!r:.200} has an open quote",
                where="columns",
                expected="ROLE=COLUMN pairs separated by spaces",
                remedy="for example image=path answer=caption",
            ) from error
        if source and not any(pairs):
            table, roles, box_format, box_units = self.view.workspace.detect_source(path)
            arguments[1] = as_argument(table)
            pairs = [f"{role}={column}" for role, column in roles.items()]
            arguments += ["--box-format", box_format] if box_format else []
            arguments += ["--box-units", box_units] if box_units else []
            if roles and "question" not in roles and not prompt:
                raise UserError(
                    "the field Prompt is empty, and the table has no column of questions",
                    where="prompt",
                    expected="a question about every image",
                    remedy="enter one, such as: Read the text.",
                )
        # The messages of commands write the option before each pair.
        pairs = [pair.removeprefix("--map=") for pair in pairs if pair not in ("", "--map")]
        arguments += [word for pair in pairs for word in ("--map", pair)]
        return target, [*arguments, *self._read_options("import", form)]

    def _import(self, state: StudioState, form: Form) -> str:
        workspace, name, source = self.view.workspace, form.get("name"), form.get("source")
        # The page fills in the path of an earlier upload for another attempt.
        if form.uploads and source.startswith("uploads/"):
            source = ""
        if bool(form.uploads) == bool(source):
            raise UserError(
                "an upload and a path are given" if source else "nothing to import is given",
                where="source",
                expected="an upload, or a file or folder in the workspace",
                remedy="clear one of them" if source else "upload files, or enter a path",
            )
        form = form.model_copy(update={"texts": {**form.texts, "source": source}})
        self._build_import(form)
        self._check_labels(source)
        is_new = False
        if form.uploads:
            if uses := self._find_commands(Path("uploads", name)):
                raise UserError(
                    f"the earlier upload is used by {uses[0]}",
                    where="name",
                    expected="the name of a data set that is not being imported",
                    remedy="wait for the end of the command, or choose another name",
                )
            folder = workspace.folder / "uploads" / name
            is_new = not folder.exists()
            source = str(workspace.save_uploads([*map(self.uploads.find, form.uploads)], name))
            files = [file for file in folder.rglob("[!.]*") if file.is_file()]
            if all(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
                # Images without a table are labeled in the next step.
                self.uploads.remove(form.uploads)
                return state.selection.link(step="label", images=source)
        try:
            form = form.model_copy(update={"texts": {**form.texts, "source": source}})
            target, arguments = self._build_import(form)
            url = self._start(state, str(target), arguments, data=str(target), form=form.texts)
            self.uploads.remove(form.uploads)
            return url
        except UserError:
            # A refused import leaves no uploads: the browser still has them.
            if is_new:
                workspace.move_to_trash(Path("uploads", name))
            raise

    def _find_commands(self, *folders: Path) -> list[str]:
        """Return the running commands that use a file in the folders or a parent folder."""
        return [
            f"the running command in the step {STEP_NAMES[job.step]}"
            for job in self.view.jobs.list_running()
            for word in job.arguments
            if any(self.view.workspace.is_overlapping(word, folder) for folder in folders)
        ]

    def _delete(self, state: StudioState, form: Form) -> str:
        """Delete the selected data set or, in the step Plan, recipe, unless something uses it."""
        if state.selection.step == "plan":
            return self._delete_recipe(state)
        if state.dataset is None:
            raise _missing("data")
        path, runs = state.dataset.path, state.content.runs
        running = [run for run in runs if self.view.describe_run(run).status == "running"]
        commands = self._find_commands(path, Path("uploads", path.name))
        paths = self.view.workspace.list_deleted(state.dataset, running, commands)
        self.view.workspace.move_to_trash(*paths)
        return state.selection.link(data="")

    def _delete_recipe(self, state: StudioState) -> str:
        if state.recipe is None:
            raise _missing("recipe")
        uses = self._find_commands(state.recipe)
        for run in state.content.runs:
            # A finished run needs the copy in its folder only.
            if run == self.view.find_run(state.recipe):
                is_finished = self.view.describe_run(run).status == "finished"
                uses += [] if is_finished else [f"the unfinished run {run}"]
        if uses or state.recipe.parent != Path("recipes"):
            raise UserError(
                f"{state.recipe} is used by {', '.join(uses)}"
                if uses
                else f"{state.recipe} was not created by the studio",
                where="delete",
                expected="a recipe in the folder recipes without an unfinished run",
                remedy="finish the run in the step Train" if uses else "delete it in a terminal",
            )
        self.view.workspace.move_to_trash(state.recipe)
        return state.selection.link(recipe="")

    def _check_labels(self, source: str) -> None:
        """Raise UserError for a folder of images without labels, before the import fails."""
        folder = self.view.workspace.folder / source
        if not source or not (count := count_unlabeled_images(folder)):
            return
        tables = [file for file in folder.parent.iterdir() if file.suffix in TABLE_SUFFIXES]
        remedies = [f"enter {Path(source).parent / file.name}" for file in sorted(tables)]
        raise UserError(
            f"{count} images without labels",
            where="source",
            expected="labels: a table, or a text or annotation file for each image",
            remedy=" or ".join([*remedies[:3], "label the images in the step Label"]),
        )

    def _create_recipe(self, state: StudioState, form: Form) -> str:
        if state.dataset is None:
            raise _missing("data")
        if form.get("train.epochs") and form.get("train.steps"):
            raise UserError(
                "both “Epochs” and “Steps instead of epochs” are given",
                where="train.epochs",
                expected="one of them, or none: then the data decide",
                remedy="clear one of the two fields",
            )
        settings = {one.name: form.get(one.name) for one in FORMS["recipe"] if "." in one.name}
        chosen = {str(state.dataset.path), *form.others}
        datasets = [one for one in state.content.datasets if str(one.path) in chosen]
        name, model = form.get("recipe-name"), form.get("model")
        recipe = self.view.workspace.create_recipe(name, datasets, model, settings)
        return state.selection.link(recipe=str(recipe))

    def _save_recipe(self, state: StudioState, form: Form) -> str:
        if state.recipe is None:
            raise _missing("recipe")
        text, digest = form.texts.get("editor", ""), form.get("digest")
        self.view.workspace.save_recipe(state.recipe, text, digest)
        return state.selection.link(recipe=str(state.recipe))

    def _find_weights(self, state: StudioState) -> str:
        """Return the weights of the selected run as an argument. Raises UserError without any."""
        if state.run is None:
            raise _missing("run")
        weights = self.view.workspace.find_weights(state.run)
        if weights is None:
            raise UserError(
                "the run has no weights yet",
                where=str(state.run),
                expected="a finished run, or a LoRA run with a checkpoint",
                remedy="select another run, or resume this one in the step Train",
            )
        return as_argument(weights)

    def _chat(self, state: StudioState, form: Form) -> str:
        arguments = ["web", self._find_weights(state), *self._read_options("web", form)]
        return self._start(state, state.target, arguments, has_page=True)

    def _label(self, state: StudioState, form: Form, *, review: bool = False) -> str:
        """Start the labelling page."""
        arguments = self._build_labels(state, form, review=review)
        return self._start(state, state.target, arguments, has_page=True, form=form.texts)

    def _build_labels(self, state: StudioState, form: Form, *, review: bool = False) -> list[str]:
        """Return the command with the selected run or, without weights of one, a model.

        An existing folder of labels is continued. A review is that of one file of the selected
        data set, and has a folder of its own.
        """
        name, fraction = form.get("labels-name"), form.get("label-fraction")
        kind, is_validation = form.get("kind"), bool(form.get("review-split"))
        if review:
            if state.dataset is None:
                raise _missing("data")
            if is_validation and state.dataset.eval_file is None:
                raise _missing("review-split")
            file = (is_validation and state.dataset.eval_file) or state.dataset.train_file
            source, target = self.view.workspace.open_review(file)
            # The other file of the data set keeps the split.
            fraction = "" if state.dataset.eval_file else fraction
        else:
            if not form.get("images"):
                raise _missing("images")
            source = self.view.workspace.resolve(form.get("images"), "images")
            target = Path("data", name)
        is_existing = review or (self.view.workspace.folder / target / JOURNAL_FILE).is_file()
        if not is_existing:
            target = self.view.workspace.check_new_name("data", name)
        elif not review:
            target = self.view.workspace.resolve(str(target), "labels-name")
        if is_existing and fraction == DEFAULT_LABEL_FRACTION:
            # The command continues with the fraction of the folder.
            fraction = ""
        weights = self.view.workspace.find_weights(state.run) if state.run else None
        run = (
            as_argument(weights)
            if weights
            else self.view.workspace.check_model(form.get("label-model"))
        )
        values = {"prompt": form.get("label-prompt"), "kind": kind, "train-fraction": fraction}
        values |= {key: form.get(key) for key, kinds in KINDS_OF_FIELDS.items() if kind in kinds}
        options = [f"--{key}={value}" for key, value in values.items() if value]
        options += ["--review"] if review else []
        options += self._read_options("label", form)
        return ["label", run, as_argument(source), *options, "--out", str(target)]

    def _serve(self, state: StudioState, form: Form) -> str:
        """Start the HTTP API, with an API key if the studio has a password.

        The key is the same for all servers of the workspace.
        """
        port = self.access.api_port
        if not port:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = int(free.getsockname()[1])
        arguments = ["serve", self._find_weights(state), "--port", str(port)]
        if self.access.password is not None:
            arguments += ["--key-file", str(self._write_api_key())]
        arguments += self._read_options("serve", form)
        return self._start(state, state.target, arguments, port=port)

    def _write_api_key(self) -> Path:
        """Return the file of the API key, which only this user can read."""
        path = Path(STUDIO_FOLDER, API_KEY_FILE)
        file = self.view.workspace.folder / path
        file.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w", encoding="utf-8") as stream:
                stream.write(secrets.token_urlsafe(32))
        return path

    def _merge(self, state: StudioState, form: Form) -> str:
        weights = self._find_weights(state)
        target = self.view.workspace.check_new_name("models", form.get("merged-name"))
        arguments = ["merge", weights, str(target), *self._read_options("merge", form)]
        return self._start(state, state.target, arguments)

    def _export(self, state: StudioState, form: Form, *, write_gguf: bool = False) -> str:
        """Print serving commands for a merged model, or write GGUF files."""
        name = form.get("merged-name")
        if not name:
            raise _missing("merged-name")
        model = self.view.workspace.resolve(f"models/{name}", "merged-name")
        arguments = ["export", str(model)]
        if write_gguf:
            target = self.view.workspace.check_new_name("gguf", name)
            arguments += [str(target), "--converter", str(self.access.converter)]
        return self._start(state, state.target, arguments)

    def _evaluate(self, state: StudioState, form: Form) -> str:
        arguments = ["eval", self._find_weights(state), *self._read_options("eval", form)]
        return self._start(state, state.target, arguments)

    def _stop(self, state: StudioState, form: Form, *, again: bool = False) -> str:
        job = self.view.jobs.find(state.selection.job)
        job.stop(again=again)
        return state.selection.link_job(job)

    def _start_listed(self, state: StudioState, form: Form) -> str:
        """Start the command that the page shows for the selection."""
        commands, is_check = self.view.list_commands(state), state.selection.step == "check"
        if not commands:
            raise _missing("data" if is_check else "recipe")
        is_train, run = state.selection.step == "train", ""
        command = [*commands[0], *self._read_options(state.selection.step, form)]
        if not is_check and state.recipe is not None:
            output_dir = self.view.workspace.load_recipe(state.recipe).output_dir
            folder = self.view.workspace.folder
            run = os.path.relpath(os.path.realpath(folder / output_dir), folder) if is_train else ""
            if is_train:
                self._check_labelling(state.recipe)
        if is_check and state.dataset is not None:
            result, codes = str(state.dataset.check_page), CHECK_EXIT_CODES
            return self._start(state, state.target, command, ok_exit_codes=codes, result=result)
        return self._start(state, state.target, command, run=run)

    def _check_labelling(self, recipe: Path) -> None:
        """Raise UserError if an open labelling page would change the data during the run."""
        workspace = self.view.workspace
        for job in self.view.jobs.list_running():
            folder = job.arguments[-1]
            root = os.path.realpath(workspace.folder / folder)
            if job.arguments[0] == "label" and workspace.uses_files(recipe, root):
                what = f"the run reads the labels of {folder}, whose labelling page is open"
                expected, remedy = "data that do not change", "stop the page in the step Label"
                raise UserError(what, where=str(recipe), expected=expected, remedy=remedy)

    def _start(
        self,
        state: StudioState,
        target: str,
        arguments: Sequence[str],
        *,
        data: str = "",
        run: str = "",
        **options: Any,
    ) -> str:
        """Start a command and return the URL of its job.

        Args:
            data: Data set that the command creates.
            run: Run that the command creates.
            options: Arguments of `JobStore.start`.
        """
        job = self.view.jobs.start(state.selection.step, target, arguments, **options)
        # The command creates these items, so they are selected before they exist.
        items = {"data": data, "run": run}
        return state.selection.link(
            job=job.id, images="", **{key: item for key, item in items.items() if item}
        )


def _check_texts(form: Form) -> None:
    """Raise UserError for a text that no argument of a command or file name can contain."""
    for name, text in form.texts.items():
        if controls := _CONTROL_CHARACTERS.findall(text):
            raise UserError(
                f"{text!r:.80} has the character {controls[0]!r}",
                where=name,
                expected="text without control characters",
                remedy="correct the field",
            )


def _missing(name: str) -> UserError:
    return UserError(MISSING_MESSAGES[name], where=name)


def make_studio_app(page: StudioPage, access: Access) -> AccessMiddleware:
    """Build the studio as an ASGI application with access control."""
    view = page.view

    def read_selection(request: Request) -> Selection:
        return Selection.parse(dict(request.query_params), read_language(request))

    def get_page(request: Request) -> Response:
        return HTMLResponse(page.render(read_selection(request)))

    def get_live(request: Request) -> Response:
        return JSONResponse(view.render(read_selection(request)))

    async def post_action(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in page.actions:
            raise HTTPException(404, "no such action")
        form = await parse_body(request, Form)
        url = await to_thread.run_sync(page.run_action, name, read_selection(request), form)
        return JSONResponse({"url": url})

    def get_view(request: Request) -> Response:
        selection, params = read_selection(request), request.query_params
        try:
            if request.path_params["name"] == "report":
                values = {key: params.getlist(key) for key in params}
                content = view.render_report(values, selection)
            else:
                content = view.read_check_page(selection)
        except UserError as error:
            raise HTTPException(404, describe_error(error, name_actions)) from error
        return HTMLResponse(content, headers=VIEW_HEADERS)

    routes = [
        Route("/", get_page),
        Route("/live", get_live),
        Route("/view/{name}", get_view),
        Route("/uploads", page.uploads.receive, methods=["POST"]),
        Route("/actions/{name}", post_action, methods=["POST"]),
        make_proxy_route(lambda job_id: view.jobs.find(job_id).socket),
    ]
    return AccessMiddleware(create_app(routes, name_actions), access)
