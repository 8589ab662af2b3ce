"""Tests of pickled weights: converted once, without executing code."""

import json
import multiprocessing
import os
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import create_tiny_model

from finesight.errors import UserError
from finesight.files.storage import DIGESTS_FILE
from finesight.model.weights_io import load_model
from finesight.model_folder import CONVERTED_FOLDER, PICKLE_INDEX_FILE, ModelFolder

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
    (folder.path / PICKLE_INDEX_FILE).write_text(text, encoding="utf-8")


def test_shards_are_converted_to_safetensors_once(folder, monkeypatch):
    _index(folder, a="pytorch_model-1.bin", b="pytorch_model-2.bin")
    torch.save({"a": TENSORS["a"]}, folder.path / "pytorch_model-1.bin")
    torch.save({"b": TENSORS["b"]}, folder.path / "pytorch_model-2.bin")
    files = folder.weight_files()
    assert [file.parent.name for file in files] == [CONVERTED_FOLDER] * 2
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    fingerprint = folder.fingerprint()
    monkeypatch.setattr(torch, "load", None)
    assert folder.weight_files() == files
    assert folder.fingerprint() == fingerprint


def test_changed_files_are_converted_again(folder: ModelFolder) -> None:
    path = folder.path / "pytorch_model.bin"
    for times in (1, 2):
        torch.save({"a": TENSORS["a"] * times}, path)
        os.utime(path, ns=(times, times))
        (file,) = folder.weight_files()
        assert torch.equal(load_file(file)["a"], TENSORS["a"] * times)


def test_damage_after_conversion_is_detected(tmp_path: Path) -> None:
    folder = ModelFolder(create_tiny_model(tmp_path / "tiny"))
    (tmp_path / "tiny" / DIGESTS_FILE).unlink()
    (single,) = folder.weight_files()
    torch.save(load_file(single), tmp_path / "tiny" / "pytorch_model.bin")
    single.unlink()
    load_model(folder, torch.float32, torch.device("cpu"))
    (converted,) = folder.weight_files()
    content = bytearray(converted.read_bytes())
    content[-1] ^= 1
    converted.write_bytes(content)
    with pytest.raises(UserError, match="has changed since it was written"):
        load_model(folder, torch.float32, torch.device("cpu"))


def _use(path: Path) -> list[str]:
    return [file.name for file in ModelFolder(path).weight_files()]


def test_concurrent_conversion(folder: ModelFolder) -> None:
    torch.save(
        {f"w{n}": torch.ones(400, 400) for n in range(40)}, folder.path / "pytorch_model.bin"
    )
    context = multiprocessing.get_context("fork")
    with context.Pool(4) as pool:
        found = pool.map(_use, [folder.path] * 4, chunksize=1)
    assert found == [["model-00001-of-00001.safetensors"]] * 4
    assert not list(folder.path.glob(".*"))


def test_views_are_converted(folder: ModelFolder) -> None:
    whole = TENSORS["a"]
    channels_last = torch.rand(1, 3, 4, 4).to(memory_format=torch.channels_last)
    tensors = {"whole": whole, "row": whole[0], "transposed": whole.T, "images": channels_last}
    torch.save(tensors, folder.path / "pytorch_model.bin")
    (file,) = folder.weight_files()
    found = load_file(file)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


UNSUPPORTED = [
    (lambda: {"a": torch.eye(3).to_sparse()}, "a is a .*sparse"),
    (lambda: {"a": torch.nested.nested_tensor([torch.zeros(2)])}, "a is a .*nested"),
    (
        lambda: {"a": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)},
        "a is a .*qint8",
    ),
    (lambda: {"a": torch.ones(3, dtype=torch.complex64)}, "a is a .*complex64"),
    (lambda: {"a": torch.empty(3, device="meta")}, "a is a .*without data"),
    (lambda: {"a": torch.zeros(1).expand(10**7, 10**5)}, "a is a .*4000000000000 bytes"),
    (lambda: [TENSORS["a"]], "a list with content other"),
    (lambda: {"a": 3}, "a dict with content other"),
    (lambda: {"a": TENSORS}, "a dict with content other"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("make", "message"), UNSUPPORTED)
def test_unsupported_contents_are_rejected(make, message, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(make(), path)
    with pytest.raises(UserError, match=message) as caught:
        ModelFolder(tmp_path).weight_files()
    assert caught.value.where == str(path)
    assert not (tmp_path / CONVERTED_FOLDER).exists()


def test_pickle_with_code_is_rejected(folder: ModelFolder) -> None:
    touched = folder.path / "touched"
    torch.save({"a": Malicious(f"touch {touched}")}, folder.path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"would execute (posix|nt)\.system") as caught:
        folder.weight_files()
    assert caught.value.where == str(folder.path / "pytorch_model.bin")
    assert not touched.exists()
    assert not (folder.path / CONVERTED_FOLDER).exists()


def test_damaged_files_are_rejected_without_unsafe_advice(folder: ModelFolder) -> None:
    path = folder.path / "pytorch_model.bin"
    torch.save(TENSORS, path)
    whole = path.read_bytes()
    for content in (
        whole[:0],
        whole[:100],
        whole[:-10],
        pickle.dumps({"a": Malicious("true")}, protocol=4),
        pickle.dumps({"a": 1}, protocol=0),
        b"\x80\x02\x8c\x05posix\x93.",
        b"version https://git-lfs.github.com/spec/v1",
    ):
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserError) as caught:
                folder.weight_files()
        assert not re.search("weights_only|torch.load|safe_globals|trust", str(caught.value))
