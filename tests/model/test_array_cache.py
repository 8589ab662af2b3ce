from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from finesight.model.vision_encoder import array_cache


def test_cache_is_bounded_in_bytes():
    computed: list[tuple[int, int]] = []

    @array_cache(max_bytes=1000)
    def pair(size: int, value: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        computed.append((size, value))
        return np.full(size, value, dtype=np.uint8), np.zeros(size, dtype=np.uint8)

    for size in (100, 200, 150, 100):
        assert len(pair(size)[0]) == size
    assert computed == [(100, 0), (200, 0), (150, 0)]
    # 900 bytes are cached; another 200 evict the least recently used result.
    pair(100, value=1)
    assert pair(100, value=1)[0].max() == 1
    assert pair(100)[0].max() == 0
    assert computed[3:] == [(100, 1)]
    pair(200)
    assert computed[4:] == [(200, 0)]
    # Results larger than the cache are computed each time.
    pair(600)
    pair(600)
    assert computed[5:] == [(600, 0), (600, 0)]


def test_one_array():
    @array_cache()
    def zeros(size: int) -> NDArray[np.float32]:
        """Zeros."""
        return np.zeros(size, dtype=np.float32)

    assert zeros(3) is zeros(3)
    assert zeros.__doc__ == "Zeros."
