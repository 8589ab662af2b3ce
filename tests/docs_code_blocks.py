"""Parse the code blocks of documentation pages."""

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

GENERATED_PAGES = {"commands.md", "files.md"}
"""Generated pages, written during the build of the documentation."""

_NEEDS = re.compile(r"<!-- needs: (.+?) -->\s*$")
_COMMENTS = {"sh": r"(^|\s)#.*", "python": r"(^|\s)#(?! %%).*", "yaml": r"(^|\s)#.*"}


@dataclass(frozen=True)
class CodeBlock:
    """A code block with its output file (caption), and needs that tests cannot meet."""

    page: Path
    line: int
    language: str
    text: str
    caption: str | None
    needs: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}, line {self.line}"

    @property
    def code(self) -> str:
        """Return the code without comments, which are in the language of the page."""
        pattern = _COMMENTS.get(self.language, "$^")
        lines = [re.sub(pattern, "", line).rstrip() for line in self.text.splitlines()]
        return "\n".join(line for line in lines if line)


def list_pages(language: str) -> dict[str, Path]:
    """Return the written pages of a language by relative path."""
    folder = DOCS / language
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.md"))}
    return {name: path for name, path in found.items() if name not in GENERATED_PAGES}


def list_code_blocks(page: Path) -> list[CodeBlock]:
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    pairs = zip(tokens, [None, *tokens], strict=False)
    return [_parse_block(page, one, before) for one, before in pairs if one.type == "fence"]


def _parse_block(page: Path, token: Token, before: Token | None) -> CodeBlock:
    language, text, caption = token.info.strip(), token.content, None
    directive = re.fullmatch(r"\{([\w-]+)\} ?(\w*)", language)
    if directive:
        language = directive[2] if directive[1] == "code-block" else directive[1]
        options = re.match(r"(?::\w+:.*\n)*\n?", text)
        assert options is not None
        given = re.search(r":caption: (.+)", options[0])
        caption, text = (given[1] if given else None), text[options.end() :]
    comment = before.content if before is not None and before.type == "html_block" else ""
    needs = _NEEDS.search(comment)
    assert token.map is not None
    return CodeBlock(page, token.map[0] + 1, language, text, caption, needs and needs[1])


def list_heading_levels(page: Path) -> list[int]:
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    return [int(token.tag[1]) for token in tokens if token.type == "heading_open"]
