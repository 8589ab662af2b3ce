"""Account for every key of imported data: used, stored in `meta`, counted, or refused.

A format names the keys that it uses at each level: of a row, a turn, a content part and so on.
`sort_keys` refuses any other key with content that an import must not drop, such as a second image,
a reasoning text, a label or a loss weight. The remaining keys are counted for the summary; those of
a row become metadata of its samples.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from finesight.errors import UserError
from finesight.samples.image_file import IMAGE_SUFFIXES, is_embedded_media, is_image_value
from finesight.samples.sample import VIDEO_SUFFIXES, to_json_data

ROWS, TURNS, PARTS = "rows", "turns", "content parts"
"""Levels of keys, as the summary of an import names them."""

_COLUMN_KEYS = frozenset(
    (
        "type",
        "text",
        "image",
        "image_url",
        "video",
        "video_url",
        "url",
        "path",
        "index",
        "from",
        "value",
        "role",
        "content",
    )
)
"""Keys that all turns or content parts of a Parquet file may have, null if they do not apply."""

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W\d_A-Za-z]+")
_MEDIA = re.compile(
    "(?:image|img|pict?(?:ure)?|photo|frame|clip|video|audio)"
    "(?:s|path|file|name|url|data|bytes)?|图.*"
)
_MEDIA_SUFFIXES = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, ".mp3", ".wav", ".flac", ".ogg", ".avi")
_ATTRIBUTE = re.compile(
    "ids?|idx|index|size|width|height|hash|md|sha|format|type|mode|count|num|number|source|dataset"
    "|license|author|date|time|timestamp|title|captions?|descriptions?|text|tags|meta|metadata|info"
    "|score|quality|duration|length|fps|rate|start|end|grid|thw|tokens?|ratio|resolution|effort"
    "|level|model|category|orientation|shape|wh|hw|chw|hwc|dims?|dimensions?|pixels|mime|mimetype"
    "|extension|codec"
)
"""Words of keys that describe an image or a text rather than contain it."""

_IDENTIFIER = re.compile("ids?|idx|index")
"""Words of keys whose value may stand for an image of a row without one."""

_ORIGIN = re.compile("source|orig|original|src|file|filename|name|path|url|link|key")
"""Words of keys whose value may name the origin of an image."""

_NUMBERED_IMAGE = re.compile(
    "(?:images?|img|photo|pict?(?:ure)?|图片?)_?(?:[0-9]+|[a-z])"
    "|(?:second|third|left|right|front|back|before|after|depth|extra|additional|mask|reference"
    "|cropp?(?:ed)?|zoom(?:ed)?|prev(?:ious)?|next|query|target|edited|other|rear|top|bottom)_?"
    "(?:image|img|photo|pict?(?:ure)?)s?|(?:audio|sound|speech|voice|visual_prompt"
    r"|(?:\w+_)?(?:depth|masks?|normal)(?:_?map)?)s?(?:_?path)?",
    re.IGNORECASE,
)
"""Keys of audio or a further image that a question may need, next to images that are used."""

_DOCUMENT = re.compile(
    "screenshots?|screens?|docs?|documents?|pdfs?|scans?|scanned|pages?|figures?|figs?|charts?"
    "|diagrams?|drawings?|posters?|thumbnails?|slides?|截图|文档"
)
_LOCATION = re.compile(r"[a-z][a-z0-9+]*://\S+|\S*[/\\]\S+|\S+\.[A-Za-z]\w{1,4}", re.IGNORECASE)
_TOOLS = re.compile("tools?|functions?")
_REASONING = re.compile("reasoning|thinking|think|thoughts?|rationales?|cot|思考|推理")
_PREFERENCE = re.compile("chosen|rejected|dispreferred|kto|preferences?|preferred|winner|loser")
_COMPARISON = re.compile("preferences?|preferred|winner|loser")
"""Words of keys that name the better one of several answers, also by its number."""
_TURN_REASONING = re.compile("analysis|scratchpad|monologue|explanations?|deliberation|reflection")
_LOSS = re.compile(
    "loss|weights?|masks?|masked|(?:un)?train(?:able|ing|ed)?|learn|learnable|supervised?|ignored?"
    "|excluded?|skip(?:ped)?"
)
_LOSS_QUALIFIER = re.compile(
    "scale|is|on|turns?|prompt|history|inputs?|response|output|tokens?|detail|sample|factor|flag"
    "|no|not|dont|do|without|with|compute|calculate|calc|use|for|in|out|from|labels?|has|should"
    "|messages?|apply|includ(?:e|ed|ing)"
)
_WITHOUT_LOSS = re.compile(
    "no|not|dont|without|ignored?|excluded?|skip(?:ped)?|masks?|masked|untrain(?:able|ed)?"
)
_ROW_LOSS = re.compile(
    "(?:no|skip|ignore|compute)_loss|loss_(?:masks?|weights?|scales?)|train_on(?:_.*)?"
    "|masks?_(?:history|prompt|inputs?)"
)
"""Keys of a row that can only mean its loss; others are metadata."""

_SHAPE = re.compile(
    "bbox(?:es)?|box(?:es)?|points?|polygons?|segmentation|keypoints?|masks?|annotations?|objects"
    "|regions|shapes"
)
_CROP = re.compile("crop|cropped|cropping|roi")

MAX_MEASURE_LENGTH = 4
"""Maximum length of the list of a size, or of another measure of an image."""

_LABEL = re.compile(
    "labels?|class(?:es)?|category|answers?|target|gt|truth|solution|output|response|text|value"
    "|content|caption|refusal|标签|答案"
)


class UnsupportedKeyError(UserError):
    """Raised when a row has a key with content that the import cannot represent."""


class UnsupportedMediaError(UnsupportedKeyError):
    """Raised when a row has an image, a video or audio under a key that the format does not use."""


class UnfoundMediaError(UnsupportedMediaError):
    """Raised when a row without images has a key that may stand for one.

    Attributes:
        key: Name of the key.
    """

    key: str = ""


class KeyMeaning(NamedTuple):
    """Content that an import must not drop, and the remedy."""

    what: str
    remedy: str


TOOL_CALLS = KeyMeaning(
    "tool calls or tools that the format does not use",
    "write definitions under `tools`, and calls under `tool_calls` of a turn",
)
PREFERENCE = KeyMeaning(
    "preference data that is neither a pair of answers nor a `label` of true or false",
    "write the worse answer under `rejected` and the better one under `chosen`, add `label`, or"
    " remove the key to train on every answer",
)
_REJECTED_NAMES = {
    "messages": "`rejected_response` as text or `rejected_messages` with all turns of the"
    " conversation",
    "conversations": "`rejected_response` as text or `rejected_conversations` with all turns",
    "response": "`rejected_response`",
}
"""Keys of the worse answer of a row, by the key of its turns or of its better answer."""

MEDIA_PREFERENCE = KeyMeaning(
    "a preference between images, but pairs differ only in their answers",
    "remove the key to train on the answers only",
)
CROP = KeyMeaning(
    "a part of the image, which an import does not crop",
    "crop the image, name the cropped file instead, and remove the key",
)
MEDIA = KeyMeaning(
    "an image, a video or audio that the format does not use",
    "move it to `images` or `videos`, or remove the key",
)
UNFOUND_MEDIA = KeyMeaning(
    "it may stand for an image or a video, and the row has none",
    'give a mapping file (--mapping) with images: {template: "FOLDER/{KEY}.jpg"}, or remove the key'
    " to train on the text alone",
)
REASONING = KeyMeaning(
    "a reasoning text outside of an answer",
    "write it into the answer as <think>...</think>, or remove the key",
)
LOSS = KeyMeaning(
    "a loss that is neither 0 nor 1 for a turn",
    "write `loss` as true or false into the turns, or remove the key to train on every answer",
)
LABEL = KeyMeaning(
    "a label or a text that the format does not use", "write it into a turn, or remove the key"
)


TEXT_NAMES = frozenset(
    {
        "answer",
        "caption",
        "captions",
        "description",
        "expression",
        "instruction",
        "ocrtext",
        "phrase",
        "prompt",
        "query",
        "question",
        "refexp",
        "referringexpression",
        "response",
        "sentence",
        "sentences",
        "text",
        "transcription",
        "utf8string",
    }
)
"""Names of texts about an object or an image with boxes, in lower case without punctuation."""


def find_meaning(
    key: str, value: object, level: str, image_names: Collection[str] = ()
) -> KeyMeaning | None:
    """Return the content that an import must not drop in a value, None for other values.

    Args:
        image_names: File names of the images and videos that the row uses.
    """
    if not has_value(value):
        return None
    words = split_words(key)
    if level == ROWS:
        return _find_row_meaning(key, value, image_names)
    is_content = isinstance(value, str | list | tuple | dict | bytes)
    is_described = _has(words, _ATTRIBUTE)
    if is_content and _has(words, _TOOLS):
        return TOOL_CALLS
    if _has(words, _PREFERENCE) and _has(words, _MEDIA):
        return MEDIA_PREFERENCE
    if _has(words, _PREFERENCE) or (words == ["label"] and isinstance(value, bool)):
        return PREFERENCE
    if value and _has(words, _CROP) and not is_media_value(value):
        return CROP
    if _is_measure(value):
        is_content = False
    if is_media_value(value) or (is_content and _has(words, _MEDIA) and not is_described):
        is_origin = _has(words, _ORIGIN) and not _has(words, _MEDIA) and isinstance(value, str)
        return None if image_names and (is_origin or _is_repeated(value, image_names)) else MEDIA
    is_reasoning = _has(words, _REASONING) or _has(words, _TURN_REASONING)
    if is_content and is_reasoning and not is_described:
        return REASONING
    if is_loss_key(key):
        return None if is_loss_default(key, value) else LOSS
    is_label = _has(words, _LABEL) or _has(words, _SHAPE)
    return LABEL if is_label and not _has(words, re.compile("ids?")) else None


def _find_row_meaning(key: str, value: object, image_names: Collection[str]) -> KeyMeaning | None:
    """Return the content of a key of a row; what does not change the training is metadata."""
    words = split_words(key)
    is_text = isinstance(value, str)
    is_structure = isinstance(value, list | tuple | dict)
    name = "_".join(words)
    is_json = is_structure or (isinstance(value, str) and value.lstrip().startswith(("[", "{")))
    if is_json and _has(words, _TOOLS) and words[-1] != "choice":
        return TOOL_CALLS
    is_score = isinstance(value, int | float) and not isinstance(value, bool)
    if _has(words, _PREFERENCE) and _has(words, _MEDIA) and not is_score:
        return MEDIA_PREFERENCE
    is_preference = _has(words, _PREFERENCE) and not (is_score and not _has(words, _COMPARISON))
    if is_preference or (name == "label" and value is False):
        return PREFERENCE
    if _is_row_media(key, value, image_names):
        return MEDIA
    if not image_names and _is_media_reference(words, value):
        return UNFOUND_MEDIA
    is_long = is_structure or (isinstance(value, str) and (" " in value.strip() or len(value) > 12))
    if is_long and _has(words, _REASONING) and not _has(words, _ATTRIBUTE):
        return REASONING
    is_loss = _ROW_LOSS.fullmatch(name) or (name == "loss" and value is False)
    if is_loss and not is_loss_default(key, value):
        return LOSS
    is_label = _has(words, _SHAPE) and _count_numbers(value) >= 4
    return LABEL if not is_text and (is_label or name == "history") else None


def _is_row_media(key: str, value: object, image_names: Collection[str]) -> bool:
    """Return whether a value of a row is an image that it needs.

    A row with images may name others, such as their origin, unless a number or a position marks
    a further image. Embedded images are always content.
    """
    words = split_words(key)
    is_media = is_media_value(value)
    values = value if isinstance(value, list | tuple) else (value,)
    is_named = all(isinstance(one, str) and not is_embedded_media(one) for one in values)
    if image_names:
        is_further = _NUMBERED_IMAGE.fullmatch(key) is not None
        return is_media and not _is_repeated(value, image_names) and (is_further or not is_named)
    if is_media or _has(words, re.compile("base")):
        return is_media or (isinstance(value, str) and len(value) > 100 and " " not in value)
    if isinstance(value, str | list | tuple | dict | bytes) and _has(words, _MEDIA):
        return not _has(words, _ATTRIBUTE)
    is_location = all(isinstance(one, str) and _LOCATION.fullmatch(one) for one in values)
    return is_location and _has(words, _DOCUMENT) and not _has(words, _ATTRIBUTE)


def _is_media_reference(words: list[str], value: object) -> bool:
    """Return whether a value such as that of `image_id` may stand for an image."""
    if isinstance(value, bool) or not isinstance(value, str | int | list):
        return False
    others = [word for word in words if _IDENTIFIER.fullmatch(word) is None]
    if isinstance(value, int):
        # Other integers are flags or counts, and a negative one stands for no image.
        is_named = len(others) < len(words) or all(map(_MEDIA.fullmatch, words))
        if value < 0 or not is_named:
            return False
    return _has(others, _MEDIA) and not _has(others, _ATTRIBUTE)


def _count_numbers(value: object) -> int:
    if isinstance(value, dict | list | tuple):
        return sum(map(_count_numbers, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_measure(value: object) -> bool:
    """Return whether a list or an object has only a few numbers, such as a width and a height."""
    if not isinstance(value, dict | list | tuple) or not 0 < len(value) <= MAX_MEASURE_LENGTH:
        return False
    return _count_numbers(value) == len(value)


def is_loss_key(key: str) -> bool:
    """Return whether a key of a turn may set its loss."""
    words = split_words(key)
    is_known = all(_LOSS.fullmatch(word) or _LOSS_QUALIFIER.fullmatch(word) for word in words)
    return is_known and _has(words, _LOSS)


def is_loss_default(key: str, value: object) -> bool:
    """Return whether a value means to train answers only; `loss_mask` selects tokens to train."""
    words = split_words(key)
    is_selection = words[-1] in ("mask", "masks") and len(words) > 1
    is_negative = _has(words, _WITHOUT_LOSS) and not is_selection
    is_prompt = _has(words, re.compile("prompt|inputs?"))
    return value == (0 if is_negative != is_prompt else 1)


def split_words(key: str) -> list[str]:
    """Return the words of a key in lower case."""
    return [word.lower() for word in _WORD.findall(key)]


def _has(words: list[str], pattern: re.Pattern[str]) -> bool:
    return any(map(pattern.fullmatch, words))


def is_media_value(value: object) -> bool:
    """Return whether a value is embedded bytes, or names an image, video or audio file."""
    is_sentence = isinstance(value, str) and re.search(r"\s", value) is not None
    return is_image_value(value, _MEDIA_SUFFIXES) and not is_sentence


def has_value(value: object) -> bool:
    """Return whether a value is neither None nor an empty text, list or object.

    An object whose values are all empty counts as empty, as in Parquet structs.
    """
    if isinstance(value, dict):
        return any(map(has_value, value.values()))
    return value is not None and value != "" and value != []


def sort_keys(
    values: Mapping[str, Any],
    used: Collection[str],
    level: str,
    counts: Counter[str],
    image_names: Collection[str] = (),
) -> dict[str, Any]:
    """Count the keys that a format does not use, and return them with their values as JSON data.

    Args:
        used: Keys that the format uses.
        level: Kind of the object in the plural; keys of `ROWS` are counted as metadata.
        counts: Number of unused keys by description.
        image_names: File names of the images of the row, which metadata may repeat.

    Raises:
        UnsupportedKeyError: A key has content that an import must not drop.
    """
    others = {
        str(key): value
        for key, value in values.items()
        if key not in used and (level == ROWS or not _is_null_column(key, value))
    }
    for path, key, value in iter_nested(others):
        meaning = find_meaning(key, value, level, image_names)
        is_nested_meta = level == ROWS and path != key
        is_media = meaning in (MEDIA, UNFOUND_MEDIA)
        if is_nested_meta and (image_names or not is_media):
            continue
        if meaning:
            error_type = UnsupportedMediaError if is_media else UnsupportedKeyError
            if meaning is UNFOUND_MEDIA:
                error_type = UnfoundMediaError
            remedy = meaning.remedy.replace("KEY", path)
            if meaning is PREFERENCE and level == ROWS:
                remedy = _suggest_pair(values)
            error = error_type(
                f"the key {path!r} with {str(value)[:60]} in {level}: {meaning.what}",
                expected="keys that the format uses, or metadata of the row",
                remedy=remedy,
            )
            if isinstance(error, UnfoundMediaError):
                error.key = key
            raise error
        counts[f"{path} in meta" if level == ROWS else f"{path} of {level}, not imported"] += 1
    return {key: to_json_data(value) for key, value in others.items()}


def _suggest_pair(record: Mapping[str, Any]) -> str:
    """Return the remedy of a preference by the keys that a conversation row may have."""
    for key, names in _REJECTED_NAMES.items():
        if has_value(record.get(key)):
            return (
                f"write the worse answer under {names}, add `label`, or remove the key to train on"
                " every answer"
            )
    return PREFERENCE.remedy


def _is_null_column(key: object, value: object) -> bool:
    """Return whether a key is one that Parquet adds to each object, here without a value."""
    is_other_object = isinstance(value, dict) and not value.keys() <= {"bytes", "path", "url"}
    return key in _COLUMN_KEYS and not has_value(value) and not is_other_object


def count_keys(
    objects: Iterable[Mapping[str, Any]], used: Collection[str], level: str, counts: Counter[str]
) -> None:
    """Count the keys with a value that a format does not use, with those of nested objects."""
    counts.update(
        f"{path} of {level}, not imported"
        for values in objects
        for path, _, value in iter_nested({k: v for k, v in values.items() if k not in used})
        if has_value(value)
    )


def reject_texts(
    objects: Iterable[Mapping[str, Any]], used: Collection[str], level: str, remedy: str
) -> None:
    """Reject texts beside boxes that may be the question or the answer.

    Args:
        used: Keys that the format uses.
        level: Kind of the objects in the plural.
        remedy: How to import data with such texts.

    Raises:
        UserError: A key with the name of a text has one. The remedy is consent by `--format`.
    """
    for values in objects:
        others = {key: value for key, value in values.items() if key not in used}
        for path, key, value in iter_nested(others):
            name = re.sub(r"[\W_]", "", key).lower()
            if name in TEXT_NAMES and _has_letters(value):
                raise UserError(
                    f"{level} have texts, which a detection dataset leaves out: {path}"
                    f" ({str(value)[:60]!r})",
                    expected="boxes with classes only",
                    remedy=remedy,
                )


def _has_letters(value: object) -> bool:
    """Return whether a value is a text with letters, or a list or an object with such a text."""
    if isinstance(value, dict):
        return any(map(_has_letters, value.values()))
    if isinstance(value, list):
        return any(map(_has_letters, value))
    return isinstance(value, str) and re.search(r"[^\W\d_]", value) is not None


def iter_nested(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield the path, key and value of each entry of an object and of the objects in it."""
    for key, value in values.items():
        yield f"{prefix}{key}", str(key), value
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, dict):
                yield from iter_nested(item, f"{prefix}{key}.")


def _is_repeated(value: object, image_names: Collection[str]) -> bool:
    """Return whether a value only repeats the name of an image that the row uses."""
    return isinstance(value, str) and re.split(r"[/\\]", value)[-1] in image_names
