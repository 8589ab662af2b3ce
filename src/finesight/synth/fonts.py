"""Fonts to draw with, found where Python packages put them: faces seen in training, others never.

No font file belongs to finesight. Drawing with a font and learning from the pictures is what all
the licences named here allow; none of them reaches to what is made with the font.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from PIL import ImageFont

from finesight.errors import UserError

Choice = Literal["built-in", "seen", "unseen"]
"""Pillow's own face alone; the faces to train on; the faces kept for measuring only."""

Script = Literal["latin", "chinese"]

NOT_A_CHARACTER = "\uffff"
"""Has no glyph in any font: it is drawn as the font draws what it lacks."""

SYSTEM_FOLDERS = ("/usr/share/fonts", "~/.local/share/fonts", "~/.fonts", "/Library/Fonts")
"""Where fonts lie that no Python package brings."""

_OFL = "SIL Open Font License 1.1"
_APACHE = "Apache License 2.0"
_UPRIGHT = (400, 700)
_SLANTED = (400,)


@dataclass(frozen=True, slots=True)
class Face:
    """One face: a file, the face's number in it and, in a variable font, its weight.

    Without a path it is the face that Pillow carries.
    """

    family: str
    path: Path | None = None
    index: int = 0
    weight: int | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """Faces of one design, the package that brings them and the licence they are under.

    `files` are paths within the module's folder, or names of files in SYSTEM_FOLDERS, each with
    the weights to take from it, none from a font that is not variable.
    """

    name: str
    licence: str
    package: str
    module: str | None
    files: tuple[tuple[str, tuple[int, ...]], ...]
    unseen: bool = False
    script: Script = "latin"


def _variable(name: str, package: str, *, unseen: bool = False, axes: str = "[wght]") -> Family:
    """A family of a `fontpkg-...` package: an upright and a slanted variable font."""
    stem = f"files/{name.replace(' ', '')}"
    files = ((f"{stem}{axes}.ttf", _UPRIGHT), (f"{stem}-Italic{axes}.ttf", _SLANTED))
    module = package.replace("-", "_")
    return Family(name, _OFL, package, module, files, unseen)


def _upright(name: str, licence: str, package: str, *, unseen: bool = False) -> Family:
    """A family of a `fontpkg-...` package: one variable font."""
    files = ((f"files/{name.replace(' ', '')}[wght].ttf", _UPRIGHT),)
    return Family(name, licence, package, package.replace("-", "_"), files, unseen)


def _static(
    name: str, package: str, stem: str, styles: Iterable[str], *, unseen: bool = False
) -> Family:
    files = tuple((f"files/{stem}-{style}.ttf", ()) for style in styles)
    return Family(name, _OFL, package, package.replace("-", "_"), files, unseen)


def _matplotlib(name: str, licence: str, files: Iterable[str]) -> Family:
    paths = tuple((f"mpl-data/fonts/ttf/{file}.ttf", ()) for file in files)
    return Family(name, licence, "matplotlib", "matplotlib", paths)


def _noto(name: str, stem: str, *, unseen: bool = False) -> Family:
    files = tuple((f"{stem}-{style}.ttc", ()) for style in ("Regular", "Bold"))
    return Family(name, _OFL, "fonts-noto-cjk", None, files, unseen, "chinese")


_DEJAVU = "Bitstream Vera licence, for some signs that of Arev, changes in the public domain"
_STIX = "SIL Open Font License 1.1, as STIX Font License of 2010"
_BAKOMA = "BaKoMa Fonts Licence"

FAMILIES = (
    Family("Aileron", "CC0 1.0", "pillow", "PIL", ()),
    _matplotlib("DejaVu Sans", _DEJAVU, ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique")),
    _matplotlib("DejaVu Serif", _DEJAVU, ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic")),
    _matplotlib("DejaVu Sans Mono", _DEJAVU, ("DejaVuSansMono", "DejaVuSansMono-Bold")),
    _matplotlib("STIX", _STIX, ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic")),
    Family(
        "Open Sans",
        _APACHE,
        "ttf-opensans",
        "ttf_opensans",
        tuple((f"ttf/OpenSans-{s}.ttf", ()) for s in ("Light", "Regular", "Bold", "Italic")),
    ),
    _variable("Inter", "fontpkg-inter", axes="[opsz,wght]"),
    _variable("Lora", "fontpkg-lora"),
    _variable("Bitter", "fontpkg-bitter"),
    _variable("JetBrains Mono", "fontpkg-jetbrains-mono"),
    _variable("Archivo Narrow", "fontpkg-archivo-narrow"),
    _upright("Oswald", _OFL, "fontpkg-oswald"),
    _static("Crimson Text", "fontpkg-crimson-text", "CrimsonText", ("Regular", "Bold", "Italic")),
    _noto("Noto Sans CJK SC", "NotoSansCJK"),
    _variable("Work Sans", "fontpkg-work-sans", unseen=True),
    _upright("Roboto Slab", _APACHE, "fontpkg-roboto-slab", unseen=True),
    _variable("Nunito Sans", "fontpkg-nunito-sans", unseen=True, axes="[YTLC,opsz,wdth,wght]"),
    _static(
        "PT Serif",
        "fontpkg-pt-serif",
        "PT_Serif-Web",
        ("Regular", "Bold", "Italic"),
        unseen=True,
    ),
    _static(
        "IBM Plex Mono",
        "fontpkg-ibm-plex-mono",
        "IBMPlexMono",
        ("Regular", "Bold", "Italic"),
        unseen=True,
    ),
    _noto("Noto Serif CJK SC", "NotoSerifCJK", unseen=True),
)
"""Every family that is drawn with. A family is seen or unseen as a whole, in all its styles."""

MATHTEXT = {
    "Computer Modern": _BAKOMA,
    "STIX": _STIX,
    "DejaVu Sans and Serif": _DEJAVU,
}
"""What matplotlib's mathtext draws formulas with, and the licence of each, as matplotlib's own
LICENSE states it. The families' licences are those that font files and packages state."""


@lru_cache
def faces(choice: Choice, script: Script = "latin") -> tuple[Face, ...]:
    """The faces of a choice, always the same and in the same order.

    Raises UserError naming the packages to install when any is missing: with other fonts the same
    seed would draw other pictures.
    """
    if choice == "built-in" and script == "latin":
        return (Face("Aileron"),)
    wanted = [
        family
        for family in FAMILIES
        if family.unseen == (choice == "unseen") and family.script == script
    ]
    require(wanted)
    return tuple(face for family in wanted for face in _faces(family))


def any_face(rng: random.Random, choice: Choice, script: Script = "latin") -> Face:
    """A family, and then one of its faces: a family of many is not drawn with more often."""
    return rng.choice(rng.choice(_by_family(choice, script)))


@lru_cache
def _by_family(choice: Choice, script: Script) -> list[list[Face]]:
    of_name: dict[str, list[Face]] = {}
    for face in faces(choice, script):
        of_name.setdefault(face.family, []).append(face)
    return list(of_name.values())


def require(families: Iterable[Family]) -> None:
    """Raise UserError naming the packages to install when any of the families is missing."""
    missing = [family for family in families if len(_paths(family)) < len(family.files)]
    if not missing:
        return
    python = sorted({family.package for family in missing if family.module})
    system = sorted({family.package for family in missing if not family.module})
    steps = [f"pip install {' '.join(python)}"] if python else []
    steps += [f"apt install {' '.join(system)}"] if system else []
    raise UserError(
        f"the fonts {', '.join(family.name for family in missing)} are not installed",
        where="generated tasks",
        expected="every font that the pictures are drawn with",
        remedy=" and ".join(steps),
    )


@lru_cache(maxsize=1024)
def load(face: Face, size: int) -> ImageFont.FreeTypeFont:
    """The face at `size` pixels an em, laid out by Pillow alone so that it is the same anywhere."""
    layout = ImageFont.Layout.BASIC
    if face.path is None:
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
        return font.font_variant(layout_engine=layout)
    font = ImageFont.truetype(str(face.path), size, face.index, layout_engine=layout)
    if face.weight is not None:
        font.set_variation_by_axes(_axes(font, face.weight))
    return font


def drawable(face: Face, text: str) -> bool:
    """Whether the face has a glyph for every character of `text`, spaces apart."""
    return all(_has(face, character) for character in text if character != " ")


@lru_cache(maxsize=200_000)
def _has(face: Face, character: str) -> bool:
    # What a font lacks is drawn like a character that none has. The reverse may err only on the
    # safe side: a glyph that looks like that sign is not drawn either.
    font = load(face, 24)
    glyph, lacking = (font.getmask(text) for text in (character, NOT_A_CHARACTER))
    return glyph.size != lacking.size or bytes(glyph) != bytes(lacking)


def _axes(font: ImageFont.FreeTypeFont, weight: int) -> list[float]:
    """Every axis at its default but the weight."""
    return [
        float(weight) if axis["name"] == b"Weight" else float(axis["default"] or 0)
        for axis in font.get_variation_axes()
    ]


def _paths(family: Family) -> list[tuple[Path, tuple[int, ...]]]:
    if family.module is None:
        return [(path, weights) for name, weights in family.files if (path := _in_system(name))]
    spec = importlib.util.find_spec(family.module)
    folders = (spec.submodule_search_locations or []) if spec else []
    return [
        (Path(folder) / name, weights)
        for folder in folders
        for name, weights in family.files
        if (Path(folder) / name).is_file()
    ]


@lru_cache
def _in_system(name: str) -> Path | None:
    found = (
        path
        for folder in SYSTEM_FOLDERS
        if Path(folder).expanduser().is_dir()
        for path in sorted(Path(folder).expanduser().rglob(name))
    )
    return next(found, None)


def _faces(family: Family) -> list[Face]:
    if not family.files:
        return [Face(family.name)]
    found = []
    for path, weights in _paths(family):
        index = _number_in(path, family.name) if path.suffix == ".ttc" else 0
        found += [Face(family.name, path, index, weight) for weight in weights or (None,)]
    return found


def _number_in(path: Path, family: str) -> int:
    """The number of the face of that name in a collection."""
    for index in range(64):
        if ImageFont.truetype(str(path), 12, index).getname()[0] == family:
            return index
    raise AssertionError(f"{path} holds no face named {family}")
