"Which of several timed formats to train in, by evidence."

from channelslast.find.evidence import APART, FAR, LEVEL, is_far_faster, is_proved_faster
from channelslast.find.timing import FormatTiming
from channelslast.formats import TrainFormat

__all__ = ["choose_row", "changes", "is_clear", "is_comparable", "level_between", "level_of", "rows_better_than"]

AMONG_FASTER = 0.05  # the level of the tests between formats that are all faster than what the Learner had
LIKELY = 0.25  # the same, where the faster one differs in what costs nothing, and changes no value but by rounding
FREE = {"channels_last", "fused_optimizer"}


def choose_row(
    rows: list[FormatTiming],
    start: FormatTiming,  # of the format that the Learner had, one of `rows`
) -> FormatTiming:
    """Return the fastest of the rows that are proved faster than `start`, or `start` where none is.

    Of two that are both faster than `start`, the one that changes less, unless the test finds the other faster, at
    `level_between`. Where `start` cannot train any other is better; where it was not tried, nothing is known.
    """
    if not start.is_tried:
        return start
    better = rows_better_than(start, rows)
    if not better:
        return start
    fastest = min(better, key=lambda row: row.ms)
    equal = [
        row
        for row in better
        if not _is_faster(fastest, row, level_between(fastest, row, better), not start.note, APART)
    ]
    return min(equal, key=lambda row: (len(changes(start.format, row.format)), row.ms))


def rows_better_than(
    start: FormatTiming,
    rows: list[FormatTiming],
) -> list[FormatTiming]:
    "Return the rows that are proved faster than `start`; where that cannot train, all that can."
    has_rounds = not start.note
    able = [row for row in rows if row is not start and row.samples and not row.error]
    timed = [row for row in able if is_comparable(row)] if has_rounds else able
    if start.error:
        return timed or able
    return [row for row in timed if _is_faster(row, start, level_of(rows), has_rounds)]


def is_clear(
    rows: list[FormatTiming],
    start: FormatTiming,
) -> bool:
    "Whether what is chosen was `APART` times as fast as all others in each round: more would hardly choose another."
    best = choose_row(rows, start)
    others = [row for row in rows if is_comparable(row) and row is not best]
    return is_comparable(best) and all(_is_faster_in_each_round(best, row, APART) for row in others)


def _is_faster(
    row: FormatTiming,
    other: FormatTiming,
    level: float,  # the chance of being wrong where both are equal
    has_rounds: bool,  # False: the samples are first steps
    times: float = FAR,  # as fast as it has to be in each round and in the first steps, where the rounds prove nothing
) -> bool:
    """Whether `row` is proved faster than `other`, by the rounds.

    Where there was time for none, the first steps have to prove that it is `FAR` times as fast, see `is_far_faster`.
    Where the rounds are too few to prove it, they can, if `row` is `times` as fast in each round too.
    """
    if not has_rounds:
        return is_far_faster(row.samples, other.samples, level, FAR)
    if is_proved_faster(row.samples, other.samples, level):
        return True
    is_far = is_far_faster(row.first_samples, other.first_samples, level, times)
    return is_far and _is_faster_in_each_round(row, other, times)


def _is_faster_in_each_round(row: FormatTiming, other: FormatTiming, times: float) -> bool:
    return all(times * ms < other_ms for ms, other_ms in zip(row.samples, other.samples))


def is_comparable(
    row: FormatTiming,
) -> bool:
    "Whether `row` was timed in the rounds."
    return not row.error and not row.note


def level_of(
    rows: list[FormatTiming],
) -> float:
    "Return the level of each comparison with the format that the Learner had: all together keep `LEVEL` (Bonferroni)."
    return LEVEL / max(1, sum(row.is_tried for row in rows) - 1)


def level_between(
    fastest: FormatTiming,
    row: FormatTiming,
    better: list[FormatTiming],  # all that are faster than what the Learner had
) -> float:
    "Return the level of the test whether the fastest of `better` is faster than `row`, another of them."
    if FREE.issuperset(changes(row.format, fastest.format)):
        return LIKELY
    return AMONG_FASTER / max(1, len(better) - 1)


def changes(
    start: TrainFormat,
    fmt: TrainFormat,
) -> list[str]:
    "Return the fields of `fmt` that differ from those of `start`."
    return [name for name, value in vars(fmt).items() if value != vars(start)[name]]
