"""Measure the forms of operators that keep channels last, and what they do to whole models.

    python nbs/benchmarks/swaps.py operators --out swaps_operators.json
    python nbs/benchmarks/swaps.py unet --out swaps_unet.json
    python nbs/benchmarks/swaps.py archs --out swaps_archs.json

Each section prints a line for each result, and writes the record after it. With `--seconds` it ends in time, and begins
where it ended when it is called again with the same file. `--device cpu --size 64` runs on a CPU, small.

`operators`: whether a form is equal to the bit, and what it costs, forward and backward, next to PyTorch's own, for an
image and an incoming gradient that are channels last. `alone` is the operator's time; `in a model` has the conversions
of what is not channels last, which the layers around it need. `gpu` is the kernels' time, replayed as a CUDA graph;
`eager` is what passes when Python launches them.

`unet`: a training step of fastai's U-Net on a resnet34, as fastai's own `to_channelslast()` and this package train it,
with swaps and without. Each contender keeps its Learner; a round is one fit of each in turn.

`archs`: a training step of many architectures with swaps and without, in turn, on one Learner, replayed as a CUDA graph
where that can be (else the time of Python hides that of the operators); and what `format_summary` says of them then.
Nothing is timed where nothing is swapped. cuDNN chooses by its heuristics.
"""

import argparse
import gc
import json
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torchvision
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.optimizer import Adam
from fastai.vision.learner import create_unet_model
from fastai.vision.models import xresnet
from torch import Tensor, nn
from typical_use import Steps

from channelslast import ChannelsLast, TrainFormat, forms, keep_channels_last
from channelslast.cli.record import made_with
from channelslast.memory_format import CHANNELS_LAST
from channelslast.swaps import swapped_classes
from channelslast.tensors import format_of
from channelslast.zoo import (
    arch_names,
    fused_adamw,
    new_learner,
    synthetic_dls,
    synthetic_loss,
    to_fastai_channelslast,
)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Record:
    "The results so far, in a file, by name; and the time that is left."

    def __init__(self, out: Path | None, seconds: float, device: torch.device):
        self.out, self.end = out, time.monotonic() + seconds
        self.results: dict[str, Any] = {}
        if out and out.exists():
            self.results = json.loads(out.read_text())["results"]
        command = shlex.join(["python", "nbs/benchmarks/swaps.py", *sys.argv[1:]])
        self.facts = made_with(command, device)

    def is_due(self, name: str) -> bool:
        return name not in self.results and time.monotonic() < self.end

    def add(self, name: str, result: dict) -> None:
        made = {key: self.facts[key] for key in ("command", "date", "cpu")}
        self.results[name] = {**result, "made_with": made}  # a file may hold results of several runs
        print(f"{name:44}", *(f"{key} {value}" for key, value in result.items()), flush=True)
        self.write({})

    def write(self, unfinished: dict[str, dict]) -> None:
        "With what will be measured again where this is cut off."
        if self.out:
            record = {**self.facts, "results": self.results, "unfinished": unfinished}
            self.out.write_text(json.dumps(record, indent=1) + "\n")


# Operators


def frozen(channels: int, weights: bool, ndim: int = 4) -> nn.Module:
    norm = (nn.BatchNorm2d if ndim == 4 else nn.BatchNorm3d)(channels).eval()
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.normal_(norm.running_mean)
    return norm.requires_grad_(weights)


# Of what was tried and left out: not equal to the bit, or no faster


def batch_norm_of_rows(norm: nn.Module, image: Tensor) -> Tensor:
    pixels = image.movedim(1, -1)
    rows = pixels.reshape(-1, pixels.shape[-1])
    rows = F.batch_norm(rows, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    return rows.reshape(pixels.shape).movedim(-1, 1)


def softmax(image: Tensor) -> Tensor:
    return F.softmax(image.movedim(1, -1), -1).movedim(-1, 1)


def log_softmax(image: Tensor) -> Tensor:
    return F.log_softmax(image.movedim(1, -1), -1).movedim(-1, 1)


def pad_3d(image: Tensor, mode: str) -> Tensor:
    "By one on all sides: the two outer dimensions, then the innermost."
    b, c, d, h, w = image.shape
    pixels = image.permute(0, 2, 3, 4, 1).reshape(b, 1, d, h, w * c)
    pixels = F.pad(pixels, (0, 0, 1, 1, 1, 1), mode)
    pixels = F.pad(pixels.reshape(b * (d + 2) * (h + 2), 1, w, c), (0, 0, 1, 1), mode)
    return pixels.reshape(b, d + 2, h + 2, w + 2, c).permute(0, 4, 1, 2, 3)


def average_by_pool(image: Tensor) -> Tensor:
    return (F.avg_pool2d if image.ndim == 4 else F.avg_pool3d)(image, image.shape[2:])


def of(form: Callable, *args: Any) -> Callable:
    return lambda module, image: form(image, *args)


def own(module: nn.Module, image: Tensor) -> Tensor:
    return module(image)


def operators(size: int, bs: int) -> Iterator[tuple[str, nn.Module, Callable, tuple[int, ...]]]:
    "Name, PyTorch's module, the form, and the shape of an image, as in usual models at `size` pixels."
    s, b = size, bs
    yield "pixel_shuffle 2", nn.PixelShuffle(2), of(forms.pixel_shuffle, 2), (b, 384, s // 4, s // 4)
    yield "pixel_shuffle 2 small", nn.PixelShuffle(2), of(forms.pixel_shuffle, 2), (b, 1024, s // 32, s // 32)
    yield "pixel_shuffle 4", nn.PixelShuffle(4), of(forms.pixel_shuffle, 4), (b, 48, s // 4, s // 4)
    yield "pixel_unshuffle 2", nn.PixelUnshuffle(2), of(forms.pixel_unshuffle, 2), (b, 64, s // 2, s // 2)
    yield "pixel_unshuffle 4 of rgb", nn.PixelUnshuffle(4), of(forms.pixel_unshuffle, 4), (b, 3, s, s)
    yield "channel_shuffle", nn.ChannelShuffle(2), of(forms.channel_shuffle, 2), (b, 116, s // 8, s // 8)
    yield "channel_shuffle 3d", nn.ChannelShuffle(4), of(forms.channel_shuffle, 4), (b // 4, 64, 8, s // 8, s // 8)
    for mode, cls in (
        ("reflect", nn.ReflectionPad2d),
        ("replicate", nn.ReplicationPad2d),
        ("circular", nn.CircularPad2d),
    ):
        for p, shape in ((1, (b, 64, s // 2, s // 2)), (3, (b // 4, 3, s, s)), ((1, 0, 1, 0), (b, 96, s // 2, s // 2))):
            padding = (p,) * 4 if isinstance(p, int) else p
            yield f"{mode} {p} {shape[1]}", cls(p), of(forms.pad, padding, mode), shape
    pads = (("reflect", nn.ReflectionPad3d), ("replicate", nn.ReplicationPad3d), ("circular", nn.CircularPad3d))
    for mode, cls in pads:
        yield f"{mode} 3d", cls(1), of(pad_3d, mode), (b // 8, 32, 16, s // 4, s // 4)
    for channels in (21, 256):
        shape = (b, channels, s // 4, s // 4)
        yield f"softmax {channels}", nn.Softmax(1), of(softmax), shape
        yield f"log_softmax {channels}", nn.LogSoftmax(1), of(log_softmax), shape
    yield "softmax 3d", nn.Softmax(1), of(softmax), (b // 8, 8, 16, s // 4, s // 4)
    yield "glu", nn.GLU(1), of(forms.glu), (b, 256, s // 8, s // 8)
    for channels, side in ((512, 7), (2048, 7), (1280, 7), (256, 56)):
        side = max(2, side * s // 224)
        shape = (b, channels, side, side)
        yield f"average {channels} {side}", nn.AdaptiveAvgPool2d(1), of(forms.global_average), shape
        yield f"average {channels} {side} by avg_pool", nn.AdaptiveAvgPool2d(1), of(average_by_pool), shape
    shape = (b // 4 or 1, 512, 2, max(2, s // 32), max(2, s // 32))
    yield "average 3d", nn.AdaptiveAvgPool3d(1), of(forms.global_average), shape
    for weights in (True, False):
        for channels, side in ((64, s // 4), (1024, s // 16)):
            name = f"frozen batch_norm {channels} {'with' if weights else 'without'} gradients of weights"
            yield name, frozen(channels, weights), batch_norm_of_rows, (b, channels, side, side)
    yield "frozen batch_norm 3d", frozen(64, True, 5), batch_norm_of_rows, (b // 4, 64, 8, s // 4, s // 4)
    # no form, but a hint: GroupNorm in place of InstanceNorm
    for channels, side in ((64, s // 4), (256, s // 16)):
        shape = (b, channels, side, side)
        yield f"InstanceNorm, GroupNorm {channels}", nn.InstanceNorm2d(channels), of(F.group_norm, channels), shape
    plain = nn.InstanceNorm3d(32)
    yield "InstanceNorm, GroupNorm 3d", plain, of(F.group_norm, 32), (b // 8, 32, 16, s // 4, s // 4)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=CHANNELS_LAST.get(tensor.ndim, torch.contiguous_format))


def difference(first: Tensor, second: Tensor) -> str:
    "'equal', or the share of unequal numbers and the largest difference, in units in the last place of the largest."
    if torch.equal(first, second):
        return "equal"
    a, b = first.double(), second.double()
    unit = torch.finfo(first.dtype).eps * 2 ** torch.floor(torch.log2(a.abs().max()))
    return f"{float((a != b).double().mean()):.1%} by {float((a - b).abs().max() / unit):.2g}"


def step(function: Callable, module: nn.Module, image: Tensor, grad: Tensor, convert: bool) -> tuple[Tensor, ...]:
    output = function(module, image)
    params = [param for param in module.parameters() if param.requires_grad]
    made = channels_last(output) if convert else output
    first, *others = torch.autograd.grad(made, [image, *params], grad, allow_unused=True)
    return (made.detach(), channels_last(first) if convert else first, *others)


def eager_ms(run: Callable, device: torch.device, n: int) -> float:
    for _ in range(3):
        run()
    times = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start) / n)
    return statistics.median(times)


def gpu_ms(run: Callable, n: int) -> float:
    "The time of `n` steps in one CUDA graph, each."
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(n):
            run()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / n)
    return statistics.median(times)


def measure_operator(module: nn.Module, form: Callable, shape: tuple, dtype: torch.dtype, device: torch.device) -> dict:
    torch.manual_seed(0)
    module.to(device)
    image = channels_last(torch.randn(shape, device=device).to(dtype)).requires_grad_()
    with torch.no_grad():
        output = form(module, image)
    grad = channels_last(torch.randn(output.shape, device=device).to(output.dtype))
    row: dict[str, Any] = {}
    results = {}
    for name, function in (("plain", own), ("form", form)):
        results[name] = output, image_grad, *_ = step(function, module, image, grad, convert=False)
        lost = ["f"] * (format_of(output) == "contiguous") + ["b"] * (format_of(image_grad) == "contiguous")
        row[f"{name}_loses"] = "".join(lost)
    again = step(own, module, image, grad, convert=False)
    for part, a, b, c in zip(("forward", "gradient", "weight", "bias"), results["plain"], results["form"], again):
        if a is not None and b is not None:
            row[part] = difference(a, b)
            if not torch.equal(a, c):
                row[f"{part} of plain again"] = difference(a, c)
    del results, again, output, image_grad
    n = 20 if device.type == "cuda" else 1
    for where, convert in (("alone", False), ("in a model", True)):
        for name, function in (("plain", own), ("form", form)):

            def run(function=function, convert=convert):
                step(function, module, image, grad, convert)

            row[f"{name} {where} eager"] = round(eager_ms(run, device, n), 4)
            if device.type == "cuda":
                row[f"{name} {where} gpu"] = round(gpu_ms(run, n), 4)
    clock = "gpu" if device.type == "cuda" else "eager"
    row["times"] = round(row[f"plain in a model {clock}"] / row[f"form in a model {clock}"], 2)
    return row


def run_operators(args: argparse.Namespace, record: Record, device: torch.device) -> None:
    for name, module, form, shape in operators(args.size, args.bs or 32):
        for dtype in args.dtypes:
            title = f"{name} {dtype}"
            is_wanted = not args.only or any(word in title for word in args.only)
            if not is_wanted or not record.is_due(title):
                continue
            try:
                result = measure_operator(module, form, shape, DTYPES[dtype], device)
            except Exception as error:  # the next ones are measured all the same
                result = {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
            record.add(title, {"shape": list(shape), **result})
            if device.type == "cuda":
                torch.cuda.empty_cache()


# Whole models


def without_swaps() -> Any:
    return patch.object(ChannelsLast, "around_batches", lambda self: nullcontext())


def fit_ms(learn: Learner, device: torch.device, n_steps: int, swaps: bool, profile: bool = False) -> Steps:
    steps = Steps(n_steps, device, profile and device.type == "cuda")
    with nullcontext() if swaps else without_swaps():
        learn.fit(1, 1e-4, cbs=steps)
    return steps


def quiet(learn: Learner) -> Learner:
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *args: None
    return learn


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def unet_contenders(bs: int, cuda: bool, amp: str, compiled: bool) -> dict[str, tuple[TrainFormat | None, bool]]:
    "By name: the format, None for fastai's own, and whether modules are swapped. First those that take no compilation."
    last = TrainFormat(True, amp, "default" if compiled else None)
    contiguous = replace(last, channels_last=False)
    found = {"fastai's own": (None, False)}
    if compiled:
        found |= {"compiled, contiguous": (contiguous, False)}
        found |= {"compiled": (last, False), "compiled, swaps": (last, True)}
        found["compiled, fused, swaps"] = replace(last, fused_optimizer=True), True
        fast = "compiled, graph, fused"
    else:
        modes = ("fp16", "bf16") if cuda else (amp,)
        found |= {f"contiguous {mode}": (replace(contiguous, amp_mode=mode), False) for mode in modes}
        found |= {"channels last": (last, False), "swaps": (last, True)}
        if cuda:
            bf16 = replace(last, amp_mode="bf16")
            found |= {"bf16": (bf16, False), "bf16, swaps": (bf16, True)}
            found["fused, swaps"] = replace(last, fused_optimizer=True), True
        fast = "graph, fused"
    if cuda and (bs <= 8 or not compiled):
        for name, fmt, swaps in ((", contiguous", contiguous, False), ("", last, False), (", swaps", last, True)):
            found[fast + name] = replace(fmt, cuda_graph=True, fused_optimizer=True), swaps
    return found


def run_unet(args: argparse.Namespace, record: Record, device: torch.device) -> None:
    cuda = device.type == "cuda"
    for bs in [args.bs] if args.bs else [32, 8]:
        for compiled in (False,) if args.no_compile else (False, True):
            title = f"DynamicUnet resnet34 {bs}{' compiled' if compiled else ''}"
            if record.is_due(title):
                contenders = unet_contenders(bs, cuda, args.amp_mode, compiled)
                measure_unet(title, bs, contenders, args, record, device)


def measure_unet(
    title: str,
    bs: int,
    contenders: dict[str, tuple[TrainFormat | None, bool]],
    args: argparse.Namespace,
    record: Record,
    device: torch.device,
) -> None:
    "A round in which all is compiled, then those that are timed, the last one profiled; recorded after each."
    learners, rows = {}, {}
    for name, (fmt, _) in contenders.items():
        if name != "fastai's own" and args.only and not any(word in name for word in args.only):
            continue
        torch.manual_seed(0)
        learners[name], rows[name] = quiet(new_learner("DynamicUnet", bs, args.size, device, Adam)), {"rounds": []}
        if fmt is None:
            to_fastai_channelslast(learners[name], args.amp_mode)
        else:
            learners[name].to_format(fmt)
    for number in range(args.rounds + 1):
        is_last = number == args.rounds or time.monotonic() > record.end
        for name, learn in list(learners.items()):
            fmt, swaps = contenders[name]
            row = rows[name]
            try:
                steps = fit_ms(learn, device, args.steps, swaps, profile=is_last)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}".partition("\n")[0]
                del learners[name]
                continue
            ms = round(statistics.median(steps.steps_ms()), 3)
            if number:
                row["rounds"].append(ms)
            else:
                row["first_step_s"] = round(steps.first_s, 2)
            if steps.layout is not None:
                row |= {"busy_ms": round(steps.busy_ms, 2), "layout": round(steps.layout, 4)}
            if fmt is not None and fmt.cuda_graph:
                row["reason"] = learn.cuda_graph.reason
            print(f"  round {number} {name:36} {ms:.2f} ms", flush=True)
            free(device)
        for row in rows.values():
            if row["rounds"]:
                pairs = zip(rows["fastai's own"]["rounds"], row["rounds"])
                row["ms"] = round(statistics.median(row["rounds"]), 3)
                row["times_fastais_own"] = round(statistics.median(own / ours for own, ours in pairs), 3)
        result = {"bs": bs, "size": args.size, "amp_mode": args.amp_mode, "rows": rows}
        if number and not is_last:
            record.write({title: result})  # what there is if this is cut off
        if is_last:
            break
    for name, row in rows.items():
        print(f"{bs:3} {name:36}", *(f"{key} {value}" for key, value in row.items()), flush=True)
    record.add(title, result)
    learners.clear()
    del learn
    free(device)
    torch.compiler.reset()


# By name: images in a batch. 'unet BODY OPTION...' is fastai's
ARCHS = {
    "unet resnet34": 16,
    "unet resnet34 self_attention": 16,
    "unet resnet34 blur": 16,
    "unet resnet50 blur self_attention": 16,
    "unet vgg16_bn": 8,
    "unet xresnet34 blur": 16,
    "fcn_resnet50": 16,
    "deeplabv3_resnet50": 16,
    "deeplabv3_mobilenet_v3_large": 16,
    "lraspp_mobilenet_v3_large": 16,
    "fasterrcnn_resnet50_fpn": 4,
    "fasterrcnn_mobilenet_v3_large_fpn": 4,
    "retinanet_resnet50_fpn": 4,
    "ssdlite320_mobilenet_v3_large": 8,
    "resnet50": 64,
    "vgg16_bn": 32,
    "shufflenet_v2_x1_0": 64,
    "squeezenet1_1": 64,
    "mobilenet_v3_large": 64,
    "efficientnet_b0": 32,
    "convnext_tiny": 32,
    "googlenet": 64,
    "r3d_18": 8,
    "seresnet50": 64,
    "resnetblur50": 32,
    "resnetv2_50x1_bit": 32,
    "res2net50_26w_4s": 32,
    "dla34": 32,
    "vovnet39a": 32,
    "ghostnet_100": 32,
    "coatnet_0_rw_224": 16,
    "mobilevit_s": 32,
    "fastvit_t8": 32,
    "efficientvit_b1": 32,
    "edgenext_small": 32,
    "poolformer_s12": 32,
    "inception_next_tiny": 32,
    "selecsls60b": 32,
}


def arch_learner(arch: str, bs: int, size: int, device: torch.device) -> Learner:
    if not arch.startswith("unet "):
        return new_learner(arch, bs, None if size == 224 else size, device, fused_adamw)
    body, *options = arch.split()[1:]
    body = getattr(xresnet, body, None) or getattr(torchvision.models, body)
    model = create_unet_model(body, 10, (size, size), pretrained=False, **dict.fromkeys(options, True)).to(device)
    return Learner(synthetic_dls(arch, model, bs, size, device), model, synthetic_loss, opt_func=fused_adamw)


def summary_row(learn: Learner, swaps: bool) -> dict[str, Any]:
    with nullcontext() if swaps else without_swaps():
        summary = learn.format_summary()
    row: dict[str, Any] = {"share": round(summary.channels_last_share, 4)}
    if summary.gpu:
        row |= {"layout": round(summary.gpu.layout, 4), "busy": round(summary.gpu.busy, 4)}
    if swaps:
        lost = {}
        for event in summary.events:
            key = f"{event.cls} {event.op.removeprefix('aten.')} {event.kind} {event.phase}"
            lost[key] = lost.get(key, 0) + event.nbytes
        heaviest = sorted(lost.items(), key=lambda item: -item[1])[:6]
        row["left"] = {key: round(nbytes / 1e6, 1) for key, nbytes in heaviest}
        row["verdict"] = summary.verdict
    return row


def measure_arch(arch: str, bs: int, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    fmt = TrainFormat(True, args.amp_mode, cuda_graph=device.type == "cuda")
    learn = quiet(arch_learner(arch, bs, args.size, device).to_format(fmt))
    with keep_channels_last(learn.model):
        swapped = swapped_classes(learn.model)
    result: dict[str, Any] = {"bs": bs, "swapped": swapped}
    rounds: dict[bool, list[float]] = {True: [], False: []}
    for number in range((args.rounds + 1) if swapped else 0):
        for swaps in (False, True) if number % 2 else (True, False):
            steps = fit_ms(learn, device, args.steps, swaps)
            if number:
                rounds[swaps].append(statistics.median(steps.steps_ms()))
    if swapped:
        ms = {swaps: statistics.median(rounds[swaps]) for swaps in rounds}
        result |= {"plain_ms": round(ms[False], 3), "swaps_ms": round(ms[True], 3)}
        ratios = [plain / with_swaps for plain, with_swaps in zip(rounds[False], rounds[True])]
        result |= {"times": round(statistics.median(ratios), 4), "rounds": [round(ratio, 3) for ratio in ratios]}
        if fmt.cuda_graph:
            result["no_graph"] = learn.cuda_graph.reason  # None: it was replayed
        result["plain"] = summary_row(learn, swaps=False)
    return result | {"with_swaps": summary_row(learn, swaps=True)}


def run_archs(args: argparse.Namespace, record: Record, device: torch.device) -> None:
    known = {name for names in arch_names().values() for name in names}
    for arch, bs in ARCHS.items():
        is_known = arch in known or arch.startswith("unet ")
        is_wanted = not args.only or any(word in arch for word in args.only)
        if not is_known or not is_wanted or not record.is_due(arch):
            continue
        started = time.monotonic()
        try:
            result = measure_arch(arch, args.bs or bs, args, device)
        except Exception as error:  # the next ones are measured all the same
            result = {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
        record.add(arch, {**result, "took_s": round(time.monotonic() - started, 1)})
        free(device)


SECTIONS = {"operators": run_operators, "unet": run_unet, "archs": run_archs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("section", choices=SECTIONS, help="what to measure")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--size", type=int, default=224, help="pixels square")
    parser.add_argument("--bs", type=int, help="images in a batch; default: 32, and what is usual for an architecture")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES, help="of operators")
    parser.add_argument("--amp-mode", default="fp16", help="fp16 or bf16, of whole models")
    parser.add_argument("--steps", type=int, default=45, help="steps of a fit, of which the first 15 are not timed")
    parser.add_argument("--rounds", type=int, default=5, help="fits of each contender")
    parser.add_argument("--no-compile", action="store_true", help="leave out what is compiled, of the U-Net")
    parser.add_argument("--only", nargs="+", help="results with one of these words in their name alone")
    parser.add_argument("--seconds", type=float, default=540, help="after which nothing new is begun")
    parser.add_argument("--out", type=Path, help="write the record to this file, and go on from it")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.backends.cudnn.benchmark = args.section != "archs"
    torch._dynamo.config.recompile_limit = 1000  # each contender compiles the same functions
    torch._dynamo.config.automatic_dynamic_shapes = False
    device = torch.device(args.device)
    SECTIONS[args.section](args, Record(args.out, args.seconds, device), device)


if __name__ == "__main__":
    main()
