"""Tests of invalid input: exit code 2, a complete message, and no partial files."""

import shutil
from contextlib import chdir
from pathlib import Path

import pytest
from case_files import load_cases
from PIL import Image
from tiny_task import make_task, write_recipe

from finesight.cli.app import run_command

CASES = load_cases("bad_input")


@pytest.fixture(scope="module")
def template_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a task and its finished run once."""
    folder = tmp_path_factory.mktemp("original")
    with chdir(folder):
        write_recipe(Path("recipe.yaml"), make_task(Path("task")) | {"output_dir": "none"})
        assert run_command(["train", "recipe.yaml", "output_dir=done"]) == 0
    return folder


@pytest.fixture(autouse=True)
def folder(template_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the task and run for a test that corrupts them, into the working directory."""
    shutil.copytree(template_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def read_contents() -> dict[Path, tuple[int, int]]:
    files = [path for path in Path().rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def check_message(printed_text: str, words: list[str]) -> None:
    """Check location, problem, expected value and remedy."""
    message = printed_text[printed_text.index("error: ") :]
    for word in (*words, "\n  expected: ", "\n  remedy: "):
        assert word in message, message


@pytest.mark.parametrize("name", CASES)
def test_bad_input_exits_with_2_and_writes_no_files(name, cli):
    command, files, words = CASES[name]
    for pattern, content in files.items():
        for file in [*Path().glob(pattern)] or [Path(pattern)]:
            if content is None:
                file.unlink()
            elif content == "BOMB":
                Image.new("1", (10_000, 10_000)).save(file)
            else:
                file.write_text(content)
    before = read_contents()
    check_message(cli(*command.split(), code=2).err, words)
    assert read_contents() == before
    assert not Path("run").exists()
