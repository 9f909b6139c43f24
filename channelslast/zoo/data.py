"Images to train architectures on: a folder of them, or random ones."

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders
from fastai.data.external import fastai_path
from fastai.data.transforms import get_image_files
from fastai.vision.augment import Resize
from fastai.vision.core import imagenet_stats
from fastai.vision.data import ImageDataLoaders, Normalize
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from channelslast.nested import tensors_in
from channelslast.restore import unchanged_modules
from channelslast.zoo.architectures import input_shape, torchvision_kind
from channelslast.zoo.options import IllegalValue

N_FRAMES = 16  # of a clip for a video model


def digits_folder() -> Path:
    "Return the folder of scikit-learn's digits, `<label>/<number>.png`; write it, among fastai's data sets, if new."
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


def image_folder(
    path: str,  # with a folder for each class, or `train` and `valid` with these
) -> Path:
    "Return the folder `path`; raises `IllegalValue` if there are no images in it."
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise IllegalValue("path", path, "there is no such folder")
    if not get_image_files(folder):
        raise IllegalValue("path", path, "there are no images in it or below")
    return folder


def image_dls(
    folder: Path,
    size: int,  # pixels square, to which the images are resized
    bs: int,  # images in a batch
    device: torch.device,
) -> ImageDataLoaders:
    """Return DataLoaders of the images, with a class for each folder.

    A random fifth validates, unless there are folders `train` and `valid`. Raises `IllegalValue` for images of one
    class, or fewer to train on than `bs`.
    """
    split = {} if (folder / "train").is_dir() and (folder / "valid").is_dir() else {"valid_pct": 0.2, "seed": 42}
    dls = ImageDataLoaders.from_folder(
        folder,
        item_tfms=Resize(size),
        batch_tfms=Normalize.from_stats(*imagenet_stats),
        bs=bs,
        device=device,
        **split,
    )
    if dls.c < 2:
        raise IllegalValue("path", str(folder), "all images are of one class; put each class into a folder of its own")
    if not len(dls.train):
        raise IllegalValue("bs", bs, f"there are {len(dls.train_ds)} images to train on; pass a number up to that")
    return dls


class Batches(list):
    "Batches that are on the device already, which fastai takes for a DataLoader."

    def to(self, device):
        self.device = device


def synthetic_inputs(
    arch: str,
    model: nn.Module,  # of that architecture
    bs: int,  # images in the batch
    size: int,  # pixels square
    device: torch.device,
) -> tuple:
    """Return random images as the architecture takes them.

    A batch (bs, C, size, size); of clips (bs, 3, 16, size, size) for video; two batches for optical flow; for detection
    a list of images and a list of targets.
    """
    kind = torchvision_kind(arch)
    if kind == "video":
        return (torch.randn(bs, 3, N_FRAMES, size, size, device=device),)
    if kind == "optical_flow":
        return tuple(torch.randn(2, bs, 3, size, size, device=device))
    if kind == "detection":
        target = {
            "boxes": torch.tensor([[0.1, 0.1, 0.6, 0.7]], device=device) * size,
            "labels": torch.ones(1, dtype=torch.long, device=device),
            "masks": torch.ones(1, size, size, dtype=torch.uint8, device=device),
            "keypoints": torch.ones(1, 17, 3, device=device) * 0.3 * size,
        }
        return list(torch.rand(bs, 3, size, size, device=device)), [target] * bs
    return (torch.randn(bs, input_shape(model)[0], size, size, device=device),)


def synthetic_dls(
    arch: str,
    model: nn.Module,  # of that architecture, on `device`
    bs: int,  # images in a batch
    size: int,  # pixels square
    device: torch.device,
    n: int = 4,  # batches
) -> DataLoaders:
    """Return DataLoaders of `n` random batches as the architecture takes them, with targets for `synthetic_loss`.

    Runs `model` once, for the shape of its output, and leaves it as it was.
    """
    batches = Batches()
    for _ in range(n):
        inputs = synthetic_inputs(arch, model, bs, size, device)
        if not batches:  # the shape of the output, of two images, for BatchNorm takes no single one
            with torch.no_grad(), unchanged_modules(model):
                output = model(*synthetic_inputs(arch, model, 2, size, device))
        target = torch.zeros(bs, device=device)
        if isinstance(output, Tensor):  # a class for each image, or for each pixel
            target = torch.randint(0, output.shape[1], (bs, *output.shape[2:]), device=device)
        batches.append((*inputs, target))
    return DataLoaders(batches, Batches(batches[:1]), device=device)


def synthetic_loss(
    output: Any,  # of the model
    target: Tensor,
) -> Tensor:
    "Return the cross-entropy of a tensor; of other outputs, which have no task here, the mean of all that is in them."
    if isinstance(output, Tensor):
        return F.cross_entropy(output, target)
    return sum(tensor.float().mean() for tensor in tensors_in(output))
