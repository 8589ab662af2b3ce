"""Video files: frame count without decoding, decoded frames, and files that are rejected."""

import os
import random
import struct
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image
from video_fixtures import find_index, write_audio, write_video

from finesight.errors import UserError
from finesight.samples import video_file
from finesight.samples.image_file import (
    CorruptImageError,
    ImageTooLargeError,
    MissingImageError,
    TruncatedImageError,
)
from finesight.samples.sample import is_video_path
from finesight.samples.video_file import VideoHeader, iter_video_frames, read_video_header

av = pytest.importorskip("av", reason="the package av is not installed")

CLIPS: dict[str, dict[str, Any]] = {
    "h264.mp4": {},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "av1.mp4": {"codec": "libsvtav1", "size": (64, 96)},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "vp8.webm": {"codec": "libvpx"},
    "sound.webm": {"codec": "libvpx-vp9", "with_audio": True},
    "h264.mkv": {"num_b_frames": 3},
    "h264.mov": {"num_b_frames": 3},
    "reordered.mp4": {"num_b_frames": 3},
    "FRAGMENTS.MP4": {"options": {"movflags": "frag_keyframe+empty_moov"}},
}
EVERY_FRAME = range(16)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_video(tmp_path / "clip.mp4")


@pytest.mark.parametrize("name", CLIPS)
def test_header_counts_the_decoded_frames(tmp_path: Path, name: str) -> None:
    path = write_video(tmp_path / name, **CLIPS[name])
    assert is_video_path(path)
    assert read_video_header(path) == VideoHeader(16, 8.0, CLIPS[name].get("size", (56, 84)))
    assert [find_index(frame) for frame in iter_video_frames(path, EVERY_FRAME)] == [*EVERY_FRAME]
    assert [find_index(frame) for frame in iter_video_frames(path, [3, 4, 11])] == [3, 4, 11]


@pytest.mark.parametrize(("name", "other"), [("a.mp4", "b.mkv"), ("a.mkv", "b.mov")])
def test_content_selects_the_container(tmp_path: Path, name: str, other: str) -> None:
    path = write_video(tmp_path / name)
    expected = read_video_header(path)
    assert read_video_header(path.rename(tmp_path / other)) == expected


def test_frames_before_an_edit_list_are_neither_counted_nor_decoded(tmp_path: Path) -> None:
    path = write_video(tmp_path / "cut.mp4", first_pts=-3)
    assert read_video_header(path).num_frames == 13
    assert [find_index(f) for f in iter_video_frames(path, range(13))] == [*range(3, 16)]


def test_hidden_vp8_packets_are_not_counted(tmp_path: Path) -> None:
    source = write_video(tmp_path / "source.webm", codec="libvpx")
    path = tmp_path / "hidden.webm"
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(video=0):
            if not packet.size:
                continue
            packet.stream = stream
            content, time = bytearray(bytes(packet)), (packet.pts, packet.dts, packet.time_base)
            writer.mux(packet)
            if time[0] == 500:
                content[0] &= 0xEF
                hidden = av.Packet(bytes(content))
                hidden.pts, hidden.dts, hidden.time_base, hidden.stream = 501, 501, time[2], stream
                writer.mux(hidden)
    with av.open(str(path)) as reader:
        assert sum(bool(packet.size) for packet in reader.demux(video=0)) == 17
    assert read_video_header(path).num_frames == 16
    assert len([*iter_video_frames(path, EVERY_FRAME)]) == 16


def test_nominal_frame_rate_is_replaced_by_the_measured_one(tmp_path: Path) -> None:
    """Recordings of browsers have a frame rate of 1,000 and no duration."""
    path = write_video(tmp_path / "a.webm", fps=1000, codec="libvpx", pts_step=40, first_pts=7)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 1000
    assert read_video_header(path) == VideoHeader(16, 25.0, (56, 84))


@pytest.mark.parametrize(
    ("matrix", "transpose"),
    [
        ((0, 1, -1, 0), Image.Transpose.ROTATE_270),
        ((0, -1, 1, 0), Image.Transpose.ROTATE_90),
        ((-1, 0, 0, -1), Image.Transpose.ROTATE_180),
    ],
)
def test_rotation_is_applied(clip, matrix, transpose):
    (plain,) = iter_video_frames(clip, [5])
    content = bytearray(clip.read_bytes())
    # Display matrix of the track header box: a, b, u, c, d, v, x, y, w.
    start = content.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    clip.write_bytes(content)
    (rotated,) = iter_video_frames(clip, [5])
    assert rotated == plain.transpose(transpose)
    assert read_video_header(clip).size == rotated.size[::-1]


def test_frames_are_converted_without_threads(clip):
    """Threads that outlive a frame hang in processes that are forked later."""
    threads = len(psutil.Process().threads())
    for _ in iter_video_frames(clip, [0, 5]):
        assert len(psutil.Process().threads()) == threads


def test_changed_file_is_read_again(clip: Path) -> None:
    assert read_video_header(clip).num_frames == 16
    write_video(clip, num_frames=9)
    assert read_video_header(clip).num_frames == 9


def test_video_inside_a_tar(tmp_path: Path, clip: Path) -> None:
    archive = tmp_path / "a.tar"
    archive.write_bytes(b"x" * 512 + clip.read_bytes())
    path = archive / f"@512+{clip.stat().st_size}/clip.mp4"
    assert read_video_header(path) == read_video_header(clip)
    assert [find_index(frame) for frame in iter_video_frames(path, [7])] == [7]


def cut(path: Path, fraction: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    return path


def replace_content(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


FASTSTART = {"movflags": "faststart"}
REJECTED: dict[str, tuple[Any, type[UserError], str]] = {
    "missing": (lambda f: f / "a.mp4", MissingImageError, "no such video"),
    "folder": (lambda f: make_folder(f / "a.mp4"), CorruptImageError, "not a file"),
    "empty": (lambda f: replace_content(f / "a.mp4", b""), CorruptImageError, "corrupt"),
    "text": (lambda f: replace_content(f / "a.webm", b"abc" * 99), CorruptImageError, "corrupt"),
    "suffix": (lambda f: write_video(f / "a.mp4").rename(f / "a.avi"), CorruptImageError, "not a"),
    "container": (
        lambda f: write_video(f / "a.avi", codec="mpeg4").rename(f / "a.mp4"),
        CorruptImageError,
        "corr",
    ),
    "audio only": (lambda f: write_audio(f / "a.mp4"), CorruptImageError, "no video stream"),
    "no frames": (lambda f: write_video(f / "a.mkv", 0), CorruptImageError, "0 frames|corrupt"),
    "no index": (lambda f: cut(write_video(f / "a.mp4"), 0.5), CorruptImageError, "corrupt"),
    "truncated mp4": (
        lambda f: cut(write_video(f / "a.mp4", options=FASTSTART), 0.8),
        TruncatedImageError,
        "truncated: .* bytes, fewer than its frames",
    ),
    "truncated mkv": (
        lambda f: cut(write_video(f / "a.mkv"), 0.5),
        TruncatedImageError,
        r"truncated: \d.\d of 2.0 seconds",
    ),
}


@pytest.mark.parametrize("kind", REJECTED)
def test_invalid_files_are_rejected(tmp_path: Path, kind: str) -> None:
    build, error, what = REJECTED[kind]
    path = build(tmp_path)
    with pytest.raises(error, match=what) as caught:
        read_video_header(path)
    assert caught.value.where == str(path)
    assert caught.value.expected
    assert caught.value.remedy


def test_damaged_frame_is_rejected(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", options=FASTSTART)
    content = bytearray(path.read_bytes())
    middle = content.index(b"mdat") + len(content) // 3
    content[middle : middle + 2000] = random.Random(0).randbytes(2000)
    path.write_bytes(content)
    assert read_video_header(path).num_frames == 16
    with pytest.raises(CorruptImageError, match=r"corrupt|cannot be decoded"):
        list(iter_video_frames(path, EVERY_FRAME))


def test_limits(tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    webm = write_video(tmp_path / "a.webm", codec="libvpx-vp9")
    limits = {"MAX_IMAGE_BYTES": 1000, "MAX_IMAGE_PIXELS": 4000, "MAX_VIDEO_FRAMES": 15}
    for name, limit in limits.items():
        for path in (clip, webm):
            os.utime(path)
            with monkeypatch.context() as patch:
                patch.setattr(video_file, name, limit)
                with pytest.raises(ImageTooLargeError, match=str(limit)):
                    read_video_header(path)


def test_other_codecs_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_file, "VIDEO_CODECS", ("h264",))
    with pytest.raises(CorruptImageError, match="the codec mpeg4"):
        read_video_header(write_video(tmp_path / "a.mp4", codec="mpeg4"))


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{}'\n",
        '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><BaseURL>{}</BaseURL></Period></MPD>',
    ],
)
def test_playlists_open_no_other_file(tmp_path: Path, clip: Path, text: str, suffix: str) -> None:
    """FFmpeg would open the file of the playlist if it detected the format itself."""
    path = replace_content(tmp_path / f"list{suffix}", text.format(clip).encode())
    with pytest.raises(CorruptImageError, match="corrupt"):
        read_video_header(path)


def test_external_data_of_an_mp4_is_not_opened(tmp_path, clip, monkeypatch):
    """A data reference to another file ("alis") stays closed, and PyAV would ask `io_open`."""
    opened: list[str] = []
    monkeypatch.setattr(video_file, "_reject_reference", lambda url, *rest: opened.append(url))
    content = bytearray(clip.read_bytes())
    at = content.index(b"dref")
    content[at + 16 : at + 20] = b"alis"
    content[at + 23] = 0  # not self-contained
    clip.write_bytes(content)
    frames = [*iter_video_frames(clip, [0])]
    assert not opened
    assert len(frames) == 1


def test_missing_package_names_the_extra(clip, monkeypatch):
    os.utime(clip, (1, 1))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="av, which cannot be imported") as caught:
        read_video_header(clip)
    assert "pip install 'finesight[video]'" in caught.value.remedy
