"""The same recipe with Unsloth, as its notebooks for pictures have it, with weights in bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# First: it changes the packages below as they are imported.
import unsloth  # noqa: F401  isort: skip
from datasets import Dataset
from PIL import Image
from trl import SFTConfig, SFTTrainer
from unsloth import FastVisionModel
from unsloth.trainer import UnslothVisionDataCollator

from contestants.clock import Clock
from contestants.job import ALPHA, DROPOUT, RANK, RATE, Job, told


def conversations(job: Job) -> Dataset:
    """Each sample as its collator wants it, the picture opened when it is asked for."""
    names = "picture", "question", "answer"
    rows = [dict(zip(names, row, strict=True)) for row in job.rows()]
    return Dataset.from_list(rows).with_transform(opened)


def opened(rows: dict[str, list[str]]) -> dict[str, list[Any]]:
    """The messages of some rows, with their pictures."""
    found = []
    for path, question, answer in zip(*rows.values(), strict=True):
        with Image.open(path) as file:
            picture = file.convert("RGB")
        said = {"type": "text", "text": question}
        found.append(
            [
                {"role": "user", "content": [{"type": "image", "image": picture}, said]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
        )
    return {"messages": found}


def main() -> None:
    """Train as told on the command line."""
    job = told()
    setting: Any = job.setting
    model, processor = FastVisionModel.from_pretrained(
        job.model,
        load_in_4bit=False,
        use_gradient_checkpointing=setting["checkpointing"],
    )
    model = FastVisionModel.get_peft_model(
        model,
        finetune_vision_layers=False,
        finetune_language_layers=True,
        finetune_attention_modules=True,
        finetune_mlp_modules=True,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        bias="none",
        use_gradient_checkpointing=setting["checkpointing"],
    )
    FastVisionModel.for_training(model, use_gradient_checkpointing=setting["checkpointing"])
    arguments = SFTConfig(
        output_dir=job.target,
        per_device_train_batch_size=job.batch,
        # Its own default is two batches a step.
        gradient_accumulation_steps=1,
        max_steps=job.steps,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        optim="adamw_torch_fused",
        bf16=True,
        logging_steps=10,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataset_text_field="",
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_num_workers=job.workers,
        max_length=8192,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        processing_class=processor,
        data_collator=UnslothVisionDataCollator(
            model,
            processor,
            train_on_responses_only=True,
            instruction_part="<|im_start|>user\n",
            response_part="<|im_start|>assistant\n",
        ),
        train_dataset=conversations(job),
        args=arguments,
        callbacks=[Clock(job)],
    )
    trainer.train()
    model.save_pretrained(Path(job.target) / "adapter")


if __name__ == "__main__":
    main()
