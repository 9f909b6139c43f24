"A copy of a tensor on its way to the CPU, while the GPU goes on. PyTorch only."

import torch
from torch import Tensor

__all__ = ["CpuCopy"]


class CpuCopy:
    "Starts to copy a tensor when it is made; `wait` waits for the copy, and not for what the GPU was given since."

    def __init__(
        self,
        tensor: Tensor,
    ):
        self.copy = tensor.detach().to("cpu", non_blocking=True, copy=True)
        self.copied = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def wait(self) -> Tensor:
        "Return the copy, once it is there."
        if self.copied is not None:
            self.copied.synchronize()
        return self.copy
