"""What lies in a folder, by kind of file."""

from __future__ import annotations

from pathlib import Path

from finesight.data.row_reader import list_folder


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    (elsewhere / "a.jpg").touch()
    (root / "images").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    (elsewhere / "again").symlink_to(elsewhere)
    assert list_folder(root).image_files() == [root / "images" / "a.jpg"]
