"`TrainFormat`, how a Learner trains; and how a module's compile mode is read and set."

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from fastai.learner import Learner
from fastai.torch_core import ismin_torch
from torch import nn

from channelslast.devices import AMPMode, to_amp_mode

__all__ = ["COMPILE_MODES", "TrainFormat", "to_train_format"]

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
MAKE_GRAPHS = ("reduce-overhead", "max-autotune")  # those that make CUDA graphs of their own


@dataclass(frozen=True)
class TrainFormat:
    """How a Learner trains: memory format, precision, and what takes Python out of the step.

    Raises `ValueError` for a value that does not exist, and for `cuda_graph` with a mode of `torch.compile` that makes
    CUDA graphs of its own.
    """

    channels_last: bool = False  # False: contiguous
    amp_mode: str | None = None  # 'fp16' or 'bf16'; None, also written 'fp32', for float32
    compile: str | None = None  # a mode of `torch.compile`, or None for eager
    cuda_graph: bool = False  # replay the model's forward and backward pass as a CUDA graph
    fused_optimizer: bool = False  # have fastai's own optimizer step with PyTorch's fused kernels

    def __post_init__(self):
        for name in ("channels_last", "cuda_graph", "fused_optimizer"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: pass True or False")
        if self.amp_mode is not None:
            mode = to_amp_mode(self.amp_mode)
            object.__setattr__(self, "amp_mode", mode and mode.value)
        if self.compile is not None and self.compile not in COMPILE_MODES:
            raise ValueError(f"compile={self.compile!r} does not exist: pass None or one of {COMPILE_MODES}")
        if self.cuda_graph and self.compile in MAKE_GRAPHS:
            raise ValueError(
                f"cuda_graph=True with compile={self.compile!r}: that mode makes CUDA graphs of its own, pass "
                "compile='default'"
            )

    def __str__(self) -> str:
        words = ["channels last" if self.channels_last else "contiguous", self.amp_mode or "fp32"]
        if self.compile is not None:
            words.append("compiled" if self.compile == "default" else f"compiled ({self.compile})")
        words += ["graph"] * self.cuda_graph + ["fused"] * self.fused_optimizer
        return " ".join(words)

    @property
    def code(self) -> str:
        "The line of Python that puts a Learner called `learn` in this format."
        return f'learn.to_format("{self}")'


def to_train_format(
    fmt: TrainFormat | str,  # a str is what a TrainFormat prints, as 'channels last bf16'
    name: str = "fmt",  # of the argument, for errors
) -> TrainFormat:
    "Return `fmt` as a TrainFormat; raises `TypeError`, or `ValueError` for a str that no TrainFormat prints."
    if isinstance(fmt, TrainFormat):
        return fmt
    if not isinstance(fmt, str):
        legal = "pass one, as TrainFormat(True, 'fp16'), or what it prints"
        raise TypeError(f"{name}={fmt!r} is not a TrainFormat: {legal}")
    legal = {str(each): each for each in _every_format()}
    words = " ".join(fmt.lower().split())
    if words not in legal:
        close = sorted(legal, key=lambda each: _likeness(words, each), reverse=True)[:3]
        raise ValueError(f"{name}={fmt!r} is no format: did you mean {' or '.join(map(repr, close))}?")
    return legal[words]


def _likeness(words: str, others: str) -> float:
    "How much two formats have in common, in any order of their words; of as much the shorter one."
    first, second = (set(each.replace("channelslast", "channels last").split()) for each in (words, others))
    in_common = len(first & second) / len(first | second)
    return in_common + difflib.SequenceMatcher(None, words, others).ratio()


def _every_format() -> Iterator[TrainFormat]:
    amp_modes, switch = (None, *(mode.value for mode in AMPMode)), (False, True)
    for channels_last, amp_mode, mode, graph, fused in product(
        switch, amp_modes, (None, *COMPILE_MODES), switch, switch
    ):
        if not (graph and mode in MAKE_GRAPHS):
            yield TrainFormat(channels_last, amp_mode, mode, graph, fused)


# The mode of each wrapper with which `to_format` compiled a module. A pickled or deep-copied module has none.
_modes: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def uncompiled(
    model: nn.Module,
) -> nn.Module:
    "Return the module inside `model` if it is the wrapper that `torch.compile` returns, else `model`."
    if type(model).__module__.startswith("torch._dynamo."):  # the class has no public name
        (model,) = model.children()
    return model


def _wrapper(model: nn.Module) -> Any:
    """Return what PyTorch calls for a module that is compiled in place.

    The module itself where it is not compiled, or where PyTorch has renamed the private attribute.
    """
    return getattr(model, "_compiled_call_impl", None) or model


def compile_mode(
    model: nn.Module,
) -> str | None:
    "Return the mode in which PyTorch compiles `model`, in place or in a wrapper module; None for eager."
    if uncompiled(model) is not model:
        return _configured_mode(model)
    wrapper = _wrapper(model)
    if wrapper in _modes:
        return _modes[wrapper]
    return None if wrapper is model else _configured_mode(wrapper)


def _configured_mode(compiled: Callable) -> str:
    "Return the mode that what `torch.compile` returned tells of itself; 'default' where it tells none, as a copy."
    config = compiled.get_compiler_config() if hasattr(compiled, "get_compiler_config") else None
    if config is None:
        return "default"
    options = torch._inductor.list_mode_options()
    # The mode with the most options first: 'default' has none, which any configuration contains
    modes = sorted(COMPILE_MODES, key=lambda mode: len(options[mode]), reverse=True)
    return next(mode for mode in modes if options[mode].items() <= config.items())


def set_compile_mode(
    learn: Learner,
    mode: str | None,  # None: eager
) -> None:
    "Compile the model of `learn` in place in `mode`, or no longer; a wrapper module of another mode is taken off."
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
            # before 2.15 PyTorch leaves a module whose `forward` is its own, as nn.Sequential, eager without a word
            model._compiled_call_impl = torch.compile(_in_own_frame(model._call_impl), mode=mode)
        _modes[_wrapper(model)] = mode
        return
    model.compile(disable=True)
    vars(model).pop("_compiled_call_impl", None)  # what is left of it: a wrapper that does nothing
    _modes.pop(model, None)


def _in_own_frame(function: Callable) -> Callable:
    "Return a function that calls `function`: of code that is not its own, PyTorch compiles (pytorch/pytorch#185722)."

    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return call
