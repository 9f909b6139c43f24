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
from fastcore.meta import delegates
from fastprogress.fastprogress import progress_bar

from channelslast.devices import FP32
from channelslast.find.budget import Budget, check_budget
from channelslast.find.candidates import Candidate
from channelslast.find.distributed import training_processes
from channelslast.find.garbage import quick_collections
from channelslast.find.result import FormatTimings
from channelslast.find.search import Search
from channelslast.find.stages import Stage, new_stages
from channelslast.formats import TrainFormat, to_train_format
from channelslast.memory_format import own_memory_kept
from channelslast.nested import check_type
from channelslast.restore import unchanged_learner


@patch
def format_find(
    self: Learner,
    formats: Iterable[TrainFormat | str] | None = None,  # candidates; None: what may pay on the device, in stages
    compile: bool = False,  # also try the best one compiled by PyTorch
    keep_precision: bool = False,  # try the Learner's own precision alone
    show_plot: bool = True,  # draw the bars
    budget: float | None = None,  # seconds to take, compilation not counted; None: 30, up to 60 where steps are slow
) -> FormatTimings:
    """Time a training step of this Learner in the formats that may pay, and tell which to train in.

    The steps are the Learner's own: model, loss, optimizer (at a learning rate of 0) and callbacks, on a few batches of
    its training data, which are on the device already. They go in stages, each with what the one before found: eager
    formats; fused steps, where the optimizer has them; on CUDA, a CUDA graph; with `compile=True` the best one
    compiled, and that with a CUDA graph. Then those that are not hopeless are timed in rounds beside the format that
    the Learner has. One that is proved faster is the best, see `FormatTimings.best`. With `formats` these alone are
    tried.

    A candidate that fails becomes a row with the reason; so does one that the budget does not reach. Afterwards the
    Learner is as before, also when the search is interrupted: an interrupt puts everything back and is raised, as any
    other. Trackers and loggers write nothing, and no callback's `after_fit` is called. (Data that come as a stream,
    without a way back, have gone on.)

    `learn.to_format(learn.format_find().best)`, in short `learn.to_fastest()`, uses the result. With `compile=True` all
    that PyTorch has compiled in this process is dropped; it compiles the best format anew from the cache on its disk.

    Raises `TypeError` and `ValueError` for arguments that cannot be, without training data, and in the middle of a fit.
    Where no candidate can train, raises what the Learner raised in the format that it has, with a note of all reasons;
    a `RuntimeError` with them where nothing was raised.
    """
    for name, value in {"compile": compile, "keep_precision": keep_precision, "show_plot": show_plot}.items():
        check_type(name, value, bool)
    formats = _check_formats(formats, keep=self.train_format if keep_precision else None)
    timings = find_format(self, new_stages(self, formats, compile, keep_precision), budget=budget)
    if not rank_distrib():
        timings.show(show_plot)
    return timings


@patch
@delegates(Learner.format_find)
def to_fastest(self: Learner, **kwargs) -> Learner:
    """Find the fastest way to train with `format_find`, show it, and train so from the next fit on.

    `learn.train_format` tells which it is, `learn.to_format` and `learn.to_contiguous` set others. Takes the options of
    `format_find`, and raises what it does; nothing has changed then.
    """
    legal = list(inspect.signature(Learner.format_find).parameters)[1:]
    for name in kwargs.keys() - legal:
        raise TypeError(f"{name}={kwargs[name]!r} is no option of to_fastest: pass {', '.join(legal)}")
    best = self.format_find(**kwargs).best
    if best == self.train_format:
        return self
    self.to_format(best)
    if not rank_distrib():
        print(f"The Learner trains in {best} from now on.")
    return self


def find_format(
    learn: Learner,
    stages: list[Stage],
    comparisons: Iterable[Candidate] = (),  # timed beside them, but no choices
    budget: float | None = None,  # seconds, see `Learner.format_find`
    start: TrainFormat | None = None,  # with which the others are compared; None: that of `learn`
) -> FormatTimings:
    "Time the candidates of `stages` on `learn`, and leave it as it was."
    check_budget(budget)
    if _is_in_a_fit(learn):
        raise RuntimeError("format_find in the middle of a fit of the same Learner: call it before or after")
    start = start or learn.train_format
    with (
        training_processes(learn) as processes,
        _progress_bar(learn) as progress,
        room_for_compiled(any(stage.compiles for stage in stages)),
    ):
        time_left = Budget(budget, processes)
        with unchanged_learner(learn) as put_tensors_back, own_memory_kept(), quick_collections() as collect_garbage:
            search = Search(
                learn,
                stages,
                list(comparisons),
                start,
                time_left,
                processes,
                progress,
                put_tensors_back,
                collect_garbage,
            )
            search.run()
            return search.finish()


def _check_formats(formats: Any, keep: TrainFormat | None) -> list[TrainFormat] | None:
    legal = "pass a list, as ['channels last bf16'] or [TrainFormat(True, amp_mode='bf16')], or None for what may pay"
    if formats is None:
        return None
    if isinstance(formats, (str, TrainFormat)) or not isinstance(formats, Iterable):
        raise TypeError(f"formats={formats!r} is not a list of TrainFormat: {legal}")
    formats = list(formats)
    if not formats:
        raise ValueError(f"formats={formats!r} is empty: {legal}")
    for fmt in formats:
        if not isinstance(fmt, (str, TrainFormat)):
            raise TypeError(f"formats holds {fmt!r}, which is not a TrainFormat: {legal}")
    formats = [to_train_format(fmt, "formats") for fmt in formats]
    for fmt in formats:
        if keep is not None and fmt.amp_mode != keep.amp_mode:
            raise ValueError(
                f"keep_precision=True with formats that hold {str(fmt)!r}: pass formats in the Learner's own "
                f"precision, {keep.amp_mode or FP32}, or keep_precision=False"
            )
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
