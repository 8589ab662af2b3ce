"""Alias of `finesight.samples.sample`."""

from finesight.samples.sample import *  # noqa: F403
