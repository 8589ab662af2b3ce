"""Tests of launchers as components: plug-ins, help, and no other module knows their names."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from plugin_fixtures import install, write_package

import finesight
from finesight import api
from finesight.errors import UserError
from finesight.launch.launch_operations import launch
from finesight.launch.launcher_component import COMMON_OPTIONS, LAUNCHERS
from finesight.operations.operation import list_parameters

SOURCE = Path(finesight.__file__).parent

WITHOUT_HEAVY_PACKAGES = """
import sys
for name in ("torch", "numpy", "transformers", "PIL", "jinja2", "yaml"):
    sys.modules[name] = None  # an import fails
from finesight.cli.app import run_command
assert run_command(["launch", "--help"]) == 0
"""

COMPONENT = """
from finesight.launch.launcher_component import LauncherComponent, LauncherOption

def build(job, options):
    return f"{job.name} {job.python_arguments} {dict(options)}\\n"

VALUES = dict(
    kind="launchers",
    name="batch",
    title="Batch",
    build=build,
    file_suffix=".batch",
    command=("submit-batch", "--file"),
    options={
        "account": LauncherOption(help="project."),
        "max_cost": LauncherOption(help="limit."),
        "hold": LauncherOption(help="wait for a release.", is_flag=True),
    },
)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with a recipe, and forget the options of plug-ins before and after."""
    monkeypatch.chdir(tmp_path)
    text = "model: some/model\ndata: {train: a.jsonl}\noutput_dir: runs/first\n"
    (tmp_path / "recipe.yaml").write_text(text)
    monkeypatch.delitem(sys.modules, "batch", raising=False)
    list_parameters.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    list_parameters.cache_clear()


def install_launcher(folder: Path, monkeypatch: pytest.MonkeyPatch, change: str = "") -> None:
    code = f"{COMPONENT}\n{change}\nCOMPONENT = LauncherComponent(**VALUES)\n"
    write_package(folder / "site", "batch", {"launchers batch": "batch:COMPONENT"}, code)
    install(folder / "site", monkeypatch)


def test_help_needs_no_heavy_packages():
    command = [sys.executable, "-c", WITHOUT_HEAVY_PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for launcher in LAUNCHERS.list_built_in():
        assert f"NAME{launcher.file_suffix} ({launcher.name})" in " ".join(done.stdout.split())


def test_common_options_are_those_of_the_command():
    parameters = {*inspect.signature(launch).parameters}
    assert parameters | {"on", "json", "as_json", "help"} == COMMON_OPTIONS


def test_package_adds_a_launcher(folder, monkeypatch, cli):
    install_launcher(folder, monkeypatch)
    words = ("launch", "recipe.yaml", "--on", "batch", "--account", "me", "--max-cost", "5")
    assert cli(*words).out == "first.batch\nstart with: submit-batch --file first.batch\n"
    text = "first -m finesight train recipe.yaml --resume {'account': 'me', 'max_cost': '5'}\n"
    assert Path("first.batch").read_text() == text
    api.launch("recipe.yaml", engine="batch", max_cost="5", out="second.batch")
    assert "{'max_cost': '5'}" in Path("second.batch").read_text()

    shown = " ".join(cli("launch", "--help").out.split())
    assert "slurm: account to charge. Default: of the cluster. batch: project." in shown
    assert "--max-cost TEXT batch: limit." in shown
    assert "or NAME.batch (batch)." in shown
    assert "or submit-batch (batch)." in shown
    assert "use --on batch" in cli("launch", "recipe.yaml", "--on", "bach", code=2).err
    assert "invalid name 'a b'" in cli(*words[:-1], "a b", code=2).err
    assert (
        "--max-cost is given with --on slurm"
        in cli(*("launch", "recipe.yaml", "--on", "slurm", "--max-cost", "5"), code=2).err
    )
    with pytest.raises(UserError, match="has the value 'no'"):
        api.launch("recipe.yaml", engine="batch", out="third.batch", hold="no")
    assert "a job in Batch is fixed" in cli(*words[:4], "--nodes", "1:2", code=2).err


BROKEN = {
    "raise SystemExit(3)": "SystemExit: 3",
    "import absent": "ModuleNotFoundError",
    "LauncherComponent = dict": "does not implement LauncherComponent",
    "VALUES['name'] = 'other'": "the launcher is named 'other', its entry point 'batch'",
    "VALUES['kind'] = 'objectives'": "its kind is 'objectives' instead of 'launchers'",
    "VALUES['file_suffix'] = '/../x'": "file_suffix is '/../x'",
    "VALUES['command'] = 'sbatch'": "command is 'sbatch' instead of a tuple",
    "VALUES['options'] = {'a-b': LauncherOption(help='')}": "the name 'a-b' of an option",
    "VALUES['options'] = {'nodes': LauncherOption(help='')}": "nodes is one of all launchers",
    "VALUES['options'] = {'x': 'text'}": "the option x is 'text', no LauncherOption",
    "VALUES['options'] = {'x': LauncherOption(help='', format=None)}": "or no NameFormat",
    "VALUES['command'] = (1,)": "command has other items than words",
    "VALUES['build'] = lambda job, options: 1 / 0": "ZeroDivisionError",
    "VALUES['build'] = lambda job, options: None": "returns None instead of a text",
}


@pytest.mark.parametrize("change", BROKEN)
def test_broken_launcher_is_a_user_error(change, folder, monkeypatch, cli):
    """Others are unaffected."""
    install_launcher(folder, monkeypatch, change)
    text = cli("launch", "recipe.yaml", "--on", "batch", code=2).text
    assert BROKEN[change] in text
    assert "plug-in batch of batch 1.0 (finesight.launchers: " in text
    assert not Path("first.batch").exists()
    cli("launch", "recipe.yaml")
    cli("launch", "--help")


def test_name_of_a_built_in_launcher_is_reported(folder, monkeypatch, cli):
    write_package(folder / "site", "batch", {"launchers slurm": "batch:COMPONENT"}, COMPONENT)
    install(folder / "site", monkeypatch)
    text = cli("launch", "recipe.yaml", "--on", "slurm", code=2).text
    assert "several packages define it: finesight, batch 1.0" in text
    cli("launch", "recipe.yaml")


def test_no_other_module_names_a_launcher():
    """torchrun is also the program that starts several ranks on one machine."""
    names = [one.name for one in LAUNCHERS.list_built_in() if one.has_queue]
    assert names
    pattern = re.compile("|".join(names), re.IGNORECASE)
    for path in sorted(SOURCE.rglob("*")):
        name = path.relative_to(SOURCE).as_posix()
        if path.suffix in (".py", ".sh", ".j2", ".yaml") and "launch/launchers/" not in name:
            assert not pattern.search(path.read_text("utf-8")), name
