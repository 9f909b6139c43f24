"`Learner.format_find`: search on a Learner that is afterwards as it was."

import gc
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.torch_core import rank_distrib
from fastcore.basics import patch
from fastprogress.fastprogress import progress_bar

from channelslast.find.budget import Budget, check_budget
from channelslast.find.candidates import Candidate, new_candidates
from channelslast.find.distributed import training_processes
from channelslast.find.result import FormatTimings
from channelslast.find.search import Search
from channelslast.formats import TrainFormat
from channelslast.nested import check_type
from channelslast.restore import unchanged_learner


@patch
def format_find(
    self: Learner,
    formats: Iterable[TrainFormat] | None = None,  # candidates; None: both formats, in all that the device accelerates
    compile: bool = False,  # also try each compiled by PyTorch
    show_plot: bool = True,  # draw the bars
    budget: float | None = None,  # seconds to take, compilation not counted; None: 27, more if steps are slow
) -> FormatTimings:
    """Time a training step of this Learner in each format, and tell which to train in.

    The steps are the Learner's own: model, loss, optimizer (at a learning rate of 0) and callbacks, on a few batches of
    its training data, which are on the device already. The format that the Learner has is always a candidate. One that
    fails becomes a row with the reason. Afterwards the Learner is as before, also when the search is interrupted;
    trackers and loggers write nothing. (Data that come as a stream, without a way back, have gone on.)

    `learn.to_format(learn.format_find().best)` uses the result. With `compile=True` all that PyTorch has compiled in
    this process is dropped, and compiled again when it is used.

    Raises `TypeError` and `ValueError` for `formats`, `compile`, `show_plot` or a `budget` that cannot be, without
    training data, and in the middle of a fit. Where no candidate can train, raises what the Learner raised in the
    format that it has, with a note of all reasons; a `RuntimeError` with them where nothing was raised.
    """
    formats = _check_formats(formats)
    check_type("compile", compile, bool)
    check_type("show_plot", show_plot, bool)
    timings = find_format(self, new_candidates(self, formats, compile), budget)
    if not rank_distrib():
        print(timings)
        if show_plot:
            timings.plot()
    return timings


def find_format(
    learn: Learner,
    candidates: list[Candidate],
    budget: float | None = None,  # seconds, see `Learner.format_find`
    start: TrainFormat | None = None,  # with which the others are compared; None: that of `learn`
) -> FormatTimings:
    "Time `candidates` on `learn`, and leave it as it was."
    check_budget(budget)
    if _is_in_a_fit(learn):
        raise RuntimeError("format_find in the middle of a fit of the same Learner: call it before or after")
    start = start or learn.train_format
    with (
        training_processes(learn) as processes,
        _progress_bar(learn) as progress,
        unchanged_learner(learn) as put_tensors_back,
        room_for_compiled(any(candidate.is_compiled for candidate in candidates)),
    ):
        search = Search(learn, candidates, Budget(budget, processes), processes, progress, put_tensors_back)
        search.run()
        return search.finish(start)


def _check_formats(formats: Any) -> list[TrainFormat] | None:
    legal = "pass a list, as [TrainFormat(True, amp_mode='bf16')], or None for all that the device accelerates"
    if formats is None:
        return None
    if isinstance(formats, (str, TrainFormat)) or not isinstance(formats, Iterable):
        raise TypeError(f"formats={formats!r} is not a list of TrainFormat: {legal}")
    formats = list(formats)
    if not formats:
        raise ValueError(f"formats={formats!r} is empty: {legal}")
    for fmt in formats:
        if not isinstance(fmt, TrainFormat):
            raise TypeError(f"formats holds {fmt!r}, which is not a TrainFormat: {legal}")
    return formats


def _is_in_a_fit(learn: Learner) -> bool:
    "Whether `learn` is training or predicting, further up in what calls this. (fastai keeps no record of it.)"
    methods = [inspect.unwrap(vars(Learner)[name]) for name in ("fit", "validate", "get_preds")]  # others may wrap them
    loops = {getattr(method, "__code__", None) for method in methods}
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code in loops and frame.f_locals.get("self") is learn:
            return True
        frame = frame.f_back
    return False


@contextmanager
def room_for_compiled(is_on: bool) -> Iterator[None]:
    """Room for the compiled forms of many candidates, each of them as if it were the first; afterwards none is left.

    By default PyTorch compiles a function 8 times and then runs it eagerly, and takes what differs the second time (the
    strides of an image) for dynamic.
    """
    if not is_on:
        yield
        return
    public = getattr(torch.compiler, "config", None)  # with the names from PyTorch 2.8 on
    config = public if hasattr(public, "recompile_limit") else torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    torch.compiler.reset()
    with config.patch({limit: 1000, "automatic_dynamic_shapes": False}):
        try:
            yield
        finally:
            torch.compiler.reset()  # else they would count against the limit; and CUDA graphs hold memory
            gc.collect()


@contextmanager
def _progress_bar(learn: Learner) -> Iterator[Callable[[float, str], None]]:
    "fastai's progress bar, where `learn` shows one: a function that takes a share between 0 and 1, and a comment."
    if rank_distrib() or not any(isinstance(cb, ProgressCallback) for cb in learn.cbs):
        yield lambda share, comment: None
        return
    bar = progress_bar(range(100), leave=False)
    bar.update(0)

    def update(share: float, comment: str) -> None:
        bar.comment = comment
        bar.update(max(1, min(99, int(100 * share))))

    try:
        yield update
    finally:
        bar.on_iter_end()
