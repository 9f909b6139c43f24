"Whose code runs in the backward pass: the nodes of autograd's graph, by the section that made them."

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from channelslast.nested import tensors_in
from channelslast.summary.images import Image
from channelslast.summary.sections import Section
from channelslast.tensors import format_of

__all__ = ["AutogradGraph", "Taken"]

Edge = tuple[Node, int]  # where a tensor was made: the node, and which of its outputs the tensor is


class Taken(NamedTuple):
    "An image that a section took."

    edge: Edge  # where it was made
    node: Node  # of the section, which read it
    index: int  # which of the gradients that `node` computes is that of the image
    image: Image


class AutogradGraph:
    """Autograd's graph, as far as the model's sections made it.

    (PyTorch's `ModuleTracker` keeps the modules of parallel branches active side by side in the backward pass, and
    cannot tell whose operator runs.)
    """

    def __init__(
        self,
        hooks: ExitStack,  # takes the hooks on nodes off
        on_gradient: Callable[[Section, Tensor], None],  # called with what a section hands on to what was channels last
    ):
        self.section: Section | None = None  # whose node runs, in a backward pass
        self.watched: list[Section] = []  # those that see their gradients
        self._hooks = hooks
        self._on_gradient = on_gradient
        self._owners: dict[Node, Section | None] = {}
        self._images: dict[Edge, Image] = {}  # those that modules take and hand on

    def forget(self) -> None:
        self.section = None
        for held in (self.watched, self._owners, self._images):
            held.clear()

    def remember(self, images: list[Tensor]) -> list[Image]:
        "Remember what a module takes or hands on, to know it again where a node reads it."
        remembered = []
        for tensor in images:
            image = Image(format_of(tensor), tensor.shape)
            remembered.append(image)
            if tensor.grad_fn is not None:
                self._images[tensor.grad_fn, tensor.output_nr] = image
            elif tensor.requires_grad and torch.is_grad_enabled():  # a leaf, whose node PyTorch makes on demand
                edge = get_gradient_edge(tensor)
                self._images[edge.node, edge.output_nr] = image
        return remembered

    def claim(self, values: Any, section: Section | None) -> list[Node]:
        "Give `section`, None for code before the model, the nodes behind `values` that are nobody's yet; return them."
        new = []
        todo = [tensor.grad_fn for tensor in tensors_in(values) if tensor.grad_fn is not None]
        while todo:
            node = todo.pop()
            if node in self._owners or node.name().endswith("AccumulateGrad"):  # a leaf's, which many share
                continue
            self._owners[node] = section
            new.append(node)
            if section is not None:
                self._hooks.callback(node.register_prehook(lambda gradients: self._enter(section)).remove)
            todo += [following for following, _ in node.next_functions if following is not None]
        return new

    def _enter(self, section: Section) -> None:
        self.section = section

    def taken_by(self, nodes: list[Node]) -> list[Taken]:
        "Return the images that these nodes, all those of one section, read, and that others made."
        own = set(nodes)
        return [
            Taken(edge, node, index, self._images[edge])
            for node in nodes
            for index, edge in enumerate(node.next_functions)
            if edge[0] not in own and edge in self._images
        ]

    def watch_gradients(self, section: Section, made: list[Tensor], taken: list[Taken]) -> None:
        "Have `section` see the gradients that it takes and hands on."
        self.watched.append(section)
        for tensor in made:
            if tensor.grad_fn is not None:
                self._hooks.callback(tensor.grad_fn.register_prehook(_take(section, tensor.output_nr)).remove)
        for each in taken:
            if each.image.memory_format == "channels last":
                self._hooks.callback(each.node.register_hook(self._give(section, each)).remove)

    def _give(self, section: Section, taken: Taken) -> Callable[..., None]:
        def hook(gradients: tuple, gradients_taken: tuple) -> None:
            gradient = gradients[taken.index]
            if gradient is not None and format_of(gradient) is not None:
                section.give_gradient(taken.edge, gradient)
                self._on_gradient(section, gradient)

        return hook


def _take(section: Section, index: int) -> Callable[..., None]:
    def hook(gradients: tuple) -> None:
        section.take_gradient(gradients[index])

    return hook
