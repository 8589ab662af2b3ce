"""Alias of `finesight.ingest.formats`."""

from finesight.ingest.formats import *  # noqa: F403
