"""Parallelism and precision of configurations of accelerate, DeepSpeed and FSDP."""

import json
import random
from pathlib import Path

import pytest
import yaml
from case_files import load_cases
from convert_fixtures import (
    SWIFT_SETTINGS,
    convert_script,
    convert_settings,
    load_converted_recipe,
    notes_by_setting,
)

from finesight.errors import UserError

TABLES = load_cases("launcher_config")
COMMAND = (
    "accelerate launch --config_file launch.yaml sft_vlm.py --dataset_name rows.jsonl"
    " --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct"
)


@pytest.mark.parametrize(("settings", "mode"), TABLES["test_accelerate_config_gives_parallelism"])
def test_accelerate_config_gives_parallelism(settings, mode, tmp_path):
    """Check every setting, in the order of the file, its reverse and two random orders."""
    chance = random.Random(4)
    for turn in range(4):
        ordered = _reorder(settings, turn, chance)
        (tmp_path / "launch.yaml").write_text(yaml.safe_dump(ordered, sort_keys=False))
        convert_script(tmp_path, COMMAND)
        assert load_converted_recipe(tmp_path).train.parallel == mode, list(ordered)


def _reorder(settings: dict[str, object], turn: int, chance: random.Random) -> dict[str, object]:
    keys = list(settings)
    if turn == 1:
        keys.reverse()
    elif turn > 1:
        chance.shuffle(keys)
    return {
        key: _reorder(settings[key], turn, chance)
        if isinstance(settings[key], dict)
        else settings[key]
        for key in keys
    }


def test_settings_of_accelerate_are_reported(tmp_path):
    settings = TABLES["reported"]
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(settings))
    done = convert_script(tmp_path, COMMAND)
    train = load_converted_recipe(tmp_path).train
    assert (train.parallel, train.precision, train.batch_size) == ("ddp", "bf16", 8 * 6)
    assert notes_by_setting(done, "differs").keys() == {"accelerate_config", "gradient_clipping"}
    assert notes_by_setting(done, "unknown").keys() == {"made_up"}
    assert {"debug", "tpu_use_cluster", "dynamo_backend"} <= notes_by_setting(
        done, "ignored"
    ).keys()


@pytest.mark.parametrize(("options", "mode"), TABLES["test_options_of_accelerate_replace_its_file"])
def test_options_of_accelerate_replace_its_file(options, mode, tmp_path):
    (tmp_path / "launch.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 2\n")
    done = convert_script(tmp_path, COMMAND.replace("launch.yaml", f"launch.yaml {options}"))
    assert load_converted_recipe(tmp_path).train.parallel == mode
    assert not notes_by_setting(done, "unknown")


@pytest.mark.parametrize(("content", "mode"), TABLES["test_deepspeed_file_gives_parallelism"])
@pytest.mark.parametrize("form", ["file", "text", "accelerate"])
def test_deepspeed_file_gives_parallelism(content, mode, form, tmp_path):
    """Check the file that a setting or accelerate names, and the same content as text."""
    (tmp_path / "ds.json").write_text(json.dumps(content))
    if form == "accelerate":
        launch = {
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {"zero3_init_flag": False, "deepspeed_config_file": "ds.json"},
        }
        (tmp_path / "launch.yaml").write_text(yaml.safe_dump(launch))
        convert_script(tmp_path, COMMAND)
    else:
        value = "ds.json" if form == "file" else json.dumps(content)
        convert_settings(tmp_path, SWIFT_SETTINGS | {"deepspeed": value})
    assert load_converted_recipe(tmp_path).train.parallel == mode


@pytest.mark.parametrize(("settings", "mode"), TABLES["test_fsdp_strategy_gives_parallelism"])
def test_fsdp_strategy_gives_parallelism(settings, mode, tmp_path):
    convert_settings(tmp_path, SWIFT_SETTINGS | settings)
    assert load_converted_recipe(tmp_path).train.parallel == mode


@pytest.mark.parametrize(
    ("name", "schedule"), [("WarmupLR", "constant"), ("WarmupDecayLR", "linear")]
)
def test_scheduler_of_deepspeed_replaces_that_of_the_trainer(name, schedule, tmp_path):
    content = {"zero_optimization": {"stage": 2}, "scheduler": {"type": name}}
    (tmp_path / "ds.json").write_text(json.dumps(content))
    settings = {"deepspeed": "ds.json", "lr_scheduler_type": "cosine", "warmup_ratio": 0.1}
    done = convert_settings(tmp_path, SWIFT_SETTINGS | settings)
    train = load_converted_recipe(tmp_path).train
    assert (train.lr_schedule, train.warmup) == (schedule, 0.1)
    assert name in str(done.notes)


@pytest.mark.parametrize("content", TABLES["test_configuration_of_a_launcher_is_refused_alone"])
def test_configuration_of_a_launcher_is_refused_alone(content: dict[str, object], tmp_path: Path):
    with pytest.raises(UserError, match="names no model") as caught:
        convert_settings(tmp_path, content, "a.json")
    assert ".sh" in str(caught.value.remedy)
    (tmp_path / "launch.yaml").write_text((tmp_path / "a.json").read_text())
    convert_script(tmp_path, COMMAND.replace("launch.yaml", "a.json"))


@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        ({"deepspeed_config": {"zero_stage": None, "zero3_init_flag": False}}, "zero2"),
        ({"deepspeed_config": "configs/zero3.json"}, "fsdp"),
        ({"deepspeed_config": "zero2_offload"}, "fsdp_offload"),
        ({"deepspeed_config": "ds.json"}, "fsdp"),
        ({"deepspeed_config": {"deepspeed_config_file": "ds.json"}}, "fsdp"),
    ],
)
def test_sections_of_other_forms_give_parallelism(settings, mode, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    launch = {"distributed_type": "DEEPSPEED", **settings}
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(launch))
    convert_script(tmp_path, COMMAND)
    assert load_converted_recipe(tmp_path).train.parallel == mode


@pytest.mark.parametrize(
    ("settings", "noted"),
    [
        ({"mixed_precision": "fp8"}, {"mixed_precision"}),
        ({"parallelism_config": {"parallelism_config_tp_size": 2}}, {"parallelism_config_tp_size"}),
        ({"parallelism_config": {"parallelism_config_tp_size": 1}}, set()),
        ({"mixed_precision": "no"}, set()),
    ],
)
def test_settings_of_accelerate_without_an_equal_are_reported(settings, noted, tmp_path):
    launch = {"distributed_type": "MULTI_GPU", **settings}
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(launch))
    done = convert_script(tmp_path, COMMAND)
    assert notes_by_setting(done, "differs").keys() == noted


def test_section_that_is_a_list_is_reported(tmp_path):
    (tmp_path / "launch.yaml").write_text("distributed_type: FSDP\nfsdp_config: [1]\n")
    done = convert_script(tmp_path, COMMAND)
    assert "fsdp_config" in {note.key for note in done.notes}


@pytest.mark.parametrize(
    "options",
    [
        "--config-file launch.yaml --num-processes 3",
        "--config-file=launch.yaml --num-processes=3",
        "--num_processes 3 --config-file launch.yaml",
        "--use-deepspeed --zero-stage 2 --num-processes 3",
        "--config_file launch.yaml --num_processes=3",
    ],
)
def test_options_of_accelerate_may_have_hyphens(options, tmp_path):
    launch = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}}
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(launch))
    convert_script(tmp_path, COMMAND.replace("--config_file launch.yaml", options))
    train = load_converted_recipe(tmp_path).train
    assert (train.parallel, train.batch_size) == ("zero2", 24)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("/data/z1/fsdp.yaml", "fsdp"),
        ("offload/zero2.yaml", "zero2"),
        ("zero3/multi_gpu.yaml", "ddp"),
        ("fuzz2_fsdp.yaml", "fsdp"),
        ("configs/ds_z3.yaml", "fsdp"),
        ("configs/dszero2_offload.yaml", "fsdp_offload"),
    ],
)
def test_name_of_a_missing_config_gives_parallelism(name, mode, tmp_path):
    convert_script(tmp_path, COMMAND.replace("launch.yaml", name))
    assert load_converted_recipe(tmp_path).train.parallel == mode


@pytest.mark.parametrize(("kind", "is_noted"), [("Lion", True), ("AdamW", False), ("SGD", True)])
def test_optimizer_of_deepspeed_is_reported(kind, is_noted, tmp_path):
    content = {"zero_optimization": {"stage": 2}, "optimizer": {"type": kind}}
    done = convert_settings(tmp_path, SWIFT_SETTINGS | {"deepspeed": json.dumps(content)})
    assert ("deepspeed optimizer" in notes_by_setting(done, "differs")) is is_noted
