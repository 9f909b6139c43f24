"Set and reset the flag `fused=True` of PyTorch's own optimizers, any whose class takes it."

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from channelslast.memory_format import match_strides

__all__ = ["begin_momentum", "is_fused", "reads_found_inf", "reset_fused_flag", "set_fused_flag", "why_no_fused_flag"]


def reads_found_inf(
    opt: Any,  # an optimizer of PyTorch's
) -> bool:
    "Whether its steps read the attribute `found_inf` on the GPU, and change nothing if it is 1."
    reads = getattr(opt, "_step_supports_amp_scaling", False)  # the constructor sets it with fused=True
    return reads and is_fused(opt) and not any(map(_begins_undampened, opt.param_groups))


def is_fused(
    opt: Any,  # an optimizer of PyTorch's
) -> bool:
    "Whether fused kernels make all steps of `opt`, as the flags of its groups say."
    return all(group.get("fused") for group in opt.param_groups)


def _begins_undampened(group: dict[str, Any]) -> bool:
    "Whether SGD begins its momentum with the whole gradient, which a step from a momentum of zeros would dampen."
    return bool(group.get("momentum") and group.get("dampening"))


def begin_momentum(
    opt: torch.optim.Optimizer,
) -> None:
    """Give parameters with a gradient a momentum of zeros where SGD has none yet.

    PyTorch's fused step would make a buffer of whatever is in memory, and leave it so if the gradients overflowed; and
    it fails where some parameters have a buffer and others do not.
    """
    for group in opt.param_groups:
        if group.get("momentum") and not _begins_undampened(group):
            for param in group["params"]:
                if param.grad is not None and opt.state[param].get("momentum_buffer") is None:
                    opt.state[param]["momentum_buffer"] = torch.zeros_like(param.data)


def why_no_fused_flag(
    opt: Any,  # an optimizer of PyTorch's
) -> str:
    """Return why `opt` cannot step with `fused=True`, '' if it can.

    Found by steps of small optimizers of its class, on the devices of its parameters: this waits for a GPU.
    """
    if is_fused(opt):
        return ""
    if any(map(_begins_undampened, opt.param_groups)):
        return "fused steps with dampening begin otherwise"
    params = [param for group in opt.param_groups for param in group["params"]]
    if any(param.grad is not None and param.grad.layout is not torch.strided for param in params):
        return "fused kernels take no sparse gradients"
    for device, dtype in {(param.device, param.dtype) for param in params}:
        try:
            fused, plain = (_Trial(opt, device, dtype, flag).step().step() for flag in (True, False))
        except Exception as error:
            return f"{type(opt).__name__} with fused=True: {error}"
        if not fused.is_close(plain):
            return f"{type(opt).__name__} with fused=True makes other steps"
    return ""


class _Trial:
    "An optimizer of the class and with the defaults of another one, for one small parameter."

    def __init__(self, like: Any, device: torch.device, dtype: torch.dtype, fused: bool):
        # more than fit in a vector of the CPU's: SGD of PyTorch 2.6 steps only what is left of them in half precision
        self.param = nn.Parameter(torch.ones(65, device=device, dtype=dtype))
        known = inspect.signature(type(like)).parameters
        options = {name: value for name, value in like.defaults.items() if name in known and name != "foreach"}
        self.opt = type(like)([self.param], **{**options, "lr": 0.5, "fused": fused})
        if fused and not is_fused(self.opt):
            raise TypeError("it takes no notice of it")

    def step(self, found_inf: float | None = None) -> "_Trial":
        self.param.grad = self.param.detach().clone()
        if found_inf is not None:
            self.opt.grad_scale, self.opt.found_inf = None, torch.full((), found_inf, device=self.param.device)
        begin_momentum(self.opt)
        self.opt.step()
        return self

    def is_close(self, other: "_Trial") -> bool:
        "Whether the parameter and its state have the values of those of `other`."
        rtol = torch.finfo(self.param.dtype).eps * 16
        pairs = [(self.param, other.param)]
        pairs += [(value, other.opt.state[other.param][name]) for name, value in self.opt.state[self.param].items()]
        # also by `atol`: what steps of 0.5 leave of a parameter of 1 may be next to nothing
        return all(
            torch.allclose(a.cpu().float(), b.cpu().float(), rtol, atol=rtol) for a, b in pairs if isinstance(a, Tensor)
        )


def _can_read_found_inf(opt: torch.optim.Optimizer) -> bool:
    "Whether the fused steps of `opt` change nothing where its `found_inf` is 1, the first one too."
    param = opt.param_groups[0]["params"][0]
    overflowed, plain = (_Trial(opt, param.device, param.dtype, True) for _ in range(2))
    if not reads_found_inf(overflowed.opt):
        return False
    return overflowed.step(found_inf=1.0).step(found_inf=0.0).is_close(plain.step())


def set_fused_flag(
    opt: torch.optim.Optimizer,  # for which `why_no_fused_flag` is ''
) -> None:
    """Let fused kernels make the steps of `opt` until `reset_fused_flag`.

    It stays the same object. Its state dicts have the flags of before, and counts of steps on the device of before.
    """
    if opt not in _changes and not is_fused(opt):
        _changes[opt] = _Changes(opt)


def reset_fused_flag(
    opt: torch.optim.Optimizer,
) -> None:
    "Undo `set_fused_flag`. The state stays where training has come to."
    if opt in _changes:
        _changes.pop(opt).undo(opt)


class _Changes:
    "What `set_fused_flag` changed of an optimizer, to undo it: flags, attributes, and the hooks that it put on."

    def __init__(self, opt: torch.optim.Optimizer):
        self.names = set(vars(opt))
        self.flags: list[dict[str, Any]] = []  # of each group, as they were
        if _can_read_found_inf(opt):
            opt._step_supports_amp_scaling = True
        self.apply(opt)
        self.hooks = [
            opt.register_state_dict_post_hook(self._to_plain),
            opt.register_load_state_dict_post_hook(self.apply),
            opt.register_step_pre_hook(lambda opt, args, kwargs: begin_momentum(opt)),
        ]

    def apply(self, opt: torch.optim.Optimizer) -> None:
        "Set the flags of the groups. Gradients and state get what the kernels need: strides, device."
        self.flags = []
        for group in opt.param_groups:
            self.flags.append({name: group[name] for name in ("fused", "foreach") if name in group})
            group.update({name: name == "fused" for name in self.flags[-1]})
            for param in group["params"]:
                match_strides(param.grad, param)
                state = opt.state.get(param, {})
                for value in state.values():
                    match_strides(value, param)
                if "step" in state:
                    state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=param.device)

    def undo(self, opt: torch.optim.Optimizer) -> None:
        for hook in self.hooks:
            hook.remove()
        for group, flags in zip(opt.param_groups, self.flags):
            group.update(flags)
            for param in group["params"]:
                if param in opt.state:
                    opt.state[param] = _with_plain_step(opt.state[param], group)
        for name in set(vars(opt)) - self.names:
            if name in ("_step_supports_amp_scaling", "_need_device_dtype_check_for_fused", "found_inf", "grad_scale"):
                delattr(opt, name)

    def _to_plain(self, opt: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = dict(state_dict["state"])
        for group, flags in zip(state_dict["param_groups"], self.flags):
            group.update(flags)
            state.update({i: _with_plain_step(state[i], group) for i in group["params"] if i in state})
        return {**state_dict, "state": state}


def _with_plain_step(state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    "Return `state` with its count of steps on the device where PyTorch has it for the flags of `group`."
    if "step" not in state or group.get("fused") or group.get("capturable"):
        return state
    return {**state, "step": state["step"].cpu()}


_changes: WeakKeyDictionary[torch.optim.Optimizer, _Changes] = WeakKeyDictionary()
