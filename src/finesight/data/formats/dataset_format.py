"""Alias of `finesight.ingest.formats.dataset_format`."""

from finesight.ingest.formats.dataset_format import *  # noqa: F403
