"""Train the recipe with transformers, peft and Trainer, with expert settings.

Batches are padded on the right, without activation checkpointing, with data loader workers, fused
AdamW, and TF32 for remaining fp32 products. Tried settings: attention, adapter data type, liger
kernels, compilation. `trainable` may be "all" for full fine-tuning with fp32 weights; `engine` is
"ddp" or "fsdp" (`fully_shard` of torch) with several processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from competitors.job import (
    ALPHA,
    DROPOUT,
    LANGUAGE_MODEL_TARGETS,
    RANK,
    CompetitorJob,
    read_job,
)
from competitors.trainer_timer import TrainerTimer

IGNORE_INDEX = -100
PADDING_VALUES = {
    "input_ids": 0,
    "labels": IGNORE_INDEX,
    "mm_token_type_ids": 0,
    "attention_mask": 0,
}


class TrainerDataset(Dataset[dict[str, torch.Tensor]]):
    """Dataset that encodes each sample on access."""

    def __init__(self, job: CompetitorJob) -> None:
        self._rows = job.load_rows()
        self._processor = AutoProcessor.from_pretrained(job.model)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        path, question, answer = self._rows[index]
        process, tokenizer = self._processor, self._processor.tokenizer
        user_message = {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": question}],
        }
        text = process.apply_chat_template(
            [user_message], tokenize=False, add_generation_prompt=True
        )
        with Image.open(path) as image:
            prompt_tokens = process(text=[text], images=[image.convert("RGB")], return_tensors="pt")
        answer_tokens = tokenizer(
            f"{answer}<|im_end|>", add_special_tokens=False, return_tensors="pt"
        )
        prompt_ids, answer_ids = prompt_tokens["input_ids"][0], answer_tokens["input_ids"][0]
        ids = torch.cat([prompt_ids, answer_ids])
        return {
            "input_ids": ids,
            "labels": torch.cat([torch.full_like(prompt_ids, IGNORE_INDEX), answer_ids]),
            "mm_token_type_ids": (ids == process.image_token_id).long(),
            "attention_mask": torch.ones_like(ids),
            "pixel_values": prompt_tokens["pixel_values"],
            "image_grid_thw": prompt_tokens["image_grid_thw"],
        }


def pad_batch(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Collate a batch: texts padded on the right, patches concatenated."""
    batch = {
        name: torch.nn.utils.rnn.pad_sequence(
            [sample[name] for sample in samples], batch_first=True, padding_value=filling
        )
        for name, filling in PADDING_VALUES.items()
    }
    for name in ("pixel_values", "image_grid_thw"):
        batch[name] = torch.cat([sample[name] for sample in samples])
    return batch


def main() -> None:
    """Train the job of the command line."""
    job = read_job()
    setting: Any = job.settings
    cuda = torch.cuda.is_available()
    torch.backends.cuda.matmul.allow_tf32 = True
    model = build_model(job, cuda)
    engine = setting.get("engine")
    arguments = TrainingArguments(
        output_dir=job.output_dir,
        use_cpu=not cuda,
        per_device_train_batch_size=job.batch_size,
        max_steps=job.num_steps,
        learning_rate=job.learning_rate,
        seed=job.seed,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        optim="adamw_torch_fused",
        bf16=setting["adapters"] == "fp32",
        fsdp=engine == "fsdp",
        fsdp_config={"version": 2} if engine == "fsdp" else None,
        ddp_find_unused_parameters=False if engine == "ddp" else None,
        tf32=cuda or None,
        use_liger_kernel=setting["liger"],
        torch_compile=setting["compiled"],
        dataloader_num_workers=job.num_workers,
        dataloader_persistent_workers=job.num_workers > 0,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        label_names=["labels"],
        logging_steps=10,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=TrainerDataset(job),
        data_collator=pad_batch,
        callbacks=[TrainerTimer(job)],
    )
    trainer.train()
    if engine is None:
        model.save_pretrained(Path(job.output_dir) / "adapter")


def build_model(job: CompetitorJob, cuda: bool) -> Any:
    """Build the model with trainable parameters or adapters."""
    setting: Any = job.settings
    everything = setting.get("trainable") == "all"
    device = "cuda" if cuda else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(
        job.model,
        dtype=torch.float32 if everything else torch.bfloat16,
        attn_implementation=setting["attention"],
        # Each process moves the model to its own GPU.
        device_map=device if setting.get("engine") is None else None,
    )
    model.config.use_cache = False
    if everything:
        return model
    adapter = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        target_modules=LANGUAGE_MODEL_TARGETS,
    )
    return get_peft_model(model, adapter, autocast_adapter_dtype=setting["adapters"] == "fp32")


if __name__ == "__main__":
    main()
