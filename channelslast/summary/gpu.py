"What the GPU did in a step: how long it was busy, and how long with the memory format alone."

import re
from dataclasses import dataclass
from typing import Any

from torch.autograd import DeviceType

__all__ = ["GpuShares", "busy_seconds", "gpu_shares"]

# Kernels whose work is the layout: cuDNN's conversions and padding, and PyTorch's copies between different strides.
# (`vectorized_` and `unrolled_elementwise_kernel` copy between equal strides, as a cast of the dtype does.)
_LAYOUT_KERNELS = re.compile(
    r"nchwToNhwc|nhwcToNchw|nchw2nhwc|nhwc2nchw|nhwcAddPadding|convertTensor"
    r"|(?<!vectorized_)(?<!unrolled_)elementwise_kernel<.*copy_kernel",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class GpuShares:
    "What the GPU did in a step of forward, loss and backward: shares between 0 and 1."

    layout: float  # of its busy time, spent in kernels that convert, pad or copy between strides
    busy: float  # of the step's wall time, in which any kernel ran


def gpu_shares(
    events: Any,  # of torch.profiler, of one step
    seconds: float,  # that a step takes without the profiler
) -> GpuShares:
    "Return what the kernels among `events` did."
    spans = [(event.time_range.end - event.time_range.start, event.name) for event in _kernels(events)]
    total = sum(span for span, _ in spans)
    layout = sum(span for span, name in spans if _LAYOUT_KERNELS.search(name))
    return GpuShares(layout / total if total else 0.0, min(1.0, busy_seconds(events) / seconds))


def busy_seconds(
    events: Any,  # of torch.profiler
) -> float:
    "Return for how long any kernel among `events` ran; those that overlap, on several streams, count once."
    spans = sorted((event.time_range.start, event.time_range.end) for event in _kernels(events))
    busy, covered_until = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, covered_until))
        covered_until = max(covered_until, end)
    return busy / 1e6


def _kernels(events: Any) -> list[Any]:
    return [event for event in events if event.device_type == DeviceType.CUDA]
