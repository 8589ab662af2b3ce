"""Cards, drivers and torch builds: judged from facts, and from planted files and programs."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from doctoring import codes, exported, only

from finesight.doctor import graphics, packages
from finesight.doctor.child import run
from finesight.doctor.graphics import Card, Graphics, Torch

NONE = packages.Packages({}, (), True)
BARE = Graphics(0, None, None, False, None, "ubuntu", False)
DRIVEN = Graphics(1, "550.54.14", (12, 4), True, None, "ubuntu", False)
H200 = Card("NVIDIA H200", (9, 0), 150 * 10**9, 149 * 10**9, "")
CPU = Torch("2.13.0+cpu", "", None)
CUDA = Torch("2.13.0+cu126", "", "12.6", ("sm_80", "sm_90"), (), (H200,), {})


def judged(seen: Graphics, torch: Torch, **environment: str) -> list[graphics.Finding]:
    return graphics.judge(seen, torch, NONE, environment)


def test_a_sound_card_is_fine() -> None:
    found = judged(DRIVEN, CUDA)
    assert codes(found) == codes(found, "hint") == []
    assert "H200" in only(found, "card").what
    assert "bf16" in only(found, "card").what


def test_a_card_without_a_compiler_is_a_fault_where_triton_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphics.sysconfig, "get_path", lambda name: str(tmp_path))
    assert graphics.gather({"PATH": str(tmp_path)}, tmp_path).unbuilt == (
        "C compiler",
        "Python.h",
    )
    (tmp_path / "Python.h").touch()
    (tmp_path / "clang").touch(mode=0o755)
    assert graphics.gather({"PATH": str(tmp_path)}, tmp_path).unbuilt == ()
    assert graphics.gather({"PATH": "", "CC": "tcc"}, tmp_path).unbuilt == ()
    triton = packages.Installed("triton", "3.7.1", tmp_path)
    bare = replace(DRIVEN, unbuilt=("C compiler",))
    found = graphics.judge(bare, CUDA, replace(NONE, found={"triton": (triton,)}), {})
    assert "apt install gcc" in only(found, "no-compiler").remedy
    assert codes(graphics.judge(bare, CUDA, NONE, {})) == []


def test_no_card_is_no_fault() -> None:
    assert codes(judged(BARE, CPU)) == []


def test_a_card_on_the_bus_without_a_driver_is_found_in_the_system(tmp_path: Path) -> None:
    device = tmp_path / "sys" / "bus" / "pci" / "devices" / "0000:01:00.0"
    sound = device.with_name("0000:01:00.1")
    for path, kind in ((device, "0x030000"), (sound, "0x040300")):
        path.mkdir(parents=True)
        (path / "vendor").write_text("0x10de\n")
        (path / "class").write_text(f"{kind}\n")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "os-release").write_text('NAME="Fedora Linux"\nID=fedora\n')
    seen = graphics.gather({"PATH": str(tmp_path)}, tmp_path)
    assert (seen.on_bus, seen.driver, seen.has_smi) == (1, None, False)
    found = only(judged(replace(seen, driver_cuda=None), CPU), "no-driver")
    assert found.remedy.splitlines() == ["sudo dnf install akmod-nvidia", "sudo reboot"]
    (tmp_path / ".dockerenv").touch()
    seen = graphics.gather({"PATH": str(tmp_path)}, tmp_path)
    found = only(judged(replace(seen, driver_cuda=None), CPU), "no-driver")
    assert "--gpus all" in found.remedy


def test_a_loaded_driver_is_read(tmp_path: Path) -> None:
    about = tmp_path / "proc" / "driver" / "nvidia" / "version"
    about.parent.mkdir(parents=True)
    about.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release\n"
    )
    assert graphics.gather({}, tmp_path).driver == "580.65.06"


@pytest.mark.parametrize(
    ("seen", "torch", "code", "word"),
    [
        (DRIVEN, CPU, "torch-without-cuda", "--torch-backend=auto"),
        (DRIVEN, replace(CUDA, cuda="13.0", cards=()), "driver-old", "--torch-backend=auto"),
        (replace(DRIVEN, driver_cuda=None), replace(CUDA, cards=()), "no-driver", "ubuntu-drivers"),
        (DRIVEN, replace(CUDA, cards=(), unseen=("error 802",)), "card-unreachable", "reboot"),
        (
            DRIVEN,
            replace(CUDA, cards=(replace(H200, capability=(12, 0), problem="no kernel image"),)),
            "torch-wrong-build",
            "--torch-backend=auto",
        ),
        (
            DRIVEN,
            replace(CUDA, cards=(replace(H200, problem="uncorrectable ECC error"),)),
            "card-fails",
            "nvidia-smi",
        ),
    ],
)
def test_what_stands_between_torch_and_a_card(
    seen: Graphics, torch: Torch, code: str, word: str
) -> None:
    found = judged(seen, torch)
    assert codes(found) == [code]
    assert word in only(found, code).remedy


def test_a_variable_that_hides_the_cards_is_unset_by_its_remedy() -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": "-1", "PATH": "/usr/bin:/bin"}
    seen = replace(DRIVEN, visible=graphics.gather(hidden).visible)
    found = only(judged(seen, replace(CUDA, cards=())), "cards-hidden")
    after = exported(found.remedy, hidden)
    assert graphics.gather(after).visible is None


def test_an_old_card_takes_fp16_and_a_crowded_one_is_told() -> None:
    t4 = Card("Tesla T4", (7, 5), 16 * 10**9, 10 * 10**9, "")
    found = judged(replace(DRIVEN, has_smi=False), replace(CUDA, cards=(t4,), kernels=("sm_75",)))
    assert codes(found) == []
    assert "fp16" in only(found, "card").what
    assert codes(found, "hint") == ["card-crowded", "no-smi"]


def test_a_card_that_others_use_is_left_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '4242, python, 90000 MiB'\n")
    smi.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen = graphics.gather({"PATH": str(tmp_path)})
    assert seen.users == ("4242, python, 90000 MiB",)
    taken = replace(H200, free=50 * 10**9)
    around = {"PATH": "/usr/bin:/bin"}
    found = only(judged(seen, replace(CUDA, cards=(taken, H200))), "card-crowded")
    assert "4242, python" in found.what
    assert exported(found.remedy, around)["CUDA_VISIBLE_DEVICES"] == "1"
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert graphics.gather({"PATH": str(tmp_path)}).users == ()


@pytest.mark.parametrize(
    ("kernel", "capability", "runs"),
    [
        ("sm_90", (9, 0), True),
        ("sm_90a", (9, 0), True),
        ("sm_86", (8, 9), True),
        ("sm_86", (8, 0), False),
        ("sm_90", (12, 0), False),
        ("compute_90", (12, 0), True),
        ("sm_120", (12, 0), True),
        ("gfx90a", (9, 0), False),
    ],
)
def test_which_code_runs_on_which_card(
    kernel: str, capability: tuple[int, int], runs: bool
) -> None:
    assert graphics._runs(kernel, capability) is runs


def test_a_torch_that_cannot_be_imported_is_found_and_the_remedy_mends_it(tmp_path: Path) -> None:
    planted = tmp_path / "torch"
    planted.mkdir()
    (planted / "__init__.py").write_text("raise ImportError('libcudart.so.12: no such file')\n")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    torch = graphics.ask_torch({"PYTHONPATH": path})
    assert "libcudart" in torch.problem
    found = only(judged(DRIVEN, torch, PYTHONPATH=path), "torch-broken")
    first = found.remedy.splitlines()[0]
    after = exported(first.partition("#")[0], {"PYTHONPATH": path, "PATH": "/usr/bin:/bin"})
    assert "PYTHONPATH" not in after


FAKE_TORCH = """\
import types, warnings
__version__, version = "2.13.0+cu126", types.SimpleNamespace(cuda="12.6")


class Product:
    def __matmul__(self, other): return self
    def __getitem__(self, place): return self
    def item(self): return 16


def ones(*shape, device):
    if device == "cuda:1":
        raise RuntimeError("CUDA error: no kernel image is available for execution\\nmore")
    return Product()


class cuda:
    is_available = staticmethod(lambda: AVAILABLE or warnings.warn("driver too old") or False)
    get_arch_list = staticmethod(lambda: ["sm_80", "sm_90"])
    device_count = staticmethod(lambda: 2)
    mem_get_info = staticmethod(lambda index: (7, 8))
    get_device_properties = staticmethod(
        lambda index: types.SimpleNamespace(name="X", major=9 + index, minor=0, total_memory=8)
    )
"""


@pytest.mark.parametrize("available", [True, False])
def test_torch_is_asked_about_every_card(tmp_path: Path, available: bool) -> None:
    """By a torch that only looks like one: what a machine with cards answers."""
    (tmp_path / "torch.py").write_text(f"AVAILABLE = {available}\n{FAKE_TORCH}")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    torch = graphics.ask_torch({"PYTHONPATH": path})
    assert (torch.problem, torch.cuda) == ("", "12.6")
    if not available:
        assert (torch.cards, torch.unseen) == ((), ("driver too old",))
        return
    first, second = torch.cards
    assert first == Card("X", (9, 0), 8, 7, "")
    assert second.problem == "CUDA error: no kernel image is available for execution"
    found = judged(DRIVEN, replace(torch, broken={}))
    assert codes(found) == ["torch-wrong-build"]


def test_a_torch_that_hides_the_installed_one_is_found_and_left_behind(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(f"AVAILABLE = False\n{FAKE_TORCH}")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    torch = replace(graphics.ask_torch({"PYTHONPATH": path}), broken={})
    found = only(graphics.judge(BARE, torch, packages.gather(), {}), "shadowed")
    assert str(tmp_path) in found.what
    after = exported(found.remedy, {"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "HOME": "/"})
    assert "PYTHONPATH" not in after


def test_a_process_that_ends_without_a_word_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dies.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    (tmp_path / "hangs.py").write_text("import time\nprint('{}', flush=True)\ntime.sleep(60)\n")
    monkeypatch.syspath_prepend(tmp_path)
    more = {"PYTHONPATH": str(tmp_path)}
    assert "SIGSEGV" in run("dies", [], 30, more).problem
    hung = run("hangs", [], 0.5, more)
    assert "no end" in hung.problem
    assert run("torch_less", [], 30, more).problem.startswith("/")


def test_torch_from_a_foreign_folder_and_damaged_packages_are_told(tmp_path: Path) -> None:
    mine = packages.Installed("torch", "2.13.0", tmp_path / "site-packages")
    installed = packages.Packages({"torch": (mine,)}, (), True)
    torch = replace(
        CPU, file=str(tmp_path / "torch" / "__init__.py"), broken={"PIL": "ImportError: x"}
    )
    found = graphics.judge(BARE, torch, installed, {})
    assert codes(found) == ["shadowed", "package-broken"]
    assert only(found, "package-broken").remedy.endswith("pillow")
    torch = replace(CPU, file=str(tmp_path / "site-packages" / "torch" / "__init__.py"))
    assert codes(graphics.judge(BARE, torch, installed, {})) == []


def test_what_torch_prints_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    card = {"name": "X", "capability": [8, 6], "total": 2, "free": 1, "problem": ""}
    said = {"version": "2", "file": "f", "cuda": "12.8", "kernels": ["sm_86"], "unseen": []}
    line = json.dumps({**said, "cards": [card], "broken": {}})
    ended = graphics.child.Ended(f"a warning\n{line}\n", "")
    monkeypatch.setattr(graphics.child, "run", lambda *_: ended)
    assert graphics.ask_torch().cards == (Card("X", (8, 6), 2, 1, ""),)


def test_cards_are_tried_by_the_names_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert graphics.visible_cards(2) == ["3", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert graphics.visible_cards(2) == ["0", "1"]
