"""The caption recipe as the popular tutorials have it, with transformers, peft and datasets.

Four samples at a time and four times before a step; all activations computed twice; the pictures'
numbers kept as lists in a table; no reading processes; the answer ends with the padding token. Two
things are added that transformers 5 cannot do without: the kinds of tokens, and no more.
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

from contestants.clock import Clock
from contestants.job import ALPHA, DROPOUT, LAYERS, RANK, RATE, told

TOGETHER = 4


def main() -> None:
    """Train as told on the command line."""
    job = told()
    processor = AutoProcessor.from_pretrained(job.model)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        job.model, dtype=torch.bfloat16, device_map="auto"
    )
    model.enable_input_require_grads()

    def encoded(row: dict[str, str]) -> dict[str, Any]:
        picture = {"type": "image", "image": row["picture"]}
        asked = {"role": "user", "content": [picture, {"type": "text", "text": row["question"]}]}
        text = processor.apply_chat_template([asked], tokenize=False, add_generation_prompt=True)
        given = processor(text=[text], images=[opened(row["picture"])], return_tensors="pt")
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

    names = ("picture", "question", "answer")
    table = Dataset.from_list([dict(zip(names, row, strict=True)) for row in job.rows()])
    kept = Path(job.target) / "table.arrow"
    table = table.map(encoded, remove_columns=list(names), cache_file_name=str(kept))
    together = DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True)

    def collated(rows: list[dict[str, Any]]) -> Any:
        batch = together(rows)
        batch["pixel_values"] = batch["pixel_values"].flatten(0, 1)
        batch["mm_token_type_ids"] = (batch["input_ids"] == model.config.image_token_id).int()
        return batch

    adapter = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        target_modules=list(LAYERS),
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        bias="none",
    )
    model = get_peft_model(model, adapter)
    arguments = TrainingArguments(
        output_dir=job.target,
        per_device_train_batch_size=TOGETHER,
        gradient_accumulation_steps=job.batch // TOGETHER,
        logging_steps=10,
        logging_first_step=True,
        max_steps=job.steps,
        save_strategy="no",
        learning_rate=RATE,
        gradient_checkpointing=True,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=table,
        data_collator=collated,
        callbacks=[Clock(job)],
    )
    trainer.train()
    model.save_pretrained(Path(job.target) / "adapter")


def opened(path: str) -> Any:
    """The picture, as the tutorial's own helper opens it."""
    from PIL import Image

    with Image.open(path) as picture:
        return picture.convert("RGB")


if __name__ == "__main__":
    main()
