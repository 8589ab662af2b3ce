"""NF4 models: equal to transformers and peft, packed, and saved to folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hf_reference import (
    CPU,
    make_config,
    make_conversation,
    make_native_model,
    make_reference_model,
    max_relative_error,
    pack_conversations,
    reference_logits,
)
from lora_fixtures import FAMILIES as ALL_FAMILIES
from lora_fixtures import merge_to_folder, tune_with_lora
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from finesight.config import TuneSettings
from finesight.errors import UserError
from finesight.model.families.architecture import to_module_name
from finesight.model.linear import FusedLinear, hub_name, iter_adapters
from finesight.model.lora.merge import merge_adapters
from finesight.model.lora.peft_io import save_adapter
from finesight.model.quant import nf4
from finesight.model.quant.base import QuantizedWeight, find_quantized_weights
from finesight.model.quant.nf4 import Nf4Matrix
from finesight.model.trainable import ModelPart, configure_tuning
from finesight.model.vlm import ARCHITECTURES, VisionLanguageModel
from finesight.model.weights_io import hub_tensors, load_model, save_model
from finesight.model_folder import PREPROCESSOR_DEFAULTS, ModelFolder, locate_model
from finesight.train.loss import fused_linear_cross_entropy

FAMILIES = [family for family in ALL_FAMILIES if family != "qwen3_5_moe"]
EVERY: tuple[ModelPart, ...] = ("vision", "merger", "language")
LORA = {"rank": 4, "alpha": 6, "dropout": 0.0}
TUNE = {"language": "lora", "vision": "lora", "merger": "lora", "lora": LORA}
SAMPLE = make_conversation(3, 2, ("image", (1, 10, 14)), 3, ("image", (1, 2, 2)), 4)
SAMPLES = [SAMPLE, make_conversation(1, 11), make_conversation(2, 5, ("image", (1, 4, 6)), 7)]


def make_settings(family: str, **changes: Any) -> dict[str, Any]:
    """Return a config whose widths are multiples of a block.

    bitsandbytes fails with others on a CPU.
    """
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
    return make_config(family, hidden_size=128, intermediate_size=192, vision=own, **more)


def make_base(
    folder: Path, family: str, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> ModelFolder:
    settings = make_settings(family, **changes)
    folder.mkdir()
    kind = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(settings | {"torch_dtype": kind}))
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(PREPROCESSOR_DEFAULTS)))
    save_model(
        make_native_model(settings, make_reference_model(settings)),
        ModelFolder(folder),
        folder,
        dtype,
    )
    return ModelFolder(folder)


def from_transformers(base: ModelFolder, dtype: torch.dtype) -> Any:
    """Load the base model for QLoRA in transformers.

    In training mode: for inference on some CPUs, bitsandbytes always computes in bf16.
    """
    import transformers

    kinds = {
        "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
        "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
        "qwen3_vl": transformers.Qwen3VLForConditionalGeneration,
        "qwen3_5": transformers.Qwen3_5ForConditionalGeneration,
    }
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = kinds[base.family].from_pretrained(
        base.path, quantization_config=four_bits, dtype=dtype, device_map="cpu"
    )
    return model.train()


def logits(model: VisionLanguageModel, samples: list[Any] | None = None) -> Tensor:
    chosen = [SAMPLE] if samples is None else samples
    theirs = make_reference_model(make_settings(model_family(model)))
    return model.compute_logits(model(pack_conversations(theirs, chosen)))


def model_family(model: VisionLanguageModel) -> str:
    (family,) = (name for name, one in ARCHITECTURES.items() if one is model.architecture)
    return family


@torch.no_grad()
def dequantize_model(model: VisionLanguageModel) -> VisionLanguageModel:
    """Replace quantized weights by dense ones in place."""
    for module in model.modules():
        if isinstance(module, FusedLinear) and isinstance(module.weight, QuantizedWeight):
            dense = torch.cat(list(module.weight.dequantize_layers()))
            del module.weight
            module.weight = torch.nn.Parameter(dense, requires_grad=False)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_match_transformers_and_peft(family: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", family)
    model = tune_with_lora(load_model(base, torch.float32, CPU, EVERY), TUNE)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(adapter, model, base_model=str(base.path))
    loaded = from_transformers(base, torch.float32)
    theirs = peft.PeftModel.from_pretrained(loaded, adapter, is_trainable=True)
    theirs.train()

    found = logits(model)
    expected = reference_logits(theirs.base_model.model, SAMPLE)
    assert max_relative_error(found, expected) <= 1e-5
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    their_gradients = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    compared = 0
    for path, _, group_adapter in iter_adapters(model):
        assert group_adapter.lora_A.grad is not None
        for output, band in group_adapter.slices.items():
            prefix = f"base_model.model.{to_module_name(hub_name(path, output))}"
            wanted_a = their_gradients[f"{prefix}.lora_A.default.weight"]
            wanted_b = their_gradients[f"{prefix}.lora_B.default.weight"]
            assert max_relative_error(group_adapter.lora_A.grad[band.rank_slice], wanted_a) <= 1e-4
            assert max_relative_error(group_adapter.lora_B[output].grad, wanted_b) <= 1e-4
            compared += 2
    assert compared == len(their_gradients)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bf16_error_is_not_larger_than_transformers(family: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", family)
    exact = logits(load_model(base, torch.float32, CPU, EVERY))
    ours = logits(load_model(base, torch.bfloat16, CPU, EVERY))
    theirs = reference_logits(from_transformers(base, torch.bfloat16), SAMPLE)
    assert max_relative_error(ours, exact) <= 1.5 * max_relative_error(theirs, exact)
    dense = logits(load_model(base, torch.float32, CPU))
    # 4-bit quantization changes results far more than rounding does.
    assert max_relative_error(exact, dense) > 5 * max_relative_error(ours, exact)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_model_matches_dequantized_bit_exactly(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", family)
    results = []
    for change in (lambda model: model, dequantize_model):
        model = tune_with_lora(change(load_model(base, dtype, CPU, EVERY)), TUNE)
        found = logits(model)
        found.float().square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([found.detach(), *gradients])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_samples_match_single_samples(family: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", family)
    model = tune_with_lora(load_model(base, torch.float32, CPU, EVERY), TUNE)
    supervised = [p for p in model.parameters() if p.requires_grad]
    batched = logits(model, SAMPLES)
    alone = torch.cat([logits(model, [sample]) for sample in SAMPLES])
    assert max_relative_error(batched, alone) <= 1e-5
    weights = torch.randn(alone.shape, generator=torch.Generator().manual_seed(0))
    pairs = zip(
        torch.autograd.grad((batched * weights).sum(), supervised),
        torch.autograd.grad((alone * weights).sum(), supervised),
        strict=True,
    )
    assert max(max_relative_error(found, expected) for found, expected in pairs) <= 1e-4


def bits(model: VisionLanguageModel) -> dict[str, Tensor]:
    return dict(model.named_buffers())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_codes_are_independent_of_compute_dtype(stored: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2_vl", stored)
    first, *others = (
        bits(load_model(base, dtype, CPU, ("language",)))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    )
    assert first
    for other in others:
        assert all(torch.equal(other[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("parts", [("language",), ("vision",), ("vision", "merger")])
def test_only_linear_layers_of_chosen_parts_are_quantized(
    parts: tuple[ModelPart, ...], tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", "qwen2_5_vl")
    model, dense = (load_model(base, torch.bfloat16, CPU, stored) for stored in (parts, ()))
    prefixes = {"language": "model.layers.", "vision": "visual.blocks.", "merger": "visual.merger."}
    chosen = tuple(prefixes[part] for part in parts)
    groups = {n for n, module in dense.named_modules() if isinstance(module, FusedLinear)}
    expected = {f"{name}.weight" for name in groups if name.startswith(chosen)}
    assert set(find_quantized_weights(model)) == expected
    others = dict(model.named_parameters())
    for name, parameter in dense.named_parameters():
        assert name in expected or torch.equal(others[name], parameter)
    shapes = [(tensor.name, tensor.shape) for tensor in hub_tensors(dense)]
    assert [(tensor.name, tensor.shape) for tensor in hub_tensors(model)] == shapes


HEAD: tuple[ModelPart, ...] = ("language", "embeddings")


def test_embeddings_quantize_only_the_lm_head(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2_vl", tie_word_embeddings=False)
    model, dense = (load_model(base, torch.float32, CPU, stored) for stored in (HEAD, ()))
    assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    head = find_quantized_weights(model)["lm_head.weight"]
    assert torch.equal(model.lm_head_weight, next(head.dequantize_layers()))
    off = max_relative_error(model.lm_head_weight, dense.lm_head_weight)
    assert 1e-2 < off < 0.5
    hidden = torch.randn(3, 128)
    assert torch.equal(model.compute_logits(hidden), hidden @ model.lm_head_weight.T)
    again = tmp_path / "again"
    again.mkdir()
    save_model(model, base, again, torch.bfloat16)
    retained = load_model(ModelFolder(again), torch.float32, CPU)
    assert torch.equal(retained.lm_head_weight, dense.lm_head_weight)


def test_lm_head_loss_and_gradients_match_dequantized(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2_vl", tie_word_embeddings=False)
    batch = pack_conversations(make_reference_model(make_settings("qwen2_vl")), SAMPLES)
    batch = replace(batch, logit_indices_L=torch.arange(len(batch.ids_T)), labels_L=batch.ids_T)
    results = []
    for change in (lambda model: model, dequantize_model):
        model = tune_with_lora(change(load_model(base, torch.float32, CPU, HEAD)), TUNE)
        hidden, one = model(batch), torch.tensor(1.0)
        loss = fused_linear_cross_entropy(
            hidden, model.lm_head_weight, batch.labels_L, one, chunk_size=5
        )
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([loss.detach(), *gradients])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_tied_lm_head_is_not_quantized(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2_vl")
    with pytest.raises(
        UserError, match="head of this model is tied to the embedding table"
    ) as refused:
        load_model(base, torch.float32, CPU, HEAD)
    assert refused.value.where == "tune.quantize.nf4"


def test_quantized_memory_is_about_a_quarter() -> None:
    folder = locate_model("finesight-tiny")
    dense, small = (load_model(folder, torch.bfloat16, CPU, four) for four in ((), EVERY))
    retained = sum(buffer.nbytes for buffer in small.buffers())
    was = sum(weight.num_elements for weight in find_quantized_weights(small).values()) * 2
    assert 0.25 < retained / was < 0.262
    full = [sum(p.nbytes for p in [*m.parameters(), *m.buffers()]) for m in (dense, small)]
    assert full[0] - full[1] == was - retained


class LargestTensorMode(TorchDispatchMode):
    """Records the number of elements of the largest floating-point tensor of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            real = isinstance(tensor, Tensor) and tensor.device.type != "meta"
            if real and tensor.is_floating_point():
                self.most = max(self.most, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return made


def test_loading_holds_one_dense_matrix_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a CPU bitsandbytes compares every element with all 16 values at once.
    monkeypatch.setattr(nf4, "CHUNK_ELEMENTS", 64)
    base = make_base(tmp_path / "base", "qwen2_vl")
    with LargestTensorMode() as four_bits:
        model = load_model(base, torch.bfloat16, CPU, EVERY)
    published = [t.num_elements for t in hub_tensors(model)]
    with LargestTensorMode() as dense:
        load_model(base, torch.bfloat16, CPU)
    # The fused gate_proj and up_proj are the largest parameter of the dense model.
    assert four_bits.most <= max(published)
    groups = [m.weight for m in model.modules() if isinstance(m, FusedLinear)]
    assert all(isinstance(weight, QuantizedWeight) for weight in groups)
    assert dense.most >= 2 * 192 * 128


def test_quantized_model_is_saved_in_base_precision(tmp_path: Path) -> None:
    """Saved in another dtype, the codes would differ after reloading."""
    base = make_base(tmp_path / "base", "qwen2_vl", torch.float32)
    model = load_model(base, torch.bfloat16, CPU, ("language",))
    again = tmp_path / "again"
    again.mkdir()
    save_model(model, base, again, torch.bfloat16, max_shard_bytes=100_000)
    copy = load_model(ModelFolder(again), torch.bfloat16, CPU, ("language",))
    found, expected = copy.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    full, baseline = (load_model(f, torch.float32, CPU) for f in (ModelFolder(again), base))
    expected_rows = dict(baseline.named_parameters())["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(
        dict(full.named_parameters())["model.layers.0.mlp.down_proj.weight"], expected_rows
    )


def test_merged_model_has_published_weights(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2_vl")
    model = tune_with_lora(load_model(base, torch.float32, CPU, ("language",)), {"lora": LORA})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(adapter, model, base_model=str(base.path), base_fingerprint=base.fingerprint())
    merged = merge_to_folder(base, adapter, tmp_path / "merged", "fp32")
    here = load_model(ModelFolder(merged.folder), torch.float32, CPU)
    dense = tune_with_lora(load_model(base, torch.float32, CPU), {"lora": LORA})
    with torch.no_grad():
        assert max_relative_error(logits(here), logits(dense)) <= 1e-5
        # The difference is only that of the quantization.
        off = max_relative_error(logits(model), logits(dense))
        assert off > 1e-2
        assert max_relative_error(logits(model), logits(here)) == pytest.approx(off, rel=1e-3)
    with pytest.raises(AssertionError, match="is quantized"):
        merge_adapters(model)


def test_already_quantized_weights_are_rejected(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2_vl")
    path = base.path / "config.json"
    content = json.loads(path.read_text()) | {"quantization_config": {"load_in_4bit": True}}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"without quantization; tune\.quantize\.nf4=\[language\]"):
        load_model(ModelFolder(base.path), torch.float32, CPU, ("language",))


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_matches_cpu(family: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", family)
    card = torch.device("cuda")
    here = tune_with_lora(load_model(base, torch.float32, CPU, EVERY), TUNE)
    there = load_model(base, torch.float32, card, EVERY)
    configure_tuning(there, TuneSettings.model_validate(TUNE), seed=0)
    own = dict(here.named_parameters())
    for name, parameter in there.named_parameters():
        parameter.data.copy_(own[name].data)
    for name, buffer in here.named_buffers():
        if buffer.dtype == torch.uint8:
            changed = int((buffer != dict(there.named_buffers())[name].cpu()).sum())
            # Another summation order of a mean may change a scale by one code.
            assert changed <= max(2, buffer.numel() // 25)
    theirs = make_reference_model(make_settings(family))
    batch = pack_conversations(theirs, SAMPLES)
    with torch.no_grad():
        expected = here.compute_logits(here(batch))
        found = there.compute_logits(there(batch.to(card))).cpu()
    assert max_relative_error(found, expected) < 2e-2


@pytest.mark.gpu
def test_gpu_loading_peak_is_below_the_dense_model(tmp_path: Path) -> None:
    folder, card = locate_model("finesight-tiny"), torch.device("cuda")
    peaks = []
    for four in (EVERY, ()):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model = load_model(folder, torch.bfloat16, card, four)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert any(isinstance(m, Nf4Matrix) for m in model.modules()) == bool(four)
        del model
    assert peaks[0] < 0.5 * peaks[1]
