"Who is running: the modules of a model, section by section, and in the backward pass those whose nodes run."

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.module_tracker import ModuleTracker

from channelslast.summary.graph import AutogradGraph
from channelslast.summary.images import Image
from channelslast.summary.records import OUTSIDE, Where
from channelslast.summary.sections import LossyOperators, Section
from channelslast.tensors import images_in

__all__ = ["Call", "EndedSection", "Modules", "Running", "modules_as_written"]


class Running(NamedTuple):
    "Whose code runs, in which pass."

    section: Section | None  # None outside the model
    phase: str

    @property
    def where(self) -> Where:
        return Where(self.section.module if self.section else OUTSIDE, self.phase)

    @property
    def lossy_operators(self) -> LossyOperators | None:
        return self.section.lossy_operators[self.phase] if self.section else None


@dataclass
class Call:
    "A module that is running its forward pass."

    module: str  # its name
    inputs: list[Image]
    section: Section  # the one that runs, or is interrupted by another module
    has_children: bool = False  # it has called other modules
    has_lost: bool = False  # it, or one inside, has lost channels last
    # What its section took is not known, for a module inside has run without a graph since then, as in a checkpoint
    is_blind: bool = False


class EndedSection(NamedTuple):
    "A section of the forward pass, at its end."

    call: Call
    took: list[Image]  # as far as it is known
    hands_on: list[Tensor]  # the images, to a module inside or, at last, to the one around
    made: list[Tensor]  # those of them that it made itself
    is_last: bool  # of the module


class Modules:
    "Knows which modules are running, by hooks on all of them."

    def __init__(
        self,
        model: nn.Module,
        graph: AutogradGraph,
        on_inputs: Callable[[list[Tensor]], None],  # called with the images that come from outside the model
        on_end: Callable[[EndedSection], None],  # called at the end of each section of the forward pass
    ):
        self._model = model
        self._graph = graph
        self._on_inputs = on_inputs
        self._on_end = on_end
        self._names = {id(module): name for name, module in modules_as_written(model)}
        self._calls: list[Call] = []  # the innermost last
        self._tracker = ModuleTracker()

    @property
    def running(self) -> Running:
        "Whose code runs now."
        if self._calls:
            return Running(self._calls[-1].section, "forward")
        if self._tracker.is_bw and self._graph.section:  # `is_bw`: in a backward pass
            return Running(self._graph.section, "backward")
        return Running(None, "forward")

    def add_hooks(self, hooks: ExitStack) -> None:
        "Put hooks on all modules, for `hooks` to take off."

        # Functions, no methods: a deep copy of a module shares these hooks, but of a method it would copy `self` too
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._enter(module, (args, kwargs))

        def before_script(module: nn.Module, args: tuple) -> None:
            self._enter(module, args)

        def after(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            self._leave(module, output)

        def after_script(module: nn.Module, args: tuple, output: Any) -> None:
            self._leave(module, output)

        opaque = [module for module in self._model.modules() if _is_opaque(module)]
        inside = {id(module) for around in opaque for module in around.modules()}
        for module in self._model.modules():
            if id(module) not in inside:
                hooks.callback(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(after, with_kwargs=True, always_call=True).remove)
        if isinstance(self._model, torch.jit.ScriptModule):  # takes no hooks of its own, but those on all modules
            hooks.callback(register_module_forward_pre_hook(before_script).remove)
            hooks.callback(register_module_forward_hook(after_script, always_call=True).remove)

    def note_loser(self) -> None:
        "Note that the innermost module loses channels last, so that those around it are not blamed for it."
        for call in self._calls:
            call.has_lost = True

    def forget(self) -> None:
        self._calls.clear()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        name = self._names.get(id(module))
        if name is None:  # a copy is code of the module that makes it
            return
        if self._calls:
            self._end_section(inputs, is_last=False)
        else:
            self._graph.claim(inputs, None)  # the nodes before the model are nobody's
            self._on_inputs(images_in(inputs))
        self._calls.append(Call(name, self._graph.remember(images_in(inputs)), Section(name)))

    def _leave(self, module: nn.Module, output: Any) -> None:
        name = self._names.get(id(module))
        # not there: it is a copy, or a hook of somebody else raised before ours was called
        if name not in [call.module for call in self._calls]:
            return
        while self._calls[-1].module != name:  # it ended by a BaseException, after which no hook runs
            self._calls.pop()
        self._end_section(output, is_last=True)
        self._graph.remember(images_in(output))
        self._calls.pop()
        if self._calls and not torch.is_grad_enabled():
            self._calls[-1].is_blind = True

    def _end_section(self, values: Any, is_last: bool) -> None:
        "End the section that runs: it hands `values` on, to a module inside or, at last, to the one around."
        call = self._calls[-1]
        images = images_in(values)
        nodes = self._graph.claim(values, call.section)
        taken = self._graph.taken_by(nodes)
        took = [each.image for each in taken]
        if is_last and not call.has_children:  # it is the only section, which took all that the module took
            took += call.inputs
        if call.is_blind:
            took = []
        own = set(nodes)
        made = [tensor for tensor in images if not own or tensor.grad_fn in own]  # all of them where there is no graph
        self._on_end(EndedSection(call, took, images, made, is_last))
        if nodes:
            self._graph.watch_gradients(call.section, made, taken)
        call.section, call.is_blind = Section(call.module), False
        if not is_last:
            call.has_children = True


def modules_as_written(
    model: nn.Module,
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the `named_modules` of `model` by the names that they have without `torch.compile`.

    A wrapper of its comes first, under the name of the module inside, so that a dict of names has the latter.
    """
    for name, module in model.named_modules():
        yield ".".join(part for part in name.split(".") if part != "_orig_mod"), module


def _is_opaque(module: nn.Module) -> bool:
    "Whether the modules inside run as code of the module around them: a script takes no hooks, a weight is no image."
    return isinstance(module, (torch.jit.ScriptModule, ParametrizationList))
