from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import CPU, config, conversation, distance, native, packed, reference, reference_logits
from safetensors.torch import load_file, save_file
from torch import Tensor

from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.model.merge import merge_folder
from finesight.model.network import VisionLanguageModel
from finesight.model.tiny import make_tiny
from finesight.model.weights import (
    hub_tensors,
    load_model,
    random_model,
    save_model,
    stored_precision,
)
from finesight.storage import write_folder

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]
SAMPLES = [conversation(1, 3, ("image", (1, 10, 12)), 4), conversation(2, 9)]


def logits(model: VisionLanguageModel, theirs: Any) -> Tensor:
    with torch.no_grad():
        return model.logits(model(packed(theirs, SAMPLES)))


def expected_logits(theirs: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([reference_logits(theirs, sample) for sample in SAMPLES])


def published(folder: Path, settings: dict[str, Any], theirs: Any) -> ModelFolder:
    """A folder as the hub has it: flat configuration, published names, two shards."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**settings, "torch_dtype": "float32"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "merges.txt").write_text("a b\n")
    (folder / "LICENSE").write_text("as you like\n")
    (folder / "modeling.py").write_text("raise SystemExit\n")
    save_model(native(settings, theirs), ModelFolder(folder), folder, torch.float32, 60_000)
    return ModelFolder(folder)


@pytest.fixture(params=FAMILIES)
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return config(request.param)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("most", [5e9, 200_000])
def test_what_is_saved_loads_in_transformers(
    tmp_path: Path, settings: dict[str, Any], tied: bool, most: float
) -> None:
    settings = settings | {"tie_word_embeddings": tied}
    theirs = reference(settings)
    source = published(tmp_path / "source", settings, theirs)
    target = tmp_path / "target"
    target.mkdir()
    save_model(load_model(source, torch.float32, CPU), source, target, torch.float32, most)
    again = type(theirs).from_pretrained(target, local_files_only=True).eval()
    assert distance(expected_logits(again), expected_logits(theirs)) == 0
    files = ModelFolder(target).weight_files()
    assert (len(files) > 2) == (most < 1e6)
    assert all(sum(t.nbytes for t in load_file(file).values()) <= most for file in files)
    names = {name for file in files for name in load_file(file)}
    ours = native(settings, theirs)
    own = {ours.architecture.published_name(tensor.name) for tensor in hub_tensors(ours)}
    assert names == own
    if settings["model_type"].startswith("qwen3_vl"):
        assert names == set(again.state_dict()) - ({"lm_head.weight"} if tied else set())
    assert ("lm_head.weight" in names) != tied
    assert {path.name for path in target.iterdir() if path.suffix != ".safetensors"} == {
        *("config.json", "preprocessor_config.json", "tokenizer.json", "merges.txt", "LICENSE"),
        *(["model.safetensors.index.json"] if most < 1e6 else []),
    }


@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saves_loads_here(
    tmp_path: Path, settings: dict[str, Any], tied: bool
) -> None:
    settings = settings | {"tie_word_embeddings": tied}
    theirs = reference(settings)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert len(ModelFolder(tmp_path).weight_files()) > 1
    ours = load_model(ModelFolder(tmp_path), torch.float32, CPU)
    assert ours.geometry.language.tied == tied
    assert distance(logits(ours, theirs), expected_logits(theirs)) <= 1e-5


def test_published_names_and_those_of_transformers_5_are_one_model(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    theirs = reference(settings)
    source = published(tmp_path / "source", settings, theirs)
    expected = logits(load_model(source, torch.float32, CPU), theirs)
    tensors = {n: t for file in source.weight_files() for n, t in load_file(file).items()}
    old = {"visual.": "model.visual.", "model.": "model.language_model."}
    if settings["model_type"].startswith("qwen3_vl"):
        # Published as transformers 5 writes them; finesight reads the shorter names too.
        old = {new: short for short, new in old.items()}
    starts = {n: next(start for start in old if n.startswith(start)) for n in tensors}
    renamed = {old[starts[n]] + n.removeprefix(starts[n]): t for n, t in tensors.items()}
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(settings))
    (other / "preprocessor_config.json").write_text("{}")
    save_file(renamed, other / "model.safetensors")
    found = load_model(ModelFolder(other), torch.float32, CPU)
    assert torch.equal(logits(found, theirs), expected)


@pytest.mark.parametrize("inner", [16, 24, 48])
@pytest.mark.parametrize("outputs_first", [True, False])
def test_experts_are_read_in_either_order(tmp_path: Path, inner: int, outputs_first: bool) -> None:
    """Also where one of a layer's stacks is square, and only the other one says which it is."""
    settings = config("qwen3_vl_moe", moe_intermediate_size=inner)
    theirs = reference(settings)
    source = published(tmp_path / "source", settings, theirs)
    for file in source.weight_files():
        tensors = load_file(file)
        turned = {n: t.mT.contiguous() for n, t in tensors.items() if t.dim() == 3}
        save_file(tensors | turned if outputs_first else tensors, file)
    found = logits(load_model(source, torch.float32, CPU), theirs)
    assert distance(found, expected_logits(theirs)) <= 1e-5


def test_the_tiny_model_s_experts_tell_inputs_from_outputs(tmp_path: Path) -> None:
    folder = ModelFolder(make_tiny(tmp_path / "tiny", "qwen3_vl_moe"))
    shapes = [t.shape for file in folder.weight_files() for t in load_file(file).values()]
    stacks = [shape for shape in shapes if len(shape) == 3]
    assert len(stacks) == 4
    assert all(inputs != outputs for _, inputs, outputs in stacks)


def test_a_tied_head_may_be_written_out(tmp_path: Path, settings: dict[str, Any]) -> None:
    theirs = reference(settings)
    source = published(tmp_path / "source", settings, theirs)
    change(source, lambda tensors: {**tensors, "lm_head.weight": torch.zeros(100, 48)})
    assert (
        distance(logits(load_model(source, torch.float32, CPU), theirs), expected_logits(theirs))
        <= 1e-5
    )


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_types_are_converted_on_the_way(
    tmp_path: Path, settings: dict[str, Any], stored: torch.dtype
) -> None:
    theirs = reference(settings)
    source = published(tmp_path / "source", settings, theirs)
    target = tmp_path / "target"
    target.mkdir()
    save_model(load_model(source, torch.float32, CPU), source, target, stored)
    assert {t.dtype for t in load_file(target / "model.safetensors").values()} == {stored}
    written = json.loads((target / "config.json").read_text())
    assert written["torch_dtype"] == str(stored).removeprefix("torch.")
    loaded = {t.name: t.data for t in hub_tensors(load_model(source, stored, CPU))}
    again = load_model(ModelFolder(target), torch.float32, CPU)
    assert all(torch.equal(t.data, loaded[t.name].float()) for t in hub_tensors(again))


def change(folder: ModelFolder, how: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Rewrite the first weight file."""
    file = folder.weight_files()[0]
    save_file(how(load_file(file)), file)
    return file


NAME = "visual.patch_embed.proj.weight"


@pytest.mark.parametrize(
    ("how", "what"),
    [
        (
            lambda tensors: {n: t for n, t in tensors.items() if n != NAME},
            f"1 tensors are missing: {NAME}",
        ),
        (
            lambda tensors: {**tensors, **{f"score.{i}": torch.zeros(1) for i in range(6)}},
            "6 tensors are unknown to this model: score.0, score.1, score.2, score.3, score.4, ...",
        ),
        (
            lambda tensors: {**tensors, f"model.{NAME}": torch.zeros_like(tensors[NAME])},
            f"2 tensors are there twice: model.{NAME}, {NAME}",
        ),
        (
            lambda tensors: {**tensors, "model.norm.weight": torch.ones(48)},
            "2 tensors are there twice: model.norm.weight, model.norm.weight",
        ),
        (
            lambda tensors: {**tensors, NAME: tensors[NAME][:-1].contiguous()},
            f"1 tensors are of another shape: {NAME} (31, 3, 2, 14, 14) not (32, 3, 2, 14, 14)",
        ),
        (
            lambda tensors: {**tensors, NAME: tensors[NAME].to(torch.int8)},
            f"1 tensors are of another type: {NAME} I8",
        ),
    ],
    ids=["missing", "unknown", "twice in a file", "twice in two", "shape", "type"],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, how: Any, what: str) -> None:
    settings = config("qwen2_vl")
    source = published(tmp_path / "source", settings, reference(settings))
    change(source, how)
    with pytest.raises(UserError) as refused:
        load_model(source, torch.float32, CPU)
    assert refused.value.what == what
    assert str(source.path) in refused.value.where
    assert refused.value.expected
    assert refused.value.remedy


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_cut_file_is_refused(tmp_path: Path, keep: int) -> None:
    settings = config("qwen2_vl")
    source = published(tmp_path / "source", settings, reference(settings))
    file = source.weight_files()[1]
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="not a whole safetensors file") as refused:
        load_model(source, torch.float32, CPU)
    assert refused.value.where == str(file)


def test_a_flipped_bit_in_a_folder_from_here_is_refused(tmp_path: Path) -> None:
    settings = config("qwen2_vl")
    source = published(tmp_path / "source", settings, reference(settings))
    with write_folder(tmp_path / "merged") as folder:
        save_model(load_model(source, torch.float32, CPU), source, folder, torch.float32)
    load_model(ModelFolder(tmp_path / "merged"), torch.float32, CPU)
    file = tmp_path / "merged" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="changed since it was written") as refused:
        load_model(ModelFolder(tmp_path / "merged"), torch.float32, CPU)
    assert refused.value.where == str(file)


def test_quantised_weights_are_refused_as_such(tmp_path: Path) -> None:
    settings = config("qwen2_vl")
    source = published(tmp_path / "source", settings, reference(settings))
    quantised = settings | {"quantization_config": {"quant_method": "awq"}}
    (source.path / "config.json").write_text(json.dumps(quantised))
    for read in (lambda s: load_model(s, torch.float32, CPU), stored_precision):
        with pytest.raises(UserError, match=r"quantised weights.*awq"):
            read(ModelFolder(source.path))


def test_the_stored_precision_is_that_of_every_tensor_or_fp32(tmp_path: Path) -> None:
    settings = config("qwen2_vl")
    source = published(tmp_path / "source", settings, reference(settings))
    assert stored_precision(source) == "fp32"
    for file in source.weight_files():
        save_file({n: t.bfloat16() for n, t in load_file(file).items()}, file)
    assert stored_precision(source) == "bf16"
    for other in (torch.float16, torch.float32):
        change(source, lambda tensors, to=other: {n: t.to(to) for n, t in tensors.items()})
        assert stored_precision(source) == "fp32"
    for file in source.weight_files():
        save_file({n: t.to(torch.int8) for n, t in load_file(file).items()}, file)
    with pytest.raises(UserError, match="weights of type I8"):
        stored_precision(source)
    for file in source.weight_files():
        save_file({}, file)
    with pytest.raises(UserError, match="weights of type none"):
        stored_precision(source)


def test_what_is_saved_in_several_types_is_counted_and_told(tmp_path: Path) -> None:
    """Four bits are written as they were published, the rest in the type of the run."""
    settings = config("qwen2_vl")
    base = published(tmp_path / "base", settings, reference(settings))
    (tmp_path / "saved").mkdir()
    model = load_model(base, torch.float16, CPU, ["language"])
    save_model(model, base, tmp_path / "saved", torch.float16, max_shard_bytes=80_000)
    saved = ModelFolder(tmp_path / "saved")
    tensors = [list(load_file(file).values()) for file in saved.weight_files()]
    sizes = [sum(tensor.nbytes for tensor in some) for some in tensors]
    index = json.loads((saved.path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert max(sizes) <= 80_000
    assert {t.dtype for some in tensors for t in some} == {torch.float16, torch.float32}
    assert saved.config["torch_dtype"] == "float32"
    assert merge_folder(saved, None, tmp_path / "merged").precision == "fp32"


def test_saving_with_an_adapter_would_lose_it(tmp_path: Path) -> None:
    settings = config("qwen2_vl")
    model = native(settings, reference(settings))
    model.model.layers[0].mlp.down_proj.adapter = torch.nn.Identity()
    with pytest.raises(AssertionError, match="1 groups still carry an adapter"):
        save_model(model, ModelFolder(tmp_path), tmp_path, torch.float32)


def test_random_models_follow_their_seed(settings: dict[str, Any]) -> None:
    first, same, other = (
        random_model(settings, seed, torch.bfloat16, CPU).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    weight = "model.layers.0.self_attn.qkv_proj.weight"
    assert not torch.equal(first[weight], other[weight])
    assert first[weight].float().std().item() == pytest.approx(0.02, rel=0.05)
    assert set(first["model.norm.weight"].tolist()) == {1.0}
    norm = "norm" if settings["model_type"].startswith("qwen3_vl") else "ln_q"
    assert first[f"visual.merger.{norm}.weight"].unique().tolist() == [1.0]
