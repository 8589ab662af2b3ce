"""Builds wheel and source archive, installs each into an empty environment, and runs the quickstart
there without a network.

`python tools/try_wheel.py [FOLDER]` prints what happened as JSON; FOLDER (new or empty) keeps all
that was made. The dependencies come from the usual index; after that every connection is refused,
by Python in all its processes and, where the system lets it, by the kernel. Exit 1 when something
was refused, tried to connect or failed.
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

SOURCES = (
    *(".ci", ".dockerignore", ".gitignore", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"),
    *("Containerfile", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "README.zh.md"),
    *(
        "SECURITY.md",
        "benchmarks",
        "constraints.txt",
        "docs",
        "examples",
        "pretraining",
        "pyproject.toml",
        "recipes",
    ),
    *("setup.py", "src", "tests", "tools"),
)
"""What a checkout holds; everything else in its folder was made there."""

MADE = (
    *("__pycache__", "*.pyc", "*.egg-info"),
    *("commands.md", "files.md", "*.mo", "*.safetensors"),
)

NO_NETWORK = ("unshare", "--user", "--map-root-user", "--net", "--")
"""Runs a command where there is no network but itself (Linux, unless the system forbids it)."""

GUARD = '''\
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
"""sitecustomize.py, which Python imports when it starts, in child processes too."""

PROBE = """
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
"""What the guard is to refuse and to let pass, tried in a child process."""


@dataclass(frozen=True)
class Archive:
    """A wheel or a source archive: its size, its number of files and the largest of them."""

    name: str
    bytes: int
    files: int
    largest: dict[str, int]


@dataclass(frozen=True)
class Trial:
    """An archive installed and tried: seconds, and what the quickstart printed and returned."""

    archive: str
    install_seconds: float
    package: str
    blocked_by: tuple[str, ...]
    connections_tried: tuple[str, ...]
    quickstart_seconds: float
    exit_code: int
    said: tuple[str, ...]
    result: object

    @property
    def good(self) -> bool:
        return self.exit_code == 0 and not self.connections_tried


def source_files(tree: Path) -> Iterator[Path]:
    """The files of a checkout, relative to it, without what was made from them."""
    for name in SOURCES:
        top = tree / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            inner = path.relative_to(tree)
            made = any(fnmatch(part, pattern) for part in inner.parts for pattern in MADE)
            if path.is_file() and not made:
                yield inner


def build(tree: Path, work: Path) -> tuple[Path, Path]:
    """The source archive of a checkout, and the wheel built from that archive alone, in `work`."""
    copy, out = work / "tree", work / "dist"
    out.mkdir(parents=True)
    for path in source_files(tree):
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tree / path, copy / path)
    sdist = out / hook("build_sdist", copy, out)
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    (unpacked,) = (work / "unpacked").iterdir()
    return sdist, out / hook("build_wheel", unpacked, out)


def hook(name: str, tree: Path, out: Path) -> str:
    """Call setuptools as a build front end does (PEP 517); gives the name of the file it made."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.{name}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=tree, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
    return done.stdout.splitlines()[-1]


def contents(path: Path) -> dict[str, int]:
    """Names and sizes in bytes of the files in a wheel or in a source archive, whose folder is
    left out of the names."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {item.filename: item.file_size for item in wheel.infolist()}
    with tarfile.open(path) as sdist:
        files = [member for member in sdist.getmembers() if member.isfile()]
        return {file.name.partition("/")[2]: file.size for file in files}


def described(path: Path) -> Archive:
    """What an archive holds, in figures."""
    sizes = contents(path)
    largest = dict(sorted(sizes.items(), key=lambda item: -item[1])[:5])
    return Archive(path.name, path.stat().st_size, len(sizes), largest)


def attempt(archive: Path, work: Path) -> Trial:
    """Install an archive into an empty environment below `work`, and run the quickstart there."""
    python = work / "venv" / "bin" / "python"
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", work / "venv"], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", archive], check=True)
    installed = time.monotonic() - start
    offline = Offline(work)
    package, networks = offline.prove(python)
    assert Path(package).is_relative_to(work), f"{package} is not of the new environment"
    start = time.monotonic()
    done = offline.run([python.parent / "finesight", "quickstart", "--json"])
    lines = done.stdout.splitlines()
    return Trial(
        archive=archive.name,
        install_seconds=round(installed, 1),
        package=str(Path(package).relative_to(work)),
        blocked_by=("python", "kernel") if networks == ["lo"] else ("python",),
        connections_tried=offline.tried(),
        quickstart_seconds=round(time.monotonic() - start, 1),
        exit_code=done.returncode,
        said=tuple(done.stderr.splitlines()[-30:]),
        result=json.loads(lines[-1]) if lines and done.returncode == 0 else None,
    )


class Offline:
    """Runs commands without a network, with an empty home and an empty working directory."""

    def __init__(self, work: Path) -> None:
        self.log, self.home, self.guard = work / "refused.txt", work / "home", work / "guard"
        for folder in (self.home, self.guard):
            folder.mkdir()
        (self.guard / "sitecustomize.py").write_text(GUARD)
        there = shutil.which(NO_NETWORK[0]) is not None
        allowed = there and subprocess.run([*NO_NETWORK, "true"], capture_output=True)
        self.prefix = NO_NETWORK if allowed and allowed.returncode == 0 else ()

    def run(self, command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
        """The command's exit code and output."""
        kept = ("PATH", "OMP_NUM_THREADS")
        surroundings = {name: os.environ[name] for name in kept if name in os.environ} | {
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(self.guard),
            "FINESIGHT_REFUSED": str(self.log),
        }
        return subprocess.run(
            [*self.prefix, *command],
            cwd=self.home,
            env=surroundings,
            capture_output=True,
            text=True,
        )

    def prove(self, python: Path) -> tuple[str, list[str]]:
        """See that connections are refused and pairs of sockets are not; gives where finesight lies
        and the names of the networks that there are."""
        script = self.guard / "probe.py"
        script.write_text(PROBE)
        done = self.run([python, script])
        assert done.returncode == 0, f"the probe failed:\n{done.stderr[-2000:]}"
        found = json.loads(done.stdout)
        expected = ["socket.connect", "socket.bind", "socket.getaddrinfo"]
        assert found["refused"] == expected, f"refused were {found['refused']}, not {expected}"
        assert len(self.tried()) == 2 * len(expected), f"the log holds {self.tried()}"
        self.log.unlink()
        return found["package"], found["networks"]

    def tried(self) -> tuple[str, ...]:
        """The connections that were refused."""
        return tuple(self.log.read_text().splitlines()) if self.log.exists() else ()


def main() -> int:
    """Build, install, try; print the figures."""
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as temporary:
        work = (given or Path(temporary)).resolve()
        archives = build(ROOT, work)
        trials = []
        for name, archive in zip(("sdist", "wheel"), archives, strict=True):
            (work / name).mkdir()
            print(f"{archive.name}: installing it and running the quickstart", file=sys.stderr)
            trials.append(attempt(archive, work / name))
        figures = {
            "archives": [asdict(described(path)) for path in archives],
            "trials": [asdict(trial) for trial in trials],
        }
        print(json.dumps(figures, indent=1))
    return 0 if all(trial.good for trial in trials) else 1


if __name__ == "__main__":
    sys.exit(main())
