"Mixed precision on every device that autocast runs on: the callback, its options, and which one a Learner has."

import inspect
from collections.abc import Iterable
from functools import partial
from numbers import Integral, Real
from typing import Any
from warnings import warn

import torch
from fastai.callback.core import Callback, CancelFitException, CancelStepException
from fastai.callback.fp16 import MixedPrecision as FastaiMixedPrecision
from fastai.callback.fp16 import ModelToHalf, NonNativeMixedPrecision
from fastai.learner import Learner
from fastcore.foundation import L
from fastcore.meta import delegates
from torch.amp import GradScaler, autocast

from channelslast.devices import AMPMode, amp_mode_of, autocast_dtype, to_amp_mode, training_device
from channelslast.early_loss import ReadsLossEarly
from channelslast.fit import FIT_GOES_ON, drop_gradients
from channelslast.memory_format import with_wrapped
from channelslast.optimizer import found_inf_reader, give_found_inf

__all__ = ["MixedPrecision"]

# Every kind of mixed precision that can be on a Learner
MIXED_PRECISIONS = (FastaiMixedPrecision, NonNativeMixedPrecision, ModelToHalf)


class MixedPrecision(ReadsLossEarly, FastaiMixedPrecision):
    """Train in mixed precision on every device that PyTorch's autocast runs on.

    A dtype that the device does not accelerate is replaced with a warning, see `autocast_dtype`. Takes the options of
    `torch.amp.GradScaler`, `enabled=False` included; bfloat16 has the range of float32 and needs no scaler. An
    exception or an interrupt inside a batch leaves autocast as it was.
    """

    # Not made by `__init__`: a callback that fastai alone has pickled comes back as one of ours
    entered = ()

    __signature__ = None  # fastai's class has one; without it `inspect` shows that of this `__init__`

    @delegates(GradScaler, but="device")
    def __init__(
        self,
        amp_mode: str | AMPMode = AMPMode.FP16,  # 'fp16' or 'bf16'
        **kwargs,
    ):
        check_scaler_options(kwargs)
        amp_mode = to_amp_mode(amp_mode)
        if amp_mode is None:
            raise ValueError("amp_mode='fp32' is no mixed precision: pass 'fp16' or 'bf16', or leave the callback away")
        super().__init__(amp_mode, **kwargs)
        if kwargs and self.amp_mode is AMPMode.BF16:
            warn(f"{', '.join(kwargs)}: without effect, bfloat16 needs no GradScaler")
        if len(kwargs) > 1 and kwargs.get("enabled") is False:
            others = ", ".join(name for name in kwargs if name != "enabled")
            warn(f"{others}: without effect, enabled=False turns the GradScaler off")

    def dtype_on(
        self,
        device: torch.device | str,  # where the model runs
    ) -> torch.dtype | None:
        "Return the dtype in which to autocast on `device`; warn once if that is not the one asked for."
        dtype, why = autocast_dtype(self.amp_mode, device)
        if dtype is not torch.float16 and self.amp_mode is AMPMode.FP16 and self.kwargs:
            why += f"; without effect there: {', '.join(self.kwargs)}"
        if why:
            self.warn_once(why)
        return dtype

    def before_fit(self):
        newest = get_mixed_precision(self.learn)
        for cb in self.learn.cbs:  # two at once would scale the loss twice; fastai resets `run` after the fit
            if isinstance(cb, FastaiMixedPrecision) and cb is not newest:
                cb.run = False
        if self is not newest:
            return
        device = training_device(self.learn)
        dtype = self.dtype_on(device)
        self.entered = []
        self.autocast_device = device.type
        self.autocast = partial(autocast, device.type, dtype=dtype) if dtype else None
        enabled = dtype is torch.float16 and self.kwargs.get("enabled", True)
        self.learn.scaler = GradScaler(device.type, **{**self.kwargs, "enabled": enabled})
        self.scales = L()
        self.is_update_due = False

    def before_batch(self):
        if self.autocast is not None:
            context = self.autocast()
            self.entered.append((context, AutocastState(self.autocast_device)))
            context.__enter__()

    def after_loss(self):
        if self.entered:
            context, _ = self.entered[-1]
            context.__exit__(None, None, None)
            self.entered.pop()  # last: an interrupt inside `__exit__` still finds the state to restore

    def after_cancel_batch(self):
        self.after_loss()

    def before_backward(self):
        super().before_backward()  # `ReadsLossEarly`'s, of the loss before it is scaled
        FastaiMixedPrecision.before_backward(self)

    def after_exception(self, error: BaseException):
        "Put back what only the rest of the batch would have."
        for _, state in reversed(self.entered):
            state.restore()
        self.entered = []
        super().after_exception(error)
        self._forget_found_inf()
        if self.training and not isinstance(error, (*FIT_GOES_ON, CancelFitException)):
            self.learn.scaler = None
            for cb in self.learn.cbs:
                if isinstance(cb, FastaiMixedPrecision):
                    cb.run = True
        drop_gradients(self.learn, error)

    def before_step(self):
        "Unscale the gradients, and cancel the step if they overflowed; a fused optimizer cancels its own."
        if self.is_update_due:  # another callback cancelled the last step after this method
            self.after_step()
        self.is_update_due = True
        if not self._step_supports_amp_scaling:
            return super().before_step()
        self.learn.scaler.unscale_(self)
        self.skipped = True
        self.learn.scaler.step(self)
        if self.skipped:
            raise CancelStepException()

    def after_step(self):
        if self.is_update_due:  # not where another callback cancelled the step before this
            super().after_step()
        self.is_update_due = False
        self._forget_found_inf()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether fused kernels make the step, which read on the GPU whether gradients overflowed.

        To read it in Python would wait for the GPU in every step. `GradScaler` looks this name up on the optimizer that
        it steps, which is `self`. If PyTorch drops the name, GradScaler reads in Python: slower, with equal results.
        """
        return found_inf_reader(self.learn.opt) is not None

    def step(self, *args, **kwargs):
        "Called by `GradScaler` in the place of the optimizer's step, which the Learner makes after it."
        self.skipped = False
        found_inf = vars(self).get("found_inf")
        if found_inf is not None:
            give_found_inf(self.learn.opt, found_inf)

    step.__signature__ = inspect.signature(step)  # which GradScaler asks for at each step

    def _forget_found_inf(self):
        for opt in with_wrapped(self.learn.opt):
            vars(opt).pop("found_inf", None)


class AutocastState:
    "Autocast as it is when this is made; `restore` puts it back, wherever an interrupt has left it."

    def __init__(
        self,
        device_type: str,  # 'cpu', 'cuda', ...
    ):
        self.device_type = device_type
        self.enabled = torch.is_autocast_enabled(device_type)
        self.dtype = torch.get_autocast_dtype(device_type)
        self.cache_enabled = torch.is_autocast_cache_enabled()
        self.depth = self._depth()

    @staticmethod
    def _depth() -> int:
        # Increment returns the new depth, never 0, so decrement runs too, and returns the depth as it is. In one
        # expression, for an interrupt between two statements would leave a level behind.
        return torch.autocast_increment_nesting() and torch.autocast_decrement_nesting()

    def restore(self) -> None:
        while self._depth() > self.depth:
            torch.autocast_decrement_nesting()
        if self.depth == 0:
            torch.clear_autocast_cache()  # of weights in half precision, which would go on being used
        torch.set_autocast_enabled(self.device_type, self.enabled)
        torch.set_autocast_dtype(self.device_type, self.dtype)
        torch.set_autocast_cache_enabled(self.cache_enabled)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


_SCALER_OPTIONS = {
    "init_scale": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "growth_factor": (lambda value: _is_number(value) and value > 1, "a number above 1"),
    "backoff_factor": (lambda value: _is_number(value) and 0 < value < 1, "a number between 0 and 1"),
    "growth_interval": (
        lambda value: _is_number(value) and isinstance(value, Integral) and value > 0,
        "a whole number above 0",
    ),
    "enabled": (lambda value: isinstance(value, bool), "True or False"),
}


def check_scaler_options(
    options: dict[str, Any],  # of `torch.amp.GradScaler`, by name
    others: Iterable[str] = (),  # legal parameters beside them
) -> None:
    "Raise `TypeError` for an option that GradScaler does not have, `ValueError` for a value it cannot take."
    for name, value in options.items():
        if name not in _SCALER_OPTIONS:
            legal = ", ".join([*others, *_SCALER_OPTIONS])
            raise TypeError(f"{name}={value!r} is no parameter here, and no option of GradScaler: pass {legal}")
        is_legal, description = _SCALER_OPTIONS[name]
        if not is_legal(value):
            raise ValueError(f"{name}={value!r} is not legal for GradScaler: pass {description}")


def get_mixed_precision(
    learn: Learner,
) -> FastaiMixedPrecision | None:
    "Return the newest MixedPrecision on `learn`, None without. (`learn.mixed_precision` may be the model's.)"
    found = [cb for cb in learn.cbs if isinstance(cb, FastaiMixedPrecision)]
    return found[-1] if found else None


def amp_mode_in_use(
    learn: Learner,
) -> str | None:
    "Return what the device of `learn` makes of the precision asked for: 'fp16', 'bf16', or None for float32."
    precision = get_mixed_precision(learn)
    if precision is None:
        return None
    dtype, _ = autocast_dtype(precision.amp_mode, training_device(learn))
    return amp_mode_of(dtype)


def choose_precision(
    learn: Learner,
    amp_mode: str | AMPMode | None,  # None: float32
    **kwargs,
) -> FastaiMixedPrecision | None:
    """Return the callback with which `learn` is to train in `amp_mode`, None for float32, without changing `learn`.

    `kwargs` are GradScaler's options. It is the callback on `learn` if that is of this mode already, and no other
    options are given. Makes every check that can be made before a fit: raises as `MixedPrecision` and `autocast_dtype`.
    """
    amp_mode, chosen = amp_mode and to_amp_mode(amp_mode), get_mixed_precision(learn)
    if amp_mode is None:
        check_scaler_options(kwargs)
        if kwargs:
            warn(f"{', '.join(kwargs)}: without effect, float32 needs no GradScaler")
        return None
    if chosen is None or chosen.amp_mode is not amp_mode or (kwargs and kwargs != chosen.kwargs):
        chosen = MixedPrecision(amp_mode, **kwargs)
    elif type(chosen) is FastaiMixedPrecision:  # which autocasts on CUDA alone
        chosen = MixedPrecision(amp_mode, **(chosen.kwargs if amp_mode is AMPMode.FP16 else {}))
    if isinstance(chosen, MixedPrecision):
        chosen.dtype_on(training_device(learn))
    return chosen


def set_precision(
    learn: Learner,
    precision: FastaiMixedPrecision | None,  # None: float32
) -> Learner:
    "Make `precision` the only mixed precision on `learn`, whatever kind it held; return `learn`."
    remove_cbs(learn, [cb for cb in learn.cbs if isinstance(cb, MIXED_PRECISIONS) and cb is not precision])
    if precision is not None and precision not in learn.cbs:
        learn.add_cb(precision)
    return learn


def remove_cbs(
    learn: Learner,
    cbs: Iterable[Callback],  # those to remove
) -> None:
    "Remove `cbs`, also where another callback, or an attribute of the model, has the name of one of them."
    for cb in list(cbs):
        vars(learn).setdefault(cb.name, cb)  # `remove_cb` deletes the attribute of that name
        learn.remove_cb(cb)
    for cb in learn.cbs:  # those of an equal name have lost theirs
        vars(learn).setdefault(cb.name, cb)
