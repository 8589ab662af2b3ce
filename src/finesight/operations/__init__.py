"""Operations: what the commands, the Python API and the web application do.

An operation is a function. Its signature is the request: the name, type, bounds and description of
each parameter. The options of the command, the arguments of the Python function and the fields of
the page are derived from it.
"""

from __future__ import annotations

from collections.abc import Mapping

from finesight.operations.operation import Operation

OPERATIONS: Mapping[str, Mapping[str, Operation]] = {
    "Start": {
        "init": Operation(
            "init:init", "Import a dataset, and write a recipe that fits this machine."
        ),
        "quickstart": Operation(
            "quickstart:quickstart", "Run the complete workflow on generated data, on a CPU."
        ),
        "studio": Operation(
            "app.start:studio", "Start a page in the browser, from images to a served model."
        ),
        "doctor": Operation("evaluation:doctor", "Diagnose a machine, a model or a run."),
        "download": Operation("deployment:download", "Download a model or dataset from a hub."),
    },
    "Data": {
        "import": Operation("dataset:import_data", "Import a dataset as samples."),
        "check": Operation("dataset:check_data", "Validate samples."),
        "label": Operation("app.start:label", "Label images with suggestions of a model."),
        "sample": Operation(
            "responses:sample", "Sample responses, and keep the best one of each question."
        ),
        "pairs": Operation(
            "responses:pairs", "Write preference pairs from responses or corrections."
        ),
        "show": Operation("dataset:show", "Print the tokenized samples of a recipe."),
        "data export": Operation(
            "dataset:export_data", "Export samples in the format of another program."
        ),
        "data convert-boxes": Operation(
            "dataset:convert_boxes", "Convert the boxes of a file to another model family."
        ),
    },
    "Training": {
        "plan": Operation(
            "training:plan", "Estimate memory and time of a run and suggest settings that fit."
        ),
        "train": Operation("training:train", "Fine-tune a model with a recipe."),
        "launch": Operation("training:launch", "Write a training job for several GPUs or nodes."),
        "convert": Operation(
            "training:convert", "Convert a configuration or script of another trainer to a recipe."
        ),
    },
    "Evaluation": {
        "eval": Operation("evaluation:evaluate", "Evaluate a model or run on a dataset."),
        "report": Operation("evaluation:report", "Write the HTML report of a run."),
        "compare": Operation("evaluation:compare", "Compare runs or evaluations on an HTML page."),
    },
    "Inference": {
        "predict": Operation("evaluation:predict", "Answer questions about images."),
        "chat": Operation("cli.chat:chat", "Start a chat in the terminal."),
        "web": Operation("app.start:web", "Start a chat UI in the browser."),
        "serve": Operation("app.start:serve", "Start an OpenAI-compatible HTTP server."),
    },
    "Deployment": {
        "merge": Operation("deployment:merge", "Merge an adapter into its base model."),
        "export": Operation(
            "deployment:export", "Upload a model, convert it to GGUF, or print serving commands."
        ),
    },
}
"""Operations by group and name, in the order of the help. A name may have two words."""


def find_operation(name: str) -> Operation:
    """Return the operation with a name."""
    return next(group[name] for group in OPERATIONS.values() if name in group)
