"""Train fastai's U-Net in channels last format, on shapes that it draws.

    python nbs/examples/segment.py
    python nbs/examples/segment.py --arch resnet34 --size 224 --bs 8 --fastest

An image is a noisy background with a disc, a square and a triangle; the model tells which pixel belongs to what.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Callable

import numpy as np
import torch
import torchvision
from fastai.callback import progress, schedule  # noqa: F401, the progress bar and `fit_one_cycle`
from fastai.data.block import DataBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import RandomSplitter
from fastai.learner import Learner
from fastai.metrics import foreground_acc
from fastai.torch_core import set_seed
from fastai.vision.data import ImageBlock, MaskBlock
from fastai.vision.learner import unet_learner
from PIL import Image, ImageDraw

from channelslast.devices import training_device
from channelslast.formats import TrainFormat
from channelslast.zoo import IllegalValue, add_format_options, check_positive, choose_amp_mode, find_device

CODES = ["background", "disc", "square", "triangle"]
ENCODERS = ("resnet18", "resnet34", "resnet50")


def draw(
    number: int,  # of the image, which is another for each
    size: int,  # pixels square
) -> tuple[np.ndarray, np.ndarray]:
    "Return an image (size, size, 3) and its mask (size, size), which holds the index in `CODES` of each pixel."
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 128, (size, size, 3), dtype=np.uint8))
    mask = Image.new("L", (size, size))
    for code in rng.permutation([1, 2, 3]):
        r = int(rng.integers(size // 10, size // 4))
        x, y = (int(value) for value in rng.integers(r, size - r, 2))
        colour = tuple(int(value) for value in rng.integers(100, 256, 3))
        for picture, fill in ((image, colour), (mask, int(code))):
            pen = ImageDraw.Draw(picture)
            if CODES[code] == "disc":
                pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
            elif CODES[code] == "square":
                pen.rectangle((x - r, y - r, x + r, y + r), fill=fill)
            else:
                pen.polygon(((x - r, y + r), (x + r, y + r), (x, y - r)), fill=fill)
    return np.array(image), np.array(mask)


def shapes_dls(
    n: int,  # images, of which a fifth validates
    size: int,  # pixels square
    bs: int,  # images in a batch
    device: torch.device,
) -> DataLoaders:
    "Return DataLoaders of drawn images and their masks."

    def part(index: int) -> Callable[[int], np.ndarray]:
        return lambda number: draw(number, size)[index]

    block = DataBlock(
        blocks=(ImageBlock, MaskBlock(codes=CODES)),
        get_x=part(0),
        get_y=part(1),
        splitter=RandomSplitter(seed=42),
    )
    return block.dataloaders(range(n), bs=bs, device=device, num_workers=0)


def new_learner(
    arch: str,
    n: int,
    size: int,
    bs: int,
    amp_mode: str,
    contiguous: bool,
    device: str | None,
) -> Learner:
    "The Learner in its format, before it is trained. Raises `IllegalValue` for what cannot be."
    if arch not in ENCODERS:
        raise IllegalValue("arch", arch, f"pass one of {', '.join(ENCODERS)}")
    torch_device = find_device(device)
    fmt = TrainFormat(channels_last=not contiguous, amp_mode=choose_amp_mode(amp_mode, torch_device))
    set_seed(42)
    dls = shapes_dls(n, size, bs, torch_device)
    if not len(dls.train):
        raise IllegalValue("bs", bs, f"there are {len(dls.train_ds)} images to train on; pass a number up to that")
    learn = unet_learner(dls, getattr(torchvision.models, arch), pretrained=False, metrics=foreground_acc)
    try:
        return learn.to_format(fmt)
    except ValueError as error:
        raise IllegalValue("amp_mode", amp_mode, str(error)) from None


def main(
    arch: str = "resnet18",  # the encoder, one of `ENCODERS`
    n: int = 200,  # images to draw
    size: int = 64,  # pixels square
    bs: int = 8,  # images in a batch
    epochs: int = 5,  # passes over the images
    lr: float = 1e-3,  # highest learning rate of the one-cycle schedule
    amp_mode: str = "auto",  # auto, fp16, bf16 or fp32; auto: what the device is fastest at
    contiguous: bool = False,  # train in contiguous format, to compare
    fastest: bool = False,  # search for the fastest format first; in the precision of `amp_mode`, if that is not auto
    device: str | None = None,  # cpu, cuda, cuda:1, mps, ...; default: fastai's choice
):
    "Train fastai's U-Net in channels last format, on shapes that it draws."
    try:
        check_positive(n=n, size=size, bs=bs, epochs=epochs, lr=lr)
        learn = new_learner(arch, n, size, bs, amp_mode, contiguous, device)
    except IllegalValue as error:
        print(f"segment.py: error: --{error.name} {error.value}: {error.why}", file=sys.stderr)
        raise SystemExit(2) from None
    if fastest:
        learn.to_fastest(keep_precision=amp_mode != "auto", show_plot=False)
        print(f"fastest: {learn.train_format.code}")
    print(f"format: {learn.train_format} on {training_device(learn)}")
    learn.fit_one_cycle(epochs, lr)
    print(f"accuracy of the shapes' pixels: {learn.recorder.values[-1][2]:.4f}")


def parse_options() -> dict:
    parser = ArgumentParser(description=main.__doc__)
    parser.add_argument("--arch", default="resnet18", help=f"the encoder: {', '.join(ENCODERS)}")
    parser.add_argument("--n", type=int, default=200, help="images to draw")
    parser.add_argument("--size", type=int, default=64, help="pixels square")
    parser.add_argument("--bs", type=int, default=8, help="images in a batch")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the images")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate of the one-cycle schedule")
    add_format_options(parser)
    return vars(parser.parse_args())


if __name__ == "__main__":
    main(**parse_options())
