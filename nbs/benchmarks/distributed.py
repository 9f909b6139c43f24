"""Train on several GPUs with fastai's DistributedTrainer: are the losses those of one process, and how does it scale?

    python nbs/benchmarks/distributed.py --processes 1,2,4,8 > nbs/benchmarks/h200x8_distributed.json

Losses: xresnet18 on scikit-learn's digits, in channels last and float32, with SyncBatchNorm and without, with the plain
steps of fastai's SGD and with fused ones. One process trains on the same global batches with plain steps: whole with
SyncBatchNorm, and without it in as many parts as there are processes, whose gradients it accumulates. Speed: an
architecture on random images that are on the GPU already, with a fused AdamW; the numbers of processes take turns, and
figures are medians over the steps of all turns.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from itertools import pairwise, product

import torch
import torch.distributed as dist
from accelerate import Accelerator
from fastai.callback.core import Callback, CancelValidException
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.distributed import DistributedDL  # and `Learner.distrib_ctx`
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastai.torch_core import num_distrib, rank_distrib
from fastcore.script import call_parse
from sklearn.datasets import load_digits
from torch import nn

from channelslast.cli.record import made_with
from channelslast.formats import TrainFormat
from channelslast.zoo import fused_adamw, new_model

N_STEPS = 8  # of which losses are compared
BS = 16  # digits in a batch of one process
WARNING = "Grad strides do not match bucket view strides"
TASK = "CHANNELSLAST_TASK"  # environment variable, for the processes that `launch` starts


class Losses(Callback):
    "The loss of each step, in the mean over the processes."

    order = 100

    def before_fit(self):
        self.losses = []

    def after_batch(self):
        loss = self.loss.detach().clone()
        if num_distrib() > 1:
            loss = loss.to(self.dls.device)
            dist.all_reduce(loss)
            loss /= num_distrib()
        self.losses.append(loss.item())

    def before_validate(self):
        raise CancelValidException()


class StepTimes(Losses):
    "Milliseconds from the end of one training step to that of the next, on the GPU."

    def after_batch(self):
        self.losses.append(torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True)))

    def ms(self, n_warm_up: int) -> list[float]:
        torch.cuda.synchronize()
        ends = self.losses[n_warm_up:]
        return [first.elapsed_time(second) for first, second in pairwise(ends)]


def broadcast(self: DistributedDL, values: list[int], rank: int) -> list[int]:
    "fastai's `_broadcast` sends over CUDA alone."
    tensor = torch.tensor(values)
    dist.broadcast(tensor, rank)
    return tensor.tolist()


def new_learner(batches: list, model, device: torch.device, **kwargs) -> Learner:
    "A Learner over batches that are on the device already."
    loader = partial(DataLoader, batches, bs=None, num_workers=0)
    dls = DataLoaders(loader(), loader(), device=device)
    learn = Learner(dls, model, nn.CrossEntropyLoss(), **kwargs)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *args: None
    return learn


def digits_losses(device: torch.device, sync_bn: bool, fused: bool, n_processes: int) -> list[float]:
    "Losses of the steps, trained in this process as in `n_processes`, with plain steps, or in those that there are."
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).div(16)[:, None].repeat(1, 3, 2, 2).to(device)
    images += 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(device)  # no equal pixels
    labels = torch.tensor(digits.target).to(device)
    batches = list(zip(images.split(BS), labels.split(BS)))[: N_STEPS * n_processes]
    cbs, is_one = [Losses()], num_distrib() <= 1
    if is_one:  # DistributedDL gives each process a run of batches: the global batch of a step takes one of each run
        batches = [batch for step in range(N_STEPS) for batch in batches[step::N_STEPS]]
        if sync_bn:
            steps = [batches[i : i + n_processes] for i in range(0, len(batches), n_processes)]
            batches = [tuple(map(torch.cat, zip(*step))) for step in steps]
        else:
            cbs.append(GradientAccumulation(n_processes * BS))
    torch.manual_seed(0)
    model = new_model("xresnet18", 10)
    learn = new_learner(batches, model, device, opt_func=partial(SGD, mom=0.9), lr=0.01, cbs=cbs)
    learn.to_format(TrainFormat(channels_last=True, fused_optimizer=fused and not is_one))
    with nullcontext() if is_one else learn.distrib_ctx(sync_bn=sync_bn):
        learn.fit(1)
    losses = learn.losses.losses
    n_parts = len(losses) // N_STEPS
    return [statistics.mean(losses[i : i + n_parts]) for i in range(0, len(losses), n_parts)]


def step_ms(
    device: torch.device, sync_bn: bool, fmt: TrainFormat, arch: str, size: int, bs: int, n: int
) -> list[float]:
    "Milliseconds of the training steps of each process, of which the first third is warm-up."
    torch.manual_seed(rank_distrib())
    batches = [
        (torch.randn(bs, 3, size, size, device=device), torch.randint(0, 1000, (bs,), device=device)) for _ in range(4)
    ]
    n_warm_up = n // 2
    times = StepTimes()
    n_batches = (n + n_warm_up + 1) * max(1, num_distrib())
    learn = new_learner((batches * n_batches)[:n_batches], new_model(arch), device, opt_func=fused_adamw, cbs=times)
    learn.to_format(fmt)
    with learn.distrib_ctx(sync_bn=sync_bn) if num_distrib() > 1 else nullcontext():
        learn.fit(1, 1e-4)
    return times.ms(n_warm_up)


def norm(sync_bn: bool) -> str:
    return "SyncBatchNorm" if sync_bn else "BatchNorm"


def work(task: dict) -> dict:
    "What one of the processes does."
    device = Accelerator().device
    if device.type == "cpu":
        DistributedDL._broadcast = broadcast
    torch.backends.cudnn.allow_tf32 = False
    result = {"device": made_with("", device)["device"], "losses": {}, "ms": {}}
    for n, sync_bn, fused in product(task["losses_of"], task["sync_bn"], [False, True]):
        name = f"{n}, {norm(sync_bn)}{', fused steps' if fused else ''}"
        result["losses"][name] = digits_losses(device, sync_bn, fused, n)
    for fmt in task["speed_in"]:
        for sync_bn in task["sync_bn"] if num_distrib() > 1 else [False]:
            name = f"{TrainFormat(*fmt)}, {norm(sync_bn)}"
            result["ms"][name] = step_ms(device, sync_bn, TrainFormat(*fmt), **task["speed_of"])
    if num_distrib() > 1:
        dist.destroy_process_group()
    return result


def launch(n_processes: int, device: str, task: dict) -> dict:
    "The result of the first of `n_processes` that run this script for the task."
    launcher = ["accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    launcher += ["--dynamo_backend", "no", "--num_processes", str(n_processes), *["--multi_gpu"] * (n_processes > 1)]
    environment = {**os.environ, TASK: json.dumps(task)}
    if device == "cpu":  # where Accelerate would start the processes with MPI
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(n_processes)]
        environment |= {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", *launcher, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    results = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not results:
        raise RuntimeError(f"{shlex.join(command)} printed no result:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    print(f"{n_processes} processes are done", file=sys.stderr, flush=True)
    return {**json.loads(results[0]), "n_warnings": (done.stdout + done.stderr).count(WARNING)}


def main(
    processes: str = "1,2",  # numbers of processes, one a GPU
    device: str = "cuda",  # cuda or cpu; on a CPU SyncBatchNorm and the speed are left out
    arch: str = "resnet50",  # to measure speed with
    size: int = 224,  # image size in pixels
    bs: int = 256,  # images in a batch of each process
    steps: int = 40,  # timed steps of each turn
    turns: int = 2,  # how often each number of processes is measured
):
    "Compare distributed training with one process, and print the record."
    numbers = [int(number) for number in processes.split(",")]
    task = {
        "sync_bn": [True, False] if device == "cuda" else [False],
        "losses_of": [],
        "speed_in": [(True, "fp16"), (True, "bf16")] if device == "cuda" and steps else [],
        "speed_of": {"arch": arch, "size": size, "bs": bs, "n": steps},
    }
    losses, ms, n_warnings = [], {}, 0
    for turn in range(max(1, turns if task["speed_in"] else 1)):
        one = {}
        for n in [1, *(number for number in numbers if number > 1)]:
            several = [number for number in numbers if number > 1] if n == 1 else [n]
            result = launch(n, device, task | {"losses_of": [] if turn else several})
            n_warnings += result["n_warnings"]
            for name, times in result["ms"].items():
                ms.setdefault(name, {}).setdefault(n, []).extend(times)
            one = one or result["losses"]
            for name, values in result["losses"].items() if n > 1 else ():
                differences = [abs(a - b) / b for a, b in zip(values, one[name], strict=True)]
                compared = {"losses": values, "one_process": one[name], "relative_differences": differences}
                losses.append({"processes": name, **compared})
    record = made_with(shlex.join(["python", "nbs/benchmarks/distributed.py", *sys.argv[1:]]), torch.device("cpu"))
    record["device"] = result["device"]
    speed = []
    for name, times in ms.items():
        alone = statistics.median(ms[name.replace(norm(True), norm(False))][1])
        for n, values in times.items():
            median = statistics.median(values)
            speed.append(
                {"format": name, "processes": n, "ms": round(median, 2), "images_per_s": round(1000 * bs * n / median)}
            )
            speed[-1]["scaling_per_gpu"] = round(alone / median, 3)
    print(json.dumps({**record, "losses": losses, "stride_warnings": n_warnings, "speed": speed}, indent=1))


if __name__ == "__main__":
    if TASK not in os.environ:
        call_parse(main)
    else:
        outcome = work(json.loads(os.environ[TASK]))
        if not rank_distrib():
            print(f"RESULT {json.dumps(outcome)}", flush=True)
        os._exit(0)  # gloo's threads may abort a process that goes the long way
