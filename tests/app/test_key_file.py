"""Tests of the API key of the servers that the studio starts."""

import os
from pathlib import Path

import pytest

from finesight.app.key_file import load_key_file
from finesight.errors import UserError


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.chmod(0o644),
        lambda file: file.chmod(0o620),
        lambda file: file.rename(file.with_name("other")) and file.symlink_to("other"),
        lambda file: file.unlink() or os.mkfifo(file, 0o600),
        lambda file: (
            file.parent.rename(file.parent.with_name("other")) and file.parent.symlink_to("other")
        ),
    ],
)
def test_key_that_others_may_know_is_refused(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    file = load_key_file()
    assert load_key_file() == file
    damage(file)
    with pytest.raises(UserError) as caught:
        load_key_file()
    # The remedy works.
    path = Path(caught.value.where)
    path.rename(tmp_path / "moved")
    assert load_key_file().read_text()


@pytest.mark.parametrize("state", ["", "state", "./state", "~nobody-at-all/state"])
def test_key_is_never_below_the_working_directory(tmp_path, monkeypatch, state):
    """Without a home folder, `~` is a name in the workspace, which may have been received."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", state)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(UserError, match="absolute"):
        load_key_file()
    assert [*tmp_path.iterdir()] == []
