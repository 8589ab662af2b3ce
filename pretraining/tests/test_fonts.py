"""Fonts: the split into seen and unseen, what a face lacks, what is said when one is missing."""

from __future__ import annotations

import io
import random
import string
from collections import Counter

import pytest
from synthetic_tasks import fonts

from finesight.errors import UserError

BUILT_IN = fonts.list_faces("built-in")[0]


def test_every_family_has_license_and_package():
    for family in fonts.FONT_FAMILIES:
        assert family.license, f"{family.name} names no licence"
        assert family.package, f"{family.name} names no package"


def test_seen_and_unseen_families_are_disjoint():
    sides = [[f for f in fonts.FONT_FAMILIES if f.is_unseen is unseen] for unseen in (False, True)]
    for part in (
        lambda family: {family.name},
        lambda family: {name for name, _ in family.files},
    ):
        seen, unseen = ({name for family in side for name in part(family)} for side in sides)
        assert not seen & unseen, f"both seen and unseen: {seen & unseen}"


def test_built_in_font_has_printable_ascii():
    assert BUILT_IN.path is None
    assert all(fonts.can_draw(BUILT_IN, sign) for sign in string.printable if sign.strip())


def test_missing_glyphs_are_detected():
    assert not fonts.can_draw(BUILT_IN, "中")
    assert not fonts.can_draw(BUILT_IN, "a中b")
    assert fonts.can_draw(BUILT_IN, "two words")


def test_missing_packages_are_named():
    absent = fonts.FontFamily("No Face", "none", "no-such-package", "no_such", (("a.ttf", ()),))
    system = fonts.FontFamily("No Type", "none", "fonts-no-such", None, (("no-such.ttc", ()),))
    with pytest.raises(UserError, match="the fonts No Face, No Type are not installed") as raised:
        fonts.require_fonts([absent, fonts.FONT_FAMILIES[0], system])
    assert raised.value.remedy == "pip install no-such-package and apt install fonts-no-such"


def test_font_splits_share_no_face(installed_fonts):
    seen, unseen = installed_fonts
    assert BUILT_IN in seen
    assert not {face.family for face in seen} & {face.family for face in unseen}
    assert len({face.family for face in unseen}) >= 5


def test_families_are_sampled_uniformly(installed_fonts):
    rng = random.Random(0)
    chosen = Counter(fonts.sample_face(rng, "seen").family for _ in range(3000))
    families = {face.family for face in installed_fonts[0]}
    assert set(chosen) == families
    assert max(chosen.values()) < 1.5 * min(chosen.values())


def test_every_font_has_printable_ascii(installed_fonts):
    for face in (face for faces in installed_fonts for face in faces):
        lacking = [
            sign for sign in string.printable if sign.strip() and not fonts.can_draw(face, sign)
        ]
        assert not lacking, f"{face} lacks {lacking}"


def test_glyph_detection_matches_font_table(installed_fonts):
    reader = pytest.importorskip("fontTools.ttLib", reason="fontTools reads the tables of fonts")
    signs = "aZ09é£€·×αβЖ中文♥→∫ﬁ"
    for face in installed_fonts[0]:
        if face.path is not None:
            known = reader.TTFont(face.path, fontNumber=face.index).getBestCmap()
            for sign in signs:
                assert fonts.can_draw(face, sign) == (ord(sign) in known), f"{face.path}: {sign}"


def test_variable_font_weights_differ(installed_fonts):
    inter = [face for face in installed_fonts[0] if face.family == "Inter"]
    light, bold = (next(face for face in inter if face.weight == weight) for weight in (400, 700))
    assert fonts.load_font(bold, 40).getlength("weight") > fonts.load_font(light, 40).getlength(
        "weight"
    )


def test_chinese_fonts_have_chinese_glyphs(chinese_fonts):
    for face in (face for faces in chinese_fonts for face in faces):
        assert fonts.can_draw(face, "中文收据")
        assert fonts.load_font(face, 20).getname()[0].endswith("SC")


STATED = {
    "SIL Open Font License 1.1": ("SIL Open Font License", "Open Font License, Version 1.1"),
    "Apache License 2.0": ("Apache License, Version 2.0",),
    "Bitstream Vera licence": ("Bitstream Vera Fonts Copyright", "DejaVu changes are in public"),
    "CC0 1.0": ("No Rights Reserved",),
}
"""What the files of a family under a licence say of themselves, one or the other of it."""


def test_font_files_state_their_license(installed_fonts, chinese_fonts):
    reader = pytest.importorskip("fontTools.ttLib", reason="fontTools reads the tables of fonts")
    for face in (face for faces in (*installed_fonts, *chinese_fonts) for face in faces):
        (licence,) = [
            family.license for family in fonts.FONT_FAMILIES if family.name == face.family
        ]
        (known,) = [stated for name, stated in STATED.items() if licence.startswith(name)]
        source = face.path or io.BytesIO(fonts.load_font(face, 12).font_bytes)
        names = reader.TTFont(source, fontNumber=face.index)["name"]
        output = " ".join(names.getDebugName(number) or "" for number in (0, 13))
        assert any(words in output for words in known), (
            f"{face.path}: {licence}, but it says {output}"
        )


@pytest.mark.parametrize(
    ("file", "family", "output"),
    [
        ("cmr10.ttf", "Computer Modern", "BaKoMa Fonts Collection"),
        ("STIXGeneral.ttf", "STIX", "SIL Open Font License"),
        ("DejaVuSerif.ttf", "DejaVu Sans and Serif", "Bitstream Vera Fonts Copyright"),
    ],
)
def test_mathtext_fonts_state_their_license(file, family, output):
    reader = pytest.importorskip("fontTools.ttLib", reason="fontTools reads the tables of fonts")
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib brings the fonts")
    names = reader.TTFont(f"{matplotlib.get_data_path()}/fonts/ttf/{file}")["name"]
    assert output in " ".join(names.getDebugName(number) or "" for number in (0, 13))
    assert output.split(" Font")[0] in fonts.MATHTEXT_LICENSES[family]
