"What `format_find` measured: a table, a picture, and the format to train in."

import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from math import inf, isnan, nan

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from channelslast.find.errors import shorten
from channelslast.formats import TrainFormat

__all__ = ["FormatTiming", "FormatTimings"]

_BUSY = 0.9  # of the step: above, the GPU is what limits it
_NUMBERS = {
    "ms": "{:.2f}",
    "IQR": "{:.2f}",
    "items/s": "{:,.0f}",
    "speedup": "{:.2f}",
    "peak GB": "{:.2f}",
    "warm-up s": "{:.1f}",
}


@dataclass
class FormatTiming:
    "A candidate: the training step of a Learner in one format."

    format: TrainFormat
    samples: list[float] = field(default_factory=list, repr=False)  # milliseconds a step, in the mean of each round
    items_per_s: float = nan  # images, or what else a batch holds, in the mean of all rounds; of all processes
    speedup: float = nan  # against the format that the Learner had; its FormatTimings sets it
    peak_bytes: int | None = None  # of GPU memory allocated in a step (CUDA); what CUDA graphs hold is not known
    warmup_s: float = nan  # seconds until the step was steady: compilation, and cuDNN's search for algorithms
    error: str | None = None  # why this candidate could not train

    @property
    def ms(self) -> float:
        "Milliseconds of a training step, the median of the rounds; nan for a candidate that could not train."
        return statistics.median(self.samples) if self.samples else nan

    @property
    def iqr(self) -> float:
        "Interquartile range of the rounds, in milliseconds."
        return _iqr(self.samples) if self.samples else nan


def _iqr(samples: Sequence[float]) -> float:
    low, high = np.percentile(samples, (25, 75))
    return float(high - low)


@dataclass(eq=False)
class FormatTimings(Sequence):
    """The candidates of `Learner.format_find`, a `FormatTiming` each, in the order in which they were named.

    Printing it gives a table, `to_frame` a pandas DataFrame, `plot` a picture, and `best` the format to train in.
    """

    rows: list[FormatTiming]
    start: TrainFormat  # the format that the Learner had
    data_items_per_s: float = inf  # what the training DataLoader yields, without training
    busy: float | None = None  # share of the best step in which the GPU ran any kernel; None where that is not known
    model: str = ""  # class of the model
    device: str = ""
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # of the model's inputs
    n_steps: int = 1  # in each round

    def __post_init__(self):
        for row in self.rows:
            row.speedup = self.row(self.start).ms / row.ms

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> FormatTiming:
        return self.rows[index]

    def __repr__(self) -> str:
        return f"FormatTimings(best={self.best!r})"

    @property
    def best(self) -> TrainFormat:
        """The fastest format; among those that are not slower beyond the noise, the one that changes least.

        One format is faster than another if their interquartile ranges do not overlap; or, which a drift of the whole
        machine does not hide, if the median of the differences round by round is larger than its own uncertainty, 1.57
        interquartile ranges over the root of the number of rounds (McGill, Tukey and Larsen 1978, "Variations of Box
        Plots"; the notch of a box plot). Whatever is not faster than the format the Learner had is out.
        """
        return self.best_row.format

    @cached_property
    def best_row(self) -> FormatTiming:
        "The row of `best`."
        start = self.row(self.start)
        able = [row for row in self.rows if not row.error]
        able = [row for row in able if row is start or start.error or _is_faster(row, start)]
        fastest = min(able, key=lambda row: row.ms)
        equal = [row for row in able if not _is_faster(fastest, row)]
        return min(equal, key=lambda row: (_n_changes(self.start, row.format), row.ms))

    def row(
        self,
        fmt: TrainFormat,
    ) -> FormatTiming | None:
        "The row of `fmt`, None where it was no candidate."
        return next((row for row in self.rows if row.format == fmt), None)

    @property
    def format_gain(self) -> float | None:
        "How many times as fast as contiguous channels last is, all else as in `best`; None where that was not timed."
        twins = self._twins()
        return None if twins is None else twins[0].ms / twins[1].ms

    def _twins(self) -> tuple[FormatTiming, FormatTiming] | None:
        "Contiguous and channels last, all else as in `best`; None where one of them was not timed."
        first, last = (self.row(replace(self.best, channels_last=channels_last)) for channels_last in (False, True))
        if first is None or last is None or first.error or last.error:
            return None
        return first, last

    @property
    def limit(self) -> str:
        "What limits the best step: 'data', 'python' (and launches), 'gpu', or 'device' where only that is known."
        if self.data_items_per_s < self.best_row.items_per_s:
            return "data"
        if self.busy is None:
            return "device"
        return "gpu" if self.busy >= _BUSY else "python"

    @property
    def verdict(self) -> str:
        "One line: what to do, what limits the step, and what the format alone gave."
        best = self.best_row
        if best.format == self.start:
            words = f"Stay in {best.format}, nothing is faster beyond the noise: `{best.format.code}`."
        elif self.row(self.start).error:
            words = f"Best: `{best.format.code}`; {self.start}, which the Learner had, could not train."
        else:
            words = f"Best: `{best.format.code}`, {best.speedup:.2f} times as fast as {self.start}."
        return f"{words} {self._limit_words()}{self._gain_words()}"

    def _limit_words(self) -> str:
        busy = "" if self.busy is None else f" (busy {self.busy:.0%} of the step)"
        python = f"Python and launches limit it, the GPU waits{busy}"
        if not any(row.format.compile for row in self.rows):
            python += "; `compile=True` also tries what PyTorch's compiler makes of it"
        return {
            "data": "Data loading limits it",
            "python": python,
            "gpu": f"The GPU limits it{busy}",
            "device": f"The computation limits it ({self.device})",
        }[self.limit] + "."

    def _gain_words(self) -> str:
        twins = self._twins()
        if twins is None:
            return ""
        first, last = twins
        rest = str(first.format).removeprefix("contiguous ")
        noise = "" if _is_faster(last, first) or _is_faster(first, last) else ", within the noise"
        return (
            f" The format alone gives {self.format_gain:.2f} times (channels last against contiguous, {rest}{noise})."
        )

    def to_frame(self) -> pd.DataFrame:
        "The rows as a pandas DataFrame."
        return pd.DataFrame(
            {
                "format": str(row.format),
                **vars(row.format),
                **{name: getattr(row, name) for name in ("ms", "iqr", "items_per_s", "speedup")},
                **{name: getattr(row, name) for name in ("peak_bytes", "warmup_s", "error")},
            }
            for row in self.rows
        )

    def __str__(self) -> str:
        table = self._table(50).rename(index="{:<24}".format)
        width = table[""].str.len().max()
        formatters = {**self._formatters(), "": lambda words: f"{words:<{width}}"}
        lines = [line.rstrip() for line in table.to_string(formatters=formatters, na_rep="").splitlines()]
        rule = "=" * max(map(len, lines))
        lines = [self._header(), rule, lines[0], rule, *lines[1:], rule, ""]
        warning = [textwrap.fill(self._data_warning(), 110), ""] if self._data_warning() else []
        return "\n".join([*warning, *lines, textwrap.fill(self.verdict, 110, subsequent_indent="  ")])

    def _repr_html_(self) -> str:
        table = self._table(300).to_html(formatters=self._formatters(), na_rep="", border=0)
        words = [self._data_warning(), self._header(), self.verdict]
        warning, header, verdict = (re.sub("`(.*?)`", r"<code>\1</code>", escape(text)) for text in words)
        return f"<p>{warning}</p><p>{header}</p>{table}<p>{verdict}</p>"

    def _data_warning(self) -> str:
        if self.limit != "data":
            return ""
        now, data = self.row(self.start), self.data_items_per_s
        text = f"The data pipeline yields {data:,.0f} items a second, the best step could take "
        text += f"{self.best_row.items_per_s:,.0f}: "
        if now.error or data <= now.items_per_s:
            return f"{text}no format will help before data come faster."
        return f"{text}until data come faster no format gives more than {data / now.items_per_s:.2f} times."

    def _header(self) -> str:
        counts = Counter(" x ".join(map(str, shape)) for shape in self.shapes)
        shapes = ", ".join(shape if n == 1 else f"{n} of {shape}" for shape, n in counts.items())
        n_rounds = max(len(row.samples) for row in self.rows)
        steps = "1 step" if self.n_steps == 1 else f"{self.n_steps} steps"
        return f"{self.model} (input shape: {shapes}) on {self.device}, {n_rounds} rounds of {steps} each"

    def _table(
        self,
        width: int,  # of a reason why a candidate could not train
    ) -> pd.DataFrame:
        "The rows as they are shown, with what is to be said of each in a column without a name."
        rows = [
            {
                "ms": row.ms,
                "IQR": row.iqr,
                "items/s": row.items_per_s,
                "speedup": row.speedup,
                "peak GB": (row.peak_bytes or nan) / 1e9,
                "warm-up s": row.warmup_s,
            }
            for row in self.rows
        ]
        table = pd.DataFrame(rows, index=[str(row.format) for row in self.rows])
        table.columns.name = "Format"
        table.loc[[bool(row.error) for row in self.rows]] = nan  # also what was measured before it failed
        if table["peak GB"].isna().all():
            del table["peak GB"]
        table[""] = [shorten(row.error, width) if row.error else ", ".join(self._marks(row)) for row in self.rows]
        return table

    def _formatters(self) -> dict:
        return {name: number.format for name, number in _NUMBERS.items()}

    def _marks(self, row: FormatTiming) -> list[str]:
        return [word for word, fmt in (("now", self.start), ("best", self.best)) if row.format == fmt]

    def plot(
        self,
        ax: Axes | None = None,  # where to draw, a new figure if None
    ) -> Axes:
        "Draw a bar for each candidate: a step in the median of its rounds, with their interquartile range."
        if ax is None:
            _, ax = plt.subplots(figsize=(9, 1.2 + 0.35 * len(self)), layout="constrained")
        longest = max(row.ms for row in self.rows if not row.error)
        for i, row in enumerate(self.rows):
            if row.error:
                ax.text(longest * 0.01, i, shorten(row.error, 70), va="center", fontsize=8, color="dimgray")
                continue
            quartiles = np.percentile(row.samples, (25, 75))
            spread = [[max(0, row.ms - quartiles[0])], [max(0, quartiles[1] - row.ms)]]
            marks = self._marks(row)
            color = (0.16, 0.58, 0.53) if "best" in marks else (0.93, 0.58, 0.22) if marks else "0.75"
            ax.barh(i, row.ms, color=color, xerr=spread, ecolor="0.3", capsize=2)
            words = ", ".join(([] if isnan(row.speedup) else [f"{row.speedup:.2f}x"]) + marks)
            ax.text(quartiles[1], i, f"  {words}", va="center")
        data_ms = self._data_ms()
        if data_ms > longest / 20:
            ax.axvline(data_ms, color="crimson", linestyle="--", label="data loading alone")
            ax.legend(loc="lower right", frameon=False)
        ax.set(yticks=range(len(self)), yticklabels=[str(row.format) for row in self.rows])
        ax.set(xlabel="ms a training step", xlim=(0, 1.25 * max(longest, data_ms)))
        ax.invert_yaxis()
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_title(f"{self.model} on {self.device}", loc="left")
        return ax

    def _data_ms(self) -> float:
        "Milliseconds in which the DataLoader yields what one step trains on."
        return statistics.fmean(self.best_row.samples) * self.best_row.items_per_s / self.data_items_per_s


def _is_faster(row: FormatTiming, other: FormatTiming) -> bool:
    differences = [b - a for a, b in zip(row.samples, other.samples)]
    is_apart = np.percentile(row.samples, 75) < np.percentile(other.samples, 25)
    notch = 1.57 * _iqr(differences) / len(differences) ** 0.5
    return bool(is_apart) or statistics.median(differences) > notch


def _n_changes(start: TrainFormat, fmt: TrainFormat) -> int:
    return sum(value != vars(start)[name] for name, value in vars(fmt).items())
