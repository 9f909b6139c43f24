"Results as JSON, with what they were made with."

import platform
import re
from datetime import date
from math import isnan
from pathlib import Path
from typing import Any

import fastai
import torch

from channelslast.devices import device_name
from channelslast.find import FormatTiming, FormatTimings
from channelslast.summary import FormatSummary


def made_with(
    command: str,
    device: torch.device,
) -> dict[str, Any]:
    "Return what a record of a measurement begins with: command, date, device, processor and versions."
    return {
        "command": command,
        "date": str(date.today()),
        "device": device_name(device),
        "cpu": cpu_name(),
        "versions": {"torch": torch.__version__, "fastai": fastai.__version__, "python": platform.python_version()},
    }


def cpu_name() -> str:
    "Return what the system calls the processor: where Python is slower, there is more to gain."
    info = Path("/proc/cpuinfo")  # Linux
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def summary_record(
    result: FormatSummary,
) -> dict[str, Any]:
    return {
        "dtype": result.dtype,
        "channels_last_share": None if isnan(result.channels_last_share) else result.channels_last_share,
        "verdict": result.verdict,
        "error": result.error,
        "hints": result.hints,
        "padded_convs": result.padded_convs,
        "dense_gradients": result.dense_gradients,
        "swapped": result.swapped,
        "gpu": result.gpu and vars(result.gpu),
        "n_layers": len(result.layers),
        "losers": {layer.module: layer.loses_in for layer in result.losers},
        "events": [{**vars(event), "dtype": str(event.dtype).removeprefix("torch.")} for event in result.events],
    }


def timings_record(
    timings: FormatTimings,
) -> dict[str, Any]:
    return {
        "model": timings.model,
        "shapes": timings.shapes,
        "start": str(timings.start),
        "best": str(timings.best),
        "verdict": timings.verdict,
        "limit": timings.limit,
        "gpu_busy": timings.busy,
        "optimizer_share": timings.optimizer_share,
        "format_gain": timings.format_gain,
        "data_items_per_s": timings.data_items_per_s,
        "rounds": max(len(row.samples) for row in timings),
        "steps_a_round": timings.n_steps,
        "rows": [row_record(row) for row in timings],
    }


def row_record(
    row: FormatTiming,
) -> dict[str, Any]:
    numbers = {name: getattr(row, name) for name in ("ms", "iqr", "items_per_s", "speedup", "warmup_s", "peak_bytes")}
    numbers = {name: None if value is None or isnan(value) else round(value, 4) for name, value in numbers.items()}
    return {
        "format": str(row.format),
        **numbers,
        "samples": [round(ms, 3) for ms in row.samples],
        "first_samples": [round(ms, 3) for ms in row.first_samples],
        "error": row.error,
        "note": row.note,
    }
