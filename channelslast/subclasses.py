"""Lets PyTorch compile models that make fastai's tensor subclasses, as its U-Net does in its last layer.

fastai's `TensorBase` copies the attributes of tensors along, in Python that PyTorch 2.11 cannot trace, and that 2.15
traces again and again inside itself. While a model is traced they are left alone; the classes of the tensors stay.
(PyTorch 2.6 traces no change of a tensor's class, and no attribute set on a tensor: there a U-Net does not compile.)
"""

from collections.abc import Callable
from typing import Any

import torch
from fastai.torch_core import TensorBase
from torch import Tensor

__all__: list[str] = []

_new = TensorBase.__new__
_torch_function = TensorBase.__torch_function__.__func__


def _new_or_traced(cls: type[TensorBase], x: Any, **kwargs) -> TensorBase:
    if torch.compiler.is_compiling() and type(x) is Tensor and not kwargs:
        return torch.as_subclass(x, cls)
    return _new(cls, x, **kwargs)


def _function_or_traced(cls: type[TensorBase], func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
    if torch.compiler.is_compiling():
        return super(TensorBase, cls).__torch_function__(func, types, args, kwargs or {})
    return _torch_function(cls, func, types, args, kwargs)


TensorBase.__new__ = _new_or_traced
TensorBase.__torch_function__ = classmethod(_function_or_traced)
Tensor.as_subclass = torch.compiler.disable(Tensor.as_subclass)  # fastai's; compiled code calls it for what it returns
