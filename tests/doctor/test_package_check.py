"""Conflicting, missing and duplicate packages: detected, and fixed by the remedy."""

import json
import sys
import tomllib
from pathlib import Path

import pytest
from doctor_fixtures import (
    ROOT,
    VirtualEnvironment,
    find_diagnosis,
    list_codes,
    make_wheel,
    write_package_metadata,
)

from finesight.doctor import package_check
from finesight.doctor.diagnosis import load_catalog
from finesight.tracker_components import TRACKERS

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
def faulty_environment(tmp_path_factory: pytest.TempPathFactory) -> VirtualEnvironment:
    """Create an environment with four package issues, and the wheels that fix them."""
    made = VirtualEnvironment(tmp_path_factory.mktemp("env") / "with space")
    write_package_metadata(made.site, "finesight", "0.1.0", REQUIRES)
    write_package_metadata(made.site, "safetensors", "0.5.0")
    write_package_metadata(made.site, "planted-twice", "1.9")
    write_package_metadata(made.site, "planted-twice", "2.1")
    write_package_metadata(made.site, "planted-host", "1.0", ["planted-piece<3", "planted-missing"])
    for name, version in (
        ("safetensors", "0.8.0"),
        ("planted-piece", "2.5"),
        ("planted-piece", "3.5"),
        ("planted-twice", "2.1"),
        ("planted-missing", "1.0"),
    ):
        make_wheel(made.wheels, name, version)
    return made


def test_package_issues_are_found_and_commands_fix_them(faulty_environment, tmp_path):
    # A torch that is broken, too, is read more quickly, and hides nothing of the rest.
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.12')\n")
    # Beside the sources, an installation from a checkout leaves metadata of its own.
    (tmp_path / "finesight").symlink_to(ROOT / "src" / "finesight")
    doctor = f"'{faulty_environment.python}' -m finesight doctor --json"
    done = faulty_environment.shell(doctor, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "libcudart" in done.stdout
    found = [one for one in json.loads(done.stdout)["diagnoses"] if one["section"] == "packages"]
    errors = [one for one in found if one["severity"] == "error"]
    assert {one["what"] for one in errors} == {
        "safetensors 0.5.0 is installed",
        "planted-piece is not installed",
        "planted-missing is not installed",
        "planted-twice is installed twice",
    }
    for one in found:
        assert str(faulty_environment.python) in one["remedy"]
        done = faulty_environment.shell(one["remedy"])
        assert done.returncode == 0, done.stderr
    after = package_check.list_packages([str(faulty_environment.site), *sys.path])
    assert list_codes(package_check.check_packages(after)) == []
    # Within the bounds of both who require it: not the newest there is.
    assert after["planted-piece"][0].version == "2.5"


def test_requirement_of_extra_is_a_hint(tmp_path: Path) -> None:
    requires = ['planted>=2; extra == "quant"', 'bitsandbytes>=0.50; extra == "quant"']
    write_package_metadata(tmp_path, "finesight", "0.1.0", requires, ["quant", "dev"])
    write_package_metadata(tmp_path, "planted", "1.0")
    packages = package_check.list_packages([str(tmp_path)])
    found = package_check.check_packages(packages)
    assert list_codes(found) == []
    assert find_diagnosis(found, "version-conflict").severity == "warning"
    (missing,) = package_check.check_extras(packages)
    assert "4 bits" in missing.what
    assert "bitsandbytes" in missing.why
    assert missing.remedy.endswith("-m pip install 'finesight[quant]'")
    write_package_metadata(tmp_path, "bitsandbytes", "0.50.2")
    (there,) = package_check.check_extras(package_check.list_packages([str(tmp_path)]))
    assert (there.code, there.severity) == ("extra", "ok")
    entries = tmp_path.glob("planted-1.0.dist-info")
    (next(entries) / "entry_points.txt").write_text("[finesight.metrics]\nscore = a:b\n")
    plugin, _ = package_check.check_extras(package_check.list_packages([str(tmp_path)]))
    assert plugin.what == "plug-in score (finesight.metrics): planted 1.0"


def test_every_user_extra_has_a_description() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    described = {code[6:] for code in load_catalog() if code.startswith("extra.")}
    described |= {one.extra for one in TRACKERS.list_built_in()}
    assert {*described, "dev"} == {*project["optional-dependencies"]}


def test_uninstalled_sources_are_reported(tmp_path: Path) -> None:
    found = package_check.check_packages(package_check.list_packages([str(tmp_path)]))
    assert find_diagnosis(found, "not-installed").severity == "warning"
