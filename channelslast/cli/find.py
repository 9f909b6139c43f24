"`channelslast find`."

import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastai.learner import Learner

from channelslast.cli.files import check_files, save_plots
from channelslast.cli.loop import check_archs, for_each_arch
from channelslast.cli.record import row_record, timings_record
from channelslast.find import FormatTimings
from channelslast.find.run import find_format
from channelslast.find.stages import fixed_stage, new_stages
from channelslast.formats import TrainFormat, to_train_format
from channelslast.zoo import (
    OPTIMIZERS,
    IllegalValue,
    check_positive,
    fastais_own,
    find_device,
    new_learner,
)


def run(
    options: Namespace,
) -> None:
    check_positive(bs=options.bs, size=options.size, budget=options.budget)
    check_files(json=options.json, plot=options.plot)
    opt_func = choose_optimizer(options.opt)
    device, formats = find_device(options.device), to_formats(options.formats)
    check_archs(options)
    found: dict[str, FormatTimings] = {}

    def run_one(arch: str) -> dict[str, Any]:
        learn = new_learner(arch, options.bs, options.size, device, opt_func, options.path)
        stages = new_stages(learn, formats, options.compile, options.keep_precision)
        built_in = fastais_own()
        started = time.perf_counter()
        found[arch] = timings = find_format(learn, stages, [built_in] if options.built_in else [], options.budget)
        seconds = round(time.perf_counter() - started, 1)
        print(str(timings).replace("`budget`", "`--budget`").replace("`budget=", "`--budget "))
        record = {"bs": options.bs, "opt": options.opt, "seconds": seconds, **timings_record(timings)}
        if options.built_in:
            row = built_in.row
            print(f"fastai's own to_channelslast(): {row.error or f'{row.ms:.2f} ms (IQR {row.iqr:.2f})'}")
            record["built_in"] = row_record(row)
        if options.verify:
            record["verified"] = measure_again(learn, timings, options.budget)
        return record

    n_failed = for_each_arch(options, run_one, device)
    if options.plot is not None and found:
        plots = {f"{arch} on {timings.device}": timings for arch, timings in found.items()}
        save_plots(options.plot, plots, heights=[1.2 + 0.35 * len(timings) for timings in found.values()])
    if n_failed:
        raise SystemExit(1)


def choose_optimizer(
    name: str,
) -> Callable:
    if name not in OPTIMIZERS:
        raise IllegalValue("opt", name, f"pass one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def to_formats(
    names: str | None,  # as a TrainFormat prints, with commas in between
) -> list[TrainFormat] | None:
    "Return the formats of these names, None for None; raises `IllegalValue` for a name of none."
    if names is None:
        return None
    try:
        return [to_train_format(name.strip()) for name in names.split(",")]
    except ValueError as error:
        raise IllegalValue("formats", repr(names), str(error).removeprefix("fmt=")) from None


def measure_again(
    learn: Learner,
    timings: FormatTimings,
    budget: float | None,
) -> dict[str, Any]:
    "Measure all that can train again, without what is known from the search; return the record."
    best = timings.best
    formats = [row.format for row in timings if not row.error]
    again = find_format(learn, [fixed_stage("again", formats)], budget=budget, start=best)
    fastest = min((row for row in again if not row.error), key=lambda row: row.ms)
    best_ms = again.row(best).ms
    contiguous = again.row(replace(best, channels_last=False))
    print(f"Again: {best} {best_ms:.2f} ms; the fastest, {fastest.format}, {fastest.ms:.2f} ms")
    return {
        "best_vs_fastest": round(best_ms / fastest.ms, 4),
        "best_vs_contiguous": round(best_ms / contiguous.ms, 4) if contiguous and not contiguous.error else None,
        "rounds": max(len(row.samples) for row in again),
        "steps_a_round": again.n_steps,
        "rows": [row_record(row) for row in again],
    }
