"""How Sphinx makes the documentation: `make docs` builds both languages, warnings being errors.

Pages of a language lie in the folder of its name. What the code says by itself (every command,
every module) is one page for both: English stands in git, and a language's folder gets its own page
of the same name when it is built.
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

import pages  # noqa: E402 (found by the line above)

import finesight  # noqa: E402

project = "finesight"
version = release = finesight.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
autodoc_typehints = "description"
autodoc_member_order = "bysource"
# What stands in single marks in docstrings is code.
default_role = "literal"
# A block without a language is what a program printed.
highlight_language = "text"
exclude_patterns: list[str] = []
# The theme's own words in Chinese; Sphinx knows its own.
locale_dirs = [str(HERE / "locale")]
html_theme = "furo"
# A little smaller than the theme's, so that commands of 90 characters are seen whole.
html_theme_options = {"light_css_variables": {"code-font-size": "0.78em"}}
# The theme's own for the dark underlines modules as if they were links.
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
    """Chinese is found by its characters and pairs of neighbours, without a list of its words.

    In place of Sphinx's own, which finds no Chinese without such a list, and whose page ends with
    an error: it names a stemmer that is not there.
    """

    lang = "zh"
    # What is looked for is cut into pairs, as most words are two characters long.
    js_splitter_code = r"""
var splitQuery = (query) =>
  query.match(/\p{Script=Han}{1,2}|(?:(?!\p{Script=Han})[\p{L}\p{N}_])+/gu) ?? [];
"""

    def split(self, input: str) -> list[str]:
        han = re.findall(r"[\u4e00-\u9fff]+", input)
        pairs = [run[n : n + 2] for run in han for n in range(len(run) - 1)]
        return re.findall(r"[^\W\u4e00-\u9fff]+", input) + list("".join(han)) + pairs


def setup(app: Sphinx) -> None:
    """Write the pages that are made, before any is read."""
    folder = Path(app.srcdir)
    for name, text in pages.built(folder.name).items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    app.add_search_language(SearchChinese)
    app.connect("html-page-context", _with_levels, priority=900)


def _with_levels(_app: Sphinx, _page: str, _file: str, context: dict[str, Any], _tree: Any) -> None:
    """The captions of lists of pages are headings to Sphinx, which leaves out of which level."""
    for part in {"body", "furo_navigation_tree"} & context.keys():
        context[part] = context[part].replace('role="heading"', 'role="heading" aria-level="2"')
