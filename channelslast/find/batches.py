"The few batches that a search trains on, over and over."

import time
from collections.abc import Iterator
from itertools import cycle
from typing import Any

from fastai.learner import Learner
from fastai.torch_core import find_bs, to_device
from fastcore.basics import defaults
from torch import Tensor

from channelslast.devices import training_device
from channelslast.find.clock import wait_for
from channelslast.fit import without_batches
from channelslast.nested import map_tensors, tensors_in

N_BATCHES = 4


class Endless:
    "Batches over and over, as a DataLoader that has no end: a copy each time, for a step may write into its batch."

    def __init__(
        self,
        batches: list[Any],
        dl: Any,  # the DataLoader in whose place it stands, and whose attributes it has
    ):
        self.batches, self.dl = batches, dl

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "dl" not in vars(self):
            raise AttributeError(name)
        return getattr(self.dl, name)

    def __iter__(self) -> Iterator[Any]:
        return (map_tensors(Tensor.clone, batch) for batch in cycle(self.batches))

    def __len__(self) -> int:
        return 1_000_000  # callbacks tell by this how far a fit has got


def load_batches(
    learn: Learner,
    seconds: float,  # to read data for, at least
) -> tuple[list[Any], float]:
    "Return the first `N_BATCHES` training batches of one shape, on the device, and the loader's items a second."
    if not getattr(learn.dls, "loaders", None):
        raise ValueError("learn.dls holds no training data: pass a Learner with at least one batch to train on")
    device = training_device(learn)
    batches, n_items = [], 0
    started = first = time.perf_counter()
    for batch in learn.dls.train:
        if not batches:
            first = time.perf_counter()  # until here workers were starting
        n_items += n_items_in(batch)
        if len(batches) < N_BATCHES and (not batches or shapes_in(batch) == shapes_in(batches[0])):
            batches.append(batch)
        if time.perf_counter() - started > seconds:
            break
    if not batches:
        raise without_batches(learn.dls.train)
    wait_for(device)
    later = n_items - n_items_in(batches[0])
    n_items, since = (later, first) if later else (n_items, started)
    items_per_s = n_items / max(1e-9, time.perf_counter() - since)  # some clocks are coarse
    return [to_device(batch, device) for batch in batches], items_per_s


def more_workers(
    learn: Learner,
) -> int | None:
    "Return how many workers fastai would give the training DataLoader, None where it has as many, or is not fastai's."
    loader = getattr(learn.dls.train, "fake_l", None)  # its own `num_workers` counts only while it is iterated
    most = min(16, defaults.cpus)  # as fastai's `TfmdDL`
    return most if loader is not None and loader.num_workers < most else None


def n_items_in(
    batch: Any,
) -> int:
    "Return how many images, or other items, `batch` holds: in tensors, or in a list as detection models take."
    inputs, targets = (batch[0], batch[-1]) if isinstance(batch, (tuple, list)) else (batch, None)
    if not isinstance(inputs, (tuple, list)):
        return find_bs(batch)
    if (
        isinstance(targets, Tensor)
        and targets.ndim
        and {x.shape[:1] for x in tensors_in(inputs)} == {targets.shape[:1]}
    ):
        return len(targets)
    return len(inputs)


def shapes_in(
    batch: Any,
) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors_in(batch)]
