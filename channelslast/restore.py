"Leave a module or a Learner as it was, whatever happens to it in between."

import copy
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.torch_core import get_random_states, set_random_states
from fastcore.foundation import L
from torch import Tensor, nn

from channelslast.memory_format import has_lazy_parameters
from channelslast.precision import AutocastState, training_device
from channelslast.trace import tensors_in

__all__ = ["unchanged_learner", "unchanged_module"]


@contextmanager
def unchanged_module(
    module: nn.Module,
) -> Iterator[None]:
    """Put `module` and the random states back afterwards, also after an exception.

    Weights and buffers with their values, strides and device, gradients (none in between), `requires_grad`, training
    mode, hooks and every attribute of its modules. Raises `ValueError` for lazy parameters, which have no way back.
    """
    if has_lazy_parameters(module):
        raise ValueError("The model has lazy parameters, which get their shape for good: run one forward pass before")
    tensors = list({id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values())
    attributes = _Attributes(module.modules())
    values = _Values(tensors)
    gradients = [(tensor, tensor.grad, tensor.requires_grad) for tensor in tensors if tensor.is_leaf]
    states = get_random_states()
    for tensor, _, _ in gradients:
        tensor.grad = None
    try:
        yield
    finally:
        set_random_states(**states)
        attributes.restore()
        values.restore()
        for tensor, grad, requires_grad in gradients:
            tensor.requires_grad_(requires_grad)
            tensor.grad = grad


@contextmanager
def unchanged_learner(
    learn: Learner,
) -> Iterator[None]:
    """Put `learn` back afterwards, also after an exception.

    Its model as `unchanged_module` does, optimizer, DataLoaders, autocast, random states, and its own attributes. Its
    callbacks and metrics stay untouched, for copies take their place in between; trackers and loggers write nothing.
    """
    optimizers = list(_optimizers(learn))
    loaders = list(getattr(learn.dls, "loaders", []))
    samplers = [getattr(loader, name, None) for loader in loaders for name in ("sampler", "batch_sampler")]
    attributes = _Attributes([learn, *optimizers, *loaders, *samplers])
    values = _Values(_state_tensors(optimizers))
    autocast = [AutocastState(device_type) for device_type in {"cpu", training_device(learn).type}]
    with unchanged_module(learn.model):
        try:
            _use_copied_callbacks(learn)
            learn.lr_finder = learn.gather_preds = None  # by these fastai's trackers and loggers know to keep quiet
            yield
        finally:
            for state in autocast:
                state.restore()
            attributes.restore()
            values.restore()


class _Attributes:
    "The attributes of objects, the contents of the containers in them, and the states of their random generators."

    def __init__(self, objects: Iterable[Any]):
        self.attributes = [(vars(obj), dict(vars(obj))) for obj in objects if hasattr(obj, "__dict__")]
        self.containers: dict[int, tuple[Any, Any]] = {}
        self.generators: list[tuple[Any, Any]] = []
        todo = [value for _, saved in self.attributes for value in saved.values()]
        while todo:
            value = todo.pop()
            if isinstance(value, random.Random):
                self.generators.append((value.setstate, value.getstate()))
            elif isinstance(value, torch.Generator):
                self.generators.append((value.set_state, value.get_state()))
            elif isinstance(value, np.random.Generator):
                bits = value.bit_generator
                self.generators.append((lambda state, bits=bits: setattr(bits, "state", state), bits.state))
            elif isinstance(value, L):
                todo.append(value.items)
            elif isinstance(value, (dict, list, set)) and id(value) not in self.containers:
                self.containers[id(value)] = value, copy.copy(value)
                todo += value.values() if isinstance(value, dict) else value

    def restore(self) -> None:
        for attributes, saved in self.attributes:
            for name in [name for name in attributes if name not in saved]:
                del attributes[name]
            attributes.update(saved)
        for container, saved in self.containers.values():
            container.clear()
            if isinstance(container, list):
                container.extend(saved)
            else:
                container.update(saved)
        for set_state, state in self.generators:
            set_state(state)


class _Values:
    "Tensors with their memory and what is in it."

    def __init__(self, tensors: Iterable[Tensor]):
        self.saved = [(tensor, tensor.data, tensor.detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, data, values in self.saved:
            if 0 not in data.stride():  # an expanded tensor cannot have been written to
                data.copy_(values)
            tensor.data = data


def _optimizers(learn: Learner) -> Iterator[Any]:
    "The optimizer of `learn`, and those that it wraps, as fastai's Lookahead and OptimWrapper do."
    opt = learn.opt
    while opt is not None:
        yield opt
        opt = vars(opt).get("opt")


def _state_tensors(optimizers: Iterable[Any]) -> list[Tensor]:
    found = {}
    for opt in optimizers:
        slow_weights = [list(group) for group in vars(opt).get("slow_weights") or []]  # fastai's Lookahead
        for tensor in tensors_in([list(opt.state.values()), slow_weights]):
            found[id(tensor)] = tensor
    return list(found.values())


def _use_copied_callbacks(learn: Learner) -> None:
    "Replace the callbacks and metrics of `learn` by copies, the progress bar by none."
    opts = list(_optimizers(learn))
    shared = [learn, learn.dls, learn.loss_func, *opts, *getattr(learn.dls, "loaders", [])]
    shared += [*learn.model.modules(), *learn.model.parameters(), *learn.model.buffers()]
    memo = {id(obj): obj for obj in shared}
    learn.metrics = [_copy(metric, memo) for metric in learn.metrics]
    cbs = [_copy(cb, memo) for cb in learn.cbs if not isinstance(cb, ProgressCallback)]
    learn.cbs = L(cbs)
    for cb in cbs:
        setattr(learn, cb.name, cb)


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    "A deep copy; where something inside cannot be copied, as an open file, a shallow one with its own containers."
    tried = dict(memo)
    try:
        result = copy.deepcopy(value, tried)
    except Exception:
        result = copy.copy(value)
        for name, item in vars(result).items():
            if isinstance(item, (dict, list, set, L)):
                vars(result)[name] = copy.copy(item)
        tried = {**memo, id(value): result}
    memo.update(tried)
    return result
