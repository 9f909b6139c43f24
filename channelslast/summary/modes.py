"What calls the tracer for each operator: a dispatch mode, and one that sees through higher-order operators."

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["HigherOrderMode", "OperatorMode"]


class OperatorMode(TorchDispatchMode):
    "Runs each operator by `run`."

    # Higher-order operators that `HigherOrderMode` leaves run as they are. (PyTorch reads this from 2.9 on.)
    supports_higher_order_operators = True

    def __init__(self, run: Callable[[Any, tuple, dict], Any]):
        super().__init__()
        self.run = run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _is_higher_order(func):
            return func(*args, **(kwargs or {}))
        return self.run(func, args, kwargs or {})


class HigherOrderMode(TorchFunctionMode):
    """Runs higher-order operators as the plain code that they stand for, and has `watching` see what that runs.

    Where there is neither a compiler nor a mode, PyTorch runs `torch.cond` and `while_loop` in Python: it calls the
    functions that they are given, with the gradients of a plain step. Below a mode it would trace these functions with
    fake tensors instead, which fails if they use a module's weights.
    """

    def __init__(self, watching: TorchDispatchMode):
        super().__init__()
        self.watching = watching

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        plain = _plain_code(func) if _is_higher_order(func) and self._is_innermost() else None
        if plain is None:
            return func(*args, **kwargs)
        args = [self._watched(arg) for arg in args]
        kwargs = {name: self._watched(arg) for name, arg in kwargs.items()}
        self.watching.__exit__(None, None, None)  # the plain code refuses to run below a mode
        try:
            return plain(*args, **kwargs)
        finally:
            self.watching.__enter__()

    def _is_innermost(self) -> bool:
        "Whether ours is the innermost mode: leaving it would else take off one of the model's own."
        innermost = getattr(_python_dispatch, "_get_current_dispatch_mode", lambda: self.watching)
        return innermost() is self.watching

    def _watched(self, arg: Any) -> Any:
        "Return `arg`, a function as one that is watched again while it runs."
        if not callable(arg) or isinstance(arg, Tensor):
            return arg

        def call(*args, **kwargs):
            with self, self.watching:
                return arg(*args, **kwargs)

        return call


def _is_higher_order(func: Any) -> bool:
    return getattr(func, "namespace", None) == "higher_order"


def _plain_code(higher_order: Any) -> Callable[..., Any] | None:
    "Return the Python function that PyTorch calls for the operator without compiler or mode, if there is one."
    kernels = getattr(higher_order, "py_kernels", {})
    return next((kernel for key, kernel in kernels.items() if key.name == "CompositeExplicitAutograd"), None)
