"What to use in place of an operator that loses channels last, each with its source."

import re
from dataclasses import dataclass

from fastai.torch_core import ismin_torch

from channelslast.summary.records import FormatEvent

__all__ = ["HINTS", "UNCONVERTED", "Hint", "average_hint", "hints_for"]

_GROUP_NORM_ON_CUDA = "on CUDA from PyTorch 2.15 on (pytorch/pytorch#191945)"
_KEEP_IT = "keep it inside `keep_channels_last(model)`, in which a Learner trains"


@dataclass(frozen=True)
class Hint:
    "What to use in place of an operator that loses the format."

    ops: str  # pattern for the names of the operators
    text: str
    cls: str = ""  # pattern for the module's class
    device: str = ""  # on this kind of device alone
    fixed_in: str = ""  # PyTorch version from which on it keeps the format

    def is_due(self, device: str) -> bool:
        "Whether the operator loses the format on this device, with this PyTorch."
        return device.startswith(self.device) and not (self.fixed_in and ismin_torch(self.fixed_in))

    def is_about(self, event: FormatEvent) -> bool:
        loses = event.kind in ("lost", "converted")
        return loses and bool(re.search(self.ops, event.op)) and bool(re.search(self.cls, event.cls))


HINTS = [
    Hint(
        "native_group_norm|clone",
        f"GroupNorm keeps channels last {_GROUP_NORM_ON_CUDA}",
        cls="GroupNorm",
        device="cuda",
        fixed_in="2.15",
    ),
    Hint(
        "clone|native_batch_norm|cudnn_batch_norm",
        "InstanceNorm works in contiguous format, and `nn.GroupNorm(c, c)`, the same function but for running "
        "statistics, is no way out: on a CPU it keeps channels last and took 0.5 to 4 times as long in float32, 4 to "
        "13 times in bfloat16 (measured, PyTorch 2.15); on CUDA it loses it too, and took 0.6 to 1.3 times as long "
        "(measured, H200, PyTorch 2.11)",
        cls="InstanceNorm",
    ),
    Hint(
        "clone|_to_copy",
        "a copy that makes an image contiguous is `.contiguous()` or a `.reshape` in the code of its layer; "
        "`.contiguous(memory_format=torch.channels_last)` keeps the format (PyTorch's documentation)",
        cls="^(?!.*(InstanceNorm|GroupNorm))",  # any but these
    ),
    Hint(
        "(pixel|channel)_(un)?shuffle",
        "shuffling pixels or channels loses channels last on CUDA (measured, PyTorch 2.11); `nn.PixelShuffle`, "
        f"`nn.PixelUnshuffle` and `nn.ChannelShuffle` {_KEEP_IT}",
        device="cuda",
    ),
    Hint(
        "(reflection|replication)_pad2d",
        "padding by reflection and replication loses channels last on CUDA (measured, PyTorch 2.11); "
        f"`nn.ReflectionPad2d` and `nn.ReplicationPad2d` {_KEEP_IT}, and padding with zeros does anywhere",
        device="cuda",
    ),
    Hint(
        "batch_norm_backward",
        "BatchNorm in eval mode returns a contiguous gradient on CUDA; in training mode it keeps channels last "
        "(measured, PyTorch 2.11)",
        cls="BatchNorm",
        device="cuda",
    ),
    Hint(
        "softmax",
        "softmax over channels works in contiguous format; `x.movedim(1, -1).softmax(-1).movedim(-1, 1)` keeps "
        "channels last, with its sums in another order, and was 2.5 to 14 times faster (measured, H200, PyTorch 2.11)",
        device="cuda",
    ),
    Hint(
        "upsample_bicubic2d_backward",
        "bicubic interpolation returns a contiguous gradient; bilinear interpolation keeps channels last "
        "(measured, PyTorch 2.11 and 2.15)",
    ),
]

# What to do where the images or the weights alone are contiguous
UNCONVERTED = {
    "inputs": "the images are contiguous, the weights channels last; `to_memory_format(images)` converts the images",
    "weights": "the weights are contiguous, the images channels last; `module_to_memory_format(model)` converts them",
}


def hints_for(
    losses: list[FormatEvent],  # of the layers that lose the format, in the phase in which they do
    device: str,  # as 'cuda:0'
) -> list[str]:
    "Return what to use in place of the operators that lose the format, where there is something."
    due = [hint for hint in HINTS if hint.is_due(device)]
    return [hint.text for hint in due if any(hint.is_about(event) for event in losses)]


def average_hint(
    modules: list[str],  # those whose gradients come out contiguous, as a reader is to see them; one at least
) -> str:
    "Return how to get a channels last gradient from a global average."
    others = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
    return (
        "the gradient of a global average comes out contiguous, which makes rows of kind 'mixed' or 'hidden' "
        f"(here that of {modules[0]}{others}); `nn.AdaptiveAvgPool2d(1)`, or `nn.AdaptiveAvgPool3d(1)` in 3D, "
        "returns a channels last one inside `keep_channels_last(model)`, in which a Learner trains"
    )
