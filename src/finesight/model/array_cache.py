"""LRU cache for functions that return NumPy arrays, limited by memory."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

Given = ParamSpec("Given")
Arrays = TypeVar("Arrays", bound=NDArray[Any] | tuple[NDArray[Any], ...])

CACHE_BYTES = 64 << 20
"""Default memory limit of one cached function, in bytes: enough for the results of hundreds of
image sizes with a thousand tokens each."""


def array_cache(
    max_bytes: int = CACHE_BYTES,
) -> Callable[[Callable[Given, Arrays]], Callable[Given, Arrays]]:
    """Cache the arrays that a function returns, keyed by its arguments.

    The least recently used results are evicted when the cached arrays exceed `max_bytes` in total;
    `functools.lru_cache` limits only the number of results. Callers share the arrays and must not
    modify them.
    """

    def decorate(function: Callable[Given, Arrays]) -> Callable[Given, Arrays]:
        results: OrderedDict[Hashable, Arrays] = OrderedDict()
        lock, cached_bytes = threading.Lock(), 0

        @functools.wraps(function)
        def cached(*args: Given.args, **kwargs: Given.kwargs) -> Arrays:
            nonlocal cached_bytes
            key = (args, tuple(kwargs.items()))
            with lock:
                if key in results:
                    results.move_to_end(key)
                    return results[key]
            result = function(*args, **kwargs)
            with lock:
                if key not in results:
                    results[key] = result
                    cached_bytes += _bytes(result)
                while cached_bytes > max_bytes:
                    cached_bytes -= _bytes(results.popitem(last=False)[1])
            return result

        return cached

    return decorate


def _bytes(arrays: NDArray[Any] | tuple[NDArray[Any], ...]) -> int:
    return (
        arrays.nbytes if isinstance(arrays, np.ndarray) else sum(array.nbytes for array in arrays)
    )
