"""Formats of names in job files."""

from __future__ import annotations

import re
from dataclasses import dataclass

from finesight.errors import UserError


@dataclass(frozen=True, slots=True)
class NameFormat:
    """Format of a name as a regular expression, and in words."""

    pattern: str
    expected: str

    def check(self, option: str, name: str | None, example: str) -> str:
        """Return the name that an option gives. Raises UserError if it is missing or invalid."""
        if name is not None and re.fullmatch(self.pattern, name):
            return name
        raise UserError(
            "is missing" if name is None else f"invalid name {name!r}",
            where=option,
            expected=self.expected,
            remedy=f"for example {option} {example}",
        )


JOB_NAME = NameFormat(
    "[a-z]([-a-z0-9]{0,61}[a-z0-9])?",
    "up to 63 lowercase letters, digits and dashes; starts with a letter, does not end with a dash",
)
"""RFC 1035 label, the strictest format among the launchers."""

PLAIN_NAME = NameFormat(
    "[A-Za-z0-9][A-Za-z0-9_.,:/@+-]*", "a name of letters, digits and _ . , : / @ + -"
)
"""Names of images, partitions and accounts, which need no quotes in a job file."""
