"""Train the recipe with LLaMA-Factory through the function of `llamafactory-cli train`.

Packing is its "neat packing", which requires flash attention.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from competitors.job import (
    ALPHA,
    DROPOUT,
    LEARNING_RATE,
    RANK,
    TARGET_MODULES,
    CompetitorJob,
    read_job,
)


def build_config(job: CompetitorJob, settings: Mapping[str, Any]) -> dict[str, object]:
    """Build the training configuration."""
    import torch

    packed = settings["packed"]
    # The collator pads packs to multiples of 8 after computing position ids.
    pack_tokens = -(-job.max_pack_tokens // 8) * 8
    return {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": job.model,
        "template": "qwen2_vl",
        "dataset": "samples",
        "dataset_dir": job.output_dir,
        "finetuning_type": "lora",
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": DROPOUT,
        "lora_target": ",".join(TARGET_MODULES),
        "freeze_vision_tower": True,
        "freeze_multi_modal_projector": True,
        "flash_attn": settings["attention"],
        "neat_packing": packed,
        "cutoff_len": pack_tokens if packed else 8192,
        "per_device_train_batch_size": 1 if packed else job.batch_size,
        "gradient_accumulation_steps": 1,
        "disable_gradient_checkpointing": True,
        "enable_liger_kernel": settings["liger"],
        "max_steps": job.num_steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "bf16": True,
        "optim": "adamw_torch_fused",
        "preprocessing_num_workers": max(1, job.num_workers),
        "dataloader_num_workers": job.num_workers,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": f"{job.output_dir}/out",
        "use_cpu": not torch.cuda.is_available(),
        "trust_remote_code": False,
    }


def main() -> None:
    """Train the job of the command line."""
    from llamafactory.train.tuner import run_exp

    from competitors.trainer_timer import TrainerTimer

    job = read_job()
    table = {
        "file_name": job.dataset,
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
        },
    }
    known = Path(job.output_dir) / "dataset_info.json"
    known.write_text(json.dumps({"samples": table}), encoding="utf-8")
    run_exp(build_config(job, job.settings), callbacks=[TrainerTimer(job)])


if __name__ == "__main__":
    main()
