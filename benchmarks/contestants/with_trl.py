"""The same recipe with TRL's SFTTrainer and its collator for pictures, which cannot pack them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, Sequence
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from contestants.clock import Clock
from contestants.job import ALPHA, DROPOUT, IN_THE_LANGUAGE_MODEL, RANK, RATE, told


def main() -> None:
    """Train as told on the command line."""
    job = told()
    setting: Any = job.setting
    cuda = torch.cuda.is_available()
    model = AutoModelForImageTextToText.from_pretrained(
        job.model,
        dtype=torch.bfloat16,
        attn_implementation=setting["attention"],
        device_map="cuda" if cuda else "cpu",
    )
    rows = [
        {
            "images": [picture],
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for picture, question, answer in job.rows()
    ]
    # Opened when a row is read, not before.
    table = Dataset.from_list(rows).cast_column("images", Sequence(Image()))
    arguments = SFTConfig(
        output_dir=job.target,
        use_cpu=not cuda,
        per_device_train_batch_size=job.batch,
        max_steps=job.steps,
        max_length=None,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        optim="adamw_torch_fused",
        bf16=True,
        tf32=cuda or None,
        gradient_checkpointing=False,
        use_liger_kernel=setting["liger"],
        dataloader_num_workers=job.workers,
        dataloader_persistent_workers=job.workers > 0,
        dataloader_pin_memory=cuda,
        logging_steps=10,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    adapter = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        target_modules=IN_THE_LANGUAGE_MODEL,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=table,
        processing_class=AutoProcessor.from_pretrained(job.model),
        peft_config=adapter,
        callbacks=[Clock(job)],
    )
    trainer.train()
    trainer.model.save_pretrained(Path(job.target) / "adapter")


if __name__ == "__main__":
    main()
