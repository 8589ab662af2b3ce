"""Conflicting, missing and duplicate packages: detected, and fixed by the remedy."""

from __future__ import annotations

import json
import sys
import tomllib
from dataclasses import replace
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


def run_diagnosis(made: VirtualEnvironment) -> package_check.InstalledPackages:
    """The environment's packages, its own folder before those that it borrows."""
    return package_check.list_packages([str(made.site), *sys.path])


def run_remedy(made: VirtualEnvironment, remedy: str) -> None:
    """The remedy, with the environment's Python in place of this one."""
    done = made.shell(remedy.replace(sys.executable, f"'{made.python}'"))
    assert done.returncode == 0, done.stderr


def test_package_issues_are_found_and_commands_fix_them(
    faulty_environment: VirtualEnvironment, tmp_path: Path
) -> None:
    # A torch that is broken, too, is read more quickly, and hides nothing of the rest.
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.12')\n")
    # Beside the sources, an installation from a checkout leaves metadata of its own.
    (tmp_path / "finesight").symlink_to(ROOT / "src" / "finesight")
    doctor = f"'{faulty_environment.python}' -m finesight doctor --no-smoke-test --json"
    done = faulty_environment.shell(doctor, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "libcudart" in done.stdout
    found = [one for one in json.loads(done.stdout)["diagnoses"] if one["section"] == "packages"]
    errors = [one for one in found if one["severity"] == "error"]
    output = {one["what"].split(" in /")[0] for one in errors}
    assert output == {
        "safetensors 0.5.0 is installed",
        "planted-piece is not installed",
        "planted-missing is not installed",
        "planted-twice is installed twice",
    }
    assert any("~orch" in one["what"] for one in found if one["severity"] == "warning")
    for one in found:
        assert str(faulty_environment.python) in one["remedy"] or one["code"] == "leftovers"
        done = faulty_environment.shell(one["remedy"])
        assert done.returncode == 0, done.stderr
    after = run_diagnosis(faulty_environment)
    assert list_codes(package_check.check_packages(after)) == []
    assert after.leftovers == ()
    # Within the bounds of both who require it: not the newest there is.
    assert after.get_version("planted-piece") == "2.5"


def test_requirement_of_extra_is_a_hint(tmp_path: Path) -> None:
    write_package_metadata(tmp_path, "finesight", "0.1.0", ['planted>=2; extra == "quant"'])
    about = tmp_path / "finesight-0.1.0.dist-info" / "METADATA"
    about.write_text(about.read_text().rstrip() + "\nProvides-Extra: quant\n")
    write_package_metadata(tmp_path, "planted", "1.0")
    found = package_check.check_packages(package_check.list_packages([str(tmp_path)]))
    assert list_codes(found) == []
    assert find_diagnosis(found, "version-conflict").severity == "warning"


def test_extras_describe_features_and_missing_packages(tmp_path: Path) -> None:
    write_package_metadata(tmp_path, "finesight", "0.1.0", ['bitsandbytes>=0.50; extra == "quant"'])
    about = tmp_path / "finesight-0.1.0.dist-info" / "METADATA"
    about.write_text(about.read_text().rstrip() + "\nProvides-Extra: quant\n")
    lacking = package_check.list_packages([str(tmp_path)])
    found = find_diagnosis(package_check.check_extras(lacking), "extra-missing")
    assert "4 bits" in found.what
    assert "bitsandbytes" in found.why
    assert found.remedy.endswith("-m pip install 'finesight[quant]'")
    write_package_metadata(tmp_path, "bitsandbytes", "0.50.2")
    there = list(package_check.check_extras(package_check.list_packages([str(tmp_path)])))
    assert find_diagnosis(there, "extra").severity == "ok"
    # The planted metadata know of one extra only.
    assert "serve" in find_diagnosis(there, "metadata-outdated").what


def test_every_user_extra_has_a_description() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*package_check.EXTRA_DESCRIPTIONS, *package_check.DEV_EXTRAS} == {
        *project["optional-dependencies"]
    }


def test_managed_system_python_is_reported(tmp_path: Path) -> None:
    found = package_check.check_packages(
        replace(package_check.list_packages([str(tmp_path)]), is_managed=True, has_pip=False)
    )
    assert "venv" in find_diagnosis(found, "python-managed").remedy
    assert find_diagnosis(found, "no-pip").remedy.endswith("-m ensurepip")


def test_user_files_are_no_leftovers(tmp_path: Path) -> None:
    for folder in ("work", "site-packages"):
        (tmp_path / folder / "~mine").mkdir(parents=True)
    found = package_check.list_packages([str(tmp_path / "work"), str(tmp_path / "site-packages")])
    assert found.leftovers == (tmp_path / "site-packages" / "~mine",)


def test_uninstalled_sources_are_reported(tmp_path: Path) -> None:
    found = package_check.check_packages(package_check.list_packages([str(tmp_path)]))
    assert find_diagnosis(found, "not-installed").severity == "warning"
