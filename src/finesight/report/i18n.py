"""Translate the texts of HTML pages.

English texts are the keys of the translation tables.
"""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.resources.abc import Traversable
from typing import Literal

from markupsafe import Markup, escape

from finesight.files.bounded_files import load_yaml

Language = Literal["en", "zh"]

LANGUAGE_TAGS: dict[Language, str] = {"en": "en", "zh": "zh-Hans"}
"""BCP 47 language tags for the `lang` attribute of pages."""

_TRANSLATION_FOLDERS = [importlib.resources.files("finesight.report") / "templates"]

_COUNTED_NOUN = re.compile(
    r"(\{[^}]*\})(?:( (?:box|epoch|image|issue|sample|source|step|token))e?s\b)?"
)
"""A field of a text with the noun that it counts, the latter without its plural."""

_LANGUAGE: ContextVar[Language] = ContextVar("language", default="en")


@contextmanager
def use_language(language: Language) -> Iterator[None]:
    """Set the language of `translate` within a `with` block."""
    token = _LANGUAGE.set(language)
    try:
        yield
    finally:
        _LANGUAGE.reset(token)


def get_language() -> Language:
    """Return the language that `use_language` has set, by default English."""
    return _LANGUAGE.get()


def detect_language() -> Language:
    """Return the language of the locale; English if it is not supported.

    Reads LC_ALL, LC_MESSAGES and LANG in the order of POSIX.
    """
    locale = os.environ.get("LC_ALL") or os.environ.get("LC_MESSAGES") or os.environ.get("LANG", "")
    if locale.lower().startswith("zh"):
        return "zh"
    return "en"


def translate(text: str, *values: object) -> str:
    """Translate an English text to the current language and format it with `values`.

    Texts without a translation, such as names and error messages, remain in English. English nouns
    after a value of 1 are singular.
    """
    translated = get_translations().get(text, text)
    if not values:
        return translated
    following = iter(values)

    def write_field(match: re.Match[str]) -> str:
        if next(following, None) != 1:
            return match[0]
        return f"{match[1]}{match[2] or ''}"

    return _COUNTED_NOUN.sub(write_field, translated).format(*values)


def translate_markup(text: str, *values: object) -> Markup:
    """Translate an English text in a template, and format it with `values`.

    All values are escaped, except for markup.
    """
    translated = escape(get_translations().get(text, text))
    return translated.format(*values) if values else translated


def get_translations() -> Mapping[str, str]:
    """Return the translations to the current language by English text; empty for English."""
    language = get_language()
    return {} if language == "en" else _load_translations(language)


@cache
def _load_translations(language: Language) -> dict[str, str]:
    translations: dict[str, str] = {}
    for folder in _TRANSLATION_FOLDERS:
        content = load_yaml((folder / f"{language}.yaml").read_text(encoding="utf-8"))
        assert isinstance(content, dict), f"translation table of {language} is not a mapping"
        translations |= {str(english): str(translated) for english, translated in content.items()}
    return translations


def add_translations(folder: Traversable) -> None:
    """Add a folder with translation tables, such as zh.yaml, of other pages than reports."""
    _TRANSLATION_FOLDERS.append(folder)
    _load_translations.cache_clear()
