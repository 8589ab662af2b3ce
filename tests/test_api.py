"""The Python API, and the page about it, every block of which is run."""

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from case_files import load_cases
from docs_code_blocks import DOCS, list_code_blocks
from tiny_task import make_task
from video_fixtures import write_video

from finesight import api
from finesight.api import UserError
from finesight.operations import training
from finesight.settings.recipe import dump_recipe, load_recipe, recipe_from_dict

PAGE = list_code_blocks(DOCS / "en" / "api.md")
BLOCKS = [block.text for block in PAGE if block.language == "python"]
PRINTED = [block.text for block in PAGE if block.language == "text"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Run the blocks of the page in order; return their folder and the names they define."""
    work = tmp_path_factory.mktemp("page")
    for block in PAGE:
        if block.caption is not None:
            (work / block.caption).write_text(block.text, encoding="utf-8")
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        for number, block in enumerate(BLOCKS):
            exec(compile(block, f"block {number}", "exec"), names)
    return work, names


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Make a tiny model, images and data, as settings without an output directory."""
    return make_task(tmp_path_factory.mktemp("task") / "task")


@pytest.fixture(scope="module")
def model(task):
    return api.load_model(task["model"], device="cpu")


@pytest.fixture
def image_path(task):
    return next(Path(task["model"]).parent.glob("train*.png"))


def test_documentation_page_detects_the_circle(page, monkeypatch):
    work, names = page
    monkeypatch.chdir(work)
    (box,) = names["answer"].boxes
    assert box.label == "red circle"
    assert np.abs(np.array(box.xyxy) - (30, 40, 91, 101)).max() < 1
    drawn = api.draw_boxes(names["answer"])
    assert drawn.size == names["image"].size
    assert drawn.getpixel((60, 40)) != names["image"].getpixel((60, 40))


def test_documentation_page_trains_and_evaluates(page):
    work, names = page
    assert json.loads((work / "runs" / "mine" / "result.json").read_text())["samples"] == 24
    assert names["result"].steps == 2
    assert names["scores"].primary_metric == "f1"
    assert len(names["scores"].predictions) == len(names["base"].predictions) == 8
    assert set(names["scores"].intervals) == set(names["scores"].scores)


def test_documentation_page_output_is_correct(page, monkeypatch):
    work, names = page
    boxes = [f"{box.label} {[*map(round, box.xyxy)]}" for box in names["answer"].boxes]
    assert PRINTED[0].splitlines() == [names["answer"].text, *boxes]
    for line in PRINTED[1].splitlines()[:-1]:
        assert line == "..." or line in str(names["encoded"]).splitlines(), line
    monkeypatch.chdir(work)
    with pytest.raises(UserError) as caught:
        api.train("recipe.yaml", {"train.stesp": 10})
    assert PRINTED[-1] == f"{caught.value.where}: {caught.value.remedy}\n"


BASE = {"torch", "numpy", "PIL", "pydantic", "huggingface_hub", "rich"}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("finesight", BASE),
        ("finesight.api", BASE),
        # Without a scan of the installed packages for plug-ins.
        ("finesight.cli.app", BASE | {"importlib.metadata"}),
        ("finesight.app.studio_page", {"torch", "transformers", "huggingface_hub"}),
        ("finesight.settings.recipe_template", {"torch", "transformers", "starlette"}),
    ],
)
def test_import_loads_no_heavy_packages(module, heavy):
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {*done.stdout.split()}
    assert module in loaded
    assert not loaded & heavy


def test_batched_and_streamed_answers_match_single_answers(model, image_path):
    alone = model.generate(image_path, "Which colour?", max_new_tokens=8)
    requested = [api.build_question([], "Hello"), api.build_question(image_path, "Which colour?")]
    batched = model.generate_batch(requested, max_new_tokens=8)
    assert batched[1] == alone
    assert batched[0].images == ()
    assert "".join(model.stream(image_path, "Which colour?", max_new_tokens=8)) == alone.text
    both = model.generate([str(image_path), image_path], "Are they the same?", max_new_tokens=4)
    assert both.images == (image_path, image_path)


def test_stream_can_be_closed_early(model, image_path):
    pieces = model.stream(image_path, "Which colour?", max_new_tokens=64, temperature=5.0, seed=1)
    next(pieces)
    pieces.close()
    assert list(pieces) == []


def test_video_file_is_a_question(model, tmp_path):
    clip = write_video(tmp_path / "clip.mp4")
    answer = model.generate(clip, "What moves?", max_new_tokens=4)
    assert (answer.id, answer.images) == (str(clip), ())
    assert "".join(model.stream(clip, "What moves?", max_new_tokens=4)) == answer.text
    question = api.build_question(clip, "What moves?")
    spans = model.encode(question, add_generation_prompt=True).visual_spans
    assert [(span.kind, span.frame_indices) for span in spans] == [("video", (0, 4, 8, 12))]
    with pytest.raises(UserError, match="no such video"):
        api.build_question(tmp_path / "gone.mp4", "What moves?")


def test_labels_are_the_supervised_ids(model, task):
    (sample,) = api.read_samples(task["data"]["train"], limit=1)
    encoded, prompt = model.encode(sample), model.encode(sample, add_generation_prompt=True)
    assert encoded.loss_mask.any()
    assert (encoded.labels[encoded.loss_mask] == encoded.input_ids[encoded.loss_mask]).all()
    assert (encoded.labels[~encoded.loss_mask] == api.IGNORE_INDEX).all()
    assert encoded.position_ids.shape == (3, len(encoded.input_ids))
    (span,) = encoded.visual_spans
    assert np.prod(span.grid_thw) == len(encoded.patches)
    starred = [line for line in str(encoded).splitlines() if re.search(r"^ +\d+ +\d+ \* ", line)]
    assert len(starred) == encoded.loss_mask.sum()
    assert not prompt.loss_mask.any()
    assert prompt.input_ids.tolist() == encoded.input_ids[: encoded.loss_mask.argmax()].tolist()
    assert (prompt.position_ids == encoded.position_ids[:, : len(prompt.input_ids)]).all()
    assert repr(encoded) == str(encoded), "notebooks show the table"
    assert repr(model) == f"Model(name={model.name!r})"


def test_skipped_images_are_named(model, image_path, tmp_path, capsys):
    (tmp_path / "empty.png").touch()
    [found] = api.predict(
        model, [image_path, tmp_path / "empty.png"], prompt="What?", max_new_tokens=2
    )
    assert found.images == (image_path,)
    assert f"skipped: {tmp_path / 'empty.png'}: an empty file" in capsys.readouterr().err


def test_read_samples_accepts_files_and_questions(task, tmp_path):
    data = task["data"]
    assert len(api.read_samples(data["train"], Path(data["eval"]), limit=2)) == 4
    requested = tmp_path / "asked.jsonl"
    requested.write_text('{"id": "1", "messages": [{"role": "user", "content": "Hello"}]}\n')
    with pytest.raises(UserError, match="no answer at the end"):
        api.read_samples(requested)
    assert len(api.read_samples(requested, require_answer=False)) == 1


INVALID_CALLS = [
    (lambda model: model.generate([], "Hi", max_new_tokens=0), "max_new_tokens"),
    (lambda model: model.generate_batch([], batch_size=0), "batch_size"),
    (lambda model: model.generate("missing.png", "Hi"), "missing.png"),
    (lambda model: next(model.stream("missing.png", "Hi")), "missing.png"),
    (lambda model: api.draw_boxes(model.generate([], "Hi", max_new_tokens=1)), "draw"),
]
for name, arguments, options, where in load_cases("api")["test_invalid_calls"]:
    INVALID_CALLS.append((lambda _, c=(name, arguments, options): call_api(*c), where))


def call_api(name, arguments, options):
    return getattr(api, name)(*arguments, **options)


@pytest.mark.parametrize(("call", "where"), INVALID_CALLS)
def test_invalid_calls_are_reported(model, tmp_path, monkeypatch, call, where):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        call(model)
    assert where in caught.value.where
    assert caught.value.remedy or "settings are wrong" in caught.value.what
    assert "--" not in str(caught.value), "options of a command"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("image", [None, 3, b"text", [["a.png"]]])
def test_objects_that_are_no_image_are_rejected(model, image):
    with pytest.raises(UserError, match=r"instead of an image|no image format"):
        model.generate(image, "Hi")
    for call in (api.read_samples, api.load_model, lambda names: api.evaluate(model, names, "qa")):
        with pytest.raises(UserError, match="a list instead"):
            call(["a.jsonl"])


def test_training_works_inside_an_event_loop(task, tmp_path):
    """As in a notebook, whose kernel is such a loop, and in a thread, which gets no signals."""
    recipe = recipe_from_dict(task | {"output_dir": str(tmp_path / "run")}, {"train.epochs": 1})
    other = {"output_dir": tmp_path / "other"}

    async def train_twice():
        return api.train(recipe), await asyncio.to_thread(api.train, recipe, other)

    first, second = asyncio.run(train_twice())
    assert first.after.validation_loss == second.after.validation_loss


def test_recipe_from_file_dict_and_object_are_equal(task, tmp_path):
    settings = task | {"output_dir": str(tmp_path / "run")}
    before = json.dumps(settings)
    overrides = {"train.batch_size": 2, "data.train": [task["data"]["eval"]]}
    made = recipe_from_dict(settings, overrides)
    assert json.dumps(settings) == before
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe_from_dict(settings)))
    typed = ["train.batch_size=2", f"data.train=[{task['data']['eval']}]"]
    assert made == load_recipe(file, typed) == load_recipe(file, overrides)


def test_resumed_run_returns_the_same_result(task, tmp_path, monkeypatch):
    recipe = recipe_from_dict(task | {"output_dir": tmp_path / "run"}, {"train.epochs": 1})
    result = api.train(recipe)
    with pytest.raises(UserError, match="run"):
        api.train(recipe)
    assert api.train(recipe, resume=True) == result
    # The result of a rank other than 0.
    monkeypatch.setattr("finesight.train.training_run.train", lambda *_, **__: None)
    outcome = training.train(recipe, resume=True)
    assert (outcome.value, outcome.data) == (result, []), "rank 0 alone prints the result"
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(UserError, match="no result"):
        api.train(recipe, resume=True)


def test_loaded_model_evaluates_like_its_name(model, task, tmp_path):
    data, out = task["data"]["eval"], tmp_path / "answers.jsonl"
    loaded = api.evaluate(model, data, "captions", max_new_tokens=4, out=out)
    assert api.evaluate(Path(task["model"]), data, "captions", max_new_tokens=4) == loaded
    assert len(out.read_text().splitlines()) == len(loaded.predictions)
