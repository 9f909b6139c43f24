"`Learner.format_summary`."

import sys
from typing import Any

import torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.learner import Learner
from fastai.torch_core import get_model
from fastcore.basics import patch
from fastcore.foundation import L

from channelslast.devices import training_device
from channelslast.fit import FitDone, without_batches
from channelslast.graphs import CudaGraph
from channelslast.restore import unchanged_learner
from channelslast.summary.observe import Observer, choose_profile
from channelslast.summary.result import FormatSummary


@patch
def format_summary(
    self: Learner,
    profile: bool | None = None,  # time the GPU's kernels too; None: on CUDA
) -> FormatSummary:
    """Run one training step on a batch of the training data, and tell what each operator does to the memory format.

    The step is the Learner's own: its callbacks, precision and loss, forward and backward, without that of the
    optimizer. Afterwards the Learner is as before, also when the step raises; trackers and loggers write nothing. (Data
    that come as a stream, without a way back, go on one batch later.) A model that is compiled, or replayed as a CUDA
    graph, runs as it was written.

    Where the model calls `.view` on channels last activations the summary says so in `error`. Any other exception is
    the Learner's own. Raises `ValueError` if there is no batch or a callback cancels it, for lazy parameters, and for
    `profile=True` without a GPU.
    """
    observer = Observer(choose_profile(profile, training_device(self)))
    with unchanged_learner(self), torch.compiler.set_stance("force_eager"), observer.during_step:
        self.cbs = L(cb for cb in self.cbs if not isinstance(cb, CudaGraph))  # in a replay there is nothing to watch
        try:
            self.fit(1, cbs=_ObservedSteps(observer))
        except FitDone:
            pass
        except RuntimeError as error:
            if not observer.stopped_by(error):
                raise
    if observer.tracer is None:
        raise ValueError("A callback of the Learner cancelled the fit or its first batch: there was no step to trace")
    return observer.summary()


class _ObservedSteps(Callback):
    "Repeat the first batch of a fit for an observer, without a step of the optimizer, and end the fit."

    order = float("inf")  # `before_batch` after the callbacks that make the batch

    def __init__(self, observer: Observer):
        self.observer = observer

    def before_train(self):
        self.learn.dl = [_first_batch(self.dl)] * self.observer.n_steps

    def before_batch(self):
        self.observer.begin(get_model(self.model), self.xb)

    def before_backward(self):
        self.observer.claim_loss(self.learn.loss_grad)

    def after_backward(self):
        raise CancelBatchException()

    def after_batch(self):
        self.observer.end()
        if self.iter == self.observer.n_steps - 1:
            raise FitDone()


def _first_batch(dl: Any) -> Any:
    "Return a batch of `dl`, loaded by this process for itself."
    distributed = sys.modules.get("fastai.distributed")  # cannot be imported without Accelerate
    if distributed and isinstance(dl, distributed.DistributedDL):
        dl = dl.dl  # that of this process alone
    if getattr(dl, "n", None) is not None and len(dl) == 0:
        raise without_batches(dl)
    if hasattr(dl, "one_batch"):
        return dl.one_batch()
    for batch in dl:
        return batch
    raise without_batches(dl)
