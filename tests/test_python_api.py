"""Training and evaluation from Python without files: the public names of `finesight`."""

import inspect
import io
import json
import pickle
import pydoc
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from case_files import CASES_FOLDER, load_cases
from PIL import Image
from tiny_task import assert_same_run, read_final_files, read_losses

import finesight
from finesight import api
from finesight.cli.app import run_command
from finesight.errors import Step
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.python_functions import hash_functions, name_function, use_functions
from finesight.model_folder import TINY_MODEL, resolve_model_path
from finesight.operations import python_training
from finesight.operations.python_training import translate_remedies, write_samples
from finesight.samples.memory_samples import (
    ImageStore,
    convert_samples,
    locate_samples,
    open_session_store,
    write_sample_file,
)
from finesight.samples.sample import BoxPart, ImagePart, VideoPart
from finesight.train.run_dir import RunDir

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}

SETTINGS: dict[str, Any] = {
    "batch_size": 3,
    "learning_rate": 1e-3,
    "num_workers": 0,
    "device": "cpu",
    "tune": {"language": "lora"},
}
EVAL = {"max_new_tokens": 4}


def draw(color: str, number: int = 0) -> np.ndarray:
    pixels = np.full((56, 56, 3), COLORS[color], np.uint8)
    pixels[0, 0] = number
    return pixels


def make_samples(count: int = 9, **changes: Any) -> list[finesight.Sample]:
    """Make questions about images in memory, as arrays and as PIL images."""
    samples = []
    for number in range(count):
        color = [*COLORS][number % 3]
        image: Any = draw(color, number)
        if number % 2:
            image = Image.fromarray(image)
        answers = {"answer": color} | changes
        samples.append(finesight.Sample(image=image, question="Which colour?", **answers))
    return samples


def count_letters(case: EvalCase) -> dict[str, float]:
    """Score the letters of an answer that are also in the reference."""
    return {"letters": len({*case.answer} & {*case.references[0]}) / 5, "length": len(case.answer)}


def train(output_dir: Path, samples: Any = None, **settings: Any) -> Any:
    given = make_samples() if samples is None else samples
    return finesight.train(TINY_MODEL, given, output_dir=output_dir, **SETTINGS | settings)


ONE = make_samples(1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train with arrays, a function as metric and a callback that stops after the second step."""
    events: list[tuple[int, dict[str, float]]] = []

    def stop_early(step: int, metrics: Any) -> None:
        events.append((step, dict(metrics)))
        if step == 2 and "loss" in metrics:
            raise finesight.StopTraining("two steps suffice")

    folder = tmp_path_factory.mktemp("trained") / "run"
    callbacks = [stop_early]
    validation = make_samples(3)
    result = train(
        folder,
        val_samples=validation,
        metric=count_letters,
        callbacks=callbacks,
        epochs=3,
        eval=EVAL,
    )
    model = finesight.load(folder, device="cpu")
    return SimpleNamespace(folder=folder, events=events, result=result, model=model)


def test_arrays_train_a_model(trained):
    answer = trained.model.generate(draw("red"), "Which colour?", max_new_tokens=4)
    (file,) = answer.images
    assert (np.asarray(Image.open(file)) == draw("red")).all()
    assert trained.model.generate(file, "Which colour?", max_new_tokens=4).text == answer.text
    both = [Image.open(file), file.read_bytes()]
    first, second = trained.model.generate(both, "Same?", max_new_tokens=2).images
    assert first == file
    assert second.read_bytes() == file.read_bytes()
    base = finesight.load(TINY_MODEL, device="cpu")
    (sample,) = make_samples(1)
    assert (base.encode(sample).input_ids == trained.model.encode(sample).input_ids).all()
    [batched] = trained.model.generate_batch([sample], max_new_tokens=4)
    assert batched.text == answer.text


def test_callback_stops_a_complete_run(trained, capsys):
    assert [step for step, _ in trained.events] == [0, 1, 2, 2]
    before, first, last, after = [metrics for _, metrics in trained.events]
    assert before.keys() == after.keys() >= {"validation_loss", "scores/letters", "scores/length"}
    assert [(1, first["loss"]), (2, last["loss"])] == read_losses(trained.folder)
    assert (trained.result.steps, trained.result.stopped_early) == (2, True)
    assert trained.result.after.validation_loss == after["validation_loss"]
    for name in ("report.html", "adapter", "checkpoints/step-2", "predictions/after.jsonl"):
        assert (trained.folder / name).exists(), name
    # A finished run is not trained again.
    capsys.readouterr()
    again = train(
        trained.folder,
        val_samples=make_samples(3),
        metric=count_letters,
        epochs=4,
        eval=EVAL,
        resume=True,
    )
    assert again == trained.result
    text = " ".join(capsys.readouterr().err.split())
    assert "nothing was trained; changed settings have no effect: train.epochs. To train" in text
    assert "finesight.train(..., output_dir='" in text
    assert "finesight train " not in text


def test_finished_run_is_found_in_any_working_directory(tmp_path, monkeypatch, capsys):
    """The result has an absolute path, and other names of the folder are no other settings."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    settings = {"val_samples": ONE, "metric": "captions", "steps": 1, "eval": EVAL}
    result = train(Path("run"), **settings)
    assert result.run_dir == str(tmp_path / "a" / "run")
    monkeypatch.chdir(tmp_path / "b")
    assert "captions" in result._repr_html_()
    model = finesight.load("../a/run", device="cpu")
    assert model.evaluate(max_new_tokens=2).predictions
    assert train(Path("../a/run"), **settings, resume=True) == result
    shutil.move(tmp_path / "a" / "run", tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    for folder in ("moved", "link"):
        assert train(tmp_path / folder, **settings, resume=True).run_dir == result.run_dir
    assert "have no effect" not in capsys.readouterr().err


def test_other_function_of_the_same_name_is_reported(tmp_path, capsys):
    def build(letter: str) -> Any:
        def score(case: EvalCase) -> float:
            return float(case.answer in {"a", "b"}) + len(letter)

        return score

    def score(case: EvalCase) -> float:
        return float(case.answer in {"a", "c"})

    settings = {"val_samples": ONE, "steps": 1, "eval": EVAL}
    train(tmp_path / "run", metric=build("a"), **settings)
    texts = []
    for metric in (build("b"), score, len):
        settings["metric"] = metric
        train(tmp_path / "run", resume=True, **settings)
        texts.append(" ".join(capsys.readouterr().err.split()))
    is_reported = ["score is another function" in text for text in texts]
    assert is_reported == [False, True, False]
    # A set of texts has another order in each process.
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    with use_functions({"python:score": build("c")}):
        assert hash_functions() == manifest["functions"]
    with use_functions({"python:len": len}):
        assert hash_functions() == {"python:len": ""}


def test_callback_stops_after_an_evaluation(tmp_path):
    def stop_at_first(step: int, metrics: Any) -> None:
        if step and "validation_loss" in metrics:
            raise finesight.StopTraining

    result = train(
        tmp_path / "run",
        val_samples=make_samples(3),
        metric="captions",
        callbacks=[stop_at_first],
        eval={"max_new_tokens": 2, "every": 1},
    )
    assert result.steps == 1
    assert result.after.step == 1
    assert (tmp_path / "run" / "predictions" / "after.jsonl").is_file()


def test_results_have_a_short_repr_and_html(trained):
    text = repr(trained.result)
    assert "\n" not in text
    assert "2 steps, letters" in text
    assert str(trained.result) == text
    page = trained.result._repr_html_()
    assert page.startswith("<iframe srcdoc=")
    assert page.count('"') == 8, "quotes of the page are escaped"
    assert len(page) < 500_000, "without examples"
    scores = trained.model.evaluate(make_samples(3), count_letters, max_new_tokens=4)
    assert repr(scores).startswith("<GenerationEvalResult of 3 samples: letters 0.")
    assert "letters*" in scores._repr_html_()
    assert len(repr(make_samples(1)[0])) < 200


def test_function_is_a_metric(trained, tmp_path, capsys):
    scores = trained.model.evaluate(make_samples(3), count_letters, max_new_tokens=4)
    assert scores.primary_metric == "letters"
    cases = [(one.answer, color) for one, color in zip(scores.predictions, COLORS, strict=True)]
    expected = [len({*answer} & {*color}) / 5 for answer, color in cases]
    assert scores.scores["letters"] == pytest.approx(np.mean(expected))
    recipe = (trained.folder / "recipe.yaml").read_text()
    assert "metric: python:count_letters" in recipe
    with pytest.raises(finesight.UserError, match="function of the Python program") as caught:
        trained.model.evaluate(make_samples(3))
    assert "evaluate(samples, metric=count_letters)" in caught.value.remedy
    assert run_command(["eval", str(trained.folder)]) == 2
    assert "FILE.py:count_letters" in capsys.readouterr().err
    assert run_command(["report", str(trained.folder), "--out", str(tmp_path / "a.html")]) == 0
    assert run_command(["doctor", str(trained.folder)]) in (0, 2)


def fail(*_: Any) -> float:
    raise ValueError("bad luck")


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        (fail, "ValueError: bad luck (for sample "),
        (lambda _: "high", "'high'"),
        (lambda case: {case.id: 1.0}, "the scores"),
    ],
)
def test_failing_metric_is_reported(trained, metric, text):
    with pytest.raises(finesight.UserError) as caught:
        trained.model.evaluate(make_samples(3), metric, max_new_tokens=2)
    assert text in caught.value.what
    assert caught.value.where.startswith(__file__)
    assert "pdb" not in caught.value.remedy


def test_run_equals_that_of_files_written_by_hand(tmp_path, monkeypatch):
    """With PNG and JSONL files of the same content, `finesight train` computes the same run."""
    monkeypatch.chdir(tmp_path)
    tune = {"language": "lora", "merger": "full"}
    train(Path("run"), val_samples=make_samples(3), tune=tune, epochs=1, save_every=2)
    recipe = yaml.safe_load(Path("run/recipe.yaml").read_text())
    recipe["data"] |= {"train": write_by_hand("train", 9), "eval": write_by_hand("eval", 3)}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run_command(["train", "recipe.yaml", "output_dir=other"]) == 0
    found = read_final_files(Path("other"))
    expected = read_final_files(Path("run"))
    assert found.keys() == expected.keys()
    assert {"state.json", "sha256.json"} <= {Path(name).name for name in found}
    for name, content in found.items():
        assert content == expected[name], name
    assert read_losses(Path("other")) == read_losses(Path("run"))


def write_by_hand(name: str, count: int) -> str:
    """Write the samples of `make_samples` without the package, in the working directory.

    Ids and names of images are those of the folder `run`.
    """
    lines = []
    Path("images").mkdir(exist_ok=True)
    recorded = map(json.loads, Path(f"run/samples/{name}.jsonl").read_text().splitlines())
    for number, record in zip(range(count), recorded, strict=True):
        color = [*COLORS][number % 3]
        file = record["messages"][0]["content"][0]["image"]
        Image.fromarray(draw(color, number)).save(file)
        question = [{"type": "image", "image": file}, {"type": "text", "text": "Which colour?"}]
        answer = [{"type": "text", "text": color}]
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"id": record["id"], "messages": messages}) + "\n")
    Path(f"{name}.jsonl").write_text("".join(lines))
    return f"{name}.jsonl"


def test_interrupted_run_resumes(tmp_path):
    def fail_once(step: int, metrics: Any) -> None:
        if step == 2:
            fail()

    settings = {"epochs": 1, "save_every": 1, "tune": {"language": "lora", "merger": "full"}}
    run, whole = tmp_path / "run", tmp_path / "whole"
    with pytest.raises(finesight.UserError, match="callback: ValueError: bad luck") as caught:
        train(run, callbacks=[fail_once], **settings)
    assert "checkpoint of step 2 written" in caught.value.what
    assert "resume=True" in caught.value.remedy
    changed = make_samples()
    changed[4] = finesight.Sample(image=draw("red"), question="What?", answer="a square")
    files = sorted(run.rglob("*"))
    for samples, text in ((changed, "sample 4"), (changed[:5], "5 samples instead of 9")):
        with pytest.raises(finesight.UserError, match=text) as caught:
            train(run, samples, resume=True, **settings)
        assert f"output_dir='{run}-2'" in caught.value.remedy
    with pytest.raises(finesight.UserError, match="contains another run") as caught:
        train(run, **settings)
    assert "add resume=True" in caught.value.remedy
    assert sorted(run.rglob("*")) == files
    train(run, resume=True, **settings)
    train(whole, **settings)
    assert_same_run(run, whole)


def test_lambda_is_a_reward(tmp_path):
    grpo = {"num_generations": 2, "max_completion_length": 4, "temperature": 2.0}
    settings = {"objective": "grpo", "grpo": grpo, "steps": 2, "batch_size": 2}
    rewards = [
        lambda case: len(case.answer) / 10,
        {"name": lambda case: None if "z" in case.answer else 1.0, "weight": 2},
    ]
    run = tmp_path / "run"
    train(run, rewards=rewards, **settings)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    last = [line for line in lines if "reward" in line][-1]
    assert {"rewards/lambda", "rewards/lambda_2"} <= {key.rpartition("/mean")[0] for key in last}
    with pytest.raises(finesight.UserError, match="reward fail: ValueError: bad luck"):
        train(tmp_path / "other", rewards=[fail], **settings)


def test_pairs_train_with_dpo(tmp_path):
    pairs = [("Which colour?", color, "no idea") for color in COLORS]
    samples = []
    for question, chosen, rejected in pairs:
        sample = finesight.Sample(
            image=draw(chosen), question=question, answer=chosen, rejected=rejected
        )
        samples.append(sample)
    result = train(tmp_path / "run", samples, objective="dpo", steps=1)
    assert result.steps == 1


def test_plain_model_folder_is_evaluated():
    model = finesight.load(str(resolve_model_path(TINY_MODEL)), device="cpu")
    scores = model.evaluate(make_samples(3), "captions", max_new_tokens=2)
    assert len(scores.predictions) == 3
    with pytest.raises(finesight.UserError, match="not set") as caught:
        model.evaluate(make_samples(3))
    assert caught.value.where == "metric"


def test_adapters_are_saved_and_merged(trained, tmp_path):
    """Two adapters of one base model are loaded side by side."""
    saved = trained.model.save(tmp_path / "saved")
    merge = trained.model.merge(tmp_path / "merged")
    assert repr(merge).startswith(f"<VerifiedMerge '{tmp_path}/merged': ")
    merged = merge.folder
    base = finesight.load(TINY_MODEL, device="cpu")
    questions = make_samples(3)
    texts = []
    for model in (trained.model, finesight.load(saved), base):
        answers = model.generate_batch(questions, max_new_tokens=8)
        texts.append([answer.text for answer in answers])
    assert texts[0] == texts[1] != texts[2]
    assert len(finesight.load(merged).generate_batch(questions, max_new_tokens=2)) == 3
    with pytest.raises(finesight.UserError):
        trained.model.save(tmp_path / "saved")
    assert base.save(tmp_path / "base").joinpath("config.json").is_file()


def test_images_are_written_without_loss(tmp_path):
    store = ImageStore(tmp_path)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 30, 3), np.uint8)
    jpeg = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(jpeg, format="JPEG", exif=exif)
    for image in (pixels, pixels[..., 0], Image.fromarray(pixels).convert("P")):
        file = tmp_path / store.save(image, "image")
        opened = image.convert("RGB") if isinstance(image, Image.Image) else image
        assert (np.asarray(Image.open(file)) == np.asarray(opened)).all()
        assert store.save(image, "image") == store.save(image, "image")
    file = tmp_path / store.save(jpeg.getvalue(), "image")
    assert file.suffix == ".jpg"
    assert file.read_bytes() == jpeg.getvalue()
    rotated = tmp_path / store.save(Image.open(jpeg), "image")
    assert Image.open(rotated).size == (20, 30)
    assert store.save("a.png", "image") == Path.cwd() / "a.png"


def draw_closed() -> Image.Image:
    image = Image.new("RGB", (2, 2))
    image.close()
    return image


def draw_truncated() -> Image.Image:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, format="PNG")
    return Image.open(io.BytesIO(file.getvalue()[:600]))


def nest(depth: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested]
    return nested


INVALID_FIELDS = [
    ({"question": None}, "question is a NoneType"),
    ({"question": b"a"}, "question is a bytes"),
    ({"answer": 0}, "answer is a int"),
    ({"answer": np.zeros(3)}, "answer is a ndarray"),
    ({"references": "crimson"}, "references is a str"),
    ({"references": None}, "references is a NoneType"),
    ({"references": [3]}, r"references\[0\] is a int"),
    ({"meta": None}, "meta is a NoneType"),
    ({"meta": {"a": float("nan")}}, "not JSON compliant"),
    ({"meta": {"a": Path("a")}}, "not JSON serializable"),
    ({"tools": None}, "tools is a NoneType"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\] is a dict"),
    ({"messages": [("user", "a")]}, r"messages\[0\] is a tuple"),
    ({"messages": finesight.Message("user", "a")}, "messages is a Message"),
    ({"answer": "\ud800"}, "half of a character"),
    ({"image": "a.png", "question": "<image> and <image>?"}, "2 <image>|<image>"),
    ({"meta": {"a": nest(5000)}}, "meta or tools"),
]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"question": 3}, "question is a int"),
        ({"image": ["a.png", 3]}, "a int instead of an image"),
        ({"answer": ["a", 3]}, "a int instead of an image"),
        ({"messages": [finesight.Message("user", 3)]}, "a int as the content"),
    ],
)
def test_types_are_checked_before_images_are_written(tmp_path, fields, text):
    samples = [*ONE, finesight.Sample(**fields)]
    with pytest.raises(finesight.UserError, match=text) as caught:
        convert_samples(samples, ImageStore(tmp_path), "samples")
    assert caught.value.where == "samples[1]"
    assert list(tmp_path.iterdir()) == []


def test_pages_of_documents_are_images(trained, tmp_path):
    pages = [Image.fromarray(draw(color)) for color in COLORS]
    file = tmp_path / "multi.tif"
    pages[0].save(file, save_all=True, append_images=pages[1:])
    asked = trained.model.build_question(file, "What?").sample
    message = finesight.Message("user", [file, "What?"])
    samples = [
        finesight.Sample(image=file, question="What?"),
        finesight.Sample(image=str(file), question="What?"),
        finesight.Sample(messages=[message]),
    ]
    for located in locate_samples(samples):
        assert located.sample.messages[-1].content == asked.messages[-1].content
    sample = finesight.Sample(image=file.read_bytes(), question="What?", answer="a")
    (written,) = convert_samples([sample], ImageStore(tmp_path), "samples")
    parts = written.messages[0].content[:3]
    assert [part.image.rpartition("#")[2] for part in parts] == ["page=1", "page=2", "page=3"]
    read_only = ImageStore(tmp_path / "none", is_read_only=True)
    assert convert_samples([sample], read_only, "samples") != [written]


INVALID_QUESTIONS = [
    (lambda model: model.generate_batch(np.zeros((2, 2))), "instead of samples"),
    (lambda model: model.generate_batch(np.array([None])), "instead of samples"),
    (lambda model: model.generate_batch(3), "instead of samples"),
    (lambda model: model.generate([], None), "prompt: a NoneType instead of a text"),
    (lambda model: model.generate([], "\ud800"), "prompt: a text with '\\ud800'"),
    (lambda model: model.generate("https://a/b.png", "x"), "https://a/b.png is a URL"),
    (lambda model: model.save(3), "path: a int instead of a name"),
    (lambda model: model.evaluate(ONE, [fail]), "metric: a list"),
    (lambda model: model.evaluate(ONE, 3), "metric: a int"),
    (lambda _: finesight.load(3), "a int instead of a name"),
    (lambda _: finesight.load(None), "a NoneType instead of a name"),
    (lambda model: api.evaluate(model, "a.jsonl", fail), "a function instead of a name"),
]


@pytest.mark.parametrize(("call", "text"), INVALID_QUESTIONS)
def test_invalid_arguments_of_models_are_reported(trained, call, text):
    with pytest.raises(finesight.UserError) as caught:
        call(trained.model)
    assert text in str(caught.value)
    assert "image.save" not in str(caught.value)


@pytest.mark.parametrize(("fields", "text"), INVALID_FIELDS)
def test_fields_of_samples_are_checked(tmp_path, fields, text):
    samples = [*ONE, finesight.Sample(**{"question": "a", "answer": "b"} | fields)]
    with pytest.raises(finesight.UserError, match=text) as caught:
        convert_samples(samples, ImageStore(tmp_path), "samples")
    assert caught.value.where == "samples[1]"
    with pytest.raises(finesight.UserError, match=text) as caught:
        locate_samples(samples)
    assert caught.value.where == "samples[1]"


def test_ids_of_samples_differ(tmp_path):
    samples = [finesight.Sample(question="a", answer="b", id="mine")] * 2
    with pytest.raises(finesight.UserError, match=r"'mine' of samples\[0\]"):
        convert_samples(samples, ImageStore(tmp_path), "samples")
    assert len(locate_samples(samples)) == 2
    assert locate_samples(()) == []
    digest = convert_samples(ONE, ImageStore(tmp_path), "samples")[0].id
    named = finesight.Sample(question="a", answer="b", id=digest)
    located = api.read_samples(write_file(tmp_path, named))
    for repeated in ([*ONE, named], [*ONE, *located], located * 2):
        with pytest.raises(finesight.UserError, match=rf"'{digest}' of samples\[0\]") as caught:
            convert_samples(repeated, ImageStore(tmp_path), "samples")
        assert "set epochs" in caught.value.remedy
    with pytest.raises(finesight.UserError, match="instead of samples"):
        locate_samples(samples[0])


@pytest.mark.parametrize(("mode", "expected"), [("L", "LA"), ("RGB", "RGBA"), ("1", "LA")])
def test_transparent_colors_are_pixels(tmp_path, mode, expected):
    store = ImageStore(tmp_path)
    image = Image.new(mode, (2, 2))
    opaque = store.save(image, "image")
    image.info["transparency"] = (0, 0, 0) if mode == "RGB" else 0
    transparent = Image.open(tmp_path / store.save(image, "image"))
    assert transparent.mode == expected
    assert set(transparent.getchannel("A").getdata()) == {0}
    assert Image.open(tmp_path / opaque).mode == mode
    image.info = {"dpi": (72, 72)}
    assert store.save(image, "image") == opaque


SESSION_SCRIPT = """
import os, threading
from finesight.samples.memory_samples import open_session_store
folders = []
threads = [threading.Thread(target=lambda: folders.append(open_session_store().folder))
           for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
child = os.fork()
if not child:
    raise SystemExit
os.waitpid(child, 0)
print(len({*folders}), folders[0].is_dir(), folders[0])
"""


def test_images_last_until_the_end_of_the_session():
    command = [sys.executable, "-c", SESSION_SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, exists, folder = done.stdout.split()
    assert (count, exists) == ("1", "True")
    assert not Path(folder).exists()


INVALID_IMAGES = [
    (np.zeros((3, 8, 8), np.uint8), "transpose(1, 2, 0)"),
    (np.zeros((8, 8)), '(image * 255).round().astype("uint8")'),
    (np.zeros((8, 8), np.int64), 'image.clip(0, 255).astype("uint8")'),
    (np.zeros((8, 8), np.uint16), '(image // 256).astype("uint8")'),
    (np.zeros((8, 8), bool), 'image.astype("uint8") * 255'),
    (np.zeros((9, 9, 1), np.uint8), "image[..., 0]"),
    (np.zeros((1, 9, 9), np.uint8), "image[0]"),
    (np.zeros((2, 9, 9, 3), np.uint8), "list(images)"),
    (np.zeros((0, 9, 3), np.uint8), "size"),
    (b"text", "array of shape"),
    (Image.new("CMYK", (2, 2)), 'image.convert("RGB")'),
    (Image.new("I", (2, 2)), "(numpy.asarray(image) // 256)"),
    (Image.new("RGB", (0, 2)), "size"),
    (draw_closed(), "open the file again"),
    (draw_truncated(), "open the file again"),
    ("", "None"),
    ("https://example.org/a.png", "download"),
    (3, "numpy.asarray"),
]


@pytest.mark.parametrize(("image", "remedy"), INVALID_IMAGES)
def test_invalid_images_are_reported(tmp_path, image, remedy):
    with pytest.raises(finesight.UserError) as caught:
        ImageStore(tmp_path).save(image, "samples[2]")
    assert caught.value.where == "samples[2]"
    assert remedy in caught.value.remedy


def test_conversations_and_ids(tmp_path):
    turns = [
        finesight.Message("system", "Be brief."),
        finesight.Message("user", [draw("red"), Path("clip.mp4"), "What?"]),
        finesight.Message("assistant", ["It is ", BoxPart(xyxy=(1, 2, 3, 4))], loss=False),
        finesight.Message("user", "And now?"),
        finesight.Message("assistant", "Nothing."),
    ]
    conversation = finesight.Sample(messages=turns, meta={"source": "test"})
    named = finesight.Sample(question="<image> before text", image=["a.png"], answer="b", id="mine")
    samples = [conversation, conversation, named]
    first, second, third = convert_samples(samples, ImageStore(tmp_path), "samples")
    assert second.id == f"{first.id}-2"
    assert third.id == "mine"
    assert [type(part) for part in first.messages[1].content[:2]] == [ImagePart, VideoPart]
    assert (first.messages[2].loss, first.meta) == (False, {"source": "test"})
    assert third.messages[0].content[1].text == " before text"
    located = api.read_samples(write_file(tmp_path, named))
    (again,) = convert_samples(located, open_session_store(), "samples")
    assert again == third


def write_file(folder: Path, sample: finesight.Sample) -> Path:
    file = folder / "a.jsonl"
    write_sample_file(convert_samples([sample], ImageStore(folder), "samples"), file)
    return file


INVALID_CALLS = [
    ({"samples": None}, "neither samples nor data", "samples=[finesight.Sample"),
    ({"data": {"train": "a.jsonl"}}, "both samples and data", 'data={"train"'),
    ({"samples": []}, "instead of samples", "read_samples(FILE)"),
    ({"samples": "a.jsonl"}, "instead of samples", "read_samples(FILE)"),
    ({"samples": [("What?", "red")]}, "a tuple instead of a sample", "finesight.Sample(image="),
    ({"samples": [finesight.Sample(question="Hi")]}, "no answer at the end", "add the answer"),
    ({"samples": [finesight.Sample(question="Hi", answer=3)]}, "int", "finesight.Message"),
    (
        {"samples": [finesight.Sample(question="Hi", messages=[finesight.Message("user", "Ho")])]},
        "messages beside",
        "finesight.Message(",
    ),
    ({"metric": "captions"}, "a metric without validation samples", "val_samples=samples["),
    ({"metric": "caption", "val_samples": ONE}, "metric: has", "eval.metric: captions?"),
    ({"samples": None, "data": {"train": "train.jsonl"}}, "train.jsonl: ", ""),
    ({"stesp": 3}, "stesp: unknown", "did you mean train.steps?"),
    ({"steps": -1}, "steps: has", "change train.steps"),
    ({"rewards": [fail]}, "train.objective=grpo", "add it"),
    ({"eval": {"metric": "qa", "patience": 2}, "val_samples": ONE}, "every", "eval.every=0.1"),
]


MODEL = SimpleNamespace(name="a")
INVALID_CALLS += [
    ({"metric": [fail], "val_samples": ONE}, "metric: a list", "for several scores"),
    ({"callbacks": ["x"]}, "callbacks: a str", "def stop(step, metrics)"),
    ({"callbacks": 3}, "callbacks: a int", "def stop(step, metrics)"),
    ({"rewards": "exakt", "objective": "grpo"}, "rewards.0", ""),
    ({"eval": "x"}, "eval: a str", 'eval={"every": 100}'),
    ({"train": 3}, "train: a int", 'train={"epochs": 3}'),
    ({"rank": 8}, "rank: unknown", "tune.lora.rank=8"),
    ({"resume": "x"}, "resume: a str", "resume=True"),
    ({"epochs": 1, "train": {"epochs": 2}}, "both epochs and", 'remove epochs, or "epochs"'),
    (
        {"metric": "qa", "eval": {"metric": "qa"}, "val_samples": ONE},
        "both metric and",
        "remove metric",
    ),
    ({"eval": {"metric": fail}, "val_samples": ONE}, "is a function", "pass metric=function"),
    ({"output_dir": None}, "output_dir: a NoneType", 'output_dir="runs/first"'),
    ({"model": MODEL}, "model: a SimpleNamespace", "model.name"),
]


@pytest.mark.parametrize(("arguments", "what", "remedy"), INVALID_CALLS)
def test_invalid_calls_are_reported(tmp_path, arguments, what, remedy):
    folder = {"model": TINY_MODEL, "output_dir": tmp_path / "run"}
    with pytest.raises(finesight.UserError) as caught:
        finesight.train(**folder | {"samples": ONE} | SETTINGS | arguments)
    assert what in str(caught.value)
    assert remedy in str(caught.value.remedy)
    assert "--" not in str(caught.value), "options of a command"


def test_files_of_the_user_in_the_folder_of_a_run_are_never_replaced(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "train.jsonl").write_text("mine")
    for name, is_link in (("real", False), ("link", True)):
        run = tmp_path / name
        run.mkdir()
        if is_link:
            (run / "samples").symlink_to(own)
        else:
            shutil.copytree(own, run / "samples")
        with pytest.raises(finesight.UserError, match="contains samples, but no run"):
            train(run)
        assert (run / "samples" / "train.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"stesp": 3}, "unknown setting"),
        ({"samples": [ONE[0], 3]}, r"samples\[1\]"),
        ({"samples": [finesight.Sample(image="none.png", question="a", answer="b")]}, "none.png"),
        ({"data": {"eval": "a.jsonl"}, "val_samples": ONE}, "both val_samples and data"),
    ],
)
def test_failed_call_leaves_no_samples(tmp_path, arguments, text):
    arguments = {"samples": ONE} | SETTINGS | arguments
    with pytest.raises(finesight.UserError, match=text):
        finesight.train(TINY_MODEL, output_dir=tmp_path / "run", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_samples_of_a_killed_process_are_used_again(tmp_path):
    """Other samples are refused, and nothing is removed."""
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    write_samples(run, {"train": ONE, "eval": ONE})
    files = sorted(run.path.rglob("*"))
    with run.lock():
        refused = "import finesight; finesight.train('finesight-tiny', [finesight.Sample("
        refused += f"question='a', answer='b')], output_dir={str(run.path)!r}, device='cpu')"
        done = subprocess.run([sys.executable, "-c", refused], capture_output=True, text=True)
    assert "another process is training in run" in done.stderr
    own = api.read_samples(run.samples_dir / "train.jsonl")
    for samples in (make_samples(2), own):
        with pytest.raises(finesight.UserError, match="not the samples of the run") as caught:
            train(run.path, samples, steps=1)
        assert f"output_dir='{run.path}-2'" in caught.value.remedy
    own_file = {"train": str(run.samples_dir / "train.jsonl")}
    with pytest.raises(finesight.UserError, match="not the samples of the run"):
        finesight.train(
            TINY_MODEL, data=own_file, val_samples=make_samples(2), output_dir=run.path, **SETTINGS
        )
    assert sorted(run.path.rglob("*")) == files
    train(run.path, ONE, val_samples=ONE, metric="captions", steps=1, eval=EVAL)
    (tmp_path / "other" / "samples").mkdir(parents=True)
    shutil.copytree(run.samples_dir, tmp_path / "other" / "samples", dirs_exist_ok=True)
    (tmp_path / "other" / "samples" / "notes.txt").write_text("mine")
    with pytest.raises(finesight.UserError, match="contains samples, but no run"):
        train(tmp_path / "other", ONE, steps=1)


def test_clean_up_keeps_the_first_error(tmp_path, monkeypatch):
    missing = finesight.Sample(image="none.png", question="a", answer="b")

    def fail_to_write(*_: Any) -> None:
        raise finesight.UserError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(python_training, "write_samples", fail_to_write)
        with pytest.raises(finesight.UserError, match="no space"):
            train(tmp_path / "run", ONE)
    assert list(tmp_path.iterdir()) == []

    def fail_to_remove(path: Path) -> None:
        raise OSError("busy")

    monkeypatch.setattr(python_training, "remove_folder", fail_to_remove)
    with pytest.raises(finesight.UserError, match=r"none\.png"):
        train(tmp_path / "run", [missing])


def test_callback_does_not_train_in_its_own_run(tmp_path):
    errors = []

    def train_again(step: int, metrics: Any) -> None:
        with pytest.raises(finesight.UserError) as caught:
            train(tmp_path / "run", ONE * 1, steps=1, resume=True)
        errors.append(caught.value.what)

    train(tmp_path / "run", ONE, steps=1, callbacks=[train_again])
    assert errors == ["another process is training in run"]


def test_val_samples_join_files_for_training(tmp_path):
    file = write_file(tmp_path, ONE[0])
    settings = SETTINGS | {"batch_size": 1, "steps": 1, "data": {"train": str(file)}}
    finesight.train(TINY_MODEL, val_samples=ONE, output_dir=tmp_path / "run", **settings)
    data = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["data"]
    assert [source["path"] for source in data["train"]] == [str(file)]
    paths = [source["path"] for source in data["eval"]]
    assert paths == [str(tmp_path / "run" / "samples" / "eval.jsonl")]


@pytest.mark.parametrize(
    ("step", "call"),
    [
        (
            Step("train", {"recipe": "my runs/a", "resume": True}),
            "finesight.train(..., output_dir='my runs/a', resume=True)",
        ),
        (
            Step("train", {"recipe": "train.run", "overrides": ["train.steps=4", "model=a b"]}),
            "finesight.train(..., output_dir='train.run', model='a b', steps=4)",
        ),
        (Step("eval", {"run_or_model": "train.run"}), "evaluate(run_or_model='train.run')"),
        ("use train.steps=4", "use train.steps=4"),
    ],
)
def test_remedies_are_calls(step, call):
    with pytest.raises(finesight.UserError) as caught, translate_remedies():
        raise finesight.UserError("in train.steps", where="train.run", remedy=step)
    assert call in caught.value.remedy
    assert (caught.value.what, caught.value.where) == ("in train.steps", "train.run")


@pytest.mark.parametrize(
    ("where", "translated"),
    [
        ("train.learning_rate", "learning_rate"),
        ("train.learning_rate of 3", "learning_rate of 3"),
        ("eval.metric", "metric"),
        ("eval.every", "eval.every"),
        ("train.jsonl", "train.jsonl"),
        ("train.steps/a", "train.steps/a"),
        ("a train.steps", "a train.steps"),
    ],
)
def test_settings_in_errors_are_arguments(where, translated):
    with pytest.raises(finesight.UserError) as caught, translate_remedies():
        raise finesight.UserError("wrong", where=where, expected=where)
    assert (caught.value.where, caught.value.expected) == (translated, translated)


def test_interruption_names_the_argument():
    interruption = pytest.raises(finesight.TrainingInterrupted, match="repeat with resume=True to")
    with interruption, translate_remedies():
        raise finesight.TrainingInterrupted("repeat the command with --resume to continue")


def naïve(case: EvalCase) -> float:
    return float(len(case.answer))


def test_functions_of_any_name_and_results_are_accepted(trained, tmp_path):
    steps = []

    def note(step: int, metrics: dict[str, float]) -> None:
        metrics.clear()
        steps.append(step)

    def check(step: int, metrics: dict[str, float]) -> None:
        assert metrics

    settings = SETTINGS | {"steps": 1, "eval": {"max_new_tokens": 2}}
    result = finesight.train(
        trained.result,
        ONE * 3,
        val_samples=ONE,
        metric=naïve,
        callbacks=[note, check],
        output_dir=tmp_path / "run",
        **settings,
    )
    assert steps == [0, 1, 1]
    assert result.after.primary_metric == "naïve"
    rewards = {}
    named = SimpleNamespace(__name__="a.b-c", __call__=naïve)
    assert name_function(named, rewards) == "python:a_b_c"
    assert finesight.load(result, device="cpu").name == str(tmp_path / "run")
    assert 'sandbox="allow-scripts"' in result._repr_html_()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert result._repr_html_() is None


def test_model_is_saved_outside_its_folder(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert trained.model.save("~/saved") == tmp_path / "saved"
    assert (tmp_path / "saved" / "adapter_config.json").is_file()
    with pytest.raises(finesight.UserError, match="inside the one"):
        trained.model.save(trained.folder / "adapter" / "copy")


def test_only_files_of_a_model_are_saved(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(resolve_model_path(TINY_MODEL), folder)
    names = {path.name for path in folder.iterdir()} - {"sha256.json"}
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("mine")
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "secret").symlink_to(tmp_path / "outside" / "secret")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("mine")
    (folder / "other.safetensors").write_bytes(b"")
    saved = finesight.load(folder, device="cpu").save(tmp_path / "saved")
    assert {path.name for path in saved.iterdir()} == names | {"sha256.json"}
    assert finesight.load(saved, device="cpu").generate([], "Hi", max_new_tokens=1)


def test_callable_package_is_pickled_and_documented():
    assert pickle.loads(pickle.dumps(finesight.train)) is finesight.train
    text = pydoc.render_doc(finesight.train, renderer=pydoc.plaintext)
    signature = inspect.signature(finesight.train)
    assert f"finesight.train{signature}" in text
    assert ", *, output_dir" in str(signature)
    assert "val_samples: Samples of the evaluations." in text


def test_several_processes_refuse_functions(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(finesight.UserError, match="2 processes") as caught:
        train(tmp_path / "run", val_samples=ONE, metric=count_letters)
    assert 'metric="metric.py:count_letters"' in caught.value.remedy
    with pytest.raises(finesight.UserError, match="callbacks in a training with 2 processes"):
        train(tmp_path / "run", callbacks=[print])
    assert not any(tmp_path.iterdir())
    for value in ("", "abc"):
        monkeypatch.setenv("WORLD_SIZE", value)
        with pytest.raises(finesight.UserError, match="WORLD_SIZE"):
            train(tmp_path / "run", val_samples=ONE, metric=count_letters)


@pytest.mark.parametrize("callbacks", [["x"], print, "x"])
def test_callbacks_of_recipes_are_checked(tmp_path, callbacks):
    file = write_file(tmp_path, ONE[0])
    recipe = {"model": TINY_MODEL, "data": {"train": str(file)}, "output_dir": str(tmp_path / "a")}
    recipe["train"] = {"steps": 1, "device": "cpu"}
    with pytest.raises(finesight.UserError, match="callbacks: a ") as caught:
        api.train(recipe, callbacks=callbacks)
    assert "def stop(step, metrics)" in caught.value.remedy
    assert not (tmp_path / "a").exists()


def test_public_names_have_documented_signatures():
    """A change of tests/cases/public_api.yaml is a change of the public API.

    Add new names with their signatures. A name that is removed first issues a DeprecationWarning
    for one minor version, and CHANGELOG.md names its replacement.
    """
    found = {}
    for module in (finesight, api):
        for name in module.__all__:
            found[f"{module.__name__}.{name}"] = describe(getattr(module, name))
    for owner in (finesight.Model, finesight.TrainingClient):
        for name, member in inspect.getmembers(owner, inspect.isfunction):
            if not name.startswith("_"):
                found[f"finesight.{owner.__name__}.{name}"] = describe(member)
    expected = load_cases("public_api")
    assert found == expected, f"update {CASES_FOLDER / 'public_api.yaml'}"


def describe(value: Any) -> str | list[str]:
    """Describe a class or function by its parameters and result, and other values by their repr."""
    if not callable(value):
        return repr(value)
    if inspect.isclass(value) and issubclass(value, Exception):
        return "exception"
    signature = inspect.signature(value)
    lines = []
    for parameter in signature.parameters.values():
        text = parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {parameter.annotation}"
        if parameter.default is not parameter.empty:
            text += f" = {parameter.default!r}"
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            text += f" ({parameter.kind.description})"
        lines.append(text)
    return [*lines, f"-> {signature.return_annotation}"]


@pytest.mark.parametrize("first", ["finesight", "finesight.train.trainer", "finesight.api"])
def test_names_work_after_any_import(first):
    code = f"import {first}, finesight, inspect, sys; loaded = {{*sys.modules}}"
    code += "; print('torch' in loaded, callable(finesight.train), finesight.Sample.__name__)"
    code += "; assert callable(finesight.api.read_samples)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    is_heavy = first == "finesight.train.trainer"
    assert done.stdout.split() == [str(is_heavy), "True", "Sample"]
    with pytest.raises(AttributeError, match=r"'trian': it has .*train; finesight\.api"):
        finesight.trian  # noqa: B018
    assert {*finesight.__all__, "api"} <= {*dir(finesight)}


def test_types_of_a_script_are_checked(tmp_path):
    """mypy in strict mode accepts the correct calls of a script, and rejects a wrong one."""
    pytest.importorskip("mypy")
    script = tmp_path / "script.py"
    script.write_text(TYPED_SCRIPT)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), str(script)]
    environment = {"MYPYPATH": str(Path(finesight.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    errors = [line for line in done.stdout.splitlines() if line.startswith("script.py")]
    assert len(errors) == 1, done.stdout
    assert 'incompatible type "int"' in errors[0]


TYPED_SCRIPT = """
from collections.abc import Mapping

import numpy as np
from PIL import Image

import finesight
from finesight.evaluate.eval_case import EvalCase


def metric(case: EvalCase) -> float:
    return float(case.answer == case.references[0])


def stop(step: int, metrics: Mapping[str, float]) -> None:
    if metrics.get("loss", 1.0) < 0.1:
        raise finesight.StopTraining


image = Image.new("RGB", (8, 8))
pixels = np.zeros((8, 8, 3), np.uint8)
samples = [
    finesight.Sample(image=image, question="What?", answer="a"),
    finesight.Sample(image=[pixels, b"", "a.png"], question="What?", answer="b"),
    finesight.Sample(messages=[finesight.Message("user", [image, "What?"])]),
]
print(finesight.api.read_samples("a.jsonl")[0].folder)
result = finesight.train(
    "m", samples, metric=metric, rewards=[metric], callbacks=[stop], epochs=3, output_dir="run"
)
print(result.steps + 1)
model = finesight.load("run")
print(model.generate(image, "What?").text.upper())
print(model.evaluate(samples, metric).scores["metric"] + 1.0)
client = finesight.TrainingClient("m", tune={"language": "lora"})
for batch in client.load_batches(samples, 2, epochs=3):
    print(client.forward_backward(batch, lambda logps, inputs: -logps.sum()).item())
    client.optim_step(1e-4)
groups = client.sample(samples, 2)
client.encode_responses(groups, [[float(case.answer == "a") for case in groups[0].cases]])
with finesight.start_server(model) as server:
    print(server.url + server.key)
model.generate(image, 3)
"""
