"`format_find`: what it finds, how it times, and how it leaves the Learner. Most times are of a clock of our own."

import gc
import random
import threading
import time
import warnings
import weakref
from contextlib import contextmanager
from functools import partial
from inspect import signature
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TinyNet, assert_same_tensors, new_dls, tensors_of
from fastai.callback import schedule  # noqa: F401, `fit_one_cycle`
from fastai.callback.core import Callback, CancelBatchException, CancelFitException, CancelTrainException
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, ShortEpochCallback
from fastai.data.core import DataLoaders, Datasets
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam, OptimWrapper, ranger
from fastcore.basics import defaults
from matplotlib import pyplot as plt
from torch import nn

from channelslast.find.batches import N_BATCHES, load_batches, more_workers, n_items_in
from channelslast.find.budget import Budget
from channelslast.find.candidates import Candidate, why_not
from channelslast.find.distributed import Processes
from channelslast.find.fits import Fits
from channelslast.find.garbage import FEW
from channelslast.find.plan import indispensable, split_by_time
from channelslast.find.run import find_format, room_for_compiled
from channelslast.find.search import Search
from channelslast.find.stages import Stage, fixed_stage, graphs, new_stages
from channelslast.find.steps import ProfiledStep, Round, WarmUp
from channelslast.formats import TrainFormat
from channelslast.memory_format import is_channels_last
from channelslast.nested import tensors_in
from channelslast.restore import unchanged_learner
from channelslast.zoo import fused_adamw

CONTIGUOUS, LAST = TrainFormat(), TrainFormat(True)
CONTIGUOUS_BF16, LAST_BF16 = TrainFormat(False, "bf16"), TrainFormat(True, "bf16")
LAST_BF16_FUSED = TrainFormat(True, "bf16", fused_optimizer=True)


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    "Few and short rounds: most tests ask for no more."
    for name, value in {"N_ROUNDS": 3, "ENOUGH_STEPS": 2, "ENOUGH_S": 0}.items():
        monkeypatch.setattr(f"channelslast.find.plan.{name}", value)


@pytest.fixture
def many_rounds(monkeypatch):
    "As many as a search makes."
    for name, value in {"N_ROUNDS": 10, "ENOUGH_STEPS": 8, "ENOUGH_S": 0.15}.items():
        monkeypatch.setattr(f"channelslast.find.plan.{name}", value)


def stages_of(*formats):
    return [fixed_stage("formats", list(formats))]


@pytest.fixture
def clock(monkeypatch):
    "A clock that stands still but for what a test adds to it."
    clock = SimpleNamespace(now=0.0)
    clock.tick = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


class TimedNet(TinyNet):
    "Takes 40 ms for a batch, a half of it in channels last and a half of it in bfloat16; the first times much longer."

    def __init__(self, clock):
        super().__init__()
        self.tick = clock.tick  # a function, for a search puts back what objects of a model hold

    def forward(self, x):
        seconds = 0.04
        if x.is_contiguous(memory_format=torch.channels_last):
            seconds /= 2
        if torch.is_autocast_enabled("cpu"):
            seconds /= 2
        self.tick(seconds)
        return super().forward(x)


class Slow(TimedNet):
    "Takes seconds more for a batch, by the format."

    def __init__(self, clock, seconds):
        super().__init__(clock)
        self.seconds = seconds

    def forward(self, x):
        is_last, is_bf16 = x.is_contiguous(memory_format=torch.channels_last), torch.is_autocast_enabled("cpu")
        self.tick(self.seconds(is_last, is_bf16))
        return super().forward(x)


@pytest.fixture
def timed(new_learner, clock, bf16_cpu):
    return new_learner(lambda: TimedNet(clock))


# What it finds


def test_times_both_formats_in_every_precision_that_the_device_accelerates_and_fused_steps(timed):
    timings = timed.format_find(show_plot=False)
    assert [row.format for row in timings] == [LAST_BF16, CONTIGUOUS, CONTIGUOUS_BF16, LAST, LAST_BF16_FUSED]
    assert [row.ms for row in timings] == pytest.approx([10, 40, 20, 20, 10])
    assert [row.iqr for row in timings] == pytest.approx([0] * 5, abs=1e-6)
    assert [row.speedup for row in timings] == pytest.approx([4, 1, 2, 2, 4])
    assert [row.items_per_s for row in timings] == pytest.approx([800, 200, 400, 400, 800])  # batches of 8
    assert timings.best == LAST_BF16 and timings.format_gain == pytest.approx(2)
    assert timings.shapes == [(8, 3, 8, 8)] and timings.model == "TimedNet" and timings.device.startswith("cpu")
    assert timings.limit == "device" and all(row.peak_bytes is None and row.error is None for row in timings)


def test_what_is_hopeless_is_not_timed_in_the_rounds(timed):
    timings = timed.format_find(show_plot=False)
    for fmt in (CONTIGUOUS_BF16, LAST):
        assert "times as long as the fastest" in timings.row(fmt).note and len(timings.row(fmt).samples) == 4
    for fmt in (LAST_BF16, CONTIGUOUS, LAST_BF16_FUSED):  # among them what the Learner has, however slow
        assert timings.row(fmt).note is None and len(timings.row(fmt).samples) == 3


@pytest.mark.parametrize("by_hand", [False, True], ids=["contiguous", "channels last by hand"])
def test_own_format_is_timed_with_weights_as_they_lay_before(new_learner, bf16_cpu, by_hand):
    class Watches(Callback):
        order = 100

        def before_batch(self):
            if self.learn.train_format == CONTIGUOUS:
                tensors = [*self.model.parameters(), *tensors_in([*self.opt.state.values()])]
                seen.update(is_channels_last(tensor) for tensor in tensors if tensor.ndim == 4)

    seen = set()
    learn = new_learner(cbs=Watches())
    learn.model.to(memory_format=torch.channels_last if by_hand else torch.contiguous_format)
    learn.fit(1)  # the optimizer has state
    seen.clear()
    timings = learn.format_find([LAST], show_plot=False)
    assert seen == {by_hand} and len(timings.row(CONTIGUOUS).samples) == 3


def test_first_steps_are_kept_beside_the_rounds(timed):
    timings = timed.format_find(show_plot=False)
    assert [len(row.first_samples) for row in timings] == [0 if row.note else 4 for row in timings]
    assert timings.row(CONTIGUOUS).first_samples == pytest.approx([40] * 4)


def test_nothing_stays_frozen_after_a_search(learn, bf16_cpu, nothing_frozen):
    class Fails(Callback):
        def before_train(self):
            n_frozen.append(gc.get_freeze_count())
            if self.learn.train_format == LAST:
                raise KeyError("no")

    n_frozen = []
    assert learn.add_cb(Fails()).format_find(show_plot=False).row(LAST).error.startswith("KeyError")
    assert min(n_frozen) >= FEW and len(set(n_frozen)) > 1  # more after the error
    assert gc.get_freeze_count() < FEW


def test_nothing_of_a_fit_outlives_the_collection_after_it(learn, bf16_cpu, monkeypatch):
    class Watches(Callback):
        def after_loss(self):
            refs.extend(map(weakref.ref, (self.learn.pred, self.learn.loss_grad)))

    @contextmanager
    def collections():
        def collect():
            gc.collect()
            n_alive.append((len(refs), sum(ref() is not None for ref in refs)))
            refs.clear()

        yield collect

    refs, n_alive = [], []
    monkeypatch.setattr("channelslast.find.run.quick_collections", collections)
    has_graphs = property(lambda self: True, lambda self, value: None)
    monkeypatch.setattr(Candidate, "has_graphs", has_graphs, raising=False)
    learn.add_cb(Watches()).format_find([LAST], show_plot=False)
    assert len(n_alive) > 5 and all(n and not alive for n, alive in n_alive)


def test_fused_steps_that_pay_are_found(timed, clock):
    class Steps(Callback):
        def after_step(self):
            clock.tick(0 if self.learn.train_format.fused_optimizer else 0.02)

    timed.add_cb(Steps())
    timings = timed.format_find(show_plot=False)
    assert timings.best == LAST_BF16_FUSED and timings.row(LAST_BF16).ms == pytest.approx(30)
    assert timings.optimizer_share is None  # what the fused one takes on this clock
    timed.opt_func = lambda params, **kwargs: OptimWrapper(params, torch.optim.Adadelta, **kwargs)
    timings = timed.format_find(show_plot=False)
    assert not any(row.format.fused_optimizer for row in timings)  # it has none
    assert timings.optimizer_share == pytest.approx(2 / 3) and timings.limit == "optimizer"
    assert "The optimizer takes 67% of the step; this may help: `learn.opt_func" in timings.verdict


def test_to_fastest_searches_shows_and_sets(timed, capsys):
    plt.close("all")
    assert timed.to_fastest(show_plot=False) is timed and timed.train_format == LAST_BF16
    shown = capsys.readouterr().out
    assert 'Best: `learn.to_format("channels last bf16")`' in shown and plt.get_fignums() == []
    assert shown.endswith("The Learner trains in channels last bf16 from now on.\n")
    with pytest.raises(TypeError, match=r"^no_such=1 is no option of to_fastest: pass formats, compile, .*budget$"):
        timed.to_fastest(no_such=1)
    assert "budget" in signature(Learner.to_fastest).parameters


@pytest.mark.parametrize("start", [CONTIGUOUS, CONTIGUOUS_BF16], ids=str)
def test_precision_can_be_kept(timed, start):
    timed.to_format(start)
    timings = timed.format_find(keep_precision=True, show_plot=False)
    assert {row.format.amp_mode for row in timings} == {start.amp_mode}
    assert timings.best == TrainFormat(True, start.amp_mode) and len(timings) == 3
    with pytest.raises(ValueError, match="keep_precision=True with formats that hold 'channels last fp16'"):
        timed.format_find([TrainFormat(True, "fp16")], keep_precision=True)


def test_whole_use(timed):
    assert timed.to_format(timed.format_find(show_plot=False).best) is timed
    assert timed.train_format == LAST_BF16
    timed.fit(1)
    assert is_channels_last(timed.model[0].weight)


def test_on_a_cpu_without_half_precision(new_learner, clock, plain_cpu):
    timings = new_learner(lambda: TimedNet(clock)).format_find(show_plot=False)
    fused = TrainFormat(True, fused_optimizer=True)
    assert [row.format for row in timings] == [CONTIGUOUS, LAST, fused] and timings.best == LAST


def test_model_without_images_has_no_format_to_choose(tabular_learner, bf16_cpu):
    timings = tabular_learner().format_find(show_plot=False)
    assert [row.format for row in timings][:2] == [CONTIGUOUS, CONTIGUOUS_BF16] and timings.format_gain is None
    assert not any(row.format.channels_last for row in timings)


def test_device_where_channels_last_is_not_reliable(learn, monkeypatch, plain_cpu):
    for module in ("candidates", "stages"):
        monkeypatch.setattr(f"channelslast.find.{module}.supports_channels_last", lambda device: False)
    assert not any(row.format.channels_last for row in learn.format_find(show_plot=False))
    timings = learn.format_find([LAST], show_plot=False)
    assert "not reliable on the device 'cpu'" in timings[1].error


def test_starts_from_the_format_that_the_learner_has(timed):
    timed.to_channelslast(amp_mode="bf16")
    timings = timed.format_find(show_plot=False)
    assert timings.start == LAST_BF16 and [row.speedup for row in timings] == pytest.approx([1, 0.5, 0.5, 0.25, 1])
    assert timings.best == LAST_BF16 and timings.verdict.startswith("Stay in channels last bf16")


def test_formats_asked_for_are_timed_beside_that_of_the_learner(timed):
    timings = timed.format_find((fmt for fmt in (LAST_BF16, LAST, LAST_BF16)), show_plot=False)
    assert [row.format for row in timings] == [CONTIGUOUS, LAST_BF16, LAST]
    assert [row.format for row in timed.format_find(["channels last bf16 fused"], show_plot=False)][1:] == [
        LAST_BF16_FUSED
    ]
    assert [row.format for row in timed.format_find([LAST, CONTIGUOUS], show_plot=False)] == [LAST, CONTIGUOUS]


def test_precision_that_the_device_would_replace_is_no_candidate(timed):
    timings = timed.format_find([TrainFormat(True, "fp16")], show_plot=False)
    assert "no fast arithmetic" in timings[1].error and timings.best == CONTIGUOUS


def test_compile_adds_the_best_one_compiled(timed, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    timings = timed.format_find(compile=True, show_plot=False)
    compiled = TrainFormat(True, "bf16", "default")
    assert [row.format for row in timings if row.format.compile] == [compiled] and timings.row(compiled).error is None
    timings = timed.format_find([LAST], compile=True, show_plot=False)
    assert [row.format for row in timings] == [CONTIGUOUS, LAST, TrainFormat(True, None, "default")]


@pytest.mark.parametrize("budget", [0.4, 0.8, 1.2, 30])
def test_what_is_to_be_compiled_is_tried_however_little_time_is_left(timed, clock, many_rounds, monkeypatch, budget):
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    timings = timed.format_find(compile=True, budget=budget, show_plot=False)
    (compiled,) = [row for row in timings if row.format.compile]
    assert compiled.error is None and compiled.samples and clock.now < 1.2 * budget + 0.4


def seen(fmt, step_s, busy_s=None, error=None, first_steps_s=1.0):
    candidate = Candidate(fmt, error=error)
    candidate.step_s, candidate.busy_s, candidate.first_steps_s = step_s, busy_s, first_steps_s
    return candidate


def test_stages_on_a_gpu(learn, monkeypatch):
    "What each proposes, by what was seen: where Python hides what the GPU takes, its busy time decides."
    monkeypatch.setattr("channelslast.find.stages.training_device", lambda learn: torch.device("cuda"))
    monkeypatch.setattr("channelslast.find.stages.accelerated_dtypes", lambda device: (torch.float16, torch.bfloat16))
    monkeypatch.setattr("channelslast.find.stages.fused_form", lambda learn, device: True)
    eager, fused, graphs, compiled, compiled_graph, others = new_stages(learn, compile=True)
    formats = eager.propose([])
    assert [str(fmt) for fmt in formats] == [
        *("channels last fp16", "channels last bf16", "contiguous fp32"),
        *("contiguous fp16", "contiguous bf16", "channels last fp32"),
    ]
    steps_s, busy_s = [0.011, 0.010, 0.009, 0.0105, 0.03, 0.02], [0.003, 0.004, 0.008, 0.0042, None, None]
    candidates = [seen(*facts) for facts in zip(formats, steps_s, busy_s)]
    assert [str(fmt) for fmt in fused.propose(candidates)] == ["contiguous fp32 fused", "channels last fp16 fused"]
    assert [str(fmt) for fmt in graphs.propose(candidates)] == ["channels last fp16 graph", "channels last bf16 graph"]
    first, second = (seen(TrainFormat(True, mode, fused_optimizer=True), 0.0, error="no") for mode in ("fp16", "bf16"))
    assert not any(fmt.fused_optimizer for fmt in graphs.propose([*candidates, first, second]))
    first.is_reached = False
    assert not any(fmt.fused_optimizer for fmt in graphs.propose([*candidates, first, second]))
    second.is_reached = False
    assert all(fmt.fused_optimizer for fmt in graphs.propose([*candidates, first, second]))
    candidates += [seen(fmt, 0.006) for fmt in fused.propose(candidates)]
    assert str(graphs.propose(candidates)[0]) == "channels last fp16 graph fused"
    candidates += [seen(fmt, 0.004) for fmt in graphs.propose(candidates)]
    (best,) = compiled.propose(candidates)
    assert str(best) == "channels last fp16 compiled fused"
    candidates.append(seen(best, 0.005))
    assert [str(fmt) for fmt in compiled_graph.propose(candidates)] == ["channels last fp16 compiled graph fused"]
    assert others.propose(candidates) == []  # compiling does not pay
    candidates.append(seen(*compiled_graph.propose(candidates), 0.003))
    assert "channels last bf16 compiled graph fused" in map(str, others.propose(candidates))
    candidates[-1].first_steps_s = 200.0
    assert others.propose(candidates) == []  # it took too long
    assert fused.propose([seen(LAST, 1.0, error="no")]) == graphs.propose([]) == compiled.propose([]) == []
    assert [stage.name for stage in new_stages(learn, [LAST], compile=True)] == [
        *("formats", "compile", "compile and CUDA graph")
    ]


def test_steps_of_the_next_one_are_fused_too_where_only_few_steps_tell_which_is_faster(learn):
    _, fused = new_stages(learn)
    candidates = [seen(LAST_BF16, 0.38), seen(CONTIGUOUS, 0.47), seen(CONTIGUOUS_BF16, 0.3)]
    assert fused.propose(candidates) == [TrainFormat(False, "bf16", fused_optimizer=True), LAST_BF16_FUSED]
    assert fused.propose(candidates[1:]) == [TrainFormat(False, "bf16", fused_optimizer=True)]  # the other is hopeless


def test_steps_that_are_fused_already_are_no_stage(learn):
    assert "fused steps" in [stage.name for stage in new_stages(learn)]
    learn.opt_func, learn.opt = fused_adamw, None
    assert "fused steps" not in [stage.name for stage in new_stages(learn)]
    learn.create_opt()
    assert "fused steps" not in [stage.name for stage in new_stages(learn)]


def test_compiled_learner_is_compared_with_the_best_one_compiled(learn, plain_cpu, monkeypatch):
    learn.to_format(TrainFormat(compile="default"))
    eager, _, compiled, _ = new_stages(learn)
    assert eager.propose([]) == [TrainFormat(compile="default"), LAST, CONTIGUOUS] and eager.compiles
    assert compiled.propose([seen(LAST, 1)]) == [TrainFormat(True, None, "default")]


def test_distinct_shapes_are_left_out_of_the_batches(learn):
    batches = [(torch.randn(bs, 3, 8, 8), torch.zeros(bs).long()) for bs in (8, 4, 8, 8, 8, 8)]
    learn.dls.loaders[0] = batches
    kept, _ = load_batches(learn, 10)
    assert [len(xb) for xb, yb in kept] == [8] * N_BATCHES


# How it times


def test_first_steps_are_not_timed_and_reported_apart(new_learner, clock, plain_cpu):
    clock.seen = []

    class SlowStart(TimedNet):
        def forward(self, x):
            last = x.is_contiguous(memory_format=torch.channels_last)
            clock.seen.append(last)
            clock.now += max(0, 4 - clock.seen.count(last)) * 10  # 30, 20 and 10 seconds more
            return super().forward(x)

    timings = new_learner(lambda: SlowStart(clock)).format_find(show_plot=False, budget=300)
    assert [timings.row(fmt).ms for fmt in (CONTIGUOUS, LAST)] == pytest.approx([40, 20])
    took = [timings.row(fmt).warmup_s for fmt in (CONTIGUOUS, LAST)]
    assert took == pytest.approx([60 + 9 * 0.04, 60 + 9 * 0.02], abs=0.05)


def test_rounds_are_interleaved_and_as_long_as_the_others(timed, many_rounds):
    order = []

    class Watches(Callback):
        def before_batch(self):
            order.append((self.learn.train_format, self.training))

    timed.add_cb(Watches())
    timings = timed.format_find([LAST], show_plot=False)
    assert all(training for _, training in order)
    lengths = [len(timings[0].samples), len(timings[1].samples)]
    assert lengths == [5, 5] and timings.n_steps == 8
    n_warm, n_timed = 2 * 7, 2 * 5 * (1 + timings.n_steps)
    assert len(order) == n_warm + n_timed + 1 + 3  # and what the optimizer takes
    formats, n = [fmt for fmt, _ in order[n_warm:]], 1 + timings.n_steps
    to_and_fro = [CONTIGUOUS] * n + [LAST] * 2 * n + [CONTIGUOUS] * n
    assert formats[:n_timed] == (to_and_fro * 3)[:n_timed]


@pytest.mark.parametrize("budget", [0.05, 0.3, 1, 3, 9])
def test_seconds_asked_for_are_not_exceeded(timed, clock, many_rounds, budget):
    timings = timed.format_find(show_plot=False, budget=budget)
    assert clock.now < 1.2 * budget + 0.2  # the step that is running, and those that tell what the optimizer takes
    assert timings.best == (CONTIGUOUS if budget == 0.05 else LAST_BF16)


def test_default_is_bounded(new_learner, clock, bf16_cpu, many_rounds):
    timings = new_learner(lambda: Slow(clock, lambda is_last, is_bf16: 1.0)).format_find(show_plot=False)
    assert clock.now < 36 and timings.row(CONTIGUOUS).samples


def test_slower_ones_are_left_out_where_time_is_short(timed, many_rounds):
    timings = timed.format_find(show_plot=False, budget=1.2)
    assert len(timings.row(LAST_BF16).samples) >= 3 and len(timings.row(CONTIGUOUS).samples) >= 3
    assert timings.best == LAST_BF16


def test_rounds_are_of_those_that_the_time_holds():
    candidates = [seen(fmt, step_s) for fmt, step_s in [(CONTIGUOUS, 4.0), (LAST, 2.0), (LAST_BF16, 1.0)]]
    candidates[0].is_own = True
    device = torch.device("cpu")
    for seconds, n_timed in {42: 3, 41: 2, 30: 2, 29: 0}.items():
        timed, left_out = split_by_time(candidates, indispensable(candidates, CONTIGUOUS), seconds, device)
        assert len(timed) == n_timed and timed + left_out == [
            *(candidates if n_timed != 2 else [candidates[0], candidates[2], candidates[1]])
        ]


def test_what_is_not_reached_says_so_and_what_is_needed_comes_first(new_learner, clock, bf16_cpu):
    class Slow(TimedNet):
        def forward(self, x):
            clock.steps = getattr(clock, "steps", 0) + 1
            clock.tick(7.0 if clock.steps in (1, 8) else 0)
            return super().forward(x)

    timings = new_learner(lambda: Slow(clock)).format_find(show_plot=False, budget=25)
    assert [row.format for row in timings if row.is_tried] == [LAST_BF16, CONTIGUOUS, LAST_BF16_FUSED]
    assert timings.row(LAST).error == "not reached in 25 seconds" and timings.best == LAST_BF16


def test_more_time_where_the_first_steps_of_a_gpu_take_long():
    budget = Budget(None, Processes())
    assert budget.seconds == 30
    budget.first_steps = 25.0
    assert budget.seconds == 40
    budget.first_steps = 500.0
    assert budget.seconds == 60
    named = Budget(14.0, Processes())
    named.first_steps = 500.0
    assert named.seconds == 14


def test_of_what_is_as_fast_rounds_are_of_the_one_that_changes_least():
    candidates = [seen(CONTIGUOUS, 4.0), seen(LAST_BF16, 1.02), seen(LAST_BF16_FUSED, 1.0), seen(LAST, 1.2)]
    candidates[0].is_own = True
    own, bf16, fused, _ = candidates
    device = torch.device("cpu")
    timed = {
        n: split_by_time(candidates, indispensable(candidates, CONTIGUOUS), seconds, device)[0]
        for n, seconds in {4: 44, 3: 37, 2: 31}.items()
    }
    assert timed == {4: candidates, 3: [own, bf16, fused], 2: [own, bf16]}
    bf16.step_s = 1.15
    assert split_by_time(candidates, indispensable(candidates, CONTIGUOUS), 31, device)[0] == [own, fused]


def test_default_is_extended_for_what_proves_something(clock, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: clock.tick(1e-3) or clock.now)  # time goes on at each look
    budget = Budget(None, Processes())
    assert 29 < budget.extend_to(10) < 30 == budget.seconds
    assert budget.extend_to(40) > 40 and budget.measure_left() > 40 and 44 < budget.seconds < 45
    before = budget.seconds
    assert budget.extend_to(100) < 45 and budget.seconds == before  # not for less than what was asked for
    clock.now = 50
    assert budget.measure_left() < 0 and 9 < budget.measure_left(is_needed=True) < 10
    named = Budget(14.0, Processes())
    assert named.extend_to(40) < 14 and named.seconds == 14 > named.measure_left(is_needed=True)


def test_default_waits_for_rounds(new_learner, clock, bf16_cpu, many_rounds):
    learn = new_learner(lambda: Slow(clock, lambda is_last, is_bf16: 1.2 if is_last and is_bf16 else 2.4))
    timings = learn.format_find(show_plot=False)
    assert timings.best == LAST_BF16 and len(timings.row(LAST_BF16).samples) >= 3 and 30 < clock.now < 50
    clock.now = 0.0
    assert not any(row.note is None and row.samples for row in learn.format_find(show_plot=False, budget=30))


@pytest.mark.parametrize("slower", [1.0, 1.1, 1.4, 2.0])
def test_default_does_not_wait_where_nothing_looks_faster(new_learner, clock, bf16_cpu, many_rounds, slower):
    learn = new_learner(lambda: Slow(clock, lambda is_last, is_bf16: 2 * slower if is_last or is_bf16 else 2.0))
    timings = learn.format_find(show_plot=False)
    assert timings.best == CONTIGUOUS and clock.now < 36


def test_default_does_not_wait_where_the_own_format_fails(new_learner, clock, bf16_cpu, many_rounds):
    class Fails(Slow):
        def forward(self, x):
            if not torch.is_autocast_enabled("cpu"):
                raise RuntimeError("no float32")
            return super().forward(x)

    timings = new_learner(lambda: Fails(clock, lambda is_last, is_bf16: 2.0)).format_find(show_plot=False)
    assert timings.row(CONTIGUOUS).error and clock.now < 36


def test_default_waits_for_the_only_choice_and_its_rounds(new_learner, clock, bf16_cpu, many_rounds):
    learn = new_learner(lambda: Slow(clock, lambda is_last, is_bf16: 1.2 if is_bf16 else 4.0))
    timings = learn.format_find(["channels last bf16"], show_plot=False)
    assert timings.best == LAST_BF16 and len(timings.row(LAST_BF16).samples) == 3 and clock.now < 61


def test_what_limits_the_step_is_not_told_where_rounds_take_the_minute(new_learner, clock, bf16_cpu, many_rounds):
    learn = new_learner(lambda: Slow(clock, lambda is_last, is_bf16: 1.5 if is_bf16 and is_last else 3.0))
    timings = learn.format_find(show_plot=False)
    assert timings.best == LAST_BF16 and len(timings.row(LAST_BF16).samples) >= 3 and clock.now < 64


def test_gpu_is_not_profiled_where_the_time_is_up(new_learner, clock, bf16_cpu, monkeypatch):
    learn = new_learner(lambda: Slow(clock, lambda is_last, is_bf16: 6.0))
    monkeypatch.setattr(Search, "measure_busy", lambda self, candidate: profiled.append(candidate.row.format))
    profiled = []
    learn.format_find(show_plot=False)
    assert profiled == []


@pytest.mark.parametrize("seconds", [8, 12, 20, 40])
def test_default_ends_within_a_minute_and_a_step(new_learner, clock, bf16_cpu, many_rounds, seconds):
    learn = new_learner(lambda: Slow(clock, lambda is_last, is_bf16: seconds))
    timings = learn.format_find(show_plot=False)
    assert timings.best == CONTIGUOUS and clock.now <= 60 + seconds + 1
    assert timings.row(CONTIGUOUS).is_tried


@pytest.mark.parametrize("budget, n_rounds", [(None, 3), (30, 2)])
def test_rounds_that_take_longer_than_was_to_be_seen(timed, clock, monkeypatch, many_rounds, budget, n_rounds):
    real = Fits.train

    def slow_in_rounds(self, candidate, new_steps, **kwargs):
        clock.tick(5 if new_steps is Round else 0)
        return real(self, candidate, new_steps, **kwargs)

    monkeypatch.setattr(Fits, "train", slow_in_rounds)
    timings = timed.format_find([LAST_BF16], show_plot=False, budget=budget)
    assert [len(row.samples) for row in timings] == [n_rounds] * 2 and timings.best == LAST_BF16


def test_second_cuda_graph_is_not_tried_where_it_takes_the_time_for_rounds(learn, monkeypatch):
    stage = Stage("CUDA graph", lambda seen: [])
    search = Search(learn, [stage], [], CONTIGUOUS, Budget(30, Processes()), Processes(), None, None, None)
    first, second = seen(TrainFormat(True, "fp16", cuda_graph=True), 0.01), Candidate(TrainFormat(cuda_graph=True))
    search.candidates = [seen(CONTIGUOUS, 0.1), first, second]
    for capture_s, left in {1: 10.5, 5: 14.5}.items():
        first.first_steps_s = capture_s
        monkeypatch.setattr(search.budget, "measure_left", lambda left=left, **_: left)
        assert not search.lacks_time(second, stage)
        monkeypatch.setattr(search.budget, "measure_left", lambda left=left, **_: left - 1)
        assert search.lacks_time(second, stage)


def test_cuda_graphs_are_tried_with_fused_steps_for_which_no_time_was_left(new_learner, clock, bf16_cpu):
    learn = new_learner(lambda: Slow(clock, lambda is_last, is_bf16: 0.5))
    proposed = {}
    for budget in (1, 10):
        later = Stage("CUDA graph", lambda seen, budget=budget: proposed.update({budget: graphs(seen)}) or [])
        timings = find_format(learn, [*new_stages(learn), later], budget=budget)
        assert timings.row(LAST_BF16_FUSED).is_tried == (budget == 10)
    assert all(fmts and all(fmt.fused_optimizer for fmt in fmts) for fmts in proposed.values()) and len(proposed) == 2


def test_first_stage_keeps_time_for_those_after_it(new_learner, clock, bf16_cpu):
    learn = new_learner(lambda: Slow(clock, lambda is_last, is_bf16: 0.5))
    stages = new_stages(learn)
    assert [stage.share for stage in stages] == [0, 0.1]
    tried = {}
    for share in (0.1, 0.4):
        stages[1] = stages[1]._replace(share=share)
        timings = find_format(learn, stages, budget=10)
        assert timings.row(LAST_BF16_FUSED).is_tried
        tried[share] = [row.format for row in timings if row.is_tried and not row.format.fused_optimizer]
    assert tried == {0.1: [LAST_BF16, CONTIGUOUS, CONTIGUOUS_BF16], 0.4: [LAST_BF16, CONTIGUOUS]}


def test_compilation_does_not_count(timed, clock, monkeypatch, many_rounds):
    real = Fits.train

    def slow_if_compiled(self, candidate, new_steps, **kwargs):
        candidate.prepare = lambda learn: learn.to_format(TrainFormat(candidate.row.format.channels_last))
        if candidate.row.format.compile and new_steps is WarmUp:
            clock.now += 1000
        return real(self, candidate, new_steps, **kwargs)

    monkeypatch.setattr(Fits, "train", slow_if_compiled)
    timings = timed.format_find([TrainFormat(True, None, "default"), LAST], show_plot=False, budget=10)
    assert 1002 < clock.now < 1012 and timings[1].warmup_s == pytest.approx(1000, abs=1)
    assert len(timings[1].samples) == len(timings[2].samples) > 5  # nor does it keep another from being tried


@pytest.mark.parametrize("drift", [0.01, -0.01])
def test_drift_does_not_choose(new_learner, clock, plain_cpu, many_rounds, drift):
    class Drifts(TinyNet):
        def forward(self, x):
            clock.tick(0.05 + drift * clock.now / 10)  # slower and slower, or faster, whatever the format
            return super().forward(x)

    timings = new_learner(Drifts).format_find(show_plot=False, budget=10)
    assert timings.best == CONTIGUOUS


def test_cost_that_comes_every_third_step_counts(new_learner, clock, plain_cpu, many_rounds):
    class Slow(Callback):
        def after_batch(self):
            if self.iter % 3 == 0 and self.learn.train_format.channels_last:
                clock.tick(0.9)

    timings = new_learner(lambda: TimedNet(clock), cbs=Slow()).format_find(show_plot=False, budget=60)
    assert timings.row(CONTIGUOUS).ms == pytest.approx(40) and timings.row(LAST).ms > 200
    assert timings.best == CONTIGUOUS


def test_unsteady_steps_of_a_cpu_are_looked_at_again(new_learner, clock, bf16_cpu, many_rounds):
    class HeldUp(Callback):
        "By others on the machine, in the first steps of the search."

        n = 0

        def after_batch(self):
            HeldUp.n += 1
            clock.tick(0.05 * HeldUp.n if HeldUp.n < 8 else 0.0)

    timings = new_learner(lambda: TimedNet(clock), cbs=HeldUp()).format_find(show_plot=False, budget=60)
    assert timings.row(LAST_BF16).note is None and timings.row(LAST_BF16).warmup_s > 0.5
    assert timings.best in (LAST_BF16, TrainFormat(True, "bf16", fused_optimizer=True))


def test_second_look_takes_no_time_that_others_need(timed, monkeypatch, many_rounds):
    monkeypatch.setattr("channelslast.find.search.UNSTEADY", 0.0)  # all are
    timings = timed.format_find(show_plot=False, budget=1.6)
    assert timings.best == LAST_BF16 and len(timings.row(LAST_BF16).samples) >= 3


def test_long_steps_are_not_given_up_for_one_that_was_held_up(new_learner, clock, plain_cpu):
    class HeldUp(Callback):
        def after_batch(self):
            clock.tick(11.0 if self.learn.train_format == LAST and self.iter == 3 else 1.0)

    timings = new_learner(lambda: TimedNet(clock), cbs=HeldUp()).format_find([CONTIGUOUS, LAST], False, budget=200)
    assert timings.row(LAST).note is None and len(timings.row(LAST).samples) > 2


def test_short_rounds_have_enough_steps_for_what_comes_every_third(new_learner, clock, plain_cpu, many_rounds):
    class Slow(Callback):
        def after_batch(self):
            if self.iter % 3 == 2:
                clock.tick(0.4)

    timings = new_learner(lambda: TimedNet(clock), cbs=Slow()).format_find(show_plot=False, budget=12)
    assert all(row.ms > 100 for row in timings if not row.note)


def test_step_rate_is_that_of_the_median_step(new_learner, clock, plain_cpu, many_rounds):
    class SometimesSlow(TimedNet):
        def forward(self, x):
            clock.tick(1.0 if clock.now % 10 > 7 else 0.0)  # as a machine that others use
            return super().forward(x)

    timings = new_learner(lambda: SometimesSlow(clock)).format_find(show_plot=False, budget=90)
    row = max(timings, key=lambda row: np.mean(row.samples) / row.ms)
    assert row.items_per_s == pytest.approx(8000 / row.ms) and np.mean(row.samples) > 1.1 * row.ms


@pytest.mark.parametrize("seconds_a_batch, limit", [(1.0, "data"), (1e-3, "device")])
def test_data_loading_is_timed_too(timed, clock, seconds_a_batch, limit):
    class Slow(list):
        def __iter__(self):
            for batch in list.__iter__(self):
                clock.now += seconds_a_batch
                yield batch

    timed.dls.loaders[0] = Slow(timed.dls.loaders[0])
    timings = timed.format_find(show_plot=False)
    assert timings.data_items_per_s == pytest.approx(8 / seconds_a_batch) and timings.limit == limit


def test_workers_that_start_are_not_data_that_are_slow(timed, clock):
    class Starts(list):
        def __iter__(self):
            clock.tick(100)
            for batch in list.__iter__(self):
                clock.tick(0.5)
                yield batch

    _, items_per_s = load_batches(timed, 1000)
    timed.dls.loaders[0] = Starts(timed.dls.loaders[0])
    _, items_per_s = load_batches(timed, 1000)
    assert items_per_s == pytest.approx(16)
    timed.dls.loaders[0] = Starts(timed.dls.loaders[0][:1])
    assert load_batches(timed, 1000)[1] == pytest.approx(8 / 100.5)


@pytest.mark.parametrize(
    "batch, n",
    [
        ((torch.zeros(5, 3, 8, 8), torch.zeros(5)), 5),
        (([torch.zeros(3, 8, 8)] * 4, [{}] * 4, torch.zeros(4)), 4),
        ({"image": torch.zeros(6, 3)}, 6),
        (((torch.zeros(5, 3, 8, 8), torch.zeros(5, 3, 8, 8)), torch.zeros(5)), 5),
        (([torch.zeros(5, 3, 8, 8), torch.zeros(5, 2)], torch.zeros(5)), 5),
        (([torch.zeros(3, 8, 8)] * 2, [{}] * 2), 2),
        (([torch.zeros(3, 8, 8)] * 2, torch.tensor(1.0)), 2),
    ],
)
def test_items_in_a_batch(batch, n):
    assert n_items_in(batch) == n


def test_steps_end_after_all_callbacks(timed, clock):
    class Late(Callback):
        order = 10_000

        def after_batch(self):
            clock.tick(1)

    timed.add_cb(Late())
    assert timed.format_find([LAST], show_plot=False)[0].ms == pytest.approx(1040)


def test_warm_up_ends(new_learner, clock, plain_cpu):
    class EverFaster(TinyNet):
        def forward(self, x):
            clock.steps = getattr(clock, "steps", 0) + 1
            clock.tick(0.5**clock.steps)
            return super().forward(x)

    learn = new_learner(EverFaster)
    find_format(learn, stages_of(CONTIGUOUS))
    assert clock.steps == 2 * (12 + 4) + 3 * (1 + 2) + 1 + 3, "looked at twice, for on a CPU others may have slowed it"


def test_rounds_are_few_where_little_of_them_is_timed(new_learner, clock, plain_cpu, many_rounds):
    learn = new_learner(lambda: TimedNet(clock))  # a step of 40 ms before each round, and one of 20
    timings = learn.format_find([LAST], show_plot=False, budget=1.6)
    assert 3 <= len(timings[0].samples) <= 6 and 2 <= timings.n_steps <= 4


def test_callbacks_that_change_the_batch_or_the_loop_take_part(new_learner):
    learn = new_learner(cbs=[MixUp(), GradientAccumulation(16), ShortEpochCallback()])
    assert not any(row.error for row in learn.format_find(show_plot=False))


def test_steps_are_whole_and_move_no_weight(learn):
    weights, steps = [], []

    class Watches(Callback):
        order = 1000

        def after_step(self):
            steps.append({hyper["lr"] for hyper in self.opt.hypers})
            weights.append(self.model[0].weight.detach().clone(memory_format=torch.contiguous_format))

    learn.add_cb(Watches())
    before = learn.model[0].weight.detach().clone()
    learn.format_find([LAST], show_plot=False)
    assert len(steps) >= 2 * 6 and all(lrs == {0} for lrs in steps)
    assert all(torch.equal(before, now) for now in weights)


# How it leaves the Learner


def random_items():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (48,), generator=generator)
    return list(zip(torch.randn(48, 3, 8, 8, generator=generator) + y.view(-1, 1, 1, 1), y))


class Augmented:
    "A data set that draws numbers of its own."

    def __init__(self, generator):
        self.items, self.generator = random_items(), generator

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        x, y = self.items[i]
        return x * (self.generator.random() + 0.5), y


class PlainLoss:
    "An object that holds a module with parameters and buffers."

    def __init__(self):
        self.head = nn.BatchNorm1d(3)

    def __call__(self, pred, target):
        return nn.functional.cross_entropy(self.head(pred), target)


class Counts(TinyNet):
    "Keeps what it has seen in an object, and a teacher that is none of its modules."

    def __init__(self):
        super().__init__()
        self.counter, self.teacher = SimpleNamespace(n=0), [nn.BatchNorm2d(3)]

    def forward(self, x):
        self.counter.n += 1
        return super().forward(self.teacher[0](x) * (1 + self.counter.n % 3))


STATEFUL = {
    "random.Random": lambda: {"dls": augmented_dls(random.Random(3))},
    "numpy Generator": lambda: {"dls": augmented_dls(np.random.default_rng(3))},
    "numpy RandomState": lambda: {"dls": augmented_dls(np.random.RandomState(3))},
    "collate_fn": lambda: {"dls": augmented_dls(None)},
    "loss": lambda: {"loss_func": PlainLoss()},
    "model": lambda: {"model": Counts},
}


def augmented_dls(generator):
    dataset = random_items() if generator is None else Augmented(generator)
    own = random.Random(4)

    def collate(items):
        xs, ys = zip(*items)
        return torch.stack(xs) * own.random(), torch.stack(ys)

    kwargs = {"collate_fn": collate} if generator is None else {}
    return DataLoaders(*[torch.utils.data.DataLoader(dataset, 8, shuffle=True, **kwargs) for _ in range(2)])


@pytest.mark.parametrize("kwargs", STATEFUL.values(), ids=STATEFUL)
def test_state_of_data_loss_and_model_is_put_back(new_learner, plain_cpu, kwargs):
    learns = []
    for disturbed in (True, False):
        seed_all()
        learns.append(new_learner(**kwargs()))
        seed_all()
        if disturbed:
            learns[-1].format_find(show_plot=False)
        learns[-1].fit(2)
    assert learns[0].recorder.losses == learns[1].recorder.losses
    for first, second in zip(learns[0].model.parameters(), learns[1].model.parameters()):
        assert torch.equal(first, second)


class Keeps(Callback):
    "Keeps losses with their graphs, and an object with a lock."

    def __init__(self):
        self.losses, self.store = [], SimpleNamespace(lock=threading.Lock(), items=[])

    def after_loss(self):
        self.losses.append(self.learn.loss_grad)
        self.store.items.append(1)


def test_callback_that_cannot_be_copied_keeps_what_it_had(learn):
    learn.add_cb(Keeps())
    learn.fit(1)
    before = len(learn.keeps.losses), len(learn.keeps.store.items)
    learn.format_find([LAST], show_plot=False)
    assert (len(learn.keeps.losses), len(learn.keeps.store.items)) == before


class HoldsTeacher(Callback):
    def __init__(self):
        self.teacher = TinyNet()

    def before_batch(self):
        self.teacher(self.x)

    def __deepcopy__(self, memo):
        raise AssertionError("copied")

    __copy__ = __reduce_ex__ = __deepcopy__


def test_callbacks_are_not_copied_and_read_only_arrays_do_no_harm(learn, bf16_cpu, assert_unchanged):
    learn.add_cb(HoldsTeacher())
    teacher = learn.holds_teacher.teacher
    learn.model[1].constant = learn.dls.constant = np.broadcast_to(np.zeros(1), 3)
    before, check = tensors_of(teacher), assert_unchanged(learn)
    learn.format_find([LAST, LAST_BF16], show_plot=False)
    check()
    assert_same_tensors(before, tensors_of(teacher))


class Dropping(TinyNet):
    "Draws random numbers and keeps a buffer."

    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5))


def shuffled_dls():
    items = random_items()
    return DataLoaders(*[DataLoader(items, bs=8, shuffle=shuffle) for shuffle in (True, False)], device="cpu")


def seed_all():
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)


OPT_FUNCS = {
    "Adam": {},
    "Lookahead": {"opt_func": ranger},
    "AdamW": {"opt_func": lambda params, **kwargs: OptimWrapper(params, torch.optim.AdamW, **kwargs)},
    "SGD": {"opt_func": lambda params, **kwargs: OptimWrapper(params, torch.optim.SGD, momentum=0.9, **kwargs)},
}


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("fmt", [CONTIGUOUS, LAST, LAST_BF16], ids=str)
@pytest.mark.parametrize("kwargs", OPT_FUNCS.values(), ids=OPT_FUNCS)
def test_training_afterwards_is_bit_for_bit_the_same(new_learner, bf16_cpu, kwargs, fmt, trained):
    learns = []
    for _ in range(2):
        seed_all()
        learns.append(new_learner(Dropping, shuffled_dls(), cbs=MixUp(), **kwargs).to_format(fmt))
        if trained:
            learns[-1].fit(1)
    seed_all()
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    learns[0].format_find(show_plot=False)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[2])
    assert (np.random.get_state()[1] == states[1]).all()
    for learn in learns:
        seed_all()
        learn.fit_one_cycle(2)
    for name, value in learns[0].model.state_dict().items():
        other = learns[1].model.state_dict()[name]
        assert torch.equal(value, other) and value.stride() == other.stride()
    assert learns[0].recorder.values == learns[1].recorder.values
    assert learns[0].recorder.losses == learns[1].recorder.losses
    for first, second in zip(learns[0].opt.state_dict()["state"], learns[1].opt.state_dict()["state"]):
        assert str(first) == str(second)


class RaisesAt(Callback):
    "Raise at the n-th event of the whole search."

    order = 1000

    def __init__(self, n, error):
        self.n, self.error = n, error
        self.times = count(1)  # an iterator goes on where a search puts back all else

    def __call__(self, event_name):
        if next(self.times) == self.n:
            raise self.error


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13, 21, 40, 80, 130])
def test_interrupt_anywhere_leaves_the_learner_as_it_was(learn, bf16_cpu, assert_unchanged, n):
    learn.fit(1)
    learn.add_cb(RaisesAt(n, KeyboardInterrupt()))
    learn.model(torch.randn(2, 3, 8, 8)).sum().backward()
    check = assert_unchanged(learn)
    with pytest.raises(KeyboardInterrupt):
        learn.format_find(show_plot=False)
    check()
    learn.remove_cb(RaisesAt)
    learn.fit(1)


def test_interrupt_while_data_are_loaded(learn, assert_unchanged):
    class Interrupted(list):
        def __iter__(self):
            yield self[0]
            raise KeyboardInterrupt

    learn.dls.loaders[0] = Interrupted(learn.dls.loaders[0])
    check = assert_unchanged(learn)
    with pytest.raises(KeyboardInterrupt):
        learn.format_find(show_plot=False, budget=100)
    check()


def test_nothing_is_left_behind(learn, bf16_cpu, assert_unchanged):
    check = assert_unchanged(learn)
    learn.format_find(show_plot=False)
    check()
    assert learn.opt is None and not hasattr(learn, "scaler") and not hasattr(learn, "lr_finder")


def test_mode_and_gradients_stay(learn, assert_unchanged):
    learn.model(torch.randn(2, 3, 8, 8)).sum().backward()
    learn.model.eval()
    learn.model[1].train()
    grad = learn.model[0].weight.grad
    values = grad.clone()
    check = assert_unchanged(learn)
    learn.format_find(show_plot=False)
    check()
    assert learn.model[0].weight.grad is grad and torch.equal(grad, values)


def test_optimizer_that_was_made_before_the_learner(new_learner):
    model = TinyNet()
    opt = OptimWrapper(model.parameters(), torch.optim.SGD, lr=0.5, momentum=0.9)
    learn = new_learner(model, opt_func=opt)
    learn.format_find(show_plot=False)
    assert learn.opt is None and opt.hypers[0]["lr"] == 0.5 and not opt.state


def test_trackers_loggers_and_savers_are_silent(new_learner, tmp_path, capsys):
    learn = new_learner(path=tmp_path, cbs=[SaveModelCallback(monitor="train_loss"), CSVLogger()])
    logged = []
    learn.logger = logged.append
    learn.format_find(show_plot=False)
    assert list(tmp_path.rglob("*")) == [] and logged == []
    assert capsys.readouterr().out.startswith("TinyNet (input shape")


def test_prints_the_table_and_draws_the_bars(timed, capsys):
    plt.close("all")
    timings = timed.format_find()
    assert capsys.readouterr().out == f"{timings}\n" and len(plt.get_fignums()) == 1
    plt.close("all")
    timed.format_find(show_plot=False)
    assert plt.get_fignums() == []


def test_progress_bar(timed, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, gen, leave):
            self.values, self.comments, self.ended = [], [], 0
            bars.append(self)

        def update(self, value):
            self.values.append(value)
            self.comments.append(getattr(self, "comment", ""))

        def on_iter_end(self):
            self.ended += 1

    monkeypatch.setattr("channelslast.find.run.progress_bar", Bar)
    timed.format_find(show_plot=False, budget=2)
    assert bars == []  # a Learner without a bar
    timed.add_cb(ProgressCallback())
    timed.format_find(show_plot=False, budget=2)
    (bar,) = bars
    assert bar.values == sorted(bar.values) and bar.values[-1] > 50 and max(bar.values) < 100 and bar.ended == 1
    assert "eager: contiguous fp32 (best so far: channels last bf16, 10.0 ms)" in bar.comments
    assert any(comment.startswith("rounds: channels last bf16 (best so far: channels") for comment in bar.comments)
    timed.add_cb(RaisesAt(20, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        timed.format_find(show_plot=False)
    assert bars[1].ended == 1


# Candidates that fail


class Views(nn.Sequential):
    "Cannot train in channels last."

    def __init__(self):
        super().__init__(nn.Conv2d(3, 3, 1), TinyNet())

    def forward(self, x):
        x = self[0](x)
        return self[1](x.view(len(x), -1).view(x.shape))


class RejectsHalf(CrossEntropyLossFlat):
    def __call__(self, pred, target):
        if torch.is_autocast_enabled("cpu"):
            raise NotImplementedError("no loss in half precision\nwith details")
        return super().__call__(pred, target)


class OutOfMemory(TinyNet):
    def forward(self, x):
        if x.is_contiguous(memory_format=torch.channels_last):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB")
        return super().forward(x)


@pytest.mark.parametrize(
    "model, loss_func, failing, reason",
    [
        (Views, CrossEntropyLossFlat, {LAST, LAST_BF16}, "RuntimeError: view size is not compatible"),
        (TinyNet, RejectsHalf, {CONTIGUOUS_BF16, LAST_BF16}, "NotImplementedError: no loss in half precision with det"),
        (OutOfMemory, CrossEntropyLossFlat, {LAST, LAST_BF16}, "OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_candidate_that_fails_is_a_row_with_its_reason(
    new_learner, bf16_cpu, assert_unchanged, model, loss_func, failing, reason
):
    learn = new_learner(model, loss_func=loss_func())
    check = assert_unchanged(learn)
    timings = learn.format_find(show_plot=False)
    check()
    assert {row.format for row in timings if row.error} == failing and timings.best not in failing
    assert all(row.error.startswith(reason) and "\n" not in row.error for row in timings if row.error)
    assert reason[:20] in str(timings)


class FailsLate(Callback):
    "Fail after `n` batches; those of contiguous images do not count, unless told."

    order = 100

    def __init__(self, n, counts_contiguous=False):
        self.n, self.counts_contiguous = n, counts_contiguous
        self.times = count(1)  # an iterator goes on where each round puts back all else

    def before_batch(self):
        if (self.counts_contiguous or is_channels_last(self.x)) and next(self.times) > self.n:
            raise RuntimeError("late")


def test_candidate_that_fails_late(learn, plain_cpu, many_rounds):
    learn.add_cb(FailsLate(30))
    timings = learn.format_find([LAST], show_plot=False)
    assert "late" in timings[1].error and timings[1].samples == [] and timings.best == CONTIGUOUS
    assert len(timings[0].samples) == 5


def test_compile_error_is_a_row(learn, plain_cpu, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("backend='x' raised:\nNo compiler")

    monkeypatch.setattr(torch, "compile", fails)
    timings = learn.format_find([TrainFormat(True, None, "default")], show_plot=False)
    assert timings[1].error == "RuntimeError: backend='x' raised: No compiler"


def test_fit_that_a_callback_cancels(learn):
    class Cancels(Callback):
        def before_train(self):
            raise CancelFitException

    learn.add_cb(Cancels())
    with pytest.raises(RuntimeError, match="a callback of the Learner cancelled the fit"):
        learn.format_find(show_plot=False)


def test_all_failing_is_an_error_with_the_reasons(learn, bf16_cpu, assert_unchanged):
    class Fails(Callback):
        def before_batch(self):
            raise ZeroDivisionError(str(self.learn.train_format))

    learn.add_cb(Fails())
    check = assert_unchanged(learn)
    with pytest.raises(ZeroDivisionError, match=r"No format can train.*channels last bf16: Z.*contiguous fp32: Z"):
        learn.format_find(show_plot=False)
    check()


@pytest.mark.parametrize("start", [CONTIGUOUS, LAST_BF16], ids=str)
def test_error_of_the_model_in_every_format_is_raised_as_it_was(new_learner, bf16_cpu, assert_unchanged, start):
    class Typo(TinyNet):
        def forward(self, x):
            return super().forward(x) + no_such_name  # noqa: F821

    learn = new_learner(Typo).to_format(start)
    with pytest.raises(NameError) as alone:
        learn.fit(1)
    learn.opt = None
    check = assert_unchanged(learn)
    with pytest.raises(NameError, match="No format can train this Learner") as raised:
        learn.format_find(show_plot=False)
    check()
    assert str(raised.value) == str(alone.value) and raised.value.__cause__ is raised.value.__context__ is None
    assert (
        raised.traceback[-1].lineno == alone.traceback[-1].lineno
        and raised.traceback[-1].path == alone.traceback[-1].path
    )


def test_error_in_the_format_of_the_learner_is_the_one_raised(learn, plain_cpu):
    class Fails(Callback):
        def before_batch(self):
            raise ZeroDivisionError if self.learn.train_format == LAST else KeyError("no")

    learn.add_cb(Fails()).to_format(LAST)
    with pytest.raises(IndexError) as raised:  # fastai's, of an exception without a message
        learn.format_find(show_plot=False)
    assert isinstance(raised.value.__context__, ZeroDivisionError)


def test_error_that_becomes_a_row_holds_no_tensors(new_learner, plain_cpu):
    held, alive = [], []

    class Fails(TinyNet):
        def forward(self, x):
            gc.collect()
            alive.append(sum(reference() is not None for reference in held))
            if is_channels_last(x):
                activation = super().forward(x)
                held.append(weakref.ref(activation))
                try:
                    raise KeyError("first")
                except KeyError:
                    raise ValueError("second") from None
            return super().forward(x)

    timings = new_learner(Fails).format_find([LAST, CONTIGUOUS], show_plot=False)
    assert timings[0].error == "ValueError: second" and held and not any(alive) and len(alive) > 6


def test_all_failing_in_the_rounds_is_an_error_too(learn, plain_cpu, many_rounds):
    learn.add_cb(FailsLate(50, counts_contiguous=True))
    with pytest.raises(RuntimeError, match=r"No format can train.*late.*late"):
        learn.format_find([LAST], show_plot=False)


def test_format_whose_loss_is_no_number_fails(new_learner, bf16_cpu):
    class Overflows(TinyNet):
        def forward(self, x):
            return super().forward(x) * (float("nan") if torch.is_autocast_enabled("cpu") else 1)

    class SkipsNan(Callback):
        def after_loss(self):
            if not torch.isfinite(self.learn.loss_grad):
                raise CancelBatchException

    for cbs in ([], [SkipsNan()]):
        learn = new_learner(Overflows, cbs=cbs)
        learn.fit(1)
        timings = learn.format_find(show_plot=False)
        assert {row.format: row.error for row in timings if row.format.amp_mode} == {
            LAST_BF16: "the loss is nan",
            CONTIGUOUS_BF16: "the loss is nan",
        }
        assert not any(row.error for row in timings if row.format.amp_mode is None)


def test_steps_without_a_backward_pass_are_none(learn):
    class Cancels(Callback):
        def after_loss(self):
            raise CancelBatchException

    learn.add_cb(Cancels())
    with pytest.raises(RuntimeError, match="cancelled every batch before its backward pass"):
        learn.format_find(show_plot=False)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("event", ["before_batch", "after_loss"])
def test_first_batches_that_a_callback_cancels_are_not_timed(new_learner, device, n, event):
    class CancelsFirst(Callback):
        def before_fit(self):
            self.left = n

        def cancel(self):
            self.left -= 1
            if self.left >= 0:
                raise CancelBatchException

    setattr(CancelsFirst, event, CancelsFirst.cancel)
    timings = new_learner(device=device, cbs=CancelsFirst()).format_find(show_plot=False)
    assert not any(row.error for row in timings) and timings.shapes == [(8, 3, 8, 8)]


def test_training_that_a_callback_ends_is_not_validated(learn):
    class Ends(Callback):
        validated = False

        def after_batch(self):
            raise CancelTrainException

        def before_validate(self):
            Ends.validated += 1

    learn.add_cb(Ends())
    learn.dls.loaders[1] = None  # which a validation would need
    with pytest.raises(RuntimeError, match="cancelled the fit"):
        learn.format_find(show_plot=False)


def test_profiler_that_fails_leaves_the_rows_alone(timed, monkeypatch):
    real = Fits.train

    def fails_to_profile(self, candidate, new_steps, **kwargs):
        if new_steps is ProfiledStep:
            return None, "no CUPTI"
        return real(self, candidate, new_steps, **kwargs)

    monkeypatch.setattr(Fits, "train", fails_to_profile)
    monkeypatch.setattr("channelslast.find.search.busy_seconds", None)
    searches = []
    finish = Search.finish

    def remember(self):
        searches.append(self)
        return finish(self)

    monkeypatch.setattr(Search, "finish", remember)
    timings = timed.format_find(show_plot=False)
    (found,) = searches
    found.device = torch.device("cuda")
    assert found.measure_busy(found.candidates[0]) is None and not any(row.error for row in timings)


def test_comparison_that_is_no_choice(timed):
    other = Candidate(LAST_BF16, is_choice=False)
    timings = find_format(timed, stages_of(CONTIGUOUS), [other])
    assert len(timings) == 1 and timings.best == CONTIGUOUS and other.row.ms == pytest.approx(10)
    assert len(other.row.samples) == 3
    with pytest.raises(RuntimeError, match=r"No format can train this Learner\. channels last fp16: .* arithmetic"):
        find_format(timed, stages_of(TrainFormat(True, "fp16")), [other])


def test_reason_why_a_gpu_cannot_train_in_bfloat16(learn, monkeypatch):
    def refuses(amp_mode, device):
        raise ValueError("the GPU has no bfloat16")

    monkeypatch.setattr("channelslast.find.candidates.autocast_dtype", refuses)
    assert why_not(LAST_BF16, torch.device("cuda")) == "the GPU has no bfloat16"


# Bad input


@pytest.mark.parametrize(
    "kwargs, error, said",
    [
        ({"formats": []}, ValueError, r"formats=\[\] is empty: pass a list, as \['channels last bf16'\]"),
        ({"formats": iter(())}, ValueError, r"formats=\[\] is empty"),
        ({"formats": "fp16"}, TypeError, "formats='fp16' is not a list of TrainFormat"),
        ({"formats": LAST}, TypeError, r"formats=TrainFormat\(.*is not a list"),
        ({"formats": 3}, TypeError, "formats=3 is not a list of TrainFormat"),
        ({"formats": [LAST, 16]}, TypeError, "formats holds 16, which is not a TrainFormat"),
        ({"compile": "default"}, TypeError, "compile='default'"),
        ({"show_plot": 1}, TypeError, "show_plot=1"),
        ({"keep_precision": "fp16"}, TypeError, "keep_precision='fp16'"),
        (
            {"formats": ["channels last"]},
            ValueError,
            "formats='channels last' is no format: did you mean 'channels last ",
        ),
        ({"budget": 0}, ValueError, "budget=0: pass a number of seconds above 0"),
        ({"budget": -3.0}, ValueError, "budget=-3.0"),
        ({"budget": float("nan")}, ValueError, "budget=nan"),
        ({"budget": float("inf")}, ValueError, "budget=inf"),
        ({"budget": "10"}, ValueError, "budget='10'"),
        ({"budget": True}, ValueError, "budget=True"),
    ],
)
def test_bad_input_names_the_argument_and_what_is_legal(learn, assert_unchanged, kwargs, error, said):
    check = assert_unchanged(learn)
    with pytest.raises(error, match=said):
        learn.format_find(**kwargs)
    check()


@pytest.mark.parametrize("has", [0, 2, 16])
def test_more_workers_are_advised_where_fastai_would_have_more(learn, monkeypatch, has):
    monkeypatch.setattr(defaults, "cpus", 128)
    items = [(torch.randn(3, 8, 8), torch.tensor(0))] * 16
    learn.dls = DataLoaders.from_dsets(items, items, bs=8, num_workers=has)
    assert more_workers(learn) == (16 if has < 16 else None)
    learn.dls = DataLoaders(torch.utils.data.DataLoader(items), [])
    assert more_workers(learn) is None, "PyTorch's loader has no `new`"


def test_a_view_that_keeps_the_model_from_channels_last_is_told(new_learner):
    timings = new_learner(Views).format_find(budget=2, show_plot=False)
    last = [row for row in timings if row.format.channels_last and row.is_tried]
    assert last and all("calls `.view`, write `.reshape` there" in row.error for row in last)
    assert timings.verdict.endswith(
        "No channels last format can train: the model calls `.view`, write `.reshape` there."
    )


@pytest.mark.parametrize("budget", [1e-9, 0.01])
def test_own_format_is_tried_however_small_the_budget_where_the_first_one_fails(new_learner, bf16_cpu, budget):
    timings = new_learner(Views).format_find(budget=budget, show_plot=False)
    assert "calls `.view`" in timings[0].error and timings.row(CONTIGUOUS).is_tried
    assert timings.best == CONTIGUOUS and not timings.row(CONTIGUOUS).error


class Scales(TinyNet):
    "Scales its images where they lie, so that the second time in the same batch they are far out of range."

    def forward(self, x):
        return super().forward(x.sub_(0.5).mul_(1e9))


class FromOne(Callback):
    "Labels that begin at 1."

    def before_batch(self):
        self.learn.yb[0].sub_(1)


@pytest.mark.parametrize("by", ["model", "callback"])
def test_what_is_written_into_a_batch_is_of_its_step_alone(new_learner, bf16_cpu, by, monkeypatch):
    learn = new_learner(Scales if by == "model" else TinyNet)
    if by == "callback":
        learn.dls = DataLoaders.from_dsets([(torch.randn(3, 8, 8), torch.tensor(1))] * 32, [], bs=8)
        learn.add_cb(FromOne())
    monkeypatch.setattr("channelslast.find.batches.N_BATCHES", 1)
    timings = learn.format_find(budget=2, show_plot=False)
    assert not [row.error for row in timings if row.is_tried and row.error]


def test_getting_ready_is_of_the_budget(timed, clock, monkeypatch):
    @contextmanager
    def slow(learn, *args, **kwargs):
        clock.tick(5)
        with unchanged_learner(learn, *args, **kwargs) as put_back:
            yield put_back

    monkeypatch.setattr("channelslast.find.run.unchanged_learner", slow)
    timed.format_find(budget=10, show_plot=False)
    assert 9 < clock.now < 12


def test_budget_that_ends_with_the_first_step(timed, clock, assert_unchanged):
    check = assert_unchanged(timed)
    timings = timed.format_find(budget=1e-3, show_plot=False)
    check()
    assert timings[0].samples == [] and timings[0].note == "1 step, the time was up" and clock.now < 0.1
    assert "limits it" not in timings.verdict
    assert all(row.error == "not reached in 0.001 seconds" and not row.is_tried for row in timings[1:])
    assert timings.best == CONTIGUOUS and "no time to compare" in timings.verdict


def test_budget_that_failing_formats_use_up(new_learner, clock, bf16_cpu):
    class Fails(TinyNet):
        def forward(self, x):
            clock.tick(1)
            raise ValueError("typo")

    with pytest.raises(
        ValueError, match=r"^typo\n(?s:.*)contiguous fp32: ValueError: typo; contiguous bf16: not reached"
    ):
        new_learner(Fails).format_find(budget=0.5)
    with pytest.raises(ValueError, match=r"^typo"):
        new_learner(Fails).format_find([CONTIGUOUS], budget=0.5)
    assert clock.now == 3


@pytest.mark.parametrize("loaders", [[], [[]]])
def test_without_training_data(learn, loaders, assert_unchanged):
    learn.dls.loaders = loaders
    check = assert_unchanged(learn)
    with pytest.raises(ValueError, match=r"learn.dls.*at least one batch to train on"):
        learn.format_find()
    check()


def test_fewer_items_than_a_batch_are_told(learn, assert_unchanged):
    items = [(torch.randn(3, 8, 8), torch.tensor(0))] * 10
    learn.dls = DataLoaders.from_dsets(items, items, bs=64)
    check = assert_unchanged(learn)
    for call in (learn.format_find, learn.format_summary):
        with pytest.raises(ValueError, match=r"learn.dls.train is empty \(10 items, bs=64\): pass a Learner"):
            call()
    check()


def test_exported_learner_has_no_training_data(new_learner, tmp_path):
    to_image, to_label = (lambda i: torch.full((3, 8, 8), float(i))), (lambda i: torch.tensor(i % 3))
    dls = Datasets(range(24), [[to_image], [to_label]], splits=[range(16), range(16, 24)]).dataloaders(bs=8)
    learn = new_learner(dls=dls, path=tmp_path)
    learn.export("model.pkl")
    with pytest.raises(ValueError, match=r"learn.dls.*at least one batch to train on"):
        load_learner(tmp_path / "model.pkl").format_find()


def test_model_with_attributes_of_the_search_and_callback_that_asks_the_loader(new_learner, plain_cpu):
    class Named(TinyNet):
        def __init__(self):
            super().__init__()
            self.scaler = self.n_steps = self.error = self.shapes = 0.5

    class Asks(Callback):
        def before_batch(self):
            assert str(self.dl.device) == "cpu"

    learn = new_learner(Named, cbs=Asks())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timings = learn.format_find([LAST], show_plot=False)
    assert not any(row.error for row in timings)


def test_own_format_is_waited_for_in_the_default_budget(new_learner, clock, bf16_cpu):
    class SlowStart(TimedNet):
        def forward(self, x):
            clock.steps = getattr(clock, "steps", 0) + 1
            clock.tick(18.0 if clock.steps in (1, 8) else 0)  # of the first candidate, and of the second
            return super().forward(x)

    timings = new_learner(lambda: SlowStart(clock)).format_find(show_plot=False)
    assert timings.row(CONTIGUOUS).note is None or "time was up" not in timings.row(CONTIGUOUS).note
    assert timings.row(CONTIGUOUS).ms == pytest.approx(40)


@pytest.mark.parametrize("gain, n_rounds", [(1.0, 10), (1.3, 5)])
def test_fewer_rounds_where_all_show_the_same_and_more_for_a_named_budget(
    new_learner, clock, bf16_cpu, many_rounds, gain, n_rounds
):
    learn = new_learner(lambda: Slow(clock, lambda is_last, is_bf16: 0.1 if is_last else 0.1 * gain))
    timings = learn.format_find(["channels last bf16", "contiguous bf16"], show_plot=False)
    assert [len(row.samples) for row in timings] == [n_rounds] * 3 and timings.best == LAST_BF16
    named = learn.format_find(["channels last bf16", "contiguous bf16"], show_plot=False, budget=60)
    assert 10 < len(named[0].samples) <= 40


def test_precision_without_a_name_stays(new_learner, plain_cpu):
    learn = new_learner()
    learn.to_non_native_fp16()
    before = {type(cb) for cb in learn.cbs}
    Fits(learn, [], None, None, None, None).put_format_back(learn)
    assert {type(cb) for cb in learn.cbs} == before


def test_in_the_middle_of_a_fit(learn):
    class Finds(Callback):
        order = 100

        def before_epoch(self):
            with pytest.raises(RuntimeError, match="in the middle of a fit"):
                self.learn.format_find()
            self.asked = True

        before_fit = after_batch = before_validate = after_fit = before_epoch

    learn.add_cb(Finds())
    learn.fit(1)
    assert learn.finds.asked
    learn.finds.asked = False
    learn.validate()
    assert learn.finds.asked


@pytest.mark.parametrize("predict", ["get_preds", "validate"])
def test_in_the_middle_of_predictions(learn, predict):
    class Finds(Callback):
        def before_validate(self):
            with pytest.raises(RuntimeError, match="in the middle of a fit"):
                self.learn.format_find()
            self.asked = True

    learn.add_cb(Finds())
    getattr(learn, predict)(dl=learn.dls.valid)
    assert learn.finds.asked


def test_fit_that_others_have_wrapped(learn, monkeypatch):
    class Wrapper:
        "As a tracker of experiments may wrap it: no function."

        def __get__(self, learn, cls):
            return partial(fit, learn)

    fit = Learner.fit
    monkeypatch.setattr(Learner, "fit", Wrapper())
    assert not any(row.error for row in learn.format_find(show_plot=False))


def test_in_the_fit_of_another_learner(new_learner):
    class Finds(Callback):
        def before_epoch(self):
            self.found = new_learner().format_find([LAST], show_plot=False)

    learn = new_learner(cbs=Finds())
    learn.fit(1)
    assert len(learn.finds.found) == 2


def test_after_an_interrupted_fit(learn):
    learn.add_cb(RaisesAt(20, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1)
    learn.remove_cb(RaisesAt)
    assert not any(row.error for row in learn.format_find(show_plot=False))


# Compilers, GPUs, processes


@pytest.mark.filterwarnings("ignore")
def test_compiled_candidate_is_timed_and_nothing_of_it_is_left(new_learner, plain_cpu, assert_unchanged):
    learn = new_learner(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    learn.to_format(TrainFormat(compile="reduce-overhead"))
    wrapper = learn.model._compiled_call_impl
    check = assert_unchanged(learn)
    formats = [TrainFormat(last, None, "default") for last in (False, True)]
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    limits = getattr(config, limit), config.automatic_dynamic_shapes
    timings = learn.format_find([CONTIGUOUS, *formats], show_plot=False)
    check()
    assert not any(row.error for row in timings) and timings.start == TrainFormat(False, None, "reduce-overhead")
    assert learn.model._compiled_call_impl is wrapper and learn.train_format.compile == "reduce-overhead"
    assert limits == (getattr(config, limit), config.automatic_dynamic_shapes)


def test_many_compiled_candidates_are_all_compiled(monkeypatch):
    "More than PyTorch's limit for one function, each by the strides of its images."
    compiled = []

    def backend(graph, inputs):
        compiled.append([tuple(tensor.stride()) for tensor in inputs if tensor.ndim == 4])
        return graph.forward

    with room_for_compiled(True):
        function = torch.compile(lambda x, n: x * n, backend=backend)
        for n in range(20):
            x = torch.randn(2, 3, 4, 4)
            function(x.to(memory_format=torch.channels_last) if n % 2 else x, n)
    assert len(compiled) == 20 and all(strides[0] in ((48, 16, 4, 1), (48, 1, 12, 3)) for strides in compiled)


@pytest.fixture
def cuda_learner(new_learner):
    "A function that makes a Learner on the GPU whose activations outweigh everything else."

    def make(**kwargs):
        dls = new_dls(3, 64, 64, n=128, bs=64, device="cuda")
        opt_func = lambda params, **kwargs: OptimWrapper(params, torch.optim.AdamW, fused=True, **kwargs)  # noqa: E731
        return new_learner(dls=dls, **{"opt_func": opt_func, **kwargs})

    return make


@pytest.mark.cuda
def test_on_a_gpu_every_precision_with_its_memory_and_what_limits_it(cuda_learner):
    timings = cuda_learner(opt_func=Adam).format_find(show_plot=False)
    assert [row.format.amp_mode for row in timings[:6]] == ["fp16", "bf16", None, "fp16", "bf16", None]
    assert not any(row.error for row in timings) and all(row.ms > 0 for row in timings)
    assert timings.row(CONTIGUOUS).peak_bytes > 0
    assert any(row.format.fused_optimizer for row in timings) and any(row.format.cuda_graph for row in timings)
    assert 0 < timings.busy <= 1 and 0 < timings.optimizer_share < 1 and "peak GB" in str(timings)


@pytest.mark.cuda
def test_model_that_cannot_be_captured_is_a_row_with_its_reason(cuda_learner):
    class Synchronizes(TinyNet):
        def forward(self, x):
            return super().forward(x * float(x.abs().mean() > 0))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timings = cuda_learner(model=Synchronizes).format_find(show_plot=False)
    reasons = [row.error for row in timings if row.format.cuda_graph]
    assert len(reasons) == 2 and all(reason.startswith("no CUDA graph: ") for reason in reasons)
    assert not any(row.error for row in timings if not row.format.cuda_graph)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore")
def test_all_stages_on_a_gpu_and_what_was_compiled_is_ready(cuda_learner, assert_unchanged):
    learn = cuda_learner()
    learn.model.to("cuda")
    check = assert_unchanged(learn)
    timings = learn.format_find(compile=True, show_plot=False)
    check()
    assert not any(row.error for row in timings)
    assert {(bool(row.format.compile), row.format.cuda_graph) for row in timings} == {
        *((False, False), (False, True), (True, False), (True, True)),
    }


def memory_after_clearing():
    "Bytes that are allocated, and that are reserved."
    torch._C._cuda_clearCublasWorkspaces()  # 32 MB for each thread that has multiplied matrices since the last capture
    gc.collect()
    torch.cuda.empty_cache()
    return torch.tensor([torch.cuda.memory_allocated(), torch.cuda.memory_reserved()])


@pytest.mark.cuda
@pytest.mark.parametrize("tries_kernels", [False, True], ids=["heuristics", "cudnn.benchmark"])
def test_memory_of_the_search_is_that_of_its_hungriest_candidate(
    cuda_learner, monkeypatch, nothing_frozen, tries_kernels
):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", tries_kernels)
    peaks = []
    real = torch.cuda.reset_peak_memory_stats

    def peak():
        peaks.append(torch.tensor([torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]))
        real()

    def baseline():
        held = memory_after_clearing()
        real()
        return held

    alone = []
    graphs = [TrainFormat(True, mode, cuda_graph=True) for mode in (None, "fp16", "bf16")]
    for fmt in (CONTIGUOUS, LAST, TrainFormat(False, "fp16"), LAST_BF16, *graphs):
        learn = cuda_learner()
        before = baseline()
        learn.to_format(fmt).fit(1)
        peak()
        alone.append(peaks.pop() - before)
        del learn
    learn = cuda_learner()
    before = baseline()
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak())
    learn.format_find(show_plot=False)
    peak()
    search = torch.stack(peaks).amax(0) - before
    print("alone", alone, "search", search)
    assert (search <= 1.3 * torch.stack(alone).amax(0)).all()
    assert memory_after_clearing()[0] <= before[0] + 2**20


def heavy_net():
    "Weights, of 150 MB, that outweigh activations."
    convs = [nn.Conv2d(1024 if i else 3, 1024, 3, padding=1) for i in range(5)]
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), *convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 10))


@pytest.mark.cuda
def test_memory_of_the_search_is_not_twice_that_of_weights_and_state(cuda_learner, monkeypatch, nothing_frozen):
    before, peaks = memory_after_clearing()[0], []
    real = torch.cuda.reset_peak_memory_stats

    def peak():
        peaks.append(torch.cuda.max_memory_allocated() - before)
        real()

    def trained():
        learn = cuda_learner(model=heavy_net)
        learn.fit(1)
        learn.opt.zero_grad()
        memory_after_clearing()
        real()
        return learn

    alone = []
    for fmt in (CONTIGUOUS, LAST, TrainFormat(True, "fp16"), TrainFormat(True, "fp16", cuda_graph=True)):
        trained().to_format(fmt).fit(1)
        peak()
        alone.append(peaks.pop())
    learn = trained()
    addresses = [each.data_ptr() for each in learn.model.parameters()]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak())
    learn.format_find(show_plot=False)
    peak()
    print("alone", alone, "search", peaks)
    assert max(peaks) <= 1.3 * max(alone)
    assert [each.data_ptr() for each in learn.model.parameters()] == addresses


@pytest.mark.cuda
def test_out_of_memory_is_a_row_and_gives_its_memory_back(cuda_learner):
    class Hungry(Callback):
        order = 100

        def before_batch(self):
            if self.learn.train_format == LAST:
                self.kept = [torch.empty(2**30, device="cuda") for _ in range(1000)]

    learn = cuda_learner(cbs=Hungry())
    before = memory_after_clearing()
    timings = learn.format_find(show_plot=False)
    assert "OutOfMemoryError" in timings.row(LAST).error and [bool(row.error) for row in timings].count(True) == 1
    assert memory_after_clearing()[0] <= before[0] + 2**20


@pytest.mark.cuda
@pytest.mark.parametrize("fmt", [CONTIGUOUS, TrainFormat(True, "fp16")], ids=str)
def test_training_on_a_gpu_afterwards_is_the_same(cuda_learner, monkeypatch, fmt):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    learns = [cuda_learner(cbs=MixUp()).to_format(fmt) for _ in range(2)]
    for learn in learns:
        seed_all()
        torch.cuda.manual_seed(5)
        learn.fit(1)
    state = torch.cuda.get_rng_state()
    learns[0].format_find(show_plot=False)
    assert torch.equal(state, torch.cuda.get_rng_state())
    for learn in learns:
        seed_all()
        torch.cuda.manual_seed(5)
        learn.fit_one_cycle(2)
    for name, value in learns[0].model.state_dict().items():
        assert torch.equal(value, learns[1].model.state_dict()[name])
    assert learns[0].recorder.values == learns[1].recorder.values


@pytest.mark.cuda
def test_loss_scale_goes_on_from_round_to_round(cuda_learner):
    scales = []

    class Watches(Callback):
        order = 1000

        def after_batch(self):
            scales.append(self.learn.scaler.get_scale())

    learn = cuda_learner(cbs=Watches()).to_channelslast(init_scale=2.0**40)
    learn.format_find([TrainFormat(True, "fp16")], show_plot=False)
    assert len(scales) > 9 and scales == sorted(scales, reverse=True) and scales[-1] < 2.0**39


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore")
def test_cuda_graphs_are_timed_interleaved_and_given_back(cuda_learner, assert_unchanged, nothing_frozen):
    learn = cuda_learner()
    learn.model.to("cuda")
    before = memory_after_clearing()
    check = assert_unchanged(learn)
    formats = [TrainFormat(last, "bf16", mode) for last in (False, True) for mode in (None, "reduce-overhead")]
    timings = learn.format_find(formats, show_plot=False, budget=10)
    check()
    for row in timings:
        print(row.format, [round(ms, 2) for ms in row.samples], row.peak_bytes, row.warmup_s)
    assert not any(row.error for row in timings)
    hungriest = max(row.peak_bytes or 0 for row in timings)
    assert not any(row.peak_bytes for row in timings if row.format.compile)
    assert (memory_after_clearing() <= before + torch.tensor([2**20, hungriest])).all()
