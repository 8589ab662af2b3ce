"""Models of other families through transformers: equal results, and rejected models."""

from pathlib import Path

import hf_models
import pytest
import torch
from case_files import load_cases
from safetensors.torch import load_file, save_file

from finesight.encode.batch import PackedBatch
from finesight.encode.packing import pack
from finesight.encode.renderer_builder import build_renderer
from finesight.errors import UserError
from finesight.model.backend import load_auto_model
from finesight.model.hf_backend import HfModel, load_hf_model
from finesight.model.trainable import configure_tuning, get_part
from finesight.model_folder import ModelFolder
from finesight.settings.config import TuneSettings
from finesight.train.objectives.objective import fused_linear_cross_entropy

CASES = load_cases("model_hf_backend")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_models.make_llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture
def model(folder: Path) -> HfModel:
    found = load_auto_model(ModelFolder(folder), torch.float32, CPU)
    assert isinstance(found, HfModel)
    return found


@pytest.fixture
def batch(folder: Path, tmp_path: Path) -> PackedBatch:
    located_sample = hf_models.make_sample(
        tmp_path, ("Which?", "red and blue"), ("Sure?", "yes"), num_images=2
    )
    return pack([build_renderer(ModelFolder(folder)).encode(located_sample)])


def test_loss_and_gradients_match_transformers(model, folder, batch):
    from transformers import AutoModelForImageTextToText

    theirs = AutoModelForImageTextToText.from_pretrained(folder)
    labels = torch.full_like(batch.ids_T, -100)
    labels[batch.logit_indices_L + 1] = batch.labels_L
    expected = theirs(**model.prepare_inputs(batch), labels=labels[None]).loss
    share = torch.tensor(1 / batch.num_supervised_tokens)
    loss = fused_linear_cross_entropy(model(batch), model.lm_head_weight, batch.labels_L, share)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    gradients = {name.removeprefix("inner."): p.grad for name, p in model.named_parameters()}
    for name, parameter in theirs.named_parameters():
        # The vision encoder ends before a norm that LLaVA does not use.
        assert (parameter.grad is None) == (gradients[name] is None)
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_unsupported_models_are_rejected(model, batch):
    model.inner.lm_head.register_forward_hook(lambda _, __, logits: 9 * torch.tanh(logits / 9))
    with pytest.raises(UserError, match="logits of llava differ"):
        model(batch)
    model.inner.model.audio_tower = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"model\.audio_tower\.weight belongs to no known part"):
        configure_tuning(model, TuneSettings(), seed=0)


@pytest.mark.parametrize(("name", "part"), CASES["test_parts_are_recognized_by_hf_names"])
def test_parts_are_recognized_by_hf_names(name, part):
    assert get_part(f"inner.{name}") == part


@pytest.mark.parametrize("how", ["missing", "another shape", "pickled"])
def test_mismatched_tensors_are_rejected(model, folder, batch, tmp_path, how):
    """Pickled weights are converted and verified."""
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    message = r"1 tensors are missing or of another shape.*up_proj"
    if how == "pickled":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        again = load_hf_model(ModelFolder(tmp_path), torch.float32, CPU)
        assert torch.equal(again(batch), model(batch))
        (converted,) = ModelFolder(tmp_path).weight_files()
        content = bytearray(converted.read_bytes())
        content[-1] ^= 1
        converted.write_bytes(content)
        message = "has changed since it was written"
    else:
        changed = {} if how == "missing" else {name: tensors[name][:5].clone()}
        del tensors[name]
        save_file(tensors | changed, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        load_hf_model(ModelFolder(tmp_path), torch.float32, CPU)
