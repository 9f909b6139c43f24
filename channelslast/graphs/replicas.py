"""What `DistributedDataParallel` does around a step, for a module that is replayed inside of it. PyTorch only.

A replay makes all gradients at once, and the hooks with which `DistributedDataParallel` sends them as they come belong
to nodes of autograd that a capture makes anew. So the module itself is called, and what the wrapper sends is sent here.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from channelslast.graphs.ground import has_sync_norm
from channelslast.nested import foreach, tensors_in

__all__ = ["Replicas"]


class Replicas:
    "The copies of a module in the processes of its `DistributedDataParallel`: their buffers and gradients stay alike."

    def __init__(
        self,
        wrapper: nn.parallel.DistributedDataParallel,
    ):
        self.wrapper, self.module, self.group = wrapper, wrapper.module, wrapper.process_group
        self.params = [param for param in self.module.parameters() if param.requires_grad]
        # dense, and in the order of the weights: the same in each process, whatever its kernels make
        self.strides = [torch.empty_like(param, device="meta").stride() for param in self.params]
        self.buffers: list[Tensor] = []
        self._hook: RemovableHandle | None = None

    @property
    def reason(self) -> str | None:
        "Why the wrapper has to send by itself, None if it has not."
        wrapper = self.wrapper
        if wrapper.find_unused_parameters:
            return "DistributedDataParallel looks for unused parameters (find_unused_parameters=True)"
        if getattr(wrapper, "_comm_hooks", None):
            return "DistributedDataParallel has a communication hook"
        if hasattr(self.module, "_ddp_params_and_buffers_to_ignore"):
            return "DistributedDataParallel ignores some parameters"
        if any(getattr(module, "sparse", False) for module in self.module.modules()):
            return "embeddings have sparse gradients"
        return None

    def agree(
        self,
        reason: str | None,  # why this process cannot use graphs
        inputs: tuple = (),  # of the module in the next batch
    ) -> str | None:
        "Wait for the other processes, and return the first reason that one of them has, the same in each."
        answers: list[Any] = [None] * self.group.size()
        shapes = [tuple(tensor.shape) for tensor in tensors_in(inputs)]
        dist.all_gather_object(answers, (reason, shapes), group=self.group)
        reasons, shapes = zip(*answers)
        if any(reasons):
            return next(filter(None, reasons))
        if has_sync_norm(self.module) and any(each != shapes[0] for each in shapes):
            return "the processes have inputs of different shapes, and exchange statistics"
        return None

    @property
    def is_parted(self) -> bool:
        "Whether captures may have parted the wrapper from the parameters: it would send no gradients."
        return getattr(self.wrapper, "is_parted", False)

    def begin(self) -> None:
        "From now on the wrapper sends nothing in training, and refuses to be called for it."
        self.wrapper.is_parted = True
        self._hook = self.wrapper.register_forward_pre_hook(_refuse)

    def end(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    def new_wrapper(self) -> nn.parallel.DistributedDataParallel:
        "Return another wrapper of the module, with the same options."
        old = self.wrapper
        options = {} if old.broadcast_buffers else {"broadcast_buffers": False}  # True, the default, is not to be said
        return nn.parallel.DistributedDataParallel(
            self.module,
            device_ids=old.device_ids,
            output_device=old.output_device,
            dim=old.dim,
            process_group=self.group,
            bucket_cap_mb=old.bucket_bytes_cap / 2**20,
            gradient_as_bucket_view=old.gradient_as_bucket_view,
            static_graph=old.static_graph,
            **options,
        )

    @torch.no_grad()
    def send_buffers(
        self,
        is_new: bool = True,  # the module may have other buffers than before
    ) -> None:
        "Give the buffers the values that they have in the first process, as the wrapper does before a forward pass."
        if not (self.wrapper.broadcast_buffers and self.wrapper.require_backward_grad_sync):
            return
        self.wrapper.require_forward_param_sync = True  # before its next evaluation too
        self.buffers = list(self.module.buffers()) if is_new else self.buffers
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


def _refuse(wrapper: nn.Module, inputs: tuple) -> None:
    if torch.is_grad_enabled() and wrapper.training:
        raise RuntimeError(
            "The model was called twice in a batch, which in distributed training with `cuda_graph` would send no "
            "gradients: train without `cuda_graph`"
        )


def _by_dtype(rows: Iterable[tuple]) -> Iterable[list[tuple]]:
    "Return the rows in lists of those whose first item, a tensor, has the same dtype."
    found: dict[torch.dtype, list[tuple]] = {}
    for row in rows:
        found.setdefault(row[0].dtype, []).append(row)
    return found.values()
