"Watch training steps, wherever they are run from: trace one, and on a GPU time and profile others."

import statistics
import time
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity

from channelslast.nested import tensors_in
from channelslast.summary.gpu import GpuShares, gpu_shares
from channelslast.summary.modules import modules_as_written
from channelslast.summary.records import OUTSIDE
from channelslast.summary.result import FormatSummary, dtype_name, quoted
from channelslast.summary.tracer import FormatTracer
from channelslast.swaps import swapped_classes
from channelslast.tensors import format_of

__all__ = ["Observer", "choose_profile", "device_of"]


class Observer:
    """Traces the first of `n_steps` training steps; with `profile` times the next three, and profiles a fifth.

    (The first of the three, which takes longer, does not count.) Each step lies between `begin` and `end`, which wait
    for the GPU in all but the first. Where a step raises, `during_step` has to be closed.
    """

    def __init__(self, profile: bool):
        self.n_steps = 5 if profile else 1
        self.during_step = ExitStack()  # the tracer, then the profiler
        self.tracer: FormatTracer | None = None  # None until the first step has begun
        self._n_ended = 0
        self._has_begun = False
        self._seconds: list[float] = []
        self._gpu: GpuShares | None = None
        self._error: str | None = None

    @property
    def _is_first(self) -> bool:
        return self._n_ended == 0

    @property
    def _is_profiled(self) -> bool:
        return self.n_steps > 1 and self._n_ended == self.n_steps - 1

    def begin(self, model: nn.Module, inputs: Any) -> None:
        "Begin a step of `model` on `inputs`."
        self._has_begun = True
        if self._is_first:
            self._note_facts(model, tensors_in(inputs))
            self.tracer = FormatTracer(model)
            self.during_step.push(self.tracer)  # to leave it once more where an interrupt hits the leaving
            self.during_step.enter_context(self.tracer)
            return
        model.zero_grad()  # to add gradients up would take time
        torch.cuda.synchronize(self._device)
        if self._is_profiled:
            profiler = torch.profiler.profile(activities=[ProfilerActivity.CUDA])
            self._profiler = self.during_step.enter_context(profiler)
        self._started = time.perf_counter()

    def _note_facts(self, model: nn.Module, inputs: list[Tensor]) -> None:
        self._device = device_of(model, inputs)
        self._modules = dict(modules_as_written(model))
        dtype = next((param.dtype for param in model.parameters() if param.is_floating_point()), torch.float32)
        if torch.is_autocast_enabled(self._device.type):
            dtype = torch.get_autocast_dtype(self._device.type)
        self._facts = {
            "model": type(self._modules[""]).__name__,
            "device": str(self._device),
            "dtype": dtype_name(dtype),
            "shapes": [tuple(tensor.shape) for tensor in inputs if not tensor.is_nested],
            "unconverted": _unconverted(model, inputs),
            "swapped": swapped_classes(model),
        }

    def claim_loss(self, loss: Tensor) -> None:
        "Call `FormatTracer.claim_loss` in the step that is traced."
        if self._is_first:
            self.tracer.claim_loss(loss)

    def end(self) -> None:
        "End the step, if one has begun."
        if not self._has_begun:  # a callback cancelled the batch before its step began
            return
        self._has_begun = False
        if not self._is_first:
            torch.cuda.synchronize(self._device)
            self._seconds.append(time.perf_counter() - self._started)
        self.during_step.close()
        if self._is_profiled:
            seconds = statistics.median(self._seconds[1:-1])  # the first takes longer, and the last was profiled
            self._gpu = gpu_shares(self._profiler.events(), seconds)
        self._n_ended += 1

    def stopped_by(self, error: RuntimeError) -> bool:
        "Whether `error` is of a `.view` on channels last activations; if so, the summary will say so."
        if self.tracer is None or not self.tracer.raised(error):
            return False
        self._error = self._view_advice(*self.tracer.error)
        return True

    def _view_advice(self, module: str, op: str, message: str) -> str:
        where = "the code outside the model"
        if module in self._modules:
            where = f"{quoted(module)} {type(self._modules[module]).__name__}"
        message = message.split(". Use ")[0]
        return (
            f"The step stopped in {where}: `{op}` raises on channels last activations ({message}); write `.reshape` "
            "there in place of `.view`, or `torch.flatten`."
        )

    def summary(self) -> FormatSummary:
        "Return what the steps showed."
        tracer = self.tracer
        share = tracer.channels_last_share
        return FormatSummary(
            events=tracer.events,
            layers=list(tracer.layers.values()),
            channels_last_share=float("nan") if share is None else share,
            padded_convs=tracer.padded_convs,
            dense_gradients=[name for name in tracer.dense_gradients if name != OUTSIDE],
            gpu=self._gpu,
            error=self._error,
            **self._facts,
        )


def device_of(
    model: nn.Module,
    inputs: list[Tensor],
) -> torch.device:
    "Return the device of the weights, or else of the inputs. (An input may be one of lengths, on the CPU.)"
    for tensor in (*model.parameters(), *inputs):
        return tensor.device
    return torch.device("cpu")


def choose_profile(
    profile: bool | None,  # None: on CUDA
    device: torch.device,
) -> bool:
    """Return whether to time the kernels of `device`.

    Raises `TypeError` if `profile` is no bool, `ValueError` if there are no kernels to time or nothing runs there.
    """
    if device.type == "meta":
        raise ValueError("The model is on the device 'meta', where nothing runs: move it to the one to train on")
    if profile is None:
        return device.type == "cuda"
    if not isinstance(profile, bool):
        raise TypeError(f"profile={profile!r} is a {type(profile).__name__}: pass True, False or None")
    if profile and device.type != "cuda":
        raise ValueError(f"profile=True: there are no GPU kernels to time on the device '{device}', pass None or False")
    return profile


def _unconverted(model: nn.Module, inputs: list[Tensor]) -> str | None:
    weights = {format_of(param) for param in model.parameters()} - {None}
    images = {format_of(tensor) for tensor in inputs} - {None}
    if weights == {"channels last"} and images == {"contiguous"}:
        return "inputs"
    if weights == {"contiguous"} and images == {"channels last"}:
        return "weights"
    return None
