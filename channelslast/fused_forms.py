"The fused forms of fastai's optimizers: classes that they have while fused kernels make their steps."

from typing import Any

import torch
from fastai.optimizer import Lookahead, Optimizer
from torch import Tensor

from channelslast.cpu_copy import CpuCopy
from channelslast.fused_steps import Plan
from channelslast.nested import foreach

__all__ = ["Fused", "FusedLookahead", "FusedSteps", "plain_type"]


class Fused:
    "What the fused forms share. If only the GPU knows whether the last step overflowed, `settle` counts it later."

    found_inf: Tensor | None = None
    overflow: CpuCopy | None = None  # whether the last step did, asked for late
    plan: Plan | None = None

    def settle(self) -> None:
        "Count the last step, unless it overflowed. Waits for the GPU to have made it."
        overflow, self.overflow = self.overflow, None
        if overflow is not None and not overflow.wait():
            self.count_step()

    def plain_vars(self) -> dict[str, Any]:
        "The attributes that are fastai's or the user's."
        return {name: value for name, value in vars(self).items() if name not in ("found_inf", "overflow", "plan")}

    @torch.no_grad()
    def zero_grad(self) -> None:
        grads = [param.grad for group in self.param_lists for param in group]
        grads = [grad for grad in grads if grad is not None]
        for grad in grads:
            if grad.requires_grad:
                grad.detach_()
        if grads:
            foreach("zero_", grads)

    def clear_state(self) -> None:
        self.settle()
        super().clear_state()

    def state_dict(self) -> dict[str, Any]:
        self.settle()
        return super().state_dict()

    def load_state_dict(self, sd: dict[str, Any]) -> None:
        self.settle()
        super().load_state_dict(sd)

    def __reduce_ex__(self, protocol: int) -> tuple:
        self.settle()
        return object.__new__, (plain_type(self),), self.plain_vars()


class FusedSteps(Fused, Optimizer):
    "fastai's `Optimizer`."

    def step(self, closure: None = None) -> None:
        if closure is not None:
            raise NotImplementedError("fastai optimizers currently do not support closure")
        self.settle()
        found_inf = vars(self).pop("found_inf", None)
        if self.plan is None or not self.plan.holds(self):
            self.plan = Plan(self)
        if found_inf is None:
            self.plan.step(self, None)
            self.count_step()
            return
        found_inf = found_inf.clamp(max=1)  # kernels compare with 1, GradScaler adds up the flags of several GPUs
        self.overflow = CpuCopy(found_inf)
        if self.plan.plain and self.overflow.wait():  # fastai's functions cannot ask the GPU
            return
        self.plan.step(self, found_inf)

    def count_step(self) -> None:
        self.plan.count_step()


class FusedLookahead(Fused, Lookahead):
    "fastai's `Lookahead`, around `FusedSteps`."

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        if closure is not None:
            raise NotImplementedError("fastai optimizers currently do not support closure")
        self.settle()
        if self.slow_weights is None:
            self._copy_weights()
        found_inf = vars(self).pop("found_inf", None)
        if found_inf is not None:
            self.opt.found_inf = found_inf
        self.opt.step()
        if (self.count + 1) % self.k == 0:
            self._catch_up(found_inf)
        if found_inf is None:
            self.count_step()
        else:
            self.overflow = self.opt.overflow

    def count_step(self) -> None:
        self.count += 1

    def _catch_up(self, found_inf: Tensor | None) -> None:
        "Move the slow weights towards the fast ones, and the fast ones there too; do nothing if `found_inf` is not 0."
        slow_weights = [weight.data for group in self.slow_weights for weight in group]
        params = [param.data for group in self.param_lists for param in group]
        # all at once, but if two share their memory, or they are on several devices, one after the other
        are_distinct = len({param.data_ptr() for param in params}) == len(params)
        n_at_once = len(params) if are_distinct and len({param.device for param in params}) == 1 else 1
        for i in range(0, len(params), n_at_once):
            slow, fast = slow_weights[i : i + n_at_once], params[i : i + n_at_once]
            moves = foreach("sub", fast, slow)
            if found_inf is None:
                foreach("add_", slow, moves, alpha=self.alpha)
                foreach("copy_", fast, slow)
            else:
                is_step = (found_inf == 0).float().to(fast[0].device)  # 1 or 0, to multiply with: Python cannot ask
                foreach("mul_", moves, is_step * self.alpha)
                foreach("add_", slow, moves)
                foreach("mul_", fast, 1 - is_step)
                foreach("add_", fast, foreach("mul", slow, is_step))


def plain_type(
    opt: Any,  # an optimizer
) -> type:
    "Return the class of `opt` without its fused form."
    if isinstance(opt, Fused):
        return Lookahead if isinstance(opt, Lookahead) else Optimizer
    return type(opt)
