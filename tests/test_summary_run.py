"`format_summary` of a model and of a Learner, and that it leaves no trace."

import gc
import random
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TinyNet, TinyVideoNet, new_dls
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from fastai.callback.mixup import MixUp
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from tracing import Views, flat, small_clean_model, thrashing_model

from channelslast.callback import ChannelsLast
from channelslast.formats import TrainFormat
from channelslast.memory_format import module_to_memory_format
from channelslast.precision import FastaiMixedPrecision
from channelslast.summary import FormatTracer, format_summary


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)


# The Learner's own step


def test_learner_in_channels_last(new_learner, bf16_cpu):
    learn = new_learner(small_clean_model).to_channelslast(amp_mode="bf16")
    summary = learn.format_summary()
    assert summary.channels_last_share == 1.0 and summary.events == []
    assert summary.dtype == "bf16" and summary.shapes == [(8, 3, 8, 8)] and summary.model == "Sequential"


def test_learner_in_contiguous_format(new_learner):
    learn = new_learner(small_clean_model).to_channelslast(use_amp=False).to_contiguous()
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

    learn = new_learner(small_clean_model, cbs=[MixUp(), Looks()]).to_channelslast(use_amp=False)
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
    summary = format_summary(
        module_to_memory_format(small_clean_model()), images, loss_func=lambda y: y.square().mean()
    )
    assert summary.events == []


def test_gradients_are_computed_whatever_mode_the_caller_is_in(images):
    model = module_to_memory_format(small_clean_model())
    with torch.no_grad():
        summary = format_summary(model, images)
    assert any(layer.share("backward") == 1.0 for layer in summary.layers)


def test_gradients_are_computed_inside_inference_mode_too():
    x, model = torch.randn(2, 3, 8, 8), small_clean_model()
    with torch.inference_mode():
        summary = format_summary(model, x)
    assert any(layer.share("backward") == 0.0 for layer in summary.layers)


def test_wrapper_of_a_model_is_looked_through(new_learner):
    learn = new_learner(thrashing_model).to_channelslast(use_amp=False)
    assert [layer.module for layer in learn.format_summary().losers] == ["1"]
    learn.model = nn.DataParallel(learn.model)  # in which nothing is swapped, as the GLU `4` is above
    learn.model.device_ids = []  # as where there is no GPU
    assert [layer.module for layer in learn.format_summary().losers] == ["1", "4"]


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
    format_summary(module_to_memory_format(small_clean_model()), images)
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
        new_learner(small_clean_model, loss_func=loss_func, metrics=None).format_summary()
    else:
        format_summary(small_clean_model(), images, loss_func=loss_func)
    values_now, grads_now = state_of_module(loss_func)
    assert all(torch.equal(*pair) for pair in zip(values, values_now)) and grads == grads_now == [None, None]


def test_interrupt_while_the_tracer_is_left_leaves_no_mode(images, monkeypatch):
    exit_tracer, interrupts = FormatTracer.__exit__, [KeyboardInterrupt]

    def interrupted_once(tracer, *exception):
        if interrupts:
            raise interrupts.pop()
        exit_tracer(tracer, *exception)

    monkeypatch.setattr(FormatTracer, "__exit__", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        format_summary(small_clean_model(), images)
    assert not is_in_torch_dispatch_mode()


# A model that calls `.view` on its activations


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
    monkeypatch.setattr("channelslast.summary.learner.choose_profile", lambda profile, device: True)  # takes five steps
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    learn = new_learner(thrashing_model, cbs=SkipsTwo())
    summary = learn.to_channelslast(use_amp=False).format_summary()
    assert [layer.module for layer in summary.losers] == ["1"] and summary.gpu is None


@pytest.mark.cuda
def test_first_steps_that_a_callback_cancels_on_cuda(new_learner):
    learn = new_learner(thrashing_model, device="cuda", cbs=SkipsTwo()).to_channelslast()
    assert learn.format_summary().losers


def test_lazy_model(new_learner):
    with pytest.raises(ValueError, match="lazy parameters"):
        format_summary(nn.LazyConv2d(3, 1), torch.randn(1, 3, 4, 4))
