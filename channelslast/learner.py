"Every method of `Learner` that sets how it trains, and what it saves, loads and exports."

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from fastai.callback.channelslast import ChannelsLast as FastaiChannelsLast  # first: its patches would undo ours
from fastai.callback.core import Callback, CancelFitException
from fastai.learner import Learner, load_model, save_model
from fastai.torch_core import get_model
from fastcore.basics import patch
from fastcore.foundation import L
from fastcore.meta import delegates
from fastcore.xtras import join_path_file
from torch import nn
from torch.amp import GradScaler
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from channelslast.callback import ChannelsLast, convert_learner
from channelslast.devices import FP32, AMPMode, to_amp_mode, training_device
from channelslast.events import LeanEvents, lean_events
from channelslast.fit import FIT_GOES_ON, FitDone
from channelslast.formats import MAKE_GRAPHS, TrainFormat, compile_mode, set_compile_mode, to_train_format, uncompiled
from channelslast.graphs import CudaGraph
from channelslast.memory_format import contiguous_weights, state_to_contiguous, supports_channels_last
from channelslast.nested import check_type
from channelslast.optimizer import FusedOptimizer, check_fused_optimizer
from channelslast.precision import (
    MIXED_PRECISIONS,
    amp_mode_in_use,
    check_scaler_options,
    choose_precision,
    remove_cbs,
    set_precision,
)


@patch
@delegates(GradScaler, but="device")
def to_channelslast(
    self: Learner,
    use_amp: bool = True,  # train in mixed precision of `amp_mode`; False: in float32
    amp_mode: str | AMPMode = AMPMode.FP16,  # 'fp16' or 'bf16'; 'fp32' for float32
    **kwargs,
) -> Learner:
    """Train in channels last format and mixed precision, whatever the Learner held before.

    `use_amp=True` trains in mixed precision of `amp_mode`: float16 by default, which a CPU without it replaces by
    bfloat16, with a warning. `use_amp=False` or 'fp32' trains in float32. The other parameters are the options of
    `torch.amp.GradScaler`, for float16; without any, a Learner that is in `amp_mode` keeps those it has. Compilation,
    CUDA graphs and fused steps stay as they are: `to_format` sets them.

    Raises `TypeError` for an unknown parameter and `ValueError` for an illegal value, or for bfloat16 on a GPU that has
    none. Nothing has changed then.
    """
    if not isinstance(use_amp, bool):
        is_mode = use_amp in (FP32, *AMPMode, *(mode.value for mode in AMPMode))
        meant = f"; as a precision: amp_mode={use_amp!r}" if is_mode else ""
        raise ValueError(f"use_amp={use_amp!r}: pass True or False{meant}")
    for name in kwargs.keys() & {field.name for field in fields(TrainFormat)}:
        code = TrainFormat(True, "fp16", "default").code
        raise TypeError(f"{name}={kwargs[name]!r} is no parameter here: `learn.to_format` sets that, as `{code}`")
    check_scaler_options(kwargs, ("use_amp", "amp_mode"))
    mode = to_amp_mode(amp_mode)
    return self.to_format(TrainFormat(True, mode if use_amp else None, **_python_in_step(self)), **kwargs)


@patch
def to_contiguous(
    self: Learner,
    to_fp32: bool = False,  # also remove mixed precision, of every kind
) -> Learner:
    """Put the model, its gradients and the optimizer state back in contiguous format, at once.

    Mixed precision stays as it is, unless `to_fp32=True`. Raises `TypeError` for any other than True and False.
    """
    check_type("to_fp32", to_fp32, bool)
    if to_fp32:
        return self.to_format(TrainFormat(False, None, **_python_in_step(self)))
    _set_channels_last(self, False)  # and nothing else: mixed precision stays, of whatever kind it is
    return self


@patch
@delegates(GradScaler, but="device")
def to_format(
    self: Learner,
    fmt: TrainFormat | str,  # as a TrainFormat, or in the words in which one prints: 'channels last bf16'
    **kwargs,
) -> Learner:
    """Train in `fmt` from the next fit on, whatever the Learner held before; leaving channels last happens at once.

    Takes the options of `torch.amp.GradScaler`. Raises `TypeError` and `ValueError` as `to_channelslast` does, and
    `ValueError` for `cuda_graph` on a device without CUDA or `fused_optimizer` with an optimizer that has no fused
    form. Nothing has changed then.
    """
    fmt = to_train_format(fmt)
    device, has = training_device(self), _python_in_step(self)  # what it has already is not checked again
    if fmt.cuda_graph and not has["cuda_graph"] and device.type != "cuda":
        raise ValueError(f"cuda_graph=True: the Learner trains on the device '{device}', which has no CUDA graphs")
    if fmt.fused_optimizer and not has["fused_optimizer"]:
        check_fused_optimizer(self, device)
    precision = choose_precision(self, fmt.amp_mode, **kwargs)
    set_compile_mode(self, fmt.compile)
    _set_callback(self, CudaGraph, fmt.cuda_graph)
    _set_callback(self, FusedOptimizer, fmt.fused_optimizer)
    _set_channels_last(self, fmt.channels_last)
    return set_precision(self, precision)


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


@patch(as_prop=True)
def train_format(self: Learner) -> TrainFormat:
    "The format in which the next fit trains, with what the device makes of the precision asked for."
    channels_last = any(isinstance(cb, FastaiChannelsLast) for cb in self.cbs)
    channels_last = channels_last and supports_channels_last(training_device(self))
    return TrainFormat(channels_last, amp_mode_in_use(self), **_python_in_step(self))


def _is_lean(learn: Learner) -> bool:
    "Whether a field is set that promises to take Python out of the step."
    return any(isinstance(cb, (CudaGraph, FusedOptimizer)) for cb in learn.cbs)


def _python_in_step(learn: Learner) -> dict[str, Any]:
    "The fields of `learn.train_format` that say how much Python there is in a step."
    has = {cls: any(isinstance(cb, cls) for cb in learn.cbs) for cls in (CudaGraph, FusedOptimizer)}
    mode = compile_mode(learn.model)
    return {
        "compile": mode,
        "cuda_graph": has[CudaGraph] and mode not in MAKE_GRAPHS,
        "fused_optimizer": has[FusedOptimizer],
    }


def _set_channels_last(learn: Learner, channels_last: bool) -> None:
    ours = [cb for cb in learn.cbs if isinstance(cb, ChannelsLast)]
    keep = ours[:1] if channels_last else []
    remove_cbs(learn, [cb for cb in learn.cbs if isinstance(cb, FastaiChannelsLast) and cb not in keep])
    for cb in ours:
        cb.remove_hooks()
    if channels_last and not keep:
        learn.add_cb(ChannelsLast())
    if not channels_last:
        convert_learner(learn, channels_last=False)


def _set_callback(learn: Learner, cls: type[Callback], is_on: bool) -> None:
    "Leave one callback of `cls` on `learn`, or none."
    found = [cb for cb in learn.cbs if isinstance(cb, cls)]
    remove_cbs(learn, found[is_on:])
    if is_on and not found:
        learn.add_cb(cls())


class _Portable:
    "Stands in for a model or optimizer where it is saved: its `state_dict` is contiguous."

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


# What stays out of a file of `export`; fastai's `load_learner` drops the callbacks on a CPU
_NOT_EXPORTED = (FastaiChannelsLast, CudaGraph, FusedOptimizer, LeanEvents, *MIXED_PRECISIONS)

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

    The file loads where only fastai is: a contiguous model that is not compiled, no mixed precision, and none of this
    package's callbacks. Call `to_channelslast` or `to_format` on what `load_learner` returns. `self` stays as it is.
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


_all_batches = Learner.all_batches


@patch
def all_batches(self: Learner):
    """Train or evaluate `self.model` on all batches of `self.dl`.

    Inside of what `around_batches` of callbacks returns; an exception is shown to them with `after_exception`.
    """
    try:
        with ExitStack() as stack, lean_events(self) if _is_lean(self) else nullcontext():
            for cb in self.cbs:
                if hasattr(type(cb), "around_batches"):
                    stack.enter_context(cb.around_batches())
            _all_batches(self)
    except BaseException as error:  # no event of fastai's follows one that it does not know
        with ExitStack() as stack:  # all of them, also where one is interrupted
            for cb in self.cbs:
                if hasattr(type(cb), "after_exception"):
                    stack.callback(_tell, cb, error)
        raise


def _tell(cb: Callback, error: BaseException) -> None:
    "Show `error` to `cb`. What fails while cleaning up does not take its place, unless fastai catches it in silence."
    try:
        cb.after_exception(error)
    except Exception as another:
        if isinstance(error, (*FIT_GOES_ON, CancelFitException, FitDone)):
            raise
        error.add_note(f"channelslast: {cb.name}.after_exception failed too: {type(another).__name__}: {another}")


_call = Learner.__call__


@patch
def __call__(
    self: Learner,
    event_name: str | list[str],  # one event, or several
) -> None:
    "Call `event_name` for all `Callback`s in `self.cbs`."
    events = vars(self).get("_call_one")
    if isinstance(events, LeanEvents) and isinstance(event_name, str):  # without a list around one name
        events(event_name)
    else:
        _call(self, event_name)
