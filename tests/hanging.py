"""A process of a run of several that waits a few seconds for the others, not half an hour.

Usage: python hanging.py RECIPE, in the environment that a launcher makes.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from unittest.mock import patch

from finesight.cli.app import run
from finesight.train import ranks

if __name__ == "__main__":
    with patch.object(ranks, "AWAITED", timedelta(seconds=3)):
        sys.exit(run(["train", *sys.argv[1:]]))
