"""Tests of model folders: their files, and errors about them."""

import json
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from case_files import load_cases
from safetensors.numpy import save_file

from finesight.errors import UserError
from finesight.files.hub_address import HubAddress
from finesight.hub import hub_model, repository
from finesight.model_folder import (
    PREPROCESSOR_DEFAULTS,
    TINY_MODEL,
    TINY_MODEL_FOLDER,
    ModelFolder,
    check_model_path,
    get_portable_name,
    locate_model,
    resolve_model_path,
)

CASES = load_cases("model_folder")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    (path / "tokenizer.json").write_text("{}")
    return path


def shard(path: Path, *names: str) -> None:
    save_file({name: np.zeros(2, dtype=np.float32) for name in names}, path)


def index(folder: Path, **names: str) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": names}))
    return path


def test_local_folder_needs_no_network(folder: Path) -> None:
    found = locate_model(str(folder))
    assert found == ModelFolder(folder)
    assert (found.config, found.family) == ({"model_type": "qwen2_vl"}, "qwen2_vl")
    assert found.tokenizer_file == folder / "tokenizer.json"
    assert found.preprocessor_config == dict(PREPROCESSOR_DEFAULTS)


@pytest.mark.parametrize(
    "name",
    ["./none", "/none", "a/b/c", "none", "../a/b", "a b/c", "", "~nobody-at-all/a", "a" * 5000],
)
def test_missing_folder_is_reported(name: str) -> None:
    with pytest.raises(UserError, match="no folder") as raised:
        locate_model(name)
    assert name in raised.value.what
    assert TINY_MODEL in raised.value.expected


def test_bundled_model_is_found_by_name(folder, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(TINY_MODEL_FOLDER)
    for path in (TINY_MODEL_FOLDER, tmp_path / "link", TINY_MODEL_FOLDER / ".." / TINY_MODEL):
        assert get_portable_name(ModelFolder(path)) == TINY_MODEL
    monkeypatch.chdir(tmp_path)
    assert get_portable_name(ModelFolder(Path("model"))) == str(folder.resolve())
    (tmp_path / TINY_MODEL).mkdir()
    assert resolve_model_path(TINY_MODEL) == locate_model(TINY_MODEL).path == TINY_MODEL_FOLDER
    for name in (f"./{TINY_MODEL}", f"{TINY_MODEL}/"):
        assert resolve_model_path(name) == Path(TINY_MODEL)
    assert resolve_model_path("~/a") == Path.home() / "a"


def test_run_may_contain_another_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "merged"):
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").touch()
    assert check_model_path(str(tmp_path)) is None
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match="but contains merged"):
        check_model_path(str(tmp_path))


def test_hub_model_is_downloaded_without_code(folder, monkeypatch):
    requested = {}

    def open_model(address: HubAddress, wanted: tuple[str, ...]) -> repository.HubRepository:
        requested[str(address)] = wanted
        return repository.HubRepository(address, "0123456", (), folder)

    monkeypatch.setattr(hub_model, "open_model_repository", open_model)
    name = "Qwen/Qwen2-VL-2B-Instruct"
    assert locate_model(name) == locate_model(f"modelscope:{name}@v1") == ModelFolder(folder)
    assert [*requested] == [f"hf:{name}", f"modelscope:{name}@v1"]
    patterns = {pattern for wanted in requested.values() for pattern in wanted}
    files = ("qwen.tiktoken", "modeling_qwen.py", "pytorch_model.bin", "model.pt", "notebook.ipynb")
    downloaded = [file for file in files if any(fnmatch(file, pattern) for pattern in patterns)]
    assert downloaded == ["qwen.tiktoken"]


def test_symlinks_and_text_links_are_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    real = tmp_path / "other" / "preprocessor_config.json"
    real.write_text('{"min_pixels": 4000}')
    link = folder / "preprocessor_config.json"
    link.symlink_to(real)
    assert ModelFolder(folder).preprocessor_config["min_pixels"] == 4000
    link.unlink()
    link.write_text("../other/preprocessor_config.json")
    assert ModelFolder(folder).find_file(link.name) == folder / "../other" / link.name
    assert ModelFolder(folder).preprocessor_config["min_pixels"] == 4000
    link.write_text("../gone/preprocessor_config.json")
    with pytest.raises(UserError, match="not readable as JSON"):
        _ = ModelFolder(folder).preprocessor_config
    assert ModelFolder(folder).find_file("none.json") is None


def test_preprocessor_of_transformers_4_and_5(folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    size = '"size": {"shortest_edge": 100, "longest_edge": 200}'
    for other, max_pixels in (('"min_pixels": null', 200), ('"max_pixels": 300', 300)):
        path.write_text(f"{{{size}, {other}}}")
        found = ModelFolder(folder).preprocessor_config
        values = found["min_pixels"], found["max_pixels"], found["patch_size"]
        assert values == (100, max_pixels, 14)
    for content, message in (
        ('{"patch_size": "14"}', "patch_size is '14'"),
        ('{"min_pixels": 9, "max_pixels": 8}', "min_pixels 9 is above max_pixels 8"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            _ = ModelFolder(folder).preprocessor_config


def test_qwen_vl_image_settings_are_read_from_config(folder: Path) -> None:
    visual = {"image_size": 448, "patch_size": 14}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen", "visual": visual}))
    (folder / "preprocessor_config.json").write_text('{"patch_size": 16}')
    found = ModelFolder(folder).preprocessor_config
    names = ("image_size", "patch_size", "merge_size", "temporal_patch_size", "max_pixels")
    assert [found[name] for name in names] == [448, 14, 2, 1, 448**2]
    visual["image_size"] = -1
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen", "visual": visual}))
    with pytest.raises(UserError, match=r"visual\.image_size is -1"):
        _ = ModelFolder(folder).preprocessor_config


@pytest.mark.parametrize(("content", "message"), CASES["test_invalid_config"])
def test_invalid_config(folder: Path, content: str, message: str) -> None:
    (folder / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=message) as raised:
        _ = ModelFolder(folder).family
    assert raised.value.where == str(folder / "config.json")


def test_missing_files(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        _ = ModelFolder(folder).tokenizer_file
    (folder / "config.json").write_text('{"model_type": "qwen"}')
    with pytest.raises(UserError, match=r"no qwen\.tiktoken"):
        _ = ModelFolder(folder).tokenizer_file
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        _ = ModelFolder(folder).config


def test_weights_by_index_or_single_file(folder: Path) -> None:
    with pytest.raises(UserError, match="a model folder without weights") as raised:
        ModelFolder(folder).weight_files()
    assert raised.value.where == str(folder)
    shard(folder / "model.safetensors", "a")
    assert ModelFolder(folder).weight_files() == [folder / "model.safetensors"]
    index(folder, b="two.safetensors", a="one.safetensors", c="two.safetensors")
    shard(folder / "one.safetensors", "a")
    with pytest.raises(UserError, match=r"no two\.safetensors"):
        ModelFolder(folder).weight_files()
    shard(folder / "two.safetensors", "b", "c")
    expected = [folder / "one.safetensors", folder / "two.safetensors"]
    assert ModelFolder(folder).weight_files() == expected


@pytest.mark.parametrize(
    "content",
    ["{}", '{"weight_map": {}}', '{"weight_map": {"a": "../b"}}', '{"weight_map": {"a": 1}}'],
)
def test_invalid_index(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match="weight_map is"):
        ModelFolder(folder).weight_files()


def test_fingerprint_covers_headers_and_index(folder: Path) -> None:
    index(folder, a="one.safetensors", b="two.safetensors")
    shard(folder / "one.safetensors", "a")
    shard(folder / "two.safetensors", "b")
    first = ModelFolder(folder).fingerprint()
    assert len(first) == 64
    assert ModelFolder(folder).fingerprint() == first
    shard(folder / "two.safetensors", "bb")
    assert ModelFolder(folder).fingerprint() != first
    shard(folder / "two.safetensors", "b")
    assert ModelFolder(folder).fingerprint() == first
    index(folder, b="one.safetensors", a="two.safetensors")
    assert ModelFolder(folder).fingerprint() != first


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs", b"\xff" * 9, bytes(8)])
def test_damaged_weight_file(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="do not start with a safetensors header") as raised:
        ModelFolder(folder).fingerprint()
    assert raised.value.where == str(folder / "model.safetensors")
