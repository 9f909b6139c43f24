"""Train an image classifier with fastai in channels last format.

    python nbs/examples/train.py
    python nbs/examples/train.py --path ~/images --arch resnet50 --size 224 --fastest
    accelerate launch --num_processes 2 nbs/examples/train.py

Without `--path` it trains on scikit-learn's digits: 1,797 real scans of 8x8 pixels, which need no download.
"""

import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import torch
import torch.distributed as dist
from fastai.callback import progress, schedule  # noqa: F401, the progress bar and `fit_one_cycle`
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import num_distrib, rank_distrib, set_seed

from channelslast.devices import training_device
from channelslast.formats import TrainFormat
from channelslast.zoo import (
    IllegalValue,
    add_format_options,
    check_positive,
    choose_amp_mode,
    digits_folder,
    find_device,
    image_dls,
    image_folder,
    new_model,
)


def prepare(path: str | None) -> Path:
    "The folder of images, in distributed training prepared by the first process, which also gives each its GPU."
    if num_distrib() <= 1:
        return images_in(path)
    from fastai.distributed import rank0_first  # cannot be imported without Accelerate

    return rank0_first(images_in, path)


def say(line: str) -> None:
    if not rank_distrib():
        print(line)


def images_in(path: str | None) -> Path:
    if path is None:
        return digits_folder()
    return image_folder(path)


class Throughput(Callback):
    "Images per second of the training steps: forward, loss, backward and step, the first one left out."

    order, run_valid = 100, False

    def before_fit(self):
        self.images, self.steps = 0, []

    def before_batch(self):
        self.started = self.now()

    def after_batch(self):
        self.steps.append((self.started, self.now()))
        if len(self.steps) > 1:
            self.images += len(self.xb[0])

    def now(self) -> float | torch.cuda.Event:
        if training_device(self.learn).type == "cuda":
            return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
        return time.perf_counter()

    def images_per_second(self) -> float | None:
        if isinstance(self.started, float):
            seconds = sum(ended - started for started, ended in self.steps[1:])
        else:
            torch.cuda.synchronize()
            seconds = sum(started.elapsed_time(ended) for started, ended in self.steps[1:]) / 1000
        return max(1, num_distrib()) * self.images / seconds if seconds else None


def new_learner(
    path: str | None,
    arch: str,
    size: int,
    bs: int,
    amp_mode: str,
    contiguous: bool,
    device: str | None,
) -> Learner:
    "The Learner in its format, before it is trained. Raises `IllegalValue` for what cannot be."
    folder = prepare(path)
    torch_device = find_device(device)
    fmt = TrainFormat(channels_last=not contiguous, amp_mode=choose_amp_mode(amp_mode, torch_device))
    set_seed(42)
    dls = image_dls(folder, size, bs, torch_device)
    say(f"{arch} on {len(dls.train_ds):,} images of {size} px from {folder}")
    learn = Learner(dls, new_model(arch, dls.c, kind="classification"), metrics=accuracy, cbs=Throughput())
    try:
        return learn.to_format(fmt)
    except ValueError as error:
        raise IllegalValue("amp_mode", amp_mode, str(error)) from None


def main(
    path: str | None = None,  # folder of images, one subfolder a class; default: scikit-learn's digits
    arch: str = "xresnet18",  # name of a fastai, torchvision or timm model
    size: int = 32,  # images are resized to this many pixels square
    bs: int = 64,  # images in a batch, of each process
    epochs: int = 5,  # passes over the images
    lr: float = 3e-3,  # highest learning rate of the one-cycle schedule
    amp_mode: str = "auto",  # auto, fp16, bf16 or fp32; auto: what the device is fastest at
    contiguous: bool = False,  # train in contiguous format, to compare
    fastest: bool = False,  # search for the fastest format first; in the precision of `amp_mode`, if that is not auto
    local_bn: bool = False,  # on several GPUs, normalize the images of each alone, without SyncBatchNorm
    device: str | None = None,  # cpu, cuda, cuda:1, mps, ...; default: fastai's choice
):
    "Train an image classifier with fastai in channels last format, on every GPU that `accelerate launch` gives it."
    try:
        check_positive(size=size, bs=bs, epochs=epochs, lr=lr)
        if fastest and num_distrib() > 1:
            raise IllegalValue("fastest", "", "search in one process, then pass what it finds")
        learn = new_learner(path, arch, size, bs, amp_mode, contiguous, device)
    except IllegalValue as error:
        print(f"train.py: error: --{error.name} {error.value}: {error.why}", file=sys.stderr)
        raise SystemExit(2) from None
    if fastest:
        learn.to_fastest(keep_precision=amp_mode != "auto", show_plot=False)
        say(f"fastest: {learn.train_format.code}")
    device_type = training_device(learn).type
    if num_distrib() > 1:
        say(f"format: {learn.train_format} on {num_distrib()} x {device_type}")
        with learn.distrib_ctx(sync_bn=not local_bn and device_type == "cuda"):
            learn.fit_one_cycle(epochs, lr)
    else:
        say(f"format: {learn.train_format} on {training_device(learn)}")
        learn.fit_one_cycle(epochs, lr)
    say(f"accuracy: {learn.recorder.values[-1][2]:.4f}")
    speed = learn.throughput.images_per_second()
    say(f"training steps: {speed:,.0f} images/s" if speed else "training steps: too few to time")
    if num_distrib() > 1:
        dist.destroy_process_group()


def parse_options() -> dict:
    parser = ArgumentParser(description=main.__doc__)
    parser.add_argument("--path", help="folder of images, one subfolder a class; default: scikit-learn's digits")
    parser.add_argument("--arch", default="xresnet18", help="name of a fastai, torchvision or timm model")
    parser.add_argument("--size", type=int, default=32, help="images are resized to this many pixels square")
    parser.add_argument("--bs", type=int, default=64, help="images in a batch, of each process")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the images")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate of the one-cycle schedule")
    add_format_options(parser)
    parser.add_argument(
        "--local-bn",
        "--local_bn",
        action="store_true",
        help="normalize the images of each GPU alone, not SyncBatchNorm",
    )
    return vars(parser.parse_args())


if __name__ == "__main__":
    main(**parse_options())
