"""Room on the disk, looked at before hours of work and not after."""

from __future__ import annotations

import shutil
from pathlib import Path

from finesight.errors import UserError


def check_space(out: Path, needed: int) -> None:
    """Raise UserError when the disk of `out`, which need not exist, has not `needed` bytes free."""
    above = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(above).free
    if needed > free:
        raise UserError(
            f"{needed:,} bytes are needed and {free:,} are free",
            where=str(out),
            expected=f"a disk with {needed - free:,} bytes more",
            remedy="free some space, or choose another output folder",
        )
