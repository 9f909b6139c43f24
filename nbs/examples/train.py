"""Train an image classifier with fastai in channels last format.

    python nbs/examples/train.py
    python nbs/examples/train.py --path ~/images --arch resnet50 --size 224
    accelerate launch --num_processes 2 nbs/examples/train.py

Without `--path` it trains on scikit-learn's digits: 1,797 real scans of 8x8 pixels, which need no download.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from fastai.callback import progress, schedule  # noqa: F401, the progress bar and `fit_one_cycle`
from fastai.callback.core import Callback
from fastai.data.external import fastai_path
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import num_distrib, rank_distrib, set_seed
from fastcore.script import call_parse
from PIL import Image
from sklearn.datasets import load_digits

from channelslast.callback import TrainFormat
from channelslast.cli import fail, image_folder, new_dls, new_model, spell_options, to_amp_mode, to_device
from channelslast.precision import training_device


def digits_folder() -> Path:
    "scikit-learn's digits as an image folder, `digits/<label>/<number>.png`, written once among fastai's data sets."
    folder = fastai_path("data") / "digits"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
        digits = load_digits()
        for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            file = unfinished / str(label) / f"{number}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray((image * 255 / 16).astype("uint8")).save(file)
        try:
            unfinished.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(unfinished)
    return folder


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


def main(
    path: str = None,  # folder of images, one subfolder a class; default: scikit-learn's digits
    arch: str = "xresnet18",  # name of a fastai, torchvision or timm model
    size: int = 32,  # images are resized to this many pixels square
    bs: int = 64,  # images in a batch, of each process
    epochs: int = 5,  # passes over the images
    lr: float = 3e-3,  # highest learning rate of the one-cycle schedule
    amp_mode: str = "auto",  # auto, fp16, bf16 or none; auto: what the device is fastest at
    contiguous: bool = False,  # train in contiguous format, to compare
    local_bn: bool = False,  # on several GPUs, normalize the images of each alone, without SyncBatchNorm
    device: str = None,  # cpu, cuda, cuda:1, mps, ...; default: fastai's choice
):
    "Train an image classifier with fastai in channels last format, on every GPU that `accelerate launch` gives it."
    for name, value in dict(size=size, bs=bs, epochs=epochs, lr=lr).items():
        if not value > 0:
            fail(f"--{name} {value}: pass a number above 0")
    folder = prepare(path)
    torch_device = to_device(device)
    mode = to_amp_mode(amp_mode, torch_device)
    set_seed(42)
    dls = new_dls(folder, size, bs, torch_device)
    throughput = Throughput()
    learn = Learner(dls, new_model(arch, dls.c, kind="classification"), metrics=accuracy, cbs=throughput)
    try:
        learn.to_format(TrainFormat(channels_last=not contiguous, amp_mode=mode))
    except ValueError as error:
        fail(str(error))
    say(f"{arch} on {len(dls.train_ds):,} images of {size} px from {folder}")
    if num_distrib() > 1:
        say(f"format: {learn.train_format} on {num_distrib()} x {torch_device.type}")
        with learn.distrib_ctx(sync_bn=not local_bn and torch_device.type == "cuda"):
            learn.fit_one_cycle(epochs, lr)
    else:
        say(f"format: {learn.train_format} on {torch_device}")
        learn.fit_one_cycle(epochs, lr)
    say(f"accuracy: {learn.recorder.values[-1][2]:.4f}")
    speed = throughput.images_per_second()
    say(f"training steps: {speed:,.0f} images/s" if speed else "training steps: too few to time")
    if num_distrib() > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.argv[1:] = spell_options(sys.argv[1:], main)
    call_parse(main)
