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
    their memory, are given up when the fit ends; after an error outside of its batches, when the next one begins.
    """

    order = 1000  # after all that makes a batch
    run_valid = False

    def __init__(self):
        self.graphed: GraphedModule | None = None
        self._reason: str | None = None
        self._is_cancelled = False

    @property
    def reason(self) -> str | None:
        "Why the fit, or else the last one, uses no graphs, or stopped using them; None if it does use them."
        return self._reason if self.graphed is None else self.graphed.reason

    def before_fit(self):
        self._release()  # graphs of a fit that was interrupted

    def before_train(self):
        if self.epoch == 0:
            self._reason = None
            if num_distrib() > 1:
                self._reason = "in distributed training the processes share gradients during the backward pass"
                warn(f"No CUDA graph, the model runs as it is: {self._reason}")

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
        "Fastai has set the gradients to zero by now, but not in a cancelled batch, as of gradient accumulation."
        if self.graphed is not None and not self._is_cancelled and _sets_gradients_to_zero(self.learn):
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
            self._reason = self.graphed.reason
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


# fastai's own methods, in which backward pass, step and `zero_grad` follow each other
_OWN_METHODS = {name: vars(Learner)[name] for name in ("_do_grad_opt", "_do_one_batch", "one_batch")}


def _sets_gradients_to_zero(learn: Learner) -> bool:
    "Whether a batch that was not cancelled ends with all gradients at zero, as by fastai's own methods."
    if any(getattr(type(learn), name) is not own or name in vars(learn) for name, own in _OWN_METHODS.items()):
        return False
    zero_grad = getattr(type(learn.opt), "zero_grad", None)  # an OptimWrapper has none: PyTorch's sets them to None
    is_known = getattr(zero_grad, "__module__", None) in ("fastai.optimizer", "channelslast.optimizer")
    return is_known and "zero_grad" not in vars(learn.opt)
