"""Scripts and configurations of TRL, Unsloth and Qwen-VL-Series-Finetune, and other objectives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from case_files import load_cases
from convert_fixtures import (
    LLAMA_FACTORY_SETTINGS,
    SWIFT_SETTINGS,
    convert_settings,
    load_converted_recipe,
    notes_by_setting,
)
from image_fixtures import write_gray_image, write_jsonl

from finesight.convert.recipe_converter import ConvertedRecipe, convert_config
from finesight.errors import UserError

TABLES = load_cases("trl_conversions")


def convert(folder: Path, name: str, text: str) -> tuple[ConvertedRecipe, dict[str, object]]:
    (folder / name).write_text(text)
    done = convert_config(folder / name, folder / "recipe.yaml")
    return done, load_converted_recipe(folder).model_dump(mode="json")


@pytest.fixture(autouse=True)
def _rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_gray_image(tmp_path / "a.png")
    turns = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "cat"}]
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns, "images": ["a.png"]}] * 4)
    (tmp_path / "sft.yaml").write_text(TABLES["CLI_FILE"])


@pytest.mark.parametrize("name", ["train.py", "train.ipynb"])
def test_long_scripts_are_read_in_linear_time(name, tmp_path):
    text = "\n" * 90_000 + f"{'Model' * 18_000}[0].from_pretrained('a')\n" + TABLES["UNSLOTH"]
    cells = [{"cell_type": "code", "source": [text]}]
    _, made = convert(tmp_path, name, json.dumps({"cells": cells}) if name[-1] == "b" else text)
    assert made["model"] == "Qwen/Qwen2-VL-7B-Instruct"


@pytest.mark.parametrize("name", ["train.py", "train.ipynb"])
def test_unsloth_script_is_read_without_execution(name, tmp_path):
    cells = [{"cell_type": "code", "source": ["!pip install unsloth\n", TABLES["UNSLOTH"]]}]
    done, made = convert(
        tmp_path, name, json.dumps({"cells": cells}) if name.endswith("b") else TABLES["UNSLOTH"]
    )
    assert (made["model"], made["output_dir"]) == ("Qwen/Qwen2-VL-7B-Instruct", "trainer_output")
    tune, train = made["tune"], made["train"]
    assert (tune["vision"], tune["merger"], tune["language"]) == ("lora", "frozen", "lora")
    assert (tune["lora"]["rank"], tune["lora"]["alpha"], tune["lora"]["dropout"]) == (8, 16, 0)
    assert tune["quantize"]["nf4"] == ["vision", "merger", "language"]
    assert (train["steps"], train["batch_size"], train["optimizer"]) == (30, 8, "adamw_8bit")
    assert (train["learning_rate"]["default"], train["precision"]) == (2e-4, "auto")
    assert (made["image"]["max_pixels"], made["data"]["max_length"]) == (640 * 28 * 28, 2048)
    source = {"source": "hf:unsloth/LaTeX_OCR", "out": "samples/LaTeX_OCR", "limit": 3000}
    assert done.imports == (source,)
    assert set(notes_by_setting(done, "differs")) == {"seed", "output_dir"}
    assert set(notes_by_setting(done, "unknown")) == {"made_up"}


def test_shell_variables_and_arithmetic_are_resolved(tmp_path):
    done, made = convert(tmp_path, "a.sh", TABLES["SERIES"])
    tune, train = made["tune"], made["train"]
    assert (tune["vision"], tune["merger"], tune["language"]) == ("frozen", "full", "lora")
    assert (tune["lora"]["rank"], made["image"]["max_pixels"]) == (16, 1280 * 28 * 28)
    assert (train["batch_size"], train["parallel"], made["output_dir"]) == (16, "fsdp", "out/$1")
    assert train["learning_rate"]["merger"] == 1e-5
    assert done.imports == ({"source": "data.json", "out": "samples/data"},)


def test_trl_command_with_other_model_gets_metric_of_its_data(tmp_path):
    done, made = convert(tmp_path, "a.sh", TABLES["CLI"])
    assert made["model"] == "OpenGVLab/InternVL3-2B-hf"
    assert "transformers backend" in notes_by_setting(done, "note")["model"]
    assert (made["eval"]["metric"], made["eval"]["every"]) == ("classification", 50)
    assert (made["train"]["learning_rate"]["default"], made["train"]["batch_size"]) == (3e-5, 16)
    assert (made["tune"]["lora"]["rank"], made["tune"]["lora"]["alpha"]) == (4, 32)


@pytest.mark.parametrize(
    "settings", TABLES["test_other_objective_keeps_the_part_that_carries_over"]
)
def test_other_objective_keeps_the_part_that_carries_over(settings, tmp_path):
    done = convert_settings(tmp_path, settings)
    notes = notes_by_setting(done, "differs")
    assert "supervised fine-tuning" in notes.get("stage", notes.get("rlhf_type"))
    assert set(notes_by_setting(done, "unknown")) <= {"pref_beta", "kl_coef"}
    made = load_converted_recipe(tmp_path)
    assert made.tune.lora.rank == settings.get("lora_rank", made.tune.lora.rank)
    assert made.train.objective is None
    assert not done.imports


@pytest.mark.parametrize(
    ("name", "text", "expected", "reward", "sizes", "noted"),
    TABLES["test_grpo_is_converted_with_its_rewards"],
)
def test_grpo_is_converted_with_its_rewards(name, text, expected, reward, sizes, noted, tmp_path):
    (tmp_path / "grpo.yaml").write_text(TABLES["GRPO_FILE"])
    done, made = convert(tmp_path, name, text)
    train = made["train"]
    assert (train["objective"], done.imports != ()) == ("grpo", True)
    assert {key: train["grpo"][key] for key in expected} == expected
    assert [{key: one[key] for key in reward} for one in made["rewards"]] == [reward]
    found = train["batch_size"], made["data"]["max_length"], train["learning_rate"]["default"]
    assert [*found] == sizes
    assert sorted(notes_by_setting(done, "differs")) == noted
    assert not notes_by_setting(done, "unknown")


def test_rewards_without_an_equal_are_named(tmp_path):
    settings = {"reward_funcs": ["a.b.score", "accuracy_reward"], "reward_weights": [2, -1]}
    base = {"model_name_or_path": "Qwen/Qwen3-VL-4B", "dataset_name": "rows.jsonl"}
    done = convert_settings(tmp_path, base | settings)
    notes = [note for note in done.notes if note.key == "reward_funcs"]
    assert [note.value for note in notes] == ["a.b.score", "accuracy_reward"]
    assert "{name: rewards.py:score, weight: 2}" in notes[0].text
    assert [reward.name for reward in load_converted_recipe(tmp_path).rewards] == ["exact"]
    done = convert_settings(tmp_path, base | settings | {"reward_weights": [1, "{"]})
    assert "weight: {}" in [note.text for note in done.notes if note.key == "reward_funcs"][-1]
    done = convert_settings(tmp_path, base | settings | {"num_generations": 1, "beta": "{"})
    assert {"num_generations", "beta"} <= set(notes_by_setting(done, "differs"))
    assert load_converted_recipe(tmp_path).train.batch_size == 1


def test_penalty_for_the_distance_from_a_changed_model_is_dropped(tmp_path):
    base = {"model_name_or_path": "Qwen/Qwen3-VL-4B", "reward_funcs": "accuracy_reward"}
    base |= {"dataset_name": "rows.jsonl", "beta": 0.04}
    done = convert_settings(tmp_path, base)
    assert "beta" in notes_by_setting(done, "differs")
    assert load_converted_recipe(tmp_path).train.grpo.beta == 0
    assert "load_in_4bit" in notes_by_setting(
        convert_settings(tmp_path, base | {"load_in_4bit": True}), "differs"
    )
    done = convert_settings(tmp_path, base | {"use_peft": True})
    assert "beta" not in notes_by_setting(done, "differs")
    assert load_converted_recipe(tmp_path).train.grpo.beta == 0.04


@pytest.mark.parametrize(
    ("name", "text", "expected", "sizes", "noted"),
    TABLES["test_distillation_is_converted_with_its_teacher"],
)
def test_distillation_is_converted_with_its_teacher(name, text, expected, sizes, noted, tmp_path):
    done, made = convert(tmp_path, name, text)
    keys = ("teacher", "beta", "lmbda", "temperature", "top_k", "max_completion_length")
    assert made["train"]["objective"] == "distill"
    assert [made["train"]["distill"][key] for key in keys] == expected
    assert made["model"].endswith("Qwen/Qwen2.5-VL-3B-Instruct")
    assert [made["data"]["max_length"], made["train"]["learning_rate"]["default"]] == sizes
    assert sorted({*notes_by_setting(done, "differs")} - {"dataset"}) == noted
    assert not notes_by_setting(done, "unknown")


PAIR_SETTINGS = TABLES["test_objectives_on_pairs_are_converted"]


@pytest.mark.parametrize(("settings", "objective"), PAIR_SETTINGS)
def test_objectives_on_pairs_are_converted(tmp_path, settings, objective):
    done = convert_settings(tmp_path, settings)
    train = load_converted_recipe(tmp_path).train
    assert train.objective == objective
    section = dict(dict(train)[objective])
    assert section["beta"] == 0.3
    assert section.get("simpo_gamma", 0.5) == 0.5
    assert section.get("desirable_weight", 2) == 2
    assert done.imports
    notes = {*notes_by_setting(done, "differs"), *notes_by_setting(done, "unknown")}
    assert not {"stage", "rlhf_type", "beta", "pref_beta", "pref_loss", "simpo_gamma"} & notes
    assert not {"loss_type", "loss_weights"} & notes


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({"loss_type": ["ipo", "sft"], "loss_weights": [1, 0.5]}, (("ipo", "sft"), (1.0, 0.5))),
        ({"loss_type": "hinge"}, (("hinge",), None)),
    ],
)
def test_losses_of_pairs_are_converted(given, settings, tmp_path):
    base = {"model_name_or_path": "Qwen/Qwen3-VL-4B", "beta": 0.3, "dataset_name": "a.jsonl"}
    done = convert_settings(tmp_path, base | given)
    assert not given.keys() & notes_by_setting(done, "differs").keys()
    dpo = load_converted_recipe(tmp_path).train.dpo
    assert (dpo.loss_type, dpo.loss_weights) == settings


def test_unsupported_loss_of_pairs_is_noted(tmp_path):
    settings = LLAMA_FACTORY_SETTINGS | {"stage": "dpo", "pref_loss": "kto_pair", "pref_ftx": 0.5}
    done = convert_settings(tmp_path, settings)
    assert "pref_loss" in notes_by_setting(done, "differs")
    assert "pref_ftx" in notes_by_setting(done, "unknown")
    done = convert_settings(tmp_path, SWIFT_SETTINGS | {"loss_type": ["sigmoid", "bco_pair"]})
    assert "loss_type" in notes_by_setting(done, "differs")


def test_methods_of_trl_have_their_own_learning_rate(tmp_path):
    (tmp_path / "run.sh").write_text(f"trl dpo {STARTED}")
    done = convert_config(tmp_path / "run.sh", tmp_path / "recipe.yaml")
    assert yaml.safe_load(done.recipe_text)["train"]["learning_rate"] == {"default": 1e-6}


MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
CONFIG = f"model_name_or_path: {MODEL}\nuse_peft: true\ndataset_name: rows.jsonl\n"
STARTED = f"--model_name_or_path {MODEL} --dataset_name rows.jsonl --output_dir o"
ACCELERATE = "deepspeed_config: {zero_stage: 2}\nnum_processes: 8\n"


@pytest.mark.parametrize(
    ("name", "text", "settings", "noted"), TABLES["test_settings_of_scripts_and_launchers_are_kept"]
)
def test_settings_of_scripts_and_launchers_are_kept(name, text, settings, noted, tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "accelerate.yaml").write_text(ACCELERATE)
    (tmp_path / name).write_text(text, newline="")
    done = convert_config(tmp_path / name, tmp_path / "recipe.yaml")
    made = load_converted_recipe(tmp_path)
    found = {
        **{"model": made.model, "import": [*done.imports, None][0]},
        **{"max_length": made.data.max_length, "parallel": made.train.parallel},
        **{"batch_size": made.train.batch_size, "output_dir": str(made.output_dir)},
    }
    assert {key: found[key] for key in settings} == settings
    assert sorted(notes_by_setting(done, "differs")) == noted


@pytest.mark.parametrize(
    "command", ["megatron sft --load a", "python qwenvl/train/train_qwen.py", "echo", "swift pt"]
)
def test_script_of_another_kind_is_refused_with_the_next_command(command, tmp_path):
    with pytest.raises(UserError) as caught:
        convert(tmp_path, "a.sh", command)
    assert "finesight init" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("before", "arguments", "after", "expected"),
    TABLES["test_only_constants_of_the_used_configuration_are_read"],
)
def test_only_constants_of_the_used_configuration_are_read(
    before, arguments, after, expected, tmp_path
):
    text = TABLES["SCRIPT"].format(before=before, arguments=arguments, after=after)
    done, made = convert(tmp_path, "a.py", text)
    epochs, unresolved = (4, ["**kw"]) if expected == "**kw" else expected
    assert made["train"]["epochs"] == epochs
    assert {*notes_by_setting(done, "differs")} == {"dataset", *unresolved}
    assert made["train"]["learning_rate"]["default"] == 2e-5
    assert made["train"]["weight_decay"] == 0


def test_two_configurations_are_never_mixed(tmp_path):
    text = TABLES["SCRIPT"].format(before="", arguments="seed=1", after="cfg = SFTConfig(seed=2)")
    with pytest.raises(UserError, match="has several training arguments, in lines 4, 5"):
        convert(tmp_path, "a.py", text)


def test_shell_arrays_and_assigned_defaults_are_resolved(tmp_path):
    text = """
readonly MODEL=Qwen/Qwen2.5-VL-3B-Instruct
: "${E:=4}"
ARGS=(
    --model_name_or_path "$MODEL"  # the model
    --dataset_name "my rows.jsonl" )
ARGS+=(--num_train_epochs $E)
trl sft "${ARGS[@]}" --lora_r 4 --use_peft
"""
    done, made = convert(tmp_path, "a.sh", text)
    assert (made["model"], made["train"]["epochs"]) == ("Qwen/Qwen2.5-VL-3B-Instruct", 4)
    assert done.imports[0]["source"] == "my rows.jsonl"
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(UserError, match="depends on"):
        convert(tmp_path, "a.sh", text.replace("[@]", "[@]:2"))


@pytest.mark.parametrize(
    ("options", "tune", "embeddings"), TABLES["test_scripts_of_qwen_vl_are_converted"]
)
def test_scripts_of_qwen_vl_are_converted(options, tune, embeddings, tmp_path):
    """Check its targets, which exclude the vision encoder, and the embeddings of base models."""
    start = "torchrun --nproc_per_node $GPUS finetune.py --data_path rows.jsonl --fix_vit True"
    script = f"GPUS=2\n{start} --model_max_length 600 --adam_beta2 0.95 {options}"
    done, made = convert(tmp_path, "a.sh", script)
    assert made["data"]["max_length"] == 600
    assert (made["train"]["batch_size"], made["train"]["betas"][1]) == (16, 0.95)
    assert [made["tune"][part] for part in ("vision", "merger", "language")] == tune
    assert made["tune"]["embeddings"] == embeddings
    if "lora" in tune:
        assert made["tune"]["lora"]["target_modules"] == ["c_attn", "attn.c_proj", "w1", "w2"]
        assert (made["tune"]["lora"]["rank"], made["tune"]["lora"]["alpha"]) == (64, 16)
    assert not notes_by_setting(done, "unknown")
