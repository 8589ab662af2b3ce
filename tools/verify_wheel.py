"""Verify wheel and source archive: build, install and run the quickstart offline.

`python tools/verify_wheel.py [FOLDER]` prints the results as JSON. FOLDER (new or empty) receives
all files. Each archive is installed into an empty virtual environment, with dependencies from the
package index. The quickstart then runs without a network: an audit hook blocks connections in all
Python processes, and a network namespace blocks them in the kernel if available. The exit code is 1
if the quickstart fails or a connection was attempted.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SOURCE_PATTERNS = (
    ".ci",
    ".dockerignore",
    ".github",
    ".gitignore",
    ".oxfmtrc.json",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "Containerfile",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "README.zh.md",
    "SECURITY.md",
    "benchmarks",
    "constraints.txt",
    "docs",
    "examples",
    "pretraining",
    "pyproject.toml",
    "recipes",
    "setup.py",
    "src",
    "tests",
    "tools",
)
"""Files and folders of a checkout. Other files are generated."""

GENERATED_PATTERNS = (
    *("__pycache__", "*.pyc", "*.egg-info"),
    *("commands.md", "files.md", "*.mo", "*.safetensors"),
)

UNSHARE_COMMAND = ("unshare", "--user", "--map-root-user", "--net", "--")
"""Command prefix that runs a command in a new network namespace (Linux, if permitted)."""

NETWORK_GUARD = '''\
"""Refuses every connection but those within the machine's own file system, and notes them."""
import os
import socket
import sys

REFUSED = ("connect", "bind", "getaddrinfo", "gethostbyname", "gethostbyaddr", "sendto", "sendmsg")


def refuse(event, arguments):
    area, _, call = event.partition(".")
    if area != "socket" or call not in REFUSED:
        return
    first = arguments[0]
    if isinstance(first, socket.SocketType) and first.family == socket.AF_UNIX:
        return
    with open(os.environ["FINESIGHT_REFUSED"], "a") as log:
        log.write(f"{event} {[a for a in arguments if not isinstance(a, socket.SocketType)]}\\n")
    raise PermissionError(f"{event} is refused: there is no network")


sys.addaudithook(refuse)
'''
"""Text of sitecustomize.py, which every Python process imports at startup."""

NETWORK_PROBE = """
import json, socket, subprocess, sys, finesight
refused = []
for call in (lambda: socket.socket().connect(("127.0.0.1", 9)),
             lambda: socket.socket().bind(("127.0.0.1", 0)),
             lambda: socket.getaddrinfo("localhost", 80)):
    try:
        call()
    except PermissionError as error:
        refused.append(str(error).split()[0])
one, other = socket.socketpair()
one.send(b"x")
assert other.recv(1) == b"x", "a pair of sockets does not speak"
if len(sys.argv) == 1:
    subprocess.run([sys.executable, __file__, "child"], check=True)
else:
    names = [name for _, name in socket.if_nameindex()]
    print(json.dumps({"refused": refused, "networks": names, "package": finesight.__file__}))
"""
"""Program that checks the guard in a parent and a child process."""


@dataclass(frozen=True)
class ArchiveInfo:
    """Size and contents of a wheel or source archive."""

    name: str
    num_bytes: int
    num_files: int
    largest_files: dict[str, int]


@dataclass(frozen=True)
class InstallResult:
    """Result of installing an archive and running the quickstart."""

    archive: str
    install_seconds: float
    package: str
    blocked_by: tuple[str, ...]
    refused_connections: tuple[str, ...]
    quickstart_seconds: float
    exit_code: int
    output: tuple[str, ...]
    result: object

    @property
    def is_ok(self) -> bool:
        return self.exit_code == 0 and not self.refused_connections


def source_files(tree: Path) -> Iterator[Path]:
    """Yield the source files of a checkout, relative to it, without generated files."""
    for name in SOURCE_PATTERNS:
        top = tree / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            inner = path.relative_to(tree)
            made = any(
                fnmatch(part, pattern) for part in inner.parts for pattern in GENERATED_PATTERNS
            )
            if path.is_file() and not made:
                yield inner


def build_archives(tree: Path, work: Path) -> tuple[Path, Path]:
    """Build the source archive of a checkout in `work`, and the wheel from that archive."""
    copy, out = work / "tree", work / "dist"
    out.mkdir(parents=True)
    for path in source_files(tree):
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tree / path, copy / path)
    sdist = out / call_build_hook("build_sdist", copy, out)
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    (unpacked,) = (work / "unpacked").iterdir()
    return sdist, out / call_build_hook("build_wheel", unpacked, out)


def call_build_hook(name: str, tree: Path, out: Path) -> str:
    """Call a setuptools build hook as a build front end does (PEP 517). Returns the file name."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.{name}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=tree, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
    return done.stdout.splitlines()[-1]


def list_contents(path: Path) -> dict[str, int]:
    """Return names and sizes of the files in an archive, without the top folder of a source
    archive."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {item.filename: item.file_size for item in wheel.infolist()}
    with tarfile.open(path) as sdist:
        files = [member for member in sdist.getmembers() if member.isfile()]
        return {file.name.partition("/")[2]: file.size for file in files}


def describe_archive(path: Path) -> ArchiveInfo:
    """Describe the contents of an archive."""
    sizes = list_contents(path)
    largest = dict(sorted(sizes.items(), key=lambda item: -item[1])[:5])
    return ArchiveInfo(path.name, path.stat().st_size, len(sizes), largest)


def install_and_run(archive: Path, work: Path) -> InstallResult:
    """Install an archive into a new virtual environment below `work` and run the quickstart."""
    python = work / "venv" / "bin" / "python"
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", work / "venv"], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", archive], check=True)
    installed = time.monotonic() - start
    offline = OfflineRunner(work)
    package, networks = offline.verify_isolation(python)
    assert Path(package).is_relative_to(work), f"{package} is not of the new environment"
    start = time.monotonic()
    done = offline.run([python.parent / "finesight", "quickstart", "--json"])
    lines = done.stdout.splitlines()
    return InstallResult(
        archive=archive.name,
        install_seconds=round(installed, 1),
        package=str(Path(package).relative_to(work)),
        blocked_by=("python", "kernel") if networks == ["lo"] else ("python",),
        refused_connections=offline.refused_connections(),
        quickstart_seconds=round(time.monotonic() - start, 1),
        exit_code=done.returncode,
        output=tuple(done.stderr.splitlines()[-30:]),
        result=json.loads(lines[-1]) if lines and done.returncode == 0 else None,
    )


class OfflineRunner:
    """Runs commands without a network, with an empty home and working directory."""

    def __init__(self, work: Path) -> None:
        self.log, self.home, self.guard_dir = work / "refused.txt", work / "home", work / "guard"
        for folder in (self.home, self.guard_dir):
            folder.mkdir()
        (self.guard_dir / "sitecustomize.py").write_text(NETWORK_GUARD)
        there = shutil.which(UNSHARE_COMMAND[0]) is not None
        allowed = there and subprocess.run([*UNSHARE_COMMAND, "true"], capture_output=True)
        self.prefix = UNSHARE_COMMAND if allowed and allowed.returncode == 0 else ()

    def run(self, command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
        """Run a command offline and return exit code and output."""
        inherited_vars = ("PATH", "OMP_NUM_THREADS")
        surroundings = {name: os.environ[name] for name in inherited_vars if name in os.environ} | {
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(self.guard_dir),
            "FINESIGHT_REFUSED": str(self.log),
        }
        return subprocess.run(
            [*self.prefix, *command],
            cwd=self.home,
            env=surroundings,
            capture_output=True,
            text=True,
        )

    def verify_isolation(self, python: Path) -> tuple[str, list[str]]:
        """Check that connections are refused and socket pairs work.

        Returns the path of the finesight package and the names of the network interfaces.
        """
        script = self.guard_dir / "probe.py"
        script.write_text(NETWORK_PROBE)
        done = self.run([python, script])
        assert done.returncode == 0, f"the probe failed:\n{done.stderr[-2000:]}"
        found = json.loads(done.stdout)
        expected = ["socket.connect", "socket.bind", "socket.getaddrinfo"]
        assert found["refused"] == expected, f"refused were {found['refused']}, not {expected}"
        assert len(self.refused_connections()) == 2 * len(expected), (
            f"the log holds {self.refused_connections()}"
        )
        self.log.unlink()
        return found["package"], found["networks"]

    def refused_connections(self) -> tuple[str, ...]:
        """Return the refused connection attempts."""
        return tuple(self.log.read_text().splitlines()) if self.log.exists() else ()


def main() -> int:
    """Build, install and run all archives; print the results."""
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as temporary:
        work = (given or Path(temporary)).resolve()
        archives = build_archives(ROOT, work)
        trials = []
        for name, archive in zip(("sdist", "wheel"), archives, strict=True):
            (work / name).mkdir()
            print(f"{archive.name}: installing it and running the quickstart", file=sys.stderr)
            trials.append(install_and_run(archive, work / name))
        figures = {
            "archives": [asdict(describe_archive(path)) for path in archives],
            "trials": [asdict(trial) for trial in trials],
        }
        print(json.dumps(figures, indent=1))
    return 0 if all(trial.is_ok for trial in trials) else 1


if __name__ == "__main__":
    sys.exit(main())
