"""Rank of a distributed run with a timeout of a few seconds instead of half an hour."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

from finesight.cli.app import run_command
from finesight.train.parallel import distributed


def train_with_short_timeout(recipe: Path) -> int:
    """Train a recipe, and return the exit code of the command."""
    with patch.object(distributed, "COLLECTIVE_TIMEOUT", timedelta(seconds=3)):
        return run_command(["train", str(recipe)])
