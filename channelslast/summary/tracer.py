"Watch every operator of a training step, and what it does to the memory format."

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from channelslast.memory_format import CHANNELS_LAST, VIEW_ERROR
from channelslast.nested import tensors_in
from channelslast.summary.graph import AutogradGraph
from channelslast.summary.images import ImageShapes, may_come_of
from channelslast.summary.modes import HigherOrderMode, OperatorMode
from channelslast.summary.modules import Call, EndedSection, Modules, modules_as_written
from channelslast.summary.operators import Operator, Written, memory_of
from channelslast.summary.records import OUTSIDE, FormatEvent, LayerFormat, Records, Where
from channelslast.summary.sections import LossyOperators, Section, known_formats, lost_images
from channelslast.swaps import is_swapped
from channelslast.tensors import format_of, images_in

__all__ = ["FormatTracer"]

_MARK = "channelslast_view"  # attribute that is set on an exception of `.view`


class _Copy(NamedTuple):
    "The last operator, where it was a copy."

    result: Tensor
    where: Where
    lossy_operators: LossyOperators | None  # in which it was counted
    nbytes: int  # that were counted


class FormatTracer:
    """Record what each operator of `model` does to the memory format, while active as a context manager.

    An operator belongs to the innermost module that is running, and in the backward pass to the module whose forward
    pass made its node of the graph. Higher-order operators, as `torch.cond`, are seen through: the functions that they
    call are code like any other. Inside a compiled function there is nothing to see: run it in
    `torch.compiler.set_stance("force_eager")`.
    """

    def __init__(
        self,
        model: nn.Module,
    ):
        self.padded_convs: dict[str, tuple[int, int]] = {}  # the same as in `FormatSummary`
        self.dense_gradients: dict[str, None] = {}  # the same as in `FormatSummary`; a dict, for it has an order
        self.error: tuple[str, str, str] | None = None  # module, operator and message of the last `.view` that raised
        self._records = Records({name: type(module).__name__ for name, module in modules_as_written(model)})
        self._shapes = ImageShapes({param.shape for param in model.parameters() if param.ndim in CHANNELS_LAST})
        self._input_channels: set[int] = set()  # of the images that the model is called with
        self._last_copy: _Copy | None = None
        # They work on views of the memory, whose strides say nothing: what they take and hand on tells
        self._swapped = {name for name, module in modules_as_written(model) if is_swapped(module)}
        self._open = ExitStack()  # modes and hooks
        self._graph = AutogradGraph(self._open, self._count_gradient)
        self._modules = Modules(model, self._graph, self._take_inputs, self._judge_forward)

    @property
    def events(self) -> list[FormatEvent]:
        "In the order in which they first happened."
        return self._records.events

    @property
    def layers(self) -> dict[str, LayerFormat]:
        "The modules that wrote images, by name, in the order in which they did."
        return self._records.layers

    @property
    def channels_last_share(self) -> float | None:
        "The share, by bytes, of 4D and 5D activations and gradients in channels last; None where there were none."
        return self._records.channels_last_share

    def raised(
        self,
        error: BaseException,
    ) -> bool:
        "Whether `error` is the exception that `self.error` tells of."
        return self.error is not None and getattr(error, _MARK, None) is self.error

    def claim_loss(
        self,
        loss: Tensor,  # computed from what the model returned
    ) -> None:
        "Note that the code between the output of the model and `loss` is the loss function, so that it has a section."
        self._graph.claim(loss, Section(OUTSIDE))

    def __enter__(self):
        mode = OperatorMode(self._run)
        try:
            self._modules.add_hooks(self._open)
            self._open.enter_context(HigherOrderMode(mode))
            self._open.enter_context(mode)
            return self
        except BaseException:
            self._open.close()
            raise

    def __exit__(self, *exception):
        self._open.close()
        for section in self._graph.watched:
            self._judge_backward(section)
        self._records.finish()
        self._graph.forget()
        self._modules.forget()
        self._last_copy = None

    # Sections, as wholes

    def _take_inputs(self, images: list[Tensor]) -> None:
        "Called with the images that come from outside the model."
        for image in images:
            self._shapes.add(image.shape)
            self._input_channels.add(image.size(1))

    def _judge_forward(self, end: EndedSection) -> None:
        "Called at the end of each section of the forward pass."
        call, section = end.call, end.call.section
        section.took = known_formats(end.took)
        if call.module in self._swapped:
            self._count_swapped(end)
        lost = lost_images(end.took, end.made)
        if lost:
            self._mark_loser(call, lost)
        elif section.lossy_operators["forward"].count > 0:
            # An operator gave channels last up, and so did the section, unless it is known to have gone back to it
            goes_back = section.took == {"channels last"} and "channels last" in map(format_of, end.made)
            if not goes_back:
                self._mark_loser(call, [])
        elif end.is_last and call.has_children and not call.has_lost:
            # No section lost it, but the module may have as a whole, if a part of it has tokens in place of images
            computed = [tensor for tensor in end.hands_on if tensor.grad_fn is not None]
            lost = lost_images(call.inputs, computed or end.hands_on)  # constants beside what is computed lose nothing
            if lost:
                self._mark_loser(call, lost)

    def _count_swapped(self, end: EndedSection) -> None:
        for image in end.made:
            self._shapes.add(image.shape)
            self._records.count(Where(end.call.module, "forward"), image)

    def _mark_loser(self, call: Call, lost: list[Tensor]) -> None:
        where = Where(call.module, "forward")
        self._modules.note_loser()
        self._records.mark_loser(where)
        for image in lost:
            if not call.section.lossy_operators["forward"].has_event:
                self._records.add_event(where, "lost", image)
            self._records.count_if_first(where, image)

    def _judge_backward(self, section: Section) -> None:
        if not section.loses_backward():
            return
        where = Where(section.module, "backward")
        self._records.mark_loser(where)
        if not section.lossy_operators["backward"].has_event:
            for gradient in section.contiguous_gradients:
                self._records.add_event(where, "lost", gradient)

    def _count_gradient(self, section: Section, gradient: Tensor) -> None:
        self._records.count_if_first(Where(section.module, "backward"), gradient)

    # Operators, one by one

    def _run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        last_copy, self._last_copy = self._last_copy, None
        try:
            result = func(*args, **kwargs)
        except RuntimeError as error:
            if VIEW_ERROR in str(error):
                self.error = self._modules.running.where.module, str(func.overloadpacket), str(error)
                # A mark on the exception: to hold it would hold its frames, and its `id` may be that of a later one
                setattr(error, _MARK, self.error)
            raise
        if images_in(result):
            self._look_at(Operator(func, args, kwargs, result))
            return result
        is_unsafe_view = func.overloadpacket is torch.ops.aten._unsafe_view
        if last_copy is not None and is_unsafe_view and args[0] is last_copy.result:
            self._forget_flattened(last_copy)
        elif isinstance(result, Tensor) and memory_of(result) not in map(memory_of, tensors_in(args)):  # no view
            self._records.set_last_op(self._modules.running.where, str(func.overloadpacket))
        return result

    def _look_at(self, operator: Operator) -> None:
        where = self._modules.running.where
        if where.module in self._swapped:
            self._records.set_last_op(where, operator.name)
            return
        if operator.is_convolution:
            self._look_at_convolution(operator)
            return
        for view in operator.slices():
            whole = operator.operands[0].shape
            if whole in self._shapes and may_come_of(view.shape, [whole]):
                self._shapes.add(view.shape)
        for written in operator.written():
            self._look_at_written(operator, written)

    def _look_at_written(self, operator: Operator, written: Written) -> None:
        running = self._modules.running
        where, image = running.where, written.image
        if written.kind:
            self._records.add_event(where, written.kind, image, operator.name)
        elif where.phase == "backward" and written.comes_of_expanded:
            self.dense_gradients.setdefault(where.module)
        loses = written.gives_up_channels_last and not self._shapes.is_weight(image)
        lossy_operators = running.lossy_operators if loses else None
        if lossy_operators is not None:
            lossy_operators.count += 1
            lossy_operators.has_event = True
        nbytes = self._count(where, operator, image, written.read)
        if operator.is_copy:
            self._last_copy = _Copy(image, where, lossy_operators, nbytes)

    def _look_at_convolution(self, operator: Operator) -> None:
        where = self._modules.running.where
        for operand in operator.relaid():
            self._records.add_event(where, "hidden", operand, operator.name)
        image = operator.convolved()
        if image is None:  # the gradient of an input that needs none
            return
        self._shapes.add(image.shape)
        self._count(where, operator, image, operator.operands)
        channels = operator.padded_channels(self._input_channels)
        if channels and where.module != OUTSIDE:
            self.padded_convs.setdefault(where.module, channels)

    def _count(self, where: Where, operator: Operator, result: Tensor, read: list[Tensor]) -> int:
        "Count what an operator wrote if it is an image; return the bytes added."
        self._records.set_last_op(where, operator.name)
        self._shapes.add_if_image(result, read)
        return self._records.count(where, result) if result.shape in self._shapes else 0

    def _forget_flattened(self, copy: _Copy) -> None:
        """Take back what was counted of a copy that was the first half of a reshape to something that is no image.

        (A `reshape` that copies is a `clone` and an `_unsafe_view`.) Such a copy is no image, and loses nothing.
        """
        if copy.lossy_operators is not None:
            copy.lossy_operators.count -= 1
        self._records.discount(copy.where, copy.result, copy.nbytes)
