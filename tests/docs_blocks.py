"""The code blocks of the documentation's pages, as a reader sees them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

MADE = {"commands.md", "files.md"}
"""Pages that are made from the code, when the documentation is built or by tools/pages.py."""

_NEEDS = re.compile(r"<!-- needs: (.+?) -->\s*$")
_COMMENTS = {"sh": r"(^|\s)#.*", "python": r"(^|\s)#(?! %%).*", "yaml": r"(^|\s)#.*"}


@dataclass(frozen=True)
class Block:
    """A code block: of which language, the file that it is to be written to (its caption), and what
    it needs that no test has."""

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
        """Without comments, which are in the page's own language."""
        pattern = _COMMENTS.get(self.language)
        lines = self.text.splitlines()
        if pattern:
            lines = [re.sub(pattern, "", line).rstrip() for line in lines]
        return "\n".join(line for line in lines if line)


def pages(language: str) -> dict[str, Path]:
    """The written pages of a language by their path below its folder."""
    folder = DOCS / language
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.md"))}
    return {name: path for name, path in found.items() if name not in MADE}


def blocks(page: Path) -> list[Block]:
    """A page's code blocks, in order."""
    found: list[Block] = []
    before: Token | None = None
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence":
            found.append(_block(page, token, before))
        before = token
    return found


def _block(page: Path, token: Token, before: Token | None) -> Block:
    language, text, caption = token.info.strip(), token.content, None
    directive = re.fullmatch(r"\{([\w-]+)\} ?(\w*)", language)
    if directive:
        language = directive[2] if directive[1] == "code-block" else directive[1]
        options = re.match(r"(?::\w+:.*\n)*\n?", text)
        assert options is not None
        given = re.search(r":caption: (.+)", options[0])
        caption, text = (given[1] if given else None), text[options.end() :]
    needs = None
    if before is not None and before.type == "html_block":
        told = _NEEDS.search(before.content)
        needs = told[1] if told else None
    assert token.map is not None
    return Block(page, token.map[0] + 1, language, text, caption, needs)


def headings(page: Path) -> list[int]:
    """The levels of a page's headings."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    return [int(token.tag[1]) for token in tokens if token.type == "heading_open"]
