"""Tensor names against those that inference engines load, with a table of their maps.

vLLM (vllm/model_executor/models: qwen2_vl.py, qwen2_5_vl.py, qwen3_vl.py, `hf_to_vllm_mapper`)
accepts tensors of Qwen2-VL and Qwen2.5-VL under `model.`, `visual.` and `lm_head.`, as first
published, or under the names of transformers 5; those of Qwen3-VL under `model.language_model.`,
`model.visual.` and `lm_head.`. SGLang (python/sglang/srt/models) has parameters of the same names,
and for Qwen3-VL removes `language_model.` and the `model.` before `visual.`. Both stack q, k and
v, and gate and up, themselves, so these tensors must be separate. In the vision encoder q, k and v
are one tensor, `attn.qkv`; gate and up of Qwen2.5-VL are separate there, too.
"""

import re
from pathlib import Path

import pytest
import torch
from hf_reference import make_config, make_native_model, make_reference_model
from safetensors import safe_open
from safetensors.torch import save_file

from finesight.model.weights_io import save_model
from finesight.model_folder import ModelFolder

LAYER = (
    r"(self_attn\.(q|k|v)_proj\.(weight|bias)|self_attn\.o_proj\.weight|{mlp}"
    r"|input_layernorm\.weight|post_attention_layernorm\.weight{norms})"
)
DENSE = r"mlp\.(gate|up|down)_proj\.weight"
EXPERTS = r"mlp\.gate\.weight|mlp\.experts\.(gate_up|down)_proj"
NORMS = r"|self_attn\.(q|k)_norm\.weight"
VISION_TENSORS = (
    r"(patch_embed\.proj\.(weight|bias)|blocks\.\d+\.(norm[12]|attn\.(qkv|proj))\.(weight|bias)"
)


def language(prefix: str, mlp: str, norms: str = "") -> str:
    """The names of a language model under a prefix."""
    layer = LAYER.format(mlp=mlp, norms=norms)
    return rf"{prefix}(embed_tokens\.weight|norm\.weight|layers\.\d+\.{layer})"


TABLE = {
    "qwen2_vl": (
        language(r"model\.", DENSE),
        rf"visual\.{VISION_TENSORS}|blocks\.\d+\.mlp\.fc[12]\.(weight|bias)"
        r"|merger\.(ln_q|mlp\.[02])\.(weight|bias))",
    ),
    "qwen2_5_vl": (
        language(r"model\.", DENSE),
        rf"visual\.{VISION_TENSORS}|blocks\.\d+\.mlp\.(gate|up|down)_proj\.(weight|bias)"
        r"|merger\.(ln_q|mlp\.[02])\.(weight|bias))",
    ),
    "qwen3_vl": (
        language(r"model\.language_model\.", DENSE, NORMS),
        rf"model\.visual\.{VISION_TENSORS}|blocks\.\d+\.mlp\.linear_fc[12]\.(weight|bias)"
        r"|pos_embed\.weight"
        r"|(merger|deepstack_merger_list\.\d+)\.(norm|linear_fc[12])\.(weight|bias))",
    ),
}
TABLE["qwen3_vl_moe"] = (language(r"model\.language_model\.", EXPERTS, NORMS), TABLE["qwen3_vl"][1])
HYBRID_LAYER = (
    r"self_attn\.(q|k|v|o)_proj\.weight|self_attn\.(q|k)_norm\.weight"
    r"|linear_attn\.(A_log|dt_bias|(conv1d|norm|out_proj|in_proj_(qkv|z|b|a))\.weight)"
    r"|(input|post_attention)_layernorm\.weight|{mlp}"
)
for hybrid, mlp in {
    "qwen3_5": DENSE,
    "qwen3_5_moe": rf"{EXPERTS}|mlp\.shared_expert\.(gate|up|down)_proj\.weight"
    r"|mlp\.shared_expert_gate\.weight",
}.items():
    layer = HYBRID_LAYER.format(mlp=mlp)
    TABLE[hybrid] = (
        r"model\.language_model\.(embed_tokens\.weight|norm\.weight|layers\.\d+\.(" + layer + "))",
        TABLE["qwen3_vl"][1],
    )


def names(folder: Path) -> set[str]:
    """Of every tensor of the folder."""
    found: set[str] = set()
    for file in ModelFolder(folder).weight_files():
        with safe_open(file, "pt") as weights:
            found |= set(weights.keys())
    return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", TABLE)
def test_tensor_names_are_loadable_by_engines(family: str, tied: bool, tmp_path: Path) -> None:
    settings = make_config(family, tie_word_embeddings=tied)
    model = make_native_model(settings, make_reference_model(settings))
    (tmp_path / "config.json").write_text("{}")
    save_file({"mtp.fc.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    source = ModelFolder(tmp_path)
    source.__dict__["config"] = settings
    out = tmp_path / "out"
    out.mkdir()
    save_model(model, source, out, next(model.parameters()).dtype, max_shard_bytes=1e5)
    assert len(ModelFolder(out).weight_files()) > 1, "one file proves nothing about shards"
    found = names(out)
    allowed = "|".join(TABLE[family]) + ("" if tied else r"|lm_head\.weight")
    if family.startswith("qwen3_5"):
        assert "mtp.fc.weight" in found
        allowed += r"|mtp\.fc\.weight"
    strange = {name for name in found if not re.fullmatch(allowed, name)}
    assert not strange
    # A tied head has no tensor of its own: SGLang passes one over, vLLM would load it twice.
    assert ("lm_head.weight" in found) is not tied
    for pattern in TABLE[family]:
        assert any(re.fullmatch(pattern, name) for name in found), pattern
    stacked = [name for name in found if re.search(r"qkv_proj|layers.*mlp\.gate_up_proj", name)]
    assert stacked == []
