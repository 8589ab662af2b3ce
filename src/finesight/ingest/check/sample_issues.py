"""Find the issues of a single sample: roles, empty turns, images, texts and boxes."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from finesight.errors import UserError, shorten
from finesight.ingest.check.check_issues import (
    CheckIssue,
    FixAction,
    IssueImage,
    SampleLocation,
    issue_from_error,
)
from finesight.ingest.check.image_catalog import ImageCatalog
from finesight.samples.boxes import clip_box, is_inside_image, sort_corners
from finesight.samples.frames import Box, BoxFrame
from finesight.samples.sample import (
    BoxPart,
    ImagePart,
    Message,
    Sample,
    TextPart,
    ToolCallPart,
    VideoPart,
    build_video_as_image_error,
    is_video_path,
    list_coordinates,
    list_media_paths,
    validate_rejected,
    validate_roles,
)

MIN_BOX_SIDE = 2.0
"""Side length in pixels below which a box is reported as tiny."""

FULL_IMAGE_FRACTION = 0.98
"""Minimum fraction of the image area of a box that covers the full image."""

_CONVENTION_HINT = (
    "boxes are in pixels of the original image after EXIF rotation; if most of them are not, "
    "import them again with --box-format and --box-units"
)

_ORDER_HINT = "write [x1, y1, x2, y2] with x1 < x2 and y1 < y2: left, top, right, bottom"


def find_box_issues(
    sample: Sample, location: SampleLocation, catalog: ImageCatalog
) -> Iterator[CheckIssue]:
    """Yield at most one issue per box of a sample.

    Boxes in missing or corrupt images are not checked, because the image size is unknown.
    """
    image_paths = [part.image for part in sample.iter_parts() if isinstance(part, ImagePart)]
    for box in (part for part in sample.iter_parts() if isinstance(part, BoxPart)):
        if box.image >= len(image_paths):
            count = f"the sample has {len(image_paths)} images"
            message = f"box refers to image {box.image} (0-based); {count}"
            remedy = "correct the box's `image`, or add the image"
            yield location.create_issue("box-without-image", message, remedy)
            continue
        path = image_paths[box.image]
        if catalog[path].issue_code is None:
            issue_image = IssueImage(Path(path), box.image, (box.xyxy,), (box.label or "",))
            yield from _check_box(box, catalog[path].size, location, issue_image)


def correct_order(xyxy: Box, size: tuple[int, int]) -> Box | None:
    """Return an inverted box with its corners sorted, or None if the correction is ambiguous.

    It is ambiguous if the sorted corners are outside the image, or if the values could be a corner
    or center with width and height.
    """
    others = (BoxFrame(one).to_pixels(xyxy, size) for one in ("xywh", "cxcywh"))
    is_ambiguous = any(is_inside_image(other, size, is_point=True) for other in others)
    sorted_box = sort_corners(xyxy)
    return sorted_box if is_inside_image(sorted_box, size, 0) and not is_ambiguous else None


def _check_box(
    box: BoxPart, size: tuple[int, int], location: SampleLocation, issue_image: IssueImage
) -> Iterator[CheckIssue]:
    height, width = size
    x1, y1, x2, y2 = xyxy = box.xyxy
    coordinates = ", ".join(f"{value:g}" for value in list_coordinates(box))
    clipped = clip_box(xyxy, size, is_point=box.is_point)
    message = f"[{coordinates}] in an image of {width} x {height}"
    fix: FixAction | None = None
    if not all(map(math.isfinite, xyxy)):
        code, message, remedy = "box-empty", f"{message}: not four finite values", _ORDER_HINT
    elif x2 < x1 or y2 < y1:
        code, remedy = "box-inverted", _ORDER_HINT
        fix = None if correct_order(xyxy, size) is None else "reordered"
    elif not box.is_point and (x1 == x2 or y1 == y2):
        code, message, remedy = "box-empty", f"{message}: a line or a point", _ORDER_HINT
    elif clipped is None or not is_inside_image(xyxy, size, is_point=box.is_point):
        code, remedy = "box-outside", _CONVENTION_HINT
    elif clipped != xyxy:
        code, remedy, fix = "box-at-edge", "clip it to the image", "clipped"
    elif not box.is_point and min(x2 - x1, y2 - y1) < MIN_BOX_SIDE:
        code, remedy = "box-tiny", "check that the box is not too small"
    elif (x2 - x1) * (y2 - y1) >= FULL_IMAGE_FRACTION * width * height:
        code, remedy = "box-covers-image", "check that the box locates an object"
    else:
        return
    yield location.create_issue(code, message, remedy, (issue_image,), fix)


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
    r'|["\']bbox_2d["\']\s*:[\s\[]*\[\s*[\d-]'
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
    box_remedy = "write boxes as box parts in pixels; an import reads them"
    for pattern, code, remedy in (
        (_TYPED_PLACEHOLDER, "placeholder-in-text", _REMEDY),
        (_TYPED_BOX, "box-in-text", box_remedy),
        (_SPECIAL_TOKEN, "special-token-in-text", _REMEDY),
    ):
        matches = (found[0] for text in stripped_texts for found in pattern.finditer(text))
        found = next(matches, None)
        if found is None and pattern is _SPECIAL_TOKEN:
            tokens = (one for one in special_tokens for text in stripped_texts if one in text)
            found = next(tokens, None)
        if found:
            yield location.create_issue(code, f"{found} in a text", remedy)


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
    preview = shorten(placeholders[0][1], 60)
    if len(placeholders) != num_images:
        yield location.create_issue(
            "placeholder-count-mismatch",
            f"{len(placeholders)} image placeholders in the texts ({preview}), {num_images} images",
            "one image part per placeholder, and no placeholders in the text",
        )
        return
    # Placeholders within the text of a part may be quoted content and are not removed.
    texts = [part.text for part in sample.iter_parts() if isinstance(part, TextPart)]
    are_at_edges = all(
        sum(bool(piece.strip()) for piece in _IMAGE_PLACEHOLDER.split(text)) <= 1 for text in texts
    )
    is_fixable = (
        are_at_edges
        and all(role == "user" for role, _ in placeholders)
        and all(message.content for message in remove_placeholders(sample).messages)
    )
    yield location.create_issue(
        "placeholder-in-text",
        f"{preview} in a text; the {num_images} images of the sample are image parts",
        "remove the placeholders from the text: the image parts define the positions",
        fix="placeholders removed" if is_fixable else None,
    )


def find_sample_issues(
    sample: Sample,
    location: SampleLocation,
    catalog: ImageCatalog,
    special_tokens: Collection[str] = (),
) -> Iterator[CheckIssue]:
    """Yield all issues of a sample that can be found without other samples.

    Args:
        special_tokens: Special tokens of the tokenizer that must not occur in texts.
    """
    try:
        validate_roles(sample.messages, "")
        validate_rejected(sample, "")
    except UserError as error:
        yield issue_from_error(error, location)
    yield from _check_reasoning(sample, location)
    # Both answers of a preference pair share the prompt and its issues.
    seen: set[tuple[str, str]] = set()
    for messages in (sample.messages, *([sample.rejected_messages] if sample.rejected else [])):
        one = sample.model_copy(update={"messages": messages})
        found = [
            *_check_turns(one, location),
            *_check_images(one, location, catalog),
            *find_text_issues(one, location, special_tokens),
            *find_box_issues(one, location, catalog),
        ]
        yield from (issue for issue in found if (issue.code, issue.what) not in seen)
        seen.update((issue.code, issue.what) for issue in found)


def iter_media_paths(sample: Sample) -> Iterator[str]:
    """Yield the paths of all images, video frames and video files of a sample."""
    return (path for part in sample.iter_parts() for path in list_media_paths(part))


def _check_turns(sample: Sample, location: SampleLocation) -> Iterator[CheckIssue]:
    for message_index, message in enumerate(sample.messages):
        texts = [part.text for part in message.content if isinstance(part, TextPart)]
        is_blank = len(texts) == len(message.content) and not "".join(texts).strip()
        if is_blank and message.role != "tool":
            code = "empty-answer" if message.role == "assistant" else "empty-question"
            message_text = f"message {message_index}, of the {message.role}, is {''.join(texts)!r}"
            yield location.create_issue(code, message_text, "add text, or remove the sample")
        if message.role in ("system", "assistant") and any(map(list_media_paths, message.content)):
            yield location.create_issue(
                "image-in-answer",
                f"message {message_index}, of the {message.role}, contains an image",
                "move it to a user turn or a tool result",
            )


_THINK_TAG = re.compile(r"</?think>")
_OTHER_TAG = re.compile(
    r"[<\[◁]\|?\s*+(?:(?P<end>/|end_of_)\s*+)?(?:begin_of_)?(?:\w+:|ant)?"
    r"(?:think(?:ing)?|thoughts?|cot|reasoning|chain_of_thought|scratchpad|思考|推理)"
    r"(?:\s+\w+=[^<>]*)?\s*(?P<closed>/)?\|?[>\]▷]",
    re.IGNORECASE,
)
"""Tag of reasoning in other spellings, such as <thinking> or [THINK], which no template reads."""

_CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)


def _check_reasoning(sample: Sample, location: SampleLocation) -> Iterator[CheckIssue]:
    """Check that the reasoning of each answer is one block at its start, before the answer."""
    for index, message in enumerate(sample.messages):
        # As in the chat template, a tag may extend over several text parts.
        parts = [part for part in message.content if isinstance(part, TextPart | BoxPart)]
        has_calls = ToolCallPart in map(type, message.content)
        pieces = (part.text if isinstance(part, TextPart) else "<box>" for part in parts)
        text, turn = "".join(pieces), f"message {index}, of the {message.role},"
        is_at_start, others = text.lstrip().startswith("<think>"), _CODE.sub("", text).lstrip()
        if is_at_start or "</think>" not in text:  # else the template splits even a quoted text
            text = _CODE.sub(lambda code: code[0].replace("<think>", ""), text)
        tags, other = _THINK_TAG.findall(text), _OTHER_TAG.search(others)
        remedy = "write <think>, the reasoning and </think> once, before the answer"
        if message.role != "assistant":
            if not is_at_start:
                continue
            code, problem = "misplaced-reasoning", "starts with <think>"
            remedy = "move the reasoning to the start of the answer"
        elif tags == ["</think>"]:
            code, problem = "misplaced-reasoning", "has </think>, but no <think>"
        elif tags and (tags != ["<think>", "</think>"] or not is_at_start):
            code, problem = "unpaired-reasoning", f"has {shorten(' '.join(tags), 60)}"
            problem += "" if is_at_start else " after other text"
        elif tags and not (text.rpartition("</think>")[2].strip() or has_calls):
            code, problem = "empty-answer", "ends with </think>"
        elif other and not tags and (other["end"] or other["closed"] or other.start() == 0):
            code = "unpaired-reasoning" if other["closed"] else "misplaced-reasoning"
            problem = f"has {shorten(other[0], 60)} instead of <think>"
        else:
            continue
        yield location.create_issue(code, f"{turn} {problem}", remedy)


def _check_images(
    sample: Sample, location: SampleLocation, catalog: ImageCatalog
) -> Iterator[CheckIssue]:
    image_index = 0
    for part in sample.iter_parts():
        for path in list_media_paths(part):
            image_info = catalog[path]
            if image_info.issue_code is not None:
                message = f"{path}: {image_info.error}" if image_info.error else path
                issue_image = IssueImage(Path(path), image_index)
                yield location.create_issue(
                    image_info.issue_code, message, image_info.remedy, (issue_image,)
                )
        if isinstance(part, ImagePart) and is_video_path(part.image):
            yield issue_from_error(build_video_as_image_error(part.image), location)
        if isinstance(part, VideoPart):
            valid = [path for path in part.frames if catalog[path].issue_code is None]
            other = next((one for one in valid if catalog[one].size != catalog[valid[0]].size), "")
            if other:
                sizes = [catalog[path].size[::-1] for path in (other, valid[0])]
                size, first_size = (f"{width} x {height}" for width, height in sizes)
                yield location.create_issue(
                    "video-frame-sizes-differ",
                    f"{other} has {size} pixels, {valid[0]} {first_size}",
                    "extract the frames again at one size",
                    (IssueImage(Path(other)),),
                )
        image_index += isinstance(part, ImagePart)
