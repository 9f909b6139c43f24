"Mixed precision on every device that PyTorch's autocast runs on."

import platform
from collections.abc import Iterable
from contextlib import ExitStack
from functools import cache, partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from fastai.callback.core import (
    Callback,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
    CancelValidException,
    TrainEvalCallback,
)
from fastai.callback.fp16 import AMPMode, ModelToHalf, NonNativeMixedPrecision
from fastai.callback.fp16 import MixedPrecision as FastaiMixedPrecision
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastai.torch_core import default_device, ismin_torch, num_distrib
from fastcore.basics import patch
from fastcore.foundation import L
from fastcore.meta import delegates
from torch.amp import GradScaler, autocast, is_autocast_available

__all__ = ["AMPMode", "MixedPrecision", "accelerated_dtypes", "autocast_dtype", "training_device"]

_DTYPES = {AMPMode.FP16: torch.float16, AMPMode.BF16: torch.bfloat16}


# What a device can do


@cache
def accelerated_dtypes(
    device: torch.device | str,  # where the model runs
) -> tuple[torch.dtype, ...]:
    """The half precision dtypes that `device` computes faster than float32, the one to prefer first.

    A CUDA GPU: float16 from compute capability 7.0 (Tensor Cores), bfloat16 from 8.0; every GPU under ROCm. A CPU: what
    its instruction set has arithmetic for (AVX512-BF16, AVX512-FP16, AMX, or Arm's BF16 and FP16). Other devices: what
    their autocast takes, unchecked.
    """
    device = torch.device(device)
    if not is_autocast_available(device.type):
        return ()
    if device.type == "mps" and not ismin_torch("2.8"):  # the first with GradScaler's kernels
        return ()
    if device.type == "cpu":
        return _accelerated_by_cpu()
    if device.type == "cuda" and not torch.version.hip:
        capability = torch.cuda.get_device_capability(device)
        needs = {torch.float16: (7, 0), torch.bfloat16: (8, 0)}
        return tuple(dtype for dtype, needed in needs.items() if capability >= needed)
    return (torch.float16, torch.bfloat16)


def amp_mode_of(
    dtype: torch.dtype | None,  # in which to autocast, None for no autocast
) -> str | None:
    "The name of the precision: 'fp16', 'bf16', or None for float32."
    return next((mode.value for mode in AMPMode if _DTYPES[mode] is dtype), None)


def _accelerated_by_cpu() -> tuple[torch.dtype, ...]:
    features = _cpu_features()
    instructions = {
        torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
        torch.float16: {"avx512_fp16", "amx_fp16", "fp16_arith", "asimdhp"},
    }
    return tuple(dtype for dtype, names in instructions.items() if names & features)


def _cpu_features() -> set[str]:
    "Names of instruction sets: PyTorch's where it tells (`torch.cpu.get_capabilities`), else Linux's."
    if hasattr(torch.cpu, "get_capabilities"):
        return {name for name, has in torch.cpu.get_capabilities().items() if has is True}
    cpuinfo = Path("/proc/cpuinfo")
    if platform.system() != "Linux" or not cpuinfo.exists():
        return set()
    lines = cpuinfo.read_text().splitlines()
    return {name for line in lines if line.startswith(("flags", "Features")) for name in line.split(":")[1].split()}


def autocast_dtype(
    amp_mode: str | AMPMode,  # the precision asked for, 'fp16' or 'bf16'
    device: torch.device | str,  # where the model runs
) -> tuple[torch.dtype | None, str]:
    """The dtype in which to autocast on `device`, None for no autocast, and why it is not the one asked for, else ''.

    Raises `ValueError` where only the caller can choose: bfloat16 on a CUDA GPU without it.
    """
    amp_mode, device = to_amp_mode(amp_mode), torch.device(device)
    dtype, accelerated = _DTYPES[amp_mode], accelerated_dtypes(device)
    asked = f"amp_mode='{amp_mode.value}'"
    if dtype in accelerated:
        return dtype, ""
    if device.type == "cuda" and dtype is torch.bfloat16:
        raise ValueError(f"{asked}: the GPU '{device}' has no bfloat16, pass amp_mode='fp16'")
    if device.type == "cuda":
        return dtype, f"{asked}: the GPU '{device}' has no Tensor Cores, float16 saves memory there but hardly time"
    instead = accelerated[0] if accelerated else None
    name = str(instead or torch.float32).removeprefix("torch.")
    return instead, f"{asked}: the device '{device}' has no fast arithmetic for it, training in {name} instead"


def training_device(
    learn: Learner,
) -> torch.device:
    "The device on which the next fit of `learn` trains: that of its DataLoaders, to which fastai moves the model."
    device = None
    if any(isinstance(cb, TrainEvalCallback) for cb in learn.cbs):
        device = getattr(learn.dls, "device", default_device())
    if device is None:
        device = next((param.device for param in learn.model.parameters()), "cpu")
    return torch.device(device)


# Checks of the arguments


def to_amp_mode(
    amp_mode: str | AMPMode,  # 'fp16' or 'bf16'
) -> AMPMode:
    "`amp_mode` as an `AMPMode`; a `ValueError` that lists the legal ones if it is none."
    try:
        return AMPMode(amp_mode)
    except ValueError:
        legal = ", ".join(repr(mode.value) for mode in AMPMode)
        float32 = "use_amp=False to `to_channelslast`, None to a TrainFormat"
        raise ValueError(
            f"amp_mode={amp_mode!r} does not exist: pass one of {legal}, or for float32 {float32}"
        ) from None


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
) -> None:
    "Raise `TypeError` for an option that GradScaler does not have, `ValueError` for a value it cannot take."
    for name, value in options.items():
        if name not in _SCALER_OPTIONS:
            legal = ", ".join(_SCALER_OPTIONS)
            raise TypeError(f"{name}={value!r} is no parameter here, and no option of GradScaler: those are {legal}")
        is_legal, description = _SCALER_OPTIONS[name]
        if not is_legal(value):
            raise ValueError(f"{name}={value!r} is not legal for GradScaler: pass {description}")


# The callback

# Every kind of mixed precision that can be on a Learner
MIXED_PRECISIONS = (FastaiMixedPrecision, NonNativeMixedPrecision, ModelToHalf)

# What may leave a loop over batches while the fit goes on
FIT_GOES_ON = (CancelTrainException, CancelValidException, CancelEpochException)


class AutocastState:
    "Autocast as it is now, to put it back to, from wherever an interrupt left it."

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
        # on one line: an interrupt between two would leave a level behind
        return torch.autocast_increment_nesting() and torch.autocast_decrement_nesting()

    def restore(self) -> None:
        while self._depth() > self.depth:
            torch.autocast_decrement_nesting()
        if self.depth == 0:
            torch.clear_autocast_cache()  # of weights in half precision, which would go on being used
        torch.set_autocast_enabled(self.device_type, self.enabled)
        torch.set_autocast_dtype(self.device_type, self.dtype)
        torch.set_autocast_cache_enabled(self.cache_enabled)


def drop_gradients(
    learn: Learner,
    error: BaseException,  # that has left the loop over batches
) -> None:
    "Zero the gradients of a batch that was never stepped, if `error` ends the fit: the next one would add to them."
    if learn.training and learn.opt is not None and not isinstance(error, FIT_GOES_ON):
        learn.opt.zero_grad()


class MixedPrecision(FastaiMixedPrecision):
    """Train in mixed precision on every device that PyTorch's autocast runs on.

    A dtype that the device does not accelerate is replaced with a warning, see `autocast_dtype`. Takes the options of
    `torch.amp.GradScaler`, `enabled=False` included; bfloat16 has the range of float32 and needs no scaler. An
    exception or an interrupt inside a batch leaves autocast as it was.
    """

    # Here, and not made by `__init__`: a callback that fastai alone has pickled comes back as one of ours
    entered = ()
    told = frozenset()
    loss_copy = None

    __signature__ = None  # not that of fastai's class, but of:

    @delegates(GradScaler, but="device")
    def __init__(
        self,
        amp_mode: str | AMPMode = AMPMode.FP16,  # 'fp16' or 'bf16'
        **kwargs,
    ):
        check_scaler_options(kwargs)
        super().__init__(to_amp_mode(amp_mode), **kwargs)
        if kwargs and self.amp_mode is AMPMode.BF16:
            warn(f"{', '.join(kwargs)}: without effect, bfloat16 needs no GradScaler")
        if len(kwargs) > 1 and kwargs.get("enabled") is False:
            others = ", ".join(name for name in kwargs if name != "enabled")
            warn(f"{others}: without effect, enabled=False turns the GradScaler off")

    def dtype_on(
        self,
        device: torch.device | str,  # where the model runs
    ) -> torch.dtype | None:
        "The dtype in which to autocast on `device`. Warns once where that is not the one asked for."
        dtype, why = autocast_dtype(self.amp_mode, device)
        if dtype is not torch.float16 and self.amp_mode is AMPMode.FP16 and self.kwargs:
            why += f"; without effect there: {', '.join(self.kwargs)}"
        if why and why not in self.told:
            self.told |= {why}
            warn(why)
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
        super().before_backward()
        self._start_copying_loss()

    def after_batch(self):
        self._finish_copying_loss()

    def after_exception(self, error: BaseException):
        "Put back what only the rest of the batch would have."
        for _, state in reversed(self.entered):
            state.restore()
        self.entered = []
        self.loss_copy = None
        self._forget_found_inf()
        if self.training and not isinstance(error, (*FIT_GOES_ON, CancelFitException)):
            self.learn.scaler = None
            for cb in self.learn.cbs:
                if isinstance(cb, FastaiMixedPrecision):
                    cb.run = True
        drop_gradients(self.learn, error)

    def before_step(self):
        "Unscale the gradients, and cancel the step if they overflowed; a fused optimizer cancels its own."
        if self.is_update_due:  # a step that another callback cancelled after this
            self.after_step()
        self.is_update_due = True
        if not self._step_supports_amp_scaling:
            return super().before_step()
        self.scaler.unscale_(self)
        self.skipped = True
        self.scaler.step(self)
        if self.skipped:
            raise CancelStepException()

    def after_step(self):
        if self.is_update_due:  # not where another callback cancelled the step before this
            super().after_step()
        self.is_update_due = False
        self._forget_found_inf()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether PyTorch's fused kernels make the step: they read for themselves whether gradients overflowed.

        To read it in Python is to wait until the GPU is done, every step. `GradScaler` looks this name up on the
        optimizer that it steps, which is `self`. Were the name to go, it would read in Python: slower, as right.
        """
        opt = self._torch_optimizer
        reads_found_inf = getattr(opt, "_step_supports_amp_scaling", False)  # PyTorch's fused optimizers have it
        return reads_found_inf and all(group.get("fused") for group in opt.param_groups)

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer | None:
        return self.opt.opt if isinstance(self.opt, OptimWrapper) else None

    def step(self, *args, **kwargs):
        "The optimizer's step as `GradScaler` sees it: the Learner makes it, with `found_inf` for a fused kernel."
        self.skipped = False
        found_inf = vars(self).get("found_inf")
        if found_inf is not None:
            self._torch_optimizer.found_inf = found_inf

    def _start_copying_loss(self):
        """Copy the loss to the CPU while the GPU goes on, for fastai's Recorder.

        The Recorder reads it after the step, and would wait there until the GPU is done with everything. Not in
        distributed training, where it gathers the loss on the GPUs.
        """
        self.loss_copy = None
        if self.loss.is_cuda and num_distrib() <= 1:
            copy = self.loss.detach().to("cpu", non_blocking=True)
            self.loss_copy = self.loss, copy, torch.cuda.current_stream(self.loss.device).record_event()

    def _finish_copying_loss(self):
        if self.loss_copy is not None:
            loss, copy, copied = self.loss_copy
            self.loss_copy = None
            if self.loss is loss:  # no callback has put another in its place
                copied.synchronize()
                self.learn.loss = copy

    def _forget_found_inf(self):
        if self._torch_optimizer is not None:
            vars(self._torch_optimizer).pop("found_inf", None)


@patch
@delegates(GradScaler, but="device")
def to_fp16(self: Learner, **kwargs) -> Learner:
    "Train in float16 mixed precision, in place of any other; see `MixedPrecision` for devices without float16."
    return set_precision(self, choose_precision(self, AMPMode.FP16, **kwargs))


@patch
def to_bf16(self: Learner) -> Learner:
    "Train in bfloat16 mixed precision, in place of any other."
    return set_precision(self, choose_precision(self, AMPMode.BF16))


@patch
def to_fp32(self: Learner) -> Learner:
    "Train in float32, without mixed precision of any kind."
    return set_precision(self, None)


def get_mixed_precision(
    learn: Learner,
) -> FastaiMixedPrecision | None:
    "The MixedPrecision on `learn`, the newest if there are several. (`learn.mixed_precision` may be the model's.)"
    found = [cb for cb in learn.cbs if isinstance(cb, FastaiMixedPrecision)]
    return found[-1] if found else None


def amp_mode_in_use(
    learn: Learner,
) -> str | None:
    "What the device of `learn` makes of the precision asked for: 'fp16', 'bf16', or None for float32."
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
    """The callback with which `learn` trains in `amp_mode`, None for float32; `kwargs` are GradScaler's options.

    The one on `learn` where it already is of that mode, unless other options are given. Makes every check that can be
    made before a fit, and changes nothing.
    """
    if amp_mode is None:
        check_scaler_options(kwargs)
        if kwargs:
            warn(f"{', '.join(kwargs)}: without effect, float32 needs no GradScaler")
        return None
    amp_mode, chosen = to_amp_mode(amp_mode), get_mixed_precision(learn)
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
    "Make `precision` the only mixed precision on `learn`, whatever kind it held."
    remove_cbs(learn, [cb for cb in learn.cbs if isinstance(cb, MIXED_PRECISIONS) and cb is not precision])
    if precision is not None and precision not in learn.cbs:
        learn.add_cb(precision)
    return learn


def remove_cbs(
    learn: Learner,
    cbs: Iterable[Callback],  # those to remove
) -> None:
    "`learn.remove_cbs`, also where another callback, or an attribute of the model, has the name of one of them."
    for cb in list(cbs):
        vars(learn).setdefault(cb.name, cb)
        learn.remove_cb(cb)
    for cb in learn.cbs:
        vars(learn).setdefault(cb.name, cb)


_all_batches = Learner.all_batches


@patch
def all_batches(self: Learner):
    "Train or evaluate `self.model` on all batches of `self.dl`; show an exception to callbacks with `after_exception`."
    try:
        _all_batches(self)
    except BaseException as error:  # no event of fastai's follows one that it does not know
        with ExitStack() as stack:  # all of them, also where one raises
            for cb in self.cbs:
                if hasattr(type(cb), "after_exception"):
                    stack.callback(cb.after_exception, error)
        raise
