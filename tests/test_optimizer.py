"Fused steps: the same training as with fastai's own, the same state and files, and what has no fused form."

import copy
import pickle
import warnings
import weakref
from functools import partial

import pytest
import torch
from conftest import TinyNet, new_dls
from fastai.callback import schedule  # noqa: F401, for `fit_one_cycle`
from fastai.callback.core import Callback, CancelTrainException
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.optimizer import (
    SGD,
    Adam,
    Lamb,
    Lookahead,
    Optimizer,
    OptimWrapper,
    QHAdam,
    RAdam,
    RMSProp,
    average_grad,
    momentum_step,
    ranger,
    sgd_step,
    weight_decay,
)
from fastcore.foundation import L
from torch import nn

import channelslast.all  # noqa: F401, for `after_exception`
from channelslast import fused_steps
from channelslast.devices import has_fused_steps
from channelslast.fused_steps import ADAM_KERNELS, Plan
from channelslast.optimizer import (
    FusedOptimizer,
    check_fused_optimizer,
    found_inf_reader,
    fuse,
    give_found_inf,
    unfuse,
    why_not_fused,
)
from channelslast.precision import MixedPrecision


def lookahead(make, **options):
    return lambda params, lr, **kwargs: Lookahead(make(params, lr=lr, **options, **kwargs), k=3)


def wrapped(make, **options):
    return lambda params, lr: OptimWrapper(params, partial(make, **options), lr=lr)


FASTAI = {
    "Adam": partial(Adam, wd=0.1),
    "Adam L2": partial(Adam, wd=0.1, decouple_wd=False),
    "Adam without decay": partial(Adam, wd=0.0),
    "SGD": SGD,
    "SGD true decay": partial(SGD, wd=0.1),
    "SGD L2": partial(SGD, wd=0.1, decouple_wd=False),
    "momentum": partial(SGD, mom=0.9),
    "momentum true decay": partial(SGD, mom=0.9, wd=0.1),
    "momentum L2": partial(SGD, mom=0.9, wd=0.1, decouple_wd=False),
    "Lookahead Adam": lookahead(Adam, wd=0.1),
    "Lookahead momentum": lookahead(SGD, mom=0.9, wd=0.1),
}
TORCH = {
    "torch Adam": wrapped(torch.optim.Adam, weight_decay=0.1, amsgrad=True),
    "torch AdamW": wrapped(torch.optim.AdamW, foreach=True),
    "torch SGD": wrapped(torch.optim.SGD, momentum=0.9, nesterov=True),
    "torch Adagrad": wrapped(torch.optim.Adagrad),
}
every_fastai = pytest.mark.parametrize("opt_func", FASTAI.values(), ids=FASTAI)
every_torch = pytest.mark.parametrize("opt_func", TORCH.values(), ids=TORCH)
every = pytest.mark.parametrize("opt_func", [*FASTAI.values(), *TORCH.values()], ids=[*FASTAI, *TORCH])
FEW = ["Adam", "momentum true decay", "Lookahead Adam", "torch AdamW"]
few = pytest.mark.parametrize("opt_func", [{**FASTAI, **TORCH}[name] for name in FEW], ids=FEW)
MORE = [*FEW, "SGD true decay", "torch SGD", "torch Adagrad"]
more = pytest.mark.parametrize("opt_func", [{**FASTAI, **TORCH}[name] for name in MORE], ids=MORE)

SHAPES = [[(4, 3, 3, 3), (4,), (1, 3, 1, 1)], [(5, 4), (5,), ()]]


class Twin:
    "An optimizer of two groups with parameters and gradients that are always the same."

    def __init__(self, opt_func, device="cpu", shapes=SHAPES):
        generator = torch.Generator().manual_seed(1)

        def new(shape):
            param = torch.randn(shape, generator=generator).to(device)
            return nn.Parameter(param.to(memory_format=torch.channels_last) if param.ndim == 4 else param)

        self.generator = torch.Generator().manual_seed(2)
        self.groups = [[new(shape) for shape in group] for group in shapes]
        self.params = [param for group in self.groups for param in group]
        self.opt = opt_func(self.groups, lr=0.1)
        if not isinstance(self.opt, OptimWrapper):
            for group in self.groups:
                self.opt.state[group[1]]["do_wd"] = False
            self.opt.state[True]["do_wd"] = False  # where fastai's `create_opt` puts the `bias=True` of an RNN
        self.n = 0

    def new_gradients(self):
        for param in self.params:
            grad = torch.randn(param.shape, generator=self.generator).to(param)
            param.grad = torch.empty_like(param).copy_(grad) if param.grad is None else param.grad.copy_(grad)

    def step(self, n=1, found_inf=None):
        for _ in range(n):
            self.n += 1
            self.opt.set_hyper("lr", [0.01 + 0.004 * (self.n % 7), 0.1 - 0.003 * self.n])
            if "mom" in self.opt.hypers[0] and self.opt.hypers[0]["mom"]:
                self.opt.set_hyper("mom", 0.95 - 0.01 * (self.n % 9))
            self.new_gradients()
            if found_inf is not None:
                give_found_inf(self.opt, torch.tensor(float(found_inf), device=self.params[0].device))
            self.opt.step()
            self.opt.zero_grad()
        return self

    def overflow(self, n=2, found_inf=1):
        "Make steps that overflow, and be as if there had been none."
        before = self.n, self.generator.get_state()
        self.step(n, found_inf)
        self.n = before[0]
        self.generator.set_state(before[1])
        if isinstance(self.opt, OptimWrapper):
            del self.opt.opt.found_inf  # as `GradScaler` does
        return self

    def fuse(self):
        fuse(self.opt)
        return self

    def unfuse(self):
        unfuse(self.opt)
        return self


def state_of(opt):
    return copy.deepcopy(opt.state_dict())


def assert_close(first, second, rtol=0.0):
    "Nested values are of the same types, and equal but for rounding."
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and first.device == second.device
        difference = (first - second).abs().double().norm()
        assert difference <= rtol * (second.abs().double().norm() + 1e-7)
    elif isinstance(first, dict):
        assert set(first) == set(second)
        for name in first:
            assert_close(first[name], second[name], rtol)
    elif isinstance(first, (list, tuple, L)):
        assert len(first) == len(second)
        for a, b in zip(first, second):
            assert_close(a, b, rtol)
    else:
        assert type(first) is type(second) and first == second


def assert_same_training(first, second, rtol=1e-5):
    assert_close(first.params, second.params, rtol)
    assert_close(state_of(first.opt), state_of(second.opt), rtol)


# The same steps


@every
def test_fused_steps_equal_the_plain_ones(opt_func):
    plain, fused = Twin(opt_func), Twin(opt_func).fuse()
    plain.step(24), fused.step(24)
    assert_same_training(fused, plain)
    assert_same_training(fused.unfuse(), plain)


@every
def test_training_goes_from_plain_to_fused_and_back(opt_func):
    plain, other = Twin(opt_func), Twin(opt_func)
    plain.step(15), other.step(5).fuse().step(5).unfuse().step(5)
    assert_same_training(other, plain)


@every
def test_state_goes_both_ways(opt_func):
    plain, fused = Twin(opt_func).step(7), Twin(opt_func).fuse().step(7)
    to_plain, to_fused = Twin(opt_func), Twin(opt_func).fuse()
    for source, target in ((fused, to_plain), (plain, to_fused)):
        target.opt.load_state_dict(state_of(source.opt))
        for param, value in zip(target.params, source.params):
            param.data = value.data.clone()
        target.n = source.n
        target.generator.set_state(source.generator.get_state())
    assert_close(state_of(to_plain.opt), state_of(fused.opt))
    for twin in (plain, fused, to_plain, to_fused):
        twin.step(7)
    assert_same_training(to_plain, plain)
    assert_same_training(to_fused, plain)
    assert_same_training(to_fused, fused)


@few
def test_cleared_state_begins_anew(opt_func):
    twins = plain, fused = Twin(opt_func), Twin(opt_func).fuse()
    for twin in twins:
        twin.step(4).opt.clear_state()
        twin.step(4)
    assert_same_training(fused, plain)


@every_fastai
def test_fastai_optimizer_is_afterwards_what_it_was(opt_func):
    twin = Twin(opt_func)
    opt, inner = twin.opt, getattr(twin.opt, "opt", twin.opt)
    kept = type(opt), type(inner), set(vars(opt)), set(vars(inner))
    assert why_not_fused(opt) == ""
    twin.fuse().step(2, found_inf=0).unfuse()
    assert twin.opt is opt and (type(opt), type(inner), set(vars(opt)), set(vars(inner))) == kept


@every_torch
def test_torch_optimizer_is_afterwards_what_it_was(opt_func):
    twin, plain = Twin(opt_func), Twin(opt_func).step(2)
    inner = twin.opt.opt
    kept, groups = set(vars(inner)), copy.deepcopy([{**group, "params": ()} for group in inner.param_groups])
    twin.fuse().step(2)
    assert all(group["fused"] for group in inner.param_groups)
    twin.unfuse()
    assert twin.opt.opt is inner and set(vars(inner)) == kept
    assert not inner._optimizer_state_dict_post_hooks and not inner._optimizer_load_state_dict_post_hooks
    assert [group["fused"] for group in inner.param_groups] == [group["fused"] for group in groups]
    assert [group["foreach"] for group in inner.param_groups] == [group["foreach"] for group in groups]
    assert_close(inner.state_dict(), plain.opt.opt.state_dict(), 1e-5)


def test_torch_optimizer_that_is_fused_stays_as_it_is():
    twin = Twin(wrapped(torch.optim.AdamW, fused=True))
    twin.fuse().step().unfuse()
    assert all(group["fused"] for group in twin.opt.opt.param_groups) and twin.opt.opt._step_supports_amp_scaling


def test_fused_twice_is_undone_once():
    for opt_func in (FASTAI["Lookahead Adam"], TORCH["torch SGD"]):
        twin = Twin(opt_func)
        before = type(twin.opt), copy.deepcopy(twin.opt.hypers)
        twin.fuse().fuse().unfuse().unfuse()
        assert (type(twin.opt), twin.opt.hypers) == before


@every_fastai
def test_copy_and_pickle_of_a_fused_optimizer_are_plain(opt_func):
    twin = Twin(opt_func).fuse().step(2)
    twin.step(found_inf=0)
    for other in (copy.deepcopy(twin.opt), pickle.loads(pickle.dumps(twin.opt))):
        assert type(other) in (Optimizer, Lookahead) and "plan" not in vars(other)
        assert type(getattr(other, "opt", other)) is Optimizer
        assert_close(state_of(other), state_of(twin.opt))
    assert b"channelslast" not in pickle.dumps(twin.opt)


@every_fastai
def test_versions_of_parameters_stay_as_with_fastai(opt_func):
    twin = Twin(opt_func).fuse()
    versions = [param._version for param in twin.params]
    assert [param._version for param in twin.step(6).params] == versions


@pytest.mark.parametrize("opt_func", [FASTAI["Adam"], FASTAI["momentum true decay"]])
def test_hyperparameters_may_be_tensors(opt_func):
    twins = plain, fused = Twin(opt_func), Twin(opt_func).fuse()
    for twin in twins:
        twin.new_gradients()
        for hyper in twin.opt.hypers:
            hyper.update({name: torch.tensor([value]).squeeze() for name, value in hyper.items()})
        twin.opt.step()
    assert_close(fused.params, plain.params, 1e-5)


@pytest.mark.parametrize("wd", [0.0, 0.1])
@pytest.mark.parametrize("decouple_wd", [True, False])
def test_momentum_may_be_zero_for_a_while(wd, decouple_wd):
    twins = plain, fused = [Twin(partial(SGD, mom=0.9, wd=wd, decouple_wd=decouple_wd)) for _ in range(2)]
    fused.fuse()
    for twin in twins:
        twin.step(2).opt.set_hyper("mom", 0.0)
        twin.step(2).opt.set_hyper("mom", 0.8)
        twin.step(2)
    assert_same_training(fused, plain)


def test_closure_is_refused_as_by_fastai():
    for opt_func in (Adam, FASTAI["Lookahead Adam"]):
        with pytest.raises(NotImplementedError):
            Twin(opt_func).fuse().opt.step(lambda: None)


# Parameters of every kind


def compare(opt_func, change, n=3, rtol=1e-5, made=None):
    "Two twins, one fused, to which `change` is done before each step, train the same."
    twins = plain, fused = [made() if made else Twin(opt_func) for _ in range(2)]
    fused.fuse()
    for i in range(2 * n):
        for twin in twins:
            change(twin, i)
            twin.step()
    assert_same_training(fused, plain, rtol)
    return fused


class Quiet(Twin):
    "Sets no gradients: the test does."

    def new_gradients(self):
        pass


@every
def test_parameters_without_gradients_are_left_alone(opt_func):
    def change(twin, i):
        Twin.new_gradients(twin)
        twin.params[i % 4].grad = None

    compare(opt_func, change, made=lambda: Quiet(opt_func))


@few
def test_new_gradients_each_step(opt_func):
    compare(opt_func, lambda twin, i: [setattr(param, "grad", None) for param in twin.params])


@few
def test_frozen_parameters_go_on_as_with_fastai(opt_func):
    def change(twin, i):
        if i == 1:
            twin.opt.freeze_to(1)
        if i == 4:
            twin.opt.unfreeze()
        for param in twin.params:
            if not param.requires_grad:
                param.grad = None if i == 3 else param.grad

    compare(opt_func, change)


@pytest.mark.parametrize("opt_func", [FASTAI["Adam"], FASTAI["momentum true decay"], FASTAI["Lookahead Adam"]])
def test_flags_in_the_state_count_from_the_next_step_on(opt_func):
    def change(twin, i):
        if i == 2:
            twin.opt.state[twin.params[0]]["do_wd"] = False
        if i == 3:
            twin.opt.state[twin.params[1]]["do_wd"] = True
        if i == 4:
            twin.opt.state[twin.params[2]].update(grad_avg=torch.ones_like(twin.params[2].data))

    compare(opt_func, change)


def test_steps_set_from_outside_count():
    def change(twin, i):
        if i == 2:
            twin.opt.state[twin.params[0]]["step"] = 100
        if i == 4:
            twin.opt.state[twin.params[1]] = {}

    compare(Adam, change)


@few
def test_memory_may_move(opt_func):
    def change(twin, i):
        if i == 2:
            twin.params[0].data = twin.params[0].data.contiguous()
        if i == 3:
            twin.params[0].grad.data = twin.params[0].grad.data.contiguous()
        if i == 4:
            for param in twin.params:
                param.data = param.data.clone()

    if opt_func is TORCH["torch AdamW"]:
        pytest.skip("PyTorch's own kernels on the CPU step wrong elements where strides differ")
    compare(opt_func, change)


@every_fastai
def test_gradient_in_another_memory_format(opt_func):
    def change(twin, i):
        twin.params[0].grad = torch.zeros(twin.params[0].shape)

    compare(opt_func, change)


@every
def test_state_in_another_memory_format(opt_func):
    def change(twin, i):
        if i == 3:
            state = state_of(twin.opt)
            for values in state["state"].values() if isinstance(state["state"], dict) else state["state"]:
                values.update({k: v.contiguous() for k, v in values.items() if torch.is_tensor(v) and v.ndim == 4})
            twin.opt.load_state_dict(state)

    fused = compare(opt_func, change)
    if not isinstance(fused.opt, OptimWrapper):
        assert not getattr(fused.opt, "opt", fused.opt).plan.plain
    for group in fused.opt.param_groups:
        assert group.get("fused", True)


@pytest.mark.parametrize("name", FASTAI)
def test_parameters_that_no_kernel_takes(name):
    def made():
        twin = Quiet(FASTAI[name], shapes=[[(4, 3, 3, 3), (4,), (3, 2)], [(5, 4), (5,), (0, 3), (6,), (2, 3), (4, 4)]])
        twin.params[-1].data = twin.params[-1].data[:, ::2]  # with gaps
        for i in (3, 4):  # a kernel takes 3
            twin.params[i].data = twin.params[i].data.double()
        return twin

    def change(twin, i):
        twin.params[4].data = twin.params[4].data.float()
        for param in twin.params:
            param.grad = torch.randn(param.shape, generator=twin.generator).to(param.dtype)
        twin.params[4].data = twin.params[4].data.double()  # its gradient is not
        twin.params[8].grad = torch.empty_strided((4, 2), (4, 2)).copy_(twin.params[8].grad)
        if name in ("SGD", "SGD true decay"):
            twin.params[7].grad = twin.params[7].grad.to_sparse()

    fused = compare(None, change, made=made)
    plain = {id(param) for _, param in getattr(fused.opt, "opt", fused.opt).plan.plain}
    no_kernel = [0, 4, 5, 7, 8] if name in ("SGD", "SGD true decay") else [0, 4, 5, 8]
    assert [i for i, param in enumerate(fused.params) if id(param) in plain] == no_kernel


@every_fastai
def test_half_precision_is_at_least_as_exact_as_with_fastai(opt_func):
    def trained(dtype, is_fused):
        twin = Twin(opt_func, shapes=[[(64, 32, 3, 3), (64,)], [(50, 40), (50,)]])
        for param in twin.params:
            param.data = param.data.bfloat16().to(dtype)
        if is_fused:
            twin.fuse()
        for _ in range(8):
            twin.new_gradients()
            for param in twin.params:
                param.grad.copy_(param.grad.bfloat16())
            twin.opt.step()
        return torch.cat([param.detach().double().flatten() for param in twin.params])

    exact = trained(torch.float64, False)
    error, plain_error = [(trained(torch.bfloat16, is_fused) - exact).norm() for is_fused in (True, False)]
    assert error <= 1.1 * plain_error


@pytest.fixture
def no_halves(monkeypatch):
    "PyTorch 2.6, whose fused kernels of the CPU leave parameters in half precision as they are."
    real = torch.optim.SGD.step

    def step(opt):
        if opt.param_groups[0]["params"][0].dtype is torch.float32 or not opt.param_groups[0].get("fused"):
            return real(opt)

    has_fused_steps.cache_clear()
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    yield
    has_fused_steps.cache_clear()


def test_halves_that_the_cpu_does_not_step_are_left_to_fastai(no_halves):
    params = [nn.Parameter(torch.ones(64, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    for param in params:
        param.grad = torch.ones_like(param)
    plan = Plan(SGD(params, lr=0.1))
    assert [param is params[1] for _, param in plan.plain] == [True] and plan.stepped[0] is params[0]


def test_optimizer_of_pytorch_that_does_not_step_halves_is_not_fused(no_halves):
    param = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    assert "makes other steps" in why_not_fused(OptimWrapper([param], torch.optim.SGD, lr=0.1))


def test_kernels_of_a_gpu_and_of_whole_precision_are_not_doubted(no_halves):
    assert has_fused_steps("cpu", torch.float32) and has_fused_steps("cuda", torch.bfloat16)
    assert not has_fused_steps("cpu", torch.int32) and not has_fused_steps("mps", torch.float32)


@pytest.mark.parametrize("name", ["Adam", "momentum true decay", "SGD L2"])
def test_complex_parameters_train_as_with_fastai(name):
    def made():
        twin = Quiet(FASTAI[name])
        twin.params[0].data = torch.complex(twin.params[0].data, twin.params[0].data)
        return twin

    def change(twin, i):
        for param in twin.params:
            param.grad = torch.randn(param.shape, generator=twin.generator).to(param.dtype)

    compare(None, change, made=made)


@pytest.mark.parametrize("name", ["Adam", "momentum true decay", "Lookahead Adam"])
@pytest.mark.parametrize("how", ["same object", "same memory"])
def test_parameter_that_is_there_twice_is_stepped_twice(name, how):
    def made():
        twin = Twin(FASTAI[name], shapes=[[(4, 3, 3, 3), (4,)], [(4, 3, 3, 3), (5,)]])
        if how == "same memory":
            twin.params[2].data = twin.params[0].data
        else:
            twin.groups[1][0] = twin.params[2] = twin.params[0]
            twin.opt = FASTAI[name](twin.groups, lr=0.1)
        return twin

    compare(None, lambda twin, i: None, made=made)


def test_groups_may_change():
    def change(twin, i):
        if i == 2:
            twin.opt.param_lists[0].append(nn.Parameter(torch.ones(3)))
            twin.params = [*twin.params, twin.opt.param_lists[0][-1]]
        if i == 4:
            twin.opt.param_lists[1].items.insert(0, twin.opt.param_lists[0].items.pop())

    compare(Adam, change)


def test_gradients_with_a_graph_are_zeroed():
    twin = Twin(Adam).fuse()
    for param in twin.params:
        param.grad = param.detach().clone().requires_grad_() * 2
    grads = [param.grad for param in twin.params]
    twin.opt.step()
    twin.opt.zero_grad()
    for param, grad in zip(twin.params, grads):
        assert param.grad is grad and not grad.requires_grad and not grad.any()


@pytest.mark.parametrize("name", ["Adam", "Lookahead Adam"])
def test_gradients_are_zeroed_in_place(name):
    twin = Twin(FASTAI[name]).fuse()
    twin.opt.zero_grad()  # there are none yet
    twin.new_gradients()
    twin.params[0].grad = twin.params[0].grad.to_sparse()
    twin.params[1].grad = None
    grads = [param.grad for param in twin.params]
    twin.opt.zero_grad()
    assert all(param.grad is grad for param, grad in zip(twin.params, grads))
    assert not any(grad.to_dense().any() for grad in grads if grad is not None)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("name", ["Adam", "Adam L2"])
def test_steps_are_the_same_where_kernels_have_other_names(name, device, monkeypatch):
    assert all(hasattr(torch, kernel) for kernel in ADAM_KERNELS.values())
    twin, other = (Twin(FASTAI[name], device).fuse() for _ in range(2))
    twin.step(3).overflow().step(2, found_inf=0)
    monkeypatch.setattr(fused_steps, "ADAM_KERNELS", {True: "renamed", False: "renamed"})
    other.step(3).overflow().step(2, found_inf=0)
    assert_same_training(other, twin)


@pytest.mark.parametrize("found_inf", [None, 0])
@pytest.mark.parametrize("name", FASTAI)
def test_steps_are_the_same_without_kernels_for_lists(name, found_inf, monkeypatch):
    plain, fused = Twin(FASTAI[name]).step(7), Twin(FASTAI[name]).fuse()
    for method in ("mul_", "mul", "sub", "copy_", "zero_"):  # those that PyTorch's own functions do not need
        monkeypatch.delattr(torch, f"_foreach_{method}")
    assert_same_training(fused.step(7, found_inf), plain)


# Steps that overflowed


def snapshot(twin):
    state = state_of(twin.opt)
    del state["param_groups" if "param_groups" in state else "hypers"]
    return copy.deepcopy([param.data for param in twin.params]), state


@pytest.mark.parametrize("found_inf", [1, 2])
@every
def test_overflowed_step_changes_nothing(opt_func, found_inf):
    twin, plain = Twin(opt_func).fuse(), Twin(opt_func)
    if found_inf_reader(twin.opt) is None or (found_inf == 2 and isinstance(twin.opt, OptimWrapper)):
        pytest.skip("PyTorch's: Adagrad reads the flag in newer versions, and none reads more than 1")
    twin.overflow(2, found_inf)
    for n in (1, 2, 1, 3):
        before = snapshot(twin.step(n))
        assert_close(snapshot(twin.overflow(2, found_inf)), before)
    assert_same_training(twin.step(), plain.step(8))


@every_fastai
def test_steps_with_the_flag_equal_those_without(opt_func):
    plain, fused = Twin(opt_func), Twin(opt_func).fuse()
    assert_same_training(fused.step(13, found_inf=0), plain.step(13))
    assert_same_training(fused.step(found_inf=0).unfuse(), plain.step())


@every_fastai
def test_overflow_in_the_first_step(opt_func):
    plain, fused = Twin(opt_func), Twin(opt_func).fuse()
    before = copy.deepcopy([param.data for param in fused.params])
    fused.overflow()
    assert_close([param.data for param in fused.params], before)
    state = fused.opt.state_dict()
    assert not any(values.get("step") for values in state["state"]) and not state.get("count")
    assert_same_training(fused.step(5), plain.step(5))


@pytest.mark.parametrize("name", ["Adam", "momentum true decay", "Lookahead Adam"])
def test_overflow_skips_parameters_without_a_kernel_too(name):
    twins = twin, plain = Twin(FASTAI[name]).fuse(), Twin(FASTAI[name])
    for other in twins:
        other.params[0].grad = torch.zeros(4, 3, 3, 3)
    before = copy.deepcopy([param.data for param in twin.params])
    assert_close([param.data for param in twin.overflow().params], before)
    assert_same_training(twin.step(4, found_inf=0), plain.step(4))


def test_momentum_of_torch_begins_with_zeros_where_its_first_step_overflows(monkeypatch):
    plain, twin = Twin(wrapped(torch.optim.SGD, momentum=0.9)), Twin(wrapped(torch.optim.SGD, momentum=0.9, fused=True))
    monkeypatch.setattr(torch, "empty_like", lambda tensor: torch.full_like(tensor, 7.0))
    twin.overflow()
    monkeypatch.undo()
    twin.step(3), plain.step(3)
    assert_close(twin.params, plain.params, 1e-5)


def test_flag_counts_for_one_step():
    twin = Twin(Adam).fuse().step(found_inf=1)
    before = snapshot(twin)
    assert twin.opt.found_inf is None
    assert not torch.equal(twin.step().params[0], before[0][0])


def test_who_reads_the_flag():
    for name, opt_func in {**FASTAI, **TORCH}.items():
        twin = Twin(opt_func)
        assert found_inf_reader(twin.opt) is None
        twin.fuse()
        if name != "torch Adagrad":  # newer versions of it do
            assert found_inf_reader(twin.opt) is (twin.opt.opt if name in TORCH else twin.opt)
        if name in FASTAI:
            step = twin.opt.step
            twin.opt.step = lambda step=step: step()  # may be one that knows nothing of the flag
            assert found_inf_reader(twin.opt) is None
            twin.opt.step()
            del twin.opt.step
        twin.unfuse()
        assert found_inf_reader(twin.opt) is None
    assert found_inf_reader(None) is None
    dampened = Twin(wrapped(torch.optim.SGD, momentum=0.9, dampening=0.5, fused=True)).opt
    assert found_inf_reader(dampened) is None  # for its first step has none


# Which have a fused form


class OwnAdam(torch.optim.Adam):
    "Takes what PyTorch's takes, and steps on its own."

    def __init__(self, params, lr=1e-3, **kwargs):
        super().__init__(params, lr=lr, **kwargs)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                param -= group["lr"] * param.grad


class OwnSGD(torch.optim.SGD):
    "Takes no `fused`."

    def __init__(self, params, lr=1e-3):
        super().__init__(params, lr=lr)


class Deaf(torch.optim.SGD):
    "Takes `fused`, and leaves it at that."

    def __init__(self, params, lr=1e-3, fused=None):
        super().__init__(params, lr=lr)


class Backwards(torch.optim.SGD):
    "Goes the other way when it is fused."

    def __init__(self, params, lr=1e-3, fused=None):
        super().__init__(params, lr=lr, maximize=bool(fused), fused=fused)


class OwnOptimizer(Optimizer):
    pass


class OwnLookahead(Lookahead):
    pass


def own_step(p, lr, **kwargs):
    p.data.add_(p.grad, alpha=-lr)


def noisy_adam(params, **kwargs):
    opt = Adam(params, **kwargs)
    opt.cbs.insert(0, own_step)
    return opt


def around_wrapper(params, lr):
    return Lookahead(OptimWrapper(params, torch.optim.AdamW, lr=lr))


def with_dampening(params, lr):
    return Optimizer(params, [weight_decay, average_grad, momentum_step], lr=lr, dampening=True)


def without_wd(params, lr):
    opt = SGD(params, lr=lr)
    for hyper in opt.hypers:
        del hyper["wd"]
    return opt


class NoHash:
    __hash__ = None

    def __call__(self, p, **kwargs):
        pass


WITHOUT = {
    "RMSProp": (RMSProp, "rms_prop_step"),
    "RAdam": (RAdam, "radam_step"),
    "QHAdam": (QHAdam, "qhadam_step"),
    "Lamb": (Lamb, "lamb_step"),
    "ranger": (ranger, "radam_step"),
    "partial ranger": (partial(ranger, wd=0.1), "radam_step"),
    "own step": (noisy_adam, "own_step"),
    "other order": (lambda params, lr: Optimizer(params, [sgd_step, weight_decay], lr=lr), "sgd_step, weight_decay"),
    "without hash": (lambda params, lr: Optimizer(params, [NoHash()], lr=lr), "NoHash"),
    "own class": (lambda params, lr: OwnOptimizer(params, [weight_decay, sgd_step], lr=lr), "OwnOptimizer"),
    "own Lookahead": (lambda params, lr: OwnLookahead(Adam(params, lr=lr)), "OwnLookahead"),
    "around a wrapper": (around_wrapper, "Lookahead"),
    "dampening": (with_dampening, "have dampening"),
    "without wd": (without_wd, "lack wd"),
    "torch RMSprop": (wrapped(torch.optim.RMSprop), "RMSprop with fused=True"),
    "dampened": (wrapped(torch.optim.SGD, momentum=0.9, dampening=0.5), "with dampening"),
    "other steps": (wrapped(Backwards), "Backwards with fused=True makes other steps"),
    "differentiable": (wrapped(torch.optim.Adam, differentiable=True), "differentiable"),
    "own torch": (wrapped(OwnSGD), "OwnSGD with fused=True"),
    "deaf": (wrapped(Deaf), "Deaf with fused=True: it takes no notice"),
}


@pytest.mark.parametrize("opt_func, match", WITHOUT.values(), ids=WITHOUT)
def test_optimizer_without_a_fused_form_is_refused_by_name(new_learner, opt_func, match, assert_unchanged):
    learn = new_learner(opt_func=opt_func)
    for is_made in (False, True):
        if is_made:
            learn.create_opt()
        check, opt, kind = assert_unchanged(learn), learn.opt, type(learn.opt)
        with pytest.raises(ValueError, match=match) as error:
            check_fused_optimizer(learn)
        assert "fastai's Adam and SGD" in str(error.value) and "fused_optimizer=True" in str(error.value)
        check()
    with pytest.raises(ValueError, match="no fused form"):
        fuse(opt)
    assert type(opt) is kind


@every
def test_optimizer_with_a_fused_form_is_found_before_it_is_made(new_learner, opt_func, assert_unchanged):
    def two_groups(model):
        return L(model[0].parameters()), L(model[9].parameters())

    for splitter in (two_groups, lambda model: model.parameters()):
        learn = new_learner(opt_func=opt_func, splitter=splitter)
        check = assert_unchanged(learn)
        check_fused_optimizer(learn)
        check_fused_optimizer(learn, "cpu")
        assert learn.opt is None
        check()


def test_function_may_make_groups_of_its_own(new_learner):
    def grouped(params, lr):
        params = list(params)
        return OptimWrapper([{"params": params[:2], "lr": lr / 2}, {"params": params[2:]}], torch.optim.AdamW, lr=lr)

    def as_dicts(model):
        params = list(model.parameters())
        return [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.5}]

    check_fused_optimizer(new_learner(opt_func=grouped))
    wrapper = lambda params, lr: OptimWrapper(opt=torch.optim.SGD(params, lr=lr))  # noqa: E731
    check_fused_optimizer(new_learner(opt_func=wrapper, splitter=as_dicts))


def test_optimizer_that_was_made_before_is_asked(new_learner):
    model = TinyNet()
    for make, match in ((torch.optim.AdamW, None), (torch.optim.RMSprop, "OptimWrapper around RMSprop")):
        learn = new_learner(model, opt_func=OptimWrapper(opt=make(model.parameters(), lr=0.1)))
        if match is None:
            check_fused_optimizer(learn)
        else:
            with pytest.raises(ValueError, match=match):
                check_fused_optimizer(learn)


def test_function_that_fails_on_small_parameters_is_named(new_learner):
    def biggest(params, lr):
        return Adam([param for param in params if param.numel() > 10], lr=lr)

    learn = new_learner(opt_func=biggest)
    with pytest.raises(ValueError, match=r"biggest failed .*learn.create_opt\(\)"):
        check_fused_optimizer(learn)
    learn.create_opt()
    check_fused_optimizer(learn)


def test_own_optimizer_that_takes_fused_reads_no_flag():
    twin = Twin(wrapped(OwnAdam)).fuse().step()
    assert found_inf_reader(twin.opt) is None


def test_sparse_gradients_of_a_torch_optimizer_are_refused():
    twin = Twin(wrapped(torch.optim.SGD))
    twin.new_gradients()
    twin.params[3].grad = twin.params[3].grad.to_sparse()
    assert "sparse" in why_not_fused(twin.opt)


@few
def test_fused_optimizer_is_freed(opt_func):
    twin = Twin(opt_func).fuse().step()
    refs = [weakref.ref(twin.opt), weakref.ref(twin.params[0])]
    del twin
    assert [ref() for ref in refs] == [None, None]


# On a Learner


def body_and_head(model):
    return L(model[:-1].parameters()), L(model[-1].parameters())


class Double(nn.Module):
    def forward(self, x):
        return x.double()


def exact_net():
    "In float64: in float32 BatchNorm makes much of rounding, and Adam of gradients that are nothing else."
    return nn.Sequential(Double(), *TinyNet()).double()


@pytest.fixture
def twins(new_learner, tmp_path):
    "A function that makes two Learners, the second one with fused steps."

    def make(**kwargs):
        kwargs = {"path": tmp_path, "splitter": body_and_head, **kwargs}
        return new_learner(exact_net, **kwargs), new_learner(exact_net, **kwargs).add_cb(FusedOptimizer())

    return make


class Seen(Callback):
    "What the optimizer is in each batch."

    run_valid = False
    order = 100

    def before_fit(self):
        self.types, self.opts = [], []

    def after_step(self):
        self.types.append(type(self.learn.opt))
        self.opts.append(self.learn.opt)


def is_fused(opt):
    return type(opt) not in (Optimizer, Lookahead) and not why_not_fused(opt) and found_inf_reader(opt) is not None


def assert_same_fit(ours, plain, rtol=1e-6):
    assert_close(ours.model.state_dict(), plain.model.state_dict(), rtol)
    assert_close(ours.opt.state_dict(), plain.opt.state_dict(), rtol)


@few
@pytest.mark.parametrize("wd_bn_bias", [False, True])
def test_fits_equal_the_plain_ones(twins, opt_func, wd_bn_bias):
    plain, ours = twins(opt_func=opt_func, wd_bn_bias=wd_bn_bias)
    check_fused_optimizer(ours)
    for learn in (plain, ours):
        learn.fit_one_cycle(2, slice(1e-3, 1e-2), wd=0.1)
        learn.freeze()
        learn.fit(1, 1e-2)
        learn.unfreeze()
        learn.fit(1, slice(1e-4, 1e-3), cbs=[GradientClip(0.1), GradientAccumulation(16)])
    assert_same_fit(ours, plain)


@few
def test_optimizer_is_fused_while_it_trains(twins, opt_func):
    _, ours = twins(opt_func=opt_func)
    ours.create_opt()
    opt, inner = ours.opt, getattr(ours.opt, "opt", None)
    kept = type(opt), type(inner), set(vars(opt)), set(vars(inner or opt))
    at_epochs_end = []
    epochs_end = Callback(after_epoch=lambda cb: at_epochs_end.append(is_fused(opt)))
    in_steps = Callback(after_step=lambda cb: in_steps.seen.append(is_fused(opt)))
    in_steps.seen, in_steps.order = [], 50
    ours.fit(2, cbs=[epochs_end, in_steps])
    assert in_steps.seen == [True] * 6 and at_epochs_end == [False, False]
    assert ours.opt is opt and (type(opt), type(inner), set(vars(opt)), set(vars(inner or opt))) == kept


class SaveInTheMiddle(Callback):
    order, run_valid = -5, False

    def after_batch(self):
        if self.train_iter == 5:
            self.learn.save("middle")


@few
def test_files_written_in_the_middle_of_a_fit_are_fastais(twins, new_learner, opt_func, tmp_path):
    plain, ours = twins(opt_func=opt_func)
    for learn, name in ((plain, "plain"), (ours, "ours")):
        learn.fit(2, cbs=[SaveInTheMiddle(), SaveModelCallback(every_epoch=True, with_opt=True, fname=name)])
        (tmp_path / "models/middle.pth").rename(tmp_path / f"models/middle_{name}.pth")
    for file in ("middle_{}.pth", "{}_0.pth", "{}_1.pth"):
        loaded = [torch.load(tmp_path / "models" / file.format(name), weights_only=False) for name in ("ours", "plain")]
        assert_close(*loaded, rtol=1e-6)
    resumed = new_learner(exact_net, opt_func=opt_func, path=tmp_path, splitter=body_and_head).load("ours_1")
    for learn in (resumed, ours.remove_cb(FusedOptimizer)):
        learn.fit(1)
    assert_same_fit(resumed, ours, rtol=0)


@few
def test_fit_goes_on_from_a_file_of_fastais(twins, opt_func):
    plain, ours = twins(opt_func=opt_func)
    plain.fit(1)
    plain.save("plain")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours.load("plain")
    for learn in (plain, ours):
        learn.fit(1)
    assert_same_fit(ours, plain)


class LoadInTheMiddle(Callback):
    order, run_valid = -5, False

    def after_batch(self):
        if self.train_iter == 2:
            self.learn.save("early")
        if self.train_iter == 5:
            self.learn.load("early")


@few
def test_state_loaded_in_the_middle_of_an_epoch_counts(twins, opt_func):
    plain, ours = twins(opt_func=opt_func)
    for learn in (plain, ours):
        learn.fit(2, cbs=LoadInTheMiddle())
    assert_same_fit(ours, plain)


@pytest.mark.parametrize("event", ["before_fit", "before_train", "after_batch"])
def test_optimizer_made_anew_in_a_fit_is_fused_too(twins, event):
    plain, ours = twins()

    def create(cb):
        if cb.learn.opt is None or cb.learn.train_iter in (0, 2):
            cb.learn.create_opt()

    for learn in (plain, ours):
        recreate = Callback(**{event: create})
        recreate.run_valid = False
        learn.fit(1, cbs=[recreate, seen := Seen()])
    assert seen.types and Optimizer not in seen.types
    assert all(type(opt) is Optimizer for opt in seen.opts)
    assert_same_fit(ours, plain)


def test_step_that_somebody_replaced_is_called(twins):
    plain, ours = twins()
    calls = []
    for learn in (plain, ours):
        learn.create_opt()
        step = learn.opt.step
        learn.opt.step = lambda step=step, learn=learn: calls.append(learn) or step()
        learn.fit(2)
        del learn.opt.step
    assert calls == [plain] * 6 + [ours] * 6
    assert_same_fit(ours, plain, rtol=0)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no"), CancelTrainException()], ids=repr)
@pytest.mark.parametrize("event", ["after_step", "after_batch", "before_batch", "before_validate"])
@pytest.mark.parametrize("opt_func", [Adam, TORCH["torch AdamW"]])
def test_interrupted_fit_leaves_a_plain_optimizer_with_its_state(twins, opt_func, event, error):
    plain, ours = twins(opt_func=opt_func)

    def fail(cb):
        if cb.learn.train_iter == (6 if event == "before_validate" else 4) and cb.learn.epoch == 1:
            raise error

    failing = Callback(**{event: fail})
    failing.order = 60
    for learn in (plain, ours):
        try:
            learn.fit(2, cbs=failing)
        except type(error):
            pass
        assert type(learn.opt) in (Optimizer, OptimWrapper) and found_inf_reader(learn.opt) is None
    assert_same_fit(ours, plain)
    for learn in (plain, ours):
        learn.opt.zero_grad()
        learn.fit(1)
    assert_same_fit(ours, plain)


def test_optimizer_without_a_fused_form_warns_once_and_trains(twins):
    plain, ours = twins(opt_func=ranger)
    plain.fit(2)
    with pytest.warns(UserWarning, match="radam_step: training with its plain step") as caught:
        ours.fit(1)
    ours.fit(1)
    plain.fit(0), ours.fit(0)
    assert len([w for w in caught if "plain step" in str(w.message)]) == 1
    assert_same_fit(ours, plain, rtol=0)


def test_learning_rate_finder_leaves_a_plain_optimizer(twins):
    plain, ours = twins()
    for learn in (plain, ours):
        learn.fit(1)
        learn.lr_find(num_it=4, show_plot=False)
        assert type(learn.opt) is Optimizer
        learn.fit(1)
    assert_same_fit(ours, plain)


def test_rnn_with_a_bias_flag_trains(new_learner):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(4, 5, batch_first=True)
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    learns = [new_learner(Net, new_dls(6, 4)) for _ in range(2)]
    learns[1].add_cb(FusedOptimizer())
    for learn in learns:
        learn.fit(2)
        assert True in learn.opt.state
    assert_same_fit(learns[1], learns[0])


# In float16


class Poison(Callback):
    "Makes the gradients of some batches overflow. Records the scale of the loss, counts the steps that Python cancels."

    run_valid = False

    def before_fit(self):
        self.scales, self.n_cancelled = [], 0

    def after_backward(self):
        if self.train_iter in (0, 1, 4, 8):
            next(self.model.parameters()).grad.view(-1)[0] = float("inf")

    def after_cancel_step(self):
        self.n_cancelled += 1

    def after_batch(self):
        self.scales.append(self.learn.scaler.get_scale())


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))


def overflows_in_float16(new_learner, opt_func, device):
    "Train with overflows, plain and fused, and compare."
    learns, poisons = [], []
    for cbs in ([], [FusedOptimizer()]):
        precision = MixedPrecision("fp16", init_scale=1024.0)
        learns.append(new_learner(linear, device=device, opt_func=opt_func, cbs=[precision, *cbs]))
        poisons.append(Poison())
        learns[-1].fit(5, 1e-3, cbs=poisons[-1])
    reads = learns[1].opt.opt if isinstance(learns[1].opt, OptimWrapper) else learns[1].opt
    assert "found_inf" not in vars(reads)
    assert poisons[0].scales == poisons[1].scales and poisons[0].scales[-1] == 64.0
    assert_same_fit(*reversed(learns), rtol=1e-2)
    return [poison.n_cancelled for poison in poisons]


@more
def test_overflows_in_float16_are_skipped_as_with_fastai(new_learner, fp16_cpu, opt_func):
    n_plain, n_fused = overflows_in_float16(new_learner, opt_func, "cpu")
    assert n_plain == 4
    if opt_func is not TORCH["torch Adagrad"]:
        assert n_fused == 0


def test_fit_interrupted_by_an_overflow_counts_the_steps_before_it(new_learner, fp16_cpu):
    def stop(cb):
        if cb.learn.train_iter == 5:
            raise KeyboardInterrupt

    learn = new_learner(linear, cbs=[FusedOptimizer(), MixedPrecision("fp16", init_scale=1024.0), Poison()])
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, cbs=Callback(after_pred=stop))
    assert type(learn.opt) is Optimizer
    assert {state["step"] for state in learn.opt.state_dict()["state"]} == {2}


# On a GPU


def skip_without_a_fused_form_on_a_gpu(opt_func):
    why = why_not_fused(Twin(opt_func, "cuda").opt)
    if "of supported devices" in why:  # Adagrad, in PyTorch 2.11
        pytest.skip(why)


@pytest.mark.cuda
@every
def test_fused_steps_equal_the_plain_ones_on_a_gpu(opt_func):
    skip_without_a_fused_form_on_a_gpu(opt_func)
    plain, fused, flagged = (Twin(opt_func, "cuda") for _ in range(3))
    fused.fuse(), flagged.fuse()
    plain.step(24), fused.step(24)
    assert_same_training(fused, plain, 1e-4)
    assert_same_training(fused.unfuse(), plain, 1e-4)
    assert_same_training(fused.step(4), plain.step(4), 1e-4)
    if found_inf_reader(flagged.opt) is not None:
        flagged.overflow()
        for n in (5, 11, 12):
            before = snapshot(flagged.step(n, found_inf=0))
            assert_close(snapshot(flagged.overflow()), before)
        assert_same_training(flagged.step().unfuse(), plain.step(), 1e-4)


@pytest.mark.cuda
@every_fastai
def test_parameters_of_every_kind_on_a_gpu(opt_func):
    def made():
        twin = Quiet(
            opt_func, "cuda", shapes=[[(4, 3, 3, 3), (4,), (6, 5, 1, 1)], [(5, 4), (5,), (4, 4), (8, 3, 3, 3)]]
        )
        twin.params[0].data = twin.params[0].data.contiguous()
        twin.params[3].data = twin.params[3].data.double()
        twin.params[5].data = twin.params[5].data[:, ::2]
        on_cpu = nn.Parameter(twin.params[4].detach().cpu())
        twin.groups[1].append(on_cpu)
        twin.params.append(on_cpu)
        twin.opt = opt_func(twin.groups, lr=0.1)
        return twin

    def change(twin, i):
        for param in twin.params:
            param.grad = torch.randn(param.shape, generator=twin.generator).to(param)
        twin.params[0].grad = twin.params[0].grad.to(memory_format=torch.channels_last)

    compare(None, change, made=made)


@pytest.mark.cuda
@every
def test_overflows_in_float16_on_a_gpu(new_learner, opt_func):
    skip_without_a_fused_form_on_a_gpu(opt_func)
    n_plain, n_fused = overflows_in_float16(new_learner, opt_func, "cuda")
    assert n_plain == 4 and (n_fused == 0 or opt_func is TORCH["torch Adagrad"])


@pytest.mark.cuda
@every_fastai
def test_fused_step_does_not_wait_for_the_gpu(new_learner, opt_func):
    learn = new_learner(linear, device="cuda", opt_func=opt_func, cbs=[FusedOptimizer(), MixedPrecision()])
    learn.fit(1)

    class NoSync(Callback):
        order, run_valid = MixedPrecision.order + 1, False

        def before_backward(self):
            torch.cuda.set_sync_debug_mode("error")

        def after_step(self):
            self.learn.opt.zero_grad()
            torch.cuda.set_sync_debug_mode("default")

    try:
        learn.fit(3, cbs=NoSync())
    finally:
        torch.cuda.set_sync_debug_mode("default")
