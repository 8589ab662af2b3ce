"""Names and formats of the files in a run folder, and its manifest, which inference reads."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from finesight.errors import UserError
from finesight.files.bounded_files import read_bytes, read_lines
from finesight.plugins import PluginRecord, require_plugins
from finesight.settings.config import ImageRule, TuneSettings

MANIFEST_FILE = "manifest.json"
RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
RESPONSES_FILE = "responses.jsonl"
SAMPLING_FILE = "sampling.json"
SKIPPED_SAMPLES_FILE = "skipped_samples.jsonl"
IMAGES_FILE = "images.safetensors"
PARAM_AUDIT_FILE = "param_audit.json"
RESULT_FILE = "result.json"
REPORT_FILE = "report.html"
GUARD_FILE = "guard.json"
CHECKPOINTS_FOLDER = "checkpoints"
PREDICTIONS_FOLDER = "predictions"
ADAPTER_FOLDER = "adapter"
MODEL_FOLDER = "model"
TRACKING_FOLDER = "track"
SAMPLES_FOLDER = "samples"

FORMAT_VERSION = 3
"""Version of the keys in a manifest. Version 3 added the form of the questions."""

READABLE_VERSIONS = (2, 3)
"""Versions of manifests that can be read; those of other versions are rejected."""

_REMEDY = "restore the manifest of the run, or train again"


QUESTION_MARK = "{question}"
"""Position of the question in a prompt template."""

MAX_TEMPLATE_CHARS = 2000
"""Maximum number of characters of a prompt template, and of a system prompt in it."""

MAX_QUESTION_IMAGES = 1000
"""Maximum number of images of a recorded question."""


class PromptTemplate(BaseModel):
    """Form of questions in the training samples, in which new questions are asked.

    Attributes:
        template: Texts and images in their order: `<image>` stands for an image or video, or for
            all of them at a single position; `{question}` for the question without white space
            around it. Without `<image>`, the positions of images differ.
        min_images, max_images: Number of images and videos of a question.
        system_prompt: System prompt of the samples; None if they have none or several.
        share: Share of this form among the training questions with images, or without images.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    template: Annotated[str, Field(max_length=MAX_TEMPLATE_CHARS)]
    min_images: Annotated[int, Field(ge=0, le=MAX_QUESTION_IMAGES)]
    max_images: Annotated[int, Field(ge=0, le=MAX_QUESTION_IMAGES)]
    system_prompt: Annotated[str, Field(max_length=MAX_TEMPLATE_CHARS)] | None = None
    share: Annotated[float, Field(ge=0, le=1)]

    @model_validator(mode="after")
    def _check_values(self) -> PromptTemplate:
        if self.template.count(QUESTION_MARK) != 1:
            raise ValueError(f"a template with {QUESTION_MARK} once")
        if self.min_images > self.max_images:
            raise ValueError("min_images of at most max_images")
        return self


class Manifest(BaseModel):
    """Content of `manifest.json` in a run folder and in a merged model folder.

    Attributes:
        base_fingerprint: SHA-256 over index and headers of the weight files of the base model. A
            base model with another fingerprint is rejected.
        system_prompt: System prompt of the run; None for a family without one.
        enable_thinking: Thinking mode of the majority of the training samples; None for a family
            without reasoning.
        metric: Task metric of the evaluation, which implies the format of the answers; None for a
            custom metric, or without an evaluation.
        max_new_tokens: Maximum completion length of the evaluation; None without an evaluation.
        prompts: Most frequent prompts of the training samples, which the chat page suggests. Their
            text is exact, and `<image>` marks their images. Runs of format version 2 have no marks.
        prompt_templates: Forms of the training questions, the most frequent first; empty for a
            run of an earlier version.
        has_images: Whether the training samples have images; `load_manifest` reads it from the
            metrics of a run. None if unknown.
        plugins: Plug-ins that the recipe and the model need.
        sections: Objectives with a section in the recipe of the run.
        functions: Digests of the code of metrics and rewards that are functions of a Python
            program, by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = FORMAT_VERSION
    family: str
    base_model: str
    base_fingerprint: str
    image_rule: ImageRule
    system_prompt: str | None
    enable_thinking: bool | None = None
    eos_token: str
    tune: TuneSettings
    versions: dict[str, str]
    metric: str | None = None
    max_new_tokens: int | None = None
    prompts: Annotated[tuple[str, ...], Field(max_length=100)] = ()
    prompt_templates: Annotated[tuple[PromptTemplate, ...], Field(max_length=10)] = ()
    has_images: bool | None = None
    plugins: tuple[PluginRecord, ...] = ()
    sections: tuple[str, ...] = ()
    functions: dict[str, str] = {}


def find_run_dir(run_or_checkpoint: Path) -> Path:
    """Return the run folder of a path, which may be one of its checkpoints."""
    is_checkpoint = run_or_checkpoint.parent.name == CHECKPOINTS_FOLDER
    return run_or_checkpoint.parents[1] if is_checkpoint else run_or_checkpoint


def find_next_run_dir(run_dir: Path) -> Path:
    """Find the first free path of a further run: `run-2`, `run-3` and so on after `run`."""
    if run_dir.name in ("", ".."):
        run_dir = Path(os.path.abspath(run_dir))
    stem, _, number = str(run_dir).rpartition("-")
    is_counter = number.isdecimal() and (Path(stem) / MANIFEST_FILE).exists()
    base = stem if is_counter else str(run_dir)
    index = 2
    while os.path.lexists(f"{base}-{index}"):
        index += 1
    return Path(f"{base}-{index}")


def find_manifest_file(folder: Path) -> Path | None:
    """Return the manifest of a run, checkpoint, model or adapter; None without one.

    That of an adapter is in its folder, as in an upload, or in the folder of its run.
    """
    folders = [find_run_dir(folder)]
    if folder.name.startswith(ADAPTER_FOLDER):
        folders.append(folder.parent)
    for candidate in folders:
        if os.path.isfile(candidate / MANIFEST_FILE):
            return candidate / MANIFEST_FILE
    return None


def find_newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the folder of the newest checkpoint of a run."""
    folders = run_dir.glob(f"{CHECKPOINTS_FOLDER}/step-[0-9]*/")
    by_step = {path.name.removeprefix("step-"): path for path in folders}
    return by_step.get(max(filter(str.isdecimal, by_step), key=int, default=""))


def find_weights(run_dir: Path) -> Path | None:
    """Return a finished run, or the newest checkpoint of unfinished LoRA training, or None."""
    if any((run_dir / name).is_dir() for name in (ADAPTER_FOLDER, MODEL_FOLDER)):
        return run_dir
    with suppress(UserError):
        is_full = load_manifest(run_dir / MANIFEST_FILE).tune.has_mode("full")
        return None if is_full else find_newest_checkpoint(run_dir)
    return None


def load_manifest(path: Path) -> Manifest:
    """Read and validate a manifest. Raises UserError if the plug-in of its model is missing."""
    manifest = _read_manifest(path)
    model_plugins = [one for one in manifest.plugins if one.kind in ("families", "architectures")]
    require_plugins(model_plugins, str(path))
    if manifest.has_images is None:
        with suppress(UserError, ValueError, LookupError, TypeError):
            lines = read_lines(path.parent / METRICS_FILE, expected="metrics")
            has_images = bool(json.loads(next(lines, b""))["size_histograms"]["patches"])
            return manifest.model_copy(update={"has_images": has_images})
    return manifest


def read_recipe_sections(run_dir: Path) -> Sequence[str]:
    """Return the components with a section in the recipe of a run; none if unknown."""
    with suppress(UserError):
        return _read_manifest(run_dir / MANIFEST_FILE).sections
    return ()


def require_run_plugins(run_dir: Path, objective: str = "", optimizer: str = "") -> None:
    """Raise UserError if a plug-in of a run is missing. An invalid manifest is not reported.

    Args:
        objective: Objective of the run: others, of which its recipe has a section, may be missing.
            Without it, they are required, too.
        optimizer: Optimizer of the run, likewise.
    """
    plugins: Sequence[PluginRecord] = ()
    with suppress(UserError):
        plugins = _read_manifest(run_dir / MANIFEST_FILE).plugins
    for kind, name in (("objectives", objective), ("optimizers", optimizer)):
        if name:
            plugins = [one for one in plugins if one.kind != kind or one.name == name]
    require_plugins(plugins, str(run_dir))


def _read_manifest(path: Path) -> Manifest:
    content = read_bytes(path, expected="the manifest of a run", remedy=_REMEDY)
    # Other versions have other keys. Version 1 named this one "format".
    with suppress(ValueError, RecursionError, AttributeError):
        record = json.loads(content)
        version = record.get("format_version", record.get("format", FORMAT_VERSION))
        if version not in READABLE_VERSIONS:
            raise UserError(
                f"manifest has format version {version!r:.80}",
                where=str(path),
                expected=f"format version {FORMAT_VERSION}",
                remedy="use the finesight version that wrote the run, or train again",
            )
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first_error = error.errors(include_url=False)[0]
        key = ".".join(map(str, first_error["loc"])) or "the file"
        raise UserError(
            f"{key} is {first_error['input']!r:.80}",
            where=str(path),
            expected=first_error["msg"],
            remedy=_REMEDY,
        ) from error
