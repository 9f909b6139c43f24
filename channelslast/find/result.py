"What `format_find` measured: a table, a picture, and the format to train in."

import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from math import inf, isnan, nan

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from channelslast.find.choice import changes, choose_row, is_comparable, level_of
from channelslast.find.errors import shorten, view_hint
from channelslast.find.evidence import FLOOR, N_ROUNDS, is_proved_faster, n_rounds_to_prove
from channelslast.find.picture import picture_size, plot_bars
from channelslast.find.timing import FormatTiming, counted
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

        The proof is a paired one-sided t-test on the rounds, that a format is more than `FLOOR` times as fast, at
        `LEVEL` divided by the number of candidates (Bonferroni): where all are equal, the chance of another choice
        stays below `LEVEL`. Of those that are faster than that, the one that changes least, unless the test, at 5% for
        all of them, finds another faster. Only what was timed in the rounds can be chosen; where there was time for
        fewer than `MIN_ROUNDS`, also what is more than `FAR` times as fast in its first steps and in each round, and of
        such formats the one that is `APART` times as fast as the others in these. Without any round it has to be `FAR`.
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
        twins = self._twins()
        return None if twins is None else twins[0].ms / twins[1].ms

    def _twins(self) -> tuple[FormatTiming, FormatTiming] | None:
        "Contiguous and channels last, all else as in `best`, or else both eager; None where neither pair was timed."
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
        parts = self._choice(), self._rival(), self._limit_words(), self._gain_words(), self._view_words()
        return " ".join(filter(None, parts))

    def _choice(self) -> str:
        best, start = self.best_row, self.row(self.start)
        if best is start and (not start.is_tried or start.note):
            words = f"there was no time to compare it with others{self._more_time(None)}.{self._seen()}"
            return f"Stay in {self.start}: {words}"
        if start.error and best is not start:
            return f"Best: `{best.format.code}`; {self.start}, which the Learner had, could not train."
        if best is not start:
            words = f"Best: `{best.format.code}`, {best.speedup:.2f} times as fast as {self.start}"
            if start.note:
                words += f" in a few steps; there was no time for rounds{self._more_time(None)}"
            elif not is_proved_faster(best.samples, start.samples, level_of(self.rows)):
                words += f" in {counted(len(best.samples), 'round')}, and in its first steps"
            return f"{words}."
        if start.error:
            return f"No other format can be chosen; {self.start}, which the Learner has, could not train."
        return f"Stay in {best.format}, nothing is proved to be faster: `{best.format.code}`."

    def _seen(self) -> str:
        "What looks fastest by the few steps that there were, where nothing is decided."
        rows = [row for row in self.rows if row.samples and not row.error]
        seen = min(rows, key=lambda row: row.ms, default=None)
        if seen is None or seen.format == self.start or isnan(seen.speedup):
            return ""
        return f" {seen.format} looks {seen.speedup:.2f} times as fast, in {counted(len(seen.samples), 'step')}."

    def _rival(self) -> str:
        "Why the fastest row is not the best, where it is not."
        best = self.best_row
        rows = [row for row in self.rows if is_comparable(row) and row.ms < best.ms]
        if not is_comparable(best) or not rows:
            return ""
        rival = min(rows, key=lambda row: row.ms)
        gain = best.ms / rival.ms
        reasons = ["within the noise"] if gain > FLOOR else ["which is too little to tell"]
        more = set(changes(self.start, rival.format)) - set(changes(self.start, best.format))
        if more and best.format != self.start:
            reasons.append(f"and it changes more ({', '.join(sorted(more))})")
        words = f"{rival.format} looks {gain:.2f} times as fast as that, {' '.join(reasons)}"
        needed = n_rounds_to_prove(rival.samples, best.samples, level_of(self.rows))
        if gain > FLOOR and best.format == self.start and needed is not None:
            n = len(rival.samples)
            words += f"; {counted(n, 'round')} {'is' if n == 1 else 'are'} too few to tell{self._more_time(needed)}"
        return f"{words}."

    def _more_time(
        self,
        n_rounds: int | None,  # that would tell; None: as many as a search makes
    ) -> str:
        "What more time would do, where that is known."
        round_s, before_s = self.round_s, self.before_rounds_s
        if n_rounds is None:  # there was none
            n_rounds = N_ROUNDS
            seen = [row for row in self.rows if row.samples and not row.error]
            missed = sum(not row.is_tried for row in self.rows)
            warmup_s = [row.warmup_s for row in seen if not isnan(row.warmup_s)]
            if missed and warmup_s:  # they take about as long as the others
                before_s += missed * np.mean(warmup_s)
            if isnan(round_s) and seen:  # about a step of each, after one that is not timed
                round_s = 2 * (len(seen) + missed) * np.mean([row.ms for row in seen]) / 1000
            if isnan(round_s) or isnan(before_s):
                return ", pass a larger `budget`"
        if isnan(round_s) or isnan(before_s):
            return f", {n_rounds} would do"
        seconds = 1.2 * (before_s + n_rounds * round_s)
        return f", `budget={seconds:.{0 if seconds > 5 else 1}f}` may do"

    def _limit_words(self) -> str:
        if not self.best_row.samples or self.best_row.error:
            return ""
        busy = "" if self.busy is None else f"busy {self.busy:.0%} of the step"
        share = "" if self.optimizer_share is None else f"the optimizer takes {self.optimizer_share:.0%} of it"
        facts = ", ".join(filter(None, (busy, share)))
        facts = f" ({facts})" if facts else ""
        words = {
            "data": "Data loading limits it",
            "optimizer": f"The optimizer takes {self.optimizer_share or 0:.0%} of the step",
            "python": f"Python and launches limit it, the GPU waits{facts}",
            "gpu": f"The GPU limits it{facts}",
            "device": f"The computation limits it ({self.device}{', ' if share else ''}{share})",
        }[self.limit]
        return f"{words}; this may help: `{self.advice}`." if self.advice else f"{words}."

    def _gain_words(self) -> str:
        twins = self._twins()
        if twins is None:
            return ""
        first, last = twins
        rest = str(first.format).removeprefix("contiguous ")
        words = f"channels last against contiguous, {rest}"
        pairs = (first.samples, last.samples), (last.samples, first.samples)
        if first.note or last.note:
            words += ", in a few steps"
        elif not any(is_proved_faster(*pair, level_of(self.rows)) for pair in pairs):
            words += ", within the noise"
        return f"The format alone gives {self.format_gain:.2f} times ({words})."

    def _view_words(self) -> str:
        "Which module keeps the model from channels last, and how to mend it, where that is known."
        last = [row for row in self.rows if row.format.channels_last and row.is_tried]
        hints = [hint for row in last if (hint := view_hint(row.error))]
        return f"No channels last format can train: {hints[0]}." if len(hints) == len(last) > 0 else ""

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
