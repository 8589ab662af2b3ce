from __future__ import annotations

from pathlib import Path

import pytest

from finesight.data.sample import Message, Sample, TextPart, write_samples
from finesight.errors import UserError
from finesight.evaluate.generation_eval import load_eval_inputs


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
eval: {{metric: latex, limit: 3, max_new_tokens: 77, batch_size: 5}}
output_dir: {tmp_path}
"""
    )
    return tmp_path


def test_run_provides_eval_data_and_settings(run):
    samples, settings = load_eval_inputs(str(run))
    assert [s.sample.id for s in samples] == ["first0", "first1", "second0", "second1"]
    assert (settings.metric, settings.limit) == ("latex", 3)
    assert (settings.max_new_tokens, settings.batch_size) == (77, 5)


def test_options_override_the_recipe(run):
    samples, settings = load_eval_inputs(
        str(run), data=run / "train.jsonl", metric="ocr", limit=1, batch_size=2, max_new_tokens=9
    )
    assert [s.sample.id for s in samples] == ["train0", "train1", "train2"]
    assert samples[0].folder == run
    assert (settings.metric, settings.limit) == ("ocr", 1)
    assert (settings.max_new_tokens, settings.batch_size) == (9, 2)


def test_data_and_metric_are_required_without_recipe(tmp_path):
    data = _data(tmp_path / "train.jsonl", 1)
    with pytest.raises(UserError, match=r"metric: .* is not a run folder with a recipe"):
        load_eval_inputs(str(tmp_path), data=data)
    with pytest.raises(UserError, match=r"data: .* is not a run folder with a recipe"):
        load_eval_inputs(str(tmp_path), metric="ocr")
    assert load_eval_inputs(str(tmp_path), data=data, metric="ocr")[1].metric == "ocr"


def test_empty_data_file_is_rejected(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="contains no samples"):
        load_eval_inputs(str(tmp_path), data=tmp_path / "empty.jsonl", metric="ocr")


def test_unknown_metric_is_rejected(tmp_path):
    data = _data(tmp_path / "train.jsonl", 1)
    with pytest.raises(UserError, match=r"unknown metric 'latx'[\s\S]*did you mean latex\?"):
        load_eval_inputs(str(tmp_path), data=data, metric="latx")
    assert load_eval_inputs(str(tmp_path), data=data, metric="a/b.py:f")[1].metric == "a/b.py:f"


def test_missing_metric_and_invalid_limits_are_rejected(run, tmp_path):
    (run / "recipe.yaml").write_text("model: m\ndata: {train: a.jsonl}\noutput_dir: o\n")
    with pytest.raises(UserError, match=r"metric: .* has a recipe without it"):
        load_eval_inputs(str(run))
    data = _data(tmp_path / "train.jsonl", 1)
    with pytest.raises(UserError, match="max_new_tokens is 9000000"):
        load_eval_inputs("finesight-tiny", data=data, metric="ocr", max_new_tokens=9_000_000)
    with pytest.raises(UserError, match="unknown metric '<function"):
        load_eval_inputs("finesight-tiny", data=data, metric=_data)
