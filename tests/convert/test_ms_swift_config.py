"""ms-swift's settings, each against what ms-swift 4.6.0 does with it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from convert_fixtures import (
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

recipe = partial(convert_to_recipe, SWIFT_SETTINGS)


def test_defaults_match_ms_swift(tmp_path):
    made = recipe(tmp_path)
    lora, train = made.tune.lora, made.train
    assert made.model == "modelscope:Qwen/Qwen2.5-VL-7B-Instruct"
    assert (lora.rank, lora.alpha, lora.dropout, lora.target_modules) == (8, 32.0, 0.05, None)
    assert (made.tune.vision, made.tune.merger, made.tune.language) == ("frozen", "frozen", "lora")
    assert (train.epochs, train.batch_size, train.learning_rate.default) == (3.0, 16, 1e-4)
    assert (train.lr_schedule, train.warmup, train.weight_decay) == ("cosine", 0, 0.1)
    assert (train.betas, train.max_grad_norm, train.optimizer) == ((0.9, 0.95), 1.0, "adamw")
    assert (train.precision, train.seed, train.save_every) == ("bf16", 42, 500)
    assert made.image.model_dump() == {"min_pixels": 3136, "max_pixels": 12_845_056}
    assert (made.data.max_length, [t.kind for t in made.track]) == (128_000, ["tensorboard"])


def full(**settings: object) -> dict[str, object]:
    return {"tuner_type": "full", **settings}


EXAMPLES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "model": ({"model": "Qwen/Qwen2-VL-2B-Instruct"}, {"data.max_length": 32_768}),
    "model_revision": (
        {"model_revision": "v2"},
        {"model": "modelscope:Qwen/Qwen2.5-VL-7B-Instruct@v2"},
    ),
    "use_hf": ({"use_hf": True}, {"model": "Qwen/Qwen2.5-VL-7B-Instruct"}),
    "model_type": (
        {"model": "./mine", "model_type": "qwen3_vl"},
        {"image.max_pixels": 16_777_216, "data.max_length": 262_144},
    ),
    "adapters": ({"adapters": ["out/v0"]}, {"adapter": "out/v0"}),
    "dataset": (
        {"dataset": ["a.jsonl", "HF::owner/name"]},
        {"data.train.1.path": "samples/name/data.jsonl"},
    ),
    "val_dataset": ({"val_dataset": ["b.jsonl"]}, {"data.eval.0.path": "samples/b/data.jsonl"}),
    "split_dataset_ratio": (
        {"split_dataset_ratio": 0.05},
        {"data.eval.0.path": "samples/tickets/eval.jsonl"},
    ),
    "system": ({"system": "One.\\nTwo."}, {"data.system_prompt": "One.\nTwo."}),
    "max_length": ({"max_length": 4096}, {"data.max_length": 4096}),
    "strict": ({"strict": True}, {"data.on_invalid_sample": "fail"}),
    "max_pixels": ({"max_pixels": 300_000}, {"image.max_pixels": 300_000}),
    "model_kwargs": (
        {"model_kwargs": '{"MAX_PIXELS": 602112}'},
        {"image.max_pixels": 602_112},
    ),
    "tuner_type": (
        full(),
        {"tune.language": "full", "tune.embeddings": "full", "train.learning_rate.default": 1e-5},
    ),
    "freeze_vit": ({"freeze_vit": False}, {"tune.vision": "lora", "tune.merger": "frozen"}),
    "freeze_aligner": (full(freeze_aligner=False), {"tune.merger": "full"}),
    "freeze_llm": (
        full(freeze_llm=True, freeze_vit=False),
        {"tune.language": "frozen", "tune.embeddings": "frozen", "tune.vision": "full"},
    ),
    "target_modules": (
        {"target_modules": ["q_proj", "v_proj"], "freeze_vit": False},
        {"tune.lora.target_modules": ["q_proj", "v_proj"], "tune.vision": "frozen"},
    ),
    "modules_to_save": ({"modules_to_save": ["embed_tokens"]}, {"tune.embeddings": "full"}),
    "lora_rank": ({"lora_rank": 16}, {"tune.lora.rank": 16, "tune.lora.alpha": 32.0}),
    "lora_alpha": ({"lora_alpha": 64}, {"tune.lora.alpha": 64.0}),
    "lora_dropout": ({"lora_dropout": 0}, {"tune.lora.dropout": 0.0}),
    "use_rslora": ({"use_rslora": True, "lora_rank": 16}, {"tune.lora.alpha": 128.0}),
    "quant_bits": ({"quant_method": "bnb", "quant_bits": 4}, {"tune.quantize.nf4": ["language"]}),
    "quant_method": ({"quant_method": "bnb", "quant_bits": 4}, {"tune.quantize.nf4": ["language"]}),
    "vit_lr": (
        {"vit_lr": 1e-5},
        {"train.learning_rate.vision": 1e-5, "train.learning_rate.default": 1e-4},
    ),
    "aligner_lr": ({"aligner_lr": 2e-5}, {"train.learning_rate.merger": 2e-5}),
    "torch_dtype": ({"torch_dtype": "float16"}, {"train.precision": "fp16"}),
    "bf16": ({"bf16": False, "fp16": False}, {"train.precision": "fp32"}),
    "fp16": ({"bf16": False, "fp16": True}, {"train.precision": "fp16"}),
    "max_epochs": ({"max_epochs": 2}, {"train.epochs": 2.0}),
    "swanlab_project": (
        {"report_to": ["swanlab"], "swanlab_project": "mine"},
        {"track.0.project": "mine"},
    ),
    "per_device_train_batch_size": ({"per_device_train_batch_size": 3}, {"train.batch_size": 18}),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 2}, {"train.batch_size": 2}),
    "sequence_parallel_size": (
        {
            "sequence_parallel_size": 4,
            "per_device_train_batch_size": 3,
            "ENV": {"NPROC_PER_NODE": 8},
        },
        # Two groups of four: 3 samples x 2 groups x ceil(16 / 3 / 2) times.
        {"train.batch_size": 18},
    ),
}
"""What one setting becomes, the others at their defaults. What both programs take from transformers
is with LLaMA-Factory's."""

ELSEWHERE = {"task_type", "freeze_parameters", "trainable_parameters"} | {
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
}
"""What has a test of its own below."""


def test_every_convertible_setting_has_an_example():
    becoming = load_rules("ms-swift").converted
    of_both = load_rules("LLaMA-Factory").converted
    assert becoming == set(EXAMPLES) | ELSEWHERE | (becoming & of_both)


@pytest.mark.parametrize("key", EXAMPLES)
def test_setting_is_converted(key: str, tmp_path: Path) -> None:
    check_conversion(SWIFT_SETTINGS, tmp_path, *EXAMPLES[key])


def test_lora_llm_trains_full_vision_encoder(tmp_path):
    """`lora_llm` hands on rank and alpha alone, and heeds nothing that is frozen."""
    settings = {"tuner_type": "lora_llm", "vit_lr": 1e-5, "freeze_vit": True, "lora_dropout": 0.1}
    done = convert_settings(tmp_path, SWIFT_SETTINGS | settings)
    made = load_converted_recipe(tmp_path)
    assert (made.tune.vision, made.tune.merger, made.tune.language) == ("full", "full", "lora")
    assert (made.tune.lora.rank, made.tune.lora.alpha, made.tune.lora.dropout) == (8, 32.0, 0.0)
    assert (made.train.learning_rate.default, made.train.learning_rate.vision) == (1e-4, 1e-5)
    assert set(notes_by_setting(done, "note")) == {"lora_dropout", "batch"}


def test_inline_deepspeed_config_is_parsed(tmp_path):
    inside = '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}'
    assert recipe(tmp_path, deepspeed=inside).train.parallel == "fsdp_offload"


def test_target_modules_match_across_the_model(tmp_path):
    """Check that peft compares suffixes of all names: the vision encoder has a gate_proj, too."""
    made = recipe(tmp_path, target_modules=["gate_proj"])
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
    older = recipe(tmp_path, model="Qwen/Qwen2-VL-2B-Instruct", target_modules=["gate_proj"])
    assert older.tune.vision == "frozen"


@pytest.mark.parametrize(
    ("variables", "pixels"),
    [
        ("MAX_PIXELS=1003520", (3136, 1_003_520)),
        # Rounded down to whole tokens of 28 x 28.
        ("MAX_PIXELS=1000000 MIN_PIXELS=100000", (99_568, 999_600)),
        ("IMAGE_MAX_TOKEN_NUM=1024 MAX_PIXELS=50176", (3136, 802_816)),
    ],
)
def test_image_sizes_come_from_environment(variables, pixels, tmp_path):
    convert_script(tmp_path, f"{variables} swift sft --model Qwen/Qwen2-VL-2B --dataset a.jsonl")
    image = load_converted_recipe(tmp_path).image
    assert (image.min_pixels, image.max_pixels) == pixels


@pytest.mark.parametrize(
    ("before", "arguments", "batch"),
    [
        ("", "", 16),
        ("NPROC_PER_NODE=2", "", 16),
        ("NPROC_PER_NODE=8", "--per_device_train_batch_size 4", 32),
        ("NPROC_PER_NODE=8 NNODES=2", "--gradient_accumulation_steps 2", 32),
        # One process over four cards: the model lies in parts.
        ("CUDA_VISIBLE_DEVICES=0,1,2,3", "--gradient_accumulation_steps 2", 2),
        ("", "--batch_size 2 --gradient_accumulation_steps 3", 6),
    ],
)
def test_batch_size_counts_all_gpus(before, arguments, batch, tmp_path):
    start = "swift sft --model Qwen/Qwen2-VL-2B-Instruct --dataset a.jsonl"
    convert_script(tmp_path, f"{before} {start} {arguments}\n")
    assert load_converted_recipe(tmp_path).train.batch_size == batch


def test_hub_datasets_become_import_commands(tmp_path):
    names = ["AI-ModelScope/LaTeX_OCR:small#200", "MS::a/b", "HF::c/d", "x/y:all"]
    done = convert_settings(tmp_path, SWIFT_SETTINGS | {"dataset": names})
    assert done.import_commands == (
        "finesight import modelscope:AI-ModelScope/LaTeX_OCR:small/train"
        " samples/LaTeX_OCR --limit 200",
        "finesight import modelscope:a/b samples/b",
        "finesight import hf:c/d samples/d",
        "finesight import modelscope:x/y samples/y",
    )


def test_finished_run_is_converted_from_args_json(tmp_path):
    """Its args.json has all settings, those that it worked out among them, and no variables."""
    record = SWIFT_SETTINGS | {
        "swift_version": "4.6.0",
        "tuner_type": "full",
        "task_type": "causal_lm",
        "freeze_vit": False,
        "freeze_parameters": ["model.visual.merger"],
        "trainable_parameters": [],
        "torch_dtype": "bfloat16",
        "bf16": True,
        "global_world_size": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": None,
        "learning_rate": 1e-5,
        "output_dir": "/root/output/v0-2026",
        "deepspeed": {"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}},
        "eval_strategy": "no",
        "eval_steps": 500,
        "something_new": None,
        "something_else": 5,
    }
    done = convert_settings(tmp_path, record, "args.json")
    made = load_converted_recipe(tmp_path)
    assert (made.train.batch_size, made.train.parallel) == (2 * 2 * 4, "fsdp")
    assert (made.tune.vision, made.tune.merger) == ("full", "frozen")
    assert made.output_dir == Path("runs/v0-2026")
    assert "MAX_PIXELS" in notes_by_setting(done, "note")
    assert not notes_by_setting(done, "differs")
    assert set(notes_by_setting(done, "unknown")) == {"something_else"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tuner_type": "dora"}, "tuner_type is dora"),
        ({"tuner_type": "adalora"}, "adapter type"),
        ({"task_type": "seq_cls"}, "without text generation"),
        ({"model": "Qwen/Qwen3-8B"}, "Qwen vision-language"),
        ({"split_dataset_ratio": 2}, "split_dataset_ratio"),
        ({"model_kwargs": "{"}, "model_kwargs"),
        ({"ENV": {"NPROC_PER_NODE": "all"}}, "NPROC_PER_NODE"),
        ({"freeze_llm": True}, "every part is frozen"),
        ({"model": ""}, "has no model"),
        ({"system": "missing.txt"}, "system"),
    ],
)
def test_unsupported_training_is_rejected(settings, words, tmp_path):
    with pytest.raises(UserError, match=words):
        convert_settings(tmp_path, SWIFT_SETTINGS | settings)
    assert not (tmp_path / "recipe.yaml").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_scale": "last_round"},
        {"use_dora": True},
        {"packing": True},
        {"init_weights": "pissa"},
        {"freeze_parameters": ["model.language_model.layers.0"]},
        {"trainable_parameters": ["lm_head"]},
        {"truncation_strategy": "left"},
        {"dataset_shuffle": False},
        {"norm_bbox": "none"},
        {"lora_bias": "all"},
        {"optim": "lion_32bit"},
        {"lr_scheduler_type": "cosine_with_min_lr"},
        {"report_to": ["comet_ml"]},
        {"modules_to_save": ["visual.merger"]},
        {"label_smoothing_factor": 0.1},
        {"adam_epsilon": 1e-6},
        {"quant_method": "hqq", "quant_bits": 4},
        {"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_quant_type": "fp4"},
        {"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_use_double_quant": False},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_differences_are_reported(settings, tmp_path):
    assert (
        len(notes_by_setting(convert_settings(tmp_path, SWIFT_SETTINGS | settings), "differs")) == 1
    )


def test_equivalent_settings_are_no_difference(tmp_path):
    same = {"loss_scale": "default", "use_dora": False, "init_weights": "true", "packing": "false"}
    same |= {"dataset_shuffle": True, "truncation_strategy": "delete", "adam_epsilon": 1e-08}
    same |= {"freeze_parameters_ratio": 0.0, "lora_bias": "none", "template": "qwen2_5_vl"}
    done = convert_settings(tmp_path, SWIFT_SETTINGS | same)
    assert not notes_by_setting(done, "differs")
    assert set(same) <= set(notes_by_setting(done, "ignored"))
