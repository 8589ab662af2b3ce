"""Run the examples with smaller sizes."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from module_loader import load_module
from PIL import Image
from tiny_model import create_tiny_model

from finesight.errors import UserError
from finesight.evaluate.regression_guard import BUILT_IN_SUITE
from finesight.ingest.init_operation import PROMPT, QuickstartSettings, write_recipe
from finesight.settings.recipe import load_recipe, recipe_from_dict

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SIZES = "NUM_TICKETS, NUM_EVAL_ROWS, NUM_STEPS"
NOTEBOOK = load_module("tools/make_notebook.py")


def with_small_settings(source: str, smaller: dict[str, str]) -> str:
    """Replace lines of the source, each of which occurs once."""
    for line, other in smaller.items():
        assert source.count(f"{line}\n") == 1, f"the example has not one line {line!r}"
        source = source.replace(f"{line}\n", f"{other}\n")
    return source


@pytest.fixture(scope="module")
def example_run(tmp_path_factory):
    """Run the example with small sizes; return its folder and global names."""
    work = tmp_path_factory.mktemp("examples")
    model = create_tiny_model(work / "tiny")
    source = (EXAMPLES / "tickets.py").read_text(encoding="utf-8")
    plan = QuickstartSettings()
    smaller = {
        f"{SIZES} = {plan.num_images}, {plan.num_eval_rows}, {plan.steps}": f"{SIZES} = 20, 4, 2",
        'MODEL = "finesight-tiny"': f"MODEL = {str(model)!r}",
    }
    source = with_small_settings(source, smaller)
    left: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        exec(compile(source, "tickets.py", "exec"), left)
    return work, left


def test_example_trains_evaluates_and_predicts(example_run):
    work, left = example_run
    run = work / "tickets-example" / "run"
    assert json.loads((run / "result.json").read_text())["steps"] == 2
    assert left["result"].before.primary_metric == "f1"
    assert (run / "report.html").is_file()
    assert left["check"].issue_counts == {}
    names = [answer.images[0].name for answer in left["answers"]]
    assert names == [f"{number:04}.png" for number in range(3)]


def test_example_settings_match_quickstart(example_run, tmp_path):
    """Example and quickstart use the same settings."""
    _, left = example_run
    assert left["PROMPT"] == PROMPT
    theirs = load_recipe(write_recipe(tmp_path / "quick", QuickstartSettings()), ["train.steps=2"])
    mine = recipe_from_dict(left["recipe"])
    # A script without a guard must not start processes that would run it again.
    train = mine.train.model_copy(update={"num_workers": None})
    assert (mine.tune, train, mine.eval) == (theirs.tune, theirs.train, theirs.eval)


def test_notebook_is_valid_and_matches_its_script():
    """Check the requirements of nbformat 4.5."""
    script = NOTEBOOK.SCRIPT_PATH.read_text(encoding="utf-8")
    text = NOTEBOOK.NOTEBOOK_PATH.read_text(encoding="utf-8")
    assert text == NOTEBOOK.to_notebook(script), "run: python tools/make_notebook.py"
    notebook = json.loads(text)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | code


def test_notebook_runs_repeatedly(tmp_path, monkeypatch, capsys):
    """Run all cells on a CPU with small sizes, and again as after a restart."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(NOTEBOOK.NOTEBOOK_PATH.read_text(encoding="utf-8"))
    code = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    installation, *cells = code
    assert installation.startswith("%pip ")
    model = create_tiny_model(tmp_path / "tiny", "qwen3_5")
    smaller = {
        f"{SIZES} = 660, 60, 75": f"{SIZES} = 20, 4, 2",
        'MODEL = "Qwen/Qwen3.5-2B"': f"MODEL = {str(model)!r}",
    }
    first = with_small_settings(f"{cells[0]}\n", smaller)
    results = []
    for _ in range(2):
        left: dict[str, object] = {}
        for number, cell in enumerate([first, *cells[1:]]):
            exec(compile(cell, f"cell {number}", "exec"), left)
        results.append(left["result"])
        assert len(left["answers"]) == 3
    assert results[0] == results[1]
    assert results[0].steps == 2
    assert (tmp_path / "tickets-on-a-gpu" / "adapter.zip").stat().st_size > 1000
    output = capsys.readouterr().out
    assert "s per step" in output
    assert "validation_loss" in output


@pytest.mark.parametrize("name", ["training_loop", "grpo_loop"])
def test_loops_learn(name, tmp_path):
    """Run the complete examples of training loops, whose answers become correct."""
    script = EXAMPLES / f"{name}.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 150
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    before, after = map(float, re.findall(r"^accuracy \w+: ([\d.]+)$", done.stdout, re.MULTILINE))
    assert before < 0.8
    assert after >= 0.9
    assert (tmp_path / "dots-adapter" / "adapter_config.json").exists() == (name == "training_loop")


@pytest.fixture
def lmms_eval_plugin(monkeypatch):
    """The plug-in, with the three classes of lmms-eval that it uses."""
    results = {"GenerationResult": namedtuple("GenerationResult", "text token_counts")}
    counts = {"TokenCounts": lambda output_tokens: output_tokens}
    manifest = {"ModelManifest": namedtuple("ModelManifest", "model_id chat_class_path")}
    modules = {"api.instance": results | counts, "api.model": {"lmms": object}}
    for name, content in (modules | {"models.registry_v2": manifest}).items():
        monkeypatch.setitem(sys.modules, f"lmms_eval.{name}", SimpleNamespace(**content))
    return load_module("examples/lmms_eval/finesight_lmms_eval.py")


def make_request(question: dict[str, Any], document: int, **options: Any) -> SimpleNamespace:
    """Return a request of lmms-eval about the image in a document."""

    def to_messages(image: Any) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "image", "url": image}, question]}]

    return SimpleNamespace(args=("", to_messages, options, document, "task", "test"))


def test_lmms_eval_plugin_answers_like_the_api(lmms_eval_plugin):
    project = tomllib.loads((EXAMPLES / "lmms_eval" / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["lmms_eval.models"]["finesight"].split(":")
    manifest = vars(lmms_eval_plugin)[name]
    assert manifest.chat_class_path == f"{module}.FinesightModel"
    model = lmms_eval_plugin.FinesightModel("finesight-tiny", "2", device="cpu")
    words = BUILT_IN_SUITE.parent / "reading-00.png"
    shapes = BUILT_IN_SUITE.parent / "counting-00.png"
    model.task_dict = {"task": {"test": [Image.open(words), str(shapes)]}}
    read = {"type": "text", "text": "Read the text."}
    requests = [make_request(read, 0), make_request(read, 1, max_new_tokens=1)]
    requests.append(make_request(read, 0, max_new_tokens=1, temperature=0.0, do_sample=False))
    long, other, short = model.generate_until(requests)
    assert long.text == model.finesight_model.generate(words, "Read the text.").text
    assert (
        other.text
        == model.finesight_model.generate(shapes, "Read the text.", max_new_tokens=1).text
    )
    assert long.text.startswith(short.text)
    assert (other.token_counts, short.token_counts) == (1, 1)
    with pytest.raises(UserError, match=r"temperature 0\.5"):
        model.generate_until([make_request(read, 0, temperature=0.5)])
    with pytest.raises(UserError, match="a part of the type audio"):
        model.generate_until([make_request({"type": "audio", "url": "a.wav"}, 0)])


def test_lmms_eval_backends_answer_equally(tmp_path):
    """The plug-in and `async_openai` with a server, in the real package."""
    if importlib.util.find_spec("lmms_eval") is None:
        pytest.skip("needs lmms-eval, in an environment of its own: see docs/en/metrics.md")
    site = tmp_path / "site"
    build = ["install", "-q", "--no-deps", "--no-build-isolation", "--target", str(site)]
    source = shutil.copytree(EXAMPLES / "lmms_eval", tmp_path / "source")
    subprocess.run([sys.executable, "-m", "pip", *build, str(source)], check=True)
    script = EXAMPLES.parent / "benchmarks" / "lmms_eval_backends.py"
    words = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json"), "--limit", "6"]
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    subprocess.run([sys.executable, str(script), *words], check=True, env=environment)
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["num_equal_answers"] == report["num_samples"] == 6
    assert report["finesight"]["scores"] == report["async_openai"]["scores"]
    assert report["finesight"]["scores"]["reading"] > 0.5
