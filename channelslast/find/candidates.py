"A format on its way through the search."

from collections.abc import Callable
from operator import methodcaller
from typing import Any

import torch
from fastai.learner import Learner

from channelslast.devices import amp_mode_of, autocast_dtype
from channelslast.find.timing import FormatTiming
from channelslast.formats import MAKE_GRAPHS, TrainFormat
from channelslast.memory_format import supports_channels_last


class Candidate:
    "A format on its way through the search."

    def __init__(
        self,
        fmt: TrainFormat,
        prepare: Callable[[Learner], Any] | None = None,  # puts a Learner into it; None: `Learner.to_format`
        error: str | None = None,  # why not to try it
        is_choice: bool = True,  # False: timed for comparison alone
        is_own: bool = False,  # what the Learner has
    ):
        self.row = FormatTiming(fmt, error=error, is_tried=error is None)
        self.is_choice, self.is_own = is_choice, is_own
        self.is_compiled = fmt.compile is not None
        # CUDA graphs, in memory of their own
        self.has_graphs = fmt.cuda_graph or fmt.compile in MAKE_GRAPHS
        self.prepare = prepare or methodcaller("to_format", fmt)
        self.scaler_state: dict[str, Any] = {}
        self.raised: Exception | None = None  # by the Learner
        self.is_reached = True  # False: there was no time for it
        # Known after the warm-up: the seconds of a step, of all steps before it was steady, of all else in a fit
        self.step_s = self.first_steps_s = self.overhead_s = 0.0
        self.least_ms = 0.0  # milliseconds of the shortest step
        self.busy_s: float | None = None  # of a step, in which the GPU ran a kernel

    @property
    def is_eager(self) -> bool:
        "Whether Python launches each kernel of a step."
        return not (self.is_compiled or self.has_graphs)

    @property
    def capture_s(self) -> float:
        "Seconds of a fit in which CUDA graphs are captured, known after the warm-up; a compiler's own count as none."
        return self.first_steps_s if self.has_graphs and not self.is_compiled else 0.0

    @property
    def is_needed(self) -> bool:
        "Whether the result says little without it."
        return self.is_own or not self.is_choice

    def n_lead(
        self,
        device: torch.device,
    ) -> int:
        "Steps of a round before the first timed one."
        if device.type != "cuda":
            return 1  # makes the optimizer's state
        if self.has_graphs:
            return 4  # weights have moved: the CUDA graphs are recorded anew
        return 2  # until Python is ahead of the GPU


def new_candidate(
    fmt: TrainFormat,
    device: torch.device,
    is_own: bool,  # with which the others are compared
    prepare: Callable[[Learner], Any] | None = None,  # puts a Learner into it; None: `Learner.to_format`
) -> Candidate:
    "Return a candidate, with an error if the device would train in another format."
    return Candidate(fmt, prepare, None if is_own else why_not(fmt, device), is_own=is_own)


def why_not(
    fmt: TrainFormat,
    device: torch.device,
) -> str | None:
    "Return why the device would train in another format than `fmt`, None if it trains in that."
    if fmt.channels_last and not supports_channels_last(device):
        return f"channels last is not reliable on the device '{device}'"
    if fmt.cuda_graph and device.type != "cuda":
        return f"the device '{device}' has no CUDA graphs"
    if fmt.amp_mode is None:
        return None
    try:
        dtype, why = autocast_dtype(fmt.amp_mode, device)
    except ValueError as error:
        return str(error)
    return None if amp_mode_of(dtype) == fmt.amp_mode else why
