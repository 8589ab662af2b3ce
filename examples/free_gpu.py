# %% [markdown]
# # Fine-tune Qwen3.5-2B on a free GPU machine
#
# This notebook fine-tunes Qwen3.5-2B on a table of labels and a folder of images, and evaluates
# the model before and after training. It targets one T4, as Colab and Kaggle provide it. Select a
# machine with a GPU and run the cells in order. The images are generated train tickets; replace
# them with your own data.
#
# Estimates for a T4 (16 GB, no bf16): `finesight plan --gpu T4` computes a peak of 11.2 GB and
# 5.5 s per step at four fifths of the speed in the data sheet, 7 minutes for all steps. **The
# notebook has not been run on a T4**: memory, time and metrics are not measured there. The cells
# below measure all of them.

# %%
# %pip install --quiet finesight

# %% [markdown]
# Settings. To load the model from ModelScope, use `modelscope:Qwen/Qwen3.5-2B`. The local disk is
# lost with the machine. Set `folder` to persistent storage: a mounted Drive on Colab,
# `/kaggle/working` on Kaggle.

# %%
import json
import shutil
from pathlib import Path

from finesight.api import (
    check_data,
    draw_boxes,
    import_data,
    load_model,
    read_samples,
    train,
)
from finesight.synth.tickets import TICKET_FIELDS, write_tickets

NUM_TICKETS, NUM_EVAL_ROWS, NUM_STEPS = 660, 60, 75
MODEL = "Qwen/Qwen3.5-2B"
PROMPT = "Read the ticket."
folder = Path("tickets-on-a-gpu")

# %% [markdown]
# Data: images and a CSV table. For a table of your own with the columns `path` and `caption`, set
# `columns` to `{"image": "path", "answer": "caption"}`. `train_fraction=0.9` instead of `eval_last`
# uses a random tenth for validation. `hf:OWNER/NAME` instead of the table downloads a dataset from
# the hub. The cell skips files that exist already.

# %%
if not (folder / "data").exists():
    table = write_tickets(folder / "tickets", NUM_TICKETS, seed=0)
    columns = {"image": "image", "fields": ",".join(TICKET_FIELDS)}
    import_data(table, folder / "data", columns=columns, prompt=PROMPT, eval_last=NUM_EVAL_ROWS)
data = {"train": folder / "data" / "train.jsonl", "eval": folder / "data" / "eval.jsonl"}
check = check_data(data["train"], data["eval"])
print(f"{check.num_samples} samples, {check.num_images} images")
print(f"issues: {check.issue_counts or 'none'}")
print(read_samples(data["train"], limit=1)[0].sample.messages)

# %% [markdown]
# Recipe. The model is published in bf16, which a T4 does not support. The recipe therefore computes
# in fp32 and recomputes the activations in the backward pass. fp16 has a smaller range than bf16,
# and the kernels of the linear attention layers need more shared memory than a T4 has. On a GPU
# with bf16 (L4, A100, RTX 30 or newer), remove `precision` and `activation_checkpointing`.
#
# The trainable parameters are LoRA adapters of the decoder, 17 million. Images are resized to at
# least `min_pixels` (256 x 256, as published) and at most `max_pixels` (640 x 640 here), because
# large images use most of the memory. If the run does not fit, set `"pack_tokens": 1024` in
# `train`.

# %%
recipe = {
    "model": MODEL,
    "data": data,
    "image": {"min_pixels": 65536, "max_pixels": 409600},
    "tune": {"language": "lora", "lora": {"rank": 16, "alpha": 32, "dropout": 0.05}},
    "train": {
        "steps": NUM_STEPS,
        "batch_size": 16,
        "learning_rate": 2.0e-4,
        "save_every": 25,
        "precision": "fp32",
        "activation_checkpointing": True,
    },
    "eval": {"metric": "json", "max_new_tokens": 128, "batch_size": 16},
    "output_dir": folder / "run",
}

# %% [markdown]
# Training. The trainer evaluates the validation split before the first step and after the last. If
# the machine is taken away, run the cells again: `resume` continues from the newest checkpoint, or
# returns the result of a finished run.

# %%
result = train(recipe, resume=True)
print(result.as_table())

# %% [markdown]
# Median step time and peak memory on this machine.

# %%
lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
steps = [step for line in lines if "step_s" in (step := json.loads(line))]
step_s = sorted(step["step_s"] for step in steps)[len(steps) // 2]
peak_gb = max(step["peak_memory_gb"] for step in steps)
print(f"{step_s:.2f} s per step, peak memory {peak_gb:.1f} GB")

# %% [markdown]
# Inference on new tickets. The last line displays an image with the predicted boxes, if any.

# %%
if not (folder / "new").exists():
    write_tickets(folder / "new", 3, seed=1)
model = load_model(folder / "run")
image_paths = sorted((folder / "new" / "images").iterdir())
answers = model.generate_batch(
    [model.build_question(image_path, PROMPT) for image_path in image_paths], max_new_tokens=128
)
print(*(answer.as_text() for answer in answers), sep="\n")
draw_boxes(answers[0])

# %% [markdown]
# Export. The adapter in one archive, for peft and `finesight predict` with the base model, and the
# report with all validation answers. `finesight merge` merges the adapter into the base model.

# %%
print(shutil.make_archive(str(folder / "adapter"), "zip", folder / "run" / "adapter"))
print(folder / "run" / "report.html")
