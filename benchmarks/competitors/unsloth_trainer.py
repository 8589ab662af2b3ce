"""Train the recipe with Unsloth like its vision notebooks, with bf16 weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Imported first, because it patches the packages below.
import unsloth  # noqa: F401  isort: skip
from datasets import Dataset
from PIL import Image
from trl import SFTConfig, SFTTrainer
from unsloth import FastVisionModel
from unsloth.trainer import UnslothVisionDataCollator

from competitors.job import ALPHA, DROPOUT, LEARNING_RATE, RANK, CompetitorJob, read_job
from competitors.trainer_timer import TrainerTimer


def build_dataset(job: CompetitorJob) -> Dataset:
    """Build the dataset; images are opened on access."""
    names = "image", "question", "answer"
    rows = [dict(zip(names, row, strict=True)) for row in job.load_rows()]
    return Dataset.from_list(rows).with_transform(load_messages)


def load_messages(rows: dict[str, list[str]]) -> dict[str, list[Any]]:
    """Return the messages of some rows with their images."""
    found = []
    for path, question, answer in zip(*rows.values(), strict=True):
        with Image.open(path) as file:
            image = file.convert("RGB")
        text_part = {"type": "text", "text": question}
        found.append(
            [
                {"role": "user", "content": [{"type": "image", "image": image}, text_part]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
        )
    return {"messages": found}


def main() -> None:
    """Train the job of the command line."""
    job = read_job()
    setting: Any = job.settings
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
        output_dir=job.output_dir,
        per_device_train_batch_size=job.batch_size,
        # The default is two accumulation steps.
        gradient_accumulation_steps=1,
        max_steps=job.num_steps,
        learning_rate=LEARNING_RATE,
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
        dataloader_num_workers=job.num_workers,
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
        train_dataset=build_dataset(job),
        args=arguments,
        callbacks=[TrainerTimer(job)],
    )
    trainer.train()
    model.save_pretrained(Path(job.output_dir) / "adapter")


if __name__ == "__main__":
    main()
