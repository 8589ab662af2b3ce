"""Very many samples: some are looked at beforehand, the others when they are read."""

from __future__ import annotations

import json

import pytest
from small_run import Task, final_files, losses

from finesight.errors import UserError
from finesight.train.survey import spread

SAMPLES = 11


@pytest.fixture(autouse=True)
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven samples are very many, of which three are looked at."""
    monkeypatch.setattr("finesight.train.texts.MOST", SAMPLES - 1)
    monkeypatch.setattr("finesight.train.survey.SOME", 3)


def others() -> list[int]:
    return [index for index in range(SAMPLES) if index not in spread(SAMPLES)]


def spoil(task: Task) -> dict[str, str]:
    """Break four samples that are not looked at beforehand: what each one's reason is to say."""
    path = task.folder / "train.jsonl"
    lines = path.read_text().splitlines()
    broken, turned, long, damaged = others()[:4]
    rows = {index: json.loads(lines[index]) for index in (turned, long)}
    rows[turned]["messages"].reverse()
    rows[long]["messages"][1]["content"] = "red " * 200
    for index, row in rows.items():
        lines[index] = json.dumps(row)
    lines[broken] = lines[broken][:-5]
    path.write_text("\n".join(lines) + "\n")
    (task.folder / f"train{damaged}.png").write_bytes(b"none")
    return {
        f"{path}:{broken + 1}": "broken JSON",
        f"{path}:{turned + 1}": "roles are assistant, user",
        f"train{long}": "tokens",
        f"train{damaged}": "not a picture",
    }


def test_few_are_looked_at_and_the_sums_are_estimates(task: Task) -> None:
    task.run(tune={"language": "lora"})
    seen = len(spread(SAMPLES))
    assert f"too many to look at all beforehand; {seen} were looked at, 0 of them" in task.screen
    assert "data.eval: 3 samples, " in task.screen
    assert "too many samples to know all of their pictures" in task.screen
    steps = [line for line in task.history() if "loss" in line]
    assert sum(line["samples"] for line in steps) == 2 * SAMPLES
    estimate = task.history()[0]["data"]["train"]["tokens"]
    assert estimate == pytest.approx(sum(line["tokens"] for line in steps) / 2, rel=0.2)


def test_what_is_wrong_with_the_others_is_found_when_they_are_read(task: Task) -> None:
    reasons = spoil(task)
    task.run("data.max_length=100", "train.epochs=1")
    steps = [line for line in task.history() if "loss" in line]
    dropped = [name for line in steps for name in line["dropped"]]
    assert sorted(dropped) == sorted(reasons)
    assert sum(line["samples"] for line in steps) == SAMPLES - len(reasons)
    for name, reason in reasons.items():
        (told,) = (line for line in task.screen.splitlines() if f"dropped {name}: " in line)
        assert reason in told


def test_or_refused(task: Task) -> None:
    spoil(task)
    with pytest.raises(UserError, match=r"broken JSON|roles are|tokens|not a picture"):
        task.run("data.max_length=100", "data.unusable=refuse")


def test_a_mistake_in_one_that_is_looked_at_is_refused_before_the_first_step(task: Task) -> None:
    path = task.folder / "train.jsonl"
    lines = path.read_text().splitlines()
    lines[spread(SAMPLES)[0]] = "{"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="broken JSON"):
        task.run()
    assert not (task.folder / "run").exists()


def test_resumed_equals_uninterrupted(task: Task) -> None:
    spoil(task)
    task.recipe["data"]["max_length"] = 100
    task.run(name="whole")
    task.unfinished()
    task.run(resume=True)
    assert losses(task.folder / "run") == losses(task.folder / "whole")
    assert final_files(task.folder / "run") == final_files(task.folder / "whole")


def test_all_looked_at_is_another_choice_of_samples(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    task.unfinished()
    monkeypatch.setattr("finesight.train.texts.MOST", SAMPLES)
    with pytest.raises(UserError, match=r"usable samples of data\.train"):
        task.run(resume=True)
