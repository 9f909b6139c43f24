"""fastai's U-Net, whose last layers have 99 channels, computed with 104: then no pass has to pad them.

Tensor Cores take channels of half precision by eights, and cuDNN pads images of others in each pass of each
convolution. Here the zeros come with the image that the U-Net merges before these layers, and zero weights go with
them: the sums are the same. The image comes in half precision, as the next convolution takes it: autocast would have
all channels merged in float32.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from fastai.layers import ConvLayer, MergeLayer, ResBlock
from fastai.vision.models.unet import DynamicUnet
from torch import Tensor, nn

from channelslast.graphs.ground import HOOKS
from channelslast.swaps import PARTS, is_free

__all__ = ["forms_of_last_layers"]

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
        or not all(map(_can_be_padded, [*convs, last[0]]))
        or not all(map(is_free, swapped))
        or any(map(_has_hooks, [merge, block, last]))
    ):
        return []
    return [(merge, _merge), *((conv, _conv) for conv in convs), (last[0], _last_conv)]


def _can_be_padded(conv: nn.Module) -> bool:
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


def _last_layers(model: nn.Module, device: torch.device) -> Iterator[tuple[nn.Module, Callable]]:
    if device.type == "cuda":
        for module in model.modules():
            yield from forms_of_last_layers(module)


PARTS.append(_last_layers)
