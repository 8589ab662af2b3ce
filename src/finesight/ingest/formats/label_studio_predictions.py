"""Label Studio with predictions instead of annotations."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from finesight.ingest.formats.label_studio import COMPONENT as LABEL_STUDIO
from finesight.ingest.formats.label_studio import open_tasks, write_files

COMPONENT = replace(
    LABEL_STUDIO,
    name="label-studio-predictions",
    description='as label-studio, with "predictions" instead of "annotations"',
    open_dataset=lambda source: None,  # detected as label-studio
    open_requested=partial(open_tasks, results_from="predictions"),
    write_files=partial(write_files, results_to="predictions"),
    position=80,
)
