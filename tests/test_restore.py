"A Learner or module as it was, every part of it, whatever happened to it in between."

import copy
import random
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TinyNet, assert_same_tensors, new_dls, tensors_of
from fastai.callback.core import Callback
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.load import DataLoader as FastaiDataLoader
from fastai.data.transforms import Transform
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import AccumMetric
from fastai.optimizer import Lookahead, OptimWrapper, ranger
from fastcore.foundation import L
from fastcore.xtras import ReindexCollection
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from channelslast.callback import ChannelsLast
from channelslast.fit import FitDone
from channelslast.formats import TrainFormat
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


def test_callbacks_are_themselves_in_between(learn):
    class Counts(Callback):
        n = 0

        def after_batch(self):
            self.n += 1

    learn.add_cb(Counts())
    counts, metric = learn.counts, learn.metrics[0]
    with unchanged_learner(learn):
        learn.fit(1)
        assert learn.counts is counts and learn.metrics[0] is metric and counts.n == 6
    assert counts.n == 0 and "n" not in vars(counts)


class Average:
    "A model that a callback holds, with a count of how many there are."

    n_alive = 0

    def __new__(cls, *args):
        cls.n_alive += 1
        return super().__new__(cls)

    def __init__(self, model):
        self.model = copy.deepcopy(model)

    def __del__(self):
        Average.n_alive -= 1


class AveragesWeights(Callback):
    def __init__(self, model):
        self.average, self.tensors = Average(model), [param.detach().clone() for param in model.parameters()]

    def after_batch(self):
        self.average.model(self.x)
        for param, other in zip(self.average.model.parameters(), self.model.parameters()):
            param.data.lerp_(other.data, 0.5)
        for tensor, other in zip(self.tensors, self.model.parameters()):
            tensor.lerp_(other.data, 0.5)


def test_model_and_tensors_that_a_callback_holds(learn):
    learn.add_cb(AveragesWeights(learn.model))
    average, tensors = learn.averages_weights.average, learn.averages_weights.tensors
    before, values = tensors_of(average.model), [tensor.clone() for tensor in tensors]
    with unchanged_learner(learn):
        for _ in range(2):
            with unchanged_learner(learn, values=False):
                learn.fit(1, 0.5)
                assert Average.n_alive == 1
            assert not torch.equal(average.model[0].weight, before[0][5]) and not torch.equal(tensors[0], values[0])
    assert learn.averages_weights.average is average and learn.averages_weights.tensors is tensors
    assert_same_tensors(before, tensors_of(average.model))
    assert all(map(torch.equal, tensors, values))


class Numbered(list):
    "A list that is made from a number."

    def __init__(self, n, doubled=False):
        super().__init__(range(n))
        self.doubled = doubled

    def __iter__(self):
        raise AssertionError("its own way of iterating")


@dataclass
class Record:
    items: list


class InSlots:
    __slots__ = ("items", "n", "unset")

    def __init__(self):
        self.n, self.items = 0, [1]


def disturb(container):
    for item in list.copy(container) if isinstance(container, list) else list(container):
        container.remove(item) if not isinstance(container, dict) else container.pop(item)
    container.update({7: 7}) if isinstance(container, dict) else None
    container.add(7) if isinstance(container, set) else None
    container.extend(range(9)) if isinstance(container, (list, deque)) else None


@pytest.mark.parametrize(
    "container",
    [
        [1, 2],
        {1: [], 2: []},
        {1, 2},
        deque([1, 2, 3], maxlen=3),
        defaultdict(list, {1: [2]}),
        OrderedDict([(2, 1), (1, 2)]),
        Counter("aab"),
        Numbered(3),
        L(1, 2).items,
    ],
    ids=lambda container: type(container).__name__,
)
@pytest.mark.parametrize("holder", [Callback, nn.Linear])
def test_containers(learn, holder, container):
    if isinstance(container, OrderedDict):
        container.move_to_end(2)
    held = holder() if holder is Callback else holder(1, 1)
    held.nested = ({"deep": container},)
    learn.add_cb(held) if holder is Callback else learn.model.append(held)
    before = repr(container), copy.copy(vars(container)) if hasattr(container, "__dict__") else None
    with unchanged_learner(learn):
        disturb(container)
        if isinstance(container, Numbered):
            container.doubled = True
        held.nested = None
    assert held.nested[0]["deep"] is container and repr(container) == before[0]
    assert before[1] is None or vars(container) == before[1]
    assert not isinstance(container, deque) or container.maxlen == 3


@pytest.mark.parametrize("new", [L, SimpleNamespace, Record, partial], ids=lambda new: new.__name__)
def test_objects_that_hold_a_list(learn, new):
    items = [1]
    held = new(items) if new is L else new(list, items) if new is partial else new(items=items)
    learn.add_cb(Callback())
    learn.callback.held = held
    before = repr(held)
    with unchanged_learner(learn):
        items.append(2)
        if new is not partial:
            held.items = []
    assert learn.callback.held is held and repr(held) == before and items == [1]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 4))[:, ::2],
        np.array([{}, [1]], object),
        np.ma.masked_array([1.0, 2.0], [True, False]),
        np.zeros(2, [("a", "f4"), ("b", "i8")]),
        np.array(1),
    ],
    ids=["strided", "objects", "masked", "records", "number"],
)
def test_arrays(array):
    module = nn.Module()
    module.held, before = {"array": array}, repr(array)
    with unchanged_modules(module):
        array[...] = array[..., ::-1] if array.ndim else 2
        if isinstance(array, np.ma.MaskedArray):
            array.mask = True
        elif array.dtype.names or array.size > 5:
            array[...] = 7
    assert module.held["array"] is array and repr(array) == before


class WithoutDict:
    "As an object of a class that is compiled: there is room for attributes, and none."

    @property
    def __dict__(self):
        raise AttributeError


def test_object_that_has_no_attributes_where_its_class_has_room_for_them(learn):
    learn.held = held = WithoutDict()
    assert type(held).__dictoffset__
    with unchanged_learner(learn):
        learn.held = None
    assert learn.held is held


@pytest.mark.parametrize("holder", [Callback, nn.Linear])
def test_objects_with_slots(learn, holder):
    held = holder() if holder is Callback else holder(1, 1)
    held.slots = slots = InSlots()
    learn.add_cb(held) if holder is Callback else learn.model.append(held)
    with unchanged_learner(learn):
        slots.n, slots.unset = 5, 5
        slots.items.append(2)
        del slots.items
    assert slots.n == 0 and slots.items == [1] and not hasattr(slots, "unset")


def test_hooks_that_callbacks_leave_behind(learn):
    class Hooks(Callback):
        def before_fit(self):
            weight = self.model[0].weight
            self.model[0].register_forward_hook(lambda *args: None)
            weight.register_hook(lambda grad: grad)
            self.model[0].bias.register_hook(lambda grad: grad)
            weight.register_post_accumulate_grad_hook(lambda param: None)
            weight.mark = True
            raise FitDone()

    weight = learn.model[0].weight
    weight.register_hook(torch.zeros_like)
    hooks = dict(weight._backward_hooks)
    learn.add_cb(Hooks())
    with unchanged_learner(learn), pytest.raises(FitDone):
        learn.fit(1)
    assert not learn.model[0]._forward_hooks and not weight._post_accumulate_grad_hooks
    assert weight._backward_hooks == hooks and not learn.model[0].bias._backward_hooks and not hasattr(weight, "mark")
    learn.model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert not weight.grad.any()


def test_metrics_with_a_state(new_learner):
    metric = AccumMetric(lambda preds, targets: len(preds), flatten=False)
    learn = new_learner(metrics=[metric])
    learn.fit(1)
    state = {name: id(value) for name, value in vars(metric).items()}
    preds = list(metric.preds)
    with unchanged_learner(learn):
        learn.fit(1)
    assert {name: id(value) for name, value in vars(metric).items()} == state
    assert learn.metrics[0] is metric and all(a is b for a, b in zip(metric.preds, preds, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: setattr(tensor, "data", torch.zeros(5)),
        lambda tensor: tensor.resize_(7).zero_(),
        lambda tensor: tensor.set_(torch.zeros(1)),
        lambda tensor: setattr(tensor, "data", tensor.double()),
        lambda tensor: tensor.requires_grad_(),
        lambda tensor: tensor.add_(torch.ones(2, 2, requires_grad=True)),
        lambda tensor: tensor.t_(),
        lambda tensor: tensor.neg_(),
    ],
    ids=[
        "replaced",
        "resized",
        "set",
        "of another dtype",
        "trained",
        "with a history",
        "transposed",
        "negated",
    ],
)
def test_tensor_in_a_list_of_a_callback(learn, change):
    tensor = torch.tensor([[0.0, float("nan")], [1.0, 2.0]])
    memory, bits = tensor.data_ptr(), tensor.view(torch.int32).clone()
    learn.add_cb(Callback())
    learn.callback.held = [tensor]
    with unchanged_learner(learn):
        change(tensor)
    assert tensor.data_ptr() == memory or tensor.untyped_storage().nbytes() > 16  # PyTorch made room elsewhere
    assert (
        tensor.stride() == (2, 1)
        and torch.equal(tensor.view(torch.int32), bits)
        and not tensor.requires_grad
        and tensor.is_leaf
    )


def test_tensor_that_trains_in_a_list_of_a_callback(learn):
    tensor = torch.ones(2, requires_grad=True)
    tensor.grad = grad = torch.ones(2)
    learn.add_cb(Callback())
    learn.callback.held = [tensor]
    with unchanged_learner(learn, values=False):
        assert tensor.grad is None
        (2 * tensor).sum().backward()
        tensor.requires_grad_(False)
    assert tensor.grad is grad and tensor.requires_grad and torch.equal(grad, torch.ones(2))


def new_fake():
    with FakeTensorMode():
        return torch.ones(2)


def new_inference():
    with torch.inference_mode():
        return torch.ones(2)


@pytest.mark.parametrize(
    "new",
    [
        new_fake,
        new_inference,
        lambda: torch.ones(2, device="meta"),
        lambda: torch.ones(1, 3).expand(4, 3),
        lambda: torch.arange(5.0).unfold(0, 3, 1),
        lambda: torch.eye(2).to_sparse(),
        lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8),
        lambda: torch.ones(2, dtype=torch.complex64).conj(),
        lambda: torch.ones(2, dtype=torch.float8_e4m3fn),
        lambda: torch.zeros(0),
    ],
    ids=[
        "fake",
        "inference",
        "meta",
        "expanded",
        "overlapping",
        "sparse",
        "nested",
        "quantized",
        "complex",
        "8 bits",
        "empty",
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_every_kind(new):
    module = nn.BatchNorm1d(2)
    module.held = held = new()
    shown = str(held)
    with unchanged_modules(module):
        module(torch.randn(4, 2))
        module.held = None
    assert module.held is held and str(held) == shown and module.num_batches_tracked == 0


def test_values_of_an_expanded_tensor():
    module = nn.Module()
    base = torch.ones(1, 3)
    module.expanded = base.expand(4, 3)
    with unchanged_modules(module):
        base.zero_()
    assert base.all() and module.expanded.stride() == (0, 1)


@pytest.mark.filterwarnings("ignore")
def test_read_only_arrays_and_tensors_over_them(learn, tmp_path):
    "To write to a file that is mapped read-only ends the process."
    np.array([1.0, float("nan")], "float32").tofile(tmp_path / "numbers")
    mapped = np.memmap(tmp_path / "numbers", "float32", "r")
    learn.model[1].broadcast, learn.model[1].mapped = np.broadcast_to(np.zeros(1), 3), mapped
    learn.model[1].over_mapped = torch.from_numpy(mapped)
    learn.add_cb(Callback())
    learn.callback.held = [learn.model[1].broadcast, learn.model[1].over_mapped]
    tensors = tensors_of(learn.model)
    with unchanged_learner(learn):
        learn.fit(1)
    assert_same_tensors(tensors, tensors_of(learn.model))


def module_with_arrays():
    module = TinyNet()
    module[0].first, module[1].array, module[2].last = np.zeros(1), np.zeros(2), np.zeros(1)
    return module


def misuse_arrays(module):
    for array in (module[0].first, module[1].array, module[2].last):
        array += 1
    misuse(module)
    module[1].array.flags.writeable = False


def assert_all_but_one_is_back(module, tensors, state):
    assert module[1].array.tolist() == [1, 1] and module[0].first == module[2].last == 0
    assert_same_tensors(tensors, tensors_of(module))
    assert module.training and torch.equal(torch.get_rng_state(), state)


def test_what_fails_to_come_back_is_named_and_everything_else_comes_back():
    module = module_with_arrays()
    tensors, state = tensors_of(module), torch.get_rng_state()
    message = r"put back TinyNet\._modules\['1'\]\.array \(ValueError: .*read-only\)$"
    with pytest.raises(RuntimeError, match=message) as raised, unchanged_modules(module):
        misuse_arrays(module)
    assert isinstance(raised.value.__cause__, ValueError)
    assert_all_but_one_is_back(module, tensors, state)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, Interrupted])
def test_error_of_the_user_is_told_what_fails_to_come_back(error):
    module = module_with_arrays()
    tensors, state, raised = tensors_of(module), torch.get_rng_state(), error("mine")
    with pytest.raises(error, match="mine") as caught, unchanged_modules(module):
        misuse_arrays(module)
        raise raised
    assert caught.value is raised and caught.value.__cause__ is None
    assert "could not put back TinyNet._modules['1'].array (ValueError" in raised.__notes__[0]
    assert_all_but_one_is_back(module, tensors, state)


def test_many_that_fail_to_come_back_are_counted():
    module = nn.Module()
    module.arrays = [np.zeros(1) for _ in range(12)]
    message = r"Module\.arrays\[0\] .*Module\.arrays\[4\] \(.*\) and 7 more$"
    with pytest.raises(RuntimeError, match=message), unchanged_modules(module):
        for array in module.arrays:
            array.flags.writeable = False


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
    learn.add_cbs([SaveModelCallback(monitor="train_loss"), EarlyStoppingCallback("train_loss"), CSVLogger()])
    before = [dict(vars(cb)) for cb in learn.cbs]
    with unchanged_learner(learn):
        learn.fit(1)
    assert list(tmp_path.rglob("*")) == []
    assert not hasattr(learn, "lr_finder") and [vars(cb) for cb in learn.cbs] == before


def test_progress_bar_that_was_taken_off(learn):
    learn.add_cb(ProgressCallback())
    progress, cbs = learn.progress, list(learn.cbs)
    with unchanged_learner(learn), learn.no_bar():
        learn.fit(1)
    assert learn.progress is progress and progress.learn is learn and list(learn.cbs) == cbs


def test_callbacks_and_data_that_were_exchanged(learn):
    learn.add_cbs([MixedPrecision("bf16"), ChannelsLast()])
    cbs, items, dls, channels_last = learn.cbs, list(learn.cbs), learn.dls, learn.channels_last
    with unchanged_learner(learn):
        learn.to_contiguous(to_fp32=True)
        learn.add_cb(MixUp())
        dls.loaders = learn.dls = None
        assert channels_last.learn is None
    assert learn.cbs is cbs and list(cbs) == items and learn.dls is dls and len(dls.loaders) == 2
    assert learn.channels_last is channels_last and channels_last.learn is learn and not hasattr(learn, "mix_up")


class ShufflesInPlace(FastaiDataLoader):
    "As fastai's loader for language models: the next order comes from this one."

    def __init__(self, items, **kwargs):
        super().__init__(items, **kwargs)
        self.order = ReindexCollection(range(len(items)))

    def get_idxs(self):
        self.order.shuffle()
        return list(self.order.idxs)


def shuffled_learner(loader):
    torch.manual_seed(0)
    x = torch.arange(144.0).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    items = list(zip(x, torch.arange(144) % 3))
    dls = new_dls(3, 8, 8)
    dls.loaders[0] = loader(items)
    return Learner(dls, TinyNet(), loss_func=CrossEntropyLossFlat())


@pytest.mark.parametrize(
    "loader",
    [
        lambda items: FastaiDataLoader(items, bs=8, shuffle=True),
        lambda items: torch.utils.data.DataLoader(items, 8, shuffle=True),
        lambda items: torch.utils.data.DataLoader(items, 8, shuffle=True, generator=torch.Generator().manual_seed(3)),
        lambda items: ShufflesInPlace(items, bs=8),
        lambda items: torch.utils.data.DataLoader(
            items, 8, sampler=torch.utils.data.RandomSampler(items, generator=torch.Generator().manual_seed(3))
        ),
    ],
    ids=["fastai", "torch", "torch with a generator", "in place", "torch with a sampler"],
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


class Untouchable:
    "An item of a data set, which nobody may look into."

    @property
    def __dict__(self):
        raise AssertionError("looked into")


class Copied(TorchDispatchMode):
    "Counts the bytes that operators write."

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result._base is None:
            self.nbytes += result.nbytes
        return result


class Images(torch.utils.data.Dataset):
    "Images in one tensor, with labels in a list and a cache of what has been read."

    def __init__(self, n):
        self.images, self.labels, self.cache, self.n_read = torch.zeros(n, 3, 8, 8), [0] * n, {}, 0
        self.first, self.array = [torch.zeros(3, 8, 8)] * 9, np.zeros(n)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        self.cache[i] = self.images[i]
        self.n_read += 1
        return self.cache[i], self.labels[i]


class Tensors:
    "A DataLoader of tensors."

    def __init__(self, *tensors):
        self.tensors, self.n_epochs = tensors, 0

    def __iter__(self):
        self.n_epochs += 1
        return iter([[tensor[:8] for tensor in self.tensors]])


@pytest.mark.parametrize(
    "loader",
    [
        lambda: FastaiDataLoader([(torch.zeros(3, 8, 8), 0)] * 200, bs=8),
        lambda: torch.utils.data.DataLoader([(torch.zeros(3, 8, 8), 0)] * 50, 8),
        lambda: FastaiDataLoader([Untouchable()] * 200, bs=8),
        lambda: torch.utils.data.DataLoader(Images(200), 8),
        lambda: FastaiDataLoader(Images(50), bs=8),
        lambda: [[torch.zeros(8, 3, 8, 8), torch.zeros(8).long()]] * 9,
        lambda: Tensors(torch.zeros(200, 3, 8, 8), torch.zeros(200).long()),
    ],
    ids=["fastai", "torch", "items", "Dataset", "Dataset of fastai's", "list", "tensors"],
)
def test_data_are_not_copied(new_learner, loader):
    learn = new_learner(lambda: nn.Linear(1, 1), DataLoaders(loader(), loader(), device="cpu"))
    learn.add_cb(Callback())
    learn.callback.own = loader() if not isinstance(learn.dls.train, (list, Tensors)) else None
    with Copied() as copied, unchanged_learner(learn):
        pass
    assert copied.nbytes < 100


def test_data_set_is_as_before(new_learner):
    data = Images(200)
    learn = new_learner(dls=DataLoaders(*[FastaiDataLoader(data, bs=8) for _ in range(2)], device="cpu"))
    with unchanged_learner(learn):
        learn.fit(1)
        assert data.n_read == 400
        data.labels.reverse()
        data.labels.append(1)
    assert data.n_read == 0 and data.cache == {} and data.labels == [0] * 200


def test_transforms_are_as_before(new_learner):
    class CountsImages(Transform):
        n = 0

        def __init__(self):
            super().__init__()
            self.shapes, self.norm = [], nn.BatchNorm2d(3)

        def encodes(self, x: torch.Tensor):
            self.n += 1
            self.shapes.append(x.shape)
            return self.norm(x[None])[0].detach() if x.ndim == 3 else x

    counts = CountsImages()
    items = [(torch.zeros(3, 8, 8), torch.tensor(0))] * 16
    dls = DataLoaders(*[TfmdDL(items, bs=8, after_item=[counts]) for _ in range(2)], device="cpu")
    learn = new_learner(dls=dls)
    with unchanged_learner(learn):
        learn.fit(1)
        assert counts.n > 0 and counts.norm.num_batches_tracked > 0
    assert counts.n == 0 and counts.shapes == [] and counts.norm.num_batches_tracked == 0


class OwnPickle:
    "As a data frame or an image, which hold more than their attributes, has."

    def __init__(self):
        self.n = 0

    def __getstate__(self):
        return {}


class HoldsFile:
    def __init__(self, file):
        self.n, self.file = 0, file


@pytest.mark.parametrize("holder", [Callback, nn.Linear])
def test_what_has_no_way_back_is_left_alone(learn, tmp_path, digits_folder, holder):
    held = holder() if holder is Callback else holder(1, 1)
    learn.add_cb(held) if holder is Callback else learn.model.append(held)
    held.frame = frame = pd.DataFrame({"a": [1.0, 2.0]})
    held.image = image = Image.open(next(digits_folder.rglob("*.png")))
    held.pickled, held.set = OwnPickle(), threading.Event()
    with (tmp_path / "file").open("w") as file, unchanged_learner(learn):
        held.with_file = HoldsFile(file)
        with unchanged_learner(learn):
            held.with_file.n = held.pickled.n = 1
            held.frame.loc[0, "a"] = 5.0
            held.set.set()
            image.load()
        assert held.with_file.n == held.pickled.n == 1 and held.set.is_set()
    assert held.frame is frame and frame["a"].tolist() == [5.0, 2.0]
    assert held.image is image and image.resize((2, 2)).size == (2, 2)


def test_another_learner_is_left_alone(new_learner):
    learn, teacher = new_learner(), new_learner()
    learn.add_cb(Callback())
    learn.callback.teacher = teacher
    with unchanged_learner(learn):
        teacher.fit(1)
    assert teacher.opt is not None


def test_variables_of_functions(new_learner):
    "Those of functions that load data come back; what a callback's own function collects is the user's."
    loaded, trained, generator = [], [], random.Random(1)

    def collate(items):
        loaded.append(generator.random())
        return torch.utils.data.default_collate(items)

    items = [(torch.zeros(3, 8, 8), 0)] * 8
    dls = DataLoaders(*[torch.utils.data.DataLoader(items, 4, collate_fn=collate) for _ in range(2)], device="cpu")
    learn = new_learner(dls=dls, cbs=Callback(after_batch=lambda cb: trained.append(1)))
    with unchanged_learner(learn):
        learn.fit(1)
    assert loaded == [] and generator.random() == random.Random(1).random() and len(trained) == 4


@pytest.mark.parametrize("values", [True, False])
def test_items_of_large_containers_are_values(learn, values):
    numbers = list(range(20_000))
    learn.add_cb(Callback())
    learn.callback.numbers = numbers
    with unchanged_learner(learn, values):
        numbers.reverse()
    assert numbers == (list(range(20_000)) if values else list(range(20_000))[::-1])


@pytest.mark.filterwarnings("ignore")
def test_scripted_module():
    module = torch.jit.script(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)))
    weight, values = module[1].weight, module[1].weight.detach().clone()
    with unchanged_modules(nn.Sequential(module)):
        module(torch.randn(4, 2)).sum().backward()
        module.eval()
        weight.data.zero_()
    assert module.training and module[0].training and module[0].num_batches_tracked == 0
    assert torch.equal(module[1].weight, values) and weight.grad is None


def test_methods_and_partials_lead_to_what_they_belong_to(learn):
    class Monitor:
        def __init__(self):
            self.n = 0

        def count(self, *args):
            self.n += 1

    monitors = [Monitor(), Monitor()]
    learn.add_cb(Callback(after_batch=monitors[0].count))
    learn.model.register_forward_hook(partial(Monitor.count, monitors[1]))
    with unchanged_learner(learn):
        learn.fit(1)
        assert monitors[0].n and monitors[1].n
    assert monitors[0].n == monitors[1].n == 0
