"""Makes a notebook of an example: `python tools/notebook.py` writes examples/free_gpu.ipynb.

The example is a script in cells that begin with `# %%`; text cells are comments, and a line that
only a notebook understands, such as `%pip install`, is a comment in the script.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SOURCE, NOTEBOOK = EXAMPLES / "free_gpu.py", EXAMPLES / "free_gpu.ipynb"

TEXT = "# %% [markdown]"
MAGIC = re.compile(r"^# (%\w+ )", re.MULTILINE)


def as_notebook(script: str) -> str:
    """The script's cells as a notebook, format 4.5 of Jupyter's nbformat, without outputs."""
    _, *found = re.split(r"^(?=# %%)", script, flags=re.MULTILINE)
    cells = [_cell(number, *text.split("\n", 1)) for number, text in enumerate(found)]
    about = {
        # By this Colab chooses the machine.
        "accelerator": "GPU",
        "colab": {"gpuType": "T4"},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    whole = {"cells": cells, "metadata": about, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def _cell(number: int, head: str, body: str) -> dict[str, object]:
    cell: dict[str, object] = {"id": f"cell-{number}", "metadata": {}}
    if head == TEXT:
        text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines())
        return cell | {"cell_type": "markdown", "source": _lines(text)}
    code = {"cell_type": "code", "execution_count": None, "outputs": []}
    return cell | code | {"source": _lines(MAGIC.sub(r"\1", body))}


def _lines(text: str) -> list[str]:
    """As nbformat keeps text: lines with their ends, but for the last one's."""
    return text.strip("\n").splitlines(keepends=True)


if __name__ == "__main__":
    NOTEBOOK.write_text(as_notebook(SOURCE.read_text(encoding="utf-8")), encoding="utf-8")
