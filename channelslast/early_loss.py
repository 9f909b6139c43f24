"Read the loss of a batch while the GPU goes on."

from functools import partial

import torch
from fastai.learner import AvgSmoothLoss, Learner
from fastai.torch_core import maybe_gather, num_distrib

from channelslast.cpu_copy import CpuCopy
from channelslast.fit import LeanCallback

__all__ = ["EarlyLoss", "ReadsLossEarly"]


class EarlyLoss:
    """The loss of a batch, on its way to the CPU from before the backward pass on.

    fastai's Recorder reads it after the step, and would wait there until the GPU is done with everything. In
    distributed training the Recorder gathers it first, which is done here instead, in the same way.
    """

    def __init__(
        self,
        learn: Learner,  # before the backward pass
    ):
        self.loss = learn.loss
        self.smooth_loss = _smooth_loss(learn) if num_distrib() > 1 else None
        loss = learn.loss.detach()
        self.copy = CpuCopy(loss if self.smooth_loss is None else maybe_gather(loss.mean()))

    def give(
        self,
        learn: Learner,  # after the batch
    ) -> None:
        "Let the Recorder take the copy, and wait for that; unless a callback has put another loss in its place."
        if learn.loss is not self.loss:
            return
        if num_distrib() <= 1:
            learn.loss = self.copy.wait()
        elif self.smooth_loss is not None:
            self.smooth_loss.accumulate = partial(self._accumulate, self.smooth_loss)

    def _accumulate(self, smooth_loss: AvgSmoothLoss, learn: Learner) -> None:
        "Do, once, what the method of the class does, without gathering."
        del smooth_loss.accumulate
        if learn.loss is not self.loss:
            smooth_loss.accumulate(learn)
            return
        smooth_loss.count += 1
        smooth_loss.val = torch.lerp(self.copy.wait(), smooth_loss.val, smooth_loss.beta)


def _smooth_loss(learn: Learner) -> AvgSmoothLoss | None:
    "What the Recorder of `learn` averages losses with, if it is fastai's own."
    smooth_loss = getattr(vars(learn).get("recorder"), "smooth_loss", None)
    return smooth_loss if type(smooth_loss) is AvgSmoothLoss else None


class ReadsLossEarly(LeanCallback):
    "Base of callbacks that have the Recorder take the loss from an `EarlyLoss`, where the loss is on a GPU."

    reads_loss = True  # one callback on a Learner does
    early_loss: EarlyLoss | None = None

    def before_backward(self):
        if self.reads_loss and self.learn.loss.is_cuda:
            self.early_loss = EarlyLoss(self.learn)

    def after_batch(self):
        early_loss, self.early_loss = self.early_loss, None
        if early_loss is not None:
            early_loss.give(self.learn)

    def after_exception(self, error: BaseException):
        "Leave the Recorder as it is without this, also where it did not take what `EarlyLoss.give` gave."
        self.early_loss = None
        smooth_loss = _smooth_loss(self.learn)
        if smooth_loss is not None:
            vars(smooth_loss).pop("accumulate", None)
