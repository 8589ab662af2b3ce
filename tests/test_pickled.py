"""Pickled weights: read once, as tensors and nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finesight.errors import UserError
from finesight.hub import CONVERTED, PICKLED_INDEX, ModelFolder

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return os.system, (self.command,)


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    return ModelFolder(tmp_path)


def _index(folder: ModelFolder, **files: str) -> None:
    text = json.dumps({"weight_map": files})
    (folder.path / PICKLED_INDEX).write_text(text, encoding="utf-8")


def test_shards_become_safetensors_once(folder: ModelFolder) -> None:
    _index(folder, a="pytorch_model-1.bin", b="pytorch_model-2.bin")
    torch.save({"a": TENSORS["a"]}, folder.path / "pytorch_model-1.bin")
    torch.save({"b": TENSORS["b"]}, folder.path / "pytorch_model-2.bin")
    files = folder.weight_files()
    assert [file.parent.name for file in files] == [CONVERTED] * 2
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    fingerprint = folder.fingerprint()
    for pickled in folder.path.glob("*.bin"):
        pickled.write_bytes(b"not read again")
    assert folder.weight_files() == files
    assert folder.fingerprint() == fingerprint


def test_one_file_whose_tensors_share_their_memory(folder: ModelFolder) -> None:
    torch.save({"a": TENSORS["a"], "b": TENSORS["a"][0]}, folder.path / "pytorch_model.bin")
    (file,) = folder.weight_files()
    assert torch.equal(load_file(file)["b"], TENSORS["a"][0])


def test_a_pickle_with_code_is_refused_and_not_run(folder: ModelFolder) -> None:
    touched = folder.path / "touched"
    torch.save({"a": Malicious(f"touch {touched}")}, folder.path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"would run (posix|nt)\.system") as caught:
        folder.weight_files()
    assert caught.value.where == str(folder.path / "pytorch_model.bin")
    assert not touched.exists()
    assert not (folder.path / CONVERTED).exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([TENSORS["a"]], "a list that holds more"),
        ({"a": 3}, "a dict that holds more"),
        ({"a": TENSORS}, "a dict that holds more"),
    ],
)
def test_other_things_are_refused(folder: ModelFolder, content: object, said: str) -> None:
    torch.save(content, folder.path / "pytorch_model.bin")
    with pytest.raises(UserError, match=said):
        folder.weight_files()


@pytest.mark.parametrize("size", [0, 100, -10])
def test_a_damaged_file_is_refused(folder: ModelFolder, size: int) -> None:
    path = folder.path / "pytorch_model.bin"
    torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"not whole|no pickle"):
        folder.weight_files()


def test_a_shard_that_is_missing_is_named(folder: ModelFolder) -> None:
    _index(folder, a="pytorch_model-1.bin")
    with pytest.raises(UserError, match=r"no pytorch_model-1\.bin"):
        folder.weight_files()
