"""How Sphinx makes the documentation: `make docs` builds both languages, warnings being errors.

Pages of a language lie in the folder of its name. What the code says by itself (every command,
every module) is one page for both: English stands in git, and a language's folder gets its own page
of the same name when it is built.
"""

from __future__ import annotations

import sys
from pathlib import Path

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
exclude_patterns: list[str] = []
html_theme = "furo"
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


def setup(app: object) -> None:
    """Write the pages that are made, before any is read."""
    folder = Path(app.srcdir)  # type: ignore[attr-defined]
    for name, text in pages.built(folder.name).items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
