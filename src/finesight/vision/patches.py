"""Conversion of images and videos to vision-encoder patches, stored as bytes before normalization.

Videos are sequences of frame images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finesight.data.image_header import CorruptImageError, ImageSize, read_image_size
from finesight.errors import UserError
from finesight.model_folder import ModelFolder
from finesight.vision.image_decoding import load_image

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
    config_keys = {
        "patch_size": "patch_size",
        "merge_size": "spatial_merge_size",
        "temporal_patch_size": "temporal_patch_size",
    }
    for preprocessor_key, config_key in config_keys.items():
        if (
            vision_config.get(config_key, preprocessor[preprocessor_key])
            != preprocessor[preprocessor_key]
        ):
            raise UserError(
                f"{preprocessor_key} {preprocessor[preprocessor_key]} in"
                f" preprocessor_config.json, but {config_key} {vision_config[config_key]} under"
                " vision_config in config.json",
                where=str(folder.path),
                expected="the same value in both files",
                remedy="use both files of the same model",
            )
    return PatchConfig(
        patch_size=preprocessor["patch_size"],
        merge_size=preprocessor["merge_size"],
        temporal_patch_size=preprocessor["temporal_patch_size"],
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
        Patches, uint8 [N, D]. Those of a single image store one frame; `repeat_still_frames` adds
    """
    t, h, w = config.compute_grid(size, len(frames))
    p, m = config.patch_size, config.merge_size
    temporal_size = 1 if len(frames) == 1 else config.temporal_patch_size
    shape = (t, h // m, w // m, m, m, NUM_CHANNELS, temporal_size, p, p)
    patches = np.empty(shape, dtype=np.uint8)
    for frame_index in range(t * temporal_size):
        if frame_index < len(frames):
            planes_CHW = _to_channel_planes(frames[frame_index], size)
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
    patch_dims = (array.shape[1] for array in patches if len(array))
    return sum(map(len, patches)), max(patch_dims, default=patches[0].shape[1])


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
    p, m = config.patch_size, config.merge_size
    temporal_size = patches_ND.shape[1] // (NUM_CHANNELS * p * p)
    blocks = patches_ND.reshape(t, h // m, w // m, m, m, NUM_CHANNELS, temporal_size, p, p)
    ordered = blocks.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5)
    frames_FHWC = ordered.reshape(t * temporal_size, h * p, w * p, NUM_CHANNELS)
    return [Image.fromarray(frame_HWC) for frame_HWC in frames_FHWC]


def _to_channel_planes(frame: Image.Image, size: ImageSize) -> NDArray[np.uint8]:
    """Resize a frame and convert it to a contiguous array [C, H, W].

    The rows of a patch are then contiguous in memory.
    """
    assert frame.mode == "RGB", f"frame has mode {frame.mode}, not RGB"
    height, width = size
    if frame.size != (width, height):
        frame = frame.resize((width, height), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(frame).transpose(2, 0, 1))


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


def patchify_video(
    files: Sequence[Path], size: ImageSize, config: PatchConfig
) -> NDArray[np.uint8]:
    """Resize the frames of a video and split them into patches, uint8 [N, D].

    Each patch spans several frames. As in the reference video processor, the last frame is repeated
    if the last group of frames is incomplete.
    """
    return patchify([load_image(file) for file in files], size, config)
