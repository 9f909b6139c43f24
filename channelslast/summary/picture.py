"The picture of a FormatSummary: its layers in the order of execution, coloured by format."

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from channelslast.summary.records import LayerFormat

__all__ = ["PICTURE_SIZE", "plot_layers"]

PICTURE_SIZE = (12, 3)  # inches
_GREY, _ORANGE, _GREEN = (0.92, 0.92, 0.92), (0.93, 0.58, 0.22), (0.16, 0.58, 0.53)


def plot_layers(
    layers: list[LayerFormat],  # in the order of execution
    ax: Axes | None = None,  # where to draw, a new figure if None
) -> Axes:
    "Draw a bar for each layer, its activations above its gradients; triangles mark where it loses the format."
    n = len(layers)
    if ax is None:
        _, ax = plt.subplots(figsize=PICTURE_SIZE, layout="constrained")
    line_width = min(0.5, 40 / (n or 1))
    for bottom, phase in ((1, "forward"), (0, "backward")):
        colors = [_color(layer.share(phase)) for layer in layers]
        ax.bar(range(n), 0.8, width=1, bottom=bottom, color=colors, edgecolor="white", linewidth=line_width)
    losers = [(i, layer) for i, layer in enumerate(layers) if layer.loses_in]
    for i, layer in losers:
        if "forward" in layer.loses_in:
            ax.plot(i, 1.9, marker="v", color="crimson")
        if "backward" in layer.loses_in:
            ax.plot(i, -0.1, marker="^", color="crimson")
    for i, layer in losers[:12]:
        ax.annotate(layer.module, (i, 2.05), rotation=45, fontsize=8, ha="left", va="bottom")
    ax.set(xlim=(-0.6, max(n, 1) - 0.4), ylim=(-0.25, 2.05))
    ax.set_yticks((0.4, 1.4), labels=("← backward", "forward →"))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("layers in the order of execution")
    ax.spines[["top", "right", "left"]].set_visible(False)
    legend = [
        Patch(color=_color(1.0), label="channels last"),
        Patch(color=_color(0.0), label="contiguous"),
        Patch(color=_color(None), label="nothing of 4D or 5D"),
        *ax.plot([], [], "v", color="crimson", label="loses channels last"),
    ]
    ax.legend(handles=legend, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False)
    return ax


def _color(share: float | None) -> tuple[float, ...]:
    "From orange (contiguous) to green (channels last); grey for None."
    if share is None:
        return _GREY
    return tuple(a + (b - a) * share for a, b in zip(_ORANGE, _GREEN, strict=True))
