"""Tests of `finesight report`: output page and invalid arguments."""

from pathlib import Path

import pytest
from image_fixtures import write_gray_image
from run_dir_fixtures import START_RECORD, FakeRunDir, make_prediction_line

from finesight.evaluate.prediction_file import read_predictions
from finesight.samples.sample import read_samples


@pytest.fixture(autouse=True)
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRunDir:
    """Write the run `run` into the working directory."""
    monkeypatch.chdir(tmp_path)
    run = FakeRunDir(Path("run"))
    run.write_metrics()
    return run


def test_report_is_written_into_run(cli, monkeypatch):
    page = Path("run/report.html")
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    for options, tag in ((["--language", "en"], "en"), (["--language", "zh"], "zh-Hans")):
        assert cli("report", "run", *options).out == f"page: {page}\n"
        assert f'<html lang="{tag}">' in page.read_text()
    cli("report", "run")
    assert '<html lang="zh-Hans">' in page.read_text()
    cli("report", "run", "--language", "en")
    assert "not finished: 60 of 60 steps" in page.read_text()


def test_report_is_written_to_out(cli):
    out = Path("new/page.html")
    assert cli("report", "run", "--out", out, "--json").json == {"report": str(out)}
    assert out.exists()
    assert not Path("run/report.html").exists()


def test_incorrect_answers_are_written_and_imported(run, cli):
    image = str(write_gray_image(Path("a.png")))
    scores = {"s0": 0.5, "s1": 1.0, "s2": 0.0}
    lines = [
        make_prediction_line(name, "x", f"answer {name}", score, image=image)
        for name, score in scores.items()
    ]
    wrong = ("report", "run", "--incorrect", "wrong.jsonl")
    assert "has no predictions" in cli(*wrong, code=2).err
    run.write_predictions("after", lines)
    assert cli(*wrong).out.startswith("2 incorrect answers: wrong.jsonl\n")
    assert [one.case.id for one in read_predictions(Path("wrong.jsonl"))] == ["s0", "s2"]
    columns = ["--map", "image=image", "--map", "question=prompt", "--map", "answer=gold"]
    cli("import", "wrong.jsonl", "data", *columns)
    samples = read_samples(Path("data/data.jsonl"))
    assert [one.messages[-1].content[0].text for one in samples] == ["answer s0", "answer s2"]
    predictions = Path("run/predictions/after.jsonl")
    cli("report", "run", "--incorrect", predictions, code=2)
    assert len(read_predictions(predictions)) == 3
    run.write_predictions("after", [lines[0] | {"scores": {}}])
    assert "none of 1 predictions has a score" in cli(*wrong, code=2).err


def test_incorrect_answers_have_the_images_of_the_run(run, tmp_path, monkeypatch, cli):
    """Recorded paths start at the working directory of the run."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (home, elsewhere):
        write_gray_image(folder / "a.png")
    images = ["a.png", ["a.png", "missing.png"], str(elsewhere / "a.png"), None]
    lines = [
        make_prediction_line(f"s{i}", "x", "y", 0.5, image=one) for i, one in enumerate(images)
    ]
    run.write_predictions("after", lines)
    run.write_metrics(start=START_RECORD | {"working_dir": str(home)})
    monkeypatch.chdir(elsewhere)
    cli("report", tmp_path / "run", "--incorrect", "wrong.jsonl")
    found = [one.record["image"] for one in read_predictions(Path("wrong.jsonl"))]
    image = str(home / "a.png")
    assert found == [image, [image, "missing.png"], images[2], None]
