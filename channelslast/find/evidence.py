"What rounds of timed steps prove: whether one format is faster than another."

from collections.abc import Sequence

import numpy as np
from scipy.stats import t, ttest_ind, ttest_rel, wilcoxon

__all__ = [
    "LEVEL",
    "FLOOR",
    "FAR",
    "APART",
    "MIN_ROUNDS",
    "CLEAR_ROUNDS",
    "N_ROUNDS",
    "MOST_ROUNDS",
    "is_proved_faster",
    "is_far_faster",
    "n_rounds_to_prove",
]

LEVEL = 0.025  # the chance of a wrong choice, of all candidates together, where all are equal
FLOOR = 1.01  # times as fast: who gains less gains nothing
APART = 1.15  # times as fast by steps of one fit: fits at different times differ by up to 15% on a shared machine
FAR = 1.5  # the same, where a wrong choice would change what the user has for nothing
MIN_ROUNDS = 3  # fewer prove next to nothing
N_ROUNDS = 10  # as many as prove a small gain; a budget that is named buys more
CLEAR_ROUNDS = 5  # do where each of them shows the same, by far
MOST_ROUNDS = 40  # that a search makes


def is_proved_faster(
    samples: Sequence[float],  # milliseconds a step, one for each round
    others: Sequence[float],  # of the other format, in the same rounds
    level: float,  # the chance of being wrong where both are equal
) -> bool:
    """Whether a format is more than `FLOOR` times as fast as another, by a paired one-sided test on the rounds.

    The test is on the logarithms, for noise grows with the step. In pairs, so that what slows a whole round down, as
    others on the machine, counts for neither. Wilcoxon's signed-rank test where the rounds are enough for it: a few
    that are far off would hide any gain from the t-test, the more surely the more rounds there are. With fewer rounds
    the t-test. Without two rounds nothing is proved.
    """
    gains = _log_gains(samples, others)
    if len(gains) < 2:
        return False
    if np.ptp(gains) < 1e-9:  # a clock that is too coarse for any noise: the test divides by it
        return bool(gains[0] > np.log(FLOOR))
    least = 0.5 ** len(gains)  # p-value of the signed-rank test where each round shows the gain
    test = wilcoxon if 2 * least < level else ttest_rel  # one of them may show a little less
    return bool(test(gains, np.full(len(gains), np.log(FLOOR)), alternative="greater").pvalue < level)


def is_far_faster(
    samples: Sequence[float],  # milliseconds of single steps of one fit
    others: Sequence[float],  # of a fit in the other format, at another time
    level: float,  # the chance of being wrong where the first is `times` as fast, or less
    times: float,
) -> bool:
    """Whether a format is more than `times` as fast as another, by a one-sided t-test of Welch on single steps.

    The test sees the noise within the fits, `times` leaves room for what differs between them. Without two steps of
    each nothing is proved.
    """
    if min(len(samples), len(others)) < 2:
        return False
    gains = np.log(others) - np.log(times)
    if max(np.ptp(gains), np.ptp(np.log(samples))) < 1e-9:
        return bool(gains[0] > np.log(samples[0]))
    return bool(ttest_ind(gains, np.log(samples), equal_var=False, alternative="greater").pvalue < level)


def n_rounds_to_prove(
    samples: Sequence[float],
    others: Sequence[float],
    level: float,
) -> int | None:
    """How many rounds would do, in most cases, if gain and noise are as in these; None if `MOST_ROUNDS` would not."""
    gains = _log_gains(samples, others)
    if len(gains) < 2:
        return None
    gain, noise = gains.mean() - np.log(FLOOR), gains.std(ddof=1)
    for n in range(len(gains) + 1, MOST_ROUNDS + 1):
        # a margin of one standard error: the next rounds may be less lucky
        if gain > noise / n**0.5 * (t.ppf(1 - level, n - 1) + 1):
            return n
    return None


def _log_gains(samples: Sequence[float], others: Sequence[float]) -> np.ndarray:
    "The logarithms of how many times as fast the first was, round by round."
    n = min(len(samples), len(others))
    return np.log(others[:n]) - np.log(samples[:n])
