"""Record when the CPU launches and when the GPU runs in training steps of one Learner, before and after.

    python nbs/benchmarks/timeline.py --out h200_timeline.json

The record holds intervals in microseconds from the start of a step: launches on the CPU, and kernels on the GPU, joined
where less than 2 us lie between them. The profiler slows the CPU down somewhat.
"""

import argparse
import json
import shlex
import sys
import warnings
from pathlib import Path

import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import ProgressCallback
from fastai.optimizer import Adam
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from channelslast import TrainFormat
from channelslast.cli.record import made_with
from channelslast.zoo import new_learner

N_WARM, N_STEPS = 30, 3
FORMATS = {
    "before": TrainFormat(True, "fp16"),
    "after": TrainFormat(True, "fp16", cuda_graph=True, fused_optimizer=True),
}


class Profile(Callback):
    "Profile some steps once training is steady, and end the fit."

    order = float("inf")

    def after_batch(self):
        if self.iter == N_WARM:
            torch.cuda.synchronize()
            activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
            self.profiler = torch.profiler.profile(activities=activities).__enter__()
        if self.iter == N_WARM + N_STEPS:
            torch.cuda.synchronize()
            self.profiler.__exit__(None, None, None)
            raise CancelFitException


def joined(spans: list[tuple[float, float]], gap: float = 2.0) -> list[list[float]]:
    "Intervals in their order, joined where less than `gap` lies between them."
    result: list[list[float]] = []
    for start, end in sorted(spans):
        if result and start - result[-1][1] < gap:
            result[-1][1] = max(end, result[-1][1])
        else:
            result.append([start, end])
    return [[round(start, 1), round(end, 1)] for start, end in result]


def timeline(arch: str, bs: int, fmt: TrainFormat) -> dict:
    torch.manual_seed(0)
    learn = new_learner(arch, bs, 224, torch.device("cuda"), Adam)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *args: None
    learn.dls.loaders[0] = type(learn.dls.train)(list(learn.dls.train) * (N_WARM + N_STEPS))
    learn.to_format(fmt)
    profile = Profile()
    learn.fit(1, 1e-4, cbs=profile)
    events = profile.profiler.events()
    launches = [
        event for event in events if event.name.startswith(("cudaLaunch", "cudaGraphLaunch", "cudaMemcpyAsync"))
    ]
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    began = min(event.time_range.start for event in launches)
    cpu = [(event.time_range.start - began, event.time_range.end - began) for event in launches]
    gpu = [(event.time_range.start - began, event.time_range.end - began) for event in kernels]
    return {
        "format": str(fmt),
        "steps": N_STEPS,
        "cpu_launches": len(launches),
        "kernels": len(kernels),
        "us": round(max(end for _, end in gpu), 1),
        "gpu_busy_us": round(sum(end - start for start, end in joined(gpu, 0.0)), 1),
        "cpu": joined(cpu, 20.0),
        "gpu": joined(gpu),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", default="resnet18", help="name of an architecture")
    parser.add_argument("--bs", type=int, default=32, help="images in a batch")
    parser.add_argument("--out", type=Path, required=True, help="write the record to this file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.backends.cudnn.benchmark = True
    command = shlex.join(["python", "nbs/benchmarks/timeline.py", *sys.argv[1:]])
    record = {**made_with(command, torch.device("cuda")), "arch": args.arch, "bs": args.bs, "size": 224}
    for name, fmt in FORMATS.items():
        record[name] = timeline(args.arch, args.bs, fmt)
        print(name, {key: value for key, value in record[name].items() if key not in ("cpu", "gpu")}, flush=True)
    args.out.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
