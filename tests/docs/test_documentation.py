"""The documentation: the same in both languages, and what it tells to type works.

`make test-docs` types every block of every page; without `--type-blocks`, blocks are read alone.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from docs_blocks import ROOT, Block, blocks, headings, pages
from docs_stage import LATER, data_sets, hubs, models, reader_folder, stage
from docs_typing import Reader
from typer.core import TyperGroup
from typer.main import get_command

from finesight.cli.app import app
from finesight.recipe import recipe_of

ENGLISH, CHINESE = pages("en"), pages("zh")
TOLD = {"README.md": ROOT / "README.md", **ENGLISH}
BLOCKS = [block for page in TOLD.values() for block in blocks(page)]
TYPED = ("sh", "python", "console")


def test_both_languages_have_the_same_pages() -> None:
    assert list(ENGLISH) == list(CHINESE)


@pytest.mark.parametrize("name", CHINESE)
def test_a_page_has_the_same_in_both_languages(name: str) -> None:
    english, chinese = ENGLISH[name], CHINESE[name]
    assert headings(chinese) == headings(english)
    assert [_said(block) for block in blocks(chinese)] == [
        _said(block) for block in blocks(english)
    ]


def _said(block: Block) -> tuple[str, str | None, str | None, str]:
    # The captions of toctrees are in the page's language; what they list is compared.
    caption = None if block.language == "toctree" else block.caption
    return block.language, caption, block.needs, block.code


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "sh"], ids=str)
def test_commands_of_a_block_are_there(block: Block) -> None:
    """Names and options alone: nothing is done."""
    for words in _commands(block.text):
        _understood(words, f"{block}: {shlex.join(words)}")


def _commands(text: str) -> Iterator[list[str]]:
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        words = shlex.split(line, comments=True)
        if "finesight" in words:
            after = words[words.index("finesight") + 1 :]
            ends = [n for n, word in enumerate(after) if word in ("|", "&&", "&", ";", ">", "||")]
            yield after[: min(ends, default=len(after))]


def _understood(words: list[str], told: str) -> None:
    command = get_command(app)
    while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
        name, *words = words
        assert name in command.commands, f"{told}: no command {name}"
        command = command.commands[name]
    known = {
        flag
        for parameter in command.params
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }
    flags = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert flags <= known | {"--help"}, f"{told}: no option {flags - known}"


def _is_of_a_recipe(block: Block) -> bool:
    """What other programs are told is shown, too, on the page that leads from them."""
    return block.language == "yaml" and "model_name_or_path" not in block.text


@pytest.mark.parametrize("block", filter(_is_of_a_recipe, BLOCKS), ids=str)
def test_settings_of_a_block_are_those_of_a_recipe(block: Block) -> None:
    least = {"model": "tiny", "data": {"train": "train.jsonl"}, "output": "runs/a"}
    recipe_of(least | yaml.safe_load(block.text))


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "json"], ids=str)
def test_json_of_a_page_can_be_read(block: Block) -> None:
    """Of several programs and kinds: what each means is typed by `make test-docs`."""
    json.loads(block.text)


@pytest.fixture(scope="session")
def reader_env(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    if not request.config.getoption("--type-blocks"):
        pytest.skip("blocks are typed by `make test-docs`")
    folder = tmp_path_factory.mktemp("reader")
    with hubs(models(folder / "models") | data_sets(), folder / "home") as env:
        yield env


@pytest.fixture(scope="session")
def prepared(reader_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "folder"
    reader_folder(folder)
    reader = Reader(folder, reader_env)
    reader.types(Block(Path(__file__), 0, "sh", LATER, None, None))
    reader.leaves()
    return folder


@pytest.mark.parametrize(
    "name", [n for n, page in TOLD.items() if any(b.language in TYPED for b in blocks(page))]
)
def test_what_a_page_tells_to_type_works(
    name: str, reader_env: dict[str, str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    stage(name, request.getfixturevalue("prepared"), folder)
    reader = Reader(folder, reader_env)
    try:
        for block in blocks(TOLD[name]):
            if block.needs is None and (block.caption or block.language in TYPED):
                reader.types(block)
    finally:
        reader.leaves()
