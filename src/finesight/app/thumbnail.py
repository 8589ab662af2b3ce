"""Thumbnails of data sets and runs: the first image of their samples."""

from __future__ import annotations

from pathlib import Path

from finesight.app.import_preview import SHOWN_SIDE, ThumbnailMaker, iter_visuals
from finesight.app.line_counter import MAX_COUNTED_BYTES
from finesight.errors import UserError
from finesight.files.worker_pool import JobOutput
from finesight.samples.corpus import open_sample_source

MAX_READ_SAMPLES = 5
"""Number of samples among which the first image is searched."""


def make_thumbnail(state: object, workspace: Path, file: Path) -> JobOutput:
    """Return the first image of a data file as a data URL.

    Args:
        state: State of the worker process, which is not used.

    Raises:
        UserError: The file is large, or the first samples have no image of the workspace.
    """
    problem = UserError("no image", where=str(file), expected="samples with images")
    if file.stat().st_size > MAX_COUNTED_BYTES:  # It would be indexed first.
        raise problem
    maker = ThumbnailMaker((workspace,))
    source = open_sample_source(file)
    for index in range(min(len(source), MAX_READ_SAMPLES)):
        located = source.read_sample(index)
        for path, _ in iter_visuals(located.sample):
            image = maker.make_thumbnail(located.resolve_path(str(path)), SHOWN_SIDE, ())
            if image.src is not None:
                return JobOutput(image.src)
    raise problem
