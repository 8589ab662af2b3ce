"""Page of the studio: forms and buttons that start commands, and its web application."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from anyio import to_thread
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from finesight.app.import_preview import (
    PreviewReply,
    PreviewSource,
    build_chosen_mapping,
    check_number,
    preview_source,
    render_preview,
)
from finesight.app.key_file import load_key_file
from finesight.app.model_cards import MODEL_CARDS, find_gpu_memory
from finesight.app.pages import (
    FILE_HEADERS,
    VIEW_HEADERS,
    UploadStore,
    create_app,
    describe_error,
    parse_body,
    render_page,
)
from finesight.app.program_use import ask_server, read_key
from finesight.app.request_jobs import RequestJobs, run_until_disconnect
from finesight.app.server import Access, AccessMiddleware, make_proxy_route
from finesight.app.studio_view import (
    FORMS,
    FORMS_OF_STEPS,
    IMPORT_SHARE,
    STEP_NAMES,
    YES_NO,
    Selection,
    StudioState,
    StudioView,
    build_form,
    build_missing_error,
    name_actions,
)
from finesight.app.thumbnail import EMPTY_IMAGE, read_thumbnail
from finesight.app.workspace import as_argument
from finesight.errors import LABEL_TRAIN_FRACTION, Step, UserError
from finesight.evaluate.answer_tables import TABLE_SUFFIXES
from finesight.files.storage import temporary_folder, translate_os_errors
from finesight.files.worker_pool import JobOutput, WorkerLimitError, WorkerLostError
from finesight.label.label_store import JOURNAL_FILE
from finesight.model_folder import TINY_MODEL
from finesight.operations.operation import Parameter, list_words
from finesight.report.i18n import get_language, translate
from finesight.samples.image_file import IMAGE_SUFFIXES
from finesight.serve.http_protocol import bind_socket
from finesight.synth.tickets import TICKET_FIELDS

MAX_FIELD_CHARS, MAX_UPLOADS = 100_000, 10_000

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0e-\x1f\ud800-\udfff]")

Text = Annotated[str, Field(max_length=MAX_FIELD_CHARS)]
Name = Annotated[str, Field(max_length=64)]

# The URL of an image has the version of its file.
IMAGE_HEADERS = {"cache-control": "private, max-age=3600", **FILE_HEADERS}

MAX_VIEW_JOBS = 2
"""Maximum number of reports that are rendered at the same time."""

MAX_IMAGE_JOBS = 2
"""Maximum number of images of cards that are read at the same time."""

MAX_PREVIEW_JOBS = 2
"""Maximum number of previews of imports at the same time."""

CLOSE_TIMEOUT_S = 15.0
"""Maximum duration of the end of a labelling page."""

STARTED_OPERATIONS = ("check", "eval", "guard", "merge", "plan", "search", "serve", "train", "web")
"""Operations that an action of their name starts with the selected items."""

DELETE_FOLDERS = {"data": "data", "recipe": "recipes", "run": "runs"}
DELETE_REMEDIES = {
    "data": "stop the command, or change or delete the recipe or other data set first",
    "recipe": "finish the run in the step Train",
    "run": "stop the command, or change the recipe or delete the other run first",
}
"""Folder of the items that can be deleted, and remedy for one in use, by kind."""

FIELDS_KIND = "fields"

QUESTIONS = (
    ("Describe images", "Describe the image.", "text", "describe"),
    ("Read text", "Read the text.", "text", "text"),
    ("Read fields", "Read the fields as JSON.", FIELDS_KIND, "fields"),
    ("Find objects", "", "boxes", "boxes"),
    ("Classify", "Which class does the image show?", "classes", "classes"),
    ("Answer questions", "", "text", "questions"),
)
"""Tasks with a proposed prompt, the kind of answers to label, and a drawing of the page.

Own questions have no proposed prompt.
"""

SOURCES = (
    ("images", "Images without answers", "Label some of them in the next step."),
    ("labels", "Images with answers", "A table, JSON, captions, boxes or folders of classes."),
)
"""What a user has: a drawing of the page, with a title and an explanation."""

SAMPLE_NAME = "tickets"
NUM_TICKETS, NUM_EVAL_TICKETS = 600, 100
"""Number of images of the sample project, and of those for validation."""


class Form(BaseModel, frozen=True):
    """Body of an action.

    Attributes:
        texts: Texts by field.
        uploads: IDs of uploads.
        others: Further data sets of a recipe.
        roles: Role by path of the records of an import, as chosen in its preview.
    """

    texts: dict[Name, Text] = {}
    uploads: Annotated[list[Name], Field(max_length=MAX_UPLOADS)] = []
    others: Annotated[list[Text], Field(max_length=1000)] = []
    roles: dict[Text, Name] = {}

    def get(self, name: str) -> str:
        """Return the text of a field without outer spaces; empty for a missing one."""
        return self.texts.get(name, "").strip()


def check_texts(form: Form) -> None:
    """Raise UserError for a field with control characters."""
    for key, text in form.texts.items():
        # No argument of a command or file name can contain them.
        if controls := _CONTROL_CHARACTERS.findall(text):
            raise UserError(
                f"{text!r:.80} has the character {controls[0]!r}",
                where=key,
                expected="text without control characters",
                remedy="correct the field",
            )


Action = Callable[[StudioState, Form], str]
"""Handler of a button: takes the state and the form, and returns the URL to open."""


@dataclass(slots=True)
class ImportRequest:
    """Checked form of an import.

    Attributes:
        texts: Fields for another attempt, with the path of the stored upload.
        arguments: Arguments of the command except for the source.
        source: Source of the command.
        new_upload: Folder of uploads that did not exist before; None without one.
        label_url: URL of the step Label for images without a table; empty for other data.
    """

    texts: dict[str, str]
    arguments: dict[str, Any]
    source: str = ""
    new_upload: Path | None = None
    label_url: str = ""


@dataclass(slots=True)
class StudioPage:
    """Forms of the steps and their actions, between the lists and jobs of `StudioView`.

    Attributes:
        has_password: Whether the studio has a password. Its servers then require an API key.
        teacher: Address of the only server that may suggest labels.
        api_port: Port of the HTTP API. 0: any free port.
    """

    view: StudioView
    uploads: UploadStore
    has_password: bool = False
    teacher: str | None = None
    api_port: int = 7872
    actions: dict[str, Action] = field(init=False)

    def __post_init__(self) -> None:
        self.actions = {
            "import": self._import,
            "sample": self._import_sample,
            "delete": self._delete,
            "label": self._label,
            "review": partial(self._label, review=True),
            "create-recipe": self._create_recipe,
            "save-recipe": self._save_recipe,
            "train-now": self._train_now,
            "export": self._export,
            "quantize": partial(self._export, quantize="w4a16"),
            "predict": self._predict,
            "follow": self._follow,
            "stop": self._stop,
            "stop-again": partial(self._stop, again=True),
        }
        for operation in STARTED_OPERATIONS:
            self.actions[operation] = partial(self._run, operation=operation)

    def run_action(self, name: str, selection: Selection, form: Form) -> str:
        """Run the action of a button, and return the URL to open."""
        check_texts(form)
        # An action applies to the items that the page shows, which its URL names.
        state = self.view.read_state(selection, use_newest=False)
        with translate_os_errors(self.view.workspace.folder):
            return self.actions[name](state, form)

    def render(self, selection: Selection) -> str:
        """Render the page with the values of its forms."""
        state = self.view.read_state(selection)
        values, digest, job = self.read_values(state), "", state.job
        shown = self.view.describe(state)
        if state.recipe is not None:
            values["editor:text"], digest = self.view.workspace.read_recipe(state.recipe)
        # A review replaces the reviewed data set. Both have the same validation samples.
        used = state.dataset.files if state.dataset else set()
        image_folders = self.view.workspace.list_uploads() if selection.step == "chat" else []
        others = [one.path for one in state.content.datasets if not one.files & used]
        runs = [str(run) for run in state.content.runs if run != state.run]
        return render_page(
            "studio.html",
            **shown,
            forms={form: build_form(form, runs) for form in FORMS_OF_STEPS[selection.step]},
            values=values,
            others=others,
            image_folders=image_folders,
            digest=digest,
            questions=QUESTIONS,
            sources=SOURCES,
            num_tickets=NUM_TICKETS,
            taken_names=self._list_taken_names(state),
            model_cards=MODEL_CARDS,
            gpu_gb=find_gpu_memory() if selection.step == "plan" else 0.0,
            num_train=state.dataset.num_train if state.dataset else 0,
            is_import_open=not state.content.datasets
            or (job is not None and bool(job.form) and job.status != "finished"),
            needs_prompt=not values["label:prompt"] and state.run is None,
            has_password=self.has_password,
        )

    def _list_taken_names(self, state: StudioState) -> list[str]:
        """Return the names of data sets and uploads, which a new data set does not get."""
        names = {one.path.name for one in state.content.datasets}
        with contextlib.suppress(OSError):
            names.update(os.listdir(self.view.workspace.folder / "uploads"))
        return sorted(names)

    def read_values(self, state: StudioState) -> dict[str, str]:
        """Return the values of the fields for the selected items, or those of the last command."""
        values = {one.name: one.value for form in FORMS for one in build_form(form)}
        selection, job = state.selection, state.job
        if selection.step in ("label", "chat"):
            prompt = self.view.workspace.read_prompt(state.run, state.dataset)
            values |= {"label:prompt": prompt, "predict:prompt": prompt}
            paths = ("answers/{}", "uploads/{}")
            values["predict:out"] = self.view.workspace.find_free_name("answers", *paths)
        # The field names the model of later commands, too: by default, that of the last merge.
        merges = [one.arguments for one in state.jobs if one.arguments[0] == "merge"]
        merged = [name for words in merges for name in words[2:3]]
        merged += [str(path) for path in state.content.models if path.parent == Path("models")]
        values["merge:out"] = Path((*merged, state.run or "")[0]).name
        values["import:out"] = self.view.workspace.find_free_name("images", "data/{}", "uploads/{}")
        if state.dataset is not None:
            name, paths = state.dataset.path.name, ("recipes/{}.yaml", "runs/{}")
            values["recipe:name"] = self.view.workspace.find_free_name(name, *paths)
        with contextlib.suppress(UserError, IndexError):
            recipe = state.recipe or state.content.recipes[0]
            values["recipe:model"] = str(self.view.workspace.load_recipe(recipe).model)
        # New images to label precede those of an earlier command.
        if job and not selection.images and (selection.step == "label" or job.status != "finished"):
            values |= job.form
        if state.run is not None:
            values["eval:out"] = self._propose_answers_file(state.run)
        if selection.images:
            values |= {"label:sources": selection.images, "label:kind": selection.kind}
            values["label:prompt"] = selection.prompt or values["label:prompt"]
            values["label:out"] = (*Path(selection.images).parts, "", "")[1]
        return values

    def _propose_answers_file(self, run: Path) -> str:
        name = f"{run.name}-eval"
        return self.view.workspace.find_answers_file(name, self._list_written_files())

    def _list_written_files(self) -> set[str]:
        """Return the files and folders that running commands write."""
        return {job.out for job in self.view.jobs.list_running()}

    def _read_form(self, name: str, form: Form) -> dict[str, Any]:
        """Return the arguments of an operation that a form gives."""
        arguments = {}
        for one in build_form(name):
            text, parameter = form.get(one.name), one.parameter
            if one.kinds and form.get("label:kind") not in one.kinds:
                continue
            if parameter is not None and (text or one.folder):
                try:
                    arguments[parameter.name] = self._parse(parameter, one.folder, text)
                except UserError as error:
                    error.where = one.name  # The page marks the field.
                    raise
        return arguments

    def _parse(self, parameter: Parameter, folder: str, text: str) -> object:
        """Return the value that a user has entered. Paths are in the workspace.

        Args:
            folder: Folder in which it is the name of a new item; empty for other values.
        """
        workspace = self.view.workspace
        if ".py:" in text:
            raise UserError(
                f"{text!r:.80} is a program",
                expected="a name of finesight",
                remedy="use it in a terminal",
            )
        if folder:
            return workspace.check_new_name(folder, text)
        if parameter.kind == "flag":
            return text == YES_NO[0]
        if parameter.path == "file":
            return as_argument(workspace.check_new_file(text, self._list_written_files()))
        if parameter.kind == "path":
            must_exist = parameter.path.startswith("existing")
            return as_argument(workspace.resolve(text, "", must_exist=must_exist))
        is_model = parameter.path in ("name", "server") and text != self.teacher
        check = workspace.check_model if is_model else str
        if parameter.is_multiple:
            # The messages of commands write the option before each value.
            try:
                words = [word.removeprefix("--map=") for word in shlex.split(text)]
            except ValueError as error:
                what = f"{text!r:.200} has an open quote"
                raise UserError(what, remedy="close the quote") from error
            values = [check(word) for word in words if word != "--map"]
            parameter.convert(values)
            return values
        number = {"integer": int, "number": float}.get(parameter.kind, check)
        with contextlib.suppress(ValueError):
            text = number(text)
        parameter.convert(text)
        return text

    def _import(self, state: StudioState, form: Form) -> str:
        request = self._read_import(state, form)
        if request.label_url:
            return request.label_url
        with self._keep_uploads(form, request):
            self._choose_roles(form, request)
            arguments = {**request.arguments, "source": request.source}
            target = str(arguments["out"])
            return self._start(
                state, "import", arguments, target=target, data=target, form=request.texts
            )

    def _import_sample(self, state: StudioState, form: Form) -> str:
        """Draw the images of a sample project, and import them."""
        workspace = self.view.workspace
        name = workspace.find_free_name(SAMPLE_NAME, "data/{}", "uploads/{}")
        arguments = {
            "source": as_argument(workspace.create_sample(name, NUM_TICKETS)),
            "out": workspace.check_new_name("data", name),
            "columns": {"image": "image", "fields": ",".join(TICKET_FIELDS)},
            "prompt": translate("Read the ticket."),
            "eval_last": NUM_EVAL_TICKETS,
        }
        target = str(arguments["out"])
        return self._start(state, "import", arguments, target=target, data=target)

    def preview_import(self, selection: Selection, form: Form) -> dict[str, str]:
        """Render the preview of an import, without a data set.

        Returns:
            `section`, the HTML of the preview, and `source`, the path of the stored upload. For
            images without a table, `url` of the step Label instead.
        """
        check_texts(form)
        state = self.view.read_state(selection, use_newest=False)
        workspace = self.view.workspace
        with translate_os_errors(workspace.folder):
            request = self._read_import(state, form)
            if request.label_url:
                return {"url": request.label_url}
            with self._keep_uploads(form, request):
                mapping = request.arguments.get("mapping")
                has_choices = mapping is None or workspace.is_own_mapping(Path(mapping))
                self._choose_roles(form, request)
                reply = self._run_preview(preview_source, request, dict(form.roles), has_choices)
                preview = PreviewReply.model_validate(reply)
        # The command does not know the task: it gets the roles of the fields.
        is_chosen = bool(form.roles) or request.texts.get("import:kind") == FIELDS_KIND
        section = render_preview(preview, is_chosen=is_chosen, name_actions=name_actions)
        return {"section": section, "source": request.texts["import:source"]}

    def _read_import(self, state: StudioState, form: Form) -> ImportRequest:
        """Check the form of an import, and store its uploads."""
        workspace = self.view.workspace
        name = form.get("import:out")
        source = form.get("import:source")
        uploads = Path("uploads", name)
        # The page fills in the path of an earlier upload for another attempt.
        if form.uploads and source.startswith("uploads/"):
            source = ""
        if bool(form.uploads) == bool(source):
            raise build_missing_error("files")
        check_number(form.roles)
        texts = {**form.texts, "import:source": source}
        if form.get("import:eval_last") and form.get("import:train_fraction") == IMPORT_SHARE:
            # The form contains this share by default, and an import accepts one of the two.
            del texts["import:train_fraction"]
        request = ImportRequest(
            texts, self._read_form("import", form.model_copy(update={"texts": texts}))
        )
        if form.uploads:
            if uses := self._find_commands(uploads):
                raise UserError(
                    f"the earlier upload is used by {uses[0]}",
                    where="import:out",
                    expected="the name of a data set that is not being imported",
                    remedy="wait for the end of the command, or choose another name",
                )
            folder = workspace.folder / uploads
            is_new = not folder.exists()
            source = str(workspace.save_uploads([*map(self.uploads.find, form.uploads)], name))
            if is_new:
                request.new_upload = uploads
            files = [file for file in folder.rglob("[!.]*") if file.is_file()]
            if all(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
                # Images without a table are labeled in the next step.
                self.uploads.remove(form.uploads)
                prompt, kind = form.get("import:prompt"), form.get("import:kind")
                request.label_url = state.selection.link(
                    step="label", images=source, prompt=prompt, kind=kind
                )
                return request
        request.texts["import:source"] = source
        with self._keep_uploads(form, request, removes_files=False):
            request.source = as_argument(workspace.resolve(source, "import:source"))
        return request

    @contextlib.contextmanager
    def _keep_uploads(
        self, form: Form, request: ImportRequest, *, removes_files: bool = True
    ) -> Iterator[None]:
        """Move new uploads to the trash on an error: the browser still has the files.

        Args:
            removes_files: Whether the received files are removed at the end.
        """
        try:
            yield
        except (UserError, WorkerLostError):
            if request.new_upload is not None:
                self.view.workspace.move_to_trash(request.new_upload)
            raise
        if removes_files:
            self.uploads.remove(form.uploads)

    def _choose_roles(self, form: Form, request: ImportRequest) -> None:
        """Write the chosen roles to a mapping file, which the import reads."""
        if not form.roles:
            return
        for option in ("columns", "format", "mapping", "box_format", "box_units", "box_task"):
            request.arguments.pop(option, None)
            request.texts.pop(f"import:{option}", None)
        name = form.get("import:out")
        text = self._run_preview(build_chosen_mapping, request, dict(form.roles))
        mapping = self.view.workspace.save_mapping(name, text)
        request.arguments["mapping"] = as_argument(mapping)
        request.texts["import:mapping"] = str(mapping)

    def _run_preview(
        self, function: Callable[..., JobOutput], request: ImportRequest, *values: object
    ) -> Any:
        """Run a function of `import_preview` in a worker process."""
        arguments = {key: value for key, value in request.arguments.items() if key != "out"}
        wants_fields = request.texts.get("import:kind") == FIELDS_KIND
        with temporary_folder("preview") as scratch:
            folder = self.view.workspace.folder
            source = PreviewSource(
                folder, scratch.resolve(), request.source, arguments, wants_fields
            )
            try:
                return self.view.workspace.run_job(function, source, *values)
            except WorkerLimitError as error:
                raise UserError(
                    f"there is no preview: it {error.what}",
                    expected="a source of which the first rows can be read within these limits",
                    remedy="import it without a preview",
                ) from error

    def _find_commands(self, *folders: Path) -> list[str]:
        """Return the running commands that use a file in the folders or a parent folder."""
        return [
            f"the running command in the step {STEP_NAMES[job.step]}"
            for job in self.view.jobs.list_running()
            for word in job.arguments
            if any(self.view.workspace.is_overlapping(word, folder) for folder in folders)
        ]

    def _delete(self, state: StudioState, form: Form) -> str:
        """Delete the data set, the recipe or the run that the step selects, unless it is used."""
        workspace = self.view.workspace
        kind = {"plan": "recipe", "results": "run"}.get(state.selection.step, "data")
        status = {run: self.view.read_status(run).kind for run in state.content.runs}
        running = [run for run, one in status.items() if one in ("running", "resuming")]
        if kind == "data":
            paths = workspace.list_deleted(state.dataset, running) if state.dataset else []
        else:
            item = state.run if kind == "run" else state.recipe
            paths = [item] if item else []
        if not paths:
            raise build_missing_error(kind)
        path, problem, remedy = paths[0], "", DELETE_REMEDIES[kind]
        uses = self._find_commands(*paths)
        if kind == "data":
            uses += self._find_commands(Path("uploads", path.name))
            uses += workspace.find_uses(path, running)
        elif kind == "run":
            if path in running:
                uses.append("its training")
            # Another run may need its weights: as a base model, an adapter or a teacher.
            uses += workspace.find_uses(path, [run for run in state.content.runs if run != path])
        elif status.get(run := self.view.find_run(path) or path, "finished") != "finished":
            # A finished run needs the copy in its folder only.
            uses.append(f"the unfinished run {run}")
        if path.parts[:-1] != (DELETE_FOLDERS[kind],):
            problem = f"{path} was not created by the studio"
            remedy = "delete it with another program"
        elif items := workspace.list_inside(path):
            problem = f"{path} contains {', '.join(map(str, items))}"
            remedy = "move the other items to another folder first"
        elif uses:
            problem = f"{path} is used by {', '.join(dict.fromkeys(uses))}"
        if problem:
            expected = f"an item of the folder {DELETE_FOLDERS[kind]} that nothing uses"
            raise UserError(problem, where="delete", expected=expected, remedy=remedy)
        workspace.move_to_trash(*paths)
        return state.selection.link(**{kind: ""})

    def _create_recipe(self, state: StudioState, form: Form) -> str:
        if state.dataset is None:
            raise build_missing_error("data")
        texts = {one.name.partition(":")[2]: form.get(one.name) for one in build_form("recipe")}
        name, model = texts.pop("name"), texts.pop("model")
        if texts["train.epochs"] and texts["train.steps"]:
            raise UserError(
                "both “Epochs” and “Steps instead of epochs” are given",
                where="recipe:train.epochs",
                expected="one of them, or none: then the data decide",
                remedy="clear one of the two fields",
            )
        chosen = {str(state.dataset.path), *form.others}
        datasets = [one for one in state.content.datasets if str(one.path) in chosen]
        recipe = self.view.workspace.create_recipe(name, datasets, model, texts)
        return state.selection.link(recipe=str(recipe))

    def _save_recipe(self, state: StudioState, form: Form) -> str:
        if state.recipe is None:
            raise build_missing_error("recipe")
        text, digest = form.texts.get("editor:text", ""), form.get("digest")
        self.view.workspace.save_recipe(state.recipe, text, digest)
        return state.selection.link(recipe=str(state.recipe))

    def _train_now(self, state: StudioState, form: Form) -> str:
        """Train the selected data set with the recipe that the form of the step Plan proposes."""
        if trained := [one.target for one in self.view.jobs.list_running() if one.step == "train"]:
            raise UserError(
                f"a training of {trained[0]} is running",
                expected="one training at a time",
                remedy="wait for its end, or stop it in the step Train",
            )
        values = self.read_values(state)
        self._create_recipe(state, Form(texts=values))
        recipe = f"recipes/{values['recipe:name']}.yaml"
        selection = Selection(step="train", recipe=recipe, lang=state.selection.lang)
        return self._run(self.view.read_state(selection, use_newest=False), form, operation="train")

    def _run(self, state: StudioState, form: Form, *, operation: str) -> str:
        """Start the operation of a form."""
        options = dict[str, Any]()
        arguments = self.view.select_arguments(operation, state)
        arguments |= self._read_form(operation, form)
        if state.recipe is not None and operation in ("plan", "search", "train"):
            self.view.workspace.load_recipe(state.recipe)  # raises the error of an invalid one
            if operation != "plan":
                self._close_labelling(state.recipe)
            if operation == "train":
                options["run"] = str(self.view.find_run(state.recipe))
        elif operation == "web":
            options["has_page"] = True
        elif operation == "serve":
            # The answers of another server at this port would look like those of this one.
            with bind_socket("127.0.0.1", self.api_port) as free:
                options["port"] = arguments["port"] = int(free.getsockname()[1])
            if self.has_password:
                arguments["key_file"] = load_key_file()
        return self._start(state, operation, arguments, **options)

    def _predict(self, state: StudioState, form: Form) -> str:
        """Start a command that answers a question about each of many images."""
        name, texts = form.get("predict:out"), dict(form.texts)
        if Path(name).suffix.lower() in TABLE_SUFFIXES:
            # The command would write one file, but the page has those of a folder.
            name = texts["predict:out"] = Path(name).stem
        if bool(form.uploads) == bool(form.get("predict:images")):
            raise build_missing_error("files")
        workspace = self.view.workspace
        workspace.check_new_name("answers", name)
        # Another tab may have proposed the same name, and its command may still be running.
        name = workspace.find_free_name(name, "answers/{}", taken=self._list_written_files())
        texts["predict:out"] = name
        if not form.uploads:
            return self._run(state, form.model_copy(update={"texts": texts}), operation="predict")
        files = [*map(self.uploads.find, form.uploads)]
        # The files of an earlier reading would be read again.
        folder = workspace.find_free_name(name, "uploads/{}")
        texts["predict:images"] = str(workspace.save_uploads(files, folder))
        try:
            url = self._run(state, form.model_copy(update={"texts": texts}), operation="predict")
        except UserError:
            workspace.move_to_trash(Path("uploads", folder))
            raise
        self.uploads.remove(form.uploads)
        return url

    def _label(self, state: StudioState, form: Form, *, review: bool = False) -> str:
        """Start the labelling page with the selected run or, without weights of one, a model.

        An existing folder of labels is continued. A review is that of one file of the selected
        data set, and has a folder of its own.
        """
        workspace, arguments = self.view.workspace, self._read_form("label", form)
        name, is_validation = form.get("label:out"), bool(form.get("label:split"))
        if review:
            if state.dataset is None:
                raise build_missing_error("data")
            if is_validation and state.dataset.eval_file is None:
                raise build_missing_error("label:split")
            file = (is_validation and state.dataset.eval_file) or state.dataset.train_file
            source, target = workspace.open_review(file)
            arguments["review"] = True
            if state.dataset.eval_file:
                # The other file of the data set keeps the split.
                arguments.pop("train_fraction", None)
        elif not form.get("label:sources"):
            raise build_missing_error("label:sources")
        else:
            source = workspace.resolve(form.get("label:sources"), "label:sources")
            target = Path("data", name)
        if not (review or (workspace.folder / target / JOURNAL_FILE).is_file()):
            target = workspace.check_new_name("data", name)
            if arguments.get("kind") == "fields" and not (state.run or arguments.get("fields")):
                raise build_missing_error("label:fields")
        else:
            target = target if review else workspace.resolve(str(target), "label:out")
            if arguments.get("train_fraction") == LABEL_TRAIN_FRACTION:
                # The command continues with the fraction of the folder.
                del arguments["train_fraction"]
        weights = workspace.find_weights(state.run) if state.run else None
        arguments |= {"sources": [as_argument(source)], "out": target}
        arguments.setdefault("run_or_model", TINY_MODEL)
        if weights is not None:
            arguments["run_or_model"] = as_argument(weights)
        return self._start(state, "label", arguments, has_page=True, form=form.texts)

    def _export(self, state: StudioState, form: Form, *, quantize: str = "") -> str:
        """Print serving commands for a merged model, or quantize the run."""
        name = form.get("merge:out")
        if not name:
            raise build_missing_error("merge:out")
        workspace = self.view.workspace
        if quantize:
            arguments = self.view.select_arguments("merge", state) | {"quantize": quantize}
            arguments["out"] = workspace.check_new_name("models", f"{name}-{quantize}")
        else:
            arguments = {"source": workspace.resolve(f"models/{name}", "merge:out")}
        return self._start(state, "export", arguments)

    def _stop(self, state: StudioState, form: Form, *, again: bool = False) -> str:
        """Stop a command. The page stays where it is, since it also lists those of other steps."""
        self.view.jobs.find(state.selection.job).stop(again=again)
        return ""

    def _follow(self, state: StudioState, form: Form) -> str:
        """Follow a proposal: change the recipe, write another one, correct data, or open a step."""
        workspace, proposals = self.view.workspace, self.view.list_proposals(state)
        step = next((one for _, one in proposals if one.operation == form.get("operation")), None)
        if step is None:
            raise build_missing_error("operation")
        overrides: Any = step.arguments.get("overrides", ())
        if step.operation == "check" and state.dataset is not None:
            name = workspace.find_free_name(f"{state.dataset.path.name}-fixed", "data/{}")
            fixed = workspace.check_new_name("data", name)
            arguments, target = {**step.arguments, "fix": fixed}, str(fixed)
            return self._start(state, "check", arguments, target=target, data=target)
        if state.selection.step == "plan" and state.recipe is not None:
            workspace.change_recipe(state.recipe, overrides)
            return state.selection.link(job=state.selection.job)
        if step.operation != "train":
            steps = {"label": "label", "report": "results", "serve": "export"}
            return state.selection.link(step=steps[step.operation], run=str(state.run))
        recipe = workspace.copy_recipe(Path(str(step.arguments["recipe"])), overrides)
        return state.selection.link(step="train", recipe=str(recipe), run="")

    def _close_labelling(self, recipe: Path) -> None:
        """End the labelling of the data of a recipe, which would change during its run.

        Each decision is saved at once. Raises UserError if a labelling page does not end.
        """
        workspace = self.view.workspace
        end = time.monotonic() + CLOSE_TIMEOUT_S
        for job in self.view.jobs.list_running():
            if job.arguments[0] != "label" or not workspace.uses_files(recipe, Path(job.out)):
                continue
            job.stop()
            while job.status == "running" and time.monotonic() < end:
                time.sleep(0.05)
            if job.status == "running":
                raise UserError(
                    f"the run reads the labels of {job.out}, whose labelling page is open",
                    where=str(recipe),
                    expected="data that do not change",
                    remedy="stop it under “Running”",
                )

    def _start(
        self,
        state: StudioState,
        operation: str,
        arguments: Mapping[str, object],
        *,
        target: str | None = None,
        data: str = "",
        run: str = "",
        **options: Any,
    ) -> str:
        """Start an operation and return the URL of its job.

        Args:
            target: Item that the job belongs to, by default the selected one.
            data: Data set that the command creates.
            run: Run that the command creates.
            options: Arguments of `JobStore.start`.
        """
        words = list_words(Step(operation, arguments))
        target = state.target if target is None else target
        job = self.view.jobs.start(state.selection.step, target, words, **options)
        # The command creates these items, so they are selected before they exist.
        items = {"run": run} if run else {}
        if data:
            items = {"data": data, "recipe": "", "run": ""}
        return state.selection.link(job=job.id, images="", prompt="", kind="", **items)


def read_selection(request: Request) -> Selection:
    """Read the selection in the URL of a request."""
    return Selection.parse(dict(request.query_params), get_language())


def make_preview_route(page: StudioPage) -> Route:
    """Build the route for previews of imports, which end when their client disconnects."""
    jobs = RequestJobs(MAX_PREVIEW_JOBS)

    async def post_preview(request: Request) -> Response:
        form = await parse_body(request, Form)
        preview = partial(page.preview_import, read_selection(request), form)
        return JSONResponse(await jobs.run(request, preview))

    return Route("/preview", post_preview, methods=["POST"])


def make_program_routes(view: StudioView) -> list[Route]:
    """Build the routes of the key and the test of a server."""
    image_jobs = RequestJobs(1)
    testing = set[str]()

    async def post_key(request: Request) -> Response:
        job = view.jobs.find(request.path_params["job"])
        content = {"key": await to_thread.run_sync(read_key, job)}
        return JSONResponse(content, headers={"cache-control": "no-store"})

    async def post_test(request: Request) -> Response:
        await request.body()
        job = view.jobs.find(request.path_params["job"])
        if job.id in testing:
            raise UserError(
                "a test of this server is running",
                where="job",
                expected="one test at a time",
                remedy="wait for its answer",
            )
        testing.add(job.id)
        try:
            content = await image_jobs.run(request, partial(view.read_example, job))
            if content is None:
                raise UserError(
                    "there is no example image",
                    where="job",
                    expected="data of the run in the workspace",
                    remedy="try the model in the step Use with images of your own",
                )
            start = time.monotonic()
            answer = await run_until_disconnect(request, partial(ask_server, job, content))
            seconds = time.monotonic() - start
        finally:
            testing.discard(job.id)
        urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        reply = {"answer": answer, "images": urls, "seconds": f"{seconds:.1f}"}
        return JSONResponse(reply, headers={"cache-control": "no-store"})

    return [
        Route("/servers/{job}/key", post_key, methods=["POST"]),
        Route("/servers/{job}/test", post_test, methods=["POST"]),
    ]


def make_studio_app(page: StudioPage, access: Access) -> AccessMiddleware:
    """Build the studio as an ASGI application with access control."""
    view = page.view
    view_jobs = RequestJobs(MAX_VIEW_JOBS)
    image_jobs = RequestJobs(MAX_IMAGE_JOBS)

    def get_page(request: Request) -> Response:
        return HTMLResponse(page.render(read_selection(request)))

    async def post_action(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in page.actions:
            raise HTTPException(404, f"no such action: {name!r:.80}")
        form = await parse_body(request, Form)
        url = await to_thread.run_sync(page.run_action, name, read_selection(request), form)
        return JSONResponse({"url": url})

    def get_job(request: Request) -> Response:
        job = view.jobs.find(request.path_params["job"])
        return RedirectResponse(f"../../{read_selection(request).link_job(job)}", 303)

    async def get_view(request: Request) -> Response:
        selection, params = read_selection(request), request.query_params
        if request.path_params["name"] == "image":
            read = partial(read_thumbnail, view.workspace, params)
            image, media_type = await image_jobs.run(request, read)
            # A missing image may be there at the next attempt.
            headers = FILE_HEADERS if image == EMPTY_IMAGE else IMAGE_HEADERS
            return Response(image, media_type=media_type, headers=headers)
        render = partial(view.read_check_page, selection)
        if request.path_params["name"] == "report":
            values: dict[str, list[str]] = {}
            for key in params:
                values[key] = params.getlist(key)
            render = partial(view.render_report, values, selection)
        try:
            content = await view_jobs.run(request, render)
        except UserError as error:
            raise HTTPException(404, describe_error(error, name_actions)) from error
        return HTMLResponse(content, headers=VIEW_HEADERS)

    def get_answers(request: Request) -> Response:
        job = view.jobs.find(request.path_params["job"])
        file = view.find_answers(job, request.path_params["name"])
        if file is None:
            raise HTTPException(404, "no such file")
        return FileResponse(file, headers=FILE_HEADERS, filename=f"{file.parent.name}{file.suffix}")

    routes = [
        Route("/", get_page),
        Route("/answers/{job}/{name}", get_answers),
        Route("/view/{name}", get_view),
        Route("/uploads", page.uploads.receive, methods=["POST"]),
        Route("/actions/{name}", post_action, methods=["POST"]),
        make_preview_route(page),
        *make_program_routes(view),
        Route("/pages/{job}/studio", get_job),
        make_proxy_route(lambda job_id: view.jobs.find(job_id).socket),
    ]
    return AccessMiddleware(create_app(routes, name_actions), access)
