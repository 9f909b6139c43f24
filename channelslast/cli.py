"The command `channelslast`, and the architectures and options that it shares with the training scripts."

import difflib
import gc
import json
import platform
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from importlib.util import find_spec
from itertools import product, starmap
from math import inf, isnan
from pathlib import Path
from typing import Any, NoReturn

import fastai
import torch
import torch.nn.functional as F
import torchvision
from fastai.callback import progress  # noqa: F401, the progress bar
from fastai.data.core import DataLoaders
from fastai.data.transforms import get_image_files
from fastai.learner import Learner
from fastai.optimizer import Adam, OptimWrapper
from fastai.torch_core import default_device
from fastai.vision.augment import Resize
from fastai.vision.core import imagenet_stats
from fastai.vision.data import ImageDataLoaders, Normalize
from fastai.vision.learner import create_unet_model
from fastai.vision.models import xresnet
from fastcore.script import anno_parser
from matplotlib import pyplot as plt
from matplotlib.backend_bases import FigureCanvasBase
from torch import Tensor, nn
from torchvision.models import get_model, get_model_builder, list_models

from channelslast.callback import COMPILE_MODES, TrainFormat
from channelslast.find import Candidate, device_name, find_format, new_candidates
from channelslast.memory_format import module_to_memory_format, supports_channels_last, to_memory_format
from channelslast.precision import accelerated_dtypes, amp_mode_of, autocast_dtype
from channelslast.restore import unchanged_modules
from channelslast.summary import FormatSummary, format_summary
from channelslast.timings import FormatTiming, FormatTimings, shorten
from channelslast.trace import tensors_in

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


def _in_one_line(error: Exception) -> str:
    return shorten(f"{type(error).__name__}: {error}", 300)


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
        return amp_mode_of(next(iter(accelerated_dtypes(device)), None))
    return None if amp_mode == "none" else amp_mode


def check_positive(
    **numbers: float | None,  # options by name; None: not given
) -> None:
    "End the program for an option that is no number above 0."
    for name, value in numbers.items():
        if value is not None and not 0 < value < inf:
            fail(f"--{name} {value}: pass a number above 0")


def check_folder(
    **files: str | None,  # options by name; None: not given
) -> None:
    "End the program for a file in a folder that does not exist."
    for name, file in files.items():
        if file is not None and not Path(file).expanduser().parent.is_dir():
            fail(f"--{name} {file}: there is no such folder")


def spell_options(
    arguments: list[str],  # of a command line
    function: Callable,  # that they are for
) -> list[str]:
    "Options in the spelling of the installed fastcore, `--amp-mode` or `--amp_mode`: both are understood."
    known = set(re.findall(r"--[\w-]+", anno_parser(function).format_help()))
    spelled = []
    for argument in arguments:
        option, *value = argument.split("=", 1)
        forms = [option, option[:2] + option[2:].replace("_", "-"), option[:2] + option[2:].replace("-", "_")]
        option = next((form for form in forms if option.startswith("--") and form in known), option)
        spelled.append("=".join([option, *value]))
    return spelled


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


def check_arch(
    arch: str,
    kind: str | None = None,  # 'classification': these alone
) -> dict[str, list[str]]:
    "The names of `model_names`; ends the program, with names that are close, if `arch` is none of them."
    names = model_names(kind)
    every = sorted({name for group in names.values() for name in group})
    if arch not in every:
        close = difflib.get_close_matches(arch, every, n=5)
        hint = f"did you mean {', '.join(close)}?" if close else "try xresnet18, resnet50 or, with timm, convnext_tiny"
        what = f"{kind} model" if kind else "model"
        fail(f"--arch {arch}: no such {what} in fastai, torchvision or timm; {hint}")
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
    names = check_arch(arch, kind)
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
    import timm

    return timm.create_model(arch, **_given(num_classes=n_out))


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


# Images


def image_folder(
    path: str,  # with a folder for each class, or `train` and `valid` with these
) -> Path:
    "The folder `path`; ends the program if there are no images in it."
    folder = Path(path).expanduser()
    if not folder.is_dir():
        fail(f"--path {path}: there is no such folder")
    if not get_image_files(folder):
        fail(f"--path {path}: there are no images in it or below")
    return folder


def new_dls(
    folder: Path,
    size: int,  # pixels square, to which the images are resized
    bs: int,  # images in a batch
    device: torch.device,
) -> ImageDataLoaders:
    "One class for each folder of images; a fifth to validate on where there is no folder `valid`."
    split = {} if (folder / "train").is_dir() and (folder / "valid").is_dir() else {"valid_pct": 0.2, "seed": 42}
    dls = ImageDataLoaders.from_folder(
        folder,
        item_tfms=Resize(size),
        batch_tfms=Normalize.from_stats(*imagenet_stats),
        bs=bs,
        device=device,
        **split,
    )
    if dls.c < 2:
        fail(f"--path {folder}: all images are of one class; put each class into a folder of its own")
    if not len(dls.train):
        fail(f"--bs {bs}: there are {len(dls.train_ds)} images to train on; pass a number up to that")
    return dls


class Batches(list):
    "Batches that are on the device already, as a DataLoader."

    def to(self, device):
        self.device = device


def synthetic_dls(
    arch: str,
    model: nn.Module,  # of that architecture, on `device`
    bs: int,  # images in a batch
    size: int,  # pixels square
    device: torch.device,
    n: int = 4,  # batches
) -> DataLoaders:
    "Random images as the architecture takes them, with targets as its loss takes them: see `synthetic_loss`."
    batches = Batches()
    for _ in range(n):
        inputs = synthetic_inputs(arch, model, bs, size, device)
        if not batches:
            with torch.no_grad(), unchanged_modules(model):
                output = model(*synthetic_inputs(arch, model, 2, size, device))
        target = torch.zeros(bs, device=device)
        if isinstance(output, Tensor):  # a class for each image, or for each pixel
            target = torch.randint(0, output.shape[1], (bs, *output.shape[2:]), device=device)
        batches.append((*inputs, target))
    return DataLoaders(batches, Batches(batches[:1]), device=device)


def synthetic_loss(
    output: Any,  # of the model
    target: Tensor,
) -> Tensor:
    "Cross-entropy where the model returns one tensor; else, for it has no task here, the mean of all that it returns."
    if isinstance(output, Tensor):
        return F.cross_entropy(output, target)
    return sum(tensor.float().mean() for tensor in tensors_in(output))


def new_learner(
    arch: str,  # name of a fastai, torchvision or timm architecture
    bs: int,  # images in a batch
    size: int | None,  # pixels square; None: `default_size`
    device: torch.device,
    opt_func: Callable,
    path: str | None = None,  # folder of images; None: random ones
) -> Learner:
    "A Learner of `arch` with fresh weights, in contiguous float32."
    if path is not None:
        dls = new_dls(image_folder(path), size or DEFAULT_SIZE, bs, device)
        return Learner(dls, new_model(arch, dls.c, kind="classification"), opt_func=opt_func)
    model = new_model(arch, size=size or DEFAULT_SIZE).to(device)
    dls = synthetic_dls(arch, model, bs, size or default_size(arch, model), device)
    return Learner(dls, model, synthetic_loss, opt_func=opt_func)


def fused_adamw(params, **kwargs):
    "PyTorch's AdamW in one kernel."
    return OptimWrapper(params, partial(torch.optim.AdamW, fused=True), **kwargs)


OPTIMIZERS = {"adam": Adam, "fused": fused_adamw}


# The commands


def summary(
    arch: str = None,  # name of a fastai, torchvision or timm model, as resnet50
    bs: int = 8,  # images in a batch
    size: int = None,  # pixels square; default: what timm says, 112 for video, else 224
    device: str = None,  # cpu, cuda, cuda:1, ...; default: fastai's choice
    amp_mode: str = "auto",  # auto, fp16, bf16 or none; auto: what the device is fastest at
    json: str = None,  # also write the result to this file
    verbose: bool = False,  # print the whole traceback of a model's error
):
    "Show where a model loses channels last in a training step on random images, and what it costs."
    if arch is None:
        fail("--arch: pass the name of a fastai, torchvision or timm model, as --arch resnet50")
    check_positive(bs=bs, size=size)
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
    check_folder(json=json)
    model = new_model(arch, size=size or DEFAULT_SIZE)
    size = size or default_size(arch, model)
    model = module_to_memory_format(model.to(torch_device).train())
    inputs = to_memory_format(synthetic_inputs(arch, model, bs, size, torch_device))
    with torch.autocast(torch_device.type, dtype=dtype, enabled=dtype is not None):
        try:
            result = format_summary(model, *inputs)
        except Exception as error:
            if verbose:
                traceback.print_exc()
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


def made_with(
    command: str,
    device: torch.device,
) -> dict[str, Any]:
    "What a record of a measurement begins with: command, date, device and versions."
    return {
        "command": command,
        "date": str(date.today()),
        "device": device_name(device),
        "versions": {"torch": torch.__version__, "fastai": fastai.__version__, "python": platform.python_version()},
    }


def write_json(
    file: str,
    result: dict[str, Any],
    device: torch.device,
) -> None:
    "Write `result` with what it was made with."
    record = {**made_with(f"channelslast {shlex.join(sys.argv[1:])}", device), **result}
    try:
        Path(file).expanduser().write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        fail(f"--json {file}: {error.strerror}")


def find(
    arch: str = None,  # one or several names of fastai, torchvision or timm models, as resnet50 convnext_tiny
    bs: int = 16,  # images in a batch
    size: int = None,  # pixels square; default: what timm says, 112 for video, else 224
    path: str = None,  # folder of images, one subfolder a class; default: random images
    device: str = None,  # cpu, cuda, cuda:1, ...; default: fastai's choice
    formats: str = None,  # as "contiguous fp16, channels last bf16 compiled"; default: all that are accelerated
    compile: bool = False,  # also try each compiled by PyTorch, which takes minutes
    opt: str = "adam",  # adam (fastai's) or fused (PyTorch's AdamW)
    budget: float = None,  # seconds a model, compilation not counted; default: 27, more if steps are slow
    built_in: bool = False,  # also time fastai's own `to_channelslast()`, to compare
    verify: bool = False,  # afterwards measure those again that are close to the best
    plot: str = None,  # also draw the bars, to this file
    json: str = None,  # also write the results to this file
    verbose: bool = False,  # print the whole traceback of a model's error
):
    "Time a training step in each format, contiguous and channels last, and tell which to train in."
    if arch is None:
        fail("--arch: pass names of fastai, torchvision or timm models, as --arch resnet50 convnext_tiny")
    check_positive(bs=bs, size=size, budget=budget)
    if opt not in OPTIMIZERS:
        fail(f"--opt {opt}: pass one of {', '.join(OPTIMIZERS)}")
    check_folder(json=json, plot=plot)
    for name, file in dict(json=json, plot=plot).items():
        if file is not None and Path(file).expanduser().is_dir():
            fail(f"--{name} {file}: that is a folder, name a file in it")
    kinds = FigureCanvasBase.get_supported_filetypes()
    if plot is not None and Path(plot).suffix[1:] not in kinds:
        fail(f"--plot {plot}: no kind of picture; let it end in one of .{', .'.join(kinds)}")
    torch_device, chosen = to_device(device), to_formats(formats)
    archs = [name for name in re.split(r"[\s,]+", arch) if name]
    if not archs:
        fail(f"--arch {arch!r}: pass names of fastai, torchvision or timm models, as --arch resnet50 convnext_tiny")
    for name in archs:
        check_arch(name, kind="classification" if path else None)
    results, found = [], {}
    for name in archs:
        if len(archs) > 1:
            print(f"{name}:")
        try:
            learn = new_learner(name, bs, size, torch_device, OPTIMIZERS[opt], path)
            found[name], result = _find_one(learn, chosen, compile, budget, built_in, verify)
            results.append({"arch": name, "bs": bs, "opt": opt, **result})
        except Exception as error:
            if verbose:
                traceback.print_exc()
            print(f"{Path(sys.argv[0]).name}: error: {name}: {_in_one_line(error)}", file=sys.stderr)
            results.append({"arch": name, "error": _in_one_line(error)})
        learn = None
        _give_back_memory()  # before the next is built
        if json is not None:  # after each, for what an interrupt would lose
            write_json(json, {"results": results}, torch_device)
    if plot is not None and found:
        _plot_all(found, plot)
    if len(found) < len(archs):
        raise SystemExit(1)


def _find_one(
    learn: Learner,
    formats: list[TrainFormat] | None,
    compile: bool,
    budget: float | None,
    built_in: bool,
    verify: bool,
) -> tuple[FormatTimings, dict[str, Any]]:
    "The timings of one architecture, which it prints, and their record."
    candidates = new_candidates(learn, formats, compile)
    fastai_own = Candidate(TrainFormat(True, "fp16"), lambda learn: learn._orig_to_channelslast(), is_choice=False)
    started = time.perf_counter()
    timings = find_format(learn, [*candidates, *([fastai_own] if built_in else [])], budget)
    seconds = round(time.perf_counter() - started, 1)
    print(timings)
    result = {"seconds": seconds, **_timings_record(timings)}
    if built_in:
        result["built_in"] = _row_record(fastai_own.row)
        ms = fastai_own.row.error or f"{fastai_own.row.ms:.2f} ms (IQR {fastai_own.row.iqr:.2f})"
        print(f"fastai's own to_channelslast(): {ms}")
    if verify:
        result["verified"] = _verify(learn, timings, budget)
    return timings, result


def _give_back_memory() -> None:
    "Free what nothing refers to, Learners and their callbacks that refer to each other included."
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def to_formats(
    names: str | None,  # as a TrainFormat prints, with commas in between
) -> list[TrainFormat] | None:
    "The formats of these names; ends the program if there is none of a name."
    if names is None:
        return None
    every = starmap(TrainFormat, product((False, True), (None, "fp16", "bf16"), (None, *COMPILE_MODES)))
    legal = {str(fmt): fmt for fmt in every}
    wanted = [" ".join(name.split()) for name in names.split(",")]
    for name in wanted:
        if name not in legal:
            close = difflib.get_close_matches(name, legal, n=3) or list(legal)[:3]
            fail(f"--formats {name!r}: no such format; did you mean {', '.join(map(repr, close))}?")
    return [legal[name] for name in wanted]


def _verify(learn: Learner, timings: FormatTimings, budget: float | None) -> dict[str, Any]:
    "Measure what is close to the best again, and contiguous in its precision."
    best = timings.best
    near = [row.format for row in timings if row.ms < 1.25 * timings.row(best).ms]
    contiguous = timings.row(replace(best, channels_last=False))
    if contiguous is not None and not contiguous.error:
        near.append(contiguous.format)
    again = find_format(learn, [Candidate(fmt) for fmt in dict.fromkeys(near)], budget, start=best)
    fastest = min((row for row in again if not row.error), key=lambda row: row.ms)
    best_ms = again.row(best).ms
    print(f"Again: {best} {best_ms:.2f} ms; the fastest, {fastest.format}, {fastest.ms:.2f} ms")
    return {
        "best_vs_fastest": round(best_ms / fastest.ms, 4),
        "best_vs_contiguous": round(best_ms / again.row(contiguous.format).ms, 4) if contiguous else None,
        "rounds": max(len(row.samples) for row in again),
        "steps_a_round": again.n_steps,
        "rows": [_row_record(row) for row in again],
    }


def _timings_record(timings: FormatTimings) -> dict[str, Any]:
    return {
        "model": timings.model,
        "shapes": timings.shapes,
        "start": str(timings.start),
        "best": str(timings.best),
        "verdict": timings.verdict,
        "limit": timings.limit,
        "gpu_busy": timings.busy,
        "format_gain": timings.format_gain,
        "data_items_per_s": timings.data_items_per_s,
        "rounds": max(len(row.samples) for row in timings),
        "steps_a_round": timings.n_steps,
        "rows": [_row_record(row) for row in timings],
    }


def _row_record(row: FormatTiming) -> dict[str, Any]:
    numbers = {name: getattr(row, name) for name in ("ms", "iqr", "items_per_s", "speedup", "warmup_s", "peak_bytes")}
    numbers = {name: None if value is None or isnan(value) else round(value, 4) for name, value in numbers.items()}
    return {"format": str(row.format), **numbers, "samples": [round(ms, 3) for ms in row.samples], "error": row.error}


def _plot_all(found: dict[str, FormatTimings], file: str) -> None:
    heights = [1.2 + 0.35 * len(timings) for timings in found.values()]
    figure, axes = plt.subplots(
        len(found), figsize=(9, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for (arch, timings), ax in zip(found.items(), axes[:, 0], strict=True):
        timings.plot(ax).set_title(f"{arch} on {timings.device}", loc="left")
    try:
        figure.savefig(Path(file).expanduser())
    except OSError as error:
        fail(f"--plot {file}: {error.strerror}")


def join_values(
    arguments: list[str],  # of a command line
    option: str,
) -> list[str]:
    "All values of `option`, one after the other or each with the option, as its one value."
    values, others, is_value = [], [], False
    for argument in arguments:
        if re.match(r"--?[a-zA-Z]", argument):
            is_value = argument.split("=")[0] == option
            if is_value:
                values += argument.split("=")[1:]
                continue
        (values if is_value else others).append(argument)
    return [*others, option, ",".join(values)] if values else arguments


COMMANDS = {"summary": summary, "find": find}


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
    if function is find:
        arguments = join_values(arguments, "--arch")
    parser = anno_parser(function, prog=f"channelslast {name}")
    options = vars(parser.parse_args(spell_options(arguments, function)))
    function(**{option: value for option, value in options.items() if option in function.__annotations__})
