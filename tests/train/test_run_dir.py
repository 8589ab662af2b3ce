"""Run directory: one run, one process, no partial lines."""

import json
from pathlib import Path

import pytest

from finesight.errors import UserError
from finesight.train.run_dir import RunDir


@pytest.mark.parametrize(
    ("existing", "run", "expected"),
    [
        (["run"], "run", "run-2"),
        (["run", "run-2"], "run", "run-3"),
        (["run", "run-2"], "run-2", "run-3"),
        (["run", "run-3"], "run-3", "run-2"),
        (["rank-64"], "rank-64", "rank-64-2"),
        (["folder-2024", "folder-2024-05"], "folder-2024-05", "folder-2024-05-2"),
    ],
)
def test_finished_run_offers_a_free_folder(tmp_path, existing, run, expected):
    for name in existing:
        (tmp_path / name).mkdir()
        if not name.startswith("folder"):
            (tmp_path / name / "manifest.json").touch()
    for name in ("manifest.json", "result.json"):
        (tmp_path / run / name).touch()
    with pytest.raises(UserError, match="contains a finished run") as caught:
        RunDir(tmp_path / run).check_available(resume=False)
    assert caught.value.remedy == f"set another folder: output_dir={tmp_path / expected}"


@pytest.mark.parametrize("resume", [False, True])
def test_foreign_paths_are_rejected(tmp_path, resume):
    folder, link, loop = (tmp_path / name for name in ("folder", "link", "loop"))
    folder.mkdir()
    (folder / "thesis.tex").touch()
    (folder / "recipe.yaml").touch()
    link.symlink_to(tmp_path / "nowhere")
    loop.symlink_to(loop)
    for path, words in (
        (folder, r"contains recipe\.yaml, thesis\.tex, but no run"),
        (folder / "thesis.tex", "is a file"),
        (link, "a broken link"),
        (loop, "a broken link"),
        (tmp_path / ("long" * 100), r"file name too long[\s\S]*shorter output"),
    ):
        with pytest.raises(UserError, match=words):
            RunDir(path).check_available(resume)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    for step in range(5):
        if step % 2 == 0:
            run.append_metrics({"step": step, "validation_loss": 1.0})
        run.append_metrics({"step": step + 1, "loss": 0.5})
    return run


def test_metrics_after_checkpoint_are_removed(run):
    expected = [(0, False), (1, True), (2, True), (2, False), (3, True)]
    # The second call also removes the evaluation of step 2.
    for step, last_eval_step, count in ((3, 2, 5), (2, 0, 3)):
        run.truncate_metrics(step, last_eval_step)
        lines = [(line["step"], "loss" in line) for line in run.iter_metrics()]
        assert lines == expected[:count]


@pytest.mark.parametrize("truncated", ['{"step": 6, "lo', '{"step": 6}', "7\n", "\x00\x00"])
def test_truncated_last_line_is_removed(run, truncated):
    with run.metrics_path.open("a") as file:
        file.write(truncated)
    assert len([*run.iter_metrics()]) == 8
    run.truncate_metrics(step=100, last_eval_step=100)
    run.append_metrics({"step": 6, "loss": 0.1})
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4, 5, 6]
