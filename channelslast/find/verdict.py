"What a search has found, in words: what to do, what limits the step, and what the format alone gave."

from math import isnan
from typing import TYPE_CHECKING

import numpy as np

from channelslast.find.choice import changes, is_comparable, level_between, level_of, rows_better_than
from channelslast.find.errors import view_hint
from channelslast.find.evidence import FLOOR, N_ROUNDS, is_proved_faster, n_rounds_to_prove
from channelslast.find.timing import FormatTiming, counted

if TYPE_CHECKING:
    from channelslast.find.result import FormatTimings

__all__ = ["verdict_of"]


def verdict_of(
    timings: "FormatTimings",
) -> str:
    "Return the verdict on what was measured, in one line."
    parts = (words(timings) for words in (_choice, _rival, _limit_words, _gain_words, _view_words))
    return " ".join(filter(None, parts))


def _choice(timings: "FormatTimings") -> str:
    best, start = timings.best_row, timings.row(timings.start)
    if best is start and (not start.is_tried or start.note):
        words = f"there was no time to compare it with others{_more_time(timings, None)}.{_seen(timings)}"
        return f"Stay in {timings.start}: {words}"
    if start.error and best is not start:
        return f"Best: `{best.format.code}`; {timings.start}, which the Learner had, could not train."
    if best is not start:
        words = f"Best: `{best.format.code}`, {best.speedup:.2f} times as fast as {timings.start}"
        if start.note:
            words += f" in a few steps; there was no time for rounds{_more_time(timings, None)}"
        elif not is_proved_faster(best.samples, start.samples, level_of(timings.rows)):
            words += f" in {counted(len(best.samples), 'round')}, and in its first steps"
        return f"{words}."
    if start.error:
        return f"No other format can be chosen; {timings.start}, which the Learner has, could not train."
    return f"Stay in {best.format}, nothing is proved to be faster: `{best.format.code}`."


def _timed(timings: "FormatTimings") -> list[FormatTiming]:
    return [row for row in timings.rows if row.samples and not row.error]


def _seen(timings: "FormatTimings") -> str:
    "What looks fastest by the few steps that there were, where nothing is decided."
    seen = min(_timed(timings), key=lambda row: row.ms, default=None)
    if seen is None or seen.format == timings.start or isnan(seen.speedup):
        return ""
    return f" {seen.format} looks {seen.speedup:.2f} times as fast, in {counted(len(seen.samples), 'step')}."


def _rival(timings: "FormatTimings") -> str:
    "Why the fastest row is not the best, where it is not."
    best = timings.best_row
    rows = [row for row in timings.rows if is_comparable(row) and row.ms < best.ms]
    if not is_comparable(best) or not rows:
        return ""
    rival = min(rows, key=lambda row: row.ms)
    gain = best.ms / rival.ms
    reasons = ["within the noise"] if gain > FLOOR else ["which is too little to tell"]
    more = set(changes(timings.start, rival.format)) - set(changes(timings.start, best.format))
    if more and best.format != timings.start:
        reasons.append(f"and it changes more ({', '.join(sorted(more))})")
    words = f"{rival.format} looks {gain:.2f} times as fast as that, {' '.join(reasons)}"
    needed = _n_rounds_needed(timings, rival) if gain > FLOOR else None
    if needed is not None:
        n = len(rival.samples)
        words += f"; {counted(n, 'round')} {'is' if n == 1 else 'are'} too few to tell{_more_time(timings, needed)}"
    return f"{words}."


def _n_rounds_needed(timings: "FormatTimings", rival: FormatTiming) -> int | None:
    "How many rounds would prove the fastest row faster than what the Learner had, or where they have, than the best."
    best, start = timings.best_row, timings.row(timings.start)
    better = rows_better_than(start, timings.rows)
    if rival in better:
        return n_rounds_to_prove(rival.samples, best.samples, level_between(rival, best, better))
    return n_rounds_to_prove(rival.samples, start.samples, level_of(timings.rows))


def _more_time(
    timings: "FormatTimings",
    n_rounds: int | None,  # that would tell; None: as many as a search makes
) -> str:
    "What more time would do, where that is known."
    round_s, before_s = timings.round_s, timings.before_rounds_s
    if n_rounds is None:  # there was none
        seen = _timed(timings)
        missed = sum(not row.is_tried for row in timings.rows)
        warmup_s = [row.warmup_s for row in seen if not isnan(row.warmup_s)]
        if missed and warmup_s:  # they take about as long as the others
            before_s += missed * np.mean(warmup_s)
        if isnan(round_s) and seen:  # about a step of each, after one that is not timed
            round_s = 2 * (len(seen) + missed) * np.mean([row.ms for row in seen]) / 1000
    if isnan(round_s) or isnan(before_s):
        return ", pass a larger `budget`" if n_rounds is None else f", {n_rounds} would do"
    seconds = max(0.1, 1.2 * (before_s + (n_rounds or N_ROUNDS) * round_s))
    return f", `budget={seconds:.{0 if seconds > 5 else 1}f}` may do"


def _limit_words(timings: "FormatTimings") -> str:
    if not timings.best_row.samples or timings.best_row.error:
        return ""
    busy = "" if timings.busy is None else f"busy {timings.busy:.0%} of the step"
    share = "" if timings.optimizer_share is None else f"the optimizer takes {timings.optimizer_share:.0%} of it"
    facts = ", ".join(filter(None, (busy, share)))
    facts = f" ({facts})" if facts else ""
    words = {
        "data": "Data loading limits it",
        "optimizer": f"The optimizer takes {timings.optimizer_share or 0:.0%} of the step",
        "python": f"Python and launches limit it, the GPU waits{facts}",
        "gpu": f"The GPU limits it{facts}",
        "device": f"The computation limits it ({timings.device}{', ' if share else ''}{share})",
    }[timings.limit]
    return f"{words}; this may help: `{timings.advice}`." if timings.advice else f"{words}."


def _gain_words(timings: "FormatTimings") -> str:
    twins = timings.twins()
    if twins is None:
        return ""
    first, last = twins
    rest = str(first.format).removeprefix("contiguous ")
    words = f"channels last against contiguous, {rest}"
    pairs = (first.samples, last.samples), (last.samples, first.samples)
    if first.note or last.note:
        words += ", in a few steps"
    elif not any(is_proved_faster(*pair, level_of(timings.rows)) for pair in pairs):
        words += ", within the noise"
    return f"The format alone gives {timings.format_gain:.2f} times ({words})."


def _view_words(timings: "FormatTimings") -> str:
    "Which module keeps the model from channels last, and how to mend it, where that is known."
    last = [row for row in timings.rows if row.format.channels_last and row.is_tried]
    hints = [hint for row in last if (hint := view_hint(row.error))]
    return f"No channels last format can train: {hints[0]}." if len(hints) == len(last) > 0 else ""
