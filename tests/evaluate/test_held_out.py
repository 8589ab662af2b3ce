from __future__ import annotations

from pathlib import Path

import pytest

from finesight.data.jsonl import write_samples
from finesight.data.sample import Message, Sample, TextPart
from finesight.errors import UserError
from finesight.evaluate.held_out import held_out


def _data(path: Path, count: int) -> Path:
    samples = [
        Sample(
            id=f"{path.stem}{i}",
            messages=(
                Message(role="user", content=(TextPart(text="Why?"),)),
                Message(role="assistant", content=(TextPart(text="because"),)),
            ),
        )
        for i in range(count)
    ]
    write_samples(path, samples)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    train, first = _data(tmp_path / "train.jsonl", 3), _data(tmp_path / "first.jsonl", 2)
    second = _data(tmp_path / "second.jsonl", 5)
    (tmp_path / "recipe.yaml").write_text(
        f"""
model: tiny
data:
  train: {train}
  eval: [{first}, {{path: {second}, limit: 2}}]
eval: {{metric: latex, limit: 3, max_new_tokens: 77, batch: 5}}
output: {tmp_path}
"""
    )
    return tmp_path


def test_a_run_says_what_it_was_measured_on(run):
    samples, settings = held_out(str(run))
    assert [s.sample.id for s in samples] == ["first0", "first1", "second0", "second1"]
    assert (settings.metric, settings.limit) == ("latex", 3)
    assert (settings.max_new_tokens, settings.batch) == (77, 5)


def test_options_come_before_the_recipe(run):
    samples, settings = held_out(
        str(run), data=run / "train.jsonl", metric="ocr", limit=1, batch=2, max_new_tokens=9
    )
    assert [s.sample.id for s in samples] == ["train0", "train1", "train2"]
    assert samples[0].folder == run
    assert (settings.metric, settings.limit) == ("ocr", 1)
    assert (settings.max_new_tokens, settings.batch) == (9, 2)


def test_without_a_recipe_data_and_metric_are_asked_for(tmp_path):
    data = _data(tmp_path / "train.jsonl", 1)
    with pytest.raises(UserError, match=r"metric: .* is no run with a recipe"):
        held_out(str(tmp_path), data=data)
    with pytest.raises(UserError, match=r"data: .* is no run with a recipe"):
        held_out(str(tmp_path), metric="ocr")
    assert held_out(str(tmp_path), data=data, metric="ocr")[1].metric == "ocr"


def test_an_empty_data_file_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no samples"):
        held_out(str(tmp_path), data=tmp_path / "empty.jsonl", metric="ocr")


def test_a_metric_that_there_is_not_is_refused(tmp_path):
    data = _data(tmp_path / "train.jsonl", 1)
    with pytest.raises(UserError, match=r"no metric 'latx'[\s\S]*did you mean latex\?"):
        held_out(str(tmp_path), data=data, metric="latx")
    assert held_out(str(tmp_path), data=data, metric="a/b.py:f")[1].metric == "a/b.py:f"


def test_a_recipe_without_measuring_and_counts_out_of_bounds_are_told(run, tmp_path):
    (run / "recipe.yaml").write_text("model: m\ndata: {train: a.jsonl}\noutput: o\n")
    with pytest.raises(UserError, match=r"metric: .* has a recipe without it"):
        held_out(str(run))
    data = _data(tmp_path / "train.jsonl", 1)
    with pytest.raises(UserError, match="max_new_tokens is 9000000"):
        held_out("finesight-tiny", data=data, metric="ocr", max_new_tokens=9_000_000)
    with pytest.raises(UserError, match="no metric '<function"):
        held_out("finesight-tiny", data=data, metric=_data)
