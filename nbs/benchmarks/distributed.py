"""Train on several GPUs with fastai's DistributedTrainer: are the losses those of one process?

    python nbs/benchmarks/distributed.py --processes 1,2,4,8 > nbs/benchmarks/h200x8_distributed.json

xresnet18 on scikit-learn's digits, in channels last and float32, with SyncBatchNorm and without, with the plain steps
of fastai's SGD, with fused ones, and on GPUs with these and CUDA graphs. One process trains on the same global batches
with plain steps: whole with SyncBatchNorm, and without it in as many parts as there are processes, whose gradients it
accumulates. distributed_speed.py measures how it scales.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product

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
from fastai.torch_core import num_distrib
from fastcore.script import call_parse
from sklearn.datasets import load_digits
from torch import nn

from channelslast.cli.record import made_with
from channelslast.formats import TrainFormat, to_train_format
from channelslast.zoo import new_model

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


def digits_losses(device: torch.device, sync_bn: bool, fmt: TrainFormat, n_processes: int) -> list[float]:
    "Losses of the steps, trained in this process as in `n_processes`, with plain steps, or in the processes there are."
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
    learn.to_format(TrainFormat(channels_last=True) if is_one else fmt)
    with nullcontext() if is_one else learn.distrib_ctx(sync_bn=sync_bn):
        learn.fit(1)
    losses = learn.losses.losses
    n_parts = len(losses) // N_STEPS
    return [statistics.mean(losses[i : i + n_parts]) for i in range(0, len(losses), n_parts)]


def norm(sync_bn: bool) -> str:
    return "SyncBatchNorm" if sync_bn else "BatchNorm"


def work(task: dict) -> dict:
    "What one of the processes does."
    device = Accelerator().device
    if device.type == "cpu":
        DistributedDL._broadcast = broadcast
    torch.backends.cudnn.allow_tf32 = False
    formats = ["channels last fp32", "channels last fp32 fused"]
    formats += ["channels last fp32 graph fused"] * (device.type == "cuda")
    result = {"device": made_with("", device)["device"], "losses": {}}
    for n, sync_bn, fmt in product(task["losses_of"], task["sync_bn"], formats):
        result["losses"][f"{n}, {norm(sync_bn)}, {fmt}"] = digits_losses(device, sync_bn, to_train_format(fmt), n)
    return result


def launch(
    script: str, n_processes: int, device: str, task: dict, on_done: Callable[[dict], None] = print, **environment: str
) -> dict:
    """The result of the first of `n_processes` that run `script` for the task, with how often PyTorch warned.

    `on_done` is called for each part of it that the process says to be done.
    """
    launcher = ["accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    launcher += ["--dynamo_backend", "no", "--num_processes", str(n_processes), *["--multi_gpu"] * (n_processes > 1)]
    environment = {**os.environ, TASK: json.dumps(task), **environment}
    if device == "cpu":  # where Accelerate would start the processes with MPI
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(n_processes)]
        environment |= {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", *launcher, script]
    lines = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        for line in run.stdout:
            lines.append(line)
            if line.startswith("DONE "):
                on_done(json.loads(line.removeprefix("DONE ")))
    results = [line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT ")]
    if not results:
        raise RuntimeError(f"{shlex.join(command)} printed no result:\n{''.join(lines)[-8000:]}")
    print(f"{n_processes} processes are done", file=sys.stderr, flush=True)
    return {**json.loads(results[0]), "n_warnings": sum(WARNING in line for line in lines)}


def run_task(work: Callable[[dict], dict]) -> None:
    "In a process that `launch` started: do the work, and let the first process print the result."
    result = work(json.loads(os.environ[TASK]))
    if num_distrib() > 1:
        dist.barrier()
        dist.destroy_process_group()
    if not int(os.environ.get("RANK", 0)):
        print(f"RESULT {json.dumps(result)}", flush=True)
    os._exit(0)  # gloo's threads may abort a process that goes the long way


def main(
    processes: str = "1,2",  # numbers of processes, one a GPU
    device: str = "cuda",  # cuda or cpu, where SyncBatchNorm is left out
):
    "Compare distributed training with one process, and print the record."
    numbers = [int(number) for number in processes.split(",") if int(number) > 1]
    task = {"sync_bn": [True, False] if device == "cuda" else [False]}
    one = launch(__file__, 1, device, task | {"losses_of": numbers})
    losses, n_warnings = [], one["n_warnings"]
    for n in numbers:
        result = launch(__file__, n, device, task | {"losses_of": [n]})
        n_warnings += result["n_warnings"]
        for name, values in result["losses"].items():
            alone = one["losses"][name]
            differences = [abs(a - b) / b for a, b in zip(values, alone, strict=True)]
            compared = {"losses": values, "one_process": alone, "relative_differences": differences}
            losses.append({"processes": name, **compared})
    record = made_with(shlex.join(["python", "nbs/benchmarks/distributed.py", *sys.argv[1:]]), torch.device("cpu"))
    record["device"] = one["device"]
    print(json.dumps({**record, "losses": losses, "stride_warnings": n_warnings}, indent=1))


if __name__ == "__main__":
    if TASK in os.environ:
        run_task(work)
    call_parse(main)
