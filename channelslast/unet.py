"""fastai's U-Net, whose last layers have 99 channels, computed with 104: then no pass has to pad them.

Tensor Cores take channels of half precision by eights. cuDNN pads images of others in each pass of each convolution,
which takes 17% of a U-Net's GPU time (H200, PyTorch 2.11, 32 images at 224 px). Here the zeros come with the image that
the U-Net merges before these layers, and zero weights go with them: the sums are the same.
"""

import torch
import torch.nn.functional as F
from fastai.layers import ConvLayer, MergeLayer, ResBlock
from fastai.vision.models.unet import DynamicUnet
from torch import Tensor, nn
from torch.func import functional_call

from channelslast.graphs.ground import HOOKS
from channelslast.swaps import MODEL_SWAPS, Swap

__all__: list[str] = []

_EIGHT = 8  # channels of half precision that a Tensor Core takes at once
_CHANNELWISE = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Mish, nn.Hardswish, nn.Identity, nn.AvgPool2d)
_CONTAINERS = (nn.Sequential, ConvLayer, ResBlock)


class _UnetSwap(Swap):
    def is_due(self, module: DynamicUnet, device: torch.device) -> bool:
        return device.type == "cuda" and _can_be_padded(module)


def _tail_of(unet: DynamicUnet) -> list[nn.Module]:
    "The layer that merges a U-Net's input, the block after it, and the convolution that makes the output."
    kinds = [type(layer) for layer in unet.layers]
    at = kinds.index(MergeLayer) if MergeLayer in kinds else len(kinds)
    return list(unet.layers[at : at + 3])


def _can_be_padded(unet: DynamicUnet) -> bool:
    "Whether the last layers are such that more channels of zeros change nothing."
    tail = _tail_of(unet)
    if [type(layer) for layer in tail] != [MergeLayer, ResBlock, ConvLayer] or not tail[0].dense:
        return False
    _, block, last = tail
    convs = [module for module in block.modules() if type(module) is nn.Conv2d] + [last[0]]
    others = {type(module) for module in block.modules()} - {nn.Conv2d}
    return (
        type(last[0]) is nn.Conv2d
        and all(conv.groups == 1 and {*dict(conv.named_parameters())} <= {"weight", "bias"} for conv in convs)
        and others <= {*_CHANNELWISE, *_CONTAINERS}
        and any(_missing(conv.in_channels) for conv in convs)
    )


def _missing(channels: int) -> int:
    return -channels % _EIGHT


def _form(unet: DynamicUnet, image: Tensor) -> Tensor | None:
    "What `DynamicUnet.forward` returns, computed with more channels in the last layers. None: as ever."
    tail = _tail_of(unet)
    if not _is_half(unet, image.device) or any(map(_has_hooks_of_others, tail)):
        return None
    merge, block, last = tail
    wide = F.pad(image, (0, 0, 0, 0, 0, _missing(block.convpath[0][0].in_channels)))
    result = image
    for layer in unet.layers:
        result.orig = wide if layer is merge else image
        if layer is block or layer is last:
            after = functional_call(layer, _padded_parameters(layer, layer is last), (result,))
        else:
            after = layer(result)
        result.orig = after.orig = None  # as fastai does: else each would hold the one before
        result = after
    return result


def _is_half(unet: DynamicUnet, device: torch.device) -> bool:
    is_autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if is_autocast else next(unet.parameters()).dtype
    return dtype in (torch.float16, torch.bfloat16)


def _has_hooks_of_others(layer: nn.Module) -> bool:
    "Hooks on the last layers, which would see the added channels, but for those of `format_summary`."
    hooks = [hook for part in layer.modules() for kind in HOOKS for hook in vars(part).get(kind, {}).values()]
    return any(not getattr(hook, "__module__", "").startswith("channelslast.") for hook in hooks)


def _padded_parameters(
    layer: nn.Module,
    is_last: bool,  # whose output keeps its channels
) -> dict[str, Tensor]:
    "The parameters of convolutions by name, with zeros for the channels that are added."
    padded = {}
    for name, param in layer.named_parameters():
        n_out = 0 if is_last else _missing(param.shape[0])
        n_in = (0, 0, 0, 0, 0, _missing(param.shape[1])) if param.ndim == 4 else ()
        padded[name] = F.pad(param, (*n_in, 0, n_out))
    return padded


MODEL_SWAPS.append(_UnetSwap(DynamicUnet, _form, (), lambda unet: None))
