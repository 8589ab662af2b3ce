"""Qwen3.5, dense and with experts, through transformers: training, prediction, and loading by peft.

Its processor requires torchvision, also for images only.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import hf_models
import pytest
import torch
from tiny_task import TinyTask

from finesight.encode.renderer import build_renderer
from finesight.errors import UserError
from finesight.infer.model_loader import load_inference_model
from finesight.infer.prediction import predict
from finesight.model_folder import ModelFolder

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
    return hf_models.make_qwen3_5(tmp_path_factory.mktemp("models") / "qwen3_5", request.param)


def test_answers_are_supervised_without_reasoning(folder: Path, tmp_path: Path) -> None:
    renderer = build_renderer(ModelFolder(folder))
    outline = renderer.tokenize(hf_models.make_sample(tmp_path, ("Which?", "light red")))
    supervised = outline.ids_T[outline.loss_mask_T].tolist()
    assert renderer.tokenizer.decode(supervised, skip_special_tokens=False) == "light red<|im_end|>"
    full = renderer.tokenizer.decode(outline.ids_T.tolist(), skip_special_tokens=False)
    assert full == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Which?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nlight red<|im_end|>\n"
    )
    with pytest.raises(UserError, match="use single-turn conversations"):
        renderer.tokenize(hf_models.make_sample(tmp_path, ("Which?", "red"), ("Sure?", "yes")))


@pytest.mark.parametrize("device", ["cpu", CARD])
def test_training_reduces_loss_and_peft_loads_adapter(
    folder: Path, tmp_path: Path, device: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    task = TinyTask(tmp_path / "task")
    task.recipe |= {"model": str(folder), "image": None, "tune": TUNE}
    task.run(
        "train.epochs=5",
        f"train.device={device}",
        "train.precision=fp32",
        eval={"metric": "qa", "max_new_tokens": 5},
    )
    measured = [x["validation_loss"] for x in task.read_metrics() if "validation_loss" in x]
    assert measured[-1] < measured[0] - 0.5

    run = task.folder / "run"
    answerer = load_inference_model(str(run), "cpu")
    requested = hf_models.make_sample(tmp_path, ("Which colour?", ""))
    (found,) = predict(
        answerer.model, answerer.renderer, [requested], max_new_tokens=8, batch_size=1
    )
    prompt = answerer.renderer.load_patches(answerer.renderer.tokenize_prompt(requested))
    ids = torch.from_numpy(prompt.tokenized.ids_T).long()[None]
    base = AutoModelForImageTextToText.from_pretrained(folder)
    theirs = PeftModel.from_pretrained(base, run / "adapter").eval()
    with torch.no_grad():
        output = theirs.generate(
            input_ids=ids, **prompt.hf_inputs, max_new_tokens=8, do_sample=False
        )[0, len(prompt.tokenized.ids_T) :].tolist()
    assert found.raw_text == answerer.renderer.tokenizer.decode(output, skip_special_tokens=False)


def test_full_model_is_saved(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    task = TinyTask(tmp_path / "task")
    full = dict.fromkeys(("vision", "merger", "language", "embeddings"), "full")
    task.recipe |= {"model": str(folder), "image": None, "tune": full}
    task.run("train.epochs=1", "train.learning_rate=0.001")
    ours = load_inference_model(str(task.folder / "run"), "cpu").model
    theirs = AutoModelForImageTextToText.from_pretrained(task.folder / "run" / "model")
    stored = {f"inner.{name}": value for name, value in theirs.state_dict().items()}
    assert all(torch.equal(value, stored[name]) for name, value in ours.state_dict().items())
