"""Qwen3.5, dense and with experts: training, evaluation, merging and transformers' answers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hf_models import make_sample
from safetensors.torch import load_file, save_file
from tiny_model import TinyFamily, create_tiny_model
from tiny_task import TinyTask
from transformers import AutoModelForImageTextToText

from finesight.cli.app import app
from finesight.encode.tokenization import EncodedSample
from finesight.infer.model_loader import load_inference_model
from finesight.infer.prediction import generate
from finesight.model_folder import ModelFolder

LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}
TUNES: dict[str, dict[str, Any]] = {
    "lora": {"vision": "lora", "merger": "lora", "language": "lora", "lora": LORA},
    "full": dict.fromkeys(("vision", "merger", "language", "embeddings"), "full"),
}
MTP = "mtp."
STEPS = 12


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_5_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with weights of multi-token prediction, in bf16 and fp32."""
    family: TinyFamily = request.param
    tiny = create_tiny_model(tmp_path_factory.mktemp(family) / "tiny", family, seed=3)
    weights = load_file(tiny / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    width = weights["model.language_model.norm.weight"].shape[0]
    weights[f"{MTP}fc.weight"] = torch.randn(width, 2 * width, generator=generator).bfloat16()
    weights[f"{MTP}norm.weight"] = torch.randn(width, generator=generator).bfloat16()
    weights[f"{MTP}layers.0.mlp.up_proj.weight"] = torch.randn(9, width, generator=generator)
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    (tiny / "sha256.json").unlink()
    return tiny


def read_weights(folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for file in ModelFolder(folder).weight_files():
        weights |= load_file(file)
    return {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}


def assert_mtp_is_unchanged(written: Path, source: Path) -> None:
    expected, found = read_weights(source, MTP), read_weights(written, MTP)
    assert found.keys() == expected.keys() != set()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].view(torch.uint8).equal(tensor.view(torch.uint8))


def generate_with_transformers(folder: Path, prompt: EncodedSample, side: int = 16) -> list[int]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    patches = torch.from_numpy(prompt.patches_ND).unflatten(1, (3, -1)).double() / 255
    pixels = (patches - 0.5) / 0.5
    frames = 2 * side**2 // pixels.shape[2]
    grids = torch.tensor([span.grid_thw for span in prompt.tokenized.spans])
    ids = torch.from_numpy(prompt.tokenized.ids_T).long()[None]
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            pixel_values=pixels.repeat_interleave(frames, 1).flatten(1).float(),
            image_grid_thw=grids,
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            max_new_tokens=STEPS,
            do_sample=False,
        )
    completion: list[int] = output[0, ids.shape[1] :].tolist()
    return completion


def assert_equal_answers(folder: Path, tmp_path: Path) -> list[list[int]]:
    loaded = load_inference_model(str(folder), "cpu", precision="fp32")
    questions = {"Which colour?": 1, "Which is larger?": 2, "Why?": 1}
    prompts = [
        loaded.renderer.encode_prompt(make_sample(tmp_path, (question, ""), num_images=number))
        for question, number in questions.items()
    ]
    end_ids = loaded.renderer.end_ids
    answers = generate(loaded.model, prompts, max_new_tokens=STEPS, end_ids=end_ids)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert generate_with_transformers(folder, prompt) == answer
    return answers


def test_greedy_answers_equal_transformers(folder, tmp_path):
    answers = assert_equal_answers(folder, tmp_path)
    assert len({tuple(answer) for answer in answers}) == len(answers)


@pytest.mark.parametrize("how", TUNES)
def test_run_trains_evaluates_and_merges(folder, how, tmp_path):
    task = TinyTask(tmp_path / "task")
    task.recipe |= {"model": str(folder), "tune": TUNES[how]}
    settings = ("train.epochs=4", "train.device=cpu", "train.precision=fp32")
    task.run(*settings, eval={"metric": "qa", "max_new_tokens": 5})
    measured = [x["validation_loss"] for x in task.read_metrics() if "validation_loss" in x]
    assert measured[-1] < measured[0] - 0.3
    assert load_inference_model(str(task.folder / "run"), "cpu").renderer.end_ids
    written = task.folder / "run" / "model"
    if how == "lora":
        written = tmp_path / "merged"
        merged = CliRunner().invoke(app, ["merge", str(task.folder / "run"), str(written)])
        assert merged.exit_code == 0, merged.output
    assert_mtp_is_unchanged(written, folder)
    assert_equal_answers(written, tmp_path)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_decay_keeps_its_stored_dtype(folder, stored, tmp_path):
    """A bf16 model with A_log in fp32 or bf16 is trained in bf16 and written as it was stored."""
    base = shutil.copytree(folder, tmp_path / "base")
    suffixes = (".A_log", ".linear_attn.norm.weight")
    weights = {
        name: value.to(stored if name.endswith(suffixes) else torch.bfloat16)
        for name, value in read_weights(folder).items()
    }
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    task = TinyTask(tmp_path / "task")
    task.recipe |= {"model": str(base), "tune": TUNES["full"]}
    task.run("train.epochs=1", "train.device=cpu", "train.precision=bf16")
    written = read_weights(task.folder / "run" / "model")
    assert {n: t.dtype for n, t in written.items()} == {n: t.dtype for n, t in weights.items()}
    assert any(not written[name].equal(weights[name]) for name in weights if ".A_log" in name)
