"""Decoding of images, resizing, and conversion to patches of a vision encoder.

Images become upright RGB images on a white background. Patches are stored as bytes before
normalization. Videos are sequences of frame images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finesight.errors import UserError
from finesight.model_folder import ModelFolder
from finesight.samples.frames import ImageSize, smart_resize
from finesight.samples.image_file import (
    MAX_IMAGE_PIXELS,
    CorruptImageError,
    build_corrupt_error,
    check_scans,
    open_image_header,
    read_exif_orientation,
    read_image_size,
)
from finesight.settings.config import ExactSize, ImageRule, ImageSettings, LongestSide, PixelRange

_EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transpose operation of each EXIF orientation (Exif 2.32, tag 0x0112)."""

_WHITE_RGBA = (255, 255, 255, 255)

MAX_BAND_PIXELS = 1 << 20
"""Maximum number of pixels per horizontal band in conversions of wide pixel types.

Conversion in bands limits the memory of 16-bit, 32-bit and floating-point intermediates.
"""


def load_image(
    path: Path, max_pixels: int = MAX_IMAGE_PIXELS, min_side: int | None = None
) -> Image.Image:
    """Load an image as RGB with EXIF rotation applied and transparency blended on white.

    16-bit grayscale is scaled to 8 bits. Animated images give their first frame. The number of
    pixels is checked before decoding.

    Args:
        min_side: Allows decoding a JPEG at 1/2, 1/4 or 1/8 of its size with no side below this.
            The complete file is still validated.

    Raises:
        CorruptImageError: The file is missing, truncated, not an image, or too large.
    """
    with open_image_header(path, max_pixels) as image:
        check_scans(path, image)
        try:
            exif_orientation = read_exif_orientation(image)
            if min_side is not None:
                image.draft(None, (min_side, min_side))
            image.load()
            rgb_image = convert_to_rgb(image)
        except Exception as error:  # decoders raise various exceptions on corrupt data
            raise build_corrupt_error(path, error) from error
    transpose = _EXIF_TRANSPOSES.get(exif_orientation)
    return rgb_image if transpose is None else rgb_image.transpose(transpose)


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, with transparency blended on white."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _convert_in_bands(image, partial(_gray_to_rgb, _compute_limits(image)))
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        return _convert_in_bands(image, _blend_on_white)
    if image.mode == "RGB":
        return image
    return image.convert("RGB")


def _compute_limits(image: Image.Image) -> tuple[float, float]:
    """Return the minimum and maximum of the finite gray values of an image."""
    lows: list[float] = []
    highs: list[float] = []
    for _, band in _iter_bands(image):
        values_HW = _to_finite_array(band)
        lows.append(float(values_HW.min()))
        highs.append(float(values_HW.max()))
    return min(lows), max(highs)


def _convert_in_bands(
    image: Image.Image, convert: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """Convert an image in horizontal bands to limit the memory of wide intermediate types."""
    if image.width * image.height <= MAX_BAND_PIXELS:
        return convert(image)
    result = Image.new("RGB", image.size)
    for top, band in _iter_bands(image):
        result.paste(convert(band), (0, top))
    return result


def _iter_bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield the first row of each horizontal band of an image, and the band."""
    width, height = image.size
    num_rows = max(1, MAX_BAND_PIXELS // width)
    for top in range(0, height, num_rows):
        yield top, image.crop((0, top, width, min(top + num_rows, height)))


def _blend_on_white(image: Image.Image) -> Image.Image:
    opaque = Image.new("RGBA", image.size, _WHITE_RGBA)
    return Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")


def _to_finite_array(image: Image.Image) -> NDArray[np.number]:
    values_HW: NDArray[np.number] = np.nan_to_num(np.asarray(image))
    return values_HW


def _gray_to_rgb(limits: tuple[float, float], image: Image.Image) -> Image.Image:
    """Scale gray values to 0..255, by the minimum and maximum of the whole image.

    Integers within 16 bits and fractions within 0..1 use that range. Other images are normalized
    by their minimum and maximum.
    """
    values_HW = _to_finite_array(image)
    low, high = limits
    is_integer = np.issubdtype(values_HW.dtype, np.integer)
    if is_integer and low >= 0 and high <= 65535:
        # Round to nearest: 65535 = 255 x 257.
        scaled = (values_HW.astype(np.uint32) + 128) // 257
    else:
        if not is_integer and low >= 0 and high <= 1:
            low, high = 0.0, 1.0
        scale = 255 / max(high - low, 1e-12)
        scaled = np.rint((values_HW.astype(np.float64) - low) * scale)
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")


MAX_ASPECT_RATIO = 200
"""Maximum aspect ratio; the reference processors reject other images."""


def get_default_image_rule(preprocessor: Mapping[str, Any]) -> PixelRange:
    """Return the range of pixel counts in the preprocessor config of a model."""
    return PixelRange(min_pixels=preprocessor["min_pixels"], max_pixels=preprocessor["max_pixels"])


def resolve_image_rule(
    preprocessor: Mapping[str, Any], requested: ImageSettings | None
) -> ImageRule:
    """Return the image rule of the recipe, with defaults of the model."""
    fixed_side = preprocessor.get("image_size")
    if fixed_side is None:
        if isinstance(requested, ImageRule):
            return requested
        default = get_default_image_rule(preprocessor)
        if requested is None:
            return default
        return requested.complete(default)
    fixed_rule = ExactSize(height=fixed_side, width=fixed_side)
    if requested not in (None, fixed_rule):
        raise UserError(
            f"image rule {requested}",
            where="image",
            expected=f"{fixed_side} x {fixed_side} pixels, the fixed image size of this model",
            remedy="remove `image` from the recipe",
        )
    return fixed_rule


def compute_resized_size(
    original_size: ImageSize, rule: ImageRule, factor: int, where: str = ""
) -> ImageSize:
    """Compute height and width after resizing, multiples of `factor` (patch size x merge size).

    PixelRange preserves the aspect ratio as closely as the factor allows and limits the area, as
    in the reference preprocessor. ExactSize rounds each side to the nearest multiple. LongestSide
    scales the longer side to its value, also upwards, then rounds each side. Halves round to even.

    Raises:
        CorruptImageError: The aspect ratio exceeds 200 under a rule that preserves it.
    """
    height, width = original_size
    assert height > 0, f"image height is {height}"
    assert width > 0, f"image width is {width}"
    if isinstance(rule, ExactSize):
        return _round_to_factor(rule.height, factor), _round_to_factor(rule.width, factor)
    if max(original_size) / min(original_size) > MAX_ASPECT_RATIO:
        raise CorruptImageError(
            f"{width} x {height} pixels",
            where=where,
            expected=f"one side at most {MAX_ASPECT_RATIO} times the other",
            remedy="crop the image or remove it from the data",
        )
    if isinstance(rule, LongestSide):
        scale = rule.longest_side / max(original_size)
        return _round_to_factor(height * scale, factor), _round_to_factor(width * scale, factor)
    return smart_resize(original_size, rule, factor)


def _round_to_factor(side: float, factor: int) -> int:
    return max(factor, round(side / factor) * factor)


def compute_video_size(
    original_size: ImageSize,
    num_frames: int,
    rule: ImageRule,
    limits: PixelRange | None,
    config: PatchConfig,
    where: str = "",
) -> ImageSize:
    """Compute height and width of the sampled frames of a video file after resizing.

    The image rule applies to each frame. Limits of the video processor apply to the pixels of all
    frames, unless the rule is a size. The smaller of both sizes is returned.
    """
    factor = config.resize_factor
    size = compute_resized_size(original_size, rule, factor, where)
    if limits is None or not isinstance(rule, PixelRange):
        return size
    height, width = original_size
    scale = max(1, factor / height, factor / width)
    if scale > 1:
        height = int(height * scale)
        width = int(width * scale)
    temporal_size = config.temporal_patch_size
    num_frames = max(num_frames, temporal_size)
    video_size = smart_resize((height, width), limits, factor, num_frames, temporal_size)
    return min(size, video_size, key=math.prod)


GridTHW = tuple[int, int, int]
"""Number of patches along time, height and width."""

NUM_CHANNELS = 3


@dataclass(frozen=True, slots=True)
class PatchConfig:
    """Patch sizes of a vision encoder.

    Attributes:
        merge_size: Number of patches per side of a merge block, which becomes one token.
    """

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2

    @property
    def resize_factor(self) -> int:
        """Divisor of both sides of a resized image, in pixels."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """Number of values per patch, including all channels and frames."""
        return NUM_CHANNELS * self.temporal_patch_size * self.patch_size**2

    def compute_grid(self, size: ImageSize, num_frames: int = 1) -> GridTHW:
        """Return the patch grid of an image or video of the given size.

        The last group of frames may be incomplete, because `patchify` repeats the last frame.
        """
        height, width = size
        return (
            -(-num_frames // self.temporal_patch_size),
            height // self.patch_size,
            width // self.patch_size,
        )

    def count_tokens(self, grid_thw: GridTHW) -> int:
        """Return the number of placeholder tokens of an image or video with a patch grid."""
        t, h, w = grid_thw
        return t * h * w // self.merge_size**2


def load_patch_config(folder: ModelFolder) -> PatchConfig:
    """Load the patch sizes of a model folder."""
    preprocessor = folder.preprocessor_config
    raw_config = folder.config.get("vision_config")
    # A missing or invalid vision_config is rejected when the model is built.
    vision_config = raw_config if isinstance(raw_config, dict) else {}
    sizes: dict[str, int] = {}
    for name in ("patch_size", "merge_size", "temporal_patch_size"):
        config_name = "spatial_merge_size" if name == "merge_size" else name
        value = preprocessor[name]
        sizes[name] = value
        other = vision_config.get(config_name, value)
        if other != value:
            raise UserError(
                f"{name} {value} in preprocessor_config.json, but {config_name} {other} under"
                " vision_config in config.json",
                where=str(folder.path),
                expected="the same value in both files",
                remedy="use both files of the same model",
            )
    return PatchConfig(**sizes)


def load_video_limits(folder: ModelFolder) -> PixelRange | None:
    """Load the pixel limits of a complete video, or None without limits."""
    size = folder.video_preprocessor_config.get("size")
    if not isinstance(size, dict):
        return None
    smallest = size.get("shortest_edge")
    largest = size.get("longest_edge")
    if isinstance(smallest, int) and isinstance(largest, int) and 0 < smallest <= largest:
        return PixelRange(min_pixels=smallest, max_pixels=largest)
    raise UserError(
        f"size {size} of the video preprocessor",
        where=str(folder.path),
        expected="shortest_edge and longest_edge, a range of pixels",
        remedy="use the files of the published model",
    )


def patchify(
    frames: Sequence[Image.Image], size: ImageSize, config: PatchConfig
) -> NDArray[np.uint8]:
    """Resize RGB frames and split them into patches.

    Patches are ordered by time, rows and columns of merge blocks, and rows and columns within a
    block. The values of a patch are ordered by channel, frame, row and column. Both orders are
    those of the reference processor. Each frame is resized in one bicubic step of Pillow from the
    original size. An incomplete group of frames is padded with the last frame.

    Returns:
        Patches, uint8 [N, D]. A single image has only one frame (see `repeat_still_frames`).
    """
    t, h, w = config.compute_grid(size, len(frames))
    p = config.patch_size
    m = config.merge_size
    temporal_size = 1 if len(frames) == 1 else config.temporal_patch_size
    shape = (t, h // m, w // m, m, m, NUM_CHANNELS, temporal_size, p, p)
    patches = np.empty(shape, dtype=np.uint8)
    for frame_index in range(t * temporal_size):
        if frame_index < len(frames):
            frame = frames[frame_index]
            assert frame.mode == "RGB", f"frame has mode {frame.mode}, not RGB"
            # In contiguous planes [C, H, W], the rows of a patch are contiguous.
            resized_HWC = np.asarray(resize_frame(frame, size))
            planes_CHW = np.ascontiguousarray(resized_HWC.transpose(2, 0, 1))
            blocks = planes_CHW.reshape(NUM_CHANNELS, h // m, m, p, w // m, m, p)
            ordered = blocks.transpose(1, 4, 2, 5, 0, 3, 6)
        patches[frame_index // temporal_size, :, :, :, :, :, frame_index % temporal_size] = ordered
    return patches.reshape(t * h * w, NUM_CHANNELS * temporal_size * p * p)


def repeat_still_frames(patches_ND: NDArray[np.uint8], patch_dim: int) -> NDArray[np.uint8]:
    """Expand patches that store one frame to `patch_dim` values by repeating the frame.

    Patches of that dimension are returned unchanged.
    """
    num_patches, current_dim = patches_ND.shape
    if current_dim == patch_dim:
        return patches_ND
    frames_NCFP = patches_ND.reshape(num_patches, NUM_CHANNELS, 1, current_dim // NUM_CHANNELS)
    return np.repeat(frames_NCFP, patch_dim // current_dim, axis=2).reshape(num_patches, patch_dim)


def first_frame(patches_ND: NDArray[np.uint8], patch: int) -> NDArray[np.uint8]:
    """Return the first frame of each patch.

    This is the inverse of `repeat_still_frames`. The argument `patch` is the patch size in pixels.
    """
    number, width = patches_ND.shape
    values_per_frame = NUM_CHANNELS * patch**2
    if width == values_per_frame:
        return patches_ND
    frames_NCFP = patches_ND.reshape(number, NUM_CHANNELS, width // values_per_frame, patch**2)
    return frames_NCFP[:, :, 0].reshape(number, values_per_frame)


def concat_shape(patches: Sequence[NDArray[np.uint8]]) -> tuple[int, int]:
    """Return the shape [N, D] of the result of `concat_patches`.

    Patches store a single frame if those of all images and videos do.
    """
    num_patches = sum(map(len, patches))
    patch_dims = (array.shape[1] for array in patches if len(array))
    return num_patches, max(patch_dims, default=patches[0].shape[1])


def concat_patches(
    patches: Sequence[NDArray[np.uint8]], out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Concatenate the patches of several images and videos.

    If any patches store several frames, single frames of the others are repeated.

    Args:
        patches: Patches of each image or video, uint8 [N, D].
        out: Output array of shape `concat_shape(patches)`; allocated if None.
    """
    if len(patches) == 1 and out is None:
        return patches[0]
    _, patch_dim = concat_shape(patches)
    return np.concatenate([repeat_still_frames(array, patch_dim) for array in patches], out=out)


def unpatchify(
    patches_ND: NDArray[np.uint8], grid_thw: GridTHW, config: PatchConfig
) -> list[Image.Image]:
    """Reconstruct the resized frames from the patches that `patchify` returned.

    Frames that were repeated to complete a group are included.
    """
    t, h, w = grid_thw
    p = config.patch_size
    m = config.merge_size
    temporal_size = patches_ND.shape[1] // (NUM_CHANNELS * p * p)
    blocks = patches_ND.reshape(t, h // m, w // m, m, m, NUM_CHANNELS, temporal_size, p, p)
    ordered = blocks.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5)
    frames_FHWC = ordered.reshape(t * temporal_size, h * p, w * p, NUM_CHANNELS)
    return [Image.fromarray(frame_HWC) for frame_HWC in frames_FHWC]


def get_frame_size(files: Sequence[Path]) -> ImageSize:
    """Return the common height and width of all frames of a video.

    Only image headers are read.

    Raises:
        CorruptImageError: A frame cannot be used, or the frame sizes differ.
    """
    assert files, "the video has no frames"
    first_size = read_image_size(files[0])
    for file in files[1:]:
        size = read_image_size(file)
        if size != first_size:
            raise CorruptImageError(
                f"{size[1]} x {size[0]} pixels, but the first frame has"
                f" {first_size[1]} x {first_size[0]}",
                where=str(file),
                expected="frames of equal size",
                remedy="extract the frames again at one size",
            )
    return first_size


def resize_frame(frame: Image.Image, size: ImageSize) -> Image.Image:
    """Resize an RGB frame to height and width, as `patchify` does."""
    height, width = size
    if frame.size == (width, height):
        return frame
    return frame.resize((width, height), Image.Resampling.BICUBIC)
