"""Pickled weights: read once, as tensors and nothing else."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import create_tiny_model
from torch import Tensor

from finesight.errors import UserError
from finesight.model.weights_io import load_model
from finesight.model_folder import CONVERTED_FOLDER, PICKLE_INDEX_FILE, ModelFolder
from finesight.storage import DIGESTS_FILE

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


def test_shards_are_converted_to_safetensors_once(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_tensors_sharing_storage(folder: ModelFolder) -> None:
    torch.save({"a": TENSORS["a"], "b": TENSORS["a"][0]}, folder.path / "pytorch_model.bin")
    (file,) = folder.weight_files()
    assert torch.equal(load_file(file)["b"], TENSORS["a"][0])


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


@pytest.mark.parametrize(
    "tensor",
    [torch.arange(6.0).view(2, 3).T, torch.rand(1, 3, 4, 4).to(memory_format=torch.channels_last)],
)
def test_non_contiguous_tensors_are_converted(folder: ModelFolder, tensor: Tensor) -> None:
    torch.save({"a": tensor}, folder.path / "pytorch_model.bin")
    (file,) = folder.weight_files()
    assert torch.equal(load_file(file)["a"], tensor)


UNUSUAL = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "qint8": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
    "complex64": lambda: torch.ones(3, dtype=torch.complex64),
    "without data": lambda: torch.empty(3, device="meta"),
    "4000000000000 bytes": lambda: torch.zeros(1).expand(10**7, 10**5),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("output", UNUSUAL)
def test_unsupported_tensors_are_rejected(folder: ModelFolder, output: str) -> None:
    path = folder.path / "pytorch_model.bin"
    torch.save({"a": UNUSUAL[output]()}, path)
    with pytest.raises(UserError, match=rf"a is a .*{output}") as caught:
        folder.weight_files()
    assert caught.value.where == str(path)
    assert not (folder.path / CONVERTED_FOLDER).exists()


def test_errors_do_not_suggest_unsafe_loading(folder: ModelFolder) -> None:
    path = folder.path / "pytorch_model.bin"
    contents: list[Callable[[], object]] = [
        lambda: torch.save({"a": Malicious("true")}, path),
        lambda: path.write_bytes(pickle.dumps({"a": Malicious("true")}, protocol=4)),
        lambda: path.write_bytes(pickle.dumps({"a": 1}, protocol=0)),
        lambda: path.write_bytes(b"\x80\x02\x8c\x05posix\x93."),
        lambda: path.write_bytes(b"version https://git-lfs.github.com/spec/v1"),
    ]
    for write in contents:
        write()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserError) as caught:
                folder.weight_files()
        for word in ("weights_only", "torch.load", "safe_globals", "trust"):
            assert word not in str(caught.value)


def test_pickle_with_code_is_rejected(folder: ModelFolder) -> None:
    touched = folder.path / "touched"
    torch.save({"a": Malicious(f"touch {touched}")}, folder.path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"would execute (posix|nt)\.system") as caught:
        folder.weight_files()
    assert caught.value.where == str(folder.path / "pytorch_model.bin")
    assert not touched.exists()
    assert not (folder.path / CONVERTED_FOLDER).exists()


@pytest.mark.parametrize(
    ("content", "output"),
    [
        ([TENSORS["a"]], "a list with content other"),
        ({"a": 3}, "a dict with content other"),
        ({"a": TENSORS}, "a dict with content other"),
    ],
)
def test_invalid_contents_are_rejected(folder: ModelFolder, content: object, output: str) -> None:
    torch.save(content, folder.path / "pytorch_model.bin")
    with pytest.raises(UserError, match=output):
        folder.weight_files()


@pytest.mark.parametrize("size", [0, 100, -10])
def test_damaged_file_is_rejected(folder: ModelFolder, size: int) -> None:
    path = folder.path / "pytorch_model.bin"
    torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"incomplete|not a pickle"):
        folder.weight_files()


def test_missing_shard_is_reported(folder: ModelFolder) -> None:
    _index(folder, a="pytorch_model-1.bin")
    with pytest.raises(UserError, match=r"no pytorch_model-1\.bin"):
        folder.weight_files()
