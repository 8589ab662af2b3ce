"""Writes what can be read off the code: trees of files, the commands, and tables of pages.

`python tools/pages.py` writes what git holds of it, and tests/test_pages.py fails while one page is
out of date; docs/conf.py writes the rest.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

from finesight.check.findings import FAULTS
from finesight.data.formats import FORMATS
from finesight.serve.limits import Limits, table

ROOT = Path(__file__).resolve().parents[1]

COMMANDS = (
    *(
        "",
        "quickstart",
        "download",
        "doctor",
        "data import",
        "data check",
        "data show",
        "data plan",
        "data export",
        "data migrate",
        "convert",
    ),
    *(
        "train",
        "launch",
        "report",
        "compare",
        "eval",
        "predict",
        "chat",
        "web",
        "serve",
        "merge",
        "export",
    ),
)

FOLDERS = {
    "tools": "What holds the project to its own rules.",
    "benchmarks": "Measurements, their results, and what they say.",
    "tests": "Tests: tests/AREA/test_x.py is about src/finesight/AREA/x.py.",
    "tests/faults": "Twenty-five ways to break a run, and what survives each.",
    "tests/invariants": "Equalities: packed = alone, resumed = uninterrupted, and so on.",
}
"""Folders that are described as a whole."""

PAGES = {
    "pretraining": "One command that makes finesight-tiny again from nothing.",
    "recipes": "Recipes of the five tutorials.",
    "examples": "The quickstart by the Python API, as a script in cells.",
    "docs": "The documentation in English and Chinese; `make docs` builds it.",
    "constraints.txt": "Exact versions that it was tested with.",
    "Makefile": "make quickstart, make test.",
    ".ci/run": "Everything that must pass, in one command.",
}


def tree(whole: bool) -> str:
    """A line for each file, or each area: its name, and the first sentence of what it says of
    itself."""
    rows = [("src/finesight/", "")]
    rows += _folder(ROOT / "src" / "finesight", 1, whole)
    for folder in ("tools", "benchmarks"):
        rows.append((f"{folder}/", FOLDERS[folder]))
        rows += _folder(ROOT / folder, 1, whole) if whole else []
    rows += [(f"{name}/", text) for name, text in FOLDERS.items() if name.startswith("tests")]
    rows += [(f"{name}/" if (ROOT / name).is_dir() else name, text) for name, text in PAGES.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in rows)


def _folder(folder: Path, depth: int, whole: bool) -> list[tuple[str, str]]:
    rows = []
    indent = "  " * depth
    for path in sorted(folder.iterdir(), key=lambda p: (p.is_dir(), p.name)):
        if path.suffix == ".py" and path.name != "__init__.py":
            rows.append((f"{indent}{path.name}", _first_sentence(path)))
        elif path.is_dir() and list(path.glob("*.py")):
            about = path / "__init__.py"
            rows.append((f"{indent}{path.name}/", _first_sentence(about)))
            rows += _folder(path, depth + 1, whole) if whole else []
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


TITLES = {"en": ("The files", "Commands"), "zh": ("文件", "命令")}


def built(language: str) -> dict[str, str]:
    """The pages of a language that are made when its documentation is built, by name."""
    files, named = TITLES[language]
    made = {"files.md": f"# {files}\n\n```\n{tree(whole=True)}\n```\n"}
    if language != "en":
        text = (ROOT / "docs" / "en" / "commands.md").read_text(encoding="utf-8")
        made["commands.md"] = text.replace("# Commands\n", f"# {named}\n", 1)
    return made


def formats() -> str:
    """Every format, in the order in which they are tried."""
    rows = [f"| `{form.name}` | {_cell(form.looks)} |" for form in FORMATS]
    return "\n".join(["| format | looks like |", "|---|---|", *rows])


def faults() -> str:
    """Every fault that `data check` knows."""
    rows = [f"| `{code}` | {severity} | {words} |" for code, (severity, words) in FAULTS.items()]
    return "\n".join(["| fault | severity | what it is |", "|---|---|---|", *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\\n", " ")


def renewed(page: str, name: str, content: str) -> str:
    """The page with what stands between its marks of that name replaced."""
    begin, end = f"<!-- {name}: made by tools/pages.py -->\n", f"<!-- end of {name} -->\n"
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    assert found, f"the page lacks {begin.strip()}"
    assert ended, f"the page lacks {end.strip()}"
    return f"{before}{begin}{content}\n{end}{after}"


def pages() -> dict[Path, str]:
    """Every page as it should be."""
    readme, data = ROOT / "README.md", ROOT / "docs" / "en" / "data.md"
    serving = ROOT / "docs" / "en" / "serving.md"
    short = f"```\n{tree(whole=False)}\n```"
    tables = renewed(data.read_text(encoding="utf-8"), "formats", formats())
    return {
        readme: renewed(readme.read_text(encoding="utf-8"), "tree", short),
        data: renewed(tables, "faults", faults()),
        serving: renewed(serving.read_text(encoding="utf-8"), "limits", table(Limits())),
        ROOT / "docs" / "en" / "commands.md": commands(),
    }


def main() -> None:
    """Write all pages."""
    for path, content in pages().items():
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
