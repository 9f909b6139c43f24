"""A module called by replaying CUDA graphs of its forward and backward pass. PyTorch only.

In a small step the GPU waits: Python launches its kernels one by one, slower than the GPU runs them. A CUDA graph is
the recorded list of these launches, on fixed memory, which one call starts again. This file decides when a recorded
graph still does what the module would, and else runs the module as it is.
"""

import gc
from collections import deque
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn

from channelslast.graphs.capture import Graph, NotCapturedError, capture, check, error_in_words
from channelslast.graphs.ground import Ground
from channelslast.memory_format import has_lazy_parameters

__all__ = ["GraphedModule"]

_MAX_GRAPHS = 4  # each has gradients of its own; they share the memory of the activations
# Inputs of a kind are worth a graph once `_OFTEN` of the last `_RECENT` calls without one had this kind
_RECENT, _OFTEN = 32, 3


class GraphedModule:
    """Calls `module` by replaying CUDA graphs of its forward and backward pass, where that does what the module would.

    A graph is captured on the first call, and for inputs of another shape once they come often. The module runs as it
    is in evaluation mode, without gradients, and for inputs that no graph fits. When something changes that the graphs
    rest on (the memory or `requires_grad` of a parameter, the mode of a submodule, a hook, a number that a module
    keeps), they are given up, and captured anew once it stays. Capturing leaves buffers, gradients, random states and
    attributes as they were. What cannot be captured runs as it is from then on, and one warning says why.

    Replayed are the GPU's kernels. The module's Python does not run, nor do hooks inside of it. Outputs are copies.
    Gradients lie in the graphs' own memory: the next call overwrites a `.grad` that is None by then, as after
    `zero_grad()`, or said to be zero by `gradients_are_zero`; it copies any other first, so that gradients add up.
    Each call has one backward pass, for all outputs together, before the next call. What plain objects or lists of the
    module keep from one call to the next is not looked at.
    """

    def __init__(
        self,
        module: nn.Module,  # on one CUDA device
    ):
        self.module = module
        self.reason: str | None = None  # why nothing is captured any more
        self.captures_once = False  # for processes that have to capture together
        self.n_replays = 0
        self.n_writes = 0  # to the memory that the graphs share
        self._graphs: dict[tuple, Graph] = {}  # by the kind of their inputs, the last used one last
        self._recent: deque[tuple] = deque(maxlen=_RECENT)
        self._ground: Ground | None = None
        self._pool: Any = None
        self._gradients_are_zero = self._has_captured = False

    @property
    def n_graphs(self) -> int:
        "How many graphs there are at the moment."
        return len(self._graphs)

    def __call__(
        self,
        *inputs: Tensor,
    ) -> Any:
        "Return what `module(*inputs)` would; raises what it would."
        are_zero, self._gradients_are_zero = self._gradients_are_zero, False
        if self.reason or not self.module.training or not torch.is_grad_enabled():
            return self.module(*inputs)
        graph = self._graph_for(inputs)
        if graph is None:
            return self.module(*inputs)
        self._free_gradients(are_zero)
        self.n_replays += 1
        self.n_writes += 1
        return graph.replay(self, inputs)

    def why_not(
        self,
        inputs: tuple,
    ) -> str | None:
        "Return why `module` cannot be captured for `inputs`, as far as can be told without a try; None if it may be."
        try:
            check(self.module, inputs)
        except NotCapturedError as error:
            return str(error)
        return None

    def gradients_are_zero(self) -> None:
        "Say that every gradient was set to zero: the next call need not keep them."
        self._gradients_are_zero = True

    def release(self) -> None:
        "Give up the graphs and their memory."
        self._free_gradients(are_zero=False)
        self._recent.clear()
        self._ground = self._pool = None
        if self._graphs:
            self._graphs.clear()
            gc.collect()  # they stand in reference cycles

    def _graph_for(self, inputs: tuple) -> Graph | None:
        "The graph for `inputs`, captured now if it is time to; None to run the module."
        is_first = not self._recent
        if self._ground is not None and not self._ground.holds():
            self.release()
        kind = _kind(inputs)
        graph = self._graphs.pop(kind, None)
        if graph is None:
            self._recent.append(kind)
            is_seldom = not is_first and self._recent.count(kind) < _OFTEN
            if is_seldom or (self.captures_once and self._has_captured) or has_lazy_parameters(self.module):
                return None
            self._has_captured = True
            graph = self._try_to_capture(inputs)
        if graph is not None:
            self._graphs[kind] = graph
        return graph

    def _try_to_capture(self, inputs: tuple) -> Graph | None:
        while len(self._graphs) >= _MAX_GRAPHS:
            self._free_gradients(are_zero=False)
            self._graphs.pop(next(iter(self._graphs)))
        graph = None
        self.n_writes += 1
        try:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._ground = self._ground or Ground(self.module)
            graph = capture(self.module, inputs, self._pool, self._ground)
        except NotCapturedError as error:
            self.reason = str(error)
        except Exception as error:  # one of the module's own comes again from the call that follows
            self.reason = error_in_words(error, self.module)
        if graph is None:
            self.release()
            torch.cuda.empty_cache()
            warn(f"No CUDA graph of {type(self.module).__name__}, it runs as it is: {self.reason}")
        return graph

    def _free_gradients(self, are_zero: bool) -> None:
        "Leave no gradient in the memory that a replay writes to."
        graphs = self._graphs.values()
        written = set().union(*[graph.addresses for graph in graphs])
        for param in [param for graph in graphs for param in graph.params]:
            grad = param.grad
            if grad is not None and grad.data_ptr() in written:
                param.grad = None if are_zero else grad.clone()


def _kind(inputs: tuple) -> tuple:
    "Return what a graph is captured for: autocast, and the inputs' shapes and dtypes."
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    facts = [
        (type(x), x.shape, x.dtype, x.device, x.requires_grad) if isinstance(x, Tensor) else type(x) for x in inputs
    ]
    return *autocast, *facts
