"""Exported folders carry every file of the published ones, and those of bases that lack some."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from finesight.export.hf_files import (
    GREEDY_CONFIG,
    complete_hf_folder,
    find_dropped_sampling,
    find_missing_files,
)
from finesight.model.weights_io import copy_model_files
from finesight.model_folder import ModelFolder

ASSETS = Path(__file__).parents[3] / "shared" / "qwen_assets"
NOT_OF_A_MODEL = {"SOURCE.txt", "README.md"}
MODELS = [
    "Qwen2-VL-2B-Instruct",
    "Qwen2.5-VL-3B-Instruct",
    "Qwen2.5-VL-7B-Instruct",
    "Qwen3-VL-Embedding-8B",
    "Qwen-VL-Chat",
]

pytestmark = pytest.mark.skipif(not ASSETS.is_dir(), reason="published files are not there")


def copy_files(name: str, out: Path) -> ModelFolder:
    """What a merge leaves beside the weights for that base."""
    base = ModelFolder(ASSETS / name)
    out.mkdir()
    copy_model_files(base, out, torch.bfloat16)
    complete_hf_folder(out, base.family, (7,))
    (out / "model.safetensors").touch()
    return ModelFolder(out)


@pytest.mark.parametrize("name", MODELS)
def test_published_files_are_copied_and_generation_is_greedy(name: str, tmp_path: Path) -> None:
    published = {path.name for path in (ASSETS / name).iterdir()} - NOT_OF_A_MODEL
    folder = copy_files(name, tmp_path / "out")
    assert published <= {path.name for path in folder.path.iterdir()}
    assert find_missing_files(folder) == []
    for path in folder.path.iterdir():
        assert not path.is_symlink()
        if path.suffix == ".json":
            json.loads(path.read_text())
    settings = folder.generation_config
    assert settings.items() >= GREEDY_CONFIG.items()
    assert settings["eos_token_id"][0] == 7
    assert not {"top_p", "repetition_penalty"} & settings.keys() - GREEDY_CONFIG.keys()
    if name not in MODELS[:3]:
        return

    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    generation = transformers.GenerationConfig.from_pretrained(folder.path)
    assert (generation.top_k, generation.repetition_penalty) == (1, 1.0)
    assert transformers.AutoConfig.from_pretrained(folder.path).architectures
    assert Qwen2VLImageProcessorPil.from_pretrained(folder.path).patch_size == 14
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder.path)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 151645


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen"])
def test_config_has_architecture_and_no_path(family: str, tmp_path: Path) -> None:
    before = {"_name_or_path": "/home/me/models/base", "architectures": ["Another"], "a": 1}
    (tmp_path / "config.json").write_text(json.dumps(before))
    complete_hf_folder(tmp_path, family, (7,))
    known = ["Qwen2VLForConditionalGeneration"] if family == "qwen2_vl" else ["Another"]
    assert json.loads((tmp_path / "config.json").read_text()) == {"architectures": known, "a": 1}


def test_missing_preprocessor_config_is_written(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(ASSETS / "Qwen2.5-VL-7B-Instruct", base)
    before = ModelFolder(base).preprocessor_config
    (base / "preprocessor_config.json").unlink()
    complete_hf_folder(base, "qwen2_5_vl", (7,))
    written = json.loads((base / "preprocessor_config.json").read_text())
    assert written["image_processor_type"] == "Qwen2VLImageProcessor"
    assert written["processor_class"] == "Qwen2_5_VLProcessor"
    again = ModelFolder(base).preprocessor_config
    for key in ("patch_size", "merge_size", "min_pixels", "max_pixels", "image_mean"):
        assert again[key] == before[key]


def test_existing_pixel_limits_are_preserved_and_dropped_penalty_is_reported(tmp_path):
    limits = {"min_pixels": 784, "max_pixels": 7840}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(limits))
    (tmp_path / "config.json").write_text("{}")
    complete_hf_folder(tmp_path, "qwen2_vl", (7,))
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert written.items() >= (limits | {"patch_size": 14}).items()
    base = ModelFolder(ASSETS / "Qwen2.5-VL-7B-Instruct")
    assert find_dropped_sampling(base) == {"repetition_penalty": 1.05}
