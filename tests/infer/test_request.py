from __future__ import annotations

import pytest

from finesight.errors import UserError
from finesight.infer.request import Options


def test_an_empty_text_to_stop_at_is_refused():
    with pytest.raises(UserError, match="an empty text to stop at"):
        Options(stop=("end", ""))
