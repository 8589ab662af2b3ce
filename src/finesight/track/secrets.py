"""Texts without what must not leave the machine: keys, passwords, and whose home a path lies in.

Three rules, each for what the others cannot know: values of environment variables that are named
like secrets, whatever they look like; forms that only secrets have, wherever they come from; and
names of settings. A text that is cleaned twice stays as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LEFT_OUT = "[removed]"

_NAMED = re.compile(
    r"(?:^|[_-])(?:api_?key|key|token|secret|password|passwd|pass|pwd|credentials?)(?:$|[_-])",
    re.IGNORECASE,
)
"""Names of secrets: WANDB_API_KEY, HF_TOKEN. Of `max_new_tokens` and `TOKENIZERS_PARALLELISM` no
part between underscores is one of these words."""

SHORTEST = 8
"""Characters of a variable's value that is looked for: `MY_KEY=on` would take words from texts."""

_USER_IN_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s@]+@", re.IGNORECASE)
_QUERY = re.compile(
    r"([?&][^=&\s]*(?:key|token|secret|signature|sig|password|credential)[^=&\s]*=)[^&\s]+",
    re.IGNORECASE,
)
_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|sk-[A-Za-z0-9_-]{20,}"  # OpenAI and who followed
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|AKIA[0-9A-Z]{16}"  # AWS
    r"|xox[abprs]-[A-Za-z0-9-]{10,}"  # Slack
    r"|wandb_v\d_\w{20,}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+)"  # JSON Web Tokens
    r"|(?<=Bearer )[\w.~+/=-]{8,}"
)
_HOMES = re.compile(r"(?<![\w.])/(?:home|Users)/[^/\s\"']+")


def cleaned(text: str) -> str:
    """The text with `[removed]` in place of secrets, and `~` in place of home folders."""
    for secret in _values():
        text = text.replace(secret, LEFT_OUT)
    text = _USER_IN_ADDRESS.sub(r"\1", text)
    text = _QUERY.sub(rf"\1{LEFT_OUT}", text)
    text = _FORMS.sub(LEFT_OUT, text)
    home = str(Path.home())
    if len(home) > 1:
        text = re.sub(rf"(?<![\w.]){re.escape(home)}(?![\w.-])", "~", text)
    return _HOMES.sub("~", text)


def cleaned_tree(tree: dict[str, Any]) -> dict[str, Any]:
    """Plain data with every text in it cleaned, and without the values of settings that are named
    like secrets."""
    return {
        cleaned(name): LEFT_OUT if _NAMED.search(name) else _cleaned(value)
        for name, value in tree.items()
    }


def _cleaned(value: object) -> object:
    match value:
        case str():
            return cleaned(value)
        case dict():
            return cleaned_tree(value)
        case list() | tuple():
            return [_cleaned(item) for item in value]
        case _:
            return value


def _values() -> Iterator[str]:
    """The longest first: one may be a part of another."""
    named = {v for name, v in os.environ.items() if _NAMED.search(name) and len(v) >= SHORTEST}
    yield from sorted(named, key=len, reverse=True)
