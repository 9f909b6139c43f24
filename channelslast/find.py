"Measure a Learner's own training step in each format, and choose the fastest."

import gc
import inspect
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import cycle
from math import isfinite, nan
from numbers import Real
from operator import methodcaller
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.torch_core import find_bs, get_model, rank_distrib, to_device
from fastcore.basics import patch
from fastprogress.fastprogress import progress_bar
from torch import Tensor
from torch.profiler import ProfilerActivity

from channelslast.callback import TrainFormat
from channelslast.memory_format import _check, conv_ndims, module_ndims, supports_channels_last, with_wrapped
from channelslast.precision import accelerated_dtypes, amp_mode_of, autocast_dtype, training_device
from channelslast.processes import EndedElsewhere, Processes, training_processes
from channelslast.restore import FitDone, unchanged_learner
from channelslast.summary import gpu_shares
from channelslast.timings import FormatTiming, FormatTimings
from channelslast.trace import tensors_in

__all__ = ["FormatTiming", "FormatTimings"]

BUDGET = 27.0  # seconds
_N_ROUNDS = 10  # more time makes them longer, which makes them steadier
_FEW_ROUNDS = 5  # where in more a round had few timed steps
_FEW_STEPS = 4  # in fewer of them, what comes every third step may never come
_MIN_ROUNDS = 3  # fewer have no spread
_N_BATCHES = 4  # to train on, over and over
_MOST_CANCELLED = 12  # batches without a backward pass, before the first that has one
_NO_NUMBER = "the loss is"


# The candidates


def _formats_to_try(learn: Learner, formats: Iterable[TrainFormat] | None, compile: bool) -> list[TrainFormat]:
    "The format of the Learner, and those asked for; with `compile` these compiled too."
    device, start = training_device(learn), learn.train_format
    if formats is None:
        amp_modes = [None, *map(amp_mode_of, accelerated_dtypes(device))]
        has_images = bool(module_ndims(learn.model) or conv_ndims(learn.model)) and supports_channels_last(device)
        both = (False, True) if has_images else (False,)
        formats = [TrainFormat(last, amp_mode, start.compile) for amp_mode in amp_modes for last in both]
    formats = list(formats)
    if compile:
        eager = [replace(fmt, compile=None) for fmt in formats]
        modes = ("default", "reduce-overhead") if device.type == "cuda" else ("default",)
        formats = [*formats, *eager, *(replace(fmt, compile=mode) for mode in modes for fmt in eager)]
    return list(dict.fromkeys(formats if start in formats else [start, *formats]))


class Candidate:
    "A format on its way through the search."

    def __init__(
        self,
        fmt: TrainFormat,
        prepare: Callable[[Learner], Any] | None = None,  # puts a Learner into it; None: `Learner.to_format`
        error: str | None = None,  # why not to try it
        is_choice: bool = True,  # False: timed for comparison alone
    ):
        self.row = FormatTiming(fmt, error=error)
        self.is_choice = is_choice
        self.has_graphs = fmt.compile in ("reduce-overhead", "max-autotune")  # CUDA graphs, in memory of their own
        self.prepare = prepare or methodcaller("to_format", fmt)
        self.scaler_state: dict[str, Any] = {}
        self.raised: Exception | None = None  # by the Learner
        self.step_s = self.overhead_s = 0.0


def new_candidates(
    learn: Learner,
    formats: Iterable[TrainFormat] | None = None,
    compile: bool = False,
) -> list[Candidate]:
    "The candidates of `Learner.format_find`."
    device = training_device(learn)
    return [Candidate(fmt, error=_cannot_train(fmt, device)) for fmt in _formats_to_try(learn, formats, compile)]


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


def _check_budget(budget: Any) -> None:
    is_number = isinstance(budget, Real) and not isinstance(budget, bool)
    if budget is not None and not (is_number and isfinite(budget) and budget > 0):
        default = f"None for {BUDGET:.0f}, or what a few rounds take"
        raise ValueError(f"budget={budget!r}: pass a number of seconds above 0, or {default}")


def _cannot_train(fmt: TrainFormat, device: torch.device) -> str | None:
    "Why the device would train in another format than `fmt`."
    if fmt.channels_last and not supports_channels_last(device):
        return f"channels last is not reliable on the device '{device}'"
    if fmt.amp_mode is None:
        return None
    try:
        dtype, why = autocast_dtype(fmt.amp_mode, device)
    except ValueError as error:
        return str(error)
    return None if amp_mode_of(dtype) == fmt.amp_mode else why


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


# The data


class _Endless:
    "Batches over and over, as a DataLoader that has no end."

    def __init__(self, batches: list[Any]):
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return cycle(self.batches)

    def __len__(self) -> int:
        return 1_000_000  # how far a fit has got is told by this


def _load_batches(learn: Learner, seconds: float) -> tuple[list[Any], float]:
    "The first batches of the training data that are of one shape, on the device; and the items a second that come."
    if not getattr(learn.dls, "loaders", None):
        raise ValueError("learn.dls holds no training data: pass a Learner with at least one batch to train on")
    device = training_device(learn)
    batches, n_items = [], 0
    started = first = time.perf_counter()
    for batch in learn.dls.train:
        if not batches:
            first = time.perf_counter()  # until here workers were starting
        n_items += n_items_in(batch)
        if len(batches) < _N_BATCHES and (not batches or _shapes(batch) == _shapes(batches[0])):
            batches.append(batch)
        if time.perf_counter() - started > seconds:
            break
    if not batches:
        raise ValueError("learn.dls.train is empty: pass a Learner with at least one batch to train on")
    _synchronize(device)
    later = n_items - n_items_in(batches[0])
    n_items, since = (later, first) if later else (n_items, started)
    items_per_s = n_items / max(1e-9, time.perf_counter() - since)  # some clocks are coarse
    return [to_device(batch, device) for batch in batches], items_per_s


def n_items_in(
    batch: Any,
) -> int:
    "How many images, or other items, `batch` holds: in tensors, or in a list as detection models take."
    inputs, targets = (batch[0], batch[-1]) if isinstance(batch, (tuple, list)) else (batch, None)
    if not isinstance(inputs, (tuple, list)):
        return find_bs(batch)
    is_of_batches = isinstance(targets, Tensor) and {len(tensor) for tensor in tensors_in(inputs)} == {len(targets)}
    return len(targets) if is_of_batches else len(inputs)


def _shapes(batch: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors_in(batch)]


# The clock


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif hasattr(getattr(torch, device.type, None), "synchronize"):
        getattr(torch, device.type).synchronize()


class _Clock:
    "Marks the time, on a CUDA GPU by events in its stream, elsewhere once the device is done."

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.marks.append(event)
        else:
            _synchronize(self.device)
            self.marks.append(time.perf_counter())

    def ms(self) -> list[float]:
        "Milliseconds between the marks."
        pairs = list(zip(self.marks, self.marks[1:]))
        if self.device.type == "cuda":
            self.marks[-1].synchronize()
            return [first.elapsed_time(second) for first, second in pairs]
        return [1000 * (second - first) for first, second in pairs]


class _TimedSteps(Callback):
    "Train on the same few batches, mark the time, and end the fit when there are enough steps."

    order = float("inf")  # after all that belongs to a step

    def __init__(self, batches: list[Any], device: torch.device, scaler_state: dict[str, Any]):
        self.batches, self.scaler_state = batches, scaler_state
        self.clock = _Clock(device)
        self.error: str | None = "a callback of the Learner cancelled the fit before it had trained enough steps"
        self.shapes: list[tuple[int, ...]] = []
        self.n_begun = self.n_backward = self.n_cancelled = self.n_steps = 0

    @property
    def place(self) -> tuple[int, int]:
        "How far the fit got, in what its process trains together with others."
        return self.n_begun, self.n_backward

    def before_fit(self):
        scaler = getattr(self.learn, "scaler", None)
        if scaler is not None and self.scaler_state:
            scaler.load_state_dict(self.scaler_state)  # else each round would begin with steps that overflow

    def before_train(self):
        self.learn.dl = _Endless(self.batches)
        self.clock.mark()

    def before_batch(self):
        self.n_begun += 1
        self.shapes = self.shapes or _shapes(self.xb)

    def before_backward(self):
        self.n_backward += 1

    def after_batch(self):
        if not self.n_backward:  # a callback cancels the first batches
            self.n_cancelled += 1
            if self.n_cancelled == _MOST_CANCELLED:
                self.finish()
            return
        self.n_steps += 1
        self.mark()
        if self.has_enough():
            self.finish()

    def finish(self):
        scaler = getattr(self.learn, "scaler", None)
        self.scaler_state = scaler.state_dict() if scaler is not None else {}
        loss = torch.as_tensor(self.learn.loss).detach()
        self.error = None
        if not torch.isfinite(loss).all():
            self.error = f"{_NO_NUMBER} {float(loss.sum())}"
        elif not self.n_backward:
            self.error = "a callback of the Learner cancelled every batch before its backward pass"
        raise FitDone()

    def before_validate(self):
        raise FitDone()  # a callback cancelled the training


class _WarmUp(_TimedSteps):
    "Time each step, until one is hardly faster than the one before."

    def __init__(self, *args: Any, agree: Callable, is_late: Callable[[], bool]):
        super().__init__(*args)
        self.agree, self.is_late = agree, is_late

    def mark(self):
        self.clock.mark()

    def has_enough(self) -> bool:
        ms = self.clock.ms()
        is_steady = len(ms) >= 3 and ms[-1] > 0.9 * ms[-2]
        return self.agree(min, is_steady, self.place) or len(ms) >= 12 or self.is_late(self.place)


class _Round(_TimedSteps):
    """Time `n` steps in one go, after `n_lead` that are not timed, and take the GPU's peak memory in them.

    In one go, for what does not come in every step, as the optimizer's under gradient accumulation, to count.
    """

    def __init__(self, *args: Any, n_lead: int, n: int):
        super().__init__(*args)
        self.n_lead, self.n = n_lead, n
        self.peak_bytes = None

    def mark(self):
        on_cuda = self.clock.device.type == "cuda"
        if self.n_steps == self.n_lead:
            if on_cuda:
                torch.cuda.reset_peak_memory_stats(self.clock.device)
            self.clock.mark()
        elif self.has_enough():
            self.clock.mark()
            if on_cuda:
                self.peak_bytes = torch.cuda.max_memory_allocated(self.clock.device)

    def has_enough(self) -> bool:
        return self.n_steps == self.n_lead + self.n

    def step_ms(self) -> float:
        "Milliseconds of a timed step, in the mean."
        return self.clock.ms()[-1] / self.n


class _ProfiledStep(_Round):
    "Profile the GPU's kernels in one step."

    def __init__(self, *args: Any, n_lead: int, running: ExitStack):
        super().__init__(*args, n_lead=n_lead, n=1)
        self.running = running  # the profiler, which an interrupt closes

    def mark(self):
        if self.n_steps == self.n_lead:
            torch.cuda.synchronize(self.clock.device)
            self.profiler = self.running.enter_context(torch.profiler.profile(activities=[ProfilerActivity.CUDA]))
        super().mark()
        if self.has_enough():
            torch.cuda.synchronize(self.clock.device)
            self.running.close()


# The search


class _Search:
    "Times candidates in interleaved rounds, on a Learner that its caller restores."

    def __init__(
        self,
        learn: Learner,
        candidates: list[Candidate],
        budget: float | None,
        progress: Callable[[float, str], None],
        put_tensors_back: Callable[[], None],
        processes: Processes,
    ):
        self.learn, self.candidates = learn, candidates
        self.progress, self.put_tensors_back = progress, put_tensors_back
        self.device = training_device(learn)
        self.processes = processes
        self.budget = budget
        self.started = time.perf_counter()
        self.uncounted = 0.0  # seconds of compilation
        self.warm_up_s: list[float] = []  # of each candidate so far, compilation not counted
        self.n_steps = 1
        self.originals = _cuda_tensors(learn)

    @property
    def running(self) -> list[Candidate]:
        return [candidate for candidate in self.candidates if not candidate.row.error]

    def agree(self, choose: Callable, value: Any, place: Any = None) -> Any:
        return self.processes.agree(choose, value, place)

    def spent(self, place: Any = None) -> float:
        "Seconds of the budget."
        return self.agree(max, time.perf_counter() - self.started - self.uncounted, place)

    def run(self) -> None:
        seconds = self.budget or BUDGET
        self.load(min(2.0, seconds / 10))
        waiting = self.running
        while waiting:
            candidate, *waiting = waiting
            self.progress(self.spent() / seconds, f"warm-up: {candidate.row.format}")
            self.warm_up(candidate)
            waiting = self.check_budget(waiting)
        self.check_any()
        self.choose_n_steps(seconds - self.spent())
        n_rounds, spent, took = 0, self.spent(), 0.0
        while n_rounds < _MIN_ROUNDS or spent + 0.5 * took < seconds:  # the nearest number of rounds
            for candidate in self.running[:: -1 if n_rounds % 2 else 1]:  # to and fro, for drift to favour none
                self.progress(self.spent() / seconds, str(candidate.row.format))
                self.time(candidate)
            n_rounds += 1
            self.check_any()
            took = self.spent() - spent
            spent += took

    def load(self, seconds: float) -> None:
        failure = None
        try:
            self.batches, items_per_s = _load_batches(self.learn, seconds)
        except Exception as raised:
            failure = raised
        reason = self.processes.agree_on_failure(failure, is_patient=True)
        if reason:
            raise failure or RuntimeError(reason)
        self.data_items_per_s = self.agree(sum, items_per_s)
        self.n_items = self.agree(sum, n_items_in(self.batches[0]))

    def check_any(self) -> None:
        "Raise an error if no candidate is left: what the Learner itself raised, at first in the format that it has."
        choices = [candidate for candidate in self.candidates if candidate.is_choice]
        if not all(candidate.row.error for candidate in choices):
            return
        reasons = "; ".join(f"{candidate.row.format}: {candidate.row.error}" for candidate in choices)
        words = f"No format can train this Learner. {reasons}"
        choices.sort(key=lambda candidate: candidate.row.format != self.learn.train_format)
        raised = next((candidate.raised for candidate in choices if candidate.raised), None)
        if raised is None:
            raise RuntimeError(words)
        raised.add_note(f"channelslast: {words}")
        raise raised

    def warm_up(self, candidate: Candidate) -> None:
        is_compiling = bool(candidate.row.format.compile)
        started, spent = time.perf_counter(), self.spent()

        def is_late(place: Any) -> bool:
            return self.budget is not None and not is_compiling and self.spent(place) > self.budget

        steps, error = self.fit(candidate, _WarmUp, agree=self.agree, is_late=is_late)
        took = time.perf_counter() - started
        if is_compiling:
            self.uncounted += took
        self.warm_up_s.append(self.spent() - spent)
        candidate.row.error = error
        if not error:
            ms = steps.clock.ms()
            candidate.step_s = self.agree(max, statistics.fmean(ms[-2:]) / 1000)
            candidate.overhead_s = self.agree(max, took - sum(ms) / 1000)
            candidate.row.warmup_s = took
            self.shapes = steps.shapes

    def check_budget(self, waiting: list[Candidate]) -> list[Candidate]:
        """Return those of `waiting` that are to be tried, none where all before failed and used up the budget.

        Raise an error where the budget is used up by what can train, or cannot hold the fewest rounds of all.
        """
        if self.budget is None:
            return waiting
        spent, warm = self.spent(), [candidate for candidate in self.running if candidate.step_s]
        if not warm:
            if spent <= self.budget:
                return waiting
            for candidate in waiting:
                candidate.row.error = f"not tried, the budget of {self.budget!r} seconds was used up"
            return []
        n_all = len(warm) + len(waiting)
        rounds = _MIN_ROUNDS * self.round_s(warm, 1) * n_all / len(warm)
        needed = spent + len(waiting) * statistics.median(self.warm_up_s) + rounds
        if spent > self.budget or (not waiting and needed > self.budget):
            raise ValueError(
                f"budget={self.budget!r} seconds cannot hold {_MIN_ROUNDS} timed steps of {n_all} format"
                f"{'s' if n_all > 1 else ''}: pass at least {1.3 * needed:.{0 if needed > 5 else 2}f}, None, or fewer "
                "formats"
            )
        return waiting

    def n_lead(self, candidate: Candidate) -> int:
        "Steps of a round before the first timed one."
        if self.device.type != "cuda":
            return 1  # makes the optimizer's state
        if candidate.has_graphs:
            return 4  # weights have moved: the CUDA graphs are recorded anew
        return 2  # until Python is ahead of the GPU

    def round_s(self, candidates: list[Candidate], n_steps: int) -> float:
        "Seconds that a round of `candidates` takes, about."
        overhead_s = min((candidate.overhead_s for candidate in candidates), default=0.0)  # the first one's is higher
        return sum(overhead_s + (self.n_lead(c) + n_steps) * c.step_s for c in candidates)

    def choose_n_steps(self, seconds: float) -> None:
        "Choose the steps of a round so that `seconds` hold `_N_ROUNDS`, or `_FEW_ROUNDS` of more steps."
        untimed_s, step_s = self.round_s(self.running, 0), sum(candidate.step_s for candidate in self.running)
        timed_s = seconds / _N_ROUNDS - untimed_s
        if timed_s < max(untimed_s, _FEW_STEPS * step_s):
            timed_s = seconds / _FEW_ROUNDS - untimed_s
        self.n_steps = max(1, int(timed_s / step_s))

    def time(self, candidate: Candidate) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the warm-up gave them
            steps, error = self.fit(candidate, _Round, n_lead=self.n_lead(candidate), n=self.n_steps)
        if error:
            candidate.row.error = error
            candidate.row.samples.clear()
            return
        candidate.row.samples.append(self.agree(max, steps.step_ms()))
        if steps.peak_bytes is not None and not candidate.has_graphs:
            moved = sum(size for tensor, memory, size in self.originals if tensor.data_ptr() != memory)
            peak_bytes = self.agree(max, steps.peak_bytes - moved)
            candidate.row.peak_bytes = max(candidate.row.peak_bytes or 0, peak_bytes)

    def fit(self, candidate: Candidate, new_steps: Callable[..., _TimedSteps], **kwargs: Any) -> tuple[Any, str | None]:
        "Train some steps; these, and why they failed, in the words of the first process that did."
        steps, error = self.try_to_fit(candidate, new_steps, **kwargs)
        if error:
            self.put_tensors_back()  # even at a learning rate of 0 a gradient that is no number spoils the weights
        if error and error.startswith(_NO_NUMBER):  # maybe those that another candidate has spoilt
            steps, error = self.try_to_fit(candidate, new_steps, **kwargs)
            self.put_tensors_back()
        return steps, error

    def try_to_fit(
        self, candidate: Candidate, new_steps: Callable[..., _TimedSteps], **kwargs: Any
    ) -> tuple[Any, str | None]:
        failure = steps = None
        try:
            with unchanged_learner(self.learn, values=False):
                candidate.prepare(self.learn)
                steps = new_steps(self.batches, self.device, candidate.scaler_state, **kwargs)
                try:
                    with self.learn.added_cbs(steps):
                        self.learn.fit(1, 0)
                except FitDone:
                    pass
                candidate.scaler_state, failure = steps.scaler_state, steps.error
        except (Exception, EndedElsewhere) as raised:
            failure = raised
        reason = self.processes.agree_on_failure(failure, steps and steps.place)
        if isinstance(failure, Exception):
            _empty_frames(failure)
            candidate.raised = failure
        if reason:
            failure = None
            gc.collect()
        self.give_back_memory(is_all=reason is not None or new_steps is _WarmUp)
        return steps, reason

    def give_back_memory(self, is_all: bool) -> None:
        "Return memory that PyTorch keeps for the next allocation to the GPU, where much has piled up."
        if self.device.type != "cuda":
            return
        needed = max((candidate.row.peak_bytes or 0 for candidate in self.running), default=0)
        if is_all or torch.cuda.memory_reserved(self.device) > 1.2 * needed:
            torch.cuda.empty_cache()

    def timings(self, start: TrainFormat) -> FormatTimings:
        "The result, once all rounds are done."
        rows = [candidate.row for candidate in self.candidates]
        for row in rows:
            row.items_per_s = 1000 * self.n_items / statistics.fmean(row.samples) if row.samples else nan
        timings = FormatTimings(
            rows=[candidate.row for candidate in self.candidates if candidate.is_choice],
            start=start,
            data_items_per_s=self.data_items_per_s,
            busy=None,
            model=type(get_model(self.learn.model)).__name__,
            device=device_name(self.device),
            shapes=self.shapes,
            n_steps=self.n_steps,
        )
        for row in rows:
            row.speedup = timings.row(start).ms / row.ms
        timings.busy = self.busy(next(c for c in self.candidates if c.row is timings.best_row))
        return timings

    def busy(self, candidate: Candidate) -> float | None:
        "The share of a step in which the GPU runs any kernel."
        if self.device.type != "cuda":
            return None
        with ExitStack() as running:
            steps, error = self.fit(candidate, _ProfiledStep, n_lead=self.n_lead(candidate), running=running)
        busy = 0.0 if error else gpu_shares(steps.profiler.events(), candidate.row.ms / 1000).busy
        return self.agree(max, busy) or None  # without any kernel the profiler does not work here


def _empty_frames(error: BaseException) -> None:
    "Take the tensors out of the traceback of `error`, and of those that came before it; its lines stay."
    todo, seen = [error], set()
    while todo:
        error = todo.pop()
        if error is not None and id(error) not in seen:
            seen.add(id(error))
            traceback.clear_frames(error.__traceback__)
            todo += [error.__cause__, error.__context__]


def _cuda_tensors(learn: Learner) -> list[tuple[Tensor, int, int]]:
    "The weights, buffers and optimizer state of `learn` on a GPU, with their address and their size in bytes."
    states = [state for opt in with_wrapped(learn.opt) for state in getattr(opt, "state", {}).values()]
    tensors = [*learn.model.parameters(), *learn.model.buffers(), *tensors_in(states)]
    return [(tensor, tensor.data_ptr(), tensor.nbytes) for tensor in tensors if tensor.is_cuda]


def device_name(
    device: torch.device,
) -> str:
    "What a record calls `device`: the GPU's name, or the CPU with its threads."
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


@contextmanager
def _compiling(is_on: bool) -> Iterator[None]:
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
    _check("compile", compile, bool)
    _check("show_plot", show_plot, bool)
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
    _check_budget(budget)
    if _is_in_a_fit(learn):
        raise RuntimeError("format_find in the middle of a fit of the same Learner: call it before or after")
    start = start or learn.train_format
    is_compiling = any(candidate.row.format.compile for candidate in candidates)
    with (
        training_processes(learn) as processes,
        _progress_bar(learn) as progress,
        unchanged_learner(learn) as put_tensors_back,
        _compiling(is_compiling),
    ):
        search = _Search(learn, candidates, budget, progress, put_tensors_back, processes)
        search.run()
        return search.timings(start)
