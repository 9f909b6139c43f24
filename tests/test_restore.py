"A Learner or module as it was, every part of it, whatever happened to it in between."

import random
import threading
from collections import deque

import numpy as np
import pytest
import torch
from conftest import TinyNet, assert_same_tensors, new_dls, tensors_of
from fastai.callback.core import Callback
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.tracker import SaveModelCallback
from fastai.data.load import DataLoader as FastaiDataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Lookahead, OptimWrapper, ranger
from torch import nn

from channelslast.callback import ChannelsLast, TrainFormat
from channelslast.memory_format import is_channels_last, module_to_memory_format
from channelslast.precision import MixedPrecision
from channelslast.restore import unchanged_learner, unchanged_modules, unchanged_tensors


def random_numbers():
    return random.random(), np.random.rand(), torch.rand(1).item()


def misuse(module):
    "Change everything about `module`."
    module_to_memory_format(module, not is_channels_last(module[0].weight))
    module(torch.randn(4, 3, 8, 8)).sum().backward()
    with torch.no_grad():
        for param in module.parameters():
            param.add_(1)
    module.eval()
    module[0].weight.requires_grad_(False)
    module.register_forward_hook(lambda *args: None)
    module[1].momentum = 0.5
    module[1].told = True
    module[1].running_mean = torch.ones(8)
    module.append(nn.Linear(3, 3))
    module.double()
    random_numbers()


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, Interrupted])
@pytest.mark.parametrize("channels_last", [True, False])
def test_module_is_as_before(channels_last, error):
    module = module_to_memory_format(TinyNet(), channels_last)
    module(torch.randn(4, 3, 8, 8)).sum().backward()
    module[4].eval()
    tensors, modes = tensors_of(module), [child.training for child in module.modules()]
    attributes = [set(vars(child)) for child in module.modules()]
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    try:
        with unchanged_modules(module):
            misuse(module)
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt, Interrupted) as raised:
        assert type(raised) is error
    assert_same_tensors(tensors, tensors_of(module))
    assert [child.training for child in module.modules()] == modes
    assert [set(vars(child)) for child in module.modules()] == attributes
    assert not module._forward_hooks and module[1].momentum == 0.1
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


def test_gradients_are_none_in_between():
    module = TinyNet()
    module(torch.randn(4, 3, 8, 8)).sum().backward()
    grad = module[0].weight.grad
    values = grad.clone()
    with unchanged_modules(module):
        assert module[0].weight.grad is None
        module(torch.randn(4, 3, 8, 8)).sum().backward()
    assert module[0].weight.grad is grad and torch.equal(grad, values)


def test_tied_weights_and_expanded_buffers():
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    module[1].weight = module[0].weight
    module.register_buffer("expanded", torch.ones(1, 1).expand(4, 1))
    with unchanged_modules(module):
        module[0].weight.data.zero_()
    assert module[1].weight is module[0].weight and module[0].weight.abs().sum() > 0
    assert module.expanded.stride() == (0, 1)


def test_lazy_parameters_are_an_error():
    with pytest.raises(ValueError, match=r"lazy parameters.*forward pass"), unchanged_modules(nn.LazyConv2d(3, 1)):
        raise AssertionError("must not be reached")


@pytest.mark.parametrize(
    "opt_func",
    [
        None,
        ranger,
        lambda params, **kwargs: OptimWrapper(params, torch.optim.AdamW, **kwargs),
        lambda params, **kwargs: OptimWrapper(params, torch.optim.SGD, momentum=0.9, **kwargs),
    ],
    ids=["Adam", "Lookahead", "AdamW", "SGD"],
)
def test_training_goes_on_as_if_nothing_had_been(new_learner, opt_func):
    kwargs = {} if opt_func is None else {"opt_func": opt_func}
    learns = [new_learner(**kwargs).to_channelslast(use_amp=False) for _ in range(2)]
    for learn in learns:
        torch.manual_seed(1)
        learn.fit(1)
    with unchanged_learner(learns[0]):
        learns[0].fit(2, lr=0.5, wd=0.3)
        learns[0].to_contiguous()
    for learn in learns:
        torch.manual_seed(2)
        learn.fit(2)
    first, second = ([param.detach().clone() for param in learn.model.parameters()] for learn in learns)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert learns[0].recorder.values == learns[1].recorder.values
    assert isinstance(learns[0].opt, Lookahead) == (opt_func is ranger)


def test_optimizer_is_none_where_there_was_none(learn):
    with unchanged_learner(learn):
        learn.fit(1)
    assert learn.opt is None


def test_optimizer_state_is_that_of_before(learn):
    learn.fit(1)
    state = {id(param): dict(values) for param, values in learn.opt.state.items()}
    copies = {key: {name: torch.as_tensor(v).clone() for name, v in values.items()} for key, values in state.items()}
    hypers = [dict(hyper) for hyper in learn.opt.hypers]
    opt = learn.opt
    with unchanged_learner(learn):
        learn.to_channelslast(use_amp=False).fit(1, lr=0.7)
        learn.opt.clear_state()
    assert learn.opt is opt and [dict(hyper) for hyper in opt.hypers] == hypers
    for param, values in opt.state.items():
        for name, value in values.items():
            assert not isinstance(value, torch.Tensor) or value is state[id(param)][name]
            assert torch.equal(torch.as_tensor(value), copies[id(param)][name])


class Remembers(Callback):
    "State of every kind, and something that cannot be copied."

    def __init__(self):
        self.lock = threading.Lock()
        self.batches = []
        self.n = 0
        self.tensor = torch.zeros(2)
        self.nested = {"a": [0], "w": torch.zeros(1)}

    def after_batch(self):
        self.batches.append(self.n)
        self.n += 1
        self.tensor += 1
        self.nested["a"].append(self.n)
        self.nested["w"] += 1

    def state(self):
        return list(self.batches), self.n, self.tensor.tolist(), list(self.nested["a"]), self.nested["w"].item()


def test_callbacks_recorder_and_metrics_are_untouched(new_learner):
    learn = new_learner(cbs=[Remembers(), MixUp(), ActivationStats()])
    learn.add_cb(ProgressCallback)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    cbs, remembers, recorder, metrics = list(learn.cbs), learn.remembers, learn.recorder, list(learn.metrics)
    seen = remembers.state(), list(recorder.losses), list(recorder.values), recorder.smooth_loss.value
    loss_func, attributes = learn.loss_func, dict(vars(learn))
    with unchanged_learner(learn), learn.no_logging():
        assert not learn.cbs.argfirst(lambda cb: isinstance(cb, ProgressCallback))
        learn.fit(2)
        learn.add_cb(MixedPrecision("bf16"))
    assert list(learn.cbs) == cbs and learn.remembers is remembers and list(learn.metrics) == metrics
    assert all(cb.learn is learn for cb in learn.cbs)
    assert seen == (remembers.state(), list(recorder.losses), list(recorder.values), recorder.smooth_loss.value)
    assert learn.loss_func is loss_func and vars(learn).keys() == attributes.keys()
    assert all(vars(learn)[name] is value for name, value in attributes.items())
    assert not any(module._forward_hooks for module in learn.model.modules())


def test_copies_of_callbacks_share_the_model_the_optimizer_and_what_they_share_among_them(learn):
    class Holds(Callback):
        def __init__(self, model, shared):
            self.layer, self.weights, self.shared = model[0], list(model.parameters()), shared

    class HoldsToo(Holds):
        pass

    shared = [1]
    learn.add_cbs([Holds(learn.model, shared), HoldsToo(learn.model, shared)])
    learn.create_opt()
    learn.holds.opt = learn.opt
    with unchanged_learner(learn):
        copy = learn.holds
        assert copy.layer is learn.model[0] and copy.weights[0] is learn.model[0].weight and copy.opt is learn.opt
        assert copy.shared is learn.holds_too.shared is not shared


@pytest.mark.parametrize("module", ["fastai.callback.azureml", "fastai.callback.comet", "fastai.callback.neptune"])
def test_loggers_that_never_keep_quiet_are_left_out(learn, module):
    class Logs(Callback):
        def before_fit(self):
            raise AssertionError("must not be reached")

    Logs.__module__ = module
    learn.add_cb(Logs())
    with unchanged_learner(learn):
        learn.fit(1)
    assert isinstance(learn.cbs[-1], Logs)


def test_attributes_of_modules_of_every_kind():
    class Remembering(nn.Module):
        def __init__(self):
            super().__init__()
            self.tensor, self.array, self.deque = torch.zeros(1), np.zeros(1), deque([1], maxlen=5)
            self.nested, self.generator = [(torch.zeros(1),)], np.random.default_rng(0)

        def forward(self):
            self.tensor += 1
            self.array += 1
            self.deque.append(2)
            self.nested[0][0].add_(1)
            return self.generator.random()

        def state(self):
            return self.tensor.item(), self.array.item(), list(self.deque), self.nested[0][0].item()

    module = Remembering()
    with unchanged_modules(module):
        drawn = module()
    assert module.state() == (0, 0, [1], 0) and module.generator.random() == drawn


def test_weight_shared_by_model_and_loss_keeps_its_gradient():
    module = nn.Linear(2, 2)
    module.weight.grad = grad = torch.ones(2, 2)
    with unchanged_modules(module, nn.Sequential(module)):
        module(torch.ones(1, 2)).sum().backward()
    assert module.weight.grad is grad


def test_tensors_are_as_before():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    x.grad = grad = torch.ones_like(x)
    values, strides = x.detach().clone(), x.stride()
    with pytest.raises(KeyboardInterrupt), unchanged_tensors([x]):
        assert x.grad is None
        x.data = x.data.mul_(2).to(memory_format=torch.channels_last)
        raise KeyboardInterrupt
    assert torch.equal(x, values) and x.stride() == strides and x.grad is grad


def test_savers_and_loggers_write_nothing(learn, tmp_path):
    learn.path = tmp_path
    learn.add_cbs([SaveModelCallback(monitor="train_loss"), CSVLogger()])
    with unchanged_learner(learn):
        learn.fit(1)
    assert list(tmp_path.rglob("*")) == []
    assert not hasattr(learn, "lr_finder")


def shuffled_learner(loader):
    torch.manual_seed(0)
    x = torch.arange(24.0).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    items = list(zip(x, torch.arange(24) % 3))
    dls = new_dls(3, 8, 8)
    dls.loaders[0] = loader(items)
    return Learner(dls, TinyNet(), loss_func=CrossEntropyLossFlat())


@pytest.mark.parametrize(
    "loader",
    [
        lambda items: FastaiDataLoader(items, bs=8, shuffle=True),
        lambda items: torch.utils.data.DataLoader(items, 8, shuffle=True),
        lambda items: torch.utils.data.DataLoader(items, 8, shuffle=True, generator=torch.Generator().manual_seed(3)),
        lambda items: torch.utils.data.DataLoader(
            items, 8, sampler=torch.utils.data.RandomSampler(items, generator=torch.Generator().manual_seed(3))
        ),
    ],
    ids=["fastai", "torch", "torch with a generator", "torch with a sampler"],
)
def test_data_come_in_the_order_they_would_have(loader):
    orders = []
    for disturbed in (True, False):
        random.seed(0)
        learn = shuffled_learner(loader)
        if disturbed:
            with unchanged_learner(learn):
                for _ in learn.dls.train:
                    pass
        orders.append(torch.cat([x[:, 0, 0, 0] for x, _ in learn.dls.train]))
    assert torch.equal(*orders)


@pytest.mark.parametrize("cb", [MixedPrecision("bf16"), ChannelsLast()], ids=["MixedPrecision", "ChannelsLast"])
def test_autocast_is_as_before_an_interrupt(learn, cb, bf16_cpu):
    class Interrupts(Callback):
        order = 100

        def before_batch(self):
            torch.autocast("cpu", torch.bfloat16).__enter__()
            raise KeyboardInterrupt

    learn.add_cbs([cb, Interrupts()])
    with pytest.raises(KeyboardInterrupt), unchanged_learner(learn):
        learn.fit(1)
    assert not torch.is_autocast_enabled("cpu")
    assert not is_channels_last(learn.model[0].weight)


def test_model_wrapped_by_a_callback_is_unwrapped(learn):
    class Wraps(Callback):
        def before_fit(self):
            self.learn.model = nn.Sequential(self.model)

    learn.add_cb(Wraps())
    model = learn.model
    with pytest.raises(ZeroDivisionError), unchanged_learner(learn):
        learn.fit(1)
        raise ZeroDivisionError
    assert learn.model is model


def test_tensors_can_be_put_back_in_between(learn):
    before = learn.model[0].weight.detach().clone()
    with unchanged_learner(learn) as put_tensors_back:
        for _ in range(2):
            learn.fit(1)
            assert not torch.equal(before, learn.model[0].weight)
            put_tensors_back()
            assert torch.equal(before, learn.model[0].weight)


def test_values_that_stay(learn):
    before = learn.model[0].weight.detach().clone()
    hooks = len(learn.model[0]._forward_hooks)
    with unchanged_learner(learn, values=False):
        learn.to_channelslast(use_amp=False).fit(1)
        learn.model[0].register_forward_hook(lambda *args: None)
    assert not torch.equal(before, learn.model[0].weight) and is_channels_last(learn.model[0].weight)
    assert learn.opt is None and len(learn.model[0]._forward_hooks) == hooks and learn.train_format == TrainFormat()


def test_loaders_that_a_callback_replaced(learn):
    loaders = learn.dls.loaders
    with unchanged_learner(learn):
        learn.dls.loaders = [[], []]
    assert learn.dls.loaders is loaders


class Point:
    "An object with a state of every kind, and what must be left alone."

    def __init__(self):
        self.n, self.items, self.tensor = 0, [1], torch.zeros(1)
        self.module, self.iterator, self.itself = nn.BatchNorm1d(2), iter([1, 2, 3]), self


@pytest.mark.parametrize("holder", ["attribute", "list", "loss"])
def test_state_of_objects_that_a_module_holds(holder):
    point, module = Point(), nn.Linear(2, 2)
    module.held = point if holder == "attribute" else {"point": [point]}
    with unchanged_modules(module):
        point.n, point.new = 5, 5
        point.items.append(2)
        point.tensor += 1
        point.module(torch.randn(4, 2))
        assert next(point.iterator) == 1
    assert point.n == 0 and point.items == [1] and point.tensor == 0 and not hasattr(point, "new")
    assert point.module.num_batches_tracked == 0 and next(point.iterator) == 2


def test_generators_that_data_reach(learn):
    class Data(list):
        pass

    generators = [
        random.Random(1),
        np.random.default_rng(1),
        np.random.RandomState(1),
        torch.Generator().manual_seed(1),
    ]

    def draw():
        first, second, third, fourth = generators
        return first.random(), second.random(), third.rand(), torch.rand(1, generator=fourth).item()

    data = Data([1])
    data.in_list, data.in_function, data.many = [generators[0]], draw, [object()] * 20_000
    learn.dls.loaders[0] = data
    with unchanged_learner(learn):
        drawn = draw()
    assert draw() == drawn
