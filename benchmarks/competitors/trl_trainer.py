"""Train the recipe with SFTTrainer of TRL and its image collator, which does not support
packing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, Sequence
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from competitors.job import ALPHA, DROPOUT, LANGUAGE_MODEL_TARGETS, RANK, read_job
from competitors.trainer_timer import TrainerTimer


def main() -> None:
    """Train the job of the command line."""
    job = read_job()
    setting: Any = job.settings
    cuda = torch.cuda.is_available()
    everything = setting.get("trainable") == "all"
    model = AutoModelForImageTextToText.from_pretrained(
        job.model,
        dtype=torch.float32 if everything else torch.bfloat16,
        attn_implementation=setting["attention"],
        device_map="cuda" if cuda else "cpu",
    )
    rows = [
        {
            "images": [image_path],
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for image_path, question, answer in job.load_rows()
    ]
    # Images are opened on access.
    table = Dataset.from_list(rows).cast_column("images", Sequence(Image()))
    arguments = SFTConfig(
        output_dir=job.output_dir,
        use_cpu=not cuda,
        per_device_train_batch_size=job.batch_size,
        max_steps=job.num_steps,
        max_length=None,
        learning_rate=job.learning_rate,
        seed=job.seed,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        optim="adamw_torch_fused",
        bf16=True,
        tf32=cuda or None,
        gradient_checkpointing=False,
        use_liger_kernel=setting["liger"],
        dataloader_num_workers=job.num_workers,
        dataloader_persistent_workers=job.num_workers > 0,
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
        target_modules=LANGUAGE_MODEL_TARGETS,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=table,
        processing_class=AutoProcessor.from_pretrained(job.model),
        peft_config=None if everything else adapter,
        callbacks=[TrainerTimer(job)],
    )
    trainer.train()
    trainer.model.save_pretrained(Path(job.output_dir) / "adapter")


if __name__ == "__main__":
    main()
