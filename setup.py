"""What a build does beyond pyproject.toml: finesight-tiny's weights are unpacked into the package.

Git holds them compressed by a third (`pretraining/weights/*.xz`, made by `pack`); wheels and
checkouts that are installed have them as every other model's. Everything here is Python's own:
a build has nothing else.
"""

from __future__ import annotations

import lzma
import os
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
PACKED = HERE / "pretraining" / "weights"
MODEL = HERE / "src" / "finesight" / "assets" / "finesight-tiny"

# Of a number in bf16 the upper byte, sign and exponent, says more of the next number's upper byte
# than of its own lower one: literals are told apart by where they stand among two.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 1, "pb": 1}]


def pack() -> None:
    """Compress the weights as they lie in the package: python -c "import setup; setup.pack()"."""
    PACKED.mkdir(exist_ok=True)
    for path in sorted(MODEL.glob("*.safetensors")):
        packed = lzma.compress(path.read_bytes(), format=lzma.FORMAT_XZ, filters=FILTERS)
        (PACKED / f"{path.name}.xz").write_bytes(packed)


def unpack() -> None:
    """Write the weights into the package, where others or none are."""
    for path in sorted(PACKED.glob("*.xz")):
        content, target = lzma.decompress(path.read_bytes()), MODEL / path.stem
        if not target.exists() or target.read_bytes() != content:
            # Whole or not at all: a build may be stopped, and two may run at once.
            hidden = target.with_name(f".{target.name}.{os.getpid()}")
            hidden.write_bytes(content)
            hidden.replace(target)


class BuildWithWeights(build_py):
    """build_py, of a package that is whole."""

    def run(self) -> None:
        unpack()
        super().run()


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildWithWeights})
