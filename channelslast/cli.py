"The command `channelslast`, and the architectures and options that it shares with the training scripts."

import difflib
import json
import platform
import re
import shlex
import sys
from collections.abc import Callable
from datetime import date
from importlib.util import find_spec
from math import isnan
from pathlib import Path
from typing import Any, NoReturn

import fastai
import torch
import torchvision
from fastai.torch_core import default_device
from fastai.vision.learner import create_unet_model
from fastai.vision.models import xresnet
from fastcore.script import anno_parser
from torch import nn
from torchvision.models import get_model, get_model_builder, list_models

from channelslast.memory_format import module_to_memory_format, supports_channels_last, to_memory_format
from channelslast.precision import accelerated_dtypes, autocast_dtype
from channelslast.summary import FormatSummary, format_summary

__all__ = ["main", "new_model", "summary", "to_amp_mode", "to_device"]

AMP_MODES = ("auto", "fp16", "bf16", "none")
DEFAULT_SIZE = 224
N_FRAMES = 16  # of a clip for a video model


def fail(message: str) -> NoReturn:
    "End the program as argparse does for a wrong option."
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


# Options


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def to_device(
    device: str | None,  # cpu, cuda, cuda:1, mps, ...; None: fastai's choice
) -> torch.device:
    "The device by its name; ends the program where there is none."
    try:
        device = torch.device(device) if device else default_device()
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {device}: {_first_line(error)}")
    return device


def to_amp_mode(
    amp_mode: str,  # auto, fp16, bf16 or none
    device: torch.device,
) -> str | None:
    "The precision in TrainFormat's words; 'auto' is what the device is fastest at. Ends the program if it is none."
    if amp_mode not in AMP_MODES:
        fail(f"--amp_mode {amp_mode}: pass one of {', '.join(AMP_MODES)}")
    if amp_mode == "auto":
        names = {torch.float16: "fp16", torch.bfloat16: "bf16"}
        return next((names[dtype] for dtype in accelerated_dtypes(device)), None)
    return None if amp_mode == "none" else amp_mode


def spell_options(
    arguments: list[str],  # of a command line
    function: Callable,  # that they are for
) -> list[str]:
    "Options in the spelling of the installed fastcore, `--amp-mode` or `--amp_mode`: both are understood."
    old, new = ("_", "-") if "--amp-mode" in anno_parser(function).format_help() else ("-", "_")
    options = [re.fullmatch(r"--([\w-]+)(=.*)?", argument) for argument in arguments]
    return [
        f"--{option[1].replace(old, new)}{option[2] or ''}" if option else argument
        for option, argument in zip(options, arguments, strict=True)
    ]


# Architectures


def model_names(
    kind: str | None = None,  # 'classification': these alone
) -> dict[str, list[str]]:
    "The architectures of each library, in the order in which a name is looked up."
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


def new_model(
    arch: str,  # name of a fastai, torchvision or timm architecture
    n_out: int | None = None,  # classes, None: the architecture's own number
    size: int = DEFAULT_SIZE,  # of the images in pixels, which DynamicUnet is built for
    kind: str | None = None,  # 'classification': look for these alone
) -> nn.Module:
    """The architecture `arch` with fresh weights; ends the program, with names that are close, if there is none.

    'DynamicUnet' is fastai's on a resnet34, as `unet_learner` makes it.
    """
    names = model_names(kind)
    if arch == "DynamicUnet" and arch in names["fastai"]:
        return create_unet_model(torchvision.models.resnet34, n_out or 10, (size, size), pretrained=False)
    if arch in names["fastai"]:
        return getattr(xresnet, arch)(**_given(n_out=n_out))
    if arch in names["torchvision"]:
        options = _given(num_classes=n_out)
        if arch in ("googlenet", "inception_v3"):
            options |= {"aux_logits": False, "init_weights": True}
        if _torchvision_kind(arch) in ("segmentation", "detection"):
            options["weights_backbone"] = None  # they would be downloaded
        return get_model(arch, weights=None, **options)
    if arch in names["timm"]:
        import timm

        return timm.create_model(arch, **_given(num_classes=n_out))
    close = difflib.get_close_matches(arch, sorted({name for group in names.values() for name in group}), n=5)
    hint = f"did you mean {', '.join(close)}?" if close else "try xresnet18, resnet50 or, with timm, convnext_tiny"
    what = f"{kind} model" if kind else "model"
    fail(f"--arch {arch}: no such {what} in fastai, torchvision or timm; {hint}")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _torchvision_kind(arch: str) -> str:
    "'models' (classification), 'segmentation', 'detection', 'video', 'optical_flow', 'quantization' or ''."
    if arch not in list_models():
        return ""
    return get_model_builder(arch).__module__.split(".")[-2]


def default_size(
    arch: str,
    model: nn.Module,
) -> int:
    "The pixels that timm says `model` was made for; 112 for video, 224 for every other."
    if _torchvision_kind(arch) == "video":
        return 112
    return _timm_input(model)[-1]


def _timm_input(model: nn.Module) -> tuple[int, ...]:
    "Channels and pixels of the images that `model` was made for, if it is timm's."
    config = getattr(model, "pretrained_cfg", None) or {}
    return config.get("input_size") or (3, DEFAULT_SIZE, DEFAULT_SIZE)


def synthetic_inputs(
    arch: str,
    model: nn.Module,  # of that architecture
    bs: int,  # images in the batch
    size: int,  # pixels square
    device: torch.device,
) -> tuple:
    "Random images as the architecture takes them: a batch, a clip of 16 frames, two batches, or images and targets."
    kind = _torchvision_kind(arch)
    if kind == "video":
        return (torch.randn(bs, 3, N_FRAMES, size, size, device=device),)
    if kind == "optical_flow":
        return tuple(torch.randn(2, bs, 3, size, size, device=device))
    if kind == "detection":
        target = {
            "boxes": torch.tensor([[0.1, 0.1, 0.6, 0.7]], device=device) * size,
            "labels": torch.ones(1, dtype=torch.long, device=device),
            "masks": torch.ones(1, size, size, dtype=torch.uint8, device=device),
            "keypoints": torch.ones(1, 17, 3, device=device) * 0.3 * size,
        }
        return list(torch.rand(bs, 3, size, size, device=device)), [target] * bs
    return (torch.randn(bs, _timm_input(model)[0], size, size, device=device),)


# The commands


def summary(
    arch: str | None = None,  # name of a fastai, torchvision or timm model, as resnet50
    bs: int = 8,  # images in a batch
    size: int | None = None,  # pixels square; default: what timm says, 112 for video, else 224
    device: str | None = None,  # cpu, cuda, cuda:1, ...; default: fastai's choice
    amp_mode: str = "auto",  # auto, fp16, bf16 or none; auto: what the device is fastest at
    json: str | None = None,  # also write the result to this file
):
    "Show where a model loses channels last in a training step on random images, and what it costs."
    if arch is None:
        fail("--arch: pass the name of a fastai, torchvision or timm model, as --arch resnet50")
    for name, value in dict(bs=bs, size=size).items():
        if value is not None and not value > 0:
            fail(f"--{name} {value}: pass a number above 0")
    torch_device = to_device(device)
    mode = to_amp_mode(amp_mode, torch_device)
    if not supports_channels_last(torch_device):
        fail(f"--device {torch_device}: channels last is not reliable there, and is not used")
    try:
        dtype, why = autocast_dtype(mode, torch_device) if mode else (None, "")
    except ValueError as error:
        fail(str(error))
    if why:
        print(f"{Path(sys.argv[0]).name}: {why}", file=sys.stderr)
    if json is not None and not Path(json).expanduser().parent.is_dir():
        fail(f"--json {json}: there is no such folder")
    model = new_model(arch, size=size or DEFAULT_SIZE)
    size = size or default_size(arch, model)
    model = module_to_memory_format(model.to(torch_device).train())
    inputs = to_memory_format(synthetic_inputs(arch, model, bs, size, torch_device))
    with torch.autocast(torch_device.type, dtype=dtype, enabled=dtype is not None):
        try:
            result = format_summary(model, *inputs)
        except Exception as error:
            fail(f"{arch} rejects {bs} images of {size} px: {_first_line(error)}")
    print(result)
    if json is not None:
        write_json(json, {"arch": arch, "bs": bs, "size": size, **_as_record(result)}, torch_device)


def _as_record(result: FormatSummary) -> dict[str, Any]:
    return {
        "dtype": result.dtype,
        "channels_last_share": None if isnan(result.channels_last_share) else result.channels_last_share,
        "verdict": result.verdict,
        "error": result.error,
        "hints": result.hints,
        "padded_convs": result.padded_convs,
        "dense_gradients": result.dense_gradients,
        "gpu": result.gpu and vars(result.gpu),
        "n_layers": len(result.layers),
        "losers": {layer.module: layer.loses_in for layer in result.losers},
        "events": [{**vars(event), "dtype": str(event.dtype).removeprefix("torch.")} for event in result.events],
    }


def write_json(
    file: str,
    result: dict[str, Any],
    device: torch.device,
) -> None:
    "Write `result` with the command, the date, the device and the versions that it was made with."
    record = {
        "command": f"channelslast {shlex.join(sys.argv[1:])}",
        "date": str(date.today()),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads",
        "versions": {
            "torch": torch.__version__,
            "fastai": fastai.__version__,
            "python": platform.python_version(),
        },
        **result,
    }
    try:
        Path(file).expanduser().write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        fail(f"--json {file}: {error.strerror}")


COMMANDS = {"summary": summary}


def main() -> None:
    "The command `channelslast`: the first argument names what to do."
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: channelslast COMMAND [options]\n")
        for command, function in COMMANDS.items():
            print(f"  {command:<10} {function.__doc__}")
        print("\n`channelslast COMMAND --help` tells the options.")
        return
    if name not in COMMANDS:
        fail(f"{name}: no such command; pass one of {', '.join(COMMANDS)}")
    function = COMMANDS[name]
    parser = anno_parser(function, prog=f"channelslast {name}")
    options = vars(parser.parse_args(spell_options(arguments, function)))
    function(**{option: value for option, value in options.items() if option in function.__annotations__})
