"""ms-swift's settings, each against what ms-swift 4.6.0 does with it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from converting import SWIFT, from_script, from_settings, made_of, recipe_of, told, try_example

from finesight.convert.ms_swift_keys import RULES
from finesight.convert.rules import Becomes
from finesight.errors import UserError

recipe = partial(made_of, SWIFT)


def test_its_defaults_are_written_out(tmp_path):
    made = recipe(tmp_path)
    lora, train = made.tune.lora, made.train
    assert made.model == "modelscope:Qwen/Qwen2.5-VL-7B-Instruct"
    assert (lora.rank, lora.alpha, lora.dropout, lora.targets) == (8, 32.0, 0.05, None)
    assert (made.tune.vision, made.tune.merger, made.tune.language) == ("frozen", "frozen", "lora")
    assert (train.epochs, train.batch, train.learning_rate.default) == (3.0, 16, 1e-4)
    assert (train.schedule, train.warmup, train.weight_decay) == ("cosine", 0, 0.1)
    assert (train.betas, train.clip, train.optimizer) == ((0.9, 0.95), 1.0, "adamw")
    assert (train.precision, train.seed, train.save_every) == ("bf16", 42, 500)
    assert made.picture.model_dump() == {"min_pixels": 3136, "max_pixels": 12_845_056}
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
        {"picture.max_pixels": 16_777_216, "data.max_length": 262_144},
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
    "system": ({"system": "One.\\nTwo."}, {"data.system": "One.\nTwo."}),
    "max_length": ({"max_length": 4096}, {"data.max_length": 4096}),
    "strict": ({"strict": True}, {"data.unusable": "refuse"}),
    "max_pixels": ({"max_pixels": 300_000}, {"picture.max_pixels": 300_000}),
    "model_kwargs": (
        {"model_kwargs": '{"MAX_PIXELS": 602112}'},
        {"picture.max_pixels": 602_112},
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
        {"tune.lora.targets": ["q_proj", "v_proj"], "tune.vision": "frozen"},
    ),
    "modules_to_save": ({"modules_to_save": ["embed_tokens"]}, {"tune.embeddings": "full"}),
    "lora_rank": ({"lora_rank": 16}, {"tune.lora.rank": 16, "tune.lora.alpha": 32.0}),
    "lora_alpha": ({"lora_alpha": 64}, {"tune.lora.alpha": 64.0}),
    "lora_dropout": ({"lora_dropout": 0}, {"tune.lora.dropout": 0.0}),
    "use_rslora": ({"use_rslora": True, "lora_rank": 16}, {"tune.lora.alpha": 128.0}),
    "quant_bits": ({"quant_method": "bnb", "quant_bits": 4}, {"tune.nf4": ["language"]}),
    "quant_method": ({"quant_method": "bnb", "quant_bits": 4}, {"tune.nf4": ["language"]}),
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
    "per_device_train_batch_size": ({"per_device_train_batch_size": 3}, {"train.batch": 18}),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 2}, {"train.batch": 2}),
    "sequence_parallel_size": (
        {
            "sequence_parallel_size": 4,
            "per_device_train_batch_size": 3,
            "ENV": {"NPROC_PER_NODE": 8},
        },
        # Two groups of four: 3 samples x 2 groups x ceil(16 / 3 / 2) times.
        {"train.batch": 18},
    ),
}
"""What one setting becomes, the others at their defaults. What both programs take from transformers
is with LLaMA-Factory's."""

ELSEWHERE = {"task_type", "freeze_parameters", "trainable_parameters"} | {
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
}
"""What has a test of its own below."""


def test_every_setting_that_becomes_one_has_an_example():
    from finesight.convert.trainer_keys import RULES as OF_BOTH

    becoming = {key for key, rule in RULES.items() if isinstance(rule, Becomes)}
    assert becoming == set(EXAMPLES) | ELSEWHERE | (becoming & set(OF_BOTH))


@pytest.mark.parametrize("key", EXAMPLES)
def test_a_setting_becomes(key: str, tmp_path: Path) -> None:
    try_example(SWIFT, tmp_path, *EXAMPLES[key])


def test_adapters_beside_a_whole_tower(tmp_path):
    """`lora_llm` hands on rank and alpha alone, and heeds nothing that is frozen."""
    settings = {"tuner_type": "lora_llm", "vit_lr": 1e-5, "freeze_vit": True, "lora_dropout": 0.1}
    done = from_settings(tmp_path, SWIFT | settings)
    made = recipe_of(tmp_path)
    assert (made.tune.vision, made.tune.merger, made.tune.language) == ("full", "full", "lora")
    assert (made.tune.lora.rank, made.tune.lora.alpha, made.tune.lora.dropout) == (8, 32.0, 0.0)
    assert (made.train.learning_rate.default, made.train.learning_rate.vision) == (1e-4, 1e-5)
    assert set(told(done, "note")) == {"lora_dropout", "batch"}


def test_deepspeed_in_a_word(tmp_path):
    inside = '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}'
    assert recipe(tmp_path, deepspeed=inside).train.parallel == "fsdp_offload"


def test_targets_are_found_in_all_of_the_model(tmp_path):
    """peft compares ends of names, whatever is frozen: Qwen2.5-VL's tower has a gate_proj, too."""
    made = recipe(tmp_path, target_modules=["gate_proj"])
    assert (made.tune.vision, made.tune.language) == ("lora", "lora")
    assert made.tune.lora.targets == ("gate_proj",)
    longer = from_settings(tmp_path, SWIFT | {"target_modules": ["layers.3.self_attn.q_proj"]})
    assert recipe_of(tmp_path).tune.lora.targets == ("q_proj",)
    assert "every layer" in told(longer, "differs")["target_modules"]
    none = from_settings(tmp_path, SWIFT | {"target_modules": ["W_pack"]})
    assert recipe_of(tmp_path).tune.lora.targets is None
    assert "left out" in told(none, "differs")["target_modules"]
    assert "all linear layers" in told(none, "note")["target_modules"]
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
def test_sizes_come_from_the_environment(variables, pixels, tmp_path):
    from_script(tmp_path, f"{variables} swift sft --model Qwen/Qwen2-VL-2B --dataset a.jsonl")
    picture = recipe_of(tmp_path).picture
    assert (picture.min_pixels, picture.max_pixels) == pixels


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
def test_batches_are_counted_over_all_gpus(before, arguments, batch, tmp_path):
    start = "swift sft --model Qwen/Qwen2-VL-2B-Instruct --dataset a.jsonl"
    from_script(tmp_path, f"{before} {start} {arguments}\n")
    assert recipe_of(tmp_path).train.batch == batch


def test_data_sets_of_hubs(tmp_path):
    names = ["AI-ModelScope/LaTeX_OCR:small#200", "MS::a/b", "HF::c/d", "x/y:all"]
    done = from_settings(tmp_path, SWIFT | {"dataset": names})
    assert done.imports == (
        "finesight data import modelscope:AI-ModelScope/LaTeX_OCR:small/train"
        " samples/LaTeX_OCR --limit 200",
        "finesight data import modelscope:a/b samples/b",
        "finesight data import hf:c/d samples/d",
        "finesight data import modelscope:x/y samples/y",
    )


def test_a_finished_run(tmp_path):
    """Its args.json has all settings, those that it worked out among them, and no variables."""
    record = SWIFT | {
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
    done = from_settings(tmp_path, record, "args.json")
    made = recipe_of(tmp_path)
    assert (made.train.batch, made.train.parallel) == (2 * 2 * 4, "fsdp")
    assert (made.tune.vision, made.tune.merger) == ("full", "frozen")
    assert made.output == Path("runs/v0-2026")
    assert "MAX_PIXELS" in told(done, "note")
    assert not told(done, "differs")
    assert set(told(done, "unknown")) == {"something_else"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tuner_type": "dora"}, "tuner_type is dora"),
        ({"tuner_type": "adalora"}, "a kind of adapter"),
        ({"task_type": "seq_cls"}, "does not answer"),
        ({"model": "Qwen/Qwen3-8B"}, "Qwen vision-language"),
        ({"split_dataset_ratio": 2}, "split_dataset_ratio"),
        ({"model_kwargs": "{"}, "model_kwargs"),
        ({"ENV": {"NPROC_PER_NODE": "all"}}, "NPROC_PER_NODE"),
        ({"freeze_llm": True}, "every part is frozen"),
        ({"model": ""}, "no model is named"),
        ({"system": "missing.txt"}, "system"),
    ],
)
def test_what_cannot_be_trained_is_refused(settings, words, tmp_path):
    with pytest.raises(UserError, match=words):
        from_settings(tmp_path, SWIFT | settings)
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
def test_differences_are_told(settings, tmp_path):
    assert len(told(from_settings(tmp_path, SWIFT | settings), "differs")) == 1


def test_the_same_in_other_words_is_no_difference(tmp_path):
    same = {"loss_scale": "default", "use_dora": False, "init_weights": "true", "packing": "false"}
    same |= {"dataset_shuffle": True, "truncation_strategy": "delete", "adam_epsilon": 1e-08}
    same |= {"freeze_parameters_ratio": 0.0, "lora_bias": "none", "template": "qwen2_5_vl"}
    done = from_settings(tmp_path, SWIFT | same)
    assert not told(done, "differs")
    assert set(same) <= set(told(done, "needless"))
