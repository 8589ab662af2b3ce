"""The same samples out of JSONL, tars and Parquet teach the same, to the last bit."""

from pathlib import Path

import pytest
from container_fixtures import write_parquet, write_tar_shards
from tiny_task import assets as assets
from tiny_task import read_losses
from tiny_task import task as task


@pytest.mark.parametrize("cache", ["never", "disk"])
def test_containers_give_identical_training(task, tmp_path, cache):
    """Compare runs with and without a vision cache, whose key is the image content."""
    table = tmp_path / "train.jsonl"
    sources = {
        "jsonl": str(table),
        "tars": write_tar_shards(table, tmp_path / "shards", each=4),
        "parquet": str(write_parquet(table, tmp_path / "train.parquet")),
    }
    tune = {"language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
    for name, source in sources.items():
        data = {"train": source, "eval": str(tmp_path / "eval.jsonl")}
        train = task.recipe["train"] | {"vision_cache": cache, "num_workers": 2}
        task.run(name=name, data=data, tune=tune, train=train)
        found = "9 of them loaded from" in task.console_output
        assert found == (cache == "disk" and name != "jsonl")
    for name in ("tars", "parquet"):
        assert read_losses(tmp_path / name) == read_losses(tmp_path / "jsonl")
        assert weights(tmp_path / name) == weights(tmp_path / "jsonl") != {}


def weights(run: Path) -> dict[str, bytes]:
    """The tensors of the last checkpoint; beside them it says which data they come from."""
    return {path.name: path.read_bytes() for path in run.glob("checkpoints/step-6/*.safetensors")}


def test_tar_eval_samples_are_evaluated_and_shown(task, tmp_path):
    validation = write_tar_shards(tmp_path / "eval.jsonl", tmp_path / "validation", each=2)
    data = {"train": str(tmp_path / "train.jsonl"), "eval": validation}
    eval_settings = {"metric": "qa", "max_new_tokens": 4}
    baseline = task.run(name="plain", eval=eval_settings)
    packed = task.run(name="packed", data=data, eval=eval_settings)
    assert packed.after.validation_loss == baseline.after.validation_loss
    packed_images, images = (
        (tmp_path / name / "report.html").read_text().count("data:image/")
        for name in ("packed", "plain")
    )
    assert packed_images == images > 0
