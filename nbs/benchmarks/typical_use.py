"""Time the training step at fastai's default sizes, with its default Adam, against fastai's own `to_channelslast`.

    python nbs/benchmarks/typical_use.py --out typical_use.json

Every contender trains the same architecture on the same random images, which are on the device already. A round is one
fit of each in turn, and a figure the median of the steps of all rounds, but for the first ones of a fit. Ratios are
medians of the rounds' own ratios. The GPU's busy time is the union of its kernels in profiled steps. On a CPU the
contenders are those that run there, on one architecture.
"""

import argparse
import gc
import json
import shlex
import statistics
import sys
import time
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import ProgressCallback
from fastai.optimizer import Adam
from torch.profiler import ProfilerActivity

from channelslast import TrainFormat
from channelslast.cli.record import made_with
from channelslast.summary.gpu import gpu_shares
from channelslast.zoo import new_learner, to_fastai_channelslast

ARCHS = {"resnet18": 32, "resnet34": 64, "resnet50": 64, "convnext_tiny": 32, "efficientnet_b0": 32, "DynamicUnet": 8}
N_LEAD = 15  # steps of a fit that are not timed


class Steps(Callback):
    "Train `n` steps on the batches that there are, over and over; when each ends, and the last ones in a profiler."

    order = float("inf")

    def __init__(self, n: int, device: torch.device, profile: bool):
        self.n, self.device, self.profile = n, device, profile
        self.ends, self.first_s = [], None
        self.busy_ms = self.layout = None

    def before_train(self):
        batches = [batch for _, batch in zip(range(4), self.dl)]
        self.learn.dl = [batches[i % len(batches)] for i in range(self.n + (5 if self.profile else 0))]
        self.synchronize()
        self.started = time.perf_counter()

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def after_batch(self):
        if self.iter == 0:
            self.synchronize()
            self.first_s = time.perf_counter() - self.started
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.ends.append(event)
        else:
            self.ends.append(time.perf_counter())
        if self.profile and self.iter == self.n - 1:
            self.synchronize()
            self.profiler = torch.profiler.profile(activities=[ProfilerActivity.CUDA])
            self.profiler.__enter__()
        if self.profile and self.iter == self.n + 4:
            self.synchronize()
            self.profiler.__exit__(None, None, None)
            shares = gpu_shares(self.profiler.events(), 1.0)
            self.busy_ms, self.layout = 1000 * shares.busy / 5, shares.layout

    def after_train(self):
        raise CancelFitException

    def steps_ms(self) -> list[float]:
        ends = self.ends[N_LEAD : self.n]
        if self.device.type == "cuda":
            self.synchronize()
            return [a.elapsed_time(b) for a, b in pairwise(ends)]
        return [1000 * (b - a) for a, b in pairwise(ends)]


def contenders(device: torch.device, amp_mode: str) -> dict[str, TrainFormat | None]:
    "By name; None is fastai's own `to_channelslast()`."
    eager = TrainFormat(True, amp_mode)
    both = {"fastai's own": None, "channels last": eager, "fused": replace(eager, fused_optimizer=True)}
    if device.type == "cuda":
        both["graph"] = replace(eager, cuda_graph=True)
        both["fused, graph"] = replace(eager, fused_optimizer=True, cuda_graph=True)
    return both


def measure(arch: str, bs: int, size: int, n_steps: int, n_rounds: int, amp_mode: str, device: torch.device) -> dict:
    formats = contenders(device, amp_mode)
    steps_ms = {name: [] for name in formats}
    rounds = {name: [] for name in formats}
    rows = {name: {} for name in formats}
    for timed_round in range(n_rounds):
        for name, fmt in formats.items():
            torch.manual_seed(0)
            learn = new_learner(arch, bs, size, device, Adam)
            learn.remove_cb(ProgressCallback)
            learn.logger = lambda *args: None
            if fmt is None:
                to_fastai_channelslast(learn, amp_mode)
            else:
                learn.to_format(fmt)
            if device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            steps = Steps(n_steps, device, profile=device.type == "cuda" and timed_round == n_rounds - 1)
            learn.fit(1, 1e-4, cbs=steps)
            ms = steps.steps_ms()
            steps_ms[name] += ms
            rounds[name].append(statistics.median(ms))
            rows[name]["first_step_s"] = round(steps.first_s, 3)
            if device.type == "cuda":
                rows[name]["peak_allocated"] = torch.cuda.max_memory_allocated()
                rows[name]["peak_reserved"] = torch.cuda.max_memory_reserved()
            if steps.busy_ms:
                rows[name]["busy_ms"] = round(steps.busy_ms, 3)
            if fmt is not None and fmt.cuda_graph:
                rows[name]["reason"] = learn.cuda_graph.reason
            del learn, steps
            gc.collect()
    for name, row in rows.items():
        quartiles = statistics.quantiles(steps_ms[name], n=4)
        row["ms"] = round(statistics.median(steps_ms[name]), 3)
        row["iqr"] = round(quartiles[2] - quartiles[0], 3)
        ratios = [own / ours for own, ours in zip(rounds["fastai's own"], rounds[name], strict=True)]
        row["times_fastais_own"] = round(statistics.median(ratios), 3)
        if "busy_ms" in row:
            row["step_vs_busy"] = round(row["ms"] / row["busy_ms"], 3)
        print(f"{arch:16} {bs:3} {name:14}", *(f"{key} {value}" for key, value in row.items()), flush=True)
    return {"arch": arch, "bs": bs, "size": size, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--archs", nargs="+", default=list(ARCHS), help="names; default: all six")
    parser.add_argument("--bs", type=int, help="images in a batch; default: that of typical use")
    parser.add_argument("--size", type=int, default=224, help="pixels square")
    parser.add_argument("--amp-mode", default="fp16", help="fp16 or bf16")
    parser.add_argument("--steps", type=int, default=80, help="steps of a fit")
    parser.add_argument("--rounds", type=int, default=3, help="fits of each contender")
    parser.add_argument("--out", type=Path, help="write the record to this file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.backends.cudnn.benchmark = True
    device = torch.device(args.device)
    results = []
    for arch in args.archs:
        bs = args.bs or ARCHS[arch]
        results.append(measure(arch, bs, args.size, args.steps, args.rounds, args.amp_mode, device))
        command = shlex.join(["python", "nbs/benchmarks/typical_use.py", *sys.argv[1:]])
        record = {**made_with(command, device), "results": results}
        for name in results[0]["rows"]:
            record.setdefault("geometric_mean_times_fastais_own", {})[name] = round(
                statistics.geometric_mean(result["rows"][name]["times_fastais_own"] for result in results), 3
            )
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(record["geometric_mean_times_fastais_own"])


if __name__ == "__main__":
    main()
