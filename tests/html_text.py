"""What a page of a file holds: the data of its script, and what is read without it."""

import json
import re
from typing import Any


def read_script_data(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None, "no data in the page"
    return json.loads(found[1])


def read_visible_text(page: str) -> str:
    body = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())
