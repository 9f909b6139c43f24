"Training steps of a Learner that are timed: callbacks that repeat a few batches, mark the time and end the fit."

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from channelslast.find.batches import Endless, shapes_in
from channelslast.find.clock import Clock, wait_for
from channelslast.find.distributed import Processes
from channelslast.fit import FitDone, LeanCallback

NO_NUMBER = "the loss is"  # begins the error of a loss that is nan or infinite
MOST_CANCELLED = 12  # batches without a backward pass, before the first that has one
MOST_WARM_UP = 12  # steps
MORE_MS = 500  # milliseconds of steady steps after these, four at most


class TimedSteps(LeanCallback):
    "Train on the same few batches, and end the fit when there are enough steps. `error` is None if that went well."

    order = float("inf")  # after all that belongs to a step

    def __init__(
        self,
        batches: list[Any],
        device: torch.device,
        scaler_state: dict[str, Any],  # of the GradScaler after the last fit
    ):
        self.batches, self.scaler_state = batches, scaler_state
        self.clock = Clock(device)
        self.error: str | None = "a callback of the Learner cancelled the fit before it had trained enough steps"
        self.shapes: list[tuple[int, ...]] = []
        self.n_begun = self.n_backward = self.n_cancelled = self.n_steps = 0

    @property
    def place(self) -> tuple[int, int]:
        "How far the fit got, in what a process trains together with others."
        return self.n_begun, self.n_backward

    def before_fit(self):
        scaler = vars(self.learn).get("scaler")  # of the Learner, which asks the model for what it has not
        if scaler is not None and self.scaler_state:
            scaler.load_state_dict(self.scaler_state)  # else each round would begin with steps that overflow

    def before_train(self):
        self.learn.dl = Endless(self.batches, self.learn.dl)
        self.clock.mark()

    def before_batch(self):
        self.n_begun += 1
        self.shapes = self.shapes or shapes_in(self.xb)

    def before_backward(self):
        self.n_backward += 1

    def after_batch(self):
        if not self.n_backward:  # a callback cancels the first batches
            self.n_cancelled += 1
            if self.n_cancelled == MOST_CANCELLED:
                self.finish()
            return
        self.n_steps += 1
        self.mark()
        if self.has_enough():
            self.finish()

    def mark(self):
        "Mark the time of the step that has just ended, if it is wanted."
        raise NotImplementedError

    def has_enough(self) -> bool:
        "Whether the fit ends after the steps so far."
        raise NotImplementedError

    def finish(self):
        scaler = vars(self.learn).get("scaler")
        self.scaler_state = scaler.state_dict() if scaler is not None else {}
        loss = torch.as_tensor(self.learn.loss).detach()
        self.error = None
        if not torch.isfinite(loss).all():
            self.error = f"{NO_NUMBER} {float(loss.sum())}"
        elif not self.n_backward:
            self.error = "a callback of the Learner cancelled every batch before its backward pass"
        raise FitDone()

    def before_validate(self):
        raise FitDone()  # a callback cancelled the training


class WarmUp(TimedSteps):
    "Time each step, until one is hardly faster than the one before; then a few more, without waiting for each."

    def __init__(
        self,
        *args: Any,
        processes: Processes,
        is_late: Callable[[Any], bool],  # takes the place in the fit; asks all processes whether to end early
    ):
        super().__init__(*args)
        self.processes, self.is_late = processes, is_late
        self.n_more = 0
        self.n_first: int | None = None  # steps until they were steady
        self.is_cut = False  # by the lack of time

    def mark(self):
        self.clock.mark()

    def has_enough(self) -> bool:
        if self.n_first is None:
            ms = self.clock.read_ms()
            is_steady = len(ms) >= 3 and ms[-1] > 0.9 * ms[-2]
            is_steady = self.processes.decide_together(min, is_steady, self.place)
            if is_steady or len(ms) >= MOST_WARM_UP:
                longest = self.processes.decide_together(max, ms[-1], self.place)
                self.n_first, self.n_more = len(ms), max(1, min(4, int(MORE_MS / max(1e-3, longest))))
        elif self.n_steps == self.n_first + self.n_more:
            return True
        self.is_cut = self.is_late(self.place)
        return self.is_cut

    def read_steady_ms(self) -> list[float]:
        "Wait for the last step, and return the milliseconds of each steady one; none where the time was up before."
        ms = self.clock.read_ms()
        if self.n_first is None:
            return []
        # of long steps one alone, which others on the machine may hold up: with the one before, which was steady too
        return ms[self.n_first :] if self.n_more > 1 else ms[self.n_first - 1 :]


class Round(TimedSteps):
    """Time `n` steps in one go, after `n_lead` that are not timed, and take the GPU's peak memory in them.

    In one go, for what does not come in every step, as the optimizer's under gradient accumulation, to count.
    """

    def __init__(
        self,
        *args: Any,
        n_lead: int,
        n: int,
    ):
        super().__init__(*args)
        self.n_lead, self.n = n_lead, n
        self.peak_bytes: int | None = None

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

    def read_step_ms(self) -> float:
        "Wait for the last step, and return the milliseconds of a timed step, in the mean."
        return self.clock.read_ms()[-1] / self.n


class OptimizerSteps(Round):
    "Time what the optimizer takes of `n` steps, after `n_lead`: from the end of the backward pass to that of the step."

    def __init__(
        self,
        *args: Any,
        **kwargs: Any,  # of `Round`
    ):
        super().__init__(*args, **kwargs)
        self.spans: list[tuple[int, int]] = []  # from which mark to which
        self.begun: int | None = None

    def after_backward(self):
        self.begun = len(self.clock.marks)
        self.clock.mark()

    def after_step(self):
        if self.begun is not None and self.n_steps >= self.n_lead:
            self.spans.append((self.begun, len(self.clock.marks)))
        self.clock.mark()
        self.begun = None

    def mark(self):
        pass

    def read_step_ms(self) -> float:
        "Wait for the last step, and return the milliseconds of an optimizer's step, in the mean of all steps."
        ms = self.clock.read_ms()
        return sum(sum(ms[first:last]) for first, last in self.spans) / self.n


class ProfiledStep(Round):
    "Profile the GPU's kernels in one step."

    def __init__(
        self,
        *args: Any,
        n_lead: int,
        profiling: ExitStack,  # closes the profiler, also after an interrupt
    ):
        super().__init__(*args, n_lead=n_lead, n=1)
        self.profiling = profiling

    def mark(self):
        if self.n_steps == self.n_lead:
            wait_for(self.clock.device)
            profiler = torch.profiler.profile(activities=[ProfilerActivity.CUDA])
            self.profiler = self.profiling.enter_context(profiler)
        super().mark()
        if self.has_enough():
            wait_for(self.clock.device)
            self.profiling.close()
