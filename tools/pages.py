"""Writes what can be read off the code: trees of files, the commands, and tables of pages.

`python tools/pages.py` writes what git holds of it, and tests/test_pages.py fails while one page is
out of date; docs/conf.py writes the rest. A table stands on every page that has its marks, in the
language of the page's folder.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from typer.testing import CliRunner

from finesight.check.findings import FAULTS
from finesight.cli.app import app
from finesight.data.formats import FORMATS
from finesight.report.language import Language, speaking
from finesight.report.language import table as words_of_reports
from finesight.serve.limits import Limits
from finesight.serve.limits import table as table_of_limits
from finesight.yaml_text import parsed

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
    "examples": "The Python API: the quickstart, and a notebook for a free GPU machine.",
    "docs": "The documentation in English and Chinese; `make docs` builds it.",
    "constraints.txt": "Exact versions that it was tested with.",
    "Containerfile": "An image with the command, for a card or a CPU.",
    "Makefile": "make quickstart, make test.",
    ".ci/run": "Everything that must pass, in one command.",
}


def tree() -> str:
    """A line for each area: its name, and the first sentence of what it says of itself."""
    rows = _rows(whole=False)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in rows)


def files(begin: str) -> str:
    """The same for each file, as a page, in lists: a browser breaks their lines."""
    lines = [begin, ""]
    for name, text in _rows(whole=True):
        bare = name.lstrip()
        lines.append(f"{name.removesuffix(bare)}- `{bare}`" + (f": {text}" if text else ""))
    return "\n".join(lines) + "\n"


def _rows(whole: bool) -> list[tuple[str, str]]:
    rows = [("src/finesight/", "")]
    rows += _folder(ROOT / "src" / "finesight", 1, whole)
    for folder in ("tools", "benchmarks"):
        rows.append((f"{folder}/", FOLDERS[folder]))
        rows += _folder(ROOT / folder, 1, whole) if whole else []
    rows += [(f"{name}/", text) for name, text in FOLDERS.items() if name.startswith("tests")]
    rows += [(f"{name}/" if (ROOT / name).is_dir() else name, text) for name, text in PAGES.items()]
    return rows


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


def commands(begin: str) -> str:
    """The help of every command, as it is printed."""
    parts = [begin]
    for name in COMMANDS:
        parts += [f"## {f'finesight {name}'.strip()}", f"```\n{_help(name)}\n```"]
    return "\n\n".join(parts) + "\n"


def _help(name: str) -> str:
    plain = {"COLUMNS": "100", "NO_COLOR": "1"}
    said = CliRunner().invoke(app, [*name.split(), "--help"], prog_name="finesight", env=plain)
    assert said.exit_code == 0, said.output
    return "\n".join(line.rstrip() for line in said.output.strip().splitlines())


FILES = {
    "en": "# The files\n\nEach with the first sentence of what it says of itself.",
    "zh": "# 文件\n\n每个文件后面是它自述的第一句话，原文为英文。",
}

HELP = {
    "en": "# Commands\n\nExit codes: 0 done; 2 your input (the message says where, what, what was"
    " expected and what to do), or what `doctor` and `data check` found, or a plan that does not"
    " fit; 3 only warnings of `data check`; 75 stopped with a checkpoint written; 130 stopped"
    " otherwise; 1 a fault of finesight.",
    "zh": "# 命令\n\n退出码：0 完成；2 你的输入有问题（提示会说明在哪里、是什么、应当怎样、"
    "该怎么办），或 `doctor`、`data check` 发现了错误，或规划放不下；3 `data check` 只有警告；"
    "75 已写出检查点后停止；130 以其他方式停止；1 finesight 自己的错误。"
    "下面是各命令打印的帮助，原文为英文。",
}


def built(language: str) -> dict[str, str]:
    """The pages of a language that are made when its documentation is built, by name."""
    return {"files.md": files(FILES[language]), "commands.md": commands(HELP[language])}


Said = Callable[[str], str]
"""A text of the code in the language of a page."""


def said_in(language: Language) -> Said:
    """Texts as reports say them in that language, else as the table beside this file does, else as
    they are."""
    with speaking(language):
        words = words_beside(language) | dict(words_of_reports())
    return lambda text: words.get(text, text)


@cache
def words_beside(language: Language) -> dict[str, str]:
    """What tables say in a language that reports do not, by the English texts."""
    if language == "en":
        return {}
    content = parsed((ROOT / "tools" / f"{language}.yaml").read_text(encoding="utf-8"))
    return {str(english): str(other) for english, other in content.items()}


def formats(said: Said) -> str:
    """Every format, in the order in which they are tried."""
    rows = [f"| `{form.name}` | {_cell(said(form.looks))} |" for form in FORMATS]
    return "\n".join([f"| {said('format')} | {said('looks like')} |", "|---|---|", *rows])


def faults(said: Said) -> str:
    """Every fault that `data check` knows."""
    rows = [
        f"| `{code}` | {said(severity)} | {said(words)} |"
        for code, (severity, words) in FAULTS.items()
    ]
    titles = " | ".join(map(said, ("fault", "severity", "what it is")))
    return "\n".join([f"| {titles} |", "|---|---|---|", *rows])


TABLES: dict[str, Callable[[Said], str]] = {
    "formats": formats,
    "faults": faults,
    "limits": partial(table_of_limits, Limits()),
}
"""Tables by the name in their marks."""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\\n", " ")


def _begin(name: str) -> str:
    return f"<!-- {name}: made by tools/pages.py -->\n"


def renewed(page: str, name: str, content: str) -> str:
    """The page with what stands between its marks of that name replaced."""
    begin, end = _begin(name), f"<!-- end of {name} -->\n"
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    assert found, f"the page lacks {begin.strip()}"
    assert ended, f"the page lacks {end.strip()}"
    return f"{before}{begin}{content}\n{end}{after}"


def pages() -> dict[Path, str]:
    """Every page as it should be."""
    readme = ROOT / "README.md"
    short = f"```\n{tree()}\n```"
    return {
        readme: renewed(readme.read_text(encoding="utf-8"), "tree", short),
        **_with_tables("en"),
        **_with_tables("zh"),
    }


def _with_tables(language: Language) -> dict[Path, str]:
    """The pages of a language that have marks of tables, with these tables."""
    made = {}
    for path in sorted((ROOT / "docs" / language).glob("*.md")):
        page = path.read_text(encoding="utf-8")
        for name in [name for name in TABLES if _begin(name) in page]:
            page = made[path] = renewed(page, name, TABLES[name](said_in(language)))
    return made


def main() -> None:
    """Write all pages."""
    for path, content in pages().items():
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
