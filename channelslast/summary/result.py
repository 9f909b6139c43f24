"FormatSummary: the verdict, the table, the hints and the picture of what one training step did to the memory format."

import html
import re
import textwrap
from collections import Counter
from dataclasses import dataclass, fields

import pandas as pd
import torch
from matplotlib.axes import Axes

from channelslast.notebook import image_html
from channelslast.summary.gpu import GpuShares
from channelslast.summary.hints import UNCONVERTED, average_hint, hints_for
from channelslast.summary.picture import PICTURE_SIZE, plot_layers
from channelslast.summary.records import FormatEvent, LayerFormat

__all__ = ["FormatSummary", "dtype_name", "quoted"]

_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
_KINDS = {
    "lost": "an operator took channels last and returned contiguous",
    "converted": "a copy changed the format",
    "hidden": "a convolution re-lays an operand inside",
    "mixed": "operands of both formats",
}
_N_ROWS = 40  # of the table that is printed
_N_NAMES = 5  # of layers in the verdict


@dataclass
class FormatSummary:
    """What one training step does to the memory format; made by `format_summary`.

    Printing it gives a table, `to_frame` a pandas DataFrame, `plot` a picture.
    """

    events: list[FormatEvent]  # where the format was lost or changed, in the order of execution
    layers: list[LayerFormat]  # the modules that wrote images, in the order of execution
    channels_last_share: float  # by bytes, of 4D and 5D activations and gradients; nan where there were none
    # Half precision convolutions that cuDNN pads, {name: channels in and out}. An input channel number of the model's
    # own images counts as no cause: nobody chooses the 3 of RGB
    padded_convs: dict[str, tuple[int, int]]
    dense_gradients: list[str]  # modules that write an expanded gradient out, in contiguous format
    gpu: GpuShares | None  # None without `profile`
    error: str | None  # what stopped the step: `.view` on channels last activations
    model: str  # class of the model
    device: str
    dtype: str  # 'fp32', or that of autocast
    shapes: list[tuple[int, ...]]  # of the model's inputs, but for nested tensors, which have none
    unconverted: str | None  # 'inputs' or 'weights' where these alone are contiguous
    # Classes of the modules that computed in a form that keeps channels last, and how many there are of each
    swapped: dict[str, int]

    @property
    def losers(self) -> list[LayerFormat]:
        "The layers that take channels last and hand contiguous on, the heaviest first."
        moved = self._nbytes_by_module()
        return sorted((layer for layer in self.layers if layer.loses_in), key=lambda layer: -moved[layer.module])

    def _nbytes_by_module(self) -> Counter[str]:
        moved = Counter()
        for event in self.events:
            moved[event.module] += event.nbytes
        return moved

    # In words

    @property
    def verdict(self) -> str:
        "One sentence to act on."
        if self.error:
            return self.error
        share, losers = self.channels_last_share, self.losers
        if not self.layers:
            return "No 4D or 5D activations: the memory format changes nothing about this model."
        if share == 0 and not losers:
            return (
                "Contiguous throughout: no activation or gradient is channels last. `learn.to_channelslast()` converts "
                "a Learner, `module_to_memory_format(model)` and `to_memory_format(images)` a model and its images."
            )
        words = f"{_percent(share)} of activations and gradients {'stay' if share > 0.5 else 'are'} channels last; "
        if not losers:
            return words + f"{self._all_keep_it()}.{self._most_contiguous()}{self._heaviest_relaid()}"
        named = [f"{quoted(layer.module)} {layer.cls} ({', '.join(layer.loses_in)})" for layer in losers[:_N_NAMES]]
        if len(losers) > _N_NAMES:
            named.append(f"and {len(losers) - _N_NAMES} more")
        verb = "loses" if len(losers) == 1 else "lose"
        return words + f"{len(losers)} of {len(self.layers)} layers with images {verb} it: {', '.join(named)}."

    def _all_keep_it(self) -> str:
        n = len(self.layers)
        return f"none of {n} layers with images loses it" if n > 1 else "the one layer with images keeps it"

    def _most_contiguous(self) -> str:
        "The layer that writes most of what is contiguous, though it hands channels last on."
        worst = max(self.layers, key=lambda layer: layer.contiguous_nbytes)
        if self.channels_last_share > 0.9 or not worst.contiguous_nbytes:
            return ""
        return f" Most of the rest is contiguous inside {quoted(worst.module)} {worst.cls}."

    def _heaviest_relaid(self) -> str:
        hidden = [event for event in self.events if event.kind == "hidden"]
        if not hidden:
            return ""
        worst = max(hidden, key=lambda event: event.nbytes)
        modules = len({event.module for event in hidden})
        which = "1 convolution gets" if modules == 1 else f"{modules} convolutions get"
        return (
            f" {which} an input, weight or gradient in the other format, to be converted on every call; the heaviest, "
            f"of {worst.nbytes / 1e6:.2g} MB, in the {worst.phase} pass of {quoted(worst.module)}."
        )

    @property
    def hints(self) -> list[str]:
        "What to use in place of the operators that lose the format, where there is something."
        found = [UNCONVERTED[self.unconverted]] if self.unconverted else []
        lossy = {(layer.module, phase) for layer in self.layers for phase in layer.loses_in}
        found += hints_for([event for event in self.events if (event.module, event.phase) in lossy], self.device)
        if self.dense_gradients and self.events:
            found.append(average_hint([quoted(name) for name in self.dense_gradients]))
        return found

    def _notes(self) -> list[str]:
        notes = [f"Hint: {hint}." for hint in self.hints]
        if self.swapped:
            named = ", ".join(f"{count} {cls}" for cls, count in self.swapped.items())
            notes.insert(0, f"Computed in another form with the same values, see `keep_channels_last`: {named}.")
        if self.padded_convs and self.device.startswith("cuda"):  # cuDNN's
            named = [f"{quoted(name)} ({c_in} to {c_out})" for name, (c_in, c_out) in self.padded_convs.items()]
            more = f", and {len(named) - 8} more" if len(named) > 8 else ""
            notes.append(
                "Channels not a multiple of 8, which cuDNN pads on every call in half precision: "
                f"{', '.join(named[:8])}{more}."
            )
        if self.gpu:
            waits = ", which waits for Python: that hides what the format gains" if self.gpu.busy < 0.9 else ""
            notes.append(
                f"GPU: {_percent(self.gpu.layout)} of its time in layout kernels; "
                f"busy {_percent(self.gpu.busy)} of the step{waits}."
            )
        return notes

    # As a table

    def to_frame(self) -> pd.DataFrame:
        "The events as a pandas DataFrame, a row each, in the order of execution."
        return pd.DataFrame([vars(event) for event in self.events], columns=[each.name for each in fields(FormatEvent)])

    def __str__(self) -> str:
        lines = [self._header()]
        if self.events:
            lines += ["", _to_text(self._table()), "", *map(_fill, self._legend())]
        return "\n".join([*lines, "", *map(_fill, (self.verdict, *self._notes()))])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        parts = [_paragraph(self._header())]
        if self.events:
            with pd.option_context("display.max_colwidth", None):
                parts.append(self._table().to_html(index=False, border=0))
            parts += map(_paragraph, self._legend())
        parts += map(_paragraph, (self.verdict, *self._notes()))
        if self.layers:
            parts.append(image_html(self.plot, PICTURE_SIZE))
        return "\n".join(parts)

    def _header(self) -> str:
        shapes = ", ".join(_shape(shape) for shape in self.shapes)
        return f"{self.model} (input shape: {shapes}), {self.dtype} on {self.device}"

    def _table(self) -> pd.DataFrame:
        "The heaviest rows as a reader is to see them, those of a module together."
        rows, module = [], None
        for event in self._heaviest_first()[:_N_ROWS]:
            rows.append(
                {
                    "Layer (type)": f"{event.module or '(model)'} {event.cls}" if event.module != module else "",
                    "Phase": event.phase,
                    "Operator": event.op.removeprefix("aten."),
                    "Kind": event.kind,
                    "Shape": f"{_shape(event.shape)} {dtype_name(event.dtype)}",
                    "n": event.count,
                    "MB": f"{event.nbytes / 1e6:.2f}",
                }
            )
            module = event.module
        return pd.DataFrame(rows)

    def _heaviest_first(self) -> list[FormatEvent]:
        "The events by module, the heaviest module first, and of each the heaviest event first."
        moved = self._nbytes_by_module()
        modules = list(dict.fromkeys(event.module for event in self.events))

        def weight(event: FormatEvent) -> tuple:
            return -moved[event.module], modules.index(event.module), -event.nbytes

        return sorted(self.events, key=weight)

    def _legend(self) -> list[str]:
        kinds = {event.kind for event in self.events}
        lines = ["; ".join(f"{kind}: {meaning}" for kind, meaning in _KINDS.items() if kind in kinds)]
        if len(self.events) > _N_ROWS:
            lines.append(
                f"{len(self.events) - _N_ROWS} lighter rows left out; `.to_frame()`, in the shell `--json`, has all"
            )
        return lines

    def plot(
        self,
        ax: Axes | None = None,  # where to draw, a new figure if None
    ) -> Axes:
        "Draw the layers in the order of execution, coloured by format; triangles mark those that lose it."
        ax = plot_layers(self.layers, ax)
        if self.error:
            ax.set_title("The step stopped after these layers", loc="left", pad=20)
        return ax


def _to_text(table: pd.DataFrame) -> str:
    "Return pandas' own text, but with words aligned to the left."
    columns = {}
    for name, column in table.items():
        if name in ("n", "MB"):
            columns[name] = column
        else:
            width = max(len(name), *map(len, column))
            columns[name.ljust(width)] = column.str.ljust(width)
    return pd.DataFrame(columns).to_string(index=False)


def dtype_name(
    dtype: torch.dtype,
) -> str:
    "Return 'fp16', 'bf16', 'fp32' or 'fp64', and of every other dtype PyTorch's name."
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def _percent(share: float) -> str:
    "Return `share` in percent, which is never rounded up to 100%."
    return "100%" if share == 1 else f"{min(share * 100, 99.9):.1f}%"


def quoted(
    module: str,  # dotted name, '' for the model itself
) -> str:
    "Return what a sentence calls a module."
    return f"`{module}`" if module else "the model itself"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _fill(text: str) -> str:
    return textwrap.fill(text, 110, subsequent_indent="  ")


def _paragraph(text: str) -> str:
    "Return `text` as HTML, with what is in backticks as code."
    return "<p>" + re.sub("`(.*?)`", r"<code>\1</code>", html.escape(text)) + "</p>"
