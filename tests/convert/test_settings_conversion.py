"""Settings, each against what LLaMA-Factory 0.9.5 and ms-swift 4.6.0 do with it."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
from case_files import load_cases
from convert_fixtures import (
    LLAMA_FACTORY_SETTINGS,
    SWIFT_SETTINGS,
    check_conversion,
    convert_script,
    convert_settings,
    convert_to_recipe,
    load_converted_recipe,
    notes_by_setting,
)

from finesight.convert.external_config import load_rules
from finesight.errors import UserError

TABLES = load_cases("settings_conversion")

recipe = partial(convert_to_recipe, LLAMA_FACTORY_SETTINGS)
swift_recipe = partial(convert_to_recipe, SWIFT_SETTINGS)


CASES = load_cases("conversions")
PROGRAMS = {"LLaMA-Factory": LLAMA_FACTORY_SETTINGS, "ms-swift": SWIFT_SETTINGS}
EXAMPLES = {
    "LLaMA-Factory": load_cases("llama_factory_settings"),
    "ms-swift": load_cases("ms_swift_settings"),
}
"""What one setting becomes, the others at their defaults."""
TESTED_BELOW = {
    *("stage", "dataset_dir", "max_samples", "task_type", "bnb_4bit_quant_type"),
    *("quant_method", "bnb_4bit_use_double_quant"),
    # With their objectives in test_trl.
    *("rlhf_type", "beta", "pref_beta", "pref_loss", "simpo_gamma"),
    *("desirable_weight", "undesirable_weight", "kto_chosen_weight", "kto_rejected_weight"),
}


def test_every_convertible_setting_has_an_example():
    for program in PROGRAMS:
        tested = {*EXAMPLES["LLaMA-Factory"], *EXAMPLES[program], *TESTED_BELOW}
        assert load_rules(program).converted <= tested


@pytest.mark.parametrize(("program", "key"), [(p, key) for p in PROGRAMS for key in EXAMPLES[p]])
def test_setting_is_converted(program: str, key: str, tmp_path: Path) -> None:
    check_conversion(PROGRAMS[program], tmp_path, *EXAMPLES[program][key])


@pytest.mark.parametrize(
    ("program", "settings", "words"), [(p, *case) for p in PROGRAMS for case in CASES[p]]
)
def test_unsupported_training_is_rejected(program, settings, words, tmp_path):
    with pytest.raises(UserError, match=words):
        convert_settings(tmp_path, PROGRAMS[program] | settings)
    assert not (tmp_path / "recipe.yaml").exists()


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
    made = recipe(tmp_path, lora_target="q_proj,attn.proj", freeze_vision_tower=False)
    assert made.tune.lora.target_modules == ("q_proj", "proj")
    done = convert_settings(tmp_path, LLAMA_FACTORY_SETTINGS | {"lora_target": "q_proj,W_pack"})
    assert load_converted_recipe(tmp_path).tune.lora.target_modules == ("q_proj",)
    assert "no linear layer" in notes_by_setting(done, "differs")["lora_target"]


@pytest.mark.parametrize(("settings", "word"), TABLES["test_unsupported_quantization_is_reported"])
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
    assert done.imports == (
        {"source": "sets/t/tickets.json", "out": "samples/tickets", "eval_last": 20},
        {
            "source": "sets/odd.json",
            "out": "samples/odd",
            "eval_last": 20,
            "columns": {"image": "images", "question": "ask", "answer": "output"},
        },
        {"source": "hf:owner/name:small/train", "out": "samples/online", "eval_last": 20},
        {"source": "hf:owner/a", "out": "samples/twice", "eval_last": 20},
    )
    assert set(notes_by_setting(done, "differs")) == {"online: num_samples"}
    limited = convert_settings(tmp_path, base | {"max_samples": 30})
    assert limited.imports[0]["limit"] == 30
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
    assert done.imports == ({"source": "data/tickets.json", "out": "samples/tickets"},)
    assert "correct the commands" in notes_by_setting(done, "note")["dataset_dir"]
    online = convert_settings(
        tmp_path, LLAMA_FACTORY_SETTINGS | {"dataset_dir": "ONLINE", "dataset": "owner/name"}
    )
    assert online.imports == ({"source": "hf:owner/name", "out": "samples/name"},)


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


@pytest.mark.parametrize("program", PROGRAMS)
def test_defaults_match_the_program(program, tmp_path):
    check_conversion(PROGRAMS[program], tmp_path, {}, TABLES["defaults"][program])


def test_inline_deepspeed_config_is_parsed(tmp_path):
    inside = '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}'
    assert swift_recipe(tmp_path, deepspeed=inside).train.parallel == "fsdp_offload"


def test_target_modules_match_across_the_model(tmp_path):
    """Check that peft compares suffixes of all names: the vision encoder has a gate_proj, too."""
    made = swift_recipe(tmp_path, target_modules=["gate_proj"])
    assert (made.tune.vision, made.tune.language) == ("lora", "lora")
    assert made.tune.lora.target_modules == ("gate_proj",)
    longer = convert_settings(
        tmp_path, SWIFT_SETTINGS | {"target_modules": ["layers.3.self_attn.q_proj"]}
    )
    assert load_converted_recipe(tmp_path).tune.lora.target_modules == ("q_proj",)
    assert "all layers" in notes_by_setting(longer, "differs")["target_modules"]
    none = convert_settings(tmp_path, SWIFT_SETTINGS | {"target_modules": ["W_pack"]})
    assert load_converted_recipe(tmp_path).tune.lora.target_modules is None
    assert "ignored" in notes_by_setting(none, "differs")["target_modules"]
    assert "all linear layers" in notes_by_setting(none, "note")["target_modules"]
    older = swift_recipe(tmp_path, model="Qwen/Qwen2-VL-2B-Instruct", target_modules=["gate_proj"])
    assert older.tune.vision == "frozen"


@pytest.mark.parametrize(("variables", "pixels"), CASES["images"])
def test_image_sizes_come_from_environment(variables, pixels, tmp_path):
    convert_script(tmp_path, f"{variables} swift sft --model Qwen/Qwen2-VL-2B --dataset a.jsonl")
    image = load_converted_recipe(tmp_path).image
    assert (image.min_pixels, image.max_pixels) == tuple(pixels)


@pytest.mark.parametrize(("before", "arguments", "batch"), CASES["batches"])
def test_batch_size_counts_all_gpus(before, arguments, batch, tmp_path):
    start = "swift sft --model Qwen/Qwen2-VL-2B-Instruct --dataset a.jsonl"
    convert_script(tmp_path, f"{before} {start} {arguments}\n")
    assert load_converted_recipe(tmp_path).train.batch_size == batch


def test_hub_datasets_become_imports(tmp_path):
    names = ["AI-ModelScope/LaTeX_OCR:small#200", "MS::a/b", "HF::c/d", "x/y:all"]
    done = convert_settings(tmp_path, SWIFT_SETTINGS | {"dataset": names})
    source = "modelscope:AI-ModelScope/LaTeX_OCR:small/train"
    assert done.imports == (
        {"source": source, "out": "samples/LaTeX_OCR", "limit": 200},
        {"source": "modelscope:a/b", "out": "samples/b"},
        {"source": "hf:c/d", "out": "samples/d"},
        {"source": "modelscope:x/y", "out": "samples/y"},
    )


def test_finished_run_is_converted_from_args_json(tmp_path):
    """Its args.json has all settings, those that it worked out among them, and no variables."""
    done = convert_settings(tmp_path, SWIFT_SETTINGS | CASES["args_json"], "args.json")
    made = load_converted_recipe(tmp_path)
    assert (made.train.batch_size, made.train.parallel) == (2 * 2 * 4, "fsdp")
    assert (made.tune.vision, made.tune.merger) == ("full", "frozen")
    assert made.output_dir == Path("runs/v0-2026")
    assert "MAX_PIXELS" in notes_by_setting(done, "note")
    assert not notes_by_setting(done, "differs")
    assert set(notes_by_setting(done, "unknown")) == {"something_else"}


@pytest.mark.parametrize("settings", CASES["differences"], ids=lambda settings: "-".join(settings))
def test_differences_are_reported(settings, tmp_path):
    done = convert_settings(tmp_path, SWIFT_SETTINGS | settings)
    assert len(notes_by_setting(done, "differs")) == 1


def test_equivalent_settings_are_no_difference(tmp_path):
    same = {"loss_scale": "default", "use_dora": False, "init_weights": "true", "packing": "false"}
    same |= {"dataset_shuffle": True, "truncation_strategy": "delete", "adam_epsilon": 1e-08}
    same |= {"freeze_parameters_ratio": 0.0, "lora_bias": "none", "template": "qwen2_5_vl"}
    done = convert_settings(tmp_path, SWIFT_SETTINGS | same)
    assert not notes_by_setting(done, "differs")
    assert set(same) <= set(notes_by_setting(done, "ignored"))
