"""How training scales to several GPUs, eager and compiled, each also with CUDA graphs, beside a plain PyTorch loop.

    python nbs/benchmarks/distributed_speed.py --processes 1 2 --out nbs/benchmarks/h200x2_speed.json

The loop is one as PyTorch's tutorials write it: DistributedDataParallel, channels last, float16, GradScaler, a fused
AdamW, no metric. The Learner is fastai's with its default Adam in fused steps, and everything it does in a step. Both
train in the same processes, on random images that are on the GPU already, in turns; a figure is the median of the steps
of all turns, between events in the GPU's stream. SyncBatchNorm is measured where there are several processes and
BatchNorms. Single processes run side by side, one a GPU. The same command with the same `--out` goes on where it
ended. On CPUs, in bfloat16, only to try the script out.
"""

import argparse
import gc
import json
import os
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from distributed import TASK, broadcast, launch, new_learner, norm, run_task
from fastai.callback.core import Callback, CancelFitException
from fastai.distributed import DistributedDL
from fastai.optimizer import Adam
from fastai.torch_core import num_distrib, rank_distrib
from torch import nn

from channelslast.cli.record import made_with
from channelslast.formats import TrainFormat
from channelslast.zoo import new_model

N_LEAD = 6  # steps of a turn that are not timed
EAGER, COMPILED = TrainFormat(True, "fp16", fused_optimizer=True), TrainFormat(True, "fp16", "default", False, True)


class Times(Callback):
    "Ends of the steps, and of the fit after `n` steps."

    order = float("inf")

    def __init__(self, n: int):
        self.n, self.ends = n, []

    def after_batch(self):
        self.ends.append(mark(self.dls.device))
        if len(self.ends) == self.n:
            raise CancelFitException


def mark(device: torch.device) -> Any:
    if device.type == "cpu":
        return time.perf_counter()
    return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))


def ms_between(ends: list) -> list[float]:
    "Milliseconds of the timed steps; none in the first turn."
    pairs = pairwise(ends[N_LEAD - 1 :])
    if isinstance(ends[0], float):
        return [1000 * (second - first) for first, second in pairs]
    torch.cuda.synchronize()
    return [first.elapsed_time(second) for first, second in pairs]


def learner_ends(
    arch: str, batches: list, sync_bn: bool, fmt: TrainFormat, counts: list[int], device: torch.device
) -> Iterator[list]:
    "Train with a Learner, as many steps at each turn as `counts` says, and yield their ends."
    loader = list(islice(cycle(batches), max(counts) * max(1, num_distrib())))
    learn = new_learner(loader, new_model(arch), device, opt_func=Adam)
    learn.to_format(fmt)
    for n in counts:
        times = Times(n)
        if num_distrib() > 1:
            with learn.distrib_ctx(sync_bn=sync_bn):
                learn.fit(1, 1e-4, cbs=times)
        else:
            learn.fit(1, 1e-4, cbs=times)
        if fmt.cuda_graph and learn.cuda_graph.reason:
            raise RuntimeError(f"no CUDA graph: {learn.cuda_graph.reason}")
        yield times.ends


def loop_ends(
    arch: str, batches: list, sync_bn: bool, is_compiled: bool, counts: list[int], device: torch.device
) -> Iterator[list]:
    "The same in a plain loop."
    model = new_model(arch).to(device, memory_format=torch.channels_last)
    if sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if is_compiled:
        model.compile()
    if num_distrib() > 1:
        model = nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    for n in counts:
        ends = []
        for images, labels in islice(cycle(batches), n):
            with torch.autocast(device.type, dtype=dtype):
                output = model(images.contiguous(memory_format=torch.channels_last))
                loss = nn.functional.cross_entropy(output, labels)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            ends.append(mark(device))
        yield ends


def measure(arch: str, bs: int, sync_bn: bool, compiled: bool, task: dict, device: torch.device) -> dict[str, dict]:
    "Milliseconds of a step for each contender, in the median; and the spread."
    torch.manual_seed(rank_distrib())
    size = task["size"]
    counts = [N_LEAD] + task["turns"] * [N_LEAD + task["steps"]]  # in the first turn algorithms are looked for
    batches = [
        (torch.randn(bs, 3, size, size, device=device), torch.randint(0, 1000, (bs,), device=device)) for _ in range(4)
    ]
    formats = {"compiled": COMPILED} if compiled else {"eager": EAGER}
    if device.type == "cuda":
        title, fmt = ("compiled, graph", COMPILED) if compiled else ("graph", EAGER)
        formats[title] = replace(fmt, cuda_graph=True)
    name = "loop, compiled" if compiled else "loop"
    turns: dict[str, Iterator] = {name: loop_ends(arch, batches, sync_bn, compiled, counts, device)}
    for title, fmt in formats.items():
        turns[title] = learner_ends(arch, batches, sync_bn, fmt, counts, device)
    ms: dict[str, list[float]] = {name: [] for name in turns}
    for _ in counts:
        for title, ends_of in turns.items():
            ms[title] += ms_between(next(ends_of))
    turns.clear()
    gc.collect()
    if device.type == "cuda":
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
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        DistributedDL._broadcast = broadcast
    torch.backends.cudnn.benchmark = True
    for arch, bs, sync_bn, compiled in task["settings"]:
        rows = measure(arch, bs, sync_bn, compiled, task, device)
        if not rank_distrib():
            done = {"processes": max(1, num_distrib()), "arch": arch, "bs": bs, "norm": norm(sync_bn), "rows": rows}
            print("DONE", json.dumps(done | {"device": made_with("", device)["device"]}), flush=True)
    return {}


def settings(args: argparse.Namespace, n_processes: int, archs: list[str], speed: list[dict]) -> list[tuple]:
    "What is to be measured in `n_processes`, and not in `speed` yet: architecture, images, SyncBatchNorm, compiled."
    found = []
    for arch in archs:
        has_norm = any(isinstance(module, nn.BatchNorm2d) for module in new_model(arch).modules())
        has_sync = has_norm and n_processes > 1 and args.device == "cuda"
        found += [(arch, bs, False, False) for bs in args.bs]
        found += [(arch, bs, True, False) for bs in args.bs if has_sync]
        found += [(arch, bs, False, True) for bs in args.compiled_bs if arch in args.compiled]
    known = {
        (row["processes"], row["arch"], row["bs"], row["norm"], any("compiled" in title for title in row["rows"]))
        for row in speed
    }
    return [each for each in found if (n_processes, *each[:2], norm(each[2]), each[3]) not in known]


def launch_all(args: argparse.Namespace, n: int, record: dict) -> None:
    "Run `n` processes; single ones as many at a time as there are GPUs. Write the record after each result."

    def on_done(row: dict) -> None:
        record["device"] = row.pop("device")
        record["speed"].append(row)
        add_ratios(record["speed"])
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        for title, found in row["rows"].items():
            print(row["processes"], row["arch"], row["bs"], row["norm"], title, found, flush=True)

    def run(archs: list[str], **environment: str) -> None:
        due = settings(args, n, archs, record["speed"])
        task = {"size": args.size, "steps": args.steps, "turns": args.turns, "settings": due}
        if due:
            launch(__file__, n, args.device, task, on_done, **environment)

    if n > 1:
        run(args.archs)
        return
    n_gpus = max(1, torch.cuda.device_count())
    with ThreadPoolExecutor(n_gpus) as pool:
        parts = [args.archs[i::n_gpus] for i in range(min(n_gpus, len(args.archs)))]
        list(pool.map(lambda i: run(parts[i], CUDA_VISIBLE_DEVICES=str(i)), range(len(parts))))


def add_ratios(speed: list[dict]) -> None:
    "Add times the loop's throughput in the same processes, and that of one process for each GPU."
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
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes, one a GPU")
    parser.add_argument("--archs", nargs="+", default=["resnet50", "convnext_tiny"], help="names")
    parser.add_argument("--bs", type=int, nargs="+", default=[64, 256, 512], help="images in a batch of each process")
    parser.add_argument("--compiled", nargs="*", default=["resnet50"], help="names of those that are compiled too")
    parser.add_argument("--compiled-bs", type=int, nargs="+", default=[256], help="batches of these")
    parser.add_argument("--size", type=int, default=224, help="pixels square")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a turn")
    parser.add_argument("--turns", type=int, default=2, help="timed turns of each contender")
    parser.add_argument("--out", type=Path, required=True, help="write the record to this file")
    args = parser.parse_args()
    command = shlex.join(["python", "nbs/benchmarks/distributed_speed.py", *sys.argv[1:]])
    speed = json.loads(args.out.read_text())["speed"] if args.out.exists() else []
    record = {**made_with(command, torch.device("cpu")), "speed": speed}
    for n in args.processes:
        launch_all(args, n, record)


if __name__ == "__main__":
    if TASK in os.environ:
        run_task(work)
    main()
