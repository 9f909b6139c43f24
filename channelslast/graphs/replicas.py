"""What `DistributedDataParallel` does around a step, for a module that is replayed inside of it. PyTorch only.

A replay makes all gradients at once, and the hooks with which `DistributedDataParallel` sends them as they come belong
to nodes of autograd that a capture makes anew. So the module itself is called, and what the wrapper sends is sent here.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from channelslast.nested import foreach

__all__ = ["Replicas"]


class Replicas:
    "The copies of a module in the processes of its `DistributedDataParallel`: their buffers and gradients stay alike."

    def __init__(
        self,
        wrapper: nn.parallel.DistributedDataParallel,
    ):
        self.wrapper, self.group = wrapper, wrapper.process_group
        self.params = [param for param in wrapper.module.parameters() if param.requires_grad]
        # dense, and in the order of the weights: the same in each process, whatever its kernels make
        self.strides = [torch.empty_like(param, device="meta").stride() for param in self.params]
        self.buffers = list(wrapper.module.buffers()) if wrapper.broadcast_buffers else []

    @property
    def reason(self) -> str | None:
        "Why the wrapper has to send by itself, None if it has not."
        wrapper = self.wrapper
        if wrapper.find_unused_parameters:
            return "DistributedDataParallel looks for unused parameters (find_unused_parameters=True)"
        if getattr(wrapper, "_comm_hooks", None):
            return "DistributedDataParallel has a communication hook"
        if hasattr(wrapper.module, "_ddp_params_and_buffers_to_ignore"):
            return "DistributedDataParallel ignores some parameters"
        if any(getattr(module, "sparse", False) for module in wrapper.module.modules()):
            return "embeddings have sparse gradients"
        return None

    def agree(
        self,
        reason: str | None,  # why this process cannot use graphs
    ) -> str | None:
        "Wait for the other processes, and return the first reason that one of them has, the same in each."
        reasons: list[Any] = [None] * self.group.size()
        dist.all_gather_object(reasons, reason, group=self.group)
        return next(filter(None, reasons), None)

    def new_wrapper(self) -> nn.parallel.DistributedDataParallel:
        "Return another wrapper like this one: a capture, also one that failed, may have parted it from the module."
        old = self.wrapper
        return nn.parallel.DistributedDataParallel(
            old.module,
            device_ids=old.device_ids,
            output_device=old.output_device,
            dim=old.dim,
            broadcast_buffers=old.broadcast_buffers,
            process_group=old.process_group,
            gradient_as_bucket_view=old.gradient_as_bucket_view,
            static_graph=old.static_graph,
        )

    @torch.no_grad()
    def send_buffers(self) -> None:
        "Give the buffers the values that they have in the first process, as the wrapper does before a forward pass."
        if not self.wrapper.require_backward_grad_sync:
            return
        for rows in _by_dtype(zip(self.buffers)):
            buffers = [buffer for (buffer,) in rows]
            sent = torch.cat([buffer.flatten() for buffer in buffers])
            dist.broadcast(sent, dist.get_global_rank(self.group, 0), group=self.group)
            parts = sent.split([buffer.numel() for buffer in buffers])
            foreach("copy_", buffers, [part.view(buffer.shape) for part, buffer in zip(parts, buffers)])

    @torch.no_grad()
    def average_gradients(self) -> None:
        "Give the gradients their mean over the processes, as the wrapper does in a backward pass."
        if not self.wrapper.require_backward_grad_sync:
            return
        given = [(param.grad, strides) for param, strides in zip(self.params, self.strides) if param.grad is not None]
        for rows in _by_dtype(given):
            grads = [grad for grad, _ in rows]
            sent = torch.empty(sum(grad.numel() for grad in grads), dtype=grads[0].dtype, device=grads[0].device)
            parts = sent.split([grad.numel() for grad in grads])
            parts = [part.as_strided(grad.shape, strides) for part, (grad, strides) in zip(parts, rows, strict=True)]
            foreach("copy_", parts, grads)
            sent /= self.group.size()  # before the sum, as the wrapper does
            dist.all_reduce(sent, group=self.group)
            foreach("copy_", grads, parts)


def _by_dtype(rows: Iterable[tuple]) -> Iterable[list[tuple]]:
    "Return the rows in lists of those whose first item, a tensor, has the same dtype."
    found: dict[torch.dtype, list[tuple]] = {}
    for row in rows:
        found.setdefault(row[0].dtype, []).append(row)
    return found.values()
