"Watch every operator of a training step, and what it does to the memory format. PyTorch only."

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

from channelslast.memory_format import CHANNELS_LAST, VIEW_ERROR, is_channels_last

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
_GROUPS = 8  # position among the arguments of `aten.convolution`
_HALF = (torch.float16, torch.bfloat16)
_MARK = "channelslast_view"  # attribute of an exception of `.view`


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

    @property
    def contiguous_nbytes(self) -> int:
        "Bytes in contiguous format, of both phases."
        return sum(nbytes for (_, given), nbytes in self.nbytes.items() if given == "first")

    def loses(
        self,
        phase: str,
    ) -> None:
        "Say that it loses the format in `phase`."
        if phase not in self.loses_in:
            self.loses_in = (*self.loses_in, phase)


class FormatTracer:
    """Record what each operator of `model` does to the memory format, while active as a context manager.

    An operator of the forward pass belongs to the innermost module that is running. In the backward pass it belongs to
    the module whose forward pass made its node of the graph: PyTorch's `ModuleTracker` keeps the modules of parallel
    branches active side by side there, and cannot tell whose operator runs.

    Formats go by strides. Tensors that are in both formats at once (one channel, 1x1 pixels, nothing in them) or
    expanded (stride 0) count as neither.

    Higher-order operators, as `torch.cond`, are seen through: the functions that they call are code like any other.
    """

    def __init__(
        self,
        model: nn.Module,
    ):
        self.model = model
        self.layers: dict[str, LayerFormat] = {}
        self.padded_convs: dict[str, tuple[int, int]] = {}  # channels in and out, in half precision, off multiples of 8
        self.dense_gradients: dict[str, None] = {}  # modules that write out an expanded gradient, in contiguous format
        self.error: tuple[str, str, str] | None = None  # module, operator and message of the last `.view` that raised
        self._events: dict[tuple, list[int]] = {}
        self._names = {id(module): name for name, module in modules_as_written(model)}
        self._classes = {name: type(module).__name__ for name, module in modules_as_written(model)}
        self._param_shapes = {param.shape for param in model.parameters() if param.ndim in CHANNELS_LAST}
        self._images: set[torch.Size] = set()
        self._input_channels: set[int] = set()  # of the images that the model is called with
        self._known: dict[tuple[Node, int], _Image] = {}  # what modules took and handed on, by its edge of the graph
        self._owners: dict[Node, _Stretch | None] = {}
        self._stretches: list[_Stretch] = []
        self._calls: list[_Call] = []  # the modules that are running, the innermost last
        self._lost: list[str] = []  # modules that lost the format in the forward pass
        self._running_backward: _Stretch | None = None
        self._is_backward = ModuleTracker()
        self._ops: dict[tuple[str, str], str] = {}  # the last operator that wrote a tensor
        self._last_copy: _Copy | None = None
        self._mode = _Operators(self._run)
        self._higher_order = _HigherOrder(self._mode)
        self._handles: list[Any] = []

    # Results

    @property
    def events(self) -> list[FormatEvent]:
        "In the order in which they first happened."
        return [FormatEvent(*key, count, nbytes) for key, (count, nbytes) in self._events.items()]

    @property
    def channels_last_share(self) -> float | None:
        "The share, by bytes, of 4D and 5D activations and gradients in channels last; None where there were none."
        total = {"last": 0, "first": 0}
        for layer in self.layers.values():
            for (_, given), nbytes in layer.nbytes.items():
                total[given] += nbytes
        return total["last"] / sum(total.values()) if sum(total.values()) else None

    def raised(
        self,
        error: BaseException,
    ) -> bool:
        "Whether `error` is that of `self.error`."
        return self.error is not None and getattr(error, _MARK, None) is self.error

    # Who is running

    def __enter__(self):
        inside = {id(child) for module in self.model.modules() if _is_opaque(module) for child in module.modules()}

        # Functions, for a copy of a module has its hooks too: it shares them, where it would copy a method's object
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._enter_module(module, args, kwargs)

        def after(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            self._leave_module(module, output)

        def after_script(module: nn.Module, args: tuple, output: Any) -> None:
            self._leave_module(module, output)

        if torch.__version__ < "2.6":
            self._handles.append(_CastsOutside())
        try:
            for module in self.model.modules():
                if id(module) not in inside:
                    self._handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
                    self._handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
            if isinstance(self.model, torch.jit.ScriptModule):  # takes hooks on all modules, and none of its own
                self._handles.append(register_module_forward_pre_hook(partial(before, kwargs={})))
                self._handles.append(register_module_forward_hook(after_script, always_call=True))
        except BaseException:
            self._remove_hooks()
            raise
        self._higher_order.__enter__()
        self._mode.__enter__()
        return self

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __exit__(self, *exception):
        self._remove_hooks()
        for name in self._lost:
            self._layer(name).loses("forward")
        for stretch in self._stretches:
            if stretch.loses_backward():
                where = stretch.owner, "backward"
                self._layer(stretch.owner).loses("backward")
                for gradient in stretch.contiguous if not stretch.is_told else []:
                    self._add_event(where, self._ops.get(where, ""), "lost", gradient)
        self.layers = {
            name: layer for name, layer in self.layers.items() if layer.loses_in or any(layer.nbytes.values())
        }
        for held in (self._known, self._owners, self._stretches, self._calls):
            held.clear()
        self._running_backward = self._last_copy = None
        self._mode.__exit__(*exception)
        self._higher_order.__exit__(*exception)

    @property
    def _where(self) -> tuple[str, str]:
        "The name of the module whose code is running, and the phase."
        running = self._running
        if isinstance(running, _Call):
            return running.name, "forward"
        return (running.owner, "backward") if running else (OUTSIDE, "forward")

    @property
    def _running(self) -> "_Call | _Stretch | None":
        if self._calls:
            return self._calls[-1]
        return self._running_backward if self._is_backward.is_bw else None

    def _enter_module(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        name = self._names.get(id(module))
        if name is None:  # a copy is code of the module that makes it
            return
        images = _images_in((args, kwargs))
        if self._calls:
            self._end_stretch(self._calls[-1], (args, kwargs), images)
            self._calls[-1].has_children = True
        else:
            self._own_nodes((args, kwargs), None)
            self._images.update(tensor.shape for tensor in images)
            self._input_channels.update(tensor.size(1) for tensor in images)
        self._calls.append(_Call(name, self._remember(images), len(self._lost)))

    def _leave_module(self, module: nn.Module, output: Any) -> None:
        name = self._names.get(id(module))
        if name not in [call.name for call in self._calls]:  # a copy, or a hook of the caller's raised before ours
            return
        while self._calls[-1].name != name:  # ended by what is no `Exception`, after which no hook runs
            self._calls.pop()
        call = self._calls[-1]
        images = _images_in(output)
        self._end_stretch(call, output, images, is_last=True)
        self._remember(images)
        self._calls.pop()
        if self._calls and not torch.is_grad_enabled():
            self._calls[-1].is_blind = True

    def _remember(self, images: list[Tensor]) -> list["_Image"]:
        result = []
        for tensor in images:
            image = _Image(layout(tensor), tensor.shape)
            result.append(image)
            if tensor.grad_fn is not None:
                self._known[tensor.grad_fn, tensor.output_nr] = image
            elif tensor.requires_grad and torch.is_grad_enabled():
                self._known[tuple(get_gradient_edge(tensor))[:2]] = image
        return result

    def _own_nodes(self, values: Any, stretch: "_Stretch | None") -> list[Node]:
        "Say that the nodes of the graph behind `values` which belong to nobody yet are those of `stretch`."
        new = []
        todo = [tensor.grad_fn for tensor in tensors_in(values) if tensor.grad_fn is not None]
        while todo:
            node = todo.pop()
            if node in self._owners or node.name().endswith("AccumulateGrad"):
                continue
            self._owners[node] = stretch
            new.append(node)
            if stretch is not None:
                self._handles.append(node.register_prehook(lambda grads: self._enter_node(stretch)))
            todo += [following for following, _ in node.next_functions if following is not None]
        return new

    def _enter_node(self, stretch: "_Stretch") -> None:
        self._running_backward = stretch

    def own_loss(
        self,
        loss: Tensor,  # computed from what the model returned
    ) -> None:
        "Say that what `loss` was computed with, outside the model, is the loss function."
        self._own_nodes(loss, _Stretch(OUTSIDE))

    # A stretch of code as a whole, what it took and what it handed on: a loss by way of 3D is that of no operator

    def _end_stretch(self, call: "_Call", values: Any, images: list[Tensor], is_last: bool = False) -> None:
        "The code of `call` hands `values` on, to a module inside it or, at last, to the module around it."
        stretch = _Stretch(call.name)
        nodes = self._own_nodes(values, stretch)
        own = set(nodes)
        edges = [
            (node, index, edge)
            for node in nodes
            for index, edge in enumerate(node.next_functions)
            if edge[0] not in own and edge in self._known
        ]
        took = [self._known[edge] for _, _, edge in edges]
        if is_last and not call.has_children:
            took += call.inputs
        made = [tensor for tensor in images if not own or tensor.grad_fn in own]
        stretch.formats = set() if call.is_blind else {image.layout for image in took} - {None}
        if lost := self._loses(stretch.formats, took, made):
            self._add_loss(call, lost)
        elif call.losses and not (stretch.formats == {"last"} and "last" in set(map(layout, made))):
            self._lost.append(call.name)
        elif is_last and call.has_children and len(self._lost) == call.n_lost:
            formats = {image.layout for image in call.inputs} - {None}
            computed = [tensor for tensor in images if tensor.grad_fn is not None] or images  # in place of constants
            if lost := self._loses(formats, call.inputs, computed):
                self._add_loss(call, lost)
        if nodes:
            self._watch_backward(stretch, made, edges)
        call.losses, call.is_told, call.is_blind = 0, False, False

    def _loses(self, formats: set[str], took: list["_Image"], tensors: list[Tensor]) -> list[Tensor]:
        "Those of `tensors` that are contiguous images made of channels last ones."
        if formats != {"last"}:
            return []
        shapes = [image.shape for image in took]
        return [tensor for tensor in tensors if layout(tensor) == "first" and _alike(tensor.shape, shapes)]

    def _add_loss(self, call: "_Call", tensors: list[Tensor]) -> None:
        self._lost.append(call.name)
        where = call.name, "forward"
        for tensor in tensors:
            if not call.is_told:  # by an event of one of its operators; else the last one is named
                self._add_event(where, self._ops.get(where, ""), "lost", tensor)
            self._write_image(where, tensor)

    def _write_image(self, where: tuple[str, str], tensor: Tensor) -> None:
        "Count `tensor` for a module none of whose operators wrote an image, but something else that is viewed as one."
        name, phase = where
        if where in self._ops and name != OUTSIDE and self._layer(name).share(phase) is None:
            self.layers[name].nbytes[phase, layout(tensor)] = _nbytes(tensor)

    def _watch_backward(
        self,
        stretch: "_Stretch",
        made: list[Tensor],
        edges: list[tuple[Node, int, tuple[Node, int]]],  # a node, and which of its gradients goes along the edge
    ) -> None:
        "Compare the gradients that a stretch takes with those that it hands on to what was channels last."
        self._stretches.append(stretch)

        def take(index: int):
            return lambda grads: stretch.takes.add(layout(grads[index]) if grads[index] is not None else None)

        def give(index: int, edge: tuple[Node, int]):
            return lambda grads_in, grads_out: self._give_gradient(stretch, edge, grads_in[index])

        for tensor in made:
            if tensor.grad_fn is not None:
                self._handles.append(tensor.grad_fn.register_prehook(take(tensor.output_nr)))
        for node, index, edge in edges:
            if self._known[edge].layout == "last":
                self._handles.append(node.register_hook(give(index, edge)))

    def _give_gradient(self, stretch: "_Stretch", edge: tuple[Node, int], grad: Tensor | None) -> None:
        if grad is None or layout(grad) is None:
            return
        stretch.gives.setdefault(edge, set()).add(layout(grad))
        self._write_image((stretch.owner, "backward"), grad)
        if layout(grad) == "first":
            stretch.contiguous.append(torch.empty_like(grad, device="meta"))

    # One operator

    def _run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        last_copy, self._last_copy = self._last_copy, None
        try:
            result = func(*args, **kwargs)
        except RuntimeError as error:
            if VIEW_ERROR in str(error):
                self.error = self._where[0], str(func.overloadpacket), str(error)
                # On the exception itself: holding it would hold its frames, and its id goes to the next one
                setattr(error, _MARK, self.error)
            raise
        if _images_in(result):
            self._look_at(func, args, kwargs, result)
        elif last_copy and func.overloadpacket is torch.ops.aten._unsafe_view and args[0] is last_copy.result:
            self._forget_flattened(last_copy)
        elif isinstance(result, Tensor) and _memory(result) not in map(_memory, tensors_in(args)):
            self._ops[self._where] = str(func.overloadpacket)
        return result

    def _look_at(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        name = str(func.overloadpacket).rpartition(".")[2]
        operands = _images_in((args, kwargs))
        if name in _CONVOLUTIONS:
            self._look_at_convolution(func, args, operands, result)
            return
        if name in _NEW:
            return
        memory = {_memory(tensor) for tensor in tensors_in((args, kwargs))}
        for tensor in filter(_has_memory, _images_in(result)):
            in_place = any(tensor is operand for operand in operands)
            if in_place or _memory(tensor) not in memory:
                self._look_at_result(func, name, operands, tensor, in_place)
            elif name in _SLICES and operands[0].shape in self._images and _alike(tensor.shape, [operands[0].shape]):
                self._images.add(tensor.shape)

    def _look_at_result(self, func: Any, name: str, operands: list[Tensor], result: Tensor, in_place: bool) -> None:
        copies = name in _COPIES
        pointwise = torch.Tag.pointwise in func.tags and not copies
        where = self._where
        # what is written over, and was not read, is no operand
        data = [operand for operand in operands if pointwise or not (in_place and operand is result)]
        taken = {layout(operand) for operand in data if _alike(result.shape, [operand.shape], reshaped=True)} - {None}
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
        op = str(func.overloadpacket)
        if kind:
            self._add_event(where, op, kind, result)
        elif where[1] == "backward" and given == "first" and data and all(0 in operand.stride() for operand in data):
            self.dense_gradients.setdefault(where[0])
        loses = kind in ("lost", "converted") and given == "first" and result.shape not in self._param_shapes
        running = self._running
        if loses and running:
            running.losses += 1
            running.is_told = True
        counted = self._count(where, op, data, result)
        if copies:
            self._last_copy = _Copy(result, where, running if loses else None, counted)

    def _look_at_convolution(self, func: Any, args: tuple, operands: list[Tensor], result: Any) -> None:
        """Find the operands that a convolution must re-lay inside its kernel, and those with channels to be padded.

        It works in channels last where its input or its weight is, and in contiguous else: the rule of
        `cudnn_conv_suggest_memory_format` and `mkldnn_conv_use_channels_last` in PyTorch's `ATen/native/ConvUtils.h`.
        """
        op, where = str(func.overloadpacket), self._where
        is_forward = isinstance(result, Tensor)
        *_, data, weight = operands
        works_in = "last" if is_channels_last(data) or is_channels_last(weight) else "first"
        for operand in operands:
            if layout(operand) not in (None, works_in):
                self._add_event(where, op, "hidden", operand)
        written = result if is_forward else result[0]  # the other gradients are the weight's and the bias's
        if written is None:
            return
        self._images.add(written.shape)
        self._count(where, op, operands, written)
        if is_forward and data.dtype in _HALF and args[_GROUPS] == 1 and where[0] != OUTSIDE:
            c_in, c_out = data.size(1), written.size(1)
            # nobody chooses the channels of the images themselves, as the 3 of RGB
            if c_out % 8 or (c_in % 8 and c_in not in self._input_channels):
                self.padded_convs.setdefault(where[0], (c_in, c_out))

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
        given = layout(result)
        images = [tensor.shape for tensor in (*data, result) if self._is_image(tensor)]
        if _alike(result.shape, images, reshaped=True):
            self._images.add(result.shape)
        if given is None or not result.is_floating_point() or result.shape not in self._images or name == OUTSIDE:
            return 0
        layer = self._layer(name)
        layer.nbytes[phase, given] = layer.nbytes.get((phase, given), 0) + _nbytes(result)
        return _nbytes(result)

    def _is_image(self, tensor: Tensor) -> bool:
        "Whether `tensor` has a shape that images have, or lies as only they do: (B, N, C) in attention does not."
        return tensor.shape in self._images or (layout(tensor) == "last" and tensor.shape not in self._param_shapes)

    def _layer(self, name: str) -> LayerFormat:
        return self.layers.setdefault(name, LayerFormat(name, self._classes[name]))

    def _forget_flattened(self, last_copy: "_Copy") -> None:
        "The last copy was half of a reshape to something that is no image: it is none either, and loses nothing."
        if last_copy.loses:
            last_copy.loses.losses -= 1
        if last_copy.counted:
            name, phase = last_copy.where
            self.layers[name].nbytes[phase, layout(last_copy.result)] -= last_copy.counted


def modules_as_written(
    model: nn.Module,
) -> Iterator[tuple[str, nn.Module]]:
    "Its `named_modules`; the wrapper that `torch.compile` puts around a module has the name of that module, before it."
    for name, module in model.named_modules():
        yield ".".join(part for part in name.split(".") if part != "_orig_mod"), module


def _is_opaque(module: nn.Module) -> bool:
    "Whether the modules inside run as code of the module around them: a script takes no hooks, a weight is no image."
    return isinstance(module, (torch.jit.ScriptModule, ParametrizationList))


def _is_higher_order(func: Any) -> bool:
    return getattr(func, "namespace", None) == "higher_order"


class _Operators(TorchDispatchMode):
    "Runs each operator by `run`."

    # Those that nobody sees through (there is no plain code, or a mode of the model's own lies on top) run as they are.
    # (The attribute counts from PyTorch 2.9 on.)
    supports_higher_order_operators = True

    def __init__(self, run: Callable[[Any, tuple, dict], Any]):
        super().__init__()
        self.run = run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _is_higher_order(func):
            return func(*args, **(kwargs or {}))
        return self.run(func, args, kwargs or {})


class _HigherOrder(TorchFunctionMode):
    """Run higher-order operators as the plain code that they stand for, below a mode that watches its operators.

    `torch.cond` calls one of its functions, `while_loop` one again and again, in code that PyTorch has for where there
    is neither a compiler nor a mode. With autograd on it gives the gradients of a plain step. What PyTorch does instead
    under a mode, it traces those functions with fake tensors, which fails where they use a module's weights.
    """

    def __init__(self, watching: TorchDispatchMode):
        super().__init__()
        self.watching = watching

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        plain = _plain_code(func) if _is_higher_order(func) and self._is_innermost() else None
        if plain is None:
            return func(*args, **kwargs)
        args = [self._watched(arg) for arg in args]
        kwargs = {name: self._watched(arg) for name, arg in kwargs.items()}
        self.watching.__exit__(None, None, None)  # the plain code refuses to run below a mode
        try:
            return plain(*args, **kwargs)
        finally:
            self.watching.__enter__()

    def _is_innermost(self) -> bool:
        "Whether no mode of the model's own lies on top. It would be taken off in the place of ours."
        innermost = getattr(_python_dispatch, "_get_current_dispatch_mode", lambda: self.watching)
        return innermost() is self.watching

    def _watched(self, arg: Any) -> Any:
        if not callable(arg) or isinstance(arg, Tensor):
            return arg

        def call(*args, **kwargs):
            with self, self.watching:
                return arg(*args, **kwargs)

        return call


def _plain_code(higher_order: Any) -> Callable[..., Any] | None:
    "What PyTorch calls for the operator in the end, where it calls Python."
    kernels = getattr(higher_order, "py_kernels", {})
    return next((kernel for key, kernel in kernels.items() if key.name == "CompositeExplicitAutograd"), None)


class _CastsOutside:
    "Casts to subclasses of Tensor outside dispatch modes, until `remove`: before PyTorch 2.6 they raise inside of one."

    def __init__(self):
        from torch.utils._mode_utils import no_dispatch  # here, for it is private and these versions alone need it

        self.cast = Tensor.as_subclass

        def as_subclass(tensor: Tensor, cls: type) -> Tensor:
            with no_dispatch():
                return self.cast(tensor, cls)

        Tensor.as_subclass = as_subclass

    def remove(self) -> None:
        Tensor.as_subclass = self.cast


class _Image(NamedTuple):
    "What is remembered of a 4D or 5D tensor."

    layout: str | None
    shape: torch.Size


@dataclass
class _Call:
    "A module that is running."

    name: str
    inputs: list[_Image]
    n_lost: int  # losses in the step when it was entered
    has_children: bool = False
    is_blind: bool = False  # a child ran without a graph, as in a checkpoint: who took what is not known
    # since a child last ran:
    losses: int = 0  # operators that gave up channels last
    is_told: bool = False  # an event tells of one


@dataclass(eq=False)
class _Stretch:
    "Code of one module that runs without another in between, as its nodes in the graph have it, in the backward pass."

    owner: str
    formats: set[str] = field(default_factory=set)  # of the images that it took in the forward pass
    takes: set[str | None] = field(default_factory=set)  # layouts of the gradients
    # of those that it hands on to what was channels last; they add up where there are several for one tensor
    gives: dict[tuple[Node, int], set[str]] = field(default_factory=dict)
    contiguous: list[Tensor] = field(default_factory=list)  # those that are, without their memory
    losses: int = 0
    is_told: bool = False

    def loses_backward(self) -> bool:
        takes = self.takes - {None}
        if takes == {"last"} and self.gives:
            return {"first"} in self.gives.values()
        # the gradient of what was made from contiguous images is contiguous rightly
        return self.losses > 0 and self.formats != {"first"}


class _Copy(NamedTuple):
    "The last copy, which may be that of a reshape."

    result: Tensor
    where: tuple[str, str]
    loses: _Call | _Stretch | None  # where its loss was counted
    counted: int  # bytes that were


def tensors_in(
    values: Any,  # a tensor, or tuples, lists, dicts and dataclasses of tensors, nested in any way
) -> list[Tensor]:
    "The tensors in `values`, in their order."
    return list(_iter_tensors(values, ()))


def _iter_tensors(values: Any, around: tuple[int, ...]) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
        return
    if isinstance(values, (tuple, list)):
        inside = values
    elif isinstance(values, Mapping):
        inside = values.values()
    elif is_dataclass(values) and not isinstance(values, type):
        inside = [getattr(values, each.name) for each in fields(values)]
    else:
        return
    if id(values) not in around:  # else it holds itself, as a node of a tree may by way of its children
        for value in inside:
            yield from _iter_tensors(value, (*around, id(values)))


def _images_in(values: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(values) if tensor.ndim in CHANNELS_LAST and not tensor.is_nested]


def layout(
    tensor: Tensor,
) -> str | None:
    "'last' or 'first', after where the strides put the channels; None for what is both at once, or expanded."
    if tensor.ndim not in CHANNELS_LAST or tensor.is_nested or tensor.layout != torch.strided:
        return None
    sizes, strides = tensor.shape, tensor.stride()
    if tensor.numel() == 0 or sizes[1] == 1 or max(sizes[2:]) == 1:
        return None
    if any(stride == 0 and size > 1 for size, stride in zip(sizes, strides, strict=True)):
        return None
    try:
        is_dense = tensor.is_contiguous(
            memory_format=CHANNELS_LAST[tensor.ndim]
        )  # whatever the stride of a batch of one
    except RuntimeError:  # inside `torch.vmap`, where PyTorch does not tell
        return None
    return "last" if is_dense or is_channels_last(tensor) else "first"


def _alike(shape: torch.Size, others: Iterable[torch.Size], reshaped: bool = False) -> bool:
    "Whether an image of `shape` can come of one of the others: the same channels, or the same pixels."
    for other in others:
        if len(other) != len(shape):
            continue
        if other[1] == shape[1] or other[2:] == shape[2:]:
            return True
        if reshaped and other.numel() == shape.numel():  # as pixel shuffle trades channels for pixels
            return True
    return False


def _has_memory(tensor: Tensor) -> bool:
    "Whether its values lie where its strides say: not those of a sparse tensor, or of one that wraps others."
    return tensor.layout == torch.strided and tensor.data_ptr() != 0


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if _has_memory(tensor) else id(tensor)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
