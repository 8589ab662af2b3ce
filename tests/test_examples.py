"""The examples, run as they are but for their size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from by_path import loaded

from finesight.model.tiny import make_tiny
from finesight.quickstart import PROMPT, Plan, write_recipe
from finesight.recipe import load_recipe, recipe_of

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOK = loaded("tools/notebook.py")


def in_small(source: str, smaller: dict[str, str]) -> str:
    """The source with some of its lines in place of others, each of which is there once."""
    for line, other in smaller.items():
        assert source.count(f"{line}\n") == 1, f"the example has not one line {line!r}"
        source = source.replace(f"{line}\n", f"{other}\n")
    return source


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder in which the example was run in small, and the names that it leaves behind."""
    work = tmp_path_factory.mktemp("examples")
    model = make_tiny(work / "tiny")
    source = (EXAMPLES / "tickets.py").read_text(encoding="utf-8")
    plan = Plan()
    sizes = f"TICKETS, HELD_OUT, STEPS = {plan.pictures}, {plan.held_out}, {plan.steps}"
    smaller = {
        sizes: "TICKETS, HELD_OUT, STEPS = 20, 4, 2",
        'MODEL = "finesight-tiny"': f"MODEL = {str(model)!r}",
    }
    source = in_small(source, smaller)
    left: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        exec(compile(source, "tickets.py", "exec"), left)
    return work, left


def test_the_example_trains_and_measures(ran):
    work, left = ran
    run = work / "tickets-example" / "run"
    assert json.loads((run / "result.json").read_text())["steps"] == 2
    assert left["result"].before.headline == "f1"
    assert (run / "report.html").is_file()
    assert left["checked"].counts == {}


def test_the_example_asks_about_new_pictures(ran):
    _, left = ran
    assert [answer.images[0].name for answer in left["answers"]] == [
        f"{number:04}.png" for number in range(3)
    ]


def test_the_example_is_in_cells():
    """Titles and code take turns, so that every cell says what it is for."""
    for path in EXAMPLES.glob("*.py"):
        heads = [
            line for line in path.read_text(encoding="utf-8").splitlines() if line[:4] == "# %%"
        ]
        assert heads[::2] == ["# %% [markdown]"] * (len(heads) // 2), path
        assert set(heads[1::2]) == {"# %%"}, path


def test_the_example_does_what_the_quickstart_does(ran, tmp_path):
    """The settings that decide about the result are the same in both."""
    _, left = ran
    assert left["PROMPT"] == PROMPT
    theirs = load_recipe(write_recipe(tmp_path / "quick", Plan()), ["train.steps=2"])
    mine = recipe_of(left["recipe"])
    # A script without a guard must not start processes that would run it again.
    train = mine.train.model_copy(update={"workers": None})
    assert (mine.tune, train, mine.eval) == (theirs.tune, theirs.train, theirs.eval)


@pytest.fixture(scope="module")
def cells():
    """The code of the notebook, cell by cell, without what installs."""
    notebook = json.loads(NOTEBOOK.NOTEBOOK.read_text(encoding="utf-8"))
    code = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert [number for number, cell in enumerate(code) if cell.startswith("%pip ")] == [0]
    return code[1:]


def test_the_notebook_is_made_of_its_script():
    script = NOTEBOOK.SOURCE.read_text(encoding="utf-8")
    made = NOTEBOOK.NOTEBOOK.read_text(encoding="utf-8")
    assert made == NOTEBOOK.as_notebook(script), "run: python tools/notebook.py"


def test_the_notebook_is_one_that_opens():
    """What Jupyter's nbformat 4.5 demands of every notebook."""
    notebook = json.loads(NOTEBOOK.NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len({*ids}), "two cells of one id"
    for cell in notebook["cells"]:
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | code
        assert all(line.endswith("\n") for line in cell["source"][:-1])


def test_the_notebook_runs_and_runs_again(cells, tmp_path, monkeypatch, capsys):
    """Cell after cell on a CPU, in small; a machine that came back goes through them anew."""
    monkeypatch.chdir(tmp_path)
    smaller = {
        "TICKETS, HELD_OUT, STEPS = 660, 60, 75": "TICKETS, HELD_OUT, STEPS = 20, 4, 2",
        'MODEL = "Qwen/Qwen2-VL-2B-Instruct"': f"MODEL = {str(make_tiny(tmp_path / 'tiny'))!r}",
    }
    first = in_small(f"{cells[0]}\n", smaller)
    results = []
    for _ in range(2):
        left: dict[str, object] = {}
        for number, cell in enumerate([first, *cells[1:]]):
            exec(compile(cell, f"cell {number}", "exec"), left)
        results.append(left["result"])
        assert len(left["answers"]) == 3
    assert results[0] == results[1]
    assert results[0].steps == 2
    assert (tmp_path / "tickets-on-a-gpu" / "adapter.zip").stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "s for a step" in shown
    assert "held_out_loss" in shown
