"The seconds that a search may take."

import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from numbers import Real
from typing import Any

from channelslast.find.distributed import Processes

BUDGET = 27.0  # seconds, unless others are asked for


class Budget:
    "The time of a search: what was asked for, and what has gone."

    def __init__(
        self,
        asked: float | None,  # seconds; None: `BUDGET`, or what the fewest rounds take
        processes: Processes,
    ):
        self.asked = asked
        self.seconds = asked or BUDGET
        self.processes = processes
        self.started = time.perf_counter()
        self.uncounted = 0.0  # seconds of compilation

    def measure_spent(
        self,
        place: Any = None,  # in a fit, if there is one
    ) -> float:
        "Wait for the other processes, and return the seconds of the budget that the slowest has spent."
        return self.processes.decide_together(max, time.perf_counter() - self.started - self.uncounted, place)

    @contextmanager
    def not_counting(self) -> Iterator[None]:
        "The seconds inside are not of the budget."
        started = time.perf_counter()
        yield
        self.uncounted += time.perf_counter() - started


def check_budget(
    budget: Any,
) -> None:
    is_number = isinstance(budget, Real) and not isinstance(budget, bool)
    if budget is not None and not (is_number and isfinite(budget) and budget > 0):
        default = f"None for {BUDGET:.0f}, or what a few rounds take"
        raise ValueError(f"budget={budget!r}: pass a number of seconds above 0, or {default}")
