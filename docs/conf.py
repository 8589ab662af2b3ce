"""Sphinx configuration of the documentation. `make docs` builds both languages.

Each language has a folder of pages. tools/generate_docs.py writes the pages of commands and source
files into this folder before the build. Warnings are errors.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.search.en import SearchEnglish

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tools"))

import generate_docs  # noqa: E402 (found by the line above)

import finesight  # noqa: E402

project = "finesight"
version = release = finesight.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
autodoc_typehints = "description"
autodoc_member_order = "bysource"
# Single backticks in docstrings are code.
default_role = "literal"
# Code blocks without a language are program output.
highlight_language = "text"
exclude_patterns: list[str] = []
# Chinese texts of the theme; Sphinx contains its own translations.
locale_dirs = [str(HERE / "locale")]
html_theme = "furo"
# Smaller than the default, so that commands of 90 characters fit.
html_theme_options = {"light_css_variables": {"code-font-size": "0.78em"}}
# The dark style of the theme underlines module names like links.
pygments_dark_style = "github-dark"
html_title = f"finesight {version}"
html_show_copyright = False
html_copy_source = False
templates_path = [str(HERE / "templates")]
html_sidebars = {
    "**": [
        *("sidebar/brand.html", "languages.html", "sidebar/search.html"),
        *("sidebar/scroll-start.html", "sidebar/navigation.html", "sidebar/scroll-end.html"),
    ]
}


class SearchChinese(SearchEnglish):
    """Search for Chinese text by characters and character pairs, without a word list.

    Replaces the Chinese search of Sphinx, which requires a word list and refers to a missing
    stemmer.
    """

    lang = "zh"
    # Queries are split into pairs, because most words have two characters.
    js_splitter_code = r"""
var splitQuery = (query) =>
  query.match(/\p{Script=Han}{1,2}|(?:(?!\p{Script=Han})[\p{L}\p{N}_])+/gu) ?? [];
"""

    def split(self, input: str) -> list[str]:
        han = re.findall(r"[\u4e00-\u9fff]+", input)
        pairs = [run[n : n + 2] for run in han for n in range(len(run) - 1)]
        return re.findall(r"[^\W\u4e00-\u9fff]+", input) + list("".join(han)) + pairs


def setup(app: Sphinx) -> None:
    """Write the generated pages before Sphinx reads the sources."""
    folder = Path(app.srcdir)
    for name, text in generate_docs.build_pages(folder.name).items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    app.add_search_language(SearchChinese)
    app.connect("html-page-context", _add_heading_levels, priority=900)


def _add_heading_levels(
    _app: Sphinx, _page: str, _file: str, context: dict[str, Any], _tree: Any
) -> None:
    """Add the missing aria-level to toctree captions, which Sphinx marks as headings."""
    for part in {"body", "furo_navigation_tree"} & context.keys():
        context[part] = context[part].replace('role="heading"', 'role="heading" aria-level="2"')
