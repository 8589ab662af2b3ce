from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from speaking import shapes
from typer.testing import CliRunner

from finesight.cli.app import app
from finesight.data.jsonl import read_samples
from finesight.data.sample import ImagePart
from finesight.errors import UserError
from finesight.vision.picture import open_picture


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return shapes(tmp_path_factory.mktemp("pictures with blanks"), 0)


def _chat(*lines: str, options: tuple[str, ...] = ()) -> list[str]:
    """The lines that are printed; the last is an error's message where there was one."""
    typed = "".join(f"{line}\n" for line in lines)
    command = ["chat", "finesight-tiny", "--device", "cpu", "--precision", "fp32", *options]
    result = CliRunner().invoke(app, command, input=typed)
    if isinstance(result.exception, UserError):
        return [*result.stdout.splitlines(), str(result.exception)]
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def test_a_talk_with_pictures_is_drawn_saved_and_taken_back(picture, tmp_path):
    path, question = picture
    drawn, saved = tmp_path / "drawn.png", tmp_path / "talk.jsonl"
    lines = _chat(
        f"/image {path}",
        question,
        f"/box {drawn}",
        "Why?",
        "/undo",
        f"/save {saved}",
        "/again",
        "/new",
        "/undo",
        "/help",
        "/quit",
        "never asked",
    )
    height_first = open_picture(path).size
    assert lines[0] == (
        f"{path}: {height_first[0]} x {height_first[1]}, shown with the next question"
    )
    assert lines[2].startswith("  box "), lines[:4]
    assert lines[2].endswith("hollow gray hexagon")
    assert open_picture(drawn).tobytes() != open_picture(path).tobytes()
    assert "gone: Why?" in lines
    assert lines.count(lines[1]) == 2, "at temperature 0 the same question has the same answer"
    assert "nothing to take back" in lines
    assert lines[-1].startswith("/quit")
    [sample] = read_samples(saved)
    assert [part.image for part in sample.parts() if isinstance(part, ImagePart)] == [str(path)]
    assert len(sample.messages) == 2


def test_several_pictures_go_with_one_question(picture, tmp_path):
    other, _ = shapes(tmp_path, 10)
    saved = tmp_path / "talk.jsonl"
    lines = _chat(f"/image '{picture[0]}' {other}", f"/image {other}", "Same?", f"/save {saved}")
    assert [line.partition(":")[0] for line in lines[:3]] == [str(picture[0]), *[str(other)] * 2]
    [sample] = read_samples(saved)
    assert sum(isinstance(part, ImagePart) for part in sample.messages[0].content) == 3


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/image", "no picture is named"),
        ("/image 'a", "cannot be read"),
        ("/image gone.png", "no such picture"),
        ("/box", "no picture in the last of 0 turns"),
        ("/again", "nothing has been asked yet"),
        ("/save", "no file is named"),
        ("/save talk.jsonl", "nothing to save"),
        ("/draw", "unknown command /draw"),
    ],
)
def test_what_is_wrong_ends_a_script(line: str, told: str, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert told in _chat(line)[-1]


def test_an_answer_is_cut_off_and_drawn_by_its_seed(picture):
    options = ("--max-new-tokens", "3", "--temperature", "8", "--seed", "4")
    lines = _chat(f"/image {picture[0]}", picture[1], "/again", options=options)
    assert lines[1].endswith("[cut off: longer than --max-new-tokens]")
    assert lines[1] != lines[2]
    assert _chat(f"/image {picture[0]}", picture[1], options=options)[1] == lines[1]


def test_ctrl_c_stops_the_answer_and_not_the_chat():
    command = [
        *(sys.executable, "-m", "finesight", "chat", "finesight-tiny", "--device", "cpu"),
        *("--max-new-tokens", "900", "--temperature", "90", "--seed", "1"),
    ]
    pipe = subprocess.PIPE
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write(b"Tell me everything.\n")
        chat.stdin.flush()
        assert chat.stdout.read(1), "no answer has begun"
        chat.send_signal(signal.SIGINT)
        said, complaints = chat.communicate(b"/undo\n/quit\n", timeout=120)
    assert chat.returncode == 0, complaints
    lines = said.decode().splitlines()
    assert lines[-2].endswith("[stopped]")
    assert lines[-1] == "gone: Tell me everything."
