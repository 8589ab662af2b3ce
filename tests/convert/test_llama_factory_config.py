"""LLaMA-Factory's settings, each against what LLaMA-Factory 0.9.5 does with it."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
from case_files import load_cases
from convert_fixtures import (
    LLAMA_FACTORY_SETTINGS,
    check_conversion,
    convert_script,
    convert_settings,
    convert_to_recipe,
    load_converted_recipe,
    notes_by_setting,
)

from finesight.convert.external_config import load_rules
from finesight.errors import UserError

recipe = partial(convert_to_recipe, LLAMA_FACTORY_SETTINGS)


def test_defaults_match_llama_factory(tmp_path):
    made = recipe(tmp_path)
    lora, train = made.tune.lora, made.train
    assert (lora.rank, lora.alpha, lora.dropout, lora.target_modules) == (8, 16.0, 0.0, None)
    assert (made.tune.vision, made.tune.merger, made.tune.language) == ("frozen", "frozen", "lora")
    assert (train.epochs, train.batch_size, train.learning_rate.default) == (3.0, 8, 5e-5)
    assert (train.lr_schedule, train.warmup, train.weight_decay) == ("linear", 0, 0.0)
    assert (train.betas, train.max_grad_norm, train.optimizer) == ((0.9, 0.999), 1.0, "adamw")
    assert (train.seed, train.data_seed, train.save_every) == (42, 42, 500)
    assert made.image.model_dump() == {"min_pixels": 3136, "max_pixels": 589_824}
    assert (made.data.max_length, made.track, made.eval) == (2048, (), None)


EXAMPLES = load_cases("llama_factory_settings")
"""What one setting becomes, the others at their defaults."""

ELSEWHERE = {"stage", "dataset_dir", "media_dir", "max_samples"} | {
    "quantization_method",
    "quantization_type",
    "double_quantization",
}
"""What has a test of its own below."""


def test_every_convertible_setting_has_an_example():
    becoming = load_rules("LLaMA-Factory").converted
    assert becoming == set(EXAMPLES) | ELSEWHERE


@pytest.mark.parametrize("key", EXAMPLES)
def test_setting_is_converted(key: str, tmp_path: Path) -> None:
    check_conversion(LLAMA_FACTORY_SETTINGS, tmp_path, *EXAMPLES[key])


def test_all_targets_exclude_the_merger(tmp_path):
    """Check that `all` excludes the layers of the merger, except where the vision encoder has them.

    This applies to Qwen3-VL, not to Qwen2.5-VL.
    """
    free = {"freeze_vision_tower": False, "freeze_multi_modal_projector": False}
    done = convert_settings(tmp_path, LLAMA_FACTORY_SETTINGS | free)
    assert load_converted_recipe(tmp_path).tune.merger == "frozen"
    assert "matches none" in notes_by_setting(done, "note")["freeze_multi_modal_projector"]
    qwen3 = {"model_name_or_path": "Qwen/Qwen3-VL-4B-Instruct"}
    assert recipe(tmp_path, **free, **qwen3).tune.merger == "lora"
    only = {"freeze_multi_modal_projector": False}
    assert recipe(tmp_path, **only, **qwen3).tune.merger == "frozen"


def test_lora_target_matches_part_of_layer_name(tmp_path):
    made = recipe(tmp_path, lora_target="proj", freeze_vision_tower=False)
    assert made.tune.vision == "lora"
    assert set(made.tune.lora.target_modules) >= {"q_proj", "proj", "gate_proj", "down_proj"}
    assert recipe(tmp_path, lora_target="qkv,q_proj").tune.vision == "frozen"
    done = convert_settings(tmp_path, LLAMA_FACTORY_SETTINGS | {"lora_target": "q_proj,W_pack"})
    assert load_converted_recipe(tmp_path).tune.lora.target_modules == ("q_proj",)
    assert "no linear layer" in notes_by_setting(done, "differs")["lora_target"]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"quantization_bit": 8}, "8 by bnb"),
        ({"quantization_bit": 4, "quantization_method": "hqq"}, "4 by hqq"),
        ({"quantization_bit": 4, "quantization_type": "fp4"}, "fp4"),
        ({"quantization_bit": 4, "double_quantization": False}, "without double"),
    ],
)
def test_unsupported_quantization_is_reported(settings, word, tmp_path):
    done = convert_settings(tmp_path, LLAMA_FACTORY_SETTINGS | settings)
    assert any(word in r.value for r in done.notes if r.kind == "differs")


def test_datasets_are_resolved_from_dataset_info(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sets").mkdir()
    info = {
        "tickets": {"file_name": "t/tickets.json", "formatting": "sharegpt"},
        "odd": {"file_name": "odd.json", "columns": {"prompt": "ask", "images": "images"}},
        "online": {"hf_hub_url": "owner/name", "subset": "small", "num_samples": 50},
        "twice": {"hf_hub_url": "owner/a", "ms_hub_url": "owner/b"},
        "liked": {"file_name": "liked.json", "ranking": True},
    }
    (tmp_path / "sets" / "dataset_info.json").write_text(json.dumps(info))
    base = LLAMA_FACTORY_SETTINGS | {"dataset_dir": "sets"}
    done = convert_settings(
        tmp_path, base | {"dataset": "tickets,odd,online,twice", "val_size": 20}
    )
    assert done.import_commands == (
        "finesight import sets/t/tickets.json samples/tickets --eval-last 20",
        "finesight import sets/odd.json samples/odd --eval-last 20",
        "finesight import hf:owner/name:small/train samples/online --limit 50 --eval-last 20",
        "finesight import hf:owner/a samples/twice --eval-last 20",
    )
    assert notes_by_setting(done, "note")["odd: columns"]
    assert "random ones" in notes_by_setting(done, "differs")["online: num_samples"]
    limited = convert_settings(tmp_path, base | {"max_samples": 30})
    assert limited.import_commands[0].endswith("tickets --limit 30")
    away = convert_settings(tmp_path, base | {"media_dir": "images"})
    assert "paths" in notes_by_setting(away, "note")["media_dir"]
    for name, words in (("liked", "preference learning"), ("none", "does not contain none")):
        with pytest.raises(UserError, match=words):
            convert_settings(tmp_path, base | {"dataset": name})


@pytest.mark.parametrize("content", ["{", "[]", "[" * 200_000, None])
def test_descriptions_that_cannot_be_read_are_refused(content, tmp_path, monkeypatch):
    """Without content: a named pipe, which must not be waited for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "dataset_info.json"
    os.mkfifo(path) if content is None else path.write_text(content)
    with pytest.raises(UserError) as caught:
        convert_settings(tmp_path, LLAMA_FACTORY_SETTINGS)
    assert caught.value.where == "data/dataset_info.json"
    assert caught.value.expected == "descriptions of datasets by name"


def test_missing_dataset_info_gives_guessed_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = convert_settings(tmp_path, LLAMA_FACTORY_SETTINGS)
    assert done.import_commands == ("finesight import data/tickets.json samples/tickets",)
    assert "does not exist" in notes_by_setting(done, "note")["dataset_dir"]
    online = convert_settings(
        tmp_path, LLAMA_FACTORY_SETTINGS | {"dataset_dir": "ONLINE", "dataset": "owner/name"}
    )
    assert online.import_commands == ("finesight import hf:owner/name samples/name",)


def test_command_gives_the_gpu_count(tmp_path):
    convert_settings(tmp_path, LLAMA_FACTORY_SETTINGS, "inner.yaml")
    start = "llamafactory-cli train inner.yaml learning_rate=3e-5"
    for before, batch in (
        ("", 8),
        ("FORCE_TORCHRUN=1 NNODES=2 NPROC_PER_NODE=4", 64),
        ("CUDA_VISIBLE_DEVICES=0,2,3", 24),
    ):
        convert_script(tmp_path, f"{before} {start}\n")
        made = load_converted_recipe(tmp_path)
        assert (made.train.batch_size, made.train.learning_rate.default) == (batch, 3e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stage": "dpo"}, "preference learning"),
        ({"stage": "rm"}, "a reward model"),
        ({"stage": "pt"}, "plain text"),
        ({"stage": "ppo"}, "reinforcement"),
        ({"finetuning_type": "freeze"}, "some layers"),
        ({"finetuning_type": "oft"}, "adapter type"),
        ({"model_name_or_path": "meta-llama/Llama-3-8B", "template": "llama3"}, "Qwen vision"),
        ({"model_name_or_path": "Qwen/Qwen2.5-7B-Instruct", "template": "qwen"}, "Qwen vision"),
        ({"do_train": False, "do_predict": True}, "is not a training"),
        ({"do_train": None, "export_dir": "out"}, "is not a training"),
        ({"lora_rank": "many"}, "lora_rank is 'many'"),
        ({"lora_rank": 0}, "lora_rank"),
        ({"bf16": "perhaps"}, "bf16 is 'perhaps'"),
        ({"freeze_language_model": True}, "every part is frozen"),
        ({"dataset": None}, "dataset"),
        ({"val_size": 1.5}, "val_size"),
        ({"image_max_pixels": 5}, "image_max_pixels"),
        ({"warmup_ratio": 1.5}, "warmup_ratio"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size"),
    ],
)
def test_unsupported_training_is_rejected(settings, words, tmp_path):
    with pytest.raises(UserError, match=words):
        convert_settings(tmp_path, LLAMA_FACTORY_SETTINGS | settings)
    assert not (tmp_path / "recipe.yaml").exists()


def test_ignored_settings_are_reported(tmp_path):
    settings = {"use_dora": True, "neat_packing": True, "flash_attn": "fa2", "made_up": 3}
    settings |= {"mask_history": True, "neftune_noise_alpha": 5, "template": "default"}
    done = convert_settings(
        tmp_path, LLAMA_FACTORY_SETTINGS | settings | {"swanlab_api_key": "s3cret"}
    )
    differing = {"use_dora", "neat_packing", "mask_history", "neftune_noise_alpha", "template"}
    assert set(notes_by_setting(done, "differs")) == differing
    assert set(notes_by_setting(done, "unknown")) == {"made_up"}
    assert {"flash_attn", "swanlab_api_key"} <= set(notes_by_setting(done, "ignored"))
    assert "s3cret" not in str(done)


@pytest.mark.parametrize(
    "settings",
    [{"save_strategy": "no"}, {"save_strategy": "epoch", "max_steps": 9}],
    ids=["no", "epochs-of-steps"],
)
def test_unsupported_checkpoint_schedule_is_reported(settings, tmp_path):
    done = convert_settings(tmp_path, LLAMA_FACTORY_SETTINGS | settings)
    assert load_converted_recipe(tmp_path).train.save_every is None
    assert "four checkpoints" in notes_by_setting(done, "note")["save_strategy"]
