"""Train the caption recipe like popular tutorials, with transformers, peft and datasets.

Batch size 4 with 4 accumulation steps, full activation checkpointing, pixel values stored as lists
in a table, no data loader workers, answers end with the padding token. The only change is the token
type ids that transformers 5 requires.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Qwen2VLForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from competitors.job import ALPHA, DROPOUT, LEARNING_RATE, RANK, TARGET_MODULES, read_job
from competitors.trainer_timer import TrainerTimer

BATCH_SIZE = 4


def main() -> None:
    """Train the job of the command line."""
    job = read_job()
    processor = AutoProcessor.from_pretrained(job.model)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        job.model, dtype=torch.bfloat16, device_map="auto"
    )
    model.enable_input_require_grads()

    def encode_row(row: dict[str, str]) -> dict[str, Any]:
        image_part = {"type": "image", "image": row["image"]}
        user_message = {
            "role": "user",
            "content": [image_part, {"type": "text", "text": row["question"]}],
        }
        text = processor.apply_chat_template(
            [user_message], tokenize=False, add_generation_prompt=True
        )
        given = processor(text=[text], images=[load_image(row["image"])], return_tensors="pt")
        lists = {key: value.tolist() for key, value in given.items()}
        before = lists["input_ids"][0]
        answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
        answer = [*answer, tokenizer.pad_token_id]
        ids = before + answer
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": [-100] * len(before) + answer,
            "pixel_values": lists["pixel_values"],
            "image_grid_thw": lists["image_grid_thw"][0],
        }

    names = ("image", "question", "answer")
    table = Dataset.from_list([dict(zip(names, row, strict=True)) for row in job.load_rows()])
    cache_path = Path(job.output_dir) / "table.arrow"
    table = table.map(encode_row, remove_columns=list(names), cache_file_name=str(cache_path))
    collator = DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True)

    def collate_rows(rows: list[dict[str, Any]]) -> Any:
        batch = collator(rows)
        batch["pixel_values"] = batch["pixel_values"].flatten(0, 1)
        batch["mm_token_type_ids"] = (batch["input_ids"] == model.config.image_token_id).int()
        return batch

    adapter = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        target_modules=list(TARGET_MODULES),
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        bias="none",
    )
    model = get_peft_model(model, adapter)
    arguments = TrainingArguments(
        output_dir=job.output_dir,
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=job.batch_size // BATCH_SIZE,
        logging_steps=10,
        logging_first_step=True,
        max_steps=job.num_steps,
        save_strategy="no",
        learning_rate=LEARNING_RATE,
        gradient_checkpointing=True,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=table,
        data_collator=collate_rows,
        callbacks=[TrainerTimer(job)],
    )
    trainer.train()
    model.save_pretrained(Path(job.output_dir) / "adapter")


def load_image(path: str) -> Any:
    """Load the image like the helper of the tutorial."""
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


if __name__ == "__main__":
    main()
