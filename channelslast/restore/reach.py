"""What modules or a Learner reach, as far as restoring goes.

They reach what is in their attributes, the items of the containers there, and so on; of a `partial` its parts, of a
method its object. Callbacks, metrics, loss function, optimizers, submodules and objects of the user's own classes are
found so. It ends here:

- A container of more than 10,000 items (1,000 with `values=False`) is not looked into: its items count as values.
- Among data, which is what DataLoaders and data sets reach but for modules, tensors and arrays are left alone, and a
  container of more than 100 items is not looked into. But variables that a function closes over are looked at.
- An object that holds a file, thread, process, queue or socket is left alone, for these have no way back. So is one
  with its own way to be pickled, as a data frame or an image, for its attributes are not all there is to it. Modules,
  callbacks, metrics and optimizers are looked into all the same; so are such objects among data, for generators.
- Iterators, classes, modules of Python, keys of dicts, other Learners, and the objects of Python's own library but for
  containers and namespaces are left alone.
"""

import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from functools import partial
from io import IOBase
from multiprocessing.process import BaseProcess
from queue import Queue
from socket import socket
from threading import Thread
from types import CellType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, FilteredBase
from fastai.data.load import DataLoader as FastaiDataLoader
from fastai.learner import Learner, Metric
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from channelslast.restore.parts import CONTAINERS, GENERATORS, Restore, save_attributes, save_generator, save_items

__all__ = ["Node", "Reached", "Saved", "path_to"]

_DATA = (DataLoaders, FastaiDataLoader, DataLoader, FilteredBase, Dataset)
_NAMES_OF_DATA = {"dls", "dl", "dataset"}
_OWNERS = (Learner, nn.Module, Callback, Metric, Optimizer)
_LIVE = (IOBase, Thread, BaseProcess, Executor, Queue, socket)
_CLOSED = (type, ModuleType, FunctionType, *_LIVE)
_KINDS = {
    "tensor": Tensor,
    "array": np.ndarray,
    "generator": GENERATORS,
    "container": CONTAINERS,
    "tuple": (tuple, frozenset),
    "function": (partial, MethodType, FunctionType),
    "script module": ScriptModule,
}
_PICKLING = ("__reduce_ex__", "__reduce__", "__getstate__")
# Libraries whose classes may say how they are pickled, and are nevertheless no more than their attributes
_OPEN_LIBRARIES = {"builtins", "collections", "types", "torch", "fastai", "fastcore", "fasttransform", "channelslast"}
_CLOSED_LIBRARIES = sys.stdlib_module_names - _OPEN_LIBRARIES


class Node(NamedTuple):
    "Something that is reached, and by which way."

    value: Any
    holder: "Node | None"  # None for a root
    access: str  # '.' for an attribute of the holder, '[' for an item of it, '' for a root
    key: Any  # name of the attribute, key or index of the item, name of the root


Saved = tuple[Node, Restore]


class Reached:
    "What `roots` reach: what has been saved, and what has many values, for the caller to save."

    def __init__(
        self,
        roots: list[tuple[str, Any]],  # with the name that an error gives them
        opaque: Iterable[Any],  # of which the attributes come back, but nobody looks into them
        n_most: int,  # items of a container to look into
    ):
        self.saved: list[Saved] = []
        self.tensors: list[Node] = []
        self.arrays: list[Node] = []
        self.large_containers: list[tuple[Node, type]] = []
        self._classes: dict[type, _Class] = {}
        self._seen: set[int] = set()
        self._n_most = {False: n_most, True: 100}  # by whether it is among data
        self._waiting: dict[bool, list[Node]] = {False: [], True: []}
        self._waiting[False] += [Node(root, None, "", name) for name, root in reversed(roots)]
        for obj in opaque:
            self._seen.add(id(obj))
            restore, _ = save_attributes(obj, ())
            self.saved.append((Node(obj, None, "", type(obj).__name__), restore))
        while any(self._waiting.values()):
            is_data = not self._waiting[False]  # last, for what is reached in another way too is no data
            node = self._waiting[is_data].pop()
            if id(node.value) not in self._seen:
                self._seen.add(id(node.value))
                self._look_at(node, is_data)

    def _look_at(self, node: Node, is_data: bool) -> None:
        value = node.value
        cls = self._class(type(value))
        if cls.kind == "tensor" and not is_data:
            if is_lazy(value):
                message = "which get their shape for good: run one forward pass before"
                raise ValueError(f"The model has lazy parameters ({path_to(node)}), {message}")
            self.tensors.append(node)
        elif cls.kind == "array" and not is_data and value.flags.writeable:
            self.arrays.append(node)
        elif cls.kind == "generator":
            self.saved.append((node, save_generator(value)))
        elif cls.kind == "container":
            self._look_at_container(node, cls.container, is_data)
        elif cls.kind == "tuple" and len(value) <= self._n_most[is_data]:
            self._look_later(node, "[", enumerate(value), is_data)
        elif cls.kind == "function":
            self._look_later(node, ".", _parts_of(value, is_data), is_data)
        elif cls.kind == "script module":  # its tensors and its mode are no attributes in Python
            self.saved.append((node, partial(setattr, value, "training", value.training)))
            tensors = [*value.named_parameters(recurse=False), *value.named_buffers(recurse=False)]
            self._look_later(node, ".", tensors, is_data)
        if cls.has_attributes:
            self._look_at_attributes(node, cls, is_data)

    def _look_at_container(self, node: Node, base: type, is_data: bool) -> None:
        if base.__len__(node.value) > self._n_most[is_data]:
            self.large_containers.append((node, base))
            return
        restore, items = save_items(node.value, base)
        self.saved.append((node, restore))
        self._look_later(node, "[", items.items() if isinstance(items, dict) else enumerate(items), is_data)

    def _look_at_attributes(self, node: Node, cls: "_Class", is_data: bool) -> None:
        restore, pairs = save_attributes(node.value, cls.slots)
        if cls.is_owner or (cls.is_whole and not any(isinstance(value, _LIVE) for _, value in pairs)):
            self.saved.append((node, restore))
        elif not is_data:
            return
        self._look_later(node, ".", pairs, is_data)

    def _look_later(self, node: Node, access: str, pairs: Iterable[tuple[Any, Any]], is_data: bool) -> None:
        "Look later at what `node` holds: attributes ('.') or items ('['), in `pairs` with their names or keys."
        for key, value in reversed(list(pairs)):
            cls = self._classes.get(type(value)) or self._class(type(value))
            if cls.kind == "container" and not cls.has_attributes and not cls.container.__len__(value):
                # empty: a module has a dozen of these, and nothing in them to look at
                self.saved.append((Node(value, node, access, key), partial(cls.container.clear, value)))
            elif cls.is_looked_at:
                to_data = is_data or cls.is_data or (access == "." and key in _NAMES_OF_DATA)
                self._waiting[to_data and not cls.is_module].append(Node(value, node, access, key))

    def _class(self, cls: type) -> "_Class":
        if cls not in self._classes:
            self._classes[cls] = _Class(cls)
        return self._classes[cls]


def _parts_of(function: Any, is_data: bool) -> list[tuple[str, Any]]:
    "Return what `function` holds, with names: of a plain function, among data alone, what it closes over."
    if isinstance(function, partial):
        return [(name, getattr(function, name)) for name in ("func", "args", "keywords")]
    if isinstance(function, MethodType):
        return [("__func__", function.__func__), ("__self__", function.__self__)]
    if is_data and function.__closure__:
        cells = zip(function.__code__.co_freevars, function.__closure__)
        return [(name, cell.cell_contents) for name, cell in cells if cell != CellType()]  # an empty cell has none
    return []


class _Class:
    "What to know of a class to look at its objects."

    def __init__(self, cls: type):
        self.kind = next((kind for kind, classes in _KINDS.items() if issubclass(cls, classes)), None)
        self.container = next((base for base in CONTAINERS if issubclass(cls, base)), None)
        is_closed = _library(cls) in _CLOSED_LIBRARIES or issubclass(cls, _CLOSED) or hasattr(cls, "__next__")
        self.slots = () if is_closed else tuple(_slots(cls))
        # Plain tensors and OrderedDicts hardly ever have attributes, and to ask for them would make a dict
        has_any = bool(cls.__dictoffset__ or self.slots) and cls not in (Tensor, OrderedDict)
        self.has_attributes = has_any and not is_closed
        self.is_looked_at = (self.kind or self.has_attributes) and not issubclass(cls, Learner)
        self.is_owner = issubclass(cls, _OWNERS)
        definers = [next(base for base in cls.__mro__ if name in vars(base)) for name in _PICKLING]
        self.is_whole = all(_library(base) in _OPEN_LIBRARIES for base in definers)
        self.is_data = issubclass(cls, _DATA)
        self.is_module = issubclass(cls, nn.Module)


def _library(cls: type) -> str:
    return str(cls.__module__).partition(".")[0]


def _slots(cls: type) -> Iterator[MemberDescriptorType]:
    for base in cls.__mro__:
        if "__slots__" in vars(base):  # classes written in C have such descriptors too
            yield from (value for value in vars(base).values() if isinstance(value, MemberDescriptorType))


def path_to(
    node: Node,
) -> str:
    "Return the path to `node`, as it is written in Python: `learn.opt.state[Parameter]`."
    path = ""
    while node is not None:
        if node.access == "[":
            key = repr(node.key) if isinstance(node.key, (int, str)) else type(node.key).__name__
            path = f"[{key}]{path}"
        else:
            path = f"{node.access}{node.key}{path}"
        node = node.holder
    return path
