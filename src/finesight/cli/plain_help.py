"""`PlainHelpCommand`: help texts with the placeholder names of command-line manuals."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand

_PLACEHOLDERS = {
    "int": "INTEGER",
    "float": "NUMBER",
    "str": "TEXT",
    "path": "PATH",
    "file": "FILE",
    "dir": "FOLDER",
}
"""Placeholder of each Python type that typer prints, such as `<int range>`."""

_TYPE_NAME = re.compile(rf"<(?:list\[)?({'|'.join(_PLACEHOLDERS)})(?: range)?\]?>", re.IGNORECASE)


class PlainHelpCommand(TyperCommand):
    """A command whose help shows `RECIPE [KEY=VALUE]...` and `--limit INTEGER`.

    Typer prints names of Python types instead, such as `{RECIPE} <path>` and `--limit <int range>`.
    """

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the words of the usage line after the command."""
        arguments = [p for p in self.get_params(ctx) if p.param_type_name == "argument"]
        return [str(self.options_metavar), *map(_format_argument, arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections of arguments and options."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            name, text = record
            if param.param_type_name == "argument":
                sections["Arguments"].append((_format_argument(param), text))
            else:
                name = _TYPE_NAME.sub(lambda match: _PLACEHOLDERS[match[1].lower()], name)
                sections["Options"].append((name, text))
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def _format_argument(param: Any) -> str:
    """Format an argument: `NAME` if required, else `[NAME]`, with `...` for several values."""
    name = param.metavar or param.name.upper()
    return (name if param.required else f"[{name}]") + ("..." if param.nargs != 1 else "")
