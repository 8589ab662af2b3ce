# %% [markdown]
# # Reading train tickets as JSON
#
# The workflow of `finesight quickstart` in the Python API: fine-tune a model on a table of labels
# and a folder of images, with an evaluation before and after training. It takes about 90 seconds
# on a CPU and needs no network. Run it as a script, or cell by cell in an editor. To start again,
# delete the folder `tickets-example`.

# %%
from pathlib import Path

from finesight.api import check_data, import_data, load_model, train
from finesight.infer.model_loader import select_cpu_precision
from finesight.synth.tickets import TICKET_FIELDS, write_tickets

NUM_TICKETS, NUM_EVAL_ROWS, NUM_STEPS = 1700, 100, 200
MODEL = "finesight-tiny"
PROMPT = "Read the ticket."
folder = Path("tickets-example")

# %% [markdown]
# Data: images and a CSV table. Replace them with your own.

# %%
table = write_tickets(folder / "tickets", NUM_TICKETS, seed=0)
print(*table.read_text(encoding="utf-8").splitlines()[:3], sep="\n")

# %% [markdown]
# Import: the columns `from,to,date,seat,price` become the answer, a JSON object. The last rows are
# the validation split.

# %%
columns = {"image": "image", "fields": ",".join(TICKET_FIELDS)}
summary = import_data(
    table, folder / "data", columns=columns, prompt=PROMPT, eval_last=NUM_EVAL_ROWS
)
for output_file in summary.output_files:
    print(f"{output_file.file}: {output_file.num_samples} samples")

# %% [markdown]
# Data check: corrupt images, contradictory answers, validation images in the training data, and
# more.

# %%
data = {"train": folder / "data" / "train.jsonl", "eval": folder / "data" / "eval.jsonl"}
check = check_data(data["train"], data["eval"])
print(f"{check.num_samples} samples, {check.num_images} images")
print(f"issues: {check.issue_counts or 'none'}")

# %% [markdown]
# Training: LoRA adapters on all linear layers; the base model is frozen. The trainer evaluates the
# validation split before the first step and after the last.

# %%
recipe = {
    "model": MODEL,
    "data": data,
    "tune": {
        "vision": "lora",
        "merger": "lora",
        "language": "lora",
        "lora": {"rank": 32, "alpha": 32, "dropout": 0.0},
    },
    "train": {
        "steps": NUM_STEPS,
        "batch_size": 8,
        "learning_rate": 4.0e-3,
        "device": "cpu",
        "precision": select_cpu_precision(),
        "num_workers": 0,
    },
    "eval": {"metric": "json", "every": 0, "max_new_tokens": 112, "batch_size": 100},
    "output_dir": folder / "run",
}
result = train(recipe)
print(result.as_table())

# %% [markdown]
# Inference on three new tickets, generated with another seed.

# %%
write_tickets(folder / "new", 3, seed=1)
image_paths = sorted((folder / "new" / "images").iterdir())
model = load_model(folder / "run")
questions = [model.build_question(image_path, PROMPT) for image_path in image_paths]
answers = model.generate_batch(questions, max_new_tokens=112)
print(*(answer.as_text() for answer in answers), sep="\n")

# %% [markdown]
# The report contains metrics with confidence intervals, loss curves and all validation answers.

# %%
print(f"Open {folder / 'run' / 'report.html'} in a browser.")
