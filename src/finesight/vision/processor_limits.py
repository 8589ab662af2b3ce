"""Pixel limits of other programs, with which images have the sizes of an image rule.

The processors of transformers, vLLM and SGLang know only a range of pixels. Under another rule,
clients resize images, and the range must leave the resized images unchanged.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from finesight.files.bounded_files import read_json_object
from finesight.model_folder import PREPROCESSOR_FILE, PROCESSOR_FILE, ModelFolder
from finesight.settings.config import ExactSize, ImageRule, PixelRange
from finesight.vision.image_processing import compute_resized_size, load_patch_config


def has_fixed_image_size(folder: ModelFolder) -> bool:
    """Return whether a model has a single image size, as Qwen-VL (2023)."""
    return "image_size" in folder.preprocessor_config


def get_processor_limits(rule: ImageRule, factor: int) -> PixelRange:
    """Return the pixel limits of a processor for images that were resized by a rule.

    With the limits of a PixelRange, the processor resizes images of any size by that rule. With
    those of another rule, it does not change images of a size that the rule produces.

    Args:
        factor: Patch size x merge size of the model.
    """
    if isinstance(rule, PixelRange):
        return rule
    if isinstance(rule, ExactSize):
        size = (rule.height, rule.width)
        num_pixels = math.prod(compute_resized_size(size, rule, factor))
        return PixelRange(min_pixels=num_pixels, max_pixels=num_pixels)
    # Half a multiple is rounded up or down, depending on the rounding error of the scale.
    shortest = max(1, rule.longest_side // factor) * factor
    longest = math.ceil(rule.longest_side / factor) * factor
    return PixelRange(min_pixels=factor * shortest, max_pixels=longest**2)


def write_processor_limits(folder: Path, base: ModelFolder, rule: ImageRule) -> None:
    """Write the pixel limits of a rule to a copied model folder.

    Existing files are changed. A new file is written only if there is none, since it would hide the
    patch and color settings of the others. The limits have the names of transformers 4; `size`, if
    present, has those of transformers 5. A model with a fixed image size has no limits.

    Args:
        folder: Folder that contains copies of the files of `base`.
        base: Model of a native family.
    """
    if has_fixed_image_size(base):
        return
    limits = get_processor_limits(rule, load_patch_config(base).resize_factor)
    smallest, largest = limits.min_pixels, limits.max_pixels

    def limit(settings: dict[str, Any]) -> dict[str, Any]:
        limited = settings | {"min_pixels": smallest, "max_pixels": largest}
        if "size" in settings:
            limited["size"] = {"shortest_edge": smallest, "longest_edge": largest}
        return limited

    processor = _read_json(folder / PROCESSOR_FILE)
    preprocessor_path = folder / PREPROCESSOR_FILE
    nested = processor.get("image_processor")
    if isinstance(nested, dict):
        _write_json(folder / PROCESSOR_FILE, processor | {"image_processor": limit(nested)})
    if preprocessor_path.exists() or not isinstance(nested, dict):
        _write_json(preprocessor_path, limit(_read_json(preprocessor_path)))


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
