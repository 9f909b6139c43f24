"""Draw what atlas.py measured: fastai's own, ours without compiling and, where that was measured too, ours compiled.

    python nbs/benchmarks/atlas_picture.py nbs/images/atlas.png EAGER.csv --compiled COMPILED.csv

Each bar is times fastai's own `to_channelslast` of its own run, and carries its figure.
"""

import argparse
import csv
import statistics
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

COLORS = {"to_fastest()": "#2b8a57", "to_fastest(compile=True)": "#1f5fa8"}
PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # words, over the line too


def read(file: Path | None) -> dict[str, dict[str, str]]:
    "Return the rows that have a gain, by architecture."
    if file is None:
        return {}
    with file.open(newline="") as stream:
        return {row["model"]: row for row in csv.DictReader(stream) if row["times_fastais_own"]}


def draw(eager: dict[str, dict[str, str]], compiled: dict[str, dict[str, str]]) -> Figure:
    "Draw a bar or two for each architecture, the largest gain first, beside a line for fastai's own."
    gains = {arch: float(row["times_fastais_own"]) for arch, row in eager.items()}
    names = sorted(gains, key=gains.get, reverse=True)
    fig, ax = plt.subplots(figsize=(9, 1.2 + 0.3 * len(names)), layout="constrained")
    unnamed = dict(COLORS)
    for y, arch in enumerate(names):
        times = [gains[arch], *[float(row["times_fastais_own"]) for row in [compiled.get(arch)] if row]]
        height = 0.84 / len(times)
        for place, (value, (label, color)) in enumerate(zip(times, COLORS.items())):
            at = y - 0.42 + (place + 0.5) * height
            ax.barh(at, value, height, color=color)
            words = f"{value:.2f}  {label}" if unnamed.pop(label, None) else f"{value:.2f}"
            ax.text(value + 0.03, at, words, va="center", fontsize=7, bbox=PLAIN)
    ax.axvline(1, color="black", linewidth=1)
    ax.text(1.03, -0.8, "1  fastai's own to_channelslast()", va="center", fontsize=8)
    ax.set_yticks(range(len(names)), [f"{arch}, {eager[arch]['batch_size']}" for arch in names], fontsize=8)
    ax.set_ylim(len(names) - 0.4, -1.3)
    ax.margins(x=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("times as fast as fastai's own")
    first = eager[names[0]]
    mean = statistics.geometric_mean(gains.values())
    version = first["torch"].partition("+")[0]
    ax.set_title(
        f"Training steps, {first['device']}, PyTorch {version}: {mean:.1f} times as fast without compiling\n"
        f"(geometric mean of {len(names)} architectures; beside each name the images in a batch)",
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
