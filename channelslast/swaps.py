"""Modules that lose channels last, run in a form with the same values that keeps it. PyTorch only.

Which of PyTorch's operators lose the format differs by device and version. So each is asked: a small module of the
class runs forward and backward there, and the strides tell.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
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
_COPYING = ("__getstate__", "__setstate__", "__reduce__", "__reduce_ex__", "__copy__", "__deepcopy__")


@contextmanager
def keep_channels_last(
    model: nn.Module,  # on the device to run on; whether it is channels last already does not matter
) -> Iterator[nn.Module]:
    """Inside, modules of `model` that lose channels last compute the same values in a form that keeps it.

    These are modules of PyTorch's own classes, and of subclasses that leave `forward` alone: PixelShuffle and
    PixelUnshuffle, ChannelShuffle, padding by reflection, replication and circular, softmax, GLU, and global averages;
    each where it loses the format on this device with this PyTorch, in images that are channels last. All else stays:
    the classes of modules, what is printed, saved, pickled and copied, and hooks. Use it around forward and
    backward pass; a compiled model too is to be called inside. Modules inside of scripts and `nn.DataParallel` stay as
    they are. `Learner`s in channels last need no call, they train inside.
    """
    check_type("model", model, nn.Module)
    swapped = []
    try:
        for module, forward in _forwards(model):
            swapped.append(module)
            vars(module).update(forward=MethodType(forward, module), __getstate__=MethodType(_own_state, module))
        yield model
    finally:
        for module in swapped:
            for name in ("forward", "__getstate__"):
                vars(module).pop(name, None)


def swapped_classes(
    model: nn.Module,
) -> dict[str, int]:
    "The classes of the modules of `model` that compute in another form at the moment, with the number of modules."
    return dict(Counter(type(module).__name__ for module in model.modules() if _is_swapped(module)))


def _is_swapped(module: nn.Module) -> bool:
    forward = getattr(vars(module).get("forward"), "__func__", None)
    return any(forward is swap.forward for swap in SWAPS)


def _own_state(module: nn.Module) -> Any:
    "What `module` is pickled and copied with: all but what stands on it for the moment."
    state = dict(type(module).__getstate__(module))
    for name in ("forward", "__getstate__"):
        state.pop(name, None)
    return state


def _forwards(model: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
    "The modules of `model` that lose channels last, each with the form that does not, as a method."
    device = next((param.device for param in model.parameters()), torch.device("cpu"))
    if not supports_channels_last(device) or any(isinstance(module, nn.DataParallel) for module in model.modules()):
        return  # the replicas of DataParallel share the attributes of the modules that they are made of
    for module in model.modules():
        swap = _swap_of(module)
        if swap is not None and swap.is_due(module, device):
            yield module, swap.forward


def _swap_of(module: nn.Module) -> "Swap | None":
    cls = type(module)
    if "forward" in vars(module) or any(
        getattr(cls, name, None) is not getattr(nn.Module, name, None) for name in _COPYING
    ):
        return None
    return next((swap for swap in SWAPS if issubclass(cls, swap.cls) and cls.forward is swap.cls.forward), None)


class Swap:
    "A class of PyTorch's modules, and the form in which they keep channels last."

    def __init__(
        self,
        cls: type[nn.Module],
        names: tuple[str, ...],  # of the attributes that say all of such a module, and of its arguments
        form: Callable[..., Tensor | None],  # of a channels last image and these attributes; None: there is none
        examples: Callable[..., list[tuple[int, ...]]],  # of these attributes; shapes of images that tell
    ):
        self.cls, self.names, self.examples = cls, names, examples
        own = cls.forward

        def forward(self: nn.Module, input: Tensor) -> Tensor:
            output = form(input, *[getattr(self, name) for name in names]) if is_channels_last(input) else None
            return own(self, input) if output is None else output

        self.forward = forward  # one object for all modules: PyTorch compiles for it once

    def is_due(
        self,
        module: nn.Module,  # of the class
        device: torch.device,
    ) -> bool:
        "Whether such modules, set as this one, lose the format on `device`."
        values = [getattr(module, name) for name in self.names]
        settings = tuple(tuple(value) if isinstance(value, list) else value for value in values)
        shapes = self.examples(*settings)
        return any(loses_format(self.cls, settings, shape, device, dtype) for shape in shapes for dtype in _DTYPES)


@cache
def loses_format(
    cls: type[nn.Module],
    settings: tuple,  # the arguments to make such a module
    shape: tuple[int, ...],  # of an image
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    "Whether such a module makes a contiguous image, or a contiguous gradient, of channels last ones on `device`."
    memory_format = CHANNELS_LAST[len(shape)]
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        image = torch.ones(shape, device=device, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
        try:
            output = cls.forward(cls(*settings), image)
            gradient = torch.ones_like(output).contiguous(memory_format=memory_format)
            (gradient,) = torch.autograd.grad(output, image, gradient)
        except RuntimeError:  # no such operator for that dtype there
            return False
    return "contiguous" in (format_of(output), format_of(gradient))


# What is swapped


def _pixel_shuffle(image: Tensor, factor: int) -> Tensor | None:
    return forms.pixel_shuffle(image, factor) if image.ndim == 4 and image.shape[1] % factor**2 == 0 else None


def _pixel_unshuffle(image: Tensor, factor: int) -> Tensor | None:
    is_whole = image.shape[-1] % factor == image.shape[-2] % factor == 0
    return forms.pixel_unshuffle(image, factor) if image.ndim == 4 and is_whole else None


def _channel_shuffle(image: Tensor, groups: int) -> Tensor | None:
    return forms.channel_shuffle(image, groups) if image.shape[1] % groups == 0 else None


def _pad(mode: str) -> Callable[[Tensor, tuple[int, ...]], Tensor | None]:
    def form(image: Tensor, padding: tuple[int, ...]) -> Tensor | None:
        "None where PyTorch refuses to pad, and says why."
        sizes = [size for size in reversed(image.shape[2:]) for _ in range(2)]
        if len(padding) != len(sizes) or min(padding) < 0:
            return None
        if any(width > size - (mode == "reflect") for width, size in zip(padding, sizes)):
            return None
        return forms.pad(image, padding, mode)

    return form


def _over_channels(form: Callable[[Tensor], Tensor]) -> Callable[[Tensor, int], Tensor | None]:
    return lambda image, dim: form(image) if dim in (1, 1 - image.ndim) else None


def _global_average(image: Tensor, size: Any) -> Tensor | None:
    return forms.global_average(image) if _is_one(size) else None


def _is_one(size: Any) -> bool:
    return all(each == 1 for each in size) if isinstance(size, tuple) else size == 1


_IMAGES = [(2, 8, 4, 4), (2, 8, 4, 4, 4)]


def _padded(padding: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(2, 8, *(max(padding) + 2,) * (len(padding) // 2))] if min(padding) >= 0 else []


def _of_dim(dim: int | None) -> list[tuple[int, ...]]:
    return [shape for shape in _IMAGES if dim in (1, 1 - len(shape))]


SWAPS = [
    Swap(nn.PixelShuffle, ("upscale_factor",), _pixel_shuffle, lambda factor: [(2, 4 * factor**2, 4, 4)]),
    Swap(nn.PixelUnshuffle, ("downscale_factor",), _pixel_unshuffle, lambda factor: [(2, 4, 4 * factor, 4 * factor)]),
    Swap(nn.ChannelShuffle, ("groups",), _channel_shuffle, lambda n: [(2, 2 * n, 4, 4), (2, 2 * n, 4, 4, 4)]),
    Swap(nn.ReflectionPad2d, ("padding",), _pad("reflect"), _padded),
    Swap(nn.ReflectionPad3d, ("padding",), _pad("reflect"), _padded),
    Swap(nn.ReplicationPad2d, ("padding",), _pad("replicate"), _padded),
    Swap(nn.ReplicationPad3d, ("padding",), _pad("replicate"), _padded),
    Swap(nn.CircularPad2d, ("padding",), _pad("circular"), _padded),
    Swap(nn.CircularPad3d, ("padding",), _pad("circular"), _padded),
    Swap(nn.Softmax, ("dim",), _over_channels(forms.softmax), _of_dim),
    Swap(nn.LogSoftmax, ("dim",), _over_channels(forms.log_softmax), _of_dim),
    Swap(nn.Softmax2d, (), forms.softmax, lambda: _IMAGES[:1]),
    Swap(nn.GLU, ("dim",), _over_channels(forms.glu), _of_dim),
    Swap(nn.AdaptiveAvgPool2d, ("output_size",), _global_average, lambda size: _IMAGES[:1] if _is_one(size) else []),
    Swap(nn.AdaptiveAvgPool3d, ("output_size",), _global_average, lambda size: _IMAGES[1:] if _is_one(size) else []),
]
