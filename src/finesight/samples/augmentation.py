"""Random variants of training images, with the boxes and points of their samples.

A variant has the size of the original image, so a sample keeps its number of image tokens. Every
object of the answer stays completely visible: crops and rotations contain all boxes and points, and
images whose text the model reads, or whose objects it counts, are not cropped.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from finesight.metric_components import get_metric
from finesight.samples.boxes import box_area, is_inside_image
from finesight.samples.frames import Box, ImageSize
from finesight.samples.image_file import read_image_size
from finesight.samples.sample import (
    BoxPart,
    ContentPart,
    ImagePart,
    LocatedSample,
    TextPart,
    ToolCallPart,
    create_region,
)
from finesight.settings.config import AugmentSettings, Recipe

MAX_BOX_GROWTH = 1.25
"""Maximum growth of the area of a box that encloses a rotated box; the angle is halved above."""

BLUR_RADII = (0.3, 1.0)
"""Range of the radius of a Gaussian blur in pixels."""

JPEG_QUALITIES = (40, 90)
"""Range of the quality of a JPEG copy."""

_SIDES_AND_TEXT = re.compile(
    r"\b(left\w*|right\w*|((north|south)[- ]?)?(east|west)\w*"
    r"|(counter|anti)?clockwise|mirror\w*|read\w*|text|word|letter|digit"
    r"|number|character|sign|logo|plate|label|title|button|menu|icon|page|screen\w*|chart|table"
    r"|document|says|written|click|tap)s?\b"
    r"|[左右东西東]|[顺順逆]时针|[文汉漢]字|数字|數字|字母|标[志题签]|標[誌題籤]|按[钮鈕]|点击|點擊"
    r"|[\"“”„«「『《]|屏幕|螢幕|[页頁]面|[图圖]表|表格|文[档件]",
    re.IGNORECASE,
)
"""Words of samples that a horizontal flip may make wrong, or whose image may contain text."""

_COUNTS = re.compile(
    r"\b(how[\s-]+many|amount of|count\w*|number of)\b"
    r"|多少|[几幾][个個只隻]|[数數]量",
    re.IGNORECASE,
)
_COORDINATES = re.compile(
    r"[\[(]\s*-?(?=\.?\d)\d*+(\.\d++)?\s*+,\s*-?\.?\d|<(loc|bin|box|point)[^<>]{0,40}\d"
    r"|<box>|\b[xy][12]?[\"']?\s*[:=]\s*[\"']?-?\.?\d"
    r"|(?<!\d)(-?(?=\.?\d)\d*+(\.\d++)?\s*+[,;]\s*){3}-?\.?\d",
    re.IGNORECASE,
)

AffineRows = tuple[float, float, float, float, float, float]
"""Two rows of an affine map of pixel coordinates."""


@dataclass(frozen=True, slots=True)
class ImageVariant:
    """Random changes of an image.

    Attributes:
        matrix: Map from pixels of the image to pixels of its variant.
        color: Factors of brightness, contrast and saturation. The hue stays, because texts name it.
        blur_radius: Radius of a Gaussian blur in pixels of the model's input; 0 for none.
        jpeg_quality: Quality of a JPEG copy of the model's input; 0 for none.
    """

    matrix: AffineRows
    color: tuple[float, float, float]
    blur_radius: float
    jpeg_quality: int

    def apply(self, image: Image.Image, size: ImageSize) -> Image.Image:
        """Return the variant of an RGB image, resized to height and width."""
        image = self._warp(image, size)
        if self.color != (1.0, 1.0, 1.0):
            brightness, contrast, saturation = self.color
            mixed = saturation * np.eye(3) + (1 - saturation) * np.array(_LUMA)
            rows = np.column_stack([brightness * contrast * mixed, [128 * (1 - contrast)] * 3])
            image = image.convert("RGB", tuple(rows.ravel().tolist()))
        if self.blur_radius:
            image = image.filter(ImageFilter.GaussianBlur(self.blur_radius))
        if self.jpeg_quality:
            copy = io.BytesIO()
            image.save(copy, format="JPEG", quality=self.jpeg_quality)
            image = Image.open(copy).convert("RGB")
        return image

    def _warp(self, image: Image.Image, size: ImageSize) -> Image.Image:
        matrix = _square(self.matrix)
        width, height = image.size
        left, top, right, bottom = _map_box(np.linalg.inv(matrix), (0.0, 0.0, width, height))
        is_axis_aligned = matrix[0, 1] == 0
        if is_axis_aligned and min(left, top) >= 0 and right <= width and bottom <= height:
            window = left, top, right, bottom
            image = image.resize(size[::-1], Image.Resampling.BICUBIC, window)
            if matrix[0, 0] < 0:
                return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return image
        # Resizing to the resolution of the result first avoids aliasing.
        zoom = math.sqrt(abs(np.linalg.det(matrix)))
        resolution = np.minimum(image.size, np.rint(zoom * np.array(size[::-1])).clip(1))
        corners = itertools.product((0, width - 1), (0, height - 1))
        fill = np.median([image.getpixel(corner) for corner in corners], axis=0)
        to_original = np.diag([*(image.size / resolution), 1.0])
        to_result = np.diag([size[1] / width, size[0] / height, 1.0])
        backward = np.linalg.inv(to_result @ matrix @ to_original)
        image = image.resize((int(resolution[0]), int(resolution[1])), Image.Resampling.BICUBIC)
        return image.transform(
            size[::-1],
            Image.Transform.AFFINE,
            backward[:2].ravel().tolist(),
            Image.Resampling.BILINEAR,
            fillcolor=tuple(map(int, fill)),
        )

    def map_box(self, box: Box, size: ImageSize) -> Box:
        """Return the box around a mapped box, or the mapped point, clipped to the image."""
        height, width = size
        x1, y1, x2, y2 = _map_box(_square(self.matrix), box)
        return (
            min(max(x1, 0.0), width),
            min(max(y1, 0.0), height),
            min(max(x2, 0.0), width),
            min(max(y2, 0.0), height),
        )


_LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the brightness of a pixel (ITU-R BT.601)."""

_IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def _square(matrix: AffineRows) -> NDArray[np.float64]:
    return np.array([matrix[:3], matrix[3:], (0.0, 0.0, 1.0)])


def _map_box(matrix: NDArray[Any], box: Box) -> Box:
    """Return the bounds of the mapped corners of a box."""
    x1, y1, x2, y2 = box
    mapped = matrix[:2] @ np.array([[x1, x2, x1, x2], [y1, y1, y2, y2], [1.0] * 4])
    left, top = mapped.min(1).tolist()
    right, bottom = mapped.max(1).tolist()
    return left, top, right, bottom


@dataclass(frozen=True, slots=True)
class AugmentedSample(LocatedSample):
    """A sample with variants of its images; boxes and points are in their pixels."""

    variants: tuple[ImageVariant, ...] = ()


@dataclass(frozen=True, slots=True)
class Augmenter:
    """Draws variants of images as a pure function of the seed and a key.

    Attributes:
        describes_scenes: Whether answers describe objects, so that crops and flips keep them true.
    """

    settings: AugmentSettings
    seed: int
    describes_scenes: bool

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Augmenter | None:
        """Create the augmenter of a recipe, or return None without `data.augment`."""
        if recipe.data.augment is None:
            return None
        describes_scenes = False
        if recipe.eval is not None:
            describes_scenes = get_metric(recipe.eval.metric).describes_scenes
        return cls(recipe.data.augment, recipe.train.seed, describes_scenes)

    def augment(self, located: LocatedSample, *key: int) -> LocatedSample:
        """Return a sample with random variants of its images; videos stay unchanged.

        The images of a sample have the same variant, up to the boxes that they must contain.

        Args:
            key: Numbers that select the variant, such as training step and index of the sample.
        """
        seeds = np.random.SeedSequence((self.seed, *key))
        # Raw output of the generator is stable across NumPy releases.
        draws = np.random.Philox(seeds).random_raw(11) / 2.0**64
        sample = located.sample
        sizes: list[ImageSize] = []
        for part in sample.iter_parts():
            if isinstance(part, ImagePart):
                sizes.append(read_image_size(located.resolve_path(part.image)))
        boxes: list[list[Box]] = [[] for _ in sizes]
        lines: list[str] = []
        for part in sample.iter_parts():
            if isinstance(part, TextPart):
                lines.append(f"{part.text}\n")
            elif isinstance(part, BoxPart) and part.image < len(boxes):
                lines.append(f"{part.label}\n")
                boxes[part.image].append(part.xyxy)
        texts = "".join(lines)
        # The numbers of a text and the arguments of a tool call cannot be moved.
        has_call = any(isinstance(part, ToolCallPart) for part in sample.iter_parts())
        can_move = not (has_call or _COORDINATES.search(texts))
        variants: list[ImageVariant] = []
        for size, image_boxes in zip(sizes, boxes, strict=True):
            matrix = _IDENTITY
            if can_move:
                matrix = self._draw_matrix(draws[:6], size, image_boxes, texts)
            variants.append(self._draw_variant(draws, matrix))

        def move(part: ContentPart) -> ContentPart:
            if not isinstance(part, BoxPart) or part.image >= len(variants):
                return part
            box = variants[part.image].map_box(part.xyxy, sizes[part.image])
            return create_region(box, part.label, is_point=part.is_point, image=part.image)

        return AugmentedSample(
            sample.with_parts(move), located.folder, located.mismatched, tuple(variants)
        )

    def _draw_variant(self, draws: NDArray[np.float64], matrix: AffineRows) -> ImageVariant:
        settings = self.settings
        brightness, contrast, saturation = 1 + settings.color * (2 * draws[6:9] - 1)
        # A chosen draw is uniform below its probability, so it selects the strength, too.
        blur_radius = 0.0
        if draws[9] < settings.blur:
            low, high = BLUR_RADII
            blur_radius = low + (high - low) * float(draws[9]) / settings.blur
        jpeg_quality = 0
        if draws[10] < settings.jpeg:
            worst, best = JPEG_QUALITIES
            jpeg_quality = round(worst + (best - worst) * float(draws[10]) / settings.jpeg)
        color = (float(brightness), float(contrast), float(saturation))
        return ImageVariant(matrix, color, blur_radius, jpeg_quality)

    def _draw_matrix(
        self, draws: NDArray[np.float64], size: ImageSize, boxes: Sequence[Box], texts: str
    ) -> AffineRows:
        """Draw a window of the image that contains all boxes, its rotation and its flip."""
        settings = self.settings
        height, width = size
        can_crop = self.describes_scenes and not _COUNTS.search(texts)
        window = (1 - can_crop * settings.crop * draws[0]) * (1 + settings.scale * draws[1])
        kept: Sequence[Box] = [(0.0, 0.0, float(width), float(height))]
        if can_crop and window < 1:
            kept = boxes
        # Without boxes, bounds beyond the image leave the window free.
        x1s, y1s, x2s, y2s = zip(*kept or [(width, height, 0.0, 0.0)], strict=True)
        low = (min(x1s), min(y1s))
        high = (max(x2s), max(y2s))
        window = max(window, (high[0] - low[0]) / width, (high[1] - low[1]) / height)
        center = []
        for axis, side in enumerate((width, height)):
            rest = side - window * side
            first = max(high[axis] - window * side, min(0.0, rest))
            last = min(low[axis], max(0.0, rest))
            center.append(first + draws[2 + axis] * (last - first) + window * side / 2)
        can_flip = self.describes_scenes and not _SIDES_AND_TEXT.search(texts)
        flip = 1.0
        if settings.flip == "auto" and can_flip and draws[5] < 0.5:
            flip = -1.0
        angle = math.radians(settings.rotate) * (2 * draws[4] - 1)
        for share in (1.0, 0.5, 0.25, 0.0):
            cosine = math.cos(share * angle) / window
            sine = math.sin(share * angle) / window
            linear = np.array([[flip * cosine, -sine], [flip * sine, cosine]])
            matrix = np.column_stack([linear, np.array([width, height]) / 2 - linear @ center])
            if all(_stays_visible(matrix, box, size, window) for box in kept):
                break
        a, b, c, d, e, f = matrix.ravel().tolist()
        return a, b, c, d, e, f


def _stays_visible(matrix: NDArray[Any], box: Box, size: ImageSize, window: float) -> bool:
    """Return whether a mapped box is inside the image and its enclosing box fits tightly."""
    mapped = _map_box(matrix, box)
    growth = box_area(mapped) * window**2
    return is_inside_image(mapped, size, is_point=True) and growth <= MAX_BOX_GROWTH * box_area(box)
