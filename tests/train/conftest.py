"""Fixtures for the tests of training."""

from tiny_task import assets as assets
from tiny_task import task as task
