"`ChannelsLast`: the callback that trains in channels last."

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from fastai.callback.channelslast import ChannelsLast as FastaiChannelsLast
from fastai.learner import Learner
from fastai.optimizer import Lookahead
from fastai.torch_core import num_distrib
from torch import Tensor, nn

from channelslast.devices import training_device
from channelslast.errors import raised_in
from channelslast.fit import FIT_GOES_ON, LeanCallback, drop_gradients
from channelslast.formats import uncompiled
from channelslast.memory_format import (
    VIEW_ERROR,
    batch_to_contiguous,
    conv_ndims,
    has_lazy_parameters,
    is_channels_last,
    match_strides,
    module_ndims,
    module_to_memory_format,
    optimizer_to_memory_format,
    supports_channels_last,
    to_memory_format,
    with_wrapped,
)
from channelslast.precision import MixedPrecision
from channelslast.swaps import keep_channels_last

__all__ = ["ChannelsLast"]

_VIEW_ERRORS = (
    VIEW_ERROR,
    "Cannot view a tensor with shape",  # the compiler's words
)


class ChannelsLast(LeanCallback, FastaiChannelsLast):
    """Train in channels last: convert the model, its gradients and the optimizer state before a fit, and its inputs.

    The memory format alone: mixed precision is another callback, see `Learner.to_channelslast` for both. 4D weights go
    to `torch.channels_last`, 5D ones to `torch.channels_last_3d`. Inputs of a rank follow where the model has
    convolution weights of that rank.
    """

    # After the callbacks that make a batch (`CastToTensor` is the last), before `DistributedTrainer` wraps the model
    order = MixedPrecision.order

    # Here, and not made by `__init__`: a callback that fastai alone has pickled comes back as one of ours
    is_on = has_lazy = False
    input_ndims, hooks = (), ()

    def before_fit(self):
        device = training_device(self.learn)
        reliable = supports_channels_last(device)
        self.has_lazy = has_lazy_parameters(self.model)
        self.input_ndims = conv_ndims(self.model) if reliable else ()
        has_ndims = bool(module_ndims(self.model) or self.input_ndims)
        self.is_on = reliable and has_ndims
        if not reliable:
            self.warn_once(f"channels last is not reliable on the device '{device}': training in contiguous format")
        elif not has_ndims and not self.has_lazy:
            self.warn_once("The model has no 4D or 5D weights: channels last changes nothing about it")
        if has_ndims:
            convert_learner(self.learn, channels_last=reliable)
        self.keep_strides()

    def after_fit(self):
        self.remove_hooks()

    def keep_strides(self):
        "In distributed training, have hooks give gradients that may lie either way the strides of their parameters."
        self.remove_hooks()  # also those of a fit that was interrupted
        if self.is_on and num_distrib() > 1:
            self.hooks = [param.register_hook(partial(_as_in, param.stride())) for param in _ambiguous(self.model)]

    def remove_hooks(self):
        "Take its hooks off the parameters."
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def before_train(self):
        self._keep_format()  # a checkpoint loaded after an epoch brings contiguous optimizer state

    def before_validate(self):
        self._keep_format()  # a callback may have put another model in its place, as an average of the weights

    def _keep_format(self):
        if self.is_on:
            convert_learner(self.learn, channels_last=True)

    def around_batches(self) -> AbstractContextManager:
        "What the batches of an epoch run in: the model keeps the format, and is the user's own before and after."
        return keep_channels_last(self.model) if self.is_on else nullcontext()

    def before_batch(self):
        if self.input_ndims:
            self.learn.xb = to_memory_format(self.learn.xb, ndims=self.input_ndims)

    def after_pred(self):
        if self.has_lazy:  # the first forward pass gave them their shape
            self.before_fit()
        if self.is_on and not self.training:
            # what `get_preds` returns, and saves; and `.view`, with which it makes one loss of each item, needs it
            self.learn.pred = batch_to_contiguous(self.pred)

    def after_exception(self, error: BaseException):
        if not isinstance(error, FIT_GOES_ON):
            self.remove_hooks()
        if self.is_on and isinstance(error, RuntimeError) and any(words in str(error) for words in _VIEW_ERRORS):
            model = uncompiled(self.model)
            where = _in_words(raised_in(error, model), model)
            error.add_note(
                f"channelslast: {where} calls `.view` on channels last activations, "
                "which cannot be viewed in that shape. Write `.reshape` there (or `torch.flatten`), "
                "or train in contiguous format: `learn.to_contiguous()`.",
            )
        drop_gradients(self.learn, error)


def _ambiguous(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of `model` that lie the same way in both formats, as 1x1 kernels.

    The kernels that make their gradients may choose either format's strides. `DistributedDataParallel` takes the
    difference for a mistake and warns: `Grad strides do not match bucket view strides`.
    """
    params = [param for param in model.parameters() if is_channels_last(param) and param.requires_grad]
    return [param for param in params if param.is_contiguous()]


def _as_in(stride: tuple[int, ...], grad: Tensor) -> Tensor:
    "`grad` with `stride`, where only dimensions of size 1 differ in it."
    if grad.stride() == stride:  # as most are
        return grad
    differing = {size for size, a, b in zip(grad.shape, grad.stride(), stride) if a != b}
    return grad.as_strided(grad.shape, stride) if differing == {1} else grad


def _in_words(name: str | None, model: nn.Module) -> str:
    "The part of `model` that `raised_in` names."
    if name is None:
        return "the code after the model"
    return f"the module `{name}` ({type(model.get_submodule(name)).__name__})" if name else "the model"


def convert_learner(
    learn: Learner,
    channels_last: bool,  # False: contiguous
) -> None:
    "Put the model of `learn`, its gradients and the optimizer state in channels last (or contiguous) format."
    module_to_memory_format(learn.model, channels_last)
    convert_optimizer(learn.opt)


def convert_optimizer(
    optimizer: Any,  # of fastai's, or None
) -> None:
    "Give the state of `optimizer`, and of one that it wraps, the memory format of the parameters it belongs to."
    for opt in with_wrapped(optimizer):
        optimizer_to_memory_format(opt)
        if isinstance(opt, Lookahead) and opt.slow_weights is not None:
            for slow_weights, params in zip(opt.slow_weights, opt.param_lists):
                for slow_weight, param in zip(slow_weights, params):
                    match_strides(slow_weight, param)
