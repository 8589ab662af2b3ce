from __future__ import annotations

import pytest

from finesight.errors import UserError
from finesight.infer.request import GenerationOptions


def test_empty_stop_string_is_rejected():
    with pytest.raises(UserError, match="empty stop string"):
        GenerationOptions(stop_strings=("end", ""))
