"""File names that are not UTF-8 as text that can be written, and as a disk spells them."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from unicodedata import normalize

import pytest

from finesight.bounded_files import find_existing, is_utf8, iter_spellings, to_readable_name

CAT = "\u4e2d\u6587\u732b"


def in_gbk(name: str) -> str:
    """A name in GBK as Python gives it from a folder."""
    return os.fsdecode(name.encode("gbk"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jpg", "a.jpg"),
        (f"{CAT}.jpg", f"{CAT}.jpg"),
        (in_gbk(f"{CAT}.jpg"), f"{CAT}.jpg"),
        (f"{CAT}/{in_gbk(CAT)}/a.jpg", f"{CAT}/{CAT}/a.jpg"),
        ("caf\udce9.jpg", "caf%E9.jpg"),
        ("a\udcff\udcfeb", "a%FF%FEb"),
        ("\ud83d.jpg", "%3D.jpg"),
    ],
)
def test_readable_names(name: str, text: str) -> None:
    assert to_readable_name(name) == text
    assert is_utf8(to_readable_name(name))
    assert is_utf8(name) is (name == text)


def test_spellings_of_a_path() -> None:
    assert list(iter_spellings("a/b.jpg")) == ["a/b.jpg"]
    assert list(iter_spellings("a\\b.jpg")) == ["a\\b.jpg", "a/b.jpg"]
    misread = f"{CAT}.jpg".encode("gbk").decode("cp437")
    assert list(iter_spellings(f"{CAT}.jpg")) == [f"{CAT}.jpg", in_gbk(f"{CAT}.jpg"), misread]
    assert list(iter_spellings("\udcd6.jpg")) == ["\udcd6.jpg"]


@pytest.mark.parametrize(("folder_form", "form"), list(itertools.product(("NFC", "NFD"), repeat=2)))
def test_composed_and_decomposed_names_are_equal(
    tmp_path: Path, folder_form: str, form: str
) -> None:
    folder, stem = normalize(folder_form, "Übung"), normalize(form, "Käse-가")
    (tmp_path / folder).mkdir()
    (tmp_path / folder / f"{stem}.jpg").touch()
    for spelling in ("NFC", "NFD"):
        name = normalize(spelling, "Übung/Käse-가.jpg")
        assert find_existing(tmp_path, name) == tmp_path / folder / f"{stem}.jpg"


@pytest.mark.parametrize("there", [CAT, in_gbk(CAT), CAT.encode("gbk").decode("cp437")])
def test_a_name_is_found_however_it_was_unpacked(tmp_path: Path, there: str) -> None:
    (tmp_path / f"{there}.jpg").touch()
    assert find_existing(tmp_path, f"{CAT}.jpg") == tmp_path / f"{there}.jpg"
    assert find_existing(tmp_path, "other.jpg") is None
    assert find_existing(tmp_path, "a\0b") is None
