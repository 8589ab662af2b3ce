"""Find the issues of a single sample: roles, empty turns, images, texts and boxes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from finesight.check.box_issues import find_box_issues
from finesight.check.check_issues import CheckIssue, IssueImage, SampleLocation
from finesight.check.image_catalog import ImageCatalog
from finesight.check.row_issues import issue_from_error
from finesight.check.text_issues import find_text_issues
from finesight.data.sample import (
    ImagePart,
    InvalidTurnsError,
    Sample,
    TextPart,
    VideoPart,
    list_media_paths,
    validate_roles,
)

_FETCH_REMEDY = "download or export the image again, or remove the sample"

_REMEDIES = {
    "image-missing": "correct the path; relative paths start at the folder of the data file",
    "image-truncated": _FETCH_REMEDY,
    "image-corrupt": _FETCH_REMEDY,
    "image-too-large": "resize or crop the image",
}


def find_sample_issues(
    sample: Sample,
    location: SampleLocation,
    catalog: ImageCatalog,
    special_tokens: Collection[str] = (),
) -> Iterator[CheckIssue]:
    """Yield all issues of a sample that can be found without other samples.

    Args:
        sample: Sample to check.
        location: Location of the sample.
        catalog: Catalog that contains the images of the sample.
        special_tokens: Special tokens of the tokenizer that must not occur in texts.
    """
    yield from _check_roles(sample, location)
    yield from _check_empty_turns(sample, location)
    yield from _check_images(sample, location, catalog)
    yield from find_text_issues(sample, location, special_tokens)
    yield from find_box_issues(sample, location, catalog)


def iter_media_paths(sample: Sample) -> Iterator[str]:
    """Yield the paths of all images and video frames of a sample."""
    return (path for part in sample.iter_parts() for path in list_media_paths(part))


def _check_roles(sample: Sample, location: SampleLocation) -> Iterator[CheckIssue]:
    try:
        validate_roles(sample.messages, "")
    except InvalidTurnsError as error:
        yield issue_from_error(error, location)


def _check_empty_turns(sample: Sample, location: SampleLocation) -> Iterator[CheckIssue]:
    for message_index, message in enumerate(sample.messages):
        texts = [part.text for part in message.content if isinstance(part, TextPart)]
        if len(texts) == len(message.content) and not "".join(texts).strip():
            code = "empty-answer" if message.role == "assistant" else "empty-question"
            message_text = f"message {message_index}, of the {message.role}, is {''.join(texts)!r}"
            yield location.create_issue(code, message_text, "add text, or remove the sample")
        if message.role != "user" and any(list_media_paths(part) for part in message.content):
            yield location.create_issue(
                "image-in-answer",
                f"message {message_index}, of the {message.role}, contains an image",
                "move it to a user turn: answers contain text and boxes only",
            )


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
                    image_info.issue_code, message, _REMEDIES[image_info.issue_code], (issue_image,)
                )
        if isinstance(part, VideoPart):
            yield from _check_frames(part.frames, location, catalog)
        image_index += isinstance(part, ImagePart)


def _check_frames(
    frames: Sequence[str], location: SampleLocation, catalog: ImageCatalog
) -> Iterator[CheckIssue]:
    frame_sizes = [
        (path, catalog[path].size) for path in frames if catalog[path].issue_code is None
    ]
    other = next((frame for frame in frame_sizes if frame[1] != frame_sizes[0][1]), None)
    if other is not None:
        (first, (height, width)), (path, (other_height, other_width)) = frame_sizes[0], other
        yield location.create_issue(
            "video-frame-sizes-differ",
            f"{path} has {other_width} x {other_height} pixels, {first} {width} x {height}",
            "extract the frames again at one size",
            (IssueImage(Path(path)),),
        )
