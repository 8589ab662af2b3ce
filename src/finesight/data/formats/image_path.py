"""Conversations whose first user message is only an image path.

{"conversations": [{"role": "user", "value": "LaTeX_OCR/0.jpg"},
                   {"role": "assistant", "value": "x ^ { 2 }"}]}

The rows contain no question: `--prompt` sets it. Later user messages are text unless they are image
paths as well. See `conversation_rows` for boxes in answers.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence

from finesight.data.formats import conversation_rows
from finesight.data.formats.conversation_rows import (
    build_turns_example,
    list_turn_texts,
    parse_answer,
    parse_turns,
)
from finesight.data.formats.dataset_format import (
    DatasetFormat,
    ExportContext,
    ImportContext,
    ImportExample,
    RowImages,
    strip_object_refs,
)
from finesight.data.jsonl import LocatedSample
from finesight.data.row_reader import Record, SourceRow
from finesight.data.sample import ContentPart, ImagePart, Role, TextPart
from finesight.errors import UserError

_IMAGE_PATH = re.compile(r"[^\n<>|]+\.(?:jpe?g|png|webp|bmp|gif|tiff?|ppm|jp2|avif)", re.IGNORECASE)


def detect(records: Sequence[Record]) -> str | None:
    """Detect conversations that start with an image path, and return the reason or None."""
    for record in records:
        question = next((text for role, text in list_turn_texts(record) if role == "user"), "")
        if not is_image_path(question):
            return None
    return f"the user text is an image path in all of the first {len(records)}"


def parse_row(row: SourceRow, context: ImportContext) -> ImportExample:
    """Build a training example from a conversation that starts with an image path."""
    images = RowImages(context)

    def parse_text(role: Role, text: str) -> Iterator[ContentPart]:
        if role == "assistant":
            yield from parse_answer(text, images)
        elif role == "user" and (not images.paths or is_image_path(text)):
            yield images.add_image(text)
        else:
            yield strip_object_refs(text)

    turns = parse_turns(row.record)
    return build_turns_example(row, context, turns, parse_text, "conversations", "system")


def is_image_path(text: str) -> bool:
    """Return whether a text consists of a single image path."""
    return _IMAGE_PATH.fullmatch(text.strip()) is not None


def write_files(
    samples: Sequence[LocatedSample], context: ExportContext
) -> conversation_rows.Files:
    """Write conversations whose first user message is the image path.

    The question, which must be the same for all samples, is reported as a note.

    Raises:
        UserError: The samples have different questions, or a question is not one image followed by
            text.
    """
    prompts: set[str] = set()

    def make_record(located_sample: LocatedSample) -> Record:
        placeholder = conversation_rows.ImagePlaceholder(located_sample, context)
        text_turns = conversation_rows.render_turns(located_sample, placeholder)
        user_index = next(
            user_index for user_index, (role, _) in enumerate(text_turns) if role == "user"
        )
        image, prompt = _split_question(located_sample.sample.messages[user_index].content)
        name = context.image_name(located_sample.resolve_path(image.image))
        prompts.add(prompt)
        later_questions = [text for role, text in text_turns[user_index + 1 :] if role == "user"]
        is_unsupported = (
            len(placeholder.image_names) > 1
            or not is_image_path(name)
            or any(map(is_image_path, later_questions))
        )
        if is_unsupported or len(prompts) > 1:
            raise _build_unsupported_error(f"the question {prompt[:60]!r} about {name!r}")
        text_turns[user_index] = ("user", name)
        turns = [{"from": role, "value": text} for role, text in text_turns]
        return conversation_rows.build_record(located_sample, context, {"conversations": turns})

    yield from conversation_rows.write_rows(samples, make_record)
    conversation_rows.add_box_note(samples, context)
    context.notes.append(
        f"the rows do not contain the question; --prompt {shlex.quote(prompts.pop())} does"
    )


def _split_question(question: tuple[ContentPart, ...]) -> tuple[ImagePart, str]:
    if question and isinstance(question[0], ImagePart):
        text = "".join(part.text for part in question[1:] if isinstance(part, TextPart))
        if all(isinstance(part, TextPart) for part in question[1:]):
            return question[0], text
    raise _build_unsupported_error(f"a question of {', '.join(part.type for part in question)}")


def _build_unsupported_error(what: str) -> UserError:
    return UserError(
        what,
        expected="one image with a common suffix, then the same question in every sample",
        remedy="export to conversations, which supports both",
    )


FORMAT = DatasetFormat(
    name="image-path",
    description='"conversations": [{"role": "user", "value": "path"}, ...], question by --prompt',
    typical_keys=frozenset({"conversations", "role", "value"}),
    detect=detect,
    parse_row=parse_row,
    supported_options=frozenset({"prompt", "boxes"}),
    write_files=write_files,
)
