"Python's garbage collections in a search."

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["quick_collections"]

FEW = 1000  # objects: Python 3.12 keeps 375 of its own frozen


@contextmanager
def quick_collections() -> Iterator[Callable[[], None]]:
    """Yield a function that collects garbage, of which each call passes over what has outlived the last one.

    A whole collection looks at half a million objects where fastai is loaded, at far more after a compilation; CUDA
    graphs need several for each capture. At the end, also by an error, all objects are looked at again. Where somebody
    else has frozen `FEW` or more (`gc.freeze`) they stay so, and each collection is a whole one.
    """
    is_free = gc.get_freeze_count() < FEW

    def collect() -> None:
        gc.collect()
        if is_free:
            gc.freeze()

    try:
        collect()
        yield collect
    finally:
        if is_free:
            gc.unfreeze()
