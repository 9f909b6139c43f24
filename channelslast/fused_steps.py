"Which of PyTorch's fused kernels make the steps of a fastai optimizer, and with which parameters each is called."

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from fastai.optimizer import (
    Optimizer,
    adam_step,
    average_grad,
    average_sqr_grad,
    l2_reg,
    momentum_step,
    sgd_step,
    step_stat,
    weight_decay,
)
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from channelslast.devices import has_fused_steps
from channelslast.memory_format import match_strides
from channelslast.nested import are_same, foreach

__all__ = ["Plan", "why_no_kernel", "names_of"]

# The steps that have a kernel

ADAM_KERNELS = {True: "_fused_adamw_", False: "_fused_adam_"}  # of PyTorch, by whether weight decay is true


@dataclass
class _Call:
    """The parameters that one call of a kernel steps: of one group, alike in weight decay, steps, device and dtype.

    Their tensors are flat views, for kernels of the CPU copy a gradient that is not contiguous.
    """

    group: int
    do_wd: bool
    params: list[Tensor] = field(default_factory=list)  # of `.data`: as with fastai, its version does not change
    grads: list[Tensor] = field(default_factory=list)
    averages: tuple[list[Tensor], ...] = ()
    count: float = 0.0  # steps made when this was made
    steps: list[Tensor] = field(default_factory=list)  # made so far, on the device: of all, or of each parameter


def _adam(call: _Call, hyper: dict[str, Any], found_inf: Tensor | None, decouple_wd: bool) -> None:
    """Make a step of Adam, with the kernel itself where PyTorch has it under the name in `ADAM_KERNELS`.

    PyTorch's function sorts the tensors and counts for each, which takes longer than to launch the kernel.
    """
    kernel = getattr(torch, ADAM_KERNELS[decouple_wd], None)
    device, tensors = call.params[0].device, (call.params, call.grads, *call.averages, [])
    options = {
        "amsgrad": False,
        "beta1": float(hyper["mom"]),
        "beta2": float(hyper["sqr_mom"]),
        "lr": float(hyper["lr"]),
        "weight_decay": float(hyper["wd"]) if call.do_wd else 0.0,
        "eps": float(hyper["eps"]),
        "maximize": False,
    }
    found_inf = found_inf if found_inf is None else found_inf.to(device)
    if not call.steps:
        n = len(call.params) if kernel is None else 1  # the kernel reads a count for each, which may be the same
        call.steps = [torch.full((1,), call.count, dtype=torch.float32, device=device) for _ in range(n)]
    if kernel is None:
        (adamw if decouple_wd else adam)(*tensors, call.steps, fused=True, found_inf=found_inf, **options)
        return
    (step,) = call.steps
    step += 1
    kernel(*tensors, [step] * len(call.params), found_inf=found_inf, **options)
    if found_inf is not None:
        step -= found_inf


def _sgd(call: _Call, hyper: dict[str, Any], found_inf: Tensor | None, decouple_wd: bool) -> None:
    lr, wd, momentum = float(hyper["lr"]), float(hyper["wd"]) if call.do_wd else 0.0, 0.0
    if call.averages:
        # fastai writes the average also if momentum is 0, the kernel would not; 1e-300 times an average is 0 too
        momentum = float(hyper["mom"]) or 1e-300
        if decouple_wd and wd != 0:  # without momentum both kinds of weight decay are the kernel's
            if found_inf is None:
                # a tensor, for the CPU rounds a number to half precision with the parameters
                factor = torch.tensor(1 - lr * wd, dtype=torch.float64)
            else:
                factor = (1 - (found_inf == 0) * (lr * wd)).to(call.params[0].device)
            foreach("mul_", call.params, factor)
            wd = 0.0
    sgd(
        call.params,
        call.grads,
        *(call.averages or [[]]),
        fused=True,
        found_inf=found_inf,
        weight_decay=wd,
        momentum=momentum,
        lr=lr,
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )


@dataclass(frozen=True)
class _Form:
    cbs: list[Any]  # what `_keys` makes of the steps of fastai's that it is the form of
    kernel: Callable  # makes the step of a `_Call`
    averages: tuple[str, ...]  # names in the state of a parameter
    hypers: set[str]  # names of the hyperparameters that it needs
    counts_steps: bool = False


def _keys(cbs: Iterable[Callable]) -> list[Any]:
    "Return what tells the steps of one optimizer from those of another: functions, and what `partial` gives them."
    return [(cb.func, cb.args, cb.keywords) if isinstance(cb, partial) else cb for cb in cbs]


def _forms(decay: Callable) -> list[_Form]:
    adam_cbs = [decay, partial(average_grad, dampening=True), average_sqr_grad, step_stat, adam_step]
    with_wd = {"decouple_wd": decay is weight_decay}
    return [
        _Form(
            _keys(adam_cbs),
            partial(_adam, **with_wd),
            ("grad_avg", "sqr_avg"),
            {"lr", "mom", "sqr_mom", "eps", "wd"},
            counts_steps=True,
        ),
        _Form([decay, sgd_step], partial(_sgd, **with_wd), (), {"lr", "wd"}),
        _Form([decay, average_grad, momentum_step], partial(_sgd, **with_wd), ("grad_avg",), {"lr", "mom", "wd"}),
    ]


_FORMS = [*_forms(weight_decay), *_forms(l2_reg)]

# What a kernel takes from the state of a parameter; to fastai's steps a hyperparameter of the same name goes first
_FROM_STATE = {"dampening", "do_wd", "grad_avg", "sqr_avg", "step"}


def _form_of(opt: Optimizer) -> _Form | None:
    keys = _keys(opt.cbs)
    return next((form for form in _FORMS if form.cbs == keys), None)


def why_no_kernel(
    opt: Optimizer,
) -> str:
    "Return why no fused kernel makes the steps of `opt`, '' if one does."
    form = _form_of(opt)
    if form is None:
        return f"no kernel makes the steps {names_of(opt.cbs)}"
    for hyper in opt.hypers:
        if missing := form.hypers - set(hyper):
            return f"the hyperparameters lack {', '.join(sorted(missing))}"
        if others := _FROM_STATE & set(hyper):
            return f"the hyperparameters have {', '.join(sorted(others))}"
    return ""


def names_of(
    cbs: Iterable[Callable],  # of an optimizer
) -> str:
    "Return the names of `cbs`, with commas in between."
    functions = [cb.func if isinstance(cb, partial) else cb for cb in cbs]
    return ", ".join(getattr(function, "__name__", type(function).__name__) for function in functions)


# Which parameters a kernel steps


def _has_kernel(param: Tensor, grad: Tensor) -> bool:
    "Whether the fused kernels take `param` with `grad`. Those of the CPU step wrong elements where strides differ."
    return (
        type(param) in (Tensor, nn.Parameter)
        and type(grad) is Tensor
        and has_fused_steps(param.device.type, param.dtype)
        and param.layout is torch.strided
        and param.numel() > 0
        and _is_dense(param)
        and _is_alike(grad, param)
    )


def _is_dense(tensor: Tensor) -> bool:
    "Whether the elements of `tensor` lie side by side, in any order of its dimensions."
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _is_alike(tensor: Any, param: Tensor) -> bool:
    "Whether each element of `tensor` lies where that of `param` does; the stride of a dimension of size 1 is free."
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.shape != param.shape:
        return False
    if tensor.dtype is not param.dtype or tensor.device != param.device:
        return False
    return tensor.stride() == param.stride() or all(
        a == b for a, b, size in zip(tensor.stride(), param.stride(), param.shape) if size > 1
    )


def _flat(tensor: Tensor) -> Tensor:
    "Return the memory of `tensor`, which is dense, in one dimension."
    return tensor.as_strided((tensor.numel(),), (1,))


class Plan:
    """The calls of kernels that make a step of a fastai optimizer.

    To make one takes longer than a step. It lasts until something changes of what it rests on.
    """

    @torch.no_grad()
    def __init__(
        self,
        opt: Optimizer,  # for which `why_no_kernel` is ''
    ):
        self.form = _form_of(opt)
        self.sizes = [len(group) for group in opt.param_lists]
        self.params = [param for group in opt.param_lists for param in group]
        self.grads = [param.grad for param in self.params]
        self.plain: list[tuple[int, Tensor]] = []  # parameters that fastai's own functions step, with their group
        self.stepped: list[Tensor] = []  # the others
        self.states: list[dict[str, Any]] = []  # their states
        self.tensors: list[Tensor] = []  # they, their gradients and averages
        groups = [i for i, size in enumerate(self.sizes) for _ in range(size)]
        rows = [row for row in zip(groups, self.params, self.grads) if row[2] is not None]
        has_kernel = [_has_kernel(param, grad) for _, param, grad in rows]
        # a kernel would step memory that is there twice by two threads at the same time
        n_times = Counter(param.data_ptr() for (_, param, _), has in zip(rows, has_kernel) if has)
        calls: dict[tuple, _Call] = {}
        for (group, param, grad), has in zip(rows, has_kernel):
            state = opt.state.setdefault(param, {})
            averages = self._averages(state, param) if has and n_times[param.data_ptr()] == 1 else None
            if averages is None:
                self.plain.append((group, param))
                continue
            do_wd = bool(state.get("do_wd", True))
            count = float(state.setdefault("step", 0)) if self.form.counts_steps else 0.0
            new = _Call(group, do_wd, averages=tuple([] for _ in averages), count=count)
            call = calls.setdefault((group, do_wd, count, param.device, param.dtype), new)
            call.params.append(_flat(param.data))
            call.grads.append(_flat(grad))
            for tensors, average in zip(call.averages, averages):
                tensors.append(_flat(average))
            self.stepped.append(param)
            self.states.append(state)
            self.tensors += [param, grad, *averages]
        self.calls = list(calls.values())
        self.values, self.pointers, self.steps = self._values(), self._pointers(), self._steps()
        self.grad_facts = _facts(self.grads)

    def _averages(self, state: dict[str, Any], param: Tensor) -> list[Tensor] | None:
        "Return the averages in `state`, new ones if there are none yet; None if a kernel does not take them."
        averages = []
        for name in self.form.averages:
            average = state.get(name)
            if average is None:
                average = torch.zeros_like(param.data)
            elif not _is_alike(average, param):
                match_strides(average, param)
                if not _is_alike(average, param):
                    return None
            averages.append(average)
        state.update(zip(self.form.averages, averages))
        return averages

    def _values(self) -> list[Any]:
        return [state.get(name) for name in (*self.form.averages, "do_wd") for state in self.states]

    def _pointers(self) -> list[int]:
        "Return where the tensors lie: one whose `data` was assigned is the same object elsewhere."
        return list(map(Tensor.data_ptr, self.tensors))

    def _steps(self) -> list[Any]:
        return [state.get("step") for state in self.states] if self.form.counts_steps else []

    def holds(
        self,
        opt: Optimizer,
    ) -> bool:
        "Whether groups, parameters, gradients, state and memory are those that the plan was made for."
        params = [param for group in opt.param_lists for param in group]
        return (
            are_same(params, self.params)
            and self.sizes == [len(group) for group in opt.param_lists]
            and self._has_same_grads([param.grad for param in params])
            and are_same(list(map(opt.state.get, self.stepped)), self.states)
            and are_same(self._values(), self.values)
            and self._pointers() == self.pointers
            and self._steps() == self.steps
        )

    def _has_same_grads(self, grads: list[Tensor | None]) -> bool:
        "Whether `grads` are the plan's, or others in the same memory, as a CUDA graph writes them."
        return are_same(grads, self.grads) or _facts(grads) == self.grad_facts

    @torch.no_grad()
    def step(
        self,
        opt: Optimizer,
        found_inf: Tensor | None,  # if not 0, the kernels change nothing
    ) -> None:
        "Make the step of `opt`, without counting it in its state."
        for call in self.calls:
            self.form.kernel(call, opt.hypers[call.group], found_inf)
        for group, param in self.plain:
            state = opt.state[param]
            for cb in opt.cbs:
                new = cb(param, **{**state, **opt.hypers[group]})
                if isinstance(new, dict):
                    state.update(new)

    def count_step(self) -> None:
        "Count a step in the state of the parameters that have a kernel."
        if self.form.counts_steps:
            for state in self.states:
                state["step"] += 1
            self.steps = self._steps()


def _facts(grads: list[Tensor | None]) -> tuple[list[Any], ...]:
    "Return where gradients lie, and how; by functions in C, for it is asked in each step."
    given = [grad for grad in grads if grad is not None]
    is_sparse = any(grad.layout is not torch.strided for grad in given)
    facts = (id,) if is_sparse else (type, Tensor.data_ptr, Tensor.stride, attrgetter("dtype"))
    return [grad is None for grad in grads], *(list(map(fact, given)) for fact in facts)
