"""Programs that run folders bring: executed when this user has trusted them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_task import TinyTask

from finesight import api
from finesight.cli.app import run_command
from finesight.errors import UserError
from finesight.evaluate import custom_metric
from finesight.evaluate.custom_metric import (
    check_metric,
    check_recipe_metric,
    in_run_folder,
    trust_file,
    trust_metric,
)
from finesight.recipe import recipe_from_dict

METRIC = """from pathlib import Path
with Path({log!r}).open("a") as file:
    file.write("executed\\n")
def score(case):
    return float(len(case.answer))
"""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A list of trusted metrics that is the test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def forget() -> None:
    trust_file().unlink(missing_ok=True)


class Run:
    """A run with a metric of its own, which tells when it is executed."""

    def __init__(self, folder: Path) -> None:
        self.task = TinyTask(folder / "task")
        self.log = folder / "log"
        self.metric = self.task.folder / "mine.py"
        self.metric.write_text(METRIC.format(log=str(self.log)))
        self.folder = self.task.folder / "run"
        self.recipe = self.task.folder / "recipe.yaml"
        self.task.run(eval={"metric": f"{self.metric}:score", "max_new_tokens": 2})
        self.log.unlink()
        self.executed()

    def executed(self) -> bool:
        """Whether the metric was executed since this was asked last."""
        found = self.log.exists()
        self.log.unlink(missing_ok=True)
        return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("made"))


def test_metric_of_a_foreign_run_needs_trust(made: Run, capsys: pytest.CaptureFixture[str]) -> None:
    forget()
    assert run_command(["eval", str(made.folder)]) == 2
    message = capsys.readouterr().err
    assert f"{made.folder / 'metric.py'}: an untrusted program in a run folder" in message
    assert "--trust-metric" in message
    assert not made.executed()
    with pytest.raises(UserError, match="trust_metric=True"):
        api.evaluate(made.folder)
    assert not made.executed()
    assert run_command(["eval", str(made.folder), "--trust-metric"]) == 0
    assert made.executed()
    # It is trusted from now on, until it is another program.
    assert run_command(["eval", str(made.folder)]) == 0
    assert made.executed()
    stored = (made.folder / "metric.py").read_text()
    (made.folder / "metric.py").write_text(stored + "\n")
    assert run_command(["eval", str(made.folder)]) == 2
    assert not made.executed()
    (made.folder / "metric.py").write_text(stored)


def test_a_metric_that_the_user_names_is_executed(made: Run) -> None:
    forget()
    data = str(made.task.folder / "eval.jsonl")
    model = str(made.task.folder / "tiny")
    named = f"{made.folder / 'metric.py'}:score"
    assert (
        run_command(["eval", model, "--data", data, "--metric", named, "--max-new-tokens", "2"])
        == 0
    )
    assert made.executed()
    # What was named once is trusted in the run's folder, too.
    assert run_command(["eval", str(made.folder)]) == 0
    assert made.executed()


def test_training_a_recipe_records_its_metric(made: Run, tmp_path: Path) -> None:
    forget()
    more = [f"output_dir={tmp_path / 'again'}", "train.steps=1", "train.epochs=null"]
    assert run_command(["train", str(made.recipe), *more]) == 0
    assert made.executed()
    assert run_command(["eval", str(tmp_path / "again")]) == 0
    assert made.executed()


def test_training_the_recipe_of_a_run_folder_asks_first(
    made: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forget()
    recipe, link = made.folder / "recipe.yaml", tmp_path / "link.yaml"
    link.symlink_to(recipe)
    more = ["train.steps=1", "train.epochs=null", f"output_dir={tmp_path / 'other'}"]
    for path in (recipe, link):
        assert run_command(["train", str(path), *more]) == 2
        assert "--trust-metric" in capsys.readouterr().err
        with pytest.raises(UserError, match="trust_metric=True"):
            api.train(path, {"output_dir": str(tmp_path / "other")})
        assert not made.executed()
        assert not (tmp_path / "other").exists()
    metric = f"eval.metric={made.metric}:score"
    assert run_command(["train", str(recipe), *more, metric]) == 0
    assert made.executed()
    forget()
    more[-1] = f"output_dir={tmp_path / 'third'}"
    assert run_command(["train", str(recipe), *more, "--trust-metric"]) == 0
    assert made.executed()


def test_resuming_into_a_copy_that_others_wrote_asks_first(made: Run, tmp_path: Path) -> None:
    """The recipe's own file is gone: what would be executed lies in the folder of the run."""
    forget()
    text = made.recipe.read_text().replace(str(made.metric), str(tmp_path / "gone.py"))
    (tmp_path / "recipe.yaml").write_text(text)
    assert run_command(["train", str(tmp_path / "recipe.yaml"), "--resume"]) == 2
    assert not made.executed()


COMMANDS = {
    "plan": ["plan", "{recipe}", "--gpu", "T4"],
    "show": ["show", "{recipe}"],
    "check": ["check", "{recipe}"],
    "report": ["report", "{run}", "--out", "{new}/report.html"],
    "compare": ["compare", "{run}", "{run2}", "--out", "{new}/compare.html"],
    "doctor": ["doctor", "{run}"],
    "predict": ["predict", "{run}", "{task}/train0.png", "--prompt", "Which?"],
    "merge": ["merge", "{run}", "{new}/merged"],
    "launch": ["launch", "{recipe}", "--out", "{new}/job.sh"],
    "export serve": ["export", "serve", "{run}/model"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_other_commands_execute_no_metric(
    made: Run, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However much it is trusted: `plan` did."""
    trust_metric(made.metric)
    second = tmp_path / "second"
    if name == "compare":
        second.symlink_to(made.folder)
        pytest.importorskip("jinja2")
    values = {
        "recipe": made.recipe,
        "run": made.folder,
        "run2": second,
        "task": made.task.folder,
        "new": tmp_path,
    }
    code = run_command([word.format(**values) for word in COMMANDS[name]])
    output = capsys.readouterr()
    assert not made.executed()
    assert code in (0, 2), output.err
    if name.startswith("data"):
        assert code == 0, output.err


def test_plan_names_a_metric_that_is_not_there(
    made: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["eval.metric=none.py:score", f"output_dir={tmp_path / 'new'}", "--gpu", "T4"]
    assert run_command(["plan", str(made.recipe), *more]) == 2
    assert "none.py: no such file" in capsys.readouterr().err


def test_the_list_is_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "metric\nby\n.py"
    file.write_text("x = 1")
    trust_metric(file)
    trust_metric(file)
    assert len(trust_file().read_text().splitlines()) == 1
    check_metric(f"{file}:x", named=False, trust=False)
    # One that others can write is not believed.
    trust_file().chmod(0o666)
    with pytest.raises(UserError, match="untrusted program"):
        check_metric(f"{file}:x", named=False, trust=False)
    trust_file().chmod(0o600)
    check_metric(f"{file}:x", named=False, trust=False)
    file.write_text("x = 2")
    with pytest.raises(UserError, match="untrusted program"):
        check_metric(f"{file}:x", named=False, trust=False)


def test_read_only_home_does_not_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", os.devnull)
    (tmp_path / "metric.py").write_text("x = 1")
    check_metric(f"{tmp_path / 'metric.py'}:x", named=True, trust=False)
    with pytest.raises(UserError):
        check_metric(f"{tmp_path / 'metric.py'}:x", named=False, trust=False)


def test_tasks_and_missing_files_are_no_programs() -> None:
    check_metric("captions", named=False, trust=False)
    check_metric("none/metric.py:score", named=False, trust=False)


def test_a_run_folder_has_a_manifest_and_a_recipe(tmp_path: Path) -> None:
    assert not in_run_folder(tmp_path / "recipe.yaml")
    (tmp_path / "manifest.json").write_text("{}")
    assert not in_run_folder(tmp_path / "metric.py")
    (tmp_path / "recipe.yaml").write_text("")
    assert in_run_folder(tmp_path / "metric.py")


@pytest.mark.parametrize(
    "name", ["loop.py", "a\0b.py", "x" * 300 + ".py", "~nobody-of-this-name/a.py"]
)
def test_a_metric_file_that_cannot_be_there_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop.py").symlink_to("loop.py")
    recipe = recipe_from_dict(
        {"model": "finesight-tiny", "data": {"train": "a.jsonl"}, "output_dir": "other"}
        | {"eval": {"metric": f"{name}:score"}}
    )
    check_recipe_metric(recipe, tmp_path / "recipe.yaml", (), trust=False)
    location = custom_metric.parse_metric_path(
        custom_metric.resolve_metric_path(f"{name}:score", tmp_path / "other")
    )
    with pytest.raises(UserError, match="no such file"):
        custom_metric.require_metric_file(location[0])
