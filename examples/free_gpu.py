# %% [markdown]
# # Fine-tune Qwen2-VL-2B on a free GPU machine
#
# A table of labels and a folder of pictures become a tuned model, with figures from before and
# after, on one T4 as Colab and Kaggle lend it: choose a machine with a GPU, then run the cells in
# order. The pictures are train tickets that are drawn here; your own come in the same way.
#
# What is known of a T4 (16 GB, no bf16): `finesight data plan --gpu T4` counts 10.1 GB at most for
# this run, and 0.5 s for a step at four fifths of the speed that the data sheet says. **It has not
# been run on a T4**: neither memory and time nor the scores are measured there. The cells below
# measure all of them.

# %%
# %pip install --quiet finesight

# %% [markdown]
# The settings. From ModelScope, the model is `modelscope:Qwen/Qwen2-VL-2B-Instruct`. A machine that
# is taken away takes its disk along: put `folder` where files last (on Colab a mounted Drive, on
# Kaggle `/kaggle/working`).

# %%
import json
import shutil
from pathlib import Path

from finesight.api import check_data, draw, import_data, load, question, read, train
from finesight.synth.tickets import FIELDS, draw_tickets

TICKETS, HELD_OUT, STEPS = 660, 60, 75
MODEL = "Qwen/Qwen2-VL-2B-Instruct"
PROMPT = "Read the ticket."
folder = Path("tickets-on-a-gpu")

# %% [markdown]
# The data: pictures, and a table as a spreadsheet saves it. Of a table of your own with the columns
# `path` and `caption`, `columns` is `{"image": "path", "answer": "caption"}`, and `split=0.9` in
# place of `eval_last` holds out a tenth. `hf:OWNER/NAME` in place of the table fetches a data set
# of the hub. A cell that has made its files already passes over them.

# %%
if not (folder / "data").exists():
    table = draw_tickets(folder / "tickets", TICKETS, seed=0)
    columns = {"image": "picture", "fields": ",".join(FIELDS)}
    import_data(table, folder / "data", columns=columns, prompt=PROMPT, eval_last=HELD_OUT)
data = {"train": folder / "data" / "train.jsonl", "eval": folder / "data" / "eval.jsonl"}
checked = check_data(data["train"], data["eval"])
print(f"{checked.samples} samples, {checked.pictures} pictures, faults: {checked.counts or 'none'}")
print(read(data["train"], limit=1)[0].sample.messages)

# %% [markdown]
# The recipe. A T4 computes in fp16, with loss scaling; that is what `precision` is where nothing
# else is said. What learns are adapters in the language model, 18 million numbers. Pictures keep
# their own size up to `max_pixels` (640 x 640 here), since large ones take most of the memory.
# Where it does not fit, set `"pack_tokens": 2048` in `train`, then `"recompute": True`.

# %%
recipe = {
    "model": MODEL,
    "data": data,
    "picture": {"min_pixels": 3136, "max_pixels": 409600},
    "tune": {"language": "lora", "lora": {"rank": 16, "alpha": 32, "dropout": 0.05}},
    "train": {"steps": STEPS, "batch": 16, "learning_rate": 2.0e-4, "save_every": 25},
    "eval": {"metric": "json", "max_new_tokens": 128, "batch": 16},
    "output": folder / "run",
}

# %% [markdown]
# Train. The held-out tickets are answered and scored before the first step and after the last. When
# the machine goes away in the middle, run the cells again: `resume` goes on from the newest
# checkpoint, and gives the result of a run that is finished.

# %%
result = train(recipe, resume=True)
print(result.as_table())

# %% [markdown]
# What it took on this machine: seconds of a step in the middle, and the most memory.

# %%
lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
steps = [step for line in lines if "seconds" in (step := json.loads(line)) and "lr" in step]
seconds = sorted(step["seconds"] for step in steps)[len(steps) // 2]
print(f"{seconds:.2f} s for a step, {max(step['memory_gb'] for step in steps):.1f} GB at most")

# %% [markdown]
# Ask it about tickets that it has never seen. The last line shows a picture, with the boxes of its
# answer where it has some.

# %%
if not (folder / "new").exists():
    draw_tickets(folder / "new", 3, seed=1)
model = load(folder / "run")
pictures = sorted((folder / "new" / "pictures").iterdir())
answers = model.generate_all([question(one, PROMPT) for one in pictures], max_new_tokens=128)
print(*(answer.as_text() for answer in answers), sep="\n")
draw(answers[0])

# %% [markdown]
# Take it with you: the adapter in one file, which peft and `finesight predict` read beside the
# model that it was trained on, and the report with every held-out answer. `finesight merge` makes a
# model of its own of the two.

# %%
print(shutil.make_archive(str(folder / "adapter"), "zip", folder / "run" / "adapter"))
print(folder / "run" / "report.html")
