"The search: warm every candidate up, then time them in rounds that go to and fro between them."

import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from math import nan
from typing import Any

from fastai.learner import Learner
from fastai.torch_core import get_model

from channelslast.devices import device_name, training_device
from channelslast.find.batches import load_batches, n_items_in
from channelslast.find.budget import Budget
from channelslast.find.candidates import Candidate
from channelslast.find.distributed import Processes
from channelslast.find.fits import Fits
from channelslast.find.memory import GpuMemory
from channelslast.find.plan import MIN_ROUNDS, check_holds_rounds, choose_n_steps
from channelslast.find.result import FormatTimings
from channelslast.find.steps import ProfiledStep, Round, WarmUp
from channelslast.formats import TrainFormat, uncompiled
from channelslast.summary.gpu import gpu_shares


class Search:
    "Times candidates on a Learner that its caller restores."

    def __init__(
        self,
        learn: Learner,
        candidates: list[Candidate],
        budget: Budget,
        processes: Processes,
        progress: Callable[[float, str], None],  # takes a share between 0 and 1, and a comment
        put_tensors_back: Callable[[], None],
    ):
        self.learn, self.candidates, self.budget, self.processes = learn, candidates, budget, processes
        self.progress, self.put_tensors_back = progress, put_tensors_back
        self.device = training_device(learn)
        self.memory = GpuMemory(learn, self.device)
        self.warm_up_s: list[float] = []  # of each candidate so far, compilation not counted
        self.n_steps = 1

    @property
    def remaining(self) -> list[Candidate]:
        "Those that have not failed."
        return [candidate for candidate in self.candidates if not candidate.row.error]

    def run(self) -> None:
        self.load()
        self.warm_up_all()
        self.check_any_remain()
        seconds = self.budget.seconds - self.budget.measure_spent()
        self.n_steps = choose_n_steps(self.remaining, seconds, self.device)
        self.time_rounds()

    def load(self) -> None:
        failure = None
        try:
            batches, items_per_s = load_batches(self.learn, min(2.0, self.budget.seconds / 10))
        except Exception as raised:
            failure = raised
        reason = self.processes.report_failure(failure, is_patient=True)
        if reason:
            raise failure or RuntimeError(reason)
        self.data_items_per_s = self.processes.decide_together(sum, items_per_s)
        self.n_items = self.processes.decide_together(sum, n_items_in(batches[0]))
        self.fits = Fits(self.learn, batches, self.processes, self.memory, self.put_tensors_back)

    def warm_up_all(self) -> None:
        waiting = self.remaining
        while waiting:
            candidate, *waiting = waiting
            self.tell(f"warm-up: {candidate.row.format}")
            self.warm_up(candidate)
            waiting = self.those_in_time(waiting)

    def warm_up(self, candidate: Candidate) -> None:
        spent = self.budget.measure_spent()
        started = time.perf_counter()
        with self.budget.not_counting() if candidate.is_compiled else nullcontext():
            steps, error = self.fits.train(
                candidate,
                WarmUp,
                processes=self.processes,
                is_late=lambda place: not candidate.is_compiled and self.is_late(place),
            )
            took = time.perf_counter() - started
        self.warm_up_s.append(self.budget.measure_spent() - spent)
        candidate.row.error = error
        if not error:
            ms = steps.clock.read_ms()
            candidate.step_s = self.processes.decide_together(max, statistics.fmean(ms[-2:]) / 1000)
            candidate.overhead_s = self.processes.decide_together(max, took - sum(ms) / 1000)
            candidate.row.warmup_s = took
            self.shapes = steps.shapes

    def is_late(self, place: Any = None) -> bool:
        "Wait for the other processes, and return whether the seconds that were asked for are spent."
        return self.budget.asked is not None and self.budget.measure_spent(place) > self.budget.asked

    def those_in_time(self, waiting: list[Candidate]) -> list[Candidate]:
        """Return those of `waiting` that are to be tried: none where all before failed and used up the budget.

        Raise a `ValueError` where the budget is used up by what can train, or cannot hold the fewest rounds of all.
        """
        if self.budget.asked is None:
            return waiting
        warm = [candidate for candidate in self.remaining if candidate.step_s]
        if warm:
            spent = self.budget.measure_spent()
            check_holds_rounds(self.budget.asked, spent, warm, len(waiting), self.warm_up_s, self.device)
        elif self.is_late():
            for candidate in waiting:
                candidate.row.error = f"not tried, the budget of {self.budget.asked!r} seconds was used up"
            return []
        return waiting

    def check_any_remain(self) -> None:
        "Raise an error if no choice is left: what the Learner itself raised, at first in the format that it has."
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

    def time_rounds(self) -> None:
        n_rounds, spent, took = 0, self.budget.measure_spent(), 0.0
        while n_rounds < MIN_ROUNDS or spent + 0.5 * took < self.budget.seconds:  # the nearest number of rounds
            for candidate in self.remaining[:: -1 if n_rounds % 2 else 1]:  # to and fro, for drift to favour none
                self.tell(str(candidate.row.format))
                self.time(candidate)
            n_rounds += 1
            self.check_any_remain()
            took = self.budget.measure_spent() - spent
            spent += took

    def time(self, candidate: Candidate) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the warm-up gave them
            n_lead = candidate.n_lead(self.device)
            steps, error = self.fits.train(candidate, Round, n_lead=n_lead, n=self.n_steps)
        row = candidate.row
        if error:
            row.error = error
            row.samples.clear()
            return
        row.samples.append(self.processes.decide_together(max, steps.read_step_ms()))
        if steps.peak_bytes is not None and not candidate.has_graphs:
            peak_bytes = self.processes.decide_together(max, self.memory.take_peak(steps.peak_bytes))
            row.peak_bytes = max(row.peak_bytes or 0, peak_bytes)

    def tell(self, comment: str) -> None:
        self.progress(self.budget.measure_spent() / self.budget.seconds, comment)

    def finish(
        self,
        start: TrainFormat,  # with which the others are compared
    ) -> FormatTimings:
        "Profile the best candidate, and return the result."
        rows = [candidate.row for candidate in self.candidates]
        for row in rows:
            row.items_per_s = 1000 * self.n_items / statistics.fmean(row.samples) if row.samples else nan
        timings = FormatTimings(
            rows=[candidate.row for candidate in self.candidates if candidate.is_choice],
            start=start,
            data_items_per_s=self.data_items_per_s,
            model=type(uncompiled(get_model(self.learn.model))).__name__,
            device=device_name(self.device),
            shapes=self.shapes,
            n_steps=self.n_steps,
        )
        for row in rows:
            row.speedup = timings.row(start).ms / row.ms
        best = next(candidate for candidate in self.candidates if candidate.row is timings.best_row)
        timings.busy = self.measure_busy(best)
        return timings

    def measure_busy(self, candidate: Candidate) -> float | None:
        "Train with the profiler, and return the share of a step in which the GPU runs any kernel; None if not known."
        if self.device.type != "cuda":
            return None
        with ExitStack() as profiling:
            n_lead = candidate.n_lead(self.device)
            steps, error = self.fits.train(candidate, ProfiledStep, n_lead=n_lead, profiling=profiling)
        busy = 0.0 if error else gpu_shares(steps.profiler.events(), candidate.row.ms / 1000).busy
        return self.processes.decide_together(max, busy) or None  # without any kernel the profiler does not work here
