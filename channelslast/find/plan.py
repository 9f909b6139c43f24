"How a search spends its time on rounds: how many, of how many steps."

from collections.abc import Callable
from math import ceil

import torch

from channelslast.find.candidates import Candidate
from channelslast.find.choice import changes
from channelslast.find.evidence import CLEAR_ROUNDS, MIN_ROUNDS, MOST_ROUNDS, N_ROUNDS
from channelslast.formats import TrainFormat

FEW_ROUNDS = 5  # where in more a round had few timed steps
FEW_STEPS = 4  # in fewer of them, what comes every third step may never come
NEAR = 1.1  # times the best step, within what a few steps tell
ENOUGH_STEPS = 8  # of the fastest, in a round; or
ENOUGH_S = 0.15  # seconds of them
WORTH_WAITING = 1.05  # times as fast by first steps
ROUNDS_SHARE = 0.3  # of the budget, kept for rounds
LIMIT_SHARE = 0.05  # of the budget, kept for finding what limits the best step


def round_s(
    candidates: list[Candidate],
    n_steps: int,
    device: torch.device,
) -> float:
    "Return the seconds that a round of `n_steps` of each candidate takes, about."
    least_s = min(candidate.overhead_s for candidate in candidates)  # the first one's is higher
    return sum(
        (candidate.capture_s or least_s) + (candidate.n_lead(device) + n_steps) * candidate.step_s
        for candidate in candidates
    )


def indispensable(
    candidates: list[Candidate],
    start: TrainFormat,  # with which all are compared
) -> list[Candidate]:
    """Return those without which rounds say nothing: what is needed, and a choice.

    That is the fastest, or of what takes up to `NEAR` times as long by a few steps, the one that changes least.
    """
    choices = [candidate for candidate in candidates if not candidate.is_needed]
    least_s = min((candidate.step_s for candidate in choices), default=0.0)
    near = [candidate for candidate in choices if candidate.step_s <= NEAR * least_s]
    choice = min(near, key=lambda each: (len(changes(start, each.row.format)), each.step_s), default=None)
    return [candidate for candidate in candidates if candidate.is_needed or candidate is choice]


def is_worth_waiting(
    candidates: list[Candidate],
) -> bool:
    "Whether one looks faster than what the Learner has, so that rounds may prove it."
    own = [candidate.step_s for candidate in candidates if candidate.is_own]
    choices = [candidate.step_s for candidate in candidates if not candidate.is_needed]
    return bool(own and choices) and WORTH_WAITING * min(choices) < own[0]


def split_by_time(
    candidates: list[Candidate],
    least: list[Candidate],  # those of them that are indispensable
    seconds: float,
    device: torch.device,
) -> tuple[list[Candidate], list[Candidate]]:
    """Return those of which `seconds` hold `MIN_ROUNDS`, and the others: the slowest are left out first.

    Where they do not hold even those of what is indispensable, all are left out.
    """
    timed = list(candidates)
    while timed and seconds < MIN_ROUNDS * round_s(timed, 1, device):
        others = [candidate for candidate in timed if candidate not in least]
        slowest = max(others, key=lambda candidate: candidate.step_s, default=None)
        timed = [candidate for candidate in timed if candidate is not slowest] if others else []
    return timed, [candidate for candidate in candidates if candidate not in timed]


def choose_n_steps(
    candidates: list[Candidate],
    seconds: float,
    device: torch.device,
) -> int:
    "Return how many steps of a round let `seconds` hold `N_ROUNDS` of it, or `FEW_ROUNDS` of more steps."
    untimed_s, step_s = round_s(candidates, 0, device), sum(candidate.step_s for candidate in candidates)
    n_steps = int((seconds / N_ROUNDS - untimed_s) / step_s)
    if n_steps < FEW_STEPS:
        return max(1, min(FEW_STEPS, int((seconds / FEW_ROUNDS - untimed_s) / step_s)))
    return min(n_steps, max(ENOUGH_STEPS, ceil(ENOUGH_S / min(candidate.step_s for candidate in candidates))))


def is_enough(
    n_rounds: int,
    is_asked: bool,  # a budget is named
    is_clear: Callable[[], bool],  # whether all rounds show the same, by far
) -> bool:
    if is_asked:
        return n_rounds >= MOST_ROUNDS
    return n_rounds >= N_ROUNDS or (n_rounds >= CLEAR_ROUNDS and is_clear())
