"""Fake tracker packages with faults, found before the real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

SWANLAB_SOURCE = '''
"""Like SwanLab, as far as a run needs it; `broken` is called at every figure."""
import os, sys, threading, types

calls = 0
def broken():
    {fault}

class Run:
    id, mode, dir = "fake", "offline", __import__("pathlib").Path("run-fake")
    def log(self, data, step=None):
        global calls
        calls += 1
        broken()
    def finish(self, state="success", error=None):
        open("finished-" + state, "x").close()

class Settings:
    Probe = Terminal = staticmethod(lambda **given: given)
    api_key, mode = None, "online"
    integration = types.SimpleNamespace(webhook=types.SimpleNamespace(url=""))
    def __init__(self, **given):
        pass

def init(**given):
    return Run()
Image = Text = lambda *given, **named: given
'''

FAULT_CODE = {
    "raises": "if calls == 3: raise ConnectionError('planted: the server is gone')",
    "hangs": "threading.Event().wait()",
    "dies": "if calls == 3: os._exit(9)",
    "crashes": "if calls == 3: os.kill(os.getpid(), 11)",
}


def install_broken_tracker(monkeypatch: pytest.MonkeyPatch, folder: Path, fault: str) -> None:
    """Install a faulty `swanlab` package for this process and its children."""
    package = folder / f"{fault}-packages"
    package.mkdir()
    (package / "swanlab.py").write_text(SWANLAB_SOURCE.format(fault=FAULT_CODE[fault]))
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.setenv("PYTHONPATH", str(package), prepend=":")


def make_unimportable(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> None:
    """Install a package whose dependency is missing."""
    package = folder / f"{name}-broken"
    package.mkdir()
    (package / f"{name}.py").write_text("import a_library_that_has_gone\n")
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.setenv("PYTHONPATH", str(package), prepend=":")
