"Fused steps: fastai's own optimizers, and PyTorch's in an `OptimWrapper`, step with PyTorch's fused kernels."

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from fastai.callback.fp16 import MixedPrecision as FastaiMixedPrecision
from fastai.learner import Learner
from fastai.optimizer import Lookahead, Optimizer, OptimWrapper
from torch import Tensor, nn

from channelslast.early_loss import ReadsLossEarly
from channelslast.fused_forms import Fused, FusedLookahead, FusedSteps, plain_type
from channelslast.fused_steps import names_of, why_no_kernel
from channelslast.fused_torch import (
    begin_momentum,
    is_fused,
    reads_found_inf,
    reset_fused_flag,
    set_fused_flag,
    why_no_fused_flag,
)
from channelslast.memory_format import with_wrapped

__all__ = [
    "FusedOptimizer",
    "check_fused_optimizer",
    "fused_form",
    "why_not_fused",
    "fuse",
    "unfuse",
    "found_inf_reader",
    "give_found_inf",
]

HAVE_FUSED_FORM = (
    "fastai's Adam and SGD, Lookahead around one of them, and an OptimWrapper around an optimizer of PyTorch's that "
    "takes fused=True (Adam, AdamW, SGD, Adagrad)"
)


# On a Learner


class FusedOptimizer(ReadsLossEarly):
    """Let the Learner's optimizer step with PyTorch's fused kernels while it trains; between epochs it is as it was.

    It trains as before, to rounding, with the same state and checkpoints. An optimizer without a fused form, put on the
    Learner after it was checked, trains as it is, with one warning.
    """

    # Before MixedPrecision asks who reads whether gradients overflowed, after GradientAccumulation has left a batch out
    order = FastaiMixedPrecision.order - 1
    run_valid = False

    def __init__(self):
        super().__init__()
        self.seen_opt = None

    def before_fit(self):
        # where a MixedPrecision is on the Learner, that one does, if it is ours
        self.reads_loss = not any(isinstance(cb, FastaiMixedPrecision) for cb in self.learn.cbs)

    def before_step(self):
        opt = self.learn.opt
        if opt is self.seen_opt:
            return
        self.after_train()  # the optimizer of the last step is no longer the Learner's
        self.seen_opt = opt
        why = why_not_fused(opt)
        if why:
            self.warn_once(f"{why}: training with its plain step")
        else:
            fuse(opt)

    def after_train(self):
        opt, self.seen_opt = self.seen_opt, None
        unfuse(opt)

    def after_exception(self, error: BaseException):
        super().after_exception(error)
        self.after_train()


def check_fused_optimizer(
    learn: Learner,
    device: torch.device | str | None = None,  # where it will train; None: where the parameters are
) -> None:
    """Raise `ValueError` if the optimizer of `learn` has no fused form, also one that `learn.opt_func` has yet to make.

    To ask an `opt_func`, it is called once, with parameters of one element in the groups of `learn.splitter`.
    """
    _optimizer_with_fused_form(learn, device)


def fused_form(
    learn: Learner,
    device: torch.device | str | None = None,  # where it will train; None: where the parameters are
) -> bool | None:
    "Whether the optimizer of `learn` has a fused form; None where its steps are fused already."
    try:
        opt = _optimizer_with_fused_form(learn, device)
    except ValueError:
        return False
    return None if isinstance(opt, OptimWrapper) and is_fused(opt.opt) else True


def _optimizer_with_fused_form(learn: Learner, device: torch.device | str | None) -> Any:
    "Return the optimizer of `learn`, or one like that which it has yet to make; raises as `check_fused_optimizer`."
    opt, name = learn.opt, _name(learn.opt)
    if opt is None:
        name = _name(learn.opt_func)
        try:
            opt = _trial(learn, device)
        except Exception as error:
            raise ValueError(
                f"fused_optimizer=True: {name} failed on parameters of one element, with which it is asked for a fused "
                f"form ({type(error).__name__}: {error}). Make the optimizer before: `learn.create_opt()`"
            ) from error
    why = why_not_fused(opt)
    if why:
        raise ValueError(
            f"fused_optimizer=True: {name} has no fused form ({why}). Those that have one: {HAVE_FUSED_FORM}"
        )
    return opt


def _trial(learn: Learner, device: torch.device | str | None) -> Any:
    "Return what `learn.opt_func` makes of a parameter of one element in the place of each one of the model."
    if isinstance(learn.opt_func, OptimWrapper):  # an optimizer already, which fastai takes as it is
        return learn.opt_func

    def small(params: Any) -> Any:
        if isinstance(params, Tensor):
            return nn.Parameter(
                torch.zeros(1, dtype=params.dtype, device=device or params.device), params.requires_grad
            )
        if isinstance(params, dict):
            return {name: small(value) for name, value in params.items()}
        is_nested = isinstance(params, Iterable) and not isinstance(params, str)
        return [small(item) for item in params] if is_nested else params

    return learn.opt_func(small(learn.splitter(learn.model)), lr=learn.lr)


def _name(opt: Any) -> str:
    "Return what a user calls the optimizer, or the function that makes it."
    if isinstance(opt, partial):
        return _name(opt.func)
    if isinstance(opt, (Lookahead, OptimWrapper)):
        return f"{plain_type(opt).__name__} around {_name(opt.opt)}"
    if isinstance(opt, Optimizer):
        return f"{plain_type(opt).__name__} of {names_of(opt.cbs)}"
    return getattr(opt, "__name__", type(opt).__name__)


# On an optimizer


def why_not_fused(
    opt: Any,  # an optimizer of fastai's
) -> str:
    "Return why `opt` has no fused form, '' if it has one; an optimizer of PyTorch's is tried out on its device."
    if isinstance(opt, OptimWrapper):
        return why_no_fused_flag(opt.opt)
    if plain_type(opt) is Lookahead and isinstance(opt.opt, Optimizer):
        return why_not_fused(opt.opt)
    if plain_type(opt) is not Optimizer:
        return f"{type(opt).__name__} is not one of fastai's own"
    return why_no_kernel(opt)


def fuse(
    opt: Any,  # an optimizer of fastai's, for which `why_not_fused` is ''
) -> None:
    """Let `opt` step with PyTorch's fused kernels until `unfuse`. It stays the same object; copies of it are plain.

    Parameters that no kernel takes keep fastai's step: integers, sparse gradients, gradients in another dtype or memory
    format than the parameter, devices other than CUDA and CPU. `give_found_inf` lets the next step change nothing if
    gradients overflowed. Raises `ValueError` for an optimizer without a fused form.
    """
    why = why_not_fused(opt)
    if why:
        raise ValueError(f"opt={_name(opt)} has no fused form ({why}). Those that have one: {HAVE_FUSED_FORM}")
    if isinstance(opt, OptimWrapper):
        set_fused_flag(opt.opt)
        return
    for part in with_wrapped(opt):
        part.__class__ = FusedLookahead if isinstance(part, Lookahead) else FusedSteps


def unfuse(
    opt: Any,  # an optimizer of fastai's, or None
) -> None:
    "Undo `fuse`. The state stays where training has come to. Waits for the GPU to have made the last step."
    for part in with_wrapped(opt):
        if isinstance(part, Fused):
            part.settle()
            for name in set(vars(part)) - set(part.plain_vars()):
                delattr(part, name)
            part.__class__ = plain_type(part)
        elif isinstance(part, torch.optim.Optimizer):
            reset_fused_flag(part)


def found_inf_reader(
    opt: Any,  # an optimizer of fastai's, or None
) -> Any:
    """Return the optimizer whose steps read its attribute `found_inf` on the GPU, and change nothing if it is 1.

    That is `opt` itself in its fused form, or what it wraps. None where there is no such optimizer, or where somebody
    has put another `step` in its place.
    """
    if isinstance(opt, OptimWrapper):
        return opt.opt if reads_found_inf(opt.opt) else None
    if isinstance(opt, Fused) and not any("step" in vars(part) for part in with_wrapped(opt)):
        return opt
    return None


def give_found_inf(
    opt: Any,  # an optimizer that `found_inf_reader` finds a reader in
    found_inf: Tensor,  # of GradScaler's: 1 if the gradients overflowed, else 0
) -> None:
    "Let the next step of `opt` change nothing if `found_inf` is 1, without waiting for the GPU."
    reader = found_inf_reader(opt)
    if isinstance(reader, torch.optim.Optimizer):
        begin_momentum(reader)
    reader.found_inf = found_inf
