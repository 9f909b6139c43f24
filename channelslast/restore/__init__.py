"""Leave a module or a Learner as it was, whatever happens to it in between, also after an exception or an interrupt.

What comes back, of the modules or the Learner given and of all that they reach:

- attributes, in `__dict__` and in `__slots__`;
- the items of lists, dicts, sets, deques and of their subclasses: the same objects in the same order;
- tensors: memory, strides, device, values, gradient, `requires_grad` and hooks; in between none has a gradient;
- the values of NumPy arrays, where they can be written to;
- random generators, and the global random states;
- autocast, for a Learner.

What does not: the tensors and arrays of DataLoaders and data sets; streams, running iterators and open files; objects
that are more than their attributes, as data frames and images; classes, the variables of functions (but of those that
load data), and other Learners. `reach.py` has the rules.

Nothing is copied but containers, one level deep, arrays, and the values of tensors (to the CPU).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.torch_core import get_random_states, set_random_states
from fastcore.foundation import L
from torch import Tensor, nn

from channelslast.devices import training_device
from channelslast.precision import AutocastState
from channelslast.restore.parts import Restore, save_array, save_gradient, save_items, save_values
from channelslast.restore.reach import Node, Reached, Saved, path_to

__all__ = ["unchanged_learner", "unchanged_modules", "unchanged_tensors"]

# fastai's loggers that do not keep quiet for `learn.lr_finder`, as its others do
_LOGGERS = ("fastai.callback.azureml", "fastai.callback.comet", "fastai.callback.neptune")


@contextmanager
def unchanged_modules(
    *modules: nn.Module,
) -> Iterator[None]:
    """Put `modules`, what they reach and the random states back afterwards.

    What fails to come back is named in a note on the exception that ended the block, or else in a `RuntimeError`.
    Raises `ValueError` for lazy parameters, which have no way back.
    """
    saved = _Saved([(type(module).__name__, module) for module in modules])
    with saved.put_back_afterwards():
        yield


@contextmanager
def unchanged_learner(
    learn: Learner,
    values: bool = True,  # False: what is written into tensors, arrays and large containers stays: no copy of them
) -> Iterator[Callable[[], None]]:
    """Put `learn`, what it reaches and the random states back afterwards; yield a function that puts tensors back.

    In between it trains with its own callbacks, but for the progress bar; trackers and loggers write nothing. A data
    set that is a stream does not go back. With `values=False` tensors keep the values, memory and strides that they
    get. Raises as `unchanged_modules` does.
    """
    quiet = L(cb for cb in learn.cbs if not _is_loud(cb))
    saved = _Saved([("learn", learn)], values, opaque=filter(_is_loud, learn.cbs))
    for device_type in {"cpu", training_device(learn).type}:
        saved.add(f"autocast on '{device_type}'", AutocastState(device_type).restore)
    with saved.put_back_afterwards():
        learn.cbs = quiet
        learn.lr_finder = learn.gather_preds = None  # by these fastai's trackers and loggers know to keep quiet
        yield saved.put_tensors_back


@contextmanager
def unchanged_tensors(
    tensors: Iterable[Tensor],
) -> Iterator[None]:
    "Put memory, values, `requires_grad` and gradients of `tensors` back afterwards; in between they have no gradients."
    saved = _Saved([("tensors", tuple(tensors))])
    with saved.put_back_afterwards():
        yield


def _is_loud(cb: Callback) -> bool:
    "Whether `cb` shows or logs what happens, also where the Learner says that it only tries something out."
    return isinstance(cb, ProgressCallback) or type(cb).__module__ in _LOGGERS


class _Saved:
    "All that comes back of `roots`, in parts."

    def __init__(
        self,
        roots: list[tuple[str, Any]],  # with the name that an error gives them
        values: bool = True,  # with the values and memory of tensors, arrays and large containers
        opaque: Iterable[Any] = (),  # of which the attributes come back, but nobody looks into them
    ):
        reached = Reached(roots, opaque, n_most=10_000 if values else 1_000)
        self.values: list[Saved] = []
        large = []
        if values:
            self.values = [(node, save_values(node.value)) for node in reached.tensors]
            large = [(node, save_array(node.value)) for node in reached.arrays]
            large += [(node, save_items(node.value, base)[0]) for node, base in reached.large_containers]
        leaves = [node for node in reached.tensors if node.value.is_leaf and (values or _can_train(node.value))]
        self.leaves = [node.value for node in leaves]
        gradients = [(node, save_gradient(node.value)) for node in leaves]
        # A gradient last, for it has to be of the device and dtype of its tensor
        self.all: list[Saved] = [*reached.saved, *self.values, *large, *gradients]
        self.add("the random states", partial(set_random_states, **get_random_states()))

    def add(self, name: str, restore: Restore) -> None:
        self.all.append((Node(None, None, "", name), restore))

    @contextmanager
    def put_back_afterwards(self) -> Iterator[None]:
        "No tensor has a gradient inside; after it everything is put back."
        try:
            try:
                for tensor in self.leaves:
                    tensor.grad = None
                yield
            finally:
                failed = _put_back(self.all)
        except BaseException as error:
            failed = _put_back(self.all)  # once more: `error` may be an interrupt that came while things were put back
            if failed:
                error.add_note(_message(failed))
            raise
        if failed:
            raise RuntimeError(_message(failed)) from failed[0][1]

    def put_tensors_back(self) -> None:
        failed = _put_back(self.values)
        if failed:
            raise RuntimeError(_message(failed)) from failed[0][1]


def _can_train(tensor: Tensor) -> bool:
    return tensor.requires_grad or tensor.grad is not None or issubclass(type(tensor), nn.Parameter)


def _put_back(saved: list[Saved]) -> list[tuple[Node, Exception]]:
    "Put all of it back; return what failed, each with its exception."
    failed = []
    for node, restore in saved:
        try:
            restore()
        except Exception as error:
            failed.append((node, error))
    return failed


def _message(failed: list[tuple[Node, Exception]]) -> str:
    shown = [f"{path_to(node)} ({type(reason).__name__}: {reason})" for node, reason in failed[:5]]
    more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
    return f"channelslast could not put back {', '.join(shown)}{more}"
