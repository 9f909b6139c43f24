"""Save one thing, as the values of a tensor or the attributes of an object.

Each function returns another one, which puts the thing back and may be called twice.
"""

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from operator import setitem
from types import MemberDescriptorType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from channelslast.nested import are_same

__all__ = [
    "CONTAINERS",
    "GENERATORS",
    "Restore",
    "save_array",
    "save_attributes",
    "save_generator",
    "save_gradient",
    "save_items",
    "save_values",
]

Restore = Callable[[], None]  # puts a thing back

CONTAINERS = (OrderedDict, dict, list, set, deque)
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def save_values(tensor: Tensor) -> Restore:
    "Save which memory `tensor` has, and a copy of its values on the CPU."
    values = None if tensor.is_meta else tensor.detach().to("cpu", copy=True)
    return partial(_put_values_back, tensor, tensor.data, values)


@torch.no_grad()
def _put_values_back(tensor: Tensor, data: Tensor, values: Tensor | None) -> None:
    tensor.data = data
    if values is None:
        return
    # Written only if it differs, for memory of a mapped file cannot be. Compared on the CPU, for a GPU may be full.
    if not _has_bits(values):
        data.copy_(values)
    elif not torch.equal(_bits(values), _bits(data.to("cpu"))):
        # of an expanded dimension, whose values are one in memory, the first alone
        once = tuple(slice(1 if stride == 0 else None) for stride in data.stride())
        data[once].copy_(values[once])


def _has_bits(tensor: Tensor) -> bool:
    "Whether `_bits` takes `tensor`."
    is_strided = tensor.layout == torch.strided and not tensor.is_nested
    has_memory = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    return is_strided and has_memory and not tensor.is_quantized and not tensor.is_complex()


def _bits(tensor: Tensor) -> Tensor:
    "Return `tensor` as integers, so that NaN equals itself and 0.0 is not -0.0."
    return tensor.view(_INTEGERS[tensor.itemsize])


def save_array(array: np.ndarray) -> Restore:
    return partial(setitem, array, ..., array.copy())


def save_gradient(tensor: Tensor) -> Restore:
    "Save the gradient of a leaf tensor, its `requires_grad`, and its hooks."
    hooks = tensor._backward_hooks, tensor._post_accumulate_grad_hooks  # dicts, or None
    items = [each and dict(each) for each in hooks]
    return partial(_put_gradient_back, tensor, tensor.grad, tensor.requires_grad, hooks, items)


def _put_gradient_back(
    tensor: Tensor, grad: Tensor | None, requires_grad: bool, hooks: tuple[Any, Any], items: list[Any]
) -> None:
    if not tensor.is_leaf:  # something with a history was written into it
        tensor.detach_()
    tensor.requires_grad_(requires_grad)
    tensor.grad = grad
    for each, saved in zip(hooks, items):
        if each is not None:
            each.clear()
            each.update(saved)
    if tensor._backward_hooks is not hooks[0]:
        tensor._backward_hooks = hooks[0]
    if tensor._post_accumulate_grad_hooks is not hooks[1]:
        tensor._post_accumulate_grad_hooks = hooks[1]


def save_items(
    container: Any,
    base: type,  # of its class, one of `CONTAINERS`: a subclass may have methods of its own
) -> tuple[Restore, Any]:
    "Return a plain list or dict of the items too."
    items = _items(container, base)
    return partial(_put_items_back, container, base, items), items


def _items(container: Any, base: type) -> Any:
    if base is OrderedDict:
        return dict(OrderedDict.items(container))
    return base.copy(container) if base in (list, dict) else list(base.__iter__(container))


def _put_items_back(container: Any, base: type, items: Any) -> None:
    now = _items(container, base)
    if are_same(now, items) and (not isinstance(items, dict) or are_same(now.values(), items.values())):
        return
    base.clear(container)
    if isinstance(items, dict):
        for key, item in items.items():
            base.__setitem__(container, key, item)
    elif base is set:
        set.update(container, items)
    else:
        base.extend(container, items)


def save_attributes(
    obj: Any,
    slots: Sequence[MemberDescriptorType],  # of its class
) -> tuple[Restore, list[tuple[str, Any]]]:
    "Return names and values of the attributes too."
    in_dict = dict(_dict_of(obj) or {})
    in_slots = {}
    for slot in slots:
        with suppress(AttributeError):  # not set
            in_slots[slot] = slot.__get__(obj)
    pairs = [*in_dict.items(), *((slot.__name__, value) for slot, value in in_slots.items())]
    return partial(_put_attributes_back, obj, in_dict, slots, in_slots), pairs


def _dict_of(obj: Any) -> dict[str, Any] | None:
    "The `__dict__` of `obj`; a class that is compiled may have room for one, and none."
    with suppress(TypeError):
        return vars(obj) if type(obj).__dictoffset__ else None


def _put_attributes_back(
    obj: Any, in_dict: dict[str, Any], slots: Sequence[MemberDescriptorType], in_slots: dict[MemberDescriptorType, Any]
) -> None:
    attributes = _dict_of(obj)
    if attributes is not None:
        _put_items_back(attributes, dict, in_dict)
    for slot in slots:
        if slot in in_slots:
            slot.__set__(obj, in_slots[slot])
        else:
            with suppress(AttributeError):  # not set
                slot.__delete__(obj)


def save_generator(
    generator: Any,  # one of `GENERATORS`
) -> Restore:
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    if isinstance(generator, (np.random.RandomState, torch.Generator)):
        return partial(generator.set_state, generator.get_state())
    bits = generator.bit_generator
    return partial(setattr, bits, "state", bits.state)
