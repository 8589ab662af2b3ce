"""A model folder as a repository of a hub: exactly the files that were listed."""

from __future__ import annotations

from fnmatch import fnmatchcase

from finesight.digests import DIGESTS, verify_folder
from finesight.errors import UserError
from finesight.hub import WANTED
from finesight.infer.load import Parts
from finesight.remote.publishing import Upload


def uploads(parts: Parts, source: str) -> list[Upload]:
    """What will be published of what `find_parts` found for `source`: data files, no code.

    Raises UserError for an adapter and for a folder that has changed since it was written.
    """
    if parts.adapter is not None or parts.quantised:
        raise UserError(
            f"{source} is an adapter on a base",
            where="finesight export",
            expected="a whole model",
            remedy=f"finesight merge {source} OUT, then export OUT",
        )
    folder = parts.folder
    weights = folder.weight_files()
    if (folder.path / DIGESTS).is_file():
        verify_folder(folder.path)
    return [
        Upload(folder.file(path.name) or path, path.name)
        for path in sorted(folder.path.iterdir())
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in WANTED)
        # Weights that the index does not name belong to something else.
        if path.suffix != ".safetensors" or folder.file(path.name) in weights
    ]
