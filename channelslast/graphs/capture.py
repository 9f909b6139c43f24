"Capture a module's forward and backward pass as CUDA graphs, and leave all else as it was. PyTorch only."

import gc
import inspect
import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from channelslast.errors import raised_in
from channelslast.graphs.ground import HOOKS, MEMBERS, Ground, has_sync_norm, module_in_words, set_since
from channelslast.nested import map_tensors, tensors_in

__all__ = ["Graph", "NotCapturedError", "capture", "check", "error_in_words"]


class NotCapturedError(Exception):
    "Says in words why a module cannot be replayed."


def capture(
    module: nn.Module,
    inputs: tuple,
    pool: Any,  # of `torch.cuda.graph_pool_handle`, the memory that graphs of `module` share
    ground: Ground,  # of `module`, as it is
) -> "Graph":
    "Capture `module` for inputs like these; raises `NotCapturedError`, or what PyTorch or the module raises."
    check(module, inputs)
    device = inputs[0].device
    before = [(name, vars(submodule), dict(vars(submodule))) for name, submodule in module.named_modules()]
    with torch.cuda.device(device), _unchanged_by_capture(module, device):
        _warm_up(module, inputs)
        graph = Graph(module, inputs, pool)
        if changed := ground.change() or set_since(before):
            raise NotCapturedError(f"its forward pass changes {changed} in Python, which a replay would not")
    return graph


def error_in_words(
    error: Exception,
    module: nn.Module,
) -> str:
    "Return what `error` says, and in which part of `module` it was raised, if that can be told."
    where = raised_in(error, module)
    message = str(error).partition("\n")[0]
    place = f" in {module_in_words(where)}" if where is not None else ""
    return f"{type(error).__name__}{place}: {message}"


class Graph:
    "The captured forward and backward pass for inputs of one kind."

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...], pool: Any):
        params = [param for param in module.parameters() if param.requires_grad]
        static = tuple(tensor.detach().clone() for tensor in inputs)
        # No warm-up of PyTorch's, but `_warm_up`: it makes workspaces in streams that nothing else uses.
        # (ROCm, where this has not been run, may want a warm-up in the stream of the capture.)
        options = {"num_warmup_iters": 0, "allow_unused_input": True, "pool": pool}
        if "capture_error_mode" in inspect.signature(torch.cuda.make_graphed_callables).parameters:
            options["capture_error_mode"] = "thread_local"  # a thread that pins batches in memory may go on
        _renew_accumulators(params)
        try:
            with _uncached_autocast(), warnings.catch_warnings():
                # that streams wait for one another in the backward pass: here they do so at the capture alone
                warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
                self.callable = torch.cuda.make_graphed_callables(_Body(module), static, **options)
        finally:
            _renew_accumulators(params)
            _clear_workspaces()
        outputs = [output for output in tensors_in(self.callable(*inputs)) if output.requires_grad]
        zeros = [torch.zeros_like(output) for output in outputs]
        # A backward pass returns the gradients where each replay will write them: remember the addresses
        gradients = torch.autograd.grad(outputs, params, zeros, allow_unused=True)
        given = [(param, grad) for param, grad in zip(params, gradients, strict=True) if grad is not None]
        self.params = [param for param, _ in given]
        self.addresses = {grad.data_ptr() for _, grad in given}

    def replay(
        self,
        owner: Any,  # of all graphs that share their memory: the GraphedModule, with `n_replays` and `n_writes`
        inputs: tuple[Tensor, ...],
    ) -> Any:
        "Return what the module would for `inputs`; its backward pass has to come before the next replay."
        output = self.callable(*inputs)
        copies = iter(_Copies.apply(owner, owner.n_writes, *tensors_in(output)))
        return map_tensors(lambda tensor: next(copies), output)


def _clear_workspaces() -> None:
    """Have cuBLAS give up its workspaces, of all threads and streams; the next call makes one.

    PyTorch before 2.15 keeps one (32 MB on a Hopper GPU) for each thread and stream, whichever graph's memory it is
    from: another graph would use it after that one is freed (pytorch/pytorch#193402). So a capture begins without any,
    to take them from the memory of its graph, and leaves none. PyTorch's own CUDA graphs of compiled models do so too.
    Without this private function there is more memory that is not given back.
    """
    getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()


def _renew_accumulators(params: list[Tensor]) -> None:
    """Have autograd make the nodes that accumulate gradients anew, in the stream of the next step.

    A node stays in the stream of the step that made it, for as long as a graph of that step is held, as by the last
    loss. In another stream a capture fails, or each backward pass waits. PyTorch drops the node of a tensor whose
    `data` move to another device (`VariableHooks::set_data`).
    """
    for param in params:
        data = param.data
        try:
            param.data = torch.empty(0, dtype=data.dtype, device="cpu")
        finally:
            param.data = data


class _Body(nn.Module):
    "Stands between PyTorch, which replaces the `forward` of what it captures, and the module."

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)


class _Copies(torch.autograd.Function):
    "Copies of a replay's outputs, whose backward pass makes sure that no later replay has written over what it needs."

    @staticmethod
    def forward(ctx: Any, owner: Any, n_writes: int, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.owner, ctx.n_writes = owner, n_writes
        return tuple(output.clone() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        if ctx.n_writes != ctx.owner.n_writes:
            raise RuntimeError(
                "A CUDA graph was replayed, or went backward, since this output was computed, and has overwritten what "
                "its backward pass needs: call `backward` once for all outputs together, before the next forward pass, "
                "or train without `cuda_graph`"
            )
        ctx.owner.n_replays += 1
        ctx.owner.n_writes += 1
        return None, None, *grads


def check(
    module: nn.Module,
    inputs: tuple,
) -> None:
    "Raise `NotCapturedError`, which says why `module` cannot be captured, for what PyTorch would not say or not see."
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise NotCapturedError(f"{type(module).__name__} spreads it over several GPUs")
    if not inputs or not all(isinstance(tensor, Tensor) and tensor.layout is torch.strided for tensor in inputs):
        raise NotCapturedError(f"its inputs are {', '.join(type(x).__name__ for x in inputs) or 'none'}, not tensors")
    if any(tensor.requires_grad for tensor in inputs):
        raise NotCapturedError("its inputs take gradients")
    tensors = [*module.parameters(), *module.buffers()]
    devices = {tensor.device for tensor in (*inputs, *tensors)}
    if len(devices) > 1 or next(iter(devices)).type != "cuda":
        raise NotCapturedError(
            f"it and its inputs lie on {', '.join(sorted(map(str, devices)))}, not on one CUDA device"
        )
    if not any(tensor.requires_grad for tensor in tensors):
        raise NotCapturedError("no parameter takes a gradient")
    held = _held_by(module)
    for name, submodule in module.named_modules():
        hooks = [hook for kind in HOOKS for hook in vars(submodule).get(kind, {}).values()]
        if not all(_belongs_to(hook, held) for hook in hooks):
            raise NotCapturedError(f"{module_in_words(name)} has hooks of others, which a replay would not call")
    for name, param in module.named_parameters():
        if getattr(param, "_backward_hooks", None) or getattr(param, "_post_accumulate_grad_hooks", None):
            raise NotCapturedError(f"the parameter `{name}` has hooks, which a capture would apply twice")


def _held_by(module: nn.Module) -> set[int]:
    "Return the `id` of each module in `module`, and of what these hold as attributes."
    held = [*module.modules()]
    for value in [value for submodule in module.modules() for value in vars(submodule).values()]:
        held += value if isinstance(value, (list, tuple)) else [value]
    return set(map(id, held))


def _belongs_to(hook: Any, held: set[int]) -> bool:
    """Whether `hook` is part of the model: its own object's, as fastai's U-Net has them, or PyTorch's for a weight.

    What such a hook keeps is for the forward pass itself, and is captured with it.
    """
    while isinstance(hook, partial):
        hook = hook.func
    owner = getattr(hook, "__self__", hook)
    return id(owner) in held or type(owner).__module__.startswith("torch.nn.utils.")


def _uncached_autocast() -> Any:
    "Return a context of autocast as it is, without its cache of weights, which a capture must not use."
    if not torch.is_autocast_enabled("cuda"):
        return nullcontext()
    return torch.autocast("cuda", dtype=torch.get_autocast_dtype("cuda"), cache_enabled=False)


def _warm_up(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Run a step that makes what is made once, and then one that raises where the CPU would wait for the GPU.

    In a capture nothing can wait. One that fails for it does not tell where, and leaves PyTorch's random generator and
    its allocator in the state of a capture. (SyncBatchNorm waits, but not in a capture.)
    """
    _step(module, inputs)
    if not has_sync_norm(module):
        mode = torch.cuda.get_sync_debug_mode()
        _set_sync_debug_mode("error")
        try:
            _step(module, inputs)
        finally:
            _set_sync_debug_mode(mode)
    _clear_workspaces()
    torch.cuda.empty_cache()  # else the capture, in a stream of its own, would have none of this memory


def _step(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    with _uncached_autocast():
        outputs = [output for output in tensors_in(module(*inputs)) if output.requires_grad]
    params = [param for param in module.parameters() if param.requires_grad]
    torch.autograd.grad(outputs, params, list(map(torch.empty_like, outputs)), allow_unused=True)


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it does not see all, and says so
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def _unchanged_by_capture(module: nn.Module, device: torch.device) -> Iterator[None]:
    "Put back what the forward passes of a capture change, and what a capture that fails leaves behind."
    stream = torch.cuda.current_stream(device)
    cpu_states = _cpu_states()
    with ExitStack() as restore:  # calls the last first, and all of them even if one raises
        if gc.isenabled():
            restore.callback(gc.enable)
        restore.callback(torch.cuda.empty_cache)  # of the warm-up, which has run in a stream of its own
        restore.callback(random.setstate, random.getstate())
        restore.callback(np.random.set_state, np.random.get_state())
        restore.callback(torch.set_rng_state, torch.get_rng_state())
        restore.callback(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device)
        for buffer in module.buffers():
            restore.callback(_copy_back, buffer, buffer.detach().clone())
        for attributes in map(vars, module.modules()):
            restore.callback(_put_back, attributes, dict(attributes))
            for members in [attributes[kind] for kind in MEMBERS if kind in attributes]:
                restore.callback(_put_back, members, dict(members))
        try:
            gc.collect()
            gc.disable()  # an earlier CUDA graph that is freed during a capture would spoil it
            torch.cuda.empty_cache()
            yield
            if _cpu_states() != cpu_states:
                raise NotCapturedError("it draws random numbers on the CPU, which a replay would repeat")
        except BaseException:
            _leave_capture(stream)
            raise


@torch.no_grad()
def _copy_back(buffer: Tensor, values: Tensor) -> None:
    buffer.copy_(values)


def _put_back(owner: dict[str, Any], saved: dict[str, Any]) -> None:
    for name in owner.keys() - saved.keys():
        del owner[name]
    owner.update(saved)


def _cpu_states() -> tuple:
    "Return the states of Python's, NumPy's and PyTorch's random generators in a form that `!=` compares."
    _, keys, *rest = np.random.get_state()
    return random.getstate(), (keys.tolist(), *rest), torch.get_rng_state().tolist()


def _leave_capture(stream: torch.cuda.Stream) -> None:
    """Go on in `stream`, and take the GPU's random generator out of a capture that CUDA broke off.

    PyTorch does neither by itself (seen in 2.11), and dropout would raise "Offset increment outside graph capture". A
    small capture that succeeds takes the generator out.
    """
    torch.cuda.set_stream(stream)
    with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=stream.device)
    torch.cuda.set_stream(stream)
