"""Fonts for synthetic images, from installed Python packages.

Some font families are reserved for evaluation. finesight contains no font files. All listed
licenses allow drawing with a font and training on the images; none of them applies to the output.
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
from finesight.vision.drawing import load_builtin_font

FontSplit = Literal["built-in", "seen", "unseen"]
"""Set of fonts for a task: the built-in font of Pillow, training or evaluation fonts."""

Script = Literal["latin", "chinese"]

MISSING_GLYPH = "\uffff"
"""Character without a glyph in any font, drawn as the symbol for a missing glyph."""

SYSTEM_FONT_DIRS = ("/usr/share/fonts", "~/.local/share/fonts", "~/.fonts", "/Library/Fonts")
"""Folders that are searched for fonts that no Python package provides."""

_OFL_LICENSE = "SIL Open Font License 1.1"
_APACHE_LICENSE = "Apache License 2.0"
_UPRIGHT_WEIGHTS = (400, 700)
_ITALIC_WEIGHTS = (400,)


@dataclass(frozen=True, slots=True)
class FontFace:
    """A font face, such as the regular or italic style of a font family.

    Attributes:
        path: Font file; None for the built-in font of Pillow.
        index: Index of the face in a font collection file.
        weight: Weight of a variable font; None for other fonts.
    """

    family: str
    path: Path | None = None
    index: int = 0
    weight: int | None = None


@dataclass(frozen=True, slots=True)
class FontFamily:
    """A font family with its package and license.

    Attributes:
        package: Python package that provides the fonts.
        module: Python module with the font files; None for system fonts.
        files: Font files with the weights to use; no weights for fonts that are not variable. Files
            are paths within the folder of the module, or file names in SYSTEM_FONT_DIRS.
        is_unseen: Whether the family is used for evaluation only.
    """

    name: str
    license: str
    package: str
    module: str | None
    files: tuple[tuple[str, tuple[int, ...]], ...]
    is_unseen: bool = False
    script: Script = "latin"


def _variable_family(
    name: str, package: str, *, is_unseen: bool = False, axes: str = "[wght]"
) -> FontFamily:
    """Build a family from a `fontpkg-...` package with an upright and an italic variable font."""
    stem = f"files/{name.replace(' ', '')}"
    files = ((f"{stem}{axes}.ttf", _UPRIGHT_WEIGHTS), (f"{stem}-Italic{axes}.ttf", _ITALIC_WEIGHTS))
    module = package.replace("-", "_")
    return FontFamily(name, _OFL_LICENSE, package, module, files, is_unseen)


def _upright_family(
    name: str, license_name: str, package: str, *, is_unseen: bool = False
) -> FontFamily:
    """Build a family from a `fontpkg-...` package with one variable font."""
    files = ((f"files/{name.replace(' ', '')}[wght].ttf", _UPRIGHT_WEIGHTS),)
    return FontFamily(name, license_name, package, package.replace("-", "_"), files, is_unseen)


def _static_family(
    name: str, package: str, stem: str, styles: Iterable[str], *, is_unseen: bool = False
) -> FontFamily:
    files = tuple((f"files/{stem}-{style}.ttf", ()) for style in styles)
    return FontFamily(name, _OFL_LICENSE, package, package.replace("-", "_"), files, is_unseen)


def _matplotlib_family(name: str, license_name: str, files: Iterable[str]) -> FontFamily:
    paths = tuple((f"mpl-data/fonts/ttf/{file}.ttf", ()) for file in files)
    return FontFamily(name, license_name, "matplotlib", "matplotlib", paths)


def _noto_family(name: str, stem: str, *, is_unseen: bool = False) -> FontFamily:
    files = tuple((f"{stem}-{style}.ttc", ()) for style in ("Regular", "Bold"))
    return FontFamily(name, _OFL_LICENSE, "fonts-noto-cjk", None, files, is_unseen, "chinese")


_DEJAVU_LICENSE = (
    "Bitstream Vera licence, for some signs that of Arev, changes in the public domain"
)
_STIX_LICENSE = "SIL Open Font License 1.1, as STIX Font License of 2010"
_BAKOMA_LICENSE = "BaKoMa Fonts Licence"

FONT_FAMILIES = (
    FontFamily("Aileron", "CC0 1.0", "pillow", "PIL", ()),
    _matplotlib_family(
        "DejaVu Sans", _DEJAVU_LICENSE, ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique")
    ),
    _matplotlib_family(
        "DejaVu Serif", _DEJAVU_LICENSE, ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic")
    ),
    _matplotlib_family(
        "DejaVu Sans Mono", _DEJAVU_LICENSE, ("DejaVuSansMono", "DejaVuSansMono-Bold")
    ),
    _matplotlib_family(
        "STIX", _STIX_LICENSE, ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic")
    ),
    FontFamily(
        "Open Sans",
        _APACHE_LICENSE,
        "ttf-opensans",
        "ttf_opensans",
        tuple((f"ttf/OpenSans-{s}.ttf", ()) for s in ("Light", "Regular", "Bold", "Italic")),
    ),
    _variable_family("Inter", "fontpkg-inter", axes="[opsz,wght]"),
    _variable_family("Lora", "fontpkg-lora"),
    _variable_family("Bitter", "fontpkg-bitter"),
    _variable_family("JetBrains Mono", "fontpkg-jetbrains-mono"),
    _variable_family("Archivo Narrow", "fontpkg-archivo-narrow"),
    _upright_family("Oswald", _OFL_LICENSE, "fontpkg-oswald"),
    _static_family(
        "Crimson Text", "fontpkg-crimson-text", "CrimsonText", ("Regular", "Bold", "Italic")
    ),
    _noto_family("Noto Sans CJK SC", "NotoSansCJK"),
    _variable_family("Work Sans", "fontpkg-work-sans", is_unseen=True),
    _upright_family("Roboto Slab", _APACHE_LICENSE, "fontpkg-roboto-slab", is_unseen=True),
    _variable_family(
        "Nunito Sans", "fontpkg-nunito-sans", is_unseen=True, axes="[YTLC,opsz,wdth,wght]"
    ),
    _static_family(
        "PT Serif",
        "fontpkg-pt-serif",
        "PT_Serif-Web",
        ("Regular", "Bold", "Italic"),
        is_unseen=True,
    ),
    _static_family(
        "IBM Plex Mono",
        "fontpkg-ibm-plex-mono",
        "IBMPlexMono",
        ("Regular", "Bold", "Italic"),
        is_unseen=True,
    ),
    _noto_family("Noto Serif CJK SC", "NotoSerifCJK", is_unseen=True),
)
"""All font families.

The styles of a family are either all for training or all for evaluation.
"""

MATHTEXT_LICENSES = {
    "Computer Modern": _BAKOMA_LICENSE,
    "STIX": _STIX_LICENSE,
    "DejaVu Sans and Serif": _DEJAVU_LICENSE,
}
"""Licenses of the fonts in matplotlib's mathtext, as stated by the LICENSE of matplotlib.

The licenses of other font families are those that font files and packages state.
"""


@lru_cache
def list_faces(font_split: FontSplit, script: Script = "latin") -> tuple[FontFace, ...]:
    """List the font faces of a split for a script, in a fixed order.

    Raises:
        UserError: A font package is missing. With other fonts, the same seed would give other
            images, so the error names the packages to install.
    """
    if font_split == "built-in" and script == "latin":
        return (FontFace("Aileron"),)
    families = [
        family
        for family in FONT_FAMILIES
        if family.is_unseen == (font_split == "unseen") and family.script == script
    ]
    require_fonts(families)
    return tuple(face for family in families for face in _list_family_faces(family))


def sample_face(rng: random.Random, font_split: FontSplit, script: Script = "latin") -> FontFace:
    """Sample a font family, and then one of its faces.

    All families are equally likely, whatever their number of faces.
    """
    return rng.choice(rng.choice(_group_by_family(font_split, script)))


@lru_cache
def _group_by_family(font_split: FontSplit, script: Script) -> list[list[FontFace]]:
    faces_by_family: dict[str, list[FontFace]] = {}
    for face in list_faces(font_split, script):
        faces_by_family.setdefault(face.family, []).append(face)
    return list(faces_by_family.values())


def require_fonts(families: Iterable[FontFamily]) -> None:
    """Raise UserError if any of the font families is not installed.

    The error names the packages to install.
    """
    missing = [family for family in families if len(_find_font_files(family)) < len(family.files)]
    if not missing:
        return
    python_packages = sorted({family.package for family in missing if family.module})
    system_packages = sorted({family.package for family in missing if not family.module})
    commands = [f"pip install {' '.join(python_packages)}"] if python_packages else []
    commands += [f"apt install {' '.join(system_packages)}"] if system_packages else []
    raise UserError(
        f"the fonts {', '.join(family.name for family in missing)} are not installed",
        where="generated tasks",
        expected="all fonts of the synthetic images",
        remedy=" and ".join(commands),
    )


@lru_cache(maxsize=1024)
def load_font(face: FontFace, size: int) -> ImageFont.FreeTypeFont:
    """Load a font face at a size in pixels per em.

    The basic layout engine of Pillow is used, so that the output does not depend on other
    libraries.
    """
    if face.path is None:
        return load_builtin_font(size)
    layout = ImageFont.Layout.BASIC
    font = ImageFont.truetype(str(face.path), size, face.index, layout_engine=layout)
    if face.weight is not None:
        font.set_variation_by_axes(_get_axis_values(font, face.weight))
    return font


def can_draw(face: FontFace, text: str) -> bool:
    """Return whether a font face has glyphs for all characters of a text.

    Spaces are ignored.
    """
    return all(_has_glyph(face, character) for character in text if character != " ")


@lru_cache(maxsize=200_000)
def _has_glyph(face: FontFace, character: str) -> bool:
    # What a font lacks is drawn like a character that none has. The reverse may err only on the
    # conservative: glyphs identical to the missing-glyph symbol are excluded as well.
    font = load_font(face, 24)
    glyph, missing_glyph = (font.getmask(text) for text in (character, MISSING_GLYPH))
    return glyph.size != missing_glyph.size or bytes(glyph) != bytes(missing_glyph)


def _get_axis_values(font: ImageFont.FreeTypeFont, weight: int) -> list[float]:
    """Return the values of all axes of a variable font for the given weight.

    Other axes have their default value.
    """
    return [
        float(weight) if axis["name"] == b"Weight" else float(axis["default"] or 0)
        for axis in font.get_variation_axes()
    ]


def _find_font_files(family: FontFamily) -> list[tuple[Path, tuple[int, ...]]]:
    if family.module is None:
        return [
            (path, weights) for name, weights in family.files if (path := _find_system_font(name))
        ]
    spec = importlib.util.find_spec(family.module)
    folders = (spec.submodule_search_locations or []) if spec else []
    return [
        (Path(folder) / name, weights)
        for folder in folders
        for name, weights in family.files
        if (Path(folder) / name).is_file()
    ]


@lru_cache
def _find_system_font(name: str) -> Path | None:
    candidates = (
        path
        for folder in SYSTEM_FONT_DIRS
        if Path(folder).expanduser().is_dir()
        for path in sorted(Path(folder).expanduser().rglob(name))
    )
    return next(candidates, None)


def _list_family_faces(family: FontFamily) -> list[FontFace]:
    if not family.files:
        return [FontFace(family.name)]
    faces = []
    for path, weights in _find_font_files(family):
        index = _find_face_index(path, family.name) if path.suffix == ".ttc" else 0
        faces += [FontFace(family.name, path, index, weight) for weight in weights or (None,)]
    return faces


def _find_face_index(path: Path, family: str) -> int:
    """Return the index of the face with the given name in a font collection file."""
    for index in range(64):
        if ImageFont.truetype(str(path), 12, index).getname()[0] == family:
            return index
    raise AssertionError(f"{path} holds no face named {family}")
