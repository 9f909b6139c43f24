"Read the loss of a batch while the GPU goes on."

from functools import partial

import torch
from fastai.learner import AvgSmoothLoss, Learner
from fastai.torch_core import maybe_gather, num_distrib

__all__ = ["EarlyLoss"]


class EarlyLoss:
    """The loss of a batch, on its way to the CPU from before the backward pass on.

    fastai's Recorder reads it after the step, and would wait there until the GPU is done with everything. In
    distributed training the Recorder gathers it first, which is done here instead, in the same way.
    """

    def __init__(
        self,
        learn: Learner,  # before the backward pass, on a GPU
    ):
        self.loss = learn.loss
        loss = learn.loss.detach()
        if num_distrib() > 1:
            loss = maybe_gather(loss.mean())
        self.copy = loss.to("cpu", non_blocking=True)
        self.copied = torch.cuda.current_stream(loss.device).record_event()

    def give(
        self,
        learn: Learner,  # after the batch
    ) -> None:
        "Wait for the copy, and let the Recorder take that; unless a callback has put another loss in its place."
        if learn.loss is not self.loss:
            return
        self.copied.synchronize()
        if num_distrib() <= 1:
            learn.loss = self.copy
            return
        smooth_loss = getattr(vars(learn).get("recorder"), "smooth_loss", None)
        if type(smooth_loss) is AvgSmoothLoss:
            smooth_loss.accumulate = partial(self._accumulate, smooth_loss)

    def _accumulate(self, smooth_loss: AvgSmoothLoss, learn: Learner) -> None:
        "Do, once, what the method of the class does, without gathering."
        del smooth_loss.accumulate
        if learn.loss is not self.loss:
            smooth_loss.accumulate(learn)
            return
        smooth_loss.count += 1
        smooth_loss.val = torch.lerp(self.copy, smooth_loss.val, smooth_loss.beta)
