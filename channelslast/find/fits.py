"Fits of a Learner in one candidate's format after the other, after each of which it is as before."

from collections.abc import Callable
from typing import Any

from fastai.learner import Learner

from channelslast.callback import convert_optimizer
from channelslast.devices import training_device
from channelslast.find.candidates import Candidate
from channelslast.find.distributed import EndedElsewhere, Processes
from channelslast.find.errors import drop_tensors
from channelslast.find.memory import GpuMemory
from channelslast.find.steps import NO_NUMBER, TimedSteps, WarmUp
from channelslast.fit import FitDone
from channelslast.graphs import CudaGraph
from channelslast.memory_format import memory_formats_kept
from channelslast.restore import unchanged_learner


class Fits:
    "Trains candidates for a few steps each."

    def __init__(
        self,
        learn: Learner,
        batches: list[Any],  # to train on
        processes: Processes,
        memory: GpuMemory,
        put_tensors_back: Callable[[], None],  # to what they were before the search
        collect_garbage: Callable[[], None],
    ):
        self.learn, self.batches, self.processes = learn, batches, processes
        self.memory, self.put_tensors_back, self.collect_garbage = memory, put_tensors_back, collect_garbage
        self.device = training_device(learn)
        self.put_model_back = memory_formats_kept(learn.model)

    def put_format_back(
        self,
        learn: Learner,
    ) -> None:
        "Leave `learn` as it was before the search, also in a precision for which `TrainFormat` has no name."
        self.put_model_back()
        convert_optimizer(learn.opt)

    def train(
        self,
        candidate: Candidate,
        new_steps: Callable[..., TimedSteps],  # a class of `find.steps`
        **kwargs: Any,  # its options
    ) -> tuple[Any, str | None]:
        "Train some steps; return them and why they failed, None if they did not. Wait for the other processes."
        steps, error = self._try_to_train(candidate, new_steps, **kwargs)
        if error:
            self.put_tensors_back()  # even at a learning rate of 0 a gradient that is no number spoils the weights
        if error and error.startswith(NO_NUMBER):  # maybe those that another candidate has spoilt
            steps, error = self._try_to_train(candidate, new_steps, **kwargs)
            self.put_tensors_back()
        return steps, error

    def _try_to_train(
        self,
        candidate: Candidate,
        new_steps: Callable[..., TimedSteps],
        **kwargs: Any,
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
                candidate.scaler_state = steps.scaler_state
                failure = steps.error or _why_no_graph(self.learn, candidate)
        except (Exception, EndedElsewhere) as raised:
            failure = raised
        error = self.processes.report_failure(failure, steps and steps.place)
        if isinstance(failure, Exception):
            drop_tensors(failure)
            candidate.raised = failure
        failure = None
        is_warm_up = new_steps is WarmUp
        # Graphs, and the frames of an error, stand in reference cycles. What a compiler has made stays, and is passed
        # over from then on.
        if error or candidate.has_graphs or (candidate.is_compiled and is_warm_up):
            self.collect_garbage()
        is_all = error is not None or candidate.has_graphs or is_warm_up
        self.memory.give_back(is_all)
        return steps, error


def _why_no_graph(learn: Learner, candidate: Candidate) -> str | None:
    "Why the model of a candidate with a CUDA graph ran as it is, None if it did not. The Learner's own may."
    if not candidate.row.format.cuda_graph or candidate.is_own:
        return None
    reasons = [cb.reason for cb in learn.cbs if isinstance(cb, CudaGraph)]
    return f"no CUDA graph: {reasons[0]}" if any(reasons) else None
