"""Whole models in NF4: as transformers and peft compute them, packed, and in and out of folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracle import CPU, config, conversation, distance, native, packed, reference, reference_logits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tuned import FAMILIES, tuned

from finesight.config import Tune
from finesight.errors import UserError
from finesight.hub import PREPROCESSOR_DEFAULTS, ModelFolder, locate
from finesight.model import nf4
from finesight.model.adapter import write_adapter
from finesight.model.frozen import FrozenWeight, frozen_weights
from finesight.model.linear import GroupedLinear
from finesight.model.lora import adapters, hub_name
from finesight.model.merge import merge_folder, merge_into
from finesight.model.network import FAMILIES as ARCHITECTURES
from finesight.model.network import VisionLanguageModel
from finesight.model.nf4 import Nf4Matrix
from finesight.model.parts import Part, apply_tuning
from finesight.model.peft_config import module_name
from finesight.model.weights import hub_tensors, load_model, save_model
from finesight.train.loss import label_loss

EVERY: tuple[Part, ...] = ("vision", "merger", "language")
LORA = {"rank": 4, "alpha": 6, "dropout": 0.0}
TUNE = {"language": "lora", "vision": "lora", "merger": "lora", "lora": LORA}
SAMPLE = conversation(3, 2, ("image", (1, 10, 14)), 3, ("image", (1, 2, 2)), 4)
SAMPLES = [SAMPLE, conversation(1, 11), conversation(2, 5, ("image", (1, 4, 6)), 7)]


def settings_of(family: str, **changes: Any) -> dict[str, Any]:
    """Widths that are multiples of a block: with others bitsandbytes is wrong on a CPU."""
    own = {"embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2}
    if family != "qwen2_vl":
        own = {"hidden_size": 64, "out_hidden_size": 128, "intermediate_size": 128}
    more: dict[str, Any] = {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
    if family == "qwen3_vl":
        more = {"rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5]}}
        more |= {"head_dim": 32}
    more |= changes
    return config(family, hidden_size=128, intermediate_size=192, vision=own, **more)


def make_base(
    folder: Path, family: str, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> ModelFolder:
    settings = settings_of(family, **changes)
    folder.mkdir()
    kind = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(settings | {"torch_dtype": kind}))
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(PREPROCESSOR_DEFAULTS)))
    save_model(native(settings, reference(settings)), ModelFolder(folder), folder, dtype)
    return ModelFolder(folder)


def from_transformers(base: ModelFolder, dtype: torch.dtype) -> Any:
    """As its users load it for Q-LoRA. In training mode, since for answers on some processors
    bitsandbytes computes in bf16 whatever it is told."""
    import transformers

    kinds = {
        "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
        "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
        "qwen3_vl": transformers.Qwen3VLForConditionalGeneration,
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
    theirs = reference(settings_of(model_family(model)))
    return model.logits(model(packed(theirs, chosen)))


def model_family(model: VisionLanguageModel) -> str:
    (family,) = (name for name, one in ARCHITECTURES.items() if one is model.architecture)
    return family


@torch.no_grad()
def dequantised(model: VisionLanguageModel) -> VisionLanguageModel:
    """The same numbers in dense weights, in place."""
    for module in model.modules():
        if isinstance(module, GroupedLinear) and isinstance(module.weight, FrozenWeight):
            dense = torch.cat(list(module.weight.dense()))
            del module.weight
            module.weight = torch.nn.Parameter(dense, requires_grad=False)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_adapter_gradients_are_those_of_transformers_and_peft(
    family: str, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", family)
    model = tuned(load_model(base, torch.float32, CPU, EVERY), TUNE)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(adapter, model, base=str(base.path))
    loaded = from_transformers(base, torch.float32)
    theirs = peft.PeftModel.from_pretrained(loaded, adapter, is_trainable=True)
    theirs.train()

    found = logits(model)
    expected = reference_logits(theirs.base_model.model, SAMPLE)
    assert distance(found, expected) <= 1e-5
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    their_gradients = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    compared = 0
    for path, _, group_adapter in adapters(model):
        assert group_adapter.a.grad is not None
        for output, band in group_adapter.bands.items():
            prefix = f"base_model.model.{module_name(hub_name(path, output))}"
            wanted_a = their_gradients[f"{prefix}.lora_A.default.weight"]
            wanted_b = their_gradients[f"{prefix}.lora_B.default.weight"]
            assert distance(group_adapter.a.grad[band.rows], wanted_a) <= 1e-4
            assert distance(group_adapter.b[output].grad, wanted_b) <= 1e-4
            compared += 2
    assert compared == len(their_gradients)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_in_bf16_it_differs_from_transformers_no_more_than_rounding(
    family: str, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", family)
    exact = logits(load_model(base, torch.float32, CPU, EVERY))
    ours = logits(load_model(base, torch.bfloat16, CPU, EVERY))
    theirs = reference_logits(from_transformers(base, torch.bfloat16), SAMPLE)
    assert distance(ours, exact) <= 1.5 * distance(theirs, exact)
    dense = logits(load_model(base, torch.float32, CPU))
    # Four bits change far more than rounding does.
    assert distance(exact, dense) > 5 * distance(ours, exact)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_computes_as_with_the_dense_numbers_to_the_last_bit(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", family)
    results = []
    for change in (lambda model: model, dequantised):
        model = tuned(change(load_model(base, dtype, CPU, EVERY)), TUNE)
        found = logits(model)
        found.float().square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([found.detach(), *gradients])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_is_computed_as_its_samples_alone(family: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", family)
    model = tuned(load_model(base, torch.float32, CPU, EVERY), TUNE)
    learned = [p for p in model.parameters() if p.requires_grad]
    together = logits(model, SAMPLES)
    alone = torch.cat([logits(model, [sample]) for sample in SAMPLES])
    assert distance(together, alone) <= 1e-5
    weights = torch.randn(alone.shape, generator=torch.Generator().manual_seed(0))
    pairs = zip(
        torch.autograd.grad((together * weights).sum(), learned),
        torch.autograd.grad((alone * weights).sum(), learned),
        strict=True,
    )
    assert max(distance(found, expected) for found, expected in pairs) <= 1e-4


def bits(model: VisionLanguageModel) -> dict[str, Tensor]:
    return dict(model.named_buffers())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_the_bits_do_not_hang_on_what_is_computed_in(stored: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2_vl", stored)
    first, *others = (
        bits(load_model(base, dtype, CPU, ("language",)))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    )
    assert first
    for other in others:
        assert all(torch.equal(other[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("parts", [("language",), ("vision",), ("vision", "merger")])
def test_only_the_linear_layers_of_the_chosen_parts_are_in_four_bits(
    parts: tuple[Part, ...], tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", "qwen2_5_vl")
    model, dense = (load_model(base, torch.bfloat16, CPU, kept) for kept in (parts, ()))
    prefixes = {"language": "model.layers.", "vision": "visual.blocks.", "merger": "visual.merger."}
    chosen = tuple(prefixes[part] for part in parts)
    groups = {n for n, module in dense.named_modules() if isinstance(module, GroupedLinear)}
    expected = {f"{name}.weight" for name in groups if name.startswith(chosen)}
    assert set(frozen_weights(model)) == expected
    others = dict(model.named_parameters())
    for name, parameter in dense.named_parameters():
        assert name in expected or torch.equal(others[name], parameter)
    shapes = [(tensor.name, tensor.shape) for tensor in hub_tensors(dense)]
    assert [(tensor.name, tensor.shape) for tensor in hub_tensors(model)] == shapes


HEAD: tuple[Part, ...] = ("language", "embeddings")


def test_of_the_embeddings_the_head_alone_is_in_four_bits(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2_vl", tie_word_embeddings=False)
    model, dense = (load_model(base, torch.float32, CPU, kept) for kept in (HEAD, ()))
    assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    head = frozen_weights(model)["lm_head.weight"]
    assert torch.equal(model.head_weight, next(head.dense()))
    off = distance(model.head_weight, dense.head_weight)
    assert 1e-2 < off < 0.5
    hidden = torch.randn(3, 128)
    assert torch.equal(model.logits(hidden), hidden @ model.head_weight.T)
    again = tmp_path / "again"
    again.mkdir()
    save_model(model, base, again, torch.bfloat16)
    kept = load_model(ModelFolder(again), torch.float32, CPU)
    assert torch.equal(kept.head_weight, dense.head_weight)


def test_the_loss_and_its_gradients_are_those_of_the_head_s_dense_numbers(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2_vl", tie_word_embeddings=False)
    batch = packed(reference(settings_of("qwen2_vl")), SAMPLES)
    batch = replace(batch, predict_L=torch.arange(len(batch.ids_T)), target_L=batch.ids_T)
    results = []
    for change in (lambda model: model, dequantised):
        model = tuned(change(load_model(base, torch.float32, CPU, HEAD)), TUNE)
        hidden, one = model(batch), torch.tensor(1.0)
        loss = label_loss(hidden, model.head_weight, batch.target_L, one, rows=5)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([loss.detach(), *gradients])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_a_tied_head_is_not_quantised(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2_vl")
    with pytest.raises(UserError, match="head is the table of its embeddings") as refused:
        load_model(base, torch.float32, CPU, HEAD)
    assert refused.value.where == "tune.nf4"


def test_frozen_weights_of_the_own_model_take_about_a_quarter() -> None:
    folder = locate("finesight-tiny")
    dense, small = (load_model(folder, torch.bfloat16, CPU, four) for four in ((), EVERY))
    kept = sum(buffer.nbytes for buffer in small.buffers())
    was = sum(weight.numbers for weight in frozen_weights(small).values()) * 2
    assert 0.25 < kept / was < 0.262
    whole = [sum(p.nbytes for p in [*m.parameters(), *m.buffers()]) for m in (dense, small)]
    assert whole[0] - whole[1] == was - kept


class Largest(TorchDispatchMode):
    """Counts the floating numbers of the largest tensor that any operation makes."""

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


def test_loading_never_holds_more_than_one_published_matrix_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a CPU bitsandbytes compares every number with all 16 values at once.
    monkeypatch.setattr(nf4, "AT_ONCE", 64)
    base = make_base(tmp_path / "base", "qwen2_vl")
    with Largest() as four_bits:
        model = load_model(base, torch.bfloat16, CPU, EVERY)
    published = [t.numbers for t in hub_tensors(model)]
    with Largest() as dense:
        load_model(base, torch.bfloat16, CPU)
    # A group of two, gate_proj and up_proj, is the largest parameter of the dense model.
    assert four_bits.most <= max(published)
    groups = [m.weight for m in model.modules() if isinstance(m, GroupedLinear)]
    assert all(isinstance(weight, FrozenWeight) for weight in groups)
    assert dense.most >= 2 * 192 * 128


def test_a_model_in_four_bits_is_saved_as_its_base_holds_it(tmp_path: Path) -> None:
    """In the base's type: written in another, its four bits would be others when read again."""
    base = make_base(tmp_path / "base", "qwen2_vl", torch.float32)
    model = load_model(base, torch.bfloat16, CPU, ("language",))
    again = tmp_path / "again"
    again.mkdir()
    save_model(model, base, again, torch.bfloat16, max_shard_bytes=100_000)
    copy = load_model(ModelFolder(again), torch.bfloat16, CPU, ("language",))
    found, expected = copy.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    whole, plain = (load_model(f, torch.float32, CPU) for f in (ModelFolder(again), base))
    expected_rows = dict(plain.named_parameters())["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(
        dict(whole.named_parameters())["model.layers.0.mlp.down_proj.weight"], expected_rows
    )


def test_the_merged_model_has_the_published_weights_and_answers_nearly_so(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2_vl")
    model = tuned(load_model(base, torch.float32, CPU, ("language",)), {"lora": LORA})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(adapter, model, base=str(base.path), base_fingerprint=base.fingerprint())
    merged = merge_folder(base, adapter, tmp_path / "merged", "fp32")
    here = load_model(ModelFolder(merged.folder), torch.float32, CPU)
    dense = tuned(load_model(base, torch.float32, CPU), {"lora": LORA})
    with torch.no_grad():
        assert distance(logits(here), logits(dense)) <= 1e-5
        # The difference is that of the four bits, no more.
        off = distance(logits(model), logits(dense))
        assert off > 1e-2
        assert distance(logits(model), logits(here)) == pytest.approx(off, rel=1e-3)
    with pytest.raises(AssertionError, match="is in few bits"):
        merge_into(model)


def test_weights_that_are_quantised_already_are_refused_with_what_to_do(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2_vl")
    path = base.path / "config.json"
    content = json.loads(path.read_text()) | {"quantization_config": {"load_in_4bit": True}}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"without quantisation: tune\.nf4=\[language\]"):
        load_model(ModelFolder(base.path), torch.float32, CPU, ("language",))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_card_computes_what_a_cpu_does(family: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", family)
    card = torch.device("cuda")
    here = tuned(load_model(base, torch.float32, CPU, EVERY), TUNE)
    there = load_model(base, torch.float32, card, EVERY)
    apply_tuning(there, Tune.model_validate(TUNE), seed=0)
    own = dict(here.named_parameters())
    for name, parameter in there.named_parameters():
        parameter.data.copy_(own[name].data)
    for name, buffer in here.named_buffers():
        if buffer.dtype == torch.uint8:
            moved = int((buffer != dict(there.named_buffers())[name].cpu()).sum())
            # A mean that is added up in another order may move a scale by one.
            assert moved <= max(2, buffer.numel() // 25)
    theirs = reference(settings_of(family))
    batch = packed(theirs, SAMPLES)
    with torch.no_grad():
        expected = here.logits(here(batch))
        found = there.logits(there(batch.to(card))).cpu()
    assert distance(found, expected) < 2e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_loading_on_a_card_peaks_below_the_dense_model(tmp_path: Path) -> None:
    folder, card = locate("finesight-tiny"), torch.device("cuda")
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
