"What memory format a tensor is in, and how to convert tensors, batches, modules and optimizer state."

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from channelslast.nested import check_type, map_tensors, tensors_in

__all__ = [
    "get_memory_format",
    "is_channels_last",
    "to_memory_format",
    "module_to_memory_format",
    "optimizer_to_memory_format",
    "state_to_contiguous",
    "module_ndims",
    "conv_ndims",
    "supports_channels_last",
]

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_INNERMOST_FIRST = {4: (1, 3, 2, 0), 5: (1, 4, 3, 2, 0)}
_CONV_NDIM = {nn.Conv2d: 4, nn.ConvTranspose2d: 4, nn.Conv3d: 5, nn.ConvTranspose3d: 5}

# What PyTorch says of `.view` on a tensor whose strides do not allow it
VIEW_ERROR = "view size is not compatible with input tensor's size and stride"

# MPS: batch norm and pooling of a channels last slice give wrong values (pytorch/pytorch#174345),
# a convolution's gradient comes back in the wrong format (pytorch/pytorch#174269). Both open in PyTorch 2.10.
UNRELIABLE_DEVICES = {"mps"}


def get_memory_format(
    tensor: Tensor,  # of any rank
) -> torch.memory_format:
    """Return the memory format in which PyTorch's operators read `tensor`.

    That is `torch.channels_last` (4D), `torch.channels_last_3d` (5D), or `torch.contiguous_format` for everything else,
    tensors of other ranks and arbitrary strides included. Operators decide by strides alone, so a tensor whose values
    lie the same way in two formats (one channel, a 1x1 kernel) still is in one of them, whatever `is_contiguous`
    answers. The rule is that of `suggest_memory_format` in PyTorch's `c10/core/MemoryFormat.h`.
    """
    check_type("tensor", tensor, Tensor)
    order = _INNERMOST_FIRST.get(tensor.ndim)
    if order is None or tensor.layout != torch.strided or tensor.stride(1) == 0:
        return torch.contiguous_format
    least_stride = 0  # that the next dimension can have, all inside it being dense
    for dim in order:
        size, stride = tensor.size(dim), tensor.stride(dim)
        # At the batch it is the channel stride only in the shape (N, 1, 1, 1), which PyTorch reads as contiguous
        if size == 0 or stride < least_stride or (dim == 0 and least_stride == tensor.stride(1)):
            return torch.contiguous_format
        least_stride = stride * size if size > 1 else stride
    return CHANNELS_LAST[tensor.ndim]


def is_channels_last(
    tensor: Tensor,  # of any rank
) -> bool:
    "Whether PyTorch's operators read `tensor` as `channels_last` (4D) or `channels_last_3d` (5D)."
    return get_memory_format(tensor) is not torch.contiguous_format


def supports_channels_last(
    device: torch.device | str,  # where the model runs
) -> bool:
    "Whether channels last gives right results on `device`: everywhere but on MPS."
    return torch.device(device).type not in UNRELIABLE_DEVICES


def to_memory_format(
    batch: Any,  # a tensor, or tuples, named tuples, lists and dicts of tensors, nested in any way
    channels_last: bool = True,  # False: contiguous
    ndims: Collection[int] = (4, 5),  # convert tensors of these ranks alone
) -> Any:
    """Return `batch` with its 4D and 5D tensors in channels last (or contiguous) format.

    Tensors in that format already, tensors of other ranks and everything that is no tensor come back as they are,
    and so does a container in which nothing changed, or whose class cannot be made from its items. Subclasses of
    `Tensor` keep their type and attributes.
    """
    check_type("channels_last", channels_last, bool)
    return map_tensors(lambda tensor: _convert(tensor, channels_last) if tensor.ndim in ndims else tensor, batch)


def state_to_contiguous(
    state: Any,  # a `state_dict` of a module or optimizer, or anything nested
) -> Any:
    "Return `state` with its 4D and 5D tensors contiguous; those that share memory, as tied weights, still do."
    converted: dict[tuple, Tensor] = {}
    return map_tensors(lambda tensor: _convert_once(tensor, False, converted), state)


def batch_to_contiguous(
    batch: Any,  # a tensor, or tensors nested in any way
) -> Any:
    "Return `batch` with its tensors, of any rank, contiguous."
    return map_tensors(_to_contiguous, batch)


def _convert(tensor: Tensor, channels_last: bool) -> Tensor:
    "Return `tensor` in the format asked for; itself where its rank has no such format, or its strides are right."
    if tensor.layout != torch.strided or tensor.is_nested or tensor.ndim not in CHANNELS_LAST or tensor.numel() == 0:
        return tensor
    memory_format = CHANNELS_LAST[tensor.ndim] if channels_last else torch.contiguous_format
    # `to` copies what operators read in the other format, `contiguous` what has gaps or strides of neither format
    new = tensor.to(memory_format=memory_format).contiguous(memory_format=memory_format)
    # The shape (N, 1, 1, 1) has the same strides in both formats, and `to` copies it each time
    return tensor if new.stride() == tensor.stride() else _like(new, tensor)


def _to_contiguous(tensor: Tensor) -> Tensor:
    tensor = _convert(tensor, channels_last=False)  # also where the values lie the same way in both formats
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_contiguous():
        return tensor
    return _like(tensor.contiguous(), tensor)


def _convert_once(tensor: Tensor, channels_last: bool, converted: dict[tuple, Tensor]) -> Tensor:
    "Call `_convert`, once for all tensors that are one and the same piece of memory."
    if tensor.data_ptr() == 0:  # no memory of its own: empty, on the meta device, or a subclass that wraps tensors
        return _convert(tensor, channels_last)
    memory = (tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride())
    key = (*memory, type(tensor), tensor.requires_grad, tensor.is_conj(), tensor.is_neg())
    if key not in converted:
        converted[key] = _convert(tensor, channels_last)
    new = converted[key]
    return tensor if new.stride() == tensor.stride() else new


def _like(new: Tensor, old: Tensor) -> Tensor:
    "Return `new` with the tensor subclass and the attributes of `old`."
    if type(new) is not type(old) and type(old) is not nn.Parameter:
        new = new.as_subclass(type(old))
    for name, value in vars(old).items():
        vars(new).setdefault(name, value)
    return new


def has_lazy_parameters(
    module: nn.Module,
) -> bool:
    "Whether `module` has parameters without a shape, and so without a memory format, until its first forward pass."
    return any(is_lazy(param) for param in module.parameters())


def module_ndims(
    module: nn.Module,
) -> set[int]:
    "Return which of the ranks 4 and 5, those with a channels last format, parameters and buffers of `module` have."
    return {tensor.ndim for tensor in _tensors(module) if tensor.ndim in CHANNELS_LAST}


def conv_ndims(
    module: nn.Module,
) -> set[int]:
    """Return which of the ranks 4 and 5 convolution weights of `module` have: inputs of these gain from channels last.

    A convolution is one of PyTorch's classes, or any module with a 4D or 5D parameter called `weight`.
    """
    ndims = set()
    for submodule in module.modules():
        ndims.update(ndim for cls, ndim in _CONV_NDIM.items() if isinstance(submodule, cls))
        weight = dict(submodule.named_parameters(recurse=False)).get("weight")
        if weight is not None and weight.ndim in CHANNELS_LAST:
            ndims.add(weight.ndim)
    return ndims


def _tensors(module: nn.Module) -> list[Tensor]:
    return [tensor for tensor in (*module.parameters(), *module.buffers()) if not is_lazy(tensor)]


def module_to_memory_format(
    module: nn.Module,
    channels_last: bool = True,  # False: contiguous
) -> nn.Module:
    """Put the 4D and 5D parameters and buffers of `module` in channels last (or contiguous) format, in place.

    Gradients follow. Parameters and buffers stay the same objects, so optimizers still hold them, and those that
    share their memory still do: tied weights are converted once, and two that overlap in another way, as a parameter
    and a slice of it, stay as they are. Unlike `module.to(memory_format=torch.channels_last)` it takes models with 5D
    weights too, which go to `torch.channels_last_3d`. Returns `module`.
    """
    check_type("module", module, nn.Module)
    check_type("channels_last", channels_last, bool)
    _set_formats(module, lambda tensor: channels_last)
    return module


def memory_formats_kept(
    module: nn.Module,
) -> Callable[[], None]:
    """Return a function that puts `module` back in the memory format that it has now.

    That is its 4D and 5D parameters and buffers, each in its own format, in place, as `module_to_memory_format` does.
    """
    kept = {id(tensor): (tensor, is_channels_last(tensor)) for tensor in _tensors(module)}

    def was_channels_last(tensor: Tensor) -> bool:
        return kept[id(tensor)][1] if id(tensor) in kept else is_channels_last(tensor)

    return partial(_set_formats, module, was_channels_last)


@torch.inference_mode(False)  # tensors made in inference mode could never be trained
def _set_formats(module: nn.Module, is_last: Callable[[Tensor], bool]) -> None:
    "Put the parameters and buffers of `module` in channels last format where `is_last` says so, else contiguous."
    pairs = _with_new_data(module, is_last)
    for tensor, data in list(pairs) if _in_own_memory.get() else pairs:  # all are read before one is written
        _set_data(tensor, data, is_trained=tensor.requires_grad)
        if isinstance(tensor, nn.Parameter):
            match_strides(tensor.grad, tensor)


_in_own_memory = ContextVar("in_own_memory", default=False)


@contextmanager
def own_memory_kept() -> Iterator[None]:
    """What is converted inside, of modules and optimizers, lies in the memory that it had, if it had that for itself.

    So what keeps the old memory, to put it back, does not need twice as much.
    """
    token = _in_own_memory.set(True)
    try:
        yield
    finally:
        _in_own_memory.reset(token)


def _set_data(tensor: Tensor, data: Tensor, is_trained: bool) -> None:
    "Give `tensor` the same values in other strides: `data`, or within `own_memory_kept` a copy of it in its memory."
    old = tensor.data
    is_writable = is_trained or old.is_cuda  # a file that is mapped for reading is not
    if _in_own_memory.get() and is_writable and data.stride() != old.stride() and _fills_its_memory(old):
        data = old.as_strided(data.shape, data.stride()).copy_(data)
    tensor.data = data


def _fills_its_memory(tensor: Tensor) -> bool:
    "Whether the values of `tensor` are all that lies in its memory, without gaps."
    if tensor.data_ptr() == 0 or tensor.is_inference() or tensor.is_conj() or tensor.is_neg():
        return False
    other = CHANNELS_LAST.get(tensor.ndim, torch.contiguous_format)
    is_dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=other)
    return is_dense and tensor.untyped_storage().nbytes() == tensor.nbytes


@contextmanager
def contiguous_weights(
    module: nn.Module,
) -> Iterator[None]:
    "Parameters and buffers of `module` are contiguous inside, and lie in the memory that they had again after it."
    tensors = list(_with_new_data(module, lambda tensor: False))
    before = [(tensor, tensor.data) for tensor, _ in tensors]
    try:
        for tensor, data in tensors:
            tensor.data = data
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def _with_new_data(module: nn.Module, is_last: Callable[[Tensor], bool]) -> Iterator[tuple[Tensor, Tensor]]:
    "Yield the 4D and 5D parameters and buffers of `module`, each with the data to give it."
    tensors = _tensors(module)
    entangled = _entangled(tensors)
    converted: dict[tuple, Tensor] = {}
    for tensor in tensors:
        if tensor.ndim in CHANNELS_LAST:
            stays = id(tensor) in entangled
            yield tensor, tensor.data if stays else _convert_once(tensor.data, is_last(tensor), converted)


def _entangled(tensors: Iterable[Tensor]) -> set[int]:
    """Return the `id` of each tensor that shares memory with one of another shape, strides or dtype, as a slice.

    Two share memory if their ranges of bytes overlap, so the even and the odd channels of a tensor do.
    """
    views: dict[tuple, list[int]] = {}  # tied weights are one and the same view
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_nested or tensor.numel() == 0 or tensor.data_ptr() == 0:
            continue
        start = tensor.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        end = start + (last + 1) * tensor.element_size()
        view = (str(tensor.device), start, end, tensor.shape, tensor.stride(), str(tensor.dtype))
        views.setdefault(view, []).append(id(tensor))
    found = set()
    furthest = None  # of the views so far, the one that ends last
    for view in sorted(views):
        device, start, end = view[:3]
        is_first_there = furthest is None or furthest[0] != device
        if not is_first_there and start < furthest[2]:
            found |= {view, furthest}
        if is_first_there or end > furthest[2]:
            furthest = view
    return {tensor_id for view in found for tensor_id in views[view]}


def match_strides(
    tensor: Any,  # a gradient or optimizer state of `param`; one of another shape, or no tensor, stays as it is
    param: Tensor,
) -> None:
    "Give `tensor` the strides of `param`, in place."
    if isinstance(tensor, Tensor) and tensor.shape == param.shape and tensor.stride() != param.stride():
        data = torch.empty_like(param, dtype=tensor.dtype, device=tensor.device).copy_(tensor.detach())
        _set_data(tensor, data, is_trained=True)


@torch.inference_mode(False)
def optimizer_to_memory_format(
    optimizer: Any,  # a `torch.optim.Optimizer`, or anything with its `state`: `{parameter: {name: value}}`
) -> Any:
    """Give the state of `optimizer` the memory format of the parameters it belongs to, in place.

    Concerns 4D and 5D state of its parameter's shape, as Adam's moments and SGD's momentum buffer, nested in any way.
    A fused or foreach kernel takes its slow path where state, gradient and parameter differ in strides. Returns
    `optimizer`.
    """
    check_type("optimizer.state", getattr(optimizer, "state", None), Mapping)
    for param, state in optimizer.state.items():
        # not every key is a parameter: fastai's `norm_bias_params` takes a GRU's `bias`, which is True, for one
        if isinstance(param, Tensor) and param.ndim in CHANNELS_LAST:
            for tensor in tensors_in(state):
                match_strides(tensor, param)
    return optimizer


def with_wrapped(
    optimizer: Any,  # or None
) -> Iterator[Any]:
    "Yield `optimizer`, and those that it wraps as its attribute `opt`, as fastai's Lookahead and OptimWrapper do."
    while optimizer is not None:
        yield optimizer
        optimizer = vars(optimizer).get("opt")
