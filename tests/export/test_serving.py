"""The lines that serve a model elsewhere: the flags of those engines, with what was measured."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from finesight.config import ExactSize, PixelRange
from finesight.errors import UserError
from finesight.export.serving import lines, serving_of
from finesight.hub import TINY_FOLDER, ModelFolder
from finesight.infer.load import Parts

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
    return lines(ModelFolder(TINY_FOLDER), path, "my model", rule, system)


def test_vllm_is_told_the_limits_of_the_training() -> None:
    rule = PixelRange(min_pixels=3136, max_pixels=50176)
    line = of_tiny(rule).vllm
    assert shlex.split(line)[:3] == ["vllm", "serve", "/m/my model"]
    given = options(line, 3)
    assert set(given) == VLLM_FLAGS
    assert json.loads(given["--mm-processor-kwargs"]) == {"min_pixels": 3136, "max_pixels": 50176}
    assert json.loads(given["--override-generation-config"]) == {"temperature": 0}
    assert given["--served-model-name"] == "my model"


def test_sglang_is_told_the_same() -> None:
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
def test_the_context_holds_the_largest_picture_within_the_positions(most: int, length: int) -> None:
    given = options(of_tiny(PixelRange(min_pixels=784, max_pixels=most)).vllm, 3)
    assert int(given["--max-model-len"]) == length


def test_without_a_run_the_limits_are_those_of_the_folder() -> None:
    given = options(of_tiny().vllm, 3)
    assert json.loads(given["--mm-processor-kwargs"]) == {"min_pixels": 3136, "max_pixels": 200704}


def test_a_request_keeps_the_tokens_of_boxes() -> None:
    serving = of_tiny()
    assert json.loads(serving.request) == {"temperature": 0, "skip_special_tokens": False}
    assert "boxes come without their tokens" in serving.notes[0]
    assert serving.as_json()["request"]["skip_special_tokens"] is False


def test_what_engines_cannot_be_told_is_noted() -> None:
    usual = "You are a helpful assistant."
    assert len(of_tiny(PixelRange(min_pixels=784, max_pixels=7840), usual).notes) == 1
    notes = of_tiny(ExactSize(height=112, width=504), "Rhyme.").notes
    assert notes[1].endswith("send pictures resized to height 112, width 504")
    assert notes[2].endswith("system prompt of the training: 'Rhyme.'")


def test_an_adapter_is_to_be_merged_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vLLM ignores adapters on the vision tower"):
        serving_of(Parts(ModelFolder(TINY_FOLDER), tmp_path, None), "runs/latex")
    with pytest.raises(UserError, match="is an adapter on a base"):
        serving_of(Parts(ModelFolder(TINY_FOLDER), None, None, ("language",)), "runs/latex")


@pytest.mark.skipif(not ASSETS.is_dir(), reason="published configurations are not there")
@pytest.mark.parametrize("name", ["Qwen2-VL-2B-Instruct", "Qwen2.5-VL-7B-Instruct"])
def test_published_folders(name: str) -> None:
    serving = serving_of(Parts(ModelFolder(ASSETS / name), None, None), name)
    assert options(serving.vllm, 3)["--max-model-len"] == "32768"
    lacking = [note for note in serving.notes if "lacks" in note]
    assert "model.safetensors" in lacking[0], "no weights are there"
    assert "tokenizer" not in lacking[0]


@pytest.mark.skipif(not ASSETS.is_dir(), reason="published configurations are not there")
def test_the_first_qwen_vl_is_not_served_so() -> None:
    with pytest.raises(UserError, match="of the family qwen\n"):
        serving_of(Parts(ModelFolder(ASSETS / "Qwen-VL-Chat"), None, None), "x")


def test_a_model_within_a_run_has_the_name_of_the_run() -> None:
    parts = Parts(ModelFolder(TINY_FOLDER), None, None)
    given = options(serving_of(parts, "runs/latex").vllm, 3)
    assert given["--served-model-name"] == "latex"
    assert f"vllm serve {TINY_FOLDER}" in serving_of(parts, "runs/latex").vllm
