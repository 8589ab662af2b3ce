"""What a run starts from, and what it refuses before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from small_run import Task

from finesight.errors import UserError
from finesight.train.budget import enough_memory


def test_going_on_from_a_run_and_from_its_adapter(task: Task) -> None:
    lora = {"language": "lora", "lora": {"rank": 2, "dropout": 0.0}}
    first = task.run(tune=lora, name="first")
    assert first.after is not None
    for number, start in enumerate(
        (
            {"model": str(task.folder / "first")},
            {"adapter": str(task.folder / "first")},
            {"adapter": str(task.folder / "first" / "adapter")},
        )
    ):
        result = task.run(tune=lora, name=f"second{number}", **start)
        assert result.before is not None
        assert result.before.held_out_loss == pytest.approx(first.after.held_out_loss, rel=1e-6)
    with pytest.raises(UserError, match="rank 2"):
        task.run(tune={"language": "lora"}, name="third", adapter=str(task.folder / "first"))
    assert not (task.folder / "third").exists()
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        task.run(name="fourth", adapter=str(task.folder / "tiny"))
    with pytest.raises(UserError, match=r"has an adapter of its own[\s\S]*leave adapter out"):
        task.run(
            tune=lora, name="fifth", model=str(task.folder / "first"), adapter=str(task.folder)
        )


@pytest.mark.parametrize("setting", ["model", "adapter"])
def test_going_on_from_a_run_keeps_its_size_and_prompt_unless_told(
    task: Task, setting: str
) -> None:
    lora = {"language": "lora", "lora": {"rank": 2}}
    task.run("data.system=Name colours.", "picture={height: 56, width: 28}", tune=lora, name="one")
    start = {setting: str(task.folder / "one"), "picture": None}
    task.run(tune=lora, name="two", **start)
    task.run("data.system=Speak.", "picture={longest_side: 56}", tune=lora, name="three", **start)
    manifests = [
        json.loads((task.folder / name / "manifest.json").read_text())
        for name in ("one", "two", "three")
    ]
    assert manifests[1]["picture"] == manifests[0]["picture"] == {"height": 56, "width": 28}
    assert manifests[1]["system"] == manifests[0]["system"] == "Name colours."
    assert manifests[2]["picture"] == {"longest_side": 56}
    assert manifests[2]["system"] == "Speak."


def test_pictures_on_both_sides_are_told(task: Task) -> None:
    task.run()
    assert "are in data.train too" not in task.screen
    task.run(f"data.eval={task.folder / 'train.jsonl'}", name="leaky")
    assert "11 pictures of data.eval are in data.train too" in task.screen


def test_resume_refuses_other_settings_and_other_data(task: Task) -> None:
    run = task.unfinished()
    with pytest.raises(UserError) as caught:
        task.run("train.batch=5", "tune.lora.rank=4", "train.weight_decay=0.5", resume=True)
    assert "train.batch is 5 now" in caught.value.what
    assert "train.weight_decay=0.01" in caught.value.expected
    assert str(run / "checkpoints" / "step-4") in caught.value.where
    with (task.folder / "train.jsonl").open("a") as file:
        file.write((task.folder / "train.jsonl").read_text().splitlines()[0].replace("0", "1"))
    with pytest.raises(UserError, match=r"data\.train is"):
        task.run(resume=True)


def test_eval_without_data_is_refused_at_once(task: Task) -> None:
    data = {"train": task.recipe["data"]["train"]}
    with pytest.raises(UserError, match=r"data\.eval"):
        task.run(data=data, eval={"metric": "ocr"})
    assert task.run(data=data).before is None


def test_an_adapter_where_nobody_can_look(task: Task) -> None:
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        task.run(adapter="a" * 5000)


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(1 << 60, dtype=torch.uint8),
        lambda: bytearray(1 << 62),
    ],
    ids=["tensor", "bytes"],
)
def test_a_machine_without_so_much_memory_is_told(allocate: Callable[[], object]) -> None:
    with pytest.raises(UserError, match="this machine's memory is full"), enough_memory():
        allocate()


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), enough_memory():
        raise RuntimeError("shapes")
