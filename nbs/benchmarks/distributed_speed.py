"""How training scales to several GPUs, with eager steps, CUDA graphs and compiled, beside a plain PyTorch loop.

    python nbs/benchmarks/distributed_speed.py --processes 1 2 --out nbs/benchmarks/h200x2_speed.json

The loop is one as PyTorch's tutorials write it: DistributedDataParallel, channels last, float16, GradScaler, a fused
AdamW, no metric. The Learner is fastai's with its default Adam in fused steps, and everything it does in a step. Both
train in the same processes, on random images that are on the GPU already, in turns; a figure is the median of the steps
of all turns, between events in the GPU's stream. SyncBatchNorm is measured where there are several processes and
BatchNorms. Single processes run side by side, one a GPU.
"""

import argparse
import gc
import json
import os
import shlex
import statistics
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice, pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from distributed import TASK, launch, new_learner, norm, run_task
from fastai.callback.core import Callback, CancelFitException
from fastai.optimizer import Adam
from fastai.torch_core import num_distrib, rank_distrib
from torch import nn

from channelslast.cli.record import made_with
from channelslast.formats import to_train_format
from channelslast.zoo import new_model

N_LEAD = 8  # steps of a turn that are not timed
FORMATS = {"eager": "channels last fp16 fused", "graph": "channels last fp16 graph fused"}
COMPILED = {"compiled": "channels last fp16 compiled fused"}


class Times(Callback):
    "Ends of the steps, and of the fit after `n` steps."

    order = float("inf")

    def __init__(self, n: int):
        self.n, self.ends = n, []

    def after_batch(self):
        self.ends.append(mark())
        if len(self.ends) == self.n:
            raise CancelFitException


def mark() -> torch.cuda.Event:
    return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))


def learner_ends(arch: str, batches: list, sync_bn: bool, fmt: str, n: int, device: torch.device) -> Iterator[list]:
    "Train `n` steps with a Learner at each turn, and yield their ends."
    loader = list(islice(cycle(batches), num_distrib() * n)) if num_distrib() > 1 else list(islice(cycle(batches), n))
    learn = new_learner(loader, new_model(arch), device, opt_func=Adam)
    learn.to_format(to_train_format(fmt))
    while True:
        times = Times(n)
        if num_distrib() > 1:
            with learn.distrib_ctx(sync_bn=sync_bn):
                learn.fit(1, 1e-4, cbs=times)
        else:
            learn.fit(1, 1e-4, cbs=times)
        yield times.ends


def loop_ends(arch: str, batches: list, sync_bn: bool, is_compiled: bool, n: int, device: torch.device) -> Iterator:
    "Train `n` steps in a plain loop at each turn, and yield their ends."
    model = new_model(arch).to(device, memory_format=torch.channels_last)
    if sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if is_compiled:
        model.compile()
    if num_distrib() > 1:
        model = nn.parallel.DistributedDataParallel(model, device_ids=[device.index])
    opt, scaler = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), torch.amp.GradScaler()
    while True:
        ends = []
        for images, labels in islice(cycle(batches), n):
            with torch.autocast("cuda", dtype=torch.float16):
                output = model(images.contiguous(memory_format=torch.channels_last))
                loss = nn.functional.cross_entropy(output, labels)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            ends.append(mark())
        yield ends


def measure(arch: str, bs: int, sync_bn: bool, compiled: bool, task: dict, device: torch.device) -> dict[str, dict]:
    "Milliseconds of a step for each contender, in the median; and the spread."
    torch.manual_seed(rank_distrib())
    size, n = task["size"], N_LEAD + task["steps"]
    batches = [
        (torch.randn(bs, 3, size, size, device=device), torch.randint(0, 1000, (bs,), device=device)) for _ in range(4)
    ]
    formats = COMPILED if compiled else FORMATS
    name = "loop, compiled" if compiled else "loop"
    turns: dict[str, Iterator] = {name: loop_ends(arch, batches, sync_bn, compiled, n, device)}
    for title, fmt in formats.items():
        turns[title] = learner_ends(arch, batches, sync_bn, fmt, n, device)
    ms: dict[str, list[float]] = {name: [] for name in turns}
    for turn in range(task["turns"] + 1):  # in the first one algorithms are looked for
        for title, ends_of in turns.items():
            ends = next(ends_of)
            torch.cuda.synchronize()
            if turn:
                ms[title] += [first.elapsed_time(second) for first, second in pairwise(ends[N_LEAD - 1 :])]
    turns.clear()
    gc.collect()
    torch.cuda.empty_cache()
    torch.compiler.reset()
    rows = {}
    for title, values in ms.items():
        quartiles = statistics.quantiles(values, n=4)
        rows[title] = {"ms": round(statistics.median(values), 3), "iqr": round(quartiles[2] - quartiles[0], 3)}
    return rows


def work(task: dict) -> dict:
    "What one of the processes does."
    warnings.simplefilter("ignore")
    device = Accelerator().device
    device = torch.device(device.type, torch.cuda.current_device())
    torch.backends.cudnn.benchmark = True
    speed = []
    for arch, bs, sync_bn, compiled in task["settings"]:
        rows = measure(arch, bs, sync_bn, compiled, task, device)
        speed.append({"arch": arch, "bs": bs, "norm": norm(sync_bn), "rows": rows})
        if not rank_distrib():
            print(num_distrib(), arch, bs, norm(sync_bn), rows, file=sys.stderr, flush=True)
    return {"device": made_with("", device)["device"], "speed": speed}


def settings(args: argparse.Namespace, n_processes: int, archs: list[str]) -> list[tuple]:
    found = []
    for arch in archs:
        has_norm = any(isinstance(module, nn.BatchNorm2d) for module in new_model(arch).modules())
        found += [(arch, bs, False, False) for bs in args.bs]
        found += [(arch, bs, True, False) for bs in args.bs if has_norm and n_processes > 1]
        found += [(arch, bs, False, True) for bs in args.compiled_bs if arch in args.compiled]
    return found


def launch_all(args: argparse.Namespace, n: int) -> list[dict]:
    "The results of `n` processes; of single ones, as many at a time as there are GPUs."
    base = {"size": args.size, "steps": args.steps, "turns": args.turns}
    if n > 1:
        return [launch(__file__, n, "cuda", base | {"settings": settings(args, n, args.archs)})]
    n_gpus = torch.cuda.device_count()

    def alone(i: int, archs: list[str]) -> dict:
        task = base | {"settings": settings(args, 1, archs)}
        return launch(__file__, 1, "cuda", task, CUDA_VISIBLE_DEVICES=str(i % n_gpus))

    parts = [args.archs[i::n_gpus] for i in range(min(n_gpus, len(args.archs)))]
    with ThreadPoolExecutor(n_gpus) as pool:
        return list(pool.map(alone, range(len(parts)), parts))


def add_ratios(speed: list[dict]) -> None:
    "Times of the loop's throughput in the same processes, and of the same in one process, for each GPU."
    alone = {(row["arch"], row["bs"]): {} for row in speed}
    for row in speed:
        if row["processes"] == 1:
            alone[row["arch"], row["bs"]].update(row["rows"])
    for row in speed:
        loop = next(rows["ms"] for title, rows in row["rows"].items() if title.startswith("loop"))
        for title, found in row["rows"].items():
            found["images_per_s"] = round(1000 * row["bs"] * row["processes"] / found["ms"])
            found["times_loop"] = round(loop / found["ms"], 3)
            if title in alone[row["arch"], row["bs"]]:
                found["scaling"] = round(alone[row["arch"], row["bs"]][title]["ms"] / found["ms"], 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes, one a GPU")
    parser.add_argument("--archs", nargs="+", default=["resnet50", "convnext_tiny"], help="names")
    parser.add_argument("--bs", type=int, nargs="+", default=[64, 256, 512], help="images in a batch of each process")
    parser.add_argument("--compiled", nargs="*", default=["resnet50"], help="names of those that are compiled too")
    parser.add_argument("--compiled-bs", type=int, nargs="+", default=[256], help="batches of these")
    parser.add_argument("--size", type=int, default=224, help="pixels square")
    parser.add_argument("--steps", type=int, default=16, help="timed steps of a turn")
    parser.add_argument("--turns", type=int, default=2, help="timed turns of each contender")
    parser.add_argument("--out", type=Path, required=True, help="write the record to this file")
    args = parser.parse_args()
    command = shlex.join(["python", "nbs/benchmarks/distributed_speed.py", *sys.argv[1:]])
    record = {**made_with(command, torch.device("cpu")), "speed": []}
    for n in args.processes:
        for result in launch_all(args, n):
            record["device"] = result["device"]
            record["speed"] += [{"processes": n, **row} for row in result["speed"]]
        add_ratios(record["speed"])
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    for row in record["speed"]:
        for title, found in row["rows"].items():
            print(row["processes"], row["arch"], row["bs"], row["norm"], title, found)


if __name__ == "__main__":
    if TASK in os.environ:
        run_task(work)
    main()
