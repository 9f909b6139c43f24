"What a traced step leaves behind: the events, and what each module wrote."

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from channelslast.tensors import format_of

__all__ = ["OUTSIDE", "FormatEvent", "LayerFormat", "Records", "Where"]

OUTSIDE = "(loss)"  # the name of what runs outside the model, as the loss function does


class Where(NamedTuple):
    "Whose code runs, and in which pass."

    module: str  # dotted name in the model, '' for the model itself, '(loss)' outside it
    phase: str  # 'forward' or 'backward'


@dataclass(frozen=True)
class FormatEvent:
    """Operators of one kind that lost or changed the memory format, or paid for one that was lost.

    Kinds: 'lost' (channels last in, contiguous out), 'converted' (a copy that changes the format), 'hidden' (a
    convolution that must re-lay an operand inside its kernel), 'mixed' (a pointwise operator, or `cat`, over operands
    of different formats).
    """

    module: str  # dotted name in the model, '' for the model itself, '(loss)' outside it
    cls: str  # the module's class
    phase: str  # 'forward' or 'backward'
    op: str  # the operator, as 'aten.clone'
    kind: str  # 'lost', 'converted', 'hidden' or 'mixed'
    shape: tuple[int, ...]  # of the tensor that is in the other format: a result, and for 'hidden' the operand
    dtype: torch.dtype
    count: int  # how often in the step
    nbytes: int  # bytes of those tensors, of all `count` together


@dataclass
class LayerFormat:
    "What one module's own operators wrote, in bytes of images by phase and format, and where it loses channels last."

    module: str
    cls: str
    nbytes: dict[tuple[str, str], int] = field(default_factory=dict)  # {(phase, 'channels last' or 'contiguous'): n}
    loses_in: tuple[str, ...] = ()  # phases in which it takes channels last and hands contiguous on

    def share(
        self,
        phase: str,  # 'forward' or 'backward'
    ) -> float | None:
        "Return the share of bytes in channels last, between 0 and 1; None if it wrote no image."
        channels_last = self.nbytes.get((phase, "channels last"), 0)
        total = channels_last + self.nbytes.get((phase, "contiguous"), 0)
        return channels_last / total if total else None

    @property
    def contiguous_nbytes(self) -> int:
        "Bytes in contiguous format, of both phases."
        return sum(nbytes for (_, memory_format), nbytes in self.nbytes.items() if memory_format == "contiguous")


class Records:
    "Collects the events and the layers of a step."

    def __init__(self, classes: dict[str, str]):  # of the modules, by name
        self.layers: dict[str, LayerFormat] = {}
        self._classes = classes
        self._events: dict[tuple, list[int]] = {}  # {all of an event but these: [count, nbytes]}
        self._last_op: dict[Where, str] = {}  # the last operator that wrote a tensor

    @property
    def events(self) -> list[FormatEvent]:
        "In the order in which they first happened."
        return [FormatEvent(*key, count, nbytes) for key, (count, nbytes) in self._events.items()]

    @property
    def channels_last_share(self) -> float | None:
        "The share, by bytes, of what was written in channels last; None where there was nothing."
        contiguous = sum(layer.contiguous_nbytes for layer in self.layers.values())
        total = sum(sum(layer.nbytes.values()) for layer in self.layers.values())
        return (total - contiguous) / total if total else None

    def add_event(self, where: Where, kind: str, tensor: Tensor, op: str | None = None) -> None:
        "Add an event about `tensor`: of `op`, or if it is None of the last operator that wrote a tensor there."
        op = self._last_op.get(where, "") if op is None else op
        cls = self._classes.get(where.module, "loss")
        key = where.module, cls, where.phase, op, kind, tuple(tensor.shape), tensor.dtype
        entry = self._events.setdefault(key, [0, 0])
        entry[0] += 1
        entry[1] += tensor.nbytes

    def mark_loser(self, where: Where) -> None:
        "Note that a module takes channels last and hands contiguous on."
        layer = self._layer(where.module)
        if where.phase not in layer.loses_in:
            layer.loses_in = (*layer.loses_in, where.phase)

    def set_last_op(self, where: Where, op: str) -> None:
        "Note that `op` wrote a tensor there."
        self._last_op[where] = op

    def count(self, where: Where, image: Tensor) -> int:
        "Count an image that an operator wrote; return the bytes added, for `discount`."
        memory_format = format_of(image)
        if memory_format is None or not image.is_floating_point() or where.module == OUTSIDE:
            return 0
        layer, key = self._layer(where.module), (where.phase, memory_format)
        layer.nbytes[key] = layer.nbytes.get(key, 0) + image.nbytes
        return image.nbytes

    def discount(self, where: Where, image: Tensor, nbytes: int) -> None:
        "Take back what `count` added."
        if nbytes:
            self.layers[where.module].nbytes[where.phase, format_of(image)] -= nbytes

    def count_if_first(self, where: Where, image: Tensor) -> None:
        "Count an image that a module hands on if its operators wrote tensors but no image: it is a view of one."
        if where in self._last_op and where.module != OUTSIDE and self._layer(where.module).share(where.phase) is None:
            self.layers[where.module].nbytes[where.phase, format_of(image)] = image.nbytes

    def finish(self) -> None:
        "Drop the layers that wrote no image."
        self.layers = {
            name: layer for name, layer in self.layers.items() if layer.loses_in or any(layer.nbytes.values())
        }

    def _layer(self, name: str) -> LayerFormat:
        return self.layers.setdefault(name, LayerFormat(name, self._classes[name]))
