"The time that training steps take on a device."

import time
from typing import Any

import torch


def wait_for(
    device: torch.device,
) -> None:
    "Wait until `device` is done with all work that it was given."
    if torch.accelerator.is_available() and torch.accelerator.current_accelerator().type == device.type:
        torch.accelerator.synchronize(device)


class Clock:
    "Marks points in time: on a CUDA GPU by events in its stream, elsewhere once the device is done."

    def __init__(
        self,
        device: torch.device,
    ):
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.current_stream(self.device).record_event(torch.cuda.Event(enable_timing=True)))
        else:
            wait_for(self.device)
            self.marks.append(time.perf_counter())

    def read_ms(self) -> list[float]:
        "Wait for the last mark, and return the milliseconds between one mark and the next."
        pairs = list(zip(self.marks, self.marks[1:]))
        if self.device.type == "cuda":
            self.marks[-1].synchronize()
            return [first.elapsed_time(second) for first, second in pairs]
        return [1000 * (second - first) for first, second in pairs]
