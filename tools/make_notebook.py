"""Generate the notebook of an example.

`python tools/make_notebook.py` writes examples/free_gpu.ipynb. The example is a script with cells
that start with `# %%`. Markdown cells are comments. Notebook commands, such as `%pip install`, are
commented out in the script.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPT_PATH, NOTEBOOK_PATH = EXAMPLES / "free_gpu.py", EXAMPLES / "free_gpu.ipynb"

MARKDOWN_HEADER = "# %% [markdown]"
MAGIC_COMMENT = re.compile(r"^# (%\w+ )", re.MULTILINE)


def to_notebook(script: str) -> str:
    """Convert the script to a notebook (nbformat 4.5) without outputs."""
    _, *found = re.split(r"^(?=# %%)", script, flags=re.MULTILINE)
    cells = [_make_cell(number, *text.split("\n", 1)) for number, text in enumerate(found)]
    about = {
        # Colab selects the machine type by this entry.
        "accelerator": "GPU",
        "colab": {"gpuType": "T4"},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook = {"cells": cells, "metadata": about, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _make_cell(index: int, head: str, body: str) -> dict[str, object]:
    cell: dict[str, object] = {"id": f"cell-{index}", "metadata": {}}
    if head == MARKDOWN_HEADER:
        text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines())
        return cell | {"cell_type": "markdown", "source": _source_lines(text)}
    code = {"cell_type": "code", "execution_count": None, "outputs": []}
    return cell | code | {"source": _source_lines(MAGIC_COMMENT.sub(r"\1", body))}


def _source_lines(text: str) -> list[str]:
    """Split text into lines with line ends, except for the last line (nbformat)."""
    return text.strip("\n").splitlines(keepends=True)


if __name__ == "__main__":
    NOTEBOOK_PATH.write_text(to_notebook(SCRIPT_PATH.read_text(encoding="utf-8")), encoding="utf-8")
