"""Mapping files: the role of each key of a record, as data.

`docs/en/mapping.md` documents the language. Paths are checked when the file is loaded; values are
read by `record_values.py`, and samples are built by `mapped_rows.py`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails

from finesight.errors import UserError, suggest_name
from finesight.files.bounded_files import load_yaml, read_text
from finesight.ingest.field_path import FieldPath, PathStep, parse_path
from finesight.samples.frames import BoxFrame, Order, Unit, get_frame

MAPPING_VERSION = 1

MAX_MAPPING_BYTES = 1_000_000

MAX_TEMPLATE_PATHS = 100

GROUPED_ROWS = "rows"
"""Key of the rows in the record of a group."""

Scalar = str | bool | int | float | None

_TEMPLATE_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_FIELD_FORMAT = re.compile(r'(?P<path>(?:"(?:[^"\\]|\\.)*"|[^":])*)(?::(?P<format>.*))?', re.DOTALL)
_INTEGRAL_FLOAT = re.compile(r"-?(?:0|[1-9][0-9]*)\.0+")
_PADDED = re.compile(r"0[1-9][0-9]?")


@dataclass(frozen=True, eq=False)  # hashed by identity, as typing requires
class ShortForm:
    """Marker of a type that also has a short form, for the JSON schema."""

    schema: dict[str, Any]

    def __get_pydantic_json_schema__(
        self, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return a schema that accepts both forms."""
        return {"anyOf": [self.schema, handler(core_schema)]}


class SingleItem:
    """Marker of a list of which a single item may be given without brackets."""

    def __get_pydantic_json_schema__(
        self, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return a schema that accepts an item or the list."""
        schema = handler(core_schema)
        return {"anyOf": [schema["items"], schema]}


ONE_PATH = ShortForm({"type": "string"})


def _list_given(section: BaseModel) -> str:
    """Return the keys that a section has, for messages."""
    return ", ".join(sorted(section.model_fields_set)) or "nothing"


def _to_path(value: object) -> object:
    return parse_path(value) if isinstance(value, str) else value


PathField = Annotated[
    FieldPath,
    BeforeValidator(_to_path),
    PlainSerializer(lambda path: path.text),
    WithJsonSchema({"type": "string"}),
]


class MappingSection(BaseModel):
    """Base class of the sections of a mapping: immutable, strict types, no unknown keys."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True
    )


def _as_tuple(value: object) -> object:
    """Return the full form of a list with one item, which may be given without brackets."""
    return value if isinstance(value, tuple) else (value,)


Scalars = Annotated[tuple[Scalar, ...], BeforeValidator(_as_tuple), SingleItem()]


class Condition(MappingSection):
    """Condition on a value of a list item or record: its text is one of a list, or none of it."""

    path: PathField
    equals: Scalars | None = None
    differs_from: Scalars | None = None

    @model_validator(mode="after")
    def _check_condition(self) -> Self:
        if (self.equals is None) == (self.differs_from is None):
            raise ValueError(f"{self.path.text}: a condition has either equals or differs_from")
        if any(step.is_each for step in self.path.steps):
            raise ValueError(f"{self.path.text}: a condition is on one value, without *")
        return self


class TemplateField(NamedTuple):
    """A path in braces of a template.

    Attributes:
        width: Number of characters to which zeros pad an integer; None for any text.
    """

    path: FieldPath
    width: int | None = None


@functools.lru_cache(maxsize=1000)
def _parse_template(template: str) -> dict[str, TemplateField]:
    """Return the fields in braces of a template, by their text."""
    fields: dict[str, TemplateField] = {}
    for match in _TEMPLATE_FIELD.finditer(template):
        if match[1] is not None:
            fields[match[1]] = _parse_template_field(match[1])
    return fields


def _parse_template_field(text: str) -> TemplateField:
    """Parse a path with a format such as `:012`. Raises ValueError for other formats."""
    match = _FIELD_FORMAT.fullmatch(text)
    if match is None or match["format"] is None:
        return TemplateField(parse_path(text))
    if not _PADDED.fullmatch(match["format"]):
        raise ValueError(
            f"{{{text[:60]}}} has a format other than a width such as :012; a key with a colon"
            ' is in double quotes: {"a:b"}'
        )
    return TemplateField(parse_path(match["path"]), int(match["format"]))


def _check_template(template: str) -> None:
    """Raise ValueError for a template without a path, or with a single brace."""
    paths = _parse_template(template)
    rest = _TEMPLATE_FIELD.sub("", template)
    if "{" in rest or "}" in rest:
        raise ValueError(f"the template {template[:60]!r} has a single brace; write it twice")
    if not paths:
        raise ValueError(f"the template {template[:60]!r} has no path in braces; give it as const")
    if len(paths) > MAX_TEMPLATE_PATHS:
        raise ValueError(f"a template with {len(paths)} paths, more than {MAX_TEMPLATE_PATHS}")


class Lookup(MappingSection):
    """Search for the item of a list whose `key` has a value; its `value` is used instead."""

    list: PathField
    key: PathField
    value: PathField


class Value(MappingSection):
    """A value: from a path, a constant, a template of paths, or the first that is not missing.

    Attributes:
        path: Path to the value.
        const: The same value for every sample.
        template: Text with paths in braces, such as "Where is the {name}?". `{number:012}` pads an
            integer with zeros.
        any_of: Values of which the first is used that is neither missing nor empty.
        split: Separator at which a text is split into a list.
        values: Value for each text or number of the source. Others are errors.
        lookup: Replace a number by this choice of `choices` or by its letter, or a key by a value
            of the item of a list that has this key.
        first: Number of the first choice, for `lookup`.
        write: Write a list or an object as JSON.
    """

    path: PathField | None = None
    const: Scalar = None
    template: str | None = None
    any_of: tuple[ValueField, ...] | None = None
    split: Annotated[str, Field(min_length=1)] | None = None
    values: dict[str, Scalar] | None = None
    lookup: Literal["choices", "letters"] | Lookup | None = None
    first: int = 0
    write: Literal["json"] | None = None

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        given = self.model_fields_set & {"path", "const", "template", "any_of"}
        if len(given) != 1:
            raise ValueError("a value has exactly one of path, const, template and any_of")
        if self.template is not None:
            _check_template(self.template)
        if len({one.num_lists for one in self.any_of or ()}) > 1:
            role = self.name_role("any_of")
            raise ValueError(f"the values of {role} have different numbers of *")
        return self

    @property
    def num_lists(self) -> int:
        """Return the number of `*` in the path, each of which makes a list."""
        if self.split is not None:
            return 1
        if self.any_of is not None:
            return max(one.num_lists for one in self.any_of)
        if self.path is None:
            return 0
        return sum(step.is_each for step in self.path.steps)

    @property
    def is_optional(self) -> bool:
        """Return whether a record may lack the value."""
        if self.any_of is not None:
            return all(one.is_optional for one in self.any_of)
        paths = [field.path for field in self.template_fields().values()]
        if self.path is not None:
            paths.append(self.path)
        return any(path.is_optional for path in paths)

    def name_role(self, role: str) -> str:
        """Return a role with the paths of its value, for messages."""
        return f"{role}{self._path_note}"

    @functools.cached_property
    def _path_note(self) -> str:
        """Paths of the value in parentheses; empty for a constant."""
        paths: list[str] = []
        for one in self.any_of or (self,):
            if one.path is not None:
                paths.append(one.path.text)
            paths += [field.path.text for field in one.template_fields().values()]
        if not paths:
            return ""
        return f" ({', '.join(paths)})"

    def template_fields(self) -> dict[str, TemplateField]:
        """Return the fields in braces of the template, by their text."""
        return _parse_template(self.template or "")

    def fill_template(self, texts: dict[str, str]) -> str:
        """Return the template with each path replaced by its text; `{{` stands for a brace."""

        def replace(match: re.Match[str]) -> str:
            if match[1] is None:
                return match[0][0]
            return texts[match[1]]

        return _TEMPLATE_FIELD.sub(replace, self.template or "")


def _expand_value(value: object) -> object:
    """Return the full form of a value: a text is a path."""
    return {"path": value} if isinstance(value, str) else value


def _with_text_keys(value: object) -> object:
    """Return an object whose `values` have texts as keys; YAML reads `0:` as a number."""
    if not isinstance(value, dict) or not isinstance(value.get("values"), dict):
        return value
    named: dict[str, object] = {}
    for key, item in value["values"].items():
        text = format_key_text(key)
        if text in named:
            raise ValueError(f"values has {text} twice")
        named[text] = item
    return {**value, "values": named}


ValueField = Annotated[
    Value, BeforeValidator(_with_text_keys), BeforeValidator(_expand_value), ONE_PATH
]
Values = Annotated[tuple[ValueField, ...], BeforeValidator(_as_tuple), SingleItem()]
Conditions = Annotated[tuple[Condition, ...], BeforeValidator(_as_tuple), SingleItem()]
Value.model_rebuild()


def format_key_text(value: object) -> str:
    """Return a scalar as the text by which it is compared: 1.0, and "1.0" of a table, as 1."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = format_scalar(value)
    if _INTEGRAL_FLOAT.fullmatch(text):
        return str(int(text.partition(".")[0]))
    return text


def format_scalar(value: object) -> str:
    """Return a scalar as text, as JSON writes it except for quotes."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


class Elements(MappingSection):
    """Items of a list: at a path, or several lists of equal length item by item.

    Attributes:
        each: Path to the list.
        zip: Path of each list by the name that it has in the items.
        where: Conditions that an item meets; others are counted and left out.
    """

    each: PathField | None = None
    zip: dict[str, PathField] | None = None
    where: Conditions = ()

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.each is not None and self.zip is not None:
            raise ValueError(f"a list has either each or zip, not both ({self.each.text})")
        return self

    @property
    def is_optional(self) -> bool:
        """Return whether a record may lack the list."""
        paths = [*(self.zip or {}).values()]
        if self.each is not None:
            paths.append(self.each)
        return any(path.is_optional for path in paths)

    @property
    def has_list(self) -> bool:
        """Return whether there is a list; without one, boxes and points are a single one."""
        return self.each is not None or self.zip is not None


class Frame(MappingSection):
    """Coordinate frame of boxes and points, which a mapping states instead of a guess.

    Attributes:
        order: Order of the coordinates of boxes, or `yxyx` for points with y before x.
        unit: Unit of the coordinates.
        size: Paths to width and height of the annotated image, which must be those of the file.
    """

    order: Order = "xyxy"
    unit: Literal["pixels", "fractions", "percent", "thousandths", "resized"] = "pixels"
    size: tuple[PathField, PathField] | None = None

    def require(self, *names: Literal["order", "unit"]) -> None:
        """Raise ValueError if one of the keys is not given."""
        missing = [name for name in names if name not in self.model_fields_set]
        if missing:
            raise ValueError(
                f"no {' and '.join(missing)} in frame: write which coordinates these are, for"
                " example frame: {order: xyxy, unit: pixels}; orders are xyxy, xywh, cxcywh and"
                " yxyx, and units are pixels, fractions, percent, thousandths and resized"
            )

    @property
    def box_frame(self) -> BoxFrame:
        """Return the frame of the coordinates."""
        units: dict[str, Unit] = {
            "pixels": "pixel",
            "fractions": "1",
            "percent": "100",
            "thousandths": "1000",
            "resized": "resized",
        }
        return get_frame(self.order, units[self.unit])


class Boxes(Elements):
    """Boxes of an image.

    Attributes:
        box: Four coordinates: a path to a list of them, or four values.
        polygon: Vertices of an outline, instead of `box`: a path to a list of them, a value each
            for the lists of x and of y, or a value for each number. The sample has the box around
            them.
        label: Class or description of the object.
    """

    box: ValueField | tuple[ValueField, ValueField, ValueField, ValueField] | None = None
    polygon: ValueField | tuple[ValueField, ...] | None = None
    label: ValueField | None = None
    frame: Frame = Frame()

    @model_validator(mode="after")
    def _check_coordinates(self) -> Self:
        if (self.box is None) == (self.polygon is None):
            raise ValueError(f"boxes have either box or polygon, not {_list_given(self)}")
        if self.box is not None:
            self.frame.require("order", "unit")
            return self
        self.frame.require("unit")
        if isinstance(self.polygon, tuple) and not _is_polygon(len(self.polygon)):
            raise ValueError(
                f"polygon has {len(self.polygon)} values; give two for the lists of x and of y, or"
                " x and y of each vertex"
            )
        if self.frame.order not in ("xyxy", "yxyx"):
            raise ValueError(f"polygons in the order {self.frame.order}; give xyxy or yxyx")
        return self


def _is_polygon(num_values: int) -> bool:
    """Return whether values are two lists, or x and y of at least three vertices."""
    return num_values == 2 or (num_values >= 6 and num_values % 2 == 0)


class Points(Elements):
    """Points of an image, such as clicks.

    Attributes:
        point: Two coordinates: a path to a list of them, or two values.
        label: Class or description of the object.
    """

    point: ValueField | tuple[ValueField, ValueField]
    label: ValueField | None = None
    frame: Frame = Frame()

    @model_validator(mode="after")
    def _check_frame(self) -> Self:
        self.frame.require("unit")
        if self.frame.order not in ("xyxy", "yxyx"):
            raise ValueError(
                f"points in the order {self.frame.order} have no size; give xyxy or yxyx"
            )
        return self


class Parts(Elements):
    """Parts of a message, each of which is a text, an image or a video.

    Attributes:
        text: Text of a part, such as `text?`: parts with another key lack it.
        image: File of an image.
        video: File of a video.
    """

    text: ValueField | None = None
    image: ValueField | None = None
    video: ValueField | None = None

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if not self.has_list:
            raise ValueError(f"parts has neither each nor zip, only {_list_given(self)}")
        if not self.list_kinds():
            raise ValueError(f"parts has only {_list_given(self)}, not text, image or video")
        return self

    def list_kinds(self) -> dict[str, Value]:
        """Return the values of the kinds of a part that the mapping names."""
        kinds = {"text": self.text, "image": self.image, "video": self.video}
        return {kind: value for kind, value in kinds.items() if value is not None}


class Messages(Elements):
    """Messages of a conversation. Images are at `<image>` in their texts, else at the start.

    Attributes:
        role: Role of a message; `values` translates names to system, user, assistant and tool.
        content: Text of a message.
        parts: Texts and images of a message, instead of `content`.
        calls: Calls of tools after the text of a message, which may be empty then.
        question: Text of a question, for items that are a question with its answer.
        answer: Text of its answer.
    """

    role: ValueField | None = None
    content: ValueField | None = None
    parts: Parts | None = None
    calls: ValueField | None = None
    question: ValueField | None = None
    answer: ValueField | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if not self.has_list:
            raise ValueError(f"messages has neither each nor zip, only {_list_given(self)}")
        given = self.model_fields_set - {"each", "zip", "where"}
        forms = [{"role", "content"}, {"role", "parts"}, {"question", "answer"}]
        forms.append({"role", "content", "calls"})
        if given not in forms:
            raise ValueError(
                "messages has role and content (also with calls), role and parts, or question and"
                f" answer, not {_list_given(self)}"
            )
        return self


class Answers(Value):
    """Several correct answers to the same question.

    Attributes:
        use: `all`: a training sample for each; `first` and `majority`: one training sample, and the
            others only as references for scoring.
    """

    use: Literal["first", "majority", "all"]


def _name_paths(value: object) -> object:
    """Return the full form of fields and metadata: a list of paths has the names of their keys."""
    if not isinstance(value, tuple):
        return value
    named: dict[str, object] = {}
    for one in value:
        if not isinstance(one, str):
            raise ValueError(f"{one!r:.60} is not a path; give an object with the name of each")
        name = parse_path(one).last_key
        if name in named:
            raise ValueError(f"two paths end in {name!r}; give an object with the name of each")
        named[name] = one
    return named


class Match(MappingSection):
    """Signature of the records that a preset reads.

    Attributes:
        keys: Paths that each of the first records has.
        optional: Further keys of the record that it may have. Other keys do not match.
    """

    keys: tuple[PathField, ...]
    optional: tuple[str, ...] = ()


class Rows(MappingSection):
    """Records inside of a JSON document: `data`, or `*` for an object of records.

    Attributes:
        key: Name under which a record has its key in the object.
    """

    path: PathField
    key: str | None = None

    @model_validator(mode="after")
    def _check_path(self) -> Self:
        if not self.path.steps:
            raise ValueError(f"{self.path.text} is the document itself: name the list of records")
        return self


class JoinedTable(MappingSection):
    """Table whose rows are inserted into the records that refer to them by a key.

    Attributes:
        source: List of the rows in a JSON document: that of the records, or `file`.
        file: File of the rows, relative to the folder of the data file.
        group: Key that any number of rows have in common: a record gets the list of them.
        key: Key that a single row has: a record gets this row.
        by: Value of a record that is equal to the key. The rows are inserted beside it.
    """

    source: Annotated[Rows, BeforeValidator(_expand_value), ONE_PATH] | None = Field(
        default=None, alias="from"
    )
    file: str | None = None
    group: PathField | None = None
    key: PathField | None = None
    by: PathField

    @property
    def key_path(self) -> FieldPath:
        """Return the path of the key in a row."""
        path = self.group or self.key
        assert path is not None, "validated with the table"
        return path

    @property
    def holder_steps(self) -> tuple[PathStep, ...]:
        """Return the steps of the path to the object in which the rows are inserted."""
        return self.by.steps[:-1]

    def list_key_paths(self, name: str) -> list[FieldPath]:
        """Return the paths of all keys in a record with the rows of the table."""
        steps = [*self.holder_steps, PathStep(name)]
        if self.group is not None:
            steps.append(PathStep("*", is_each=True))
        steps += self.key_path.steps
        return [self.by, FieldPath(f"key of the table {name}", tuple(steps))]

    @model_validator(mode="after")
    def _check_key(self) -> Self:
        if (self.group is None) == (self.key is None):
            raise ValueError("a table has either group (a list of rows) or key (a single row)")
        path = self.key_path
        if not _names_one_value(path):
            raise ValueError(f"{path.text} is not the path of one value, without $, * and ?")
        if not self.by.steps or self.by.steps[-1].is_each:
            raise ValueError(
                f"by: {self.by.text} does not end in a key, beside which rows are inserted"
            )
        return self

    @model_validator(mode="after")
    def _check_file(self) -> Self:
        if self.file is None:
            if self.source is None:
                raise ValueError("a table has from (a list of the document), file or both")
            return self
        parts = PurePosixPath(self.file).parts
        if not parts or self.file.startswith("/") or ".." in parts:
            raise ValueError(
                f"file: {self.file[:60]!r} is not a path below the folder of the data file"
            )
        return self


class TableClasses(MappingSection):
    """Class names of a data set of boxes: a value of all rows of a table."""

    table: str
    value: PathField

    @model_validator(mode="after")
    def _check_value(self) -> Self:
        if not _names_one_value(self.value):
            raise ValueError(f"{self.value.text} is not the path of one value, without $, * and ?")
        return self


def _names_one_value(path: FieldPath) -> bool:
    """Return whether a path has only keys, none of which is optional."""
    has_lists = any(step.is_each or step.is_optional for step in path.steps)
    return bool(path.steps) and not path.from_root and not has_lists


def _as_elements(value: object) -> object:
    return {"each": value} if isinstance(value, str) else value


Choices = ValueField | Annotated[tuple[ValueField, ...], Field(min_length=1)]

NamedValues = Annotated[
    dict[str, ValueField],
    BeforeValidator(_name_paths),
    ShortForm({"type": "array", "items": {"type": "string"}}),
]


Notation = Literal["json", "python", "base64"]
Notations = Annotated[
    tuple[Notation, ...], Field(min_length=1), BeforeValidator(_as_tuple), SingleItem()
]


class RecordMapping(MappingSection):
    """A mapping file.

    Attributes:
        title: Name of the format or data set, for presets.
        source: Address of the description or data from which a preset was derived.
        match: Signature of the records, for presets.
        rows: List or object of records in a JSON document; None: the reader of the file finds them.
        group: Value that the rows of a record have in common: the record has them as `rows`; None:
            each row of the file is a record.
        tables: Tables whose rows are inserted into the records, by name and in this order.
        parse: Text values that are parsed before paths are read, with their notation, or several
            in their order: [base64, json] for JSON encoded as base64.
        sample: List of which each item becomes a sample; None: the record is one sample.
        where: Conditions that a sample meets; others are counted and left out.
        split: Split of a record, which is `train` or `eval`; None: all are for training.
        id: Identifier of a sample; None: `id` of the record, else a number.
        system: System prompt.
        choices: Options of a question, written below it with letters: a list, or a value for each.
        fields: Answer as a JSON object, by name.
        answer: The answer. `question` and `answer` follow the `messages`, if there are any.
        calls: Calls of tools, as the answer or after it.
        tools: Definitions of the tools that the answers may call.
        rejected: Worse answer to the same question, in preference data.
        verdict: Whether the answer is desirable, in preference data of single answers.
        classes: Class names of a data set of boxes, which the question lists: the names, or the
            value of the rows of a table.
        meta: Values that samples keep without a role, by name.
        ignore: Paths that the import leaves out. `*` leaves out all keys without a role.
    """

    version: Literal[1]
    title: str = ""
    source: str = ""
    match: Match | None = None
    rows: Annotated[Rows, BeforeValidator(_expand_value), ONE_PATH] | None = None
    group: PathField | None = None
    tables: dict[Annotated[str, Field(min_length=1)], JoinedTable] = {}
    parse: dict[str, Notations] = {}
    sample: Annotated[Elements, BeforeValidator(_as_elements), ONE_PATH] | None = None
    where: Conditions = ()
    split: ValueField | None = None
    id: ValueField | None = None
    images: Values = ()
    videos: Values = ()
    system: ValueField | None = None
    question: ValueField | None = None
    choices: Choices | None = None
    answer: ValueField | None = None
    answers: Annotated[Answers, BeforeValidator(_with_text_keys)] | None = None
    fields: NamedValues | None = None
    calls: ValueField | None = None
    tools: ValueField | None = None
    messages: Messages | None = None
    rejected: ValueField | None = None
    verdict: ValueField | None = None
    boxes: Boxes | None = None
    points: Points | None = None
    classes: tuple[str, ...] | TableClasses = ()
    meta: NamedValues = {}
    ignore: tuple[PathField, ...] = ()

    def list_parse_paths(self) -> list[tuple[FieldPath, str]]:
        """Return the paths of texts to parse, with their notation; outer texts come first."""
        paths: list[tuple[FieldPath, str]] = []
        for path, notations in self.parse.items():
            paths += [(parse_path(path), notation) for notation in notations]
        return paths

    @property
    def _answer_roles(self) -> list[str]:
        return [one for one in ("answer", "answers", "fields") if getattr(self, one)]

    @model_validator(mode="after")
    def _check_answer(self) -> Self:
        for path in self.parse:
            parse_path(path)
        answers = self._answer_roles
        if len(answers) > 1:
            raise ValueError(f"{answers[0]} and {answers[1]} are both the answer; give one of them")
        if not (answers or self.messages or self.boxes or self.points or self.calls):
            raise ValueError(
                f"no answer beside {_list_given(self)}: give answer, answers, fields, messages,"
                " calls, boxes or points"
            )
        if self.calls is not None and (self.boxes is not None or self.points is not None):
            raise ValueError(f"calls and boxes or points among {_list_given(self)}")
        if self.choices is not None and self.question is None:
            raise ValueError(f"{name_values('choices', self.choices)} without a question")
        if self.sample is not None and not self.sample.has_list:
            raise ValueError(f"sample has neither each nor zip, only {_list_given(self.sample)}")
        return self

    @model_validator(mode="after")
    def _check_group(self) -> Self:
        if self.group is None:
            return self
        text = self.group.text
        if not _names_one_value(self.group):
            raise ValueError(f"group: {text} is not the path of one value, without $, * and ?")
        if self.match is not None:
            raise ValueError(f"group ({text}) and match: a preset reads single rows")
        return self

    @model_validator(mode="after")
    def _check_tables(self) -> Self:
        if self.tables and self.group is not None:
            raise ValueError(f"group ({self.group.text}) and tables: give a table with group")
        if self.tables and self.match is not None:
            raise ValueError(f"tables ({', '.join(self.tables)}) and match: a preset has no tables")
        for name, table in self.tables.items():
            if table.file is None and self.rows is None:
                raise ValueError(
                    f"tables.{name}: from is a list of the document of the records: give rows, or"
                    " the file of the table"
                )
        if isinstance(self.classes, TableClasses) and self.classes.table not in self.tables:
            raise ValueError(f"classes: no table {self.classes.table} among {_list_given(self)}")
        self._check_table_order()
        return self

    def _check_table_order(self) -> None:
        """Raise ValueError for a table that refers to the rows of a later one."""
        pending = list(self.tables)
        for name, table in self.tables.items():
            for later in pending:
                holder = self.tables[later].holder_steps
                keys = [step.key for step in (*holder, PathStep(later))]
                by_keys = [step.key for step in table.by.steps]
                if by_keys == keys:
                    raise ValueError(
                        f"tables.{name}: {table.by.text} is a value of the record, but also the"
                        f" name of the table {later}; rename the table"
                    )
                if by_keys[: len(keys)] == keys:
                    raise ValueError(
                        f"tables.{name}: {table.by.text} is in the rows of {later}, which is not"
                        f" an earlier table; write {name} below it"
                    )
            pending.remove(name)

    @model_validator(mode="after")
    def _check_messages(self) -> Self:
        if self.messages is None:
            return self
        others = ("choices", "answers", "fields", "boxes", "points")
        given = [one for one in others if getattr(self, one) is not None]
        if given:
            raise ValueError(f"messages and {given[0]}: messages contain the conversation")
        has_answer = self.answer is not None or self.calls is not None
        if self.question is not None and not has_answer:
            raise ValueError(f"a question after messages without an answer: {_list_given(self)}")
        if self.messages.parts is not None:
            for kind, files in {"image": self.images, "video": self.videos}.items():
                if files and getattr(self.messages.parts, kind) is not None:
                    raise ValueError(f"{kind}s and parts.{kind}: their order would be unknown")
        return self

    @model_validator(mode="after")
    def _check_regions(self) -> Self:
        has_text = bool(self._answer_roles) or self.question is not None
        if self.boxes is not None and self.points is not None:
            raise ValueError(f"boxes and points among {_list_given(self)}: give one of them")
        if self.boxes is not None and not has_text and not self.classes:
            raise ValueError(f"boxes with {_list_given(self)}: give question or classes")
        if self.classes and (has_text or self.boxes is None):
            raise ValueError(
                f"the classes {name_classes(self.classes)[:60]} are for boxes without a question"
                " and an answer"
            )
        if self.classes:
            for role in ("system", "rejected", "verdict"):
                if getattr(self, role) is not None:
                    raise ValueError(f"{role} and classes: give a question instead of classes")
        return self

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        """Reject operators without effect, and answers that YAML reads as true or false."""
        for name, section in self:
            for value in iter_values(section):
                is_choice = value.lookup in ("choices", "letters")
                is_answer = name in ("answer", "answers") and self.choices is not None
                if is_choice and not is_answer:
                    raise ValueError(f"{name}: lookup is for the answer to a question with choices")
                translations = (value.values or {}).values()
                is_verdict = is_choice or name == "verdict"
                if not is_verdict and any(isinstance(one, bool) for one in translations):
                    raise ValueError(
                        f"{name}: true or false under values; write texts such as yes in quotes"
                    )
        if self.messages is not None and self.messages.is_optional and self.question is None:
            raise ValueError("messages: without them (?), there is no question; give question, too")
        return self


def name_classes(classes: tuple[str, ...] | TableClasses) -> str:
    """Return class names, or the table that has them, for messages."""
    if isinstance(classes, TableClasses):
        return f"of the table {classes.table}"
    return ", ".join(classes)


def name_values(role: str, section: object) -> str:
    """Return a role with the paths of all its values, for messages."""
    paths = [value.path.text for value in iter_values(section) if value.path is not None]
    if not paths:
        return role
    return f"{role} ({', '.join(paths)})"


def iter_values(section: object) -> Iterator[Value]:
    """Yield all values of a section of a mapping."""
    if isinstance(section, Value):
        yield section
        yield from iter_values(section.any_of)
    elif isinstance(section, MappingSection):
        for _, inner in section:
            yield from iter_values(inner)
    elif isinstance(section, tuple):
        for inner in section:
            yield from iter_values(inner)
    elif isinstance(section, dict):
        for inner in section.values():
            yield from iter_values(inner)


def load_mapping(path: Path) -> RecordMapping:
    """Load and validate a mapping file. Raises UserError with the key and the reason."""
    text = read_text(path, expected="a mapping file", max_bytes=MAX_MAPPING_BYTES)
    try:
        content = load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"not valid YAML: {str(error)[:200]}",
            where=str(path),
            expected="a mapping file",
            remedy="correct the file",
        ) from error
    return parse_mapping(content, str(path))


def write_schema() -> str:
    """Return the JSON schema of mapping files, for editors."""
    schema = RecordMapping.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return f"{json.dumps(schema, indent=1, ensure_ascii=False)}\n"


def parse_mapping(content: object, where: str) -> RecordMapping:
    """Validate the content of a mapping file."""
    version = content.get("version") if isinstance(content, dict) else None
    if not isinstance(content, dict) or type(version) is not int or version != MAPPING_VERSION:
        raise UserError(
            "no mapping of version 1",
            where=where,
            expected=f"an object that begins with version: {MAPPING_VERSION}",
            remedy="add the line, if the file is a mapping",
        )
    try:
        return RecordMapping.model_validate(_as_tuples(content))
    except ValidationError as error:
        raise _explain_error(error, where) from error


def _as_tuples(value: Any) -> Any:
    """Return the content of a YAML file with tuples, which strict validation requires."""
    if isinstance(value, dict):
        return {key: _as_tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_as_tuples(item) for item in value)
    return value


def _find_first_error(error: ValidationError) -> ErrorDetails:
    """Return the first error of a mapping file.

    Where both a value and a list are possible, the error of a list is that of its items. That of an
    object is not that it is no list.
    """
    first, *others = error.errors()
    if first["type"] == "tuple_type" and isinstance(first["input"], dict) and others:
        return others[0]
    *key, form = first["loc"] or ("",)
    is_form = "[" in str(form) and isinstance(first["input"], tuple)
    if is_form and others and others[0]["loc"][: len(key)] == tuple(key):
        return others[0]
    return first


def _explain_error(error: ValidationError, where: str) -> UserError:
    """Return the first error of a mapping file, with the location of its key."""
    first = _find_first_error(error)
    # Validators of unions and short forms are no keys of the file.
    parts = [str(part) for part in first["loc"] if not re.search(r"[\[(]", str(part))]
    key = ".".join(parts)
    if key:
        where = f"{where}: {key}"
    message = first["msg"].removeprefix("Value error, ")
    remedy = "correct the mapping"
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        message = f"unknown key {name!r}"
        remedy = "remove it"
        if len(first["loc"]) == 1:
            remedy = suggest_name(name, list(RecordMapping.model_fields), remedy)
    elif first["type"] == "tuple_type":
        message = f"{first['input']!r:.60} is no list"
    elif first["type"] == "model_type":
        message = f"{first['input']!r:.60} is neither a path nor an object"
        if type(first["input"]) is int:
            remedy = f'write a column whose name is a number in quotes: "{first["input"]}"'
    elif "FieldPath" in message:
        message = f"{first['input']!r:.60} is no path such as images.*.file_name"
    return UserError(
        message,
        where=where,
        expected="a mapping as in the page Mapping files",
        remedy=remedy,
    )
