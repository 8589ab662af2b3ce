"""The same recipe with LLaMA-Factory, by the function behind its command `llamafactory-cli train`.

Packed where the setting says so (its "neat packing", which wants a flash attention)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contestants.job import ALPHA, DROPOUT, LAYERS, RANK, RATE, Job, told


def arguments(job: Job, setting: Mapping[str, Any]) -> dict[str, object]:
    """What stands in its file of settings."""
    import torch

    packed = setting["packed"]
    # Its collator pads packs to multiples of 8 after it has counted their positions.
    pack_tokens = -(-job.pack_tokens // 8) * 8
    return {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": job.model,
        "template": "qwen2_vl",
        "dataset": "samples",
        "dataset_dir": job.target,
        "finetuning_type": "lora",
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": DROPOUT,
        "lora_target": ",".join(LAYERS),
        "freeze_vision_tower": True,
        "freeze_multi_modal_projector": True,
        "flash_attn": setting["attention"],
        "neat_packing": packed,
        "cutoff_len": pack_tokens if packed else 8192,
        "per_device_train_batch_size": 1 if packed else job.batch,
        "gradient_accumulation_steps": 1,
        "disable_gradient_checkpointing": True,
        "enable_liger_kernel": setting["liger"],
        "max_steps": job.steps,
        "learning_rate": RATE,
        "lr_scheduler_type": "cosine",
        "bf16": True,
        "optim": "adamw_torch_fused",
        "preprocessing_num_workers": max(1, job.workers),
        "dataloader_num_workers": job.workers,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": f"{job.target}/out",
        "use_cpu": not torch.cuda.is_available(),
        "trust_remote_code": False,
    }


def main() -> None:
    """Train as told on the command line."""
    from llamafactory.train.tuner import run_exp

    from contestants.clock import Clock

    job = told()
    table = {
        "file_name": job.table,
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
        },
    }
    known = Path(job.target) / "dataset_info.json"
    known.write_text(json.dumps({"samples": table}), encoding="utf-8")
    run_exp(arguments(job, job.setting), callbacks=[Clock(job)])


if __name__ == "__main__":
    main()
