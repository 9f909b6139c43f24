"What `format_find` measured: a table, a picture, and the format to train in."

import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from math import inf, nan

import pandas as pd
from matplotlib.axes import Axes

from channelslast.find.choice import choose_row, is_comparable
from channelslast.find.errors import shorten
from channelslast.find.picture import picture_size, plot_bars
from channelslast.find.timing import FormatTiming, counted
from channelslast.find.verdict import verdict_of
from channelslast.formats import TrainFormat
from channelslast.notebook import cell, image_html, show

__all__ = ["FormatTimings"]

_BUSY = 0.9  # of the step: above, the GPU is what limits it
_FEW = 3  # steps outside of the rounds that tell what the format gives
_MUCH_OPTIMIZER = 1 / 3  # of the step: above, the optimizer is what limits it
_NUMBERS = {
    "ms": "{:.2f}",
    "IQR": "{:.2f}",
    "items/s": "{:,.0f}",
    "speedup": "{:.2f}",
    "peak GB": "{:.2f}",
    "warm-up s": "{:.1f}",
}


@dataclass(eq=False)
class FormatTimings(Sequence):
    """The candidates of `Learner.format_find`, a `FormatTiming` each, in the order in which they were named.

    Printing it gives a table, `to_frame` a pandas DataFrame, `plot` a picture, and `best` the format to train in.
    """

    rows: list[FormatTiming]
    start: TrainFormat  # the format that the Learner had
    data_items_per_s: float = inf  # what the training DataLoader yields, without training
    more_workers: int | None = None  # that this DataLoader could have; None where it has as many, or that is not known
    busy: float | None = None  # share of the best step in which the GPU ran any kernel; None where that is not known
    optimizer_share: float | None = None  # of the best step, that the optimizer takes; None where that is not known
    has_fused_form: bool | None = False  # the optimizer can make fused steps; None: it makes them already
    model: str = ""  # class of the model
    device: str = ""
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # of the model's inputs
    n_steps: int = 1  # in each round
    before_rounds_s: float = nan  # seconds of the search until the first round
    round_s: float = nan  # seconds of a round
    _shown_in: int | None = field(default=None, init=False)  # the cell of a notebook

    def __post_init__(self):
        if self.row(self.start) is None:
            raise ValueError(f"start={self.start!r} is the format of none of the rows: pass that of one of them")
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
        """The fastest format that is proved faster than what the Learner had; that itself where none is.

        The proof is a paired one-sided test on the rounds (Wilcoxon's where they are enough for it, else Student's),
        that a format is more than `FLOOR` times as fast, at `LEVEL` divided by the number of candidates (Bonferroni):
        where all are equal, the chance of another choice stays below `LEVEL`. Of those that are faster than that, the
        one that changes least, unless the test, at 5% for all of them, finds another faster; at 25% where that differs
        in the memory format or fused steps alone, which cost nothing. Only what was timed in the rounds can be chosen;
        where these are too few to prove it, also what is more than `FAR` times as fast in its first steps and in each
        round, and of such formats the one that is `APART` times as fast as the others in these. Without any round it
        has to be `FAR`.
        """
        return self.best_row.format

    @cached_property
    def best_row(self) -> FormatTiming:
        "The row of `best`."
        return choose_row(self.rows, self.row(self.start))

    def row(
        self,
        fmt: TrainFormat,
    ) -> FormatTiming | None:
        "The row of `fmt`, None where it was no candidate."
        return next((row for row in self.rows if row.format == fmt), None)

    @property
    def format_gain(self) -> float | None:
        """How many times as fast as contiguous channels last is, all else as in `best`.

        None where one of both was not timed, or in fewer than three steps outside of the rounds.
        """
        twins = self.twins()
        return None if twins is None else twins[0].ms / twins[1].ms

    def twins(self) -> tuple[FormatTiming, FormatTiming] | None:
        "Return contiguous and channels last, all else as in `best`, or else both eager; None where neither was timed."
        eager = replace(self.best, compile=None, cuda_graph=False)
        for fmt in (self.best, eager, replace(eager, fused_optimizer=self.start.fused_optimizer)):
            first, last = (self.row(replace(fmt, channels_last=channels_last)) for channels_last in (False, True))
            if all(
                row is not None and not row.error and len(row.samples) >= (_FEW if row.note else 1)
                for row in (first, last)
            ):
                return first, last
        return None

    @property
    def limit(self) -> str:
        """What limits the best step.

        'data', 'optimizer' (it takes a third of the step), 'python' (and launches), 'gpu', or 'device' where only that
        is known.
        """
        if self.data_items_per_s < self.best_row.items_per_s:
            return "data"
        if (self.optimizer_share or 0) >= _MUCH_OPTIMIZER:
            return "optimizer"
        if self.busy is None:
            return "device"
        return "gpu" if self.busy >= _BUSY else "python"

    @property
    def advice(self) -> str | None:
        "A line of Python that may help against what limits the best step; None where none is known."
        if self.limit == "data" and self.more_workers:
            return f"learn.dls.loaders[0] = learn.dls.train.new(num_workers={self.more_workers})"
        is_plain = self.has_fused_form is not None and not any(row.format.fused_optimizer for row in self.rows)
        if self.limit == "optimizer" and is_plain:
            if self.has_fused_form:
                return replace(self.best, fused_optimizer=True).code
            return "learn.opt_func, learn.opt = partial(OptimWrapper, opt=torch.optim.AdamW), None"
        if self.limit == "python" and not any(row.format.compile for row in self.rows):
            return "learn.to_fastest(compile=True)"
        return None

    @property
    def verdict(self) -> str:
        "One line: what to do, what limits the step, and what the format alone gave."
        return verdict_of(self)

    def to_frame(self) -> pd.DataFrame:
        "The rows as a pandas DataFrame."
        return pd.DataFrame(
            {
                "format": str(row.format),
                **vars(row.format),
                **{name: getattr(row, name) for name in ("ms", "iqr", "items_per_s", "speedup")},
                **{name: getattr(row, name) for name in ("peak_bytes", "warmup_s", "error", "note")},
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

    def show(
        self,
        show_plot: bool = True,  # draw the bars
    ) -> None:
        "Show table and picture where the user is: in the notebook's cell that runs now, else printed and plotted."
        if cell() is not None:
            self._shown_in = show(self.to_html(show_plot))
            return
        print(self)
        if show_plot:
            self.plot()

    def to_html(
        self,
        show_plot: bool = True,  # with the picture
    ) -> str:
        "What a notebook shows."
        table = self._table(300).to_html(formatters=self._formatters(), na_rep="", border=0)
        words = [self._data_warning(), self._header(), self.verdict]
        warning, header, verdict = (re.sub("`(.*?)`", r"<code>\1</code>", escape(text)) for text in words)
        picture = image_html(self.plot, picture_size(len(self))) if show_plot else ""
        return f"<p>{warning}</p><p>{header}</p>{table}<p>{verdict}</p>{picture}"

    def _repr_html_(self) -> str | None:
        if self._shown_in is not None and self._shown_in == cell():
            return None  # it is the value of the cell that has shown it
        return self.to_html()

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
        n_rounds = max((len(row.samples) for row in self.rows if is_comparable(row)), default=0)
        rounds = (
            f"{counted(n_rounds, 'round')} of {counted(self.n_steps, 'step')} each"
            if n_rounds
            else "no time for rounds"
        )
        return f"{self.model} (input shape: {shapes}) on {self.device}, {rounds}"

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
        table[""] = [shorten(row.error, width) if row.error else ", ".join(self._words(row)) for row in self.rows]
        return table

    def _formatters(self) -> dict:
        return {name: number.format for name, number in _NUMBERS.items()}

    def _words(self, row: FormatTiming) -> list[str]:
        return [*self._marks(row), *([row.note] if row.note else [])]

    def _marks(self, row: FormatTiming) -> list[str]:
        if self.best == self.start:
            return ["now", "kept"] if row.format == self.start else []
        return [word for word, fmt in (("now", self.start), ("best", self.best)) if row.format == fmt]

    def plot(
        self,
        ax: Axes | None = None,  # where to draw, a new figure if None
    ) -> Axes:
        "Draw a bar for each candidate: a step in the median of its rounds, with their interquartile range."
        marks = dict(enumerate(map(self._marks, self.rows)))
        return plot_bars(self.rows, marks, self._data_ms(), f"{self.model} on {self.device}", ax)

    def _data_ms(self) -> float:
        "Milliseconds in which the DataLoader yields what one step trains on."
        best = self.best_row
        return best.ms * best.items_per_s / self.data_items_per_s if best.samples else 0.0
