"`format_summary` of a model and of a Learner: what it says, how it shows it, and that it leaves no trace."

import gc
import random
import weakref
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import TinyNet, TinyVideoNet, new_dls
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from fastai.callback.fp16 import MixedPrecision as FastaiMixedPrecision
from fastai.callback.mixup import MixUp
from fastai.learner import Learner
from matplotlib import pyplot as plt
from torch import nn
from torch.autograd import DeviceType

from channelslast.callback import ChannelsLast, TrainFormat
from channelslast.memory_format import module_to_memory_format
from channelslast.summary import _HINTS, _LAYOUT_KERNELS, format_summary, gpu_shares


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)


def thrashing_model():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.InstanceNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.GLU(1),
        nn.Conv2d(4, 3, 3, padding=1),
        nn.AvgPool2d(8),
        nn.Flatten(),
    )


def clean_model():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3), nn.AvgPool2d(4), nn.Flatten())


@pytest.fixture
def thrashing(images):
    return format_summary(module_to_memory_format(thrashing_model()), images)


def flat(summary):
    "What is printed, without its line breaks."
    return " ".join(str(summary).split())


# What it says


def test_verdict_names_the_layers_that_lose_the_format_and_their_phases(thrashing):
    assert 0 < thrashing.channels_last_share < 1
    assert f"{thrashing.channels_last_share:.1%} of activations and gradients" in thrashing.verdict
    assert "2 of 7 layers with images lose it" in thrashing.verdict
    assert "`1` InstanceNorm2d (forward)" in thrashing.verdict and "`4` GLU (backward)" in thrashing.verdict
    assert [layer.module for layer in thrashing.losers] == ["1", "4"]  # the heaviest first


def test_verdict_on_a_clean_model(images):
    summary = format_summary(module_to_memory_format(clean_model()), images)
    assert summary.channels_last_share == 1.0 and summary.events == []
    assert (
        summary.verdict
        == "100% of activations and gradients stay channels last; none of 4 layers with images loses it."
    )


def test_share_is_never_rounded_up_to_all():
    x = torch.randn(8, 3, 64, 64).to(memory_format=torch.channels_last)
    layers = [nn.Conv2d(3, 32, 3), *[nn.ReLU() for _ in range(40)], nn.Conv2d(32, 2, 3), nn.Softmax(1)]
    summary = format_summary(module_to_memory_format(nn.Sequential(*layers)), x)
    assert 0.9995 > summary.channels_last_share > 0.99 and summary.verdict.startswith("99.")


def test_verdict_on_a_contiguous_model():
    summary = format_summary(clean_model(), torch.randn(2, 3, 8, 8))
    assert summary.channels_last_share == 0.0 and summary.events == []
    assert summary.verdict.startswith("Contiguous throughout")


@pytest.mark.parametrize(
    "model, shape", [(nn.Linear(4, 2), (3, 4)), (nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), (2, 3, 8, 8))]
)
def test_verdict_on_a_model_without_images(model, shape):
    x = torch.randn(shape)
    summary = format_summary(model, x.to(memory_format=torch.channels_last) if x.ndim == 4 else x)
    assert np.isnan(summary.channels_last_share) and summary.layers == []
    assert "No 4D or 5D activations" in summary.verdict


def test_verdict_on_a_contiguous_model_whose_first_layer_loses_a_channels_last_input(images):
    summary = format_summary(nn.Sequential(nn.Softmax(1), nn.ReLU(), nn.AvgPool2d(2)), images)
    assert summary.channels_last_share == 0.0
    assert "0.0% of activations" in summary.verdict and "`0` Softmax (forward)" in summary.verdict


def test_verdict_names_the_convolution_that_re_lays_its_input():
    summary = format_summary(module_to_memory_format(clean_model()), torch.randn(2, 3, 8, 8))
    assert "1 convolution gets an input, weight or gradient in the other format" in summary.verdict
    assert "forward pass of `0`" in summary.verdict and "to_memory_format(images)" in summary.hints[0]


def test_hint_for_contiguous_weights_under_channels_last_images(images):
    summary = format_summary(clean_model(), images)
    assert "module_to_memory_format(model)" in summary.hints[0]
    assert "2 convolutions get an input, weight or gradient" in summary.verdict


def test_verdict_names_the_layer_that_is_contiguous_inside(images):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.LocalResponseNorm(3), nn.Conv2d(8, 8, 1))
    verdict = format_summary(module_to_memory_format(model), images).verdict
    assert (
        "none of 3 layers with images loses it. Most of the rest is contiguous inside `1` LocalResponseNorm" in verdict
    )


def test_verdict_on_little_that_is_contiguous_names_no_layer(images):
    layers = [nn.Conv2d(3, 8, 1), *[nn.ReLU() for _ in range(20)], nn.AdaptiveAvgPool2d(1)]
    summary = format_summary(module_to_memory_format(nn.Sequential(*layers)), images)
    assert 0.9 < summary.channels_last_share < 1 and summary.verdict.endswith("none of 22 layers with images loses it.")


def test_verdict_on_one_layer(images):
    verdict = format_summary(module_to_memory_format(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten())), images).verdict
    assert "the one layer with images keeps it" in verdict


def test_many_losers_are_cut_short_in_the_verdict(images):
    layers = [layer for _ in range(8) for layer in (nn.Conv2d(3, 3, 1), nn.Softmax(1))]
    summary = format_summary(module_to_memory_format(nn.Sequential(*layers)), images)
    assert "8 of 16 layers with images lose it" in summary.verdict and summary.verdict.endswith("and 3 more.")


def test_5d_model():
    x = torch.randn(2, 2, 4, 4, 4).to(memory_format=torch.channels_last_3d)
    model = nn.Sequential(nn.BatchNorm3d(2), nn.AdaptiveAvgPool3d(2), nn.BatchNorm3d(2))
    summary = format_summary(module_to_memory_format(model), x)
    assert {layer.module: layer.loses_in for layer in summary.losers} == {"1": ("forward",)}


def test_channels_to_be_padded_are_named_on_cuda_alone(images):
    with torch.autocast("cpu", torch.bfloat16):
        summary = format_summary(module_to_memory_format(clean_model()), images)
    assert "multiple of 8" not in flat(summary)
    summary.device = "cuda:0"
    assert "Channels not a multiple of 8, which cuDNN pads" in flat(summary) and ": `2` (8 to 3)." in flat(summary)


# Hints: each replacement keeps the format where the hint says so


def hints(model, x):
    return format_summary(module_to_memory_format(model), x).hints


def test_hint_for_instance_norm_and_that_its_replacement_is_the_same_function_and_clean(images):
    norm, replacement = nn.InstanceNorm2d(8, affine=True), nn.GroupNorm(8, 8)
    x = torch.randn(2, 8, 8, 8)
    torch.testing.assert_close(norm(x), replacement(x))
    (hint,) = hints(nn.Sequential(nn.Conv2d(3, 8, 3), norm), images)
    assert "GroupNorm" in hint and "191945" in hint
    assert format_summary(module_to_memory_format(nn.Sequential(nn.Conv2d(3, 8, 3), replacement)), images).events == []


def test_hint_for_a_copy_in_the_code_of_a_layer_and_that_its_replacement_is_clean(images):
    class Copies(nn.Module):
        def __init__(self, memory_format):
            super().__init__()
            self.memory_format = memory_format

        def forward(self, x):
            return x.contiguous(memory_format=self.memory_format)

    (hint,) = hints(nn.Sequential(nn.Conv2d(3, 8, 3), Copies(torch.contiguous_format)), images)
    assert "`.contiguous()`" in hint
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Copies(torch.channels_last))
    assert format_summary(module_to_memory_format(model), images).events == []
    assert hints(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()), images) == []  # nobody can avoid that one


def resize(mode):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Upsample(scale_factor=2, mode=mode), nn.Conv2d(8, 8, 3))


def test_hint_for_bicubic_and_that_bilinear_is_clean(images):
    (hint,) = hints(resize("bicubic"), images)
    assert "bilinear" in hint
    assert hints(resize("bilinear"), images) == []
    assert format_summary(module_to_memory_format(resize("bilinear")), images).events == []


class GlobalAverage(nn.Module):
    def forward(self, x):
        return F.avg_pool2d(x, x.shape[-2:])


def test_hint_for_a_global_average_and_that_its_replacement_is_the_same_function_and_clean(images):
    torch.testing.assert_close(GlobalAverage()(images), nn.AdaptiveAvgPool2d(1)(images))
    (hint,) = hints(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)), images)
    assert "`2`" in hint and "F.avg_pool2d(x, x.shape[-2:])" in hint
    assert hints(nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1)), images) == [hint.replace("`2`", "`1`")]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), GlobalAverage())
    assert format_summary(module_to_memory_format(model), images).events == []


def test_hints_of_a_device_and_version_are_given_there_alone(thrashing, monkeypatch):
    event = thrashing.events[0]
    for hint in _HINTS:
        op = {"(reflection|replication)_pad": "reflection_pad2d", "pixel_(un)?shuffle": "pixel_shuffle"}.get(
            hint.ops, hint.ops.split("|")[0]
        )
        fake = SimpleNamespace(
            **{**vars(event), "op": f"aten.{op}", "kind": "lost", "cls": hint.cls if hint.cls.isalpha() else "X"}
        )
        thrashing.events, thrashing.device = [fake], "cuda:0"
        thrashing.layers = [SimpleNamespace(module=event.module, loses_in=("forward", "backward"))]
        monkeypatch.setattr("channelslast.summary.ismin_torch", lambda version: False)
        assert hint.text in thrashing.hints
        monkeypatch.setattr("channelslast.summary.ismin_torch", lambda version: True)
        assert (hint.text in thrashing.hints) == (not hint.fixed_in)
        thrashing.device = "cpu"
        assert (hint.text in thrashing.hints) == (not hint.device)


# How it shows it


def test_table_has_a_row_for_each_event_grouped_by_module(thrashing):
    text = str(thrashing)
    assert text.startswith("Sequential (input shape: 2 x 3 x 8 x 8), fp32 on cpu\n")
    rows = [line for line in text.splitlines() if " x " in line and line.split()[-2].isdigit()]
    assert len(rows) == len(thrashing.events)
    assert sum(row.startswith("1 InstanceNorm2d") for row in rows) == 1
    assert "converted: a copy changed the format" in text
    assert thrashing.verdict in flat(thrashing) and "Hint: InstanceNorm" in text
    frame = thrashing.to_frame()
    heaviest = frame.groupby("module").nbytes.sum().idxmax()
    assert rows[0].startswith(f"{heaviest} ")


def test_long_table_says_what_it_leaves_out(thrashing):
    thrashing.events *= 10
    text = str(thrashing)
    assert f"{len(thrashing.events) - 40} lighter rows left out" in text


def test_frame_has_the_events_and_their_columns(thrashing):
    frame = thrashing.to_frame()
    assert list(frame.columns) == ["module", "cls", "phase", "op", "kind", "shape", "dtype", "count", "nbytes"]
    assert len(frame) == len(thrashing.events)
    assert frame.nbytes.sum() == sum(event.nbytes for event in thrashing.events)
    assert set(frame.kind) <= {"lost", "converted", "hidden", "mixed"} and set(frame.phase) == {"forward", "backward"}


def test_frame_of_a_clean_model_has_columns_and_no_rows(images):
    frame = format_summary(module_to_memory_format(clean_model()), images).to_frame()
    assert isinstance(frame, pd.DataFrame) and len(frame) == 0 and "nbytes" in frame.columns


def test_notebooks_and_terminals_show_the_table(thrashing):
    assert repr(thrashing) == str(thrashing)
    assert thrashing._repr_html_().startswith("<pre>") and "InstanceNorm2d" in thrashing._repr_html_()


def test_picture_has_a_bar_for_each_layer_and_phase_and_a_mark_for_each_loss(thrashing):
    ax = thrashing.plot()
    colors = [bar.get_facecolor() for bar in ax.patches]
    forward, backward = colors[:7], colors[7:]
    assert len(colors) == 14
    assert forward[0] == forward[3] != forward[1]  # channels last, and contiguous after InstanceNorm
    assert forward[1] == forward[2] == backward[2]
    marks = [line for line in ax.lines if len(line.get_xdata()) and line.get_marker() in "v^"]
    assert sorted((int(line.get_xdata()[0]), line.get_marker()) for line in marks) == [(1, "v"), (4, "^")]
    assert {text.get_text() for text in ax.texts} == {"1", "4"}
    plt.close(ax.figure)


def test_picture_of_a_step_that_stopped_says_so(images):
    summary = format_summary(module_to_memory_format(nn.Sequential(nn.Conv2d(3, 8, 3), Views())), images)
    ax = summary.plot()
    assert "stopped" in ax.get_title(loc="left")
    plt.close(ax.figure)


def test_picture_is_drawn_where_told(thrashing):
    _, ax = plt.subplots()
    assert thrashing.plot(ax) is ax
    plt.close(ax.figure)


# The Learner's own step


def test_learner_in_channels_last(new_learner, bf16_cpu):
    learn = new_learner(clean_model).to_channelslast(amp_mode="bf16")
    summary = learn.format_summary()
    assert summary.channels_last_share == 1.0 and summary.events == []
    assert summary.dtype == "bf16" and summary.shapes == [(8, 3, 8, 8)] and summary.model == "Sequential"


def test_learner_in_contiguous_format(new_learner):
    learn = new_learner(clean_model).to_channelslast(use_amp=False).to_contiguous()
    summary = learn.format_summary()
    assert summary.channels_last_share == 0.0 and summary.events == [] and summary.dtype == "fp32"


def test_video_learner(new_learner):
    learn = new_learner(TinyVideoNet, new_dls(2, 4, 8, 8)).to_channelslast(use_amp=False)
    assert learn.format_summary().losers == []


def test_callbacks_make_the_batch_and_the_loss(new_learner):
    seen = []

    class Looks(Callback):
        order = 200

        def after_pred(self):
            seen.append(self.pred)
            self.learn.pred = self.pred + 0

    learn = new_learner(clean_model, cbs=[MixUp(), Looks()]).to_channelslast(use_amp=False)
    assert learn.format_summary().losers == []
    assert len(seen) == 1


def test_loss_function_is_told_apart_from_the_model(new_learner):
    def loss_func(pred, target):
        return F.cross_entropy(pred.softmax(1), target[:, None, None].expand(-1, 8, 8))

    learn = new_learner(lambda: nn.Conv2d(3, 4, 1), loss_func=loss_func, metrics=None).to_channelslast(use_amp=False)
    summary = learn.format_summary()
    assert {event.module for event in summary.events if event.kind == "lost"} == {"(loss)"}
    assert {layer.module for layer in summary.layers} == {""} and summary.losers == []


def test_compiled_learner_is_traced_as_it_is_written(new_learner):
    learn = new_learner(thrashing_model).to_format(TrainFormat(True))
    events = learn.format_summary().events
    assert events and learn.to_format(TrainFormat(True, compile="default")).format_summary().events == events
    assert learn.train_format.compile == "default"


class Chooses(nn.Module):
    "Calls one of two modules, by PyTorch's operator for it."

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.Sequential(nn.InstanceNorm2d(3), nn.Conv2d(3, 3, 1)), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return torch.cond(x.sum() < torch.inf, self.norm, self.conv, (x,))


def test_branches_of_cond_are_seen_through(images, new_learner):
    model = module_to_memory_format(Chooses())
    model(images).sum().backward()  # it runs by itself
    assert [layer.module for layer in format_summary(model, images).losers] == ["norm.0"]
    learn = new_learner(nn.Sequential(nn.Conv2d(3, 3, 1), model, nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    assert [layer.module for layer in learn.to_channelslast(use_amp=False).format_summary().losers] == ["1.norm.0"]


def test_wrapper_of_the_compiler_has_no_name(images):
    model = module_to_memory_format(thrashing_model())
    losers = [layer.module for layer in format_summary(model, images).losers]
    model[4] = torch.compile(model[4])
    summary = format_summary(torch.compile(model), images)
    assert [layer.module for layer in summary.losers] == losers
    assert summary.model == "Sequential" and {layer.cls for layer in summary.losers} == {"InstanceNorm2d", "GLU"}


def test_view_below_the_wrapper_of_the_compiler(images):
    model = module_to_memory_format(nn.Sequential(nn.Conv2d(3, 8, 3), Views()))
    assert "`1` Views" in format_summary(torch.compile(model), images).error


def test_module_in_the_mode_it_is_in(images):
    model = module_to_memory_format(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).eval()
    mean = model[1].running_mean.clone()
    format_summary(model, images)
    assert torch.equal(model[1].running_mean, mean) and not model.training


def test_nested_inputs_have_no_shape_to_tell():
    rows = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], layout=torch.jagged)
    summary = format_summary(nn.Linear(4, 4), rows, loss_func=lambda y: y.values().sum())
    assert summary.shapes == []


def test_loss_func_of_the_caller(images):
    summary = format_summary(module_to_memory_format(clean_model()), images, loss_func=lambda y: y.square().mean())
    assert summary.events == []


def test_gradients_are_computed_whatever_mode_the_caller_is_in(images):
    model = module_to_memory_format(clean_model())
    with torch.no_grad():
        summary = format_summary(model, images)
    assert any(layer.share("backward") == 1.0 for layer in summary.layers)


def test_gradients_are_computed_inside_inference_mode_too():
    x, model = torch.randn(2, 3, 8, 8), clean_model()
    with torch.inference_mode():
        summary = format_summary(model, x)
    assert any(layer.share("backward") == 0.0 for layer in summary.layers)


def test_wrapper_of_a_model_is_looked_through(new_learner):
    learn = new_learner(thrashing_model).to_channelslast(use_amp=False)
    losers = [layer.module for layer in learn.format_summary().losers]
    learn.model = nn.DataParallel(learn.model)
    learn.model.device_ids = []  # as where there is no GPU
    assert losers and [layer.module for layer in learn.format_summary().losers] == losers


def test_average_in_the_loss_is_no_hint_about_the_model(images):
    model = module_to_memory_format(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    summary = format_summary(model, images, loss_func=lambda y: y.mean((2, 3)).square().sum())
    assert summary.dense_gradients == []


# No trace is left


def state_of(learn):
    return {
        "tensors": [
            (id(t), t.data_ptr(), t.stride(), t.detach().clone(), t.grad)
            for t in (*learn.model.parameters(), *learn.model.buffers())
        ],
        "modes": [module.training for module in learn.model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in learn.model.modules()],
        "attributes": dict(vars(learn)),
        "cbs": list(learn.cbs),
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "opt": learn.opt and {id(p): dict(state) for p, state in learn.opt.state.items()},
        "hypers": learn.opt and [dict(hyper) for hyper in learn.opt.hypers],
    }


def assert_unchanged(before, learn):
    after = state_of(learn)
    for (*facts, values, grad), (*facts_now, values_now, grad_now) in zip(before.pop("tensors"), after.pop("tensors")):
        assert facts == facts_now and torch.equal(values, values_now) and grad is grad_now
    attributes, attributes_now = before.pop("attributes"), after.pop("attributes")
    assert attributes.keys() == attributes_now.keys()
    assert all(attributes[name] is attributes_now[name] for name in attributes)
    assert before == after


def raising(event, error):
    def method(self):
        raise error

    return type("Raises", (Callback,), {"order": 300, event: method})()


EVENTS = ["before_fit", "before_epoch", "before_train", "before_batch", "after_pred", "after_loss", "before_backward"]


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("event", [None, *EVENTS])
@pytest.mark.parametrize(
    "error", [RuntimeError("mine"), KeyboardInterrupt()], ids=["RuntimeError", "KeyboardInterrupt"]
)
def test_learner_is_untouched_also_when_a_callback_raises(new_learner, bf16_cpu, event, error, fitted):
    learn = new_learner().to_channelslast(amp_mode="bf16")
    if fitted:
        learn.fit(1)
    if event:
        learn.add_cb(raising(event, error))
    before = state_of(learn)
    if event:
        with pytest.raises(type(error), match="mine" if error.args else None):
            learn.format_summary()
    else:
        learn.format_summary()
    assert_unchanged(before, learn)


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("mine")


class Fails(nn.Module):
    def __init__(self, where):
        super().__init__()
        self.where = where

    def forward(self, x):
        if self.where == "forward":
            raise RuntimeError("mine")
        return FailsInBackward.apply(x)


@pytest.mark.parametrize("cbs", [ChannelsLast, FastaiMixedPrecision], ids=["ours", "fastai's MixedPrecision"])
@pytest.mark.parametrize("where", ["forward", "backward", "loss"])
def test_failure_of_the_model_or_the_loss_is_the_users_own_error(new_learner, where, cbs):
    def loss_func(pred, target):
        if where == "loss":
            raise RuntimeError("mine")
        return pred.sum()

    model = nn.Sequential(TinyNet(), nn.Identity() if where == "loss" else Fails(where))
    learn = new_learner(model, loss_func=loss_func, metrics=None, cbs=cbs)
    before = state_of(learn)
    with pytest.raises(RuntimeError, match=r"^mine"):
        learn.format_summary()
    assert_unchanged(before, learn)


def test_inputs_keep_their_gradients(images):
    images = images.requires_grad_()
    images.grad = grad = torch.ones_like(images)
    format_summary(module_to_memory_format(clean_model()), images)
    assert images.grad is grad and (grad == 1).all()


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1)), nn.LazyConv2d(3, 1)])
def test_inputs_are_as_before_with_a_model_that_overwrites_them_or_cannot_run(images, model):
    values, images.grad = images.clone(), torch.ones_like(images)
    grad = images.grad
    try:
        format_summary(model, images)
    except ValueError:
        assert isinstance(model, nn.LazyConv2d)
    assert torch.equal(images, values) and images.grad is grad


class NormalizedSum(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, pred, target=None):
        return self.norm(pred).square().sum()


def state_of_module(module):
    tensors = [*module.parameters(), *module.buffers()]
    return [tensor.detach().clone() for tensor in tensors], [param.grad for param in module.parameters()]


@pytest.mark.parametrize("of_learner", [False, True])
def test_loss_function_that_is_a_module_is_untouched(images, new_learner, of_learner):
    loss_func = NormalizedSum()
    values, grads = state_of_module(loss_func)
    if of_learner:
        new_learner(clean_model, loss_func=loss_func, metrics=None).format_summary()
    else:
        format_summary(clean_model(), images, loss_func=loss_func)
    values_now, grads_now = state_of_module(loss_func)
    assert all(torch.equal(*pair) for pair in zip(values, values_now)) and grads == grads_now == [None, None]


# A model that calls `.view` on its activations


class Views(nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)


def test_view_is_told_with_its_module_and_operator(images):
    model = module_to_memory_format(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softmax(1), nn.Conv2d(8, 8, 1), Views()))
    summary = format_summary(model, images)
    assert "`3` Views" in summary.error and "aten.view" in summary.error and ".reshape" in summary.error
    assert summary.verdict == summary.error and summary.error in flat(summary)
    assert [event.module for event in summary.events] == ["1", "2"]


def test_view_in_a_learner(new_learner):
    model = nn.Sequential(nn.Conv2d(3, 2, 1), Views(), nn.Linear(128, 3))
    learn = new_learner(model).to_channelslast(use_amp=False)
    before = state_of(learn)
    assert "`1` Views" in learn.format_summary().error
    assert_unchanged(before, learn)


def test_view_that_the_model_catches_is_no_error(images):
    class Tries(nn.Module):
        def forward(self, x):
            try:
                return x.view(len(x), -1)
            except RuntimeError:
                return x.reshape(len(x), -1)

    summary = format_summary(module_to_memory_format(nn.Sequential(nn.Conv2d(3, 8, 3), Tries())), images)
    assert summary.error is None and "keeps it" in summary.verdict


def test_other_error_after_a_view_that_the_model_catches_is_raised(images):
    class Tries(nn.Module):
        def forward(self, x):
            try:
                return x.view(len(x), -1)
            except RuntimeError:
                raise RuntimeError("mine") from None

    with pytest.raises(RuntimeError, match="mine"):
        format_summary(module_to_memory_format(nn.Sequential(nn.Conv2d(3, 8, 3), Tries())), images)


@pytest.mark.parametrize("learner", [False, True])
def test_error_after_a_view_that_the_model_replaced_is_its_own(images, new_learner, learner):
    class Tries(nn.Module):
        def forward(self, x):
            try:
                x = x.view(len(x), -1)
            except RuntimeError:
                x = x.reshape(len(x), -1)
            raise RuntimeError("mine")  # where the exception of `.view` lay, as often as not

    model = module_to_memory_format(nn.Sequential(nn.Conv2d(3, 8, 3), Tries()))
    for _ in range(5):
        with pytest.raises(RuntimeError, match="mine"):
            if learner:
                new_learner(model).to_channelslast(use_amp=False).format_summary()
            else:
                format_summary(model, images)


def test_exception_of_a_caught_view_lives_no_longer_than_without(images):
    class Held:
        pass

    alive = []

    class Tries(nn.Module):
        def forward(self, x):
            held = Held()
            alive.append(weakref.ref(held))
            try:
                return x.view(len(x), -1)
            except RuntimeError:
                return x.reshape(len(x), -1)

    class Looks(nn.Module):
        def forward(self, x):
            gc.collect()
            alive.append(alive[0]())
            return x * 1

    format_summary(module_to_memory_format(nn.Sequential(nn.Conv2d(3, 8, 3), Tries(), Looks())), images)
    assert alive[1] is None


# Bad input


def test_no_inputs_is_an_error_that_says_what_to_pass():
    with pytest.raises(TypeError, match=r"format_summary\(model\) without inputs: pass .*a batch of images"):
        format_summary(nn.Conv2d(3, 3, 1))


def test_something_that_is_no_module_is_an_error():
    with pytest.raises(TypeError, match="model='resnet18' is a str"):
        format_summary("resnet18", torch.ones(1))


@pytest.mark.parametrize("profile, error", [("yes", TypeError), (True, ValueError)])
def test_profile_that_cannot_be_is_an_error(learn, images, profile, error):
    for call in (
        lambda: format_summary(TinyNet(), images, profile=profile),
        lambda: learn.format_summary(profile=profile),
    ):
        with pytest.raises(error, match=f"profile={profile!r}"):
            call()


def test_learner_in_the_place_of_a_model(learn):
    with pytest.raises(TypeError, match=r"model is a Learner: call `learn\.format_summary\(\)`"):
        format_summary(learn, torch.ones(1))


def test_device_that_runs_nothing():
    with pytest.raises(ValueError, match="device 'meta', where nothing runs"):
        format_summary(TinyNet().to("meta"), torch.randn(2, 3, 8, 8, device="meta"))


def test_model_on_a_device_that_runs_nothing():
    with pytest.raises(ValueError, match="device 'meta', where nothing runs"):
        format_summary(TinyNet().to("meta"), torch.randn(2, 3, 8, 8))


def test_batch_that_the_model_rejects_is_its_own_error():
    with pytest.raises(RuntimeError, match="channels"):
        format_summary(TinyNet(), torch.randn(2, 5, 8, 8))


def test_learner_without_data(new_learner):
    learn = new_learner(dls=new_dls(3, 8, 8, n=0))
    before = state_of(learn)
    with pytest.raises(ValueError, match=r"learn\.dls\.train is empty"):
        learn.format_summary()
    assert_unchanged(before, learn)


@pytest.mark.parametrize("event", ["before_fit", "before_batch"])
def test_step_that_a_callback_cancels(new_learner, event):
    learn = new_learner(cbs=raising(event, CancelFitException()))
    with pytest.raises(ValueError, match="callback of the Learner cancelled"):
        learn.format_summary()


class SkipsTwo(Callback):
    def before_batch(self):
        if self.iter < 2:
            raise CancelBatchException


def test_first_steps_that_a_callback_cancels(new_learner, monkeypatch):
    monkeypatch.setattr("channelslast.summary._use_profiler", lambda profile, device: True)  # takes five steps
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    learn = new_learner(thrashing_model, cbs=SkipsTwo())
    summary = learn.to_channelslast(use_amp=False).format_summary()
    assert [layer.module for layer in summary.losers] == ["1", "4"] and summary.gpu is None


@pytest.mark.cuda
def test_first_steps_that_a_callback_cancels_on_cuda(new_learner):
    learn = new_learner(thrashing_model, device="cuda", cbs=SkipsTwo()).to_channelslast()
    assert learn.format_summary().losers


def test_lazy_model(new_learner):
    with pytest.raises(ValueError, match="lazy parameters"):
        format_summary(nn.LazyConv2d(3, 1), torch.randn(1, 3, 4, 4))


# The GPU


def kernel(name, start, end, device_type=DeviceType.CUDA):
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device_type)


def test_gpu_shares_of_kernels_that_overlap():
    events = [
        kernel("conv", 0, 50),
        kernel("nchwToNhwcKernel", 40, 60),  # on another stream
        kernel("conv", 80, 110),
        kernel("cudaLaunchKernel", 0, 1000, DeviceType.CPU),
    ]
    shares = gpu_shares(events, seconds=180e-6)
    assert shares.layout == pytest.approx(20 / 100) and shares.busy == pytest.approx(90 / 180)


@pytest.mark.parametrize(
    "name, is_layout",
    [
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<__half, __half, float, false, true>(...)", True),
        ("void cudnn::engines_precompiled::nhwcToNchwKernel<__half, __half, float, true, false>(...)", True),
        ("void nhwcAddPaddingKernel<__half, __half, float, true, (cudnnKernelDataType_t)0>(...)", True),
        (
            "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<direct_copy_kernel_cuda",
            True,
        ),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(...)", False),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::float16_copy_kernel_cuda(...)", False),
        ("void at::native::elementwise_kernel<128, 4, at::native::CUDAFunctor_add<c10::Half>>", False),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_cudnn", False),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<OpaqueType<2u>, unsigned int, 4>", False),
    ],
)
def test_layout_kernels_are_known_by_name(name, is_layout):
    assert bool(_LAYOUT_KERNELS.search(name)) == is_layout


@pytest.mark.cuda
def test_gpu_shares_of_a_learner(new_learner):
    learn = new_learner(thrashing_model, device="cuda").to_channelslast()
    before = torch.cuda.get_rng_state()
    summary = learn.format_summary()
    assert summary.dtype == "fp16" and summary.device.startswith("cuda")
    assert 0 < summary.gpu.layout < 1 and 0 < summary.gpu.busy <= 1
    assert "in layout kernels" in flat(summary)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert learn.format_summary(profile=False).gpu is None


@pytest.mark.cuda
def test_contiguous_model_spends_more_on_layout_than_a_channels_last_one():
    x = torch.randn(32, 64, 56, 56, device="cuda")
    shares = []
    for channels_last in (False, True):
        model = nn.Sequential(*[nn.Conv2d(64, 64, 3, padding=1) for _ in range(4)]).cuda()
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        with torch.autocast("cuda", torch.float16):
            summary = format_summary(module_to_memory_format(model, channels_last), x.to(memory_format=memory_format))
        shares.append(summary.gpu.layout)
    assert shares[0] > 0.1 > shares[1]


@pytest.mark.cuda
def test_group_norm_on_cuda_keeps_the_format_from_the_version_that_the_hint_tells():
    model = module_to_memory_format(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)).cuda())
    x = torch.randn(2, 3, 8, 8, device="cuda").to(memory_format=torch.channels_last)
    summary = format_summary(model, x, profile=False)
    assert bool(summary.hints) == bool(summary.losers) == (torch.__version__ < "2.15")


def test_patched_method_and_function_are_two(learn):
    assert Learner.format_summary is not format_summary
