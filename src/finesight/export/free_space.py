"""Check the free disk space before long exports."""

from __future__ import annotations

import shutil
from pathlib import Path

from finesight.errors import UserError


def check_free_space(out: Path, needed: int) -> None:
    """Raise UserError if the disk of a folder has less than `needed` free bytes.

    The folder need not exist.
    """
    existing = next(
        folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists()
    )
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{needed:,} bytes are required, {free:,} are free",
            where=str(out),
            expected=f"a disk with {needed - free:,} more bytes",
            remedy="free some space, or choose another output folder",
        )
