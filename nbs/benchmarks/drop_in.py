"""Time `to_channelslast` against fastai's built-in one and against a plain PyTorch loop, all in one interleaved run.

    python nbs/benchmarks/drop_in.py --device cpu --arch xresnet18 --size 128 --bs 16 --amp-mode bf16
    python nbs/benchmarks/drop_in.py --device cuda --arch resnet50 --size 224 --bs 128 --amp-mode fp16

Every contender trains on the same random batches, which are on the device already. A round times one epoch of each in
turn; figures are medians over the rounds, and ratios medians of the rounds' own ratios. On CUDA it also takes peak
memory and the time of the conversion itself. The records beside this file are what it printed.
"""

import json
import shlex
import statistics
import sys
import time
import warnings
from functools import partial

import torch
import torch.nn.functional as F
from fastai.callback import progress  # noqa: F401, for `Learner.no_bar`
from fastai.callback.core import Callback, CancelValidException
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam
from fastcore.script import call_parse
from torch import nn
from torch.amp import GradScaler, autocast

from channelslast import zoo
from channelslast.callback import ChannelsLast
from channelslast.cli.record import made_with
from channelslast.memory_format import module_to_memory_format, optimizer_to_memory_format
from channelslast.zoo import Batches, fused_adamw, to_fastai_channelslast

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
N_CLASSES = 1000


class EpochTimer(Callback):
    "The seconds of the training part of each epoch, everything that the Learner does in it included."

    def __init__(self, synchronize):
        self.synchronize, self.seconds = synchronize, []

    def before_train(self):
        self.synchronize()
        self.started = time.perf_counter()

    def after_train(self):
        self.synchronize()
        self.seconds.append(time.perf_counter() - self.started)

    def before_validate(self):
        raise CancelValidException()


def new_model(arch: str) -> nn.Module:
    torch.manual_seed(0)
    return zoo.new_model(arch, N_CLASSES)


class LearnerLoop:
    "Epochs of a Learner."

    def __init__(self, arch, batches, device, synchronize, opt_func, convert):
        self.timer = EpochTimer(synchronize)
        dls = DataLoaders(batches, Batches(batches[:1]), device=device)
        self.learn = Learner(dls, new_model(arch), CrossEntropyLossFlat(), opt_func=opt_func, cbs=self.timer)
        convert(self.learn)

    def epoch(self) -> float:
        with self.learn.no_logging(), self.learn.no_bar():
            self.learn.fit(1, 1e-3)
        return self.timer.seconds[-1]


class PlainLoop:
    "Epochs of a loop in PyTorch alone: channels last, autocast, fused AdamW."

    def __init__(self, arch, batches, device, synchronize, amp_mode):
        self.batches, self.device, self.synchronize, self.dtype = batches, device, synchronize, DTYPES[amp_mode]
        self.model = new_model(arch).to(device, memory_format=torch.channels_last).train()
        self.opt = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.scaler = GradScaler(device.type, enabled=amp_mode == "fp16")

    def epoch(self) -> float:
        self.synchronize()
        started = time.perf_counter()
        for x, y in self.batches:
            x = x.to(memory_format=torch.channels_last)
            with autocast(self.device.type, self.dtype):
                loss = F.cross_entropy(self.model(x), y)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.opt)
            self.scaler.update()
            self.opt.zero_grad()
        self.synchronize()
        return time.perf_counter() - started


def summarise(seconds: list[float], n_batches: int) -> dict:
    ms = sorted(1000 * s / n_batches for s in seconds)
    quartiles = statistics.quantiles(ms, n=4)
    return {"ms": round(statistics.median(ms), 3), "iqr": round(quartiles[2] - quartiles[0], 3)}


def callback_cost(learn: Learner, batch) -> float:
    "Median microseconds of Python that `ChannelsLast` spends on a batch that has to be converted."
    cb = next(cb for cb in learn.cbs if isinstance(cb, ChannelsLast))
    times = []
    for _ in range(300):
        learn.xb = batch[:1]
        started = time.perf_counter()
        cb("before_batch")
        times.append(time.perf_counter() - started)
    return round(1e6 * statistics.median(times), 1)


def conversion_ms(arch: str, device, synchronize) -> dict:
    "Median milliseconds of converting a model with its Adam state, there and back."
    model = new_model(arch).to(device)
    opt = torch.optim.Adam(model.parameters())
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    opt.step()
    times = {True: [], False: []}
    for _ in range(20):
        for channels_last in times:
            synchronize()
            started = time.perf_counter()
            module_to_memory_format(model, channels_last)
            optimizer_to_memory_format(opt)
            synchronize()
            times[channels_last].append(1000 * (time.perf_counter() - started))
    return {
        "to_channels_last": round(statistics.median(times[True]), 2),
        "to_contiguous": round(statistics.median(times[False]), 2),
    }


@call_parse
def main(
    device: str = "cpu",  # cpu or cuda
    arch: str = "xresnet18",  # a torchvision or fastai xresnet name
    size: int = 128,  # image size in pixels
    bs: int = 16,  # images in a batch
    amp_mode: str = "bf16",  # fp16 or bf16
    n_batches: int = 5,  # training steps in a round
    rounds: int = 7,  # timed rounds
):
    "Time a training step of `to_channelslast`, of fastai's built-in and of a plain PyTorch loop."
    warnings.simplefilter("ignore")
    torch.backends.cudnn.benchmark = True
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    synchronize = torch.cuda.synchronize if on_cuda else lambda: None
    batches = Batches(
        (torch.randn(bs, 3, size, size, device=device), torch.randint(0, N_CLASSES, (bs,), device=device))
        for _ in range(n_batches)
    )
    opt_func = fused_adamw if on_cuda else Adam
    new_learner = partial(LearnerLoop, arch, batches, device, synchronize, opt_func)
    new_contender = {
        "channelslast": lambda: new_learner(lambda learn: learn.to_channelslast(amp_mode=amp_mode)),
        "fastai built-in": lambda: new_learner(lambda learn: to_fastai_channelslast(learn, amp_mode)),
        "plain PyTorch loop": lambda: PlainLoop(arch, batches, device, synchronize, amp_mode),
    }
    contenders = {name: make() for name, make in new_contender.items()}
    seconds = {name: [] for name in contenders}
    for timed_round in range(-2, rounds):  # two rounds warm up
        for name, contender in contenders.items():
            took = contender.epoch()
            if timed_round >= 0:
                seconds[name].append(took)

    def ratio(name: str, other: str) -> float:
        "Round by round, so that what slows the machine down for a while hits both."
        return round(statistics.median(a / b for a, b in zip(seconds[name], seconds[other])), 3)

    fastest = {name: round(1000 * min(took) / n_batches, 3) for name, took in seconds.items()}
    result = {
        **made_with(shlex.join(["python", "nbs/benchmarks/drop_in.py", *sys.argv[1:]]), device),
        "step": {name: summarise(took, n_batches) for name, took in seconds.items()},
        "fastest_round_ms": fastest,
        "throughput_vs_builtin": ratio("fastai built-in", "channelslast"),
        "step_vs_plain_loop": ratio("channelslast", "plain PyTorch loop"),
        "callback_us_per_batch": callback_cost(contenders["channelslast"].learn, batches[0]),
        "conversion_ms": conversion_ms(arch, device, synchronize),
    }
    if on_cuda:
        contenders.clear()
        result["peak_gib"] = {}
        for name, make in new_contender.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            make().epoch()
            result["peak_gib"][name] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    print(json.dumps(result, indent=2))
