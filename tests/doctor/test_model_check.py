"""Folders of models, damaged in one place each, and the command that brings a sound one."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from case_files import load_cases
from doctor_fixtures import find_diagnosis, list_codes, write_package_metadata
from hub_fixtures import cache, huggingface
from tiny_model import create_tiny_model

from finesight.cli.app import run_command
from finesight.doctor import model_check, package_check
from finesight.doctor.diagnosis import Diagnosis
from finesight.model_folder import TINY_MODEL_FOLDER

CASES = load_cases("model_check")

__all__ = ["cache", "huggingface"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"


@pytest.fixture(scope="module")
def valid_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def diagnose(path: Path) -> list[Diagnosis]:
    return model_check.check_model(path, {})


def test_valid_model_has_no_issue(valid_model: Path) -> None:
    assert [one.severity for one in diagnose(valid_model)] == ["ok"]
    assert list_codes(diagnose(TINY_MODEL_FOLDER)) == []


def _delete_shard(path: Path) -> None:
    (path / WEIGHTS).rename(path / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (path / INDEX).write_text(json.dumps({"weight_map": names}))


MIXED_INDEX = json.dumps({"weight_map": {"lm_head.x": WEIGHTS}})


@pytest.mark.parametrize(
    ("name", "damage", "code"),
    [
        (WEIGHTS, lambda data: data[:-100], "model-weights"),
        (WEIGHTS, lambda data: data[:-1] + b"\x7f", "model-changed"),
        (WEIGHTS, lambda data: POINTER, "model-lfs-pointers"),
        (WEIGHTS, None, "model-weights"),
        ("", _delete_shard, "model-weights"),
        (INDEX, lambda data: MIXED_INDEX.encode(), "model-weights"),
        ("config.json", lambda data: b'{"model_type": "qwen2_vl",', "model-config"),
        ("tokenizer.json", None, "model-files"),
        ("tokenizer.json", lambda data: data[:1000], "model-files"),
        ("preprocessor_config.json", lambda data: b'{"patch_size": 0}', "model-files"),
    ],
)
def test_damage_is_found(valid_model, tmp_path, name, damage, code):
    path = tmp_path / "model"
    shutil.copytree(valid_model, path)
    file = path / name
    if not name:
        damage(path)
    elif damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes() if file.exists() else b""))
    found = diagnose(path)
    assert list_codes(found) == [code]
    words = shlex.split(find_diagnosis(found, code).remedy)
    assert words == ["finesight", "download", "OWNER/NAME", "--to", f"{path}-again"]


def test_remedy_downloads_damaged_cached_model_again(valid_model, huggingface, capsys):
    files = {path.name: path.read_bytes() for path in valid_model.iterdir()}
    huggingface.repositories["models/planted/tiny"] = files
    assert run_command(["download", "planted/tiny"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert list_codes(diagnose(path)) == []
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-100])
    assert run_command(["doctor", str(path)]) == 2
    remedy = find_diagnosis(diagnose(path), "model-weights").remedy
    assert remedy in capsys.readouterr().out
    away, again = remedy.split(" && ")
    subprocess.run(away, shell=True, check=True)
    assert run_command(shlex.split(again)[1:]) == 0
    assert Path(capsys.readouterr().out.strip()) == path
    assert run_command(["doctor", str(path)]) == 0


def test_missing_git_lfs_files_are_pulled(valid_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "clone"
    shutil.copytree(valid_model, path)
    (path / ".git").mkdir()
    (path / WEIGHTS).write_bytes(POINTER)
    found = find_diagnosis(diagnose(path), "model-lfs-pointers")
    assert shlex.split(found.remedy) == ["git", "-C", str(path), "lfs", "pull"]


@pytest.mark.parametrize(
    ("family", "package", "extra"),
    [("qwen", "tiktoken", "qwen-vl"), ("other", "transformers", "hf")],
)
def test_family_needing_an_extra_names_it(valid_model, tmp_path, family, package, extra):
    path = tmp_path / "model"
    shutil.copytree(valid_model, path)
    config = json.loads((path / "config.json").read_text()) | {"model_type": family}
    (path / "config.json").write_text(json.dumps(config))
    found = find_diagnosis(diagnose(path), "model-needs-extra")
    assert found.remedy.endswith(f"'finesight[{extra}]'")
    write_package_metadata(tmp_path / "site", package, "99.0")
    there = package_check.list_packages([str(tmp_path / "site")])
    assert "model-needs-extra" not in list_codes(model_check.check_model(path, there))


@pytest.mark.parametrize(("path", "source"), CASES["test_source_of_cached_model"])
def test_source_of_cached_model(path: str, source: str | None) -> None:
    remedy = model_check.redownload_command(Path(path))
    assert remedy.endswith(f"finesight download {source}" if source else f"--to {path}-again")


def test_truncated_adapter_is_found(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x10")
    assert list_codes([model_check.check_adapter(tmp_path)]) == ["adapter"]
