"""Check the bounding boxes of a sample against the size of their image."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from finesight.check.check_issues import CheckIssue, IssueImage, SampleLocation
from finesight.check.image_catalog import ImageCatalog
from finesight.data.boxes import MAX_OVERHANG_PX, Box
from finesight.data.sample import BoxPart, ImagePart, Sample

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
    for box in sample.iter_parts():
        if not isinstance(box, BoxPart):
            continue
        if box.image >= len(image_paths):
            yield location.create_issue(
                "box-without-image",
                (
                    f"box refers to image {box.image} (0-based); the sample has {len(image_paths)}"
                    " images"
                ),
                "correct the box's `image`, or add the image",
            )
            continue
        image_info = catalog[image_paths[box.image]]
        if image_info.issue_code is None:
            issue_image = IssueImage(
                Path(image_paths[box.image]), box.image, (box.xyxy,), (box.label or "",)
            )
            yield from _check_box(box.xyxy, image_info.size, location, issue_image)


def sort_corners(xyxy: Box, size: tuple[int, int]) -> Box | None:
    """Return an inverted box with its corners sorted, or None if the correction is ambiguous.

    It is ambiguous if the sorted corners are outside the image, or if the values could be a corner
    or center with width and height.
    """
    height, width = size
    a, b, c, d = xyxy
    sorted_box = (min(a, c), min(b, d), max(a, c), max(b, d))
    if (
        sorted_box[0] == sorted_box[2]
        or sorted_box[1] == sorted_box[3]
        or not _is_within(sorted_box, size, 0)
    ):
        return None
    fits_as_xywh = a + c <= width + MAX_OVERHANG_PX and b + d <= height + MAX_OVERHANG_PX
    fits_as_cxcywh = _is_within((a - c / 2, b - d / 2, a + c / 2, b + d / 2), size, MAX_OVERHANG_PX)
    return None if fits_as_xywh or fits_as_cxcywh else sorted_box


def clip_box(xyxy: Box, size: tuple[int, int]) -> Box | None:
    """Clip a box to its image; return None if no area remains."""
    height, width = size
    x1, y1, x2, y2 = xyxy
    clipped_box = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    return (
        clipped_box if clipped_box[0] < clipped_box[2] and clipped_box[1] < clipped_box[3] else None
    )


def _check_box(
    xyxy: Box, size: tuple[int, int], location: SampleLocation, issue_image: IssueImage
) -> Iterator[CheckIssue]:
    height, width = size
    x1, y1, x2, y2 = xyxy
    coordinates = ", ".join(f"{value:g}" for value in xyxy)
    message = f"[{coordinates}] in an image of {width} x {height}"
    issue_images = (issue_image,)
    if not all(map(math.isfinite, xyxy)):
        yield location.create_issue(
            "box-empty", f"{message}: not four finite values", _ORDER_HINT, issue_images
        )
    elif x2 < x1 or y2 < y1:
        is_certain = sort_corners(xyxy, size) is not None
        yield location.create_issue(
            "box-inverted",
            message,
            _ORDER_HINT,
            issue_images,
            "reordered" if is_certain else None,
        )
    elif x1 == x2 or y1 == y2:
        yield location.create_issue(
            "box-empty", f"{message}: a line or a point", _ORDER_HINT, issue_images
        )
    elif not _is_within(xyxy, size, MAX_OVERHANG_PX) or clip_box(xyxy, size) is None:
        yield location.create_issue("box-outside", message, _CONVENTION_HINT, issue_images)
    elif not _is_within(xyxy, size, 0):
        yield location.create_issue(
            "box-at-edge", message, "clip it to the image", issue_images, "clipped"
        )
    elif min(x2 - x1, y2 - y1) < MIN_BOX_SIDE:
        yield location.create_issue(
            "box-tiny", message, "check that the box is not too small", issue_images
        )
    elif (x2 - x1) * (y2 - y1) >= FULL_IMAGE_FRACTION * width * height:
        yield location.create_issue(
            "box-covers-image", message, "check that the box locates an object", issue_images
        )


def _is_within(xyxy: Box, size: tuple[int, int], tolerance: float) -> bool:
    x1, y1, x2, y2 = xyxy
    return min(x1, y1) >= -tolerance and x2 <= size[1] + tolerance and y2 <= size[0] + tolerance
