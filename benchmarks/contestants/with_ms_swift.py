"""The same recipe with ms-swift, by the function behind its command `swift sft`.

Packed where the setting says so, which wants a flash attention; otherwise padded. A pack is as long
as a batch's samples together, and a step has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from contestants.job import ALPHA, DROPOUT, RANK, RATE, Job, told


def arguments(job: Job, setting: Mapping[str, Any]) -> dict[str, object]:
    """What stands on the command line, by name."""
    import torch

    packed = setting["packed"]
    return {
        "model": job.model,
        "model_type": "qwen2_vl",
        "template": "qwen2_vl",
        "dataset": job.table,
        "tuner_type": "lora",
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": DROPOUT,
        "target_modules": "all-linear",
        "freeze_vit": "true",
        "freeze_aligner": "true",
        "torch_dtype": "bfloat16",
        "attn_impl": setting["attention"],
        "packing": str(packed).lower(),
        "max_length": job.pack_tokens if packed else 8192,
        "per_device_train_batch_size": 1 if packed else job.batch,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": "false",
        "use_liger_kernel": str(setting["liger"]).lower(),
        # It asks its hub about the files of a local model otherwise, and waits where there is none.
        "check_model": "false",
        "max_steps": job.steps,
        "learning_rate": RATE,
        "dataloader_num_workers": job.workers,
        "logging_steps": 10,
        "save_strategy": "no",
        "eval_strategy": "no",
        "split_dataset_ratio": 0,
        "report_to": "none",
        "use_cpu": str(not torch.cuda.is_available()).lower(),
        "callbacks": "clock",
        "output_dir": job.target,
        "add_version": "false",
    }


def main() -> None:
    """Train as told on the command line."""
    from swift import sft_main
    from swift.callbacks import callbacks_map

    from contestants.clock import Clock

    job = told()
    callbacks_map["clock"] = lambda args, trainer: Clock(job)
    words = arguments(job, job.setting).items()
    sft_main([piece for name, value in words for piece in (f"--{name}", str(value))])


if __name__ == "__main__":
    main()
