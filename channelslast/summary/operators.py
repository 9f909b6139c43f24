"What one operator did to the memory format of the images that it read and wrote."

from typing import Any, NamedTuple

import torch
from torch import Tensor

from channelslast.memory_format import is_channels_last
from channelslast.nested import tensors_in
from channelslast.summary.images import may_come_of
from channelslast.tensors import format_of, images_in

__all__ = ["Operator", "Written", "memory_of"]

_CONVOLUTIONS = {"convolution", "convolution_backward"}
_COPIES = {"clone", "copy", "copy_", "_to_copy"}
_SLICES = {"alias", "detach", "narrow", "slice", "split", "split_with_sizes"}  # views of an image that are images
_NEW = {
    "empty",
    "empty_like",
    "empty_strided",
    "full",
    "full_like",
    "new_empty",
    "new_empty_strided",
    "new_full",
    "new_zeros",
    "ones_like",
    "zeros",
    "zeros_like",
}
_GROUPS = 8  # position among the arguments of `aten.convolution`
_HALF = (torch.float16, torch.bfloat16)


class Written(NamedTuple):
    "An image that an operator wrote."

    image: Tensor
    read: list[Tensor]  # the images that it was computed from
    kind: str | None  # 'lost', 'converted' or 'mixed'; None where nothing happened to the format

    @property
    def gives_up_channels_last(self) -> bool:
        return self.kind in ("lost", "converted") and format_of(self.image) == "contiguous"

    @property
    def comes_of_expanded(self) -> bool:
        "Whether it is a contiguous image made of expanded ones alone."
        if not self.read or format_of(self.image) != "contiguous":
            return False
        return all(0 in tensor.stride() for tensor in self.read)


class Operator:
    """An operator that has run, with the images among its operands.

    Ask a convolution (`is_convolution`) by its own methods, every other operator by `written` and `slices`.
    """

    def __init__(self, func: Any, args: tuple, kwargs: dict, result: Any):  # of `__torch_dispatch__`
        self.name = str(func.overloadpacket)  # as 'aten.clone'
        self._short_name = self.name.rpartition(".")[2]
        self.is_copy = self._short_name in _COPIES
        self.is_convolution = self._short_name in _CONVOLUTIONS
        self.operands = images_in((args, kwargs))
        self._is_pointwise = torch.Tag.pointwise in func.tags and not self.is_copy
        self._args, self._kwargs, self._result = args, kwargs, result

    # Every operator but a convolution

    def written(self) -> list[Written]:
        "Return the images among its results that are no views."
        return [self._written(image) for image in self._results() if not self._is_view(image)]

    def slices(self) -> list[Tensor]:
        "Return the images among its results that are a part of its first operand."
        return [image for image in self._results() if self._is_view(image)] if self._short_name in _SLICES else []

    def _results(self) -> list[Tensor]:
        if self._short_name in _NEW:
            return []
        return [tensor for tensor in images_in(self._result) if _has_memory(tensor)]

    def _is_written_over(self, result: Tensor) -> bool:
        return any(result is operand for operand in self.operands)

    def _is_view(self, result: Tensor) -> bool:
        if self._is_written_over(result):
            return False
        return memory_of(result) in map(memory_of, tensors_in((self._args, self._kwargs)))

    def _written(self, image: Tensor) -> Written:
        read = self.operands
        if self._is_written_over(image) and not self._is_pointwise:  # as by `copy_`, which does not read it
            read = [operand for operand in read if operand is not image]
        return Written(image, read, self._kind(image, read))

    def _kind(self, image: Tensor, read: list[Tensor]) -> str | None:
        sources = [operand for operand in read if may_come_of(image.shape, [operand.shape], or_reshaped=True)]
        before, after = {format_of(source) for source in sources} - {None}, format_of(image)
        if after is None or not before:
            return None
        if self.is_copy:
            return "converted" if before != {after} else None
        if len(before) == 2:
            return "mixed" if self._is_pointwise or self._short_name == "cat" else None
        return "lost" if before == {"channels last"} and after == "contiguous" else None

    # A convolution, forward or backward: its last two operands are its input and its weight

    def relaid(self) -> list[Tensor]:
        """Return the operands that a convolution must re-lay inside its kernel.

        It works in channels last where its input or its weight is, and in contiguous else: the rule of
        `cudnn_conv_suggest_memory_format` and `mkldnn_conv_use_channels_last` in PyTorch's `ATen/native/ConvUtils.h`.
        """
        *_, image, weight = self.operands
        works_in = "channels last" if is_channels_last(image) or is_channels_last(weight) else "contiguous"
        return [operand for operand in self.operands if format_of(operand) not in (None, works_in)]

    def convolved(self) -> Tensor | None:
        "Return the image that it wrote; of a backward pass the gradient of its input, None if that needs none."
        return self._result if isinstance(self._result, Tensor) else self._result[0]

    def padded_channels(self, input_channels: set[int]) -> tuple[int, int] | None:
        """Return channels in and out of a half precision convolution if cuDNN pads them to multiples of 8, else None.

        Channels in that the model's own images have (`input_channels`) are no reason: nobody chooses the 3 of RGB.
        """
        is_forward = isinstance(self._result, Tensor)
        if not is_forward or self.operands[-2].dtype not in _HALF or self._args[_GROUPS] != 1:
            return None
        c_in, c_out = self.operands[-2].size(1), self._result.size(1)
        is_padded = c_out % 8 or (c_in % 8 and c_in not in input_channels)
        return (c_in, c_out) if is_padded else None


def memory_of(
    tensor: Tensor,
) -> int:
    "Return a number that is the same for tensors in the same memory."
    return tensor.untyped_storage().data_ptr() if _has_memory(tensor) else id(tensor)


def _has_memory(tensor: Tensor) -> bool:
    "Whether its values lie where its strides say: not those of a sparse tensor, or of one that wraps others."
    return tensor.layout == torch.strided and tensor.data_ptr() != 0
