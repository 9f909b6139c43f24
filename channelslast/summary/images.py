"Which of a step's 4D and 5D tensors are images. Others are weights, or the heads of attention."

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from channelslast.tensors import format_of

__all__ = ["Image", "ImageShapes", "may_come_of"]


class Image(NamedTuple):
    "What is remembered of an image."

    memory_format: str | None  # as `format_of` tells it
    shape: torch.Size


class ImageShapes:
    "The shapes that images have in a step: those of the model's inputs, and what comes of them."

    def __init__(self, weights: set[torch.Size]):  # shapes of the model's parameters
        self._weights = weights
        self._shapes: set[torch.Size] = set()

    def __contains__(self, shape: torch.Size) -> bool:
        return shape in self._shapes

    def add(self, shape: torch.Size) -> None:
        self._shapes.add(shape)

    def add_if_image(self, result: Tensor, read: list[Tensor]) -> None:
        "Add the shape of `result` if it comes of images: it, or what it was computed from, has their shape or strides."
        images = [tensor.shape for tensor in (*read, result) if self._is_image(tensor)]
        if may_come_of(result.shape, images, or_reshaped=True):
            self._shapes.add(result.shape)

    def _is_image(self, tensor: Tensor) -> bool:
        "Whether it has an image's shape, or is channels last, as attention's (B, heads, N, C) never is, and no weight."
        if tensor.shape in self._shapes:
            return True
        return format_of(tensor) == "channels last" and not self.is_weight(tensor)

    def is_weight(self, tensor: Tensor) -> bool:
        "Whether it has the shape of a weight, and so may be one, or the gradient of one."
        return tensor.shape in self._weights


def may_come_of(
    shape: torch.Size,
    others: Iterable[torch.Size],
    or_reshaped: bool = False,  # also if it has as many values: pixel shuffle trades channels for pixels
) -> bool:
    "Whether an image of `shape` may come of one of the others: it has the same channels, or the same pixels."
    for other in others:
        if len(other) != len(shape):
            continue
        if other[1] == shape[1] or other[2:] == shape[2:]:
            return True
        if or_reshaped and other.numel() == shape.numel():
            return True
    return False
