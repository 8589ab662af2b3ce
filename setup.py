"""Unpack the weights of finesight-tiny into the package during the build.

Git contains the compressed weights (`pretraining/weights/*.xz`, written by `pack`, one third
smaller). Wheels and installed checkouts contain plain safetensors files. This file imports only the
standard library and setuptools, because the build environment has no other packages.
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

# The upper byte of a bf16 value (sign and exponent) predicts the upper byte of the next value
# better than its own lower byte. So the literal context depends on the position within two bytes.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 1, "pb": 1}]


def pack() -> None:
    """Compress the weights of the package: python -c "import setup; setup.pack()"."""
    PACKED.mkdir(exist_ok=True)
    for path in sorted(MODEL.glob("*.safetensors")):
        packed = lzma.compress(path.read_bytes(), format=lzma.FORMAT_XZ, filters=FILTERS)
        (PACKED / f"{path.name}.xz").write_bytes(packed)


def unpack() -> None:
    """Write the weights into the package if they are missing or different."""
    for path in sorted(PACKED.glob("*.xz")):
        content, target = lzma.decompress(path.read_bytes()), MODEL / path.stem
        if not target.exists() or target.read_bytes() != content:
            # Write atomically: a build may be interrupted, and two builds may run concurrently.
            temporary = target.with_name(f".{target.name}.{os.getpid()}")
            temporary.write_bytes(content)
            temporary.replace(target)


class BuildWithWeights(build_py):
    """build_py with unpacked weights."""

    def run(self) -> None:
        unpack()
        super().run()


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildWithWeights})
