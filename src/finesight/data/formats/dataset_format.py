"""Alias of `finesight.ingest.formats.dataset_format`."""

from finesight.ingest.formats.dataset_format import *  # noqa: F403
from finesight.samples.default_prompts import escape_placeholders as escape_placeholders
