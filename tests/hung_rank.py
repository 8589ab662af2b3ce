"""Rank of a distributed run with a timeout of a few seconds instead of half an hour.

Usage: python hung_rank.py RECIPE, in the environment of a launcher.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from unittest.mock import patch

from finesight.cli.app import run_command
from finesight.train.parallel import distributed

if __name__ == "__main__":
    with patch.object(distributed, "COLLECTIVE_TIMEOUT", timedelta(seconds=3)):
        sys.exit(run_command(["train", *sys.argv[1:]]))
