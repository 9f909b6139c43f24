"""Layers of fastai's U-Net in forms for a GPU: its last ones, and those that upsample.

The last ones have 99 channels and compute with 104: then no pass has to pad them. Tensor Cores take channels of half
precision by eights, and cuDNN pads images of others in each pass of each convolution. Here the zeros come with the
image that the U-Net merges before these layers, and zero weights go with them: the sums are the same. The image comes
in half precision, as the next convolution takes it: autocast would have all channels merged in float32.

`PixelShuffle_ICNR` is a 1x1 convolution and a shuffle that deals its channels out to pixels. Here the convolution makes
them in the order in which they lie there: runs of channels move, not single ones. The values are those of the layer, to
the bit where the convolution's kernel computes all channels alike (in float32, float16 and bfloat16); the image's
gradient to rounding, for it adds channels up in that order.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from fastai.layers import ConvLayer, MergeLayer, PixelShuffle_ICNR, ResBlock
from fastai.vision.models.unet import DynamicUnet
from torch import Tensor, nn

from channelslast.graphs.ground import HOOKS
from channelslast.swaps import PARTS, is_free

__all__ = ["forms_of_last_layers", "forms_of_upsampling"]

_EIGHT = 8  # channels of half precision that a Tensor Core takes at once
_CHANNELWISE = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Mish, nn.Hardswish, nn.Identity, nn.AvgPool2d)
_CONTAINERS = (nn.Sequential, ConvLayer, ResBlock)


def forms_of_last_layers(
    module: nn.Module,  # any
) -> list[tuple[nn.Module, Callable]]:
    "The layers of a `DynamicUnet` that compute with more channels, each with its `forward`; none of another module."
    if not isinstance(module, DynamicUnet) or type(module).forward is not DynamicUnet.forward or not is_free(module):
        return []
    kinds = [type(layer) for layer in module.layers]
    at = kinds.index(MergeLayer) if MergeLayer in kinds else len(kinds)
    if kinds[at : at + 3] != [MergeLayer, ResBlock, ConvLayer]:
        return []
    merge, block, last = module.layers[at : at + 3]
    convs = [part for part in block.modules() if type(part) is nn.Conv2d]
    others = {type(part) for part in block.modules()} - {nn.Conv2d}
    swapped = [merge, *convs, last[0]]
    if (
        not merge.dense
        or not convs
        or not _missing(convs[0].in_channels)
        or not others <= {*_CHANNELWISE, *_CONTAINERS}
        or not all(map(_is_plain, [*convs, last[0]]))
        or not all(map(is_free, swapped))
        or any(map(_has_hooks, [merge, block, last]))
    ):
        return []
    return [(merge, _merge), *((conv, _conv) for conv in convs), (last[0], _last_conv)]


def _is_plain(conv: nn.Module) -> bool:
    return type(conv) is nn.Conv2d and conv.groups == 1 and conv.padding_mode == "zeros"


def _has_hooks(layer: nn.Module) -> bool:
    "Hooks on a layer, which would see the added channels, or compute a weight from others."
    return any(vars(part).get(kind) for part in layer.modules() for kind in HOOKS)


def _missing(channels: int) -> int:
    return -channels % _EIGHT


def _merge(self: MergeLayer, x: Tensor) -> Tensor:
    if x.dtype not in (torch.float16, torch.bfloat16):
        return MergeLayer.forward(self, x)
    image = x.orig.to(x.dtype)
    return torch.cat([x, F.pad(image, (0, 0, 0, 0, 0, _missing(x.shape[1] + image.shape[1])))], dim=1)


def _conv(self: nn.Conv2d, input: Tensor) -> Tensor:
    return _padded_conv(self, input, _missing(self.out_channels))


def _last_conv(self: nn.Conv2d, input: Tensor) -> Tensor:
    return _padded_conv(self, input, 0)


def _padded_conv(
    conv: nn.Conv2d,
    image: Tensor,
    n_out: int,  # channels to add to the output, if the image has added ones
) -> Tensor:
    n_in = _missing(conv.in_channels)
    if image.shape[1] != conv.in_channels + n_in:
        return nn.Conv2d.forward(conv, image)
    weight = F.pad(conv.weight, (0, 0, 0, 0, 0, n_in, 0, n_out))
    bias = None if conv.bias is None else F.pad(conv.bias, (0, n_out))
    return F.conv2d(image, weight, bias, conv.stride, conv.padding, conv.dilation)


def forms_of_upsampling(
    module: nn.Module,  # any
) -> list[tuple[nn.Module, Callable]]:
    "A `PixelShuffle_ICNR` with its `forward`, where its channels may come in another order; none for another module."
    if type(module) is not PixelShuffle_ICNR or not is_free(module) or len(module) < 2:
        return []
    layer, shuffle = module[0], module[1]
    if type(layer) is not ConvLayer or type(shuffle) is not nn.PixelShuffle:
        return []
    conv, *others = layer
    if (
        not _is_plain(conv)
        or any(type(part) not in _CHANNELWISE for part in others)
        or not all(map(is_free, [layer, conv, shuffle]))
        or any(map(_has_hooks, [layer, shuffle]))
    ):
        return []
    return [(module, _upsample)]


def _upsample(self: PixelShuffle_ICNR, input: Tensor) -> Tensor:
    if input.ndim != 4:
        return PixelShuffle_ICNR.forward(self, input)
    (conv, *others), shuffle, *rest = self
    factor = shuffle.upscale_factor
    weight, bias = (
        param if param is None else param.unflatten(0, (-1, factor**2)).transpose(0, 1).flatten(0, 1)
        for param in (conv.weight, conv.bias)
    )
    image = F.conv2d(input, weight, bias, conv.stride, conv.padding, conv.dilation)
    for part in others:
        image = part(image)
    image = (_deal_out if torch.compiler.is_compiling() else _DealOut.apply)(image, factor)
    for part in rest:
        image = part(image)
    return image


def _deal_out(image: Tensor, factor: int) -> Tensor:
    "`F.pixel_shuffle` of an image whose channels come in the order of the pixels: (factor, factor, C)."
    b, _, h, w = image.shape
    rows = image.permute(0, 2, 3, 1).reshape(b, h, w, factor, -1).transpose(2, 3)
    return _contiguous(rows).view(b, h * factor, w * factor, -1).permute(0, 3, 1, 2)


class _DealOut(torch.autograd.Function):
    "`_deal_out`, whose gradient takes a single copy, also where it is a part of the channels."

    @staticmethod
    def forward(image: Tensor, factor: int) -> Tensor:
        return _deal_out(image, factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        _, ctx.factor = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        pixels = grad.permute(0, 2, 3, 1).unflatten(2, (-1, ctx.factor)).unflatten(1, (-1, ctx.factor))
        return _contiguous(pixels.transpose(2, 3)).flatten(3).permute(0, 3, 1, 2), None


def _contiguous(rows: Tensor) -> Tensor:
    "A copy that moves 8 bytes at a time where it can: PyTorch moves element by element what is strided."
    n = 1
    if not (torch.compiler.is_compiling() or torch.is_grad_enabled()):  # which follow no view of another dtype
        n = 8 // rows.element_size()
        steps = rows.shape[-1], rows.storage_offset(), *rows.stride()[:-1]
    if n < 2 or rows.stride(-1) != 1 or any(step % n for step in steps):
        return rows.clone(memory_format=torch.contiguous_format)
    return rows.view(torch.int64).clone(memory_format=torch.contiguous_format).view(rows.dtype)


def _parts(model: nn.Module, device: torch.device) -> Iterator[tuple[nn.Module, Callable]]:
    if device.type == "cuda":
        for module in model.modules():
            yield from (*forms_of_last_layers(module), *forms_of_upsampling(module))


PARTS.append(_parts)
