"""The lines that serve a model elsewhere: the flags of those engines, with what was measured."""

import argparse
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lora_fixtures import save_random_adapter
from safetensors import safe_open

from finesight.errors import UserError
from finesight.export.deployment import (
    GgufFiles,
    build_llama_server_command,
    build_serving_commands,
    format_serving_commands,
)
from finesight.infer.model_loader import ModelSource
from finesight.model.lora.peft_io import ADAPTER_WEIGHTS_FILE
from finesight.model_folder import TINY_MODEL_FOLDER, ModelFolder
from finesight.settings.config import ExactSize, PixelRange, TuneSettings
from finesight.settings.manifest import Manifest, PromptTemplate

ASSETS = Path(__file__).parents[3] / "shared" / "qwen_assets"

NEEDS_ASSETS = pytest.mark.skipif(
    not ASSETS.is_dir(), reason="published configurations are not there"
)


def options(line: str, words: int) -> dict[str, str]:
    """The options of a command line as a shell splits it, after so many words."""
    given = shlex.split(line)[words:]
    return dict(zip(given[::2], given[1::2], strict=True))


def of_tiny(
    rule: Any = None,
    system: str | None = None,
    path: str = "/m/my model",
    templates: Sequence[PromptTemplate] = (),
    num_gpus: int = 1,
) -> Any:
    values = {"image_rule": rule, "system_prompt": system, "enable_thinking": None}
    manifest: Any = SimpleNamespace(**values, prompts=(), prompt_templates=templates)
    manifest = None if rule is None else manifest
    folder = ModelFolder(TINY_MODEL_FOLDER)
    return format_serving_commands(folder, path, "my model", manifest, num_gpus=num_gpus)


def test_commands_have_the_limits_of_the_training() -> None:
    """The options are those that vLLM and SGLang document."""
    serving = of_tiny(PixelRange(min_pixels=3136, max_pixels=50176))
    limits = {"min_pixels": 3136, "max_pixels": 50176}
    assert shlex.split(serving.vllm)[:3] == ["vllm", "serve", "/m/my model"]
    given = options(serving.vllm, 3)
    assert given.pop("--served-model-name") == "my model"
    assert given.pop("--max-model-len") == "4096"
    assert json.loads(given.pop("--mm-processor-kwargs")) == limits
    assert json.loads(given.pop("--override-generation-config")) == {"temperature": 0}
    assert not given
    assert shlex.split(serving.sglang)[:3] == ["python", "-m", "sglang.launch_server"]
    given = options(serving.sglang, 3)
    assert given.pop("--model-path") == "/m/my model"
    assert given.pop("--served-model-name") == "my model"
    assert given.pop("--context-length") == "4096"
    assert json.loads(given.pop("--mm-process-config")) == {"image": limits}
    assert not given


def test_each_of_several_gpus_has_a_copy_of_the_model() -> None:
    one = of_tiny()
    several = of_tiny(num_gpus=4)
    given = options(several.vllm, 3)
    assert given.pop("--data-parallel-size") == "4"
    assert given == options(one.vllm, 3)
    assert shlex.split(several.sglang)[:3] == ["python", "-m", "sglang_router.launch_server"]
    given = options(several.sglang, 3)
    assert given.pop("--dp-size") == "4"
    assert given == options(one.sglang, 3)
    (note,) = set(several.notes) - set(one.notes)
    assert "sglang-router" in note


def test_parser_of_vllm_accepts_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    reason = "vLLM 0.33 is not installed"
    cli_args = pytest.importorskip("vllm.entrypoints.common.cli_args", reason=reason)
    argparse_utils = pytest.importorskip("vllm.utils.argparse_utils", reason=reason)
    parser = cli_args.make_arg_parser(argparse_utils.FlexibleArgumentParser())
    given = parser.parse_args(shlex.split(of_tiny(num_gpus=4).vllm)[2:])
    assert (given.model_tag, given.data_parallel_size) == ("/m/my model", 4)
    assert given.mm_processor_kwargs == {"min_pixels": 3136, "max_pixels": 200704}


def test_parsers_of_sglang_and_its_router_accept_the_command() -> None:
    """They are those of `sglang_router.launch_server`, whose `main` also starts the servers."""
    reason = "SGLang 0.5 and sglang-router are not installed"
    server_args = pytest.importorskip("sglang.srt.server_args", reason=reason)
    router_args = pytest.importorskip("sglang_router.router_args", reason=reason)
    parser = argparse.ArgumentParser()
    server_args.ServerArgs.add_cli_args(parser)
    router_args.RouterArgs.add_cli_args(parser, use_router_prefix=True, exclude_host_port=True)
    given = parser.parse_args(shlex.split(of_tiny(num_gpus=4).sglang)[3:])
    assert (given.model_path, given.dp_size) == ("/m/my model", 4)
    assert given.mm_process_config == {"image": {"min_pixels": 3136, "max_pixels": 200704}}


def test_notes_have_the_form_of_the_training_questions() -> None:
    numbers = {"min_images": 1, "max_images": 1}
    templates = (
        PromptTemplate(
            template="{question}\n<image>", **numbers, system_prompt="Be exact.", share=0.75
        ),
        PromptTemplate(template="<image>{question}", **numbers, share=0.25),
    )
    rule = PixelRange(min_pixels=784, max_pixels=50176)
    form, several, system_prompt = of_tiny(rule, "You are.", templates=templates).notes[-3:]
    (content,) = re.findall(r"\[.*\]", form)
    assert json.loads(content) == [
        {"type": "text", "text": "QUESTION\n"},
        {"type": "image_url", "image_url": {"url": "URL"}},
    ]
    assert "(75%), '<image>{question}' (25%)" in several
    assert "'Be exact.'" in system_prompt
    assert not any("QUESTION" in note for note in of_tiny(rule).notes)


@pytest.mark.parametrize(
    ("most", "length"), [(3_000 * 784, 8192), (12_845_056, 32768), (10**9, 32768)]
)
def test_context_length_fits_the_largest_image(most: int, length: int) -> None:
    given = options(of_tiny(PixelRange(min_pixels=784, max_pixels=most)).vllm, 3)
    assert int(given["--max-model-len"]) == length


def test_folder_without_run_has_its_pixel_limits_and_unsupported_settings_are_noted() -> None:
    serving = of_tiny()
    given = options(serving.vllm, 3)
    assert json.loads(given["--mm-processor-kwargs"]) == {"min_pixels": 3136, "max_pixels": 200704}
    assert json.loads(serving.request) == {"temperature": 0, "skip_special_tokens": False}
    assert serving.as_json()["request"]["skip_special_tokens"] is False
    assert "boxes lose their tokens" in serving.notes[0]
    usual = "You are a helpful assistant."
    assert len(of_tiny(PixelRange(min_pixels=784, max_pixels=7840), usual).notes) == 1
    serving = of_tiny(ExactSize(height=100, width=504), "Rhyme.")
    assert serving.notes[1].endswith("system prompt of the training: 'Rhyme.'")
    assert "to 504 x 112 pixels (width x height)" in serving.notes[2]
    limits = {"min_pixels": 504 * 112, "max_pixels": 504 * 112}
    assert json.loads(options(serving.vllm, 3)["--mm-processor-kwargs"]) == limits


def test_model_of_run_is_named_after_it_and_quantized_base_is_merged_first() -> None:
    tiny = ModelFolder(TINY_MODEL_FOLDER)
    with pytest.raises(UserError, match="is an adapter on a base"):
        build_serving_commands(ModelSource(tiny, None, None, ("language",)), "runs/latex")
    line = build_serving_commands(ModelSource(tiny, None, None), "runs/latex").vllm
    assert shlex.split(line)[:3] == ["vllm", "serve", str(TINY_MODEL_FOLDER)]
    assert options(line, 3)["--served-model-name"] == "latex"


def test_adapter_of_the_language_model_is_served_on_its_base(tmp_path: Path) -> None:
    tiny = ModelFolder(TINY_MODEL_FOLDER)
    tune = {"language": "lora", "lora": {"rank": 12}}
    adapter = save_random_adapter(tiny, tmp_path / "a, b", tune)
    source = ModelSource(tiny, adapter, None, ("language",))
    serving = build_serving_commands(source, "runs/latex", num_gpus=2)
    words = shlex.split(serving.vllm)
    words.remove("--enable-lora")
    given = dict(zip(words[3::2], words[4::2], strict=True))
    assert given["--data-parallel-size"] == "2"
    assert given["--max-lora-rank"] == "16", "the next rank that vLLM accepts"
    assert given["--served-model-name"] == "base", "another name than that of the adapter"
    module = json.loads(given["--lora-modules"])  # vLLM reads a path with a comma as JSON
    assert module == {"name": "latex", "path": str(adapter)}
    greedy = {"temperature": 0, "repetition_penalty": 1.0}
    assert json.loads(given["--override-generation-config"]) == greedy
    assert not serving.sglang
    assert not any("sglang-router" in note for note in serving.notes)
    assert any("language in NF4" in note for note in serving.notes)
    adapter = adapter.rename(tmp_path / "adapter")
    with safe_open(adapter / ADAPTER_WEIGHTS_FILE, "pt") as file:
        # vLLM maps these names to its modules (hf_to_vllm_mapper).
        prefix = "base_model.model.model.language_model.layers."
        assert all(key.startswith(prefix) for key in file.keys())  # noqa: SIM118
    line = build_serving_commands(ModelSource(tiny, adapter, None), "runs/latex").vllm
    assert f"--lora-modules latex={adapter} " in line


@pytest.mark.parametrize(
    ("tune", "reason"),
    [
        ({"language": "lora", "merger": "lora"}, "adapted layers are in the vision encoder"),
        ({"language": "lora", "lora": {"rank": 513}}, "its rank 513 is above 512"),
    ],
)
def test_other_adapters_must_be_merged_first(tune, reason, tmp_path) -> None:
    tiny = ModelFolder(TINY_MODEL_FOLDER)
    adapter = save_random_adapter(tiny, tmp_path / "adapter", tune)
    with pytest.raises(UserError, match=reason) as caught:
        build_serving_commands(ModelSource(tiny, adapter, None), "runs/latex")
    assert "finesight merge runs/latex OUT" in str(caught.value)


@NEEDS_ASSETS
@pytest.mark.parametrize("name", ["Qwen2-VL-2B-Instruct", "Qwen2.5-VL-7B-Instruct"])
def test_published_model_folders(name: str) -> None:
    serving = build_serving_commands(ModelSource(ModelFolder(ASSETS / name), None, None), name)
    assert options(serving.vllm, 3)["--max-model-len"] == "32768"
    lacking = [note for note in serving.notes if note.startswith("missing files")]
    assert "model.safetensors" in lacking[0], "no weights are there"
    assert "tokenizer" not in lacking[0]
    with pytest.raises(UserError, match="of the family qwen\n"):
        build_serving_commands(ModelSource(ModelFolder(ASSETS / "Qwen-VL-Chat"), None, None), "x")


@NEEDS_ASSETS
@pytest.mark.parametrize("name", ["Qwen3.5-2B", "Qwen3.5-4B", "Qwen3.8-27B"])
@pytest.mark.parametrize("enable_thinking", [None, True])
def test_thinking_mode_of_the_run_is_selected(name: str, enable_thinking: bool | None) -> None:
    folder = ModelFolder(ASSETS / name)
    manifest = Manifest(
        family=folder.family,
        base_model="base",
        base_fingerprint="0",
        image_rule=PixelRange(min_pixels=65536, max_pixels=262144),
        system_prompt=None,
        enable_thinking=enable_thinking,
        eos_token="<|im_end|>",
        tune=TuneSettings(),
        versions={},
    )
    source = ModelSource(folder, None, manifest if enable_thinking else None)
    serving = build_serving_commands(source, "runs/mine")
    expected = {"enable_thinking": bool(enable_thinking)}
    for line in (serving.vllm, serving.sglang):
        given = options(line, 3)
        assert json.loads(given["--default-chat-template-kwargs"]) == expected
        assert given.get("--reasoning-parser") == ("qwen3" if enable_thinking else None)
    assert any(json.dumps(expected) in note for note in serving.notes)
    files = GgufFiles(Path("model.gguf"), Path("m.gguf"))
    given_words = shlex.split(build_llama_server_command(source, files).command)
    at = given_words.index("--chat-template-kwargs")
    assert json.loads(given_words[at + 1]) == expected


@NEEDS_ASSETS
def test_models_with_one_mode_have_no_template_options() -> None:
    folder = ModelFolder(ASSETS / "Qwen3-VL-Embedding-8B")
    assert "chat-template" not in format_serving_commands(folder, "a", "a", None).vllm
    files = GgufFiles(Path("model.gguf"), Path("m.gguf"))
    line = build_llama_server_command(ModelSource(folder, None, None), files).command
    limits = "--image-min-tokens 4 --image-max-tokens 1280"
    assert line == f"llama-server -m model.gguf --mmproj m.gguf --special --temp 0 {limits}"
