"Tensors nested in any way, and lists of them; checks of types and of identity. PyTorch only."

import copy
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor

__all__ = ["are_same", "check_type", "foreach", "map_tensors", "tensors_in"]

_ARRAYS = (array, bytearray, memoryview)  # sequences of numbers alone, which may be long


def map_tensors(
    function: Callable[[Tensor], Tensor],
    batch: Any,  # a tensor, or tuples, lists and dicts of tensors, nested in any way
) -> Any:
    """Return `batch` with `function` applied to its tensors, in new containers where one changed.

    A container without changes comes back itself, and so does one whose class cannot be made from items.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        items = batch.items()
    elif _is_walked(batch):
        items = enumerate(batch)
    else:
        return batch
    changed = {}
    for key, value in items:
        new = map_tensors(function, value)
        if new is not value:
            changed[key] = new
    return _replace_items(batch, changed) if changed else batch


def tensors_in(
    values: Any,  # a tensor, or tuples, lists, dicts and dataclasses of tensors, nested in any way
) -> list[Tensor]:
    "Return the tensors in `values`, in their order."
    return list(_iter_tensors(values, ()))


def _iter_tensors(values: Any, around: tuple[int, ...]) -> Iterator[Tensor]:
    "Yield the tensors in `values`, which lies in the containers with the ids `around`."
    if isinstance(values, Tensor):
        yield values
        return
    if isinstance(values, (tuple, list)):
        inside = values
    elif isinstance(values, Mapping):
        inside = values.values()
    elif is_dataclass(values) and not isinstance(values, type):
        inside = [getattr(values, each.name) for each in fields(values)]
    else:
        return
    if id(values) in around:  # it holds itself, as the root of a tree does whose nodes know their parent
        return
    for value in inside:
        yield from _iter_tensors(value, (*around, id(values)))


def _is_walked(batch: Any) -> bool:
    "Whether to look for tensors in `batch`: in a tuple, or a sequence whose items can be set, as a str's cannot."
    if isinstance(batch, tuple):
        return True
    return isinstance(batch, Sequence) and hasattr(batch, "__setitem__") and not isinstance(batch, _ARRAYS)


def _replace_items(batch: Any, changed: dict[Any, Any]) -> Any:
    "Return a container like `batch` with the items in `changed`; `batch` if its class cannot be made from items."
    if isinstance(batch, tuple) and hasattr(batch, "_replace"):  # a named tuple
        return batch._replace(**{batch._fields[i]: item for i, item in changed.items()})
    try:
        if isinstance(batch, (dict, list)) or hasattr(type(batch), "__copy__"):
            result = copy.copy(batch)  # keeps what a subclass carries, as a state dict its version
            for key, item in changed.items():
                result[key] = item
            return result
        if isinstance(batch, Mapping):
            return type(batch)({**batch, **changed})
        return type(batch)([changed.get(i, item) for i, item in enumerate(batch)])
    except Exception:  # a class of the user's, whose constructor takes something else
        return batch


def are_same(
    first: Collection[Any],
    second: Collection[Any],
) -> bool:
    "Whether both hold the same objects, in the same order."
    return len(first) == len(second) and all(map(is_, first, second))


def check_type(
    name: str,  # of the argument
    value: Any,
    cls: type,
) -> None:
    "Raise a `TypeError` that names the argument if `value` is no `cls`. (`torch.channels_last` would pass for True.)"
    if not isinstance(value, cls):
        legal = "True or False" if cls is bool else f"a {cls.__name__}"
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: pass {legal}")


def foreach(
    name: str,  # of a method of tensors
    tensors: list[Tensor],
    *args: Any,  # of the method: lists of one for each tensor, or the same for all
    **kwargs: Any,
) -> Any:
    "Call the method `name` of all `tensors`, in one kernel if PyTorch has one; return the results in a list."
    function = getattr(torch, f"_foreach_{name}", None)
    if function is not None:
        return function(tensors, *args, **kwargs)
    rows = zip(*[arg if isinstance(arg, list) else [arg] * len(tensors) for arg in (tensors, *args)])
    return [getattr(tensor, name)(*others, **kwargs) for tensor, *others in rows]
