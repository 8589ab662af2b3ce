"""List the files of a model folder that an upload to a hub contains."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from finesight.digests import DIGESTS_FILE, verify_folder
from finesight.errors import UserError
from finesight.infer.model_loader import ModelSource
from finesight.model_folder import DOWNLOAD_PATTERNS


def list_uploads(model_source: ModelSource, source: str) -> dict[str, Path]:
    """List the weights, configuration and tokenizer files of a model by their name in the upload.

    Code and unrelated files are excluded. `source` is the model as the user named it, for messages.

    Raises UserError for an adapter, and for a folder whose files changed since they were written.
    """
    if model_source.adapter is not None or model_source.quantization_summary:
        raise UserError(
            f"{source} is an adapter on a base",
            where="finesight export",
            expected="a merged model",
            remedy=f"finesight merge {source} OUT, then export OUT",
        )
    folder = model_source.folder
    weight_files = folder.weight_files()
    if (folder.path / DIGESTS_FILE).is_file():
        verify_folder(folder.path)
    return {
        path.name: folder.find_file(path.name) or path
        for path in sorted(folder.path.iterdir())
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in DOWNLOAD_PATTERNS)
        # Weights that are not in the index belong to another model.
        if path.suffix != ".safetensors" or folder.find_file(path.name) in weight_files
    }
