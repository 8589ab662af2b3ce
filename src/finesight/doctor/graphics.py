"""NVIDIA cards: is there one, has it a driver, and does this torch compute on it?"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finesight.doctor import child
from finesight.doctor.findings import Finding, fault, fine, hint, typed
from finesight.doctor.packages import PIP, Packages

TORCH_SECONDS = 120.0
"""For torch to load, from a cold disk."""

NVIDIA = "0x10de"
"""The maker's number on a PCI bus."""

BF16 = (8, 0)
"""Compute capability from which a card multiplies bf16."""

CROWDED = 0.1
"""Share of a card's memory that others may hold before it is worth a word."""

CUDA_VISIBLE = "CUDA_VISIBLE_DEVICES"

COMPILERS = ("gcc", "clang")
"""That Triton looks for where CC is not set."""


@dataclass(frozen=True, slots=True)
class Graphics:
    """What the system says of cards. `on_bus` counts NVIDIA's, `driver` is the version of the
    loaded kernel module, `driver_cuda` the newest CUDA (major, minor) that its library takes,
    `visible` the variable that hides cards, None where it is not set; `system` is the ID of
    os-release, `contained` whether this is a container, `users` what computes on the cards, as far
    as nvidia-smi sees it, `unbuilt` what is missing for Triton to build its part of a kernel."""

    on_bus: int
    driver: str | None
    driver_cuda: tuple[int, int] | None
    has_smi: bool
    visible: str | None
    system: str
    contained: bool
    users: tuple[str, ...] = ()
    unbuilt: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Card:
    """A card as torch sees it: memory in bytes, `free` None where asking for it failed; `problem`
    what the first product on it ended with."""

    name: str
    capability: tuple[int, int]
    total: int
    free: int | None
    problem: str


@dataclass(frozen=True, slots=True)
class Torch:
    """What torch says: `cuda` is the version that it was built for, None for a CPU build, `file`
    where it was imported from, `kernels` the architectures it has code for, `unseen` its words
    about cards that it does not reach, `broken` packages that cannot be imported. `problem` is what
    importing torch itself ended with; then all else is empty."""

    version: str = ""
    file: str = ""
    cuda: str | None = None
    kernels: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    cards: tuple[Card, ...] = ()
    broken: Mapping[str, str] | None = None
    problem: str = ""


def gather(environment: Mapping[str, str], root: Path = Path("/")) -> Graphics:
    """Look at the bus, the driver and its library. No card is touched."""
    release = root / "etc" / "os-release"
    named = release.read_text(encoding="utf-8") if release.is_file() else ""
    entries = dict(line.split("=", 1) for line in named.splitlines() if "=" in line)
    smi = shutil.which("nvidia-smi", path=environment.get("PATH"))
    return Graphics(
        on_bus=_on_bus(root),
        driver=_driver(root),
        driver_cuda=_driver_cuda(),
        has_smi=smi is not None,
        users=_users(smi) if smi else (),
        visible=environment.get(CUDA_VISIBLE),
        system=entries.get("ID", "").strip('"'),
        contained=(root / ".dockerenv").exists() or (root / "run" / ".containerenv").exists(),
        unbuilt=tuple(_unbuilt(environment)),
    )


def _unbuilt(environment: Mapping[str, str]) -> Iterator[str]:
    path = environment.get("PATH")
    if not environment.get("CC") and not any(shutil.which(cc, path=path) for cc in COMPILERS):
        yield "C compiler"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        yield "Python.h"


def _on_bus(root: Path) -> int:
    devices = root / "sys" / "bus" / "pci" / "devices"
    makers = [path for path in devices.glob("*/vendor") if path.read_text().strip() == NVIDIA]
    # 0x03: a display controller; the same cards have sound, too.
    classes = [path.with_name("class").read_text() for path in makers]
    return sum(name.startswith("0x03") for name in classes)


def _driver(root: Path) -> str | None:
    path = root / "proc" / "driver" / "nvidia" / "version"
    if not path.is_file():
        return None
    words = path.read_text().splitlines()[0].split()
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def _users(smi: str) -> tuple[str, ...]:
    asked = [smi, "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip())


def _driver_cuda() -> tuple[int, int] | None:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int(0)
    if library.cuDriverGetVersion(ctypes.byref(number)) != 0 or not number.value:
        return None
    return number.value // 1000, number.value % 1000 // 10


def ask_torch(more: Mapping[str, str] | None = None) -> Torch:
    """What torch says, in a process of its own."""
    ended = child.run("finesight.doctor.torch_child", [], TORCH_SECONDS, more or {})
    try:
        said: dict[str, Any] = json.loads(ended.printed.splitlines()[-1])
    except (ValueError, IndexError):
        return Torch(problem=ended.problem or "no answer")
    cards = [{**card, "capability": tuple(card["capability"])} for card in said["cards"]]
    return Torch(
        version=said["version"],
        file=said["file"],
        cuda=said["cuda"],
        kernels=tuple(said["kernels"]),
        unseen=tuple(said["unseen"]),
        cards=tuple(Card(**card) for card in cards),
        broken=said["broken"],
    )


def judge(
    graphics: Graphics, torch: Torch, packages: Packages, environment: Mapping[str, str]
) -> list[Finding]:
    """From the import of torch up to the first product on every card: the first thing that is
    wrong explains what comes after it."""
    if torch.problem:
        return [_torch_broken(torch, environment)]
    build = f"CUDA {torch.cuda}" if torch.cuda else "a CPU"
    found = [fine("torch", f"torch {torch.version}, built for {build}")]
    found += [*_shadowed(torch, packages), *_packages_broken(torch)]
    if torch.cards:
        found += [one for index in range(len(torch.cards)) for one in _card(index, graphics, torch)]
        return [*found, *_without_builder(graphics, packages), *_without_smi(graphics)]
    return [*found, _no_card(graphics, torch)]


def _torch_broken(torch: Torch, environment: Mapping[str, str]) -> Finding:
    again = typed(*PIP, "install", "--force-reinstall", "torch")
    borrowed = [name for name in ("PYTHONPATH", "LD_LIBRARY_PATH") if environment.get(name)]
    without = (
        [f"unset {' '.join(borrowed)}   # if that alone helps, leave it so"] if borrowed else []
    )
    return fault(
        "torch-broken",
        f"torch cannot be imported: {torch.problem}",
        why="everything that computes needs it"
        + (f"; {' and '.join(borrowed)} may bring in foreign files" if borrowed else ""),
        remedy="\n".join([*without, again]),
    )


def _shadowed(torch: Torch, packages: Packages) -> Iterator[Finding]:
    """Another torch than the installed one, from a folder that comes before it."""
    installed = packages.found.get("torch")
    if not installed or not torch.file:
        return
    if not Path(torch.file).resolve().is_relative_to(installed[0].folder.resolve()):
        yield fault(
            "shadowed",
            f"torch comes from {torch.file}, not from {installed[0].folder}",
            why="a folder on PYTHONPATH, or the current one, hides the installed package",
            remedy="unset PYTHONPATH; cd ~",
        )


def _packages_broken(torch: Torch) -> Iterator[Finding]:
    for name, problem in (torch.broken or {}).items():
        package = {"PIL": "pillow", "triton.language": "triton"}.get(name, name)
        yield fault(
            "package-broken",
            f"{name} is installed and cannot be imported: {problem}",
            why="its files are damaged, of another version, or hidden by a folder of that name",
            remedy=typed(*PIP, "install", "--force-reinstall", "--no-deps", package),
        )


def _card(index: int, graphics: Graphics, torch: Torch) -> list[Finding]:
    card = torch.cards[index]
    able = ".".join(map(str, card.capability))
    if card.problem:
        return [_not_computing(index, card, torch)]
    bf16 = "bf16" if card.capability >= BF16 else "fp16, as it does not multiply bf16"
    gb = f"{(card.free or 0) / 1e9:.3g} of {card.total / 1e9:.3g} GB free"
    found = [fine("card", f"GPU {index}: {card.name}, {able}, {gb}, computes in {bf16}")]
    taken = 1 - (card.free or 0) / card.total
    if taken > CROWDED:
        found.append(_crowded(index, taken, graphics, torch))
    return found


def _without_builder(graphics: Graphics, packages: Packages) -> Iterator[Finding]:
    """A module in C starts Triton's kernels; it is built when the first of them runs."""
    if not graphics.unbuilt or "triton" not in packages.found:
        return
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    steps = {
        "debian": f"sudo apt install gcc libc6-dev python{version}-dev",
        "ubuntu": f"sudo apt install gcc libc6-dev python{version}-dev",
        "fedora": f"sudo dnf install gcc python{version}-devel",
        "arch": "sudo pacman -S gcc",
    }
    yield fault(
        "no-compiler",
        f"no {' and no '.join(graphics.unbuilt)}: Triton builds with them what starts its kernels",
        why="what computes on a card ends at its first kernel",
        remedy=steps.get(graphics.system, "conda install -c conda-forge c-compiler"),
    )


def _crowded(index: int, taken: float, graphics: Graphics, torch: Torch) -> Finding:
    """A card that others use, and the one with the most free memory in its place."""
    free = [card.free or 0 for card in torch.cards]
    freest = free.index(max(free))
    remedy = f"export {CUDA_VISIBLE}={visible_cards(len(free))[freest]}"
    if freest == index:
        remedy = "nvidia-smi --query-compute-apps=pid,process_name,used_memory --format=csv"
    seen = f" ({'; '.join(graphics.users[:4])})" if graphics.users else ""
    return hint(
        "card-crowded",
        f"GPU {index}: {taken:.0%} of its memory is taken by other programs{seen}",
        why="a run that would fit may be refused, or ends on the way",
        remedy=remedy,
    )


def fitting_torch() -> str:
    """The command that installs the build of torch that the driver takes: uv finds it out."""
    uv = (sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable)
    fit = typed(*uv, "--reinstall-package", "torch", "--torch-backend=auto", "torch>=2.11")
    return f"{typed(*PIP, 'install', 'uv')} && {fit}"


def _not_computing(index: int, card: Card, torch: Torch) -> Finding:
    able = "".join(map(str, card.capability))
    lacks = torch.kernels and not any(_runs(kernel, card.capability) for kernel in torch.kernels)
    if lacks or "no kernel image" in card.problem:
        return fault(
            "torch-wrong-build",
            f"GPU {index}: torch {torch.version} has no code for {card.name} (sm_{able})",
            why=f"it was built for {', '.join(torch.kernels)}",
            remedy=fitting_torch(),
        )
    return fault(
        "card-fails",
        f"GPU {index}: {card.name} does not compute: {card.problem}",
        why="the first product of two small matrices failed",
        remedy=f"nvidia-smi --query-gpu=index,name,ecc.errors.uncorrected.volatile.total,"
        f"memory.used --format=csv --id={index}",
    )


def _runs(kernel: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture (sm_90, sm_90a, compute_90) runs on such a card: machine
    code on its own generation from its number on, intermediate code on all later ones."""
    kind, _, number = kernel.partition("_")
    digits = "".join(filter(str.isdigit, number))
    if not digits:
        return False
    built = int(digits[:-1] or 0), int(digits[-1])
    if kind == "compute":
        return built <= capability
    return built[0] == capability[0] and built <= capability


def _without_smi(graphics: Graphics) -> list[Finding]:
    if graphics.has_smi:
        return []
    return [
        hint(
            "no-smi",
            "nvidia-smi is not on the PATH",
            why="finesight does without; what else runs on a card cannot be seen",
            remedy="ls /usr/bin/nvidia-smi /usr/lib/wsl/lib/nvidia-smi /usr/local/nvidia/bin",
        )
    ]


def _no_card(graphics: Graphics, torch: Torch) -> Finding:
    """Why torch sees none."""
    there = graphics.on_bus or graphics.driver or graphics.driver_cuda
    if not there:
        return fine("no-card", "no NVIDIA card: everything is computed on the CPU, slowly")
    if graphics.driver_cuda is None:
        return _no_driver(graphics)
    driver = f"driver {graphics.driver or '?'} (CUDA {'.'.join(map(str, graphics.driver_cuda))})"
    if torch.cuda is None:
        return fault(
            "torch-without-cuda",
            f"torch {torch.version} is a CPU build, and there is a card with {driver}",
            why="nothing runs on the card",
            remedy=fitting_torch(),
        )
    if graphics.visible is not None:
        return fault(
            "cards-hidden",
            f"{CUDA_VISIBLE} is {graphics.visible!r}, and torch sees no card",
            why="the variable hides all of them, or names one that is not there",
            remedy=f"unset {CUDA_VISIBLE}",
        )
    wanted = tuple(int(number) for number in torch.cuda.split(".")[:2])
    if graphics.driver_cuda[0] < wanted[0]:
        return fault(
            "driver-old",
            f"{driver} is older than torch's CUDA {torch.cuda}",
            why="a driver takes CUDA up to its own major version",
            remedy=fitting_torch(),
        )
    return fault(
        "card-unreachable",
        f"torch sees no card in spite of {driver}: {' '.join(torch.unseen)[:300] or 'no reason'}",
        why="often a driver that was updated and waits for a restart, or a service of several cards"
        " that does not run (nvidia-fabricmanager)",
        remedy="sudo reboot",
    )


_DRIVERS: Mapping[str, Sequence[str]] = {
    "ubuntu": ("sudo ubuntu-drivers install", "sudo reboot"),
    "debian": ("sudo apt install nvidia-driver", "sudo reboot"),
    "fedora": ("sudo dnf install akmod-nvidia", "sudo reboot"),
    "arch": ("sudo pacman -S nvidia", "sudo reboot"),
}
"""By the ID of os-release."""


def _no_driver(graphics: Graphics) -> Finding:
    if graphics.contained:
        return fault(
            "no-driver",
            "an NVIDIA card is on the bus, and its driver's library is not in this container",
            why="torch cannot reach the card",
            remedy="docker run --gpus all IMAGE",
        )
    steps = _DRIVERS.get(graphics.system, ("xdg-open https://www.nvidia.com/drivers",))
    return fault(
        "no-driver",
        f"{max(graphics.on_bus, 1)} NVIDIA card(s), and no driver (libcuda.so.1 is missing)",
        why="torch cannot reach the card",
        remedy="\n".join(steps),
    )


def visible_cards(count: int) -> list[str]:
    """What to set CUDA_VISIBLE_DEVICES to for each card alone, of those that are visible now."""
    named = [name.strip() for name in os.environ.get(CUDA_VISIBLE, "").split(",") if name.strip()]
    return named[:count] if named else [str(index) for index in range(count)]
