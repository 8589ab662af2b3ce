"""Unusual images: each is used or rejected with a reason, without a crash or much memory."""

import json
import os
import subprocess
import sys
from typing import Any

import edge_case_images
import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.filterwarnings("ignore")

ODDS = edge_case_images.list_edge_case_images()
REFUSED = {odd.name for odd in ODDS if not odd.is_valid}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of each image in a separate process with measured memory."""
    done = subprocess.run(
        [sys.executable, edge_case_images.__file__, str(tmp_path_factory.mktemp("odd"))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_each_image_is_encoded_or_rejected_with_reason(outcomes):
    """Training and the data check agree. No image takes 30 MB, even those of 3.6 billion pixels."""
    assert len(REFUSED) >= 100
    assert len(ODDS) - len(REFUSED) >= 150
    assert [one["name"] for one in outcomes] == [odd.name for odd in ODDS]
    for one in outcomes:
        assert bool(one["reason"]) == (one["name"] in REFUSED), one
        assert not one["reason"] or f"/{one['name']}: " in one["reason"], one
        assert bool(one["fault"]) == (one["name"] in REFUSED), one
        assert one["megabytes"] < 30 or sys.platform != "linux", one
    assert sum(one["megabytes"] for one in outcomes) < 120 or sys.platform != "linux"


MEASURE_LOADING = """
import sys
from pathlib import Path
from finesight.vision import image_processing

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

before = peak()
image = image_processing.load_image(Path(sys.argv[1]))
used = peak() - before
image_processing.MAX_BAND_PIXELS = 1 << 60
assert image.tobytes() == image_processing.load_image(Path(sys.argv[1])).tobytes()
print(used * 1024 / 4096**2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is counted in kilobytes")
@pytest.mark.parametrize("mode", ["F", "I", "I;16", "RGBA", "LA"])
def test_high_bit_depth_conversion_is_memory_bounded(mode, tmp_path):
    """16 million pixels take at most 12 bytes each, and the bits are the same."""
    values = np.random.default_rng(0).integers(0, 60_000, (4096, 4096))
    kinds = {"F": np.float32, "I": np.int32, "I;16": np.uint16}
    if mode in kinds:
        image = Image.fromarray(values.astype(kinds[mode]))
    else:
        image = Image.fromarray((values % 256).astype(np.uint8)).convert(mode)
        image.putalpha(Image.fromarray((values // 256).astype(np.uint8)))
    image.save(tmp_path / "large.tif")
    command = [sys.executable, "-c", MEASURE_LOADING, str(tmp_path / "large.tif")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 12
