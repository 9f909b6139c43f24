"""Operators in forms that keep channels last, with the values of PyTorch's own. PyTorch only.

Each works on views of the image's memory: with its channels moved to the end, a channels last image is a contiguous
tensor, of which PyTorch's operators make contiguous ones, forward and backward.
"""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["channel_shuffle", "global_average", "glu", "pad", "pixel_shuffle", "pixel_unshuffle"]


def pixel_shuffle(
    image: Tensor,  # (B, C * factor ** 2, H, W)
    factor: int,
) -> Tensor:
    "Return `F.pixel_shuffle(image, factor)`, equal to the bit, forward and backward."
    b, c, h, w = image.shape
    c = c // factor**2
    pixels = image.permute(0, 2, 3, 1).reshape(b, h, w, c, factor, factor)
    return pixels.permute(0, 1, 4, 2, 5, 3).reshape(b, h * factor, w * factor, c).permute(0, 3, 1, 2)


def pixel_unshuffle(
    image: Tensor,  # (B, C, H * factor, W * factor)
    factor: int,
) -> Tensor:
    "Return `F.pixel_unshuffle(image, factor)`, equal to the bit, forward and backward."
    b, c, h, w = image.shape
    h, w = h // factor, w // factor
    pixels = image.permute(0, 2, 3, 1).reshape(b, h, factor, w, factor, c)
    return pixels.permute(0, 1, 3, 5, 2, 4).reshape(b, h, w, c * factor**2).permute(0, 3, 1, 2)


def channel_shuffle(
    image: Tensor,  # 4D or 5D
    groups: int,
) -> Tensor:
    "Return what `nn.ChannelShuffle(groups)` does, equal to the bit, forward and backward."
    pixels = image.movedim(1, -1)
    grouped = pixels.reshape(*pixels.shape[:-1], groups, pixels.shape[-1] // groups)
    return grouped.transpose(-1, -2).reshape(pixels.shape).movedim(-1, 1)


def pad(
    image: Tensor,  # 4D
    padding: tuple[int, ...],  # four numbers, as `F.pad` takes them
    mode: str,  # 'reflect', 'replicate' or 'circular'
) -> Tensor:
    """Return `F.pad(image, padding, mode)`, equal to the bit.

    The gradient too, as far as PyTorch's own is the same twice: on CUDA it adds up in any order, but for 'circular'.
    """
    # As a volume of one channel, of which the channels are the last dimension and get no padding
    volume = image.permute(0, 2, 3, 1).unsqueeze(1)
    return F.pad(volume, (0, 0, *padding), mode).squeeze(1).permute(0, 3, 1, 2)


def glu(
    image: Tensor,  # 4D or 5D
) -> Tensor:
    "Return `F.glu(image, 1)`, equal to the bit; the gradient to one rounding (on CUDA it was equal too)."
    return F.glu(image.movedim(1, -1), -1).movedim(-1, 1)


def global_average(
    image: Tensor,  # 4D or 5D
) -> Tensor:
    "Return the average of each channel, as `F.adaptive_avg_pool2d(image, 1)`, equal to the bit, forward and backward."
    pixels = image.movedim(1, -1)
    return pixels.mean(tuple(range(1, image.ndim - 1)), keepdim=True).movedim(-1, 1)
