"The memory format that an image is in, where that can be told. PyTorch only."

from typing import Any

import torch
from torch import Tensor

from channelslast.memory_format import CHANNELS_LAST, is_channels_last
from channelslast.nested import tensors_in

__all__ = ["format_of", "images_in"]


def images_in(
    values: Any,  # as `tensors_in` takes them
) -> list[Tensor]:
    "Return the 4D and 5D tensors in `values`, but for nested ones, which have no shape."
    return [tensor for tensor in tensors_in(values) if tensor.ndim in CHANNELS_LAST and not tensor.is_nested]


def format_of(
    tensor: Tensor,  # of any rank
) -> str | None:
    """Return whether a 4D or 5D tensor is in 'channels last' or in 'contiguous' format, by its strides.

    None where that makes no difference or cannot be told: for other ranks, for tensors that are in both formats at
    once (one channel, 1x1 pixels, no elements), expanded ones (a stride of 0), sparse and nested ones, and inside
    `torch.vmap`. (`get_memory_format` tells how operators read a tensor, and so has an answer for each.)
    """
    if tensor.ndim not in CHANNELS_LAST or tensor.is_nested or tensor.layout != torch.strided:
        return None
    shape, strides = tensor.shape, tensor.stride()
    if tensor.numel() == 0 or shape[1] == 1 or max(shape[2:]) == 1:
        return None
    if any(stride == 0 and size > 1 for size, stride in zip(shape, strides, strict=True)):
        return None
    try:
        # unlike `is_channels_last` it ignores the batch stride of a batch of one, which says nothing
        is_dense = tensor.is_contiguous(memory_format=CHANNELS_LAST[tensor.ndim])
    except RuntimeError:  # inside `torch.vmap`
        return None
    return "channels last" if is_dense or is_channels_last(tensor) else "contiguous"
