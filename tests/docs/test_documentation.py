"""Tests of the documentation: equal content in both languages, valid code blocks.

`make test-docs` runs all blocks of all pages. Without `--type-blocks`, blocks are only parsed.
"""

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from docs_code_blocks import ROOT, CodeBlock, list_code_blocks, list_heading_levels, list_pages
from docs_terminal import (
    READER,
    DocsTerminal,
    build_dataset_repositories,
    build_model_repositories,
    create_reader_folder,
    prepare_page_folder,
    run_fake_hubs,
    write_tutorial_files,
)

from finesight.cli.app import app
from finesight.files.bounded_files import load_yaml
from finesight.ingest.mapping import parse_mapping
from finesight.settings.recipe import recipe_from_dict

ENGLISH, CHINESE = list_pages("en"), list_pages("zh")
RUNNABLE_PAGES = {"README.md": ROOT / "README.md", **ENGLISH}
BLOCKS = [block for page in RUNNABLE_PAGES.values() for block in list_code_blocks(page)]
TYPED = ("sh", "python", "console")
ALTERNATIVE = re.compile("(.+), instead of the import above")
ALTERNATIVES = [block for block in BLOCKS if block.needs and ALTERNATIVE.fullmatch(block.needs)]
"""Imports that a reader chooses in place of the first one of a page."""

MAPPING_START = "version: 1\n"
MAPPINGS = [block for block in BLOCKS if block.text.startswith(MAPPING_START)]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_both_languages_have_the_same_pages() -> None:
    assert list(ENGLISH) == list(CHINESE)


@pytest.mark.parametrize("name", CHINESE)
def test_page_has_the_same_content_in_both_languages(name: str) -> None:
    english, chinese = ENGLISH[name], CHINESE[name]
    assert list_heading_levels(chinese) == list_heading_levels(english)
    blocks, english_blocks = map(list_code_blocks, (chinese, english))
    assert list(map(normalize_block, blocks)) == list(map(normalize_block, english_blocks))


def normalize_block(block: CodeBlock) -> tuple[str, str | None, str | None, str]:
    # Captions of toctrees are translated; only their entries are compared.
    caption = None if block.language == "toctree" else block.caption
    code = block.code
    if code.startswith("src/finesight/\n"):  # The tree has translated descriptions of folders.
        code = "\n".join(line.split()[0] for line in code.splitlines())
    return block.language, caption, block.needs, code


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "sh"])
def test_commands_in_code_blocks_exist(block: CodeBlock) -> None:
    """Check commands, options, and extras of `pip install` without running the commands."""
    for words in _commands(block.text):
        check_command(words, f"{block}: {shlex.join(words)}")
    extras = ",".join(re.findall(r"finesight\[(.+?)\]", block.text)).split(",")
    assert set(extras) <= PROJECT["optional-dependencies"].keys() | {""}, block


def _commands(text: str) -> Iterator[list[str]]:
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        words = shlex.split(line, comments=True)
        if "finesight" in words:
            after = words[words.index("finesight") + 1 :]
            ends = [n for n, word in enumerate(after) if word in ("|", "&&", "&", ";", ">", "||")]
            yield after[: min(ends, default=len(after))]


def check_command(words: list[str], error_reported: str) -> None:
    command = app
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, *words = words
        command = command.get_command(click.Context(command), name)
        assert command is not None, f"{error_reported}: no command {name}"
    known = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    flags = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert flags <= known | {"--help"}, f"{error_reported}: no option {flags - known}"


def _is_of_a_recipe(block: CodeBlock) -> bool:
    """Check if a YAML block is a recipe, not settings of other programs, a suite or a mapping."""
    others = ("model_name_or_path", "groups:", MAPPING_START)
    return block.language == "yaml" and not any(one in block.text for one in others)


@pytest.mark.parametrize("block", [block for block in BLOCKS if _is_of_a_recipe(block)])
def test_settings_in_code_blocks_are_valid(block: CodeBlock) -> None:
    least = {"model": "tiny", "data": {"train": "train.jsonl"}, "output_dir": "runs/a"}
    recipe_from_dict(least | yaml.safe_load(block.text))


@pytest.mark.parametrize("block", MAPPINGS, ids=str)
def test_mappings_in_code_blocks_are_valid(block: CodeBlock) -> None:
    parse_mapping(load_yaml(block.text), str(block))


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "json"])
def test_json_code_blocks_are_valid(block: CodeBlock) -> None:
    json.loads(block.text)


def test_files_named_by_pages_exist() -> None:
    named = re.compile(r"`((?:src|benchmarks|tools|recipes|examples|docs)/[a-z0-9_./-]+\.[a-z]+)`")
    for page in (*ENGLISH.values(), *CHINESE.values()):
        for file in named.findall(page.read_text("utf-8")):
            assert (ROOT / file).exists(), f"{page}: {file}"


def test_chinese_paragraphs_have_no_line_breaks() -> None:
    """Browsers render a line break as a space, which Chinese text does not use."""
    for name, page in CHINESE.items():
        text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
        broken = re.search(r".*[\u3001-\u9fff\uff00-\uffef]\n[\u3001-\u9fff\uff00-\uffef].*", text)
        assert broken is None, f"{name}: {broken[0]}"


@pytest.fixture(scope="session")
def reader_env(request, tmp_path_factory):
    if not request.config.getoption("--type-blocks"):
        pytest.skip("blocks are typed by `make test-docs`")
    folder = tmp_path_factory.mktemp("reader")
    repositories = build_model_repositories(folder / "models") | build_dataset_repositories()
    with run_fake_hubs(repositories, folder / "home") as env:
        yield env


@pytest.mark.parametrize("block", ALTERNATIVES, ids=str)
def test_alternative_import_creates_the_files_of_later_commands(block, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_tutorial_files(folder)
    with run_fake_hubs(build_dataset_repositories(), tmp_path / "home") as env:
        reader = DocsTerminal(folder, env)
        try:
            reader.run_block(block)
        finally:
            reader.close()
    out = next(_commands(block.text))[2]
    blocks = list_code_blocks(block.page)
    later = [one.text for one in blocks if one.line > block.line and one.needs is None]
    used = {path for text in later for path in re.findall(rf"\b{out}/[\w.-]+", text)}
    assert len(used) >= 3
    assert [path for path in sorted(used) if not (folder / path).exists()] == []


@pytest.fixture(scope="session")
def prepared_repositories(reader_env, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "folder"
    create_reader_folder(folder)
    reader = DocsTerminal(folder, reader_env)
    reader.run_block(CodeBlock(Path(__file__), 0, "sh", READER["commands"], None, None))
    reader.close()
    return folder


def has_typed_blocks(name: str) -> bool:
    return any(block.language in TYPED for block in list_code_blocks(RUNNABLE_PAGES[name]))


@pytest.mark.parametrize("name", filter(has_typed_blocks, RUNNABLE_PAGES))
def test_code_blocks_of_page_run(name, reader_env, request, tmp_path):
    folder = tmp_path / "folder"
    prepare_page_folder(name, request.getfixturevalue("prepared_repositories"), folder)
    reader = DocsTerminal(folder, reader_env)
    output: str | None = None
    try:
        for block in list_code_blocks(RUNNABLE_PAGES[name]):
            if block.language == "text" and block.needs is None and output is not None:
                missing = find_missing_lines(block.text, output)
                assert not missing, f"{block}: the commands do not print {missing}"
            output = None
            if block.needs is None and (block.caption or block.language in TYPED):
                output = reader.run_block(block)
    except AssertionError as error:
        error.add_note(str(block))
        raise
    finally:
        reader.close()


def find_missing_lines(expected: str, output: str) -> list[str]:
    """Return the lines of an output block that a command does not print.

    Numbers, durations, line breaks and lines of `...` are ignored.
    """
    printed = normalize_output(output)
    lines = [line for line in expected.splitlines() if line.strip() not in ("", "...", "…")]
    return [line for line in lines if normalize_output(line) not in printed]


def normalize_output(text: str) -> str:
    # Bars and plots depend on numbers.
    text = re.sub(r"[#█▇▆▅▄▃▂▁━─]+", "", re.sub(r"\d[\d,.]*", "0", text))
    # The machine decides about the units of durations, and which shares of a step are printed.
    text = re.sub(r"\b0 (?:ms|s|min|h)\b(?: 0 (?:min|s)\b)*", "0 s", text)
    text = re.sub(r" +0 % (?:MFU|waiting for data|sampling|scoring)\b", "", text)
    return " ".join(text.split())


def test_speed_of_the_machine_changes_no_output() -> None:
    line = "step 9/9  {}peak 0.5 GB  {}left, about {}, 1.3 of 25 GB of memory"
    slow, fast = ("31 % MFU  ", "5 % waiting for data  1 s ", "1 h 02 min"), ("", "42 s ", "79.8 s")
    assert find_missing_lines(line.format(*slow), line.format(*fast)) == []
    assert find_missing_lines(line, line.replace("memory", "disk")) == [line]
