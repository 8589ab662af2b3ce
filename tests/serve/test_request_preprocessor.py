"""Videos of requests: tokens and patches of a sample, sampled frames, and invalid files."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api_server_fixtures import (
    make_data_url,
    make_image_part,
    make_messages,
    make_noise_png,
    make_video_part,
)
from conversation_fixtures import make_folder
from pool_jobs import load_state_without_av
from video_fixtures import write_audio, write_video

from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import EncodedSample
from finesight.files.worker_pool import WorkerPool
from finesight.model_folder import ModelFolder
from finesight.samples.sample import ImagePart, LocatedSample, Message, Sample, TextPart, VideoPart
from finesight.serve.api_schema import ApiError, ServerLimits
from finesight.serve.api_server import create_worker_pool
from finesight.serve.media_sources import DEFAULT_IMAGE_FORMATS
from finesight.serve.request_preprocessor import RequestPreprocessor

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]
LIMITS = ServerLimits(num_reader_threads=1, max_worker_memory_bytes=150 << 20)
PARAM = "messages.0.content.0"


def make_renderer(folder: Path, family: str) -> NativeRenderer:
    return NativeRenderer(ModelFolder(make_folder(folder, family)))


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Iterator[WorkerPool]:
    renderer = make_renderer(tmp_path_factory.mktemp("model"), "qwen3_vl")
    with contextlib.closing(create_worker_pool(renderer, 600, LIMITS)) as pool:
        pool.start()
        yield pool


def encode(
    pool: WorkerPool, folder: Path, *parts: Any, limits: ServerLimits = LIMITS, **given: Any
) -> EncodedSample:
    """Preprocess a request with the parts of a question."""
    body = json.dumps({"model": "m", "messages": make_messages(*parts), **given}).encode()
    preprocessor = RequestPreprocessor(pool, limits, DEFAULT_IMAGE_FORMATS, folder)
    return preprocessor.encode(preprocessor.parse_body(bytearray(body), 32_000), 32_000)


@pytest.mark.parametrize("family", FAMILIES)
def test_videos_have_the_tokens_and_patches_of_a_sample(tmp_path: Path, family: str) -> None:
    renderer = make_renderer(tmp_path / "model", family)
    frames = [make_noise_png(56, 84, seed) for seed in range(5)]
    for number, frame in enumerate(frames):
        (tmp_path / f"{number}.png").write_bytes(frame)
    clips = [
        write_video(tmp_path / "a.mp4", 40, num_b_frames=3),
        write_video(tmp_path / "a.webm", codec="libvpx-vp9"),
    ]
    names = tuple(f"{number}.png" for number in range(5))
    content = (
        VideoPart(video="a.mp4"),
        TextPart(text="and"),
        ImagePart(image="0.png"),
        VideoPart(video="a.webm", fps=4.0),
        VideoPart(frames=names, fps=1.0),
        TextPart(text="Which?"),
    )
    sample = Sample(id="request", messages=(Message(role="user", content=content),))
    expected = renderer.encode_prompt(LocatedSample(sample, tmp_path))
    urls = [make_data_url(frame) for frame in frames]
    joined = ",".join(url.partition(",")[2] for url in urls)
    (tmp_path / "request").mkdir()
    with contextlib.closing(create_worker_pool(renderer, 600, LIMITS)) as pool:
        pool.start()
        for listed in (
            {"type": "video", "video": urls, "fps": 1},
            {
                "type": "video_url",
                "video_url": {"url": f"data:video/jpeg;base64,{joined}"},
                "fps": 1,
            },
        ):
            first, second = (make_video_part(clip.read_bytes()) for clip in clips)
            parts = first, "and", make_image_part(urls[0]), second | {"fps": 4}, listed, "Which?"
            found = encode(pool, tmp_path / "request", *parts)
            assert found.tokenized.ids_T.tolist() == expected.tokenized.ids_T.tolist()
            positions = found.tokenized.position_ids_3T
            assert np.array_equal(positions, expected.tokenized.position_ids_3T)
            assert np.array_equal(found.patches_ND, expected.patches_ND)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> bytes:
    """Video of 5 seconds with 8 frames per second."""
    return write_video(tmp_path_factory.mktemp("clip") / "a.mp4", 40).read_bytes()


@pytest.mark.parametrize(
    ("part", "request_fields", "num_frames"),
    [
        ({}, {}, 10),
        ({"fps": 1}, {}, 5),
        ({"max_frames": 7}, {}, 7),
        ({"fps": 8, "max_frames": 33}, {}, 33),
        ({}, {"mm_processor_kwargs": {"fps": 4, "do_sample_frames": True}}, 20),
        ({"fps": 1}, {"mm_processor_kwargs": {"fps": 4, "max_frames": 4}}, 4),
        ({}, {"mm_processor_kwargs": None, "media_io_kwargs": {"video": {"num_frames": 16}}}, 16),
        ({}, {"media_io_kwargs": {"video": {"num_frames": 16, "fps": 2}}}, 10),
        ({}, {"media_io_kwargs": {"video": {"num_frames": -1, "fps": 100}}}, 40),
        ({}, {"media_io_kwargs": {"video": {"num_frames": 16, "fps": -1}}}, 16),
        ({"max_frames": 30}, {"media_io_kwargs": {"video": {"num_frames": 16}}}, 16),
        ({"fps": 8}, {"mm_processor_kwargs": {"num_frames": 16, "max_frames": 9}}, 9),
    ],
)
def test_sampling_of_frames(pool, clip, tmp_path, part, request_fields, num_frames):
    found = encode(pool, tmp_path, make_video_part(clip, **part), "What?", **request_fields)
    assert sum(span.num_frames for span in found.tokenized.spans) == num_frames
    url = make_data_url(make_noise_png(56, 56))
    frames = encode(pool, tmp_path, {"type": "video", "video": [url] * 6}, "?", **request_fields)
    assert sum(span.num_frames for span in frames.tokenized.spans) == 6


def make_bad_parts(folder: Path, clip: bytes) -> dict[str, tuple[Any, str, str]]:
    """Return invalid message parts by name, with the field and a text of the error."""
    other = write_video(folder / "a.avi", codec="mpeg4").read_bytes()
    wide, url = (make_data_url(make_noise_png(side, 56)) for side in (84, 56))
    large = write_video(folder / "a.mp4", 5, size=(560, 840)).read_bytes()
    slow = write_video(folder / "slow.mp4", 90, fps=1).read_bytes()
    prefix = {"type": "video_url"}
    return {
        "empty": (make_video_part(b""), PARAM, "corrupt"),
        "truncated": (make_video_part(clip[: len(clip) // 2]), PARAM, "corrupt"),
        "container": (make_video_part(other), PARAM, "corrupt"),
        "text": (make_video_part(b"#EXTM3U\nfile:///etc/passwd\n" * 9), PARAM, "corrupt"),
        "image": (make_video_part(make_noise_png()), PARAM, "corrupt"),
        "sound": (make_video_part(write_audio(folder / "b.mp4").read_bytes()), PARAM, "no video"),
        "size": (
            make_video_part(bytes(3_000_000)),
            PARAM,
            "3000000 bytes; expected at",
        ),
        "pixels": (make_video_part(large), PARAM, "470400 pixels; expected at most 100000"),
        "seconds": (make_video_part(slow), PARAM, "90 seconds; expected at most 60"),
        "frames": (
            {"type": "video", "video": ["data:,"] * 10_000},
            "messages",
            "10000 video frames",
        ),
        "sampled": (
            make_video_part(clip, fps=8),
            "messages",
            "40 video frames; expected",
        ),
        "URLs": ({"type": "video", "video": ["https://a.b/c"] * 33}, "messages", "34 images"),
        "sizes": ({"type": "video", "video": [url, wide]}, "messages", "84 x 56 pixels"),
        "frame": ({"type": "video", "video": [url, "data:,"]}, f"{PARAM}.video.1", "data URL"),
        "no frames": ({"type": "video", "video": []}, "messages.0.user.content.0.video", ""),
        "base64": ({**prefix, "video_url": {"url": "data:video/mp4;base64,A"}}, PARAM, "base64"),
        "fps": (make_video_part(clip, fps=0), "messages.0.user.content.0.video_url.fps", "greater"),
        "slow": (make_video_part(clip, fps=1e-320), "messages.0", "greater than or equal to 0.001"),
        "fast": (make_video_part(clip, fps=1e308), "messages.0", "less than or equal to 1000"),
        "many": (make_video_part(clip, max_frames=10**400), "messages.0", ""),
        "few": (make_video_part(clip, max_frames=3), "messages.0.user.content.0.video_url", "4"),
    }


def test_invalid_videos_are_rejected(pool, clip, tmp_path):
    limits = replace(
        LIMITS,
        max_image_bytes=2_000_000,
        max_image_pixels=100_000,
        max_video_frames=30,
        max_video_s=60.0,
    )
    for name, (part, param, text) in make_bad_parts(tmp_path, clip).items():
        with pytest.raises(ApiError) as raised:
            encode(pool, tmp_path, part, "What?", limits=limits)
        error = raised.value
        assert (error.status, str(tmp_path) in error.message) in ((400, False), (413, False)), name
        assert (error.param or "").startswith(param), (name, error.param)
        assert text in error.message, (name, error.message)


def test_time_of_videos_is_limited(pool, tmp_path):
    clip = write_video(tmp_path / "a.mp4", 200, size=(560, 840), codec="mpeg4").read_bytes()
    part = make_video_part(clip)
    limits = replace(LIMITS, max_request_cpu_s=0.25)
    with pytest.raises(ApiError, match="CPU time") as raised:
        encode(pool, tmp_path, part, "What?", limits=limits)
    assert raised.value.param == PARAM


def test_memory_of_videos_is_limited(pool, tmp_path):
    clip = write_video(tmp_path / "a.mp4", 4, size=(2000, 2000), codec="mpeg4").read_bytes()
    part = make_video_part(clip)
    with pytest.raises(ApiError, match="memory") as raised:
        encode(pool, tmp_path, part, "What?")
    assert raised.value.param == PARAM


def test_videos_without_the_package_are_rejected(tmp_path, clip):
    renderer = make_renderer(tmp_path / "model", "qwen2_vl")
    sizes = {"num_idle": 1, "memory_bytes": LIMITS.max_worker_memory_bytes}
    with contextlib.closing(WorkerPool(load_state_without_av, renderer, 600, **sizes)) as pool:
        pool.start()
        with pytest.raises(ApiError, match="the package av, of the extra video") as raised:
            encode(pool, tmp_path, make_video_part(clip), "What?")
        assert (raised.value.status, raised.value.param) == (400, PARAM)
        url = make_data_url(make_noise_png())
        assert encode(pool, tmp_path, {"type": "video", "video": [url]}, "?").tokenized.spans
