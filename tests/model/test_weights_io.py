import json
import weakref
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_reference import (
    CPU,
    make_config,
    make_conversation,
    make_native_model,
    make_reference_model,
    max_relative_error,
    native_logits,
    reference_logits,
    write_model_folder,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from finesight.errors import UserError
from finesight.files.storage import open_tensors, write_folder
from finesight.model import weights_io
from finesight.model.weights_io import (
    build_meta_model,
    hub_tensors,
    load_model,
    save_model,
    stored_precision,
)
from finesight.model_folder import ModelFolder

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"]
SAMPLES = [make_conversation(1, 3, ("image", (1, 10, 12)), 4), make_conversation(2, 9)]


def expected_logits(theirs: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([reference_logits(theirs, sample) for sample in SAMPLES])


def published(folder: Path, settings: dict[str, Any], theirs: Any = None) -> ModelFolder:
    """Write a folder in the hub's format: flat config, published names, two shards."""
    source = write_model_folder(folder, settings, theirs=theirs, max_shard_bytes=60_000)
    (folder / "tokenizer.json").write_text("{}")
    for name in ("merges.txt", "LICENSE", "modeling.py"):
        (folder / name).write_text("raise SystemExit\n")
    return source


@pytest.fixture(params=FAMILIES)
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return make_config(request.param)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("most", [5e9, 200_000])
def test_saved_model_loads_in_transformers(tmp_path, settings, tied, most):
    settings = settings | {"tie_word_embeddings": tied}
    theirs = make_reference_model(settings)
    source = published(tmp_path / "source", settings, theirs)
    target = tmp_path / "target"
    target.mkdir()
    save_model(load_model(source, torch.float32, CPU), source, target, torch.float32, most)
    again = type(theirs).from_pretrained(target, local_files_only=True).eval()
    loaded = again.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in theirs.state_dict().items())
    # The memory alignment of loaded weights may change the order of sums.
    assert max_relative_error(expected_logits(again), expected_logits(theirs)) <= 1e-6
    files = ModelFolder(target).weight_files()
    assert (len(files) > 2) == (most < 1e6)
    assert all(sum(t.nbytes for t in load_file(file).values()) <= most for file in files)
    names = {name for file in files for name in load_file(file)}
    ours = make_native_model(settings, theirs)
    own = {ours.architecture.to_hub_name(tensor.name) for tensor in hub_tensors(ours)}
    assert names == own
    if settings["model_type"].startswith("qwen3_"):
        assert names == set(again.state_dict()) - ({"lm_head.weight"} if tied else set())
    assert ("lm_head.weight" in names) != tied
    assert {path.name for path in target.iterdir() if path.suffix != ".safetensors"} == {
        *("config.json", "preprocessor_config.json", "tokenizer.json", "merges.txt", "LICENSE"),
        *(["model.safetensors.index.json"] if most < 1e6 else []),
    }


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_model_loads(tmp_path, settings, tied):
    settings = settings | {"tie_word_embeddings": tied}
    theirs = make_reference_model(settings)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert len(ModelFolder(tmp_path).weight_files()) > 1
    ours = load_model(ModelFolder(tmp_path), torch.float32, CPU)
    assert ours.config.decoder.tie_word_embeddings == tied
    assert max_relative_error(native_logits(ours, theirs, SAMPLES), expected_logits(theirs)) <= 1e-5


def test_published_and_transformers_5_names_are_equivalent(tmp_path, settings):
    theirs = make_reference_model(settings)
    source = published(tmp_path / "source", settings, theirs)
    expected = native_logits(load_model(source, torch.float32, CPU), theirs, SAMPLES)
    tensors = {n: t for file in source.weight_files() for n, t in load_file(file).items()}
    old = {"visual.": "model.visual.", "model.": "model.language_model."}
    if settings["model_type"].startswith("qwen3_"):
        # Published as transformers 5 writes them; finesight reads the shorter names as well.
        old = {new: short for short, new in old.items()}
    starts = {n: next(start for start in old if n.startswith(start)) for n in tensors}
    renamed = {old[starts[n]] + n.removeprefix(starts[n]): t for n, t in tensors.items()}
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(settings))
    (other / "preprocessor_config.json").write_text("{}")
    save_file(renamed, other / "model.safetensors")
    found = load_model(ModelFolder(other), torch.float32, CPU)
    assert torch.equal(native_logits(found, theirs, SAMPLES), expected)


@pytest.mark.parametrize("inner", [16, 24, 48])
@pytest.mark.parametrize("outputs_first", [True, False])
def test_expert_weights_load_in_either_layout(tmp_path, inner, outputs_first):
    """Includes a layer with one square stack, where only the other shows the layout."""
    settings = make_config("qwen3_vl_moe", moe_intermediate_size=inner)
    theirs = make_reference_model(settings)
    source = published(tmp_path / "source", settings, theirs)
    for file in source.weight_files():
        tensors = load_file(file)
        turned = {n: t.mT.contiguous() for n, t in tensors.items() if t.dim() == 3}
        save_file(tensors | turned if outputs_first else tensors, file)
    found = native_logits(load_model(source, torch.float32, CPU), theirs, SAMPLES)
    assert max_relative_error(found, expected_logits(theirs)) <= 1e-5


def test_tied_lm_head_may_be_stored(tmp_path, settings):
    theirs = make_reference_model(settings)
    source = published(tmp_path / "source", settings, theirs)
    change(source, {"lm_head.weight": torch.zeros(100, 48)})
    found = native_logits(load_model(source, torch.float32, CPU), theirs, SAMPLES)
    assert max_relative_error(found, expected_logits(theirs)) <= 1e-5


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_dtypes_are_converted_while_loading(tmp_path, settings, stored):
    theirs = make_reference_model(settings)
    source = published(tmp_path / "source", settings, theirs)
    target = tmp_path / "target"
    target.mkdir()
    save_model(load_model(source, torch.float32, CPU), source, target, stored)
    fp32_suffixes = make_native_model(settings, theirs).architecture.fp32_suffixes
    dtypes = {n: t.dtype for n, t in load_file(target / "model.safetensors").items()}
    assert {dtypes[n] for n in dtypes if not n.endswith(fp32_suffixes)} == {stored}
    assert {dtypes[n] for n in dtypes if n.endswith(fp32_suffixes)} <= {torch.float32}
    written = json.loads((target / "config.json").read_text())
    assert written["torch_dtype"] == str(stored).removeprefix("torch.")
    loaded = {t.name: t.data for t in hub_tensors(load_model(source, stored, CPU))}
    again = load_model(ModelFolder(target), torch.float32, CPU)
    assert all(torch.equal(t.data, loaded[t.name].float()) for t in hub_tensors(again))


def change(folder: ModelFolder, changes: dict[str, Tensor | None]) -> None:
    """Change tensors in the first file of weights; None removes one."""
    file = folder.weight_files()[0]
    tensors = load_file(file) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


NAME = "visual.patch_embed.proj.weight"


TABLE = torch.zeros(32, 3, 2, 14, 14)
MISMATCHES = {
    f"1 tensors are missing: {NAME}": {NAME: None},
    "6 tensors are unknown to this model: score.0, score.1, score.2, score.3, score.4, ...": {
        f"score.{i}": torch.zeros(1) for i in range(6)
    },
    f"2 tensors are duplicates: model.{NAME}, {NAME}": {f"model.{NAME}": TABLE},
    "2 tensors are duplicates: model.norm.weight, model.norm.weight": {
        "model.norm.weight": torch.ones(48)
    },
    f"1 tensors are of another shape: {NAME} (31, 3, 2, 14, 14) not (32, 3, 2, 14, 14)": {
        NAME: TABLE[1:].clone()
    },
    f"1 tensors are of another type: {NAME} I8": {NAME: TABLE.to(torch.int8)},
}


@pytest.mark.parametrize(("what", "changes"), MISMATCHES.items())
def test_mismatched_weight_file_is_rejected(tmp_path, what, changes):
    source = published(tmp_path / "source", make_config("qwen2_vl"))
    change(source, changes)
    with pytest.raises(UserError) as refused:
        load_model(source, torch.float32, CPU)
    assert refused.value.what == what
    assert str(source.path) in refused.value.where


def test_damaged_file_is_rejected(tmp_path):
    source = published(tmp_path / "source", make_config("qwen2_vl"))
    with write_folder(tmp_path / "merged") as folder:
        save_model(load_model(source, torch.float32, CPU), source, folder, torch.float32)
    file = tmp_path / "merged" / "model.safetensors"
    load_model(ModelFolder(tmp_path / "merged"), torch.float32, CPU)
    content = file.read_bytes()
    damaged = bytearray(content)
    damaged[-3] ^= 1
    for written, message in (
        (damaged, "changed since it was written"),
        *((content[:keep], "not a complete safetensors file") for keep in (0, 5, 200, -1)),
    ):
        file.write_bytes(written)
        with pytest.raises(UserError, match=message) as refused:
            load_model(ModelFolder(tmp_path / "merged"), torch.float32, CPU)
        assert refused.value.where == str(file)
        (tmp_path / "merged" / "sha256.json").unlink(missing_ok=True)


def test_stored_precision(tmp_path):
    source = published(tmp_path / "source", make_config("qwen2_vl"))

    def store(*dtypes: torch.dtype) -> str:
        for file, dtype in zip(source.weight_files(), cycle(dtypes), strict=False):
            save_file({n: t.to(dtype) for n, t in load_file(file).items()}, file)
        return stored_precision(source)

    assert store(torch.float32) == "fp32"
    assert store(torch.bfloat16) == "bf16"
    for other in (torch.float16, torch.float32):
        assert store(other, torch.bfloat16) == "fp32"
    with pytest.raises(UserError, match="weights of type I8"):
        store(torch.int8)


class TensorTracker(TorchDispatchMode):
    """Counts the tracked tensors that are alive in later operations of torch or reads."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[weakref.ref[Tensor]] = []
        self.max_alive = 0

    def track(self, *tensors: Tensor) -> None:
        self.references += map(weakref.ref, tensors)

    def measure(self) -> None:
        alive = [reference for reference in self.references if reference() is not None]
        self.max_alive = max(self.max_alive, len(alive))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.measure()
        return func(*args, **(kwargs or {}))


def test_only_one_shard_is_in_memory(tmp_path, monkeypatch):
    source = published(tmp_path / "source", make_config("qwen2_vl"))
    model = load_model(source, torch.float32, CPU)
    tracker = TensorTracker()

    def save_and_track(content: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        save_file(content, *args, **kwargs)
        tracker.track(*content.values())

    monkeypatch.setattr(weights_io, "save_file", save_and_track)
    target = tmp_path / "target"
    target.mkdir()
    with tracker:
        save_model(model, source, target, torch.float32, 60_000)
    assert len(ModelFolder(target).weight_files()) > 2
    assert len(tracker.references) == len(list(hub_tensors(model)))
    assert tracker.max_alive == 0


class TrackedFile:
    """An open safetensors file that tracks the tensors that are read."""

    def __init__(self, path: Path, tracker: TensorTracker) -> None:
        self._file = open_tensors(path)
        self._tracker = tracker

    def __enter__(self) -> "TrackedFile":
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_tensor(self, name: str) -> Tensor:
        self._tracker.measure()
        tensor = self._file.get_tensor(name)
        self._tracker.track(tensor)
        return tensor


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl_moe"])
def test_only_one_read_tensor_is_in_memory(tmp_path, monkeypatch, family):
    settings = make_config(family)
    theirs = make_reference_model(settings)
    source = published(tmp_path / "source", settings, theirs)
    for file in source.weight_files():
        # Experts with outputs first are transposed while loading.
        turned = {n: t.mT.contiguous() if t.dim() == 3 else t for n, t in load_file(file).items()}
        save_file(turned, file)
    tracker = TensorTracker()
    monkeypatch.setattr(weights_io, "open_tensors", lambda path: TrackedFile(path, tracker))
    model = load_model(source, torch.float32, CPU)
    assert len(tracker.references) == len(list(hub_tensors(model)))
    assert tracker.max_alive == 0
    assert max_relative_error(native_logits(model, theirs, SAMPLES), expected_logits(theirs)) < 1e-5


def test_missing_experts_are_listed_in_the_order_of_the_file(tmp_path):
    settings = make_config("qwen3_5_moe", num_hidden_layers=8, layer_types=["full_attention"] * 8)
    theirs = make_reference_model(settings)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    missing = [name for name in tensors if name.endswith("experts.3.up_proj.weight")]
    save_file({name: tensors[name] for name in tensors.keys() - missing}, file)
    with pytest.raises(UserError, match="8 tensors are missing") as refused:
        load_model(ModelFolder(tmp_path), torch.float32, CPU)
    layers = [f"model.layers.{layer}.mlp.experts.3.up_proj.weight" for layer in range(5)]
    assert ", ".join(layers) in refused.value.what


@pytest.mark.parametrize("bit_format", ["nf4", "fp8"])
def test_error_of_a_tied_head_names_the_format(tmp_path, bit_format):
    source = published(tmp_path / "source", make_config("qwen2_vl"))
    parts = {"nf4_parts": [], "fp8_parts": []} | {f"{bit_format}_parts": ["embeddings"]}
    with pytest.raises(UserError) as refused:
        build_meta_model(source, torch.bfloat16, **parts)
    assert refused.value.where == f"tune.quantize.{bit_format}"
    assert f"embeddings are in {bit_format}" in refused.value.what
    assert f"out of {bit_format}" in refused.value.remedy
