"""Samples from records, as a mapping states the roles of their keys."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from string import ascii_uppercase
from typing import Any, NamedTuple, get_args

from finesight.ingest.field_path import EACH, FieldPath, PathStep, format_key
from finesight.ingest.formats.conversation_rows import decode_json, parse_tools, read_tool_call
from finesight.ingest.formats.dataset_format import (
    NUMBERED_IMAGE,
    ImportContext,
    ImportExample,
    InvalidOptionError,
    PlaceholderCountError,
    RowImages,
    as_list,
    build_example,
    check_image_order,
    describe_value,
    join_leading_media,
    make_text_part,
    merge_text_parts,
)
from finesight.ingest.formats.image_annotations import (
    ObjectAnnotation,
    build_detection_examples,
    check_declared_size,
)
from finesight.ingest.formats.table import (
    create_labelled_boxes,
    find_letters,
    letter_options,
    omit_classes,
    place_images,
)
from finesight.ingest.joined_tables import UnjoinedRecord
from finesight.ingest.mapping import (
    GROUPED_ROWS,
    Boxes,
    Elements,
    Frame,
    Messages,
    Parts,
    Points,
    RecordMapping,
    Value,
    format_key_text,
    iter_values,
    name_values,
)
from finesight.ingest.record_values import (
    META_ROLE,
    MISSING,
    PART_ROLE,
    RecordValues,
    RoleAssignment,
    Scope,
    is_empty,
    iter_children,
    parse_texts,
    read_group,
    to_text,
    write_json,
)
from finesight.ingest.row_reader import Record, SourceRow
from finesight.samples.boxes import InvalidBoxError
from finesight.samples.default_prompts import NO_OBJECTS_ANSWER
from finesight.samples.sample import (
    MAX_ANSWERS,
    MAX_MESSAGES,
    BoxPart,
    ContentPart,
    EmptyAnswerError,
    InvalidRowError,
    Message,
    Role,
    TextPart,
    check_limit,
)

REASON_NO_ITEMS = "without items in `sample` of the mapping"
LEFT_OUT = "left out by `where` of the mapping"

ROLES: dict[str, Role] = {role: role for role in get_args(Role)}

NOTE_EMPTY_ARGUMENTS = "records with calls, whose keys without a value (null) are left out"
NOTE_POLYGON = "polygons, each imported as the box around it"

MIN_VERTICES = 3

CoordinateCheck = Callable[[Any, str], list[Any]]
"""Function that returns the coordinates of a region for its values and its role."""

_PLACEHOLDER = re.compile(rf"(<image>|<video>|{NUMBERED_IMAGE.pattern})")


@dataclass(frozen=True, slots=True)
class MappedRow:
    """Result of a record: its samples, and the account of its keys.

    Attributes:
        readings: Values of the record with their roles, in the order of reading.
        unused: Values without a role.
    """

    examples: list[ImportExample]
    readings: list[RoleAssignment]
    unused: list[RoleAssignment]


def parse_mapped_row(
    row: SourceRow, context: ImportContext, mapping: RecordMapping
) -> list[ImportExample]:
    """Build the samples of a record.

    Raises:
        InvalidRowError: A path does not fit the record, or a key has no role.
    """
    found = read_mapped_row(row, context, mapping)
    if found.unused and found.examples:
        raise _build_unused_error(found.unused)
    return found.examples


def read_mapped_row(row: SourceRow, context: ImportContext, mapping: RecordMapping) -> MappedRow:
    """Build the samples of a record, and account for its keys."""
    if mapping.group is not None:
        read_group(row.record[GROUPED_ROWS][0], mapping.group)  # raises for a row without it
    record = row.record
    if isinstance(record, UnjoinedRecord):
        record = record.tables.join(record)
    record = parse_texts(record, mapping.list_parse_paths())
    values = RecordValues(Scope(record, ""))
    scopes = [values.root]
    if mapping.sample is not None:
        scopes = _select_items(values, mapping.sample, values.root, "sample", context)
        if not scopes:
            context.skipped_rows[REASON_NO_ITEMS] += 1
    is_eval: bool | None = None
    examples: list[ImportExample] = []
    left_out: Counter[str] = Counter()
    for number, scope in enumerate(scopes, start=1):
        sample_id = f"{row.id}-{number}" if len(scopes) > 1 else row.id
        builder = SampleBuilder(row, context, mapping, values, scope, sample_id)
        unmet = values.find_unmet(mapping.where, scope)
        if unmet is None:
            if is_eval is None:  # records that `where` leaves out may have another split
                is_eval = _read_split(values, mapping.split)
            examples += [replace(example, is_eval=is_eval) for example in builder.build()]
        else:
            left_out[f"{LEFT_OUT} ({unmet})"] += 1
            values.discard(scope)
    if examples:
        context.row_notes.update({f"samples {name}": count for name, count in left_out.items()})
    else:
        context.skipped_rows.update(dict.fromkeys(left_out, 1))
        if left_out:  # all keys of the record
            values.discard(values.root)
    _use_keys(values, row, mapping)
    _count_keys(values, mapping, context)
    return MappedRow(examples, values.readings, list(values.iter_unused()))


def _read_split(values: RecordValues, split: Value | None) -> bool:
    """Return whether a record is one for validation."""
    if split is None:
        return False
    found = values.evaluate(split, values.root, "split")
    if found is MISSING:
        return False
    name = to_text(found, split.name_role("split"))
    if name not in ("train", "eval"):
        raise InvalidRowError(
            f"the {split.name_role('split')} {name[:60]!r}",
            "train or eval",
            "translate it: values: {training: train, validation: eval}; leave rows out by where",
        )
    return name == "eval"


def _use_keys(values: RecordValues, row: SourceRow, mapping: RecordMapping) -> None:
    """Mark the ID of the record and all keys of groups and tables as used."""
    if row.has_own_id and mapping.id is None:
        values.discard_key("id")
    if mapping.group is not None:
        steps = (PathStep(GROUPED_ROWS), PathStep("*", is_each=True), *mapping.group.steps)
        all_rows = FieldPath(f"{GROUPED_ROWS}.*.{mapping.group.text}", steps)
        values.read_optional(all_rows, values.root, "group")
        values.use_repeated(values.root.value[GROUPED_ROWS])
    for name, table in mapping.tables.items():
        for path in table.list_key_paths(name):
            values.read_optional(path, values.root, "key")


def _count_keys(values: RecordValues, mapping: RecordMapping, context: ImportContext) -> None:
    """Count missing values, keys of objects that become unknown, and ignored keys."""
    for path_text, count in values.num_missing.items():
        context.row_notes[f"values missing at {path_text} of the mapping"] += count
    for path_text, count in values.num_object_keys.items():
        context.row_notes[f"keys of the objects at {path_text}, which no role uses"] += count
    for path_text, count in values.discard_unselected().items():
        context.row_notes[f"items of {path_text}, which no lookup selects"] += count
    for path in mapping.ignore:
        ignored = values.read_optional(path, values.root, "ignore")
        for keys in dict.fromkeys(one.list_general_keys() for one in ignored):
            context.other_keys[f"{'.'.join(keys)}, ignored by the mapping"] += 1


def generalize_location(location: str) -> str:
    """Return the path of a location and of others in the same lists."""
    return re.sub(r"(?<=\.)[0-9]+(?=\.|$)", "*", location)


def _build_unused_error(unused: Sequence[RoleAssignment]) -> InvalidRowError:
    location = unused[0].location
    others = ""
    if len(unused) > 1:
        others = f", and {len(unused) - 1} more: " + ", ".join(one.location for one in unused[1:6])
    return InvalidRowError(
        f"{location} with {describe_value(unused[0].value)} has no role{others}",
        "a role for each key of the record, meta or ignore",
        f"add the key to the mapping, for example ignore: [{generalize_location(location)}]",
    )


def _select_items(
    values: RecordValues, elements: Elements, scope: Scope, role: str, context: ImportContext
) -> list[Scope]:
    """Return the items of a list that meet its conditions; the others are counted."""
    kept: list[Scope] = []
    for item in values.iterate(elements, scope, role):
        unmet = values.find_unmet(elements.where, item)
        if unmet is None:
            kept.append(item)
        else:
            if item is scope:  # the sample itself, for a single box
                _discard_region(values, elements, item)
            else:
                values.discard(item)
            context.row_notes[f"items {LEFT_OUT} ({unmet})"] += 1
    return kept


def _discard_region(values: RecordValues, elements: Elements, scope: Scope) -> None:
    """Mark coordinates and label of a box or point that the mapping leaves out as used."""
    sections: list[Any] = []
    if isinstance(elements, Boxes):
        sections = [elements.box, elements.polygon, elements.label]
    elif isinstance(elements, Points):
        sections = [elements.point, elements.label]
    for value in iter_values(tuple(sections)):
        if value.path is not None:
            values.read_optional(value.path, scope, "left out")


@dataclass(frozen=True, slots=True)
class SampleBuilder:
    """Builder of the sample of a record, or of an item of its list `sample`.

    Attributes:
        scope: Value in which paths start.
    """

    row: SourceRow
    context: ImportContext
    mapping: RecordMapping
    values: RecordValues
    scope: Scope
    sample_id: str

    def build(self) -> list[ImportExample]:
        """Build the samples: one, or several for `--box-task grounding`."""
        mapping = self.mapping
        sample_id = self.sample_id
        if mapping.id is not None:
            sample_id = self.values.evaluate_text(mapping.id, self.scope, "id")
        meta = self._read_meta()
        if mapping.messages is not None:
            examples = [self._build_conversation(sample_id, mapping.messages)]
        elif mapping.boxes is not None and mapping.question is None and mapping.classes:
            examples = self._build_detection(sample_id, mapping.boxes)
        else:
            examples = [self._build_question(sample_id)]
        label = self._read_verdict()
        tools = self._read_tools()
        return [
            replace(example, meta={**meta, **example.meta}, label=label, tools=tools)
            for example in examples
        ]

    def _read(self, role: str, value: Value | None) -> Any:
        """Return the value of a role, `MISSING` without one."""
        if value is None:
            return MISSING
        return self.values.evaluate(value, self.scope, role)

    def _read_text(self, role: str, value: Value | None) -> str | None:
        """Return the text of a role; None without a role, or without the optional key."""
        if value is None:
            return None
        found = self._read(role, value)
        return None if found is MISSING else to_text(found, value.name_role(role))

    def _read_meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = {}
        for name, value in self.mapping.meta.items():
            found = self._read(META_ROLE, value)
            if found is not MISSING and found is not None:
                # Values of other types than those of JSON, such as dates, become text.
                meta[name] = json.loads(write_json(found, f"metadata {name}"))
        return meta

    def _read_verdict(self) -> bool | None:
        if self.mapping.verdict is None:
            return None
        found = self._read("verdict", self.mapping.verdict)
        if found is MISSING:
            return None
        if not isinstance(found, bool):
            raise InvalidRowError(
                f"the {self.mapping.verdict.name_role('verdict')} is {describe_value(found)}",
                "true or false",
                "translate it: values: {good: true, bad: false}",
            )
        return found

    def _read_tools(self) -> tuple[Record, ...]:
        """Return the definitions of tools."""
        value = self.mapping.tools
        found = self._read("tools", value)
        if value is None or found is MISSING:
            return ()
        with _name_role(value, "tools"):
            tools = tuple(parse_tools(found))
        if not tools and not value.is_optional:
            raise InvalidRowError(
                f"no definitions in the {value.name_role('tools')}",
                "a list of tools",
                "add them, or write ? after the key of tools if rows may lack them",
            )
        return tools

    def _read_calls(self, calls: Value | None, scope: Scope) -> tuple[ContentPart, ...]:
        """Return the calls of tools of an answer: a list of them or one, also as JSON text."""
        if calls is None:
            return ()
        found = self.values.evaluate(calls, scope, "calls")
        if found is MISSING or is_empty(found):
            return ()
        decoded = decode_json(found)
        if not isinstance(found, str) and decoded != found:
            self.context.row_notes[NOTE_EMPTY_ARGUMENTS] += 1
        with _name_role(calls, "calls"):
            return tuple(map(read_tool_call, as_list(decoded)))

    def _list_media(self, role: str, sources: Sequence[Value]) -> list[Any]:
        """Return the files of a role. A path with `*` stands for several."""
        files: list[Any] = []
        for source in sources:
            found = self._read(role, source)
            if found is MISSING:
                continue
            named = source.name_role(role)
            for item in _flatten(found, source.num_lists):
                _check_file(item, named, is_image=role == "images")
                files.append(item)
        return files

    def _build_conversation(self, sample_id: str, messages: Messages) -> ImportExample:
        """Build a conversation, with its images at their placeholders or at the start."""
        mapping = self.mapping
        media = Media(
            RowImages(self.context),
            self._list_media("images", mapping.images),
            self._list_media("videos", mapping.videos),
        )
        turns: list[MappedTurn] = []
        system = self._read_text("system", mapping.system)
        if system is not None:
            turns.append(MappedTurn("system", [system]))
        for item in _select_items(self.values, messages, self.scope, "messages", self.context):
            turns += self._read_turns(messages, item, media)
        question = self._read_text("question", mapping.question)
        if question is not None:
            turns.append(MappedTurn("user", split_placeholders(question)))
        answer: list[str | ContentPart] = []
        if mapping.answer is not None:
            text = self._read("answer", mapping.answer)
            if not (text is MISSING and mapping.calls is not None):
                answer.append(to_text(text, mapping.answer.name_role("answer")))
        answer += self._read_calls(mapping.calls, self.scope)
        if answer:
            turns.append(MappedTurn("assistant", answer))
        check_limit(len(turns), MAX_MESSAGES, "messages")
        example = build_example(sample_id, media.build_messages(turns, self.context), {})
        rejected = self._read_text("rejected", mapping.rejected)
        if rejected is None:
            return example
        return replace(example, rejected=(make_text_part(rejected),))

    def _read_turns(self, messages: Messages, item: Scope, media: Media) -> list[MappedTurn]:
        """Return the message of an item, or its question and answer."""
        if messages.question is not None and messages.answer is not None:
            question = self.values.evaluate_text(messages.question, item, "question")
            answer = self.values.evaluate_text(messages.answer, item, "answer")
            return [
                MappedTurn("user", split_placeholders(question)),
                MappedTurn("assistant", [answer]),
            ]
        assert messages.role is not None, "validated with the mapping"
        role = self.values.evaluate_text(messages.role, item, "role")
        if role not in ROLES:
            raise InvalidRowError(
                f"the {messages.role.name_role('role')} {role[:60]!r}",
                f"one of {', '.join(ROLES)}",
                "translate it under messages.role: {path: ..., values: {human: user}}",
            )
        if messages.parts is not None:
            return [MappedTurn(ROLES[role], self._read_parts(messages.parts, item, media))]
        assert messages.content is not None, "validated with the mapping"
        calls = self._read_calls(messages.calls, item)
        content: list[str | ContentPart] = []
        found = self.values.evaluate(messages.content, item, "content")
        if not (calls and (found is MISSING or is_empty(found))):
            text = to_text(found, messages.content.name_role("content"))
            content += split_placeholders(text)
        return [MappedTurn(ROLES[role], [*content, *calls])]

    def _read_parts(self, parts: Parts, message: Scope, media: Media) -> list[str | ContentPart]:
        """Return the texts, images and videos of a message."""
        content: list[str | ContentPart] = []
        for item in _select_items(self.values, parts, message, "parts", self.context):
            found: list[str | ContentPart] = []
            for kind, value in parts.list_kinds().items():
                inner = self.values.evaluate(value, item, PART_ROLE)
                if inner is MISSING:
                    continue
                role = value.name_role(kind)
                if kind == "text":
                    found.append(to_text(inner, role))
                else:
                    _check_file(inner, role, is_image=kind == "image")
                    found.append(media.add(kind, inner))
            if len(found) != 1:
                raise InvalidRowError(
                    f"{item.location} has {len(found)} of text, image and video:"
                    f" {describe_value(item.value)}",
                    "one of them in each part",
                    "add the key of the part to messages.parts, or remove the part",
                )
            content += found
        return content

    def _build_detection(self, sample_id: str, boxes: Boxes) -> list[ImportExample]:
        """Build questions about all objects of an image, which list the classes."""
        if self.context.box_task not in ("detection", "grounding"):
            raise InvalidOptionError(
                f"boxes of a mapping have no {self.context.box_task}",
                where="--box-task",
                expected="detection or grounding",
                remedy="remove --box-task, or give the data in a format with outlines",
            )
        image_files = self._list_media("images", self.mapping.images)
        if len(image_files) != 1:
            raise InvalidRowError(
                f"boxes in a sample with {len(image_files)} images", "one image", "correct the row"
            )
        classes = _list_classes(self.row.record, self.mapping)
        objects: list[ObjectAnnotation] = []
        for coordinates, label in self._read_boxes(boxes):
            if label not in classes:
                raise InvalidRowError(
                    f"the label {str(label)[:60]!r}",
                    f"one of the classes {', '.join(classes)}"[:200],
                    "add it to classes in the mapping, or correct the row",
                )
            objects.append(ObjectAnnotation(str(label), coordinates))
        record = {"id": sample_id, "classes": list(classes)}
        return build_detection_examples(
            replace(self.row, record=record),
            self.context,
            boxes.frame.box_frame,
            image_files[0],
            objects,
            declared_size=self._read_size(boxes.frame),
        )

    def _build_question(self, sample_id: str) -> ImportExample:
        """Build a question with its answers."""
        mapping = self.mapping
        context = self.context
        if context.box_task != "detection":
            raise InvalidOptionError(
                "the mapping has a question of its own",
                where="--box-task",
                expected="a mapping of boxes with classes, without a question and an answer",
                remedy="remove --box-task, or map the question",
            )
        images = RowImages(context)
        media: list[ContentPart] = []
        for image in self._list_media("images", mapping.images):
            media.append(images.add_image(image))
        for video in self._list_media("videos", mapping.videos):
            media.append(images.add_video(video))
        choices = self._read_choices()
        question = self._read_text("question", mapping.question)
        if choices and question is None:
            raise InvalidRowError(
                f"{len(choices)} choices without a question",
                "a question",
                "add it, or remove the row",
            )
        if question is not None:
            lines = [question, *letter_options([*choices.values()], [*choices])]
            media = place_images(media, "\n".join(lines))
        regions, omitted = self._create_regions(images)
        messages: list[Message] = []
        system = self._read_text("system", mapping.system)
        if system is not None:
            messages.append(Message(role="system", content=(make_text_part(system),)))
        content = omit_classes(context.add_prompt(media), omitted, regions)
        messages.append(Message(role="user", content=content))
        texts, references = self._read_answers(choices)
        line_end = "\n" if regions else ""
        calls = self._read_calls(mapping.calls, self.scope)
        answers: list[tuple[ContentPart, ...]] = []
        for text in texts:
            answers.append((make_text_part(f"{text}{line_end}"), *regions, *calls))
        if not answers and mapping.calls is not None:
            _require_calls(calls, mapping.calls)
            answers.append(calls)
        elif not answers:  # of a mapping of boxes or points without an answer
            answers.append(regions or (TextPart(text=NO_OBJECTS_ANSWER),))
        rejected: tuple[ContentPart, ...] = ()
        rejected_text = self._read_text("rejected", mapping.rejected)
        if rejected_text is not None:
            rejected = (make_text_part(rejected_text),)
        return ImportExample(
            sample_id,
            tuple(messages),
            tuple(answers),
            references=tuple(references),
            rejected=rejected,
        )

    def _read_choices(self) -> dict[str, str]:
        """Return the choices by their letters."""
        choices = self.mapping.choices
        if choices is None:
            return {}
        if not isinstance(choices, Value):
            return self._join_choices(choices)
        role = choices.name_role("choices")
        num_read = len(self.values.readings)
        num_lost_keys = self.values.num_object_keys.total()
        found = self._read("choices", choices)
        if found is MISSING:
            return {}
        if not isinstance(found, list | tuple):
            remedy = "give split, or parse for a list in a text"
            if isinstance(found, dict):
                remedy = "write .* at the end of the path for the values of an object"
            raise InvalidRowError(f"the {role} are {describe_value(found)}", "a list", remedy)
        check_limit(len(found), len(ascii_uppercase), "choices")
        readings = self.values.readings[num_read:]
        if self.values.num_object_keys.total() == num_lost_keys:
            texts = [to_text(one, role) for one in found]
            item_letters = self._read_item_letters(choices, readings)
            return dict(zip(item_letters or ascii_uppercase, texts, strict=False))
        letters = self._read_letters(choices, readings)
        values = list(found)
        while values and is_empty(values[-1]):  # keys that only other rows have, as in Parquet
            values.pop()
        options: dict[str, str] = {}
        for letter, one in zip(letters, values, strict=False):
            options[letter] = to_text(one, role)
        return options

    def _read_letters(self, choices: Value, readings: Sequence[RoleAssignment]) -> list[str]:
        """Return the letters of an object of choices, by its keys.

        Raises:
            InvalidRowError: The keys state no letters and no order.
        """
        keys: list[str] = []
        paths = "options.first, options.second"
        if choices.path is not None:
            keys = [format_key(one.scope.get_item(choices.path).key) for one in readings]
            before, _, after = choices.path.text.rpartition(EACH)
            paths = ", ".join(f"{before}{key}{after}" for key in keys)
            del self.values.num_object_keys[choices.path.text]
        letters = find_letters(keys)
        if not letters:
            raise InvalidRowError(
                f"the {choices.name_role('choices')} are the values of an object, whose keys are"
                " no letters",
                "letters as keys, or a list",
                f"name the value of each choice in order: choices: [{paths}]; KEY? is one that rows"
                " may lack",
            )
        return letters

    def _read_item_letters(self, choices: Value, readings: Sequence[RoleAssignment]) -> list[str]:
        """Return the letters that the items of a list of choices have: `{id: B, text: red}`.

        The list is empty if no key of the items has a letter for each.

        Raises:
            InvalidRowError: Several keys have different letters, or the letters have gaps.
        """
        path = choices.path
        is_list = [step.is_each for step in path.steps] if path is not None else []
        if path is None or True not in is_list or is_list[-1] or len(readings) < 2:
            return []
        items = [dict(iter_children(one.scope.get_item(path).value)) for one in readings]
        num_item_steps = len(is_list) - is_list[::-1].index(True)
        text_key = path.steps[num_item_steps].key
        letters_by_key: dict[str, list[str]] = {}
        for key in dict.fromkeys(itertools.chain.from_iterable(items)):
            letters = [_parse_letter(item.get(key)) for item in items]
            are_different = all(letters) and len({*letters}) == len(letters)
            if ("A" in letters or are_different) and str(key) != text_key:
                letters_by_key[str(key)] = letters
        # Flags such as Y and N are letters, too, but those of choices begin with A.
        expected = list(ascii_uppercase[: len(items)])
        complete = {key: one for key, one in letters_by_key.items() if sorted(one) == expected}
        is_ambiguous = len({"".join(one) for one in complete.values()}) > 1
        if is_ambiguous or (letters_by_key and not complete):
            raise _build_letters_error(choices, letters_by_key)
        for key in complete:
            location = f"{path.text.rpartition(EACH)[0]}{EACH}.{format_key(key)}"
            steps = (*path.steps[:num_item_steps], PathStep(key))
            key_path = FieldPath(location, steps, path.from_root)
            self.values.read_optional(key_path, self.scope, "letters of choices")
            self.context.row_notes[f"rows whose choices have the letters at {location}"] += 1
        return next(iter(complete.values()), [])

    def _join_choices(self, values: Sequence[Value]) -> dict[str, str]:
        """Return choices that have a value each.

        The last ones may be missing. Keys that are letters are those of the choices.
        """
        check_limit(len(values), len(ascii_uppercase), "choices")
        letters: Sequence[str] = ascii_uppercase
        steps = [value.path.steps for value in values if value.path is not None]
        if len(steps) == len(values):
            for keys in zip(*steps, strict=False):
                named = find_letters([step.key for step in keys])
                letters = named or letters
        found = [self._read("choices", value) for value in values]
        while found and found[-1] is MISSING:
            found.pop()
        choices: dict[str, str] = {}
        for letter, value, one in zip(letters, values, found, strict=False):
            choices[letter] = to_text(one, value.name_role("choice"))
        return choices

    def _read_answers(self, choices: Mapping[str, str]) -> tuple[list[str], list[str]]:
        """Return the answers for training, and those only for scoring."""
        mapping = self.mapping
        if mapping.fields is not None:
            members: dict[str, Any] = {}
            for name, value in mapping.fields.items():
                found = self._read("fields", value)
                if found is not MISSING and not is_empty(found):
                    members[name] = found
            if not members:
                raise EmptyAnswerError(
                    f"no value in {', '.join(mapping.fields)}",
                    expected="a value in at least one field",
                    remedy="add it, or remove the row",
                )
            return [make_text_part(write_json(members, "fields")).text], []
        if mapping.answer is not None:
            found = self._read("answer", mapping.answer)
            if found is MISSING and mapping.calls is not None:
                return [], []
            return [_look_up(found, mapping.answer, choices)], []
        if mapping.answers is None:
            return [], []
        found = self._read("answers", mapping.answers)
        if found is MISSING or is_empty(found):
            raise EmptyAnswerError(
                f"no {mapping.answers.name_role('answers')}",
                expected="at least one answer",
                remedy="add it, or remove the row",
            )
        if not isinstance(found, list | tuple):
            raise InvalidRowError(
                f"the {mapping.answers.name_role('answers')} are {describe_value(found)}",
                "a list of answers",
                "map it as answer",
            )
        check_limit(len(found), MAX_ANSWERS, "answers")
        texts = [_look_up(one, mapping.answers, choices) for one in found]
        return _select_answers(texts, mapping.answers.use)

    def _read_size(self, frame: Frame) -> tuple[object, object]:
        """Return height and width that the source declares for the image, each None if missing."""
        if frame.size is None:
            return None, None
        width, height = (self.values.read(path, self.scope, "size") for path in frame.size)
        return height, width

    def _read_boxes(self, boxes: Boxes) -> list[tuple[list[Any], str | None]]:
        """Return the coordinates of boxes with their labels."""
        if boxes.box is not None:
            check_coordinates = partial(_check_coordinates, count=4)
            return self._read_regions(boxes, boxes.box, "boxes", check_coordinates)
        assert boxes.polygon is not None, "validated with the mapping"
        enclose: CoordinateCheck = _enclose_polygon
        if isinstance(boxes.polygon, tuple) and len(boxes.polygon) == 2:
            enclose = _enclose_columns
        pairs = self._read_regions(boxes, boxes.polygon, "polygons", enclose)
        self.context.row_notes[NOTE_POLYGON] += len(pairs)
        return pairs

    def _read_regions(
        self,
        regions: Boxes | Points,
        coordinates: Value | Sequence[Value],
        role: str,
        check_coordinates: CoordinateCheck,
    ) -> list[tuple[list[Any], str | None]]:
        """Return the coordinates of boxes or points with their labels.

        Args:
            check_coordinates: Function that returns the coordinates of a region for its values and
                its role. It raises InvalidRowError if they are not valid.
        """
        pairs: list[tuple[list[Any], str | None]] = []
        values = [coordinates] if isinstance(coordinates, Value) else list(coordinates)
        named = name_values(role, coordinates)
        for item in _select_items(self.values, regions, self.scope, role, self.context):
            numbers: Any = [self.values.evaluate(one, item, role) for one in values]
            if all(one is MISSING for one in numbers):
                self._check_no_region(regions, item, named)
                continue
            if isinstance(coordinates, Value):
                (numbers,) = numbers
            numbers = check_coordinates(numbers, named)
            label = None
            if regions.label is not None:
                label = self.values.evaluate_text(regions.label, item, "label")
            pairs.append((list(numbers), label))
        return pairs

    def _check_no_region(self, regions: Boxes | Points, item: Scope, role: str) -> None:
        """Raise InvalidRowError if an item without coordinates has a label."""
        if regions.label is None:
            return
        label = self.values.evaluate(regions.label, item, "label")
        if label is not MISSING and not is_empty(label):
            raise InvalidRowError(
                f"the label {str(label)[:60]!r} without {role}",
                "coordinates for each label",
                "add them, or leave the item out by where",
            )

    def _create_regions(
        self, images: RowImages
    ) -> tuple[tuple[BoxPart, ...], dict[str, InvalidBoxError]]:
        """Return the boxes or points of a sample, and the errors of dropped boxes by label."""
        boxes = self.mapping.boxes
        points = self.mapping.points
        regions = boxes or points
        if regions is None:
            return (), {}
        images.require_single_image()
        frame = regions.frame.box_frame
        declared = self._read_size(regions.frame)
        check_declared_size(declared, images.paths[0], self.context)
        if boxes is not None:
            return create_labelled_boxes(self._read_boxes(boxes), images, frame)
        assert points is not None, "one of the two"
        parts: list[BoxPart] = []
        check_coordinates = partial(_check_coordinates, count=2)
        for numbers, label in self._read_regions(points, points.point, "points", check_coordinates):
            parts.append(images.create_box(numbers, label, frame))
        return tuple(parts), {}


def _list_classes(record: Record, mapping: RecordMapping) -> tuple[str, ...]:
    """Return the class names of a mapping, or of its table."""
    if isinstance(mapping.classes, tuple):
        return mapping.classes
    assert isinstance(record, UnjoinedRecord), "opened with the tables of the mapping"
    return record.tables.classes


def _parse_letter(value: object) -> str:
    """Return the letter that names a choice, such as A for `(a)`.

    It is empty for other values.
    """
    match = re.fullmatch(r"(?i)(?:(?:option|choice)[_ ]?)?([A-Z])", str(value).strip(" ()[].:、．"))
    return match[1].upper() if match is not None else ""


def _build_letters_error(
    choices: Value, letters_by_key: Mapping[str, Sequence[str]]
) -> InvalidRowError:
    """Build the error of choices whose items state no letter for each without doubt."""
    assert choices.path is not None, "the items are those of a path"
    before, _, after = choices.path.text.rpartition(EACH)
    paths = ", ".join(f"{before}{number}?{after}" for number in range(4))
    found = "; ".join(f"{key}: {', '.join(one)}" for key, one in letters_by_key.items())
    return InvalidRowError(
        f"the {choices.name_role('choices')} have letters of their own ({found[:100]})",
        "one key with the letters from A without gaps",
        f"to keep these letters, correct the rows; to give the letters A, B and so on to the"
        f" choices in their order, which changes what answers by letter mean, write choices:"
        f" [{paths}] with a path for each",
    )


def _check_file(file: object, role: str, *, is_image: bool) -> None:
    """Reject an empty file and a list of images. A list of frames is a video."""
    if is_image and isinstance(file, list | tuple):
        raise InvalidRowError(
            f"the {role} is a list of {len(file)}",
            "one image",
            "write .* at the end of the path for several images",
        )
    if is_empty(file):
        raise InvalidRowError(f"an empty value in {role}", "a file", "add it, or remove the row")


def split_placeholders(text: str) -> list[str | ContentPart]:
    """Split a text at the placeholders of images and videos."""
    pieces: list[str | ContentPart] = []
    for piece in _PLACEHOLDER.split(join_leading_media(text)):
        if piece:
            pieces.append(piece)
    return pieces


class MappedTurn(NamedTuple):
    """A message whose texts may be the placeholders of images and videos."""

    role: Role
    content: list[str | ContentPart]


@dataclass(slots=True)
class Media:
    """Images and videos of a conversation, in the order of their placeholders."""

    row_images: RowImages
    images: list[Any]
    videos: list[Any]

    def add(self, kind: str, file: object) -> ContentPart:
        """Return the part of a file."""
        if kind == "image":
            return self.row_images.add_image(file)
        return self.row_images.add_video(file)

    def _replace_placeholders(self, turns: Sequence[MappedTurn]) -> list[MappedTurn]:
        """Return turns with `<image>` instead of placeholders with numbers.

        Raises:
            InvalidRowError: The numbers are not those of the images in order.
        """
        placeholders: list[str] = []
        text = ""
        replaced: list[MappedTurn] = []
        for turn in turns:
            pieces = [piece for piece in turn.content if isinstance(piece, str)]
            numbered = [piece for piece in pieces if NUMBERED_IMAGE.fullmatch(piece)]
            if numbered:
                placeholders += numbered
                text += "".join(pieces)
            content = ["<image>" if piece in numbered else piece for piece in turn.content]
            replaced.append(MappedTurn(turn.role, content))
        check_image_order(placeholders, len(self.images), text)
        return replaced

    def build_messages(self, turns: Sequence[MappedTurn], context: ImportContext) -> list[Message]:
        """Return the messages with all files: at their placeholders, or before the first question.

        Raises:
            PlaceholderCountError: There are more or fewer placeholders than files.
        """
        turns = self._replace_placeholders(turns)
        start: list[str | ContentPart] = []
        for kind, files in {"image": self.images, "video": self.videos}.items():
            num_marked = sum(turn.content.count(f"<{kind}>") for turn in turns)
            if not num_marked:
                start += [f"<{kind}>"] * len(files)
            elif num_marked != len(files):
                raise PlaceholderCountError(
                    f"{num_marked} `<{kind}>` in the texts for {len(files)} {kind}s",
                    expected="a placeholder for each file, or none",
                    remedy="correct the texts, or the path of the files in the mapping",
                )
        queues = {"<image>": iter(self.images), "<video>": iter(self.videos)}
        messages: list[Message] = []
        has_question = False
        for role, content in turns:
            pieces = content
            is_first = role == "user" and not has_question
            if is_first:
                pieces = [*start, *content]
                has_question = True
            parts: list[ContentPart] = []
            for piece in pieces:
                if not isinstance(piece, str):
                    parts.append(piece)
                elif piece in queues:
                    parts.append(self.add(piece.strip("<>"), next(queues[piece])))
                else:
                    parts.append(make_text_part(piece))
            if is_first:
                parts = list(context.add_prompt(parts))
            messages.append(Message(role=role, content=merge_text_parts(parts)))
        return messages


def _flatten(value: Any, depth: int) -> list[Any]:
    """Return the items of nested lists, one level for each `*` of a path."""
    if depth == 0:
        return [value]
    return [inner for item in value for inner in _flatten(item, depth - 1)]


@contextmanager
def _name_role(value: Value, role: str) -> Iterator[None]:
    """Add the role and the path of a value to an error."""
    try:
        yield
    except InvalidRowError as error:
        error.what = f"{error.what} in the {value.name_role(role)}"
        raise


def _require_calls(calls: Sequence[ContentPart], value: Value) -> None:
    """Reject an answer that is only calls, of which there is none."""
    if not calls:
        raise EmptyAnswerError(
            f"no call in the {value.name_role('calls')}",
            expected="at least one call, or an answer",
            remedy="add it, or remove the row",
        )


def _enclose_polygon(vertices: Any, role: str) -> list[float]:
    """Return the box around an outline: the least x and y, then the greatest.

    Args:
        vertices: A list of x1, y1, x2, y2, ..., of pairs, or of several outlines.
    """
    xs: list[float] = []
    ys: list[float] = []
    pending = [vertices]
    while pending:
        value = pending.pop()
        if not isinstance(value, list | tuple):
            raise _build_vertices_error(value, role)
        inner = [one for one in value if isinstance(one, list | tuple)]
        if inner and len(inner) == len(value):
            pending += inner
            continue
        numbers = [_parse_coordinate(one, role) for one in value]
        is_outline = len(numbers) >= 2 * MIN_VERTICES and len(numbers) % 2 == 0
        if len(numbers) != 2 and not is_outline:
            raise _build_vertices_error(value, role)
        xs += numbers[0::2]
        ys += numbers[1::2]
    return _enclose(xs, ys, role)


def _enclose_columns(columns: Sequence[Any], role: str) -> list[float]:
    """Return the box around an outline whose x and y are a list each, or lists of outlines."""
    xs, ys = (list(_iter_coordinates(column, role)) for column in columns)
    if len(xs) != len(ys):
        raise InvalidRowError(
            f"the {role} have {len(xs)} values of x and {len(ys)} of y",
            "a value of y for each x",
            "correct the row, or the paths in the mapping",
        )
    return _enclose(xs, ys, role)


def _enclose(xs: Sequence[float], ys: Sequence[float], role: str) -> list[float]:
    if len(xs) < MIN_VERTICES:
        raise InvalidRowError(
            f"the {role} have {len(xs)} vertices",
            f"at least {MIN_VERTICES} vertices",
            "correct the row, or leave the item out by where",
        )
    return [min(xs), min(ys), max(xs), max(ys)]


def _iter_coordinates(value: Any, role: str) -> Iterator[float]:
    """Yield the numbers of nested lists."""
    if not isinstance(value, list | tuple):
        yield _parse_coordinate(value, role)
        return
    for item in value:
        yield from _iter_coordinates(item, role)


def _parse_coordinate(value: Any, role: str) -> float:
    """Return a number, also from its text."""
    if not isinstance(value, bool):
        with suppress(TypeError, ValueError, OverflowError):
            number = float(value)
            if math.isfinite(number):
                return number
    raise _build_vertices_error(value, role)


def _build_vertices_error(value: Any, role: str) -> InvalidRowError:
    remedy = "correct the row"
    if isinstance(value, str):
        remedy = "give split for a text, or correct the row"
    elif isinstance(value, dict):
        remedy = "give a value each for x and y: polygon: [vertices.*.x, vertices.*.y]"
    return InvalidRowError(
        f"the {role} have {describe_value(value)}",
        "pairs of x and y, or a list of them",
        remedy,
    )


def _check_coordinates(numbers: Any, role: str, count: int) -> list[Any]:
    """Return coordinates: numbers or their texts, or the corners of a box as pairs.

    Raises:
        InvalidRowError: They are not `count` numbers.
    """
    if count == 4 and isinstance(numbers, list | tuple) and len(numbers) == 2:
        first, second = numbers
        is_pair = isinstance(first, list | tuple) and isinstance(second, list | tuple)
        if is_pair and len(first) == len(second) == 2:
            numbers = [*first, *second]
    is_list = isinstance(numbers, list | tuple) and len(numbers) == count
    if not is_list or not all(map(_is_number, as_list(numbers))):
        raise InvalidRowError(
            f"the {role} are {describe_value(numbers)}",
            f"a list of {count} numbers",
            "give split for a text, or a value for each number",
        )
    return list(numbers)


def _is_number(value: object) -> bool:
    """Return whether a value is a number or a text, which may be one."""
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _look_up(found: Any, value: Value, choices: Mapping[str, str]) -> str:
    """Return an answer as text; with `lookup`, its number stands for a choice.

    Args:
        choices: Choices of the question by their letters.
    """
    role = value.name_role("answer")
    is_list = isinstance(found, list | tuple)
    has_lookup = value.lookup in ("choices", "letters")
    if is_list and has_lookup:
        return _look_up_several(found, value, choices)
    if choices and not has_lookup and (is_list or value.write == "json"):
        raise InvalidRowError(
            f"the {role} is {describe_value(found)}, to a question with {len(choices)} choices",
            "one choice, or several as a list in JSON",
            "for several choices in JSON, give lookup: choices and write: json, with values to"
            " translate verdicts on the choices to true and false; for alternatives, give answers",
        )
    text = to_text(found, role)
    if not has_lookup:
        is_number = isinstance(found, int)  # of a choice, or the text of one
        if choices and (is_number or text not in (*choices, *choices.values())):
            remedy = "give lookup: choices, and first: 1 if the first choice has the number 1"
            if text.upper() in choices:
                letters = ", ".join(f"{letter.lower()}: {letter}" for letter in choices)
                remedy = f"translate the letters: values: {{{letters}}}"
            raise InvalidRowError(
                f"the {role} {text[:60]!r} to a question with {len(choices)} choices",
                "the text or the letter of a choice",
                remedy,
            )
        return text
    if value.write == "json":
        return _look_up_several([found], value, choices)
    letter = _find_letter(found, value, choices)
    if value.lookup == "letters":
        return letter
    return choices[letter]


def _find_letter(found: Any, value: Value, choices: Mapping[str, str]) -> str:
    """Return the letter of the choice with a number."""
    number = -1
    index = format_key_text(found)
    if index.isascii() and index.isdecimal():
        number = int(index) - value.first
    if not 0 <= number < len(choices):
        raise InvalidRowError(
            f"the answer {index[:60]!r} is no number of a choice",
            f"a number from {value.first} to {value.first + len(choices) - 1}",
            "correct first in the mapping, or the row; translate verdicts on the choices by values"
            " to true and false",
        )
    return list(choices)[number]


def _look_up_several(found: Sequence[Any], value: Value, choices: Mapping[str, str]) -> str:
    """Return several choices as a list in JSON."""
    role = value.name_role("answer")
    letters = _find_letters(found, value, choices)
    if value.write != "json":
        raise InvalidRowError(
            f"the {role} is a list of {len(letters)} choices",
            "one choice, or several as a list in JSON",
            "give write: json beside lookup",
        )
    if not letters:
        raise InvalidRowError(
            f"no choice in the {role}, {describe_value(list(found))}",
            "at least one choice",
            "correct the row, or values in the mapping; or leave such rows out by where, with a"
            " key that marks them",
        )
    if len(set(letters)) < len(letters):
        raise InvalidRowError(
            f"a choice twice in the {role}, {describe_value(list(found))}",
            "each choice once",
            "correct the row; translate verdicts on the choices by values to true and false",
        )
    if value.lookup == "letters":
        return write_json(letters, role)
    return write_json([choices[letter] for letter in letters], role)


def _find_letters(found: Sequence[Any], value: Value, choices: Mapping[str, str]) -> list[str]:
    """Return the letters of several choices: by verdicts, names or numbers."""
    role = value.name_role("answer")
    if found and all(isinstance(one, bool) for one in found):
        if len(found) != len(choices):
            raise InvalidRowError(
                f"{len(found)} verdicts in the {role} on {len(choices)} choices",
                "true or false for each choice",
                "correct the row, or the paths of choices and answer",
            )
        return list(itertools.compress(choices, found))
    named = [_find_named(one, choices) for one in found]
    if all(named):
        return named
    if any(named):
        raise InvalidRowError(
            f"{describe_value(found[named.index('')])} beside letters or texts of choices in the"
            f" {role}",
            "letters, texts or numbers of choices",
            "correct the row",
        )
    texts = [format_key_text(to_text(one, role)) for one in found]
    may_be_verdicts = len(texts) == len(choices) and {"0", "1"}.issuperset(texts)
    if may_be_verdicts and "first" not in value.model_fields_set:
        raise InvalidRowError(
            f"the {role}, {describe_value(list(found))}, may be verdicts on {len(choices)} choices"
            " or their numbers",
            "a mapping that states one of them",
            "for verdicts, give values: {0: false, 1: true}; for numbers, give first, the number of"
            " the first choice",
        )
    return [_find_letter(one, value, choices) for one in found]


def _find_named(item: object, choices: Mapping[str, str]) -> str:
    """Return the letter of the only choice with a letter or a text; empty for a number."""
    if not isinstance(item, str) or format_key_text(item).isdecimal():
        return ""
    found = [letter for letter, text in choices.items() if item in (letter, text)]
    if len(found) != 1:
        return ""
    return found[0]


def _select_answers(texts: Sequence[str], use: str) -> tuple[list[str], list[str]]:
    """Return the answers for training, and the others, which are references for scoring."""
    distinct = list(dict.fromkeys(texts))
    if use == "all":
        return distinct, []
    chosen = distinct[:1]
    if use == "majority" and distinct:
        chosen = [max(distinct, key=Counter(texts).__getitem__)]  # the first of several
    return chosen, [text for text in distinct if text not in chosen]
