"""Families without code of their own here: what transformers has for them, or why they are refused.

No code of a model's repository is ever run: a class that transformers itself brings, or none.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

from finesight.encode.family import FAMILIES
from finesight.errors import UserError
from finesight.hub import ModelFolder

LOCAL = {"local_files_only": True, "trust_remote_code": False}
"""How transformers reads a folder: nothing is fetched, and no code of the folder is run."""


def is_native(folder: ModelFolder) -> bool:
    """Whether the folder's family has code of its own here."""
    return folder.family in FAMILIES


@lru_cache
def transformers() -> Any:
    """The package. Raises UserError where it is missing."""
    # Kernels would be code from a hub, fetched where a package for them is installed.
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    try:
        import transformers as package
    except ImportError as error:
        raise UserError(
            f"the package transformers cannot be imported: {error}",
            where="model",
            expected=f"a model of the families {', '.join(FAMILIES)}, or transformers for others",
            remedy="pip install 'finesight[hf]'",
        ) from error
    package.utils.logging.disable_progress_bar()
    return package


def configuration(folder: ModelFolder) -> Any:
    """The folder's configuration as transformers reads it.

    Raises UserError for a family that transformers has no class for, or none that answers about
    pictures; for one that only code of its own repository computes; and for quantised weights.
    """
    package = transformers()
    file = str(folder.path / "config.json")
    expected = (
        f"one of {', '.join(FAMILIES)}, or a family that transformers {package.__version__} itself"
        " has an image-text-to-text class for"
    )
    if folder.family not in package.CONFIG_MAPPING:
        code = folder.config.get("auto_map")
        raise UserError(
            f"a model of the family {folder.family}, which transformers {package.__version__} does"
            " not know"
            + (f": its code is in its own repository, auto_map is {code}" if code else ""),
            where=file,
            expected=expected,
            remedy="code that comes with a model is never run: take the model in transformers' own"
            " format, if it was published so"
            if code
            else "choose another model, or install a transformers that knows the family",
        )
    if "quantization_config" in folder.config:
        how = folder.config["quantization_config"]
        raise UserError(
            f"quantised weights: quantization_config is {how!r:.80}",
            where=file,
            expected="weights in bf16, fp16 or fp32",
            remedy="take the same model without quantisation",
        )
    try:
        config = package.AutoConfig.from_pretrained(str(folder.path), **LOCAL)
    except Exception as error:  # each family checks its own way
        raise UserError(
            f"no configuration of the family {folder.family} for transformers"
            f" {package.__version__} ({str(error).strip().splitlines()[-1].strip():.200})",
            where=file,
            expected=expected,
            remedy="take the config.json of the published model",
        ) from error
    answers = type(config) in package.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if not answers or config.is_encoder_decoder:
        kind = "is an encoder with a decoder" if answers else "does not answer about pictures"
        raise UserError(
            f"a model of the family {folder.family}, which {kind}",
            where=file,
            expected=expected + ", with a decoder only",
            remedy="choose another model",
        )
    return config
