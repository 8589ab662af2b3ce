"""What tests of `finesight doctor` plant faults with: environments, packages, and shells."""

import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from finesight.doctor.diagnosis import Diagnosis

ROOT = Path(__file__).parents[1]


def find_diagnosis(findings: Iterable[Diagnosis], code: str) -> Diagnosis:
    (found,) = [one for one in findings if one.code == code]
    return found


def list_codes(findings: Iterable[Diagnosis], severity: str = "error") -> list[str]:
    return [one.code for one in findings if one.severity == severity]


def write_package_metadata(
    site: Path, name: str, version: str, requires: Iterable[str] = (), extras: Iterable[str] = ()
) -> None:
    """The metadata of an installed package, as an installer leaves them."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = _metadata(name, version, requires) + "".join(f"Provides-Extra: {e}\n" for e in extras)
    info.joinpath("METADATA").write_text(lines)
    info.joinpath("INSTALLER").write_text("pip\n")
    names = [f"{info.name}/{file}" for file in ("METADATA", "INSTALLER", "RECORD")]
    info.joinpath("RECORD").write_text("".join(f"{file},,\n" for file in names))


def _metadata(name: str, version: str, requires: Iterable[str]) -> str:
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    return "\n".join([*lines, *(f"Requires-Dist: {text}" for text in requires), ""])


def make_wheel(folder: Path, name: str, version: str) -> None:
    """A package without any file, for pip to install."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    about = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {"METADATA": _metadata(name, version, ()), "WHEEL": about, "RECORD": ""}
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(f"{stem}.dist-info/{file}", text)


class VirtualEnvironment:
    """A virtual environment above that of the tests; `pip` installs from `wheels` alone."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")
        own = [path for path in sys.path if path.endswith("site-packages")]
        # After the environment's own, which it shadows so.
        (self.site / "beside.pth").write_text("\n".join(own) + "\n")
        self.wheels = folder / "wheels"
        self.wheels.mkdir()

    def shell(self, command: str, **more: str) -> subprocess.CompletedProcess[str]:
        """A line typed into a shell, in which `pip` reaches nothing but `wheels`."""
        pip = {"PIP_NO_INDEX": "1", "PIP_NO_CACHE_DIR": "1", "PIP_FIND_LINKS": self.wheels.as_uri()}
        variables = {**os.environ, **pip, "PYTHONPATH": str(ROOT / "src"), **more}
        words, options = ["bash", "-c", command], {"capture_output": True, "text": True}
        return subprocess.run(words, env=variables, cwd=ROOT, **options)


def run_remedy(remedy: str, variables: Mapping[str, str]) -> dict[str, str]:
    """The variables `before`, and what typing the remedy into a shell makes of them."""
    command = ["bash", "-c", f"{remedy} && env -0"]
    output = subprocess.check_output(command, text=True, env=dict(variables))
    pairs = [pair.partition("=") for pair in output.split("\0") if pair]
    return {name: value for name, _, value in pairs if name not in ("_", "SHLVL", "OLDPWD")}
