"""The same recipe with transformers, peft and Trainer, by somebody who knows both well.

Whole batches padded on the right, nothing computed twice, pictures read ahead by other processes,
AdamW in one kernel, TF32 where fp32 is left. Which attention, adapters in which type, and whether
with liger's kernels or compiled, is the setting: all are tried. `learns` may be "all", with fp32
weights in the place of adapters, and `engine` is "ddp" or "fsdp" (torch's `fully_shard`) where a
launcher has started several processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from contestants.clock import Clock
from contestants.job import ALPHA, DROPOUT, IN_THE_LANGUAGE_MODEL, RANK, RATE, Job, told

UNLEARNED = -100
FILLINGS = {"input_ids": 0, "labels": UNLEARNED, "mm_token_type_ids": 0, "attention_mask": 0}


class Samples(Dataset[dict[str, torch.Tensor]]):
    """Each sample as the model wants it, read when it is asked for."""

    def __init__(self, job: Job) -> None:
        self._rows = job.rows()
        self._processor = AutoProcessor.from_pretrained(job.model)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        path, question, answer = self._rows[index]
        process, tokenizer = self._processor, self._processor.tokenizer
        asked = {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": question}],
        }
        text = process.apply_chat_template([asked], tokenize=False, add_generation_prompt=True)
        with Image.open(path) as picture:
            given = process(text=[text], images=[picture.convert("RGB")], return_tensors="pt")
        learned = tokenizer(f"{answer}<|im_end|>", add_special_tokens=False, return_tensors="pt")
        before, answered = given["input_ids"][0], learned["input_ids"][0]
        ids = torch.cat([before, answered])
        return {
            "input_ids": ids,
            "labels": torch.cat([torch.full_like(before, UNLEARNED), answered]),
            "mm_token_type_ids": (ids == process.image_token_id).long(),
            "attention_mask": torch.ones_like(ids),
            "pixel_values": given["pixel_values"],
            "image_grid_thw": given["image_grid_thw"],
        }


def padded(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch: texts padded on the right, patches end to end."""
    batch = {
        name: torch.nn.utils.rnn.pad_sequence(
            [sample[name] for sample in samples], batch_first=True, padding_value=filling
        )
        for name, filling in FILLINGS.items()
    }
    for name in ("pixel_values", "image_grid_thw"):
        batch[name] = torch.cat([sample[name] for sample in samples])
    return batch


def main() -> None:
    """Train as told on the command line."""
    job = told()
    setting: Any = job.setting
    cuda = torch.cuda.is_available()
    torch.backends.cuda.matmul.allow_tf32 = True
    model = learning(job, cuda)
    engine = setting.get("engine")
    arguments = TrainingArguments(
        output_dir=job.target,
        use_cpu=not cuda,
        per_device_train_batch_size=job.batch,
        max_steps=job.steps,
        learning_rate=RATE,
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
        dataloader_num_workers=job.workers,
        dataloader_persistent_workers=job.workers > 0,
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
        train_dataset=Samples(job),
        data_collator=padded,
        callbacks=[Clock(job)],
    )
    trainer.train()
    if engine is None:
        model.save_pretrained(Path(job.target) / "adapter")


def learning(job: Job, cuda: bool) -> Any:
    """The model with what learns of it."""
    setting: Any = job.setting
    everything = setting.get("learns") == "all"
    place = "cuda" if cuda else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(
        job.model,
        dtype=torch.float32 if everything else torch.bfloat16,
        attn_implementation=setting["attention"],
        # Of several processes each brings it to its own GPU.
        device_map=place if setting.get("engine") is None else None,
    )
    model.config.use_cache = False
    if everything:
        return model
    adapter = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        target_modules=IN_THE_LANGUAGE_MODEL,
    )
    return get_peft_model(model, adapter, autocast_adapter_dtype=setting["adapters"] == "fp32")


if __name__ == "__main__":
    main()
