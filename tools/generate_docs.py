"""Generate documentation from the code: the command reference, the module list and tables.

`python tools/generate_docs.py` updates the tables of pages in git. tests/test_generated_docs.py
fails if a table is out of date. docs/conf.py writes `commands.md` and `files.md` during the build.
A table is inserted into each page with its markers, in the language of the page.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from finesight.cli.app import app
from finesight.files.bounded_files import load_yaml
from finesight.ingest.check.check_issues import ISSUE_TYPES
from finesight.ingest.formats import FORMATS
from finesight.ingest.mapping import write_schema
from finesight.operations import OPERATIONS, find_operation
from finesight.operations.operation import list_parameters
from finesight.report.i18n import Language, get_translations, use_language
from finesight.serve.api_schema import MIB, ServerLimits

ROOT = Path(__file__).resolve().parents[1]

COMMAND_NAMES = ("", *(name for group in OPERATIONS.values() for name in group))

FOLDER_SUMMARIES = {
    "tools": "Checks of the project and generators of documentation.",
    "benchmarks": "Measurements and their results.",
    "tests": "Tests: tests/AREA/test_X.py tests src/finesight/AREA/X.py.",
    "tests/faults": "Fault injection: kills, power loss, full disks, non-finite values.",
    "tests/invariants": "Equalities, such as packed and unpacked samples.",
}
"""Descriptions of folders that are not packages."""

EXTRA_PATHS = {
    "pretraining": "Training of finesight-tiny from scratch.",
    "recipes": "Recipes of the tutorials.",
    "examples": "Python API: quickstart, notebook for a free GPU; plug-ins, also of lmms-eval.",
    "docs": "Documentation in English and Chinese; `make docs` builds it.",
    "constraints.txt": "Tested versions of all dependencies.",
    "Containerfile": "Container image with the command, for GPU or CPU.",
    "Makefile": "Development commands, such as `make quickstart` and `make test`.",
    ".ci/run": "All checks of the CI.",
}


SCHEMA_FILE = ROOT / "src" / "finesight" / "ingest" / "mapping.schema.json"


def render_files(header: str) -> str:
    """Render the list of all files, each with the first sentence of its docstring."""
    lines = [header, ""]
    for name, text in _list_files():
        bare = name.lstrip()
        lines.append(f"{name.removesuffix(bare)}- `{bare}`" + (f": {text}" if text else ""))
    return "\n".join(lines) + "\n"


def _list_files() -> list[tuple[str, str]]:
    rows = [("src/finesight/", ""), *_list_folder(ROOT / "src" / "finesight", 1)]
    for folder in ("tools", "benchmarks"):
        rows += [(f"{folder}/", FOLDER_SUMMARIES[folder]), *_list_folder(ROOT / folder, 1)]
    rows += [
        (f"{name}/", text) for name, text in FOLDER_SUMMARIES.items() if name.startswith("tests")
    ]
    rows += [
        (f"{name}/" if (ROOT / name).is_dir() else name, text) for name, text in EXTRA_PATHS.items()
    ]
    return rows


def _list_folder(folder: Path, depth: int) -> list[tuple[str, str]]:
    rows = []
    indent = "  " * depth
    for path in sorted(folder.iterdir(), key=lambda p: (p.is_dir(), p.name)):
        if path.suffix == ".py" and path.name != "__init__.py":
            rows.append((f"{indent}{path.name}", _first_sentence(path)))
        elif path.is_dir() and list(path.glob("*.py")):
            rows.append((f"{indent}{path.name}/", _first_sentence(path / "__init__.py")))
            rows += _list_folder(path, depth + 1)
    return rows


def _first_sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", paragraph)[0]


def render_commands(header: str) -> str:
    """Render the help text of every command."""
    parts = [header]
    for name in COMMAND_NAMES:
        parts += [f"## {f'finesight {name}'.strip()}", f"```\n{_command_help(name)}\n```"]
    return "\n\n".join(parts) + "\n"


def _command_help(name: str) -> str:
    environment = {"COLUMNS": "100", "NO_COLOR": "1"}
    result = CliRunner().invoke(
        app, [*name.split(), "--help"], prog_name="finesight", env=environment
    )
    assert result.exit_code == 0, result.output
    return "\n".join(line.rstrip() for line in result.output.strip().splitlines())


FILES_PAGE_HEADERS = {
    "en": "# Source files\n\nAll source files with the first sentence of their docstrings.",
    "zh": "# 源文件\n\n所有源文件及其文档字符串的第一句，原文为英文。",
}

COMMANDS_PAGE_HEADERS = {
    "en": """# Commands

The help texts of all commands. `finesight COMMAND --help` prints the same text.

| exit code | meaning |
|---|---|
| 0 | success |
| 1 | internal error of finesight |
| 2 | invalid input; errors reported by `doctor` or `check`; a plan that does not fit |
| 3 | `check` found warnings only; `guard` found a regression |
| 75 | training stopped after writing a checkpoint |
| 130 | interrupted without a checkpoint |""",
    "zh": """# 命令

各命令的帮助文本，原文为英文，与 `finesight COMMAND --help` 的输出相同。

| 退出码 | 含义 |
|---|---|
| 0 | 成功 |
| 1 | finesight 内部错误 |
| 2 | 输入无效；`doctor` 或 `check` 报告了错误；规划放不下 |
| 3 | `check` 只有警告；`guard` 发现回归 |
| 75 | 写出检查点后停止训练 |
| 130 | 被中断，没有写出检查点 |""",
}


def build_pages(language: str) -> dict[str, str]:
    """Return the pages generated during the build of one language, by file name."""
    return {
        "files.md": render_files(FILES_PAGE_HEADERS[language]),
        "commands.md": render_commands(COMMANDS_PAGE_HEADERS[language]),
    }


Translate = Callable[[str], str]
"""Translates a text of the code into the language of a page."""


def get_translator(language: Language) -> Translate:
    """Return a translator that uses the report translations, then tools/<language>.yaml."""
    with use_language(language):
        translations = load_extra_translations(language) | dict(get_translations())
    return lambda text: translations.get(text, text)


@cache
def load_extra_translations(language: Language) -> dict[str, str]:
    """Load translations of table texts that reports do not contain, by English text."""
    if language == "en":
        return {}
    content = load_yaml((ROOT / "tools" / f"{language}.yaml").read_text(encoding="utf-8"))
    return {str(english): str(translation) for english, translation in content.items()}


def render_formats_table(translate: Translate) -> str:
    """Render the table of data formats in detection order."""
    rows = [
        f"| `{form.name}` | {_escape_cell(translate(form.description))} |"
        for form in FORMATS.list_built_in()
    ]
    return "\n".join([f"| {translate('format')} | {translate('content')} |", "|---|---|", *rows])


def render_issues_table(translate: Translate) -> str:
    """Render the table of issues that `check` reports."""
    rows = [
        f"| `{code}` | {translate(severity)} | {translate(description)} |"
        for code, (severity, description) in ISSUE_TYPES.items()
    ]
    titles = " | ".join(map(translate, ("issue", "severity", "description")))
    return "\n".join([f"| {titles} |", "|---|---|---|", *rows])


def render_limits_table(translate: Translate) -> str:
    """Render the table of limits of the server."""
    titles = " | ".join(map(translate, ("limit", "default", "description", "option")))
    lines = [f"| {titles} |", "|---|---|---|---|"]
    values = asdict(ServerLimits())
    options = {one.name: f"`{one.option}`" for one in list_parameters(find_operation("serve"))}
    for limit in fields(ServerLimits):
        value, is_size = values[limit.name], limit.name.endswith("_bytes")
        default = f"{value // MIB} MiB" if is_size else f"{value:,.0f}"
        description, option = translate(limit.metadata["description"]), options.get(limit.name, "")
        lines.append(f"| `{limit.name}` | {default} | {description} | {option} |")
    return "\n".join(lines)


def load_source_map() -> dict[str, Any]:
    """Return folders of the core, aliases, satellites, and the functions of each path."""
    return load_yaml((ROOT / "tools" / "source_map.yaml").read_text(encoding="utf-8"))


def render_source_map(translate: Translate) -> str:
    """Render the folders of the package with their purposes, and the functions of the paths."""
    content = load_source_map()
    titles = {
        "core": "core, which imports no satellite",
        "aliases": "aliases",
        "satellites": "satellites",
    }
    lines = ["```text", "src/finesight/"]
    for group, title in titles.items():
        lines.append(f"# {translate(title)}")
        for name in content[group]:
            purpose = _first_sentence(ROOT / "src" / "finesight" / name / "__init__.py")
            lines.append(f"  {name + '/':<13}{translate(purpose)}")
    lines += ["```", ""]
    header = " | ".join(map(translate, ("path", "functions and classes, in order")))
    lines += [f"| {header} |", "|---|---|"]
    for title, steps in content["paths"].items():
        functions = []
        for step in steps:
            file, name = step.split()
            functions.append(f"`{file}` (`{name}`)")
        lines.append(f"| {translate(title)} | {', '.join(functions)} |")
    return "\n".join(lines)


TABLE_RENDERERS: dict[str, Callable[[Translate], str]] = {
    "formats": render_formats_table,
    "issues": render_issues_table,
    "limits": render_limits_table,
    "map": render_source_map,
}
"""Table renderers by the name in the markers."""


def _escape_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\\n", " ")


def _table_marker(name: str) -> str:
    return f"<!-- {name}: made by tools/generate_docs.py -->\n"


def replace_table(page: str, name: str, content: str) -> str:
    """Replace the text between the markers of a table."""
    begin, end = _table_marker(name), f"<!-- end of {name} -->\n"
    before, begin_found, rest = page.partition(begin)
    _, end_found, after = rest.partition(end)
    assert begin_found, f"the page lacks {begin.strip()}"
    assert end_found, f"the page lacks {end.strip()}"
    return f"{before}{begin}{content}\n{end}{after}"


def generate_all() -> dict[Path, str]:
    """Return all pages with generated tables and the schema of mapping files, up to date."""
    return {**_pages_with_tables("en"), **_pages_with_tables("zh"), SCHEMA_FILE: write_schema()}


def _pages_with_tables(language: Language) -> dict[Path, str]:
    pages = {}
    translate = get_translator(language)
    for path in sorted((ROOT / "docs" / language).glob("*.md")):
        page = path.read_text(encoding="utf-8")
        for name in [name for name in TABLE_RENDERERS if _table_marker(name) in page]:
            page = pages[path] = replace_table(page, name, TABLE_RENDERERS[name](translate))
    return pages


def main() -> None:
    """Update the tables of all pages."""
    for path, content in generate_all().items():
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
