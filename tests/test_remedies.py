"""Remedies and proposed steps: what they name exists, and following them changes the outcome."""

import ast
import difflib
import re
import shlex
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
from case_files import load_cases
from click.testing import CliRunner
from image_fixtures import write_gray_image, write_jsonl
from tiny_task import TinyTask, write_recipe

from finesight import api
from finesight.app.jobs import JobOutcome
from finesight.cli.app import app, build_command, run_command
from finesight.doctor.diagnosis import load_catalog
from finesight.errors import Remedy, Step, UserError
from finesight.infer.model_loader import resolve_model_source
from finesight.ingest.formats import FORMATS
from finesight.operations import OPERATIONS, find_operation
from finesight.operations.operation import (
    OUTCOME_VARIABLE,
    format_call,
    format_command,
    format_step,
    list_parameters,
)
from finesight.settings import recipe_template
from finesight.settings.recipe import list_setting_names

SOURCE = Path(__file__).parents[1] / "src" / "finesight"
COMMAND = re.compile(rf"finesight (?:{'|'.join(n for g in OPERATIONS.values() for n in g)})\b")
OTHER_PROGRAMS = re.compile(
    r"(?:du|ps|torchrun|docker|podman|pip|kubectl|nvidia-smi|sbatch|llama|vllm|python)\b[^;`]*"
)


@cache
def parse_modules() -> dict[Path, tuple[ast.AST, ...]]:
    """Return the nodes of each module of the source."""
    paths = sorted(SOURCE.rglob("*.py"))
    return {path: (*ast.walk(ast.parse(path.read_text("utf-8"))),) for path in paths}


def iter_remedies() -> Iterator[tuple[str, str]]:
    """Yield location and text of strings in arguments, variables and results that are remedies.

    A function with a parameter `remedy` passes it on; one named `suggest_...` returns a remedy.
    """
    positions = {
        node.name: [arg.arg for arg in node.args.args if arg.arg != "self"].index("remedy")
        for nodes in parse_modules().values()
        for node in nodes
        if isinstance(node, ast.FunctionDef) and "remedy" in [arg.arg for arg in node.args.args]
    }
    for path, nodes in parse_modules().items():
        found: list[ast.AST | None] = []
        for node in nodes:
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
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
def list_options() -> set[str]:
    """Return the options of all operations, and --help."""
    found = [find_operation(name) for group in OPERATIONS.values() for name in group]
    parameters = [one for operation in found for one in list_parameters(operation)]
    options = [one.option for one in parameters if not one.is_positional]
    return {part for option in options for part in option.split("/")} | {"--help"}


@cache
def list_setting_prefixes() -> set[str]:
    """Return the settings of recipes, and the groups that contain them."""
    names = [*list_setting_names(), "image.min_pixels", "train.learning_rate.vision"]
    parts = [name.split(".") for name in names]
    return {".".join(one[:count]) for one in parts for count in range(1, len(one) + 1)}


def iter_unknown(text: str) -> Iterator[str]:
    """Yield options, formats and settings in a text that do not exist, and commands."""
    text = OTHER_PROGRAMS.sub("", text)
    yield from COMMAND.findall(text)
    yield from set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - list_options()
    formats = {data_format.name for data_format in FORMATS.list_built_in()}
    yield from set(re.findall(r"--format (?!to )([a-z][a-z-]+)", text)) - formats
    for setting in re.findall(r"\b(?:train|tune|data|eval)\.[a-z_.0-9]*[a-z0-9]", text):
        is_file = setting.endswith((".jsonl", ".json", ".yaml", ".html"))
        if not is_file and setting not in list_setting_prefixes():
            yield setting


def test_options_formats_and_settings_of_remedies_exist():
    remedies = {*iter_remedies()}
    assert len(remedies) > 600
    unknown = {source: [*iter_unknown(text)] for source, text in remedies}
    assert {source: names for source, names in unknown.items() if names} == {}
    assert [*iter_unknown("finesight import A; --formats; --format cocos; train.step=1")] == [
        *("finesight import", "--formats", "cocos", "train.step")
    ]


def test_errors_about_data_have_an_expected_value_and_a_remedy():
    for path, nodes in parse_modules().items():
        for node in nodes if path.relative_to(SOURCE).parts[0] in ("data", "encode") else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error"):
                keywords = {keyword.arg for keyword in node.keywords}
                has_parts = {"expected", "remedy"} <= keywords or len(node.args) > 1
                assert has_parts or not keywords & {"expected", "remedy", "where"}, path


def iter_steps() -> Iterator[tuple[str, str, set[str]]]:
    """Yield location, operation and names of arguments of all steps in the source."""

    def uses_step(nodes: Iterable[ast.AST]) -> bool:
        return any(isinstance(n, ast.Name) and n.id == "Step" for n in nodes)

    scopes = [
        (path, n) for path, found in parse_modules().items() if uses_step(found) for n in found
    ]
    for path, scope in scopes:
        nodes = [*ast.walk(scope)] if isinstance(scope, ast.FunctionDef) else []
        if not uses_step(nodes):
            continue
        named = {ast.unparse(n.targets[0]): n.value for n in nodes if isinstance(n, ast.Assign)}
        for node in nodes:
            match node:
                case ast.Call(ast.Name("Step"), [ast.Constant(str(operation)), arguments, *_]):
                    known = named.get(ast.unparse(arguments), arguments)
                    keys = known.keys if isinstance(known, ast.Dict) else []
                    names = {key.value for key in keys if isinstance(key, ast.Constant)}
                    yield f"{path.name}:{node.lineno}", operation, names
    for code, entry in load_catalog().items():
        if "step" in entry:
            yield f"diagnoses.yaml: {code}", entry["step"][0], {*entry["step"][1]}


def test_steps_have_operations_with_their_arguments():
    steps = [*iter_steps()]
    assert len(steps) > 60
    for location, name, arguments in steps:
        known = {one.name for one in list_parameters(find_operation(name))}
        assert arguments <= known, f"{location}: {name} {arguments - known}"


def iter_strings(path: Path) -> Iterator[str]:
    """Yield the strings of a module, or the text of another file."""
    if path.suffix != ".py":
        yield path.read_text("utf-8")
    for node in parse_modules().get(path, ()):
        yield from iter_texts(node) if isinstance(node, ast.Constant | ast.JoinedStr) else ()


OPERATION_FILES = re.compile(
    r"(?:cli|app|operations)/.*|api\.py|.*_operations?\.py"
    r"|ingest/source_options\.py|launch/launch_options\.py|serve/model_server\.py"
    r"|settings/trainer_settings\.yaml"  # texts of `convert`
)
"""Operations, their options, and the interfaces that name commands."""


def test_modules_below_operations_contain_no_commands():
    found = {}
    for path in SOURCE.rglob("*.*"):
        is_text = path.suffix in {".py", ".yaml", ".html", ".js", ".sh"}
        if not is_text or OPERATION_FILES.fullmatch(path.relative_to(SOURCE).as_posix()):
            continue
        commands = [c for text in iter_strings(path) for c in COMMAND.findall(text)]
        found |= {path.name: commands} if commands else {}
    assert found == {}


def test_error_of_a_job_keeps_the_step(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", [{}])
    monkeypatch.setenv(OUTCOME_VARIABLE, str(tmp_path / "outcome.json"))
    assert run_command(["train", str(tmp_path / "a.jsonl")]) == 2
    error = JobOutcome.model_validate_json((tmp_path / "outcome.json").read_text()).error
    arguments = {"data": str(tmp_path / "a.jsonl")}
    assert error.remedy == Step("init", arguments, "write one for these data")


def test_python_functions_raise_errors_that_name_python_functions(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{}])
    with pytest.raises(UserError) as raised:
        api.train(tmp_path / "a.jsonl")
    assert f"finesight.api.init(data={str(tmp_path / 'a.jsonl')!r})" in str(raised.value)
    assert format_call(Step("serve", {"run_or_model": "run"})) == "finesight serve run"
    question = Step("predict", {"run_or_model": Path("run"), "images": [Path("a.png")]})
    assert format_call(question) == "finesight.api.predict(run_or_model='run', images=['a.png'])"


CASES = load_cases("remedies")


@pytest.fixture
def _inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_gray_image(tmp_path / "a.png")
    for name, text in CASES["files"].items():
        (tmp_path / name).write_text(text)

    def fail(*arguments: object, **options: object) -> None:
        raise UserError("not planned")

    monkeypatch.setattr("finesight.ingest.init_operation.plan", fail)


def run(words: list[str]) -> tuple[int, UserError | None]:
    result = CliRunner().invoke(app, words)
    error = result.exception if isinstance(result.exception, UserError) else None
    assert error is not None or isinstance(result.exception, SystemExit | None), result.exception
    return result.exit_code, error


def follow(words: list[str], remedy: Remedy, values: dict[str, str]) -> Iterator[list[str]]:
    """Yield the commands of each alternative in a remedy, with its placeholders replaced."""
    while isinstance(remedy, Step):
        command = shlex.split(format_command(remedy))[1:]
        yield [values.get(word, word) for word in command]
        remedy = remedy.alternative or ""
    for placeholder, value in values.items():
        remedy = remedy.replace(placeholder, value)
    words = [values.get(word, word) for word in words]
    for alternative in re.split("[;,] or ", remedy):
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
            alternatives = [*follow(words, error.remedy, CASES["commands"][command])]
            commands += reversed(alternatives)  # the first one first
        seen.add(str(error))
    assert seen
    assert code == 0, seen


SESSIONS = {"chat", "label", "serve", "studio", "web"}
"""Commands that wait for a person: their words are parsed, and their model is located."""


def run_and_list_steps(words: list[str], file: Path) -> list[Step]:
    """Run a command that must succeed, and return its next steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(OUTCOME_VARIABLE, str(file))
        code = run_command(words)
    outcome = JobOutcome.model_validate_json(file.read_text())
    assert code == 0, f"{words}: {outcome.error}"
    return [Step(one.operation, one.arguments) for one in outcome.next_steps]


def follow_next_steps(words: list[str], values: dict[str, str], file: Path) -> list[str]:
    """Run a command and what it proposes to the end, and return the operations."""
    waiting = [words]
    done: list[list[str]] = []
    while waiting:
        words = waiting.pop(0)
        if words in done:
            continue
        done.append(words)
        if words[0] in SESSIONS:
            command = build_command(words[0], find_operation(words[0]))
            context = command.make_context(words[0], words[1:])
            if "run_or_model" in context.params:
                resolve_model_source(context.params["run_or_model"])
            continue
        steps = run_and_list_steps(words, file)
        found = (shlex.split(format_step(step))[1:] for step in steps)
        # The first step and those after it precede the second one.
        waiting = [[values.get(word, word) for word in command] for command in found] + waiting
    return [one[0] for one in done]


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder with data, a recipe and a run of finesight-tiny in `run`; runs are short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe_template, "choose_duration", lambda *_, **__: {"train.steps": "1"})
    monkeypatch.setattr(recipe_template, "NUM_EVAL_ROWS", 2)
    task = TinyTask(tmp_path / "task")
    tune = {"language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}
    recipe = task.recipe | {"model": "finesight-tiny", "tune": tune, "output_dir": "run"}
    recipe["eval"] = {"metric": "ocr", "max_new_tokens": 4}
    recipe["image"] = {"max_pixels": 1568}
    train = {"epochs": None, "steps": 1, "batch_size": 4, "save_every": None}
    write_recipe(Path("recipe.yaml"), recipe, **train)
    assert run_command(["train", "recipe.yaml"]) == 0
    lines = ["image,text"]
    for n in range(22):
        write_gray_image(Path(f"{n}.png"), gray_level=10 * n)
        lines.append(f"{n}.png,level {n}")
    Path("labels.csv").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize("start", CASES["next_steps"])
@pytest.mark.usefixtures("trained")
def test_next_steps_are_followed_to_their_end(start, tmp_path):
    expected, values = CASES["next_steps"][start]
    operations = follow_next_steps(start.split(), values, tmp_path / "outcome.json")
    assert set(expected.split()) <= {*operations}, operations


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
    assert format_command(Step("train", {"recipe": "a b.yaml"})) == f"{expected} train 'a b.yaml'"
    write_jsonl(tmp_path / "a.jsonl", [{}])
    assert run_command(["train", "a.jsonl"]) == 2
    assert f"{expected} init a.jsonl" in capsys.readouterr().err
