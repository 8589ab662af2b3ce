"""Thumbnails of data sets and runs: the first image of their samples."""

from __future__ import annotations

import contextlib
from base64 import b64decode
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from finesight.app.import_preview import SHOWN_SIDE, ThumbnailMaker, iter_visuals
from finesight.app.line_counter import MAX_COUNTED_BYTES
from finesight.app.workspace import DATA_FILES, Workspace
from finesight.errors import UserError
from finesight.files.worker_pool import JobOutput, WorkerLimitError, WorkerLostError
from finesight.samples.corpus import open_sample_source
from finesight.settings.manifest import RECIPE_FILE

MAX_READ_SAMPLES = 5
"""Number of samples among which the first image is searched."""

EMPTY_IMAGE = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 5"/>'


def read_thumbnail(workspace: Workspace, params: Mapping[str, str]) -> tuple[bytes, str]:
    """Return the first image of a data set or a run, and its media type.

    Without one in the workspace, it is an empty drawing, since a card needs no image.

    Args:
        params: Path of the data set as `data`, or of the run as `run`.
    """
    with contextlib.suppress(UserError, OSError, WorkerLostError):
        file = find_samples(workspace, params)
        if file is not None and workspace.contains(file):
            url = _read_version(workspace, file, file.stat().st_mtime_ns)
            media_type, _, content = url.removeprefix("data:").partition(";base64,")
            if content:
                return b64decode(content), media_type
    return EMPTY_IMAGE, "image/svg+xml"


def find_samples(workspace: Workspace, params: Mapping[str, str]) -> Path | None:
    """Return the data file of a data set or a run.

    Only the named folder is read: a page has an image for each of many items.
    """
    if "data" in params:
        folder = workspace.folder / workspace.resolve(params["data"], "data")
        files = (folder / name for name in DATA_FILES)
        return next((file for file in files if file.is_file()), None)
    run = workspace.resolve(params.get("run", ""), "run")
    data = workspace.load_recipe(run / RECIPE_FILE).data
    return workspace.folder / (*data.eval, *data.train)[0].path


@lru_cache(maxsize=500)
def _read_version(workspace: Workspace, file: Path, version: int) -> str:
    """Return the first image of a data file as a data URL; empty without one.

    Raises WorkerLimitError if reading takes too long, which the next attempt may not.
    """
    try:
        return str(workspace.run_job(make_thumbnail, workspace.folder, file))
    except WorkerLimitError:
        raise
    except UserError:
        return ""


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
