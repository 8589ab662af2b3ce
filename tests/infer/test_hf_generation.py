"""Families without native code answer as transformers does by itself."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from PIL import Image

from finesight.errors import TrainingInterrupted, UserError
from finesight.infer.chat_session import ChatSession
from finesight.infer.inference_service import InferenceService
from finesight.infer.model_loader import InferenceModel, load_inference_model
from finesight.infer.prediction import Prediction, predict
from finesight.infer.request import GenerationOptions, SamplingParams
from finesight.samples.sample import LocatedSample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_models.make_llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def inference_model(folder: Path) -> InferenceModel:
    return load_inference_model(str(folder), "cpu")


@pytest.fixture
def samples(tmp_path: Path) -> list[LocatedSample]:
    return [
        hf_models.make_sample(tmp_path, (question, ""), num_images=count)
        for count, question in enumerate(("Hello", "Which colour?", "Which?"))
    ]


def run_predict(
    inference_model: InferenceModel, samples: list[LocatedSample], tokens: int, **given: Any
) -> list[Prediction]:
    options = {"max_new_tokens": tokens, "batch_size": 4, **given}
    return predict(inference_model.model, inference_model.renderer, samples, **options)


@torch.no_grad()
def test_answers_match_transformers_generate(inference_model, folder, samples, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    predictions = run_predict(inference_model, samples, 20)
    assert len({prediction.raw_text for prediction in predictions}) == 3
    for count, prediction in enumerate(predictions):
        text = f"<|im_start|>user\n{'<|image_pad|>' * count}{prediction.prompt}<|im_end|>\n"
        inputs = processor(
            text=text + "<|im_start|>assistant\n",
            images=[Image.open(tmp_path / f"{n}.png") for n in range(count)] or None,
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        ids = ids[0, inputs["input_ids"].shape[1] :].tolist()
        decode = inference_model.renderer.tokenizer.decode
        assert prediction.raw_text == decode(ids, skip_special_tokens=False)
        assert prediction.num_tokens == len(ids)


def test_generation_ends_at_the_last_position_or_on_request(inference_model, samples, monkeypatch):
    prompt = inference_model.renderer.tokenize_prompt(samples[1])
    text_config = inference_model.model.inner.config.get_text_config()
    monkeypatch.setattr(text_config, "max_position_embeddings", prompt.num_tokens + 3)
    (found,) = run_predict(inference_model, samples[1:2], 20)
    assert found.num_tokens == 3
    result: list[int] = []

    def stop(ended: int) -> None:
        result.append(ended)
        if len(result) == 2:
            raise TrainingInterrupted("enough")

    with pytest.raises(TrainingInterrupted):
        run_predict(inference_model, samples[1:2], 9, on_progress=stop)
    assert result == [0, 0]


def test_service_and_chat_match_predict(inference_model, samples, tmp_path):
    """Sampling is rejected. The chat contains no boxes, which this backend does not support."""
    wanted = run_predict(inference_model, samples[:2], 9)
    options = GenerationOptions(max_new_tokens=9)
    sampled = replace(options, sampling_params=SamplingParams(temperature=0.5))
    with closing(InferenceService(inference_model, max_num_seqs=1)) as service:
        assert service.max_model_len == 512
        with pytest.raises(UserError, match="temperature: not supported by the transformers"):
            list(service.submit(samples[0], sampled))
        for sample, prediction in zip(samples[:2], wanted, strict=True):
            stream = service.submit(sample, options)
            assert "".join(delta.text for delta in stream) == prediction.answer
            assert stream.build_prediction() == prediction
        chat = ChatSession(service)
        for path in (tmp_path / "0.png", tmp_path / "1.png"):
            (reply,) = chat.send("Which colour?", [path], [options]).replies
            assert "".join(reply) == reply.text != ""
            assert reply.image_path == path
        assert chat.turns[0].replies[0].text == wanted[1].answer
