"The seconds that a search may take."

import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from numbers import Real
from typing import Any

from channelslast.find.distributed import Processes

BUDGET = 30.0  # seconds, unless others are asked for
PATIENT = 2.0  # times `BUDGET`, at most, where steps are slow
EXPECTED_FIRST_STEPS = 15.0  # seconds of first steps, in which algorithms are looked for, that fit into `BUDGET`


class Budget:
    "The time of a search: how long it may take, and what has gone."

    def __init__(
        self,
        asked: float | None,  # seconds; None: `BUDGET`, up to `PATIENT` times that where steps are slow
        processes: Processes,
    ):
        self.asked = asked
        self.processes = processes
        self.started = time.perf_counter()
        self.uncounted = 0.0  # seconds of compilation
        self.first_steps = 0.0  # seconds of steps in which the device looked for algorithms (cuDNN's benchmark)
        self.waits = 0.0  # seconds more that the default takes for the fewest rounds that prove something

    @property
    def seconds(self) -> float:
        "What the search may take, by what is known so far."
        if self.asked is not None:
            return self.asked
        longer = max(0.0, self.first_steps - EXPECTED_FIRST_STEPS) + self.waits
        return BUDGET + min((PATIENT - 1) * BUDGET, longer)

    def measure_spent(
        self,
        place: Any = None,  # in a fit, if there is one
    ) -> float:
        "Wait for the other processes, and return the seconds of the budget that the slowest has spent."
        return self.processes.decide_together(max, time.perf_counter() - self.started - self.uncounted, place)

    def measure_left(
        self,
        place: Any = None,
    ) -> float:
        "Wait for the other processes, and return the seconds that are left; below 0 where too many are spent."
        return self.seconds - self.measure_spent(place)

    def wait_for(
        self,
        seconds: float,
    ) -> float:
        "Have the default hold so many seconds more, if it may; return those that are left."
        left = self.measure_left()
        if self.asked is not None or left >= seconds:
            return left
        self.waits += seconds - left
        return self.measure_left()

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
        default = f"None for {BUDGET:.0f}, up to {PATIENT * BUDGET:.0f} where steps are slow"
        raise ValueError(f"budget={budget!r}: pass a number of seconds above 0, or {default}")
