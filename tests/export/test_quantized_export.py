"""Runs exported with 4-bit weights: by auto-round, and by a stand-in where it is not installed."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gptq_fixtures import GptqConfig, change_config, write_quantized_model
from safetensors.torch import load_file
from tiny_model import create_tiny_model
from tiny_task import make_task, write_recipe

from finesight.encode.packing import pack
from finesight.errors import UserError
from finesight.export import quantized_export
from finesight.export.quantized_export import (
    QuantizedExport,
    export_quantized,
    select_group_size,
    to_hf_inputs,
)
from finesight.files.storage import verify_folder
from finesight.infer.model_loader import load_inference_model, resolve_model_source
from finesight.model.lora.merge import dequantize_model
from finesight.model_folder import ModelFolder
from finesight.progress import ProgressConsole
from finesight.samples.corpus import load_corpus
from finesight.settings.recipe import load_recipe
from finesight.train.training_run import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an adapter on all parts, and a metric."""
    folder = tmp_path_factory.mktemp("task")
    recipe = make_task(folder) | {"output_dir": str(folder / "run")}
    recipe["eval"] = {"metric": "qa", "max_new_tokens": 4}
    train(load_recipe(write_recipe(folder / "recipe.yaml", recipe, steps=1, epochs=None)))
    return folder / "run"


def export(run: Path, out: Path, **options: Any) -> QuantizedExport:
    source = resolve_model_source(str(run))
    settings = {"device": "cpu", "num_samples": 3} | options
    return export_quantized(str(run), source, out, ProgressConsole(), **settings)


class RoundToNearest:
    """Stand-in for `auto_round.AutoRound` that computes one sample and rounds to nearest."""

    def __init__(self, model: Any, *, dataset: Any, group_size: int, **options: Any) -> None:
        assert options["nsamples"] == len(dataset)
        assert torch.isfinite(model(**dataset[0]).logits).all()
        self.folder, self.group_size = ModelFolder(Path(model.name_or_path)), group_size

    def quantize_and_save(self, out: str, format: str) -> None:
        assert format == "auto_gptq"
        write_quantized_model(self.folder, Path(out), GptqConfig(self.group_size))
        shutil.rmtree(Path(out) / "dense")


def check_folder(result: QuantizedExport, run: Path) -> None:
    """The folder is complete, and equals the merged model except for the packed layers."""
    folder = result.folder
    verify_folder(folder)
    record = json.loads((folder / "quantization.json").read_text())
    assert record["num_layers"] == result.num_layers == 14
    assert {one["name"] for one in record["differences"]} >= {"exact"}
    card = (folder / "README.md").read_text()
    assert f"# {folder.name}\n" in card
    assert "\n".join(result.format_lines()) in card
    tensors = load_file(folder / "model.safetensors")
    base = load_file(Path(load_recipe(run / "recipe.yaml").model) / "model.safetensors")
    assert sum(name.endswith(".qweight") for name in tensors) == 14
    missing = {name for name in base if name not in tensors}
    assert {name.rpartition(".")[0] + ".qweight" for name in missing} <= tensors.keys()
    assert all(tensors[name].dtype == base[name].dtype for name in base if name in tensors)
    assert not [name for name in missing if name.startswith("visual.")]
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_packed_layers_replace_those_of_the_merged_model(run, tmp_path, monkeypatch):
    stand_in = SimpleNamespace(AutoRound=RoundToNearest)
    monkeypatch.setattr(quantized_export, "import_auto_round", lambda: stand_in)
    monkeypatch.setattr(quantized_export, "version", lambda name: "0")
    check_folder(export(run, tmp_path / "tiny-w4a16"), run)


def test_transformers_computes_the_same_logits_from_the_folder(run, tmp_path):
    """transformers reads the packed tensors through auto-round, finesight by itself."""
    pytest.importorskip("auto_round", reason="the extra quantize is not installed")
    import transformers

    result = export(run, tmp_path / "tiny-w4a16", iterations=2)
    check_folder(result, run)
    ours = load_inference_model(str(result.folder), "cpu", "fp32").model
    assert dequantize_model(ours) == 14
    source = resolve_model_source(str(result.folder))
    change_config(
        source.folder,
        quantization_config={
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "block_name_to_quantize": "model.language_model.layers",
            **{"bits": 4, "group_size": result.group_size, "sym": True, "data_type": "int"},
        },
    )
    load = transformers.AutoModelForImageTextToText.from_pretrained
    theirs = load(result.folder, dtype=torch.float32).eval()
    sample = load_corpus(load_recipe(run / "recipe.yaml").data.eval)[0]
    encoded = source.build_renderer().encode(sample)
    batch = pack([encoded])
    with torch.no_grad():
        expected = ours.compute_logits(ours(batch))
        inputs = to_hf_inputs(encoded, source.folder.preprocessor_config)
        logits = theirs(**inputs).logits[0][batch.logit_indices_L]
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-2


def test_unsuitable_sources_are_rejected(run, tmp_path, monkeypatch):
    model, out = create_tiny_model(tmp_path / "model"), tmp_path / "out"
    with pytest.raises(UserError, match="is no run of the family"):
        export(model, out)
    out.mkdir()
    with pytest.raises(UserError, match="exists"):
        export(run, out)
    monkeypatch.setitem(sys.modules, "auto_round", None)
    with pytest.raises(UserError, match="cannot import auto_round") as found:
        export(run, tmp_path / "other")
    assert found.value.remedy == "pip install 'finesight[quantize]'"
    shape = SimpleNamespace(name="model.layers.0.mlp.up_proj.weight", shape=(64, 48))
    monkeypatch.setattr(quantized_export, "read_headers", lambda files: [shape])
    with pytest.raises(UserError, match=r"shapes \[\(64, 48\)\]"):
        select_group_size(ModelFolder(model), "run", tmp_path)
