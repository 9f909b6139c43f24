"The time that a training step of one format takes."

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import nan

import numpy as np

from channelslast.formats import TrainFormat

__all__ = ["FormatTiming", "counted"]


@dataclass
class FormatTiming:
    "A candidate: the training step of a Learner in one format."

    format: TrainFormat
    samples: list[float] = field(default_factory=list, repr=False)  # milliseconds a step, in the mean of each round
    items_per_s: float = nan  # images, or what else a batch holds, at `ms` a step; of all processes
    speedup: float = nan  # against the format that the Learner had; its FormatTimings sets it
    peak_bytes: int | None = None  # of GPU memory allocated in a step (CUDA); what CUDA graphs hold is not known
    warmup_s: float = nan  # seconds until the step was steady: compilation, and cuDNN's search for algorithms
    error: str | None = None  # why this candidate could not train, or was not tried
    note: str | None = None  # why its samples are single steps of one fit, and it was not timed in the rounds
    is_tried: bool = True
    first_samples: list[float] = field(default_factory=list, repr=False)  # of single steps of one fit before the rounds

    @property
    def ms(self) -> float:
        "Milliseconds of a training step, the median of the rounds; nan for a candidate that could not train."
        return statistics.median(self.samples) if self.samples else nan

    @property
    def iqr(self) -> float:
        "Interquartile range of the rounds, in milliseconds; nan for fewer than two."
        return _iqr(self.samples) if len(self.samples) > 1 else nan


def counted(
    n: int,
    what: str,  # 'step', 'round', ...
) -> str:
    "Return '1 step', '2 steps' and so on."
    return f"{n} {what}{'' if n == 1 else 's'}"


def _iqr(samples: Sequence[float]) -> float:
    low, high = np.percentile(samples, (25, 75))
    return float(high - low)
