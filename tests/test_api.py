"""The Python API, and the page about it, every block of which is run."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from docs_blocks import DOCS, blocks
from PIL import Image
from small_run import make_task

from finesight import api
from finesight.api import UserError
from finesight.model.tiny import make_tiny
from finesight.recipe import dump_recipe, load_recipe, recipe_of

PAGE = blocks(DOCS / "en" / "api.md")
BLOCKS = [block.text for block in PAGE if block.language == "python"]
PRINTED = [block.text for block in PAGE if block.language == "text"]
LINES_OF_A_BLOCK = 10


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names that the page's blocks leave behind, run in their order, and the folder."""
    work = tmp_path_factory.mktemp("page")
    for block in PAGE:
        if block.caption is not None:
            (work / block.caption).write_text(block.text, encoding="utf-8")
    left: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        for number, block in enumerate(BLOCKS):
            exec(compile(block, f"block {number}", "exec"), left)
    return work, left


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A tiny model, pictures and data: a recipe's settings but for the output."""
    return make_task(tmp_path_factory.mktemp("task") / "task")


@pytest.fixture(scope="module")
def model(task):
    return api.load(task["model"], device="cpu")


@pytest.fixture
def picture(task):
    return next(Path(task["model"]).parent.glob("train*.png"))


def test_the_page_finds_its_circle(page, monkeypatch):
    work, left = page
    monkeypatch.chdir(work)
    (box,) = left["answer"].boxes
    assert box.label == "red circle"
    assert np.abs(np.array(box.xyxy) - (30, 40, 91, 101)).max() < 1
    drawn = api.draw(left["answer"])
    assert drawn.size == left["picture"].size
    assert drawn.getpixel((60, 40)) != left["picture"].getpixel((60, 40))


def test_the_page_trains_and_measures(page):
    work, left = page
    assert json.loads((work / "runs" / "mine" / "result.json").read_text())["samples"] == 24
    assert left["result"].steps == 2
    assert left["scores"].headline == "f1"
    assert len(left["scores"].predictions) == len(left["base"].predictions) == 8
    assert set(left["scores"].intervals) == set(left["scores"].scores)


def test_the_page_shows_what_is_printed(page, monkeypatch):
    work, left = page
    boxes = [f"{box.label} {[*map(round, box.xyxy)]}" for box in left["answer"].boxes]
    assert PRINTED[0].splitlines() == [left["answer"].text, *boxes]
    for line in PRINTED[1].splitlines()[:-1]:
        assert line == "..." or line in str(left["encoded"]).splitlines(), line
    monkeypatch.chdir(work)
    with pytest.raises(UserError) as caught:
        api.train("recipe.yaml", {"train.stesp": 10})
    assert PRINTED[2] == f"{caught.value.where}: {caught.value.remedy}\n"


def test_every_block_is_short():
    assert len(BLOCKS) >= 10
    for block in BLOCKS:
        assert len(block.splitlines()) < LINES_OF_A_BLOCK, block


def test_the_page_uses_all_that_there_is():
    used = "".join(BLOCKS)
    methods = [name for name, _ in inspect.getmembers(api.Model, inspect.isfunction)]
    public = [*api.__all__, *(name for name in methods if not name.startswith("_"))]
    unused = {name for name in public if not re.search(rf"\b{name}\b", used)}
    # A run is not interrupted on the page; the classes are what `load` and `encode` give.
    assert unused == {"Interrupted", "Model", "Encoding"}


@pytest.mark.parametrize("module", ["finesight", "finesight.api"])
def test_importing_loads_nothing_heavy(module):
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert module in done.stdout.split()
    assert not loaded & {"torch", "numpy", "PIL", "pydantic", "huggingface_hub", "rich"}


def test_everything_public_is_annotated_and_described():
    for name in api.__all__:
        member = getattr(api, name)
        assert inspect.getdoc(member), name
        if inspect.isfunction(member):
            kinds = inspect.signature(member)
            told = [kinds.return_annotation, *(p.annotation for p in kinds.parameters.values())]
            assert inspect.Signature.empty not in told, name


def test_answers_are_the_same_alone_and_together(model, picture):
    alone = model.generate(picture, "Which colour?", max_new_tokens=8)
    asked = [api.question([], "Hello"), api.question(picture, "Which colour?")]
    together = model.generate_all(asked, max_new_tokens=8)
    assert together[1] == alone
    assert together[0].images == ()
    assert alone.text == alone.answer
    assert "".join(model.stream(picture, "Which colour?", max_new_tokens=8)) == alone.text


def test_a_stream_can_be_left(model, picture):
    pieces = model.stream(picture, "Which colour?", max_new_tokens=64, temperature=5.0, seed=1)
    next(pieces)
    pieces.close()
    assert list(pieces) == []


def test_several_pictures_are_one_question(model, picture):
    both = model.generate([str(picture), picture], "Are they the same?", max_new_tokens=4)
    assert both.images == (picture, picture)


def test_labels_are_the_learned_ids(model, task):
    (sample,) = api.read(task["data"]["train"], limit=1)
    encoded = model.encode(sample)
    assert encoded.learned.any()
    assert (encoded.labels[encoded.learned] == encoded.ids[encoded.learned]).all()
    assert (encoded.labels[~encoded.learned] == api.UNLEARNED).all()
    assert encoded.positions.shape == (3, len(encoded.ids))
    (span,) = encoded.pictures
    assert np.prod(span.grid) == len(encoded.patches)
    starred = [line for line in str(encoded).splitlines() if re.search(r"^ +\d+ +\d+ \* ", line)]
    assert len(starred) == encoded.learned.sum()


def test_encode_gives_the_prompt_of_the_last_answer(model, task):
    (sample,) = api.read(task["data"]["train"], limit=1)
    whole, prompt = model.encode(sample), model.encode(sample, add_generation_prompt=True)
    assert not prompt.learned.any()
    assert prompt.ids.tolist() == whole.ids[: whole.learned.argmax()].tolist()
    assert (prompt.positions == whole.positions[:, : len(prompt.ids)]).all()


def test_read_takes_several_files_and_questions(task, tmp_path):
    data = task["data"]
    assert len(api.read(data["train"], Path(data["eval"]), limit=2)) == 4
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"id": "1", "messages": [{"role": "user", "content": "Hello"}]}\n')
    with pytest.raises(UserError, match="no answer at the end"):
        api.read(asked)
    assert len(api.read(asked, answered=False)) == 1


@pytest.mark.parametrize(
    ("call", "where"),
    [
        (lambda model, picture: model.generate(picture, "Hi", max_new_tokens=0), "max_new_tokens"),
        (lambda model, _: model.generate_all([], batch=0), "batch"),
        (lambda model, _: model.generate("missing.png", "Hi"), "missing.png"),
        (lambda model, _: next(model.stream("missing.png", "Hi")), "missing.png"),
        (lambda model, _: api.draw(model.generate([], "Hi", max_new_tokens=1)), "draw"),
        (lambda *_: api.read("missing.jsonl"), "missing.jsonl"),
        (lambda *_: api.read("missing.jsonl", limit=0), "limit"),
        (lambda *_: api.load("./missing"), "model"),
        (lambda *_: api.evaluate("./missing", limit=-1), "limit"),
        (lambda *_: api.evaluate("./missing", "missing.jsonl"), "metric"),
        (lambda *_: api.evaluate("./missing", metric="qa"), "data"),
        (lambda *_: api.load("finesight-tiny", device="cuda:1"), "device"),
        (lambda *_: api.load("finesight-tiny", precision="bfloat16"), "precision"),
        (lambda *_: api.load("finesight-tiny", weights="int3"), "weights"),
        (lambda *_: api.train("missing.yaml"), "missing.yaml"),
        (lambda *_: api.train({"model": "m"}), "recipe"),
        (lambda *_: api.import_data("missing.csv", "out"), "missing.csv"),
        (lambda *_: api.import_data("missing.csv", "out", limit=0), "limit"),
        (lambda *_: api.import_data("missing.csv", "out", eval_last=0), "eval_last"),
        (lambda *_: api.check_data("missing.jsonl"), "missing.jsonl"),
    ],
)
def test_mistakes_are_told(model, picture, tmp_path, monkeypatch, call, where):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        call(model, picture)
    assert where in caught.value.where
    assert caught.value.remedy or "settings are wrong" in caught.value.what
    assert list(tmp_path.iterdir()) == []


def test_errors_name_no_option_of_a_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = [
        lambda: api.evaluate("./missing", "missing.jsonl"),
        lambda: api.evaluate("./missing", metric="qa"),
        lambda: api.import_data("missing.csv", "out", split=2),
        lambda: api.import_data("missing.csv", "out", split=0.5, eval_last=2),
    ]
    for call in calls:
        with pytest.raises(UserError) as caught:
            call()
        assert "--" not in str(caught.value)


@pytest.mark.parametrize(
    "picture",
    [
        Image.new("RGB", (40, 40)),
        [Image.new("RGB", (40, 40))],
        np.zeros((40, 40, 3), np.uint8),
        b"\x89PNG",
        None,
        3,
    ],
    ids=lambda picture: type(picture).__name__,
)
def test_pictures_in_memory_are_to_be_saved(model, picture):
    with pytest.raises(UserError, match="in place of a file's name") as caught:
        model.generate(picture, "Hi")
    assert "image.save(" in caught.value.remedy


def test_lists_in_place_of_a_name_are_told(model):
    for call in (api.read, api.load, lambda names: api.evaluate(model, names, "qa")):
        with pytest.raises(UserError, match="a list in place"):
            call(["a.jsonl"])


def test_a_cell_of_a_notebook_shows_a_line_and_a_table(model, picture):
    assert repr(model) == f"Model(name={model.name!r})"
    encoded = model.encode(api.question(picture, "Hi"))
    assert repr(encoded) == str(encoded)
    assert "token" in str(encoded).splitlines()[1]


def test_one_model_answers_in_several_threads(model, task):
    pictures = sorted(Path(task["model"]).parent.glob("train*.png"))[:3]

    def answer(one):
        return model.generate(one, "Which colour?", max_new_tokens=8)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(answer, pictures)) == [answer(one) for one in pictures]


def test_a_run_trains_in_a_loop_that_runs_and_beside_it(task, tmp_path):
    """As in a notebook, whose kernel is such a loop, and in a thread, which gets no signals."""
    recipe = recipe_of(task | {"output": str(tmp_path / "run")}, {"train.epochs": 1})

    async def both():
        inside = api.train(recipe)
        return inside, await asyncio.to_thread(api.train, recipe, {"output": tmp_path / "other"})

    first, second = asyncio.run(both())
    assert first.after.held_out_loss == second.after.held_out_loss


def test_a_recipe_is_the_same_as_file_settings_and_object(task, tmp_path):
    settings = task | {"output": str(tmp_path / "run")}
    before = json.dumps(settings)
    made = recipe_of(settings, {"train.batch": 2, "data.train": [task["data"]["eval"]]})
    assert json.dumps(settings) == before
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe_of(settings)))
    typed = ["train.batch=2", f"data.train=[{task['data']['eval']}]"]
    assert made == load_recipe(file, typed)
    assert made == load_recipe(file, {"train.batch": 2, "data.train": [task["data"]["eval"]]})


def test_settings_that_a_program_got_wrong_are_all_named():
    with pytest.raises(UserError) as caught:
        recipe_of({"modle": "m", "data": {"train": 3}, "output": "o"}, {"train.stesp": 3})
    told = str(caught.value)
    assert "recipe: modle: unknown setting" in told
    assert "override train.stesp=3: train.stesp: unknown setting" in told
    assert "did you mean train.steps?" in told


def test_a_run_goes_on_and_gives_its_result_to_every_process(task, tmp_path, monkeypatch):
    settings = task | {"output": tmp_path / "run"}
    recipe = recipe_of(settings, {"train.epochs": 1})
    result = api.train(recipe)
    with pytest.raises(UserError, match="run"):
        api.train(recipe)
    assert api.train(recipe, resume=True) == result
    # What a process that follows another one comes back with.
    monkeypatch.setattr("finesight.train.loop.train", lambda *_, **__: None)
    assert api.train(recipe, resume=True) == result
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(UserError, match="no result"):
        api.train(recipe, resume=True)


def test_a_loaded_model_is_measured_as_the_named_one(model, task, tmp_path):
    data = task["data"]["eval"]
    out = tmp_path / "answers.jsonl"
    loaded = api.evaluate(model, data, "captions", max_new_tokens=4, out=out)
    assert api.evaluate(Path(task["model"]), data, "captions", max_new_tokens=4) == loaded
    assert len(out.read_text().splitlines()) == len(loaded.predictions)


def test_another_model_folder_is_another_model(tmp_path):
    folder = make_tiny(tmp_path / "other")
    assert api.load(folder).name == str(folder)
