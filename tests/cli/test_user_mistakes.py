"""Tests of frequent mistakes of users and damaged files: one message each, which names the fix.

Each case runs a command line in a workspace with images, a table, data, a recipe and a run.
"""

import contextlib
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from case_files import load_cases
from PIL import Image
from tiny_model import create_tiny_model
from tiny_task import make_task

from finesight.cli.app import run_command
from finesight.files import storage
from finesight.label.label_store import JOURNAL_FILE
from finesight.plan import run_plan, step_time
from finesight.train import setup
from finesight.train.run_dir import RunDir

pillow_heif = pytest.importorskip("pillow_heif", reason="the package pillow-heif is not installed")

MISTAKES = load_cases("user_mistakes")
FILES = MISTAKES.pop("files")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Create the workspace, and make it the working directory."""
    folder = tmp_path_factory.mktemp("workspace")
    with contextlib.chdir(folder):
        for name in ("photos", "pairs", "moved", "empty"):
            Path(name).mkdir()
        for n in range(4):
            Image.new("RGB", (56, 56), (60 * n, 0, 0)).save(f"photos/{n}.png")
            shutil.copy(f"photos/{n}.png", f"pairs/{n}.png")
            Path(f"pairs/{n}.txt").write_text(f"ticket {n}" * (n != 2))
        pillow_heif.from_pillow(Image.new("RGB", (56, 56))).save("photo.heic")
        for file, content in FILES.items():
            Path(file).write_text(content)
        Path("utf16.csv").write_text(FILES["labels.csv"].rstrip("\n"), encoding="utf-16-le")
        recipe = make_task(Path("task")) | {"output_dir": "run"}
        recipe["tune"]["merger"] = "lora"
        recipe["train"] |= {"epochs": None, "steps": 2, "save_every": 1}
        text = yaml.safe_dump(recipe, sort_keys=False)
        Path("recipe.yaml").write_text(text)
        Path("colon.yaml").write_text(text.replace("model: ", "model "))
        Path("tab.yaml").write_text(text.replace("  train: ", "\ttrain: "))
        Path("typo.yaml").write_text(text.replace("  batch_size:", "  bach_size:"))
        create_tiny_model(Path("other"), "qwen2_5_vl")
        assert run_command(["train", "recipe.yaml"]) == 0
        shutil.copytree("run", "stopped")
        Path("stopped/result.json").unlink()
        yield folder


def hide_heif_plugin(stack: contextlib.ExitStack, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "pillow_heif", None)
    patch.delitem(Image.OPEN, "HEIF", raising=False)  # registered by an earlier test


def hide_web_packages(stack: contextlib.ExitStack, patch: pytest.MonkeyPatch) -> None:
    for name in ("starlette", "uvicorn"):
        patch.setitem(sys.modules, name, None)


def occupy_port(stack: contextlib.ExitStack, patch: pytest.MonkeyPatch) -> None:
    patch.setenv(
        "PORT", str(stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1])
    )


def limit_memory(stack: contextlib.ExitStack, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(run_plan, "MIN_CHECKED_PARAMS", 0)
    patch.setattr(step_time, "total_memory", lambda: 500_000_000)
    patch.setattr(setup, "measure_peak_flops", lambda device, dtype: 1e12)


def fill_disk(stack: contextlib.ExitStack, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1, used=1, free=1))


def hide_gpu(stack: contextlib.ExitStack, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: False)


def train_elsewhere(stack: contextlib.ExitStack, patch: pytest.MonkeyPatch) -> None:
    stack.enter_context(RunDir(Path("stopped")).lock())


def label_elsewhere(stack: contextlib.ExitStack, patch: pytest.MonkeyPatch) -> None:
    Path("labels").mkdir(exist_ok=True)
    lock = stack.enter_context(
        storage.FileLock(Path("labels") / JOURNAL_FILE, os.O_RDWR | os.O_CREAT)
    )
    lock.acquire()


def forget_token(stack: contextlib.ExitStack, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("HF_TOKEN", raising=False)
    patch.delenv("HF_HUB_OFFLINE", raising=False)


PREPARATIONS = {
    function.__name__: function
    for function in (
        *(hide_heif_plugin, hide_web_packages, hide_gpu, occupy_port, limit_memory, fill_disk),
        *(train_elsewhere, label_elsewhere, forget_token),
    )
}


def read_contents(folder: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()}


def change_files(folder: Path, contents: dict[str, str | None]) -> None:
    """Write files, remove those without content, and replace BOMB by an image bomb."""
    for pattern, content in contents.items():
        for file in [*folder.glob(pattern)] or [folder / pattern]:
            if content is None:
                file.unlink()
            elif content == "BOMB":
                Image.new("1", (10_000, 10_000)).save(file)
            else:
                file.write_text(content)


@pytest.mark.parametrize("name", MISTAKES)
def test_message_names_the_fix_and_no_files_are_written(
    workspace, name, monkeypatch, cli, tmp_path
):
    mistake = MISTAKES[name]
    if files := mistake.get("files"):
        workspace = shutil.copytree(workspace, tmp_path / "changed")
        change_files(workspace, files)
        monkeypatch.chdir(workspace)
    monkeypatch.setenv("WORKSPACE", str(workspace))
    with contextlib.ExitStack() as stack:
        if prepare := mistake.get("prepare"):
            PREPARATIONS[prepare](stack, monkeypatch)
        before = read_contents(workspace)
        error = cli(*os.path.expandvars(mistake["command"]).split(), code=2).err
        assert read_contents(workspace) == before
    *_, message = error.partition("error: ")
    problem, remedy = map(os.path.expandvars, (mistake["problem"], mistake["remedy"]))
    assert message.startswith(problem), message
    assert message.count("\n  expected: ") == message.count("\n  remedy: ") == 1, message
    assert "error: " not in message
    assert message.partition("\n  remedy: ")[2].startswith(remedy), message
    assert not Path("out").exists()
