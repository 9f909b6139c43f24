"How a search spends its time: how many rounds, of how many steps each."

import statistics

import torch

from channelslast.find.candidates import Candidate

N_ROUNDS = 10  # more time makes them longer, which makes them steadier
FEW_ROUNDS = 5  # where in more a round had few timed steps
FEW_STEPS = 4  # in fewer of them, what comes every third step may never come
MIN_ROUNDS = 3  # fewer have no spread


def round_s(
    candidates: list[Candidate],
    n_steps: int,
    device: torch.device,
) -> float:
    "Return the seconds that a round of `n_steps` of each candidate takes, about."
    overhead_s = min(candidate.overhead_s for candidate in candidates)  # the first one's is higher
    return sum(overhead_s + (candidate.n_lead(device) + n_steps) * candidate.step_s for candidate in candidates)


def choose_n_steps(
    candidates: list[Candidate],
    seconds: float,
    device: torch.device,
) -> int:
    "Return how many steps of a round let `seconds` hold `N_ROUNDS` of it, or `FEW_ROUNDS` of more steps."
    untimed_s, step_s = round_s(candidates, 0, device), sum(candidate.step_s for candidate in candidates)
    timed_s = seconds / N_ROUNDS - untimed_s
    if timed_s < max(untimed_s, FEW_STEPS * step_s):
        timed_s = seconds / FEW_ROUNDS - untimed_s
    return max(1, int(timed_s / step_s))


def check_holds_rounds(
    budget: float,
    spent: float,  # seconds of it
    warm: list[Candidate],  # those that can train, one at least
    n_waiting: int,  # candidates that have not been tried
    warm_up_s: list[float],  # of all that have
    device: torch.device,
) -> None:
    "Raise a `ValueError` where the budget is used up; once none is waiting, where it cannot hold the fewest rounds."
    n_all = len(warm) + n_waiting
    rounds_s = MIN_ROUNDS * round_s(warm, 1, device) * n_all / len(warm)
    needed = spent + n_waiting * statistics.median(warm_up_s) + rounds_s
    if spent > budget or (not n_waiting and needed > budget):
        formats = "1 format" if n_all == 1 else f"{n_all} formats"
        enough = f"{1.3 * needed:.{0 if needed > 5 else 2}f}"
        raise ValueError(
            f"budget={budget!r} seconds cannot hold {MIN_ROUNDS} timed steps of {formats}: pass at least {enough}, "
            "None, or fewer formats"
        )
