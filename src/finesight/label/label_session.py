"""Labelling session: samples, task and labels of a folder, with suggestions of a model."""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from finesight.errors import UserError, suggest_similar_path
from finesight.label.label_store import (
    ORIGINAL_PROMPT_KEY,
    AnswerContent,
    AnswerKind,
    LabelItem,
    LabelStore,
    Suggestion,
    can_review,
    get_question,
    get_text,
    list_boxes,
    list_question_texts,
    read_labels,
    replace_texts,
)
from finesight.label.suggestion import JsonLeaf, iter_json_leaves
from finesight.metric_components import METRICS
from finesight.model_folder import resolve_model_path
from finesight.samples.default_prompts import NO_OBJECTS_ANSWER
from finesight.samples.image_file import CorruptImageError, is_image_file, list_images, list_pages
from finesight.samples.marked_prompt import remove_marks, write_marked_prompt
from finesight.samples.prompt_format import PromptFormat
from finesight.samples.run_examples import read_run_examples
from finesight.samples.sample import (
    BoxPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    check_utf8,
    format_number,
    read_samples,
)
from finesight.settings.recipe_template import detect_metric, is_closed_set
from finesight.train.run_dir import RunDir

MAX_CLASSES = 30
"""Maximum number of different answers that count as classes."""


@dataclass(frozen=True, slots=True)
class LabelTask:
    """Prompt and kind of the answers of a session.

    Attributes:
        prompt: Question about each image; None if it is unknown.
        choices: Closed set of class names: the answers, or the labels of boxes. Empty for free text
            and for names that hardly repeat.
        names: Known labels of boxes, also of an open set.
        has_fixed_choices: Whether the user gave the choices, so that other classes are invalid.
        template: JSON object for images without a suggestion; empty without one. Its values have
            the types of the examples: "", 0, false, or null for an unknown type.
        field_names: Keys of the answers, as given by the user; empty without any.
        has_default_kind: Whether neither the user nor examples determine the kind.
    """

    kind: AnswerKind = "text"
    prompt: str | None = None
    choices: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    template: str = ""
    field_names: tuple[str, ...] = ()
    has_default_kind: bool = False
    has_fixed_choices: bool = False

    @property
    def has_regions(self) -> bool:
        """Return whether the answers are boxes or points."""
        return self.kind in ("boxes", "points")


SUGGESTIONS_PER_WRITE = 64
"""Number of suggestions after which they are saved, so that an interruption loses no more."""


@dataclass(slots=True)
class LabelSession:
    """Open labels of a folder.

    Attributes:
        model: Run or model of the suggestions, as given by the user.
        review: Whether existing answers are reviewed, instead of new ones created.
    """

    model: str
    task: LabelTask
    store: LabelStore
    review: bool

    def add_suggestions(
        self,
        suggest: Callable[..., tuple[list[Suggestion], dict[str, str]]],
        on_progress: Callable[[int], None] = lambda count: None,
    ) -> dict[str, str]:
        """Suggest answers to the open samples that have none from this model.

        Images are decoded here only after a worker has decoded them within its limits.

        Args:
            suggest: `suggest_labels` or `rank_labels` with their options, or `Teacher.suggest`.

        Returns:
            The reason for each sample without a suggestion, by ID. Those with unreadable images are
            no longer listed.
        """
        reasons: dict[str, str] = {}
        pending = self.store.list_unsuggested(self.model)
        for start in range(0, len(pending), SUGGESTIONS_PER_WRITE):
            chunk = pending[start : start + SUGGESTIONS_PER_WRITE]
            unreadable = self.store.decode_images(chunk)
            chunk = [sample for sample in chunk if sample.sample.id not in unreadable]
            suggestions, failed = suggest(chunk, on_progress=on_progress)
            self.store.add_suggestions(suggestions, self.model)
            self.store.exclude(unreadable)
            reasons |= failed | unreadable
            on_progress(len(failed | unreadable))
        return reasons

    def complete_task(self) -> None:
        """Detect kind, labels of boxes and template, if they are unknown.

        The existing labels of the folder determine them or, without labels, the suggestions.
        """
        task, names = self.task, self.task.field_names
        contents = [item.proposal for item in self.store.items if item.proposal]
        answers = [one for one in self.store.list_answers() if get_text(one) != NO_OBJECTS_ANSWER]
        if task.has_default_kind:
            task = replace(task, kind=_detect_kind(answers or contents))
        if task.kind == "fields" and (names or not task.template):
            texts = [*map(get_text, answers), *([task.template] if names else [])]
            template = _build_template(texts, names) or _build_template(map(get_text, contents))
            task = replace(task, template=template)
        if not task.names:
            labels = _count_labels(contents, task.kind)
            choices = task.choices or _find_classes([*labels.elements()])
            names = tuple(name for name, _ in labels.most_common())
            task = replace(task, choices=choices, names=names)
        self.task = task

    def select_suggestion(self, item: LabelItem) -> AnswerContent:
        """Return the parts of a suggestion that have the kind of the task; empty without any.

        Fields are those of a JSON object with the keys that the user named.
        """
        content = self._select_parts(item, item.suggestion.content if item.suggestion else ())
        if self.task.kind != "fields" or list_boxes(content):
            return content
        value = _parse_json(get_text(content))
        keys = {*value} if isinstance(value, dict) else set[str]()
        return content if keys and keys == {*(self.task.field_names or keys)} else ()

    def select_proposal(self, item: LabelItem) -> AnswerContent:
        """Return the answer that the page shows first, without parts that its kind excludes."""
        if item.draft or item.label is not None:
            return self._select_parts(item, item.proposal)
        return self.select_suggestion(item)

    def _select_parts(self, item: LabelItem, content: AnswerContent) -> AnswerContent:
        if self._allows_boxes(item) and list_boxes(content):
            return content
        # Models answer some questions with an empty text.
        has_text = get_text(content).strip() != ""
        return tuple(part for part in content if has_text and not isinstance(part, BoxPart))

    def _allows_boxes(self, item: LabelItem) -> bool:
        """Return whether the task or the reviewed answer has boxes."""
        return self.task.has_regions or bool(list_boxes(item.existing_answer or ()))

    def save(
        self, item: LabelItem, content: AnswerContent, question: Sequence[str] | None = None
    ) -> None:
        """Save an answer. The first saved JSON object defines the fields of the other images.

        Args:
            question: See `LabelStore.save_label`.
        """
        suggested = self.select_suggestion(item)
        self.store.save_label(item.sample.sample.id, content, suggested, question)
        if self.task.kind == "fields" and not self.task.template:
            self.task = replace(self.task, template=_build_template([get_text(content)]))

    def describe_item(self, item: LabelItem) -> dict[str, Any]:
        """Return the values of an item as JSON data."""
        content, entry = self.select_proposal(item), item.suggestion
        suggested = self._select_parts(item, entry.content if entry else ())
        values = entry.model_dump(mode="json") if entry else {}
        text = get_text(content)
        source, leaves = self._find_fields(text)
        fields = []
        for leaf in leaves:
            # A parsed number would lose digits, as of 12.50.
            shown = leaf.value if isinstance(leaf.value, str) else source[leaf.start : leaf.stop]
            is_empty = source != text or leaf.value is None
            shown = "" if is_empty else shown.encode(errors="replace").decode()
            fields.append({"path": leaf.path, "text": shown})
        return {
            "id": item.sample.sample.id,
            "decision": item.decision.event if item.decision else "open",
            "confidence": values.get("confidence"),
            "score": values.get("score"),
            "answer": describe_answer(content),
            "question": item.question,
            "turns": [
                {"role": turn.role, "text": get_text(turn.content)}
                for turn in item.sample.sample.messages[: -2 if item.existing_answer else -1]
            ],
            "fields": fields,
            "has_template": bool(leaves) and source != text,
            "suggestion": describe_answer(suggested) if suggested else None,
            "parts": values["parts"] if suggested else [],
            "history": _describe_history(item),
        }

    def edit_fields(self, text: str, edits: Mapping[int, str]) -> str:
        """Replace fields of an answer by index. All other characters remain.

        Fields of the template without a value become "" or null. An unedited template becomes "".
        """
        source, leaves = self._find_fields(text)
        if source != text and not edits:
            return ""
        if extra := edits.keys() - set(range(len(leaves))):
            raise UserError(
                f"field {min(extra)} (0-based) of {len(leaves)} fields",
                where="label",
                expected="fields of the answer",
                remedy="reload the page",
            )
        types = {leaf.path: leaf.value for leaf in iter_json_leaves(self.task.template)}
        parts, offset = [], 0
        for index, leaf in enumerate(leaves):
            if source == text and index not in edits:
                continue
            # The template has one item of each list.
            path = tuple(0 if isinstance(key, int) else key for key in leaf.path)
            typed = types.get(path) if leaf.value is None else leaf.value
            parts += [source[offset : leaf.start], _encode_scalar(edits.get(index, ""), typed)]
            offset = leaf.stop
        return "".join(parts) + source[offset:]

    def check_answer(self, item: LabelItem, text: str, has_boxes: bool) -> None:
        """Raise UserError for boxes in another task, or fields that are not a JSON object."""
        if has_boxes and not self._allows_boxes(item):
            raise UserError(
                "the answer has boxes",
                expected=f"an answer of the kind {self.task.kind}",
                remedy="reload the page, or start the command with --kind boxes or points",
            )
        value = _parse_json(text)
        if self.task.kind == "fields" and text.strip() and not isinstance(value, dict):
            raise UserError(
                f"the answer is not JSON{'' if value is None else ' of an object'}: {text!r:.80}",
                expected="a JSON object, like most answers",
                remedy="correct it, or skip (S); answers of the kind text need no JSON",
            )

    def _find_fields(self, text: str) -> tuple[str, list[JsonLeaf]]:
        """Return the JSON text that has the fields of an answer, and its scalars.

        It is the answer or else the template; without fields, the answer without scalars.
        """
        for source in (text, self.task.template) if self.task.kind == "fields" else ():
            if isinstance(_parse_json(source), dict):
                return source, [*iter_json_leaves(source)]
        return text, []


def open_session(
    folder: Path,
    run_or_model: str,
    sources: Sequence[Path],
    *,
    prompt: str | None = None,
    kind: AnswerKind | None = None,
    choices: Sequence[str] = (),
    field_names: Sequence[str] = (),
    review: bool = False,
    train_fraction: float | None = None,
) -> LabelSession:
    """Read the samples of a session and open its folder.

    Kind and choices that are not given come from the training data of the run, or else from the
    answers of the samples. The prompt is that of the existing labels, or else of the training data.
    """
    examples = read_run_examples(run_or_model)
    prompt_format = PromptFormat.from_run(resolve_model_path(run_or_model))
    known = {} if review else _read_questions(folder)
    default = LabelQuestion(prompt or build_task(examples).prompt)
    last_question = next(reversed(known.values()), None)
    if last_question is not None and (prompt is None or last_question.has_text(prompt)):
        # Also with an equal --prompt: existing labels have image marks and system messages, too.
        default = last_question

    def select_question(path: Path) -> LabelQuestion:
        question = known.get(os.path.realpath(path), default)
        if question.prompt is None:
            raise UserError(
                "images have no prompt",
                where="--prompt",
                expected="a question, because the training data of a run does not provide one",
                remedy='for example: --prompt "Read the receipt."',
            )
        if prompt and not question.has_text(prompt):
            texts = f"{question.text!r:.500}, not {prompt!r:.500}"
            raise UserError(
                f"the label of {path} answers the prompt {texts}",
                where=str(folder),
                expected="the prompt of the existing labels",
                remedy=f"use it: --prompt {shlex.quote(question.text)}, or choose a free folder: "
                f"--out {RunDir(folder).next_path}",
            )
        return question

    def build_question(path: Path) -> LocatedSample:
        return _build_question(path, select_question(path), prompt_format)

    samples = read_items(sources, build_question, review)
    if not examples:
        examples = [one for one in samples if one.sample.messages[-1].role == "assistant"]
    task = build_task(
        examples,
        prompt=default.text or None,
        kind=kind,
        choices=choices,
        field_names=field_names,
    )
    if review and not can_review(folder, sources):
        raise UserError(
            "the folder has samples that are not of this review",
            where=str(folder),
            expected="a new folder, or that of a review of the same files",
            remedy=f"choose a free folder: --out {RunDir(folder).next_path}",
        )
    store = LabelStore(folder, samples, review=review, train_fraction=train_fraction)
    store.add_sources(sources, review=review)
    return LabelSession(run_or_model, task, store, review)


def describe_answer(content: Sequence[Any]) -> dict[str, Any]:
    """Return the text and the boxes of an answer as JSON data. A point has two equal corners."""
    boxes = [
        {"image": box.image, "label": box.label, "xyxy": [*map(format_number, box.xyxy)]}
        for box in list_boxes(content)
    ]
    return {"text": get_text(content), "boxes": boxes}


class LabelQuestion(NamedTuple):
    """Question about an image, and the messages before it.

    Attributes:
        prompt: Text with `<image>` where labels have their images; None if it is unknown.
        system_messages: Messages before the question; None for those of the run.
    """

    prompt: str | None
    system_messages: tuple[Message, ...] | None = None

    @property
    def text(self) -> str:
        """Prompt without the marks of images."""
        return remove_marks(self.prompt or "")

    def has_text(self, prompt: str) -> bool:
        """Return whether a prompt asks this question, apart from white space around it."""
        return remove_marks(prompt).strip() == self.text.strip()


def _read_questions(folder: Path) -> dict[str, LabelQuestion]:
    """Read the questions of existing labels by the resolved path of the image.

    Corrections concern one image each, and are in the journal.
    """
    questions: dict[str, LabelQuestion] = {}
    for located in read_labels(folder):
        messages = located.sample.messages
        question = next(turn for turn in reversed(messages) if turn.role == "user")
        original = located.sample.meta.get(ORIGINAL_PROMPT_KEY)
        if original is not None and len(list_question_texts(located.sample)) == 1:
            question = replace_texts(question, [original])
        prompt = write_marked_prompt(question.content)
        system_messages = messages[:1] if messages[0].role == "system" else ()
        for part in located.sample.iter_parts():
            if isinstance(part, ImagePart):
                path = os.path.realpath(located.resolve_path(part.image))
                questions[path] = LabelQuestion(prompt, system_messages)
    return questions


def _describe_history(item: LabelItem) -> list[dict[str, Any]]:
    """Return the entries of an item with their answers, and the answer before if it differs."""
    entries, before = [], item.existing_answer or ()
    for entry in item.history:
        old, new = describe_answer(before), describe_answer(entry.content)
        texts = {"old": old if before and old != new else None, "new": new}
        values = entry.model_dump(mode="json", include={"time", "event", "model", "question"})
        entries.append({**values, **(texts if entry.content else {"old": None, "new": None})})
        before = entry.content or before
    return entries


def is_imported(folder: Path, run_dir: Path) -> bool:
    """Return whether a run was trained with copies of labels of a folder, as `init` writes them."""
    examples, labels = (
        {(LabelItem(one, review=False).digest, get_question(one.sample)) for one in samples}
        for samples in (read_run_examples(str(run_dir)), read_labels(folder))
    )
    return bool(examples) and examples <= labels


def build_task(
    examples: Sequence[LocatedSample],
    *,
    prompt: str | None = None,
    kind: AnswerKind | None = None,
    choices: Sequence[str] = (),
    field_names: Sequence[str] = (),
) -> LabelTask:
    """Build the task of labeled samples. Given values take precedence over detected ones.

    A closed set of at most `MAX_CLASSES` answers or labels of boxes are classes.
    """
    answers = [one.sample.messages[-1] for one in examples]
    contents = [message.content for message in answers if message.role == "assistant"]
    texts = [get_text(content) for content in contents]
    detected = "fields" if field_names else _detect_kind(contents)
    if detected == "text" and (choices or _find_classes(texts)):
        detected = "classes"
    labels = _count_labels(contents, kind or detected)
    is_class = (kind or detected) == "classes"
    found = _find_classes(texts if is_class else [*labels.elements()], is_class)
    if prompt is None and examples:
        prompt = get_question(examples[0].sample) or None
    return LabelTask(
        kind=kind or detected,
        prompt=prompt,
        choices=tuple(choices) or found,
        names=tuple(labels),
        template=_build_template(texts, field_names) if (kind or detected) == "fields" else "",
        field_names=tuple(field_names),
        has_default_kind=not (kind or choices or field_names or contents),
        has_fixed_choices=bool(choices),
    )


def _find_classes(names: Sequence[str], is_class: bool = False) -> tuple[str, ...]:
    """Return the names of a closed set; empty for other names."""
    is_closed = 0 < len({*names}) <= MAX_CLASSES and (is_class or is_closed_set(names))
    return tuple(dict.fromkeys(filter(None, names))) if is_closed else ()


def _count_labels(contents: Iterable[Sequence[Any]], kind: AnswerKind) -> Counter[str]:
    """Count the labels of boxes and points, if they are the kind of the answers."""
    boxes = chain.from_iterable(map(list_boxes, contents))
    return Counter(box.label for box in boxes if box.label and kind in ("boxes", "points"))


def _detect_kind(contents: Iterable[Sequence[Any]]) -> AnswerKind:
    """Return the kind of most answers; images without objects are not counted."""
    found = [one for one in contents if list_boxes(one) or get_text(one) != NO_OBJECTS_ANSWER]
    if not found:
        return "text"
    content = METRICS[detect_metric(found)].answer_content
    return "text" if content == "formula" else content


def _build_template(texts: Iterable[str], field_names: Sequence[str] = ()) -> str:
    """Return a JSON object with the keys of at least half of the objects, if most texts are any.

    Args:
        field_names: Keys of the result instead. Those in no text are strings.
    """
    values = [_parse_json(text) for text in texts]
    objects = [value for value in values if isinstance(value, dict)]
    counts = Counter(key for value in objects for key in value)
    names = field_names or [key for key, count in counts.items() if 2 * count >= len(objects)]
    if not field_names and (not names or 2 * len(objects) <= len(values)):
        return ""
    if field_names:
        objects = [*objects, dict.fromkeys(field_names, "")]
    template = {name: _build_empty_value([one.get(name) for one in objects]) for name in names}
    return json.dumps(template, ensure_ascii=False)


def _build_empty_value(values: Sequence[Any]) -> Any:
    """Return the first known one of JSON values with empty scalars; null for an unknown type."""
    first = next((one for one in values if one is not None), None)
    if isinstance(first, dict):
        others = [one for one in values if isinstance(one, dict)]
        return {key: _build_empty_value([one.get(key) for one in others]) for key in first}
    if isinstance(first, list):
        items = [item for one in values if isinstance(one, list) for item in one]
        return [_build_empty_value(items)] if first else []
    return None if first is None else type(first)()


def read_items(
    sources: Iterable[Path], build_question: Callable[[Path], LocatedSample], review: bool
) -> list[LocatedSample]:
    """Read samples from data files, and build one sample for each image.

    Args:
        sources: Images, folders of images (searched recursively), and JSONL files.
        build_question: Function that returns the sample of an image.
        review: Whether the samples of each source need answers.

    Raises:
        UserError: A source is missing, has no samples or, in a review, no answers.
    """
    items: list[LocatedSample] = []
    for source in sources:
        if not source.exists():
            raise UserError(
                f"{source} does not exist",
                where="label",
                expected="images, folders of images, or a JSONL file",
                remedy=suggest_similar_path(source),
            )
        if source.is_dir() or is_image_file(source):
            files = [] if review else list_images(source)
            found = [*map(build_question, files)]
        else:
            samples = read_samples(source, require_answer=False)
            found = [LocatedSample(sample, source.parent) for sample in samples]
        if review and not any(one.sample.messages[-1].role == "assistant" for one in found):
            raise UserError(
                "no sample has an answer",
                where=str(source),
                expected="with --review, JSONL files of samples with answers",
                remedy="remove --review",
            )
        items += found
    if not items:
        raise UserError(
            "no images and no samples",
            where=", ".join(map(str, sources)),
            expected="images, folders of images, or a JSONL file",
            remedy="correct the paths",
        )
    return items


def _build_question(
    path: Path, question: LabelQuestion, prompt_format: PromptFormat
) -> LocatedSample:
    pages = [path]
    with suppress(CorruptImageError):  # the page shows it
        pages = list_pages(path)
    images = [ImagePart(image=page.name) for page in pages]
    content = prompt_format.build_content(question.prompt or "", images)
    system_messages = question.system_messages
    if system_messages is None:
        system_messages = prompt_format.build_system_messages(len(images))
    messages = (*system_messages, Message(role="user", content=content))
    sample = Sample(id=check_utf8(str(path)), messages=messages)
    return LocatedSample(sample, path.parent)


def _parse_json(text: str) -> dict[str, Any] | list[Any] | None:
    """Return the JSON object or list of a text, or None for all other texts."""
    with suppress(ValueError, RecursionError):
        # int() raises ValueError for NaN and Infinity, which are not JSON.
        value = json.loads(text, parse_constant=int)
        return value if isinstance(value, dict | list) else None
    return None


def _encode_scalar(text: str, typed: Any) -> str:
    """Return the JSON of an edited value: of the type of `typed` if possible, else a string."""
    word = text.strip()
    if not isinstance(typed, str):
        if word in ("", "null"):
            return "null"
        types = (int, float) if type(typed) in (int, float) else (bool,)
        with suppress(ValueError, RecursionError):
            if type(json.loads(word, parse_constant=int)) in types:
                return word
    return json.dumps(text, ensure_ascii=False)
