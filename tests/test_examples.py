"""The examples, run as they are but for their size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finesight.model.tiny import make_tiny
from finesight.quickstart import PROMPT, Plan, write_recipe
from finesight.recipe import load_recipe, recipe_of

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder in which the example was run in small, and the names that it leaves behind."""
    work = tmp_path_factory.mktemp("examples")
    model = make_tiny(work / "tiny")
    source = (EXAMPLES / "tickets.py").read_text(encoding="utf-8")
    plan = Plan()
    sizes = f"TICKETS, HELD_OUT, STEPS = {plan.pictures}, {plan.held_out}, {plan.steps}\n"
    for line, smaller in (
        (sizes, "TICKETS, HELD_OUT, STEPS = 20, 4, 2\n"),
        ('MODEL = "finesight-tiny"\n', f"MODEL = {str(model)!r}\n"),
    ):
        assert source.count(line) == 1, f"the example has not one line {line!r}"
        source = source.replace(line, smaller)
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
