"""Train the recipe with ms-swift through the function of `swift sft`.

Packing requires flash attention; otherwise batches are padded. A pack has the tokens of a batch,
and a step has one pack.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from competitors.job import ALPHA, DROPOUT, LEARNING_RATE, RANK, CompetitorJob, read_job


def build_arguments(job: CompetitorJob, settings: Mapping[str, Any]) -> dict[str, object]:
    """Build the command-line arguments by name."""
    import torch

    packed = settings["packed"]
    return {
        "model": job.model,
        "model_type": "qwen2_vl",
        "template": "qwen2_vl",
        "dataset": job.dataset,
        "tuner_type": "lora",
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": DROPOUT,
        "target_modules": "all-linear",
        "freeze_vit": "true",
        "freeze_aligner": "true",
        "torch_dtype": "bfloat16",
        "attn_impl": settings["attention"],
        "packing": str(packed).lower(),
        "max_length": job.max_pack_tokens if packed else 8192,
        "per_device_train_batch_size": 1 if packed else job.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": "false",
        "use_liger_kernel": str(settings["liger"]).lower(),
        # Otherwise it queries the hub for files of a local model and waits offline.
        "check_model": "false",
        "max_steps": job.num_steps,
        "learning_rate": LEARNING_RATE,
        "dataloader_num_workers": job.num_workers,
        "logging_steps": 10,
        "save_strategy": "no",
        "eval_strategy": "no",
        "split_dataset_ratio": 0,
        "report_to": "none",
        "use_cpu": str(not torch.cuda.is_available()).lower(),
        "callbacks": "clock",
        "output_dir": job.output_dir,
        "add_version": "false",
    }


def main() -> None:
    """Train the job of the command line."""
    from swift import sft_main
    from swift.callbacks import callbacks_map

    from competitors.trainer_timer import TrainerTimer

    job = read_job()
    callbacks_map["clock"] = lambda args, trainer: TrainerTimer(job)
    words = build_arguments(job, job.settings).items()
    sft_main([piece for name, value in words for piece in (f"--{name}", str(value))])


if __name__ == "__main__":
    main()
