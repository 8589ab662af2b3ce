"""Remedies of errors: what they name exists, and following them changes the outcome."""

import ast
import difflib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from case_files import load_cases
from click.testing import CliRunner
from image_fixtures import write_gray_image, write_jsonl

from finesight.cli.app import app, run_command
from finesight.data.formats import FORMATS
from finesight.doctor.diagnosis import load_catalog
from finesight.errors import UserError, format_command
from finesight.operations import OPERATIONS
from finesight.operations.operation import list_parameters
from finesight.recipe import list_setting_names

SOURCE = Path(__file__).parents[1] / "src" / "finesight"
PROSE = ("from", "is", "or", "that", "version")
OTHER_PROGRAMS = re.compile(
    r"(?:du|ps|torchrun|docker|podman|pip|kubectl|nvidia-smi|sbatch|llama|vllm|python)\b[^;`]*"
)


def iter_remedies() -> Iterator[tuple[str, str]]:
    """Yield location and text of strings in arguments, variables and results that are remedies.

    A function with a parameter `remedy` passes it on; one named `suggest_...` returns a remedy.
    """
    trees = {path: ast.parse(path.read_text("utf-8")) for path in sorted(SOURCE.rglob("*.py"))}
    positions = {
        node.name: [arg.arg for arg in node.args.args if arg.arg != "self"].index("remedy")
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and "remedy" in [arg.arg for arg in node.args.args]
    }
    for path, tree in trees.items():
        found: list[ast.AST | None] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).rpartition(".")[2]
                found += node.args[positions.get(name, len(node.args)) :][:1]
                found += [keyword.value for keyword in node.keywords if keyword.arg == "remedy"]
            elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = {ast.unparse(target).lower() for target in targets}
                found += [node.value] if any("remedy" in name for name in names) else []
            elif isinstance(node, ast.FunctionDef) and "suggest" in node.name:
                found += [part.value for part in ast.walk(node) if isinstance(part, ast.Return)]
        for value in {id(node): node for node in found if node is not None}.values():
            yield from ((f"{path.name}:{value.lineno}", text) for text in iter_texts(value))
    for code, entry in load_catalog().items():
        yield f"diagnoses.yaml: {code}", re.sub(r"\{\w+\}", "X", entry.get("remedy", ""))


def iter_texts(node: ast.AST) -> Iterator[str]:
    """Yield the strings in an expression, with X in place of values."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(
            str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values
        )
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from iter_texts(child)


@cache
def list_options(name: str = "") -> set[str]:
    """Return the options of the operations whose name starts with a name."""
    found = [o for group in OPERATIONS.values() for n, o in group.items() if n.startswith(name)]
    parameters = [one for operation in found for one in list_parameters(operation.load())]
    options = [one.option for one in parameters if not one.is_positional]
    return {part for option in options for part in option.split("/")}


def iter_unknown(text: str) -> Iterator[str]:
    """Yield commands, options, formats and settings in a remedy that do not exist."""
    text = OTHER_PROGRAMS.sub("", text)
    for match in re.finditer(r"finesight((?: [a-z][a-z-]+){1,2})([^;`()]*)", text):
        first, *rest = match[1].split()
        name = " ".join([first, *rest[:1]]) if first == "data" else first
        if not any(name in group for group in OPERATIONS.values()):
            if first not in PROSE:
                yield f"finesight {first}"
        else:
            options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", match[2].partition(", ")[0]))
            yield from (f"{match[1]} {option}" for option in options - list_options(name))
    everything = list_options() | {"--help"}
    yield from set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - everything
    formats = {data_format.name for data_format in FORMATS}
    yield from set(re.findall(r"--format (?!to )([a-z][a-z-]+)", text)) - formats
    names = [*list_setting_names(), "image.min_pixels", "train.learning_rate.vision"]
    for setting in re.findall(r"\b(?:train|tune|data|eval)\.[a-z_.0-9]*[a-z0-9]", text):
        is_file = setting.endswith((".jsonl", ".json", ".yaml", ".html"))
        if not is_file and not any(f"{name}.".startswith(f"{setting}.") for name in names):
            yield setting


REMEDIES = sorted(set(iter_remedies()))


def test_commands_options_formats_and_settings_of_remedies_exist():
    assert len(REMEDIES) > 600
    unknown = {source: [*iter_unknown(text)] for source, text in REMEDIES}
    assert {source: names for source, names in unknown.items() if names} == {}
    assert [*iter_unknown("finesight imports A; --formats; --format cocos; train.step=1")] == [
        *("finesight imports", "--formats", "cocos", "train.step")
    ]


CASES = load_cases("remedies")


@pytest.fixture
def _inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_gray_image(tmp_path / "a.png")
    for name, text in CASES["files"].items():
        (tmp_path / name).write_text(text)


def run(words: list[str]) -> tuple[int, UserError | None]:
    result = CliRunner().invoke(app, words)
    error = result.exception if isinstance(result.exception, UserError) else None
    assert error is not None or isinstance(result.exception, SystemExit | None), result.exception
    return result.exit_code, error


def follow(words: list[str], remedy: str, values: dict[str, str]) -> Iterator[list[str]]:
    """Yield the commands of each alternative in a remedy, with its placeholders replaced."""
    for placeholder, value in values.items():
        remedy = remedy.replace(placeholder, value)
    words = [values.get(word, word) for word in words]
    for alternative in re.split("[;,] or ", remedy):
        if command := re.search(r"finesight ((?:[^;`:]|:(?! ))+)", alternative):
            yield shlex.split(command[1])
        if name := re.match(r"did you mean (\S+)\?", alternative):
            near = difflib.get_close_matches(name[1], words, 1)
            yield [name[1] if word in near else word for word in words]
        if override := re.match(r"use (\S+=\S+?)(?::|$)", alternative):
            yield [*words[:2], override[1]]
        words = words[:-1] if alternative.startswith("use --") else words
        value = r"""(?: (?:"[^"]*"|(?!skips)[^ ;,"-][^ ;,"]*))?"""
        options = re.findall(rf"--[a-z][a-z-]+{value}", alternative)
        yield [*words, *(word for option in options for word in shlex.split(option))]


@pytest.mark.parametrize("command", CASES["commands"])
@pytest.mark.usefixtures("_inputs")
def test_followed_remedies_lead_to_success(command):
    """A remedy may lead to the next error, but not to one that was seen before."""
    commands, seen = [command.split()], set[str]()
    while commands:
        words = commands.pop()
        code, error = run(words)
        if code == 0:
            break
        assert error is not None
        if str(error) not in seen:
            commands += follow(words, error.remedy, CASES["commands"][command])
        seen.add(str(error))
    assert seen
    assert code == 0, seen


@pytest.mark.parametrize(
    ("started", "on_path", "program"),
    [
        ("bin/finesight", False, "./bin/finesight"),
        ("bin/finesight", True, "finesight"),
        ("../finesight", False, "{parent}/finesight"),
        ("finesight/__main__.py", False, "finesight"),
    ],
)
def test_next_commands_name_the_program_as_started(
    started, on_path, program, tmp_path, monkeypatch, capsys
):
    file = tmp_path / started
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(file.parent) if on_path else "")
    monkeypatch.setattr("sys.argv", [str(file)])
    expected = program.format(parent=tmp_path.parent)
    assert format_command("train", "a b.yaml") == f"{expected} train 'a b.yaml'"
    write_jsonl(tmp_path / "a.jsonl", [{}])
    assert run_command(["train", "a.jsonl"]) == 2
    assert f"{expected} init a.jsonl" in capsys.readouterr().err
