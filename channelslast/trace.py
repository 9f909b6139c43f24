"Watch every operator of a training step, and what it does to the memory format. PyTorch only."

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

from channelslast.memory_format import CHANNELS_LAST, is_channels_last

__all__ = ["FormatEvent", "FormatTracer", "LayerFormat"]

OUTSIDE = "(loss)"  # what runs outside the model, as the loss function does

_CONVOLUTIONS = {"convolution", "convolution_backward"}
_COPIES = {"clone", "copy", "copy_", "_to_copy"}
_SLICES = {"alias", "detach", "narrow", "slice", "split", "split_with_sizes"}  # views of an image that are images
_NEW = {
    "empty",
    "empty_like",
    "empty_strided",
    "full",
    "full_like",
    "new_empty",
    "new_empty_strided",
    "new_full",
    "new_zeros",
    "ones_like",
    "zeros",
    "zeros_like",
}
_GRADIENT_SECOND = {"cudnn_batch_norm_backward", "miopen_batch_norm_backward"}  # among their operands
_HALF = (torch.float16, torch.bfloat16)
_VIEW_ERROR = "view size is not compatible with input tensor's size and stride"


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
    "What one module's own operators wrote: bytes of 4D and 5D tensors by phase and format, and where it loses it."

    module: str
    cls: str
    nbytes: dict[tuple[str, str], int] = field(default_factory=dict)  # {(phase, 'last' or 'first'): bytes}
    loses_in: tuple[str, ...] = ()  # phases in which it takes channels last and hands contiguous on

    def share(
        self,
        phase: str,  # 'forward' or 'backward'
    ) -> float | None:
        "The share of bytes in channels last, None where it wrote no image."
        last, first = (self.nbytes.get((phase, name), 0) for name in ("last", "first"))
        return last / (last + first) if last + first else None


class FormatTracer(TorchDispatchMode):
    """Record what each operator of `model` does to the memory format, while active as a context manager.

    An operator of the forward pass belongs to the innermost module that is running. In the backward pass it belongs to
    the module whose forward pass made its node of the graph: PyTorch's `ModuleTracker` keeps the modules of parallel
    branches active side by side there, and cannot tell whose operator runs.

    Formats go by strides. Tensors that are in both formats at once (one channel, 1x1 pixels, nothing in them) or
    expanded (stride 0) count as neither.
    """

    def __init__(
        self,
        model: nn.Module,
    ):
        super().__init__()
        self.model = model
        self.layers: dict[str, LayerFormat] = {}
        self.padded_convs: dict[str, tuple[int, int]] = {}  # channels in and out
        self.dense_gradients: dict[str, None] = {}  # modules that write out an expanded gradient, in contiguous format
        self.error: tuple[str, str, RuntimeError] | None = None  # module, operator and what it raised on `.view`
        self._events: dict[tuple, list[int]] = {}
        self._names = {id(module): name for name, module in model.named_modules()}
        self._classes = {name: type(module).__name__ for name, module in model.named_modules()}
        self._param_shapes = {param.shape for param in model.parameters() if param.ndim in CHANNELS_LAST}
        self._images: set[torch.Size] = set()
        self._losses: dict[tuple[str, str], int] = {}  # {(module, phase): times it gave up channels last}
        self._given_up: set[tuple[str, str]] = set()  # (module, phase) with an event that tells it
        self._kept: set[tuple[str, str]] = set()  # (module, phase) that hand on what they took in channels last
        self._ops: dict[tuple[str, str], str] = {}  # the last operator that wrote a tensor
        self._stack: list[_Call] = []
        self._backward_of: str | None = None
        self._owners: dict[Node, str | None] = {}
        self._blank: set[int] = set()  # memory of tensors that nothing has been written to
        self._last_copy = (0, (OUTSIDE, "forward"), False, 0)  # its memory, where, whether it loses, bytes counted
        self._handles: list[Any] = []

    # Results

    @property
    def events(self) -> list[FormatEvent]:
        "In the order in which they first happened."
        return [FormatEvent(*key, count, nbytes) for key, (count, nbytes) in self._events.items() if count]

    @property
    def channels_last_share(self) -> float | None:
        "The share, by bytes, of 4D and 5D activations and gradients in channels last; None where there were none."
        last, first = (
            sum(
                layer.nbytes.get((phase, name), 0)
                for layer in self.layers.values()
                for phase in ("forward", "backward")
            )
            for name in ("last", "first")
        )
        return last / (last + first) if last + first else None

    # Who is running

    def __enter__(self):
        for module in self.model.modules():
            self._handles += [
                module.register_forward_pre_hook(self._enter_module, prepend=True, with_kwargs=True),
                module.register_forward_hook(self._leave_module, with_kwargs=True, always_call=True),
            ]
        return super().__enter__()

    def __exit__(self, *exception):
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._owners.clear()
        self._finish()
        return super().__exit__(*exception)

    def _finish(self) -> None:
        for (name, phase), count in self._losses.items():
            layer = self.layers.get(name)
            if count > 0 and layer and (name, phase) not in self._kept and phase not in layer.loses_in:
                layer.loses_in = (*layer.loses_in, phase)

    @property
    def _where(self) -> tuple[str, str]:
        "The name of the module that is running, and the phase."
        if self._stack:
            return self._stack[-1].name, "forward"
        if self._backward_of is not None:
            return self._backward_of, "backward"
        return OUTSIDE, "forward"

    def _enter_module(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        name = self._names[id(module)]
        self._own_nodes((args, kwargs), self._stack[-1].name if self._stack else None)
        images = self._images_in((args, kwargs))
        if not self._stack:
            self._images.update(tensor.shape for tensor in images)
        else:
            self._stack[-1].has_children = True
        self._stack.append(_Call(name, images, sum(self._losses.values())))

    def _leave_module(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if not self._stack:  # a hook of the caller's own raised before it was entered
            return
        call = self._stack[-1]
        nodes = self._own_nodes(output, call.name)  # None where `forward` raised
        results = self._images_in(output)
        self._check_forward(call, results)
        formats = set(map(layout, call.inputs)) - {None}
        if formats == {"last"} and not call.has_children:
            self._watch_backward(call, results, nodes)
        elif formats == {"first"}:
            self._kept.add((call.name, "backward"))  # its gradient belongs in contiguous format
        self._stack.pop()

    def _images_in(self, values: Any) -> list[Tensor]:
        "The 4D and 5D tensors in `values` but for weights, which parametrizations take and return."
        tensors = [tensor for tensor in tensors_in(values) if tensor.ndim in CHANNELS_LAST]
        return [tensor for tensor in tensors if tensor.shape not in self._param_shapes]

    def _own_nodes(self, values: Any, owner: str | None) -> list[Node]:
        "Say that the nodes of the graph behind `values` which belong to nobody yet are those of the module `owner`."
        new = []
        todo = [tensor.grad_fn for tensor in tensors_in(values) if tensor.grad_fn is not None]
        while todo:
            node = todo.pop()
            if node in self._owners or hasattr(node, "variable"):  # leaves have no operator of their own
                continue
            self._owners[node] = owner
            new.append(node)
            if owner is not None:
                self._handles.append(node.register_prehook(lambda grads: self._enter_node(owner)))
            todo += [following for following, _ in node.next_functions if following is not None]
        return new

    def own_loss(
        self,
        loss: Tensor,  # computed from what the model returned
    ) -> None:
        "Say that what `loss` was computed with, outside the model, is the loss function."
        self._own_nodes(loss, OUTSIDE)

    def _enter_node(self, owner: str) -> None:
        self._backward_of = owner

    # A module as a whole: what it took and what it handed on. Sees losses that no single operator shows, as through 3D.

    def _check_forward(self, call: "_Call", results: list[Tensor]) -> None:
        if set(map(layout, call.inputs)) - {None} != {"last"}:
            return
        memory = {_memory(tensor) for tensor in call.inputs}
        new = [result for result in results if layout(result) and _memory(result) not in memory]
        lost = [
            result
            for result in new
            if layout(result) == "first" and (result.shape in self._images or _alike(result, call.inputs))
        ]
        if lost and sum(self._losses.values()) == call.losses:
            self._add_module_loss(call.name, "forward", lost)
        elif set(map(layout, new)) == {"last"} and not call.has_children:
            self._kept.add((call.name, "forward"))

    def _watch_backward(self, call: "_Call", results: list[Tensor], nodes: list[Node]) -> None:
        "Compare the gradients that a module without children takes with those that it hands on."
        taken: list[str | None] = []
        own = set(nodes)

        def look_at(index: int):
            return lambda grads: taken.append(layout(grads[index]) if grads[index] is not None else None)

        def compare(index: int):
            return lambda grads_in, grads_out: self._check_backward(call.name, taken, grads_in[index])

        for result in results:
            if result.grad_fn in own:
                self._handles.append(result.grad_fn.register_prehook(look_at(result.output_nr)))
        inputs = {get_gradient_edge(tensor).node for tensor in call.inputs if tensor.requires_grad}
        for node in nodes:
            for index, (following, _) in enumerate(node.next_functions):
                if following in inputs:
                    self._handles.append(node.register_hook(compare(index)))

    def _check_backward(self, name: str, taken: list[str | None], grad: Tensor | None) -> None:
        if grad is None or layout(grad) is None:
            return
        layer = self._layer(name)
        if layer.share("backward") is None:  # a view of something that was no image
            layer.nbytes["backward", layout(grad)] = _nbytes(grad)
        if set(taken) - {None} != {"last"}:
            return
        if layout(grad) == "last":
            self._kept.add((name, "backward"))
        elif not self._losses.get((name, "backward")):
            self._add_module_loss(name, "backward", [grad])

    def _add_module_loss(self, name: str, phase: str, tensors: list[Tensor]) -> None:
        "The last operator that wrote something is named for it."
        where = name, phase
        for tensor in tensors if where not in self._given_up else []:
            self._add_event(where, self._ops.get(where, "aten.view"), "lost", tensor)
        if self._layer(name).share(phase) is None:
            self.layers[name].nbytes[phase, "first"] = sum(map(_nbytes, tensors))
        self._losses[where] = self._losses.get(where, 0) + 1

    # One operator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        try:
            result = func(*args, **kwargs)
        except RuntimeError as error:
            if _VIEW_ERROR in str(error):
                self.error = self._where[0], str(func.overloadpacket), error
            raise
        if any(tensor.ndim in CHANNELS_LAST for tensor in tensors_in(result)):
            self._look_at(func, args, kwargs, result)
        elif isinstance(result, Tensor) and _memory(result) not in map(_memory, tensors_in(args)):
            self._ops[self._where] = str(func.overloadpacket)
        elif func.overloadpacket is torch.ops.aten._unsafe_view:
            self._forget_flattened(args[0])
        return result

    def _look_at(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        op = str(func.overloadpacket)
        name = op.rpartition(".")[2]
        operands = [tensor for tensor in tensors_in((args, kwargs)) if tensor.ndim in CHANNELS_LAST]
        if name in _CONVOLUTIONS:
            self._look_at_convolution(op, operands, result)
            return
        memory = {_memory(tensor) for tensor in tensors_in((args, kwargs))}
        for tensor in tensors_in(result):
            if tensor.ndim not in CHANNELS_LAST:
                continue
            in_place = any(tensor is operand for operand in operands)
            if _memory(tensor) in memory and not in_place:
                if name in _SLICES and operands[0].shape in self._images and _alike(tensor, operands[:1]):
                    self._images.add(tensor.shape)
            elif name in _NEW:
                self._blank.add(_memory(tensor))
            else:
                self._look_at_result(func, op, operands, tensor, in_place)
                self._blank.discard(_memory(tensor))

    def _look_at_result(self, func: Any, op: str, operands: list[Tensor], result: Tensor, in_place: bool) -> None:
        name = op.rpartition(".")[2]
        copies = name in _COPIES
        pointwise = torch.Tag.pointwise in func.tags and not copies
        data = [
            operand
            for operand in operands
            # what is written over, and was not read, is no operand
            if (pointwise or not (in_place and operand is result)) and _memory(operand) not in self._blank
        ]
        where = self._where
        saved: list[Tensor] = []
        if where[1] == "backward" and not (copies or pointwise or name == "cat"):
            if name in _GRADIENT_SECOND:
                data = data[1::-1] + data[2:]
            data, saved = data[:1], data[1:]
        taken = {layout(operand) for operand in data if _alike(result, [operand], reshaped=True)} - {None}
        given = layout(result)
        kind = None
        if given is None or not taken:
            pass
        elif copies:
            kind = "converted" if taken != {given} else None
        elif len(taken) == 2:
            kind = "mixed" if pointwise or name == "cat" else None
        elif taken == {"last"} and given == "first":
            kind = "lost"
        if kind:
            self._add_event(where, op, kind, result)
        elif where[1] == "backward" and given == "first" and data and all(0 in operand.stride() for operand in data):
            self.dense_gradients.setdefault(where[0])
        gives_up = kind in ("lost", "converted") and given == "first" and result.shape not in self._param_shapes
        # a gradient in the contiguous format of what was saved in the forward pass is none of its own loss
        loses = gives_up and "first" not in {layout(tensor) for tensor in saved if _alike(result, [tensor])}
        if gives_up:
            self._given_up.add(where)
        if loses:
            self._losses[where] = self._losses.get(where, 0) + 1
        counted = self._count(where, op, data, result)
        if copies:
            self._last_copy = _memory(result), where, loses, counted

    def _look_at_convolution(self, op: str, operands: list[Tensor], result: Any) -> None:
        """Find the operands that a convolution must re-lay inside its kernel, and those with channels to be padded.

        It works in channels last where its input or its weight is, and in contiguous else: the rule of
        `cudnn_conv_suggest_memory_format` and `mkldnn_conv_use_channels_last` in PyTorch's `ATen/native/ConvUtils.h`.
        """
        backward = not isinstance(result, Tensor)
        where = self._where
        *grads, data, weight = operands
        works_in = "last" if is_channels_last(data) or is_channels_last(weight) else "first"
        for operand in operands:
            if layout(operand) not in (None, works_in):
                self._add_event(where, op, "hidden", operand)
        self._images.update(tensor.shape for tensor in (*grads, data))
        written = result[0] if backward else result  # the other gradients are the weight's and the bias's
        if written is None:
            return
        self._images.add(written.shape)
        if layout(grads[0] if backward else data) == "last" and layout(written) == "first":
            self._add_event(where, op, "lost", written)
            self._losses[where] = self._losses.get(where, 0) + 1
        self._count(where, op, operands, written)
        channels = data.size(1), written.size(1)
        is_grouped = data.size(1) not in weight.shape[:2]
        if not backward and data.dtype in _HALF and not is_grouped and any(number % 8 for number in channels):
            self.padded_convs.setdefault(where[0], channels)

    def _add_event(self, where: tuple[str, str], op: str, kind: str, tensor: Tensor) -> None:
        name, phase = where
        key = name, self._classes.get(name, "loss"), phase, op, kind, tuple(tensor.shape), tensor.dtype
        entry = self._events.setdefault(key, [0, 0])
        entry[0] += 1
        entry[1] += _nbytes(tensor)

    def _count(self, where: tuple[str, str], op: str, data: list[Tensor], result: Tensor) -> int:
        "Add `result` to what its module wrote, if it is an image in one format; the bytes added."
        name, phase = where
        self._ops[where] = op
        is_image = any(operand.shape in self._images and _alike(result, [operand], reshaped=True) for operand in data)
        given = layout(result)
        if is_image or (given == "last" and result.shape not in self._param_shapes):
            self._images.add(result.shape)
        if given is None or not result.is_floating_point() or result.shape not in self._images or name == OUTSIDE:
            return 0
        layer = self._layer(name)
        layer.nbytes[phase, given] = layer.nbytes.get((phase, given), 0) + _nbytes(result)
        return _nbytes(result)

    def _layer(self, name: str) -> LayerFormat:
        return self.layers.setdefault(name, LayerFormat(name, self._classes[name]))

    def _forget_flattened(self, source: Tensor) -> None:
        "The last copy was half of a reshape to something that is no image: it is none either, and loses nothing."
        memory, where, loses, counted = self._last_copy
        if memory != _memory(source):
            return
        if loses:
            self._losses[where] -= 1
        if counted:
            name, phase = where
            self.layers[name].nbytes[phase, layout(source)] -= counted


@dataclass
class _Call:
    "A module that is running."

    name: str
    inputs: list[Tensor]  # those of 4D and 5D
    losses: int  # in the step so far, when it was entered
    has_children: bool = False


def tensors_in(
    values: Any,  # a tensor, or tuples, lists, dicts and dataclasses of tensors, nested in any way
) -> list[Tensor]:
    "The tensors in `values`, in their order."
    return list(_iter_tensors(values))


def _iter_tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _iter_tensors(value)
    elif isinstance(values, Mapping):
        yield from _iter_tensors(list(values.values()))
    elif is_dataclass(values):
        yield from _iter_tensors(list(vars(values).values()))


def layout(
    tensor: Tensor,
) -> str | None:
    "'last' or 'first', after where the strides put the channels; None for what is both at once, or expanded."
    if tensor.ndim not in CHANNELS_LAST or tensor.layout != torch.strided or tensor.is_nested:
        return None
    sizes, strides = tensor.shape, tensor.stride()
    if tensor.numel() == 0 or sizes[1] == 1 or max(sizes[2:]) == 1:
        return None
    if any(stride == 0 and size > 1 for size, stride in zip(sizes, strides, strict=True)):
        return None
    return "last" if is_channels_last(tensor) else "first"


def _alike(result: Tensor, operands: Iterable[Tensor], reshaped: bool = False) -> bool:
    "Whether `result` can be the image that one of `operands` was: the same channels, or the same pixels."
    for operand in operands:
        if operand.ndim != result.ndim:
            continue
        if operand.size(1) == result.size(1) or operand.shape[2:] == result.shape[2:]:
            return True
        if reshaped and operand.numel() == result.numel():  # as pixel shuffle trades channels for pixels
            return True
    return False


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
