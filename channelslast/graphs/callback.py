"CUDA graphs on fastai's `Learner`."

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from warnings import warn

from fastai.learner import Learner
from fastai.torch_core import num_distrib
from torch.nn.parallel import DistributedDataParallel

from channelslast.fit import FIT_GOES_ON, LeanCallback
from channelslast.graphs.ground import has_sync_norm
from channelslast.graphs.module import GraphedModule
from channelslast.graphs.replicas import Replicas

__all__ = ["CudaGraph"]


class CudaGraph(LeanCallback):
    """Train by replaying CUDA graphs of the model's forward and backward pass, see `GraphedModule`.

    Loss, metrics, the scaling of mixed precision, the optimizer and all callbacks run as they are. The graphs, and
    their memory, are given up when the fit ends; after an error outside of its batches, when the next one begins.

    In distributed training each process replays its own; gradients are sent when the backward pass is done. Where one
    process cannot capture in the first batch, all train as they are.
    """

    order = 1000  # after all that makes a batch
    run_valid = False

    def __init__(self):
        self.graphed: GraphedModule | None = None
        # In distributed training: what shares the gradients in the place of DistributedDataParallel; whether the
        # processes have asked each other after the first batch; why all of them have stopped
        self.replicas: Replicas | None = None
        self._is_agreed, self._stopped = False, None
        self._reason: str | None = None
        self._is_cancelled = False

    @property
    def reason(self) -> str | None:
        "Why the fit, or else the last one, uses no graphs, or stopped using them; None if it does use them."
        return self._reason if self.graphed is None else self.graphed.reason

    def before_fit(self):
        self._release()  # graphs of a fit that was interrupted
        self._stopped = None

    def before_train(self):
        if self.epoch == 0:
            self._reason = None

    def around_batches(self) -> Any:
        "What the batches of an epoch run in: the processes share the gradients of a backward pass."
        return _backward_of(self.learn, _SharedBackward(self)) if num_distrib() > 1 and self.training else nullcontext()

    def before_batch(self):
        self._is_cancelled = False
        if num_distrib() > 1 and not self._is_ready_in_all_processes():
            return
        model = self.learn.model
        module = model if self.replicas is None else self.replicas.module
        if self.graphed is None or self.graphed.module is not module:
            self._release()
            self.graphed = GraphedModule(module)
        self.learn.model = _OneCall(self.learn, self.graphed, self.replicas)

    def _is_ready_in_all_processes(self) -> bool:
        "Whether all processes replay graphs: they ask each other before the first batch of a fit, and after it."
        model = self.learn.model
        if self._stopped is None and not isinstance(model, DistributedDataParallel):
            self._stop("the processes share gradients without DistributedDataParallel")
        elif self._stopped is None and (self.replicas is None or self.replicas.wrapper is not model):
            self._release()
            replicas, self.graphed, self._is_agreed = Replicas(model), GraphedModule(model.module), False
            self._keep_strides(False)  # by hooks, which a capture would contain
            reason = replicas.agree(replicas.reason or self.graphed.why_not(self.learn.xb), self.learn.xb)
            if reason is None:
                self.replicas = replicas
                self.graphed.captures_once = has_sync_norm(replicas.module)
                replicas.begin()
            else:
                self._stop(reason, replicas)
        elif self._stopped is None and not self._is_agreed:
            self._is_agreed = True
            if reason := self.replicas.agree(self.graphed.reason):
                self._stop(reason, self.replicas)
        return self._stopped is None

    def _stop(self, reason: str, replicas: Replicas | None = None):
        "Train as without this callback for the rest of the fit."
        is_told = self.graphed is not None and self.graphed.reason is not None
        self._release()
        self._reason = self._stopped = reason
        self._keep_strides(True)
        if replicas is not None and replicas.is_parted:
            self.learn.model = replicas.new_wrapper()
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
        if self.replicas is not None:
            self.replicas.end()
            self.replicas = None
        if self.graphed is not None:
            self._reason = self.graphed.reason
            self.graphed.release()
            self.graphed = None


class _OneCall:
    "Stands in for the model of a Learner in its next call, and puts the model back before it."

    def __init__(self, learn: Learner, graphed: GraphedModule, replicas: Replicas | None):
        self.learn, self.graphed, self.replicas, self.model = learn, graphed, replicas, learn.model

    def put_back(self) -> None:
        self.learn.model = self.model

    def __call__(self, *inputs: Any) -> Any:
        self.put_back()
        if self.replicas is not None:
            self.replicas.send_buffers(is_new=not self.graphed.n_graphs)
        return self.graphed(*inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["model"], name)


class _SharedBackward:
    "Stands in for `Learner._backward`: then the processes share the gradients."

    def __init__(self, cb: CudaGraph):
        self.cb, self.backward = cb, cb.learn._backward

    def __call__(self) -> None:
        self.backward()
        if self.cb.replicas is not None:
            self.cb.replicas.average_gradients()

    def __reduce__(self) -> tuple:
        "In a file, and in a copy of the Learner, fastai's own method takes its place."
        return getattr, (self.cb.learn, "_backward")


@contextmanager
def _backward_of(learn: Learner, backward: Callable) -> Iterator[None]:
    "Inside, `learn` goes backward with `backward`."
    own = vars(learn).get("_backward")
    learn._backward = backward
    try:
        yield
    finally:
        if vars(learn).get("_backward") is backward:
            del learn._backward
            if own is not None:
                learn._backward = own


# fastai's own methods, in which backward pass, step and `zero_grad` follow each other
_OWN_METHODS = {name: vars(Learner)[name] for name in ("_do_grad_opt", "_do_one_batch", "one_batch")}


def _sets_gradients_to_zero(learn: Learner) -> bool:
    "Whether a batch that was not cancelled ends with all gradients at zero, as by fastai's own methods."
    if any(getattr(type(learn), name) is not own or name in vars(learn) for name, own in _OWN_METHODS.items()):
        return False
    zero_grad = getattr(type(learn.opt), "zero_grad", None)  # an OptimWrapper has none: PyTorch's sets them to None
    is_known = getattr(zero_grad, "__module__", None) in ("fastai.optimizer", "channelslast.fused_forms")
    return is_known and "zero_grad" not in vars(learn.opt)
