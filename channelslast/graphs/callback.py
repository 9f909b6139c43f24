"CUDA graphs on fastai's `Learner`."

from typing import Any
from warnings import warn

from fastai.learner import Learner
from fastai.torch_core import num_distrib

from channelslast.fit import FIT_GOES_ON, LeanCallback
from channelslast.graphs.module import GraphedModule

__all__ = ["CudaGraph"]


class CudaGraph(LeanCallback):
    """Train by replaying CUDA graphs of the model's forward and backward pass, see `GraphedModule`.

    Loss, metrics, the scaling of mixed precision, the optimizer and all callbacks run as they are. The graphs, and
    their memory, are given up when the fit ends.
    """

    order, run_valid = 1000, False  # after all that makes a batch

    def __init__(self):
        self.graphed: GraphedModule | None = None
        self.reason: str | None = None  # why the last fit did not use graphs, or did not go on to
        self._is_cancelled = False

    def before_fit(self):
        self._release()  # of a fit that was interrupted
        self.reason = None
        if num_distrib() > 1:
            self.reason = "in distributed training the processes share gradients during the backward pass"
            warn(f"No CUDA graph, the model runs as it is: {self.reason}")

    def before_batch(self):
        self._is_cancelled = False
        if num_distrib() > 1:
            return
        if self.graphed is None or self.graphed.module is not self.model:
            self._release()
            self.graphed = GraphedModule(self.model)
        self.learn.model = _OneCall(self.learn, self.graphed)

    def after_cancel_batch(self):
        self._put_model_back()
        self._is_cancelled = True

    def after_batch(self):
        "fastai has set the gradients to zero, unless the batch was cancelled, as for gradient accumulation."
        if self.graphed is not None and not self._is_cancelled and _is_own_step_fastais(self.learn):
            self.graphed.gradients_are_zero()

    def after_exception(self, error: BaseException):
        self._put_model_back()
        if not isinstance(error, FIT_GOES_ON):
            self._release()

    def after_fit(self):
        self._release()

    def _put_model_back(self):
        if isinstance(self.learn.model, _OneCall):
            self.learn.model = self.graphed.module

    def _release(self):
        if self.graphed is not None:
            self.reason = self.graphed.reason
            self.graphed.release()
            self.graphed = None


class _OneCall:
    "Stands in for the model of a Learner in its next call, and puts the model back before it."

    def __init__(self, learn: Learner, graphed: GraphedModule):
        self.learn, self.graphed = learn, graphed

    def __call__(self, *inputs: Any) -> Any:
        self.learn.model = self.graphed.module
        return self.graphed(*inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["graphed"].module, name)


def _is_own_step_fastais(learn: Learner) -> bool:
    "Whether backward pass, step and `zero_grad` follow each other as fastai has them, in no subclass's other way."
    cls = type(learn)
    return all(getattr(cls, name) is getattr(Learner, name) for name in ("_do_grad_opt", "_do_one_batch", "one_batch"))
