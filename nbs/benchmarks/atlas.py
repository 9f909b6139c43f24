"""What `to_fastest` gains over fastai's own `to_channelslast`, for many architectures: a row of a CSV for each.

    python nbs/benchmarks/atlas.py --budget 540
    python nbs/benchmarks/atlas.py --budget 540 --compile
    python nbs/benchmarks/atlas.py --budget 540 --bs 128 --opt fused --archs resnet50 efficientnet_b0
    python nbs/benchmarks/atlas.py --budget 900 --device cpu --bs 8 --size 64

Each architecture is searched once, as a user would, with fastai's default Adam (`--opt fused`: PyTorch's fused AdamW);
fastai's own is timed in the same rounds. The file is named for the device and the setting, in `--folder`. The same
command goes on where it ended. What fails becomes a row with the reason; what ends the process is told by the next run,
from a file that names what ran.
With several GPUs, run as many processes, each with one of them in CUDA_VISIBLE_DEVICES, with `--part 1/2` and
`--part 2/2`: they append to the same file. Of several rows of an architecture and a batch size the last one counts.
With `--caches` a run finds what an earlier one has compiled, maybe several processes at once into another `--folder`:
`search_s` is without the compiler's time then, a search that finds it quickly also compiles the other precision, and
the row's command says so.
"""

import argparse
import csv
import gc
import json
import os
import re
import shlex
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from math import isnan
from pathlib import Path
from typing import Any

import torch
from fastai.callback.core import Callback, CancelValidException
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner

from channelslast import TrainFormat
from channelslast.cli.record import made_with
from channelslast.devices import device_name
from channelslast.find.errors import in_one_line
from channelslast.find.result import FormatTimings
from channelslast.find.run import find_format
from channelslast.find.stages import new_stages
from channelslast.zoo import OPTIMIZERS, arch_names, choose_amp_mode, compile_caches, fastais_own, new_learner
from channelslast.zoo.architectures import torchvision_kind

# By the images in a batch of typical use
ARCHS = {
    8: """DynamicUnet fcn_resnet50 deeplabv3_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large r3d_18
        mc3_18 r2plus1d_18 s3d mvit_v2_s""",
    64: """xresnet18 xresnet34 xresnet50 xse_resnet50 resnet18 resnet34 resnet50 resnet26t resnet50d seresnet50
        resnext50_32x4d squeezenet1_1 mobilenet_v2 mobilenet_v3_large shufflenet_v2_x1_0 mnasnet1_0 googlenet
        mobilenetv3_large_100 mobilenetv4_conv_small ghostnet_100 repvgg_b0 vit_small_patch16_224
        deit_tiny_patch16_224 fastvit_t8 edgenext_small""",
    32: """xresnext50 efficientnet_b0 convnext_tiny resnet101 wide_resnet50_2 densenet121 vgg16_bn inception_v3
        efficientnet_v2_s regnet_y_3_2gf vit_b_16 swin_t maxvit_t resnetv2_50 resnetv2_50x1_bit ecaresnet50t
        res2net50_26w_4s resnest50d dla60 hrnet_w18 cspresnet50 cspdarknet53 dpn68 mixnet_s mobilenetv4_hybrid_medium
        tf_efficientnetv2_b0 efficientnet_lite0 efficientvit_b1 efficientformerv2_s0 mobileone_s1 convnextv2_tiny
        convmixer_768_32 poolformer_s12 nf_resnet50 regnety_032 gcresnet33ts botnet26t_256 coatnet_0_rw_224
        coat_lite_mini mobilevit_s swin_tiny_patch4_window7_224 mixer_b16_224 xcit_tiny_12_p16_224
        inception_next_tiny hgnetv2_b0 rexnet_100 visformer_small pvt_v2_b1""",
}
SIZES = {"s3d": 224, "mvit_v2_s": 224}  # pixels of those that reject what is common for their kind
TYPICAL_BS = {arch: bs for bs, names in ARCHS.items() for arch in names.split()}

COMPILED = """xresnet18 xresnet50 resnet18 resnet34 resnet50 mobilenetv3_large_100 mobilenet_v2 ghostnet_100
    vit_small_patch16_224 efficientnet_b0 convnext_tiny vgg16_bn densenet121 regnety_032 swin_t nf_resnet50
    coatnet_0_rw_224 resnetv2_50 poolformer_s12 r3d_18"""

COLUMNS = """model library task batch_size img_size pick ms iqr items_per_s peak_gb reserved_gb gpu_busy
    layout_share fastais_own_ms fastais_own_iqr fastais_own_items_per_s fastais_own_peak_gb times_fastais_own
    contiguous_fp32_ms search_s error device torch cuda cudnn fastai python date command"""


def file_name(args: argparse.Namespace, device: torch.device) -> str:
    "Return the name of the CSV, in the parts of timm's results: mode, precision, layout, PyTorch, CUDA, GPU."
    version = "pt" + "".join(torch.__version__.partition("+")[0].split(".")[:2])
    parts = ["benchmark", "train", args.amp_mode, "nhwc", version]
    if device.type == "cuda":
        parts.append("cu" + str(torch.version.cuda).replace(".", ""))
    parts.append(re.sub(r"\W+", "_", device_name(device).lower()).strip("_"))
    parts += ["fused_adamw"] * (args.opt == "fused") + ["compile"] * args.compile
    parts += [f"b{args.bs}"] * bool(args.bs) + [f"{args.size}px"] * bool(args.size)
    return "-".join(parts) + ".csv"


def library_of(arch: str) -> str:
    return next((library for library, names in arch_names().items() if arch in names), "")


def task_of(arch: str) -> str:
    if arch == "DynamicUnet":
        return "segmentation"
    kind = torchvision_kind(arch)
    return kind if kind in ("segmentation", "video") else "classification"


def rounded(value: float | None, digits: int = 4) -> float | str:
    return "" if value is None or isnan(value) else round(value, digits)


def in_gb(n_bytes: int | None) -> float | None:
    return None if n_bytes is None else n_bytes / 1e9


def layout_share(learn: Learner, device: torch.device) -> float | None:
    "The share of the GPU's busy time in layout kernels, without compilation and graphs, where it can be told."
    if device.type != "cuda":
        return None
    fmt = learn.train_format
    learn.to_format(TrainFormat(fmt.channels_last, fmt.amp_mode))
    shares = learn.format_summary().gpu
    return None if shares is None else shares.layout


class TrainingAlone(Callback):
    "Leave out the validation."

    def before_validate(self):
        raise CancelValidException


def reserved_bytes(learn: Learner, device: torch.device) -> int | None:
    "Train the few batches there are, and return the most memory that PyTorch held of the GPU, CUDA graphs and all."
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    with learn.no_logging():
        learn.fit(1, 0, cbs=TrainingAlone())
    return torch.cuda.max_memory_reserved(device)


def lacked_time(reason: str | None) -> bool:
    return bool(re.search("no time|not reached|the time was up", reason or ""))


def why_not(timings: FormatTimings) -> list[str]:
    "Return why no format of a kind could be picked: what stopped the first one."
    kinds = {
        "half precision": lambda fmt: fmt.amp_mode and not fmt.cuda_graph and not fmt.compile,
        "fused steps": lambda fmt: fmt.fused_optimizer and not fmt.cuda_graph and not fmt.compile,
        "CUDA graph": lambda fmt: fmt.cuda_graph,
        "compiled": lambda fmt: fmt.compile is not None,
    }
    found = []
    for kind, is_of_kind in kinds.items():
        rows = [row for row in timings if is_of_kind(row.format)]
        reasons = [row.error or (row.note if lacked_time(row.note) else None) for row in rows]
        if reasons and all(reasons):
            reason = reasons[0]
            found.append(reason if reason.startswith(f"no {kind}: ") else f"{kind}: {reason}")
    return found


def measure(arch: str, bs: int, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    "Return the columns that are measured."
    learn = new_learner(arch, bs, args.size or SIZES.get(arch), device, OPTIMIZERS[args.opt])
    learn.remove_cb(ProgressCallback)
    own = fastais_own(args.amp_mode)
    started = time.perf_counter()
    timings = find_format(learn, new_stages(learn, None, args.compile), [own], args.each)
    seconds = time.perf_counter() - started
    best, own = timings.row(timings.best), own.row
    is_compared = bool(own.samples) and not own.error and not own.note
    notes = [] if is_compared else [f"fastai's own: {own.error or own.note or 'not timed'}"]
    notes += why_not(timings)
    found = {
        "img_size": timings.shapes[0][-1],
        "pick": str(timings.best),
        "ms": rounded(best.ms, 3),
        "iqr": rounded(best.iqr, 3),
        "items_per_s": rounded(best.items_per_s, 1),
        "peak_gb": rounded(in_gb(best.peak_bytes), 3),
        "gpu_busy": rounded(timings.busy, 3),
        "fastais_own_ms": rounded(own.ms, 3),
        "fastais_own_iqr": rounded(own.iqr, 3),
        "fastais_own_items_per_s": rounded(own.items_per_s, 1),
        "fastais_own_peak_gb": rounded(in_gb(own.peak_bytes), 3),
        "times_fastais_own": rounded(own.ms / best.ms, 3) if is_compared else "",
        "contiguous_fp32_ms": rounded(timings.row(timings.start).ms, 3),
        "search_s": rounded(seconds, 1),
    }
    learn.to_format(timings.best)
    for name, look in {
        "reserved_gb": lambda: in_gb(reserved_bytes(learn, device)),
        "layout_share": lambda: layout_share(learn, device),
    }.items():
        try:
            found[name] = rounded(look(), 3)
        except Exception as error:
            notes.append(f"{name}: {in_one_line(error)}")
    return found | {"error": "; ".join(notes)}


def begin(file: Path) -> None:
    "Write the header, where no process has; whole, for several begin at once."
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        new = Path(folder) / file.name
        new.write_text(",".join(COLUMNS.split()) + "\n")
        with suppress(FileExistsError):
            os.link(new, file)


def append(file: Path, row: dict[str, Any]) -> None:
    if not file.exists():
        begin(file)
    with file.open("a", newline="") as stream:
        csv.DictWriter(stream, COLUMNS.split(), lineterminator="\n").writerow(row)


def rows_of(file: Path) -> dict[tuple[str, str], dict[str, str]]:
    "Return the last row of each architecture and batch size."
    if not file.exists():
        return {}
    with file.open(newline="") as stream:
        return {(row["model"], row["batch_size"]): row for row in csv.DictReader(stream)}


def has_failed(row: dict[str, str]) -> bool:
    "Whether `row` has no figures, or says that its search lacked time."
    return not row["ms"] or lacked_time(row["error"])


def facts_of(arch: str, bs: int, command: str, device: torch.device) -> dict[str, Any]:
    "Return the columns that are known without measuring."
    made = made_with(command, device)
    return {
        "model": arch,
        "library": library_of(arch),
        "task": task_of(arch),
        "batch_size": bs,
        "device": made["device"],
        **made["versions"],
        "cuda": torch.version.cuda if device.type == "cuda" else "",
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else "",
        "date": made["date"],
        "command": command,
        "error": "",
    }


def part_of(text: str) -> tuple[int, int]:
    "Return the numbers of an option as '1/2'."
    part, n_parts = map(int, text.split("/"))
    if not 1 <= part <= n_parts:
        raise ValueError(text)
    return part, n_parts


def run(args: argparse.Namespace, device: torch.device, command: str) -> Path:
    "Measure what is not in the file yet, until the time is up; return the file."
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / file_name(args, device)
    part, n_parts = args.part
    running = file.with_suffix(f".{part}.running")
    if running.exists():
        append(file, {**json.loads(running.read_text()), "error": "the process ended while it was measured"})
        running.unlink()
    started = time.perf_counter()
    archs = list(args.archs or (COMPILED.split() if args.compile else TYPICAL_BS))
    for arch in archs[part - 1 :: n_parts]:
        bs = args.bs or TYPICAL_BS.get(arch, 32)
        known = rows_of(file).get((arch, str(bs)))
        if known and not (args.retry and has_failed(known)):
            continue
        if time.perf_counter() - started > args.budget:
            print("The time is up: the same command goes on.")
            break
        row = facts_of(arch, bs, command, device)
        running.write_text(json.dumps(row))
        try:
            with compile_caches(args.caches):
                row |= measure(arch, bs, args, device)
        except Exception as error:
            row["error"] = in_one_line(error)
        append(file, row)
        running.unlink()
        print(f"{arch}: {row.get('pick', '')} {row.get('times_fastais_own', '')} {row['error']}".rstrip(), flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # ends the run where an error has left the GPU unusable
            torch.cuda.empty_cache()
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--archs", nargs="+", help="names; default: all, with --compile the twenty of COMPILED")
    parser.add_argument("--bs", type=int, help="images in a batch; default: that of typical use, 8 to 64")
    parser.add_argument("--size", type=int, help="pixels square; default: that of the architecture")
    parser.add_argument("--opt", default="adam", choices=list(OPTIMIZERS), help="adam (fastai's) or fused (AdamW)")
    parser.add_argument("--compile", action="store_true", help="search with compile=True")
    parser.add_argument("--amp-mode", help="of fastai's own: fp16, bf16; default: what the device is fastest at")
    parser.add_argument("--part", type=part_of, default=(1, 1), help="1/2: every second one, from the first on")
    parser.add_argument("--each", type=float, help="seconds of a search; default: that of `to_fastest`")
    parser.add_argument("--caches", type=Path, help="keep what is compiled here; default: nowhere, each compiles anew")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which no search begins")
    parser.add_argument("--retry", action="store_true", help="measure again what has failed or lacked time")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "atlas", help="where the CSVs lie")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device(args.device)
    args.amp_mode = args.amp_mode or choose_amp_mode("auto", device) or "fp16"
    command = shlex.join(["python", "nbs/benchmarks/atlas.py", *sys.argv[1:]])
    print(run(args, device, command))


if __name__ == "__main__":
    main()
