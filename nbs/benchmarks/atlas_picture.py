"""Draw what atlas.py measured: fastai's own, ours without compiling and, where that was measured too, ours compiled.

    python nbs/benchmarks/atlas_picture.py nbs/images/atlas.png EAGER.csv --compiled COMPILED.csv

Each bar is times fastai's own `to_channelslast`, and carries its figure. Both bars of an architecture are
against fastai's own of the run without compiling, for that differs from run to run.
"""

import argparse
import csv
import statistics
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

COLORS = {"to_fastest()": "#2b8a57", "to_fastest(compile=True)": "#1f5fa8"}
Rows = dict[str, dict[str, str]]  # the columns of a row, by its architecture
PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # words, over the line too


def read(file: Path | None) -> Rows:
    "Return the rows that have a gain, by architecture; the last one of each."
    if file is None:
        return {}
    with file.open(newline="") as stream:
        rows = {row["model"]: row for row in csv.DictReader(stream)}
    return {arch: row for arch, row in rows.items() if row["times_fastais_own"]}


def times_of(row: dict[str, str], own: dict[str, str]) -> float:
    "Return how many times as fast the pick of `row` trains as fastai's own of `own`."
    return float(own["fastais_own_ms"]) / float(row["ms"])


def bars_of(arch: str, eager: Rows, compiled: Rows) -> list[tuple[float, str]]:
    "Return the length of each bar, and what it shows."
    rows = [(file[arch], label) for file, label in zip((eager, compiled), COLORS) if arch in file]
    return [(times_of(row, eager[arch]), label) for row, label in rows]


def draw(eager: Rows, compiled: Rows) -> Figure:
    "Draw a bar or two for each architecture, the largest gain first, beside a line for fastai's own."
    names = sorted(eager, key=lambda arch: times_of(eager[arch], eager[arch]), reverse=True)
    fig, ax = plt.subplots(figsize=(9, 1.2 + 0.3 * len(names)), layout="constrained")
    unnamed = set(COLORS)
    for y, arch in enumerate(names):
        bars = bars_of(arch, eager, compiled)
        height = 0.84 / len(bars)
        for place, (value, label) in enumerate(bars):
            at = y - 0.42 + (place + 0.5) * height
            ax.barh(at, value, height, color=COLORS[label])
            words = f"{value:.2f}  {label}" if label in unnamed else f"{value:.2f}"
            unnamed.discard(label)
            ax.text(value + 0.03, at, words, va="center", fontsize=7, bbox=PLAIN)
    ax.axvline(1, color="black", linewidth=1)
    ax.text(1.03, -0.8, "1  fastai's own to_channelslast()", va="center", fontsize=8)
    ax.set_yticks(range(len(names)), [f"{arch}, {eager[arch]['batch_size']}" for arch in names], fontsize=8)
    ax.set_ylim(len(names) - 0.4, -1.3)
    ax.margins(x=0.22)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("times as fast as fastai's own")
    first = eager[names[0]]
    mean = statistics.geometric_mean(times_of(row, row) for row in eager.values())
    version = first["torch"].partition("+")[0]
    ax.set_title(
        f"Training steps, {first['device']}, PyTorch {version}: {mean:.1f} times as fast without compiling\n"
        f"(geometric mean of {len(eager)} architectures; beside each name the images in a batch;\n"
        "two bars: both against fastai's own in the run without compiling)",
        loc="left",
        fontsize=11,
    )
    return fig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("picture", type=Path, help="the file to write")
    parser.add_argument("eager", type=Path, help="a CSV of atlas.py")
    parser.add_argument("--compiled", type=Path, help="one of atlas.py --compile, on the same device")
    args = parser.parse_args()
    draw(read(args.eager), read(args.compiled)).savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()
