"""Packages that clash, are missing or there twice: planted into an environment, found, mended."""

from __future__ import annotations

import json
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from doctoring import ROOT, Environment, codes, make_wheel, only, plant_package

from finesight.doctor import extras, packages

REQUIRES = (
    "safetensors>=0.7",
    "planted-piece>=1.0",
    "planted-twice>=2",
    "planted-host",
    'bitsandbytes>=0.50; extra == "quant"',
    'pytest>=999; extra == "dev"',
    'planted-other>=1; sys_platform == "plan9"',
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with four faults of packages, and the wheels that mend them."""
    made = Environment(tmp_path_factory.mktemp("env") / "with space")
    plant_package(made.site, "finesight", "0.1.0", REQUIRES)
    plant_package(made.site, "safetensors", "0.5.0")
    plant_package(made.site, "planted-twice", "1.9")
    plant_package(made.site, "planted-twice", "2.1")
    plant_package(made.site, "planted-host", "1.0", ["planted-piece<3", "planted-missing"])
    (made.site / "~orch-2.0.dist-info").mkdir()
    for name, version in (
        ("safetensors", "0.8.0"),
        ("planted-piece", "2.5"),
        ("planted-piece", "3.5"),
        ("planted-twice", "2.1"),
        ("planted-missing", "1.0"),
    ):
        make_wheel(made.wheels, name, version)
    return made


def looked(made: Environment) -> packages.Packages:
    """The environment's packages, its own folder before those that it borrows."""
    return packages.gather([str(made.site), *sys.path])


def mended(made: Environment, remedy: str) -> None:
    """The remedy, with the environment's Python in place of this one."""
    done = made.shell(remedy.replace(sys.executable, f"'{made.python}'"))
    assert done.returncode == 0, done.stderr


def test_every_planted_fault_is_found_and_the_printed_commands_mend_it(
    planted: Environment, tmp_path: Path
) -> None:
    # A torch that is broken, too, is read more quickly, and hides nothing of the rest.
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.12')\n")
    # Beside the sources, an installation from a checkout leaves metadata of its own.
    (tmp_path / "finesight").symlink_to(ROOT / "src" / "finesight")
    doctor = f"'{planted.python}' -m finesight doctor --no-trial --json"
    done = planted.shell(doctor, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "libcudart" in done.stdout
    found = [one for one in json.loads(done.stdout)["findings"] if one["section"] == "packages"]
    faults = [one for one in found if one["severity"] == "fault"]
    said = {one["what"].split(" in /")[0] for one in faults}
    assert said == {
        "safetensors 0.5.0 is installed",
        "planted-piece is not installed",
        "planted-missing is not installed",
        "planted-twice is installed twice",
    }
    assert any("~orch" in one["what"] for one in found if one["severity"] == "hint")
    for one in found:
        assert str(planted.python) in one["remedy"] or one["code"] == "leftovers"
        done = planted.shell(one["remedy"])
        assert done.returncode == 0, done.stderr
    after = looked(planted)
    assert codes(packages.judge(after)) == []
    assert after.leftovers == ()
    # Within the bounds of both who require it: not the newest there is.
    assert after.version("planted-piece") == "2.5"


def test_what_only_an_extra_needs_is_a_hint(tmp_path: Path) -> None:
    plant_package(tmp_path, "finesight", "0.1.0", ['planted>=2; extra == "quant"'])
    about = tmp_path / "finesight-0.1.0.dist-info" / "METADATA"
    about.write_text(about.read_text().rstrip() + "\nProvides-Extra: quant\n")
    plant_package(tmp_path, "planted", "1.0")
    found = packages.judge(packages.gather([str(tmp_path)]))
    assert codes(found) == []
    assert only(found, "version-clash").severity == "hint"


def test_extras_say_what_they_give_and_what_they_lack(tmp_path: Path) -> None:
    plant_package(tmp_path, "finesight", "0.1.0", ['bitsandbytes>=0.50; extra == "quant"'])
    about = tmp_path / "finesight-0.1.0.dist-info" / "METADATA"
    about.write_text(about.read_text().rstrip() + "\nProvides-Extra: quant\n")
    lacking = packages.gather([str(tmp_path)])
    found = only(extras.judge(lacking), "extra-missing")
    assert "four bits" in found.what
    assert "bitsandbytes" in found.why
    assert found.remedy.endswith("-m pip install 'finesight[quant]'")
    plant_package(tmp_path, "bitsandbytes", "0.50.2")
    there = extras.judge(packages.gather([str(tmp_path)]))
    assert only(there, "extra").severity == "fine"
    # The planted metadata know of one extra only.
    assert "serve" in only(there, "metadata-old").what


def test_every_extra_for_users_has_its_words() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*extras.GIVES, *packages.NOT_FOR_USERS} == {*project["optional-dependencies"]}


def test_a_python_of_the_system_is_told(tmp_path: Path) -> None:
    found = packages.judge(replace(packages.gather([str(tmp_path)]), managed=True, pip=False))
    assert "venv" in only(found, "python-managed").remedy
    assert only(found, "no-pip").remedy.endswith("-m ensurepip")


def test_files_of_the_user_are_no_leftovers(tmp_path: Path) -> None:
    for folder in ("work", "site-packages"):
        (tmp_path / folder / "~mine").mkdir(parents=True)
    found = packages.gather([str(tmp_path / "work"), str(tmp_path / "site-packages")])
    assert found.leftovers == (tmp_path / "site-packages" / "~mine",)


def test_sources_that_are_not_installed_are_told(tmp_path: Path) -> None:
    found = packages.judge(packages.gather([str(tmp_path)]))
    assert only(found, "not-installed").severity == "hint"
