"""Contents of a page: its elements, the data of its script, and its text."""

import json
import re
from html.parser import HTMLParser
from typing import Any


def read_script_data(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None, "no data in the page"
    return json.loads(found[1])


def read_visible_text(page: str) -> str:
    body = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def compact(page: str) -> str:
    """Return a page without white space around tags, and with single spaces elsewhere."""
    return re.sub(r" ?(<[^<>]*?) ?> ?", r"\1>", " ".join(page.split()))


class ParsedPage(HTMLParser):
    """Elements of a page with their attributes, and its texts inside and outside of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._texts: list[str] = []
        self.feed(page)
        self.close()

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self._texts.append(data)
