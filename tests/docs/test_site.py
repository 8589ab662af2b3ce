"""Tests of the built documentation: warnings, language, links, search, accessibility."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe import AxeChecker
from browser import DESKTOP_WIDTH, PHONE_WIDTH, Browser, launch_chromium
from docs_code_blocks import DOCS, ROOT, list_pages

LOCALES = {"en": "en", "zh": "zh_CN"}
TAGS = {"en": "en", "zh": "zh-CN"}

CHECKED_PAGES = ("index", "quickstart-own-data", "recipe", "performance")
"""Pages with an image, commands, wide tables, long lines and numbers."""

BROKEN = """
const size = (at) => at.getBoundingClientRect();
const missing = [...document.images].filter((at) => !at.naturalWidth);
const cut = [...document.querySelectorAll("article *")].filter((at) =>
  size(at).width && size(at).right > innerWidth && !at.closest("pre, .table-wrapper"));
return [...missing, ...cut].map((at) => at.outerHTML.slice(0, 120));
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build both languages as `make docs` does, which takes long for all pages."""
    folder = tmp_path_factory.mktemp("site")
    for language, locale in LOCALES.items():
        command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", str(DOCS)]
        locations = ["-d", folder / f"kept-{language}", DOCS / language, folder / language]
        command += ["-D", f"language={locale}", *map(str, locations)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launch_chromium() as started:
        yield started


@pytest.mark.parametrize("language", LOCALES)
def test_every_page_is_built_in_its_language(site: Path, language: str) -> None:
    for name in [*list_pages(language), "commands.md", "files.md"]:
        page = (site / language / name).with_suffix(".html").read_text("utf-8")
        assert f'lang="{TAGS[language]}"' in page, name
        english = re.search(r">\s*(Next|Previous|On this page|Made with)\s*<", page)
        assert (english is not None) == (language == "en"), name


@pytest.mark.parametrize("language", LOCALES)
def test_site_links_are_valid(site: Path, language: str) -> None:
    texts = {path: path.read_text("utf-8") for path in sorted(site.rglob("*.html"))}
    for page in (site / language).rglob("*.html"):
        for address in re.findall(r'(?:href|src)="([^":]+)"', texts[page]):
            file, _, anchor = address.partition("#")
            path = (page.parent / file.partition("?")[0]).resolve() if file else page
            assert path.exists(), f"{page.name}: {address}"
            known = not anchor or f'id="{anchor}"' in texts.get(path, f'id="{anchor}"')
            assert known, f"{page.name}: {address}"


def test_files_named_by_pages_exist() -> None:
    named = re.compile(r"`((?:src|benchmarks|tools|recipes|examples|docs)/[a-z0-9_./-]+\.[a-z]+)`")
    for page in (page for language in LOCALES for page in list_pages(language).values()):
        for file in named.findall(page.read_text("utf-8")):
            assert (ROOT / file).exists(), f"{page}: {file}"


def test_chinese_paragraphs_have_no_line_breaks() -> None:
    """Browsers render a line break as a space, which Chinese text does not use."""
    for name, page in list_pages("zh").items():
        text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
        broken = re.search(r".*[\u3001-\u9fff\uff00-\uffef]\n[\u3001-\u9fff\uff00-\uffef].*", text)
        assert broken is None, f"{name}: {broken[0]}"


@pytest.mark.parametrize(
    ("language", "query", "page"),
    [
        ("en", "learning rate", "recipe"),
        ("zh", "显存", "hardware"),
        ("zh", "训练速度", "performance"),
    ],
)
def test_site_search_finds_pages(
    site: Path, browser: Browser, language: str, query: str, page: str
) -> None:
    browser.visit(f"{(site / language / 'search.html').as_uri()}?q={query}")
    found = browser.run(
        "return new Promise((resolve) => setInterval(() => {"
        " if (/\\d/.test(document.querySelector('#search-results p')?.textContent))"
        " resolve([...document.querySelectorAll('#search-results a')].map((at) => at.href));"
        "}, 50));"
    )
    assert any(f"/{page}.html" in address for address in found)


@pytest.mark.parametrize("language", LOCALES)
@pytest.mark.parametrize("name", CHECKED_PAGES)
def test_page_is_readable_on_phone_and_desktop(
    site: Path, browser: Browser, language: str, name: str
) -> None:
    axe = AxeChecker()
    for width, dark in ((PHONE_WIDTH, False), (DESKTOP_WIDTH, True)):
        browser.open(site / language / f"{name}.html", width, dark=dark)
        assert browser.overflow_width() == 0
        assert browser.run(BROKEN) == []
        assert axe.find_violations(browser) == []
        assert browser.messages() == []
        assert all(url.startswith("file:") for url in browser.requests())
