"""Loading of model configs with transformers, for families without native code.

Code from model repositories is never executed: only classes of transformers itself are used.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

from finesight.encode.family import FAMILIES
from finesight.errors import UserError
from finesight.model_folder import ModelFolder

FROM_PRETRAINED_OPTIONS = {"local_files_only": True, "trust_remote_code": False}
"""Arguments of `from_pretrained`: no downloads, and no code from the model folder."""


def is_native(folder: ModelFolder) -> bool:
    """Return whether finesight has its own implementation of the model family."""
    return folder.family in FAMILIES


@lru_cache
def import_transformers() -> Any:
    """Import transformers, with hub kernels and progress bars disabled.

    Raises:
        UserError: transformers is not installed.
    """
    # Hub kernels would download and execute code from the hub.
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    try:
        import transformers as package
    except ImportError as error:
        raise UserError(
            f"cannot import transformers: {error}",
            where="model",
            expected=f"a model of the families {', '.join(FAMILIES)}, or installed transformers",
            remedy="pip install 'finesight[hf]'",
        ) from error
    package.utils.logging.disable_progress_bar()
    return package


def load_hf_config(folder: ModelFolder) -> Any:
    """Load the config of a model folder with transformers.

    Raises:
        UserError: transformers has no image-text-to-text decoder class for the family, the family
            needs remote code, or the weights are quantized.
    """
    package = import_transformers()
    config_file = str(folder.path / "config.json")
    expected = (
        f"one of {', '.join(FAMILIES)}, or a family with an image-text-to-text class in"
        f" transformers {package.__version__}"
    )
    if folder.family not in package.CONFIG_MAPPING:
        remote_code = folder.config.get("auto_map")
        raise UserError(
            f"the family {folder.family} is unknown to transformers {package.__version__}"
            + (f": it needs remote code, auto_map is {remote_code}" if remote_code else ""),
            where=config_file,
            expected=expected,
            remedy="remote code is never executed: use a version of the model in transformers'"
            " native format, if available"
            if remote_code
            else "choose another model, or install a transformers version with this family",
        )
    if "quantization_config" in folder.config:
        quantization = folder.config["quantization_config"]
        raise UserError(
            f"quantized weights: quantization_config is {quantization!r:.80}",
            where=config_file,
            expected="weights in bf16, fp16 or fp32",
            remedy="use the unquantized version of the model",
        )
    try:
        config = package.AutoConfig.from_pretrained(str(folder.path), **FROM_PRETRAINED_OPTIONS)
    except Exception as error:  # families raise different exceptions
        raise UserError(
            f"invalid config of the family {folder.family} for transformers"
            f" {package.__version__} ({str(error).strip().splitlines()[-1].strip():.200})",
            where=config_file,
            expected=expected,
            remedy="use the config.json of the published model",
        ) from error
    is_image_text_to_text = type(config) in package.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if not is_image_text_to_text or config.is_encoder_decoder:
        reason = (
            "is an encoder-decoder model"
            if is_image_text_to_text
            else "has no image-text-to-text class"
        )
        raise UserError(
            f"the family {folder.family} {reason}",
            where=config_file,
            expected=expected + ", decoder-only",
            remedy="choose another model",
        )
    return config
