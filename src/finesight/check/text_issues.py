"""Find placeholders, boxes and special tokens in texts, which would be tokenized as plain text."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

from finesight.check.check_issues import CheckIssue, SampleLocation
from finesight.data.sample import ImagePart, Message, Sample, TextPart

_IMAGE_PLACEHOLDER = re.compile(
    r"(?:Picture \d+:\s*)?<img>[^<\n]{1,500}</img>\n?"
    r"|<\|vision_start\|>(?:(?!<\|vision_start\|>).){0,500}?<\|vision_end\|>"
    r"|<image>\n?",
    re.DOTALL,
)
"""Pattern of a complete image placeholder in several dataset formats."""

_TYPED_PLACEHOLDER = re.compile(
    r"<\|(?:image_pad|video_pad|vision_start|vision_end|vision_pad)\|>|<imgpad>"
    r"|<(?P<tag>video|audio)>(?!.{0,2000}?</(?P=tag)>)",
    re.DOTALL,
)
"""Pattern of a single placeholder token without its image.

The tags <video> and <audio> with a closing tag are HTML and do not match.
"""

_TYPED_BOX = re.compile(
    r"<\|(?:box|quad|object_ref)_(?:start|end)\|>|<(?:box|quad)>\s*\(|</?ref>|<bbox>|<ref-object>"
    r'|["\']bbox_2d["\']\s*:\s*\['
)
"""Pattern of a box or its label, written as text in a known syntax."""

_SPECIAL_TOKEN = re.compile(
    r"<\|(?:endoftext|im_start|im_end|fim_\w+|repo_name|file_sep|extra_\d+)\|>"
)
"""Pattern of the special tokens of all Qwen families, except image and box tokens."""

_REMEDY = "remove it from the text: it is tokenized as text, not as a special token"


def filter_known_tokens(tokens: Iterable[str]) -> tuple[str, ...]:
    """Return the special tokens that the patterns of this module do not match."""
    known_patterns = (_TYPED_PLACEHOLDER, _TYPED_BOX, _SPECIAL_TOKEN)
    return tuple(t for t in tokens if not any(pattern.fullmatch(t) for pattern in known_patterns))


def find_text_issues(
    sample: Sample, location: SampleLocation, special_tokens: Collection[str] = ()
) -> Iterator[CheckIssue]:
    """Yield the issues of a sample whose texts contain placeholders, boxes or special tokens."""
    texts = [part.text for part in sample.iter_parts() if isinstance(part, TextPart)]
    if not any(char in text for text in texts for char in "<{") and not special_tokens:
        return
    yield from _check_placeholders(sample, location)
    stripped_texts = [_IMAGE_PLACEHOLDER.sub("", text) for text in texts]
    found = _find_first(_TYPED_PLACEHOLDER, stripped_texts)
    if found:
        yield location.create_issue("placeholder-in-text", f"{found} in a text", _REMEDY)
    found = _find_first(_TYPED_BOX, stripped_texts)
    if found:
        remedy = "write boxes as box parts in pixels; `finesight data import` reads them"
        yield location.create_issue("box-in-text", f"{found} in a text", remedy)
    found = _find_first(_SPECIAL_TOKEN, stripped_texts) or _find_token(
        special_tokens, stripped_texts
    )
    if found:
        yield location.create_issue("special-token-in-text", f"{found} in a text", _REMEDY)


def remove_placeholders(sample: Sample) -> Sample:
    """Return a copy of a sample without image placeholders in user texts."""

    def clean_message(message: Message) -> Message:
        if message.role != "user":
            return message
        content = [
            TextPart(text=_IMAGE_PLACEHOLDER.sub("", part.text))
            if isinstance(part, TextPart)
            else part
            for part in message.content
        ]
        remaining = tuple(p for p in content if not isinstance(p, TextPart) or p.text)
        return message.model_copy(update={"content": remaining})

    return sample.model_copy(update={"messages": tuple(map(clean_message, sample.messages))})


def _check_placeholders(sample: Sample, location: SampleLocation) -> Iterator[CheckIssue]:
    placeholders = [
        (message.role, found[0].strip())
        for message in sample.messages
        for part in message.content
        if isinstance(part, TextPart)
        for found in _IMAGE_PLACEHOLDER.finditer(part.text)
    ]
    if not placeholders:
        return
    num_images = sum(isinstance(part, ImagePart) for part in sample.iter_parts())
    preview = (
        placeholders[0][1] if len(placeholders[0][1]) <= 60 else f"{placeholders[0][1][:57]}..."
    )
    if len(placeholders) != num_images:
        yield location.create_issue(
            "placeholder-count-mismatch",
            f"{len(placeholders)} image placeholders in the texts ({preview}), {num_images} images",
            "one image part per placeholder, and no placeholders in the text",
        )
    else:
        is_fixable = all(role == "user" for role, _ in placeholders) and _are_at_edges(sample)
        yield location.create_issue(
            "placeholder-in-text",
            f"{preview} in a text; the {num_images} images of the sample are image parts",
            "remove the placeholders from the text: the image parts define the positions",
            fix="placeholders removed" if is_fixable and _stays_valid(sample) else None,
        )


def _are_at_edges(sample: Sample) -> bool:
    """Return whether all placeholders are before or after the text of their part.

    Placeholders within the text may be quoted content and are not removed.
    """
    texts = (part.text for part in sample.iter_parts() if isinstance(part, TextPart))
    return all(
        sum(bool(piece.strip()) for piece in _IMAGE_PLACEHOLDER.split(text)) <= 1 for text in texts
    )


def _stays_valid(sample: Sample) -> bool:
    """Return whether every message still has content after the placeholders are removed."""
    return all(message.content for message in remove_placeholders(sample).messages)


def _find_first(pattern: re.Pattern[str], texts: list[str]) -> str | None:
    return next((found[0] for text in texts for found in pattern.finditer(text)), None)


def _find_token(tokens: Collection[str], texts: list[str]) -> str | None:
    return next((token for token in tokens for text in texts if token in text), None)
