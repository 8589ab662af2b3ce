"""Metrics of Python files, which run folders bring: executed if this user has trusted them."""

import os
from pathlib import Path

import pytest
from case_files import load_cases
from tiny_task import TinyTask

from finesight import api
from finesight.cli.app import run_command
from finesight.errors import UserError
from finesight.evaluate import custom_metric
from finesight.evaluate.custom_metric import (
    METRIC_COPY_FILE,
    check_metric,
    check_recipe_metric,
    load_custom_metric,
    parse_metric_path,
    resolve_metric_path,
    trust_file,
    trust_metric,
)
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.task_metrics import check_references, compute_metrics, get_primary_metric
from finesight.files.storage import write_file
from finesight.settings.manifest import MANIFEST_FILE, RECIPE_FILE
from finesight.settings.recipe import recipe_from_dict

TABLES = load_cases("custom_metric")

CASES = [EvalCase("abc", (), ("abd",), (), "s1"), EvalCase("x", (), ("x", "y"), (), "s2")]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test its own list of trusted metrics."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def write_metric(folder: Path, text: str) -> str:
    (folder / "mine.py").write_text(text)
    return f"{folder / 'mine.py'}:score"


def test_single_and_several_scores_with_headline(tmp_path: Path) -> None:
    metric = write_metric(tmp_path, "def score(case): return case.answer in case.references")
    scored = compute_metrics(metric, CASES)
    assert scored.scores == {"score": 0.5, "ended_with_eos": 1.0}
    assert get_primary_metric(metric, scored.scores) == "score"
    assert set(scored.intervals()) == {"score", "ended_with_eos"}
    scores = "{'length': len(case.answer), 'same': case.answer == case.references[0]}"
    metric = write_metric(tmp_path, f"HEADLINE = 'same'\ndef score(case): return {scores}\n")
    scored = compute_metrics(metric, CASES)
    assert list(scored.scores.items()) == [("same", 0.5), ("length", 2.0), ("ended_with_eos", 1.0)]
    assert get_primary_metric(metric, scored.scores) == "same"
    assert scored.per_sample[0] == {"same": 0.0, "length": 3.0}


@pytest.mark.parametrize(
    ("text", "where", "what"), TABLES["test_metric_error_is_reported_with_its_line"]
)
def test_metric_error_is_reported_with_its_line(tmp_path, text, where, what):
    with pytest.raises(UserError, match=what) as caught:
        compute_metrics(write_metric(tmp_path, text), CASES)
    assert caught.value.where == str(tmp_path / where)


def test_metric_process_does_not_affect_the_caller(tmp_path: Path, capfd) -> None:
    pid = os.getpid()
    lines = ["import os, time", "def score(case):", "    print('x' * 2_000_000)"]
    lines += ["    if os.fork() == 0: time.sleep(1000)", "    return os.environ['MY_KEY'] == 'a'"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MY_KEY", "a")
        scored = compute_metrics(write_metric(tmp_path, "\n".join(lines)), CASES)
    assert scored.scores["score"] == 1
    assert (capfd.readouterr().out, os.getpid()) == ("", pid)


@pytest.mark.parametrize(("text", "message"), TABLES["test_broken_metric_fails_before_generation"])
def test_broken_metric_fails_before_generation(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_references(write_metric(tmp_path, text), [(("a",), ())])
    metric = write_metric(tmp_path, "def score(case): return case.answer == case.references[0]\n")
    check_references(metric, [(("",), ())])


def test_metric_paths_are_resolved_to_the_copy_of_a_run(tmp_path: Path) -> None:
    assert parse_metric_path("captions") is None
    assert parse_metric_path("a/b.py:f") == (Path("a/b.py"), "f")
    assert parse_metric_path("~/b.py:f") == (Path("~/b.py").expanduser(), "f")
    metric = write_metric(tmp_path, "def score(case): return 1\n")
    copy = tmp_path / METRIC_COPY_FILE
    assert resolve_metric_path(metric, tmp_path) == metric
    copy.write_text("def score(case): return 0\n")
    assert resolve_metric_path(metric, tmp_path) == metric
    assert resolve_metric_path(metric, tmp_path, prefer_copy=True) == f"{copy}:score"
    (tmp_path / "mine.py").unlink()
    assert resolve_metric_path(metric, tmp_path) == f"{copy}:score"
    assert resolve_metric_path("ocr", tmp_path) == "ocr"
    with pytest.raises(UserError, match="no such file"):
        load_custom_metric(tmp_path / "mine.py", "score")


METRIC = """from pathlib import Path
with Path({log!r}).open("a") as file:
    file.write("executed\\n")
def score(case):
    return float(len(case.answer))
"""


class Run:
    """A run whose metric records that it is executed."""

    def __init__(self, folder: Path) -> None:
        self.task = TinyTask(folder / "task")
        self.log = folder / "log"
        self.metric = self.task.folder / "mine.py"
        self.metric.write_text(METRIC.format(log=str(self.log)))
        self.folder = self.task.folder / "run"
        self.recipe = self.task.folder / "recipe.yaml"
        self.task.run(eval={"metric": f"{self.metric}:score", "max_new_tokens": 2})
        self.log.unlink()

    def executed_by(self, *command: object) -> tuple[int, bool]:
        """Return the exit code of a command, and whether it executed the metric."""
        code = run_command([str(word) for word in command])
        found = self.log.exists()
        self.log.unlink(missing_ok=True)
        return code, found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("made"))


def test_metric_of_a_foreign_run_needs_trust(made: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert made.executed_by("eval", made.folder) == (2, False)
    message = capsys.readouterr().err
    copy = made.folder / "metric.py"
    assert f"{copy}: an untrusted program in a run folder" in message
    assert "--trust-metric" in message
    with pytest.raises(UserError, match="trust_metric=True"):
        api.evaluate(made.folder)
    assert not made.log.exists()
    assert made.executed_by("eval", made.folder, "--trust-metric") == (0, True)
    # Later evaluations execute it until its content changes.
    assert made.executed_by("eval", made.folder) == (0, True)
    stored = copy.read_text()
    copy.write_text(stored + "\n")
    assert made.executed_by("eval", made.folder) == (2, False)
    copy.write_text(stored)


def test_named_metric_is_executed_and_trusted(made: Run, tmp_path: Path) -> None:
    named = ("--metric", f"{made.folder / 'metric.py'}:score", "--max-new-tokens", 2)
    data = ("--data", made.task.folder / "eval.jsonl")
    assert made.executed_by("eval", made.task.folder / "tiny", *data, *named) == (0, True)
    assert made.executed_by("eval", made.folder) == (0, True)
    trust_file().unlink()
    more = (f"output_dir={tmp_path / 'again'}", "train.steps=1", "train.epochs=null")
    assert made.executed_by("train", made.recipe, *more) == (0, True)
    assert made.executed_by("eval", tmp_path / "again") == (0, True)


def test_training_the_recipe_of_a_run_folder_asks_first(made, tmp_path, capsys):
    recipe, link, other = made.folder / "recipe.yaml", tmp_path / "link.yaml", tmp_path / "other"
    link.symlink_to(recipe)
    steps = ("train.steps=1", "train.epochs=null")
    for path in (recipe, link):
        assert made.executed_by("train", path, *steps, f"output_dir={other}") == (2, False)
        assert "--trust-metric" in capsys.readouterr().err
        with pytest.raises(UserError, match="trust_metric=True"):
            api.train(path, {"output_dir": str(other)})
        assert not made.log.exists()
        assert not other.exists()
    for number, option in enumerate((f"eval.metric={made.metric}:score", "--trust-metric")):
        trust_file().unlink(missing_ok=True)
        more = (*steps, f"output_dir={tmp_path / str(number)}", option)
        assert made.executed_by("train", recipe, *more) == (0, True)


def test_resuming_into_a_copy_that_others_wrote_asks_first(made: Run, tmp_path: Path) -> None:
    """The metric file of the recipe is missing, so the copy in the run folder would be executed."""
    text = made.recipe.read_text().replace(str(made.metric), str(tmp_path / "gone.py"))
    (tmp_path / "recipe.yaml").write_text(text)
    assert made.executed_by("train", tmp_path / "recipe.yaml", "--resume") == (2, False)


@pytest.mark.parametrize("command", TABLES["test_other_commands_execute_no_metric"])
def test_other_commands_execute_no_metric(made: Run, command: str, tmp_path: Path) -> None:
    """Even a trusted metric."""
    trust_metric(made.metric)
    (tmp_path / "second").symlink_to(made.folder)
    folders = {"run": made.folder, "task": made.task.folder, "new": tmp_path}
    words = [word.format(recipe=made.recipe, **folders) for word in command.split()]
    code, executed = made.executed_by(*words)
    assert not executed
    assert code in (0, 2)


def assert_untrusted(file: Path) -> None:
    with pytest.raises(UserError, match="untrusted program"):
        check_metric(f"{file}:x", named=False, trust=False)


def test_list_of_trusted_metrics_belongs_to_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "metric\nby\n.py"
    file.write_text("x = 1")
    trust_metric(file)
    trust_metric(file)
    assert len(trust_file().read_text().splitlines()) == 1
    check_metric(f"{file}:x", named=False, trust=False)
    # A list that others can write is ignored.
    trust_file().chmod(0o666)
    assert_untrusted(file)
    trust_file().chmod(0o600)
    check_metric(f"{file}:x", named=False, trust=False)
    file.write_text("x = 2")
    assert_untrusted(file)
    # Without a home folder, the list would be in the working directory, perhaps a received one.
    trust_metric(file)
    trusted = trust_file().read_bytes()
    with monkeypatch.context() as context:
        context.chdir(tmp_path)
        context.setenv("XDG_STATE_HOME", "state")
        write_file(Path("state/finesight/trusted_metrics"), trusted)
        assert_untrusted(file)
        trust_metric(file)
        check_metric(f"{file}:x", named=True, trust=False)
    # Task names and missing files are no programs.
    check_metric("captions", named=False, trust=False)
    check_metric("none/metric.py:score", named=False, trust=False)


def test_reward_file_in_a_run_folder_needs_trust(tmp_path: Path) -> None:
    for name in (MANIFEST_FILE, RECIPE_FILE, "rewards.py"):
        (tmp_path / name).write_text("")
    settings = {"model": "finesight-tiny", "data": {"train": "a.jsonl"}, "output_dir": "other"}
    reward = f"{tmp_path / 'rewards.py'}:score"
    recipe = recipe_from_dict(
        settings | {"train": {"objective": "grpo"}, "rewards": ["exact", reward]}
    )
    for path in (tmp_path / RECIPE_FILE, tmp_path.parent / "recipe.yaml"):
        with pytest.raises(UserError, match="untrusted program"):
            check_recipe_metric(recipe, path, ("eval.limit=1",), trust=False)
    check_recipe_metric(recipe, tmp_path / RECIPE_FILE, (f"rewards={reward}",), trust=False)
    check_recipe_metric(recipe, tmp_path / RECIPE_FILE, (), trust=False)


def test_read_only_home_does_not_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", os.devnull)
    (tmp_path / "metric.py").write_text("x = 1")
    check_metric(f"{tmp_path / 'metric.py'}:x", named=True, trust=False)
    assert_untrusted(tmp_path / "metric.py")


@pytest.mark.parametrize(
    "name", ["loop.py", "a\0b.py", "x" * 300 + ".py", "~nobody-of-this-name/a.py"]
)
def test_impossible_metric_file_is_missing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("loop.py").symlink_to("loop.py")
    metric = f"{name}:score"
    settings = {"model": "finesight-tiny", "data": {"train": "a.jsonl"}, "output_dir": "other"}
    recipe = recipe_from_dict(settings | {"eval": {"metric": metric}})
    check_recipe_metric(recipe, tmp_path / "recipe.yaml", (), trust=False)
    location = parse_metric_path(resolve_metric_path(metric, tmp_path / "other"))
    assert location is not None
    with pytest.raises(UserError, match="no such file"):
        custom_metric.require_metric_file(location[0])
