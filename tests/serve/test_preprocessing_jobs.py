"""Encoding of prompts with untrusted images in worker processes."""

import contextlib
from functools import partial
from pathlib import Path

import hf_models
import pytest
import torch
from hostile_requests import make_jpeg2000
from service_fixture import write_shape_image

from finesight.encode import renderer
from finesight.encode.family import DEFAULT_THINKING
from finesight.encode.renderer_builder import build_renderer
from finesight.errors import UserError
from finesight.infer.chat_session import ChatSession
from finesight.infer.inference_service import InferenceService
from finesight.infer.model_loader import load_inference_model
from finesight.infer.request import GenerationOptions
from finesight.model_folder import ModelFolder
from finesight.samples.sample import LocatedSample
from finesight.serve import preprocessing_jobs
from finesight.serve.preprocessing_jobs import encode_in_worker
from finesight.vision.image_reader import create_image_pool


def test_chat_decodes_images_in_worker_processes(tmp_path, monkeypatch):
    model = load_inference_model("finesight-tiny", "cpu", "fp32")
    image, question = write_shape_image(tmp_path, 0)
    hostile = tmp_path / "hostile.jpg"
    hostile.write_bytes(make_jpeg2000())
    options = [GenerationOptions(max_new_tokens=60)]

    def ask(service: InferenceService, *images: Path) -> tuple[str, object]:
        reply = ChatSession(service).send(question, images, options).replies[0]
        return "".join(reply), reply.boxes

    with contextlib.closing(InferenceService(model, max_num_seqs=1)) as service:
        expected = ask(service, image, image), ask(service)
    monkeypatch.setattr(preprocessing_jobs, "MAX_PROMPT_CPU_S", 2.0)
    monkeypatch.setattr(renderer, "load_image", lambda *_: pytest.fail("decoded in the server"))
    with contextlib.closing(create_image_pool(model.renderer, encode_in_worker.__module__)) as pool:
        encode = partial(encode_in_worker, pool)
        service = InferenceService(model, max_num_seqs=1, encode_prompt=encode)
        with contextlib.closing(service):
            assert (ask(service, image, image), ask(service)) == expected
            # Its replacement would cost the time of a start at each prompt.
            assert sum(worker.jobs for worker in pool.idle_workers) == 2, "a worker was replaced"
            with pytest.raises(UserError, match=r"CPU time"):
                ask(service, *[hostile] * 8)
            pool.close()
            with pytest.raises(UserError, match="the server stops"):
                ask(service, image)


def test_transformers_inputs_are_encoded_in_worker_processes(tmp_path):
    native = build_renderer(ModelFolder(hf_models.make_llava(tmp_path / "llava")))
    sample: LocatedSample = hf_models.make_sample(tmp_path, ("Which colour?", ""))
    expected = native.load_patches(native.tokenize_prompt(sample))
    with contextlib.closing(create_image_pool(native, encode_in_worker.__module__)) as pool:
        encoded = encode_in_worker(pool, sample, DEFAULT_THINKING)
    assert encoded.tokenized.ids_T.tolist() == expected.tokenized.ids_T.tolist()
    assert encoded.hf_inputs.keys() == expected.hf_inputs.keys()
    assert all(torch.equal(encoded.hf_inputs[k], v) for k, v in expected.hf_inputs.items())
