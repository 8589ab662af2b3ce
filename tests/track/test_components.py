"""Tests of trackers as components: light halves, plug-ins, and names in other modules."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from plugin_fixtures import install, write_package

import finesight
from finesight.errors import UserError
from finesight.settings.recipe import recipe_from_dict
from finesight.track.tracker_manager import start_trackers
from finesight.tracker_components import TRACKERS, require_trackers

SOURCE = Path(finesight.__file__).parent
RECIPE = {"model": "m", "data": {"train": "train.jsonl"}, "output_dir": "run"}

WITHOUT_PACKAGES = """
import sys
from finesight.tracker_components import TRACKERS
for name in ("torch", "numpy", "PIL", *TRACKERS):
    sys.modules[name] = None  # an import fails
from finesight.settings.recipe import dump_recipe, recipe_from_dict
recipe = recipe_from_dict(RECIPE | {"track": [*TRACKERS]})
assert [one.kind for one in recipe.track] == [*TRACKERS]
assert recipe_from_dict(recipe.model_dump(mode="json")) == recipe
for name in TRACKERS:
    assert TRACKERS.load_tracker(name)
"""


def test_trackers_and_recipes_import_no_package():
    code = WITHOUT_PACKAGES.replace("RECIPE", repr(RECIPE))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


NAMING_FILES = {"settings/trainer_settings.yaml", "track/tracker_records.py"}
"""Settings of other trainers, and known formats of tokens."""


@pytest.mark.parametrize("name", [one.name for one in TRACKERS.list_built_in()])
def test_no_other_module_names_a_tracker(name):
    own = f"track/trackers/{name}.py"
    word = re.compile(rf"{name}|{TRACKERS[name].title}", re.IGNORECASE)
    found = set()
    for path in SOURCE.rglob("*"):
        is_text = path.suffix in (".py", ".yaml", ".html", ".js", ".j2")
        if is_text and word.search(path.read_text("utf-8")):
            found.add(path.relative_to(SOURCE).as_posix())
    assert found - NAMING_FILES == {own}


TRACKER_CODE = """
from finesight.track.backends import Tracker
from finesight.tracker_components import TrackerComponent

class Plugin:
    class Lines(Tracker):
        telemetry_off_env = {"LINES_REPORTS": "off"}
        def start_run(self, record):
            record.folder.mkdir(parents=True)
            self.file = record.folder / "lines.txt"
            return "started"
        def log_metrics(self, record):
            import os
            self.file.write_text(f"{record.steps[0].values} {os.environ['LINES_REPORTS']}")
        def log_images(self, record): ...
        def send_alert(self, record): ...
        def finish_run(self, record): ...

def check_uri(uri):
    if uri == "broken":
        return 1 / 0
    if uri == "words":
        return "the uri has no colon"
    if not uri.startswith("lines:"):
        return f"lines does not support uri {uri!r}: use lines:NAME"

def component(**arguments):
    lines = {"implementation": "planted:Plugin.Lines"} | arguments
    return TrackerComponent(kind="trackers", name="lines", title="Lines", **lines)

COMPONENT = component(check_uri=check_uri, telemetry_off_env={"LINES_REPORTS": "off"})
"""


def plant(folder: Path, target: str, monkeypatch: pytest.MonkeyPatch, code: str = "") -> None:
    """Install a package with the tracker `lines`, an object of these lines of code."""
    write_package(folder, "planted", {"trackers lines": target}, TRACKER_CODE + code)
    monkeypatch.delitem(sys.modules, "planted", raising=False)
    install(folder, monkeypatch)


@pytest.mark.parametrize("target", ["planted:Plugin.Lines", "planted:COMPONENT"])
def test_class_and_component_of_a_plugin_are_trackers(target, tmp_path, monkeypatch):
    """Plug-ins of version 0.1.0 name the class, which is in a class here."""
    plant(tmp_path / "site", target, monkeypatch)
    recipe = recipe_from_dict(RECIPE | {"track": {"kind": "lines", "uri": "lines:one"}})
    require_trackers(recipe.track)
    messages: list[str] = []
    with start_trackers(recipe, tmp_path / "run", 0, messages.append) as trackers:
        trackers.start_run({})
        trackers.log_metrics(1, {"loss": 2.0})
    assert messages == ["started"]
    logged = (tmp_path / "run" / "track" / "lines" / "lines.txt").read_text()
    assert logged == "{'loss': 2.0} off"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("mine", r"lines does not support uri 'mine'\s[\s\S]*use lines:NAME"),
        ("broken", "ZeroDivisionError"),
        ("words", r"the uri has no colon\s[\s\S]*change uri of the item of track"),
        ("lines:?token=x", "contains a password or token"),
    ],
)
def test_plugin_checks_its_uri(uri, message, tmp_path, monkeypatch):
    plant(tmp_path, "planted:COMPONENT", monkeypatch)
    with pytest.raises(UserError, match=message):
        recipe_from_dict(RECIPE | {"track": {"kind": "lines", "uri": f"{uri}"}})


def test_plugin_needs_a_uri(tmp_path, monkeypatch):
    plant(tmp_path, "planted:tracker", monkeypatch, "tracker = component(needs_uri=True)")
    assert recipe_from_dict(RECIPE | {"track": {"kind": "lines", "uri": "a"}}).track
    with pytest.raises(UserError, match=r"lines needs uri\s[\s\S]*add it to the item of track"):
        recipe_from_dict(RECIPE | {"track": "lines"})


BROKEN = {
    "tracker = Plugin()": "does not implement TrackerComponent",
    "class tracker(Tracker): ...": "does not implement Tracker",
    "tracker = component(implementation='')": "it has no implementation",
    "tracker = component(implementation='planted:Plugin')": "is no subclass of Tracker",
    "tracker = component(implementation='planted:Tracker')": "lacks methods of Tracker",
    "tracker = component(implementation='planted.heavy:Lines')": "ModuleNotFoundError",
    "tracker = component(modes='cloud')": "modes is 'cloud', which has another type",
    "import dataclasses\ntracker = dataclasses.replace(COMPONENT, kind='metrics')": "'metrics'",
    "import dataclasses\ntracker = dataclasses.replace(COMPONENT, name='line')": "named 'line'",
    "from finesight.settings.config import TrainSettings\n"
    "tracker = component(settings=TrainSettings)": "use track.config",
}


@pytest.mark.parametrize("code", BROKEN)
def test_broken_tracker_of_a_plugin_is_a_user_error(code, tmp_path, monkeypatch):
    plant(tmp_path, "planted:tracker", monkeypatch, code)
    recipe = recipe_from_dict(RECIPE | {"track": "lines"})
    with pytest.raises(UserError, match=BROKEN[code]) as caught:
        require_trackers(recipe.track)
    assert "plug-in lines of planted 1.0 (finesight.trackers: planted" in caught.value.where
