"""Train the digits with and without CUDA graph and fused steps, from several seeds, and compare accuracies.

python nbs/benchmarks/accuracy.py --out h200_accuracy.json
"""

import argparse
import json
import shlex
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import fit_one_cycle  # noqa: F401, a method of Learner
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed

from channelslast import TrainFormat
from channelslast.cli.record import made_with
from channelslast.zoo import digits_folder, image_dls, new_model


def train(seed: int, fmt: TrainFormat, device: torch.device, epochs: int) -> dict:
    set_seed(seed)
    dls = image_dls(digits_folder(), 32, 64, device)
    learn = Learner(dls, new_model("xresnet18", dls.c), metrics=accuracy).to_format(fmt)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *args: None
    learn.fit_one_cycle(epochs, 3e-3)
    _, valid_loss, correct, *_ = learn.recorder.values[-1]
    return {"seed": seed, "format": str(fmt), "accuracy": round(correct, 4), "valid_loss": round(float(valid_loss), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--amp-mode", default="fp16", help="fp16, bf16 or fp32")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="write the record to this file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device(args.device)
    eager = TrainFormat(True, args.amp_mode)
    other = replace(eager, cuda_graph=device.type == "cuda", fused_optimizer=True)
    rows = []
    for seed in args.seeds:
        for fmt in (eager, other):
            rows.append(train(seed, fmt, device, args.epochs))
            print(rows[-1], flush=True)
    command = shlex.join(["python", "nbs/benchmarks/accuracy.py", *sys.argv[1:]])
    if args.out:
        args.out.write_text(json.dumps({**made_with(command, device), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
