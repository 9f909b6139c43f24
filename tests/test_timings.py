"The result of `format_find`: which format it chooses, and what it says and draws."

import re
import sys
from math import isnan, nan
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib import pyplot as plt

from channelslast.find import FormatTiming, FormatTimings
from channelslast.find.choice import is_clear, level_between, rows_better_than
from channelslast.find.evidence import LEVEL, n_rounds_to_prove
from channelslast.formats import TrainFormat

CONTIGUOUS, LAST = TrainFormat(), TrainFormat(True)
CONTIGUOUS_BF16, LAST_BF16 = TrainFormat(False, "bf16"), TrainFormat(True, "bf16")
COMPILED = TrainFormat(True, "bf16", "reduce-overhead")


def new_timings(samples, start=CONTIGUOUS, bs=10, **kwargs):
    "Timings of formats by their samples, or by the reason why they could not train."
    rows = [
        FormatTiming(fmt, error=values) if isinstance(values, str) else FormatTiming(fmt, list(values), warmup_s=0.5)
        for fmt, values in samples.items()
    ]
    start_ms = next(row.ms for row in rows if row.format == start)
    for row in rows:
        row.items_per_s, row.speedup = 1000 * bs / row.ms, start_ms / row.ms
    facts = dict(data_items_per_s=1e6, busy=None, model="Net", device="cpu", shapes=[(bs, 3, 8, 8)], n_steps=1)
    return FormatTimings(rows, start, **facts | kwargs)


def around(ms, spread=0.1):
    return [ms - spread, ms, ms, ms + spread]


@pytest.fixture
def timings():
    return new_timings({CONTIGUOUS: around(100), LAST: around(80), CONTIGUOUS_BF16: around(60), LAST_BF16: around(40)})


def test_a_row_is_the_median_and_the_quartiles_of_its_samples():
    row = FormatTiming(LAST, [4.0, 1.0, 2.0, 3.0, 5.0])
    assert (row.ms, row.iqr) == (3.0, 2.0)
    failed = FormatTiming(LAST, error="no")
    assert isnan(failed.ms) and isnan(failed.iqr)
    single = FormatTiming(LAST, [4.0])
    assert single.ms == 4 and isnan(single.iqr)  # it says nothing of the noise


def test_it_is_a_sequence_of_rows_in_the_order_of_the_candidates(timings):
    assert len(timings) == 4 and timings[1].format == LAST and timings[-1].format == LAST_BF16
    assert [row.ms for row in timings] == [100, 80, 60, 40]


def test_best_is_the_fastest(timings):
    assert timings.best == LAST_BF16 and timings.best_row is timings[3]


@pytest.mark.parametrize(
    "samples, best",
    [
        # as fast as what the Learner has
        ({CONTIGUOUS: around(40), LAST: around(40), LAST_BF16: around(40)}, CONTIGUOUS),
        # faster, by less than the differences spread
        ({CONTIGUOUS: [40, 44, 46, 50], LAST: [46, 40, 48, 39]}, CONTIGUOUS),
        ({CONTIGUOUS: [40, 50, 60, 45], LAST: [45, 44, 50, 56]}, CONTIGUOUS),
        # faster by more
        ({CONTIGUOUS: [40, 44, 46, 50], LAST: [30, 33, 35, 37]}, LAST),
        # the whole machine drifts, round by round one is faster
        ({CONTIGUOUS: [40, 60, 80, 100], LAST: [38, 57, 76, 95]}, LAST),
        # one round is off, with few there is no telling
        ({CONTIGUOUS: [40, 40, 41, 80, 40], LAST: [37, 37, 37, 37, 37]}, CONTIGUOUS),
        ({CONTIGUOUS: [40, 40, 41, 80, 40] * 3, LAST: [37, 37, 37, 37, 37] * 3}, LAST),
        # by less than a percent, however sure
        ({CONTIGUOUS: around(40, 0.01) * 5, LAST: around(39.7, 0.01) * 5}, CONTIGUOUS),
        # two that are equal: the one that changes less
        ({CONTIGUOUS: around(40), LAST_BF16: [19, 20, 20, 21], LAST: [20.5, 19.5, 21, 20]}, LAST),
        ({CONTIGUOUS: around(40), COMPILED: around(20), CONTIGUOUS_BF16: around(20)}, CONTIGUOUS_BF16),
        # two that are equal and change as much: the faster one
        ({CONTIGUOUS: around(40), CONTIGUOUS_BF16: around(20.05), LAST: around(20)}, LAST),
        # the faster one changes more
        ({CONTIGUOUS: around(40), LAST: around(22), LAST_BF16: around(20)}, LAST_BF16),
        # a noisy one, as fast as the fastest for all one knows, but not faster than what the Learner has
        ({CONTIGUOUS: around(40), LAST: [5, 20, 60, 70], LAST_BF16: around(30)}, LAST_BF16),
        # often enough to be sure
        ({CONTIGUOUS: [40, 41, 43, 46] * 4, LAST: [38, 40, 39, 41] * 4}, LAST),
        # one round proves nothing
        ({CONTIGUOUS: [40], LAST: [20]}, CONTIGUOUS),
        # a clock that is too coarse for noise
        ({CONTIGUOUS: [40, 40], LAST: [20, 20]}, LAST),
        # what fails is out
        ({CONTIGUOUS: around(40), LAST: "out of memory", LAST_BF16: around(30)}, LAST_BF16),
    ],
)
def test_best_changes_least_within_the_noise(samples, best):
    assert new_timings(samples).best == best


SIX = [TrainFormat(last, mode) for last in (False, True) for mode in (None, "fp16", "bf16")]


def share_chosen(best, ms, noise, n_rounds, far_off=0.0, n_trials=400):
    """The share of trials that choose `best` among formats that take so many milliseconds, of which the first is held.

    The share `far_off` of all samples takes twice as long.
    """
    rng = np.random.default_rng()
    n_chosen = 0
    for _ in range(n_trials):
        samples = np.array([*ms.values()])[:, None] * (1 + noise * rng.standard_normal((len(ms), n_rounds)))
        samples *= 1 + (rng.random(samples.shape) < far_off)
        rows = [FormatTiming(*row) for row in zip(ms, samples.tolist())]
        n_chosen += FormatTimings(rows, next(iter(ms))).best == best
    return n_chosen / n_trials


def share_of(best, ms, noise, n_rounds, far_off=0.0):
    "The share of trials that choose `best` among six formats, the last of which takes `ms`, the others 100."
    return share_chosen(best, dict.fromkeys(SIX, 100) | {SIX[-1]: ms}, noise, n_rounds, far_off)


def test_among_faster_ones_what_costs_nothing_need_only_be_likely():
    fused = TrainFormat(True, "bf16", fused_optimizer=True)
    assert share_chosen(fused, {CONTIGUOUS: 100, LAST_BF16: 53, fused: 50}, 0.05, 5) >= 0.6
    assert share_chosen(LAST, {CONTIGUOUS: 100, LAST_BF16: 50, LAST: 50}, 0.05, 5) >= 0.9, "a precision is not free"


@pytest.mark.parametrize("noise", [0.01, 0.1])
@pytest.mark.parametrize("n_rounds", [3, 5, 10])
def test_of_equal_formats_the_own_one_is_kept(noise, n_rounds):
    # at the level of the test 400 trials give more than 5% wrong ones less than once in a thousand runs
    assert LEVEL <= 0.025
    assert share_of(SIX[0], 100, noise, n_rounds) >= 0.95


@pytest.mark.parametrize(
    "ms, noise, n_rounds, found", [(100 / 1.05, 0.01, 10, 0.95), (50, 0.05, 3, 0.8)], ids=["5%", "2 times"]
)
def test_gain_is_found(ms, noise, n_rounds, found):
    assert share_of(SIX[-1], ms, noise, n_rounds) >= found


@pytest.mark.parametrize("n_rounds, found", [(10, 0.45), (25, 0.75), (40, 0.9)])
def test_rounds_that_are_far_off_hide_a_gain_the_less_the_more_there_are(n_rounds, found):
    assert share_of(SIX[-1], 100 / 1.05, 0.01, n_rounds, far_off=0.05) >= found
    assert share_of(SIX[0], 100, 0.01, n_rounds, far_off=0.05) >= 0.95


@pytest.mark.parametrize(
    "rounds, first_ms, best",
    [
        ([60], 40, LAST),
        ([60, 40], 40, LAST),
        ([60, 40], 80, CONTIGUOUS),  # not far faster in its first steps
        ([60, 95], 40, CONTIGUOUS),  # nor in a round
        ([60, 40, 94], 40, CONTIGUOUS),  # enough rounds to prove it, if it is so
    ],
)
def test_first_steps_count_where_rounds_are_too_few_to_prove_anything(rounds, first_ms, best):
    timings = new_timings({CONTIGUOUS: [100, 140, 95][: len(rounds)], LAST: rounds})
    timings[0].first_samples, timings[1].first_samples = around(100), around(first_ms)
    assert timings.best == best
    words = f" in {len(rounds)} round{'s' * (len(rounds) > 1)}, and in its first steps."
    assert (words in timings.verdict) == (best == LAST)


@pytest.mark.parametrize(
    "rounds, first_ms, best",
    [([40], 40, LAST_BF16), ([46], 40, LAST), ([40], 46, LAST), ([40, 40], 40, LAST_BF16)],
)
def test_among_faster_ones_too_few_rounds_choose_what_is_apart_in_all_that_was_seen(rounds, first_ms, best):
    n = len(rounds)
    timings = new_timings({CONTIGUOUS: [100] * n, LAST: [50] * n, LAST_BF16: rounds})
    for row, ms in zip(timings, (100, 50, first_ms)):
        row.first_samples = around(ms)
    assert timings.best == best


def test_first_steps_also_count_where_rounds_prove_too_little():
    timings = new_timings({CONTIGUOUS: [100, 140, 95], LAST: [50, 40, 61]})
    assert timings.best == CONTIGUOUS, "three rounds alone prove little"
    timings = new_timings({CONTIGUOUS: [100, 140, 95], LAST: [50, 40, 61]})
    timings[0].first_samples, timings[1].first_samples = around(100), around(45)
    assert timings.best == LAST and "in 3 rounds, and in its first steps" in timings.verdict


def test_what_was_timed_is_better_than_what_was_not_where_the_own_format_fails():
    rows = [FormatTiming(CONTIGUOUS, error="boom"), FormatTiming(LAST, note="1 step, the time was up")]
    assert FormatTimings(rows, CONTIGUOUS).best == CONTIGUOUS
    rows.append(FormatTiming(LAST_BF16, [5.0, 5.1, 5.2], note="3 steps, no time for rounds"))
    assert FormatTimings(rows, CONTIGUOUS).best == LAST_BF16


def test_rounds_that_would_tell_are_counted_at_the_level_of_the_choice():
    rng = np.random.default_rng(0)
    ms = {CONTIGUOUS: 100, LAST: 50, CONTIGUOUS_BF16: 50, LAST_BF16: 48, TrainFormat(True, "fp16"): 50}
    n_told = 0
    for _ in range(200):
        rows = [FormatTiming(fmt, (each * (1 + 0.012 * rng.standard_normal(5))).tolist()) for fmt, each in ms.items()]
        timings = FormatTimings(rows, CONTIGUOUS)
        better = rows_better_than(rows[0], rows)
        told = re.search(r"looks .*; 5 rounds are too few to tell, (\d+) would do", timings.verdict)
        if told and min(better, key=lambda row: row.ms) is rows[3]:
            n_told += 1
            level = level_between(rows[3], timings.best_row, better)
            assert int(told[1]) == n_rounds_to_prove(rows[3].samples, timings.best_row.samples, level)
    assert n_told > 20


@pytest.mark.parametrize(
    "samples, clear",
    [
        ({CONTIGUOUS: [100, 110, 90, 105, 95], LAST: [50, 55, 45, 52, 48]}, True),
        ({CONTIGUOUS: [100, 110, 90, 105, 95], LAST: [50, 55, 45, 52, 90]}, False),  # a round shows it less
        ({CONTIGUOUS: [100] * 5, LAST: [50] * 5, LAST_BF16: [48] * 5}, False),  # two are near
        ({CONTIGUOUS: [100] * 5, LAST: [120] * 5}, True),  # stay
        ({CONTIGUOUS: [100] * 5, LAST: [105] * 5}, False),
        ({CONTIGUOUS: "out of memory", LAST: [50] * 5}, True),
    ],
)
def test_rounds_that_all_show_the_same_by_far_are_clear(samples, clear):
    rows = list(new_timings(samples))
    assert is_clear(rows, rows[0]) == clear


def test_best_where_the_format_of_the_learner_fails():
    timings = new_timings({CONTIGUOUS: "out of memory", LAST: around(50), LAST_BF16: around(50)})
    assert timings.best == LAST and isnan(timings[1].speedup)
    noted = new_timings({CONTIGUOUS: "out of memory", LAST: around(50), LAST_BF16: around(40)})
    noted[1].note = noted[2].note = "3 steps"
    assert noted.best == LAST_BF16
    assert new_timings({CONTIGUOUS: "out of memory", LAST: "no", LAST_BF16: "no"}).best == CONTIGUOUS
    assert "contiguous fp32, which the Learner had, could not train" in timings.verdict


def test_best_starts_from_the_format_of_the_learner():
    equal = {CONTIGUOUS: around(40), LAST: around(40)}
    assert new_timings(equal, start=LAST).best == LAST
    assert new_timings(equal, start=CONTIGUOUS).best == CONTIGUOUS


def test_gain_of_the_format_alone_is_between_twins(timings):
    assert timings.format_gain == 60 / 40
    assert "The format alone gives 1.50 times (channels last against contiguous, bf16)." in timings.verdict
    slower = new_timings({CONTIGUOUS: around(40), LAST: around(50)})
    assert slower.best == CONTIGUOUS and slower.format_gain == 40 / 50
    graph = new_timings({CONTIGUOUS: around(40), LAST: around(20), TrainFormat(True, cuda_graph=True): around(10)})
    assert graph.best.cuda_graph and graph.format_gain == 2  # of the eager ones


def test_gain_of_the_format_within_the_noise_is_called_that():
    noisy = new_timings({CONTIGUOUS: [40, 50, 40, 50], LAST: [50, 40, 39, 49]})
    assert "(channels last against contiguous, fp32, within the noise)" in noisy.verdict


@pytest.mark.parametrize("n_steps, is_told", [(1, False), (2, False), (3, True)])
def test_gain_of_the_format_is_not_told_of_one_step_that_was_held_up(n_steps, is_told):
    timings = new_timings({CONTIGUOUS: [400] * n_steps, LAST: around(40)}, start=LAST)
    timings[0].note = "10 times the fastest"
    words = "The format alone gives 10.00 times (channels last against contiguous, fp32, in a few steps)."
    assert (words in timings.verdict) is is_told and (timings.format_gain is not None) is is_told


@pytest.mark.parametrize("twin", [{}, {CONTIGUOUS_BF16: "out of memory"}])
def test_gain_of_the_format_is_unknown_without_a_twin(twin):
    timings = new_timings({CONTIGUOUS: around(40), LAST_BF16: around(20), **twin})
    assert timings.format_gain is None and "alone" not in timings.verdict


@pytest.mark.parametrize(
    "facts, limit, said",
    [
        (
            {"data_items_per_s": 200, "more_workers": 8},
            "data",
            "Data loading limits it; this may help: `learn.dls.loaders[0] = learn.dls.train.new(num_workers=8)`",
        ),
        ({"data_items_per_s": 200, "busy": 0.99}, "data", "Data loading limits it."),
        ({"busy": 0.95}, "gpu", "The GPU limits it (busy 95% of the step)"),
        ({"busy": 0.95, "optimizer_share": 0.1}, "gpu", "(busy 95% of the step, the optimizer takes 10% of it)."),
        (
            {"busy": 0.5},
            "python",
            "the GPU waits (busy 50% of the step); this may help: `learn.to_fastest(compile=True",
        ),
        (
            {"optimizer_share": 0.4},
            "optimizer",
            "The optimizer takes 40% of the step; this may help: `learn.opt_func, learn.opt =",
        ),
        ({"optimizer_share": 0.2}, "device", "The computation limits it (cpu, the optimizer takes 20% of it)."),
        ({}, "device", "The computation limits it (cpu)"),
    ],
)
def test_what_limits_the_best_step(facts, limit, said):
    timings = new_timings({CONTIGUOUS: around(100), LAST_BF16: around(40)}, **facts)  # 250 items a second
    assert timings.limit == limit and said in timings.verdict


def test_compiling_is_not_advised_where_it_was_tried():
    timings = new_timings({CONTIGUOUS: around(100), COMPILED: around(40)}, busy=0.5)
    assert timings.limit == "python" and "compile=True" not in timings.verdict and timings.advice is None


def test_row_that_looks_faster_is_explained():
    few = new_timings({CONTIGUOUS: [40, 44, 46, 50], LAST: [40, 40, 48, 39]})
    assert (
        few.best == CONTIGUOUS
        and "channels last fp32 looks 1.12 times as fast as that, within the noise" in few.verdict
    )
    assert "4 rounds are too few to tell, " in few.verdict and "would do." in few.verdict
    assert "too few" not in new_timings({CONTIGUOUS: [40, 44, 46, 50] * 5, LAST: [46, 34, 48, 49] * 5}).verdict
    few.before_rounds_s, few.round_s = 10, 2
    assert "4 rounds are too few to tell, `budget=" in few.verdict
    more = new_timings({CONTIGUOUS: around(40), LAST_BF16: [18, 20, 19.5, 21], LAST: [20.5, 19.5, 21, 20]})
    assert more.best == LAST and "channels last bf16 looks 1.03 times as fast as that, within" in more.verdict
    assert "within the noise and it changes more (amp_mode)." in more.verdict and "rounds are" not in more.verdict
    more = new_timings({CONTIGUOUS: around(40), LAST_BF16: [17, 20.5, 17, 19], LAST: [20.5, 19.5, 21, 20]})
    assert more.best == LAST and "it changes more (amp_mode); 4 rounds are too few to tell, " in more.verdict
    assert "looks" not in new_timings({CONTIGUOUS: around(40), LAST: around(20)}).verdict


def test_what_was_not_timed_in_the_rounds_is_no_choice(timings):
    timings[3].note = "3 steps: 1.8 times the fastest"
    assert timings.best == CONTIGUOUS_BF16 and "3 steps: 1.8 times the fastest" in str(timings)
    assert "note" in timings.to_frame()
    plt.close(timings.plot().figure)


def without_rounds(n=4, noise=0.01, drift=0.0, gain=1.0, seed=0):
    "Four formats that were timed in `n` steps of one fit each, with noise within fits and drift between them."
    rng = np.random.default_rng(seed)
    formats = [CONTIGUOUS, LAST, LAST_BF16, CONTIGUOUS_BF16]
    steps = [list(10 * rng.lognormal(0, drift) * rng.lognormal(0, noise, n)) for _ in formats]
    steps[-1] = [ms / gain for ms in steps[-1]]
    return FormatTimings(
        [FormatTiming(fmt, ms, note="no time for rounds") for fmt, ms in zip(formats, steps)], CONTIGUOUS
    )


def test_without_rounds_a_far_faster_format_is_chosen():
    timings = without_rounds(gain=1.9)
    assert timings.best == CONTIGUOUS_BF16
    assert re.search(r"Best: .*, 1\.\d+ times as fast as contiguous fp32 in a few steps; there was no", timings.verdict)
    assert without_rounds(n=2, gain=3.9).best == CONTIGUOUS_BF16, "long steps, of which there are two"
    assert without_rounds(n=1, gain=3.9).best == CONTIGUOUS, "one step proves nothing"
    assert without_rounds(gain=1.4).best == CONTIGUOUS, "fits may differ that much"


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("noise, drift", [(0.01, 0), (0.1, 0), (0.01, 0.05), (0.02, 0.1)])
def test_without_rounds_equal_formats_are_left_alone(n, noise, drift):
    n_wrong = sum(without_rounds(n=n, noise=noise, drift=drift, seed=seed).best != CONTIGUOUS for seed in range(300))
    assert n_wrong <= 0.05 * 300


@pytest.mark.parametrize("is_tried", [False, True])
def test_without_the_own_format_nothing_is_chosen(is_tried):
    rows = [FormatTiming(LAST, around(20)), FormatTiming(CONTIGUOUS, [], is_tried=is_tried)]
    if is_tried:
        rows[1].samples, rows[1].note = [40.0], "1 step, the time was up"
    else:
        rows[1].error = "not reached in 1 seconds"
    timings = FormatTimings(rows, CONTIGUOUS)
    assert timings.best == CONTIGUOUS and "there was no time to compare it with others" in timings.verdict
    assert "larger `budget`" in timings.verdict
    plt.close(timings.plot().figure)
    timings.before_rounds_s, timings[0].warmup_s = 20.0, 5.0
    assert f", `budget={'25' if is_tried else '31'}` may do." in timings.verdict  # ten rounds, and what was not reached
    words = "channels last fp32 looks 2.00 times as fast, in 4 steps."
    assert (words in timings.verdict) is is_tried


def test_slow_data_are_told_first(timings):
    assert str(timings).startswith("Net (input shape: 10 x 3 x 8 x 8) on cpu, 4 rounds of 1 step each")
    timings.data_items_per_s = 50
    first = str(timings).split("\n\n")[0]
    assert "yields 50 items a second" in first and "could take 250" in first and "no format will help" in first
    timings.data_items_per_s = 150  # between what the Learner takes now and the best
    assert "no format gives more than 1.50 times" in " ".join(str(timings).split("\n\n")[0].split())


def test_verdict_is_one_line_with_the_code(timings):
    assert timings.verdict.startswith(f"Best: `{LAST_BF16.code}`, 2.50 times as fast as contiguous fp32.")
    assert "\n" not in timings.verdict
    stay = new_timings({CONTIGUOUS: around(40), LAST: around(40)})
    assert stay.verdict.startswith("Stay in contiguous fp32, nothing is proved to be faster: `learn.to_format(")
    assert stay.format_gain == 1


def test_table_has_a_line_for_each_candidate_in_columns():
    timings = new_timings({CONTIGUOUS: around(1234.5), LAST: "RuntimeError: no " + "x" * 200, LAST_BF16: around(40)})
    lines = str(timings).splitlines()
    assert lines[2].split() == ["Format", "ms", "IQR", "items/s", "speedup", "warm-up", "s"]
    rows = lines[4:7]
    assert rows[0].split() == ["contiguous", "fp32", "1234.50", "0.05", "8", "1.00", "0.5", "now"]
    assert rows[1].startswith("channels last fp32") and "RuntimeError: no" in rows[1] and len(rows[1]) < 130
    assert rows[2].split()[-1] == "best" and "30.86" in rows[2]
    assert lines[1] == lines[3] == lines[7] and set(lines[1]) == {"="} and len(lines[1]) >= max(map(len, rows))


def test_in_a_notebook_it_is_a_table_of_html():
    plt.close("all")
    timings = new_timings({CONTIGUOUS: around(1234.5), LAST: "ValueError: <no>", LAST_BF16: around(40)})
    html = timings._repr_html_()
    assert html.count("<tr") == 4 and "ValueError: &lt;no&gt;" in html and "<td>1234.50</td>" in html
    assert "30.86 times as fast" in html and "<code>learn.to_format(" in html and "peak GB" not in html
    timings.data_items_per_s = 50
    assert "yields 50 items a second" in timings._repr_html_()
    assert html.count('<img src="data:image/png;base64,') == 1 and "<img" not in timings.to_html(show_plot=False)
    assert plt.get_fignums() == []


def test_a_cell_that_showed_it_shows_it_once(timings, monkeypatch):
    shown, number = [], [7]
    for module in ("channelslast.find.result", "channelslast.notebook"):
        monkeypatch.setattr(f"{module}.cell", lambda: number[0])
    display = SimpleNamespace(display=shown.append, HTML=str)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    timings.show()
    assert len(shown) == 1 and "<img" in shown[0] and timings._repr_html_() is None
    number[0] = 8
    assert "<table" in timings._repr_html_()


def test_rows_and_start_are_enough():
    rows = [FormatTiming(CONTIGUOUS, around(100)), FormatTiming(LAST, around(40))]
    timings = FormatTimings(rows, CONTIGUOUS)
    assert timings.best == LAST and timings[1].speedup == 2.5 and timings.limit == "device"
    assert "2.50 times as fast" in timings.verdict and "channels last fp32" in str(timings) + timings._repr_html_()
    plt.close(timings.plot().figure)


def test_start_has_to_be_a_row():
    with pytest.raises(ValueError, match=r"start=TrainFormat.* is the format of none of the rows"):
        FormatTimings([FormatTiming(LAST, [1.0])], CONTIGUOUS)


def test_fused_steps_are_advised_where_the_optimizer_has_them():
    facts = {"optimizer_share": 0.4, "has_fused_form": True}
    timings = new_timings({CONTIGUOUS: around(100), LAST_BF16: around(40)}, **facts)
    assert timings.advice == 'learn.to_format("channels last bf16 fused")'
    timings.has_fused_form = None
    assert timings.limit == "optimizer" and timings.advice is None, "its steps are fused already"


def test_table_of_a_gpu_has_its_memory():
    timings = new_timings({CONTIGUOUS: around(40), LAST: around(20)})
    for row in timings:
        row.peak_bytes = 2_500_000_000
    assert "peak GB" in str(timings) and str(timings).count("2.50") == 2


def test_what_is_kept_is_marked():
    timings = new_timings({CONTIGUOUS: around(40), LAST: around(40)})
    assert "now, kept" in str(timings)


def test_repr_is_short_and_names_the_best(timings):
    assert repr(timings) == f"FormatTimings(best={LAST_BF16!r})"


def test_frame_has_a_row_for_each_candidate(timings):
    frame = timings.to_frame()
    assert list(frame["format"]) == [str(row.format) for row in timings]
    assert list(frame["channels_last"]) == [False, True, False, True] and list(frame["ms"]) == [100, 80, 60, 40]
    assert {"amp_mode", "compile", "iqr", "items_per_s", "speedup", "peak_bytes", "warmup_s", "error"} <= set(frame)


def test_plot_has_a_bar_for_each_candidate_that_trains():
    timings = new_timings({CONTIGUOUS: around(100), LAST: "RuntimeError: no", LAST_BF16: around(40)})
    ax = timings.plot()
    bars = [bar for bar in ax.patches if bar.get_width()]
    assert [bar.get_width() for bar in bars] == [100, 40]
    assert bars[1].get_facecolor() != bars[0].get_facecolor()
    texts = [text.get_text() for text in ax.texts]
    assert any("RuntimeError: no" in text for text in texts) and any("2.50x, best" in text for text in texts)
    assert [label.get_text() for label in ax.get_yticklabels()] == [str(row.format) for row in timings]
    assert ax.get_legend() is None
    plt.close(ax.figure)


def test_plot_marks_data_loading_where_it_counts():
    timings = new_timings({CONTIGUOUS: around(100), LAST: around(50)}, data_items_per_s=100)
    _, ax = plt.subplots()
    assert timings.plot(ax) is ax
    (line,) = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert line.get_xdata()[0] == pytest.approx(100) and ax.get_xlim()[1] > 100  # 10 items at 100 a second
    assert "data loading alone" in [text.get_text() for text in ax.texts] and ax.get_legend() is None
    plt.close(ax.figure)


def test_plot_without_a_speedup():
    timings = new_timings({CONTIGUOUS: "no", LAST: around(50)})
    assert isnan(timings[1].speedup) and timings[1].items_per_s == 200 and nan != timings[1].ms
    ax = timings.plot()
    assert any(text.get_text().strip() == "best" for text in ax.texts)
    plt.close(ax.figure)


def test_memory_that_is_not_known_is_left_blank():
    timings = new_timings({CONTIGUOUS: around(40), COMPILED: around(20)})
    timings[0].peak_bytes = 2_500_000_000
    lines = str(timings).splitlines()
    assert "2.50" in lines[4] and lines[5].index("0.5") > lines[4].index("2.50")


def test_shapes_that_repeat_are_counted():
    timings = new_timings({CONTIGUOUS: around(40)}, shapes=[(3, 8, 8)] * 16 + [(2,)])
    assert "(input shape: 16 of 3 x 8 x 8, 2)" in str(timings)
