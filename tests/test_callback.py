"ChannelsLast on a Learner: what is converted, when, how it is undone, and what leaves the Learner."

import copy
import inspect
import pickle
import traceback
import warnings
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from conftest import TinyNet, TinyVideoNet, new_dls, wrapped_adamw
from fastai.callback import schedule  # noqa: F401, for `fine_tune`
from fastai.callback.core import Callback
from fastai.callback.fp16 import ModelToHalf, NonNativeMixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.data.block import CategoryBlock, DataBlock
from fastai.distributed import DistributedTrainer
from fastai.learner import CastToTensor, Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, Adam, ranger
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from torch import nn
from torch.amp import GradScaler

from channelslast import callback, devices, formats, memory_format, precision
from channelslast.callback import ChannelsLast, FastaiChannelsLast
from channelslast.devices import AMPMode
from channelslast.formats import TrainFormat, to_train_format
from channelslast.memory_format import is_channels_last
from channelslast.precision import FastaiMixedPrecision, MixedPrecision


def all_channels_last(tensors):
    return all(is_channels_last(tensor) for tensor in tensors if tensor.ndim in (4, 5))


def optimizer_state(opt):
    "Every tensor that `opt` keeps for a parameter, with the parameter."
    while hasattr(opt, "opt"):
        opt = opt.opt
    for param, state in opt.state.items():
        for value in state.values():
            if torch.is_tensor(value) and value.shape == param.shape:
                yield param, value


def assert_format(learn, channels_last):
    "Model, gradients and optimizer state of `learn` are in one format."
    for tensor in (*learn.model.parameters(), *learn.model.buffers()):
        if tensor.ndim in (4, 5):
            assert is_channels_last(tensor) is channels_last, tensor.shape
        if tensor.grad is not None:
            assert tensor.grad.stride() == tensor.stride()
    if learn.opt is not None:
        for param, value in optimizer_state(learn.opt):
            assert value.stride() == param.stride()


def count(learn, cls):
    return sum(isinstance(cb, cls) for cb in learn.cbs)


class InputFormats(Callback):
    "Records which of the model's inputs are channels last, as the model receives them."

    order = 100

    def before_batch(self):
        self.formats = [is_channels_last(x) for x in self.xb]


# TrainFormat


@pytest.mark.parametrize(
    "fmt, text",
    [
        (TrainFormat(), "contiguous fp32"),
        (TrainFormat(True, "fp16"), "channels last fp16"),
        (TrainFormat(True, "bf16", "default"), "channels last bf16 compiled"),
        (TrainFormat(False, None, "reduce-overhead"), "contiguous fp32 compiled (reduce-overhead)"),
    ],
)
def test_train_format_reads_well_and_gives_its_code(fmt, text, learn):
    assert str(fmt) == text
    assert fmt.code == f'learn.to_format("{text}")'
    assert formats.to_train_format(text.upper()) == fmt


def test_train_format_is_a_value():
    assert len({TrainFormat(True), TrainFormat(True), TrainFormat()}) == 2
    with pytest.raises(FrozenInstanceError):
        TrainFormat().channels_last = True


def test_train_format_takes_an_amp_mode_as_fastai_names_it():
    assert TrainFormat(True, AMPMode.BF16) == TrainFormat(True, "bf16")


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"channels_last": 1}, "channels_last=1: pass True or False"),
        ({"amp_mode": "fp8"}, "amp_mode='fp8'.*'fp16', 'bf16'"),
        ({"compile": "fast"}, "compile='fast'.*'default', 'reduce-overhead'"),
    ],
)
def test_train_format_that_does_not_exist_is_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        TrainFormat(**wrong)


# What is converted


@pytest.mark.parametrize("opt_func", [Adam, SGD, ranger, wrapped_adamw])
def test_model_gradients_and_optimizer_state_follow_there_and_back(new_learner, opt_func):
    learn = new_learner(opt_func=opt_func)
    learn.fit(1)
    params = list(learn.model.parameters())
    learn.to_channelslast(use_amp=False).fit(1)
    assert_format(learn, True)
    assert any(is_channels_last(value) for _, value in optimizer_state(learn.opt)) or opt_func is SGD
    learn.model[0].weight.grad = torch.randn_like(learn.model[0].weight)
    learn.to_contiguous()
    assert_format(learn, False)
    assert all(a is b for a, b in zip(params, learn.model.parameters()))
    learn.fit(1)
    assert_format(learn, False)


@pytest.mark.parametrize("opt_func", [Adam, wrapped_adamw])
def test_optimizer_state_loaded_between_epochs_follows(new_learner, opt_func, tmp_path):
    learn = new_learner(opt_func=opt_func, path=tmp_path).to_channelslast(use_amp=False)
    learn.fit(1)
    learn.save("mid")
    load = Callback(after_epoch=lambda cb: cb.epoch == 0 and cb.learn.load("mid"))
    learn.fit(2, cbs=[load, Callback(after_backward=lambda cb: assert_format(cb.learn, True))])
    assert_format(learn, True)


def test_model_that_gets_its_shapes_in_the_first_batch_follows(new_learner):
    def lazy():
        return nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(3))

    learn = new_learner(lazy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn.to_channelslast(use_amp=False).fit(1)
    assert all_channels_last(learn.model.parameters())
    assert_format(learn, True)


def test_lookahead_weights_follow(new_learner):
    learn = new_learner(opt_func=ranger)
    learn.fit(1)
    learn.to_channelslast(use_amp=False).fit(1)
    assert all_channels_last(weight for weights in learn.opt.slow_weights for weight in weights)


def test_gradients_from_before_the_fit_follow(new_learner):
    learn = new_learner()
    for param in learn.model.parameters():
        param.grad = torch.randn_like(param)
    learn.create_opt()
    learn.to_channelslast(use_amp=False)
    learn("before_fit")
    assert_format(learn, True)
    assert all_channels_last(param.grad for param in learn.model.parameters())


@pytest.mark.parametrize("opt_func", [Adam, wrapped_adamw])
def test_loaded_optimizer_state_follows(new_learner, opt_func, tmp_path):
    learn = new_learner(opt_func=opt_func, path=tmp_path).to_channelslast(use_amp=False)
    learn.fit(1)
    learn.save("with_opt")
    learn.load("with_opt")
    assert all_channels_last(learn.model.parameters())
    learn.fit(1)
    assert_format(learn, True)


def body_and_head(model):
    return [
        [param for layer in layers for param in layer.parameters()] for layers in (list(model)[:5], list(model)[5:])
    ]


def random_image(i):
    return PILImage.create(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "call",
    [
        lambda learn: learn.fit(1),
        lambda learn: learn.validate(),
        lambda learn: learn.get_preds(),
        lambda learn: learn.predict(random_image(0)),
        lambda learn: learn.tta(n=1),
        lambda learn: learn.fine_tune(1),
    ],
    ids=["fit", "validate", "get_preds", "predict", "tta", "fine_tune"],
)
def test_every_entry_into_the_loop_converts(new_learner, call):
    blocks = DataBlock((ImageBlock, CategoryBlock), get_x=random_image, get_y=lambda i: "abc"[i % 3])
    dls = blocks.dataloaders(range(24), bs=4, num_workers=0, device=torch.device("cpu"))
    spy = InputFormats()
    learn = new_learner(dls=dls, splitter=body_and_head, cbs=[ChannelsLast, spy])
    with learn.no_mbar():
        call(learn)
    assert_format(learn, True)
    assert spy.formats == [True]


def tied():
    "A model of two convolutions with one weight."
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model[1].weight = model[0].weight
    return model


def test_tied_weights_stay_tied(new_learner):
    learn = new_learner(tied, cbs=ChannelsLast())
    learn.fit(1)
    assert learn.model[0].weight is learn.model[1].weight and is_channels_last(learn.model[0].weight)


def test_3d_model_goes_to_channels_last_3d(new_learner):
    spy = InputFormats()
    learn = new_learner(TinyVideoNet, new_dls(2, 4, 8, 8), cbs=[ChannelsLast(), spy])
    learn.fit(1)
    assert learn.model[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert_format(learn, True)
    assert spy.formats == [True]


class TwoRanks(nn.Module):
    "An image, a volume and a vector into one head."

    def __init__(self):
        super().__init__()
        self.image, self.volume = TinyNet(), TinyVideoNet()
        self.vector = nn.Linear(4, 3)

    def forward(self, image, volume, vector):
        return self.image(image) + self.volume(volume) + self.vector(vector)


def test_both_ranks_in_one_model(new_learner):
    spy = InputFormats()
    batch = torch.randn(8, 3, 8, 8), torch.randn(8, 2, 4, 8, 8), torch.randn(8, 4), torch.randint(0, 3, (8,))
    dls = new_dls(3)
    dls.train[:] = dls.valid[:] = [batch]
    dls.n_inp = 3
    new_learner(TwoRanks, dls, cbs=[ChannelsLast(), spy]).fit(1)
    assert spy.formats == [True, True, False]


class ClipNet(nn.Module):
    "Frame by frame through a 2D network."

    def __init__(self):
        super().__init__()
        self.frames = TinyNet()

    def forward(self, clip):
        return self.frames(clip.flatten(0, 1)).unflatten(0, clip.shape[:2]).mean(1)


def test_clip_on_its_way_into_a_2d_network_stays_as_it_is(new_learner):
    spy = InputFormats()
    learn = new_learner(ClipNet, new_dls(4, 3, 8, 8), cbs=[ChannelsLast(), spy])
    learn.fit(1)
    assert all_channels_last(learn.model.parameters())
    assert spy.formats == [False]


def test_image_on_its_way_into_a_network_without_convolutions_stays_as_it_is(new_learner):
    class Position(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Flatten(), nn.Linear(192, 3))
            self.position = nn.Parameter(torch.randn(1, 3, 8, 8))

    spy = InputFormats()
    new_learner(Position, cbs=[ChannelsLast(), spy]).fit(1)
    assert spy.formats == [False]


@pytest.mark.parametrize("mix", [MixUp, CutMix])
def test_inputs_that_a_callback_makes_are_converted(new_learner, mix):
    spy = InputFormats()
    new_learner(cbs=[mix(), ChannelsLast(), spy]).fit(1)
    assert spy.formats == [True]


def test_converts_after_the_callbacks_that_make_a_batch_and_before_the_model_is_wrapped(new_learner):
    class NewBatch(Callback):
        order = CastToTensor.order

        def before_batch(self):
            self.learn.xb = tuple(x.contiguous() for x in self.xb)

    class Wrap(Callback):
        order = DistributedTrainer.order

        def before_fit(self):
            self.wrapped = all_channels_last(self.model.parameters())

    wrap, spy = Wrap(), InputFormats()
    new_learner(cbs=[wrap, NewBatch(), ChannelsLast(), spy]).fit(1)
    assert wrap.wrapped and spy.formats == [True]


def test_nested_inputs_are_converted(new_learner):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = TinyNet()

        def forward(self, batch):
            self.formats = [is_channels_last(batch["image"]), is_channels_last(batch["more"][0])]
            return self.net(batch["image"])

    dls = new_dls(3, 8, 8)
    dls.train[:] = dls.valid[:] = [({"image": x, "more": [x]}, y) for x, y in dls.train]
    learn = new_learner(Nested, dls, cbs=ChannelsLast())
    learn.fit(1)
    assert learn.model.formats == [True, True]


class ContiguousGradient(torch.autograd.Function):
    "As some kernels make the gradient of a 1x1 convolution."

    @staticmethod
    def forward(ctx, weight):
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty(grad.shape).copy_(grad)


class OneByOne(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 4, 1)

    def forward(self, x):
        return self._conv_forward(x, ContiguousGradient.apply(self.weight), self.bias)


@pytest.mark.parametrize("n_processes", [0, 1, 2])  # 0: fastai's number where nothing is distributed
def test_gradients_have_the_strides_of_their_weights_in_distributed_training(new_learner, monkeypatch, n_processes):
    "Without, PyTorch warns: Grad strides do not match bucket view strides."
    monkeypatch.setattr(callback, "num_distrib", lambda: n_processes)
    strides = []

    def model():
        frozen = nn.Conv2d(4, 4, 1).requires_grad_(False)
        return nn.Sequential(OneByOne(), frozen, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    learn = new_learner(model, cbs=ChannelsLast())
    weight = learn.model[0].weight
    learn.fit(1, cbs=Callback(after_backward=lambda cb: strides.append(weight.grad.stride())))
    assert weight.stride() == (3, 1, 3, 3)
    assert set(strides) == ({(3, 1, 3, 3)} if n_processes > 1 else {(3, 1, 1, 1)})
    assert not weight._backward_hooks
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=Callback(after_pred=interrupt))
    assert not weight._backward_hooks and learn.channels_last.hooks == []
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=Callback(after_epoch=interrupt))
    assert len(weight._backward_hooks or ()) == (n_processes > 1)
    learn.fit(1)
    assert not weight._backward_hooks
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=Callback(after_epoch=interrupt))
    learn.to_contiguous()
    assert not weight._backward_hooks


def test_gradient_that_lies_otherwise_in_memory_stays():
    grad = torch.randn(4, 3, 2, 1)
    stride = grad.to(memory_format=torch.channels_last).stride()
    assert callback._as_in(stride, grad) is grad and callback._as_in(grad.stride(), grad) is grad


def interrupt(cb):
    raise KeyboardInterrupt


# Models and devices for which there is nothing to do


@pytest.mark.parametrize("with_amp", [False, True])
def test_model_without_4d_weights_warns_once_and_trains_bit_for_bit(tabular_learner, bf16_cpu, with_amp):
    plain, ours = tabular_learner(), tabular_learner()
    if with_amp:
        plain.to_bf16()
    plain.fit(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours.to_channelslast(use_amp=with_amp, amp_mode="bf16")
        ours.fit(2)
        losses = list(ours.recorder.losses)
        ours.validate()
    assert len([w for w in caught if "no 4D or 5D weights" in str(w.message)]) == 1
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), ours.model.parameters()))
    assert plain.recorder.losses == losses


def test_unreliable_device_trains_in_contiguous_format_with_one_warning(new_learner, monkeypatch):
    spy = InputFormats()
    learn = new_learner(cbs=spy).to_channelslast(use_amp=False)
    learn.fit(1)
    monkeypatch.setattr(memory_format, "UNRELIABLE_DEVICES", {"cpu"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learn.fit(1)
        learn.fit(1)
    assert len([w for w in caught if "not reliable on the device 'cpu'" in str(w.message)]) == 1
    assert_format(learn, False)
    assert spy.formats == [False]
    assert learn.train_format == TrainFormat(False)


# The two methods


def test_every_call_returns_the_learner_and_calling_twice_changes_nothing(learn, bf16_cpu):
    for _ in range(2):
        assert learn.to_channelslast(amp_mode="bf16") is learn
        cbs = list(learn.cbs)
        assert learn.to_channelslast(amp_mode="bf16") is learn
        assert all(a is b for a, b in zip(cbs, learn.cbs, strict=True))
        assert learn.to_contiguous() is learn and learn.to_contiguous() is learn
        assert learn.to_contiguous(to_fp32=True) is learn and learn.to_contiguous(to_fp32=True) is learn


def test_another_precision_replaces_the_precision(learn, bf16_cpu):
    learn.to_channelslast(amp_mode="fp16")
    learn.to_channelslast(amp_mode=AMPMode.BF16)
    assert learn.mixed_precision.amp_mode is AMPMode.BF16 and count(learn, FastaiMixedPrecision) == 1
    learn.to_channelslast(use_amp=False)
    assert count(learn, FastaiMixedPrecision) == 0 and count(learn, ChannelsLast) == 1


def test_same_precision_keeps_its_options_unless_others_are_given(learn, fp16_cpu):
    learn.to_channelslast(init_scale=16.0).to_channelslast()
    assert learn.mixed_precision.kwargs == {"init_scale": 16.0}
    learn.to_channelslast(growth_interval=7)
    assert learn.mixed_precision.kwargs == {"growth_interval": 7}


HELD_BEFORE = {
    "nothing": lambda learn: learn,
    "fastai's ChannelsLast": lambda learn: learn.add_cb(FastaiChannelsLast()),
    "fastai's MixedPrecision": lambda learn: learn.add_cb(FastaiMixedPrecision()),
    "both of fastai's": lambda learn: learn.add_cbs([FastaiChannelsLast(), FastaiMixedPrecision()]),
    "both of fastai's in bf16": lambda learn: learn.add_cbs([FastaiChannelsLast(), FastaiMixedPrecision("bf16")]),
    "ours": lambda learn: learn.to_channelslast(),
    "ours in float32": lambda learn: learn.to_channelslast(use_amp=False),
    "ours, added by hand": lambda learn: learn.add_cbs([ChannelsLast, MixedPrecision]),
    "ours and fastai's": lambda learn: learn.to_channelslast().add_cbs([FastaiChannelsLast(), FastaiMixedPrecision()]),
    "to_fp16": lambda learn: learn.to_fp16(),
    "two of fastai's MixedPrecision": lambda learn: learn.add_cbs([FastaiMixedPrecision] * 2),
}


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("before", HELD_BEFORE.values(), ids=HELD_BEFORE)
def test_result_is_the_same_whatever_the_learner_held_before(new_learner, bf16_cpu, before, fitted):
    learn = new_learner()
    before(learn)
    if fitted and count(learn, FastaiMixedPrecision) < 2:
        learn.fit(1)
    assert learn.to_channelslast(amp_mode="bf16") is learn
    assert [type(cb) for cb in learn.cbs if isinstance(cb, FastaiChannelsLast)] == [ChannelsLast]
    assert [type(cb) for cb in learn.cbs if isinstance(cb, FastaiMixedPrecision)] == [MixedPrecision]
    assert learn.mixed_precision.amp_mode is AMPMode.BF16 and isinstance(learn.channels_last, ChannelsLast)
    learn.fit(1)
    assert_format(learn, True)
    before(learn)
    assert learn.to_contiguous(to_fp32=True) is learn
    assert count(learn, FastaiChannelsLast) == count(learn, FastaiMixedPrecision) == 0
    assert_format(learn, False)
    learn.fit(1)
    assert_format(learn, False)


def test_one_channels_last_even_if_there_were_two(learn):
    learn.add_cbs([ChannelsLast, ChannelsLast]).to_channelslast(use_amp=False)
    assert count(learn, ChannelsLast) == 1


def test_model_attributes_of_the_callbacks_names_are_no_obstacle(learn, bf16_cpu):
    learn.model.channels_last = learn.model.mixed_precision = learn.model.scaler = "the model's"
    learn.to_channelslast(amp_mode="bf16").fit(1)
    assert_format(learn, True)
    learn.to_contiguous(to_fp32=True)
    assert count(learn, ChannelsLast) == count(learn, MixedPrecision) == 0


def test_to_contiguous_keeps_mixed_precision_unless_told(learn, bf16_cpu):
    learn.to_channelslast(amp_mode="bf16").to_contiguous()
    assert count(learn, MixedPrecision) == 1 and count(learn, ChannelsLast) == 0
    learn.to_contiguous(to_fp32=True)
    assert count(learn, MixedPrecision) == 0


@pytest.mark.parametrize("kind", ["MixedPrecision", "NonNativeMixedPrecision"])
def test_to_fp32_takes_every_kind_of_mixed_precision_off(learn, kind):
    if kind == "MixedPrecision":
        learn.add_cb(FastaiMixedPrecision())
    else:
        learn.to_non_native_fp16()
    learn.to_contiguous()
    kinds = (FastaiMixedPrecision, NonNativeMixedPrecision, ModelToHalf)
    assert count(learn, kinds) > 0
    learn.to_contiguous(to_fp32=True)
    assert count(learn, kinds) == 0


def test_to_contiguous_leaves_mixed_precision_alone(new_learner, monkeypatch):
    theirs = FastaiMixedPrecision("bf16")
    learn = new_learner(cbs=[theirs, ChannelsLast()])
    monkeypatch.setattr(devices, "accelerated_dtypes", lambda device: (torch.float16,))
    monkeypatch.setattr(precision, "training_device", lambda learn: torch.device("cuda"))
    assert theirs in learn.to_contiguous().cbs


def test_plain_cbs_of_fastais_mixed_precision_work(new_learner):
    learn = new_learner(cbs=[FastaiMixedPrecision(), ChannelsLast()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fastai's autocasts on CUDA alone, and says so
        learn.fit(1)
    assert_format(learn, True)


def test_one_mixed_precision_with_to_fp16_before_and_after(learn, bf16_cpu):
    learn.to_fp16().to_channelslast(amp_mode="bf16")
    assert count(learn, FastaiMixedPrecision) == 1
    learn.to_fp16()
    assert count(learn, FastaiMixedPrecision) == count(learn, ChannelsLast) == 1


def test_signature_shows_every_option():
    options = set(inspect.signature(GradScaler).parameters) - {"device"}
    for method in (Learner.to_channelslast, Learner.to_format):
        parameters = inspect.signature(method).parameters
        assert options <= set(parameters)
        assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in options)
    assert [*inspect.signature(Learner.to_channelslast).parameters][:3] == ["self", "use_amp", "amp_mode"]


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda learn: learn.to_channelslast(initial_scale=3), TypeError, "initial_scale=3.*init_scale"),
        (lambda learn: learn.to_channelslast(use_amp=False, initial_scale=3), TypeError, "initial_scale=3.*init_scale"),
        (lambda learn: learn.to_channelslast(init_scale=-1), ValueError, "init_scale=-1.*above 0"),
        (
            lambda learn: learn.to_channelslast(ampmode="bf16"),
            TypeError,
            "ampmode='bf16' is no.*: pass use_amp, amp_mode",
        ),
        (
            lambda learn: learn.to_channelslast(compile=True),
            TypeError,
            "compile=True is no.*`learn.to_format` sets that",
        ),
        (lambda learn: learn.to_contiguous(to_fp32="no"), TypeError, "to_fp32='no' is a str: pass True or False"),
        (lambda learn: learn.to_channelslast(amp_mode="fp8"), ValueError, "amp_mode='fp8'.*'fp16', 'bf16'"),
        (lambda learn: learn.to_channelslast(False, "fp8"), ValueError, "amp_mode='fp8'.*'fp16', 'bf16'"),
        (
            lambda learn: learn.to_channelslast(amp_mode=None),
            ValueError,
            "amp_mode=None.*'fp16', 'bf16'.*use_amp=False",
        ),
        (lambda learn: learn.to_channelslast(use_amp="no"), ValueError, "use_amp='no': pass True or False"),
        (lambda learn: learn.to_format("channels last"), ValueError, "fmt='channels last'.*'channels last fp16'"),
        (lambda learn: learn.to_format(True), TypeError, "fmt=True.*TrainFormat"),
        (lambda learn: learn.to_channelslast("bf16"), ValueError, "use_amp='bf16'.*amp_mode='bf16'"),
        (lambda learn: learn.to_format(None), TypeError, "fmt=None.*TrainFormat"),
    ],
)
def test_bad_input_is_an_error_at_the_call_and_changes_nothing(new_learner, bf16_cpu, call, error, match):
    for held in (lambda learn: learn, lambda learn: learn.to_channelslast(amp_mode="bf16")):
        learn = held(new_learner())
        learn.fit(1)
        cbs, strides = list(learn.cbs), [param.stride() for param in learn.model.parameters()]
        with pytest.raises(error, match=match):
            call(learn)
        assert all(a is b for a, b in zip(cbs, learn.cbs, strict=True))
        assert strides == [param.stride() for param in learn.model.parameters()]


@pytest.mark.parametrize(
    "written, meant",
    [
        ("fused bf16 channels last", "channels last bf16 fused"),
        ("channelslast bf16", "channels last bf16"),
        ("chanels last fp16", "channels last fp16"),
        ("bf16", "contiguous bf16"),
    ],
)
def test_format_that_was_meant_comes_first(written, meant):
    with pytest.raises(ValueError, match=f"fmt='{written}' is no format: did you mean '{meant}' or "):
        to_train_format(written)


def test_precision_that_the_device_cannot_do_is_an_error_at_the_call(learn, monkeypatch):
    monkeypatch.setattr(precision, "training_device", lambda learn: torch.device("cuda"))
    monkeypatch.setattr(devices, "accelerated_dtypes", lambda device: (torch.float16,))
    cbs = list(learn.cbs)
    with pytest.raises(ValueError, match=r"amp_mode='bf16'.*pass amp_mode='fp16'"):
        learn.to_channelslast(amp_mode="bf16")
    assert learn.cbs == cbs


def test_options_without_effect_warn(learn, bf16_cpu):
    with pytest.warns(UserWarning, match="init_scale: without effect, float32"):
        learn.to_channelslast(use_amp=False, init_scale=8.0)
    with pytest.warns(UserWarning, match="init_scale: without effect, bfloat16"):
        learn.to_channelslast(amp_mode="bf16", init_scale=8.0)


def test_train_format_tells_what_the_device_makes_of_it(learn, bf16_cpu):
    assert learn.train_format == TrainFormat()
    learn.to_channelslast()
    assert learn.train_format == TrainFormat(True, "bf16")
    learn.to_format(TrainFormat(False, "bf16"))
    assert learn.train_format == TrainFormat(False, "bf16")


def test_both_methods_take_to_formats_path(learn, monkeypatch):
    taken = []
    real = Learner.to_format
    monkeypatch.setattr(Learner, "to_format", lambda self, fmt, **kw: taken.append(fmt) or real(self, fmt, **kw))
    learn.to_channelslast(use_amp=False)
    learn.to_contiguous(to_fp32=True)
    assert taken == [TrainFormat(True), TrainFormat(False)]


# Compilation


@pytest.fixture
def count_compiles(monkeypatch):
    "Replace the compiler by one that runs the model as it is; the list grows by the mode at each compiled call."
    real, calls = torch.compile, []

    def compile(model, *args, mode=None, disable=False, **kwargs):
        if disable:
            return real(model, disable=True)

        def compiled(*args, **kwargs):
            calls.append(mode)
            return model(*args, **kwargs)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    return calls


def test_to_format_compiles_in_place_and_a_format_without_undoes_it(learn, count_compiles):
    x = torch.randn(2, 3, 8, 8)
    assert learn.to_format(TrainFormat(compile="reduce-overhead")) is learn
    assert learn.train_format.compile == "reduce-overhead"
    learn.model(x)
    assert count_compiles == ["reduce-overhead"]
    wrapper = learn.model._compiled_call_impl
    learn.to_format(TrainFormat(True, compile="reduce-overhead"))
    assert learn.model._compiled_call_impl is wrapper
    learn.to_contiguous(to_fp32=True)
    assert learn.train_format == TrainFormat(compile="reduce-overhead")
    learn.to_format(TrainFormat(compile="default"))
    learn.model(x)
    assert count_compiles == ["reduce-overhead", "default"]
    learn.to_format(TrainFormat())
    learn.model(x)
    assert learn.train_format == TrainFormat()
    assert len(count_compiles) == 2
    assert "_compiled_call_impl" not in vars(learn.model)


@pytest.mark.parametrize("model", [TinyNet, lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten())])
def test_model_of_pytorchs_own_class_is_compiled_too(new_learner, monkeypatch, model):
    real, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile(model, mode=None, disable=False):
        return real(model, backend=backend, disable=disable)

    monkeypatch.setattr(torch, "compile", compile)
    learn = new_learner(model).to_format(TrainFormat(compile="default"))
    with torch.no_grad():
        for _ in range(3):
            learn.model(torch.randn(2, 3, 8, 8))
    assert len(graphs) == 1


def test_model_that_its_owner_compiled_stays_so_unless_a_format_says_otherwise(learn, count_compiles):
    learn.model.compile()
    learn.to_channelslast(use_amp=False).fit(1)
    learn.to_contiguous()
    assert learn.train_format.compile == "default" and count_compiles
    learn.to_format(TrainFormat())
    assert learn.train_format.compile is None


def test_pytorch_still_keeps_its_compiled_call_where_we_look_for_it(learn):
    learn.model.compile()
    assert learn.train_format.compile == "default"


def test_undoing_compilation_works_if_pytorch_renames_that_place(learn, count_compiles, monkeypatch):
    class Renamed(TinyNet):
        compiled = None

        def compile(self, **kwargs):
            self.compiled = torch.compile(super().__call__, **kwargs)

        def __call__(self, *args):
            return self.compiled(*args) if self.compiled else super().__call__(*args)

    learn.model = Renamed()
    learn.to_format(TrainFormat(compile="default"))
    learn.model(torch.randn(2, 3, 8, 8))
    assert learn.train_format.compile == "default" and count_compiles == ["default"]
    learn.to_format(TrainFormat())
    learn.model(torch.randn(2, 3, 8, 8))
    assert learn.train_format.compile is None and count_compiles == ["default"]


def test_failure_to_compile_changes_nothing(learn, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(RuntimeError, match="no compiler here"):
        learn.to_format(TrainFormat(True, compile="default"))
    assert learn.train_format == TrainFormat()


def test_model_that_its_owner_compiles_anew_counts_as_the_owners(learn, count_compiles):
    learn.to_format(TrainFormat(compile="reduce-overhead"))
    learn.model.compile()
    assert learn.train_format.compile == "default"
    learn.to_format(TrainFormat(compile="reduce-overhead"))
    assert learn.train_format.compile == "reduce-overhead"


def test_copy_of_a_compiled_learner_is_not_compiled(learn, count_compiles):
    learn.to_format(TrainFormat(compile="default"))
    assert copy.deepcopy(learn.model)._compiled_call_impl is None
    learn.model = copy.deepcopy(learn.model)
    assert learn.train_format.compile is None


# The wrapper that `torch.compile(model)` returns


def wrapped(**kwargs):
    "A function that makes a TinyNet in PyTorch's wrapper, compiled by a backend that runs it as it is."
    return lambda: torch.compile(TinyNet(), **{"backend": "eager", **kwargs})


def test_pytorch_still_names_its_wrapper_as_we_know_it():
    model = nn.Sequential(nn.Linear(2, 2))
    wrapper = torch.compile(model)
    assert formats.uncompiled(wrapper) is model and formats.uncompiled(model) is model
    assert next(iter(wrapper.state_dict())) == "_orig_mod.0.weight"


@pytest.mark.parametrize("mode", [None, *formats.COMPILE_MODES])
def test_wrapped_model_is_reported_as_compiled_in_its_mode(new_learner, mode):
    learn = new_learner(lambda: torch.compile(TinyNet(), mode=mode))
    assert learn.train_format == TrainFormat(compile=mode or "default")
    learn.model = torch.compile(TinyNet(), mode=mode, backend="eager")
    assert learn.train_format == TrainFormat(compile="default")
    learn.model = TinyNet()
    learn.model.compile(mode=mode)
    assert learn.train_format == TrainFormat(compile=mode or "default")


def test_wrapped_model_of_the_mode_asked_for_is_compiled_no_more(new_learner, bf16_cpu):
    learn = new_learner(wrapped())
    model = learn.model
    for change in (
        lambda: learn.to_format(TrainFormat(True, compile="default")),
        lambda: learn.to_channelslast(amp_mode="bf16"),
        lambda: learn.to_contiguous(),
        lambda: learn.to_contiguous(to_fp32=True),
    ):
        assert change() is learn and learn.model is model
        assert learn.train_format.compile == "default"
        assert vars(formats.uncompiled(model)).get("_compiled_call_impl") is None
    learn.to_channelslast(use_amp=False).fit(1)
    assert_format(learn, True)
    learn.to_contiguous()
    assert_format(learn, False)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_other_mode_takes_the_model_out_of_its_wrapper(new_learner, monkeypatch, mode):
    learn = new_learner(wrapped())
    wrapper, model = learn.model, formats.uncompiled(learn.model)
    learn.fit(1)
    params = list(model.parameters())
    calls = []

    def compile(call, mode=None, disable=False):
        return lambda *args: calls.append(mode) or call(*args)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "compile", compile)
        learn.to_format(TrainFormat(True, compile=mode))
        assert learn.model is model and learn.model is not wrapper
        assert learn.train_format == TrainFormat(True, compile=mode)
        before = [param.detach().clone() for param in params]
        learn.fit(1)
    assert set(calls) == ({mode} if mode else set())
    assert all(a is b for a, b in zip(params, learn.model.parameters(), strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(params, before))
    assert_format(learn, True)


def test_failure_to_compile_leaves_the_model_in_its_wrapper(new_learner, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no compiler here")

    learn = new_learner(wrapped())
    model = learn.model
    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(RuntimeError, match="no compiler here"):
        learn.to_format(TrainFormat(True, compile="reduce-overhead"))
    assert learn.model is model and learn.train_format == TrainFormat(compile="default")


def test_inputs_of_a_wrapped_model_are_converted(new_learner):
    spy = InputFormats()
    new_learner(wrapped(), cbs=[ChannelsLast(), spy]).fit(1)
    assert spy.formats == [True]


def test_copy_of_a_wrapped_model_is_reported_as_compiled(new_learner):
    learn = new_learner(wrapped())
    learn.model = copy.deepcopy(learn.model)
    assert learn.train_format == TrainFormat(compile="default")
    learn.to_format(TrainFormat())
    assert type(learn.model) is TinyNet


# A model that cannot read channels last


class Head(nn.Module):
    def forward(self, x):
        return x.view(x.shape[0], -1)[:, :3]


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3)
        self.decoder = nn.Sequential(nn.ReLU(), Head())

    def forward(self, x):
        return self.decoder(self.body(x))


def test_view_error_reaches_the_user_with_a_note(new_learner):
    learn = new_learner(Views, cbs=ChannelsLast())
    with pytest.raises(RuntimeError) as caught:
        learn.fit(1)
    error = caught.value
    assert type(error) is RuntimeError and str(error).startswith("view size is not compatible")
    (note,) = error.__notes__
    assert "`decoder.1` (Head)" in note and "reshape" in note and "to_contiguous()" in note
    assert note in "".join(traceback.format_exception(error))
    learn.to_contiguous()
    learn.fit(1)


def test_note_names_the_module_in_a_wrapped_model(new_learner):
    learn = new_learner(lambda: torch.compile(Views(), backend="eager"), cbs=ChannelsLast())
    with pytest.raises(RuntimeError) as caught, torch.compiler.set_stance("force_eager"):
        learn.fit(1)
    assert "`decoder.1` (Head)" in caught.value.__notes__[0]


def test_view_error_in_the_model_itself(new_learner):
    class Root(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).view(len(x), -1)

    with pytest.raises(RuntimeError) as caught:
        new_learner(lambda: Root(3, 4, 3), cbs=ChannelsLast()).fit(1)
    assert "the model calls `.view`" in caught.value.__notes__[0]


def test_view_error_in_the_loss_is_not_laid_at_a_module(new_learner):
    def loss(pred, target):
        return pred.view(-1).sum()

    def body():
        return nn.Sequential(nn.Conv2d(3, 4, 3))

    with pytest.raises(RuntimeError) as caught:
        new_learner(body, loss_func=loss, metrics=[], cbs=ChannelsLast()).fit(1)
    assert "the code after the model" in caught.value.__notes__[0]


def test_view_error_gets_no_note_where_the_model_is_contiguous(new_learner, monkeypatch):
    def fit(model, dls):
        with warnings.catch_warnings(), pytest.raises(RuntimeError) as caught:
            warnings.simplefilter("ignore")
            new_learner(model, dls, cbs=ChannelsLast()).fit(1)
        return caught.value

    class Transposes(nn.Linear):
        def forward(self, x):
            return super().forward(x.transpose(1, 2)).transpose(1, 2).view(-1)

    assert not hasattr(fit(lambda: Transposes(4, 3), new_dls(4, 5)), "__notes__")
    assert hasattr(fit(Views, new_dls(3, 8, 8)), "__notes__")
    monkeypatch.setattr(memory_format, "UNRELIABLE_DEVICES", {"cpu"})
    dls = new_dls(3, 8, 8)
    for dl in (dls.train, dls.valid):
        dl[:] = [(x.to(memory_format=torch.channels_last), y) for x, y in dl]
    assert not hasattr(fit(Views, dls), "__notes__")


@pytest.mark.cuda
def test_view_error_of_a_compiled_model_gets_a_note(new_learner):
    learn = new_learner(Views, device="cuda").to_format(TrainFormat(True, compile="default"))
    with pytest.raises(RuntimeError) as caught:
        learn.fit(1)
    assert "reshape" in caught.value.__notes__[0]


def test_other_errors_get_no_note(new_learner):
    def loss(pred, target):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError) as caught:
        new_learner(loss_func=loss, cbs=ChannelsLast()).fit(1)
    assert not hasattr(caught.value, "__notes__")


# What leaves the Learner


class UsersChannelsLast(ChannelsLast):
    pass


@pytest.mark.parametrize("cls", [ChannelsLast, MixedPrecision, UsersChannelsLast])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_callback_comes_back_from_a_pickle_with_its_class_and_attributes(cls, protocol):
    cb = cls()
    cb.warned |= {"a warning"}
    loaded = pickle.loads(pickle.dumps(cb, protocol))
    assert type(loaded) is cls and all(vars(loaded)[name] == value for name, value in vars(cb).items())


def test_conversion_before_a_fit_is_made_once(learn, monkeypatch):
    calls = []
    real = ChannelsLast.before_fit
    monkeypatch.setattr(ChannelsLast, "before_fit", lambda self: calls.append(1) or real(self))
    learn.to_channelslast(use_amp=False).fit(1)
    assert len(calls) == 1


def test_callbacks_pickle(bf16_cpu, learn):
    learn.to_channelslast(amp_mode="bf16").fit(1)
    for cb in (learn.channels_last, learn.mixed_precision):
        cb.learn = None
        assert type(pickle.loads(pickle.dumps(cb))) is type(cb)


# Equal results


def test_channels_last_trains_as_contiguous_does(new_learner):
    plain, ours = new_learner(opt_func=SGD), new_learner(opt_func=SGD).to_channelslast(use_amp=False)
    plain.fit(3)
    ours.fit(3)
    assert torch.allclose(torch.stack(plain.recorder.losses), torch.stack(ours.recorder.losses), rtol=1e-5)
    for a, b in zip(plain.model.parameters(), ours.model.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


# On a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("amp_mode", ["fp16", "bf16", None])
def test_channels_last_on_a_gpu(new_learner, amp_mode):
    spy = InputFormats()
    learn = new_learner(device="cuda", cbs=spy)
    learn.fit(1)
    learn.to_channelslast(use_amp=amp_mode is not None, amp_mode=amp_mode or "fp16")
    losses = []
    learn.fit(5, cbs=Callback(after_loss=lambda cb: losses.append(cb.loss.item())))
    assert_format(learn, True)
    assert spy.formats == [True] and learn.train_format == TrainFormat(True, amp_mode)
    assert losses[-1] < losses[0]
    learn.to_contiguous(to_fp32=True)
    assert_format(learn, False)
    learn.fit(1)


@pytest.mark.cuda
def test_interrupt_on_a_gpu_leaves_autocast_off(new_learner):
    def fail(cb):
        raise KeyboardInterrupt

    learn = new_learner(device="cuda").to_channelslast()
    for event in ("after_pred", "after_loss", "after_backward"):
        with pytest.raises(KeyboardInterrupt):
            learn.fit(1, cbs=Callback(**{event: fail}))
        assert not torch.is_autocast_enabled("cuda")
        learn.fit(1)


@pytest.mark.cuda
def test_compiled_format_on_a_gpu(new_learner):
    learn = new_learner(device="cuda").to_format(TrainFormat(True, "fp16", "default"))
    learn.fit(1)
    assert_format(learn, True)
    learn.to_format(TrainFormat())
    learn.fit(1)
    assert_format(learn, False)


@pytest.mark.cuda
def test_3d_model_on_a_gpu(new_learner):
    dls = new_dls(2, 4, 8, 8, device="cuda")
    learn = new_learner(TinyVideoNet, dls, device="cuda", loss_func=CrossEntropyLossFlat()).to_channelslast()
    learn.fit(1)
    assert_format(learn, True)


def test_format_by_its_words(learn, bf16_cpu):
    assert learn.to_format("channels last bf16").train_format == TrainFormat(True, "bf16")
    assert learn.to_format(" contiguous  fp32 ").train_format == TrainFormat()
    assert TrainFormat(True, "fp32") == TrainFormat(True)
    assert learn.to_channelslast(amp_mode="fp32").train_format == TrainFormat(True)


@pytest.mark.parametrize("fmt", [TrainFormat(), TrainFormat(True, "fp16", "default", True, True)], ids=str)
def test_words_and_code_of_a_format_lead_back_to_it(fmt):
    assert formats.to_train_format(str(fmt)) == fmt
    assert formats.to_train_format(eval(fmt.code.removeprefix("learn.to_format"))) == fmt
