"""What lies in a folder, by kind of file."""

from pathlib import Path

from finesight.data.row_reader import is_json_object, list_folder


def test_files_are_grouped_by_kind(tmp_path: Path) -> None:
    root = tmp_path / "set"
    names = ("b.PNG", "a.jpg", "in/c.txt", "in/.hidden", ".git/x.jpg", "sha256.json", "noend")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    found = list_folder(root)
    assert found.image_files() == [root / "a.jpg", root / "b.PNG"]
    assert found.files_with_suffix(".txt") == [root / "in" / "c.txt"]
    assert str(found) == "1 .jpg, 1 .png, 1 .txt, 1 no suffix"


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    (elsewhere / "a.jpg").touch()
    (root / "images").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    (elsewhere / "again").symlink_to(elsewhere)
    assert list_folder(root).image_files() == [root / "images" / "a.jpg"]


def test_json_object_detection(tmp_path: Path) -> None:
    for name, content, is_object in (
        ("a.json", b'\xef\xbb\xbf \n{"a": 1}', True),
        ("a.JSON", b"{", True),
        ("a.json", b"[{}]", False),
        ("a.json", b"", False),
        ("a.jsonl", b"{}", False),
    ):
        (tmp_path / name).write_bytes(content)
        assert is_json_object(tmp_path / name) is is_object
    assert not is_json_object(tmp_path / "missing.json")
