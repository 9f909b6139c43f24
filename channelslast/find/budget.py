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
MARGIN = 1.1  # times what is planned: estimates are rough, and time goes on
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
        self.extension = 0.0  # seconds that the default takes on top, see `extend_to`

    @property
    def seconds(self) -> float:
        "What the search may take, by what is known so far."
        longer = max(0.0, self.first_steps - EXPECTED_FIRST_STEPS) + self.extension
        return min(self.longest, self.planned + longer)

    @property
    def planned(self) -> float:
        "What the search may take without what comes on top where steps are slow."
        return BUDGET if self.asked is None else self.asked

    @property
    def longest(self) -> float:
        "What the search may take at most."
        return PATIENT * self.planned if self.asked is None else self.asked

    def measure_spent(
        self,
        place: Any = None,  # in a fit, if there is one
    ) -> float:
        "Wait for the other processes, and return the seconds of the budget that the slowest has spent."
        return self.processes.decide_together(max, time.perf_counter() - self.started - self.uncounted, place)

    def measure_left(
        self,
        place: Any = None,
        is_needed: bool = False,  # for what the search is worth little without: of `longest`
    ) -> float:
        "Wait for the other processes, and return the seconds that are left; below 0 where too many are spent."
        return (self.longest if is_needed else self.seconds) - self.measure_spent(place)

    def extend_to(
        self,
        seconds: float,
    ) -> float:
        """Have the default last until `seconds` more are left, and a little, if it may be that long.

        Waits for the other processes; returns the seconds that are left.
        """
        spent = self.measure_spent()
        missing = MARGIN * seconds - (self.seconds - spent)
        if missing > 0 and self.seconds + missing <= self.longest:
            self.extension += missing
        return self.seconds - spent

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
