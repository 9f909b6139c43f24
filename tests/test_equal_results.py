"Training in channels last gives the results of training in contiguous format: losses, metrics, gradients, accuracy."

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import Batches
from fastai.callback import schedule  # noqa: F401, for `fit_one_cycle`
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.layers import ConvLayer
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.vision.models.unet import DynamicUnet
from fastai.vision.models.xresnet import xresnet18
from sklearn.datasets import load_digits
from torch import nn

from channelslast.formats import TrainFormat
from channelslast.memory_format import is_channels_last, module_to_memory_format, to_memory_format

EPS = torch.finfo(torch.float32).eps

# A smooth activation: a ReLU whose input is rounded to the other side of zero makes a jump of a rounding error
conv_layer = partial(ConvLayer, act_cls=nn.SiLU)


# The digits


def ink(size):
    "The digits in `size` pixels, 8 or a multiple, from 0 for paper to 1 for ink, in random order, and their classes."
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.images, dtype=torch.float32)[order] / 16
    x = x.repeat_interleave(size // 8, dim=1).repeat_interleave(size // 8, dim=2)
    return x, torch.tensor(digits.target)[order]


def images(size=16):
    x, y = ink(size)
    return torch.stack([x, 1 - x, x.transpose(1, 2)], dim=1), y


def masks():
    "Images, and a class for every pixel: paper, ink of an even digit, ink of an odd one."
    x, y = images()
    return x, torch.where(x[:, 0] > 0.5, 1 + y[:, None, None] % 2, 0)


def volumes():
    "Four slices of a digit, each above another level of ink, and their negative, as two channels."
    x, y = ink(16)
    x = (x[:, None] - torch.arange(4).view(1, 4, 1, 1) / 4).clamp(0, 1)
    return torch.stack([x, 1 - x], dim=1), y


def digits_dls(x, y, n_train, n_valid, bs, device="cpu"):
    x, y = x.to(device), y.to(device)
    train, valid = slice(n_train), slice(n_train, n_train + n_valid)
    return DataLoaders(*(Batches(zip(x[part].split(bs), y[part].split(bs))) for part in (train, valid)), device=device)


# The networks


def classifier(n_features, ndim=2):
    pool = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[ndim]
    return [pool(1), nn.Flatten(), nn.Linear(n_features, 10)]


def new_xresnet():
    return xresnet18(n_out=10, widen=0.25, stem_szs=(8, 8, 64), act_cls=nn.SiLU)


def new_unet():
    encoder = nn.Sequential(conv_layer(3, 8, stride=2), conv_layer(8, 16, stride=2))
    return DynamicUnet(encoder, 3, (16, 16), act_cls=nn.SiLU)


def new_3d_network():
    return nn.Sequential(conv_layer(2, 8, ndim=3), conv_layer(8, 16, stride=2, ndim=3), *classifier(16, ndim=3))


def new_groupnorm_network():
    def block(n_in, n_out, stride):
        return [nn.Conv2d(n_in, n_out, 3, stride, padding=1), nn.GroupNorm(4, n_out), nn.SiLU()]

    return nn.Sequential(*block(3, 16, 1), *block(16, 32, 2), *block(32, 32, 1), *classifier(32))


def new_depthwise_network():
    def block(n_in, n_out, stride):
        return [conv_layer(n_in, n_in, stride=stride, groups=n_in), conv_layer(n_in, n_out, ks=1)]

    return nn.Sequential(conv_layer(3, 16), *block(16, 32, 2), *block(32, 32, 1), *classifier(32))


class Case(NamedTuple):
    new_model: Callable
    new_data: Callable = images
    axis: int = -1  # of the classes in a prediction
    lr: float = 0.1
    rtol: float = 1e-5  # of a loss


# Tolerances of losses. Without a jump in the network the two fits differ by one or two units in the last place
# (1e-7 to 3e-7 here), and 1e-5 leaves room for other CPUs. The max pool of the xresnet does jump, to another pixel
# where two round alike, and batch norm over single pixels enlarges it: 3e-6 in most fits, 1e-4 with a jump.
CASES = {
    "xresnet": Case(new_xresnet, lr=2e-3, rtol=1e-3),
    "U-Net": Case(new_unet, masks, axis=1),
    "3D": Case(new_3d_network, volumes, lr=0.3),
    "GroupNorm": Case(new_groupnorm_network),
    "depthwise": Case(new_depthwise_network),
}
each_network = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


# Float32


class Record(Callback):
    "What a fit did: the loss of every training batch, and the memory format of weights and inputs in every batch."

    order = 100  # sees the inputs as the model receives them

    def __init__(self):
        self.losses = []
        self.channels_last = set()

    def before_batch(self):
        weights = [param for param in self.model.parameters() if param.ndim in (4, 5)]
        self.channels_last.update(map(is_channels_last, (*weights, *self.xb)))

    def after_loss(self):
        if self.training:
            self.losses.append(self.loss.item())


@each_network
def test_float32_fit_gives_the_losses_and_metrics_of_a_contiguous_one(case, new_learner):
    records, values = [], []
    for channels_last in (False, True):
        learn = new_learner(
            case.new_model,
            digits_dls(*case.new_data(), n_train=256, n_valid=64, bs=32),
            loss_func=CrossEntropyLossFlat(axis=case.axis),
            metrics=partial(accuracy, axis=case.axis),
            opt_func=partial(SGD, mom=0.9),
            lr=case.lr,
        )
        learn.to_format(TrainFormat(channels_last))
        record = Record()
        learn.fit(3, cbs=record)
        assert record.channels_last == {channels_last}
        records.append(record)
        values.append(learn.recorder.values)
    contiguous, channels_last = (torch.tensor(record.losses) for record in records)
    assert len(contiguous) == 24 and contiguous[-8:].mean() < 0.99 * contiguous[:8].mean()
    torch.testing.assert_close(channels_last, contiguous, rtol=case.rtol, atol=0)
    contiguous, channels_last = map(torch.tensor, values)
    torch.testing.assert_close(channels_last[:, :2], contiguous[:, :2], rtol=case.rtol, atol=0)
    one_image = 1 / 64
    torch.testing.assert_close(channels_last[:, 2], contiguous[:, 2], rtol=0, atol=one_image)


def gradients(case, x, y, dtype, channels_last):
    "The gradient of every parameter of the model of `case`, always of the same values."
    torch.manual_seed(0)
    model = case.new_model()
    with torch.no_grad():
        for param in model.parameters():  # no weight of zero, as batch norm has, behind which all gradients are
            param += 0.1 * torch.randn_like(param)
    module_to_memory_format(model.to(dtype), channels_last)
    x = to_memory_format(x.to(dtype), channels_last)
    assert is_channels_last(x) is channels_last
    F.cross_entropy(model(x), y).backward()
    for param in model.parameters():
        assert param.ndim not in (4, 5) or is_channels_last(param.grad) is channels_last
    return {name: param.grad.double() for name, param in model.named_parameters()}


def relative_errors(grads, exact):
    return {name: ((grads[name] - grad).norm() / grad.norm()).item() for name, grad in exact.items()}


@each_network
def test_float32_gradients_are_as_close_to_float64_as_contiguous_ones(case):
    contiguous, channels_last = [], []
    inputs, targets = case.new_data()
    for batch in range(3):
        x, y = inputs[batch * 16 :][:16], targets[batch * 16 :][:16]
        x = x + torch.randn_like(x)  # without the equal pixels of paper, between which max pool chooses at random
        exact = gradients(case, x, y, torch.float64, False)
        contiguous.append(relative_errors(gradients(case, x, y, torch.float32, False), exact))
        channels_last.append(relative_errors(gradients(case, x, y, torch.float32, True), exact))
    for name, grad in exact.items():
        # The median: in one batch in thirty two pixels round alike, and max pool chooses the other one (4e-3)
        errors = [torch.tensor([batch[name] for batch in batches]).median() for batches in (contiguous, channels_last)]
        # Scales and biases have the sum over all positions for a gradient, of terms that cancel; the channels last
        # kernels of batch norm add them up one after the other (up to 160 EPS here). Others stay within 9 EPS.
        floor = 512 * EPS if grad.ndim == 1 else 32 * EPS
        assert errors[1] <= 3 * errors[0] + floor, name


# Half precision


def held_out_accuracy(new_learner, fmt, seed=0, device="cpu"):
    "Of a small network after a fit in `fmt` on 1000 digits, on the 797 others, in percent."

    def new_model():
        torch.manual_seed(seed)
        return nn.Sequential(conv_layer(3, 32), conv_layer(32, 64, stride=2), conv_layer(64, 128), *classifier(128))

    dls = digits_dls(*images(size=8), n_train=1000, n_valid=797, bs=50, device=device)
    learn = new_learner(new_model, dls).to_format(fmt)
    dtypes = set()
    learn.model[-1].register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    learn.fit_one_cycle(4, 1e-2)
    assert dtypes == {{None: torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[fmt.amp_mode]}
    assert all(is_channels_last(p) is fmt.channels_last for p in learn.model.parameters() if p.ndim == 4)
    return 100 * learn.recorder.values[-1][-1]


def test_bf16_on_the_cpu_has_the_accuracy_of_float32(bf16_cpu, new_learner):
    float32 = held_out_accuracy(new_learner, TrainFormat())
    assert float32 > 95
    assert held_out_accuracy(new_learner, TrainFormat(True, "bf16")) == pytest.approx(float32, abs=1)


@pytest.mark.cuda
@pytest.mark.parametrize("amp_mode", ["fp16", "bf16"])
def test_half_precision_on_a_gpu_has_the_accuracy_of_float32(amp_mode, new_learner):
    float32 = held_out_accuracy(new_learner, TrainFormat(), device="cuda")
    assert float32 > 95
    half = held_out_accuracy(new_learner, TrainFormat(True, amp_mode), device="cuda")
    assert half == pytest.approx(float32, abs=1)
