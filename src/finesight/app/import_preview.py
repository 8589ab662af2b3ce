"""Preview of an import on the page of the studio: roles of the keys, and the first samples.

A worker process reads the source and its images. Its reply is plain data, which the template
`import_preview.html` escapes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from finesight.app.jobs import ErrorParts
from finesight.app.pages import describe_error, render_page
from finesight.errors import (
    Remedy,
    UserError,
    escape_unprintable,
    format_count,
    shorten,
)
from finesight.files.worker_pool import JobOutput
from finesight.ingest.data_operations import build_import_options
from finesight.ingest.explanation import format_value
from finesight.ingest.field_path import EACH, parse_path
from finesight.ingest.formats.dataset_format import as_list
from finesight.ingest.import_source import (
    ImportOptions,
    find_table,
    open_source,
    open_table_rows,
)
from finesight.ingest.mapping_draft import list_examples
from finesight.ingest.preview import MAX_KEYS, MAX_READ_ROWS, ImportPreview, preview_import
from finesight.ingest.role_choices import CHOICES, add_folder, build_mapping, format_mapping
from finesight.ingest.role_proposal import UnassignedKeysError
from finesight.ingest.row_reader import Record
from finesight.ingest.source_fetch import fetch_source
from finesight.operations import find_operation
from finesight.operations.operation import list_parameters
from finesight.report.html import build_inline_image
from finesight.samples.image_file import CorruptImageError, get_file, is_image_value
from finesight.samples.sample import (
    BoxPart,
    ContentPart,
    ImagePart,
    Sample,
    TextPart,
    VideoPart,
    is_video_path,
    list_coordinates,
)
from finesight.samples.video_file import iter_video_frames, read_visual_size
from finesight.vision.image_processing import load_image

NUM_SAMPLES = 5
MAX_SHOWN_IMAGES = 4
"""Maximum number of images of a sample; the pages of a document are images, too."""

MAX_SHOWN_REGIONS = 100
"""Maximum number of boxes and points in an image."""

MAX_TEXT_CHARS = 1500
MAX_LABEL_CHARS = 80

MAX_PATH_CHARS = 2000
"""Maximum length of a path whose role can be chosen."""

MAX_SHOWN_MESSAGES = 20
"""Maximum number of messages of a sample, and of parts of a message."""

MAX_THUMBNAIL_SIDE = 320
"""Maximum width and height of an image in pixels."""

SHOWN_SIDE = 220
SHOWN_SIDE_OF_SEVERAL = 160
"""Maximum width and height of an image on the page, of samples with one and with several images.

Screens with a high resolution show more of the pixels.
"""

THUMBNAIL_QUALITY = 80
SMALL_IMAGE_SCALE = 4
"""Maximum enlargement of small images on the page."""

ROLE_LABELS = {
    "images": "image",
    "videos": "video",
    "question": "question",
    "choices": "options of the question",
    "answer": "answer",
    "fields": "part of the answer",
    "rejected": "worse answer",
    "verdict": "verdict (true/false)",
    "system": "system prompt",
    "id": "ID of the sample",
    "meta": "keep as metadata",
    "ignore": "leave out",
}
"""Name of each role of `CHOICES` on the page."""

MEDIA_CHOICES = {"image": "images", "video": "videos"}
"""Choice of the roles of `--map` that have another name."""

TEXT_ROLES = {"box": "box", "label": "class of the box"}
"""Names of roles that the page cannot change."""

MESSAGE_LABELS = {
    "system": "System prompt",
    "user": "Question",
    "assistant": "Answer",
    "tool": "Result of a tool",
    "rejected": "Worse answer",
    "reference": "Also accepted",
}
"""Headings of the texts of a sample."""

DataUrl = Annotated[str, Field(pattern=r"^data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+$")]


class PreviewRegion(BaseModel, frozen=True):
    """Box or point in an image, in percent of its width and height.

    Attributes:
        position: CSS classes of the position of the label.
    """

    left: float
    top: float
    width: float
    height: float
    label: str = ""
    is_point: bool = False
    position: str = ""

    @property
    def style(self) -> str:
        """Return position and size as CSS."""
        corner = f"left: {self.left}%; top: {self.top}%"
        return f"{corner}; width: {self.width}%; height: {self.height}%"


class PreviewImage(BaseModel, frozen=True):
    """Thumbnail of an image or of the first frame of a video.

    Attributes:
        src: None for an image that is not shown, for the reason in `problem`.
        width: Width on the page in pixels.
    """

    name: str
    src: DataUrl | None = None
    width: int = 0
    height: int = 0
    regions: tuple[PreviewRegion, ...] = ()
    problem: str = ""

    @property
    def style(self) -> str:
        """Return the size as CSS."""
        return f"width: {self.width}px; aspect-ratio: {self.width} / {self.height}"


class PreviewPart(BaseModel, frozen=True):
    """Text of a message, or the number of an image between its texts."""

    text: str = ""
    image: int = 0


class PreviewMessage(BaseModel, frozen=True):
    """Message of a sample, with a kind of `MESSAGE_LABELS`."""

    kind: Literal["system", "user", "assistant", "tool", "rejected", "reference"]
    parts: tuple[PreviewPart, ...]


class PreviewSample(BaseModel, frozen=True):
    """Sample with its first images.

    Attributes:
        verdict: Whether the answer is desirable; None without a verdict.
    """

    id: str
    images: tuple[PreviewImage, ...] = ()
    num_more_images: int = 0
    num_more_messages: int = 0
    messages: tuple[PreviewMessage, ...] = ()
    verdict: bool | None = None


class PreviewKey(BaseModel, frozen=True):
    """Path in the records with an example.

    Attributes:
        name: The path without characters that could reorder the text of the page.
        role: One of `CHOICES`, or a role as text; empty if the user must choose it.
    """

    path: str
    name: str
    role: str
    example: str


class PreviewReply(BaseModel, frozen=True):
    """Reply of the worker process.

    Attributes:
        has_choices: Whether the page can change the roles of the keys.
        is_blocked: Whether the import fails with the problem. Otherwise, it skips such rows.
    """

    format: str = ""
    num_rows: int = 0
    keys: tuple[PreviewKey, ...] = ()
    has_choices: bool = False
    samples: tuple[PreviewSample, ...] = ()
    problem: ErrorParts | None = None
    is_blocked: bool = False


@dataclass(frozen=True, slots=True)
class PreviewSource:
    """Source of a preview, as the command of an import would get it.

    Attributes:
        workspace: Working directory of the command.
        scratch: Existing temporary folder for unpacked and embedded images.
        path: File or folder, relative to the workspace.
        arguments: Further arguments of the import.
        wants_fields: The user has chosen to read fields: all columns of text.
    """

    workspace: Path
    scratch: Path
    path: str
    arguments: Mapping[str, Any]
    wants_fields: bool = False

    @contextlib.contextmanager
    def open(self) -> Iterator[tuple[Path, ImportOptions]]:
        """Enter the workspace, and yield the file or folder to read and the options."""
        with contextlib.chdir(self.workspace):
            out = self.scratch / "data"
            with fetch_source(self.path, out, self._build_options()) as fetched:
                path = fetched.path
                if not fetched.options.is_detected:
                    path = find_table(path, fetched.options)
                yield path, fetched.options

    def hide_folders(self, text: str) -> str:
        """Return a text without the temporary folder and the path of the workspace."""
        for folder in (self.scratch, self.workspace):
            text = text.replace(f"{folder}{os.sep}", "")
        return text.replace(str(self.workspace), self.workspace.name)

    def dump_error(self, error: UserError) -> ErrorParts:
        """Return the parts of an error, without folders of the server."""
        remedy = error.remedy
        if isinstance(remedy, str):
            remedy = self.hide_folders(remedy)
        return ErrorParts(
            what=self.hide_folders(error.what),
            where=error.where,
            expected=self.hide_folders(error.expected),
            remedy=remedy,
        )

    def _build_options(self) -> ImportOptions:
        values: dict[str, Any] = {}
        for parameter in list_parameters(find_operation("import")):
            if parameter.name in self.arguments:
                values[parameter.name] = parameter.convert(self.arguments[parameter.name])
        values["row_range"] = values.pop("rows", None)
        known = {field.name for field in fields(ImportOptions)}
        return build_import_options({}, **{key: values[key] for key in known & values.keys()})


def preview_source(
    state: Any, source: PreviewSource, roles: Mapping[str, str], has_choices: bool
) -> JobOutput:
    """Read the first samples of a source in a worker process.

    Args:
        roles: Chosen role of each path; empty for those that the import finds.
        has_choices: Whether the roles may be chosen, if the source has records without boxes.
    """
    try:
        with source.open() as (path, options):
            shown = _preview_opened(source, path, options, roles, has_choices)
    except UserError as error:
        shown = PreviewReply(problem=source.dump_error(error), is_blocked=True)
    return JobOutput(shown.model_dump(mode="json"))


def _preview_opened(
    source: PreviewSource,
    path: Path,
    options: ImportOptions,
    roles: Mapping[str, str],
    has_choices: bool,
) -> PreviewReply:
    embedded = source.scratch / "images"
    embedded.mkdir()
    found = preview_import(path, options, embedded, NUM_SAMPLES, wants_fields=source.wants_fields)
    examples: Mapping[str, Any] = {}
    if has_choices and (found.keys or roles or _may_be_misread(found)):
        with contextlib.suppress(UserError):
            examples = list_examples(_read_records(path, options))
    keys = _list_detected(found, examples)
    if roles or not keys:
        keys = _list_chosen(roles, examples)
    can_choose = bool(examples) and len(examples) <= MAX_KEYS
    for key in keys:
        is_usual = key.path in examples and len(key.path) <= MAX_PATH_CHARS
        can_choose = can_choose and is_usual and key.role in ("", *CHOICES)
    images = ThumbnailMaker((source.workspace, source.scratch))
    problem = None
    if found.problem is not None:
        problem = source.dump_error(found.problem)
    elif source.wants_fields and not can_choose and not options.columns and found.keys:
        problem = ErrorParts(
            what=f"{format_count(len(examples), 'key')}, too many to choose their roles here",
            where="",
            expected=f"at most {MAX_KEYS} keys",
            remedy="name the columns in the form",
        )
    return PreviewReply(
        # The mapping of chosen roles is a file of which the user knows nothing.
        format="" if roles else source.hide_folders(_format_source(found, options)),
        num_rows=found.num_rows,
        keys=tuple(keys),
        has_choices=can_choose,
        samples=tuple(images.describe_sample(sample) for sample in found.samples),
        problem=problem,
        is_blocked=found.is_blocked or (problem is not None and options.on_invalid_row == "fail"),
    )


def _may_be_misread(found: ImportPreview) -> bool:
    """Return whether other roles may help: no row has a sample, for another reason than images."""
    return (
        found.is_blocked and not found.samples and not isinstance(found.problem, CorruptImageError)
    )


def _format_source(found: ImportPreview, options: ImportOptions) -> str:
    """Return format and reason. Detected columns are not those of the option."""
    if options.columns:
        return found.format
    return found.format.replace("--map", "columns")


def _list_chosen(roles: Mapping[str, str], examples: Mapping[str, Any]) -> list[PreviewKey]:
    """Return all paths with the chosen roles; without any, only images have a role."""
    keys: list[PreviewKey] = []
    for path, value in examples.items():
        role = roles.get(path, "")
        if not roles and is_image_value(value):
            role = "images"
        keys.append(_make_key(path, role, format_value(value)))
    return keys[:MAX_KEYS]


def _list_detected(found: ImportPreview, examples: Mapping[str, Any]) -> list[PreviewKey]:
    """Return the paths of a preview. Those that the import leaves out have the role `ignore`."""
    unused = _list_unused(found, examples)
    keys: list[PreviewKey] = []
    for key in found.keys:
        role = MEDIA_CHOICES.get(key.role, key.role)
        if not role and key.path in examples and key.path not in unused:
            role = "ignore"
        keys.append(_make_key(key.path, role, key.example))
    return keys


def _list_unused(found: ImportPreview, examples: Mapping[str, Any]) -> set[str]:
    """Return the paths without a role that the import does not leave out silently."""
    if not found.is_blocked:
        return set()
    paths = set(examples)
    if isinstance(found.problem, UnassignedKeysError) and found.problem.proposal is not None:
        columns = found.problem.proposal.list_unused()
        paths = {path for path in paths if parse_path(path).steps[0].key in columns}
    return paths


def _make_key(path: str, role: str, example: str) -> PreviewKey:
    name = _shorten(path, MAX_LABEL_CHARS)
    path = path[: MAX_PATH_CHARS + 1]
    return PreviewKey(path=path, name=name, role=role, example=escape_unprintable(example))


def _read_records(path: Path, options: ImportOptions) -> list[Record]:
    """Return the first records of a source; those of the only table of a folder."""
    file = find_table(path, options)
    if options.row_files:
        file = options.row_files[0]
    rows = open_table_rows(file, options)
    return [row.record for row in rows.iter_range(0, min(rows.num_rows, MAX_READ_ROWS))]


def build_chosen_mapping(state: Any, source: PreviewSource, roles: Mapping[str, str]) -> JobOutput:
    """Build the text of a mapping file from chosen roles in a worker process.

    Raises:
        UserError: A role or path is unknown, or the roles make no sample.
    """
    with source.open() as (path, options):
        records = _read_records(path, options)
        check_roles(roles, list_examples(records))
        mapping = build_mapping(roles, records)
        _add_image_folder(mapping, path, options)
    return JobOutput(format_mapping(mapping))


def check_roles(roles: Mapping[str, str], examples: Mapping[str, object]) -> None:
    """Raise UserError for unknown paths, and for roles without an answer.

    Args:
        examples: Known paths.
    """
    for path in roles:
        if path not in examples:
            raise UserError(
                f"the records have no key {path!r:.80}",
                expected="a key of the previewed source",
                remedy="preview the source again",
            )
    if {"answer", "fields"}.isdisjoint(roles.values()):
        raise UserError(
            "no key is the answer",
            expected="the role “answer” for one key, or “part of the answer” for several",
            remedy="choose the role of the answer",
        )


def check_number(roles: Mapping[str, str]) -> None:
    """Raise UserError for more roles than a preview shows."""
    if len(roles) > MAX_KEYS:
        raise UserError(
            f"roles of {format_count(len(roles), 'key')}",
            expected=f"at most {MAX_KEYS}",
            remedy="write a mapping file",
        )


def _add_image_folder(mapping: dict[str, Any], path: Path, options: ImportOptions) -> None:
    """Add the folder of the images next to a table to their path.

    An import without a mapping finds it, too.
    """
    for role, column_role in (("images", "image"), ("videos", "video")):
        files = list(map(str, as_list(mapping.get(role))))
        parsed = list(map(parse_path, files))
        if not files or any(len(one.steps) > 1 or one.last_key == EACH for one in parsed):
            continue
        column = parsed[0].last_key
        columns = {column_role: column, "answer": column}
        table = replace(options, columns=columns, format="table", mapping=None, prompt="")
        try:
            folder = open_source(find_table(path, options), table).image_folder
        except UserError:
            return  # the preview reports the error of the source
        if folder is not None:
            mapping[role] = add_folder(files, folder.name)


@dataclass(frozen=True, slots=True)
class ThumbnailMaker:
    """Builds the page data of samples.

    Attributes:
        folders: Folders of which images are shown.
    """

    folders: Sequence[Path]

    def describe_sample(self, sample: Sample) -> PreviewSample:
        """Return the images and texts of a sample."""
        visuals = list(iter_visuals(sample))
        images: list[PreviewImage] = []
        for path, image_index in visuals[:MAX_SHOWN_IMAGES]:
            side = SHOWN_SIDE if len(visuals) == 1 else SHOWN_SIDE_OF_SEVERAL
            images.append(self.make_thumbnail(path, side, _list_regions(sample, image_index)))
        messages: list[PreviewMessage] = []
        number = 1
        for message in sample.messages[:MAX_SHOWN_MESSAGES]:
            if len(visuals) > 1:
                messages.append(_describe_parts(message.role, message.content, number))
            else:
                messages.append(_describe_text(message.role, message.content))
            number += sum(isinstance(part, ImagePart | VideoPart) for part in message.content)
        if sample.rejected:
            messages.append(_describe_text("rejected", sample.rejected))
        for reference in sample.references[:MAX_SHOWN_MESSAGES]:
            messages.append(_describe_text("reference", (TextPart(text=reference),)))
        return PreviewSample(
            id=_shorten(sample.id, MAX_LABEL_CHARS),
            images=tuple(images),
            num_more_images=len(visuals) - len(images),
            num_more_messages=max(0, len(sample.messages) - MAX_SHOWN_MESSAGES),
            messages=tuple(messages),
            verdict=sample.label,
        )

    def make_thumbnail(self, path: Path, side: int, regions: Sequence[BoxPart]) -> PreviewImage:
        """Return a thumbnail with regions, or the reason without one.

        Args:
            side: Maximum width and height on the page.
        """
        name = _shorten(path.name, MAX_LABEL_CHARS)
        try:
            file = Path(os.path.realpath(get_file(path)))
        except ValueError:  # a null byte
            return PreviewImage(name=name, problem="invalid file name")
        if not any(file.is_relative_to(folder) for folder in self.folders):
            return PreviewImage(name=name, problem="outside of the workspace")
        try:
            height, width = read_visual_size(path)
            scale = min(1.0, MAX_THUMBNAIL_SIDE / max(width, height))
            frames: Iterator[Any] = iter(())
            if is_video_path(path):
                frames = iter_video_frames(path, [0])
            min_side = max(1, round(min(width, height) * scale))
            image = next(frames, None) or load_image(path, min_side=min_side)
        except CorruptImageError as error:
            return PreviewImage(name=name, problem=_shorten(error.what, MAX_TEXT_CHARS))
        inline = build_inline_image(image, MAX_THUMBNAIL_SIDE, THUMBNAIL_QUALITY)
        enlarged = min(SMALL_IMAGE_SCALE, side / max(width, height))
        return PreviewImage(
            name=name,
            src=inline["src"],
            width=max(1, round(width * enlarged)),
            height=max(1, round(height * enlarged)),
            regions=tuple(_build_region(region, width, height) for region in regions),
        )


def iter_visuals(sample: Sample) -> Iterator[tuple[Path, int | None]]:
    """Yield images with their index, and the first frame or the file of each video."""
    index = 0
    for part in sample.iter_parts():
        if isinstance(part, ImagePart):
            yield Path(part.image), index
            index += 1
        elif isinstance(part, VideoPart):
            yield Path(part.video or part.frames[0]), None


def _list_regions(sample: Sample, image_index: int | None) -> list[BoxPart]:
    regions: list[BoxPart] = []
    for part in sample.iter_parts():
        if isinstance(part, BoxPart) and part.image == image_index:
            regions.append(part)
    return regions[:MAX_SHOWN_REGIONS]


def _build_region(region: BoxPart, width: int, height: int) -> PreviewRegion:
    x1, y1, x2, y2 = region.xyxy
    left = 100 * min(x1, x2) / width
    top = 100 * min(y1, y2) / height
    region_height = 100 * abs(y2 - y1) / height
    # As `labelPosition` of the reports: the label covers as little of a box as possible.
    vertical = "below"
    if top > 12:
        vertical = "above"
    elif region_height > 25:
        vertical = "inside"
    horizontal = "rightwards"
    if left > 60:
        horizontal = "leftwards"
    return PreviewRegion(
        left=round(left, 3),
        top=round(top, 3),
        width=round(100 * abs(x2 - x1) / width, 3),
        height=round(region_height, 3),
        label=_shorten(region.label or "", MAX_LABEL_CHARS),
        is_point=region.is_point,
        position=f"{vertical} {horizontal}",
    )


def _describe_text(kind: Any, content: Sequence[ContentPart]) -> PreviewMessage:
    """Return the texts and boxes of a message."""
    text = "".join(map(_format_part, content)).strip()
    return PreviewMessage(kind=kind, parts=(PreviewPart(text=_shorten(text, MAX_TEXT_CHARS)),))


def _describe_parts(kind: Any, content: Sequence[ContentPart], number: int) -> PreviewMessage:
    """Return the texts and boxes of a message between the numbers of its images."""
    parts: list[PreviewPart] = []
    text = ""
    for part in content:
        if not isinstance(part, ImagePart | VideoPart):
            text += _format_part(part)
            continue
        if text.strip():
            parts.append(PreviewPart(text=_shorten(text.strip(), MAX_TEXT_CHARS)))
        text = ""
        if number <= MAX_SHOWN_IMAGES:
            parts.append(PreviewPart(image=number))
        number += 1
    if text.strip():
        parts.append(PreviewPart(text=_shorten(text.strip(), MAX_TEXT_CHARS)))
    return PreviewMessage(kind=kind, parts=tuple(parts))


def _format_part(part: ContentPart) -> str:
    if isinstance(part, TextPart):
        return part.text
    if isinstance(part, BoxPart):
        coordinates = ", ".join(f"{round(value, 1):.10g}" for value in list_coordinates(part))
        return f"{part.label or ''} [{coordinates}]\n".lstrip()
    if isinstance(part, ImagePart | VideoPart):
        return ""
    return part.to_text()


def _shorten(text: str, max_chars: int) -> str:
    """Shorten a text, and escape what could reorder it or cannot be encoded."""
    return escape_unprintable(shorten(text, max_chars))


def render_preview(
    preview: PreviewReply, *, is_chosen: bool, name_actions: Callable[[Remedy], str]
) -> str:
    """Render the section of the page in the current language.

    Args:
        is_chosen: Whether the user has chosen the roles.
        name_actions: See `describe_error`.
    """
    problem = ""
    if preview.problem is not None:
        problem = describe_error(UserError(**dict(preview.problem)), name_actions)
    return render_page(
        "import_preview.html",
        preview=preview,
        problem=problem,
        source=name_actions(preview.format),
        # Without a change, another preview confirms the roles of a blocked one.
        is_chosen=is_chosen or (preview.has_choices and preview.is_blocked),
        needs_roles=preview.has_choices and not all(key.role for key in preview.keys),
        role_labels=ROLE_LABELS,
        text_roles=ROLE_LABELS | TEXT_ROLES,
        message_labels=MESSAGE_LABELS,
    )
