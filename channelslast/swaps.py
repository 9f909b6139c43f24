"""Modules that lose channels last, run in a form with the same values that keeps it. PyTorch only.

Which of PyTorch's operators lose the format differs by device and version. So each is asked: the module runs forward
and backward on a small image there, and the strides tell.

Left out (measured, H200, PyTorch 2.11): softmax and log-softmax over channels, whose sums come in another order;
padding in 3D, which is no faster; frozen BatchNorm, which takes as much of Python as it spares the GPU.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from channelslast import forms
from channelslast.memory_format import CHANNELS_LAST, is_channels_last, supports_channels_last
from channelslast.nested import check_type
from channelslast.tensors import format_of

__all__ = ["keep_channels_last"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ATTRIBUTES = ("forward", "__getstate__")  # that stand on a module for the moment
# How a module is copied and pickled. One with a way of its own would take along what stands on it for the moment
_COPYING = ("__getstate__", "__reduce__", "__reduce_ex__", "__copy__", "__deepcopy__")


@contextmanager
def keep_channels_last(
    model: nn.Module,  # on the device that it runs on
) -> Iterator[nn.Module]:
    """Inside, modules of `model` that lose channels last compute the same values in a form that keeps it.

    These are PyTorch's own, and subclasses that leave `forward` alone, each where it loses the format on this device
    with this PyTorch: PixelShuffle, PixelUnshuffle and ChannelShuffle; padding by reflection, replication and circular,
    in 2D; GLU over channels; and global averages. Images in contiguous format are taken as ever. On CUDA, where the
    last layers of fastai's U-Net compute in half precision, they do so with a multiple of 8 channels, the added ones
    being zeros, and equal to rounding; but not if they have hooks, which would see these channels. There fastai's
    `PixelShuffle_ICNR` too makes its channels in another order, its image's gradient equal to rounding.

    Put it around training, a compiled model's too. What is printed, saved, pickled and copied inside, classes and hooks
    are as without it. Scripts, and a model in `nn.DataParallel`, run as they are. A Learner that trains in channels
    last needs no call.
    """
    check_type("model", model, nn.Module)
    swapped = []
    try:
        for module, forward in list(_due(model)):
            swapped.append(module)
            vars(module).update(forward=MethodType(forward, module), __getstate__=MethodType(_own_state, module))
        yield model
    finally:
        for module in swapped:
            for name in _ATTRIBUTES:
                vars(module).pop(name, None)


def is_swapped(
    module: nn.Module,
) -> bool:
    "Whether `module` computes at the moment in the form of its class in `SWAPS`, on views of the memory."
    forward = getattr(vars(module).get("forward"), "__func__", None)
    return any(forward is swap.forward for swap in SWAPS)


def swapped_classes(
    model: nn.Module,
) -> dict[str, int]:
    "The classes of the modules of `model` that compute in another form at the moment, with how many there are of each."
    states = [(type(module).__name__, vars(module).get("__getstate__")) for module in model.modules()]
    return dict(Counter(name for name, state in states if getattr(state, "__func__", None) is _own_state))


def _own_state(module: nn.Module) -> dict[str, Any]:
    "What `module` is pickled and copied with: all but what stands on it for the moment."
    state = type(module).__getstate__(module)
    return {name: value for name, value in state.items() if name not in _ATTRIBUTES}


def _due(model: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
    "The modules of `model` that lose channels last, each with the form that does not, as a method."
    device = next((param.device for param in model.parameters()), torch.device("cpu"))
    if not supports_channels_last(device) or any(isinstance(module, nn.DataParallel) for module in model.modules()):
        return  # the replicas of DataParallel have the attributes of the modules that they are made of
    for module in model.modules():
        swap = _swap_of(module)
        if swap is not None and swap.is_due(module, device):
            yield module, swap.forward
    for parts in PARTS:
        yield from parts(model, device)


def _swap_of(module: nn.Module) -> "Swap | None":
    cls = type(module)
    if not is_free(module):
        return None
    return next((swap for swap in SWAPS if issubclass(cls, swap.cls) and cls.forward is swap.cls.forward), None)


def is_free(
    module: nn.Module,
) -> bool:
    "Whether `module` has no `forward` of its own beside its class's, and is copied and pickled as all modules are."
    return "forward" not in vars(module) and all(getattr(type(module), name, None) is _own(name) for name in _COPYING)


def _own(name: str) -> Any:
    return getattr(nn.Module, name, None)


class Swap:
    "A class of PyTorch's modules, and the form in which they keep channels last."

    def __init__(
        self,
        cls: type[nn.Module],
        form: Callable[[Any, Tensor], Tensor | None],  # takes the module and a channels last image; None: as ever
        settings: tuple[str, ...],  # the attributes on which it depends whether such a module loses the format
        shape: Callable[[Any], tuple[int, ...] | None],  # of an image to ask the module with; None: do not ask
    ):
        self.cls, self.settings, self.shape = cls, settings, shape
        self.answers: dict[tuple, bool] = {}  # by device and settings
        own = cls.forward

        def forward(self: nn.Module, input: Tensor) -> Tensor:
            output = form(self, input) if is_channels_last(input) else None
            return own(self, input) if output is None else output

        self.forward = forward  # one function for all modules: PyTorch compiles it once

    def is_due(
        self,
        module: nn.Module,  # of the class
        device: torch.device,
    ) -> bool:
        "Whether modules with the settings of this one lose the format on `device`."
        shape = self.shape(module)
        if shape is None:
            return False
        key = device, *(str(getattr(module, name)) for name in self.settings)
        if key not in self.answers:
            self.answers[key] = any(loses_format(self.cls.forward, module, shape, device, dtype) for dtype in _DTYPES)
        return self.answers[key]


def loses_format(
    forward: Callable[[nn.Module, Tensor], Tensor],
    module: nn.Module,
    shape: tuple[int, ...],  # of an image
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    "Whether `forward(module, image)` makes a contiguous image, or gradient, of channels last ones on `device`."
    memory_format = CHANNELS_LAST[len(shape)]
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            image = torch.ones(shape, device=device, dtype=dtype)
            image = image.contiguous(memory_format=memory_format).requires_grad_()
            output = forward(module, image)
            gradient = torch.ones_like(output).contiguous(memory_format=memory_format)
            (gradient,) = torch.autograd.grad(output, image, gradient)
    except RuntimeError:  # no such operator for that dtype there
        return False
    return "contiguous" in (format_of(output), format_of(gradient))


# What is swapped: forms of modules, and shapes to ask with


def _pixel_shuffle(module: nn.PixelShuffle, image: Tensor) -> Tensor | None:
    factor = module.upscale_factor
    return forms.pixel_shuffle(image, factor) if image.ndim == 4 and image.shape[1] % factor**2 == 0 else None


def _pixel_unshuffle(module: nn.PixelUnshuffle, image: Tensor) -> Tensor | None:
    factor = module.downscale_factor
    is_whole = image.shape[-1] % factor == image.shape[-2] % factor == 0
    return forms.pixel_unshuffle(image, factor) if image.ndim == 4 and is_whole else None


def _channel_shuffle(module: nn.ChannelShuffle, image: Tensor) -> Tensor | None:
    return forms.channel_shuffle(image, module.groups) if image.shape[1] % module.groups == 0 else None


def _pad(mode: str) -> Callable[[Any, Tensor], Tensor | None]:
    margin = 1 if mode == "reflect" else 0  # an edge is no mirror of itself

    def form(module: Any, image: Tensor) -> Tensor | None:
        "None where PyTorch refuses to pad, and says why."
        left, right, top, bottom = module.padding
        height, width = (size - margin for size in image.shape[-2:])
        is_legal = min(module.padding) >= 0 and max(left, right) <= width and max(top, bottom) <= height
        return forms.pad(image, module.padding, mode) if image.ndim == 4 and is_legal else None

    return form


def _padded(module: Any) -> tuple[int, ...]:
    size = max(module.padding) + 2
    return 2, 8, size, size


def _glu(module: nn.GLU, image: Tensor) -> Tensor | None:
    return forms.glu(image) if module.dim in (1, 1 - image.ndim) and image.shape[1] % 2 == 0 else None


def _global_average(module: Any, image: Tensor) -> Tensor | None:
    if image.ndim == 5 and image.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return None  # autocast computes PyTorch's own in float32 there, and no mean
    return forms.global_average(image) if _is_global(module) and image.ndim == _ndim(module) else None


def _is_global(pool: Any) -> bool:
    size = pool.output_size
    return all(each == 1 for each in size) if isinstance(size, (tuple, list)) else size == 1


def _ndim(pool: Any) -> int:
    return 4 if isinstance(pool, nn.AdaptiveAvgPool2d) else 5


def _globally(pool: Any) -> tuple[int, ...] | None:
    return (2, 8, 4, 4, 4)[: _ndim(pool)] if _is_global(pool) else None


SWAPS = [
    Swap(
        nn.PixelShuffle, _pixel_shuffle, ("upscale_factor",), lambda shuffle: (2, 4 * shuffle.upscale_factor**2, 4, 4)
    ),
    Swap(
        nn.PixelUnshuffle,
        _pixel_unshuffle,
        ("downscale_factor",),
        lambda shuffle: (2, 4, 4 * shuffle.downscale_factor, 4 * shuffle.downscale_factor),
    ),
    Swap(nn.ChannelShuffle, _channel_shuffle, ("groups",), lambda shuffle: (2, 2 * shuffle.groups, 4, 4)),
    Swap(nn.ReflectionPad2d, _pad("reflect"), ("padding",), _padded),
    Swap(nn.ReplicationPad2d, _pad("replicate"), ("padding",), _padded),
    Swap(nn.CircularPad2d, _pad("circular"), ("padding",), _padded),
    Swap(nn.GLU, _glu, ("dim",), lambda glu: (2, 8, 4, 4) if glu.dim in (1, -3) else None),
    Swap(nn.AdaptiveAvgPool2d, _global_average, ("output_size",), _globally),
    Swap(nn.AdaptiveAvgPool3d, _global_average, ("output_size",), _globally),
]
# From the rooms that know other libraries: what finds modules of a model, and yields each with its `forward`
PARTS: list[Callable[[nn.Module, torch.device], Iterator[tuple[nn.Module, Callable]]]] = []
