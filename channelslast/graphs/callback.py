"CUDA graphs on fastai's `Learner`."

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from warnings import warn

from fastai.learner import Learner
from fastai.torch_core import num_distrib
from torch.nn.parallel import DistributedDataParallel

from channelslast.fit import FIT_GOES_ON, LeanCallback
from channelslast.graphs.module import GraphedModule
from channelslast.graphs.replicas import Replicas

__all__ = ["CudaGraph"]


class CudaGraph(LeanCallback):
    """Train by replaying CUDA graphs of the model's forward and backward pass, see `GraphedModule`.

    Loss, metrics, the scaling of mixed precision, the optimizer and all callbacks run as they are. The graphs, and
    their memory, are given up when the fit ends; after an error outside of its batches, when the next one begins.

    In distributed training each process replays its own; gradients are sent when the backward pass is done. Where one
    process cannot capture, all train as they are.
    """

    order = 1000  # after all that makes a batch
    run_valid = False

    def __init__(self):
        self.graphed: GraphedModule | None = None
        self.replicas: Replicas | None = None  # that share gradients here, and not in DistributedDataParallel
        self._reason: str | None = None
        self._is_agreed = self._is_cancelled = False

    @property
    def reason(self) -> str | None:
        "Why the fit, or else the last one, uses no graphs, or stopped using them; None if it does use them."
        return self._reason if self.graphed is None else self.graphed.reason

    def before_fit(self):
        self._release()  # graphs of a fit that was interrupted

    def before_train(self):
        if self.epoch == 0:
            self._reason = None

    def around_batches(self) -> Any:
        "What the batches of an epoch run in: the processes share the gradients of a backward pass."
        return self._shared_gradients()

    @contextmanager
    def _shared_gradients(self) -> Iterator[None]:
        learn = self.learn
        backward = learn._backward

        def backward_and_share():
            backward()
            if self.replicas is not None:
                self.replicas.average_gradients()

        try:
            if num_distrib() > 1 and self.training:
                learn._backward = backward_and_share
            yield
        finally:
            if vars(learn).get("_backward") is backward_and_share:
                del learn._backward

    def before_batch(self):
        self._is_cancelled = False
        if num_distrib() > 1 and not self._is_ready_in_all_processes():
            return
        module = _module_in(self.learn.model)
        if self.graphed is None or self.graphed.module is not module:
            self._release()
            self.graphed = GraphedModule(module)
        self.learn.model = _OneCall(self.learn, self.graphed, self.replicas)

    def _is_ready_in_all_processes(self) -> bool:
        "Whether all processes replay graphs; in the first two batches of a fit they ask each other."
        if self._reason is not None:
            return False
        if not isinstance(self.model, DistributedDataParallel):
            self._stop("the processes share gradients without DistributedDataParallel")
        elif self.replicas is None or self.replicas.wrapper is not self.model:
            self._release()
            replicas, self.graphed, self._is_agreed = Replicas(self.model), GraphedModule(self.model.module), False
            self._keep_strides(False)  # by hooks, which a capture would contain
            reason = replicas.agree(replicas.reason or self.graphed.why_not(self.xb))
            if reason is None:
                self.replicas = replicas
            else:
                self._stop(reason)
        elif not self._is_agreed:
            self._is_agreed = True
            if reason := self.replicas.agree(self.graphed.reason):
                self.learn.model = self.replicas.new_wrapper()
                self._stop(reason, is_told=self.graphed.reason is not None)
        return self._reason is None

    def _stop(self, reason: str, is_told: bool = False):
        "Train as without this callback for the rest of the fit."
        self._release()
        self._reason = reason
        self._keep_strides(True)
        if not is_told:
            warn(f"No CUDA graph, the model runs as it is: {reason}")

    def _keep_strides(self, is_on: bool):
        "Have `ChannelsLast` put its hooks on the parameters, or take them off."
        for cb in self.learn.cbs:
            if hasattr(type(cb), "keep_strides"):
                cb.keep_strides() if is_on else cb.remove_hooks()

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
            self.learn.model.put_back()

    def _release(self):
        self.replicas = None
        if self.graphed is not None:
            self._reason = self.graphed.reason
            self.graphed.release()
            self.graphed = None


def _module_in(model: Any) -> Any:
    return model.module if isinstance(model, DistributedDataParallel) else model


class _OneCall:
    "Stands in for the model of a Learner in its next call, and puts the model back before it."

    def __init__(self, learn: Learner, graphed: GraphedModule, replicas: Replicas | None):
        self.learn, self.graphed, self.replicas, self.model = learn, graphed, replicas, learn.model

    def put_back(self) -> None:
        self.learn.model = self.model

    def __call__(self, *inputs: Any) -> Any:
        self.put_back()
        if self.replicas is not None:
            self.replicas.send_buffers()
        return self.graphed(*inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["model"], name)


# fastai's own methods, in which backward pass, step and `zero_grad` follow each other
_OWN_METHODS = {name: vars(Learner)[name] for name in ("_do_grad_opt", "_do_one_batch", "one_batch")}


def _sets_gradients_to_zero(learn: Learner) -> bool:
    "Whether a batch that was not cancelled ends with all gradients at zero, as by fastai's own methods."
    if any(getattr(type(learn), name) is not own or name in vars(learn) for name, own in _OWN_METHODS.items()):
        return False
    zero_grad = getattr(type(learn.opt), "zero_grad", None)  # an OptimWrapper has none: PyTorch's sets them to None
    is_known = getattr(zero_grad, "__module__", None) in ("fastai.optimizer", "channelslast.optimizer")
    return is_known and "zero_grad" not in vars(learn.opt)
