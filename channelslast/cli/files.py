"The files that commands write."

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.backend_bases import FigureCanvasBase

from channelslast.cli.record import made_with
from channelslast.zoo import IllegalValue


def check_files(
    **files: str | None,  # options by name; None: not given
) -> None:
    "Raise `IllegalValue` for a file that could not be written."
    for name, file in files.items():
        if file is not None and not Path(file).expanduser().parent.is_dir():
            raise IllegalValue(name, file, "there is no such folder")
        if file is not None and Path(file).expanduser().is_dir():
            raise IllegalValue(name, file, "Is a directory, name a file in it")
    plot, kinds = files.get("plot"), FigureCanvasBase.get_supported_filetypes()
    if plot is not None and Path(plot).suffix[1:] not in kinds:
        raise IllegalValue("plot", plot, f"no kind of picture; let it end in one of .{', .'.join(kinds)}")


def write_json(
    file: str,
    result: dict[str, Any],
    device: torch.device,
) -> None:
    "Write `result`, and what it was made with, to `file`; raises `IllegalValue` if it cannot be written."
    record = {**made_with(f"channelslast {shlex.join(sys.argv[1:])}", device), **result}
    try:
        Path(file).expanduser().write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise IllegalValue("json", file, error.strerror) from None


def save_plots(
    file: str,
    found: dict[str, Any],  # what has a `plot`, by its title
    heights: list[float],  # inches
    width: float = 9,
) -> None:
    "Draw all of `found`, one below the other, to `file`; raises `IllegalValue` if it cannot be written."
    figure, axes = plt.subplots(
        len(found), figsize=(width, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for (title, result), ax in zip(found.items(), axes[:, 0], strict=True):
        result.plot(ax).set_title(title, loc="left")
    try:
        figure.savefig(Path(file).expanduser())
    except OSError as error:
        raise IllegalValue("plot", file, error.strerror) from None
