"""No command replaces a file or folder that it did not write."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_task import TinyTask

from finesight.operations import OPERATIONS, find_operation
from finesight.operations.operation import list_parameters

OUT = "mine.x"

COMMANDS: dict[tuple[str, str], str] = {
    ("init", "--out"): "init train.jsonl --model tiny --out",
    ("quickstart", "--out"): "quickstart --out",
    ("download", "--to"): "download a/b --to",
    ("import", "OUT"): "import train.jsonl",
    ("check", "--fix"): "check train.jsonl --fix",
    ("check", "--html"): "check train.jsonl --html",
    ("label", "--out"): "label tiny eval0.png --prompt x --suggest-only --out",
    ("sample", "OUT"): "sample run train.jsonl --reward qa",
    ("pairs", "OUT"): "pairs run",
    ("show", "--html"): "show recipe.yaml --html",
    ("data export", "OUT"): "data export train.jsonl --to coco",
    ("search", "--out"): "search recipe.yaml --out",
    ("launch", "--out"): "launch recipe.yaml --out",
    ("convert", "RECIPE"): "convert other.yaml",
    ("eval", "--out"): "eval run --out",
    ("report", "--out"): "report run --out",
    ("report", "--incorrect"): "report run --incorrect",
    ("compare", "--out"): "compare run second --out",
    ("predict", "--out"): "predict run eval0.png --prompt x --out",
    ("merge", "OUT"): "merge run",
    ("export", "OUT"): "export tiny --converter other.yaml",
    ("train", "output_dir"): "train recipe.yaml output_dir=",
    ("serve", "--socket"): "serve tiny --socket",
}
"""Command line before the name of its output, by operation and option."""

INPUTS = {"--password-file", "--key-file", "--suite", "--draw"}
"""Options with a path that are no new file: they are read, or the folder gets further files."""


def write_file(path: Path) -> None:
    path.write_text("precious")


def write_folder(path: Path) -> None:
    path.mkdir()
    # The names are those that a labelling session and a search would write.
    for name in ("labels.jsonl", "best.yaml", "report.html", "recipe.yaml"):
        write_file(path / name)


def link_to(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def link(path: Path) -> None:
        make(path.with_name("precious"))
        path.symlink_to("precious")

    return link


TAKEN: dict[str, Callable[[Path], None]] = {
    "file": write_file,
    "folder": write_folder,
    "link to a file": link_to(write_file),
    "link to a folder": link_to(write_folder),
    "broken link": link_to(lambda path: None),
}


def read_tree(folder: Path) -> dict[str, Any]:
    """Return the content of all files and links by path."""
    tree: dict[str, Any] = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            tree[str(path)] = os.readlink(path)
        elif path.is_file():
            tree[str(path)] = path.read_bytes()
    return tree


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task") / "task"
    task = TinyTask(folder)
    task.run("train.steps=1", "train.epochs=null", eval={"metric": "qa", "max_new_tokens": 2})
    shutil.copytree(folder / "run", folder / "second")
    lines = ("model_name_or_path: a/b", "stage: sft", "finetuning_type: lora", "dataset: a")
    (folder / "other.yaml").write_text("\n".join(lines))
    return folder


def complete(words: str, out: str) -> list[str]:
    """Return the words of a command line with its output."""
    return f"{words}{out}".split() if words.endswith("=") else [*words.split(), out]


@pytest.mark.parametrize("taken", TAKEN)
def test_existing_file_or_folder_is_refused_and_unchanged(task, tmp_path, monkeypatch, cli, taken):
    shutil.copytree(task, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    TAKEN[taken](tmp_path / OUT)
    before = read_tree(tmp_path)
    for words in COMMANDS.values():
        printed = cli(*complete(words, OUT), code=2)
        assert OUT in printed.err, words
        assert read_tree(tmp_path) == before, words


def test_all_outputs_of_commands_are_tested():
    found = set()
    for operation in (name for group in OPERATIONS.values() for name in group):
        for one in list_parameters(find_operation(operation)):
            is_new = one.path in ("file", "folder") or one.name in ("out", "to", "fix", "html")
            if is_new and one.kind in ("path", "text") and one.option not in INPUTS:
                found.add((operation, "OUT" if one.is_positional else one.option))
    assert found - COMMANDS.keys() == set()


@pytest.mark.parametrize(
    "words",
    [
        "check train.jsonl --fix new --html new/page.html",
        "check train.jsonl --fix new --html ./new",
        "report run --out new --incorrect new",
    ],
)
def test_two_outputs_in_one_place_are_refused(task, tmp_path, monkeypatch, cli, words):
    shutil.copytree(task, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    before = read_tree(tmp_path)
    assert "which --" in cli(*words.split(), code=2).err
    assert read_tree(tmp_path) == before


def test_search_takes_no_folder_of_others(task, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    Path("mine/data").mkdir(parents=True)
    write_file(Path("mine/data/notes.txt"))
    before = read_tree(tmp_path)
    cli("search", task / "recipe.yaml", "--out", "mine", "--budget", "1s", code=2)
    assert read_tree(tmp_path) == before


def test_answers_of_an_evaluation_go_to_a_new_file(task, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "new" / "answers.jsonl"
    cli("eval", task / "run", "--out", out)
    before = out.read_bytes()
    assert before.count(b"\n") == 3
    assert "answers-2.jsonl" in cli("eval", task / "run", "--out", out, code=2).err
    assert out.read_bytes() == before
