"Python's garbage collections in a search."

import gc
from types import TracebackType

__all__ = ["Garbage"]


class Garbage:
    """Collects garbage often, at little cost: a collection passes over what has outlived the last one.

    A whole one looks at half a million objects where fastai is loaded, at far more after a compilation; CUDA graphs
    need several for each capture. At the end, also by an error, all objects are looked at again. Where somebody else
    has frozen objects (`gc.freeze`) they stay so, and each collection is a whole one.
    """

    def __enter__(self) -> "Garbage":
        self.is_free = not gc.get_freeze_count()
        self.collect()
        return self

    def collect(self) -> None:
        "Collect what has become garbage since the last time."
        gc.collect()
        if self.is_free:
            gc.freeze()

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.is_free:
            gc.unfreeze()
