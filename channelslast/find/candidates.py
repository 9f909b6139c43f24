"The formats that a search tries."

from collections.abc import Callable, Iterable
from dataclasses import replace
from operator import methodcaller
from typing import Any

import torch
from fastai.learner import Learner

from channelslast.devices import accelerated_dtypes, amp_mode_of, autocast_dtype, training_device
from channelslast.find.result import FormatTiming
from channelslast.formats import TrainFormat
from channelslast.memory_format import conv_ndims, module_ndims, supports_channels_last


class Candidate:
    "A format on its way through the search."

    def __init__(
        self,
        fmt: TrainFormat,
        prepare: Callable[[Learner], Any] | None = None,  # puts a Learner into it; None: `Learner.to_format`
        error: str | None = None,  # why not to try it
        is_choice: bool = True,  # False: timed for comparison alone
    ):
        self.row = FormatTiming(fmt, error=error)
        self.is_choice = is_choice
        self.is_compiled = fmt.compile is not None
        # CUDA graphs, in memory of their own
        self.has_graphs = fmt.cuda_graph or fmt.compile in ("reduce-overhead", "max-autotune")
        self.prepare = prepare or methodcaller("to_format", fmt)
        self.scaler_state: dict[str, Any] = {}
        self.raised: Exception | None = None  # by the Learner
        self.step_s = self.overhead_s = 0.0  # of a step, and of all else in a fit; known after the warm-up

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


def new_candidates(
    learn: Learner,
    formats: Iterable[TrainFormat] | None = None,  # None: all that the device accelerates
    compile: bool = False,  # each compiled too
) -> list[Candidate]:
    "Return the candidates of `Learner.format_find`, those marked that the device would train in another format."
    device = training_device(learn)
    return [Candidate(fmt, error=why_not(fmt, device)) for fmt in formats_to_try(learn, formats, compile)]


def formats_to_try(
    learn: Learner,
    formats: Iterable[TrainFormat] | None,
    compile: bool,
) -> list[TrainFormat]:
    "Return the format of the Learner, and those asked for; with `compile` these compiled too."
    device, start = training_device(learn), learn.train_format
    if formats is None:
        amp_modes = [None, *map(amp_mode_of, accelerated_dtypes(device))]
        has_images = bool(module_ndims(learn.model) or conv_ndims(learn.model)) and supports_channels_last(device)
        both = (False, True) if has_images else (False,)
        formats = [replace(start, channels_last=last, amp_mode=mode) for mode in amp_modes for last in both]
    formats = list(formats)
    if compile:
        eager = [replace(fmt, compile=None) for fmt in formats]
        modes = ("default", "reduce-overhead") if device.type == "cuda" else ("default",)
        formats = [*formats, *eager, *(replace(fmt, compile=mode) for mode in modes for fmt in eager)]
    return list(dict.fromkeys(formats if start in formats else [start, *formats]))


def why_not(
    fmt: TrainFormat,
    device: torch.device,
) -> str | None:
    "Return why the device would train in another format than `fmt`, None if it trains in that."
    if fmt.channels_last and not supports_channels_last(device):
        return f"channels last is not reliable on the device '{device}'"
    if fmt.amp_mode is None:
        return None
    try:
        dtype, why = autocast_dtype(fmt.amp_mode, device)
    except ValueError as error:
        return str(error)
    return None if amp_mode_of(dtype) == fmt.amp_mode else why
