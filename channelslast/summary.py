"Show where a model loses channels last, forward and backward, and what it costs."

import html
import re
import statistics
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pandas as pd
import torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.learner import Learner
from fastai.torch_core import get_model, ismin_torch
from fastcore.basics import patch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from channelslast.memory_format import _check
from channelslast.precision import training_device
from channelslast.restore import FitDone, unchanged_learner, unchanged_modules, unchanged_tensors
from channelslast.trace import (
    OUTSIDE,
    FormatEvent,
    FormatTracer,
    LayerFormat,
    layout,
    modules_as_written,
    tensors_in,
)

__all__ = ["FormatSummary", "GpuShares", "format_summary"]

_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}

# Kernels whose work is the layout: cuDNN's conversions and padding, and PyTorch's copies between different strides.
# (`vectorized_` and `unrolled_elementwise_kernel` copy between equal strides, as a cast of the dtype does.)
_LAYOUT_KERNELS = re.compile(
    r"nchwToNhwc|nhwcToNchw|nchw2nhwc|nhwc2nchw|nhwcAddPadding|convertTensor"
    r"|(?<!vectorized_)(?<!unrolled_)elementwise_kernel<.*copy_kernel",
    re.IGNORECASE,
)
_GROUP_NORM_ON_CUDA = "on CUDA from PyTorch 2.15 on (pytorch/pytorch#191945)"


@dataclass(frozen=True)
class _Hint:
    "What to use in place of an operator that loses the format, with the source."

    ops: str  # pattern for the names of the operators
    text: str
    cls: str = ""  # pattern for the module's class
    device: str = ""  # on this kind of device alone
    fixed_in: str = ""  # PyTorch version from which on it keeps the format


_HINTS = [
    _Hint(
        "native_group_norm|clone",
        f"GroupNorm keeps channels last {_GROUP_NORM_ON_CUDA}",
        cls="GroupNorm",
        device="cuda",
        fixed_in="2.15",
    ),
    _Hint(
        "clone|native_batch_norm|cudnn_batch_norm",
        "InstanceNorm works in contiguous format; `nn.GroupNorm(c, c, affine=...)` for c channels is the same function "
        "but for running statistics (PyTorch's documentation of GroupNorm), and keeps channels last: on a CPU, and "
        f"{_GROUP_NORM_ON_CUDA}",
        cls="InstanceNorm",
    ),
    _Hint(
        "clone|_to_copy",
        "a copy that makes an image contiguous is `.contiguous()` or a `.reshape` in the code of its layer; "
        "`.contiguous(memory_format=torch.channels_last)` keeps the format (PyTorch's documentation)",
        cls="^(?!.*(InstanceNorm|GroupNorm))",
    ),
    _Hint(
        "pixel_(un)?shuffle",
        "PixelShuffle keeps channels last on a CPU only; nearest or bilinear upsampling and a convolution, or "
        "ConvTranspose2d, keep it on CUDA too (measured, PyTorch 2.11)",
        device="cuda",
    ),
    _Hint(
        "(reflection|replication)_pad",
        "padding by reflection and replication keep channels last on a CPU only, padding with zeros on CUDA too "
        "(measured, PyTorch 2.11)",
        device="cuda",
    ),
    _Hint(
        "batch_norm_backward",
        "BatchNorm in eval mode returns a contiguous gradient on CUDA; in training mode it keeps channels last "
        "(measured, PyTorch 2.11)",
        cls="BatchNorm",
        device="cuda",
    ),
    _Hint(
        "upsample_bicubic2d_backward",
        "bicubic interpolation returns a contiguous gradient; bilinear interpolation keeps channels last "
        "(measured, PyTorch 2.11 and 2.15)",
    ),
]


_UNCONVERTED = {
    "inputs": "the images are contiguous, the weights channels last; `to_memory_format(images)` converts the images",
    "weights": "the weights are contiguous, the images channels last; `module_to_memory_format(model)` converts them",
}
_KINDS = {
    "lost": "an operator took channels last and returned contiguous",
    "converted": "a copy changed the format",
    "hidden": "a convolution re-lays an operand inside",
    "mixed": "operands of both formats",
}


@dataclass(frozen=True)
class GpuShares:
    "What the GPU did in a step of forward, loss and backward: shares between 0 and 1."

    layout: float  # of its busy time, spent in kernels that convert, pad or copy between strides
    busy: float  # of the step's wall time, in which any kernel ran


@dataclass
class FormatSummary:
    """What one training step does to the memory format; made by `format_summary`.

    Printing it gives a table, `to_frame` a pandas DataFrame, `plot` a picture.
    """

    events: list[FormatEvent]  # where the format was lost or changed, in the order of execution
    layers: list[LayerFormat]  # the modules that wrote images, in the order of execution
    channels_last_share: float  # by bytes, of 4D and 5D activations and gradients; nan where there were none
    padded_convs: dict[str, tuple[int, int]]  # name: channels in and out of half precision convolutions off 8, where
    # that is not because of the channels of the model's own inputs
    dense_gradients: list[str]  # modules that write an expanded gradient out, in contiguous format
    gpu: GpuShares | None  # None without `profile`
    error: str | None  # what stopped the step: `.view` on channels last activations
    model: str  # class of the model
    device: str
    dtype: str  # 'fp32', or that of autocast
    shapes: list[tuple[int, ...]]  # of the model's inputs, but for nested tensors, which have none
    unconverted: str | None  # 'inputs' or 'weights' where these alone are contiguous

    @property
    def losers(self) -> list[LayerFormat]:
        "The layers that take channels last and hand contiguous on, the heaviest first."
        moved = {layer.module: 0 for layer in self.layers}
        for event in self.events:
            if event.module in moved:
                moved[event.module] += event.nbytes
        return sorted((layer for layer in self.layers if layer.loses_in), key=lambda layer: -moved[layer.module])

    @property
    def verdict(self) -> str:
        "One sentence to act on."
        if self.error:
            return self.error
        share, losers = self.channels_last_share, self.losers
        if not self.layers:
            return "No 4D or 5D activations: the memory format changes nothing about this model."
        if share == 0 and not losers:
            return (
                "Contiguous throughout: no activation or gradient is channels last. `learn.to_channelslast()` converts "
                "a Learner, `module_to_memory_format(model)` and `to_memory_format(images)` a model and its images."
            )
        words = f"{_percent(share)} of activations and gradients {'stay' if share > 0.5 else 'are'} channels last; "
        if not losers:
            return words + f"{self._all_keep_it()}.{self._inside()}{self._relaid()}"
        named = [f"{_name(layer.module)} {layer.cls} ({', '.join(layer.loses_in)})" for layer in losers[:5]]
        if len(losers) > 5:
            named.append(f"and {len(losers) - 5} more")
        verb = "loses" if len(losers) == 1 else "lose"
        return words + f"{len(losers)} of {len(self.layers)} layers with images {verb} it: {', '.join(named)}."

    def _all_keep_it(self) -> str:
        n = len(self.layers)
        return f"none of {n} layers with images loses it" if n > 1 else "the one layer with images keeps it"

    def _inside(self) -> str:
        "The layer that writes most of what is contiguous, though it hands channels last on."
        worst = max(self.layers, key=lambda layer: layer.contiguous_nbytes)
        if self.channels_last_share > 0.9 or not worst.contiguous_nbytes:
            return ""
        return f" Most of the rest is contiguous inside {_name(worst.module)} {worst.cls}."

    def _relaid(self) -> str:
        hidden = [event for event in self.events if event.kind == "hidden"]
        if not hidden:
            return ""
        worst = max(hidden, key=lambda event: event.nbytes)
        modules = len({event.module for event in hidden})
        which = "1 convolution gets" if modules == 1 else f"{modules} convolutions get"
        return (
            f" {which} an input, weight or gradient in the other format, to be converted on every call; the heaviest, "
            f"of {worst.nbytes / 1e6:.2g} MB, in the {worst.phase} pass of {_name(worst.module)}."
        )

    @property
    def hints(self) -> list[str]:
        "What to use in place of the operators that lose the format, where there is something."
        found = [_UNCONVERTED[self.unconverted]] if self.unconverted else []
        lossy = {(layer.module, phase) for layer in self.layers for phase in layer.loses_in}
        losses = [event for event in self.events if (event.module, event.phase) in lossy]
        for hint in _HINTS:
            if hint.device and not self.device.startswith(hint.device):
                continue
            if hint.fixed_in and ismin_torch(hint.fixed_in):
                continue
            if any(_matches(hint, event) for event in losses):
                found.append(hint.text)
        if self.dense_gradients and self.events:
            others = f" and {len(self.dense_gradients) - 1} more" if len(self.dense_gradients) > 1 else ""
            found.append(
                "the gradient of a global average comes out contiguous, which makes rows of kind 'mixed' or 'hidden' "
                f"(here that of {_name(self.dense_gradients[0])}{others}); `F.avg_pool2d(x, x.shape[-2:])`, or "
                "`avg_pool3d` in 3D, is the same with a channels last gradient (measured, PyTorch 2.11 and 2.15)"
            )
        return found

    def to_frame(self) -> pd.DataFrame:
        "The events as a pandas DataFrame, a row each, in the order of execution."
        columns = list(FormatEvent.__dataclass_fields__)
        return pd.DataFrame([vars(event) for event in self.events], columns=columns)

    def __str__(self) -> str:
        words = [textwrap.fill(text, 110, subsequent_indent="  ") for text in (self.verdict, *self._notes())]
        return "\n".join([self._header(), *self._table(), "", *words])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def _header(self) -> str:
        shapes = ", ".join(_shape(shape) for shape in self.shapes)
        return f"{self.model} (input shape: {shapes}), {self.dtype} on {self.device}"

    def _table(self, n_rows: int = 40) -> list[str]:
        if not self.events:
            return []
        modules: dict[str, list[FormatEvent]] = {}
        for event in self.events:
            modules.setdefault(event.module, []).append(event)
        heaviest = sorted(modules.values(), key=lambda events: -sum(event.nbytes for event in events))
        rows = [[event, i == 0] for events in heaviest for i, event in enumerate(_heaviest_first(events))]
        width = max(20, *(len(f"{_bare(event.module)} {event.cls}") for event, _ in rows[:n_rows]))
        op_width = max(8, *(len(event.op.removeprefix("aten.")) for event, _ in rows[:n_rows]))
        head = f"{'Layer (type)':<{width}} {'Phase':<8} {'Operator':<{op_width}} {'Kind':<9} "
        head += f"{'Shape':<22} {'n':>3} {'MB':>8}"
        lines = ["=" * len(head), head, "=" * len(head)]
        for event, is_first in rows[:n_rows]:
            if is_first and len(lines) > 3:
                lines.append("_" * len(head))
            layer = f"{_bare(event.module)} {event.cls}" if is_first else ""
            shape = f"{_shape(event.shape)} {_DTYPES.get(event.dtype, '')}"
            op = event.op.removeprefix("aten.")
            lines.append(
                f"{layer:<{width}} {event.phase:<8} {op:<{op_width}} {event.kind:<9} {shape:<22} {event.count:>3} "
                f"{event.nbytes / 1e6:>8.2f}"
            )
        lines.append("=" * len(head))
        kinds = {event.kind for event in self.events}
        lines.append("; ".join(f"{kind}: {meaning}" for kind, meaning in _KINDS.items() if kind in kinds))
        if len(rows) > n_rows:
            lines.append(f"{len(rows) - n_rows} lighter rows left out; `.to_frame()` has all")
        return lines

    def _notes(self) -> list[str]:
        lines = [f"Hint: {hint}." for hint in self.hints]
        if self.padded_convs and self.device.startswith("cuda"):  # cuDNN's
            named = [f"{_name(name)} ({c_in} to {c_out})" for name, (c_in, c_out) in self.padded_convs.items()]
            more = f", and {len(named) - 8} more" if len(named) > 8 else ""
            lines.append(
                f"Channels not a multiple of 8, which cuDNN pads on every call in half precision: "
                f"{', '.join(named[:8])}{more}."
            )
        if self.gpu:
            waits = ", which waits for Python: that hides what the format gains" if self.gpu.busy < 0.9 else ""
            lines.append(
                f"GPU: {_percent(self.gpu.layout)} of its time in layout kernels; "
                f"busy {_percent(self.gpu.busy)} of the step{waits}."
            )
        return lines

    def plot(
        self,
        ax: Axes | None = None,  # where to draw, a new figure if None
    ) -> Axes:
        "Draw the layers in the order of execution, coloured by format; triangles mark those that lose it."
        n = len(self.layers)
        if ax is None:
            _, ax = plt.subplots(figsize=(12, 3), layout="constrained")
        for row, phase in ((1, "forward"), (0, "backward")):
            colors = [_color(layer.share(phase)) for layer in self.layers]
            ax.bar(
                range(n), 0.8, width=1, bottom=row, color=colors, edgecolor="white", linewidth=min(0.5, 40 / (n or 1))
            )
        marked = [(i, layer) for i, layer in enumerate(self.layers) if layer.loses_in]
        for i, layer in marked:
            for phase in layer.loses_in:
                ax.plot(
                    i, 1.9 if phase == "forward" else -0.1, marker="v" if phase == "forward" else "^", color="crimson"
                )
        for i, layer in marked[:12]:
            ax.annotate(layer.module, (i, 2.05), rotation=45, fontsize=8, ha="left", va="bottom")
        ax.set(
            xlim=(-0.6, max(n, 1) - 0.4), ylim=(-0.25, 2.05), yticks=(0.4, 1.4), yticklabels=("← backward", "forward →")
        )
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("layers in the order of execution")
        ax.spines[["top", "right", "left"]].set_visible(False)
        if self.error:
            ax.set_title("The step stopped after these layers", loc="left", pad=20)
        names = {1.0: "channels last", 0.0: "contiguous", None: "nothing of 4D or 5D"}
        handles = [Patch(color=_color(share), label=name) for share, name in names.items()]
        handles += ax.plot([], [], "v", color="crimson", label="loses channels last")
        ax.legend(handles=handles, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False)
        return ax


def _matches(hint: _Hint, event: FormatEvent) -> bool:
    loses = event.kind in ("lost", "converted")
    return loses and bool(re.search(hint.ops, event.op)) and bool(re.search(hint.cls, event.cls))


def _heaviest_first(events: list[FormatEvent]) -> list[FormatEvent]:
    return sorted(events, key=lambda event: -event.nbytes)


def _percent(share: float) -> str:
    "Never rounded up to 100%."
    return "100%" if share == 1 else f"{min(share * 100, 99.9):.1f}%"


def _bare(name: str) -> str:
    return name or "(model)"


def _name(name: str) -> str:
    return f"`{name}`" if name else "the model itself"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _color(share: float | None) -> tuple[float, ...]:
    "From orange (contiguous) to green (channels last); grey for None."
    if share is None:
        return (0.92, 0.92, 0.92)
    first, last = (0.93, 0.58, 0.22), (0.16, 0.58, 0.53)
    return tuple(a + (b - a) * share for a, b in zip(first, last, strict=True))


class _Observer:
    """Watches training steps: traces the first one; on a GPU times the next and profiles the last.

    Each step lies between `begin` and `end`, and there are `n_steps`.
    """

    def __init__(self, profile: bool):
        self.n_steps = 5 if profile else 1
        self.step = 0  # those that have ended
        self.has_begun = False
        self.seconds: list[float] = []
        self.gpu: GpuShares | None = None
        self.error: str | None = None
        self.tracer: FormatTracer | None = None
        self.running = ExitStack()  # the tracer, then the profiler: closed after each step, and if one fails

    def begin(self, model: nn.Module, inputs: Any) -> None:
        self.has_begun = True
        if self.step == 0:
            tensors = tensors_in(inputs)
            self.model = model
            self.shapes = [tuple(tensor.shape) for tensor in tensors if not tensor.is_nested]
            self.unconverted = _unconverted(model, tensors)
            self.device = _device(model, tensors)
            autocast = torch.is_autocast_enabled(self.device.type)
            self.dtype = torch.get_autocast_dtype(self.device.type) if autocast else _dtype(model)
            self.tracer = FormatTracer(model)
            self.running.enter_context(self.tracer)
        else:
            model.zero_grad()  # else gradients would add up, which takes time
            torch.cuda.synchronize(self.device)
            if self.step == self.n_steps - 1:
                profiler = torch.profiler.profile(activities=[ProfilerActivity.CUDA])
                self.profiler = self.running.enter_context(profiler)
            self.started = time.perf_counter()

    def own_loss(self, loss: Tensor) -> None:
        if self.step == 0:
            self.tracer.own_loss(loss)

    def end(self) -> None:
        if not self.has_begun:  # a callback cancelled the batch before
            return
        self.has_begun = False
        if self.step > 0:
            torch.cuda.synchronize(self.device)
            self.seconds.append(time.perf_counter() - self.started)
        self.running.close()
        if 0 < self.step == self.n_steps - 1:
            self.gpu = gpu_shares(self.profiler.events(), statistics.median(self.seconds[1:-1]))
        self.step += 1

    def stopped_by(self, error: RuntimeError) -> bool:
        "Whether `error` is that of `.view` on channels last activations, which the summary then tells."
        if self.tracer is None or not self.tracer.raised(error):
            return False
        self.error = _view_advice(*self.tracer.error, self.tracer.model)
        return True

    def summary(self) -> FormatSummary:
        tracer = self.tracer
        share = tracer.channels_last_share
        return FormatSummary(
            events=tracer.events,
            layers=list(tracer.layers.values()),
            channels_last_share=float("nan") if share is None else share,
            padded_convs=tracer.padded_convs,
            dense_gradients=[name for name in tracer.dense_gradients if name != OUTSIDE],
            gpu=self.gpu,
            error=self.error,
            model=type(dict(modules_as_written(self.model))[""]).__name__,
            device=str(self.device),
            dtype=_DTYPES.get(self.dtype, str(self.dtype).removeprefix("torch.")),
            shapes=self.shapes,
            unconverted=self.unconverted,
        )


def _unconverted(model: nn.Module, tensors: list[Tensor]) -> str | None:
    weights = {layout(param) for param in model.parameters()} - {None}
    images = {layout(tensor) for tensor in tensors} - {None}
    return {("last", "first"): "inputs", ("first", "last"): "weights"}.get((*weights, *images))


def _device(model: nn.Module, tensors: list[Tensor]) -> torch.device:
    tensors = [*islice(model.parameters(), 1), *tensors]  # the first input may be one of lengths, on the CPU
    return tensors[0].device if tensors else torch.device("cpu")


def _dtype(model: nn.Module) -> torch.dtype:
    return next((param.dtype for param in model.parameters() if param.is_floating_point()), torch.float32)


def _view_advice(name: str, op: str, message: str, model: nn.Module) -> str:
    where = "the code outside the model"
    modules = dict(modules_as_written(model))
    if name in modules:
        where = f"{_name(name)} {type(modules[name]).__name__}"
    message = message.split(". Use ")[0]
    return (
        f"The step stopped in {where}: `{op}` raises on channels last activations ({message}); write `.reshape` there "
        "in place of `.view`, or `torch.flatten`."
    )


def gpu_shares(
    events: Any,  # of torch.profiler
    seconds: float,  # of a step without the profiler
) -> GpuShares:
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end, event.name) for event in kernels)
    busy, covered_until = 0.0, float("-inf")
    for start, end, _ in spans:  # streams overlap
        busy += max(0.0, end - max(start, covered_until))
        covered_until = max(covered_until, end)
    total = sum(end - start for start, end, _ in spans)
    relaying = sum(end - start for start, end, name in spans if _LAYOUT_KERNELS.search(name))
    return GpuShares(relaying / total if total else 0.0, min(1.0, busy / 1e6 / seconds))


def _use_profiler(profile: bool | None, device: torch.device) -> bool:
    if device.type == "meta":
        raise ValueError("The model is on the device 'meta', where nothing runs: move it to the one to train on")
    if profile is None:
        return device.type == "cuda"
    _check("profile", profile, bool)
    if profile and device.type != "cuda":
        raise ValueError(f"profile=True: there are no GPU kernels to time on the device '{device}', pass None or False")
    return profile


def _eager(model: nn.Module) -> Any:
    """A compiled model runs as it was written: inside the compiler's code there are no operators to watch.

    Before PyTorch 2.6 it is for the caller to put its attributes back.
    """
    if hasattr(torch.compiler, "set_stance"):  # PyTorch 2.6
        return torch.compiler.set_stance("force_eager")
    for module in model.modules():
        vars(module).pop("_compiled_call_impl", None)
    return nullcontext()


@patch
def format_summary(
    self: Learner,
    profile: bool | None = None,  # time the GPU's kernels too; None: on CUDA
) -> FormatSummary:
    """Run one training step on a batch of the training data, and tell what each operator does to the memory format.

    The step is the Learner's own: its callbacks, precision and loss, forward and backward, without that of the
    optimizer. Afterwards the Learner is as before, also when the step raises; trackers and loggers write nothing. (Data
    that come as a stream, without a way back, go on one batch later.)

    Where the model calls `.view` on channels last activations the summary says so in `error`. Any other exception is
    the Learner's own.
    """
    observer = _Observer(_use_profiler(profile, training_device(self)))
    with unchanged_learner(self), _eager(self.model), observer.running:
        try:
            self.fit(1, cbs=_ObservedSteps(observer))
        except FitDone:
            pass
        except RuntimeError as error:
            if not observer.stopped_by(error):
                raise
    if observer.tracer is None:
        raise ValueError("A callback of the Learner cancelled the fit or its first batch: there was no step to trace")
    return observer.summary()


def format_summary(  # noqa: F811, the function beside the method: after it, for `patch` takes the name away
    model: nn.Module,  # as it is to be trained, in either format
    *inputs: Any,  # what to call it with: tensors, and tuples, lists and dicts of them
    loss_func: Callable[[Any], Tensor] | None = None,  # of what the model returns; None: gradients in its format
    profile: bool | None = None,  # time the GPU's kernels too; None: on CUDA
) -> FormatSummary:
    """Run one training step of `model` on `inputs`, and tell what each operator does to the memory format.

    Model and inputs are taken as they are: `module_to_memory_format` and `to_memory_format` convert them. Call it
    inside `torch.autocast` to see mixed precision. Without `loss_func` each output gets a gradient of ones in the
    format of that output. Afterwards inputs, weights, buffers, gradients, mode and random states are as before.

    Where the model calls `.view` on channels last activations the summary says so in `error`. Any other exception is
    the model's own. Raises `TypeError` without inputs, and `ValueError` for a model with lazy parameters or on the
    device 'meta'.
    """
    if isinstance(model, Learner):
        raise TypeError("model is a Learner: call `learn.format_summary()`, or pass `learn.model` and its inputs")
    _check("model", model, nn.Module)
    if not inputs:
        raise TypeError("format_summary(model) without inputs: pass what to call the model with, as a batch of images")
    tensors = tensors_in(inputs)
    observer = _Observer(_use_profiler(profile, _device(model, tensors)))
    modules = [model, loss_func] if isinstance(loss_func, nn.Module) else [model]
    unchanged = unchanged_modules(*modules), unchanged_tensors(tensors)
    with unchanged[0], unchanged[1], torch.inference_mode(False), _eager(model), observer.running:
        try:
            for _ in range(observer.n_steps):
                observer.begin(model, inputs)
                _backward(observer, model(*inputs), loss_func)
                observer.end()
        except RuntimeError as error:
            if not observer.stopped_by(error):
                raise
    return observer.summary()


def _backward(observer: _Observer, output: Any, loss_func: Callable[[Any], Tensor] | None) -> None:
    if loss_func is not None:
        loss = loss_func(output)
        observer.own_loss(loss)
        loss.backward()
        return
    outputs = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
    torch.autograd.backward(outputs, [torch.ones_like(tensor) for tensor in outputs])


class _ObservedSteps(Callback):
    "Repeat the first batch of a fit for an observer, without a step of the optimizer, and end the fit."

    order = float("inf")  # `before_batch` after the callbacks that make the batch

    def __init__(self, observer: _Observer):
        self.observer = observer

    def before_train(self):
        self.learn.dl = [_first_batch(self.dl)] * self.observer.n_steps

    def before_batch(self):
        self.observer.begin(get_model(self.model), self.xb)

    def before_backward(self):
        self.observer.own_loss(self.learn.loss_grad)

    def after_backward(self):
        raise CancelBatchException()

    def after_batch(self):
        self.observer.end()
        if self.iter == self.observer.n_steps - 1:
            raise FitDone()


def _first_batch(dl: Any) -> Any:
    distributed = sys.modules.get("fastai.distributed")  # cannot be imported without Accelerate
    if distributed and isinstance(dl, distributed.DistributedDL):
        dl = dl.dl  # that of this process alone
    if hasattr(dl, "one_batch"):
        return dl.one_batch()
    for batch in dl:
        return batch
    raise ValueError("learn.dls.train is empty: pass a Learner with at least one batch to train on")
