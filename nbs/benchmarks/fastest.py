"""What `to_fastest` picks, how long it takes, and how it trains beside fastai's own `to_channelslast` and all it tried.

    python nbs/benchmarks/fastest.py --out fastest.json
    python nbs/benchmarks/fastest.py --archs resnet50 mobilenetv3_large_100 --bs 128 --opt fused --compile --out c.json
    python nbs/benchmarks/fastest.py --device cpu --archs xresnet18 --bs 16 --size 128 --amp-mode bf16 --out cpu.json

Each architecture is searched once, as a user would, with PyTorch's caches of compiled code cold. Then the pick, every
candidate that was not far slower and fastai's own are timed again, in rounds of all of them. What fits not in
`--seconds` is left out; the same command with the same `--out` goes on with it. (What is gained without compiling:
atlas.py with `--opt fused --bs 128`.)
"""

import argparse
import gc
import json
import shlex
import statistics
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback

from channelslast.cli.record import made_with, row_record, timings_record
from channelslast.find.run import find_format
from channelslast.find.stages import fixed_stage
from channelslast.fit import FitDone
from channelslast.zoo import OPTIMIZERS, compile_caches, fastais_own, new_learner

ARCHS = {"resnet18": 32, "resnet34": 64, "resnet50": 64, "convnext_tiny": 32, "efficientnet_b0": 32, "DynamicUnet": 8}
CLOSE = 1.5  # times the step of the pick: what was slower in the search is not the fastest


class TwoSteps(Callback):
    "End the fit after two steps."

    order = float("inf")

    def after_batch(self):
        if self.iter == 1:
            raise FitDone


def measure(arch: str, args: argparse.Namespace, device: torch.device) -> dict:
    bs = args.bs or ARCHS[arch]
    learn = new_learner(arch, bs, args.size, device, OPTIMIZERS[args.opt])
    learn.remove_cb(ProgressCallback)
    learn.model.to(device)
    started = time.perf_counter()
    timings = learn.format_find(compile=args.compile, show_plot=False)
    seconds = time.perf_counter() - started
    rows = sorted((row for row in timings if not row.error), key=lambda row: row.ms)  # the fastest cut the others short
    close = [row.format for row in rows if row.ms <= CLOSE * timings.best_row.ms]
    formats = list(dict.fromkeys([*close, timings.best, timings.start]))
    own = fastais_own(args.amp_mode)
    again = find_format(learn, [fixed_stage("again", formats)], [own], args.again)
    best = again.row(timings.best)
    fastest = min((row for row in again if not row.error), key=lambda row: row.ms)
    started = time.perf_counter()
    learn.to_format(timings.best)
    with suppress(FitDone):
        learn.fit(1, 0, cbs=TwoSteps())
    record = {"arch": arch, "bs": bs, "seconds": round(seconds, 1), "pick": str(timings.best)}
    record["ready_s"] = round(time.perf_counter() - started, 1)
    is_compared = own.row.samples and not own.row.error
    record["times_fastais_own"] = round(own.row.ms / best.ms, 3) if is_compared else None
    record["pick_vs_fastest"] = round(fastest.ms / best.ms, 3)
    record["fastest"] = str(fastest.format)
    print(*(f"{key} {value}" for key, value in record.items()), flush=True)
    record["fastais_own"] = row_record(own.row)
    record["again"] = [row_record(row) for row in again]
    record["search"] = timings_record(timings)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--archs", nargs="+", default=list(ARCHS), help="names; default: the six of typical use")
    parser.add_argument("--bs", type=int, help="images in a batch; default: that of typical use")
    parser.add_argument("--size", type=int, default=224, help="pixels square")
    parser.add_argument("--opt", default="adam", choices=list(OPTIMIZERS), help="adam (fastai's) or fused (AdamW)")
    parser.add_argument("--amp-mode", default="fp16", help="of fastai's own: fp16 or bf16")
    parser.add_argument("--compile", action="store_true", help="search with compile=True")
    parser.add_argument("--again", type=float, default=12.0, help="seconds of timing again")
    parser.add_argument("--seconds", type=float, default=540.0, help="begin none after these")
    parser.add_argument("--out", type=Path, required=True, help="write the record to this file, or go on with it")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device(args.device)
    command = shlex.join(["python", "nbs/benchmarks/fastest.py", *sys.argv[1:]])
    results = json.loads(args.out.read_text())["results"] if args.out.exists() else []
    started = time.perf_counter()
    for arch in args.archs:
        if any(result["arch"] == arch for result in results) or time.perf_counter() - started > args.seconds:
            continue
        try:
            with compile_caches():
                result = measure(arch, args, device)
        except Exception as error:
            print(arch, repr(error)[:300], flush=True)
            result = {"arch": arch, "error": repr(error)[:300]}
        made = made_with(command, device)
        results.append(result | {"made_with": made})  # a file may hold results of several runs
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        record = {**made, "results": results}
        if times := [result["times_fastais_own"] for result in results if result.get("times_fastais_own")]:
            record["geometric_mean_times_fastais_own"] = round(statistics.geometric_mean(times), 3)
            print("geometric mean", record["geometric_mean_times_fastais_own"], flush=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
