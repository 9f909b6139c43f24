"""Draw what `learn.to_fastest()` gained over fastai's own `to_channelslast`, from a record of fastest.py.

python nbs/benchmarks/fastest_picture.py nbs/benchmarks/h200_fastest.json nbs/images/fastest.png
"""

import argparse
import json
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

OWN, FASTEST = "#b8b8b8", "#2b8a57"
HEIGHT = 0.38  # of a bar; the two of an architecture touch


def draw(record: dict) -> Figure:
    "Draw two bars for each architecture, each with its images a second in it or beside it."
    results = [result for result in record["results"] if result.get("times_fastais_own")]
    fig, ax = plt.subplots(figsize=(9, 0.8 + 0.75 * len(results)), layout="constrained")
    for y, result in enumerate(results):
        pick = next(row for row in result["again"] if row["format"] == result["pick"])
        times = result["times_fastais_own"]
        is_first = y == 0
        ax.barh(y - HEIGHT / 2, 1, HEIGHT, color=OWN)
        own = f"{1000 * result['bs'] / result['fastais_own']['ms']:,.0f} images/s"
        ax.text(1.05, y - HEIGHT / 2, own + " with fastai's own to_channelslast()" * is_first, va="center")
        ax.barh(y + HEIGHT / 2, times, HEIGHT, color=FASTEST)
        fastest = f"{times:.1f} times, {1000 * result['bs'] / pick['ms']:,.0f} images/s"
        ax.text(times + 0.05, y + HEIGHT / 2, fastest + "\nafter learn.to_fastest()" * is_first, va="center")
    ax.set_yticks(range(len(results)), [f"{result['arch']}\n{result['bs']} images" for result in results])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.35 * max(result["times_fastais_own"] for result in results))
    ax.set_xticks([])
    ax.tick_params(left=False)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    torch_version = record["versions"]["torch"].partition("+")[0]
    setting = f"fastai's default Adam, PyTorch {torch_version}, not compiled"
    ax.set_title(f"Training speed on an {record['device']}, {setting}")
    return fig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("record", type=Path, help="what fastest.py wrote")
    parser.add_argument("picture", type=Path, help="the file to write")
    args = parser.parse_args()
    draw(json.loads(args.record.read_text())).savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()
