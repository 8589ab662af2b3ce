"""Fonts: the split into seen and unseen, what a face lacks, what is said when one is missing."""

from __future__ import annotations

import io
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


STATED = {
    "SIL Open Font License 1.1": ("SIL Open Font License", "Open Font License, Version 1.1"),
    "Apache License 2.0": ("Apache License, Version 2.0",),
    "Bitstream Vera licence": ("Bitstream Vera Fonts Copyright", "DejaVu changes are in public"),
    "CC0 1.0": ("No Rights Reserved",),
}
"""What the files of a family under a licence say of themselves, one or the other of it."""


def test_font_files_state_the_licence_that_is_named(installed_fonts, chinese_fonts):
    reader = pytest.importorskip("fontTools.ttLib", reason="fontTools reads the tables of fonts")
    for face in (face for faces in (*installed_fonts, *chinese_fonts) for face in faces):
        (licence,) = [family.licence for family in fonts.FAMILIES if family.name == face.family]
        (known,) = [stated for name, stated in STATED.items() if licence.startswith(name)]
        source = face.path or io.BytesIO(fonts.load(face, 12).font_bytes)
        names = reader.TTFont(source, fontNumber=face.index)["name"]
        said = " ".join(names.getDebugName(number) or "" for number in (0, 13))
        assert any(words in said for words in known), f"{face.path}: {licence}, but it says {said}"


@pytest.mark.parametrize(
    ("file", "family", "said"),
    [
        ("cmr10.ttf", "Computer Modern", "BaKoMa Fonts Collection"),
        ("STIXGeneral.ttf", "STIX", "SIL Open Font License"),
        ("DejaVuSerif.ttf", "DejaVu Sans and Serif", "Bitstream Vera Fonts Copyright"),
    ],
)
def test_fonts_of_mathtext_state_the_licence_that_is_named(file, family, said):
    reader = pytest.importorskip("fontTools.ttLib", reason="fontTools reads the tables of fonts")
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib brings the fonts")
    names = reader.TTFont(f"{matplotlib.get_data_path()}/fonts/ttf/{file}")["name"]
    assert said in " ".join(names.getDebugName(number) or "" for number in (0, 13))
    assert said.split(" Font")[0] in fonts.MATHTEXT[family]
