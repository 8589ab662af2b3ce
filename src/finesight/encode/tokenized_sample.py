"""Data classes of tokenized samples, and of encoded samples with image patches.

Shapes: T tokens of a sequence, N patches, D values per patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

ImageSize = tuple[int, int]
"""Height and width in pixels."""

GridTHW = tuple[int, int, int]
"""Number of patches along time, height and width."""


@dataclass(frozen=True, slots=True)
class VisualSpan:
    """An image or video of a tokenized sample, and the range of its placeholder tokens.

    Attributes:
        start: Index of the first placeholder token.
        stop: Index after the last placeholder token.
        files: Image file, or the frames of a video.
        original_size: Size of the image or frames before resizing.
        resized_size: Size after resizing for the model.
    """

    kind: Literal["image", "video"]
    start: int
    stop: int
    grid_thw: GridTHW
    files: tuple[Path, ...]
    original_size: ImageSize
    resized_size: ImageSize


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """Token ids, loss mask and position ids of a sample.

    Built from the text and the image headers; pixels are not decoded.

    Attributes:
        loss_mask_T: True for tokens that contribute to the loss.
        position_ids_3T: M-RoPE positions: time, height and width (Wang et al. 2024, Qwen2-VL,
            section 2.1).
    """

    id: str
    ids_T: NDArray[np.int32]
    loss_mask_T: NDArray[np.bool_]
    position_ids_3T: NDArray[np.int32]
    spans: tuple[VisualSpan, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.ids_T)

    @property
    def num_supervised_tokens(self) -> int:
        """Number of tokens that contribute to the loss.

        The first token is not counted, because no earlier token predicts it.
        """
        return int(self.loss_mask_T[1:].sum())

    @property
    def num_packed_tokens(self) -> int:
        """Number of tokens of this sample that a packed batch contains.

        Tokens after the last image and after the token that predicts the last supervised token do
        not affect the loss and are not packed. Without supervised tokens, all tokens are packed.
        """
        predicting = np.flatnonzero(self.loss_mask_T[1:])
        if not len(predicting):
            return self.num_tokens
        return max(int(predicting[-1]) + 1, self.spans[-1].stop if self.spans else 0)

    @property
    def num_patches(self) -> int:
        return sum(t * h * w for t, h, w in (span.grid_thw for span in self.spans))


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """A tokenized sample with the pixel patches of its images and videos.

    Attributes:
        patches_ND: uint8 patches of all images and videos in the order of the transformers image
            processor: grouped by merge block, D = channels x frames x patch_size x patch_size.
            Samples with images only store one frame, which the processor repeats
            (`vision.patches.repeat_still_frames`).
        hf_inputs: Processor outputs by name for families without native code, which have no
            patches.
    """

    tokenized: TokenizedSample
    patches_ND: NDArray[np.uint8]
    hf_inputs: Mapping[str, Tensor] = field(default_factory=dict)
