"""Fonts: the split into seen and unseen, what a face lacks, what is said when one is missing."""

from __future__ import annotations

import random
import string
from collections import Counter

import pytest

from finesight.errors import UserError
from finesight.synth import fonts

BUILT_IN = fonts.faces("built-in")[0]


def test_every_family_names_its_licence_and_its_package():
    for family in fonts.FAMILIES:
        assert family.licence, f"{family.name} names no licence"
        assert family.package, f"{family.name} names no package"


def test_no_family_and_no_file_is_on_both_sides():
    sides = [[f for f in fonts.FAMILIES if f.unseen is unseen] for unseen in (False, True)]
    for part in (
        lambda family: {family.name},
        lambda family: {name for name, _ in family.files},
    ):
        seen, unseen = ({name for family in side for name in part(family)} for side in sides)
        assert not seen & unseen, f"both seen and unseen: {seen & unseen}"


def test_the_built_in_face_needs_nothing_and_has_every_printable_sign():
    assert BUILT_IN.path is None
    assert all(fonts.drawable(BUILT_IN, sign) for sign in string.printable if sign.strip())


def test_what_a_face_lacks_is_known():
    assert not fonts.drawable(BUILT_IN, "中")
    assert not fonts.drawable(BUILT_IN, "a中b")
    assert fonts.drawable(BUILT_IN, "two words")


def test_missing_packages_are_named():
    absent = fonts.Family("No Face", "none", "no-such-package", "no_such", (("a.ttf", ()),))
    system = fonts.Family("No Type", "none", "fonts-no-such", None, (("no-such.ttc", ()),))
    with pytest.raises(UserError, match="the fonts No Face, No Type are not installed") as raised:
        fonts.require([absent, fonts.FAMILIES[0], system])
    assert raised.value.remedy == "pip install no-such-package and apt install fonts-no-such"


def test_choices_share_no_face(installed_fonts):
    seen, unseen = installed_fonts
    assert BUILT_IN in seen
    assert not {face.family for face in seen} & {face.family for face in unseen}
    assert len({face.family for face in unseen}) >= 5


def test_families_are_chosen_alike_however_many_faces_they_have(installed_fonts):
    rng = random.Random(0)
    chosen = Counter(fonts.any_face(rng, "seen").family for _ in range(3000))
    families = {face.family for face in installed_fonts[0]}
    assert set(chosen) == families
    assert max(chosen.values()) < 1.5 * min(chosen.values())


def test_every_face_has_the_signs_of_the_words(installed_fonts):
    for face in (face for faces in installed_fonts for face in faces):
        lacking = [
            sign for sign in string.printable if sign.strip() and not fonts.drawable(face, sign)
        ]
        assert not lacking, f"{face} lacks {lacking}"


def test_drawable_agrees_with_the_table_of_the_font(installed_fonts):
    reader = pytest.importorskip("fontTools.ttLib", reason="fontTools reads the tables of fonts")
    signs = "aZ09é£€·×αβЖ中文♥→∫ﬁ"
    for face in installed_fonts[0]:
        if face.path is not None:
            known = reader.TTFont(face.path, fontNumber=face.index).getBestCmap()
            for sign in signs:
                assert fonts.drawable(face, sign) == (ord(sign) in known), f"{face.path}: {sign}"


def test_weights_of_a_variable_font_differ(installed_fonts):
    inter = [face for face in installed_fonts[0] if face.family == "Inter"]
    light, bold = (next(face for face in inter if face.weight == weight) for weight in (400, 700))
    assert fonts.load(bold, 40).getlength("weight") > fonts.load(light, 40).getlength("weight")


def test_chinese_faces_have_chinese(chinese_fonts):
    for face in (face for faces in chinese_fonts for face in faces):
        assert fonts.drawable(face, "中文收据")
        assert fonts.load(face, 20).getname()[0].endswith("SC")
