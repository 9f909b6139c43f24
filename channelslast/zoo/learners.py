"Learners of the architectures, and what they are compared with."

from collections.abc import Callable
from functools import partial

import torch
from fastai.callback import progress  # noqa: F401, the progress bar
from fastai.learner import Learner
from fastai.optimizer import Adam, OptimWrapper

from channelslast.callback import FastaiChannelsLast
from channelslast.find.candidates import Candidate
from channelslast.formats import TrainFormat
from channelslast.precision import FastaiMixedPrecision
from channelslast.zoo.architectures import DEFAULT_SIZE, default_size, new_model
from channelslast.zoo.data import image_dls, image_folder, synthetic_dls, synthetic_loss


def new_learner(
    arch: str,  # name of a fastai, torchvision or timm architecture
    bs: int,  # images in a batch
    size: int | None,  # pixels square; None: `default_size`
    device: torch.device,
    opt_func: Callable = Adam,
    path: str | None = None,  # folder of images; None: random ones
) -> Learner:
    "Return a Learner of `arch` with fresh weights, in contiguous float32; raises `IllegalValue` as its parts do."
    if path is not None:
        dls = image_dls(image_folder(path), size or DEFAULT_SIZE, bs, device)
        return Learner(dls, new_model(arch, dls.c, kind="classification"), opt_func=opt_func)
    model = new_model(arch, size=size or DEFAULT_SIZE).to(device)
    dls = synthetic_dls(arch, model, bs, size or default_size(arch, model), device)
    return Learner(dls, model, synthetic_loss, opt_func=opt_func)


def fused_adamw(params, **kwargs):
    "PyTorch's AdamW in one kernel."
    return OptimWrapper(params, partial(torch.optim.AdamW, fused=True), **kwargs)


OPTIMIZERS = {"adam": Adam, "fused": fused_adamw}


def to_fastai_channelslast(
    learn: Learner,  # without mixed precision
    amp_mode: str = "fp16",
) -> Learner:
    "Do what fastai's own `to_channelslast`, which this package replaces, would; return `learn`."
    return learn.add_cbs([FastaiChannelsLast(), FastaiMixedPrecision(amp_mode)])


def fastais_own(
    amp_mode: str = "fp16",
) -> Candidate:
    "Return fastai's own `to_channelslast` for a search to time beside its candidates."
    prepare = partial(to_fastai_channelslast, amp_mode=amp_mode)
    return Candidate(TrainFormat(True, amp_mode), prepare, is_choice=False)
