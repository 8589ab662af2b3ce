"""The lines that serve a model elsewhere: the flags of those engines, with what was measured."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from finesight.config import ExactSize, PixelRange, TuneSettings
from finesight.errors import UserError
from finesight.export.deployment import (
    GgufFiles,
    build_serving_commands,
    format_llama_server_command,
    format_serving_commands,
)
from finesight.infer.model_loader import ModelSource
from finesight.manifest import Manifest
from finesight.model_folder import TINY_MODEL_FOLDER, ModelFolder

ASSETS = Path(__file__).parents[3] / "shared" / "qwen_assets"

VLLM_FLAGS = {
    "--served-model-name",
    "--max-model-len",
    "--mm-processor-kwargs",
    "--override-generation-config",
}
"""Of `vllm serve`, as its engine arguments are documented."""

SGLANG_FLAGS = {"--model-path", "--served-model-name", "--context-length", "--mm-process-config"}
"""Of `python -m sglang.launch_server`, as its server arguments are documented."""


def options(line: str, words: int) -> dict[str, str]:
    """The options of a command line as a shell splits it, after so many words."""
    given = shlex.split(line)[words:]
    return dict(zip(given[::2], given[1::2], strict=True))


def of_tiny(rule: Any = None, system: str | None = None, path: str = "/m/my model") -> Any:
    return format_serving_commands(ModelFolder(TINY_MODEL_FOLDER), path, "my model", rule, system)


def test_vllm_command_has_training_limits() -> None:
    rule = PixelRange(min_pixels=3136, max_pixels=50176)
    line = of_tiny(rule).vllm
    assert shlex.split(line)[:3] == ["vllm", "serve", "/m/my model"]
    given = options(line, 3)
    assert set(given) == VLLM_FLAGS
    assert json.loads(given["--mm-processor-kwargs"]) == {"min_pixels": 3136, "max_pixels": 50176}
    assert json.loads(given["--override-generation-config"]) == {"temperature": 0}
    assert given["--served-model-name"] == "my model"


def test_sglang_command_has_training_limits() -> None:
    rule = PixelRange(min_pixels=3136, max_pixels=50176)
    line = of_tiny(rule).sglang
    assert shlex.split(line)[:3] == ["python", "-m", "sglang.launch_server"]
    given = options(line, 3)
    assert set(given) == SGLANG_FLAGS
    assert given["--model-path"] == "/m/my model"
    limits = json.loads(given["--mm-process-config"])
    assert limits == {"image": {"min_pixels": 3136, "max_pixels": 50176}}


@pytest.mark.parametrize(
    ("most", "length"), [(50176, 4096), (3_000 * 784, 8192), (12_845_056, 32768), (10**9, 32768)]
)
def test_context_length_fits_the_largest_image(most: int, length: int) -> None:
    given = options(of_tiny(PixelRange(min_pixels=784, max_pixels=most)).vllm, 3)
    assert int(given["--max-model-len"]) == length


def test_pixel_limits_of_folder_without_run() -> None:
    given = options(of_tiny().vllm, 3)
    assert json.loads(given["--mm-processor-kwargs"]) == {"min_pixels": 3136, "max_pixels": 200704}


def test_request_keeps_special_tokens_for_boxes() -> None:
    serving = of_tiny()
    assert json.loads(serving.request) == {"temperature": 0, "skip_special_tokens": False}
    assert "boxes lose their tokens" in serving.notes[0]
    assert serving.as_json()["request"]["skip_special_tokens"] is False


def test_unsupported_settings_are_noted() -> None:
    usual = "You are a helpful assistant."
    assert len(of_tiny(PixelRange(min_pixels=784, max_pixels=7840), usual).notes) == 1
    notes = of_tiny(ExactSize(height=112, width=504), "Rhyme.").notes
    assert notes[1].endswith("send images resized to height 112, width 504")
    assert notes[2].endswith("system prompt of the training: 'Rhyme.'")


def test_adapter_must_be_merged_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vLLM ignores adapters of the vision encoder"):
        build_serving_commands(
            ModelSource(ModelFolder(TINY_MODEL_FOLDER), tmp_path, None), "runs/latex"
        )
    with pytest.raises(UserError, match="is an adapter on a base"):
        build_serving_commands(
            ModelSource(ModelFolder(TINY_MODEL_FOLDER), None, None, ("language",)), "runs/latex"
        )


@pytest.mark.skipif(not ASSETS.is_dir(), reason="published configurations are not there")
@pytest.mark.parametrize("name", ["Qwen2-VL-2B-Instruct", "Qwen2.5-VL-7B-Instruct"])
def test_published_model_folders(name: str) -> None:
    serving = build_serving_commands(ModelSource(ModelFolder(ASSETS / name), None, None), name)
    assert options(serving.vllm, 3)["--max-model-len"] == "32768"
    lacking = [note for note in serving.notes if note.startswith("missing files")]
    assert "model.safetensors" in lacking[0], "no weights are there"
    assert "tokenizer" not in lacking[0]


@pytest.mark.skipif(not ASSETS.is_dir(), reason="published configurations are not there")
def test_qwen_vl_is_not_supported() -> None:
    with pytest.raises(UserError, match="of the family qwen\n"):
        build_serving_commands(ModelSource(ModelFolder(ASSETS / "Qwen-VL-Chat"), None, None), "x")


def test_model_of_run_is_named_after_the_run() -> None:
    parts = ModelSource(ModelFolder(TINY_MODEL_FOLDER), None, None)
    given = options(build_serving_commands(parts, "runs/latex").vllm, 3)
    assert given["--served-model-name"] == "latex"
    assert f"vllm serve {TINY_MODEL_FOLDER}" in build_serving_commands(parts, "runs/latex").vllm


@pytest.mark.skipif(not ASSETS.is_dir(), reason="published configurations are not there")
@pytest.mark.parametrize("name", ["Qwen3.5-2B", "Qwen3.5-4B", "Qwen3.8-27B"])
def test_thinking_mode_is_selected_by_the_server(name: str) -> None:
    folder = ModelFolder(ASSETS / name)
    serving = format_serving_commands(folder, "models/a", "a", None, None)
    for line, words in ((serving.vllm, 3), (serving.sglang, 3)):
        given = options(line, words)
        assert json.loads(given["--default-chat-template-kwargs"]) == {"enable_thinking": False}
    assert any('"chat_template_kwargs": {"enable_thinking": false}' in x for x in serving.notes)
    line = format_llama_server_command(folder, GgufFiles(Path("a/model.gguf"), Path("a/m.gguf")))
    given = shlex.split(line)
    assert given[given.index("--chat-template-kwargs") + 1] == '{"enable_thinking": false}'


@pytest.mark.skipif(not ASSETS.is_dir(), reason="published configurations are not there")
def test_thinking_mode_of_the_run_is_selected() -> None:
    folder = ModelFolder(ASSETS / "Qwen3.5-2B")
    manifest = Manifest(
        family=folder.family,
        base_model="base",
        base_fingerprint="0",
        image_rule=PixelRange(min_pixels=65536, max_pixels=262144),
        system_prompt=None,
        enable_thinking=True,
        eos_token="<|im_end|>",
        tune=TuneSettings(),
        versions={},
    )
    serving = build_serving_commands(ModelSource(folder, None, manifest), "runs/mine")
    for line in (serving.vllm, serving.sglang):
        given = options(line, 3)
        assert json.loads(given["--default-chat-template-kwargs"]) == {"enable_thinking": True}
        assert given["--reasoning-parser"] == "qwen3"
    assert any('{"enable_thinking": true}' in note for note in serving.notes)
    files = GgufFiles(Path("model.gguf"), Path("m.gguf"))
    line = format_llama_server_command(folder, files, manifest.enable_thinking)
    assert """--chat-template-kwargs '{"enable_thinking": true}'""" in line


@pytest.mark.skipif(not ASSETS.is_dir(), reason="published configurations are not there")
def test_models_with_one_mode_have_no_template_options() -> None:
    folder = ModelFolder(ASSETS / "Qwen3-VL-Embedding-8B")
    assert "chat-template" not in format_serving_commands(folder, "a", "a", None, None).vllm
    line = format_llama_server_command(folder, GgufFiles(Path("model.gguf"), Path("m.gguf")))
    assert line == "llama-server -m model.gguf --mmproj m.gguf --special --temp 0"
