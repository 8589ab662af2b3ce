"""Pictures cut into the patches that a vision tower reads, kept as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.vision.resize import Size

Grid = tuple[int, int, int]
"""Patches along time, height and width."""

CHANNELS = 3


@dataclass(frozen=True, slots=True)
class PatchGeometry:
    """`patch` pixels a side, `temporal` frames deep; `merge` x `merge` patches become one token."""

    patch: int = 14
    merge: int = 2
    temporal: int = 2

    @property
    def factor(self) -> int:
        """What both sides of a resized picture are multiples of."""
        return self.patch * self.merge

    @property
    def numbers(self) -> int:
        """D, the numbers of one patch."""
        return CHANNELS * self.temporal * self.patch**2

    def grid(self, size: Size, frames: int = 1) -> Grid:
        """Patches along time, height and width; an odd frame is filled up with its repetition."""
        height, width = size
        return -(-frames // self.temporal), height // self.patch, width // self.patch

    def tokens(self, grid: Grid) -> int:
        """Placeholder tokens of a picture or video with that grid."""
        t, h, w = grid
        return t * h * w // self.merge**2


def geometry_of(folder: ModelFolder) -> PatchGeometry:
    """The patch sizes of a model. Raises UserError when its two files contradict each other."""
    preprocessor = folder.preprocessor
    found = folder.config.get("vision_config")
    # A file without it, or with something else there, is refused when the model is built.
    vision = found if isinstance(found, dict) else {}
    names = {
        "patch_size": "patch_size",
        "merge_size": "spatial_merge_size",
        "temporal_patch_size": "temporal_patch_size",
    }
    for ours, theirs in names.items():
        if vision.get(theirs, preprocessor[ours]) != preprocessor[ours]:
            raise UserError(
                f"{ours} {preprocessor[ours]} in preprocessor_config.json, but {theirs}"
                f" {vision[theirs]} under vision_config in config.json",
                where=str(folder.path),
                expected="the same number in both files",
                remedy="take both files from the same model",
            )
    return PatchGeometry(
        patch=preprocessor["patch_size"],
        merge=preprocessor["merge_size"],
        temporal=preprocessor["temporal_patch_size"],
    )


def to_patches(
    frames: Sequence[Image.Image], size: Size, geometry: PatchGeometry
) -> NDArray[np.uint8]:
    """Resize RGB frames to `size` and cut them: uint8 [N, D] in the published processor's order.

    Patches follow time, then the rows and columns of merge blocks, then the rows and columns
    within a block. The numbers of a patch follow channel, frame, row, column. Frames short of a
    multiple of the temporal depth are filled up by repeating the last; the patches of one still
    picture hold its frame once, and `whole` repeats it. The resize is one bicubic step of Pillow,
    straight from the original.
    """
    t, h, w = geometry.grid(size, len(frames))
    p, m = geometry.patch, geometry.merge
    depth = 1 if len(frames) == 1 else geometry.temporal
    shape = (t, h // m, w // m, m, m, CHANNELS, depth, p, p)
    patches = np.empty(shape, dtype=np.uint8)
    for place in range(t * depth):
        if place < len(frames):
            planes_CHW = _planes(frames[place], size)
            blocks = planes_CHW.reshape(CHANNELS, h // m, m, p, w // m, m, p)
            ordered = blocks.transpose(1, 4, 2, 5, 0, 3, 6)
        patches[place // depth, :, :, :, :, :, place % depth] = ordered
    return patches.reshape(t * h * w, CHANNELS * depth * p * p)


def whole(patches_ND: NDArray[np.uint8], numbers: int) -> NDArray[np.uint8]:
    """The patches with so many numbers each, their one frame repeated where they hold one."""
    number, width = patches_ND.shape
    if width == numbers:
        return patches_ND
    frames_NCFP = patches_ND.reshape(number, CHANNELS, 1, width // CHANNELS)
    return np.repeat(frames_NCFP, numbers // width, axis=2).reshape(number, numbers)


def first_frame(patches_ND: NDArray[np.uint8], patch: int) -> NDArray[np.uint8]:
    """Keep one frame of patches of `patch` pixels a side: the inverse of `whole` for a still."""
    number, width = patches_ND.shape
    numbers = CHANNELS * patch**2
    if width == numbers:
        return patches_ND
    frames_NCFP = patches_ND.reshape(number, CHANNELS, width // numbers, patch**2)
    return frames_NCFP[:, :, 0].reshape(number, numbers)


def common_shape(patches: Sequence[NDArray[np.uint8]]) -> tuple[int, int]:
    """[N, D] of these patches end to end: with one frame each where all of them hold one."""
    widths = (part.shape[1] for part in patches if len(part))
    return sum(map(len, patches)), max(widths, default=patches[0].shape[1])


def end_to_end(
    patches: Sequence[NDArray[np.uint8]], out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """The patches of one picture or sample after those of another, of their common shape; written
    to `out` where it is given."""
    if len(patches) == 1 and out is None:
        return patches[0]
    _, numbers = common_shape(patches)
    return np.concatenate([whole(part, numbers) for part in patches], out=out)


def from_patches(
    patches_ND: NDArray[np.uint8], grid: Grid, geometry: PatchGeometry
) -> list[Image.Image]:
    """The frames that `to_patches` cut up, resized as the model sees them; its inverse.

    They include the repetitions of the last frame that filled up the temporal depth.
    """
    t, h, w = grid
    p, m = geometry.patch, geometry.merge
    depth = patches_ND.shape[1] // (CHANNELS * p * p)
    blocks = patches_ND.reshape(t, h // m, w // m, m, m, CHANNELS, depth, p, p)
    ordered = blocks.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5)
    frames_FHWC = ordered.reshape(t * depth, h * p, w * p, CHANNELS)
    return [Image.fromarray(frame_HWC) for frame_HWC in frames_FHWC]


def _planes(frame: Image.Image, size: Size) -> NDArray[np.uint8]:
    """One resized frame as contiguous planes [C, H, W]; rows of a patch are then whole runs."""
    assert frame.mode == "RGB", f"a frame of mode {frame.mode}, not RGB"
    height, width = size
    if frame.size != (width, height):
        frame = frame.resize((width, height), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(frame).transpose(2, 0, 1))
