"""Writes what can be read off the code: the file tree in README.md and docs/commands.md.

`python tools/pages.py` writes both; tests/test_pages.py fails while one is out of date.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- tree: made by tools/pages.py -->\n", "<!-- end of tree -->\n"

COMMANDS = ("", "quickstart", "data import", "data show", "train", "eval", "predict", "merge")

FOLDERS = {
    "tests": "Tests: tests/AREA/test_x.py is about src/finesight/AREA/x.py.",
    "tests/invariants": "Equalities: packed = alone, resumed = uninterrupted, and so on.",
}
"""Folders that are described as a whole."""

PAGES = {
    "recipes": "Recipes of the four tutorials.",
    "docs": "Settings, commands, promises, and what changes for who comes from a tutorial.",
    "constraints.txt": "Exact versions that it was tested with.",
    "Makefile": "make quickstart, make test.",
    ".ci/run": "Everything that must pass, in one command.",
}


def tree() -> str:
    """A line for each file: its name, and the first sentence of what it says of itself."""
    rows = [("src/finesight/", "")]
    rows += _folder(ROOT / "src" / "finesight", 1)
    for folder in ("tools", "benchmarks"):
        rows.append((f"{folder}/", ""))
        rows += _folder(ROOT / folder, 1)
    rows += [(f"{name}/", text) for name, text in FOLDERS.items()]
    rows += [(f"{name}/" if (ROOT / name).is_dir() else name, text) for name, text in PAGES.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in rows)


def _folder(folder: Path, depth: int) -> list[tuple[str, str]]:
    rows = []
    indent = "  " * depth
    for path in sorted(folder.iterdir(), key=lambda p: (p.is_dir(), p.name)):
        if path.suffix == ".py" and path.name != "__init__.py":
            rows.append((f"{indent}{path.name}", _first_sentence(path)))
        elif path.is_dir() and list(path.glob("*.py")):
            about = path / "__init__.py"
            rows.append((f"{indent}{path.name}/", _first_sentence(about) if about.exists() else ""))
            rows += _folder(path, depth + 1)
    return rows


def _first_sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", paragraph)[0]


def commands() -> str:
    """The help of every command, as it is printed."""
    parts = [
        "# Commands",
        "Made from the running commands by `python tools/pages.py`. Exit codes: 0 done, 2 your"
        " input (the message says where, what, what was expected and what to do), 75 stopped with"
        " a checkpoint written, 130 stopped otherwise, 1 a fault of finesight.",
    ]
    for name in COMMANDS:
        title = f"finesight {name}".strip()
        parts += [f"## {title}", f"```\n{_help(name)}\n```"]
    return "\n\n".join(parts) + "\n"


def _help(name: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "finesight", *name.split(), "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1"},
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def with_tree(readme: str) -> str:
    """The README with the tree between its marks renewed."""
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"README.md lacks {BEGIN.strip()} or {END.strip()}"
    return f"{before}{BEGIN}```\n{tree()}\n```\n{END}{after}"


def main() -> None:
    """Write both pages."""
    readme = ROOT / "README.md"
    readme.write_text(with_tree(readme.read_text(encoding="utf-8")), encoding="utf-8")
    (ROOT / "docs" / "commands.md").write_text(commands(), encoding="utf-8")


if __name__ == "__main__":
    main()
