"""NF4 models: equal to transformers and peft, packed, and saved to folders."""

import json
from pathlib import Path
from typing import Any

import hf_reference
import peft
import pytest
import torch
from lora_fixtures import FAMILIES as ALL_FAMILIES
from lora_fixtures import tune_with_lora
from safetensors.torch import load_file

from finesight.model.families import to_module_name
from finesight.model.linear import hub_name, iter_adapters
from finesight.model.lora.peft_io import save_adapter
from finesight.model.trainable import ModelPart
from finesight.model.weights_io import load_model, save_model, stored_precision
from finesight.model_folder import ModelFolder

FAMILIES = [family for family in ALL_FAMILIES if family != "qwen3_5_moe"]
EVERY: tuple[ModelPart, ...] = ("vision", "merger", "language")
LORA = {"rank": 4, "alpha": 6, "dropout": 0.0}
TUNE = {"language": "lora", "vision": "lora", "merger": "lora", "lora": LORA}
SAMPLE = hf_reference.make_conversation(3, 2, ("image", (1, 10, 14)), 3, ("image", (1, 2, 2)), 4)


def make_settings(family: str, **changes: Any) -> dict[str, Any]:
    """Return a config of widths that bitsandbytes supports on a CPU: multiples of a block."""
    own = {"embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2}
    if family != "qwen2_vl":
        own = {"hidden_size": 64, "out_hidden_size": 128, "intermediate_size": 128}
    more: dict[str, Any] = {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
    if family == "qwen3_vl":
        more = {"rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5]}}
        more |= {"head_dim": 32}
    if family == "qwen3_5":
        more = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    more |= changes
    return hf_reference.make_config(
        family, hidden_size=128, intermediate_size=192, vision=own, **more
    )


def make_base(
    folder: Path, family: str, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> ModelFolder:
    return hf_reference.write_model_folder(folder, make_settings(family, **changes), dtype)


def from_transformers(base: ModelFolder, dtype: torch.dtype) -> Any:
    """Load for training: in inference, bitsandbytes always computes in bf16 on some CPUs."""
    import transformers

    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        base.path, quantization_config=four_bits, dtype=dtype, device_map="cpu"
    )
    return model.train()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_match_transformers_and_peft(family, tmp_path):
    base = make_base(tmp_path / "base", family)
    model = tune_with_lora(load_model(base, torch.float32, hf_reference.CPU, EVERY), TUNE)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(adapter, model, base_model=str(base.path))
    loaded = from_transformers(base, torch.float32)
    theirs = peft.PeftModel.from_pretrained(loaded, adapter, is_trainable=True).train()
    reference = hf_reference.make_reference_model(make_settings(family))
    found = model.compute_logits(model(hf_reference.pack_conversations(reference, [SAMPLE])))
    expected = hf_reference.reference_logits(theirs.base_model.model, SAMPLE)
    assert hf_reference.max_relative_error(found, expected) <= 1e-5
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {}
    for path, _, group_adapter in iter_adapters(model):
        for output, band in group_adapter.slices.items():
            prefix = f"base_model.model.{to_module_name(hub_name(path, output))}"
            a_gradient = group_adapter.lora_A.grad[band.rank_slice]
            gradients[f"{prefix}.lora_A.default.weight"] = a_gradient
            gradients[f"{prefix}.lora_B.default.weight"] = group_adapter.lora_B[output].grad
    their_gradients = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        assert hf_reference.max_relative_error(gradient, their_gradients[name]) <= 1e-4, name


def test_quantized_model_is_saved_in_base_precision(tmp_path):
    """Saved in another dtype, the codes would differ after reloading."""
    base = make_base(tmp_path / "base", "qwen2_vl", torch.float32, tie_word_embeddings=False)
    parts = ("language", "embeddings")
    model = load_model(base, torch.bfloat16, hf_reference.CPU, parts)
    again = tmp_path / "again"
    again.mkdir()
    save_model(model, base, again, torch.bfloat16, max_shard_bytes=100_000)
    files = ModelFolder(again).weight_files()
    tensors = [tensor for file in files for tensor in load_file(file).values()]
    index = json.loads((again / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16, torch.float32}
    assert ModelFolder(again).config["torch_dtype"] == "float32"
    assert stored_precision(ModelFolder(again)) == "fp32"
    found = load_model(ModelFolder(again), torch.bfloat16, hf_reference.CPU, parts).state_dict()
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    full, baseline = (
        load_model(folder, torch.float32, hf_reference.CPU).state_dict()
        for folder in (ModelFolder(again), base)
    )
    for name in ("model.layers.0.mlp.down_proj.weight", "lm_head.weight"):
        assert torch.equal(full[name], baseline[name])
