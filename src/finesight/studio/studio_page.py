"""Gradio page of the studio: forms and buttons that start commands, and its web application."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import gradio as gr
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from markupsafe import Markup
from pydantic import Field, TypeAdapter

from finesight.config import TaskName
from finesight.data.image_header import IMAGE_SUFFIXES
from finesight.data.import_source import ImportOptions, count_unlabeled_images, detect_columns
from finesight.data.source_fetch import fetch_source
from finesight.errors import LABEL_TRAIN_FRACTION, UserError
from finesight.hub.archive import is_archive
from finesight.label.label_session import AnswerKind
from finesight.label.label_store import JOURNAL_FILE
from finesight.model_folder import TINY_MODEL
from finesight.report.i18n import translate, use_language
from finesight.report.summary import format_command
from finesight.storage import translate_os_errors
from finesight.studio.studio_view import (
    CHECK_EXIT_CODES,
    LABELS_NAME,
    STATIC_FOLDER,
    STEP_NAMES,
    Selection,
    StudioState,
    StudioView,
    render_message,
    split_words,
)
from finesight.studio.workspace import STUDIO_FOLDER, TABLE_SUFFIXES, as_argument
from finesight.web.access_middleware import (
    EMPTY_INPUT,
    GET_ROUTES,
    MAX_UPLOAD_BYTES,
    AccessMiddleware,
    Inputs,
    Upload,
)
from finesight.web.web_server import CHATS_FOLDER, UPLOADS_FOLDER, mount_page
from finesight.web.web_sessions import DiskBudget

MAX_FIELD_CHARS = 100_000

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0e-\x1f\ud800-\udfff]")

Text = Annotated[str, Field(max_length=MAX_FIELD_CHARS)]

VIEW_ROUTES = r"|/studio\.(?:css|js)|/live|/view/(?:report|check)"

PASSWORD_FILE, API_KEY_FILE = "password", "api-key"
DEFAULT_FRACTION, DEFAULT_LABEL_FRACTION = "0.9", str(LABEL_TRAIN_FRACTION)
METRIC_LABEL = "Metric (empty: chosen from the answers)"


@dataclass(frozen=True, slots=True)
class ServerAccess:
    """Options by which the servers that the studio starts are reached and protected.

    Attributes:
        host: Address that the studio and its chat pages listen on.
        password: Password of both. None admits everyone.
        chat_port, api_port, label_port: Ports of the chat page, of the HTTP API and of the
            labelling page. 0: any free port.
        converter: Converter of llama.cpp for GGUF files. It runs as a program of this user.
        proxies: Addresses of trusted proxies of the studio and its servers.
    """

    host: str = "127.0.0.1"
    password: str | None = None
    converter: Path | None = None
    chat_port: int = 7871
    api_port: int = 7872
    label_port: int = 7873
    port: int = 0
    proxies: tuple[str, ...] = ()


MISSING_MESSAGES = {
    "data": "No data set is selected. Select one, or import one in the step Data.",
    "recipe": "No recipe is selected. Select one, or create one in the step Plan.",
    "run": "No run is selected. Select one, or train one in the step Train.",
    "images": "No images are given. Enter a file or folder, or upload images in the step Data.",
    "review-split": "The data set has no validation samples. Review those for training.",
    "merged-name": "No merged model is given. Merge one, or enter its name.",
}
"""Message about a missing item or an empty field by its name."""

ANSWER_KINDS, DETECTED_KIND = get_args(AnswerKind), "detect automatically"
KINDS_OF_FIELDS = {"classes": ("classes", "boxes"), "fields": ("fields",)}
"""Kinds of answers by field of the label form that is shown for these kinds only."""


class MissingItemError(UserError):
    """Raised for a missing selection or an empty field. Its message is one or two sentences."""


Action = Callable[..., str]
"""Handler of a button: takes the state and the inputs, and returns the URL to open."""


class StudioPage:
    """Gradio page with one form per step. The lists and jobs are HTML from `StudioView`."""

    def __init__(
        self, view: StudioView, access: ServerAccess, budget: DiskBudget | None = None
    ) -> None:
        self._budget = budget
        self._view, self._workspace, self._jobs = view, view.workspace, view.jobs
        self._access = access
        self._labels: list[tuple[Any, str]] = []
        self._choices: list[tuple[Any, list[tuple[str, str]]]] = []
        self._forms: dict[str, gr.Column] = {}
        self.inputs: dict[int, Inputs] = {}
        """Input types of the events that a browser may send, by event number."""
        with gr.Blocks(
            title="finesight studio", analytics_enabled=False, fill_width=True
        ) as self.blocks:
            self._top = _create_html("studio-top")
            self._message = _create_html("message")
            # The address to open after an action; read by the script of the page.
            self._next_url = gr.Textbox(visible="hidden")
            self._digest = gr.Textbox(visible="hidden")
            self._build_forms()
            self._bottom = _create_html("studio-bottom")
            load = self.blocks.load(
                self._on_load,
                outputs=[*self._forms.values(), *(item for item, _ in self._labels), self._digest],
                show_progress="hidden",
            )
            self.inputs[load["id"]] = EMPTY_INPUT

    def _build_forms(self) -> None:
        with self._form("data"), self._accordion("New data set") as self._import_panel:
            upload = gr.File(file_count="multiple", elem_id="upload", height=120)
            self._labels.append((upload, "Upload images with or without labels, or an archive"))
            values: list[Any] = [
                self._text("Or a file or folder in the workspace", "source", "photos"),
                self._text("Name of the data set", "name", "tickets"),
                self._text("Prompt", "prompt", "Read the ticket."),
                self._text("Columns (empty: detected)", "columns", "image=path answer=caption"),
                self._text("Fraction of training samples", "fraction", value=DEFAULT_FRACTION),
                self._choice("Invalid rows", "invalid-rows", ["skip"], "stop the import"),
            ]
            self._import_fields = values
            self._add_preview(
                "preview", values, lambda _, *form: self._build_import(*form, unpack=False)[1]
            )
            inputs = [upload, *values]
            input_type = TypeAdapter(tuple[list[Upload] | None, Text, Text, Text, Text, Text, Text])
            self._button("Import", self._import, inputs, input_type)
        # Clicked by the script of the page, the second one after a confirmation.
        ask = partial(self._delete, ask_only=True)
        script, title = "(url) => window.finesightConfirm(url)", "Not deleted"
        self._button("Delete", ask, elem_id="ask-delete", error_title=title, script=script)
        self._button("Delete", self._delete, error_title=title)
        with self._form("label"):
            fields = [
                self._text("Images to label: a file or folder", "images", "photos"),
                self._text("Prompt", "label-prompt", "Read the ticket.", lines=2),
                self._text("Name of the data set", "labels-name", value=LABELS_NAME),
                self._text("Model without a run", "label-model", value=TINY_MODEL),
                self._choice("Kind of the answers", "kind", ANSWER_KINDS, DETECTED_KIND),
                self._text("Classes", "classes", "red, green, blue", visible=False),
                self._text("Fields", "fields", "merchant, date, amount", visible=False),
                self._text(
                    "Fraction of training samples", "label-fraction", value=DEFAULT_LABEL_FRACTION
                ),
                self._choice(
                    "Samples to review", "review-split", ["for validation"], "for training"
                ),
            ]
            self._label_fields = fields
            change = fields[4].change(
                lambda kind: [gr.update(visible=kind in one) for one in KINDS_OF_FIELDS.values()],
                fields[4],
                fields[5:7],
                show_progress="hidden",
            )
            self.inputs[change["id"]] = _text_inputs(1)
            self._add_preview(
                "label-preview",
                fields,
                lambda state, *form: self._build_labels(state, *form) if form[0].strip() else [],
            )
            with gr.Row():
                self._button("Start labelling", self._label, fields)
                review = partial(self._label, review=True)
                self._button("Review existing labels", review, fields, variant="secondary")
        with self._form("check"):
            self._button("Check", self._start_listed)
        with self._form("plan"):
            self._button("Estimate memory and time", self._start_listed)
            with self._accordion("New recipe for the selected data set") as self._recipe_panel:
                self._others = gr.CheckboxGroup(elem_id="other-data", visible=False)
                self._labels.append((self._others, "Also train on"))
                values = [
                    self._text("Name of the recipe and its run", "recipe-name", "tickets"),
                    self._text("Model: a name on a hub, or a folder", "model", value=TINY_MODEL),
                    self._choice(METRIC_LABEL, "metric", get_args(TaskName)),
                    self._text("Epochs", "epochs", "chosen from the data"),
                    self._text("Steps instead of epochs", "steps", "chosen from the data"),
                    self._text("Learning rate", "learning-rate", "chosen from the model"),
                ]
                types: Inputs = TypeAdapter(
                    tuple[tuple[Text, ...], Text, Text, Text, Text, Text, Text]
                )
                named, title = [self._others, *values], "Recipe not saved"
                self._button(
                    "Create the recipe", self._create_recipe, named, types, error_title=title
                )
            self._editor = self._text("Selected recipe", "editor", lines=12)
            values = [self._editor, self._digest]
            self._button(
                "Save the recipe", self._save_recipe, values, error_title="Recipe not saved"
            )
        with self._form("train"):
            self._button("Start or resume", self._start_listed)
        with self._form("results"):
            pass
        with self._form("chat"):
            self._button("Start the chat", self._chat)
        with self._form("export"):
            self._button("Start the server", self._serve)
            name = self._text("Name of the merged model", "merged-name", "tickets")
            self._merged_name = name
            self._button("Merge", self._merge, [name])
            with gr.Row():
                self._button("Commands for vLLM and SGLang", self._export, [name])
                if self._access.converter is not None:
                    self._button("Write GGUF", partial(self._export, write_gguf=True), [name])
        self._button("Stop", self._stop, elem_id="stop", error_title="")
        again = "Stop without a checkpoint"
        self._button(again, partial(self._stop, again=True), elem_id="stop-again", error_title="")

    def _form(self, step: str) -> gr.Column:
        self._forms[step] = gr.Column(visible=False, elem_classes="studio-form")
        return self._forms[step]

    def _accordion(self, label: str) -> gr.Accordion:
        panel = gr.Accordion(open=False)
        self._labels.append((panel, label))
        return panel

    def _text(
        self, label: str, elem_id: str, placeholder: str = "", lines: int = 1, **options: Any
    ) -> gr.Textbox:
        box = gr.Textbox(
            label=label,
            placeholder=placeholder,
            elem_id=elem_id,
            lines=lines,
            max_lines=max(lines, 30) if lines > 1 else 1,
            max_length=MAX_FIELD_CHARS,
            **{"value": ""} | options,
        )
        self._labels.append((box, label))
        return box

    def _choice(self, label: str, elem_id: str, names: Sequence[str], default: str = "") -> Any:
        """Add a list of names. Empty: the default of the command, with its description."""
        choices = [(default, ""), *((name, name) for name in names)]
        field = gr.Dropdown(choices, value="", label=label, elem_id=elem_id)
        self._labels.append((field, label))
        self._choices.append((field, choices))
        return field

    def _button(
        self,
        label: str,
        action: Action,
        inputs: Sequence[Any] = (),
        input_type: Inputs | None = None,
        elem_id: str | None = None,
        error_title: str = "Command not started",
        script: str = "",
        variant: Any = "primary",
    ) -> None:
        """Add a button whose action shows its error, or opens a URL by default."""

        def on_click(request: gr.Request, *values: Any) -> tuple[str, str]:
            selection = _read_selection(request)
            try:
                _check_texts(values)
                # An action applies to the items that the page shows, which its URL names.
                state = self._view.read_state(selection, use_newest=False)
                with translate_os_errors(self._workspace.folder):
                    return "", action(state, *values)
            except UserError as error:
                with use_language(selection.lang):
                    is_sentence = isinstance(error, MissingItemError)
                    text = translate(error.what) if is_sentence else str(error)
                    return render_message(translate(error_title), text, field=error.where), ""

        elem_id = elem_id or re.sub(r"\W+", "-", label.lower())
        button = gr.Button(label, elem_id=elem_id, variant=variant)
        self._labels.append((button, label))
        click = button.click(
            on_click, list(inputs), [self._message, self._next_url], show_progress="hidden"
        )
        self.inputs[click["id"]] = input_type or _text_inputs(len(inputs))
        is_saved = str(action == self._save_recipe).lower()
        script = script or f"(url) => window.finesightOpen(url, {is_saved})"
        click.then(None, self._next_url, None, js=script)

    def _on_load(self, request: gr.Request) -> dict[Any, Any]:
        selection = _read_selection(request)
        state = self._view.read_state(selection)
        updates: dict[Any, Any] = {
            form: gr.Column(visible=step == selection.step) for step, form in self._forms.items()
        }
        with use_language(selection.lang):
            for item, label in self._labels:
                text = translate(label)
                is_button = isinstance(item, gr.Button)
                updates[item] = gr.update(value=text) if is_button else gr.update(label=text)
            for item, choices in self._choices:
                updates[item]["choices"] = [(translate(name), key) for name, key in choices]
            prompt = self._workspace.read_prompt(state.run, state.dataset)
            updates[self._label_fields[1]]["value"] = prompt
            if not prompt and state.run is None:
                updates[self._label_fields[1]]["label"] = translate("Prompt (required)")
        if selection.images:
            updates[self._label_fields[0]]["value"] = selection.images
            updates[self._label_fields[2]]["value"] = (*Path(selection.images).parts, "")[1]
        # Commands apply to the model that was merged last.
        merged = [job.arguments[2] for job in state.jobs if job.arguments[0] == "merge"]
        merged += [str(path) for path in state.content.models if path.parent == Path("models")]
        updates[self._merged_name]["value"] = Path((merged or [""])[0]).name
        # Forms for new items are open in an empty workspace.
        job, is_open = state.job, not state.content.datasets
        is_label = selection.step == "label"
        fields = self._label_fields if is_label else self._import_fields
        # New images to label precede those of an earlier command.
        form = () if job is None or (is_label and selection.images) else job.form
        if job is not None and form and (is_label or job.status != "finished"):
            is_open = True
            for field, text in zip(fields, form, strict=False):
                updates[field]["value"] = text
        # A review replaces the reviewed data set. Both have the same validation samples.
        used = state.dataset.files if state.dataset else set()
        others = [str(one.path) for one in state.content.datasets if not one.files & used]
        updates[self._others] |= {"choices": others, "value": [], "visible": bool(others)}
        updates[self._import_panel]["open"] = is_open
        updates[self._digest] = ""
        updates[self._recipe_panel]["open"] = not state.content.recipes
        if state.recipe is not None:
            text, updates[self._digest] = self._workspace.read_recipe(state.recipe)
            updates[self._editor]["value"] = text
        return updates

    def _add_preview(
        self, elem_id: str, fields: Sequence[Any], build: Callable[..., list[str]]
    ) -> None:
        """Show the command of a form, and update it with each field."""

        def on_change(request: gr.Request, *values: str) -> str:
            selection = _read_selection(request)
            try:
                _check_texts(values)
                state = self._view.read_state(selection, use_newest=False)
                with translate_os_errors(self._workspace.folder):
                    arguments = build(state, *values)
                return render_command(arguments) if arguments else ""
            except UserError as error:
                with use_language(selection.lang):
                    return render_message("", str(error), "hint")

        html, changes = _create_html(elem_id), [field.change for field in fields]
        event = gr.on(changes, on_change, list(fields), html, show_progress="hidden")
        self.inputs[event["id"]] = _text_inputs(len(fields))

    def _build_import(self, *form: str, unpack: bool = True) -> tuple[Path, list[str]]:
        """Return the data set and the import command of a form. The source may be missing yet.

        Args:
            unpack: Detect the columns of a table in an archive, too.
        """
        source, name, prompt, columns, fraction, invalid_rows = form
        target = self._workspace.check_new_name("data", name)
        path = self._workspace.resolve(source, "source") if source.strip() else Path("uploads/…")
        arguments = ["import", as_argument(path), str(target)]
        arguments += ["--prompt", prompt.strip()] if prompt.strip() else []
        try:
            pairs = shlex.split(columns)
        except ValueError as error:
            raise UserError(
                f"{columns!r:.200} has an open quote",
                where="columns",
                expected="ROLE=COLUMN pairs separated by spaces",
                remedy="for example image=path answer=caption",
            ) from error
        if source.strip() and not any(pairs) and (unpack or not is_archive(path.name)):
            path, options = _detect_columns(self._workspace.folder, path)
            arguments[1] = as_argument(path)
            roles = options.columns
            pairs = [f"{role}={column}" for role, column in roles.items()]
            arguments += ["--box-format", options.box_format] if options.box_format else []
            arguments += ["--box-units", options.box_units] if options.box_units else []
            if roles and "question" not in roles and not prompt.strip():
                raise UserError(
                    "the field Prompt is empty, and the table has no column of questions",
                    where=str(path),
                    expected="a question about every image",
                    remedy="enter one, such as: Read the text.",
                )
        # The messages of commands write the option before each pair.
        pairs = [pair.removeprefix("--map=") for pair in pairs if pair not in ("", "--map")]
        arguments += [word for pair in pairs for word in ("--map", pair)]
        arguments += ["--train-fraction", fraction.strip()] if _check_fraction(fraction) else []
        arguments += ["--on-invalid-row", invalid_rows] if invalid_rows else []
        return target, arguments

    def _import(self, state: StudioState, upload: list[str] | None, *values: str) -> str:
        source, name, *others = values
        # The page fills in the path of an earlier upload for another attempt.
        if upload and source.strip().startswith("uploads/"):
            source = ""
        if bool(upload) == bool(source.strip()):
            raise UserError(
                "an upload and a path are given" if upload else "nothing to import is given",
                where="import",
                expected="an upload, or a file or folder in the workspace",
                remedy="clear one of them" if upload else "upload files, or enter a path",
            )
        self._build_import(source, name, *others)
        self._check_labels(source)
        if upload:
            if uses := self._find_commands(Path("uploads", name.strip())):
                raise UserError(
                    f"the earlier upload is used by {uses[0]}",
                    where=name.strip(),
                    expected="the name of a data set that is not being imported",
                    remedy="wait for the end of the command, or choose another name",
                )
            folder = self._workspace.folder / "uploads" / name.strip()
            is_new, files = not folder.exists(), [Path(file) for file in upload]
            source = str(self._workspace.save_uploads(files, name.strip()))
            files = [file for file in folder.rglob("[!.]*") if file.is_file()]
            if all(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
                self._mark_copied(upload)
                # Images without a table are labeled in the next step.
                return state.selection.link(step="label", images=source)
        try:
            target, arguments = self._build_import(source, name, *others)
            form = [source, name, *others]
            url = self._start(state, str(target), arguments, data=str(target), form=form)
            self._mark_copied(upload or ())
            return url
        except UserError:
            # A refused import leaves no uploads: the browser still has them.
            if upload and is_new:
                self._workspace.move_to_trash(Path("uploads", name.strip()))
            raise

    def _mark_copied(self, upload: Sequence[str]) -> None:
        if self._budget is not None:
            self._budget.mark_copied(map(Path, upload))

    def _find_commands(self, *folders: Path) -> list[str]:
        """Return the running commands that use a file in the folders or a parent folder."""
        return [
            f"the running command in the step {STEP_NAMES[job.step]}"
            for job in self._jobs.list_running()
            for word in job.arguments
            if any(self._workspace.is_overlapping(word, folder) for folder in folders)
        ]

    def _delete(self, state: StudioState, *, ask_only: bool = False) -> str:
        """Delete the selected data set or, in the step Plan, recipe, unless something uses it.

        Args:
            ask_only: Check the uses only, before the page asks for confirmation.
        """
        if state.selection.step == "plan":
            return self._delete_recipe(state, ask_only)
        if state.dataset is None:
            raise _missing("data")
        path, runs = state.dataset.path, state.content.runs
        running = [run for run in runs if self._view.describe_run(run).status == "running"]
        commands = self._find_commands(path, Path("uploads", path.name))
        paths = self._workspace.list_deleted(state.dataset, running, commands)
        if not ask_only:
            self._workspace.move_to_trash(*paths)
        return state.selection.link(data="")

    def _delete_recipe(self, state: StudioState, ask_only: bool) -> str:
        if state.recipe is None:
            raise _missing("recipe")
        uses = self._find_commands(state.recipe)
        for run in state.content.runs:
            # A finished run needs the copy in its folder only.
            if run == self._view.find_run(state.recipe):
                is_finished = self._view.describe_run(run).status == "finished"
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
        if not ask_only:
            self._workspace.move_to_trash(state.recipe)
        return state.selection.link(recipe="")

    def _check_labels(self, source: str) -> None:
        """Raise UserError for a folder of images without labels, before the import fails."""
        folder = self._workspace.folder / source.strip()
        if not source.strip() or not (count := count_unlabeled_images(folder)):
            return
        tables = [file for file in folder.parent.iterdir() if file.suffix in TABLE_SUFFIXES]
        remedies = [f"enter {Path(source.strip()).parent / file.name}" for file in sorted(tables)]
        raise UserError(
            f"{count} images without labels",
            where=source.strip(),
            expected="labels: a table, or a text or annotation file for each image",
            remedy=" or ".join([*remedies[:3], "label the images in the step Label"]),
        )

    def _create_recipe(
        self,
        state: StudioState,
        others: list[str],
        name: str,
        model: str,
        metric: str,
        epochs: str,
        steps: str,
        learning_rate: str,
    ) -> str:
        if state.dataset is None:
            raise _missing("data")
        if epochs.strip() and steps.strip():
            raise UserError(
                "both “Epochs” and “Steps instead of epochs” are given",
                where="recipe",
                expected="one of them, or none: then the data decide",
                remedy="clear one of the two fields",
            )
        settings = {
            "train.epochs": epochs,
            "train.steps": steps,
            "train.learning_rate": learning_rate,
            "eval.metric": metric,
        }
        chosen = {str(state.dataset.path), *others}
        datasets = [one for one in state.content.datasets if str(one.path) in chosen]
        recipe = self._workspace.create_recipe(name.strip(), datasets, model, settings)
        return state.selection.link(recipe=str(recipe))

    def _save_recipe(self, state: StudioState, text: str, digest: str) -> str:
        if state.recipe is None:
            raise _missing("recipe")
        self._workspace.save_recipe(state.recipe, text, digest)
        return state.selection.link(recipe=str(state.recipe))

    def _find_weights(self, state: StudioState) -> str:
        """Return the weights of the selected run as an argument. Raises UserError without any."""
        if state.run is None:
            raise _missing("run")
        weights = self._workspace.find_weights(state.run)
        if weights is None:
            raise UserError(
                "the run has no weights yet",
                where=str(state.run),
                expected="a finished run, or a LoRA run with a checkpoint",
                remedy="select another run, or resume this one in the step Train",
            )
        return as_argument(weights)

    def _chat(self, state: StudioState) -> str:
        arguments = ["web", self._find_weights(state)]
        port, host = self._access.chat_port, self._access.host
        options = self._page_options()
        return self._start_server(state, arguments, port, options, host)

    def _label(self, state: StudioState, *form: str, review: bool = False) -> str:
        """Start the labelling page."""
        arguments = self._build_labels(state, *form, review=review)
        port, host = self._access.label_port, self._access.host
        return self._start_server(state, arguments, port, self._page_options(), host, form)

    def _build_labels(
        self,
        state: StudioState,
        images: str,
        prompt: str,
        name: str,
        model: str,
        kind: str,
        classes: str,
        fields: str,
        fraction: str,
        split: str,
        *,
        review: bool = False,
    ) -> list[str]:
        """Return the command with the selected run or, without weights of one, a model.

        An existing folder of labels is continued. A review is that of one file of the selected
        data set, and has a folder of its own.
        """
        if review:
            if state.dataset is None:
                raise _missing("data")
            if split and state.dataset.eval_file is None:
                raise _missing("review-split")
            file = (split and state.dataset.eval_file) or state.dataset.train_file
            source, target = self._workspace.open_review(file)
            # The other file of the data set keeps the split.
            fraction = "" if state.dataset.eval_file else fraction
        else:
            if not images.strip():
                raise _missing("images")
            source, target = self._workspace.resolve(images, "images"), Path("data", name.strip())
        is_existing = review or (self._workspace.folder / target / JOURNAL_FILE).is_file()
        if not is_existing:
            target = self._workspace.check_new_name("data", name)
        elif not review:
            target = self._workspace.resolve(str(target), "labels")
        if is_existing and fraction.strip() == DEFAULT_LABEL_FRACTION:
            # The command continues with the fraction of the folder.
            fraction = ""
        weights = self._workspace.find_weights(state.run) if state.run else None
        run = as_argument(weights) if weights else self._workspace.check_model(model)
        values = {"prompt": prompt, "kind": kind, "train-fraction": fraction}
        named = {"classes": classes, "fields": fields}
        values |= {key: text for key, text in named.items() if kind in KINDS_OF_FIELDS[key]}
        options = [f"--{key}={value.strip()}" for key, value in values.items() if value.strip()]
        options += ["--review"] if review else []
        return ["label", run, as_argument(source), *options, "--out", str(target)]

    def _page_options(self) -> list[str]:
        """Return the options that protect a page in the same way as the studio."""
        options = ["--host", self._access.host]
        options += [f"--trusted-proxy={proxy}" for proxy in self._access.proxies]
        if self._access.password is None:
            return [*options, "--no-auth"]
        return [*options, "--password-file", str(self._write_password(self._access.password))]

    def _serve(self, state: StudioState) -> str:
        """Start the HTTP API, with an API key if the studio has a password.

        The key is the same for all servers of the workspace.
        """
        options: list[str] = []
        if self._access.password is not None:
            file = self._workspace.folder / STUDIO_FOLDER / API_KEY_FILE
            key = file.read_text("utf-8") if file.is_file() else secrets.token_urlsafe(32)
            options = ["--key-file", str(self._write_password(key, API_KEY_FILE))]
        arguments = ["serve", self._find_weights(state)]
        return self._start_server(state, arguments, self._access.api_port, options)

    def _write_password(self, password: str, name: str = PASSWORD_FILE) -> Path:
        """Write a password or an API key into a file that only this user can read."""
        path = Path(STUDIO_FOLDER, name)
        file = self._workspace.folder / path
        file.parent.mkdir(exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(password)
        return path

    def _start_server(
        self,
        state: StudioState,
        arguments: Sequence[str],
        port: int,
        options: Sequence[str] = (),
        host: str = "127.0.0.1",
        form: Sequence[str] = (),
    ) -> str:
        if not port:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = int(free.getsockname()[1])
        arguments = [*arguments, "--port", str(port), *options]
        return self._start(state, state.target, arguments, port=port, host=host, form=form)

    def _merge(self, state: StudioState, name: str) -> str:
        weights = self._find_weights(state)
        target = self._workspace.check_new_name("models", name)
        arguments = ["merge", weights, str(target)]
        return self._start(state, state.target, arguments)

    def _export(self, state: StudioState, name: str, *, write_gguf: bool = False) -> str:
        """Print serving commands for a merged model, or write GGUF files."""
        if not name.strip():
            raise _missing("merged-name")
        model = self._workspace.resolve(f"models/{name.strip()}", "merged model")
        arguments = ["export", str(model)]
        if write_gguf:
            target = self._workspace.check_new_name("gguf", name)
            arguments += [str(target), "--converter", str(self._access.converter)]
        return self._start(state, state.target, arguments)

    def _stop(self, state: StudioState, *, again: bool = False) -> str:
        job = self._jobs.find(state.selection.job)
        job.stop(again=again)
        return state.selection.link_job(job)

    def _start_listed(self, state: StudioState) -> str:
        """Start the command that the page shows for the selection."""
        commands, is_check = self._view.list_commands(state), state.selection.step == "check"
        if not commands:
            raise _missing("data" if is_check else "recipe")
        is_train, run = state.selection.step == "train", ""
        if not is_check and state.recipe is not None:
            output_dir = self._workspace.load_recipe(state.recipe).output_dir
            folder = self._workspace.folder
            run = os.path.relpath(os.path.realpath(folder / output_dir), folder) if is_train else ""
        exit_codes = CHECK_EXIT_CODES if is_check else (0,)
        return self._start(state, state.target, commands[0], ok_exit_codes=exit_codes, run=run)

    def _start(
        self,
        state: StudioState,
        target: str,
        arguments: Sequence[str],
        *,
        data: str = "",
        run: str = "",
        ok_exit_codes: Sequence[int] = (0,),
        port: int = 0,
        host: str = "127.0.0.1",
        form: Sequence[str] = (),
    ) -> str:
        job = self._jobs.start(
            state.selection.step,
            target,
            arguments,
            ok_exit_codes=ok_exit_codes,
            port=port,
            host=host,
            form=form,
        )
        # The command creates these items, so they are selected before they exist.
        items = {"data": data, "run": run}
        return state.selection.link(
            job=job.id, images="", **{key: item for key, item in items.items() if item}
        )


def _detect_columns(workspace: Path, path: Path) -> tuple[Path, ImportOptions]:
    """Return the table of a source with its column roles; none if the command detects its format.

    A source without a known format is returned unchanged, for the error of the command. So is an
    archive, which is unpacked for the detection only.
    """
    with contextlib.suppress(UserError):
        if is_archive(path.name):
            folder = workspace / STUDIO_FOLDER / "unpacked"
            with fetch_source(str(workspace / path), folder, ImportOptions()) as fetched:
                return path, detect_columns(fetched.path, fetched.options)[1]
        table, options = detect_columns(workspace / path, ImportOptions())
        return (table.relative_to(workspace) if options.columns else path), options
    return path, ImportOptions()


def _check_texts(values: Sequence[Any]) -> None:
    """Raise UserError for a text that no argument of a command or file name can contain."""
    for text in (value for value in values if isinstance(value, str)):
        controls = _CONTROL_CHARACTERS.findall(text)
        if controls or len(text) > MAX_FIELD_CHARS:
            raise UserError(
                f"{text!r:.80} has {f'the character {controls[0]!r}' if controls else len(text)}",
                where="form",
                expected=f"text of at most {MAX_FIELD_CHARS} characters, no control characters",
                remedy="correct the field",
            )


def _check_fraction(text: str) -> bool:
    """Return whether a fraction is given. Raises UserError if it is not between 0 and 1."""
    with contextlib.suppress(ValueError):
        if not text.strip() or 0 < float(text) <= 1:
            return bool(text.strip())
    raise UserError(
        f"{text.strip()!r:.80} is not a fraction",
        where="fraction of training samples",
        expected="a number above 0 and at most 1",
        remedy="enter 0.9 for 90 %",
    )


def render_command(arguments: Sequence[str]) -> str:
    """Render the command that a form would start."""
    code = split_words(format_command(*arguments))
    return Markup('<div class="command"><code>{}</code></div>').format(code)


def _create_html(elem_id: str) -> gr.HTML:
    return gr.HTML("", elem_id=elem_id, js_on_load=None, apply_default_css=False)


def _text_inputs(count: int) -> Inputs:
    """Return the input type of an event with texts."""
    texts = Annotated[tuple[Text, ...], Field(min_length=count, max_length=count)]
    return TypeAdapter(texts)


def _missing(name: str) -> UserError:
    return MissingItemError(MISSING_MESSAGES[name], where=name)


def _read_selection(request: gr.Request | Request) -> Selection:
    params = dict(request.query_params)
    return Selection.parse(params, request.headers.get("accept-language", ""))


def make_studio_app(
    view: StudioView, folder: Path, access: ServerAccess, loopback_only: bool
) -> AccessMiddleware:
    """Build the studio as an ASGI application with access control.

    Args:
        folder: Private folder of uploads.
        loopback_only: Whether the page is for this machine only. See `AccessMiddleware`.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    uploads = folder / UPLOADS_FOLDER
    budget = DiskBudget(uploads, folder / CHATS_FOLDER)
    page = StudioPage(view, access, budget)

    @app.get("/studio.css")
    def get_style() -> Response:
        return Response(view.style, media_type="text/css")

    @app.get("/live")
    def get_live(request: Request) -> Response:
        host = request.url.hostname or "127.0.0.1"
        return JSONResponse(view.render(_read_selection(request), host))

    @app.get("/view/{name}")
    def get_page(name: str, request: Request) -> Response:
        selection = _read_selection(request)
        params = {key: request.query_params.getlist(key) for key in request.query_params}
        try:
            if name == "report":
                return HTMLResponse(view.render_report(params, selection))
            return HTMLResponse(view.read_check_page(selection))
        except UserError as error:
            return Response(str(error), 404, media_type="text/plain")

    mounted = mount_page(
        app,
        page.blocks,
        (STATIC_FOLDER / "studio.js").read_text(encoding="utf-8"),
        head='<link rel="stylesheet" href="studio.css">',
        max_file_size=MAX_UPLOAD_BYTES,
    )
    return AccessMiddleware(
        mounted,
        uploads,
        budget,
        page.inputs,
        lambda name: name in page.blocks._queue.pending_messages_per_session,
        access.password,
        loopback_only,
        get_routes=re.compile(GET_ROUTES.pattern + VIEW_ROUTES),
        session_cookie=f"finesight-studio-{access.port}",
    )
