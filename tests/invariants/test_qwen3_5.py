"""Qwen3.5, dense and with experts, through transformers: learned, answered, and read by peft.

Its processor needs torchvision, also for pictures alone.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import borrowed
import pytest
import torch
from small_run import Task

from finesight.encode.rendering import renderer_of
from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.infer.load import load_answerer
from finesight.infer.predict import predict

pytestmark = pytest.mark.skipif(find_spec("torchvision") is None, reason="no torchvision")
CARD = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)
TUNE = {
    "vision": "lora",
    "merger": "lora",
    "language": "lora",
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
}


@pytest.fixture(scope="module", params=[0, 4], ids=["dense", "experts"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return borrowed.qwen3_5(tmp_path_factory.mktemp("models") / "qwen3_5", request.param)


def test_answers_are_learned_without_a_thought(folder: Path, tmp_path: Path) -> None:
    renderer = renderer_of(ModelFolder(folder))
    outline = renderer.outline(borrowed.sample(tmp_path, ("Which?", "light red")))
    learned = outline.ids_T[outline.learned_T].tolist()
    assert renderer.tokenizer.decode(learned, skip_special=False) == "light red<|im_end|>"
    whole = renderer.tokenizer.decode(outline.ids_T.tolist(), skip_special=False)
    assert whole == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Which?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nlight red<|im_end|>\n"
    )
    with pytest.raises(UserError, match="keep the last answer of each conversation alone"):
        renderer.outline(borrowed.sample(tmp_path, ("Which?", "red"), ("Sure?", "yes")))


@pytest.mark.parametrize("device", ["cpu", CARD])
def test_it_learns_and_peft_reads_it(folder: Path, tmp_path: Path, device: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    task = Task(tmp_path / "task")
    task.recipe |= {"model": str(folder), "picture": None, "tune": TUNE}
    task.run(
        "train.epochs=5",
        f"train.device={device}",
        "train.precision=fp32",
        eval={"metric": "qa", "max_new_tokens": 5},
    )
    measured = [x["held_out_loss"] for x in task.history() if "held_out_loss" in x]
    assert measured[-1] < measured[0] - 0.5

    run = task.folder / "run"
    answerer = load_answerer(str(run), "cpu")
    asked = borrowed.sample(tmp_path, ("Which colour?", ""))
    (found,) = predict(answerer.model, answerer.renderer, [asked], max_new_tokens=8, batch=1)
    prompt = answerer.renderer.with_patches(answerer.renderer.prompt_outline(asked))
    ids = torch.from_numpy(prompt.outline.ids_T).long()[None]
    base = AutoModelForImageTextToText.from_pretrained(folder)
    theirs = PeftModel.from_pretrained(base, run / "adapter").eval()
    with torch.no_grad():
        said = theirs.generate(input_ids=ids, **prompt.inputs, max_new_tokens=8, do_sample=False)[
            0, len(prompt.outline.ids_T) :
        ].tolist()
    assert found.raw == answerer.renderer.tokenizer.decode(said, skip_special=False)


def test_it_is_written_whole(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    task = Task(tmp_path / "task")
    whole = dict.fromkeys(("vision", "merger", "language", "embeddings"), "full")
    task.recipe |= {"model": str(folder), "picture": None, "tune": whole}
    task.run("train.epochs=1", "train.learning_rate=0.001")
    ours = load_answerer(str(task.folder / "run"), "cpu").model
    theirs = AutoModelForImageTextToText.from_pretrained(task.folder / "run" / "model")
    stored = {f"inner.{name}": value for name, value in theirs.state_dict().items()}
    assert all(torch.equal(value, stored[name]) for name, value in ours.state_dict().items())
