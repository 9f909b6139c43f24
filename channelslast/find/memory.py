"The memory of a GPU during a search: what a candidate needs, and what is given back for the next."

import torch
from fastai.learner import Learner
from torch import Tensor

from channelslast.memory_format import with_wrapped
from channelslast.nested import tensors_in


class GpuMemory:
    "What candidates take of a GPU's memory. Without one, no call does anything."

    def __init__(
        self,
        learn: Learner,  # as it is before the search
        device: torch.device,
    ):
        self.device = device
        self.originals = cuda_tensors(learn)
        self.needed = 0  # bytes, by the hungriest candidate so far

    def take_peak(
        self,
        peak_bytes: int,  # that PyTorch had allocated at once in a step
    ) -> int:
        "Return how many of them were the candidate's, and keep the most in mind."
        moved = (size for tensor, memory, size in self.originals if tensor.data_ptr() != memory)
        own = peak_bytes - sum(moved)  # whose originals wait for the end of the search
        self.needed = max(self.needed, own)
        return own

    def give_back(
        self,
        is_all: bool,  # False: only where much more has piled up than a candidate needs
    ) -> None:
        "Give the memory back to the GPU that PyTorch keeps for the next allocation."
        if self.device.type == "cuda" and (is_all or torch.cuda.memory_reserved(self.device) > 1.2 * self.needed):
            torch.cuda.empty_cache()


def cuda_tensors(
    learn: Learner,
) -> list[tuple[Tensor, int, int]]:
    "Return weights, buffers and optimizer state of `learn` on a GPU, with their address and their size in bytes."
    states = [state for opt in with_wrapped(learn.opt) for state in getattr(opt, "state", {}).values()]
    tensors = [*learn.model.parameters(), *learn.model.buffers(), *tensors_in(states)]
    return [(tensor, tensor.data_ptr(), tensor.nbytes) for tensor in tensors if tensor.is_cuda]
