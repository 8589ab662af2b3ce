"""Families without native code answer as transformers does by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from PIL import Image

from finesight.cli.app import run_command
from finesight.data.sample import LocatedSample
from finesight.errors import TrainingInterrupted, UserError
from finesight.infer.chat_session import ChatSession
from finesight.infer.inference_service import InferenceService
from finesight.infer.model_loader import InferenceModel, load_inference_model
from finesight.infer.prediction import Prediction, predict
from finesight.infer.request import GenerationOptions, SamplingParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_models.make_llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def inference_model(folder: Path) -> InferenceModel:
    return load_inference_model(str(folder), "cpu")


def run_predict(
    inference_model: InferenceModel, samples: list[LocatedSample], tokens: int, **given: Any
) -> list[Prediction]:
    options = {"max_new_tokens": tokens, "batch_size": 1, **given}
    return predict(inference_model.model, inference_model.renderer, samples, **options)


@torch.no_grad()
def reference(folder: Path, question: str, num_images: list[Path], most: int) -> list[int]:
    """What transformers generates by itself, without anything of finesight."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    text = f"<|im_start|>user\n{'<|image_pad|>' * len(num_images)}{question}<|im_end|>\n"
    inputs = processor(
        text=text + "<|im_start|>assistant\n",
        images=[Image.open(path) for path in num_images] or None,
        return_tensors="pt",
    )
    ids = model.generate(**inputs, max_new_tokens=most, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("images", [0, 1, 2])
def test_answers_match_transformers_generate(inference_model, folder, tmp_path, images):
    requested = hf_models.make_sample(tmp_path, ("Which colour?", ""), num_images=images)
    (found,) = run_predict(inference_model, [requested], 20, batch_size=4)
    paths = [tmp_path / f"{n}.png" for n in range(images)]
    ids = reference(folder, "Which colour?", paths, 20)
    assert found.raw_text == inference_model.renderer.tokenizer.decode(
        ids, skip_special_tokens=False
    )
    assert found.num_tokens == len(ids)


def test_batched_answers_match_single_ones(inference_model: InferenceModel, tmp_path: Path) -> None:
    samples = [
        hf_models.make_sample(tmp_path, ("Which colour?", ""), name="a"),
        hf_models.make_sample(tmp_path, ("Which?", "red"), num_images=2, name="b"),
        hf_models.make_sample(tmp_path, ("Hello", ""), num_images=0, name="c"),
    ]
    batched = run_predict(inference_model, samples, 9, batch_size=4)
    alone = [run_predict(inference_model, [one], 9)[0] for one in samples]
    assert batched == alone
    assert len({one.raw_text for one in batched}) == 3


def test_completion_ends_at_the_last_position(inference_model, tmp_path, monkeypatch):
    requested = hf_models.make_sample(tmp_path, ("Which colour?", ""))
    prompt = inference_model.renderer.tokenize_prompt(requested)
    text_config = inference_model.model.inner.config.get_text_config()
    monkeypatch.setattr(text_config, "max_position_embeddings", prompt.num_tokens + 3)
    (found,) = run_predict(inference_model, [requested], 20)
    assert found.num_tokens == 3


def test_generation_can_be_stopped_between_tokens(inference_model, tmp_path):
    result: list[int] = []

    def stop(ended: int) -> None:
        result.append(ended)
        if len(result) == 3:
            raise TrainingInterrupted("enough")

    requested = hf_models.make_sample(tmp_path, ("Which colour?", ""))
    with pytest.raises(TrainingInterrupted):
        run_predict(inference_model, [requested], 9, on_progress=stop)
    assert result == [0, 0, 0]


def test_predict_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / hf_models.write_image(tmp_path, 0)
    command = ["predict", str(folder), str(image), "--prompt", "Which colour?", "--device", "cpu"]
    assert run_command([*command, "--max-new-tokens", "3"]) == 0
    assert "[truncated after 3 tokens]" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["predict", "train"])
def test_model_with_remote_code_is_rejected(tmp_path, capsys, command):
    folder = tmp_path / "chatty"
    folder.mkdir()
    auto = {"AutoConfig": "chatty.Config", "AutoModelForImageTextToText": "chatty.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "chatty", "auto_map": auto}))
    (folder / "chatty.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    image = str(tmp_path / hf_models.write_image(tmp_path, 0))
    arguments = [str(folder), image, "--prompt", "What?"]
    if command == "train":
        turns = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "b"}]
        (tmp_path / "data.jsonl").write_text(json.dumps({"id": "s", "messages": turns}))
        recipe = {"model": str(folder), "output_dir": str(tmp_path / "out")}
        recipe["data"] = {"train": str(tmp_path / "data.jsonl")}
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        arguments = [str(tmp_path / "recipe.yaml")]
    assert run_command([command, *arguments]) == 2
    output = capsys.readouterr().err
    assert "the family chatty is unknown to transformers" in output
    assert "chatty.Model" in output
    assert "one of qwen2_vl, qwen2_5_vl" in output
    assert "remote code is never executed" in output
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out").exists()


def test_service_answers_match_predict(inference_model: InferenceModel, tmp_path: Path) -> None:
    samples = [
        hf_models.make_sample(tmp_path, ("Which colour?", ""), name="a"),
        hf_models.make_sample(tmp_path, ("Hello", ""), num_images=0, name="b"),
    ]
    wanted = run_predict(inference_model, samples, 9)
    service = InferenceService(inference_model, max_num_seqs=1)
    try:
        requested = [
            service.submit(sample, GenerationOptions(max_new_tokens=9)) for sample in samples
        ]
        texts = ["".join(delta.text for delta in answering) for answering in requested]
        assert [answering.build_prediction() for answering in requested] == wanted
        assert texts == [one.answer for one in wanted]
        assert service.max_model_len == 512
        sampled = GenerationOptions(
            max_new_tokens=9, sampling_params=SamplingParams(temperature=0.5)
        )
        drawn = service.submit(samples[1], sampled)
        with pytest.raises(UserError, match="temperature: not supported by the transformers"):
            list(drawn)
        again = service.submit(samples[1], GenerationOptions(max_new_tokens=9))
        assert "".join(delta.text for delta in again) == texts[1]
    finally:
        service.close()


def test_chat_accepts_images(inference_model: InferenceModel, tmp_path: Path) -> None:
    """The transformers backend rejects boxes, which the conversation must not contain."""
    options = [GenerationOptions(max_new_tokens=9)]
    images = [Path(hf_models.write_image(tmp_path, number)) for number in range(2)]
    paths = [tmp_path / image for image in images]
    service = InferenceService(inference_model, max_num_seqs=1)
    try:
        chat = ChatSession(service)
        for path in paths:
            turn = chat.send("Which colour?", [path], options)
            text = "".join(turn.replies[0])
            assert text == turn.replies[0].text != ""
            assert turn.replies[0].image_path == path
    finally:
        service.close()
