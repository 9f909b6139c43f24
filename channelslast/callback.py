"Channels last on fastai's `Learner`: the callback, the methods that add and remove it, and portable checkpoints."

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from warnings import warn
from weakref import WeakKeyDictionary

import torch
from fastai.callback.channelslast import ChannelsLast as FastaiChannelsLast  # first: its patches would undo ours
from fastai.learner import Learner, load_model, save_model
from fastai.optimizer import Lookahead
from fastai.torch_core import get_model, ismin_torch, num_distrib
from fastcore.basics import patch
from fastcore.foundation import L
from fastcore.meta import delegates
from fastcore.xtras import join_path_file
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from channelslast.memory_format import (
    VIEW_ERROR,
    batch_to_contiguous,
    contiguous_weights,
    conv_ndims,
    has_lazy_parameters,
    is_channels_last,
    match_strides,
    module_ndims,
    module_to_memory_format,
    optimizer_to_memory_format,
    state_to_contiguous,
    supports_channels_last,
    to_memory_format,
    with_wrapped,
)
from channelslast.precision import (
    FIT_GOES_ON,
    MIXED_PRECISIONS,
    AMPMode,
    MixedPrecision,
    amp_mode_in_use,
    choose_precision,
    drop_gradients,
    remove_cbs,
    set_precision,
    to_amp_mode,
    training_device,
)

__all__ = ["ChannelsLast", "TrainFormat"]

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_VIEW_ERRORS = (
    VIEW_ERROR,
    "Cannot view a tensor with shape",  # the compiler's words
)


@dataclass(frozen=True)
class TrainFormat:
    "How a Learner trains: memory format, precision, and whether PyTorch compiles the model."

    channels_last: bool = False  # False: contiguous
    amp_mode: str | None = None  # 'fp16', 'bf16', or None for float32
    compile: str | None = None  # a mode of `torch.compile`, or None for eager

    def __post_init__(self):
        if not isinstance(self.channels_last, bool):
            raise ValueError(f"channels_last={self.channels_last!r}: pass True or False")
        if self.amp_mode is not None:
            object.__setattr__(self, "amp_mode", to_amp_mode(self.amp_mode).value)
        if self.compile is not None and self.compile not in COMPILE_MODES:
            raise ValueError(f"compile={self.compile!r} does not exist: pass None or one of {COMPILE_MODES}")

    def __str__(self) -> str:
        words = ["channels last" if self.channels_last else "contiguous", self.amp_mode or "fp32"]
        if self.compile is not None:
            words.append("compiled" if self.compile == "default" else f"compiled ({self.compile})")
        return " ".join(words)

    @property
    def code(self) -> str:
        "The line of Python that puts a Learner called `learn` in this format."
        return f"learn.to_format({self!r})"


class ChannelsLast(FastaiChannelsLast):
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
    told = frozenset()

    def before_fit(self):
        device = training_device(self.learn)
        reliable = supports_channels_last(device)
        self.has_lazy = has_lazy_parameters(self.model)
        self.input_ndims = conv_ndims(self.model) if reliable else ()
        has_ndims = bool(module_ndims(self.model) or self.input_ndims)
        self.is_on = reliable and has_ndims
        if not reliable:
            self._warn_once(f"channels last is not reliable on the device '{device}': training in contiguous format")
        elif not has_ndims and not self.has_lazy:
            self._warn_once("The model has no 4D or 5D weights: channels last changes nothing about it")
        if has_ndims:
            _convert_model(self.learn, channels_last=reliable)
        self._remove_hooks()  # those of a fit that was interrupted
        if self.is_on and num_distrib() > 1:
            self.hooks = [param.register_hook(partial(_as_in, param.stride())) for param in _ambiguous(self.model)]

    def after_fit(self):
        self._remove_hooks()

    def _remove_hooks(self):
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def before_train(self):
        self._keep_format()  # a checkpoint loaded after an epoch brings contiguous optimizer state

    def before_validate(self):
        self._keep_format()  # a callback may have put another model in its place, as an average of the weights

    def _keep_format(self):
        if self.is_on:
            _convert_model(self.learn, channels_last=True)

    def _warn_once(self, message: str):
        if message not in self.told:
            self.told |= {message}
            warn(message)

    def before_batch(self):
        if self.input_ndims:
            self.learn.xb = to_memory_format(self.xb, ndims=self.input_ndims)

    def after_pred(self):
        if self.has_lazy:  # the first forward pass gave them their shape
            self.before_fit()
        if self.is_on and not self.training:
            # what `get_preds` returns, and saves; and `.view`, with which it makes one loss of each item, needs it
            self.learn.pred = batch_to_contiguous(self.pred)

    def after_exception(self, error: BaseException):
        if not isinstance(error, FIT_GOES_ON):
            self._remove_hooks()
        if self.is_on and isinstance(error, RuntimeError) and any(words in str(error) for words in _VIEW_ERRORS):
            add_note(
                error,
                f"channelslast: {_raised_in(error, self.model)} calls `.view` on channels last activations, "
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
    differing = {size for size, a, b in zip(grad.shape, grad.stride(), stride) if a != b}
    return grad.as_strided(grad.shape, stride) if differing == {1} else grad


def add_note(
    error: BaseException,
    note: str,  # printed below the traceback
) -> None:
    "`error.add_note(note)`, new in Python 3.11; before, the note is kept in the same place and shown as a warning."
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        error.__notes__ = [*getattr(error, "__notes__", []), note]
        warn(note)


def _raised_in(error: BaseException, model: nn.Module) -> str:
    "The innermost module of `model` whose code was running when `error` was raised, in words."
    names = {id(module): name for name, module in uncompiled(model).named_modules()}
    found = "the code after the model"
    traceback = error.__traceback__
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if id(owner) in names:
            found = f"the module `{names[id(owner)]}` ({type(owner).__name__})" if names[id(owner)] else "the model"
        traceback = traceback.tb_next
    return found


def _convert_model(learn: Learner, channels_last: bool) -> None:
    "Put the model of `learn`, its gradients and the optimizer state in channels last (or contiguous) format."
    module_to_memory_format(learn.model, channels_last)
    for opt in with_wrapped(learn.opt):
        optimizer_to_memory_format(opt)
        if isinstance(opt, Lookahead) and opt.slow_weights is not None:
            for slow_weights, params in zip(opt.slow_weights, opt.param_lists):
                for slow_weight, param in zip(slow_weights, params):
                    match_strides(slow_weight, param)


@patch
@delegates(GradScaler, but="device")
def to_channelslast(
    self: Learner,
    use_amp: bool = True,  # train in mixed precision of `amp_mode`; False: in float32
    amp_mode: str | AMPMode = AMPMode.FP16,  # 'fp16' or 'bf16'
    **kwargs,
) -> Learner:
    """Train in channels last format and mixed precision, whatever the Learner held before.

    `use_amp=True` trains in mixed precision of `amp_mode`, which is 'fp16' unless told, 'fp16' or 'bf16'; a CPU without
    float16 trains in bfloat16 then, with a warning. `use_amp=False` trains in float32. The other parameters are the
    options of `torch.amp.GradScaler`, for float16; without any, a Learner that is in `amp_mode` keeps those it has.

    Raises `TypeError` for an unknown parameter and `ValueError` for an illegal value, or for bfloat16 on a GPU that has
    none. Nothing has changed then.
    """
    if not isinstance(use_amp, bool):
        raise ValueError(f"use_amp={use_amp!r}: pass True or False")
    mode = to_amp_mode(amp_mode).value
    return self.to_format(TrainFormat(True, mode if use_amp else None, compile_mode(self.model)), **kwargs)


@patch
def to_contiguous(
    self: Learner,
    to_fp32: bool = False,  # also remove mixed precision, of every kind
) -> Learner:
    """Put the model, its gradients and the optimizer state back in contiguous format, at once.

    Mixed precision stays as it is, unless `to_fp32=True`.
    """
    if to_fp32:
        return self.to_format(TrainFormat(False, None, compile_mode(self.model)))
    _set_channels_last(self, False)  # and nothing else: mixed precision stays, of whatever kind it is
    return self


@patch
@delegates(GradScaler, but="device")
def to_format(
    self: Learner,
    fmt: TrainFormat,  # memory format, precision and compilation
    **kwargs,
) -> Learner:
    """Train in `fmt` from the next fit on, whatever the Learner held before; leaving channels last happens at once.

    Takes the options of `torch.amp.GradScaler`. Raises `TypeError` and `ValueError` as `to_channelslast` does.
    """
    if not isinstance(fmt, TrainFormat):
        raise TypeError(
            f"fmt={fmt!r} is not a TrainFormat: pass one, as TrainFormat(channels_last=True, amp_mode='fp16')"
        )
    precision = choose_precision(self, fmt.amp_mode, **kwargs)
    _set_compile_mode(self, fmt.compile)
    _set_channels_last(self, fmt.channels_last)
    return set_precision(self, precision)


@patch(as_prop=True)
def train_format(self: Learner) -> TrainFormat:
    "The format in which the next fit trains: what the device makes of the precision asked for, and the compile mode."
    channels_last = any(isinstance(cb, FastaiChannelsLast) for cb in self.cbs)
    channels_last = channels_last and supports_channels_last(training_device(self))
    return TrainFormat(channels_last, amp_mode_in_use(self), compile_mode(self.model))


def _set_channels_last(learn: Learner, channels_last: bool) -> None:
    ours = [cb for cb in learn.cbs if isinstance(cb, ChannelsLast)]
    keep = ours[:1] if channels_last else []
    remove_cbs(learn, [cb for cb in learn.cbs if isinstance(cb, FastaiChannelsLast) and cb not in keep])
    for cb in ours:
        cb._remove_hooks()
    if channels_last and not keep:
        learn.add_cb(ChannelsLast())
    if not channels_last:
        _convert_model(learn, channels_last=False)


# The mode of each wrapper with which `to_format` compiled a module. A pickled or deep-copied module has none.
_modes: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def uncompiled(model: nn.Module) -> nn.Module:
    "The module in the wrapper that `torch.compile(model)` returns; any other `model` itself."
    if type(model).__module__.startswith("torch._dynamo."):  # the class has no public name
        (model,) = model.children()
    return model


def _wrapper(model: nn.Module) -> Any:
    "PyTorch's wrapper around a module that is compiled in place; without one, or without its name, the module itself."
    return getattr(model, "_compiled_call_impl", None) or model


def compile_mode(model: nn.Module) -> str | None:
    "The mode in which PyTorch compiles `model`, in place or in a wrapper module; None for eager."
    if uncompiled(model) is not model:
        return _told_mode(model)
    wrapper = _wrapper(model)
    return _modes.get(wrapper, None if wrapper is model else _told_mode(wrapper))


def _told_mode(compiled: Callable) -> str:
    "The mode that what `torch.compile` returned tells of itself; 'default' where it tells nothing, as a copy does."
    config = compiled.get_compiler_config() if hasattr(compiled, "get_compiler_config") else None
    if config is None:
        return "default"
    options = torch._inductor.list_mode_options()
    modes = sorted(COMPILE_MODES, key=lambda mode: len(options[mode]), reverse=True)  # 'default' has none
    return next(mode for mode in modes if options[mode].items() <= config.items())


def _set_compile_mode(learn: Learner, mode: str | None) -> None:
    "Compile the model of `learn` in place, or no longer; out of its wrapper, if it was in one of another mode."
    if mode != compile_mode(learn.model):
        model = uncompiled(learn.model)
        _compile_in_place(model, mode)
        learn.model = model


def _compile_in_place(model: nn.Module, mode: str | None) -> None:
    if mode == compile_mode(model):
        return
    if mode is not None:
        model.compile(mode=mode)
        if "_compiled_call_impl" in vars(model) and not ismin_torch("2.15"):
            # there it passes over a module whose `forward` is PyTorch's own, as nn.Sequential, in silence
            model._compiled_call_impl = torch.compile(_in_own_frame(model._call_impl), mode=mode)
        _modes[_wrapper(model)] = mode
        return
    model.compile(disable=True)
    vars(model).pop("_compiled_call_impl", None)  # what is left of it: a wrapper that does nothing
    _modes.pop(model, None)


def _in_own_frame(function: Callable) -> Callable:
    "`function` called from code that PyTorch does not count as its own, which it compiles (pytorch/pytorch#185722)."

    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return call


class _Portable:
    "A model or optimizer whose `state_dict` is contiguous."

    def __init__(self, source: Any):
        self.source = source

    def state_dict(self) -> Any:
        return state_to_contiguous(self.source.state_dict())


@patch
@delegates(save_model)
def save(
    self: Learner,
    file: str | Path,  # name in `self.path/self.model_dir`, without its ending
    **kwargs,
) -> Path:
    """Save model and optimizer state (if `with_opt`) to `self.path/self.model_dir/file`, in contiguous format.

    Plain PyTorch and safetensors read the file; `load` puts it into a channels last model as well as a contiguous one,
    into a compiled one as well as an eager one.
    """
    file = join_path_file(file, self.path / self.model_dir, ext=".pth")
    opt = self.opt and _Portable(self.opt)
    save_model(file, _Portable(uncompiled(get_model(self.model))), opt, **kwargs)
    return file


_load = Learner.load


@patch
@delegates(load_model)
def load(
    self: Learner,
    file: str | Path,  # name in `self.path/self.model_dir`, without its ending
    device: torch.device | str | int | None = None,  # to load to, that of the DataLoaders by default
    **kwargs,
) -> Learner:
    """Load model and optimizer state (if `with_opt`) from `self.path/self.model_dir/file`, whatever the format.

    Also what fastai alone saved of a model in the wrapper that `torch.compile` returns.
    """
    model = self.model
    self.model = uncompiled(get_model(model))
    hook = self.model.register_load_state_dict_pre_hook(_drop_prefix)
    try:
        return _load(self, file, device, **kwargs)
    finally:
        self.model = model
        hook.remove()


def _drop_prefix(module: nn.Module, state: dict[str, Any], *_) -> None:
    consume_prefix_in_state_dict_if_present(state, "_orig_mod.")  # the name of the module in PyTorch's wrapper


# Callbacks that stay out of a file of `export`; fastai's `load_learner` drops them on a CPU
_NOT_EXPORTED = (FastaiChannelsLast, *MIXED_PRECISIONS)

_export = Learner.export


@patch
@delegates(_export)
def export(
    self: Learner,
    fname: str | Path = "export.pkl",  # name in `self.path`
    *args,
    **kwargs,
) -> None:
    """Export the content of `self` without the items and the optimizer state for inference.

    The file loads where only fastai is: a contiguous model that is not compiled, and no `ChannelsLast` or mixed
    precision. Call `to_channelslast` or `to_format` on what `load_learner` returns. `self` stays as it is.
    """
    with _as_fastai_has_it(self):
        _export(self, fname, *args, **kwargs)


@contextmanager
def _as_fastai_has_it(learn: Learner) -> Iterator[None]:
    "Inside, `learn` is contiguous, in float32, not compiled, without our callbacks. After it, it is as it was."
    attributes = dict(vars(learn))
    try:
        learn.model = uncompiled(learn.model)
        learn.cbs = L(cb for cb in learn.cbs if not isinstance(cb, _NOT_EXPORTED))
        for name, value in attributes.items():
            if isinstance(value, _NOT_EXPORTED):
                delattr(learn, name)
        with contiguous_weights(learn.model):
            yield
    finally:
        vars(learn).update(attributes)
