"""Folders of models, damaged in one place each, and the command that brings a sound one."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from doctoring import codes, only, plant_package
from hub_servers import Serving
from hubs import cache, huggingface

from finesight.cli.app import run
from finesight.doctor import model_folder, packages
from finesight.doctor.findings import Finding
from finesight.hub import TINY_FOLDER
from finesight.model.tiny import make_tiny

__all__ = ["cache", "huggingface"]

NONE = packages.Packages({}, (), True)
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny")


def judged(path: Path) -> list[Finding]:
    return model_folder.judge(path, NONE)


def test_a_sound_model_is_fine(sound: Path) -> None:
    assert [one.severity for one in judged(sound)] == ["fine"]


def test_the_packages_own_model_is_fine_and_comes_again_with_it(tmp_path: Path) -> None:
    assert codes(judged(TINY_FOLDER)) == []
    assert "--force-reinstall --no-deps finesight" in model_folder._again(TINY_FOLDER)


def _cut(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _change(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")


def _point(path: Path) -> None:
    text = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"
    (path / "model.safetensors").write_bytes(text)


def _lose_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def _lose_shard(path: Path) -> None:
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (path / INDEX).write_text(json.dumps({"weight_map": names}))


def _mix_shards(path: Path) -> None:
    (path / INDEX).write_text(json.dumps({"weight_map": {"lm_head.x": "model.safetensors"}}))


def _break_config(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "qwen2_vl",')


def _lose_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()


def _break_tokenizer(path: Path) -> None:
    tokens = path / "tokenizer.json"
    tokens.write_bytes(tokens.read_bytes()[:1000])


def _break_preprocessor(path: Path) -> None:
    (path / "preprocessor_config.json").write_text('{"patch_size": 0}')


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (_cut, "model-weights"),
        (_change, "model-changed"),
        (_point, "model-pointers"),
        (_lose_weights, "model-weights"),
        (_lose_shard, "model-weights"),
        (_mix_shards, "model-weights"),
        (_break_config, "model-config"),
        (_lose_tokenizer, "model-files"),
        (_break_tokenizer, "model-files"),
        (_break_preprocessor, "model-files"),
    ],
)
def test_damage_is_found(
    sound: Path, tmp_path: Path, damage: Callable[[Path], None], code: str
) -> None:
    path = tmp_path / "model"
    shutil.copytree(sound, path)
    damage(path)
    found = judged(path)
    assert codes(found) == [code]
    words = shlex.split(only(found, code).remedy)
    assert words == ["finesight", "download", "OWNER/NAME", "--to", f"{path}-again"]


def test_the_remedy_brings_a_damaged_model_of_the_cache_again(
    sound: Path, huggingface: Serving, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {path.name: path.read_bytes() for path in sound.iterdir()}
    huggingface.repositories["models/planted/tiny"] = files
    assert run(["download", "planted/tiny"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert codes(judged(path)) == []
    _cut(path)
    assert run(["doctor", str(path)]) == 2
    remedy = only(judged(path), "model-weights").remedy
    assert remedy in capsys.readouterr().out
    away, again = remedy.split(" && ")
    subprocess.run(away, shell=True, check=True)
    assert run(shlex.split(again)[1:]) == 0
    assert Path(capsys.readouterr().out.strip()) == path
    assert run(["doctor", str(path)]) == 0


def test_a_clone_without_its_large_files_is_pulled(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "clone"
    shutil.copytree(sound, path)
    (path / ".git").mkdir()
    _point(path)
    found = only(judged(path), "model-pointers")
    assert shlex.split(found.remedy) == ["git", "-C", str(path), "lfs", "pull"]


def test_a_download_that_was_cut_off_is_a_hint(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(sound, path)
    (path / "model-2.safetensors.incomplete").touch()
    assert codes(judged(path), "hint") == ["model-unfinished"]


@pytest.mark.parametrize(
    ("family", "package", "extra"),
    [("qwen", "tiktoken", "qwen-vl"), ("other", "transformers", "hf")],
)
def test_a_family_that_needs_an_extra_names_it(
    sound: Path, tmp_path: Path, family: str, package: str, extra: str
) -> None:
    path = tmp_path / "model"
    shutil.copytree(sound, path)
    config = json.loads((path / "config.json").read_text()) | {"model_type": family}
    (path / "config.json").write_text(json.dumps(config))
    found = only(judged(path), "model-needs-extra")
    assert found.remedy.endswith(f"'finesight[{extra}]'")
    plant_package(tmp_path / "site", package, "99.0")
    there = packages.gather([str(tmp_path / "site")])
    assert "model-needs-extra" not in codes(model_folder.judge(path, there))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("/c/hub/models--Qwen--Qwen2-VL-2B-Instruct/snapshots/ab", "Qwen/Qwen2-VL-2B-Instruct"),
        ("/c/assets/finesight/hf/models/Qwen/X/0123", "hf:Qwen/X"),
        ("/c/finesight/modelscope/https%3A%2F%2Fm/models/Qwen/X/01", "modelscope:Qwen/X"),
        ("/home/me/models/mine", None),
    ],
)
def test_where_a_cached_model_came_from(path: str, source: str | None) -> None:
    assert model_folder.source_of(Path(path)) == source


def test_an_adapter_that_is_cut_off_is_found(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x10")
    assert codes(model_folder.judge_adapter(tmp_path)) == ["adapter"]
