"""Forms of operators that keep channels last, with the values of PyTorch's own. PyTorch only.

Each works on views of the image's memory: with its channels moved to the end, a channels last image is a contiguous
tensor, of which PyTorch's operators make contiguous ones, forward and backward.
"""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["channel_shuffle", "glu", "global_average", "log_softmax", "pad", "pixel_shuffle", "pixel_unshuffle"]
__all__ += ["softmax"]


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
    "Return `F.channel_shuffle(image, groups)`, equal to the bit, forward and backward."
    pixels = image.movedim(1, -1)
    grouped = pixels.reshape(*pixels.shape[:-1], groups, pixels.shape[-1] // groups)
    return grouped.transpose(-1, -2).reshape(pixels.shape).movedim(-1, 1)


def pad(
    image: Tensor,  # 4D or 5D
    padding: tuple[int, ...],  # as `F.pad` takes it
    mode: str,  # 'reflect', 'replicate' or 'circular'
) -> Tensor:
    """Return `F.pad(image, padding, mode)`, equal to the bit.

    The gradient too in 4D. In 5D it is a sum in another order, at edges where several dimensions are padded.
    """
    if image.ndim == 4:
        # One channel, and the true ones as a last dimension that gets no padding: PyTorch pads up to three dimensions
        pixels = image.permute(0, 2, 3, 1).unsqueeze(1)
        return F.pad(pixels, (0, 0, *padding), mode).squeeze(1).permute(0, 3, 1, 2)
    b, c, d, h, w = image.shape
    pixels = image.permute(0, 2, 3, 4, 1).reshape(b, 1, d, h, w * c)
    pixels = F.pad(pixels, (0, 0, *padding[2:]), mode)  # the two outer dimensions, then the innermost
    d, h = pixels.shape[2:4]
    pixels = F.pad(pixels.reshape(b * d * h, 1, w, c), (0, 0, *padding[:2]), mode)
    return pixels.reshape(b, d, h, -1, c).permute(0, 4, 1, 2, 3)


def softmax(
    image: Tensor,  # 4D or 5D
) -> Tensor:
    "Return `F.softmax(image, 1)`, but for the order of its sums."
    return F.softmax(image.movedim(1, -1), -1).movedim(-1, 1)


def log_softmax(
    image: Tensor,  # 4D or 5D
) -> Tensor:
    "Return `F.log_softmax(image, 1)`, but for the order of its sums."
    return F.log_softmax(image.movedim(1, -1), -1).movedim(-1, 1)


def glu(
    image: Tensor,  # 4D or 5D
) -> Tensor:
    "Return `F.glu(image, 1)`, equal to the bit, forward and backward."
    return F.glu(image.movedim(1, -1), -1).movedim(-1, 1)


def global_average(
    image: Tensor,  # 4D or 5D
) -> Tensor:
    "Return the average of each channel, as `F.adaptive_avg_pool2d(image, 1)`, equal to the bit, forward and backward."
    pixels = image.movedim(1, -1)
    return pixels.mean(tuple(range(1, image.ndim - 1)), keepdim=True).movedim(-1, 1)
