"""Tensors of written models have the names of transformers, which engines load.

vLLM and SGLang stack q, k and v, and gate and up themselves, so these tensors must be separate.
"""

from pathlib import Path

import pytest
import torch
from hf_reference import CONFIGS, make_config, make_native_model, make_reference_model
from safetensors.torch import load_file, save_file

from finesight.model.weights_io import save_model
from finesight.model_folder import ModelFolder


def list_names(folder: Path) -> set[str]:
    files = ModelFolder(folder).weight_files()
    return {name for file in files for name in load_file(file)}


@pytest.mark.parametrize("family", [name for name in CONFIGS if name.startswith("qwen")])
@pytest.mark.parametrize("tied", [True, False])
def test_tensor_names_are_loadable_by_engines(family: str, tied: bool, tmp_path: Path) -> None:
    settings = make_config(family, tie_word_embeddings=tied)
    reference = make_reference_model(settings)
    reference.save_pretrained(tmp_path / "theirs")
    model = make_native_model(settings, reference)
    (tmp_path / "config.json").write_text("{}")
    save_file({"mtp.fc.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    source = ModelFolder(tmp_path)
    source.__dict__["config"] = settings
    (tmp_path / "out").mkdir()
    save_model(model, source, tmp_path / "out", torch.float32, max_shard_bytes=1e5)
    assert len(ModelFolder(tmp_path / "out").weight_files()) > 1, "no shards"
    # Transformers writes the experts one by one; published models have them in one tensor.
    names = {name for name in list_names(tmp_path / "theirs") if ".experts." not in name}
    names |= {name for name, _ in reference.named_parameters() if ".experts." in name}
    names |= {"mtp.fc.weight"} if family.startswith("qwen3_5") else set()
    assert list_names(tmp_path / "out") == names
    # A tied head has no tensor of its own: SGLang ignores one, vLLM would load it twice.
    assert ("lm_head.weight" in names) is not tied
