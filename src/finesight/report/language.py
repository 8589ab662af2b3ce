"""What pages say, in the reader's language: English stands where it is said, Chinese in a table."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Literal

from markupsafe import Markup, escape

from finesight.yaml_text import parsed

Language = Literal["en", "zh"]

TAGS: dict[Language, str] = {"en": "en", "zh": "zh-Hans"}
"""What a page says its language is (BCP 47)."""

_TABLES = importlib.resources.files("finesight.report") / "templates"

_SPOKEN: ContextVar[Language] = ContextVar("spoken", default="en")


@contextmanager
def speaking(language: Language) -> Iterator[None]:
    """Within the block, `say` speaks this language."""
    token = _SPOKEN.set(language)
    try:
        yield
    finally:
        _SPOKEN.reset(token)


def spoken() -> Language:
    """The language in force."""
    return _SPOKEN.get()


def preferred() -> Language:
    """The language of the user's locale, by POSIX's order of variables; English for any other."""
    chosen = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return "zh" if next(filter(None, chosen), "").lower().startswith("zh") else "en"


def say(text: str, *values: object) -> str:
    """The text in the language in force, its places {} filled with `values`. What the table lacks
    stays English: names that users gave, and messages of errors."""
    said = table().get(text, text)
    return said.format(*values) if values else said


def say_in_page(text: str, *values: object) -> Markup:
    """`say` for templates, where a value may be an element; all else is escaped."""
    said = escape(table().get(text, text))
    return said.format(*values) if values else said


def table() -> Mapping[str, str]:
    """Texts of the language in force by the English ones; empty for English."""
    return {} if spoken() == "en" else _table(spoken())


@cache
def _table(language: Language) -> dict[str, str]:
    text = (_TABLES / f"{language}.yaml").read_text(encoding="utf-8")
    content = parsed(text)
    assert isinstance(content, dict), f"the table of {language} is no mapping"
    return {str(english): str(other) for english, other in content.items()}
