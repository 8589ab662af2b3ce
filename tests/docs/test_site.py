"""The documentation as it is built: without a warning, in its language, readable in a browser."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe import Axe
from browser import DESK, PHONE, Browser, chromium
from docs_blocks import DOCS, ROOT, pages

LOCALES = {"en": "en", "zh": "zh_CN"}
TAGS = {"en": "en", "zh": "zh-CN"}

LOOKED_AT = ("index", "ten-minutes", "recipe", "speed")
"""Among them are a picture, commands, wide tables, long lines and figures."""

BROKEN = """
const size = (at) => at.getBoundingClientRect();
const missing = [...document.images].filter((at) => !at.naturalWidth);
const cut = [...document.querySelectorAll("article *")].filter((at) =>
  size(at).width && size(at).right > innerWidth && !at.closest("pre, .table-wrapper"));
return [...missing, ...cut].map((at) => at.outerHTML.slice(0, 120));
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both languages side by side, as `make docs` builds them."""
    folder = tmp_path_factory.mktemp("site")
    for language, locale in LOCALES.items():
        command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", str(DOCS)]
        places = ["-d", folder / f"kept-{language}", DOCS / language, folder / language]
        done = subprocess.run(
            [*command, "-D", f"language={locale}", *map(str, places)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.mark.parametrize("language", LOCALES)
def test_every_page_is_built_in_its_language(site: Path, language: str) -> None:
    for name in [*pages(language), "commands.md", "files.md"]:
        page = (site / language / name).with_suffix(".html").read_text("utf-8")
        assert f'lang="{TAGS[language]}"' in page, name
        english = re.search(r">\s*(Next|Previous|On this page|Made with)\s*<", page)
        assert (english is not None) == (language == "en"), name


@pytest.mark.parametrize("language", LOCALES)
def test_links_of_the_site_lead_somewhere(site: Path, language: str) -> None:
    texts = {path: path.read_text("utf-8") for path in sorted(site.rglob("*.html"))}
    for page in (site / language).rglob("*.html"):
        for address in re.findall(r'(?:href|src)="([^":]+)"', texts[page]):
            file, _, anchor = address.partition("#")
            path = (page.parent / file.partition("?")[0]).resolve() if file else page
            assert path.exists(), f"{page.name}: {address}"
            known = not anchor or f'id="{anchor}"' in texts.get(path, f'id="{anchor}"')
            assert known, f"{page.name}: {address}"


@pytest.mark.parametrize("language", LOCALES)
def test_files_that_pages_name_are_there(language: str) -> None:
    named = re.compile(r"`((?:src|benchmarks|tools|recipes|examples|docs)/[a-z0-9_./-]+\.[a-z]+)`")
    for name, page in pages(language).items():
        for file in named.findall(page.read_text("utf-8")):
            assert (ROOT / file).exists(), f"{name}: {file}"


def test_chinese_is_not_broken_into_lines() -> None:
    """A browser shows the end of a line as a space."""
    for name, page in pages("zh").items():
        text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
        broken = re.search(r".*[\u3001-\u9fff\uff00-\uffef]\n[\u3001-\u9fff\uff00-\uffef].*", text)
        assert broken is None, f"{name}: {broken[0]}"


@pytest.mark.parametrize(
    ("language", "asked", "page"),
    [("en", "learning rate", "your-gpu"), ("zh", "显存", "your-gpu"), ("zh", "训练速度", "speed")],
)
def test_what_is_searched_is_found(
    site: Path, browser: Browser, language: str, asked: str, page: str
) -> None:
    browser.visit(f"{(site / language / 'search.html').as_uri()}?q={asked}")
    found = browser.run(
        "return new Promise((resolve) => setInterval(() => {"
        " if (/\\d/.test(document.querySelector('#search-results p')?.textContent))"
        " resolve([...document.querySelectorAll('#search-results a')].map((at) => at.href));"
        "}, 50));"
    )
    assert any(f"/{page}.html" in address for address in found)


@pytest.mark.parametrize("language", LOCALES)
@pytest.mark.parametrize("name", LOOKED_AT)
def test_a_page_can_be_read_on_a_telephone_and_on_a_desk(
    site: Path, browser: Browser, language: str, name: str
) -> None:
    axe = Axe()
    for width, dark in ((PHONE, False), (DESK, True)):
        browser.open(site / language / f"{name}.html", width, dark=dark)
        assert browser.overflow() == 0
        assert browser.run(BROKEN) == []
        assert axe.grave(browser) == []
        assert browser.messages() == []
        assert all(url.startswith("file:") for url in browser.requests())
