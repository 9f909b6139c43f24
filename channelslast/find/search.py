"The search: stage by stage warm candidates up, then time the hopeful ones in rounds that go to and fro between them."

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
from channelslast.find.batches import load_batches, more_workers, n_items_in
from channelslast.find.budget import Budget
from channelslast.find.candidates import Candidate, new_candidate
from channelslast.find.choice import is_clear
from channelslast.find.distributed import Processes
from channelslast.find.evidence import MIN_ROUNDS
from channelslast.find.fits import Fits
from channelslast.find.memory import GpuMemory
from channelslast.find.plan import (
    LIMIT_SHARE,
    NEAR,
    ROUNDS_SHARE,
    choose_n_steps,
    indispensable,
    is_enough,
    is_worth_waiting,
    round_s,
    split_by_time,
)
from channelslast.find.result import FormatTimings
from channelslast.find.stages import HOPELESS, Stage, able, fastest
from channelslast.find.steps import OptimizerSteps, ProfiledStep, Round, WarmUp
from channelslast.find.timing import counted
from channelslast.formats import TrainFormat, uncompiled
from channelslast.optimizer import fused_form
from channelslast.summary.gpu import busy_seconds

N_OPTIMIZER_STEPS = 3  # in which the optimizer is timed
UNSTEADY = 1.2  # times the shortest step


class Search:
    "Times the candidates of its stages on a Learner that its caller restores."

    def __init__(
        self,
        learn: Learner,
        stages: list[Stage],
        comparisons: list[Candidate],  # timed beside them, but no choices
        start: TrainFormat,  # with which the others are compared
        budget: Budget,
        processes: Processes,
        progress: Callable[[float, str], None],  # takes a share between 0 and 1, and a comment
        put_tensors_back: Callable[[], None],
        collect_garbage: Callable[[], None],
    ):
        self.learn, self.stages, self.comparisons, self.start = learn, stages, comparisons, start
        self.budget, self.processes = budget, processes
        self.progress, self.put_tensors_back, self.collect_garbage = progress, put_tensors_back, collect_garbage
        self.device = training_device(learn)
        self.memory = GpuMemory(learn, self.device)
        self.candidates: list[Candidate] = []
        self.n_steps, self.round_s, self.before_rounds_s = 1, nan, nan
        self.shapes: list[tuple[int, ...]] = []

    def run(self) -> None:
        self.load()
        for stage in self.stages:
            for candidate in self.new_candidates(stage):
                self.candidates.append(candidate)
                if not candidate.row.error:
                    self.try_in_time(candidate, stage)
        self.check_any_remain()
        self.time_rounds(self.choose_finalists())

    def load(self) -> None:
        failure = None
        try:
            batches, items_per_s = load_batches(self.learn, min(1.0, self.budget.seconds / 10))
        except Exception as raised:
            failure = raised
        reason = self.processes.report_failure(failure, is_patient=True)
        if reason:
            raise failure or RuntimeError(reason)
        self.data_items_per_s = self.processes.decide_together(sum, items_per_s)
        self.n_items = self.processes.decide_together(sum, n_items_in(batches[0]))
        self.fits = Fits(self.learn, batches, self.processes, self.memory, self.put_tensors_back, self.collect_garbage)

    def new_candidates(self, stage: Stage) -> list[Candidate]:
        "Return the candidates of `stage` that no stage before had, and in the first stage the comparisons."
        seen = {candidate.row.format for candidate in self.candidates if candidate.is_choice}
        formats = dict.fromkeys(stage.propose(self.candidates))
        now = self.learn.train_format
        candidates = [
            new_candidate(fmt, self.device, fmt == self.start, self.fits.put_format_back if fmt == now else None)
            for fmt in formats
            if fmt not in seen
        ]
        return candidates if self.candidates else [*candidates, *self.comparisons]

    def try_in_time(self, candidate: Candidate, stage: Stage) -> None:
        "Warm `candidate` up if there is time for it."
        if self.lacks_time(candidate, stage):
            candidate.is_reached = candidate.row.is_tried = False
            candidate.row.error = "not reached in time"
            return
        self.tell(f"{stage.name}: {candidate.row.format}")
        self.warm_up(candidate)
        if self.is_unsteady(candidate):
            self.look_again(candidate)
        is_hopeful = candidate in able(self.candidates) and not candidate.row.note
        if (
            is_hopeful
            and candidate.is_eager
            and candidate.step_s <= HOPELESS * fastest(self.candidates).step_s
            and self.budget.measure_left() > (candidate.n_lead(self.device) + 1) * candidate.step_s
        ):
            candidate.busy_s = self.measure_busy(candidate)

    def is_unsteady(self, candidate: Candidate) -> bool:
        """Wait for the other processes, and return whether to look at the steps once more.

        On a CPU others, or memory that is touched for the first time, slow them down.
        """
        ms = candidate.row.samples
        if self.device.type != "cpu" or candidate.row.note or not ms:
            return False
        decide = self.processes.decide_together
        if not decide(max, max(ms) > UNSTEADY * candidate.least_ms):
            return False
        needed_s = 2 * decide(max, candidate.row.warmup_s) + ROUNDS_SHARE * self.budget.seconds
        return self.budget.measure_left() > needed_s

    def look_again(self, candidate: Candidate) -> None:
        "Warm `candidate` up once more, and keep the steps of the shorter ones."
        row, first_steps_s, step_s = candidate.row, candidate.first_steps_s, candidate.step_s
        samples, warmup_s = row.samples, row.warmup_s
        self.warm_up(candidate)
        if row.error:
            return
        candidate.first_steps_s, row.warmup_s = first_steps_s, warmup_s
        if row.note or candidate.step_s > step_s:
            candidate.step_s, row.samples, row.note = step_s, samples, None

    def lacks_time(self, candidate: Candidate, stage: Stage) -> bool:
        "Wait for the other processes, and return whether `candidate` would take the time of what is needed after it."
        is_first = candidate is self.candidates[0]
        if not able(self.candidates) and (is_first or candidate.is_own):  # a budget of any size tells whether it trains
            return False
        needed_s = 0.0
        others = [other for other in self.candidates if other is not candidate]
        is_needed = candidate.is_needed or all(other.is_needed for other in others)  # the first choice
        if not is_needed:
            is_own_tried = any(other.is_own for other in self.candidates)
            eager = [other.first_steps_s for other in self.candidates if other.is_eager]
            first_steps_s = max(eager) if stage.is_first and eager else 0.0
            needed_s = (1 if is_own_tried else 2) * first_steps_s
            if not candidate.is_compiled:  # what the user asks for is tried also where no time is left for rounds
                later = self.stages[self.stages.index(stage) + 1 :]
                needed_s += (ROUNDS_SHARE + sum(stage.share for stage in later)) * self.budget.planned
                if candidate.has_graphs:
                    needed_s += max(other.capture_s for other in self.candidates)
        return self.budget.measure_left(is_needed=is_needed) <= needed_s

    def warm_up(self, candidate: Candidate) -> None:
        started = time.perf_counter()
        with self.budget.not_counting() if candidate.is_compiled else nullcontext(), warnings.catch_warnings():
            if not candidate.is_own:
                warnings.filterwarnings("ignore", "No CUDA graph")  # it becomes the row's error
            steps, error = self.fits.train(
                candidate,
                WarmUp,
                processes=self.processes,
                is_late=lambda place: self.is_late(candidate, place),
            )
            took = time.perf_counter() - started
        candidate.row.error = error
        if error:
            return
        decide = self.processes.decide_together
        steady_ms = [decide(max, ms) for ms in steps.read_steady_ms()]
        all_ms = steps.clock.read_ms()
        ms = steady_ms or all_ms
        candidate.step_s = decide(max, (statistics.median(ms) if len(ms) > 2 else min(ms)) / 1000)
        candidate.least_ms = min(all_ms)
        candidate.first_steps_s = decide(max, max(0.0, took - len(steady_ms) * candidate.step_s))
        candidate.overhead_s = decide(max, took - sum(all_ms) / 1000)
        candidate.row.warmup_s, candidate.row.samples = took, steady_ms
        candidate.row.note = f"{counted(steps.n_steps, 'step')}, the time was up" if steps.is_cut else None
        if self.device.type == "cuda" and candidate.is_eager:
            self.budget.first_steps += candidate.first_steps_s
        self.shapes = steps.shapes

    def is_late(self, candidate: Candidate, place: Any) -> bool:
        "Wait for the other processes, and return whether to end the warm-up of `candidate` for lack of time."
        # The default waits for what all others are compared with, and is longer then
        left = self.budget.measure_left(place, candidate.is_needed)
        return left <= 0 and not candidate.is_compiled

    def check_any_remain(self) -> None:
        "Raise an error if no choice is left: what the Learner itself raised, at first in the format that it has."
        choices = [candidate for candidate in self.candidates if candidate.is_choice]
        if not all(candidate.row.error for candidate in choices):
            return
        reasons = "; ".join(f"{candidate.row.format}: {candidate.row.error}" for candidate in choices)
        words = f"No format can train this Learner. {reasons}"
        choices.sort(key=lambda candidate: not candidate.is_own)
        raised = next((candidate.raised for candidate in choices if candidate.raised), None)
        if raised is None:
            raise RuntimeError(words)
        raised.add_note(f"channelslast: {words}")
        raise raised

    def choose_finalists(self) -> list[Candidate]:
        "Return those to time in rounds, and note with the others what was seen of them."
        best_s, finalists = fastest(self.candidates).step_s, []
        for candidate in self.candidates:
            row = candidate.row
            if row.error or row.note:
                continue
            # a round of one with a CUDA graph costs a capture
            if candidate.is_needed or candidate.step_s <= (NEAR if candidate.has_graphs else HOPELESS) * best_s:
                finalists.append(candidate)
            else:
                longer = candidate.step_s / best_s
                row.note = f"{counted(len(row.samples), 'step')}: {longer:.1f} times as long as the fastest"
        return finalists

    def time_rounds(self, finalists: list[Candidate]) -> None:
        "Time rounds while there is time. Finalists for which there is none keep their first steps."
        kept = max(LIMIT_SHARE * self.budget.seconds, self.limits_s(fastest(self.candidates)))
        self.before_rounds_s = self.budget.measure_spent()
        self.round_s = round_s(finalists, 1, self.device) if finalists else nan
        is_worth_it, least = is_worth_waiting(finalists), indispensable(finalists, self.start)
        needed_s = MIN_ROUNDS * round_s(least, 1, self.device) if is_worth_it else 0.0
        left = self.budget.extend_to(needed_s + kept) - kept
        if left < needed_s:
            kept = 0.0  # what limits the step is told where there is time for it
            left = self.budget.extend_to(needed_s)
        timed, left_out = split_by_time(finalists, least, left, self.device)
        for candidate in left_out:
            candidate.row.note = f"{counted(len(candidate.row.samples), 'step')}, no time for rounds"
        if not timed:
            return
        finalists = timed
        self.n_steps = choose_n_steps(finalists, left, self.device)
        self.round_s = round_s(finalists, self.n_steps, self.device)
        for candidate in finalists:
            candidate.row.first_samples, candidate.row.samples = candidate.row.samples, []
        n_rounds = 0
        is_asked = self.budget.asked is not None
        while not is_enough(n_rounds, is_asked, self.is_clear) and left > 0.9 * self.round_s:
            for candidate in finalists[:: -1 if n_rounds % 2 else 1]:  # to and fro, for drift to favour none
                if not candidate.row.error:
                    self.tell(f"rounds: {candidate.row.format}")
                    self.time(candidate)
            n_rounds += 1
            self.check_any_remain()
            before, left = left, self.budget.measure_left() - kept
            self.round_s = before - left
            if n_rounds < MIN_ROUNDS and is_worth_it:
                left = self.budget.extend_to((MIN_ROUNDS - n_rounds) * self.round_s + kept) - kept

    def is_clear(self) -> bool:
        rows = [candidate.row for candidate in self.candidates if candidate.is_choice]
        return is_clear(rows, next(row for row in rows if row.format == self.start))

    def time(self, candidate: Candidate) -> None:
        steps, error = self.train_again(candidate, Round, n=self.n_steps)
        row = candidate.row
        if error:
            row.error = error
            row.samples.clear()
            return
        row.samples.append(self.processes.decide_together(max, steps.read_step_ms()))
        if steps.peak_bytes is not None and not candidate.has_graphs:
            peak_bytes = self.processes.decide_together(max, self.memory.take_peak(steps.peak_bytes))
            row.peak_bytes = max(row.peak_bytes or 0, peak_bytes)

    def train_again(
        self,
        candidate: Candidate,
        new_steps: Callable[..., Round],
        **kwargs: Any,  # its options
    ) -> tuple[Any, str | None]:
        "Train `candidate`, which is warmed up, as `Fits.train` does."
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the warm-up gave them
            return self.fits.train(candidate, new_steps, n_lead=candidate.n_lead(self.device), **kwargs)

    def tell(self, comment: str) -> None:
        best = fastest(self.candidates)
        if best is not None:
            comment += f" (best so far: {best.row.format}, {1000 * best.step_s:.1f} ms)"
        self.progress(self.budget.measure_spent() / self.budget.seconds, comment)

    def finish(self) -> FormatTimings:
        "Measure what limits the best candidate, and return the result."
        for candidate in self.candidates:
            candidate.row.items_per_s = 1000 * self.n_items / candidate.row.ms
            if not candidate.is_reached:
                candidate.row.error = f"not reached in {self.budget.seconds:.3g} seconds"
        timings = FormatTimings(
            rows=[candidate.row for candidate in self.candidates if candidate.is_choice],
            start=self.start,
            data_items_per_s=self.data_items_per_s,
            more_workers=more_workers(self.learn),
            model=type(uncompiled(get_model(self.learn.model))).__name__,
            device=device_name(self.device),
            shapes=self.shapes,
            n_steps=self.n_steps,
            before_rounds_s=self.before_rounds_s,
            round_s=self.round_s,
        )
        for candidate in self.comparisons:
            candidate.row.speedup = timings.row(self.start).ms / candidate.row.ms
        best = next(candidate for candidate in self.candidates if candidate.row is timings.best_row)
        timings.has_fused_form = fused_form(self.learn, self.device)
        if not best.row.error and best.row.samples and self.budget.measure_left() > self.limits_s(best):
            busy_s = self.measure_busy(best)
            timings.busy = busy_s and min(1.0, 1000 * busy_s / best.row.ms)
            timings.optimizer_share = self.measure_optimizer_share(best)
        return timings

    def limits_s(self, candidate: Candidate) -> float:
        "Return the seconds that it takes to find out what limits `candidate`, about."
        n_fits = 2 if self.device.type == "cuda" else 1
        return n_fits * (candidate.capture_s + (candidate.n_lead(self.device) + N_OPTIMIZER_STEPS) * candidate.step_s)

    def measure_busy(self, candidate: Candidate) -> float | None:
        "Train with the profiler, and return the seconds of a step in which the GPU runs any kernel; None if not known."
        if self.device.type != "cuda":
            return None
        with ExitStack() as profiling:
            steps, error = self.train_again(candidate, ProfiledStep, profiling=profiling)
        busy = 0.0 if error else busy_seconds(steps.profiler.events())
        return self.processes.decide_together(max, busy) or None  # without any kernel the profiler does not work here

    def measure_optimizer_share(self, candidate: Candidate) -> float | None:
        "Train, and return the share of a step that the optimizer takes; None if that fails."
        steps, error = self.train_again(candidate, OptimizerSteps, n=N_OPTIMIZER_STEPS)
        share = 0.0 if error else min(1.0, steps.read_step_ms() / candidate.row.ms)
        return self.processes.decide_together(max, share) or None
