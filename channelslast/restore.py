"Leave a module or a Learner as it was, whatever happens to it in between."

import copy
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastai.torch_core import get_random_states, set_random_states
from fastcore.foundation import L
from torch import Tensor, nn

from channelslast.memory_format import has_lazy_parameters, with_wrapped
from channelslast.precision import AutocastState, training_device

__all__ = ["FitDone", "unchanged_learner", "unchanged_modules", "unchanged_tensors"]

# fastai's loggers that do not keep quiet for `learn.lr_finder`, as its others do
_LOGGERS = ("fastai.callback.azureml", "fastai.callback.comet", "fastai.callback.neptune")


@contextmanager
def unchanged_modules(
    *modules: nn.Module,
) -> Iterator[None]:
    """Put `modules` and the random states back afterwards, also after an exception.

    Weights and buffers with their values, strides and device, gradients (none in between), `requires_grad`, training
    mode, hooks and attributes, with the tensors, arrays and containers in them. Raises `ValueError` for lazy
    parameters, which have no way back.
    """
    with _unchanged(modules, []):
        yield


@contextmanager
def unchanged_learner(
    learn: Learner,
    values: bool = True,  # False: what is written into tensors stays, which saves a copy of them
) -> Iterator[Callable[[], None]]:
    """Put `learn` back afterwards, also after an exception; gives a function that puts the tensors back in between.

    Its model and loss function as `unchanged_modules` does, optimizer, DataLoaders, autocast, random states, and its
    own attributes. Its callbacks and metrics stay untouched, for copies take their place in between; trackers and
    loggers write nothing. A data set that is a stream does not go back. With `values=False` weights, buffers, optimizer
    state and other tensors keep the values, memory and strides that they got.
    """
    loss_func = getattr(learn.loss_func, "func", learn.loss_func)  # fastai's losses wrap PyTorch's
    loaders = list(getattr(learn.dls, "loaders", []))
    samplers = [getattr(loader, name, None) for loader in loaders for name in ("sampler", "batch_sampler")]
    autocast = [AutocastState(device_type).restore for device_type in {"cpu", training_device(learn).type}]
    made_before = learn.opt_func if isinstance(learn.opt_func, OptimWrapper) else None
    optimizers = [*with_wrapped(learn.opt), *with_wrapped(made_before)]
    others = [learn, learn.dls, *optimizers, *loaders, *samplers]
    unchanged = _unchanged([learn.model, loss_func, learn.loss_func], others, values)
    with unchanged as put_tensors_back, _unchanged_generators(learn.dls):
        try:
            _use_copied_callbacks(learn)
            learn.lr_finder = learn.gather_preds = None  # by these fastai's trackers and loggers know to keep quiet
            yield put_tensors_back
        finally:
            _finish(autocast)


def _finish(
    restores: list[Callable[[], None]],  # each may be called twice
) -> None:
    "Call them all; an interrupt in the middle of it counts afterwards."
    try:
        for restore in restores:
            restore()
    except KeyboardInterrupt:
        for restore in restores:
            restore()
        raise


class FitDone(BaseException):
    "Ends a fit without the events that follow one, for none was made. (fastai rewrites an `Exception` of a callback.)"


@contextmanager
def unchanged_tensors(
    tensors: Iterable[Tensor],
) -> Iterator[None]:
    "Put memory, values, `requires_grad` and gradients of `tensors` back afterwards; in between they have no gradients."
    tensors = list(tensors)
    values, gradients = _Values(tensors), _Gradients(tensors)
    restores = [values.restore, gradients.restore]
    try:
        gradients.take()
        yield
    finally:
        _finish(restores)


@contextmanager
def _unchanged(roots: Iterable[Any], others: Iterable[Any], values: bool = True) -> Iterator[Callable[[], None]]:
    "`roots`, modules or objects that hold some, with all that they reach; `others` with their own attributes alone."
    modules = [root for root in roots if isinstance(root, nn.Module)]
    if any(map(has_lazy_parameters, modules)):
        raise ValueError("The model has lazy parameters, which get their shape for good: run one forward pass before")
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    attributes = [_Attributes(roots, is_deep=True), _Attributes(others, is_deep=False)]
    saved = _Values([*tensors, *attributes[0].tensors, *attributes[1].tensors] if values else [])
    gradients = _Gradients([*tensors, *attributes[0].tensors])
    restores = [part.restore for part in (*attributes, saved, gradients)]
    restores.append(partial(set_random_states, **get_random_states()))
    try:
        gradients.take()
        yield saved.restore
    finally:
        _finish(restores)


_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


def _generator(generator: Any) -> tuple[Callable[[Any], Any], Any]:
    "What puts `generator` back, and the state to give it."
    if isinstance(generator, random.Random):
        return generator.setstate, generator.getstate()
    if isinstance(generator, (np.random.RandomState, torch.Generator)):
        return generator.set_state, generator.get_state()
    bits = generator.bit_generator
    return partial(setattr, bits, "state"), bits.state


def _is_plain(value: Any) -> bool:
    "Whether the attributes of `value` are its state: no class, function, Learner, callback or running iterator."
    others = (type, ModuleType, FunctionType, MethodType, Learner, Callback, Tensor)
    return hasattr(value, "__dict__") and not isinstance(value, others) and not hasattr(value, "__next__")


@contextmanager
def _unchanged_generators(root: Any, n_most: int = 10_000) -> Iterator[None]:
    "Put the random generators back that `root` reaches; not through containers of more than `n_most`, which are data."
    todo, seen, generators = [root], set(), []
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, (str, bytes, Tensor, np.ndarray, nn.Module)):
            continue
        seen.add(id(value))
        if isinstance(value, _GENERATORS):
            generators.append(_generator(value))
        elif isinstance(value, dict):
            todo += list(value.values()) if len(value) <= n_most else []
        elif isinstance(value, (list, tuple, set, deque)):
            todo += value if len(value) <= n_most else []
        elif isinstance(value, partial):
            todo += [value.func, value.args, value.keywords]
        elif isinstance(value, MethodType):
            todo.append(value.__self__)
        elif isinstance(value, FunctionType):
            todo += [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        if _is_plain(value):  # a container may be
            todo += vars(value).values()
    restores = [partial(set_state, state) for set_state, state in generators]
    try:
        yield
    finally:
        _finish(restores)


class _Attributes:
    "The attributes of objects, with the containers, arrays and random generators in them; their tensors in `tensors`."

    def __init__(
        self,
        objects: Iterable[Any],
        is_deep: bool,  # also those of the objects in them
    ):
        self.attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.containers: dict[int, tuple[Any, Any]] = {}
        self.arrays: list[tuple[np.ndarray, np.ndarray]] = []
        self.generators: list[tuple[Any, Any]] = []
        self.tensors: list[Tensor] = []
        seen: set[int] = set()
        todo = []
        for obj in objects:
            if hasattr(obj, "__dict__") and id(obj) not in seen:
                seen.add(id(obj))
                self.attributes.append((vars(obj), dict(vars(obj))))
                todo += vars(obj).values()
        while todo:
            value = todo.pop()
            if isinstance(value, Tensor):
                self.tensors.append(value)
            elif isinstance(value, np.ndarray):
                self.arrays.append((value, value.copy()))
            elif isinstance(value, _GENERATORS):
                self.generators.append(_generator(value))
            elif isinstance(value, L):
                todo.append(value.items)
            elif isinstance(value, tuple):
                todo += value
            elif isinstance(value, (dict, list, set, deque)):
                if id(value) not in self.containers:
                    self.containers[id(value)] = value, copy.copy(value)
                    todo += value.values() if isinstance(value, dict) else value
            elif is_deep and _is_plain(value) and id(value) not in seen:
                seen.add(id(value))
                self.attributes.append((vars(value), dict(vars(value))))
                todo += vars(value).values()

    def restore(self) -> None:
        for attributes, saved in self.attributes:
            for name in [name for name in attributes if name not in saved]:
                del attributes[name]
            attributes.update(saved)
        for container, saved in self.containers.values():
            container.clear()
            if isinstance(container, (list, deque)):
                container.extend(saved)
            else:
                container.update(saved)
        for array, saved in self.arrays:
            array[...] = saved
        for set_state, state in self.generators:
            set_state(state)


class _Values:
    "Tensors with their memory and a copy, on the CPU, of what is in it."

    def __init__(self, tensors: Iterable[Tensor]):
        unique = {id(tensor): tensor for tensor in tensors}.values()
        self.saved = [(tensor, tensor.data, tensor.detach().to("cpu", copy=True)) for tensor in unique]

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, data, values in self.saved:
            if 0 not in data.stride():  # an expanded tensor cannot have been written to
                data.copy_(values)
            tensor.data = data


class _Gradients:
    "The gradients of tensors, which it takes away, and whether they need any."

    def __init__(self, tensors: Iterable[Tensor]):
        self.saved = [(tensor, tensor.grad, tensor.requires_grad) for tensor in tensors if tensor.is_leaf]

    def take(self) -> None:
        for tensor, _, _ in self.saved:
            tensor.grad = None

    def restore(self) -> None:
        for tensor, grad, requires_grad in self.saved:
            tensor.requires_grad_(requires_grad)
            tensor.grad = grad


def _use_copied_callbacks(learn: Learner) -> None:
    "Replace the callbacks and metrics of `learn` by copies, the progress bar by none."
    shared = [learn, learn.dls, learn.loss_func, *with_wrapped(learn.opt), *getattr(learn.dls, "loaders", [])]
    shared += [*learn.model.modules(), *learn.model.parameters(), *learn.model.buffers()]
    memo = {id(obj): obj for obj in shared}
    learn.metrics = [_copy(metric, memo) for metric in learn.metrics]
    silent = [cb for cb in learn.cbs if not isinstance(cb, ProgressCallback) and type(cb).__module__ not in _LOGGERS]
    cbs = [_copy(cb, memo) for cb in silent]
    learn.cbs = L(cbs)
    for cb in cbs:
        setattr(learn, cb.name, cb)


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    "A deep copy; what in it cannot be copied, as an open file or a tensor with a gradient function, it shares."
    if id(value) in memo:
        return memo[id(value)]
    tried = dict(memo)
    try:
        result = copy.deepcopy(value, tried)
    except Exception:
        return _copy_by_parts(value, memo)
    memo.update(tried)
    return result


def _copy_by_parts(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, (list, set, deque, tuple)) and not hasattr(value, "_fields"):  # a named tuple is shared
        result = type(value)(_copy(item, memo) for item in value)
    elif isinstance(value, dict):
        result = copy.copy(value)
        for key, item in value.items():
            result[key] = _copy(item, memo)
    elif _is_plain(value) or isinstance(value, Callback):
        try:
            result = copy.copy(value)
        except Exception:
            return value
        memo[id(value)] = result
        for name, item in vars(value).items():
            vars(result)[name] = _copy(item, memo)
    else:
        result = value
    memo[id(value)] = result
    return result
