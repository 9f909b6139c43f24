"The picture of a search: a bar for each candidate."

from math import isnan

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from channelslast.find.errors import shorten
from channelslast.find.timing import FormatTiming

__all__ = ["picture_size", "plot_bars"]

_COLORS = {"best": (0.16, 0.58, 0.53), "now": (0.93, 0.58, 0.22)}


def picture_size(
    n_rows: int,
) -> tuple[float, float]:
    "Return width and height in inches."
    return 9, 1.2 + 0.35 * n_rows


def plot_bars(
    rows: list[FormatTiming],
    marks: dict[int, list[str]],  # by the number of the row: 'now', 'best'
    data_ms: float,  # milliseconds in which the DataLoader yields what one step trains on
    title: str,
    ax: Axes | None = None,  # where to draw, a new figure if None
) -> Axes:
    "Draw a bar for each candidate: a step in the median of its rounds, with their interquartile range."
    if ax is None:
        _, ax = plt.subplots(figsize=picture_size(len(rows)), layout="constrained")
    longest = max((row.ms for row in rows if row.samples and not row.error), default=1.0)
    for i, row in enumerate(rows):
        if row.error or not row.samples:
            words = shorten(row.error or row.note or "", 70)
            ax.text(longest * 0.01, i, words, va="center", fontsize=8, color="dimgray")
            continue
        words = [] if isnan(row.speedup) else [f"{row.speedup:.2f}x"]
        color = next((color for mark, color in _COLORS.items() if mark in marks[i]), "0.75")
        end = row.ms
        if row.note:
            ax.barh(i, row.ms, color=color, alpha=0.5)
            words.append("a few steps")
        else:
            low, end = np.percentile(row.samples, (25, 75))
            spread = [[max(0, row.ms - low)], [max(0, end - row.ms)]]
            ax.barh(i, row.ms, color=color, xerr=spread, ecolor="0.3", capsize=2)
        ax.text(end, i, "  " + ", ".join(words + marks[i]), va="center")
    if data_ms > longest / 20:
        ax.axvline(data_ms, color="crimson", linestyle="--")
        # above the bars, which it would hide
        ax.text(data_ms, 1.01, "data loading alone", color="crimson", transform=ax.get_xaxis_transform(), ha="center")
    ax.set(yticks=range(len(rows)), yticklabels=[str(row.format) for row in rows])
    ax.set(xlabel="ms a training step", xlim=(0, 1.25 * max(longest, data_ms)))
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, loc="left", pad=16)
    return ax
