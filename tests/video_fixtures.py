"""Small video files whose frames have their index as gray level."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

av = pytest.importorskip("av", reason="the package av is not installed")
pytest.importorskip("av.filter")

LOSSLESS = {"libx264": {"qp": "0"}, "libvpx-vp9": {"lossless": "1"}, "libsvtav1": {"crf": "5"}}
LOSSLESS |= {"libvpx": {"b": "2M", "deadline": "good"}, "mpeg4": {"b": "4M"}}
FIRST_LEVEL, LEVEL_STEP = 20, 3


def write_video(
    path: Path,
    num_frames: int = 16,
    fps: int = 8,
    size: tuple[int, int] = (56, 84),
    codec: str = "libx264",
    *,
    first_pts: int = 0,
    pts_step: int = 1,
    num_b_frames: int = 0,
    options: Mapping[str, str] | None = None,
    with_audio: bool = False,
) -> Path:
    """Write a video of `num_frames` frames; `find_index` returns the index of a frame."""
    height, width = size
    with av.open(str(path), "w", options=dict(options or {})) as container:
        codec_options = LOSSLESS[codec] | {"bf": str(num_b_frames)}
        stream = container.add_stream(codec, fps, options=codec_options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        audio = container.add_stream("libopus", 48_000) if with_audio else None
        packets = []
        if not num_frames:
            container.start_encoding()
        for index in range(num_frames):
            gray = np.full((height, width, 3), FIRST_LEVEL + LEVEL_STEP * index).astype(np.uint8)
            gray[:16, :16] = 0  # a black corner makes rotation visible
            packets += stream.encode(av.VideoFrame.from_ndarray(gray, format="rgb24"))
        for packet in [*packets, *stream.encode()]:
            packet.pts = packet.pts * pts_step + first_pts
            packet.dts = packet.dts * pts_step + first_pts
            container.mux(packet)
        if audio is not None:
            container.mux(_encode_silence(audio, num_frames / fps))
    return path


def write_audio(path: Path) -> Path:
    """Write a file with a second of sound and no video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libopus", 48_000)
        container.mux(_encode_silence(stream, 1.0))
    return path


def _encode_silence(stream: av.AudioStream, seconds: float) -> list[av.Packet]:
    graph = av.filter.Graph()
    source = graph.add("anullsrc", f"r=48000:cl=stereo:nb_samples=960:d={seconds}")
    sink = graph.add("abuffersink")
    graph.link_nodes(source, graph.add("aformat", "sample_fmts=s16"), sink).configure()
    packets = []
    for _ in range(int(seconds * 50)):
        packets += stream.encode(sink.pull())
    return [*packets, *stream.encode()]


def find_index(frame: Image.Image) -> int:
    """Return the index of a frame of `write_video`, read from its center."""
    level = np.asarray(frame)[frame.height // 2 :, frame.width // 2 :].mean()
    return round((float(level) - FIRST_LEVEL) / LEVEL_STEP)


def save_frames(folder: Path, frames: Sequence[Image.Image]) -> list[str]:
    """Save frames as PNG files, and return their names."""
    folder.mkdir(exist_ok=True)
    for number, frame in enumerate(frames):
        frame.save(folder / f"{number}.png")
    return [f"{folder.name}/{number}.png" for number in range(len(frames))]
