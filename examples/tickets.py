# %% [markdown]
# # Train tickets, read into JSON
#
# What `finesight quickstart` does, by the Python API: a table of labels and a folder of pictures
# become a tuned model with figures from before and after. Runs on a CPU in about two minutes,
# without a network: as a script, or cell by cell in an editor that knows `# %%`. To begin anew,
# delete the folder `tickets-example`.

# %%
from pathlib import Path

from finesight.api import check_data, import_data, load, question, train
from finesight.infer.load import cpu_precision
from finesight.synth.tickets import FIELDS, draw_tickets

TICKETS, HELD_OUT, STEPS = 2500, 100, 200
MODEL = "finesight-tiny"
PROMPT = "Read the ticket."
folder = Path("tickets-example")

# %% [markdown]
# The data: pictures, and a table as a spreadsheet saves it. Put your own in its place.

# %%
table = draw_tickets(folder / "tickets", TICKETS, seed=0)
print(*table.read_text(encoding="utf-8").splitlines()[:3], sep="\n")

# %% [markdown]
# Import: the columns `from,to,date,seat,price` become the answer, a JSON object. The last rows are
# held out.

# %%
columns = {"image": "picture", "fields": ",".join(FIELDS)}
summary = import_data(table, folder / "data", columns=columns, prompt=PROMPT, eval_last=HELD_OUT)
for written in summary.written:
    print(f"{written.file}: {written.samples} samples")

# %% [markdown]
# Check: damaged pictures, contradictions, held-out pictures that are trained on, and more.

# %%
data = {"train": folder / "data" / "train.jsonl", "eval": folder / "data" / "eval.jsonl"}
checked = check_data(data["train"], data["eval"])
print(f"{checked.samples} samples, {checked.pictures} pictures, faults: {checked.counts or 'none'}")

# %% [markdown]
# Train: adapters on all linear layers; the model itself stays as it is. Held-out tickets are
# answered and scored before the first step and after the last.

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
        "steps": STEPS,
        "batch": 16,
        "learning_rate": 2.0e-3,
        "device": "cpu",
        "precision": cpu_precision(),
        "workers": 0,
    },
    "eval": {"metric": "json", "max_new_tokens": 112, "batch": 100},
    "output": folder / "run",
}
result = train(recipe)
print(result.as_table())

# %% [markdown]
# Ask it about three tickets that it has never seen, drawn from another seed.

# %%
draw_tickets(folder / "new", 3, seed=1)
pictures = sorted((folder / "new" / "pictures").iterdir())
model = load(folder / "run")
asked = [question(picture, PROMPT) for picture in pictures]
answers = model.generate_all(asked, max_new_tokens=112)
print(*(answer.as_text() for answer in answers), sep="\n")

# %% [markdown]
# And look: figures with intervals, curves, and every held-out ticket with its answers.

# %%
print(f"Open {folder / 'run' / 'report.html'} in a browser.")
