"""Instructions for other programs to resize images as in the training.

Programs with another image rule get images that the client has resized. The code needs Pillow only,
and its result equals the resized images of finesight, except for images of 16 bits and more.
"""

from __future__ import annotations

import textwrap

from finesight.settings.config import ExactSize, ImageRule, LongestSide, PixelRange
from finesight.vision.image_processing import compute_resized_size

_CODE = """\
{imports}from PIL import Image, ImageOps

def resize(path):
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")
{size}
    return image.resize(size, Image.Resampling.BICUBIC)

# PNG is lossless. Images of 16 bits must be converted to 8 bits before.
resize("image.jpg").save("resized.png")
"""

_LONGEST_SIDE = """\
scale = {longest_side} / max(image.size)
size = [max({factor}, round(side * scale / {factor}) * {factor}) for side in image.size]"""

_PIXEL_RANGE = """\
size = [round(side / {factor}) * {factor} for side in image.size]
if math.prod(size) > {max_pixels}:
    scale = math.sqrt(math.prod(image.size) / {max_pixels})
    size = [max({factor}, math.floor(side / scale / {factor}) * {factor}) for side in image.size]
elif math.prod(size) < {min_pixels}:
    scale = math.sqrt({min_pixels} / math.prod(image.size))
    size = [math.ceil(side * scale / {factor}) * {factor} for side in image.size]"""


def format_resize_code(rule: ImageRule, factor: int) -> str:
    """Format Python code that resizes an image file by an image rule.

    Args:
        factor: Patch size x merge size of the model, which divides both sides.
    """
    imports = ""
    if isinstance(rule, ExactSize):
        size = f"size = {_get_exact_size(rule, factor)}  # width, height"
    elif isinstance(rule, LongestSide):
        size = _LONGEST_SIDE.format(factor=factor, **rule.model_dump())
    else:
        imports = "import math\n"
        size = _PIXEL_RANGE.format(factor=factor, **rule.model_dump())
    return _CODE.format(imports=imports, size=textwrap.indent(size, "    "))


def describe_image_size(rule: ImageRule, factor: int) -> str:
    """Describe the sizes to which an image rule resizes images."""
    if isinstance(rule, ExactSize):
        width, height = _get_exact_size(rule, factor)
        return f"{width} x {height} pixels (width x height)"
    multiples = f"both sides multiples of {factor} pixels"
    if isinstance(rule, LongestSide):
        return f"a longest side of {rule.longest_side} pixels, {multiples}"
    return f"{rule.min_pixels:,} to {rule.max_pixels:,} pixels, {multiples}"


def describe_resizing(rule: ImageRule, factor: int, programs: str, code: str) -> str:
    """Return the note for programs without this image rule, or an empty text.

    Programs have the rule of a range of pixels.

    Args:
        programs: Names of the programs.
        code: Where the client finds the output of `format_resize_code`.
    """
    if isinstance(rule, PixelRange):
        return ""
    size = describe_image_size(rule, factor)
    return (
        f"the training resized images to {size}, for which {programs} have no setting:"
        f" resize each image with {code} before sending it; the pixel limits leave resized images"
        " unchanged"
    )


def _get_exact_size(rule: ExactSize, factor: int) -> tuple[int, int]:
    """Return the width and height of all images."""
    height, width = compute_resized_size((rule.height, rule.width), rule, factor)
    return width, height
