"""Recipes against a machine that lacks something, and the settings that are printed instead."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from doctor_fixtures import find_diagnosis, list_codes, write_package_metadata
from tiny_task import make_task, write_recipe

from finesight.doctor import diagnostics, model_check, package_check
from finesight.doctor.diagnosis import Diagnosis
from finesight.doctor.gpu_check import GpuInfo, TorchInfo
from finesight.doctor.machine_check import GB, WriteLocation
from finesight.recipe import load_recipe

OUTPUT = WriteLocation("output", Path("/runs"), 100 * GB, True)
CPU = TorchInfo("2.13.0+cpu")
T4 = TorchInfo("2.13.0+cu126", gpus=(GpuInfo("Tesla T4", (7, 5), 16 * GB, 15 * GB, ""),))
NONE = package_check.InstalledPackages({}, (), True)
AROUND = {"packages": NONE, "torch_info": CPU, "location": OUTPUT}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    made = make_task(tmp_path / "task") | {"output_dir": str(tmp_path / "run")}
    return write_recipe(tmp_path / "my recipe.yaml", made)


def diagnose(path: Path, *changes: str, around: dict[str, object] = AROUND) -> list[Diagnosis]:
    return model_check.check_recipe(path, load_recipe(path, changes), **around)


def remedy_overrides(path: Path, found: Diagnosis) -> list[str]:
    """The changes that the remedy makes to the recipe."""
    words = shlex.split(found.remedy)
    assert words[:3] == ["finesight", "train", str(path)]
    return words[3:]


def test_trainable_recipe_has_no_issue(recipe: Path) -> None:
    assert list_codes(diagnose(recipe)) == list_codes(diagnose(recipe), "warning") == []


@pytest.mark.parametrize(
    "requested", ["train.precision=bf16", "tune.quantize.fp8=[language]"], ids=["bf16", "fp8"]
)
def test_unsupported_precision_is_replaced(recipe: Path, requested: str) -> None:
    around = AROUND | {"torch_info": T4}
    changes = ["train.device=auto", "tune.merger=frozen", requested]
    found = find_diagnosis(diagnose(recipe, *changes, around=around), "precision-unsupported")
    assert "Tesla T4 (7.5)" in found.what
    assert (
        list_codes(diagnose(recipe, *changes, *remedy_overrides(recipe, found), around=around))
        == []
    )


def test_missing_gpu_is_replaced(recipe: Path) -> None:
    found = find_diagnosis(diagnose(recipe, "train.device=cuda"), "no-cuda")
    assert list_codes(diagnose(recipe, *remedy_overrides(recipe, found))) == []


def test_extra_needed_by_setting_is_named(recipe: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    needs = ['bitsandbytes>=0.50; extra == "quant"', 'tensorboard; extra == "track"']
    write_package_metadata(site, "finesight", "0.1.0", needs)
    about = site / "finesight-0.1.0.dist-info" / "METADATA"
    extras = "\nProvides-Extra: quant\nProvides-Extra: track\n"
    about.write_text(about.read_text().rstrip() + extras)
    around = AROUND | {"packages": package_check.list_packages([str(site)])}
    changes = ("tune.quantize.nf4=[language]", "track=tensorboard")
    found = [one for one in diagnose(recipe, *changes, around=around) if one.severity == "error"]
    assert list_codes(found) == ["recipe-needs-extra", "recipe-needs-extra"]
    assert [shlex.split(one.remedy)[-1] for one in found] == [
        "finesight[quant]",
        "finesight[track]",
    ]
    write_package_metadata(site, "bitsandbytes", "0.50.2")
    write_package_metadata(site, "tensorboard", "2.21")
    around = AROUND | {"packages": package_check.list_packages([str(site)])}
    assert list_codes(diagnose(recipe, *changes, around=around)) == []


@pytest.mark.parametrize(
    ("location", "code"),
    [
        (replace(OUTPUT, free_bytes=1), "disk-full"),
        (replace(OUTPUT, is_writable=False), "not-writable"),
    ],
)
def test_unwritable_output_is_replaced(recipe: Path, location: WriteLocation, code: str) -> None:
    found = find_diagnosis(diagnose(recipe, around=AROUND | {"location": location}), code)
    assert str(load_recipe(recipe, remedy_overrides(recipe, found)).output_dir) != "/runs"


def test_missing_data_file_is_searched(recipe: Path) -> None:
    found = find_diagnosis(diagnose(recipe, "data.train=gone/train.jsonl"), "data-missing")
    assert shlex.split(found.remedy) == ["find", ".", "-name", "train.jsonl"]


def test_recipe_without_eval_data_is_reported(recipe: Path) -> None:
    assert list_codes(diagnose(recipe, "data.eval=[]"), "warning") == ["not-evaluated"]


def test_damaged_model_of_recipe_is_found(recipe: Path) -> None:
    weights = Path(load_recipe(recipe).model) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert list_codes(diagnose(recipe)) == ["model-weights"]


def test_invalid_recipe_is_a_finding(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe.write_text(recipe.read_text().replace("learning_rate", "lerning_rate"))
    ((section,)) = diagnostics.diagnose(str(recipe))
    assert list_codes(section.diagnoses) == ["recipe"]
    assert "learning_rate" in section.diagnoses[0].why


def test_doctor_command_diagnoses_recipe(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics.gpu_check, "probe_torch", lambda: T4)
    path = write_recipe(recipe, {**_content(recipe), "data": {"train": "gone.jsonl"}})
    ((section,)) = diagnostics.diagnose(str(path))
    assert list_codes(section.diagnoses) == ["data-missing"]


def _content(path: Path) -> dict[str, object]:
    return yaml.safe_load(path.read_text())
