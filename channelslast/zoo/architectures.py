"The architectures of fastai, torchvision and timm by their names, with fresh weights."

import difflib
import re
from importlib.util import find_spec
from typing import Any

import torchvision
from fastai.vision.learner import create_unet_model
from fastai.vision.models import xresnet
from torch import nn
from torchvision.models import get_model, get_model_builder, list_models

from channelslast.zoo.options import IllegalValue

DEFAULT_SIZE = 224  # pixels


def arch_names(
    kind: str | None = None,  # 'classification': these alone
) -> dict[str, list[str]]:
    "Return the architectures of each library, in the order in which a name is looked up."
    names = {
        "fastai": [name for name in xresnet.__all__ if re.match(r"x\w*res\w*\d", name)],
        "torchvision": list_models(module=torchvision.models if kind else None),
        "timm": [],
    }
    if kind is None:
        names["fastai"].append("DynamicUnet")
    if find_spec("timm"):
        import timm

        names["timm"] = timm.list_models()
    return names


def check_arch(
    arch: str,
    kind: str | None = None,  # 'classification': these alone
) -> dict[str, list[str]]:
    "Return `arch_names(kind)`; raises `IllegalValue`, with names that are close, if `arch` is none of them."
    names = arch_names(kind)
    every = sorted({name for group in names.values() for name in group})
    if arch not in every:
        close = similar_names(arch, every)
        hint = f"did you mean {', '.join(close)}?" if close else "try xresnet18, resnet50 or, with timm, convnext_tiny"
        what = f"{kind} model" if kind else "model"
        raise IllegalValue("arch", arch, f"no such {what} in fastai, torchvision or timm; {hint}")
    return names


def similar_names(
    name: str,
    names: list[str],
    n: int = 5,  # at most
) -> list[str]:
    "Return the two shortest of `names` that contain `name`, then those that are spelled like it, in any case."
    lower = {each.lower(): each for each in names}
    holding = sorted((each for each in lower if name and name.lower() in each), key=len)
    close = difflib.get_close_matches(name.lower(), lower, n=n)
    return [lower[each] for each in dict.fromkeys([*holding[:2], *close])][:n]


def new_model(
    arch: str,  # name of a fastai, torchvision or timm architecture
    n_out: int | None = None,  # classes, None: the architecture's own number
    size: int = DEFAULT_SIZE,  # of the images in pixels, which DynamicUnet is built for
    kind: str | None = None,  # 'classification': look for these alone
) -> nn.Module:
    """Return the architecture `arch` with fresh weights; raises `IllegalValue`, with names that are close, without it.

    'DynamicUnet' is fastai's on a resnet34, as `unet_learner` makes it.
    """
    names = check_arch(arch, kind)
    if arch == "DynamicUnet" and arch in names["fastai"]:
        return create_unet_model(torchvision.models.resnet34, n_out or 10, (size, size), pretrained=False)
    if arch in names["fastai"]:
        return getattr(xresnet, arch)(**_given(n_out=n_out))
    if arch in names["torchvision"]:
        options = _given(num_classes=n_out)
        if arch.removeprefix("quantized_") in ("googlenet", "inception_v3"):
            options |= {"aux_logits": False, "init_weights": True}
        if torchvision_kind(arch) in ("segmentation", "detection"):
            options["weights_backbone"] = None  # they would be downloaded
        return get_model(arch, weights=None, **options)
    import timm

    return timm.create_model(arch, **_given(num_classes=n_out))


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def torchvision_kind(
    arch: str,
) -> str:
    "Return 'models' (classification), 'segmentation', 'detection', 'video', 'optical_flow', 'quantization' or ''."
    if arch not in list_models():
        return ""
    return get_model_builder(arch).__module__.split(".")[-2]


def default_size(
    arch: str,
    model: nn.Module,
) -> int:
    "Return the pixels that timm says `model` was made for; 112 for video, 224 for every other."
    if torchvision_kind(arch) == "video":
        return 112
    return input_shape(model)[-1]


def input_shape(
    model: nn.Module,
) -> tuple[int, ...]:
    "Return channels and pixels of the images that `model` was made for, if it is timm's."
    config = getattr(model, "pretrained_cfg", None) or {}
    return config.get("input_size") or (3, DEFAULT_SIZE, DEFAULT_SIZE)
