"""Video files as model input, by functions of transformers compiled without torchvision."""

from __future__ import annotations
import __future__

import ast
import importlib.util
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from chat_reference import build_rope_model
from conversation_fixtures import make_folder
from image_fixtures import make_sample
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from video_fixtures import find_index, save_frames, write_video

from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import iter_video_runs
from finesight.errors import UserError
from finesight.families.qwen2_5_vl.renderer import Qwen25VL
from finesight.families.qwen2_vl.renderer import Qwen2VL
from finesight.families.qwen3_5.renderer import Qwen35
from finesight.families.qwen3_vl.renderer import Qwen3VL
from finesight.model_folder import ModelFolder
from finesight.samples.sample import LocatedSample, VideoPart
from finesight.samples.video_file import iter_video_frames
from finesight.settings.config import ExactSize, LongestSide, PixelRange
from finesight.vision.image_processing import (
    PatchConfig,
    compute_resized_size,
    compute_video_size,
    repeat_still_frames,
)

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]
RULE = PixelRange(min_pixels=784, max_pixels=100352)
LARGEST = PixelRange(min_pixels=10**9, max_pixels=10**9)
FPS = (7.5, 8, 23.976, 24, 25, 29.97, 30, 59.94, 60)
DEFAULTS = SimpleNamespace(
    num_frames=None, fps=2, min_frames=4, max_frames=768, temporal_patch_size=2
)


def load_function(module: str, name: str) -> Callable[..., Any]:
    """Compile a function or method of a module of transformers without importing the module."""
    spec = importlib.util.find_spec(f"transformers.models.{module}")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    (node,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name)
    scope: dict[str, Any] = {"torch": torch, "np": np, "math": math}
    body = ast.Module([node], [])
    flags = __future__.annotations.compiler_flag
    exec(compile(body, name, "exec", flags=flags, dont_inherit=True), scope)
    function: Callable[..., Any] = scope[name]
    return function


SAMPLERS = {
    "qwen2_vl": load_function("qwen2_vl.video_processing_qwen2_vl", "sample_frames"),
    "qwen3_vl": load_function("qwen3_vl.video_processing_qwen3_vl", "sample_frames"),
}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (Qwen2VL(), "qwen2_vl"),
        (Qwen25VL(), "qwen2_vl"),
        (Qwen3VL(), "qwen3_vl"),
        (Qwen35(), "qwen3_vl"),
    ],
)
def test_sampled_frames_match_transformers(family, name):
    for total in (*range(2, 200), 449, 450, 900, 5000, 36_001, 107_892):
        for video_fps in FPS:
            for fps in (0.5, 1.0, 2.0, 4.0):
                metadata = SimpleNamespace(total_num_frames=total, fps=video_fps)
                expected = SAMPLERS[name](DEFAULTS, metadata, fps=fps).tolist()
                found = family.sample_frames(total, video_fps, fps, 2)
                # torch.arange may add `total` itself, which is not a frame. In long videos, its
                # fp32 rounding may select the previous frame.
                frames = [index for index in expected if index < total]
                np.testing.assert_allclose(found, frames, rtol=0, atol=0 if total < 10_000 else 1)
                assert all(a < b for a, b in pairwise(found))
    # transformers fails on a single frame.
    assert family.sample_frames(1, 25.0, 2.0, 2) == [0]
    assert len(family.sample_frames(100_000, 30.0, 2.0, 2)) == 768


def test_video_sizes_match_transformers():
    resize = load_function("qwen3_vl.video_processing_qwen3_vl", "smart_resize")
    config = PatchConfig(patch_size=16)
    rng = np.random.default_rng(0)
    for least, most in ((4096, 25165824), (131072, 786432)):
        limits = PixelRange(min_pixels=least, max_pixels=most)
        for _ in range(2000):
            size = height, width = rng.integers(8, 1500, 2).tolist()
            num_frames = int(rng.integers(2, 300))
            pixels = {"min_pixels": least, "max_pixels": most}
            expected = resize(num_frames, height, width, factor=32, **pixels)
            assert compute_video_size(size, num_frames, LARGEST, limits, config) == expected


def test_image_rule_limits_each_frame():
    config, limits = PatchConfig(patch_size=16), PixelRange(min_pixels=4096, max_pixels=25165824)
    size = (720, 1280)
    for rule in (RULE, ExactSize(height=320, width=640), LongestSide(longest_side=2048)):
        alone = compute_resized_size(size, rule, 32)
        assert compute_video_size(size, 16, rule, limits, config) == alone
        assert compute_video_size(size, 16, rule, None, config) == alone
    many = compute_video_size(size, 768, RULE, limits, config)
    assert math.prod(many) * 768 <= 25165824 < math.prod(compute_resized_size(size, RULE, 32)) * 768


@pytest.fixture(params=FAMILIES)
def renderer(request: pytest.FixtureRequest, tmp_path: Path) -> NativeRenderer:
    return NativeRenderer(ModelFolder(make_folder(tmp_path / "model", request.param)), RULE)


def ask(part: VideoPart, *more: VideoPart, folder: Path) -> LocatedSample:
    return make_sample("clip", folder, "Look: ", part, "What?", *more, answer="A disc.")


def test_video_file_equals_its_sampled_frames(tmp_path, renderer):
    clip = write_video(tmp_path / "clip.mp4")
    encoded = renderer.encode(ask(VideoPart(video=clip.name), folder=tmp_path))
    spans = encoded.tokenized.spans
    indices = [index for span in spans for index in span.frame_indices]
    is_newer = renderer.family.name.startswith("qwen3")
    assert indices == ([0, 5, 10, 15] if is_newer else [0, 4, 8, 12])
    assert all(span.files == (clip,) for span in spans)
    frames = [*iter_video_frames(clip, indices)]
    assert [*map(find_index, frames)] == indices
    files = save_frames(tmp_path / "frames", frames)
    # The sampled frames are 5/8 and 4/8 of a second apart.
    part = VideoPart(frames=tuple(files), fps=1.6 if is_newer else 2.0)
    expected = renderer.encode(ask(part, folder=tmp_path))
    for name in ("ids_T", "loss_mask_T", "position_ids_3T"):
        found = getattr(encoded.tokenized, name)
        np.testing.assert_array_equal(found, getattr(expected.tokenized, name))
    np.testing.assert_array_equal(encoded.patches_ND, expected.patches_ND)


def test_tokens_are_counted_without_decoding(tmp_path, renderer, monkeypatch):
    write_video(tmp_path / "clip.mp4", num_frames=37, fps=10, size=(60, 200))
    write_video(tmp_path / "odd.webm", num_frames=3, codec="libvpx-vp9")
    write_video(tmp_path / "one.mkv", num_frames=1)
    for name in ("clip.mp4", "odd.webm", "one.mkv"):
        sample = ask(VideoPart(video=name, fps=3.0), folder=tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr("finesight.encode.renderer.iter_video_frames", None)
            tokenized = renderer.tokenize(sample)
        patches_ND = renderer.load_patches(tokenized).patches_ND
        assert len(patches_ND) == tokenized.num_patches > 0
        pads = {renderer.tokenizer.token_to_id("<|video_pad|>")}
        placeholders = sum(token in pads for token in tokenized.ids_T.tolist())
        assert placeholders == tokenized.num_patches // 4


def test_several_videos_in_a_sample(tmp_path, renderer):
    """The spans of a file are decoded in one pass; a repeated file starts again."""
    write_video(tmp_path / "a.mp4")
    write_video(tmp_path / "b.mp4", num_frames=8)
    parts = [VideoPart(video=name, fps=4.0) for name in ("a.mp4", "a.mp4", "b.mp4")]
    encoded = renderer.encode(ask(*parts, folder=tmp_path))
    spans = encoded.tokenized.spans
    runs = [[span.files[0].name for span in run] for run in iter_video_runs(spans)]
    per_clip = len(runs[0])
    assert runs == [["a.mp4"] * per_clip] * 2 + [["b.mp4"] * (len(spans) - 2 * per_clip)]
    values = renderer.patch_config.patch_dim
    alone = [repeat_still_frames(renderer.span_patches(span), values) for span in spans]
    np.testing.assert_array_equal(np.concatenate(alone), encoded.patches_ND)


@pytest.mark.parametrize(
    ("num_frames", "video_fps", "fps"),
    [(61, 10, 0.7), (61, 10, 3.0), (90, 24, 2.0), (90, 24, 7.0), (50, 30, 0.7), (50, 30, 7.0)],
)
def test_positions_and_timestamps_match_transformers(
    tmp_path, renderer, num_frames, video_fps, fps
):
    clip = write_video(tmp_path / "clip.mp4", num_frames, video_fps, size=(240, 320))
    tokenized = renderer.tokenize(ask(VideoPart(video=clip.name, fps=fps), folder=tmp_path))
    newer = renderer.family.name.startswith("qwen3")
    metadata = SimpleNamespace(total_num_frames=num_frames, fps=video_fps)
    indices = SAMPLERS["qwen3_vl" if newer else "qwen2_vl"](DEFAULTS, metadata, fps=fps).tolist()
    pad = renderer.tokenizer.token_to_id("<|video_pad|>")
    ids = torch.from_numpy(tokenized.ids_T.astype(np.int64))[None]
    grids = torch.tensor([span.grid_thw for span in tokenized.spans])
    more: dict[str, Any] = {}
    if newer:
        times = Qwen3VLProcessor._calculate_timestamps(None, indices, float(video_fps), 2)
        text = renderer.tokenizer.decode(tokenized.ids_T, skip_special_tokens=True)
        found = [piece.split("<")[-1] for piece in text.split(" seconds>")[:-1]]
        assert found == [f"{time:.1f}" for time in times]
        grids = torch.tensor([[len(tokenized.spans), *tokenized.spans[0].grid_thw[1:]]])
    elif renderer.family.name == "qwen2_5_vl":
        sampled_fps = len(indices) / num_frames * video_fps
        more["second_per_grid_ts"] = torch.tensor([2 / sampled_fps])
    reference = "qwen3_vl" if newer else renderer.family.name
    positions, _ = build_rope_model(reference).get_rope_index(
        input_ids=ids, mm_token_type_ids=2 * (ids == pad).long(), video_grid_thw=grids, **more
    )
    stop = tokenized.spans[-1].stop
    np.testing.assert_array_equal(tokenized.position_ids_3T[:, :stop], positions[:, 0, :stop])


def test_published_limits_apply_to_video_files(shared, tmp_path):
    folder = make_folder(tmp_path / "model", "qwen3_5")
    for file in (shared / "qwen_assets" / "Qwen3.5-0.8B").glob("*preprocessor_config.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"patch_size": 14', '"patch_size": 16'))
    renderer = NativeRenderer(ModelFolder(folder))
    write_video(tmp_path / "clip.mp4", num_frames=16, size=(1080, 1920))
    tokenized = renderer.tokenize(ask(VideoPart(video="clip.mp4", fps=8.0), folder=tmp_path))
    resize = load_function("qwen3_vl.video_processing_qwen3_vl", "smart_resize")
    expected = resize(16, 1080, 1920, factor=32, min_pixels=4096, max_pixels=25165824)
    assert {span.resized_size for span in tokenized.spans} == {expected}
    assert tokenized.num_patches <= 25165824 // 16**2 // 2


def test_qwen_vl_rejects_video_files(tmp_path):
    write_video(tmp_path / "clip.mp4")
    renderer = NativeRenderer(ModelFolder(make_folder(tmp_path / "model", "qwen")))
    with pytest.raises(UserError, match="a video of 4 frames") as caught:
        renderer.tokenize(ask(VideoPart(video="clip.mp4"), folder=tmp_path))
    assert "Qwen-VL does not support videos" in caught.value.expected
