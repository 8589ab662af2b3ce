"""`finesight doctor`: what it looks at, what it prints, and its exit codes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from finesight.cli.app import run
from finesight.doctor import examine
from finesight.doctor.findings import Section, as_lines, fault, fine, hint
from finesight.doctor.graphics import Torch
from finesight.errors import UserError

FOUND = (
    Section("one", (fine("a", "well"), hint("b", "could\x1b be", why="so", remedy="do this"))),
    Section("two", (fault("c", "bad", why="because", remedy="first\nsecond"),)),
)


def test_findings_are_marked_and_commands_stand_alone() -> None:
    assert as_lines(FOUND) == [
        "one",
        "  fine   well",
        "  hint   could\\x1b be",
        "         why: so",
        "         $ do this",
        "two",
        "  FAULT  bad",
        "         why: because",
        "         $ first",
        "         $ second",
        "1 fault, 1 hint",
    ]


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a torch that answers at once."""
    monkeypatch.setattr(examine.graphics, "ask_torch", lambda: Torch("2.13.0+cpu", broken={}))
    for name in ("HF_TOKEN", "https_proxy", "http_proxy", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("sound")
def test_this_machine_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--no-trial", "--json"]) in (0, 2)
    said = json.loads(capsys.readouterr().out)
    sections = dict.fromkeys(one["section"] for one in said["findings"])
    assert list(sections) == ["machine", "packages", "torch and cards", "environment", "extras"]
    assert all(
        one["remedy"] and one["why"] for one in said["findings"] if one["severity"] != "fine"
    )


@pytest.mark.usefixtures("sound")
def test_one_planted_fault_ends_with_two_and_its_remedy_with_less(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def faults() -> set[str]:
        run(["doctor", "--no-trial", "--json"])
        said = json.loads(capsys.readouterr().out)
        return {one["code"] for one in said["findings"] if one["severity"] == "fault"}

    before = faults()
    monkeypatch.setenv("HF_TOKEN", "no token at all")
    assert run(["doctor", "--no-trial"]) == 2
    assert "         $ unset HF_TOKEN\n" in capsys.readouterr().out
    assert faults() == before | {"token-malformed"}


@pytest.mark.usefixtures("sound")
def test_nothing_is_asked_of_the_network(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("somebody asked the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    assert run(["doctor", "--no-trial"]) in (0, 2)


def test_a_model_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "finesight-tiny"]) == 0
    assert "a whole model of the family qwen2_vl" in capsys.readouterr().out


def test_an_adapter_is_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert run(["doctor", str(tmp_path)]) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().out


def test_what_is_nothing_of_these_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "Qwen/Qwen2-VL-2B-Instruct"]) == 2
    error = capsys.readouterr().err
    assert "there is no folder and no recipe" in error
    assert "finesight download" in error
    assert run(["doctor", "finesight-tiny", "--hub", "huggingface"]) == 2


def test_torch_is_not_needed_to_say_what_is_wrong(tmp_path: Path) -> None:
    """A torch that is broken must not keep `doctor` from saying so."""
    (tmp_path / "torch.py").write_text("raise OSError('broken')\n")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import finesight.cli.app, finesight.doctor.examine as e\n"
        "try: e.examine('nothing')\nexcept Exception: print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr


def test_a_fault_without_a_remedy_cannot_be_written() -> None:
    with pytest.raises(TypeError):
        fault("code", "what", why="why")  # type: ignore[call-arg]
    with pytest.raises(UserError):
        examine.examine("no such thing")
