"""The sections of a module's code, and whether one gave up channels last as a whole.

A *section* is a part of one module's own code in which no other module runs: from its start to the first module that it
calls, between two of them, or from the last one to its end. A module that calls none is one section. It runs a second
time in the backward pass, as the nodes that it added to autograd's graph.

A section is judged by what it took and what it handed on, since no operator need be to blame: code that goes by way of
3D, as `(x.flatten(2) @ weights).reshape(x.shape)`, loses the format between operators that see no image.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from channelslast.summary.images import Image, may_come_of
from channelslast.tensors import format_of

__all__ = ["LossyOperators", "Section", "known_formats", "lost_images"]


@dataclass
class LossyOperators:
    "How many operators of a section gave up channels last, in one pass."

    count: int = 0
    has_event: bool = False  # one of them at least, which so is told to the user


class Section:
    "A section, or all that runs outside the model."

    def __init__(self, module: str):
        self.module = module  # its name
        self.took: set[str] = set()  # formats of the images that it took in the forward pass, as far as they are known
        self.lossy_operators = {"forward": LossyOperators(), "backward": LossyOperators()}
        # In the backward pass: formats of the gradients that it takes, and of those that it hands on to images that
        # were channels last, {where the image was made: formats}. (The gradients of one image add up.)
        self.gradients_taken: set[str | None] = set()
        self.gradients_given: dict[tuple, set[str]] = {}
        self.contiguous_gradients: list[Tensor] = []  # of those handed on, without their values

    def take_gradient(self, gradient: Tensor | None) -> None:
        if gradient is not None:
            self.gradients_taken.add(format_of(gradient))

    def give_gradient(self, edge: tuple, gradient: Tensor) -> None:
        "Note the gradient of an image that was channels last, made at `edge` of the graph."
        self.gradients_given.setdefault(edge, set()).add(format_of(gradient))
        if format_of(gradient) == "contiguous":
            self.contiguous_gradients.append(torch.empty_like(gradient, device="meta"))

    def loses_backward(self) -> bool:
        "Whether it took channels last gradients and handed contiguous ones on."
        if self.gradients_taken - {None} == {"channels last"} and self.gradients_given:
            return {"contiguous"} in self.gradients_given.values()
        # The section's gradients do not tell, but an operator in it may. (The gradient of what was made from contiguous
        # images is contiguous rightly.)
        return self.lossy_operators["backward"].count > 0 and self.took != {"contiguous"}


def lost_images(
    took: list[Image],
    made: list[Tensor],
) -> list[Tensor]:
    "Return those of `made` that are contiguous and may come of `took`, if all of that was channels last."
    if known_formats(took) != {"channels last"}:
        return []
    shapes = [image.shape for image in took]
    return [tensor for tensor in made if format_of(tensor) == "contiguous" and may_come_of(tensor.shape, shapes)]


def known_formats(
    images: Iterable[Image],
) -> set[str]:
    "Return the formats of `images`, but for images whose format cannot be told."
    return {image.memory_format for image in images} - {None}
